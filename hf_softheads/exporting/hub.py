"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hf_softheads.files import human_bytes
from hf_softheads.report.tables import Table

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_MODELS = ("config.json", "adapter_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Upload:
    """What `push` would upload; prints as a table and the card."""

    repo: str
    files: tuple[tuple[str, int], ...]
    card: str | None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        table = Table(["file", "size"])
        for name, size in self.files:
            table.add(name, human_bytes(size))
        table.add(f"{len(self.files)} files for {self.repo}", human_bytes(self.nbytes))
        card = (
            "there is no card: `softheads card FOLDER` writes one"
            if self.card is None
            else self.card
        )
        return f"{table}\n\n{card}"


def prepare_upload(folder: str | Path, repo: str) -> Upload:
    """The files of a folder that would be uploaded; nothing is sent.

    Raises:
        ValueError: `repo` is no OWNER/NAME, or the folder holds no model, pickles, or half of an export.
        OSError: there is no such folder.
    """
    folder = Path(folder)
    if re.fullmatch(_REPO, repo) is None:
        raise ValueError(
            f"a repository is OWNER/NAME of letters, digits, '-', '_' and '.', got {repo!r}"
        )
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise NotADirectoryError(
            f"{folder} is {kind}; give the folder that `softheads export` wrote"
        )
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p, folder)]
    names = [str(path.relative_to(folder)) for path in paths]
    if not any(name in _MODELS or name.endswith(".gguf") for name in names):
        raise ValueError(
            f"{folder} holds no model (no {', no '.join(_MODELS)}, no GGUF file); give a folder that "
            "`softheads export` wrote"
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise ValueError(
            f"{folder} holds pickles, which run code where they are loaded: {', '.join(pickles[:3])}; take them out"
        )
    if half := [name for name in names if ".writing" in name]:
        raise ValueError(f"{folder} holds a half-written file: {half[0]}; export it again")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    return Upload(
        repo, tuple((n, p.stat().st_size) for n, p in zip(names, paths, strict=True)), text
    )


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder to a repository, which is made if it is not there; its address.

    Raises:
        ValueError, OSError: as `prepare_upload`.
        PermissionError: there is no token, or it has no right to write there.
        ConnectionError: the Hub cannot be reached, or answers with an error.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    upload = prepare_upload(folder, repo)
    if huggingface_hub.get_token() is None:
        raise PermissionError(
            "there is no token for the Hub; run `hf auth login`, or look at the upload with --dry-run"
        )
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[name for name, _ in upload.files]
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"this token has no right to write to {repo}; make one with write access at "
                "huggingface.co/settings/tokens"
            ) from error
        raise ConnectionError(f"the Hub refused the upload to {repo}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or give --dry-run"
        ) from error
    return str(url)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)

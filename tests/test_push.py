"""`softheads push`: what a dry run shows, what is uploaded, what is refused before anything is sent."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_softheads.cli import main
from hf_softheads.exporting import hub


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "out"
    (place / ".cache").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(bytes(2048))
    (place / "README.md").write_text("# The card\n")
    (place / ".cache" / "lock").write_text("")
    return place


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What the Hub was asked for; `answer` is raised instead if it is set."""
    made = {"answer": None, "asked": []}

    class Api:
        def create_repo(self, repo, **options):
            if made["answer"] is not None:
                raise made["answer"]
            made["asked"].append(("create", repo, options))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, **options):
            made["asked"].append(("upload", options["repo_id"], options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return made


def test_a_dry_run_needs_no_token_and_sends_nothing(folder, calls, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "config.json" in printed
    assert "2.0 KiB" in printed
    assert "3 files for me/model" in printed
    assert "# The card" in printed
    assert ".cache" not in printed
    assert calls["asked"] == []
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    assert "there is no card: `softheads card FOLDER` writes one" in capsys.readouterr().out


def test_what_the_dry_run_shows_is_uploaded(folder, calls, capsys):
    assert main(["push", str(folder), "me/model", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/model\n"
    (create, _, made), (upload, _, sent) = calls["asked"]
    assert (create, upload) == ("create", "upload")
    assert made == {"exist_ok": True, "private": True}
    shown = [name for name, _ in hub.prepare_upload(folder, "me/model").files]
    assert sent["allow_patterns"] == shown == ["README.md", "config.json", "model.safetensors"]


def test_a_gguf_folder_is_a_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert hub.prepare_upload(tmp_path, "me/model").nbytes == 4


class Response:
    def __init__(self, status_code):
        self.headers, self.request, self.status_code = {}, None, status_code


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HfHubHTTPError("no", response=Response(403)), "no right to write to me/model; make one"),
        (HfHubHTTPError("no", response=Response(401)), "no right to write to me/model; make one"),
        (HfHubHTTPError("full", response=Response(507)), "refused the upload to me/model: full"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so nothing can be uploaded"),
    ],
)
def test_what_the_hub_refuses_is_one_line(answer, message, folder, calls, capsys):
    calls["answer"] = answer
    assert main(["push", str(folder), "me/model"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("softheads push: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("out model", "a repository is OWNER/NAME of letters"),
        ("out me/my/model", "got 'me/my/model'"),
        ("out m!e/model", "got 'm!e/model'"),
        ("nowhere me/model", "nowhere is not there; give the folder that"),
        ("out/config.json me/model", "config.json is a file; give the folder that"),
        ("out/.cache me/model", "holds no model (no config.json, "),
    ],
)
def test_wrong_input_sends_nothing(command, message, folder, calls, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for options in ([], ["--dry-run"]):
        assert main(["push", *command.split(), *options]) == 2
        assert message in capsys.readouterr().err
    assert calls["asked"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.bin", "holds pickles, .*: optimizer.bin"),
        ("a.writing.json", "half-written file"),
    ],
)
def test_files_that_are_never_uploaded(name, message, folder, calls):
    (folder / name).write_text("")
    with pytest.raises(ValueError, match=message):
        hub.push(folder, "me/model")
    assert calls["asked"] == []


def test_no_token(folder, calls, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(PermissionError, match="no token for the Hub; run `hf auth login`"):
        hub.push(folder, "me/model")
    assert calls["asked"] == []

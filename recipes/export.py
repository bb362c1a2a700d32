"""Export a finished run: safetensors, tokenizer, results and a model card in one folder, optionally to the Hub.

python recipes/export.py --run runs/repair --output exported/my-model [--push-to-hub owner/name]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_softheads  # noqa: F401 - its plan in config.json is understood from here on
from hf_softheads.exporting import export
from hf_softheads.files import write_json
from hf_softheads.plan import plan_of

RESULTS = "results.json"


def save(model: Any, tokenizer: Any, folder: Path, results: Mapping[str, Any]) -> None:
    """A folder that `from_pretrained` loads; with a model card where the model is patched.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    if plan_of(model) is not None:
        export(model, folder, tokenizer, results)
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not empty; choose another folder or remove it"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "softheads_results.json", results)


def export_run(run: Path, folder: Path, hub: str | None = None) -> Path:
    """Load what `finetune.py` left in `run` and write it to `folder`; with `hub` also upload that folder.

    Raises:
        FileNotFoundError: `run` is no finished run.
    """
    if not (run / RESULTS).is_file():
        state = (
            "not finished yet"
            if (run / "experiment.json").is_file()
            else "not a run of finetune.py"
        )
        raise FileNotFoundError(f"{run} is {state}: it has no {RESULTS}")
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    save(model, tokenizer, folder, {**results, "repo": hub or folder.name})
    if hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(hub, exist_ok=True)
        api.upload_folder(repo_id=hub, folder_path=folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the --output of finetune.py")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as well")
    arguments = parser.parse_args()
    print(export_run(arguments.run, arguments.output, arguments.push_to_hub))


if __name__ == "__main__":
    main()

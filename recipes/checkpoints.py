"""Checkpoints of an accelerate run: whole or not at all, the last few kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PROGRESS = "progress.json"


def save(
    accelerator: Accelerator, folder: Path, step: int, progress: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step_000100` under another name, then rename it; remove all but the last `keep`."""
    target = folder / f"step_{step:06d}"
    fresh = target.with_name(target.name + ".writing")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed here
        fresh.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (fresh / PROGRESS).write_text(json.dumps({**progress, "step": step}))
        shutil.rmtree(target, ignore_errors=True)  # the same step, saved by a run that was stopped
        fresh.rename(target)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = folder.glob("step_*/" + PROGRESS)
    return sorted(path.parent for path in found if not path.parent.name.endswith(".writing"))


def restore(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint into the prepared objects and give its progress; None if there is none."""
    found = complete(folder)
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    progress: dict[str, Any] = json.loads((found[-1] / PROGRESS).read_text())
    return progress

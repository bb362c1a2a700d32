"""hf_softheads: retrofit pretrained Transformers with other output heads and other attention softmaxes.

import hf_softheads as sh
sh.patch(model, head=sh.heads.VQ(codes=4096), attention=sh.attention.SSMax())
model.save_pretrained("out")  # loads with AutoModelForCausalLM.from_pretrained after `import hf_softheads`

`import hf_softheads` imports neither torch nor transformers: a public name is imported when it is first used, and what
transformers needs to load a patched folder when transformers imports its own quantizers.
"""

import importlib

from hf_softheads.imports import after_import
from hf_softheads.version import __version__ as __version__

_PUBLIC = {  # as `pkgutil.resolve_name` takes it
    "Objective": "hf_softheads.training.objective:Objective",
    "SoftheadsConfig": "hf_softheads.config:SoftheadsConfig",
    "attention": "hf_softheads.attention",
    "choose": "hf_softheads.measure.choose:choose",
    "classifiers": "hf_softheads.classifiers",
    "collect": "hf_softheads.measure.calibration:collect",
    "decoding": "hf_softheads.decoding",
    "describe": "hf_softheads.report.describe:describe",
    "diagnose": "hf_softheads.measure.diagnostics:diagnose",
    "embedded": "hf_softheads.text.embedded",
    "embeddings": "hf_softheads.embeddings",
    "evaluate": "hf_softheads.measure.evaluation:evaluate",
    "export": "hf_softheads.exporting:export",
    "heads": "hf_softheads.heads",
    "losses": "hf_softheads.losses",
    "patch": "hf_softheads.patching:patch",
    "repair_head": "hf_softheads.training.distill_head:repair_head",
    "trainer_loss": "hf_softheads.training.trainer_loss:trainer_loss",
    "unpatch": "hf_softheads.patching:unpatch",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    import pkgutil

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = pkgutil.resolve_name(_PUBLIC[name])
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import(
    "transformers.quantizers.auto", lambda: importlib.import_module("hf_softheads.checkpoint")
)

"""hf_softheads: retrofit pretrained Transformers with other output heads and other attention softmaxes.

import hf_softheads as sh
sh.patch(model, head=sh.heads.VQ(codes=4096), attention=sh.attention.SSMax())
model.save_pretrained("out")  # loads with AutoModelForCausalLM.from_pretrained after `import hf_softheads`
"""

from hf_softheads import attention, classifiers, embeddings, heads, losses
from hf_softheads.checkpoint import SoftheadsQuantizer as _SoftheadsQuantizer  # noqa: F401 - registers itself
from hf_softheads.config import SoftheadsConfig
from hf_softheads.export import export
from hf_softheads.measure.calibration import collect
from hf_softheads.measure.choose import choose
from hf_softheads.measure.diagnostics import diagnose
from hf_softheads.measure.evaluation import evaluate
from hf_softheads.patching import patch, unpatch
from hf_softheads.report.describe import describe
from hf_softheads.text import embedded
from hf_softheads.training.distill_head import repair_head
from hf_softheads.training.objective import Objective
from hf_softheads.training.trainer_loss import trainer_loss
from hf_softheads.version import __version__ as __version__

__all__ = [
    "Objective",
    "SoftheadsConfig",
    "attention",
    "choose",
    "classifiers",
    "collect",
    "describe",
    "diagnose",
    "embedded",
    "embeddings",
    "evaluate",
    "export",
    "heads",
    "losses",
    "patch",
    "repair_head",
    "trainer_loss",
    "unpatch",
]

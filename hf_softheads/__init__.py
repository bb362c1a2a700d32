"""hf_softheads: retrofit pretrained Transformers with other output heads and other attention softmaxes.

import hf_softheads as sh
sh.patch(model, head=sh.heads.VQ(codes=4096), attention=sh.attention.SSMax())
model.save_pretrained("out")  # loads with AutoModelForCausalLM.from_pretrained after `import hf_softheads`
"""

from hf_softheads import attention, bridge, confidence, data, embedded, heads, losses
from hf_softheads.checkpoint import SoftheadsQuantizer as _SoftheadsQuantizer  # noqa: F401 - registers itself
from hf_softheads.choose import Choice, choose
from hf_softheads.config import SoftheadsConfig
from hf_softheads.description import describe
from hf_softheads.diagnostics import Diagnostics, diagnose
from hf_softheads.evaluation import Evaluation, evaluate
from hf_softheads.head_diagnostics import HeadDiagnostics
from hf_softheads.objective import Objective, trainer_loss
from hf_softheads.patching import dense_head, patch, unpatch
from hf_softheads.repair import Repair, repair_head
from hf_softheads.results import provenance
from hf_softheads.stats import HeadStats, collect

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Diagnostics",
    "Evaluation",
    "HeadDiagnostics",
    "HeadStats",
    "Objective",
    "Repair",
    "SoftheadsConfig",
    "attention",
    "bridge",
    "choose",
    "collect",
    "confidence",
    "data",
    "dense_head",
    "describe",
    "diagnose",
    "embedded",
    "evaluate",
    "heads",
    "losses",
    "patch",
    "provenance",
    "repair_head",
    "trainer_loss",
    "unpatch",
]

# Written by `make docs`.
__version__: str
from hf_softheads import attention as attention
from hf_softheads import classifiers as classifiers
from hf_softheads import decoding as decoding
from hf_softheads import embeddings as embeddings
from hf_softheads import heads as heads
from hf_softheads import losses as losses
from hf_softheads.config import SoftheadsConfig as SoftheadsConfig
from hf_softheads.exporting import export as export
from hf_softheads.measure.calibration import collect as collect
from hf_softheads.measure.choose import choose as choose
from hf_softheads.measure.diagnostics import diagnose as diagnose
from hf_softheads.measure.evaluation import evaluate as evaluate
from hf_softheads.patching import patch as patch
from hf_softheads.patching import unpatch as unpatch
from hf_softheads.report.describe import describe as describe
from hf_softheads.text import embedded as embedded
from hf_softheads.training.distill_head import repair_head as repair_head
from hf_softheads.training.objective import Objective as Objective
from hf_softheads.training.trainer_loss import trainer_loss as trainer_loss

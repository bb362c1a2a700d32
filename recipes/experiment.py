"""Everything that decides the result of `finetune.py`, as one JSON file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hf_softheads.heads.base import HeadSpec
from hf_softheads.losses.base import LossSpec
from hf_softheads.registry import Spec, spec_from_dict
from hf_softheads.text.embedded import NAME as EMBEDDED
from hf_softheads.text.packing import Packing


@dataclass(frozen=True)
class Experiment(Spec, kind="experiment", name="experiment"):
    """Everything that decides the result. A folder of another experiment is refused.

    model: `embedded`, a Hub id, or a folder (patched or not); `head`, `attention`: what to patch first.
    train: `head` (the body is frozen), `lora` (adapters on the body; a replaced head and attention wholly), `full`.
    losses: `{"kl": 1.0}` or `[{"name": "kl", "temperature": 2.0, "weight": 1.0}, …]`; default `kl` for `head`, else
        `cross_entropy`. teacher: a model for distillation losses; default the model before it is patched here (for
        `head` its head, on the same hidden states). backend: see `Objective`.
    data, split, text_column, streaming: see `text.documents.read`; eval_data, eval_split: the same for held-out text.
    packing: see `text.packing.rows`. window: tokens a row; batch: rows an optimizer step over all processes;
        micro_batch: rows a forward pass of one process (0: all it has).
    optimizer: AdamW, or AdamW behind ⊥Grad. warmup: share of the steps. schedule: how the rate falls to zero.
    precision: of the computation; `auto` is bf16 where the hardware has it. dtype: of the weights.
    calibration_tokens: for `sh.collect` before the head is fitted.
    eval_every, checkpoint_every: in steps, 0 for never; keep: how many checkpoints.
    """

    model: str = EMBEDDED
    head: HeadSpec | None = None
    attention: Any = None
    train: Literal["head", "lora", "full"] = "head"
    losses: Any = None
    teacher: str | None = None
    backend: str | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    dora: bool = False
    data: str = "stdlib"
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    eval_data: str | None = None
    eval_split: str | None = None
    packing: Packing = "documents"
    window: int = 512
    batch: int = 8
    micro_batch: int = 0
    steps: int = 200
    lr: float = 1e-3
    optimizer: Literal["adamw", "orthograd"] = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    calibration_tokens: int = 131_072
    eval_tokens: int = 65_536
    eval_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    tracker: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "window", "keep"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        self.weighted_losses()

    def weighted_losses(self) -> dict[LossSpec, float]:
        given = self.losses or ({"kl": 1.0} if self.train == "head" else {"cross_entropy": 1.0})
        if isinstance(given, dict):
            given = [{"name": name, "weight": weight} for name, weight in given.items()]
        found: dict[LossSpec, float] = {}
        for entry in given:
            entry = {"name": entry} if isinstance(entry, str) else dict(entry)
            weight = float(entry.pop("weight", 1.0))
            found[spec_from_dict("loss", entry)] = weight
        return found

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }[self.schedule]

"""`transformers.Trainer` with an Objective, and loss curves of patched against untouched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_softheads as sh
from hf_softheads.attention import Softmax
from hf_softheads.heads import VQ, Dense
from hf_softheads.plan import dense_head
from tests.conftest import VOCAB, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def data(rows: int = 48, length: int = 20) -> Tensor:
    """Text with something to learn: each token mostly follows from the one before."""
    g = torch.Generator().manual_seed(0)
    follows = torch.randperm(VOCAB - 3, generator=g) + 3
    ids = torch.empty(rows, length, dtype=torch.long)
    ids[:, 0] = torch.randint(3, VOCAB, (rows,), generator=g)
    for t in range(1, length):
        jump = torch.rand(rows, generator=g) < 0.1
        ids[:, t] = follows[ids[:, t - 1] - 3]
        ids[jump, t] = torch.randint(3, VOCAB, (int(jump.sum()),), generator=g)
    return ids


def train(model: Any, folder: Path) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    examples: Any = [{"input_ids": row, "labels": row} for row in data()]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:8]
    )
    trainer.train()
    evaluated = trainer.evaluate()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*curve, evaluated["eval_loss"]]


def test_trainer_with_an_objective_trains_as_without(tmp_path: Path) -> None:
    expected = train(make_model("llama"), tmp_path / "a")
    model = make_model("llama")
    sh.trainer_loss(model)
    assert train(model, tmp_path / "b") == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


def test_trainer_with_a_teacher_and_a_patched_head(tmp_path: Path) -> None:
    model = make_model("llama")
    sh.patch(model, head=VQ(codes=40))
    goal = sh.trainer_loss(model, {"cross_entropy": 1.0, "kl": 0.5}, dense_head(model))
    curve = train(model, tmp_path)
    assert curve[5] < curve[0]
    assert set(goal.parts) == {"cross_entropy", "kl"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_the_patched_control_converges_as_the_untouched_model(family: str, tied: bool) -> None:
    """Dense head + softmax + Objective against the family's own loss: 20 steps, fp32, the same curve.

    A new head unties the embeddings; tied ones keep theirs, and its gradient joins that of the embeddings.
    """
    rows = data()
    curves: list[list[float]] = []
    for patched in (False, True):
        model = make_model(family, tie_word_embeddings=tied).train()
        if patched:
            sh.patch(model, head=None if tied else Dense(), attention=Softmax())
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        goal = sh.Objective(model, {"cross_entropy": 1.0}, memory=7 * VOCAB * 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        curve = []
        for step in range(20):
            batch = rows[step % 6 * 8 : step % 6 * 8 + 8]
            if patched:
                loss = goal(input_ids=batch, labels=batch)
            else:
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(curve)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)

"""`transformers.Trainer` on a patched model: accumulated gradients, evaluation, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.clients.samples import HEADS, patched
from tests.conftest import VOCAB

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def rows(count: int = 16, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Random tokens; each row has another number of labels."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = tokens.clone()
        labels[: number % (length - 2)] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def trainer_for(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    data: Any = rows()
    settings = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data)


def curve(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.client(
    "trainer",
    works="gradient accumulation counts labels over the whole batch (`num_items_in_batch`), without logits",
)
@pytest.mark.parametrize("name", ["dense", "vq", "quantized", "hierarchical"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, tmp_path):
    curves, weights = [], []
    for size, steps in ((4, 1), (1, 4)):
        model = patched(name)
        seen: list[bool] = []
        hook = model.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[-1].logits is None)
        )
        trainer = trainer_for(
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        trainer.train()
        hook.remove()
        assert len(seen) == 2 * steps
        assert all(seen)
        curves.append(curve(trainer))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)


@pytest.mark.client("trainer", works="the evaluation loss is that of the logits, under every head")
@pytest.mark.parametrize("name", HEADS)
def test_evaluation_loss(name, tmp_path):
    model = patched(name)
    found = trainer_for(model, tmp_path, per_device_eval_batch_size=4).evaluate()["eval_loss"]
    expected = []
    for start in range(0, 16, 4):
        batch = rows()[start : start + 4]
        with torch.no_grad():
            logits = model(torch.stack([row["input_ids"] for row in batch])).logits
        labels = torch.stack([row["labels"] for row in batch])
        expected.append(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        )
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.mark.client(
    "trainer", works="`save_steps`, `resume_from_checkpoint`: the same losses as without a break"
)
@pytest.mark.parametrize("name", ["dense", "vq", "quantized"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(patched(name), tmp_path, **options)
    whole.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert type(loaded.lm_head).__name__ == type(patched(name).lm_head).__name__
    resumed = trainer_for(patched(name), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(resumed) == pytest.approx(curve(whole), rel=1e-5)
    assert len(curve(resumed)) == 4
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)

"""lm-evaluation-harness on a patched model: the numbers of an offline task are those of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.clients.samples import patched, tokenizer
from tests.conftest import VOCAB

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-eval lacks something that it needs"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own, of whatever version


def questions() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        drawn = torch.randint(0, VOCAB - 3, (count,), generator=generator)
        return " ".join(f"w{word}" for word in drawn.tolist())

    return [
        {"question": words(6), "choices": [words(1 + n % 3) for n in range(4)], "answer": row % 4}
        for row in range(6)
    ]


def task() -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": "toy",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(questions())},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}],
        }
    )


@torch.no_grad()
def by_logits(model: Any, words: Any) -> tuple[list[list[float]], float]:
    """Log-likelihoods of all choices, and the accuracy."""
    found, right = [], 0
    for row in questions():
        context = words(row["question"]).input_ids
        scores = []
        for choice in row["choices"]:
            rest = words(choice).input_ids
            logits = model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1]
            chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(rest)[:, None])
            scores.append(float(chosen.sum()))
        right += scores.index(max(scores)) == row["answer"]
        found.append(scores)
    return found, right / len(found)


@pytest.mark.client(
    "lm-eval",
    works="`HFLM(pretrained=model)`: log-likelihoods and accuracy are those of the logits",
)
@pytest.mark.parametrize("name", ["dense", "vq", "quantized", "hierarchical", "sigsoftmax"])
def test_a_multiple_choice_task(name):
    model, words = patched(name), tokenizer()
    harness = huggingface.HFLM(pretrained=model, tokenizer=words, batch_size=3, device="cpu")
    result = lm_eval.simple_evaluate(
        harness,
        tasks=[task()],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # those take a minute
        log_samples=True,
        bootstrap_iters=0,
    )
    expected, accuracy = by_logits(model, words)
    assert result["results"]["toy"]["acc,none"] == pytest.approx(accuracy)
    found = [
        [float(answer[0]) for answer in sample["filtered_resps"]]
        for sample in sorted(result["samples"]["toy"], key=lambda sample: sample["doc_id"])
    ]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)

"""TRL's trainers on models with patched heads: the same losses as from whole logits."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_softheads as sh
from hf_softheads.heads import VQ, Dense, Quantized
from hf_softheads.heads.base import HeadSpec
from hf_softheads.registry import variants
from tests.conftest import make_model

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install hf_softheads[trl]")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(fused LM head|full logits).*:FutureWarning"),
]

NAMES = sorted(variants("head"))
VOCAB, DIM = 256, 16
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w1 {% generation %}{{ m['content'] }} w2"
    "{% endgeneration %}{% else %}w0 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def dense() -> Any:
    model = make_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def patched(dense: Any) -> Callable[..., Any]:
    """A new model with a head, by its spec or by the name of its family; every head is fitted once."""
    tokens = torch.randint(4, VOCAB, (24, 32), generator=torch.Generator().manual_seed(1))
    stats = sh.collect(dense, tokens)

    @functools.cache
    def fitted(spec: HeadSpec) -> Any:
        return sh.patch(copy.deepcopy(dense), head=spec, stats=stats)

    def make(spec: HeadSpec | str) -> Any:
        if isinstance(spec, str):
            ladder = variants("head")[spec].ladder(DIM, VOCAB)  # type: ignore[attr-defined]
            spec = ladder[len(ladder) // 2]
        return copy.deepcopy(fitted(spec))

    return make


def text(seed: int, length: int) -> str:
    ids = torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def chats(rows: int = 8) -> Dataset:
    def chat(i: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": text(i, 4 + i % 3)},
            {"role": "assistant", "content": text(100 + i, 3 + i % 4)},
        ]

    return Dataset.from_list([{"messages": chat(i)} for i in range(rows)])


def pairs(rows: int = 4) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": text(i, 5),
                "chosen": f" {text(50 + i, 4)}",
                "rejected": f" {text(90 + i, 6)}",
            }
            for i in range(rows)
        ]
    )


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        **more,
    }


def log_of(trainer: Any) -> dict[str, float]:
    trainer.train()
    found: dict[str, float] = next(e for e in trainer.state.log_history if "loss" in e)
    return found


def loss_from_logits(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean over all labelled tokens of `-log softmax(logits)[label]`, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            log_p = model(**inputs).logits[:, :-1].double().log_softmax(-1)
            labels = batch["labels"][:, 1:]
            kept = labels != -100
            total -= float(log_p[kept].gather(-1, labels[kept].unsqueeze(-1)).sum())
            count += int(kept.sum())
    return total / count


# -- the fused head ------------------------------------------------------------


@pytest.mark.client(
    "trl",
    works="the fused head (`add_fused_lm_head`) of every head: loss, log-probability, entropy as from logits",
)
@pytest.mark.parametrize("name", NAMES)
def test_fused_outputs_are_those_of_the_logits(name: str, patched: Any) -> None:
    model = patched(name)
    ids = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :5] = -100
    z = model(ids).logits[:, :-1] / 0.7
    plain = model(ids, labels=labels).loss
    add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    assert torch.equal(model(ids, labels=labels).loss, plain)  # unless asked, nothing changes
    found = model(ids, labels=labels, fused_lm_head=True)
    kept = labels[:, 1:] != -100
    assert torch.equal(found.label_mask, kept)
    log_p = z.log_softmax(-1)
    own = log_p.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    wanted = {
        "log_probs": own,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == ids[:, 1:],
    }
    for field, value in wanted.items():
        close = {"rtol": 1e-4, "atol": 1e-5, "msg": lambda m, f=field: f"{f}: {m}"}
        torch.testing.assert_close(found[field], value.masked_fill(~kept, 0), **close)
    loss = -own[kept].mean()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(found.loss, trained, allow_unused=True)
    whole = torch.autograd.grad(loss, trained, allow_unused=True)
    for a, b in zip(grads, whole, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.client("trl", works="soft caps and scales of the family in the fused head")
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "gpt2"])
def test_fused_head_knows_what_the_family_does_to_its_logits(family: str, tokens: Tensor) -> None:
    model = sh.patch(make_model(family), head=VQ(24))
    add_fused_lm_head(model)
    wanted = model(tokens, labels=tokens).loss
    assert model(tokens, labels=tokens, fused_lm_head=True).loss.item() == pytest.approx(
        wanted.item(), rel=1e-4
    )


@pytest.mark.client("trl", works="the router loss beside the fused head")
def test_fused_head_adds_the_router_loss(tokens: Tensor) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    model = sh.patch(AutoModelForCausalLM.from_config(config).eval(), head=VQ(24))
    add_fused_lm_head(model)
    found = model(tokens, labels=tokens, fused_lm_head=True)
    wanted = model(tokens, labels=tokens)
    assert found.aux_loss.item() > 0.5
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-4)


def test_a_fused_head_given_before_the_patch(dense: Any) -> None:
    model = copy.deepcopy(dense)
    ids = torch.arange(4, 16)[None]
    add_fused_lm_head(model)
    before, forward = model(ids, labels=ids, fused_lm_head=True).loss, model.forward
    sh.patch(model, head=VQ(32))
    wanted = model(ids, labels=ids).loss
    found = model(ids, labels=ids, fused_lm_head=True).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    sh.unpatch(model)
    assert model.forward == forward
    assert torch.equal(model(ids, labels=ids, fused_lm_head=True).loss, before)


def test_unpatching_gives_trl_its_own_forward_back(dense: Any) -> None:
    model = sh.patch(copy.deepcopy(dense), head=VQ(32))
    ids = torch.arange(4, 16)[None]
    add_fused_lm_head(model)
    sh.unpatch(model)
    found = model(ids, labels=ids, fused_lm_head=True).loss
    assert found.item() == pytest.approx(dense(ids, labels=ids).loss.item(), rel=1e-4)


@pytest.mark.client(
    "trl", refused="settings of the fused head that TRL adds later", why="the loss would be another"
)
def test_refuses_a_setting_of_trl_that_it_does_not_know(patched: Any) -> None:
    model = patched(VQ(32))
    with pytest.raises(ValueError, match="has variance, which hf_softheads does not know"):
        add_fused_lm_head(model, outputs=("log_probs", "variance"))
    assert "forward" not in model.__dict__


@pytest.mark.client(
    "trl",
    refused="the fused head while other code hooks the head, or has given it a forward of its own",
    why="the fused head does not call it",
)
@pytest.mark.parametrize("own", [False, True], ids=["hook", "forward"])
def test_a_hooked_head_refuses_the_fused_outputs(own: bool, patched: Any) -> None:
    model, ids = patched(VQ(32)), torch.arange(4, 16)[None]
    add_fused_lm_head(model)
    if own:
        model.lm_head.forward = lambda hidden: model.lm_head.scores(hidden) * 2
    else:
        model.lm_head.register_forward_hook(lambda *a: a[2] * 2)
    with pytest.raises(ValueError, match=r"a hook on this VQHead.* does not call the head"):
        model(ids, labels=ids, fused_lm_head=True)


# -- trainers ------------------------------------------------------------


@pytest.mark.client("trl", works="`SFTTrainer` with every head, gradient accumulation")
@pytest.mark.parametrize("name", NAMES)
def test_sft_loss_is_that_of_the_logits(
    name: str, patched: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Assistant tokens alone, over an accumulated batch."""
    model = patched(name)
    args = trl.SFTConfig(
        **options(tmp_path, gradient_accumulation_steps=2), assistant_only_loss=True, max_length=32
    )
    trainer = trl.SFTTrainer(model, args=args, train_dataset=chats(4), processing_class=tokenizer)
    batches = list(trainer.get_train_dataloader())
    assert all((batch["labels"] == -100).any() for batch in batches)
    wanted = loss_from_logits(model, batches)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    log = log_of(trainer)
    assert log["loss"] == pytest.approx(wanted, rel=1e-4)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("lm_head.") for k in moved)
    assert any(k.startswith("model.") for k in moved)


@pytest.mark.client("trl", works="`DPOTrainer` with every head")
@pytest.mark.parametrize("name", NAMES)
def test_dpo_at_learning_rate_0_is_log_2(
    name: str, patched: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = patched(name)
    args = trl.DPOConfig(**options(tmp_path, learning_rate=0.0), max_length=32)
    trainer = trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=pairs(2),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        log_p = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    ids, kept = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] != 0
    each = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1).masked_fill(~kept, 0).sum(-1)
    log = log_of(trainer)
    assert log["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert log["logps/chosen"] == pytest.approx(float(each[:2].mean()), rel=1e-4)
    assert log["logps/rejected"] == pytest.approx(float(each[2:].mean()), rel=1e-4)


@pytest.mark.client("trl", works="`GRPOTrainer` with every head")
@pytest.mark.parametrize("name", NAMES)
def test_grpo_starts_without_kl(name: str, patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The reference model is the folder that the policy was loaded from."""
    patched(name).save_pretrained(tmp_path / "patched")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    args = trl.GRPOConfig(
        **options(tmp_path, learning_rate=0.0),
        num_generations=2,
        max_completion_length=4,
        beta=0.1,
        temperature=0.9,
    )

    def reward(completions: Any, **_: Any) -> list[float]:
        return [float(len(c)) + i for i, c in enumerate(completions)]

    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [text(i, 5) for i in range(2)]}),
        processing_class=tokenizer,
    )
    log = log_of(trainer)
    assert log["kl"] == pytest.approx(0, abs=1e-6)
    assert log["entropy"] > 0


@pytest.fixture(scope="module")
def folder(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the original model."""
    path: Path = tmp_path_factory.mktemp("original")
    dense.save_pretrained(path)
    return path


@pytest.mark.client(
    "trl",
    refused="a reference model or tokenizer that the trainer would load by the name of a model patched in memory "
    "(`ref_model=None`, `beta > 0`, no `processing_class`)",
    why="that folder holds the original; save the patched model and load it, or give `ref_model`, `processing_class`",
)
@pytest.mark.parametrize(
    "patch", [{"head": VQ(32)}, {"attention": "sigmoid"}], ids=["head", "attention"]
)
@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_reference_model_is_not_the_original_one(
    kind: str, patch: dict[str, Any], folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = sh.patch(AutoModelForCausalLM.from_pretrained(folder), **patch)
    data: dict[str, Any] = {"train_dataset": pairs(2)}
    more: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        data = {
            "train_dataset": pairs(2),
            "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        }
        more = {"num_generations": 2, "beta": 0.1}
    elif kind == "KTO":
        rows = [
            {"prompt": text(i, 5), "completion": f" {text(50 + i, 4)}", "label": i < 2}
            for i in range(4)
        ]
        data = {"train_dataset": Dataset.from_list(rows)}
    args = getattr(trl, f"{kind}Config")(**options(tmp_path, **more))
    trainer = getattr(trl, f"{kind}Trainer")
    with pytest.raises(
        (OSError, ValueError), match="patched_in_memory__save_it_and_load_that_folder"
    ):
        trainer(model, args=args, processing_class=tokenizer, **data)
    with pytest.raises(
        (OSError, ValueError), match="patched_in_memory__save_it_and_load_that_folder"
    ):
        trainer(model, args=args, **data)
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    found = trainer(again, args=args, processing_class=tokenizer, **data).ref_model
    ids = torch.arange(4, 12)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)


@pytest.mark.client("trl", works="packing")
@pytest.mark.parametrize("spec", [VQ(32), Quantized(4)], ids=str)
def test_packing(spec: HeadSpec, patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = patched(spec)
    args = trl.SFTConfig(
        **options(tmp_path), packing=True, packing_strategy="wrapped", max_length=16
    )
    rows = Dataset.from_dict({"text": [text(i, 9 + i) for i in range(8)]})
    trainer = trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    torch.manual_seed(0)
    first = next(iter(trainer.get_train_dataloader()))
    wanted = loss_from_logits(model, [first])
    assert log_of(trainer)["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.client("trl", works="PEFT adapters on the body")
@pytest.mark.parametrize("spec", [VQ(32), Quantized(4), Dense()], ids=str)
def test_an_adapter_on_top(spec: HeadSpec, patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    """DPO takes the model without its adapter as reference; the head stays as it is."""
    model = patched(spec)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(model.lm_head.state_dict())
    args = trl.DPOConfig(**options(tmp_path, max_steps=2), max_length=32)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=pairs(4), processing_class=tokenizer, peft_config=lora
    )
    assert log_of(trainer)["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.lm_head.state_dict().items())
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in n for n in trained)


def test_head_in_full_beside_an_adapter(patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = patched(VQ(32))
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    args = trl.SFTConfig(**options(tmp_path, max_steps=2), assistant_only_loss=True, max_length=32)
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=chats(4), processing_class=tokenizer, peft_config=lora
    )
    head = trainer.model.base_model.model.lm_head
    before = head.modules_to_save["default"].weight.detach().clone()
    frozen = head.original_module.weight.detach().clone()
    log_of(trainer)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, frozen)


def test_what_needs_logits_gets_them(patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Label smoothing and metrics of the logits."""
    model = patched(VQ(32))
    args = trl.SFTConfig(
        **options(tmp_path, label_smoothing_factor=0.1, eval_strategy="no"),
        assistant_only_loss=True,
        max_length=32,
    )
    seen = []

    def shapes(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    trainer = trl.SFTTrainer(
        model,
        args=args,
        train_dataset=chats(2),
        eval_dataset=chats(2),
        processing_class=tokenizer,
        compute_metrics=shapes,
    )
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    own = log_p[kept].gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    wanted = -(0.9 * own + 0.1 * log_p[kept].mean(-1)).mean()
    assert log_of(trainer)["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    trainer.evaluate()
    assert seen[0][-1] == VOCAB


def test_head_in_fp32(patched: Any, tokenizer: Any, tmp_path: Path) -> None:
    """`cast_lm_head_to_fp32` computes the head in fp32, in the loss and while generating."""
    model = patched(VQ(32)).to(torch.bfloat16)
    args = trl.GRPOConfig(
        **options(tmp_path, learning_rate=0.0),
        num_generations=2,
        max_completion_length=3,
        cast_lm_head_to_fp32=True,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [text(i, 5) for i in range(2)]}),
        processing_class=tokenizer,
    )
    ids = torch.arange(4, 12)[None]
    assert model(ids).logits.dtype == torch.float32
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    wanted = model(ids).logits[0, :-1].log_softmax(-1)[range(7), ids[0, 1:]]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    log_of(trainer)


@pytest.mark.client(
    "trl",
    refused="`DistillationTrainer`",
    why="it multiplies by both heads' matrices; `Objective(teacher=…)` distils without",
)
def test_distillation_trainer_refuses_by_name(
    dense: Any, patched: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """It multiplies by both heads' matrices; `Objective(teacher=…)` distils without."""
    model = patched(VQ(32))
    args = trl.DistillationConfig(**options(tmp_path), max_completion_length=3)
    trainer = trl.DistillationTrainer(
        model,
        teacher_model=copy.deepcopy(dense),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [text(i, 5) for i in range(2)]}),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match=r"trl\.\S+ reads rows or products .* of the parameter"):
        trainer.train()

"""The parameter `weight` of a patched head is no matrix of logits, and says so to code that takes it for one."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import AssistantToTargetTranslator

import hf_softheads as sh
from hf_softheads.heads import SVM, VQ, Cosine, Dense, LowRank, Quantized
from hf_softheads.heads.base import HeadSpec
from tests.conftest import VOCAB, make_model

SPECS: list[HeadSpec] = [VQ(24), Quantized(4), LowRank(8), Cosine(), SVM()]


class Fused(torch.autograd.Function):
    """As the fused losses of other libraries: the product is inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ hidden


@torch.library.custom_op("softheads_tests::product", mutates_args=())
def product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


@product.register_fake
def _(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(len(hidden), len(weight))


def in_a_module(hidden: Tensor, weight: Tensor) -> Tensor:
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = weight
    return linear(hidden)


READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": lambda h, w: F.linear(h, w),
    "@": lambda h, w: h @ w,
    "@ of the transpose": lambda h, w: h @ w.T,
    "t()": lambda h, w: torch.mm(h, w.t()),
    "a slice": lambda h, w: h @ w[:4].t(),
    "rows": lambda h, w: w.index_select(0, torch.tensor([0])),
    "a cast": lambda h, w: F.linear(h.double(), w.to(torch.float64)),
    "float()": lambda h, w: h @ w.bfloat16().float().T,
    "einsum": lambda h, w: torch.einsum("nd,vd->nv", h, w),
    "embedding": lambda h, w: F.embedding(torch.tensor([0]), w),
}
# Of rows as wide as the hidden states; others do not fit, and fail.
WIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inner": torch.inner,
    "element by element": lambda h, w: (h[:, None] * w).sum(-1),
    "chunks": lambda h, w: torch.cat([h @ part.T for part in w.chunk(2)], -1),
    "row by row": lambda h, w: torch.stack([h @ row for row in w], -1),
    "scaled first": lambda h, w: h @ (0.5 * w).permute(1, 0),
    "autograd function": Fused.apply,
    "custom operator": product,
    "operator by name": lambda h, w: torch.ops.softheads_tests.product(h, w),
    "another module": in_a_module,
    "functional call": lambda h, w: torch.func.functional_call(
        nn.Linear(*w.shape[::-1], bias=False), {"weight": w}, (h,)
    ),
}


@pytest.mark.parametrize(
    ("spec", "readers"),
    [*((s, READERS) for s in SPECS), (VQ(24), WIDE), (Cosine(), WIDE)],
    ids=[*(s.name for s in SPECS), "vq, more", "cosine, more"],
)
def test_refuses_products_by_other_code(spec: HeadSpec, readers: Any) -> None:
    model = sh.patch(make_model("llama"), head=spec)
    for weight in (model.lm_head.weight, copy.deepcopy(model).lm_head.weight):
        for name, read in readers.items():
            with pytest.raises(ValueError, match="test_head_weight reads rows or products"):
                pytest.fail(f"{name} gives {read(torch.zeros(2, 32), weight)}")


def test_a_dense_head_is_what_it_seems(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=Dense())
    states: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, args, __: states.append(args[0]))
    logits = model(tokens).logits
    assert torch.equal(F.linear(states[0], model.lm_head.weight), logits)
    assert type(model.lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_everything_else_sees_an_ordinary_parameter(
    spec: HeadSpec, tokens: Tensor, tmp_path: Path
) -> None:
    plain = sh.patch(make_model("llama"), head=spec)
    weight = plain.lm_head.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.is_leaf
    assert weight is dict(plain.named_parameters())["lm_head.weight"]
    assert type(plain.state_dict()["lm_head.weight"]) is Tensor
    assert type(weight.detach()) is type(weight.data) is Tensor
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
    with pytest.raises(ValueError, match="reads rows or products"):
        loaded.lm_head.weight[0]
    for foreach in (False, True):
        model = copy.deepcopy(plain).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=foreach)
        model(tokens, labels=tokens).loss.backward()
        assert type(model.lm_head.weight.grad) is Tensor
        optimizer.step()
        assert not torch.equal(model.lm_head.weight.detach(), weight.detach())
    half = copy.deepcopy(plain).to(torch.bfloat16)
    assert half(tokens).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(tokens).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "reader", [*READERS, *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)]
)
def test_refuses_compiled_readers(reader: str) -> None:
    model, hidden = sh.patch(make_model("llama"), head=VQ(24)), torch.zeros(2, 32)
    torch.compiler.reset()

    def read(h: Tensor) -> Tensor:
        return {**READERS, **WIDE}[reader](h, model.lm_head.weight)

    with pytest.raises(ValueError, match="test_head_weight reads rows or products"):
        torch.compile(read, backend="aot_eager")(hidden)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):  # which may not fall back to eager
        torch.compile(read, backend="aot_eager", fullgraph=True)(hidden)


def launched(weight: Tensor) -> int:
    """In a module named as Triton's, whose kernels read memory by its address."""
    return weight.data_ptr()


def test_refuses_kernels_of_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    head = sh.patch(make_model("llama"), head=VQ(24)).lm_head
    assert head.weight.data_ptr() == head.weight.detach().data_ptr()
    launch = types.FunctionType(launched.__code__, {"__name__": "triton.runtime.jit"})
    with pytest.raises(ValueError, match=r"triton\.runtime\.jit reads rows or products"):
        launch(head.weight)
    within = types.FunctionType(
        (lambda launch, weight: launch(weight)).__code__,
        {"__name__": "torch._inductor.output_code"},
    )
    assert within(launch, head.weight) == head.weight.data_ptr()  # a head that was compiled


def test_compiles_in_one_graph(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=VQ(24))
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.lm_head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), model.lm_head(hidden))


def test_other_code_may_update_and_measure_it() -> None:
    weight = sh.patch(make_model("llama"), head=VQ(24)).lm_head.weight
    plain = weight.detach()
    assert weight.square().sum().item() == plain.square().sum().item()
    assert weight.norm().item() == plain.norm().item()
    assert not weight.isnan().any()
    assert type(torch.zeros_like(weight)) is Tensor
    average = torch.zeros_like(weight)
    average.mul_(0.9).add_(weight, alpha=0.1)
    assert type(average) is Tensor
    with torch.no_grad():
        weight.mul_(0.5).sub_(average)
        torch._foreach_add_([weight, average], 1.0)
        nn.init.normal_(weight)
    vector = nn.utils.parameters_to_vector([weight, average]).detach()
    nn.utils.vector_to_parameters(vector, [weight, average])
    assert torch.equal(torch.cat([weight.flatten(), average.flatten()]).detach(), vector)
    assert weight.requires_grad_() is weight


@pytest.fixture
def one_process() -> Iterator[Any]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_refuses_products_under_fsdp2(one_process: Any, compiled: bool, tokens: Tensor) -> None:
    """It puts parameters of its own in, and replaced forwards read them while they are whole."""
    model = sh.patch(make_model("llama"), head=VQ(24))
    wanted = model(tokens).logits
    fully_shard(model, mesh=one_process)
    torch.testing.assert_close(model(tokens).logits, wanted)

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state @ self.lm_head.weight.T

    torch.compiler.reset()
    model.forward = types.MethodType(forward, model)
    call = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        with pytest.raises(ValueError, match=r"test_head_weight reads rows or products \(T\)"):
            call(tokens)


def test_a_parameter_that_was_put_in_its_place_is_guarded_in_a_call(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=VQ(24))
    state = model.state_dict()
    model.to_empty(device="cpu").load_state_dict(state)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    model(tokens)
    with pytest.raises(ValueError, match="reads rows or products"):
        model.lm_head.weight[0]


def test_unpatched_model_has_its_own_parameter_again() -> None:
    model = make_model("llama")
    before = model.lm_head.weight
    sh.unpatch(sh.patch(model, head=VQ(24)))
    assert model.lm_head.weight is before
    assert type(before) is nn.Parameter


def words(count: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )


@pytest.mark.parametrize("spec", [*SPECS, None], ids=lambda s: getattr(s, "name", "unpatched"))
def test_pruned_head_of_an_assistant(spec: HeadSpec | None) -> None:
    """transformers keeps the rows of the tokens that both models know, when it samples with an assistant."""
    assistant: Any = make_model("llama")
    if spec is not None:
        sh.patch(assistant, head=spec)
    head = assistant.get_output_embeddings()

    def translate() -> Any:
        return AssistantToTargetTranslator(words(50), words(VOCAB), 50, assistant, True)

    if spec is None:
        assert translate().assistant_prune_lm_head
        return
    with pytest.raises(ValueError, match=r"transformers\.pytorch_utils reads rows .* turn off"):
        translate()
    assert assistant.get_output_embeddings() is head

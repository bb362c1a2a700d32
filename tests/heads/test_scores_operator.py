"""The scores of a head as an operator: eager, with gradients, compiled and exported they are the same."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_softheads import heads
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.forms import scores_operator
from tests.heads.conftest import Toy, make_toy
from tests.heads.test_kernels import needs_compiler

pytestmark = needs_compiler

SPECS: list[HeadSpec] = [
    heads.Quantized(4),
    heads.Quantized(8),
    heads.Quantized(3, frequent=40),
    heads.TransformCoded(4.5, tiers=3),
    heads.ProductVQ(8, 16),
    heads.ProductVQ(8, 256, rotation="structured"),
    heads.LowRankResidual(rank=2, bits=3),
]
WRAPPED: list[HeadSpec] = [
    heads.LowRank(8, heads.Quantized(8)),
    heads.Screened(heads.ProductVQ(8, 16), 9),
    heads.Screened(heads.TransformCoded(4.5, tiers=3), 9, inner=heads.Quantized(8)),
    heads.Cascade(heads.TransformCoded(4.5, tiers=3), 9),
    heads.Temperature(inner=heads.Quantized(4)),
]


def fitted(spec: HeadSpec, toy: Toy, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    head: Any = spec.module(*toy.shape, bias=bias)
    if "product_vq" in json.dumps(spec.to_dict()):
        head.use_kernels("require")  # else it leaves fp32 states to torch
    spec.fit(head, toy.weight, torch.linspace(-1, 1, len(toy.weight)) if bias else None, toy.stats)
    for name, parameter in head.named_parameters():
        if name not in head.keep_in_fp32:
            parameter.data = parameter.data.to(dtype)
    return head.eval()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Heads that the operator builds, in order."""
    names: list[str] = []
    build = scores_operator._build

    def noted(tensors: Any, text: str) -> Any:
        names.append(text)
        return build(tensors, text)

    monkeypatch.setattr(scores_operator, "_build", noted)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_dtype_of_models_uses_the_kernel(toy: Toy, spec: HeadSpec, dtype: Any) -> None:
    head, hidden = fitted(spec, toy, dtype), toy.hidden[:5].to(dtype)
    assert head.kernel_or_reason(hidden) is None  # in evaluation, though parameters want gradients
    found = head(hidden)
    with torch.no_grad():
        assert torch.equal(head(hidden), found)
        head.use_kernels("require")
        assert torch.equal(head(hidden), found)
    assert head.train().kernel_or_reason(hidden) == "not in training"
    assert "fp32, bf16 and fp16" in head.eval().kernel_or_reason(hidden.double())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_the_plain_definition(toy: Toy, spec: HeadSpec) -> None:
    head, hidden = fitted(spec, toy), toy.hidden[:5].clone().requires_grad_()
    inputs = [hidden, *head.parameters()]
    weights = torch.linspace(-1, 1, len(toy.weight))
    expected = torch.autograd.grad((head.plain_scores(hidden) * weights).sum(), inputs)
    scores = head(hidden)
    assert "softheads_scores" in str(scores.grad_fn.next_functions)
    found = torch.autograd.grad((scores * weights).sum(), inputs)
    torch.testing.assert_close(found, expected)
    only = torch.autograd.grad((head(hidden) * weights).sum(), [inputs[1]])
    torch.testing.assert_close(only, expected[1:2])
    head.requires_grad_(False)
    only = torch.autograd.grad((head(hidden) * weights).sum(), [hidden])
    torch.testing.assert_close(only, expected[:1])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS + WRAPPED, ids=str)
def test_compiled_as_one_graph_it_is_the_same(toy: Toy, spec: HeadSpec, built: list[str]) -> None:
    torch.compiler.reset()  # so many versions of one function are too many
    head, hidden = fitted(spec, toy), toy.hidden[:3].clone()
    with torch.no_grad():
        expected = head(hidden)
        times = len(built)
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden), expected, rtol=0, atol=1e-5)
        assert len(built) == times >= 1  # neither it nor the tables of its kernel
    hidden.requires_grad_()
    (found,) = torch.autograd.grad(compiled(hidden).logsumexp(-1).sum(), [hidden])
    (expected,) = torch.autograd.grad(head(hidden).logsumexp(-1).sum(), [hidden])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_exported_it_carries_the_operator(toy: Toy, spec: HeadSpec) -> None:
    head, hidden = fitted(spec, toy).requires_grad_(False), toy.hidden[:3]
    expected = head(hidden)
    program = torch.export.export(head, (hidden,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "softheads.scores" in program.graph_module.code
    file = io.BytesIO()
    torch.export.save(program, file)
    del head, program
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(hidden), expected)
    torch.testing.assert_close(loaded(hidden[:2]), expected[:2])


def test_written_or_replaced_tensors_are_seen(toy: Toy, built: list[str]) -> None:
    head, hidden = fitted(heads.ProductVQ(8, 16), toy, bias=False), toy.hidden[:3]
    before = head(hidden)
    with torch.no_grad():
        head.weight.mul_(2)
        torch.testing.assert_close(head(hidden), 2 * before)
        assert len(built) == 1
        head.weight = torch.nn.Parameter(head.weight * 2)
        torch.testing.assert_close(head(hidden), 4 * before)
        head.weight.data = head.weight.data / 2
        torch.testing.assert_close(head(hidden), 2 * before)
        twin = copy.deepcopy(head)
        twin.weight.mul_(2)
        torch.testing.assert_close(twin(hidden), 4 * before)
        torch.testing.assert_close(head(hidden), 2 * before)


def test_tensors_of_a_call_are_those_that_count(toy: Toy) -> None:
    torch.compiler.reset()
    head, hidden = fitted(heads.Quantized(4), toy, bias=False), toy.hidden[:3]

    def scaled(hidden: Tensor) -> Tensor:
        weight = {"weight": 3 * head.weight.detach()}
        return torch.func.functional_call(head, weight, (hidden,))

    for function in (scaled, torch.compile(scaled, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(function(hidden), 3 * head(hidden))


def test_what_is_kept_dies_with_the_head(toy: Toy) -> None:
    head = fitted(heads.TransformCoded(4.5, tiers=3), toy)
    head(toy.hidden[:1])
    kept = weakref.ref(scores_operator._BUILT[next(head.parameters())][1])
    del head
    gc.collect()
    assert kept() is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_inductor_and_any_number_of_states() -> None:
    torch.compiler.reset()
    toy = make_toy(256, 16)
    head = fitted(heads.TransformCoded(4.5, tiers=3), toy).requires_grad_(False)
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    for count in (1, 7, 200):
        torch.testing.assert_close(compiled(toy.hidden[:count]), head(toy.hidden[:count]))


def test_there_are_no_second_derivatives(toy: Toy) -> None:
    head, hidden = fitted(heads.Quantized(4), toy), toy.hidden[:1].clone().requires_grad_()
    (first,) = torch.autograd.grad(head(hidden).logsumexp(-1).sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match=r"head\.train\(\)"):
        first.sum().backward()
    head.train()
    (first,) = torch.autograd.grad(head(hidden).logsumexp(-1).sum(), [hidden], create_graph=True)
    first.sum().backward()

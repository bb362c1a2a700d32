"""Other packages' cross-entropies through the Objective: value and gradients as exact as eager, errors where not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hf_softheads as sh
from hf_softheads.heads import VQ
from tests.conftest import make_model

HERE = "tests.losses.test_backends"


def installed(package: str) -> Any:
    missing = not util.find_spec(package) or not util.find_spec("triton")
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def compare(backend: str, dtype: torch.dtype) -> None:
    """At most twice eager's own error to float64, and the gradients of a mean over 300 tokens."""
    model = make_model("llama", tie_word_embeddings=False).to(dtype)
    weight = model.lm_head.weight
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, weight.shape[1], generator=g).to(dtype).requires_grad_()
    labels = torch.randint(len(weight), (300,), generator=g)

    def eager(h: Any, w: Any) -> Any:
        logits = h @ w.T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels)

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(eager(*exact), exact)
    plain = torch.autograd.grad(eager(hidden, weight), [hidden, weight])
    goal = sh.Objective(model, {"cross_entropy": 1.0}, backend=backend)
    value = goal.from_hidden(hidden, labels)
    found = torch.autograd.grad(value, [hidden, weight])
    floor = torch.finfo(dtype).eps
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, eager(hidden, weight), rtol=1e-6, atol=0)
    for mine, theirs, exactly in zip(found, plain, wanted, strict=True):
        error, size = (theirs - exactly).norm(), exactly.norm()
        assert (mine - exactly).norm() <= 2 * error + floor * size
    torch.testing.assert_close(goal.parts["cross_entropy"] / 300, value.detach())
    with torch.no_grad():
        torch.testing.assert_close(goal.from_hidden(hidden, labels), value.detach())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch is older")
def test_torch() -> None:
    compare("torch", torch.float32)


@installed("cut_cross_entropy")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_cross_entropy(dtype: torch.dtype) -> None:
    compare("cce", dtype)


@installed("liger_kernel")
def test_liger() -> None:
    """Its Triton kernels, interpreted: that has to be asked for before they are imported."""
    code = f"import {HERE} as t, torch; t.compare('liger', torch.float32)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    for losses in ({"z_loss": 1.0}, {"cross_entropy": 1.0, "z_loss": 1.0}):
        with pytest.raises(ValueError, match="computes cross_entropy alone, not"):
            sh.Objective(model, losses, backend="torch")
    with pytest.raises(ValueError, match="did you mean 'liger'"):
        sh.Objective(model, {"cross_entropy": 1.0}, backend="ligr")
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        sh.Objective(model, {"cross_entropy": 1.0}, backend="liger")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch is older")
def test_refusals_at_the_call() -> None:
    ids = torch.arange(3, 11).unsqueeze(0)
    half = make_model("llama").bfloat16()
    scaled, patched = make_model("granite"), sh.patch(make_model("llama"), head=VQ(codes=40))
    for model, message in (
        (half, "rounds the loss itself to torch.bfloat16"),
        (scaled, "changes its scores"),
        (patched, "no plain matrix"),
    ):
        goal = sh.Objective(model, {"cross_entropy": 1.0}, backend="torch")
        with pytest.raises(ValueError, match=message):
            goal(input_ids=ids, labels=ids)

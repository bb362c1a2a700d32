"""Certificates against an enumeration of the vertices of what the head cannot tell apart."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hf_softheads as sh
from tests.clients.samples import patched

IDS = torch.zeros(2, 3, dtype=torch.long)
VOCAB = 6


def feasible(equal: Any, target: Any, upper: Any) -> bool:
    """Whether `equal q = target, 0 ≤ q ≤ upper` has a solution: one of its vertices, all of which are tried."""
    m, n = equal.shape
    for basis in combinations(range(n), m):
        rest = [i for i in range(n) if i not in basis]
        square = equal[:, basis]
        if abs(np.linalg.det(square)) < 1e-12:
            continue
        for at in product((0, 1), repeat=len(rest)):
            fixed = np.array(at) * upper[rest]
            q = np.linalg.solve(square, target - equal[:, rest] @ fixed)
            if (q >= -1e-9).all() and (q <= upper[list(basis)] + 1e-9).all():
                return True
    return False


def kept_by_enumeration(rows: Tensor, scores: Tensor, epsilon: float) -> list[list[int]]:
    found = []
    for z in scores.double():
        p = z.softmax(-1).numpy()
        eta = min(epsilon, epsilon**0.5 * float(np.exp((p * np.log(p)).sum())))
        equal = np.vstack([rows.double().numpy().T, np.ones(len(p))])
        tokens = []
        for i in range(len(p)):
            upper = p / (1 - eta)
            upper[i] = 0
            if p[i] >= eta or not feasible(equal, equal @ p, upper):
                tokens.append(i)
        found.append(tokens)
    return found


def kept(processor: Any, scores: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in processor(IDS, scores)]


@pytest.mark.parametrize("seed", range(4))
def test_certificates_by_enumeration(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(VOCAB, 2, generator=generator)
    scores = 2 * torch.randn(2, VOCAB, generator=generator)
    processor = sh.decoding.BasisAware(matrix, 0.4, columns=2, tested=VOCAB)
    assert not processor.closed
    assert kept(processor, scores) == kept_by_enumeration(matrix, scores, 0.4)


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_of_a_vq_head(seed):
    head = sh.heads.VQ(codes=3).module(2, VOCAB)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 2, generator=generator))
    head.codes.copy_(torch.tensor([0, 0, 1, 1, 1, 2]))
    scores = 2 * torch.randn(2, VOCAB, generator=generator)
    processor = sh.decoding.BasisAware(head, 0.3)
    assert processor.closed
    rows = head.weight.detach()[head.codes.long()]
    assert kept(processor, scores) == kept_by_enumeration(rows, scores, 0.3)
    processor.closed, processor.tested = False, VOCAB  # by linear programs over the codes
    assert kept(processor, scores) == kept_by_enumeration(rows, scores, 0.3)


def test_more_than_eta_sampling_keeps(tokens):
    """In `generate`; every token that eta sampling keeps stays."""
    from transformers import EtaLogitsWarper

    model = patched("dense")
    scores = model(tokens).logits[:, -1].detach()
    found = sh.decoding.BasisAware(model, 0.2, tested=3)(tokens, scores)
    plain = EtaLogitsWarper(0.2)(tokens, scores)
    assert (found.isfinite() | ~plain.isfinite()).all()
    own = [sh.decoding.BasisAware(model, 0.2, tested=1)]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "logits_processor": own}
    assert model.generate(tokens, **options).shape == (2, 14)


def test_what_is_refused():
    matrix = torch.randn(VOCAB, 2)
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="epsilon must be above 0 and below 1"):
            sh.decoding.BasisAware(matrix, wrong)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        sh.decoding.BasisAware(matrix, columns=0)
    with pytest.raises(ValueError, match=r"has no matrix \(V, D\)"):
        sh.decoding.BasisAware(patched("hierarchical"))

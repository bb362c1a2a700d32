"""VQ-Logits: tokens share the codes of a small codebook, in its published form and repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.code_bias import code_bias
from hf_softheads.heads.fit.kmeans import require_finite, weighted_means
from hf_softheads.heads.fit.perplexity_floor import measure_floor
from hf_softheads.heads.fit.token_to_code import initial_map
from hf_softheads.heads.forms.vq_module import VQHead
from hf_softheads.registry import Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class VQ(HeadSpec, name="vq"):
    """`logit_v = weight[code(v)] · h + bias_v`: one row per code, gathered to the vocabulary (arXiv 2505.10202).

    The defaults are the published method: codes from k-means on the trained rows, no bias, a trainable codebook and
    a fixed map. Tokens of one code then share one logit, so perplexity cannot fall under `exp E[log n_code(y)]`,
    however the model is trained; `describe` prints that floor. The other fields repair this, each on its own, and
    all need `HeadStats`; `VQ.repaired(codes)` sets them together.

    Attributes:
        codes: size of the codebook, singletons included.
        init: token → code map: `kmeans` on the trained rows, or the published baselines `random` and `contiguous`;
            a code starts as the mean of its tokens' rows.
        bias: `none`; `prior`: `log(n_code π(token | code))` from the token counts, which leaves each code its mass;
            `fitted`: `log` of the dense model's mean probability within the code, plus an offset per code that gives
            each code the probability its tokens have under the dense model (iterative proportional fitting).
        singletons: how many of the most frequent tokens keep their own row as a code of its own.
        metric: `euclidean`, as published; `activation`: distances in `E[h hᵀ]` (in the covariance of h when there is
            a bias), each token weighted by its mean probability under the dense model.
        seed: of k-means and of the random map.
    """

    codes: Count
    init: Literal["kmeans", "random", "contiguous"] = "kmeans"
    bias: Literal["none", "prior", "fitted"] = "none"
    singletons: CountOrZero = 0
    metric: Literal["euclidean", "activation"] = "euclidean"
    seed: CountOrZero = 0

    @classmethod
    def repaired(cls, codes: int, seed: int = 0) -> VQ:
        """Every repair that needs no training: activation metric, fitted bias, a quarter of the codes for one token."""
        return cls(codes, bias="fitted", singletons=codes // 4, metric="activation", seed=seed)

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls.repaired(vocab // part) for part in (64, 32, 16, 8, 4) if vocab > part]

    def check(self, dim: int, vocab: int) -> None:
        if self.codes >= vocab:
            raise ValueError(
                f"vq asked for {self.codes} codes for {vocab} tokens; 1 to {vocab - 1} are possible"
            )
        if self.singletons >= self.codes:
            raise ValueError(
                f"vq asked for {self.singletons} singleton codes of {self.codes}; "
                f"0 to {self.codes - 1} are possible, the rest of the tokens shares what is left"
            )

    @property
    def needs_stats(self) -> bool:
        return self.bias != "none" or self.singletons > 0 or self.metric != "euclidean"

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> VQHead:
        return VQHead(
            dim, vocab, self.codes, bias=bias or self.bias != "none", singletons=self.singletons
        )

    @torch.no_grad()
    def fit(
        self, head: VQHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        if self.needs_stats and stats is None:
            raise ValueError(
                f"{self} needs statistics of the model's hidden states; pass stats=sh.collect(model, batches)"
            )
        labels, row_weights = initial_map(
            weight,
            stats,
            codes=self.codes,
            singletons=self.singletons,
            init=self.init,
            metric=self.metric,
            centred=self.bias != "none",
            seed=self.seed,
        )
        head.codes.copy_(labels)
        head.weight.copy_(weighted_means(weight, labels, self.codes, row_weights))
        if head.bias is not None:
            if self.bias != "none" and stats is not None:
                bias = code_bias(head, labels, stats, fitted=self.bias == "fitted")
            assert bias is not None  # else the head has one because the dense head had
            head.bias.copy_(bias)
        measure_floor(head, stats)

"""What every output head is: a spec that builds and fits a module, and a module with one contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_softheads.heads.forms.fit_guard import checked
from hf_softheads.heads.forms.largest import largest, logsumexp, packed, unpacked
from hf_softheads.heads.forms.logit_transform import LogitTransform as LogitTransform
from hf_softheads.heads.forms.sampling import check_temperature, gumbel_max
from hf_softheads.heads.forms.token_numbers import TokenStatistics as TokenStatistics
from hf_softheads.heads.forms.token_numbers import as_statistics, labelled, of_logits
from hf_softheads.registry import Spec

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

T = TypeVar("T")

_CHUNK_ELEMENTS = 2**23  # logits held at once by the generic paths: 32 MiB in fp32


@dataclass(frozen=True)
class HeadSpec(Spec, kind="head"):
    """A head variant: hyper-parameters, how to build the module and how to fit it to the trained matrix."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "fit" in cls.__dict__:
            cls.fit = checked(cls.fit)  # type: ignore[method-assign]

    def check(self, dim: int, vocab: int) -> None:
        """Raise ValueError if the fields make no sense for a matrix `(vocab, dim)`."""

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> Head:
        """An uninitialised module; works under `torch.device("meta")`. `bias`: the dense head had one."""
        raise NotImplementedError

    def fit(self, head: Any, weight: Tensor, bias: Tensor | None, stats: HeadStats | None) -> None:
        """Set the module's tensors from the trained `weight (V, D)` and `bias (V,)`, in place.

        `weight` has the model's own dtype and may be half of the memory: turn it into fp32 a block of rows at a time.
        """
        raise NotImplementedError

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        """Specs for a matrix `(vocab, dim)` by rising size: what `choose` tries, and the tests expect to improve."""
        return []

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec | None:
        """The setting that reproduces the dense logits up to rounding, or None if the structure has none."""
        return None


class Head(nn.Module):
    """Hidden states `(…, D)` to scores `(…, V)`, and what decoders and losses need, without a `(tokens, V)` tensor.

    A variant implements `scores`; the methods below are correct for any variant, in chunks of tokens that are
    recomputed in the backward pass, and a variant overrides those that its structure makes cheaper. `forward`
    gives raw scores, as `nn.Linear` does, because the model applies its own soft cap or scale afterwards; the other
    methods apply `transform` themselves and so describe the model's real distribution.

    Every variant has a parameter called `weight`: transformers reads its dtype and device, and a checkpoint loaded
    without this package fails on its shape instead of starting from a random head.
    """

    weight: nn.Parameter
    keep_in_fp32: tuple[str, ...] = ()  # parameters that half precision would spoil
    kernels: Literal["auto", "off", "require"] = "auto"  # set by `use_kernels`
    untied = False  # the head that it replaced shared its matrix with the input embedding

    def __init__(self, dim: int, vocab: int):
        super().__init__()
        self.in_features, self.out_features = dim, vocab
        # None: the family does something unknown
        self.transform: LogitTransform | None = LogitTransform()
        # set for one call by the model's forward, to train without logits
        self.targets: Tensor | None = None
        self.nll: Tensor | None = None
        # set for some calls by a decoder: what it wants to know instead of scores
        self.question: Callable[[Tensor], Any] | None = None
        self._tables: dict[str, tuple[object, tuple[Tensor, ...], object]] = {}

    def scores(self, hidden: Tensor) -> Tensor:
        """Raw scores `(…, V)`, before the family's transform."""
        raise NotImplementedError

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Raw scores of some tokens only, fp32: `hidden (…, D)`, `tokens (…, M)` → `(…, M)`."""
        return self.scores(hidden).float().gather(-1, tokens)

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Raw scores of the same tokens for every hidden state, fp32: `hidden (…, D)`, `tokens (M,)` → `(…, M)`."""
        return self.scores(hidden).float().index_select(-1, tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.question is not None:
            return cast(Tensor, self.question(hidden))
        if self.targets is None or self.targets.shape != hidden.shape[:-1]:
            return self.scores(hidden)
        targets, self.targets = self.targets, None
        self.nll, self.counted = self.token_loss(hidden, targets), (targets != -100).sum()
        # stands in for the logits; the loss is built from this very tensor
        return self.nll.unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `(…, V)` in fp32: raw scores through the family's transform."""
        return self._known_transform()(self.scores(hidden).float())

    def token_loss(self, hidden: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """`-log p(label)` in fp32, `(…)`; exactly 0 where `label == ignore_index`, which is not computed at all."""
        labels = labels.to(hidden.device)
        keep = labels != ignore_index
        if torch.compiler.is_compiling():  # data-dependent shapes would break the graph
            safe = torch.where(keep, labels, 0)
            return torch.where(keep, -self.log_prob(hidden, safe), 0.0)
        loss = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        return loss.masked_scatter(keep, -self.log_prob(hidden[keep], labels[keep]))

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """`log softmax(logits)[label]`, `(…)` fp32. `labels` in `[0, V)`, shaped as `hidden` without its last axis."""

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            z = self.logits(h)
            return z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)

        return self._in_chunks(chunk, hidden, labels)

    def logsumexp(self, hidden: Tensor) -> Tensor:
        """`log Σ_v exp(logits)`, `(…)` fp32."""
        return self._in_chunks(lambda h: self.logits(h).logsumexp(-1), hidden)

    def token_statistics(
        self, hidden: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100
    ) -> TokenStatistics:
        """`log p(label)`, entropy and best token of `p = softmax(logits / temperature)`, each `(…)`.

        Exactly 0 where `label == ignore_index`, which is not computed. Gradients flow through the first two.
        """
        check_temperature(temperature)
        numbers = partial(self.token_numbers, temperature=temperature, moments=False)
        return as_statistics(labelled(numbers, hidden, labels, ignore_index))

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        """`log p(label)`, entropy, best token and, with `moments`, mean logit and `log Σ p²`: `(…, 3 or 5)` fp32.

        `p = softmax(logits / temperature)`, and the mean is of `logits / temperature`; `labels` in `[0, V)`.
        """

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            return of_logits(self.logits(h) / temperature, y, moments)

        return self._in_chunks(chunk, hidden, labels)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits, `(…, k)` fp32 descending, and their token ids."""

        def chunk(h: Tensor) -> Tensor:
            return packed(*largest(self.logits(h), k, self.kernels))

        values, tokens = unpacked(self._in_chunks(chunk, hidden), k)
        return values, tokens

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest logits, their ids, and `log Σ_v exp(logits / temperature)`: a decoding step."""
        check_temperature(temperature)

        def chunk(h: Tensor) -> Tensor:
            z = self.logits(h)
            total = logsumexp(z if temperature == 1 else z / temperature, self.kernels)
            return packed(*largest(z, k, self.kernels), total)

        values, tokens, total = unpacked(self._in_chunks(chunk, hidden), k)
        return values, tokens, total

    def topk_log_prob(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the k likeliest tokens, `(…, k)` fp32 descending, and their ids."""
        values, tokens, total = self.topk_logsumexp(hidden, k)
        return values - total.unsqueeze(-1), tokens

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One token id per hidden state, `(…)`, drawn exactly from `softmax(logits / temperature)`."""
        check_temperature(temperature)

        def chunk(h: Tensor) -> Tensor:
            return gumbel_max(self.logits(h) / temperature, generator)

        return self._in_chunks(chunk, hidden)

    def dense(self) -> tuple[Tensor, Tensor | None] | None:
        """A matrix `(V, D)` and a bias, fp32, that give the same raw scores; differentiable.

        For training a head that would rebuild its rows for every chunk of tokens; None where there is no such matrix
        or chunks are cheaper.
        """
        return None

    def reset_parameters(self) -> None:
        """Initialise what a checkpoint did not hold; called by transformers for missing keys."""
        for parameter in self.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                nn.init.zeros_(parameter)

    def resize(self, vocab: int) -> Head:
        """A head for another vocabulary size, used by `resize_token_embeddings`.

        Raises:
            NotImplementedError: this structure cannot grow; resize the dense model first, then patch it.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} head cannot be resized from {self.out_features} to {vocab} tokens; "
            "resize the dense model's embeddings first, then patch it"
        )

    @property
    def n_parameters(self) -> int:
        """Floating-point parameters (integer codes are not counted, as the papers count)."""
        return sum(p.numel() for p in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes as stored in a checkpoint: parameters and persistent buffers."""
        return sum(t.numel() * t.element_size() for t in self.state_dict(keep_vars=True).values())

    @property
    def backend(self) -> str:
        """What computes the scores, for `describe`: `torch`, or a kernel's name, or why there is none."""
        return "torch"

    def why_no_kernel(self) -> str | None:
        """Why no C++ kernel can run this head here; None if one can."""
        return "there is none for this variant"

    def use_kernels(self, mode: Literal["auto", "off", "require"]) -> None:
        """Whether this head and those inside it decode by their C++ kernels: where they can, never, or raising."""
        for module in self.modules():
            if isinstance(module, Head):
                module.kernels = mode

    @property
    def bytes_read(self) -> int:
        """Bytes read to score all tokens for one hidden state."""
        return self.nbytes

    @property
    def flops(self) -> int:
        """Floating-point operations to score all tokens for one hidden state."""
        return 2 * self.in_features * self.out_features

    def code_table(self) -> tuple[Tensor, int] | None:
        """The codes of each token, `(V, G)`, and how many there are to choose from; None for a head without codes."""
        return None

    def index_limits(self) -> dict[str, int]:
        """Names of this head's own integer tensors that are indices, and how many there are to choose from."""
        return {}

    def notes(self) -> list[str]:
        """Facts about this head that `describe` prints, one a line."""
        return []

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    @property
    def logit_scale(self) -> float:
        """What the family multiplies scores by; 1 where it does something else."""
        scale = None if self.transform is None else self.transform.scale
        return 1.0 if scale is None else scale

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the tables, which are built again (and may be opaque to torch)."""
        return {**self.__dict__, "_tables": {}}

    def _known_transform(self) -> LogitTransform:
        if self.transform is None:
            raise NotImplementedError(
                "this model changes its logits after the head in a way that is not understood, so only "
                "model(...).logits gives its distribution; the head's own log_prob, topk and sample do not"
            )
        return self.transform

    def _derived(
        self, name: str, build: Callable[[], T], *sources: Tensor, constants: Hashable = None
    ) -> T:
        """`build()`, kept until one of `sources` is replaced or written to, or `constants` differ.

        For lookup tables that follow from parameters and codes and so have no place in a checkpoint.
        """
        if torch.compiler.is_compiling():
            return build()
        versions = tuple(
            (t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in sources
        )
        kept = self._tables.get(name)
        if kept is not None:
            value, old_sources, old_state = kept
            same = all(a is b for a, b in zip(old_sources, sources, strict=True))
            if same and old_state == (versions, constants):
                return cast(T, value)
        built = build()
        self._tables[name] = built, sources, (versions, constants)
        return built

    def _in_chunks(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        *others: Tensor,
        width: int | None = None,
    ) -> Tensor:
        """`function` over chunks of tokens, recomputed in the backward pass.

        `width`: elements that the function holds for one token (default V); a chunk holds `_CHUNK_ELEMENTS`.
        """
        shape = hidden.shape[:-1]
        tensors = [hidden.reshape(-1, hidden.shape[-1]), *(t.reshape(-1) for t in others)]
        rows = max(1, _CHUNK_ELEMENTS // (width or self.out_features))
        if math.prod(shape) <= rows:
            out = function(*tensors)
        else:
            parts = zip(*(t.split(rows) for t in tensors), strict=True)
            if torch.is_grad_enabled():
                out = torch.cat(
                    [checkpoint(function, *part, use_reentrant=False) for part in parts]
                )
            else:
                out = torch.cat([function(*part) for part in parts])
        return out.reshape((*shape, *out.shape[1:]))

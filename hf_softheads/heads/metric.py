"""The metric in which errors of output rows matter: `E ‖(ŵ - w)·h‖² = (ŵ - w) E[h hᵀ] (ŵ - w)ᵀ`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.stats import HeadStats

_DAMPING = 1e-3  # of the mean variance, added to every direction: directions never seen still cost a little


def metric_root(stats: HeadStats, *, centred: bool = False) -> tuple[Tensor, Tensor]:
    """`R` and `R⁻¹`, `(D, D)` float64, with `R Rᵀ` = the damped `E[h hᵀ]`, or the covariance of h if `centred`.

    Columns of R are its principal directions, the strongest first. Centred is right for a head with a bias per
    token: the bias absorbs what a row's error does to the mean hidden state.
    """
    moment = (stats.covariance if centred else stats.second_moment).double()
    moment = (moment + moment.T) / 2
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    scale = (values + _DAMPING * values.mean().clamp_min(1e-30)).sqrt()
    return vectors * scale, (vectors / scale).T

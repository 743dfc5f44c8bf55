"""``G = k xᵀ = c vᵀ`` without a bias: rows, how well each is known, and the open scale ``s``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..low_rank import machine_epsilon, rank_one
from .registry import Head

__all__ = ["Multiples", "explained", "polish_scale", "rows_of"]


@dataclass(frozen=True)
class Multiples:
    """``G = c vᵀ``: each row's multiple ``c_j`` of ``v``, and its relative precision."""

    c: Tensor
    v: Tensor
    precision: Tensor
    residual: float
    eps: float

    @property
    def trusted(self) -> Tensor:
        """Rows whose multiple is known to a fifth of itself."""
        return self.precision < 0.2


def rows_of(G: Tensor) -> Multiples:
    """Fit ``c vᵀ``; what it leaves over tells the precision."""
    fit, eps = rank_one(G), machine_epsilon(G)
    v = fit.right
    c = G @ v  # and not σ₁u, whose small entries carry the rounding of its large ones
    noise = (G - torch.outer(c, v)).norm(dim=1) / math.sqrt(max(len(v) - 1, 1))
    precision = torch.where(c == 0, math.inf, eps + noise / c.abs().clamp_min(1e-300))
    return Multiples(c, v, precision, fit.residual, eps)


def explained(rows: Multiples, answers: Callable[[Multiples], list[Head]]) -> list[Head]:
    """Answers of both signs of ``v`` that rounding and noise leave standing, best first."""
    tolerance = min(0.5, max(1e3 * rows.eps, 100 * rows.residual))
    mirrored = replace(rows, c=-rows.c, v=-rows.v)
    found = [h for side in (rows, mirrored) for h in answers(side) if h.residual <= tolerance]
    found.sort(key=lambda head: head.residual)
    keep = 1e3 * max(rows.eps, found[0].residual) if found else 0.0
    return [head for head in found if head.residual <= keep]


def polish_scale(
    s: float,
    log_k: Callable[[float], tuple[Tensor, Tensor]],
    c: Tensor,
    used: Tensor,
    precision: Tensor,
) -> float:
    """Gauss–Newton on ``log s + log |k_j(s)| = log |c_j|``, kept only where it helps.

    ``log_k(s)`` gives ``log |k|`` and its slope in ``s``; ``used`` the rows, weighed by precision.
    """
    w, wanted = precision[used].pow(-2), c[used].abs().log()

    def gap(s: float) -> tuple[Tensor, Tensor]:
        value, slope = log_k(s)
        return math.log(s) + value[used] - wanted, 1 / s + slope[used]

    for _ in range(20):
        error, slope = gap(s)
        below = float((w * slope.square()).sum())
        new = s - float((w * slope * error).sum()) / below if below > 0 else s
        if not new > 0 or (w * gap(new)[0].square()).sum() >= (w * error.square()).sum():
            break
        s = new
    return s

"""The span of some gradient rows, how far a vector lies from it, and what lies in it by chance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from .transformer import Directions

__all__ = ["Span", "chance", "extend"]


class Span:
    r"""Rows' span as a test: ``distance(u)`` is the share of ``u`` that lies outside.

    Directions count with :math:`\epsilon/\sqrt{\sigma^2 + \epsilon^2}`: fully where the rows have
    nothing (σ = 0), not at all where they stand above the noise ε. With ``rank`` the cut is hard.

    Parameters
    ----------
    rows : Directions
        With their noise.
    rank : int, optional
        Directions to trust, where the noise is known to be larger than it looks.

    Attributes
    ----------
    rank : int
        Directions that stand above the noise.
    """

    def __init__(self, rows: Directions, rank: int | None = None) -> None:
        _, S, Vh = torch.linalg.svd(rows.matrix, full_matrices=True)
        S = functional.pad(S, (0, len(Vh) - len(S)))
        noise = max(rows.noise, 1e-300)
        self.rank = int((3 * noise < S).sum()) if rank is None else rank
        self.values, self.noise = S, noise
        share = noise / (S.square() + noise**2).sqrt()
        if rank is not None:
            share = (torch.arange(len(S), device=S.device) >= rank).double()
        self.outside = Vh.T * share

    def distance(self, u: Tensor) -> Tensor:
        """From 0 to 1, for vectors ``(n, d)`` of any length."""
        unit = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        far: Tensor = (unit @ self.outside).norm(dim=-1)
        return far


def chance(candidates: int, tolerance: float, dimension: int, rank: int) -> float:
    r""":math:`V \rho^\nu\, \Gamma(D/2) / (\Gamma(\nu/2 + 1)\, \Gamma((D - \nu)/2))` pass by chance.

    The share of a sphere near a subspace, for a small tolerance ρ; it lacks ν of D dimensions.
    Implements :eq:`span-chance`.
    """
    checks.number(tolerance, "tolerance", "a number, zero or more", lambda v: v >= 0)
    for value, name in ((candidates, "candidates"), (dimension, "dimension"), (rank, "rank")):
        checks.whole(value, name, 0)
    gap = dimension - rank
    if gap <= 0 or tolerance >= 1:
        return float(candidates)
    if tolerance <= 0:
        return 0.0
    log = gap * math.log(tolerance) + math.lgamma(dimension / 2)
    log -= math.lgamma(gap / 2 + 1) + math.lgamma(max(rank, 1) / 2)
    return min(candidates * math.exp(min(log, 700.0)), float(candidates))


def extend(
    prefixes: Tensor, words: Tensor, distance: Callable[[Tensor], Tensor], limit: float, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every prefix with every word after it, and those of them that the test accepts.

    Parameters
    ----------
    prefixes : Tensor
        ``(n, t)``.
    words : Tensor
        ``(m,)``.
    distance : callable
        From sentences to the test's distances.
    limit, most : float, int
        Largest distance, and how many at most: the nearest.

    Returns
    -------
    longer, distances, refused, ended : Tensor
        ``(k, t + 1)`` and ``(k,)``; the distances of the rest; which prefixes nothing follows.
    """
    longer = torch.cat(
        [prefixes.repeat_interleave(len(words), 0), words.repeat(len(prefixes))[:, None]], 1
    )
    far = distance(longer)
    near = far <= limit
    ended = ~near.reshape(len(prefixes), len(words)).any(dim=1)
    kept = far.argsort()[: min(most, int(near.sum()))]
    return longer[kept], far[kept], far[~near], ended

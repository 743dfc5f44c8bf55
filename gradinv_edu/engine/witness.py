"""Zeros of sparse directions: which are real, and which direction they are witnesses of."""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import Factors

__all__ = ["NonzeroRows", "products", "unit"]

FEW = 5  # rows in one proportion that are no chance


class NonzeroRows:
    """The rows of ``L`` that are not zero, and what noise leaves to be seen of their zeros."""

    def __init__(self, factors: Factors) -> None:
        self.left, self.values, self.eps = (
            factors.left[factors.living],
            factors.values,
            factors.eps,
        )
        m = len(self.left)
        self.products = products(self.left)
        self.least = max(1e-9, 1e-2 * self.eps) / m**0.5
        self.noise = self.eps * (self.left * self.values).norm(dim=1) + factors.noise / m**0.5

    def zeros(self, q: Tensor, slack: float = 1.0) -> Tensor:
        """Where ``l_j · q`` vanishes as far as noise lets one tell, ``(…, m)``."""
        grown = (q / self.values).norm(dim=1, keepdim=True)
        bound = (8 * slack * grown * self.noise).clamp_min(self.least)
        vanishes: Tensor = (q @ self.left.T).abs() <= bound
        return vanishes

    def witnessed(self, q: Tensor) -> Tensor:
        """Those of ``q``, ``(…, N)``, that hang on none of their zeros alone: solved from these."""
        size = (q @ self.left.T).abs() * len(self.left) ** 0.5
        sharp = self.zeros(q, 10)  # a descent stops near its end, sooner or later
        return torch.cat([self._witnessed(sharp | (size <= width)) for width in (1e-7, 1e-4)])

    def _witnessed(self, zero: Tensor) -> Tensor:
        N = self.left.shape[1]
        for _ in range(3):
            zero = zero[zero.sum(dim=1) >= N]
            gram = (zero.to(self.left) @ self.products).reshape(-1, N, N)
            values, vectors = torch.linalg.eigh(gram)
            inverse = torch.where(values > 1e-10, 1 / values, 0.0)
            inverse[:, 0] = 0
            pseudo = (vectors * inverse[:, None, :]) @ vectors.mT
            leverage = pseudo.flatten(1) @ self.products.T  # one: q hangs on this row
            fixed = torch.where(zero, leverage, 0.0).amax(dim=1) < 0.999
            q, fixed = vectors[:, :, 0], fixed & (values[:, 1] > 1e-10)
            zero = self.zeros(q)
        kept: Tensor = q[fixed & (zero.sum(dim=1) >= N)]
        return kept

    def sparsest(self, found: Tensor, new: Tensor) -> Tensor:
        """Sparsest first, each independent of those before it; then no pair hides another."""
        for _ in range(1 + self.left.shape[1]):
            if not len(new):
                break
            q = torch.cat([found, new])
            count = self.zeros(q).sum(dim=1)
            count[: len(found)] += 1  # the found stay, unless something is sparser by far
            found = _independent(q[count.argsort(descending=True, stable=True)])
            new = self._hidden(found)
        return found

    def _hidden(self, q: Tensor) -> Tensor:
        """What is sparser than one of these and comes of two: mixtures that share a sample."""
        count, found = self.zeros(q).sum(dim=1), [q[:0]]
        for i, j, ratio in self._repeats(q, FEW):
            new = self.witnessed(unit((q[i] - ratio * q[j])[None]))
            found.append(new[self.zeros(new).sum(dim=1) > count[i]])
        return torch.cat(found)

    def _repeats(self, q: Tensor, rows: int) -> list[tuple[int, int, float]]:
        """Pairs i, j and the ratio of ``L q_i`` to ``L q_j`` that occurs in so many rows."""
        K, on, found = q @ self.left.T, ~self.zeros(q), []
        safe, noise = torch.where(on, K, 1.0), max(1e-8, 100 * self.eps)
        for i in range(len(q)):
            ratios = torch.where(on & on[i], K[i] / safe, torch.nan).sort(dim=1).values
            low, high = ratios[:, : 1 - rows], ratios[:, rows - 1 :]
            tight = (high - low) <= noise * torch.maximum(low.abs(), high.abs())
            tight[i] = False
            first = tight.int().argmax(dim=1)
            for j in tight.any(dim=1).nonzero().flatten().tolist():
                found.append((i, j, float(ratios[j, first[j] + rows // 2])))
        return found

    def ambiguity(self, q: Tensor) -> str:
        """Why these need not be the samples; empty where nothing speaks against it."""
        if self._repeats(q, max(FEW, round(0.04 * len(self.left)))):
            return (
                "others are sparse as well: many rows of the gradient mix two samples in one "
                "proportion, as under a network with a single output, and sparsity cannot tell "
                "the samples apart."
            )
        zero, N = self.zeros(q).double(), len(q)
        scarce = zero.sum(dim=1) < (2 * N if self.eps > 1e-12 else N + 1)  # what chance leaves
        # a mixture that cancels wherever all of its samples are on is not zero where one is off
        share = zero.mean(dim=1)
        both, expected = zero @ zero.T / len(zero.T), torch.outer(share, share)
        spread = (expected * torch.outer(1 - share, 1 - share) / len(zero.T)).sqrt()
        apart = (both < expected / 2) & (both < expected - 4 * spread)
        if bool(scarce.any()) or (N > 2 and bool(apart.fill_diagonal_(False).any())):
            return (
                "they need not be the samples': most units are on, so that zeros are few, or "
                "shared by mixtures, as with more samples than outputs above. Give the layer's "
                "weight and bias, which tell."
            )
        return ""

    def refined(self, q: Tensor) -> Tensor:
        """Each direction once more, from all of its zeros."""
        return torch.stack([torch.linalg.svd(self.left[zero]).Vh[-1] for zero in self.zeros(q)])


def _independent(q: Tensor) -> Tensor:
    """The first of these directions, and each next one outside the span of those before it."""
    span, rest, chosen = q.new_zeros(q.shape[1], 0), q, []
    for _ in range(q.shape[1]):
        fresh = (rest.norm(dim=1) > 1e-3).nonzero().flatten()
        if len(fresh) == 0:
            break
        chosen.append(int(fresh[0]))
        span = torch.cat([span, unit(rest[chosen[-1]][None]).T], dim=1)
        rest = q - (q @ span) @ span.T
    return q[chosen]


def products(left: Tensor) -> Tensor:
    """``l_j l_jᵀ`` of every row, flat: ``(m, N²)``."""
    return (left[:, :, None] * left[:, None, :]).flatten(1)


def unit(q: Tensor) -> Tensor:
    """Rows of length one; zero where there is none."""
    return torch.nan_to_num(q / q.norm(dim=1, keepdim=True), 0.0, 0.0, 0.0)

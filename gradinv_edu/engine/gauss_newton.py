"""Equations that are not linear: linearised by autograd, solved by Gauss and Newton."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .krylov import Progress, Rows

__all__ = ["Linearised", "gauss_newton"]

ROUNDS = 40  # of Gauss and Newton
AT_ONCE = 64  # columns of a matrix
SHORTEST = 2.0**-10  # share of a step below which its linearisation is of no use
STALLED = 1e-3  # a step that lowers the residual by less, relatively, was the last


class Linearised:
    r""":math:`d \mapsto r'(x)\,d` and its adjoint, from one graph each.

    Parameters
    ----------
    rows : callable
        From an input to :class:`Rows`, twice differentiable by autograd.
    x : Tensor
        Where.
    """

    dtype = torch.float64

    def __init__(self, rows: Callable[[Tensor], Rows], x: Tensor) -> None:
        self.like = x
        with torch.enable_grad():
            self.leaf = x.detach().clone().requires_grad_()
            self.at = rows(self.leaf)
            parts = [p for p in (self.at.z, self.at.g) if p.requires_grad]
            # The adjoint is linear in the rows, so its own adjoint is the derivative.
            self.tangents = [torch.zeros_like(p, requires_grad=True) for p in parts]
            (self.pulled,) = torch.autograd.grad(
                parts, self.leaf, self.tangents, create_graph=True, retain_graph=True
            )
        self.parts = parts

    @property
    def value(self) -> Rows:
        """Rows at ``x``."""
        return Rows(self.at.z.detach(), self.at.g.detach())

    def forward(self, x: Tensor) -> Rows:
        """Change of the rows along ``x``."""
        return Rows(*self._pushed(x))

    def columns(self, steps: Tensor) -> Tensor:
        """Change of the rows along each of some steps, ``(steps, rows)``."""
        pushed = self._pushed(steps, is_grads_batched=True)
        return torch.cat([part.reshape(len(steps), -1) for part in pushed], dim=1)

    def _pushed(self, x: Tensor, **how: bool) -> list[Tensor]:
        """Change of both kinds of rows; zero for one that the input does not reach."""
        told = torch.autograd.grad(
            self.pulled, self.tangents, x, retain_graph=True, allow_unused=True, **how
        )
        found, many = iter(told), x.shape[: x.dim() - self.like.dim()]
        rows = []
        for part in (self.at.z, self.at.g):
            change = next(found) if part.requires_grad else None
            rows.append(x.new_zeros(*many, *part.shape) if change is None else change.detach())
        return rows

    def matrix(self) -> Tensor:
        """``(rows, unknowns)``."""
        n = self.like.numel()
        units = torch.eye(n, dtype=self.like.dtype, device=self.like.device)
        parts = torch.split(units.reshape(n, *self.like.shape), AT_ONCE)
        return torch.cat([self.columns(part) for part in parts]).T

    def adjoint(self, r: Rows) -> Tensor:
        """Rows pulled back to the input."""
        sides = [s for s, part in ((r.z, self.at.z), (r.g, self.at.g)) if part.requires_grad]
        (pulled,) = torch.autograd.grad(self.parts, self.leaf, sides, retain_graph=True)
        return pulled


def gauss_newton(
    rest: Callable[[Tensor], Rows],
    step: Callable[[Tensor, Rows, float], Tensor],
    x: Tensor,
    *,
    target: float = 0.0,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> tuple[Tensor, list[float]]:
    r""":math:`x \leftarrow x + t \arg\min_d \lVert J d - r(x) \rVert`, ``t`` halved until it helps.

    Parameters
    ----------
    rest : callable
        ``r``: what ``x`` leaves unexplained.
    step : callable
        Least-squares step from ``x``, ``r(x)`` and its norm.
    x : Tensor
        Where to begin.
    target : float
        Norm of ``r`` at which to stop.
    rounds : int
        Most steps.
    progress : callable, optional
        Called with the round and the norm.

    Returns
    -------
    x : Tensor
        The best answer.
    norms : list of float
        Of ``r``: at the start and after each step that helped.
    """
    r = rest(x)
    norms = [math.sqrt(r.squared_norm())]
    for turn in range(1, rounds + 1):
        if norms[-1] <= target or not math.isfinite(norms[-1]):
            break
        d, length = step(x, r, norms[-1]), 1.0
        while length > SHORTEST:
            found = rest(x + length * d)
            norm = math.sqrt(found.squared_norm())
            if norm < norms[-1]:
                x, r = x + length * d, found
                norms.append(norm)
                break
            length /= 2
        else:
            break
        if progress is not None:
            progress(turn, norm)
        if norms[-1] > (1 - STALLED) * norms[-2]:
            break
    return x, norms

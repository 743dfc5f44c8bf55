"""Which of two inputs an activation had: settled by the equations of the layer below it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..systems import LayerSystem, ScaledSystem
from .krylov import Rows, cgls, squared_norm
from .solve import DENSE, draw

__all__ = ["Doubt", "Sides", "confirmed", "settle"]

FIELDS = ("value", "k", "weight")

FOLDS = 4  # parts of the units, each judged by equations in which it had no part
SWEEPS, PATIENCE = 60, 8  # over all parts, at most, and without another unit becoming sure
PLAIN = 6  # rounds of the plain alternation that is tried first
FLOOR = 1e-4  # variance of a row that is sure, relative to that of a unit
UNSURE = 0.5  # expected number of units on the wrong side, below which all are decided
LOOSE, TIGHT, STEPS = 1e-4, 1e-10, 400  # of the conjugate gradients of a round
HOLDS = 1e-7  # relative rest of rows that hold: the layer's own solve then says more
CLOSE = 30.0  # times the largest rest: sides nearer to each other are not told by their own row
SEEN = 1e-4  # of a row's own size: what other rows must leave of it to confirm it
BITS = 10  # that each spare equation is sure to tell


@dataclass(frozen=True)
class Sides:
    """What holds at the output of a layer if the units above had certain inputs.

    Attributes
    ----------
    value, k : Tensor
        Output, and its gradient.
    weight : Tensor
        Of each entry of ``value`` as an equation.
    """

    value: Tensor
    k: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Doubt:
    """Units of which two inputs give the output that was found.

    Attributes
    ----------
    first, other : Sides
        If each had its input right of the activation's minimum, or left of it.
    units : Tensor
        Bool: which ones; elsewhere both sides are the same.
    """

    first: Sides
    other: Sides
    units: Tensor

    def choose(self, side: Tensor) -> Sides:
        """What holds with these units, bool, on their other side."""
        pairs = ((getattr(s, n) for s in (self.other, self.first)) for n in FIELDS)
        return Sides(*(torch.where(side, there, here) for there, here in pairs))

    def nearer(self, z: Tensor) -> Tensor:
        """Units whose other side is the nearer one to ``z``."""
        return self.units & ((z - self.other.value).abs() < (z - self.first.value).abs())

    def map(self, change: Callable[[Tensor], Tensor]) -> Doubt:
        """Return the same with every tensor under other names."""
        sides = (self.first, self.other)
        first, other = (Sides(*(change(getattr(s, n)) for n in FIELDS)) for s in sides)
        return Doubt(first, other, change(self.units))


class _Settling:
    """One layer's equations, with units in doubt above it."""

    def __init__(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        gradient: Tensor | None,
        doubt: Doubt,
    ) -> None:
        self.module, self.input_shape, self.gradient = module, input_shape, gradient
        self.doubt, self.first, self.units = doubt, doubt.first, doubt.units
        first, other = doubt.first, doubt.other
        self.gap = torch.where(self.units, other.value - first.value, 0.0)
        self.k_gap = torch.where(self.units, other.k - first.k, 0.0)
        sure = (first.weight > 0) & ~self.units
        known = first.value[sure] if bool(sure.any()) else first.value[first.weight > 0]
        self.size = float(known.square().mean()) if known.numel() else 1.0
        # a normal distribution of z has these odds; the slopes tell the densities of one a
        slopes = (first.k.abs() + 1e-300).log() - (other.k.abs() + 1e-300).log()
        odds = slopes - (other.value.square() - first.value.square()) / (2 * self.size)
        self.prior = torch.where(self.units, odds, -math.inf)
        self.x: Tensor | None = None

    def outputs(self, value: Tensor, k: Tensor, weight: Tensor, g: Tensor, tight: float) -> Tensor:
        """Solve with rows so weighted, and apply the layer to the answer."""
        gradient = None if self.gradient is None else g.clamp_min(1e-6).sqrt()
        system = LayerSystem(self.module, k, self.input_shape, weight, gradient)
        if gradient is None:
            system = system.without(gradient=True)
        A, b = ScaledSystem(system), system.right_hand_side(value, self.gradient)
        fast = A.to(torch.float32)
        target = tight * math.sqrt(squared_norm(A.adjoint(b)))
        steps = STEPS if tight == LOOSE else 10 * STEPS
        self.x = cgls(A, b, target, steps, fast=fast, start=self.x).x
        with torch.no_grad():
            z: Tensor = self.module(self.x)
        return z

    def alternate(self, side: Tensor, rounds: int, careful: bool) -> tuple[Tensor, bool]:
        """Solve, look which side is nearer, solve again; whether every equation then holds.

        Carefully: rows whose sides lie closer to each other than the largest of what is left
        over are masked before their sides are looked at.
        """
        for _ in range(rounds):
            z, worst, rest = self._tried(side)
            if rest < HOLDS and torch.equal(self.doubt.nearer(z), side):
                return side, True
            if careful:
                z = self._tried(side, self.gap.abs() > CLOSE * worst)[0]
            new = self.doubt.nearer(z)
            if torch.equal(new, side):
                break
            side = new
        return side, False

    def _tried(self, side: Tensor, used: Tensor | None = None) -> tuple[Tensor, float, float]:
        """Outputs by these sides' equations; the largest of what is left, and all, relative."""
        now = self.doubt.choose(side)
        weight = now.weight if used is None else now.weight * (used | ~self.units)
        z = self.outputs(now.value, now.k, weight, now.value.new_ones(self.gradient_shape), TIGHT)
        left = now.weight * (z - now.value)
        size = float((now.weight * now.value).norm()) or 1.0
        return z, float(left.abs().max()), float(left.norm()) / size

    @property
    def gradient_shape(self) -> torch.Size:
        """Of the weight gradients, packed."""
        return torch.Size([0]) if self.gradient is None else self.gradient.shape

    def cross_validate(self, generator: torch.Generator) -> Tensor:
        """Probability that each unit is on its other side."""
        p = torch.sigmoid(self.prior)
        part = torch.randint(FOLDS, p.shape, generator=generator, device=generator.device).to(
            p.device
        )
        least, since = math.inf, 0
        for sweep in range(SWEEPS * FOLDS):
            if sweep % FOLDS == 0:
                open_ = float((p * (1 - p)).sum())
                least, since = (open_, 0) if open_ < 0.99 * least else (least, since + 1)
                if sweep and (open_ < UNSURE or since > PATIENCE):
                    break
                part = part.flatten()[
                    torch.randperm(part.numel(), generator=generator).to(part.device)
                ].reshape(part.shape)
            held = part == sweep % FOLDS
            spread = p * (1 - p)
            floor = FLOOR * self.size
            weight = (floor / (floor + spread * self.gap.square())).sqrt() * ~held
            weight = weight * torch.maximum(self.first.weight, self.units * self.doubt.other.weight)
            k = self.first.k + p * self.k_gap
            z = self.outputs(
                self.first.value + p * self.gap,
                k,
                weight,
                self._trust(k, spread * self.k_gap.square(), floor),
                LOOSE,
            )
            sure = held & ~self.units & (self.first.weight > 0)
            miss = float((z - self.first.value)[sure].square().mean()) if bool(sure.any()) else 0.0
            error = max(miss, 1e-12 * self.size)
            far, near = (z - self.first.value).square(), (z - self.first.value - self.gap).square()
            told = torch.sigmoid(self.prior + (far - near) / (2 * error))
            p = torch.where(held & self.units, told, p)
        return p

    def _trust(self, k: Tensor, spread: Tensor, floor: float) -> Tensor:
        """Weight of each gradient row, squared, by the doubt about the ``k`` in it."""
        shape = self.gradient_shape
        if not shape.numel():
            return k.new_zeros(shape)
        x2 = 1.0 if self.x is None else max(float(self.x.square().mean()), 1e-12)
        filters = k.dim() > 2 and len(shape) == k.dim() and shape[0] == k.shape[1]
        dim = 1 if filters else k.dim() - 1
        if not filters and (len(shape) != 2 or shape[0] != k.shape[-1]):
            return k.new_full(shape, floor / (floor + float(spread.sum()) * x2 * self._scale(k)))
        others = [d for d in range(k.dim()) if d != dim]
        trust = floor / (floor + spread.sum(others) * x2 * self._scale(k))
        return trust.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def _scale(self, k: Tensor) -> float:
        """``‖W‖²/‖k‖²``: by which gradient rows are scaled to weigh as much as the others."""
        weights = sum(
            float(p.detach().square().sum()) for p in self.module.parameters() if p.dim() > 1
        )
        return weights / max(float(k.square().sum()), 1e-300)


def settle(
    module: nn.Module,
    input_shape: tuple[int, ...],
    gradient: Tensor | None,
    doubt: Doubt,
    generator: torch.Generator | None = None,
) -> tuple[Sides, int]:
    r""":math:`W x + b = z_s,\; \sum_\ell k_s(\ell) \otimes \text{patch}_\ell(x) = G`.

    Both the equations' right-hand side ``z`` and the output gradient ``k = k_a φ'(z)`` depend on
    the side ``s`` of each unit. Plain alternation first: solve for ``x`` with the likelier sides,
    take for each unit the nearer one, and again. Where that does not come to rest at an answer,
    by cross-validation: units have probabilities, rows enter with their expected value and a
    weight by their variance, and **each unit is judged by equations in which it had no part**,
    whose error the units with one input, left out likewise, tell.

    Parameters
    ----------
    module : nn.Module
        Affine in its input.
    input_shape : tuple of int
        Of one sample.
    gradient : Tensor or None
        Its weight gradients, packed.
    doubt : Doubt
        Both sides, and the units that have two.
    generator : torch.Generator, optional
        Of the parts.

    Returns
    -------
    sides : Sides
        What was settled on: to be verified by the layer's residual and rank, and by
        :func:`confirmed`.
    open : int
        Units whose side is not settled.

    Notes
    -----
    Source: this project's.
    """
    generator = generator or torch.Generator().manual_seed(19970901)
    way = _Settling(module, input_shape, gradient, doubt)
    side, holds = way.alternate(way.prior > 0, PLAIN, careful=False)
    unsure = 0.0
    if not holds:
        way.x = None
        p = way.cross_validate(generator)
        unsure = float((p * (1 - p)).sum())
        side, holds = way.alternate(p > 0.5, PLAIN, careful=True)
    return doubt.choose(side), 0 if holds else max(1, round(unsure))


def confirmed(
    system: LayerSystem, units: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    r""":math:`((I - A A^{+})\,\xi)_j \neq 0`: rows that the other equations confirm.

    A row whose right-hand side may be one of two is settled only if the others do not leave it
    free: random right-hand sides are laid on the rows, and what no input explains of them
    vanishes just where a row stands alone. Where spare equations are too few for the number of
    choices, none is confirmed.

    Parameters
    ----------
    system : LayerSystem
        Of full rank, with the sides settled.
    units : Tensor
        Bool, shaped as its ``k``: the rows in doubt.

    Returns
    -------
    Tensor
        Bool, of their shape.
    """
    spare = system.equations - system.unknowns
    if spare < max(1, int(units.sum()) / BITS):
        return torch.zeros_like(units)
    rows = torch.ones_like(system.k) if system.row_mask is None else system.row_mask
    system = LayerSystem(system.module, system.k, system.input_shape, rows, system.gradient_mask)
    A = ScaledSystem(system)  # rows as they are: a mask keeps filters from being mixed
    if A.like.numel() <= DENSE:
        Q = torch.linalg.qr(A.matrix()).Q
        free = (1 - Q.square().sum(1)).clamp_min(0).sqrt()[: units.numel()].reshape(units.shape)
        proven: Tensor = units & ((free > SEEN) | (rows == 0))
        return proven
    generator = generator or torch.Generator().manual_seed(20110815)
    free = torch.zeros_like(system.k)
    for _ in range(2):
        z, g = draw(system.k, generator), draw(system.k.new_empty(system.gradient_shape), generator)
        dye = Rows(rows * z, g if system.gradient_mask is None else system.gradient_mask * g)
        target = 1e-7 * math.sqrt(squared_norm(A.adjoint(dye)))
        run = cgls(A, dye, target, 10_000, fast=A.to(torch.float32))
        if not run.converged:
            return torch.zeros_like(units)
        free = torch.maximum(free, run.unexplained.z.abs())
    return units & ((free > SEEN) | (rows == 0))

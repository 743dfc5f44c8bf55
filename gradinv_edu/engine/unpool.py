"""Max pooling undone: the places of its winners, found by annealing and verified without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import InconsistentGradientError, InvalidTensorError
from ..systems import LayerSystem, ScaledSystem
from .annealing import Annealing
from .folded import Beneath, Folded
from .kinks import told_by_sums
from .krylov import Progress, Rows, Run, cgls, squared_norm
from .layers import rule_of
from .layers.convolution import ConvolutionOperator
from .solve import Solution, answered, rank_test
from .winners import Winners, find_winners, windows

__all__ = ["Unpooled", "Watch", "read", "solve"]

ROUNDS = 200  # of annealing, at most
ACCEPT = 1e-8  # what a right answer may leave of rows, bounds and gradient
NOISY = 300.0  # times the noise, where that is more
EQUAL = 1e-8  # maxima that differ by less, relative to the largest, are one
NEAR = 10.0  # times the noise: windows that may be on the other side of zero
BLURRED = 30.0  # times the noise, where that is more
FREED = 6  # rounds without the prior that bring it no nearer: then it is back
NEARBY = 1e-3  # misfit of these from which their choice is tried
ANYWAY = 25  # rounds after which one is tried in any case: ties never settle
STEPS = 5000  # of conjugate gradients, to try a choice of places
HOPELESS = 1000  # of these, in any case
TARGET = 1e-15  # of their residual
SETTLING = 5  # times that the sides of the ReLU below may change with the answer

Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Unpooled:
    """What max pooling and the layer below it gave.

    Attributes
    ----------
    solution : Solution
        Of the equations with every winner in its place; ``x`` is ``(1, *input_shape)``. Of full
        rank only if ``verified``; where no choice of places fits, the search's last guess, with
        everything undetermined.
    k : Tensor
        ``∂L/∂y`` at the output of the affine layer below the pooling and its activation.
    winners : Winners
        Distinct maxima, and their candidates.
    places : Tensor
        ``(winners,)``, where each is, in all maps end to end.
    equations : int
        Rows of the winners, and entries of the gradient.
    rounds : int
        Of annealing.
    misfit : float
        Largest of what ``x`` leaves of rows, bounds and gradient, relative.
    verified : bool
        Whether all of these hold, they determine every unknown, and so many are to spare that no
        other choice of places is to be expected to fit.
    """

    solution: Solution
    k: Tensor
    winners: Winners
    places: Tensor
    equations: int
    rounds: int
    misfit: float
    verified: bool


def solve(
    conv: nn.Module,
    pool: nn.Module,
    value: Tensor,
    k: Tensor,
    weight_gradient: Tensor,
    input_shape: tuple[int, ...],
    *,
    activation: nn.Module | None = None,
    below: nn.Module | None = None,
    noise: float = 0.0,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
    rounds: int = ROUNDS,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Unpooled:
    r""":math:`(W x + b)_{\ell_w} = v_w \ge (W x + b)_\ell,\; \sum_w k_w \otimes x_{\ell_w} = G`.

    The input ``x`` of ``max pooling ∘ activation ∘ conv`` from the pooled value. Each pooled
    value ``v_w`` is a row at a place ``q_w`` that is not known; the loss's gradient by it, ``k_w``,
    lies at the same place. Both are unknown together, and :class:`~.annealing.Annealing` finds
    them; what it finds is then tried without its prior.

    Parameters
    ----------
    conv : nn.Module
        A convolution, or one with what scales and shifts its filters (batch norm in eval mode).
    pool : nn.Module
        Max pooling, of any window that can be listed.
    value, k : Tensor
        ``(1, filters, …)``: output of the pooling, and ``∂L/∂`` of it.
    weight_gradient : Tensor
        ``∂L/∂W`` of the convolution, ``G``.
    input_shape : tuple of int
        Of the unknown ``x``, without the batch dimension.
    activation : nn.Module, optional
        Between ``conv`` and ``pool``, increasing.
    below : nn.Module, optional
        One more affine layer, with a ReLU between it and ``conv``: ``x`` is its input.
    noise : float
        Relative noise of the gradients; the values' may be some ten times as large.
    weight : Tensor, optional
        Shaped as ``value``: 0 where it is not known.
    sums : Tensor, optional
        ``Σ_q ∂L/∂y``, ``(filters,)``: gradient of the bias, or the norm's, of ``conv``. It tells
        which windows near zero were alive.
    rounds : int
        Of annealing, at most.
    generator : torch.Generator, optional
        Of the rows held out and of the dye that tells the rank; a fixed one by default.
    progress : callable, optional
        Called each round with its number and the estimated error.
    watch : callable, optional
        Called each round with its number, the likeliest place of each winner, in all maps end to
        end, and its probability.

    Raises
    ------
    InvalidTensorError
        If a tensor or a shape does not fit the layers.
    UnsupportedLayerError
        If a layer is not of the kinds above.
    VanishingGradientError
        If the weight gradient is zero everywhere.
    InconsistentGradientError
        If every window is dead, and the gradient is not zero.

    Notes
    -----
    Source: this project's own; see :mod:`~gradinv_edu.engine.annealing`.
    """
    lower = None if below is None else Folded(below, tuple(input_shape))
    layer = Folded(conv, tuple(input_shape) if lower is None else lower.output_shape)
    winners = read(layer, pool, activation, value, k, weight, sums, noise)
    gradient = checks.shaped(weight_gradient, "weight_gradient", tuple(layer.weight.shape))
    gradient = layer.unfolded(checks.not_all_zero(gradient, "weight_gradient"))
    under = Beneath(lower, winners.values.new_zeros(1, *layer.input_shape))
    generator = generator or torch.Generator().manual_seed(0)
    search = Annealing(layer, under, winners, gradient, noise, generator)

    def chosen() -> _Choice:
        return _Choice(layer, under, winners, gradient, search.choice)

    def turn(free: bool) -> None:
        search.turn(free)
        if progress is not None:
            progress(search.round, search.error / search.size)
        if watch is not None:
            watch(search.round, winners.at(search.choice), search.belief.max(1).values)

    accept = max(ACCEPT, NOISY * noise)
    near, found, tried, wait = max(NEARBY, 10 * accept), chosen(), 0, 2
    misfit, solution = math.inf, None
    while solution is None and search.round < rounds:
        turn(free=False)
        good, anyway = False, search.round % ANYWAY == 0
        if search.settling and search.round - tried >= wait:
            best, since = math.inf, 0
            while not good and since < FREED and search.round < rounds:
                turn(free=True)
                good = search.changed == 0 and chosen().misfit(search.x) <= near
                best, since = min(best, search.error), 0 if search.error < best else since + 1
            tried, wait = search.round, min(wait + 1, 8)
        if good or anyway:
            found = chosen()
            run = found.solve(search.x, STEPS if good else HOPELESS)
            misfit = found.misfit(run.x)
            solution = found.account(run, generator) if misfit <= accept else None
    if solution is None:  # nothing is proven: the annealed input is nearer than any wrong choice's
        found = chosen()
        misfit = found.misfit(search.x)
        solution = Solution(search.x, misfit, search.round, 1.0, 0.0, 0.0, converged=False)
    # digits by which a wrong choice of places fails, against those of the number of choices
    spare = (found.equations - solution.x.numel()) * -math.log10(accept)
    proven = spare > winners.arrangements + under.arrangements
    solution = replace(solution, converged=solution.converged and proven)
    return Unpooled(
        solution=solution,
        k=found.k,
        winners=winners,
        places=found.at,
        equations=found.equations,
        rounds=search.round,
        misfit=misfit,
        verified=solution.full_rank,
    )


def read(
    layer: Folded,
    pool: nn.Module,
    activation: nn.Module | None,
    value: Tensor,
    k: Tensor,
    weight: Tensor | None,
    sums: Tensor | None,
    noise: float,
) -> Winners:
    """Winners of the layer's own output, the activation undone."""
    filters, *map_shape = layer.output_shape
    places = windows(pool, tuple(map_shape)).to(layer.weight.device)
    value, k = checks.finite(value, "value"), checks.finite(k, "k")
    for name, tensor in (("value", value), ("k", k), ("weight", weight)):
        if tensor is not None and (len(tensor), tensor.numel()) != (1, filters * len(places)):
            raise InvalidTensorError(
                f"{name} has shape {tuple(tensor.shape)}, but one sample has {filters} maps of "
                f"{len(places)} windows each."
            )
    value, k = value.reshape(filters, -1), k.reshape(filters, -1)
    known = torch.ones_like(value) if weight is None else weight.reshape(filters, -1)
    known, live, bounds = known > 0, known > 0, value
    if activation is not None:
        undone = rule_of(activation).undo(value, type(activation).__name__, noise)
        # What a ReLU has cut off lies below zero; what is cut off above, nobody knows.
        low = value <= float(activation(torch.zeros(1)))
        bounds = torch.where(undone.known, undone.inputs, torch.where(low, 0.0, torch.inf))
        live, z, slope = known & undone.known, undone.inputs, undone.slope
        if sums is not None and rule_of(activation).rectifies:
            misread = _misread(value, k, live, sums, noise)
            live = live ^ misread
            z, slope = (
                torch.where(misread, value * live, z),
                torch.where(misread, live.to(k), slope),
            )
        value, k = z, k * slope
    bounds = torch.where(known, bounds, torch.inf)
    k = k * (layer.scale != 0)[:, None]  # such a filter's gradient tells nothing
    if not bool(live.any()):
        raise InconsistentGradientError(
            "The layers above determine no output of the pooling: nothing leads below it."
            if not bool(known.any())
            else "Every output of the pooling that is known lies where the activation is constant: "
            "nothing leads below it."
        )
    tolerance = max(EQUAL, BLURRED * noise) * float(value.abs().max())
    return find_winners(value, k, live, bounds, places, tuple(map_shape), tolerance)


def _misread(value: Tensor, k: Tensor, live: Tensor, sums: Tensor, noise: float) -> Tensor:
    """Windows near zero that are alive though they seem dead, or the other way."""
    near = (value.abs() <= NEAR * max(noise, EQUAL) * value.abs().max()) | ~live
    turn = torch.where(live, -k, k) * near
    return told_by_sums((k * live)[None], turn[None], sums, noise)[0]


class _Placed:
    """Rows and gradient with every winner in its place, down to the unknown."""

    def __init__(
        self, layer: Folded, under: Beneath, system: LayerSystem, dtype: torch.dtype = torch.float64
    ) -> None:
        self.layer, self.under, self.system, self.dtype = layer, under, system, dtype
        scaled = ScaledSystem(system, dtype).operator
        assert isinstance(scaled, ConvolutionOperator) and system.row_mask is not None
        self.weight, self.k = layer.matrix(scaled.weight), scaled.k.flatten(2)[0]
        self.mask = system.row_mask.to(dtype)

    @property
    def like(self) -> Tensor:
        """Zeros of the unknown's shape."""
        return self.under.offset.new_zeros(self.under.shape)

    def to(self, dtype: torch.dtype) -> _Placed:
        """Return the same map in another precision."""
        return _Placed(self.layer, self.under, self.system, dtype)

    def forward(self, x: Tensor) -> Rows:
        """Rows and gradient of ``x``."""
        P = self.layer.patches(self.under.forward(x))
        rows = self.mask * (self.weight @ P).reshape(self.mask.shape)
        return Rows(rows, self.layer.of_matrix(self.k @ P.T))

    def adjoint(self, r: Rows) -> Tensor:
        """Both, pulled back."""
        P = self.weight.T @ (self.mask * r.z).flatten(2)[0] + self.layer.matrix(r.g).T @ self.k
        return self.under.adjoint(self.layer.patches_adjoint(P))


class _Choice:
    """Every winner in one place, without any prior."""

    def __init__(
        self,
        layer: Folded,
        under: Beneath,
        winners: Winners,
        gradient: Tensor,
        choice: Tensor,
    ) -> None:
        self.layer, self.under, self.winners, self.gradient = layer, under, winners, gradient
        self.at = winners.at(choice)
        placed = torch.zeros_like(winners.places, dtype=torch.float64)
        placed.scatter_(1, choice[:, None], 1.0)
        self.k = winners.scatter(placed * winners.k[:, None])
        self.mask = winners.scatter(placed).clamp(max=1)
        self.equations = len(self.at) + int((gradient != 0).sum())

    def solve(self, x: Tensor, steps: int) -> Run:
        """The input that these places want, from a guess."""
        values = torch.zeros_like(self.mask)
        values.view(-1)[self.at] = self.winners.values
        system = LayerSystem(self.layer.conv, self.k, self.layer.input_shape, row_mask=self.mask)
        for _ in range(SETTLING):
            self.under.look(x)
            side, offset = self.under.side, self.under.offset
            self.map = _Placed(self.layer, self.under, system)
            self.b = system.right_hand_side(
                values - self.layer.rows(offset),
                self.gradient - self.layer.gradient(self.k, offset),
            )
            target = TARGET * math.sqrt(squared_norm(self.map.adjoint(self.b)))
            fast = self.map.to(torch.float32)
            run = cgls(self.map, self.b, target, steps, fast=fast, start=x)
            x = run.x
            self.under.look(x)
            if bool((self.under.side == side).all()):
                break
        return run

    def misfit(self, x: Tensor) -> float:
        """Largest of what ``x`` leaves of rows, bounds and gradient, relative."""
        w, a = self.winners, self.under.look(x)
        z, size = self.layer(a), float(w.values.abs().mean()) or 1.0
        off = (self.layer.gradient(self.k, a) - self.gradient).norm() / self.gradient.norm()
        rows = (z.view(-1)[self.at] - w.values).abs().max() / size
        over = (z.reshape(w.bounds.shape) - w.bounds).max() / size
        return max(map(float, (off, rows, over)))

    def account(self, run: Run, generator: torch.Generator) -> Solution:
        """The answer, with the rank of its equations."""
        fast = self.map.to(torch.float32)
        return answered(rank_test(self.map, generator=generator, fast=fast), run, self.b)

"""Blocks of branches: ways from one place that meet again, and the input that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import GradientInversionError
from ..systems import LayerSystem
from .gauss_newton import Linearised, gauss_newton
from .krylov import Progress, Rows, cgls, squared_norm
from .layers import pack, pull_back, rule_of, weight_names
from .layers.branches import Block
from .solve import Solution, draw, rank_test

__all__ = ["BlockSystem", "solve", "two_systems"]

SETTLED = 4e-15  # relative residual at which float64 has nothing left to give
SOLVED = 1e-12  # relative residual of the normal equations of a round; the first need less
EXPLAINED = 1e-9  # relative residual of an answer that needs no second attempt


class BlockSystem:
    r""":math:`f(x) + W_s x = z,\; \partial L/\partial\theta(x) = G_\theta`.

    The equations of a block, such as one whose output is the sum of two ways, given the output
    ``z`` and its gradient ``k = ∂L/∂z``. A sum hands the same ``k`` to both ways, so the last
    layer of each keeps its gradient constraints; the input is shared, and so the unknowns are
    too. A gradient further down a way depends on the side of every kink above it and jumps there:
    it is left out at first, and joins where the others leave part of the input open, once they
    have told the sides.
    Implements :eq:`residual-block`.

    Parameters
    ----------
    block : Block
        Float64.
    output_gradient : Tensor
        ``k``, ``(N, *output_shape)``.
    gradients : mapping of str to Tensor
        ``∂L/∂θ`` by the parameter's name in the block; one that was not sent is left out.
    row_mask : Tensor, optional
        Shaped as ``k``: weight of each entry of the output as an equation.
    """

    def __init__(
        self,
        block: Block,
        output_gradient: Tensor,
        gradients: Mapping[str, Tensor],
        row_mask: Tensor | None = None,
    ) -> None:
        self.block, self.k, self.gradients = block, output_gradient, dict(gradients)
        self.constants = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        weights = [name for name in gradients if name.rpartition(".")[2] != "bias"]
        smooth = [name for name in weights if name in block.smooth()]
        self.choices = {"sum": [], "smooth": smooth, "all": weights}
        self.used, self.jumping = smooth, len(smooth) < len(weights)
        self.kinked = rule_of(block).kinked
        self.row_mask = torch.ones_like(output_gradient) if row_mask is None else row_mask
        self.scale = 1.0

    @property
    def weight_equations(self) -> int:
        """Entries of the output that the mask leaves."""
        return int((self.row_mask != 0).sum())

    @property
    def gradient_equations(self) -> int:
        """Entries of the gradients used to find the input."""
        return sum(self.gradients[name].numel() for name in self.used)

    def use(self, rows: str) -> None:
        """Choose among the gradients: none ("sum"), those without jumps ("smooth"), or "all"."""
        self.used = self.choices[rows]

    def rows(self, x: Tensor) -> Rows:
        """Masked outputs, and the gradients in use, at ``x``; differentiable."""
        z, found = self._at(x, self.used)
        g = [found[name].reshape(-1) for name in self.used]
        return Rows(self.row_mask * z, self.scale * torch.cat([*g, x.new_zeros(0)]))

    def _at(self, x: Tensor, names: list[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with torch.enable_grad():
            own = {name: self.constants[name].detach().requires_grad_() for name in names}
            out: Tensor = functional_call(self.block, {**self.constants, **own}, (x,))
            if not own:
                return out, {}
            found = torch.autograd.grad(
                out, list(own.values()), self.k, create_graph=x.requires_grad, allow_unused=True
            )
        pairs = zip(own.items(), found, strict=True)
        return out, {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}

    def gradients_at(self, x: Tensor) -> dict[str, Tensor]:
        """What a client with this input would send of the block's parameters."""
        return {name: g.detach() for name, g in self._at(x, list(self.gradients))[1].items()}

    def rest(self, outputs: Tensor, x: Tensor) -> Rows:
        """What ``x`` leaves unexplained of the rows in use."""
        known = torch.where(self.row_mask > 0, outputs, torch.zeros_like(outputs))
        g = [self.gradients[name].reshape(-1) for name in self.used]
        found = self.rows(x)
        sent = self.scale * torch.cat([*g, outputs.new_zeros(0)])
        return Rows(self.row_mask * known - found.z.detach(), sent - found.g.detach())

    def balance(self, x: Tensor, generator: torch.Generator) -> None:
        """Weigh the gradient rows so that both kinds answer alike to a random step."""
        step = Linearised(self.rows, x).forward(draw(x, generator))
        z, g = squared_norm(step.z), squared_norm(step.g)
        if z > 0 and g > 0:
            self.scale *= math.sqrt(z / g)

    def residual(self, x: Tensor, outputs: Tensor) -> float:
        """Relative norm of what ``x`` leaves unexplained, every gradient of the block included."""
        z, found = self._at(x, list(self.gradients))
        known = torch.where(self.row_mask > 0, outputs, z.detach())
        pairs = [(self.row_mask * (z.detach() - known), self.row_mask * known)]
        pairs += [(found[n].detach() - given, given) for n, given in self.gradients.items()]
        gaps = (math.sqrt(squared_norm(a) / squared_norm(b)) for a, b in pairs if bool(b.any()))
        return max(gaps, default=0.0)

    def cleaned(self, solution: Solution, outputs: Tensor, noise: float) -> Solution:
        """The same, or zero where that explains everything: then what was found is rounding."""
        zero = torch.zeros_like(solution.x)
        gap = self.residual(zero, outputs)
        return replace(solution, x=zero, residual=gap) if gap <= 10 * noise else solution


def solve(
    system: BlockSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Solution:
    r""":math:`x \leftarrow x + \arg\min_d \lVert J d - (b - r(x)) \rVert` (Gauss-Newton).

    From the sum itself, where the shortcut is the identity: a block is a small change of it.
    Where that leads nowhere, from two linear systems instead (:func:`two_systems`), with the
    gradients that jump taken in.

    Parameters
    ----------
    system : BlockSystem
        The block's equations.
    outputs : Tensor
        ``s``, shaped as ``k``; masked entries may be anything.
    input_shape : tuple of int
        Of one sample.
    noise : float
        Relative noise of the gradients: rounds that would only fit it are not spent.
    generator, progress
        As for :func:`~gradinv_edu.engine.solve.least_squares`.

    Returns
    -------
    Solution
        Its ``residual`` is over the outputs and every gradient of the block, those too that were
        not used to find the input.

    Notes
    -----
    Source: this project's.
    """
    generator = generator or torch.Generator().manual_seed(20151210)
    best: tuple[float, Tensor] | None = None
    iterations = 0
    for start, rows in _starts(system, outputs, input_shape, noise, generator):
        system.use(rows)
        system.balance(start, generator)
        target = max(SETTLED, 1e-3 * noise)
        x, spent = _descend(system, outputs, start, target, progress)
        gap, iterations = system.residual(x, outputs), iterations + spent
        best = (gap, x) if best is None or gap < best[0] else best
        if gap <= max(EXPLAINED, 1e3 * noise):
            break
    assert best is not None
    for rows in ("smooth", "all"):  # those that jump hold at the answer: what do they determine?
        system.use(rows)
        account = _account(system, best[1], generator)
        iterations += account.iterations
        if account.full_rank or not system.jumping:
            break
    return replace(account, x=best[1], residual=best[0], iterations=iterations)


def _account(system: BlockSystem, x: Tensor, generator: torch.Generator) -> Solution:
    """What the equations in use leave open at ``x``."""
    cap = 1000 + 4 * math.isqrt(x.numel())
    return replace(
        rank_test(Linearised(system.rows, x), x, cap=cap, generator=generator), converged=True
    )


def _descend(
    system: BlockSystem, outputs: Tensor, x: Tensor, target: float, progress: Progress | None
) -> tuple[Tensor, int]:
    """Gauss and Newton from ``x``, each step as exact as the residual deserves."""
    size = math.sqrt(system.rest(outputs, torch.zeros_like(x)).squared_norm()) or 1.0
    cap, iterations = 1000 + 4 * math.isqrt(x.numel()), 0

    def step(x: Tensor, r: Rows, gap: float) -> Tensor:
        nonlocal iterations
        at = Linearised(system.rows, x)
        wanted = max(SOLVED, min(1e-2, gap / size)) * math.sqrt(squared_norm(at.adjoint(r)))
        run = cgls(at, r, wanted, cap)
        iterations += run.iterations
        return run.x

    x, _ = gauss_newton(
        lambda x: system.rest(outputs, x), step, x, target=target * size, progress=progress
    )
    return x, iterations


def _starts(
    system: BlockSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    noise: float,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, str]]:
    """Where to begin, and the rows that lead on from there; the likelier first."""
    shape = (len(outputs), *input_shape)
    ways = system.block.ways()
    plain = ways is not None and all(isinstance(module, nn.Identity) for module in ways[1])
    alike = plain and outputs.shape == shape
    known = torch.where(system.row_mask > 0, outputs, torch.zeros_like(outputs))
    if alike and system.kinked and system.weight_equations == known.numel():
        yield known, "sum"  # close to a linear map with an inverse: no kink can mislead
    if alike:
        yield known, "smooth"
    if system.kinked:
        start = two_systems(system, outputs, input_shape, noise=noise, generator=generator)
        if start is not None:
            yield start, "all"
    if not alike:
        size = float(known.norm()) / math.sqrt(known.numel())
        yield 1e-3 * size * draw(outputs.new_empty(shape), generator), "smooth"


def two_systems(
    system: BlockSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    r""":math:`W_s x + W_2 a = z,\; K_2 a = G_2` for ``(x, a)``; then ``W_1 x = φ⁻¹(a)``.

    A block ``W_s x + W_2 φ(W_1 x)`` with its hidden activation taken for an unknown of its own:
    first one linear system, whose ``a`` tells the sides of the kinks, then another for ``x``
    alone, with everything that the first could not use.

    Parameters
    ----------
    system, outputs, input_shape, noise, generator
        As for :func:`~gradinv_edu.segments.solve_block`.

    Returns
    -------
    Tensor or None
        ``(N, *input_shape)``; None for blocks of another form.
    """
    parts = _parts(system.block)
    if parts is None:
        return None
    low, activation, high, short = parts
    x = outputs.new_zeros(1, *input_shape)
    with torch.no_grad():
        shapes = [x.shape[1:], low(x).shape[1:]]
        try:
            pair = _solved(_Pair(high, short, shapes), system, system.k, outputs, noise, generator)
            a = pair[:, math.prod(input_shape) :].reshape(-1, *shapes[1])
            below = rule_of(activation).undo(a, "activation", max(1e-9, noise))
            k = pull_back(high, system.k, a) * below.slope
            known = torch.cat([below.known.flatten(1), system.row_mask.flatten(1)], dim=1)
            return _solved(
                _Fork(low, short, x.shape[1:]),
                system,
                torch.cat([k.flatten(1), system.k.flatten(1)], dim=1),
                torch.cat([below.inputs.flatten(1), (outputs - high(a)).flatten(1)], dim=1),
                noise,
                generator,
                known.to(torch.float64),
            ).reshape(-1, *input_shape)
        except GradientInversionError:
            return None


class _Pair(nn.Module):
    """Both summands from ``(x, a)`` end to end."""

    def __init__(
        self, high: nn.Module, short: nn.Module, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.high, self.short, self.shapes = high, short, shapes
        self.sizes = [math.prod(shape) for shape in shapes]

    def forward(self, v: Tensor) -> Tensor:
        x, a = torch.split(v, self.sizes, dim=1)
        x, a = x.reshape(-1, *self.shapes[0]), a.reshape(-1, *self.shapes[1])
        total: Tensor = self.short(x) + self.high(a)
        return total


class _Fork(nn.Module):
    """What both ways make of ``x`` before anything bends it, end to end."""

    def __init__(self, low: nn.Module, short: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.low, self.short, self.shape, self.sizes = low, short, shape, [math.prod(shape)]

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.shape)
        return torch.cat([self.low(x).flatten(1), self.short(x).flatten(1)], dim=1)


def _parts(block: Block) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module] | None:
    """``(W_1, φ, W_2, W_s)`` of a block ``W_s x + W_2 φ(W_1 x)``; None for another form."""
    ways = block.ways()
    if ways is None or not all(_straight(module) for module in ways[1]):
        return None
    branch, short = ways
    bends = [i for i, module in enumerate(branch) if not _straight(module)]
    if len(bends) != 1 or not rule_of(branch[bends[0]]).elementwise:
        return None
    low, high = branch[: bends[0]], branch[bends[0] + 1 :]
    return nn.Sequential(*low), branch[bends[0]], nn.Sequential(*high), nn.Sequential(*short)


def _straight(module: nn.Module) -> bool:
    rule = rule_of(module)
    dropout = isinstance(module, nn.modules.dropout._DropoutNd)  # in eval mode here
    return rule.affine or rule.reshapes or dropout


def _solved(
    module: _Pair | _Fork,
    system: BlockSystem,
    k: Tensor,
    outputs: Tensor,
    noise: float,
    generator: torch.Generator | None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Least-squares input of one affine part of the block, from all of its equations."""
    names = {id(parameter): name for name, parameter in system.block.named_parameters()}
    wanted = [names[id(module.get_parameter(name))] for name in weight_names(module)]
    sent = {name: system.gradients[name] for name in wanted if name in system.gradients}
    gradient = pack(sent) if wanted and len(sent) == len(wanted) else None
    mask = system.row_mask if row_mask is None else row_mask
    layer = LayerSystem(module, k, (sum(module.sizes),), mask)
    return layer.solve(outputs, gradient, noise=noise, generator=generator).x

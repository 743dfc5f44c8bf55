"""Residual blocks: two ways from one place, summed, and the input that both of them share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from .activations import NORMS, is_elementwise, undo
from .chain import Residual
from .errors import GradientInversionError, UnsupportedLayerError
from .krylov import Progress, Rows, cgls, open_share, ritz_values, squared_norm
from .systems import LayerSystem, pack, weight_names

KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
ROUNDS = 40
SETTLED = 4e-15  # relative residual at which float64 has nothing left to give
SOLVED = 1e-12  # relative residual of the normal equations of a round; the first need less
EXPLAINED = 1e-9  # relative residual of an answer that needs no second attempt
SHORTEST = 1e-3  # share of a step below which the linearisation is of no use


@dataclass(frozen=True)
class ResidualSolution:
    """What a residual block's equations gave, and whether it may be believed.

    Attributes
    ----------
    inputs : Tensor
        Of the block, float64, ``(N, *input_shape)``.
    residual : float
        Norm of what the answer leaves unexplained, relative: outputs and every gradient of the
        block, those too that were not used to find it.
    equations : int
        Rows used, after masking.
    rounds, iterations : int
        Linearisations, and applications of all of them and their adjoints.
    full_rank : bool
        Whether the linearised equations determine the whole input, at the answer.
    undetermined : float
        Share of the input space that they leave open there.
    smallest_singular_value, largest_singular_value : float
        Of the scaled linearised equations there.
    """

    inputs: Tensor
    residual: float
    equations: int
    rounds: int
    iterations: int
    full_rank: bool
    undetermined: float
    smallest_singular_value: float
    largest_singular_value: float


class ResidualSystem:
    r""":math:`f(x) + g(x) = s,\; \partial L/\partial\theta(x) = G_\theta`.

    The equations of a block whose output is the sum of two ways, given the sum ``s`` and the
    output gradient ``k = ∂L/∂s``. The sum hands the same ``k`` to both ways, so the last layer
    of each keeps its gradient constraints; the input is shared, and so the unknowns are too.
    A gradient further down a way depends on the side of every kink above it and jumps there:
    it is left out at first, and joins where the others leave part of the input open, once they
    have told the sides.
    Implements :eq:`residual-block`.

    Parameters
    ----------
    block : Residual
        Float64.
    output_gradient : Tensor
        ``k``, ``(N, *output_shape)``.
    gradients : mapping of str to Tensor
        ``∂L/∂θ`` by the parameter's name in the block; one that was not sent is left out.
    row_mask : Tensor, optional
        Shaped as ``k``: weight of each entry of the sum as an equation.
    constraints : {"both", "weight", "gradient"}
        Which set to use.

    Raises
    ------
    UnsupportedLayerError
        If a layer inside is random or uses statistics of its own batch.
    """

    def __init__(
        self,
        block: Residual,
        output_gradient: Tensor,
        gradients: Mapping[str, Tensor],
        row_mask: Tensor | None = None,
        *,
        constraints: str = "both",
    ) -> None:
        refuse_random(block)
        self.block, self.k = block, output_gradient
        self.constants = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.gradients = {} if constraints == "weight" else dict(gradients)
        weights = [name for name in self.gradients if name.rpartition(".")[2] != "bias"]
        smooth = [name for name in weights if name in set(_smooth(block))]
        self.choices = {"sum": [], "smooth": smooth, "all": weights}
        self.jumping = len(smooth) < len(weights)
        self.used = smooth
        self.kinked = any(isinstance(module, KINKED) for module in block.modules())
        mask = torch.ones_like(output_gradient) if row_mask is None else row_mask
        self.row_mask = torch.zeros_like(mask) if constraints == "gradient" else mask
        self.scale = 1.0

    @property
    def weight_equations(self) -> int:
        """Entries of the sum that the mask leaves."""
        return int((self.row_mask != 0).sum())

    @property
    def gradient_equations(self) -> int:
        """Entries of the gradients used to find the input."""
        return sum(self.gradients[name].numel() for name in self.used)

    def use(self, rows: str) -> None:
        """Choose among the gradients: none ("sum"), those without jumps ("smooth"), or "all"."""
        self.used = self.choices[rows]

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Masked outputs, and the gradients in use, at ``x``."""
        z, found = self._at(x, self.used)
        g = [found[name].reshape(-1) for name in self.used]
        return self.row_mask * z, self.scale * torch.cat([*g, x.new_zeros(0)])

    def _at(self, x: Tensor, names: list[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        own = {name: self.constants[name].detach() for name in names}

        def through(own: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(self.block, {**self.constants, **own}, (x,))
            return output

        if not own:
            return through({}), {}
        evaluated = vjp(through, own)
        return evaluated[0], evaluated[1](self.k)[0]

    def right_hand_side(self, outputs: Tensor) -> Rows:
        """Rows that the input must give: the sum, masked, and the gradients in use."""
        known = torch.where(self.row_mask > 0, outputs, torch.zeros_like(outputs))
        g = [self.gradients[name].reshape(-1) for name in self.used]
        return Rows(self.row_mask * known, self.scale * torch.cat([*g, outputs.new_zeros(0)]))

    def balance(self, x: Tensor, generator: torch.Generator) -> None:
        """Weigh the gradient rows so that both kinds answer alike to a random step."""
        step = Linearised(self, x).forward(_random_like(x, generator))
        z, g = squared_norm(step.z), squared_norm(step.g)
        if z > 0 and g > 0:
            self.scale *= math.sqrt(z / g)

    def residual(self, x: Tensor, outputs: Tensor) -> float:
        """Relative norm of what ``x`` leaves unexplained, every gradient of the block included."""
        z, found = self._at(x, list(self.gradients))
        gaps = [self.row_mask * torch.where(self.row_mask > 0, z - outputs, 0.0)]
        sizes = [self.row_mask * torch.where(self.row_mask > 0, outputs, 0.0)]
        gaps += [found[name] - given for name, given in self.gradients.items()]
        sizes += list(self.gradients.values())
        parts = [
            math.sqrt(squared_norm(gap) / squared_norm(size))
            for gap, size in zip(gaps, sizes, strict=True)
            if squared_norm(size) > 0
        ]
        return max(parts, default=0.0)


class Linearised:
    """The rows' derivative at one input, and its adjoint."""

    dtype = torch.float64

    def __init__(self, system: ResidualSystem, x: Tensor) -> None:
        rows, self.pull = vjp(system.rows, x)[:2]
        zeros = tuple(torch.zeros_like(part) for part in rows)
        # The adjoint is linear in the rows, so its own adjoint is the derivative: reverse mode
        # twice, built once, where forward mode would evaluate the block anew at every step.
        self.push = vjp(lambda z, g: vjp(system.rows, x)[1]((z, g))[0], *zeros)[1]

    def forward(self, x: Tensor) -> Rows:
        """Change of the rows along ``x``."""
        return Rows(*self.push(x))

    def adjoint(self, r: Rows) -> Tensor:
        """Rows pulled back to the input."""
        pulled: Tensor = self.pull((r.z, r.g))[0]
        return pulled


def solve(
    system: ResidualSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> ResidualSolution:
    r""":math:`x \leftarrow x + \arg\min_d \lVert J d - (b - r(x)) \rVert` (Gauss-Newton).

    From the sum itself, where the shortcut is the identity: a block is a small change of it.
    Where that leads nowhere, from two linear systems instead (:func:`two_systems`), with the
    gradients that jump taken in.

    Parameters
    ----------
    system : ResidualSystem
        The block's equations.
    outputs : Tensor
        The sum ``s``, shaped as the output gradient; masked entries may be anything.
    input_shape : tuple of int
        Of one sample.
    noise : float
        Relative noise of the gradients: rounds that would only fit it are not spent.
    generator : torch.Generator, optional
        Of the start and of the test of the rank; a fixed one by default.
    progress : callable, optional
        Called with rounds done and the relative residual.

    Returns
    -------
    ResidualSolution

    Notes
    -----
    Source: this project's.
    """
    generator = generator or torch.Generator(outputs.device).manual_seed(20151210)
    explained = max(EXPLAINED, 1e3 * noise)
    best: ResidualSolution | None = None
    for start in _starts(system, outputs, input_shape, noise, generator):
        system.use(start.rows)
        system.balance(start.x, generator)
        found = _sought(system, outputs, start.x, max(SETTLED, 1e-3 * noise), progress)
        best = found if best is None or found.residual < best.residual else best
        if found.residual <= explained:
            break
    assert best is not None
    system.use("smooth")
    best = _asked(system, best, generator)
    if not best.full_rank and system.jumping:  # they hold at the answer: what do they determine?
        system.use("all")
        best = _asked(system, best, generator)
    return best


@dataclass(frozen=True)
class _Start:
    """Where to begin, and the rows that lead on from there."""

    x: Tensor
    rows: str


def _starts(
    system: ResidualSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    noise: float,
    generator: torch.Generator,
) -> Iterator[_Start]:
    """The likelier first."""
    shape = (len(outputs), *input_shape)
    plain = all(isinstance(module, nn.Identity) for _, module in system.block.ways[1])
    alike = plain and outputs.shape == shape
    known = torch.where(system.row_mask > 0, outputs, torch.zeros_like(outputs))
    if alike and system.kinked and system.weight_equations == known.numel():
        yield _Start(known, "sum")  # close to a linear map with an inverse: no kink can mislead
    if alike:
        yield _Start(known, "smooth")
    if system.kinked:
        start = two_systems(system, outputs, input_shape, noise=noise, generator=generator)
        if start is not None:
            yield _Start(start, "all")
    if not alike:
        size = float(known.norm()) / math.sqrt(known.numel())
        random = 1e-3 * size * _random_like(outputs.new_empty(shape), generator)
        yield _Start(random, "smooth")


def _asked(
    system: ResidualSystem, found: ResidualSolution, generator: torch.Generator
) -> ResidualSolution:
    """The same answer, with what the equations in use leave open there."""
    x = found.inputs
    cap = 1000 + 4 * math.isqrt(x.numel())
    left, washed = open_share(Linearised(system, x), _random_like(x, generator), cap)
    smallest, largest = ritz_values(washed.alphas, washed.betas)
    return replace(
        found,
        equations=system.weight_equations + system.gradient_equations,
        iterations=found.iterations + washed.iterations,
        full_rank=left == 0,
        undetermined=left,
        smallest_singular_value=smallest,
        largest_singular_value=largest,
    )


def two_systems(
    system: ResidualSystem,
    outputs: Tensor,
    input_shape: tuple[int, ...],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    r""":math:`g x + W_2 a = s,\; K_2 a = G_2` for ``(x, a)``; then ``W_1 x = σ⁻¹(a)`` and the rest.

    A block ``g x + W_2 σ(W_1 x)`` with its hidden activation taken for an unknown of its own:
    first one linear system, whose ``a`` tells the sides of the kinks, then another for ``x``
    alone, with everything that the first could not use.

    Parameters
    ----------
    system, outputs, input_shape, noise, generator
        As for :func:`solve`.

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
            pair = _solved(_Sum(high, short, shapes), system, system.k, outputs, noise, generator)
            a = pair[:, math.prod(input_shape) :].reshape(-1, *shapes[1])
            below = undo(activation, "activation", a, max(1e-9, noise))
            k = vjp(high, a)[1](system.k)[0] * below.slope
            rest = outputs - high(a)
            known = torch.cat([below.known.flatten(1), system.row_mask.flatten(1)], dim=1)
            return _solved(
                _Fork(low, short, x.shape[1:]),
                system,
                torch.cat([k.flatten(1), system.k.flatten(1)], dim=1),
                torch.cat([below.inputs.flatten(1), rest.flatten(1)], dim=1),
                noise,
                generator,
                known.to(torch.float64),
            ).reshape(-1, *input_shape)
        except GradientInversionError:
            return None


class _Sum(nn.Module):
    """Both summands from ``(x, a)`` end to end."""

    def __init__(
        self, high: nn.Module, short: nn.Module, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.high, self.short, self.shapes = high, short, shapes

    def forward(self, v: Tensor) -> Tensor:
        cut = math.prod(self.shapes[0])
        x = v[:, :cut].reshape(-1, *self.shapes[0])
        a = v[:, cut:].reshape(-1, *self.shapes[1])
        total: Tensor = self.short(x) + self.high(a)
        return total


class _Fork(nn.Module):
    """What both ways make of ``x`` before anything bends it, end to end."""

    def __init__(self, low: nn.Module, short: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.low, self.short, self.shape = low, short, shape

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.shape)
        return torch.cat([self.low(x).flatten(1), self.short(x).flatten(1)], dim=1)


def _parts(block: Residual) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module] | None:
    """``(W_1, σ, W_2, g)`` of a block ``g x + W_2 σ(W_1 x)``; None for another form."""
    count = len(block.ways[0])
    branch, short = list(block.layers[:count]), list(block.layers[count:])
    bends = [i for i, module in enumerate(branch) if _bends(module)]
    nested = any(isinstance(module, Residual) for module in (*branch, *short))
    if len(bends) != 1 or nested or any(_bends(module) for module in short):
        return None
    (bend,) = bends
    low, high = branch[:bend], branch[bend + 1 :]
    return nn.Sequential(*low), branch[bend], nn.Sequential(*high), nn.Sequential(*short)


def _bends(module: nn.Module) -> bool:
    affine = isinstance(module, (*NORMS, nn.modules.dropout._DropoutNd))  # both in eval mode here
    return is_elementwise(module) and not affine


def _solved(
    module: nn.Module,
    system: ResidualSystem,
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
    whole = bool(wanted) and len(sent) == len(wanted)
    layer = LayerSystem(
        module,
        k,
        _flat_input(module),
        system.row_mask if row_mask is None else row_mask,
        constraints="both" if whole else "weight",
    )
    gradient = pack(sent) if whole else None
    return layer.solve(outputs, gradient, noise=noise, generator=generator).inputs


def _flat_input(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, _Sum):
        return (sum(math.prod(shape) for shape in module.shapes),)
    assert isinstance(module, _Fork)
    return (math.prod(module.shape),)


def _sought(
    system: ResidualSystem, outputs: Tensor, x: Tensor, target: float, progress: Progress | None
) -> ResidualSolution:
    """Answer of the equations in use; what they leave open is not asked yet."""
    b = system.right_hand_side(outputs)
    x, rounds, iterations = _gauss_newton(system, b, x, target, progress)
    equations = system.weight_equations + system.gradient_equations
    gap = system.residual(x, outputs)
    return ResidualSolution(x, gap, equations, rounds, iterations, False, 1.0, 0.0, 0.0)


def _gauss_newton(
    system: ResidualSystem, b: Rows, x: Tensor, target: float, progress: Progress | None
) -> tuple[Tensor, int, int]:
    size = math.sqrt(b.squared_norm()) or 1.0
    rest = _rest(system, b, x)
    gap, iterations, cap = math.sqrt(rest.squared_norm()), 0, 1000 + 4 * math.isqrt(x.numel())
    for turn in range(1, ROUNDS + 1):
        if gap <= target * size:
            return x, turn - 1, iterations
        at = Linearised(system, x)
        wanted = max(SOLVED, min(1e-2, gap / size)) * math.sqrt(squared_norm(at.adjoint(rest)))
        run = cgls(at, rest, wanted, cap)
        iterations += run.iterations
        x, rest, found = _shortened(system, b, x, run.x, gap)
        if progress is not None:
            progress(turn, found / size)
        if found > 0.999 * gap:
            return x, turn, iterations
        gap = found
    return x, ROUNDS, iterations


def _rest(system: ResidualSystem, b: Rows, x: Tensor) -> Rows:
    z, g = system.rows(x)
    return Rows(b.z - z, b.g - g)


def _shortened(
    system: ResidualSystem, b: Rows, x: Tensor, step: Tensor, gap: float
) -> tuple[Tensor, Rows, float]:
    """The step, halved until it leads down; none where it never does."""
    length = 1.0
    while length > SHORTEST:
        rest = _rest(system, b, x + length * step)
        found = math.sqrt(rest.squared_norm())
        if found < gap:
            return x + length * step, rest, found
        length /= 2
    return x, _rest(system, b, x), gap


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(
        x.shape, generator=generator, dtype=torch.float64, device=generator.device
    ).to(x.device)


def _smooth(block: Residual) -> Iterator[str]:
    """Parameters whose gradient is continuous in the input: no kink between them and the sum."""
    index = len(block.layers)
    for way in reversed(block.ways):
        kinked = False
        for _, module in reversed(way):
            index -= 1
            inside = [m for m in module.modules() if isinstance(m, KINKED)]
            if not kinked and not inside:
                yield from (f"layers.{index}.{name}" for name, _ in module.named_parameters())
            kinked = kinked or bool(inside)


def refuse_random(block: Residual) -> None:
    """Raise an error that names a layer inside which the server could not evaluate itself."""
    for (name, _), module in zip(
        [layer for way in block.ways for layer in way], block.layers, strict=True
    ):
        for part in module.modules():
            random = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            statistics = isinstance(part, nn.modules.batchnorm._BatchNorm)
            if part.training and (random or statistics):
                raise UnsupportedLayerError(
                    f"{name} ({type(part).__name__}) is in train mode inside a residual block, "
                    "whose equations are then not known to the server."
                )
            if "MaxPool" in type(part).__name__:
                raise UnsupportedLayerError(
                    f"{name} ({type(part).__name__}) inside a residual block cannot be inverted: "
                    "it keeps one entry of each window and forgets which."
                )

"""Gauss-Newton on the whole gradient: the digits that the recursion lost on its way down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from . import checks
from .chain import Step
from .errors import InconsistentGradientError, InvalidTensorError, UnsupportedLayerError
from .krylov import Progress, ritz_values
from .systems import RANK_TOLERANCE

GradientAt = Callable[[Tensor], Mapping[str, Tensor]]

DENSE_UNKNOWNS = 4096  # up to here one dense Gram matrix costs less than the iterations it saves
SKETCH = 8  # rows per unknown that a sketched Jacobian keeps: its size no longer follows the model
CHUNK = 32  # columns of the Jacobian at a time
PROBES = 64  # random combinations of rows from which a diagonal is estimated
SHIFT = 1e-13  # of the largest eigenvalue: what rounding leaves of a Gram matrix's zeros
HALVINGS = 8
GAIN = 10  # a polish that neither ends at noise nor gains this much has fitted nothing
STALLED = 1e-6  # a step that lowers the mismatch by less, relatively, was the last
ROUNDING = 32  # entries of a gradient differ by this many units of rounding between programs
TRACE = 1e-3  # share of a random start's size per entry under which nothing is left of it


@dataclass(frozen=True)
class Polish:
    """What the polish gave, and whether it may be believed.

    Attributes
    ----------
    inputs : Tensor
        Best answer, float64, shaped as the one it began from.
    mismatches : tuple of float
        Before the first step and after each: root mean square difference between the gradients,
        each entry relative to the largest of its parameter. Rounding alone leaves about the
        ``eps`` of the client's precision.
    smallest_singular_value : float
        Of the weighted Jacobian at the answer: a lower estimate.
    largest_singular_value : float
        Likewise, an upper estimate.
    full_rank : bool
        Whether the whole gradient determines the whole input, to first order.
    error : float
        Estimated relative error of ``inputs``: noise of the gradient over the smallest singular
        value; infinite without full rank.
    at_noise : bool
        Whether the last mismatch is no more than rounding in the client's precision explains.
    iterations : int
        Applications of the Jacobian and its adjoint.
    """

    inputs: Tensor
    mismatches: tuple[float, ...]
    smallest_singular_value: float
    largest_singular_value: float
    full_rank: bool
    error: float
    at_noise: bool
    iterations: int


def chain_gradient(
    steps: Sequence[Step], kept: Mapping[str, Tensor], loss: nn.Module, target: Tensor
) -> GradientAt:
    r""":math:`x \mapsto \partial L(f(x), y)/\partial\theta`, for :func:`polish` to differentiate.

    Parameters
    ----------
    steps : sequence of Step
        As :func:`gradinv_edu.chain.trace` lists them.
    kept : mapping of str to Tensor
        Mask, scaled, of each dropout in train mode, by the name of its step.
    loss : nn.Module
        The client's.
    target : Tensor
        Recovered label.

    Returns
    -------
    callable
        From ``(1, *input_shape)`` in float64 to a gradient for each parameter's name.

    Raises
    ------
    UnsupportedLayerError
        If a dropout in train mode has no mask in ``kept``.
    """
    _refuse_unseen_masks(steps, kept)
    parameters = {
        known: step.module.get_parameter(own).detach()
        for step in steps
        for own, known in step.parameters()
    }
    target = target.to(torch.float64) if target.is_floating_point() else target

    def value(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        for step in steps:
            x = x * kept[step.name] if step.name in kept else _apply(step, weights, x)
        result: Tensor = loss(x, target)
        return result

    def gradient_at(x: Tensor) -> Mapping[str, Tensor]:
        gradients: dict[str, Tensor] = grad(value)(parameters, x)
        return gradients

    return gradient_at


def _refuse_unseen_masks(steps: Sequence[Step], kept: Mapping[str, Tensor]) -> None:
    for step in steps:
        module = step.module
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if random and module.training and step.name not in kept:
            raise UnsupportedLayerError(
                f"{step.name} is a dropout in train mode whose mask is not known, so the gradient "
                "cannot be computed again; give the mask in `kept`."
            )


def _apply(step: Step, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    own = {name: weights[known] for name, known in step.parameters()}
    x = x.clone() if getattr(step.module, "inplace", False) else x
    output: Tensor = functional_call(step.module, own, (x,))
    return output


def polish(
    gradient_at: GradientAt,
    inputs: Tensor,
    gradients: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    steps: int = 6,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> Polish:
    r""":math:`x \leftarrow x + \arg\min_d \lVert J d - D\,(g - g(x)) \rVert` (Gauss-Newton).

    ``g`` is the client's gradient, ``g(x)`` the model's at ``x``, and ``J = D ∂g(x)/∂x``.
    Each equation is weighted by ``D``, one over the largest entry of its parameter's gradient,
    because rounding in a gradient is relative to that. A step that does not lower the mismatch
    is halved until it does; the polish ends where none lowers it any more.
    Implements :eq:`gauss-newton`.

    Parameters
    ----------
    gradient_at : callable
        From an input to ``{name: gradient}``, float64, twice differentiable by ``torch.func``,
        such as :func:`chain_gradient` makes.
    inputs : Tensor
        Answer to begin from, such as the recursion's.
    gradients : mapping of str to Tensor
        What the client sent; names that ``gradient_at`` lacks are left out.
    dtype : torch.dtype
        Precision in which the client computed them.
    steps : int
        Most steps.
    progress : callable, optional
        Called with the Jacobian's applications so far and the present mismatch.
    generator : torch.Generator, optional
        Of the random start that tests the rank; a fixed one by default.

    Returns
    -------
    Polish

    Raises
    ------
    InvalidTensorError
        If a tensor has the wrong shape or type or holds NaN or infinite entries.
    VanishingGradientError
        If every gradient is zero.
    InconsistentGradientError
        If the model's gradient at ``inputs`` is not finite.

    Notes
    -----
    Up to 4096 unknowns the Gram matrix at the first point, inverted once, preconditions the
    conjugate gradients of every step; above, its estimated diagonal does.

    The gradient must be smooth between start and answer. Where a leaky ReLU's unit lies on the
    wrong side of its kink, the least-squares step fits the jump and leads away: a polish that
    neither ends at noise nor lowers the mismatch tenfold gives back what it began from.
    """
    if steps < 1:
        raise ValueError(f"steps is at least 1, not {steps}.")
    x = checks.finite(inputs, "inputs")
    match = _match(gradient_at, x, gradients, dtype)
    generator = generator or torch.Generator(x.device).manual_seed(20180502)
    run = _Run(match, x, generator, progress)
    run.descend(steps)
    return run.result()


# --- the equations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """Weighted differences between the client's gradient and the model's, as one vector."""

    gradient_at: GradientAt
    gradients: dict[str, Tensor]
    weights: dict[str, float]
    eps: float

    def residual(self, x: Tensor) -> Tensor:
        """``D (g − g(x))``."""
        found = self.gradient_at(x)
        return torch.cat(
            [((g - found[n]) * self.weights[n]).reshape(-1) for n, g in self.gradients.items()]
        )


def _match(
    gradient_at: GradientAt, x: Tensor, gradients: Mapping[str, Tensor], dtype: torch.dtype
) -> _Match:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidTensorError(f"dtype is a floating-point torch.dtype, not {dtype!r}.")
    found = gradient_at(x)
    used = {
        n: checks.shaped(g, f"gradients[{n!r}]", tuple(found[n].shape)).to(x.device)
        for n, g in gradients.items()
        if n in found
    }
    if not used:
        raise InvalidTensorError(
            f"No name of gradients ({', '.join(gradients) or 'none'}) is a parameter of the model "
            f"({', '.join(found)})."
        )
    for n in used:
        if not bool(torch.isfinite(found[n]).all()):
            raise InconsistentGradientError(
                f"The model's gradient of {n} at `inputs` is not finite: begin from an input of "
                "reasonable size."
            )
    return _Match(gradient_at, used, _weights(used, dtype), torch.finfo(dtype).eps)


def _weights(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """One over the size to which rounding is relative: the largest entry, if it is any."""
    sizes = {n: float(g.abs().max()) for n, g in gradients.items()}
    top = max(sizes.values())
    checks.not_all_zero(torch.tensor(top), "Every gradient")
    tiny = torch.finfo(dtype).tiny  # below it the precision is absolute
    return {n: 1 / max(size or top, tiny) for n, size in sizes.items()}


@dataclass(frozen=True)
class _Jacobian:
    """``J`` at one point, as a product with either side, from one graph for both."""

    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


def _linearize(match: _Match, x: Tensor) -> tuple[Tensor, _Jacobian]:
    """Residual and its Jacobian; the adjoint is linear, so its own adjoint is the Jacobian."""
    residual, back = vjp(match.residual, x)[:2]

    def pull(v: Tensor) -> Tensor:
        row: Tensor = back(-v)[0]  # the residual falls where the gradient rises
        return row

    forth = vjp(pull, torch.zeros_like(residual))[1]

    def push(d: Tensor) -> Tensor:
        column: Tensor = forth(d)[0]
        return column

    return residual, _Jacobian(push, pull)


# --- preconditioners --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preconditioner:
    """Approximate inverse of ``JᵀJ``, with the ends of the spectrum of what it inverts."""

    apply: Callable[[Tensor], Tensor]
    low: float
    high: float


def _precondition(jacobian: _Jacobian, run: _Run, equations: int) -> _Preconditioner:
    if run.x.numel() <= DENSE_UNKNOWNS:
        return _dense(jacobian, run, equations)
    return _diagonal(jacobian, run, equations)


def _dense(jacobian: _Jacobian, run: _Run, equations: int) -> _Preconditioner:
    A = _gram(_rows(jacobian, run, equations))
    values = torch.linalg.eigvalsh(A)
    high = float(values[-1])
    shift = SHIFT * high or 1.0
    A.diagonal().add_(shift)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
    low = max(float(values[0]), 0.0) + shift
    return _Preconditioner(
        lambda s: (inverse @ s.reshape(-1)).reshape(s.shape), low, max(high, shift)
    )


def _rows(jacobian: _Jacobian, run: _Run, equations: int) -> Tensor:
    """``Jᵀ``, one row an unknown; sketched where the equations are many times the unknowns."""
    x, unknowns = run.x, run.x.numel()
    width = min(equations, SKETCH * unknowns)
    rows = x.new_empty(unknowns, width)
    sketch = _sketch(equations, width, run) if width < equations else None
    for start in range(0, unknowns, CHUNK):
        size = min(CHUNK, unknowns - start)
        units = x.new_zeros(size, unknowns)
        units[range(size), range(start, start + size)] = 1
        block = vmap(jacobian.push)(units.reshape(size, *x.shape))
        rows[start : start + size] = sketch(block) if sketch else block
        run.count(size)
    return rows


def _sketch(equations: int, width: int, run: _Run) -> Callable[[Tensor], Tensor]:
    """Add the equations up, with random signs, in ``width`` random groups."""
    device, generator = run.x.device, run.generator
    bucket = torch.randint(width, (equations,), generator=generator, device=generator.device).to(
        device
    )
    sign = torch.randint(2, (equations,), generator=generator, device=generator.device)
    signs = (2 * sign - 1).to(device, run.x.dtype)
    return lambda block: block.new_zeros(len(block), width).index_add_(1, bucket, block * signs)


def _gram(rows: Tensor, size: int = 512) -> Tensor:
    """Lower triangle of ``rows · rowsᵀ``: half the work of the whole."""
    A = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), size):
        stop = start + size
        A[start:stop, :stop] = rows[start:stop] @ rows[:stop].T
    return A


def _diagonal(jacobian: _Jacobian, run: _Run, equations: int) -> _Preconditioner:
    squares = torch.zeros_like(run.x)
    for _ in range(PROBES):
        squares += jacobian.pull(run.noise(torch.Size([equations]))).square()
        run.count(1)
    d = squares / PROBES
    d = d.clamp_min(1e-6 * float(d.mean()) or 1.0)  # an entry that no equation sees stays put
    return _Preconditioner(lambda s: s / d, float(d.min()), float(d.max()))


# --- steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solve:
    """Conjugate gradients on one linearised problem."""

    direction: Tensor
    values: tuple[float, float]  # smallest and largest singular value seen, preconditioned


@dataclass
class _Run:
    """One polish under way."""

    match: _Match
    x: Tensor
    generator: torch.Generator
    progress: Progress | None
    mismatches: list[float] = field(default_factory=list)
    iterations: int = 0

    def noise(self, shape: torch.Size) -> Tensor:
        device = self.generator.device
        drawn = torch.randn(shape, generator=self.generator, dtype=self.x.dtype, device=device)
        return drawn.to(self.x.device)

    def count(self, applications: int) -> None:
        self.iterations += applications
        if self.progress is not None:
            self.progress(self.iterations, self.mismatches[-1])

    def descend(self, steps: int) -> None:
        begun = self.x
        residual, jacobian = _linearize(self.match, begun)
        self.equations = residual.numel()
        self.mismatches = [_rms(residual)]
        self.preconditioner = _precondition(jacobian, self, self.equations)
        for _ in range(steps):
            step = self._solve(jacobian, residual).direction
            length = self._search(step)
            if length == 0:
                break
            residual, jacobian = _linearize(self.match, self.x)
            if self.mismatches[-1] > (1 - STALLED) * self.mismatches[-2]:
                break
        if not self._at_noise() and self.mismatches[-1] > self.mismatches[0] / GAIN:
            self.x, self.mismatches = begun, self.mismatches[:1]
            jacobian = _linearize(self.match, begun)[1]
        self.jacobian = jacobian

    def _at_noise(self) -> bool:
        return self.mismatches[-1] <= ROUNDING * self.match.eps

    def _search(self, step: Tensor) -> float:
        """Longest of the halved steps that lowers the mismatch, taken; 0 if none does."""
        for halving in range(HALVINGS):
            length = 0.5**halving
            mismatch = _rms(self.match.residual(self.x + length * step))
            if mismatch < self.mismatches[-1]:
                self.x = self.x + length * step
                self.mismatches.append(mismatch)
                return length
        return 0.0

    def _solve(self, jacobian: _Jacobian, residual: Tensor, start: Tensor | None = None) -> _Solve:
        """``min ‖J d − r‖`` by preconditioned conjugate gradients on the normal equations."""
        d = torch.zeros_like(self.x) if start is None else start
        r = residual if start is None else residual - jacobian.push(start)
        s = jacobian.pull(r)
        p = z = self.preconditioner.apply(s)
        gamma = first = float((s * z).sum())
        alphas: list[float] = []
        betas: list[float] = []
        while len(alphas) < self._cap() and not self._solved(d, r, gamma, first, start):
            q = jacobian.push(p)
            alphas.append(gamma / float(q.square().sum()))
            d, r = d + alphas[-1] * p, r - alphas[-1] * q
            s = jacobian.pull(r)
            z = self.preconditioner.apply(s)
            gamma, previous = float((s * z).sum()), gamma
            betas.append(gamma / previous)
            p = z + betas[-1] * p
            self.count(1)
        return _Solve(d, ritz_values(alphas, betas))

    def _solved(
        self, d: Tensor, r: Tensor, gamma: float, first: float, start: Tensor | None
    ) -> bool:
        if start is not None:
            return self._left(d, start) < TRACE or gamma <= 1e-24 * first
        noise = float(r.square().mean()) * d.numel()  # what gamma would be for noise alone
        return gamma <= self._tolerance() ** 2 * max(first, noise)

    def _tolerance(self) -> float:
        return 1e-8 if self.x.numel() <= DENSE_UNKNOWNS else 1e-6

    def _left(self, d: Tensor, start: Tensor) -> float:
        return float(d.norm() / start.norm()) * math.sqrt(start.numel())

    def _cap(self) -> int:
        return 10_000 + 4 * math.isqrt(self.x.numel())

    def result(self) -> Polish:
        """Rank at the answer: what the Jacobian does not see is left of a random start."""
        start = self.noise(self.x.shape)
        zero = self.x.new_zeros(self.equations)
        test = self._solve(self.jacobian, zero, start)
        smallest = test.values[0] * math.sqrt(self.preconditioner.low)
        largest = test.values[1] * math.sqrt(self.preconditioner.high)
        seen = smallest > RANK_TOLERANCE * largest and self.equations >= self.x.numel()
        full_rank = self._left(test.direction, start) < TRACE and seen
        return Polish(
            inputs=self.x,
            mismatches=tuple(self.mismatches),
            smallest_singular_value=smallest,
            largest_singular_value=largest,
            full_rank=full_rank,
            error=self._error(smallest) if full_rank else math.inf,
            at_noise=self._at_noise(),
            iterations=self.iterations,
        )

    def _error(self, smallest: float) -> float:
        """Noise, as the spare equations show it, carried to the input by the weakest direction."""
        spare = max(self.equations - self.x.numel(), 1) / self.equations
        noise = max(self.mismatches[-1] / math.sqrt(spare), self.match.eps)
        unit = smallest * max(float(self.x.norm()), 1e-300)
        return noise * math.sqrt(self.x.numel()) / unit


def _rms(residual: Tensor) -> float:
    value = float(residual.square().mean().sqrt())
    return value if math.isfinite(value) else math.inf

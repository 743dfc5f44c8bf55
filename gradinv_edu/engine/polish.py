"""Gauss-Newton on the whole gradient: the digits that the recursion lost on its way down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import checks
from ..errors import InconsistentGradientError, InvalidArgumentError, InvalidTensorError
from .gauss_newton import Linearised, gauss_newton
from .graph import Step
from .krylov import Progress, Rows, cgls, squared_norm
from .solve import (
    TOLERANCE,
    Preconditioned,
    Solution,
    draw,
    extreme_eigenvalues,
    patience,
    rank_test,
)

__all__ = ["GradientAt", "Polish", "gradient_of", "polish"]

GradientAt = Callable[[Tensor], Mapping[str, Tensor]]

DENSE = 4096  # up to here one dense Gram matrix costs less than the iterations it saves
SKETCH = 8  # rows per unknown that a sketched Jacobian keeps: its size no longer follows the model
CHUNK = 32  # columns of the Jacobian at a time
PROBES = 64  # random combinations of rows from which a diagonal is estimated
SHIFT = 1e-13  # of the largest eigenvalue: what rounding leaves of a Gram matrix's zeros
GAIN = 10  # a polish that neither ends at noise nor gains this much has fitted nothing
ROUNDING = 32  # entries of a gradient differ by this many units of rounding between programs


@dataclass(frozen=True)
class Polish:
    """What the polish gave, and whether it may be believed.

    Attributes
    ----------
    solution : Solution
        Best answer with the account of the weighted Jacobian there.
    mismatches : tuple of float
        Before the first step and after each: root mean square difference between the gradients,
        each entry relative to the largest of its parameter. Rounding alone leaves about the
        ``eps`` of the client's precision.
    at_noise : bool
        Whether the last one is no more than rounding in the client's precision explains.
    error : float
        Estimated relative error of the answer: noise of the gradient over the smallest singular
        value; infinite without full rank.
    """

    solution: Solution
    mismatches: tuple[float, ...]
    at_noise: bool
    error: float


def gradient_of(
    steps: Sequence[Step],
    kept: Mapping[str, Tensor],
    loss: nn.Module,
    target: Tensor,
    ties: float = 0.0,
) -> GradientAt:
    r""":math:`x \mapsto \partial L(f(x), y)/\partial\theta`, which can be differentiated again.

    Parameters
    ----------
    steps : sequence of Step
        The model, as :func:`~gradinv_edu.engine.graph.trace` reads it.
    kept : mapping of str to Tensor
        Mask, scaled, of each dropout in train mode, by the name of its step.
    loss : nn.Module
        The client's.
    target : Tensor
        Recovered label.
    ties : float
        Relative size below which an entry is zero, and a difference in a pooling's window none:
        in a black or even patch of a picture rounding must not switch a unit on, or another on.

    Returns
    -------
    callable
        From ``(N, *input_shape)`` in float64 to a gradient for each parameter's name.
    """
    names = {known: (step, own) for step in steps for own, known in step.parameters()}
    parameters = {
        known: step.module.get_parameter(own).detach() for known, (step, own) in names.items()
    }
    target = target.to(torch.float64) if target.is_floating_point() else target

    def gradient_at(x: Tensor) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            y = x
            for step in steps:
                if step.name in kept:
                    y = y * kept[step.name]
                else:
                    if ties and (step.rule.kinked or step.rule.pools):
                        grid = ties * float(y.detach().abs().max())
                        y = y + ((y / grid).round() * grid - y).detach()
                    # a norm in train mode changes its running statistics: those of a copy
                    held = {name: b.clone() for name, b in step.module.named_buffers()}
                    own = held | {name: leaves[known] for name, known in step.parameters()}
                    y = functional_call(step.module, own, (y,))
            found = torch.autograd.grad(
                loss(y, target),
                list(leaves.values()),
                create_graph=x.requires_grad,
                allow_unused=True,
            )
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    return gradient_at


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
    r""":math:`x \leftarrow \arg\min_{x'} \lVert D J (x' - x) - D (g - g(x)) \rVert`, Gauss-Newton.

    ``g`` is the client's gradient, ``g(x)`` the model's at ``x``, and ``J = ∂g(x)/∂x``.
    Each equation is weighted by ``D``, one over the largest entry of its parameter's gradient,
    because rounding in a gradient is relative to that. A step that does not lower the mismatch
    is halved until it does; the polish ends where none lowers it any more.
    Implements :eq:`gauss-newton`.

    Parameters
    ----------
    gradient_at : callable
        From an input to ``{name: gradient}``, float64, twice differentiable, as
        :func:`~gradinv_edu.engine.polish.gradient_of` makes it.
    inputs : Tensor
        Answer to begin from, such as the recursion's.
    gradients : mapping of str to Tensor
        What the client sent; names that ``gradient_at`` lacks are left out.
    dtype : torch.dtype
        Precision in which the client computed them.
    steps : int
        Most steps.
    progress : callable, optional
        Called with the step and the present mismatch.
    generator : torch.Generator, optional
        Of sketches and of the random start that tests the rank; a fixed one by default.

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
    Up to 4096 unknowns the Gram matrix at the first point preconditions the conjugate gradients
    of every step; above, its estimated diagonal does.

    The gradient must be smooth between start and answer. Where a leaky ReLU's unit lies on the
    wrong side of its kink, the least-squares step fits the jump and leads away: a polish that
    neither ends at noise nor lowers the mismatch tenfold gives back what it began from.
    """
    checks.whole(steps, "steps")
    x = checks.finite(inputs, "inputs")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgumentError(f"dtype is a floating-point torch.dtype, not {dtype!r}.")
    generator = generator or torch.Generator().manual_seed(20180502)
    used, weights = _weighted(gradient_at, x, gradients, dtype)
    empty = x.new_zeros(0)

    def rows(x: Tensor) -> Rows:
        found = gradient_at(x)
        parts = [(found[n] * weight).reshape(-1) for n, weight in weights.items()]
        return Rows(torch.cat(parts), empty)

    sent = torch.cat([(used[n] * weight).reshape(-1) for n, weight in weights.items()])
    equations, unknowns = sent.numel(), x.numel()
    first = Linearised(rows, x)
    dense = unknowns <= DENSE
    made = _cholesky(first, generator) if dense else _diagonal(first, generator)
    undo, undo_transposed, low, high = made
    cap, tolerance, iterations = patience(unknowns), 1e-8 if dense else 1e-6, 0

    def step(x: Tensor, r: Rows, gap: float) -> Tensor:
        nonlocal iterations
        A = Preconditioned(Linearised(rows, x), undo, undo_transposed)
        # what the normal equations would leave of noise alone
        noise = gap * math.sqrt(unknowns / equations)
        size = max(math.sqrt(squared_norm(A.adjoint(r))), noise)
        run = cgls(A, r, tolerance * size, cap)
        iterations += run.iterations
        return undo(run.x)

    def rest(x: Tensor) -> Rows:
        return Rows(sent - rows(x).z.detach(), empty)

    best, norms = gauss_newton(rest, step, x, rounds=steps, progress=progress)
    mismatches = [norm / math.sqrt(equations) for norm in norms]
    eps = torch.finfo(dtype).eps
    at_noise = mismatches[-1] <= ROUNDING * eps
    if not at_noise and mismatches[-1] > mismatches[0] / GAIN:
        best, mismatches = x, mismatches[:1]
    A = Preconditioned(Linearised(rows, best), undo, undo_transposed)
    test = rank_test(A, best, cap=cap, generator=generator)
    smallest = test.smallest_singular_value * low
    seen = test.smallest_singular_value > TOLERANCE and equations >= unknowns
    left = test.undetermined if seen else max(test.undetermined, 1 / unknowns)
    solution = replace(
        test,
        x=best,
        residual=mismatches[-1],
        iterations=iterations + test.iterations,
        undetermined=left,
        smallest_singular_value=smallest,
        largest_singular_value=test.largest_singular_value * high,
    )
    # noise, as the spare equations show it, carried to the input by the weakest direction
    noise = max(mismatches[-1] / math.sqrt(max(equations - unknowns, 1) / equations), eps)
    error = noise * math.sqrt(unknowns) / max(smallest * float(best.norm()), 1e-300)
    return Polish(solution, tuple(mismatches), at_noise, error if left == 0 else math.inf)


def _weighted(
    gradient_at: GradientAt, x: Tensor, gradients: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients to be matched, and one over the size to which rounding in each is relative."""
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
    sizes = {n: float(g.abs().max()) for n, g in used.items()}
    top = max(sizes.values())
    checks.not_all_zero(torch.tensor(top), "Every gradient")
    tiny = torch.finfo(dtype).tiny  # below it the precision is absolute
    return used, {n: 1 / max(size or top, tiny) for n, size in sizes.items()}


_Made = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float, float]


def _cholesky(A: Linearised, generator: torch.Generator) -> _Made:
    """``R`` with ``RᵀR ≈ JᵀJ``: its two inverses, its smallest and largest singular value."""
    rows = _sketched_columns(A, generator)
    gram = _gram(rows)
    gram.diagonal().add_(SHIFT * float(torch.linalg.matrix_norm(gram, 1)) or 1.0)
    factor = torch.linalg.cholesky(gram)
    low, high = extreme_eigenvalues(gram, factor)

    def solved(v: Tensor, transposed: bool) -> Tensor:
        L = factor.mT if transposed else factor
        flat: Tensor = torch.linalg.solve_triangular(L, v.reshape(-1, 1), upper=transposed)
        return flat.reshape(v.shape)

    ends = math.sqrt(max(low, 0.0)), math.sqrt(high)
    return lambda y: solved(y, True), lambda s: solved(s, False), *ends


def _sketched_columns(A: Linearised, generator: torch.Generator) -> Tensor:
    """``Jᵀ``, one row an unknown; equations added up, with random signs, in random groups."""
    n, equations = A.like.numel(), A.at.z.numel()
    width = min(equations, SKETCH * n)
    group = torch.randint(width, (equations,), generator=generator, device=generator.device)
    sign = 2.0 * torch.randint(2, (equations,), generator=generator, device=generator.device) - 1
    group, sign = group.to(A.like.device), sign.to(A.like)
    rows = A.like.new_empty(n, width)
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        units = A.like.new_zeros(size, n)
        units[range(size), range(start, start + size)] = 1
        block = A.columns(units.reshape(size, *A.like.shape))
        if width < equations:
            block = block.new_zeros(size, width).index_add_(1, group, block * sign)
        rows[start : start + size] = block
    return rows


def _gram(rows: Tensor, size: int = 512) -> Tensor:
    """``rows · rowsᵀ``, each half of it computed once."""
    A = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), size):
        stop = start + size
        A[start:stop, :stop] = rows[start:stop] @ rows[:stop].T
        A[:start, start:stop] = A[start:stop, :start].T
    return A


def _diagonal(A: Linearised, generator: torch.Generator) -> _Made:
    squares = torch.zeros_like(A.like)
    for _ in range(PROBES):
        squares += A.adjoint(Rows(draw(A.at.z, generator), A.at.g)).square()
    d = squares / PROBES
    d = d.clamp_min(1e-6 * float(d.mean()) or 1.0).sqrt()  # what no equation sees stays put
    return lambda y: y / d, lambda s: s / d, float(d.min()), float(d.max())

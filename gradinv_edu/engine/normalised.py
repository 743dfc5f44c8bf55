"""Solving a norm together with the affine layer below it, and what the two leave open."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .krylov import Progress, Rows, cgls, squared_norm
from .layers import pull_back
from .layers.norms import Norm
from .norm_system import NormSystem, nonzero, per_sample
from .solve import DENSE, ROUNDING, Linearised, Solution, gauss_newton, patience, rank_test

__all__ = ["Normalised", "account_at", "from_gradients", "solve"]

TOLERANCE = 1e-10  # singular values below this share of the largest count as zero
FIRST = 1e-7  # of the first, linear system where some outputs are unknown: it is a start
FORCING = 1e-2  # of a round's residual, to which its normal equations are solved
MORE = 6  # rounds where no output is known, or where one led nowhere
EXPLAINED = 1e-9  # relative residual of an answer that needs no second attempt
SETTLED = 4e-15  # relative residual at which float64 has nothing left to give


@dataclass(frozen=True)
class Normalised:
    """What the equations of a norm and the affine layer below it gave.

    Attributes
    ----------
    inputs : Tensor
        ``x`` of the affine layer; where ``scaled`` is False, of each family up to one factor.
    k : Tensor
        ``∂L/∂x``; up to one over that factor.
    scaled : bool
        Whether the factor is known.
    factor : Tensor
        Of each family: what the norm's ``ε`` tells of the factor; ones where it is known, or where
        ``ε`` tells nothing.
    unseen : Tensor or None
        Shaped as ``inputs``: number of the open constant that each entry is known up to, −1 for
        none; None where there is none at all.
    solution : Solution
        Over all unknowns, with those constants at zero; its ``x`` is ``inputs``.
    unknowns, equations : int
        Counts.
    deviation : Tensor
        ``σ`` of each group, in the units of ``inputs``.
    output : Tensor
        The norm's whole output, unknown entries filled in.
    """

    inputs: Tensor
    k: Tensor
    scaled: bool
    factor: Tensor
    unseen: Tensor | None
    solution: Solution
    unknowns: int
    equations: int
    deviation: Tensor
    output: Tensor


def solve(
    system: NormSystem,
    *,
    noise: float = 0.0,
    rounds: int = 1,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Normalised:
    r""":math:`\arg\min_{x,\sigma,\mu,\tau}` of the rows, and what they leave open.

    Linear where all entries are known and each filter has one ``σ``. Else first with the unknown
    entries of ``x̂`` at their mean, then Gauss and Newton; statistics that were sent join last.

    Parameters
    ----------
    system : NormSystem
        The equations.
    noise : float
        Relative noise of the gradients.
    rounds : int
        Of the linear system before Newton's steps, each with the unknown entries as the one before
        found them.
    generator, progress
        As for :func:`~gradinv_edu.engine.solve.least_squares`.
    """
    if system.sent is not None and not system.linear:  # statistics mislead while x̂ is a guess
        first = solve(system.without_sent(), noise=noise, generator=generator, progress=progress)
        sigma = first.deviation
        by = 1.0 if first.scaled else (system.sent.deviation @ sigma) / (sigma @ sigma)
        v, spent = _descend(system, system.at(by * first.inputs), noise, generator, progress)
        return _answer(system, v, first.solution.iterations + spent, generator)
    found = _attempt(system, rounds, noise, generator, progress)
    if not system.linear and found.solution.residual > max(EXPLAINED, 1e3 * noise):
        again = _attempt(system, MORE, noise, generator, progress)
        found = min(found, again, key=lambda answer: answer.solution.residual)
    return found


def _attempt(
    system: NormSystem,
    rounds: int,
    noise: float,
    generator: torch.Generator | None,
    progress: Progress | None,
) -> Normalised:
    gradient, iterations = system.gradient, 0
    if not system.linear:
        system.freeze()
        if not system.shared:
            system.gradient = None
    v = zero = torch.zeros_like(system.per_column)
    for turn in range(1 if system.linear else rounds):
        if turn:
            system.freeze(v)
        system.balance(None, generator)
        at = Linearised(system.rows, zero)
        wanted = max(ROUNDING if system.linear else FIRST, 1e-4 * noise)
        u, spent = _least_squares(at, system.rest(zero), wanted, progress)
        v, iterations = u * system.per_column, iterations + spent
    system.gradient, system.frozen = gradient, None
    if not system.linear:
        v, spent = _descend(system, v, noise, generator, progress)
        iterations += spent
    return _answer(system, v, iterations, generator)


def from_gradients(
    module: nn.Module,
    norm: Norm,
    k: Tensor,
    input_shape: tuple[int, ...],
    weight_gradient: Tensor,
    scale_gradient: Tensor,
    shift_gradient: Tensor,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Normalised:
    r""":math:`K(\tilde\kappa)\,x = \sigma_g\,\partial L/\partial W`, no output of the norm known.

    As on a way of a residual block, where the sum is known and its parts are not, but ``k = ∂L/∂y``
    is. Its means follow from ``∂L/∂β`` and ``∂L/∂γ``, so that ``κ̃`` is known up to ``x̂``, which
    is what the last round made of it. Needs more entries of the gradient than unknowns.

    Parameters
    ----------
    module, norm, input_shape
        As for :class:`~gradinv_edu.engine.norm_system.NormSystem`.
    k : Tensor
        ``∂L/∂y``, ``(1, *output_shape)``; of a batch norm any number of samples.
    weight_gradient, scale_gradient, shift_gradient : Tensor
        ``∂L/∂W``, ``∂L/∂γ``, ``∂L/∂β``.

    Returns
    -------
    Normalised
        ``inputs`` and their ``k`` up to one factor, ``output`` without it.
    """
    groups, (gain, _) = norm.groups(k.shape, k.device), norm.coefficients(k)
    count = groups.sum(torch.ones_like(k))

    def mean(gradient: Tensor) -> Tensor:  # of γ times what one parameter's entries add up to
        shape = norm.broadcast(k)
        each = gradient.to(k).reshape(shape).expand_as(k) * (math.prod(shape) / k.numel())
        return groups.sum(gain * each) / count

    system = NormSystem(
        module,
        norm,
        torch.zeros_like(k),
        k,
        input_shape,
        weight_gradient,
        torch.zeros_like(k),
        means=(mean(shift_gradient), mean(scale_gradient)),
    )
    return solve(system, noise=noise, rounds=MORE, generator=generator, progress=progress)


def _least_squares(
    at: Linearised, b: Rows, wanted: float, progress: Progress | None = None
) -> tuple[Tensor, int]:
    """By a factorisation while that is cheap, else by conjugate gradients."""
    if at.like.numel() <= DENSE:
        A, rhs = at.matrix(), b.flat()
        inverse = torch.linalg.pinv(A, rtol=1e-14)
        x = inverse @ rhs
        return x + inverse @ (rhs - A @ x), 0
    size = math.sqrt(squared_norm(at.adjoint(b)))
    run = cgls(at, b, wanted * size, patience(at.like.numel()), progress=progress)
    return run.x, run.iterations


def _descend(
    system: NormSystem,
    v: Tensor,
    noise: float,
    generator: torch.Generator | None,
    progress: Progress | None,
) -> tuple[Tensor, int]:
    """Gauss and Newton, from the answer with frozen entries."""
    system.balance(v, generator)
    v = system.normed(v)
    size, iterations = system.size(v), 0

    def step(u: Tensor, r: Rows, gap: float) -> Tensor:
        nonlocal iterations
        wanted = max(min(FORCING, 0.1 * gap / size), 1e-12, 1e-3 * noise)
        d, spent = _least_squares(Linearised(system.rows, u), r, wanted)
        iterations += spent
        return d

    target = max(SETTLED, 1e-3 * noise) * size
    u, _ = gauss_newton(system.rest, step, system.scaled(v), target=target, progress=progress)
    return u * system.per_column, iterations


def _answer(
    system: NormSystem, v: Tensor, iterations: int, generator: torch.Generator | None
) -> Normalised:
    system.balance(v, generator)
    v = system.normed(v)
    u = system.scaled(v)
    residual = math.sqrt(system.rest(u).squared_norm()) / system.size(v)
    told = _account(Linearised(system.rows, u), generator)
    x, sigma, _, tau = system.split(v)
    centre = system.centre(v)
    xhat = system.normal(v, centre)
    k = system.gradient_of_norm(xhat) / system.groups.spread(nonzero(sigma))
    k = pull_back(lambda t: functional_call(system.module, system.constants, (t,)), k, x)
    output = system.gain * xhat + system.shift
    factor, scaled = x.new_ones(system.families), system.sent is not None
    if system.has_tau:
        x, k, sigma = _times(system, x, k, sigma, 1 / nonzero(tau))
        scaled = True
    elif not scaled:
        factor = _factor_of_eps(system, centre, sigma)
    solution = replace(told, x=x, residual=residual, iterations=told.iterations + iterations)
    return Normalised(
        x,
        k,
        scaled,
        factor,
        system.unseen,
        solution,
        system.unknowns,
        system.equations,
        sigma,
        output,
    )


def account_at(system: NormSystem, x: Tensor, generator: torch.Generator | None) -> Solution:
    """What the equations leave open at an input that fulfils them."""
    v = system.at(x)
    system.balance(v, generator)
    return _account(Linearised(system.rows, system.scaled(system.normed(v))), generator)


def _account(at: Linearised, generator: torch.Generator | None = None) -> Solution:
    """What the equations leave open at the answer."""
    if at.like.numel() > DENSE:
        return rank_test(at, generator=generator)
    values = torch.linalg.svdvals(at.matrix())
    largest = float(values[0])
    seen = values[values > TOLERANCE * largest] if largest > 0 else values[:0]
    smallest = float(seen[-1]) if len(seen) else 0.0
    return Solution(at.like, 0.0, 0, 1 - len(seen) / at.like.numel(), smallest, largest)


def _times(
    system: NormSystem, x: Tensor, k: Tensor, sigma: Tensor, by: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, its gradient and deviations with each family's factor."""
    each = per_sample(by, x).reshape(-1, *[1] * (x.dim() - 1))
    return x * each, k / each, sigma * by[system.groups.family]


def _factor_of_eps(system: NormSystem, centre: Tensor, sigma: Tensor) -> Tensor:
    r""":math:`s^2(\sigma_1^2 - \mathrm{var}\,z_1) = \varepsilon`: the factor of each family."""
    groups = system.groups
    var = groups.sum(centre.square()) / system.count
    if system.norm.centred:
        var = var - (groups.sum(centre) / system.count).square()
    left = groups.total(system.share * (sigma.square() - var))
    told = left > 0
    one = torch.ones_like(left)
    found = (system.norm.eps / torch.where(told, left, one)).sqrt()
    return torch.where(told & torch.isfinite(found), found, one)

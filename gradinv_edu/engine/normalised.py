"""Solving a norm together with the affine layer below it, and what the two leave open."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from .channels import ENTRIES, PIXELS
from .gauss_newton import Linearised, gauss_newton
from .krylov import Progress, Rows, cgls, squared_norm
from .layers import pull_back, rule_of
from .layers.convolution import Convolution
from .layers.norms import Norm
from .norm_system import NormSystem, nonzero, per_sample
from .solve import DENSE, ROUNDING, Solution, Truncated, patience, rank_test

__all__ = [
    "Normalised",
    "account_at",
    "by_channel",
    "from_start",
    "means",
    "solve",
]

TOLERANCE = 1e-10  # singular values below this share of the largest count as zero
FIRST = 1e-7  # of the first, linear system where some outputs are unknown: it is a start
FORCING = 1e-2  # of a round's residual, to which its normal equations are solved
MORE = 6  # rounds where no output is known, or where one led nowhere
EXPLAINED = 1e-9  # relative residual of an answer that needs no second attempt
TURNS = 60  # by channel, at most
SOON, FAR = 12, 1e-2  # of them, after which a change so large leads nowhere
NEARLY = 1e-12  # change of a turn from which rounding alone may be left
FAINT = 1e-9  # of the largest singular value: below, directions count as open
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

    :func:`by_channel` where that is enough. Else linear where all entries are known and each filter
    has one ``σ``; else first with the unknown
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
    found = by_channel(system, noise, generator)
    if found is not None:
        return found
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


def means(
    norm: Norm, like: Tensor, scale_gradient: Tensor, shift_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """``mean κ`` and ``mean κx̂`` of each group, from ``∂L/∂γ`` and ``∂L/∂β``."""
    groups, (gain, _) = norm.groups(like.shape, like.device), norm.coefficients(like)
    shape = norm.broadcast(like)

    def mean(gradient: Tensor) -> Tensor:  # of γ times what one parameter's entries add up to
        each = gradient.to(like).reshape(shape).expand_as(like) * (math.prod(shape) / like.numel())
        return groups.sum(gain * each) / groups.count

    return mean(shift_gradient), mean(scale_gradient)


def from_start(
    system: NormSystem,
    x: Tensor,
    *,
    noise: float = 0.0,
    trial: bool = False,
    generator: torch.Generator | None = None,
) -> Normalised:
    """Gauss and Newton from an input that is nearly right; of a ``trial`` no rank is told."""
    v, spent = _descend(system, system.at(x), noise, generator, None)
    told = Solution(system.like, 0.0, 0, 1.0, 0.0, 0.0, converged=False) if trial else None
    return _answer(system, v, spent, generator, told)


def by_channel(
    system: NormSystem, noise: float = 0.0, generator: torch.Generator | None = None
) -> Normalised | None:
    r""":math:`K(\tilde\kappa)\,x_c = \sigma_g G_c`: one small matrix for all channels.

    A convolution's gradient rows alone: where ``κ̃`` is known, the ``σ`` that leave least of them
    unexplained are an eigenvector, and ``x`` follows. What of ``x̂`` is not known, and with it
    ``κ̃``, is what the last round made of it. None where they are not enough, or do not settle.
    """
    rule, G = rule_of(system.module), system.gradient
    if not isinstance(rule, Convolution) or G is None or system.has_tau or not system.shared:
        return None
    F, C, T = (G := G.flatten(2)).shape
    pixels = system.like.numel() // system.like.shape[1]
    enough = pixels <= min(F * T, PIXELS) and F * T * pixels <= ENTRIES
    if rule.geometry is None or rule.geometry.groups > 1 or not enough:
        return None
    groups, of, shape = system.groups, system.group_of.flatten(), tuple(system.like.shape[1:])
    open_ = 0 if system.unseen is None else (int(system.unseen.max()) + 1) // C
    rank, faint = pixels - open_, max(FAINT, 10 * noise)
    squares = G.new_zeros(len(system.count)).index_add(0, of, G.square().sum((1, 2)))
    live = squares > 0
    per = torch.where(live, squares, 1.0).rsqrt()
    system.freeze()
    assert system.frozen is not None
    xhat, least = torch.where(system.known, system.xhat, system.frozen), math.inf
    system.frozen = None
    turns = 0
    while turns < TURNS:
        turns += 1
        kappa = system.gradient_of_norm(xhat)
        parts = [rule.operator(k[None], shape).channel() for k in kappa]  # type: ignore[attr-defined]
        K = torch.cat(parts, 2).reshape(F * T, pixels)
        if not bool(torch.isfinite(K).all()):
            return None
        U, values, V = torch.linalg.svd(K, full_matrices=False)
        if rank < 1 or not float(values[rank - 1]) > faint * float(values[0]):
            return None
        U, values, V = U[:, :rank], values[:rank], V[:rank]
        seen = torch.einsum("ftj,fct->jcf", U.reshape(F, T, rank), G).reshape(-1, F)
        seen = per * seen.new_zeros(len(seen), len(per)).index_add(1, of, seen)
        left, ways = torch.linalg.eigh(torch.diag(2.0 - live.to(seen)) - seen.T @ seen)
        sigma = per * ways[:, 0] * ways[:, 0].sum().sign()
        right = U.T @ (sigma[of][:, None, None] * G).transpose(1, 2).reshape(-1, C)
        x = (V.T @ (right / values[:, None])).T.reshape(C, len(system.like), *shape[1:])
        v = torch.cat([x.transpose(0, 1).reshape(-1), torch.zeros_like(system.count).repeat(2)])
        z = system.centre(v[: system.unknowns])
        mu, z, variance = groups.moments(z, system.norm.centred)
        sigma = torch.where(live, sigma, variance.sqrt())
        before, xhat = xhat, torch.where(system.known, system.xhat, z / groups.spread(sigma))
        change = float((xhat - before).norm() / xhat.norm())
        if change <= max(SETTLED, 0.1 * noise) or (change < NEARLY and change > 0.5 * least):
            break
        least = min(least, change)
        if turns >= SOON and least > FAR:
            return None
    apart = float(left[1] / left[-1]) if len(left) > 1 else 1.0
    if turns == TURNS or not apart > faint**2 or not bool((sigma > 0).all()):
        return None
    v = torch.cat([x.transpose(0, 1).reshape(-1), sigma, mu[: system.sizes[2]]])
    if system.sent is not None:
        v = v * (system.sent.deviation @ sigma) / (sigma @ sigma)
    smallest = min(float(values[-1] / values[0]), math.sqrt(apart))
    told = Solution(system.like, 0.0, turns, 0.0, smallest, 1.0)
    found = _answer(system, v, 0, generator, told)
    return found if found.solution.residual <= max(EXPLAINED, 1e3 * noise) else None


def _least_squares(
    at: Linearised, b: Rows, wanted: float, progress: Progress | None = None
) -> tuple[Tensor, int]:
    """By a factorisation while that is cheap, else by conjugate gradients."""
    if at.like.numel() <= DENSE:
        A = at.matrix()
        return Truncated.of(A, 1e-14).refined(A, b.flat()), 0
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
    system: NormSystem,
    v: Tensor,
    iterations: int,
    generator: torch.Generator | None,
    told: Solution | None = None,
) -> Normalised:
    system.balance(v, generator)
    v = system.normed(v)
    u = system.scaled(v)
    residual = math.sqrt(system.rest(u).squared_norm()) / system.size(v)
    told = told or _account(Linearised(system.rows, u), generator)
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

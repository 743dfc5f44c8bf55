"""Units so near a kink that their side was misread, found by the next layer's own gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..systems import LayerSystem
from .layers import Rule, weight_names
from .solve import Solution

__all__ = ["in_doubt", "misread", "settle", "told_by_sums"]

Solve = Callable[[Tensor, Tensor, Solution], tuple[LayerSystem, Solution]]

COSINE = 0.5  # of the best match: what chance alone does not reach
ASIDE = 0.5  # of the best match, that another filter's must have to be turned along
GAIN = 0.9  # of the residual: what a solution on the other sides must stay under
ROUNDS = 20
OUTLYING = 10.0  # times the median, what is left of a filter that stands out
NEAR = 1e-4  # relative error of an input, at most: no unit was misread that matters
TRIMS, FEW = 6, 1024  # times that filters are left out or taken back; units in doubt of one
BLURRED = 100.0  # times the noise: a gap between sums that rounding does not make


def misread(system: LayerSystem, inputs: Tensor, weight_gradient: Tensor, turn: Tensor) -> Tensor:
    r""":math:`\arg\max_j |\langle S_k r, S_k e_j\rangle| / (|S_k r|\, |S_k e_j|)`.

    A step of matching pursuit: ``r = K x − ∂L/∂W`` is what the gradient's equations leave over at
    the solution, ``e_j = (k'_j − k_j) · (filter of j) ⊗ patch_j(x)`` what one unit's turn adds,
    ``S_k`` the filters' balance. Best matches of other filters that come near it are turned along.
    Implements :eq:`kink-pursuit`.

    Parameters
    ----------
    system : LayerSystem
        Of one convolution or dense layer.
    inputs : Tensor
        What its equations gave, ``(N, *input_shape)``.
    weight_gradient : Tensor
        ``∂L/∂W``, shaped as the weight.
    turn : Tensor
        ``k' − k``: what ``k`` gains if a unit is on the other side, shaped as ``k``; zero where no
        unit is in doubt.

    Returns
    -------
    Tensor
        Shaped as ``turn``, bool; nowhere true if nothing matches.

    Notes
    -----
    Source: Mallat and Zhang (1993) for matching pursuit; what is pursued here is this project's.
    """
    cosine = _cosines(system, inputs, weight_gradient, turn).transpose(0, 1)
    best = cosine.flatten(1).max(1)
    top = best.values.max()
    near = (best.values >= ASIDE * top) & (top >= COSINE)
    found = torch.zeros_like(cosine, dtype=torch.bool).flatten(1)
    found[near, best.indices[near]] = True
    return found.reshape(cosine.shape).transpose(0, 1)


def told_by_sums(k: Tensor, turn: Tensor, sums: Tensor, noise: float) -> Tensor:
    r""":math:`\sum_\ell k_f(\ell) + \sum_{j \in f} (k'_j - k_j) = \partial L/\partial b_f`.

    The gradient of a bias adds up ``k`` over the places of one filter: where it disagrees with the
    ``k`` that was found, the gap is the turn of a unit that was misread, or of two.

    Parameters
    ----------
    k, turn : Tensor
        ``(1, filters, …)`` or ``(1, filters)``, as for :func:`~gradinv_edu.segments.misread`.
    sums : Tensor
        ``Σ_ℓ k``, ``(filters,)``, as it was sent.
    noise : float
        Of ``k``, relative to its largest entry.

    Returns
    -------
    Tensor
        Shaped as ``turn``, bool: units to be turned.

    Notes
    -----
    Source: this project's.
    """
    turns = turn.reshape(len(sums), -1)  # behind a dense layer a filter has one place
    found = torch.zeros_like(turns, dtype=torch.bool)
    gaps = sums - k.reshape(turns.shape).sum(1)
    least = BLURRED * noise * float(k.abs().max())
    for f in (gaps.abs() > least).nonzero().flatten().tolist():
        own = turns[f]
        doubtful = (own.abs() > least).nonzero().flatten()
        alone = (own[doubtful] - gaps[f]).abs()
        if len(doubtful) and float(alone.min()) <= least:
            found[f, doubtful[alone.argmin()]] = True
        elif len(doubtful) > 1:
            pairs = (
                (own[doubtful][:, None] + own[doubtful] - gaps[f]).abs().fill_diagonal_(torch.inf)
            )
            if float(pairs.min()) <= least:
                one, other = divmod(int(pairs.argmin()), len(doubtful))
                found[f, doubtful[one]] = found[f, doubtful[other]] = True
    return found.reshape(turn.shape)


def _cosines(system: LayerSystem, x: Tensor, g: Tensor, t: Tensor) -> Tensor:
    """Of what is left with what each turn would add; zero where a turn would add to it."""
    T, left = system.balance.gradient, system.matvec(x)[1] - g
    sizes = _layer(system.module, torch.ones_like(g), x.square()).clamp_min(0).sqrt()
    if T is None:
        inner = _layer(system.module, left, x)  # ⟨r, filter ⊗ patch⟩
    else:
        left = torch.tensordot(T, left, 1)
        inner = _layer(system.module, torch.tensordot(T.mT, left, 1), x)
        sizes = sizes * T.norm(dim=0).reshape(-1, *[1] * (t.dim() - 2))
    sizes = sizes * left.norm()
    fits = (inner * t < 0) & (sizes > 0)
    return torch.where(fits, inner.abs() / sizes, torch.zeros_like(inner))


def _layer(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    parameters = {name: torch.zeros_like(p, dtype=x.dtype) for name, p in module.named_parameters()}
    (name,) = weight_names(module)
    answer: Tensor = functional_call(module, {**parameters, name: weight}, (x,))
    return answer


def settle(
    system: LayerSystem,
    solution: Solution,
    weight_gradient: Tensor,
    turn: Tensor,
    solve: Solve,
) -> tuple[LayerSystem, Solution, int]:
    r""":math:`K(k') = K(k) + e_j`, as long as turns explain what is left.

    Turns the units that :func:`misread` names and solves again; a solution that leaves less
    unexplained is kept, and the search goes on from it. Where what is left may still be much of
    the input, the filters that stand out are left out, and read again from what the others give.
    Where no turn explains anything, as under noise, the first solution stays, and so it does where
    the layer is grouped.

    Parameters
    ----------
    system, solution : LayerSystem, Solution
        As they were solved.
    weight_gradient, turn : Tensor
        As for :func:`misread`.
    solve : callable
        From another output gradient ``k``, the weight gradient, and the solution before, to the
        system and its solution.

    Returns
    -------
    system, solution : LayerSystem, Solution
        What holds now.
    turned : int
        How many units were turned.
    """
    grouped = getattr(system.module, "groups", 1) != 1
    rows = isinstance(system.module, nn.Linear) and system.k.dim() != 2
    if grouped or rows or len(weight_names(system.module)) != 1:
        return system, solution, 0
    first = system.k
    for _ in range(ROUNDS):
        found = misread(system, solution.x, weight_gradient, turn)
        if not bool(found.any()):
            break
        turned, again = solve(system.k + turn * found, weight_gradient, solution)
        if not again.full_rank or again.residual > GAIN * solution.residual:
            break
        system, solution, turn = turned, again, torch.where(found, -turn, turn)
    found = _reread(system, solution, weight_gradient, turn, solve)
    if bool(found.any()):
        turned, again = solve(system.k + turn * found, weight_gradient, solution)
        if again.full_rank and again.residual <= GAIN * solution.residual:
            system, solution = turned, again
    return system, solution, int((system.k != first).sum())


def _reread(
    system: LayerSystem, solution: Solution, G: Tensor, turn: Tensor, solve: Solve
) -> Tensor:
    """Units of the filters that stand out, by the input that all others give."""
    none = torch.zeros_like(turn, dtype=torch.bool)
    k, conv = system.k, system.module
    if solution.residual * solution.condition <= NEAR:
        return none
    if not isinstance(conv, nn.Conv2d) or len(k) > 1 or turn.count_nonzero() == 0:
        return none
    sizes = k.flatten(2).norm(dim=2)[0]
    doubtful = (turn[0].flatten(1) != 0).any(1) & (sizes > 0)

    def off(x: Tensor) -> Tensor:
        """What is left of each filter's rows, relative."""
        left = (system.matvec(x)[1] - G).flatten(1).norm(dim=1)
        return torch.where(sizes > 0, left / sizes.clamp_min(1e-300), torch.zeros_like(left))

    x, out = solution.x, none.new_zeros(len(sizes))
    rest = off(x)
    for limit in (1.0, *[OUTLYING] * TRIMS):  # at first, half of them
        fresh = doubtful & (rest > limit * rest.median())
        if torch.equal(fresh, out):
            break
        out = fresh
        keep = (~out).to(k.dtype).reshape(-1, *[1] * (k.dim() - 2))
        _, part = solve(k * keep, G * keep.reshape(-1, *[1] * (G.dim() - 1)), solution)
        if not part.full_rank:
            return none
        x, rest = part.x, off(part.x)
    spans = (
        cast("tuple[int, ...]", part)
        for part in (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    )
    patches = nn.functional.unfold(x, *spans)[0]
    left = (G - system.matvec(x)[1]).flatten(1)
    found = none[0].flatten(1)
    for f in out.nonzero().flatten().tolist():
        own = turn[0, f].flatten()
        places = own.nonzero().flatten()
        if len(places) <= FEW:
            found[f, places] = _explaining(patches[:, places] * own[places], left[f])
    return found.reshape(turn.shape)


def _explaining(columns: Tensor, left: Tensor) -> Tensor:
    """Which columns add up to what is left: rounded least squares, then one or two flips a step."""
    gram, told = columns.T @ columns, columns.T @ left
    chosen = torch.zeros_like(told)
    if len(left) >= len(told):
        start = torch.linalg.lstsq(columns, left[:, None]).solution[:, 0].round().clamp(0, 1)
        if bool(torch.isfinite(start).all()) and float((columns @ start - left).norm()) < float(
            left.norm()
        ):
            chosen = start
    for _ in range(2 * ROUNDS):
        way = 1 - 2 * chosen
        one = gram.diagonal() - 2 * way * (told - gram @ chosen)
        two = one[:, None] + one + 2 * way[:, None] * way * gram
        two.diagonal().copy_(one)
        if float(two.min()) >= -1e-12 * float(left.square().sum()):
            break
        i, j = divmod(int(two.argmin()), len(told))
        for place in {i, j}:
            chosen[place] = 1 - chosen[place]
    return chosen.bool()


def in_doubt(rule: Rule, outputs: Tensor, noise: float, reach: float) -> Tensor:
    """Units that noise may have put on the wrong side of a kink: near it, or read as silent."""
    known = rule.undo(rule.clamp(outputs), "", noise).known
    return (outputs.abs() <= reach) | ~known

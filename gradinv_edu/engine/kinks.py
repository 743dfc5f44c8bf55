"""Units so near a kink that their side was misread, found by the next layer's own gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..systems import LayerSystem
from .layers import Rule, weight_names
from .solve import Solution

__all__ = ["in_doubt", "misread", "settle", "told_by_sums"]

COSINE = 0.5  # of the best match: what chance alone does not reach
ASIDE = 0.5  # of the best match, that another filter's must have to be turned along
GAIN = 0.9  # of the residual: what a solution on the other sides must stay under
ROUNDS = 20
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
    solve: Callable[[Tensor, Solution], tuple[LayerSystem, Solution]],
) -> tuple[LayerSystem, Solution, int]:
    r""":math:`K(k') = K(k) + e_j`, as long as turns explain what is left.

    Turns the units that :func:`misread` names and solves again; a solution that leaves less
    unexplained is kept, and the search goes on from it. Where no turn explains anything, as under
    noise, the first solution stays, and so it does where the layer is grouped.

    Parameters
    ----------
    system, solution : LayerSystem, Solution
        As they were solved.
    weight_gradient, turn : Tensor
        As for :func:`misread`.
    solve : callable
        From another output gradient ``k``, and the solution before, to the system and its
        solution.

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
        turned, again = solve(system.k + turn * found, solution)
        if not again.full_rank or again.residual > GAIN * solution.residual:
            break
        system, solution, turn = turned, again, torch.where(found, -turn, turn)
    return system, solution, int((system.k != first).sum())


def in_doubt(rule: Rule, outputs: Tensor, noise: float, reach: float) -> Tensor:
    """Units that noise may have put on the wrong side of a kink: near it, or read as silent."""
    known = rule.undo(rule.clamp(outputs), "", noise).known
    return (outputs.abs() <= reach) | ~known

"""Gradient constraints by channel: one small matrix that every input channel meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layers.convolution import ConvolutionOperator
from .solve import Truncated

__all__ = ["Channels", "cheap", "nonnegative", "settled", "small", "solve"]

PIXELS = 2048  # of a map up to which the rows of one channel are factorised
CHEAP, SPARE = 200, 1.5  # pixels, and rows for each, where it is done before anything else
ENTRIES = 1e7  # of that matrix
FREE = 3e7  # entries of all directions that these rows leave open, written out as pictures
SIGNED = 1500  # of them that signs may tell
NEWTON = 60  # steps towards a point without negative entries
BELOW = 0.01  # of the largest entry: how far below zero noise may leave one at such a point
SLACK = 1e-10  # of the largest entry, by which one may be negative
RANK = 1e-10  # singular values below this share of the largest count as zero


def small(operator: ConvolutionOperator) -> bool:
    """Whether the matrix of one channel may be factorised."""
    pixels, rows = _counts(operator)
    return pixels <= PIXELS and rows * pixels <= ENTRIES


def cheap(operator: object) -> bool:
    """Whether it is small and has rows to spare: no iteration is as fast then."""
    if not isinstance(operator, ConvolutionOperator):
        return False
    pixels, rows = _counts(operator)
    return pixels <= CHEAP and rows >= SPARE * pixels


def _counts(operator: ConvolutionOperator) -> tuple[int, int]:
    """Unknowns of one channel, and rows."""
    groups, taps = operator.geometry.groups, math.prod(operator.weight.shape[2:])
    return math.prod(operator.template.shape[2:]), len(operator.weight) // groups * taps


@dataclass(frozen=True)
class Channels:
    """The least-norm answer of all channels, and what it leaves open.

    Attributes
    ----------
    x : Tensor
        ``(1, channels, …)``.
    smallest, largest : float
        Singular values of the matrices.
    missing : int
        Directions that no equation sees.
    free : Tensor or None
        These, ``(missing, channels, …)``; None where there are none, or too many to write out.
    """

    x: Tensor
    smallest: float
    largest: float
    missing: int = 0
    free: Tensor | None = None


def solve(
    operator: ConvolutionOperator, G: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> Channels:
    r""":math:`\sum_\ell k_f(\ell)\, x_c(\ell + t) = G_{f,c,t}` for every channel ``c``.

    Parameters
    ----------
    operator : ConvolutionOperator
        Of one sample.
    G : Tensor
        ``∂L/∂W``, shaped as the weight.
    known : tuple of Tensor, optional
        Entries of the input that are known already, and where.
    """
    like, groups = operator.template, operator.geometry.groups
    pixels = math.prod(like.shape[2:])
    filters, taps = len(operator.weight) // groups, math.prod(operator.weight.shape[2:])
    rows = G.reshape(groups, filters, -1, taps).transpose(2, 3)
    x = torch.zeros_like(like).reshape(groups, -1, pixels)
    where = torch.zeros_like(x, dtype=torch.bool)
    if known is not None:
        x, where = (part.reshape(x.shape) for part in known)
        x = torch.where(where, x, torch.zeros_like(x))
    parts = []
    for group in range(groups):
        M = operator.channel(group).reshape(filters * taps, pixels)
        right = rows[group].reshape(filters * taps, -1)
        parts.append(_by_column(M, right, x[group].T, where[group].T))
    found = torch.cat([part.x.T for part in parts]).reshape(like.shape)
    smallest, largest = min(p.smallest for p in parts), max(p.largest for p in parts)
    missing, free = sum(len(p.open) for p in parts), None
    if 0 < missing * found.numel() <= FREE:
        free = torch.zeros(missing, groups, x.shape[1], pixels, dtype=x.dtype, device=x.device)
        ways = [(g, *way) for g, part in enumerate(parts) for way in part.open]
        for step, (group, column, direction) in zip(free, ways, strict=True):
            step[group, column] = direction
        free = free.reshape(missing, *found.shape[1:])
    return Channels(found, smallest, largest, missing, free)


def settled(found: Channels, rows: Callable[[Tensor], Tensor], rest: Tensor) -> Channels:
    """The answer moved along its open directions to meet other rows.

    Parameters
    ----------
    found : Channels
        What the gradient's rows gave.
    rows : callable
        The other rows of a step, a linear map.
    rest : Tensor
        What they leave unexplained at ``found.x``.
    """
    if found.free is None:
        return found
    moved = torch.stack([rows(step[None]).flatten() for step in found.free], dim=1)
    told = Truncated.of(moved)
    if not told.rank:
        return found
    share = told.smallest / float(told.values[0])
    return replace(
        found,
        x=found.x + torch.tensordot(told.solve(rest.flatten()), found.free, 1),
        smallest=min(found.smallest, share * found.largest),
        missing=found.missing - told.rank,
        free=torch.tensordot(told.null, found.free, 1),
    )


def nonnegative(found: Channels, noise: float = 0.0) -> Channels:
    r""":math:`\{c : x_0 + N c \ge 0\}` where it is one point: what no equation sees, signs tell.

    Behind a ReLU no entry is negative and many are zero. Newton's steps on the entries below zero
    lead to such a point; it is the only one if the directions at its zero entries, ``N_a``, have
    full rank and ``N_aᵀ y = 0`` for some ``y > 0``: then no step lowers none of them (Gordan).

    Parameters
    ----------
    found : Channels
        What all equations gave.
    noise : float
        Relative noise of ``x``.

    Notes
    -----
    Source: this project's.
    """
    if found.free is None or not 0 < len(found.free) <= SIGNED:
        return found
    every, x = found.free.flatten(1).T, found.x.flatten()
    touched = every.abs().amax(1) > RANK * every.abs().max()
    N, start, top = every[touched], x[touched], float(x.abs().max())
    slack = max(SLACK, 30 * noise) * top
    left, c = start, torch.zeros_like(N[0])
    for _ in range(NEWTON):
        below = left < 0
        gram = N[below].T @ N[below]
        gram.diagonal().add_(RANK * float(gram.diagonal().max()) + 1e-300)
        step = torch.linalg.solve(gram, N[below].T @ left[below])
        before, size = float(left.clamp_max(0).norm()), 1.0
        while float((left - size * (N @ step)).clamp_max(0).norm()) > before and size > 1e-4:
            size /= 2
        c = c - size * step
        left = start + N @ c
        if float(left.clamp_max(0).norm()) > (1 - 1e-6) * before:
            break
    if float(left.min()) < -BELOW * top:
        return found
    limit, before = 10 * max(slack, -float(left.min())), math.inf
    while limit < before:  # zero is what fits zero as well as the others do
        zero = left.abs() <= limit
        told = Truncated.of(N[zero])
        if int(zero.sum()) <= len(c) or told.rank < len(c):
            return found
        left = start + N @ told.solve(-start[zero])
        before, limit = limit, max(slack, 6 * float(left[zero].square().mean().sqrt()))
    if float(left.min()) < -6 * before or not _surrounded(N[zero]):
        return found
    answer = x + every @ told.solve(-start[zero])
    smallest = min(found.smallest, told.smallest / float(told.values[0]) * found.largest)
    return Channels(answer.reshape(found.x.shape), smallest, found.largest)


def _surrounded(directions: Tensor) -> bool:
    """Whether a combination of all rows, each with a weight above zero, vanishes."""
    from scipy.optimize import nnls

    A = directions.T.cpu().numpy()
    total = A.sum(1)
    try:
        rest = nnls(A, -total, maxiter=20 * A.shape[1])[1]
    except RuntimeError:  # it did not come to an end
        return False
    return bool(rest <= 1e-9 * (abs(A).sum() / len(A)))


@dataclass(frozen=True)
class _Columns:
    """``M X = R`` solved, and each open direction with its column."""

    x: Tensor
    smallest: float
    largest: float
    open: list[tuple[int, Tensor]]


def _by_column(M: Tensor, right: Tensor, x: Tensor, where: Tensor) -> _Columns:
    """``M x = right``, a column each, where some entries of ``x`` are known."""
    if len(M) > 2 * M.shape[1]:  # as many rows as columns say the same
        Q, M = torch.linalg.qr(M)
        right = Q.T @ right
    largest = float(torch.linalg.matrix_norm(M, 2))
    x, right = x.clone(), right - M @ x
    smallest, free = largest, []
    columns, kind = torch.unique(where, dim=1, return_inverse=True)
    for number in range(columns.shape[1]):  # columns with the same entries open are solved at once
        unknown, same = (~columns[:, number]).nonzero().T[0], (kind == number).nonzero().T[0]
        if not len(unknown):
            continue
        part = Truncated.of(M[:, unknown], largest=largest)
        x[unknown[:, None], same] = part.refined(M[:, unknown], right[:, same])
        smallest = min(smallest, part.smallest)
        for direction in part.null:
            spread = x.new_zeros(len(x))
            spread[unknown] = direction
            free += [(int(column), spread) for column in same]
    return _Columns(x, smallest, largest, free)

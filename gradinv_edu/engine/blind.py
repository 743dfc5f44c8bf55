"""A convolution whose weight gradient alone gives its input and its output gradient away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..checks import checked
from .layers.convolution import Conv, Convolution, places
from .solve import Solution, draw

__all__ = ["Blind", "possible", "solve"]

FAINT = 1e-9  # of the largest singular value: at most as many count as there are positions
SEPARATE = 1e-6  # of the largest: what tells one scale of the eigenvectors from another
DRAWS = 20  # combinations of shifts, of which the one with the widest gaps is taken
ROUNDS = 12  # of alternating least squares, for the last digits


@dataclass(frozen=True)
class Blind:
    """Input and output gradient of a convolution, read off its weight gradient.

    Attributes
    ----------
    solution : Solution
        ``x`` is the input, ``(1, channels, *positions)``.
    k : Tensor
        ``∂L/∂z``, ``(1, filters, *positions)``.
    """

    solution: Solution
    k: Tensor


@checked
def possible(conv: Conv, input_shape: tuple[int, ...]) -> bool:
    """Whether a convolution has as many filters and channels as positions, and keeps their number.

    Parameters
    ----------
    conv : nn.Module
        The convolution.
    input_shape : tuple of int
        Of one input, ``(channels, *positions)``.
    """
    places(conv, input_shape)  # refuses a shape that the convolution does not take
    least = min(conv.out_channels, conv.in_channels) // conv.groups
    return math.prod(input_shape[1:]) <= least and Convolution(conv).shifts(input_shape[1:])


@checked
def solve(
    conv: Conv,
    weight_gradient: Float[Tensor, "F C ..."],
    total: Float[Tensor, " F"] | None,
    input_shape: tuple[int, ...],
    *,
    centred: bool = False,
    noise: float = 0.0,
) -> Blind | None:
    r""":math:`\partial L/\partial W_t = k\, S_t X`: both factors from the taps of one gradient.

    ``S_t`` shifts the map by tap ``t``, ``X`` holds the input, ``(positions, channels)``, and
    ``k`` the output gradient, ``(filters, positions)``. Projected on the leading singular vectors
    of all taps, ``T_0⁻¹ T_t = Y S_t Y⁻¹``: the same unknown ``Y`` turns every known shift
    into what was received. The eigenvectors of one combination of taps give ``Y`` up to a scale
    each; the other taps tie these scales together, and ``Σ_p k`` fixes the last.
    Implements :eq:`blind`.

    Parameters
    ----------
    conv : nn.Module
        Stride one, odd kernel, as many positions after as before, and no more of them than
        filters or channels (:func:`gradinv_edu.networks.may_be_blind`).
    weight_gradient : Tensor
        ``∂L/∂W``, shaped as the weight, float64.
    total : Tensor or None
        ``Σ_p k``, ``(filters,)``: the gradient of the bias, or what a norm above tells of it.
        None leaves one factor open, and its sign.
    input_shape : tuple of int
        ``(channels, *positions)``.
    centred : bool
        Whether each filter's ``k`` adds up to zero, as under a batch norm of its own statistics:
        ``k`` then spans one dimension less, and all taps together give both factors.
    noise : float
        Relative noise of the gradient.

    Returns
    -------
    Blind or None
        None where the output gradient or the input spans fewer dimensions than there are
        positions, or the taps leave the scales open.

    Notes
    -----
    Source: this project's.
    """
    index, pixels = places(conv, input_shape)
    checks.fits(weight_gradient, "weight_gradient", conv.weight.shape)
    if total is not None:
        checks.fits(total, "total", (conv.out_channels,))
    filters, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    size = float(weight_gradient.abs().max())
    if size == 0:
        return None
    taps = (weight_gradient / size).reshape(conv.groups, filters, channels, -1)
    parts = []
    sums = [None] * conv.groups if total is None else [*(total / size).reshape(-1, filters)]
    for group, own in zip(taps, sums, strict=True):
        S = _shifts(index, pixels, group)
        part = _factors(group.permute(2, 0, 1), own, S, centred, noise)
        if part is None:
            return None
        parts.append(part)
    k = size * torch.cat([part.k for part in parts]).reshape(1, conv.out_channels, *input_shape[1:])
    x = torch.cat([part.a for part in parts]).reshape(1, *input_shape)
    worst = min(part.smallest for part in parts)
    residual = max(part.residual for part in parts)
    return Blind(Solution(x, residual, 0, 0.0, worst, 1.0), k)


@dataclass(frozen=True)
class _Part:
    """One group: ``k``, input, what they leave unexplained, and the least certain direction."""

    k: Tensor
    a: Tensor
    residual: float
    smallest: float


def _shifts(index: Tensor, pixels: int, like: Tensor) -> Tensor:
    """``S_t`` of every tap, ``(taps, positions, pixels)``."""
    S = torch.zeros(len(index), index.shape[1], pixels + 1, dtype=torch.float64)
    S.scatter_(2, index[:, :, None], 1.0)
    return S[:, :, 1:].to(like.device)


def _factors(
    G: Tensor, total: Tensor | None, S: Tensor, centred: bool, noise: float
) -> _Part | None:
    """``k`` and ``A`` from ``(taps, filters, channels)``."""
    P, middle = S.shape[1], len(S) // 2
    filters, channels = (G.abs().amax(dim=dims) > 0 for dims in ((0, 2), (0, 1)))
    live = G[:, filters][:, :, channels]  # what never moved says nothing, and would divide by zero
    rank = P - centred
    if live.shape[1] < rank or live.shape[2] < P or not rank:
        return None
    U, left = _leading(live.transpose(0, 1).flatten(1), rank)
    V, right = _leading(live.permute(2, 0, 1).flatten(1), P)
    if min(left, right) < max(FAINT, 10 * noise):
        return None
    T, least = U.T @ live @ V, max(SEPARATE, 10 * noise)
    separate = 1.0
    if centred:
        found = _both(T, S, least)
        if found is None:
            return None
        K, separate = U @ found[0], found[1]
    elif P > 1:
        turned = _similarity(torch.linalg.solve(T[middle], T), S, least)
        if turned is None:
            return None
        K, separate = U @ T[middle] @ turned[0], turned[1]
    else:
        K = U @ T[middle]
    K, A, residual = _refined(live, K, S)
    scale, apart = 1.0, 0.0
    if total is not None:
        sums = K.sum(1)
        scale = float(sums @ total[filters] / sums.square().sum())
        if scale == 0 or not math.isfinite(scale):
            return None
        apart = float((scale * sums - total[filters]).norm() / total.norm())
    k, a = G.new_zeros(len(filters), P), G.new_zeros(len(channels), P)
    k[filters], a[channels] = scale * K, A.T / scale
    return _Part(k, a, max(residual, apart), min(left, right, separate))


def _both(T: Tensor, S: Tensor, separate: float) -> tuple[Tensor, float] | None:
    """``X⁻¹ Q`` with ``X T_t = Q S_t B`` for all taps, linear in ``(X, B)``; ``Q 1 = 0``."""
    taps, rank, P = T.shape
    ones = torch.full((P, 1), P**-0.5, dtype=T.dtype, device=T.device)
    Q = torch.linalg.qr(torch.cat([ones, torch.eye(P).to(T)[:, 1:]], 1)).Q[:, 1:].T
    one, own = torch.eye(rank).to(T), torch.eye(P).to(T)
    left = torch.einsum("ai,tkj->tajik", one, T).reshape(taps * rank * P, -1)
    right = torch.einsum("tam,jb->tajmb", Q @ S, own).reshape(taps * rank * P, -1)
    _, values, ways = torch.linalg.svd(torch.cat([left, -right], 1), full_matrices=False)
    tied = float(values[-2] / values[0])
    X = ways[-1, : rank * rank].reshape(rank, rank)
    inverse, info = torch.linalg.inv_ex(X)
    return (inverse @ Q, tied) if tied > separate and int(info) == 0 else None


def _leading(M: Tensor, P: int) -> tuple[Tensor, float]:
    """Leading ``P`` left singular vectors, and the last of these singular values by the first."""
    if M.shape[0] > 4 * P + 16:  # of low rank: its range from a few random combinations
        seeds = draw(M.new_empty(M.shape[1], 2 * P + 8))
        range_ = torch.linalg.qr(M @ seeds).Q
        U, values, _ = torch.linalg.svd(range_.T @ M, full_matrices=False)
        U = range_ @ U
    else:
        U, values, _ = torch.linalg.svd(M, full_matrices=False)
    return U[:, :P], float(values[P - 1] / values[0])


def _similarity(B: Tensor, S: Tensor, separate: float) -> tuple[Tensor, float] | None:
    """``Y`` with ``B_t Y = Y S_t`` up to one factor, and how well the scales are tied."""
    weights = _combination(S)
    if weights is None:
        return None
    Q = torch.linalg.eigh(torch.tensordot(weights, S, 1)).eigenvectors
    found, R = torch.linalg.eig(torch.tensordot(weights, B, 1))
    R = R[:, found.real.argsort()].real
    inverse, info = torch.linalg.inv_ex(R)
    if int(info) != 0:
        return None
    # (R⁻¹ B_t R) diag(c) = diag(c) (Qᵀ S_t Q): the scales c span the null space of N
    L, M = inverse @ B @ R, Q.T @ S @ Q
    product = (L * M).sum(0)
    N = torch.diag((L.square().sum(1) + M.square().sum(2)).sum(0)) - product - product.T
    values, vectors = torch.linalg.eigh(N)
    tied = math.sqrt(max(float(values[1] / values[-1]), 0.0))
    if not tied > separate:
        return None
    return R @ torch.diag(vectors[:, 0]) @ Q.T, tied


def _combination(S: Tensor) -> Tensor | None:
    """Weights of the taps, opposite ones alike, whose sum has the widest gaps between eigenvalues.

    Opposite shifts are each other's transpose: their sum is symmetric, its eigenvalues are real.
    """
    generator, best, widest = torch.Generator().manual_seed(1), None, 1e-6
    for _ in range(DRAWS):
        drawn = draw(S[:, 0, 0], generator)
        weights = drawn + drawn.flip(0)
        values = torch.linalg.eigvalsh(torch.tensordot(weights, S, 1))
        gap = float(values.diff().min() / (values[-1] - values[0]))
        best, widest = (weights, gap) if gap > widest else (best, widest)
    return best


def _refined(G: Tensor, K: Tensor, S: Tensor) -> tuple[Tensor, Tensor, float]:
    """Alternating least squares over all taps, as long as they explain more."""
    flat, size, best = G.flatten(0, 1), float(G.norm()), math.inf
    pair = None
    for _ in range(ROUNDS):
        A = torch.linalg.lstsq(torch.cat([K @ s for s in S]), flat).solution
        across = torch.cat([(s @ A).T for s in S])
        K = torch.linalg.lstsq(across, G.permute(0, 2, 1).flatten(0, 1)).solution.T
        residual = float((G - K @ S @ A).norm()) / size
        if not residual < best:
            break
        better, best, pair = residual < 0.5 * best, residual, (K, A)
        if not better:
            break
    assert pair is not None
    return *pair, best

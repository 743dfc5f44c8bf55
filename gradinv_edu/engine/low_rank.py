"""Sums of a few outer products: one sample's gradient has rank one, that of N samples rank N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..checks import checked
from ..errors import InconsistentGradientError, InvalidArgumentError, UndeterminedScaleError

__all__ = [
    "Factors",
    "RankOne",
    "leading_triple",
    "low_rank_factors",
    "machine_epsilon",
    "rank_one",
    "require_bias",
]

POWER_STEPS = 30
SETTLED = 2e-15  # change of a singular vector of length one: rounding alone
CHUNK = 2**20  # entries that are worked on at a time
EXTREME = 1e-200  # squares of entries are left room over the smallest number


@dataclass(frozen=True)
class RankOne:
    """Best rank-one fit ``value · left rightᵀ``; ``residual`` is what it leaves, relative."""

    left: Tensor
    value: float
    right: Tensor
    residual: float


@dataclass(frozen=True)
class Factors:
    """``matrix / |matrix|_max = left · diag(values) · right``, up to ``noise``.

    ``left`` is ``(m, N)`` with orthonormal columns, ``values`` ``(N,)`` falling, ``right``
    ``(N, n)`` with orthonormal rows; ``noise`` the first singular value left out, or what
    rounding makes of it, and ``eps`` the machine precision of the numbers that came in.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    noise: float
    eps: float

    @property
    def living(self) -> Tensor:
        """Rows that are not zero, ``(m,)``."""
        return (self.left != 0).any(dim=1)


@checked
def rank_one(
    weight_gradient: Float[Tensor, " m n"], bias_gradient: Float[Tensor, " m"] | None = None
) -> RankOne:
    r""":math:`G = d\,u v^\top + \dots`: one sample's weight gradient ``k xᵀ`` has rank one.

    Gives the direction of ``x`` (and of ``k``), not its scale or sign. Implements
    :eq:`rank-one-gradient`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``G``, ``(m, n)``.
    bias_gradient : Tensor, optional
        ``(m,)``; beside the other as one more column.

    Returns
    -------
    RankOne

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        For a tensor of another shape or not finite; for a weight gradient of zeros.
    """
    checks.not_all_zero(weight_gradient, "weight_gradient")
    blocks = [weight_gradient]
    if bias_gradient is not None:
        blocks.append(bias_gradient[:, None])
    tamed, scale = _tamed(blocks)
    u, value, v = leading_triple(*tamed)
    parts = torch.split(value * v, [block.shape[1] for block in blocks])
    rest = math.hypot(*(_rest(block, u, part) for block, part in zip(tamed, parts, strict=True)))
    return RankOne(
        u, scale * value, v, rest / math.hypot(*(float(block.norm()) for block in tamed))
    )


def _rest(G: Tensor, u: Tensor, v: Tensor) -> float:
    """``‖G − u vᵀ‖``, some rows at a time: to allocate such a matrix again costs more than sums."""
    rows = max(1, CHUNK // G.shape[1])
    parts = zip(torch.split(G, rows), torch.split(u, rows), strict=True)
    return math.hypot(*(float(torch.addr(g, part, v, alpha=-1).norm()) for g, part in parts))


def _tamed(blocks: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
    """Blocks whose entries can be squared, and what they were divided by for that."""
    size = max(abs(float(end)) for block in blocks for end in torch.aminmax(block))
    scale = 1.0 if EXTREME < size * size < 1 / EXTREME else size
    return (blocks if scale == 1.0 else [block / scale for block in blocks]), scale


def leading_triple(*blocks: Tensor) -> tuple[Tensor, float, Tensor]:
    r""":math:`d, u, v` of the blocks side by side, each entry of v relative to its size.

    Power iteration settles at once where the rank is nearly one; elsewhere the SVD decides.

    Parameters
    ----------
    *blocks : Tensor
        ``(m, n_i)``, finite, float64, not all zero.

    Returns
    -------
    u, value, v : Tensor, float, Tensor
    """
    G, scale = _tamed(blocks)
    row = int(torch.stack([block.norm(dim=1) for block in G]).norm(dim=0).argmax())
    parts, before = [block[row] for block in G], None
    for _ in range(POWER_STEPS):
        u = torch.stack([block @ part for block, part in zip(G, parts, strict=True)]).sum(dim=0)
        u = u / u.norm()
        parts = [u @ block for block in G]
        v = torch.cat(parts)
        value, v = float(v.norm()), v / v.norm()
        if before is not None and float((v - before).norm()) < SETTLED:
            return u, scale * value, v
        before = v
    u = torch.linalg.svd(torch.cat([*G], dim=1), full_matrices=False).U[:, 0]
    v = torch.cat([u @ block for block in G])
    return u, scale * float(v.norm()), v / v.norm()


def require_bias(bias_gradient: Tensor | None) -> Tensor:
    """Return the bias gradient, without which a weight gradient leaves lengths open.

    Raises
    ------
    UndeterminedScaleError, VanishingGradientError
        If it is missing, or zero everywhere.
    """
    if bias_gradient is None:
        raise UndeterminedScaleError(
            "bias_gradient is missing: without it the weight gradient gives every sample's "
            "direction at most, not its length."
        )
    return checks.not_all_zero(bias_gradient, "bias_gradient")


def machine_epsilon(tensor: Tensor) -> float:
    """Machine precision of the coarsest type that holds every entry.

    A gradient keeps this mark of the client's type when it is converted to a finer one.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)):
            return torch.finfo(dtype).eps
    return torch.finfo(tensor.dtype).eps


@checked
def low_rank_factors(matrix: Float[Tensor, " m n"], rank: int, eps: float | None = None) -> Factors:
    r""":math:`G = k^\top X = U R`: both factors, up to an invertible :math:`N \times N` matrix.

    The gradient of N samples has rank N. Its singular vectors are one factorisation, the samples
    another, and ``kᵀ = U Q``, ``X = Q⁻¹ R``. Implements :eq:`low-rank-split`.

    Parameters
    ----------
    matrix : Tensor
        ``G``, ``(m, n)``.
    rank : int
        N.
    eps : float, optional
        Machine precision of the numbers; by default, of the coarsest type that holds them.

    Returns
    -------
    Factors

    Raises
    ------
    InvalidTensorError, VanishingGradientError, InvalidArgumentError
        If it is not a finite matrix, or zero; if ``rank`` is not from 1 to min(m, n).
    InconsistentGradientError
        If the rank is another one; the message says which.
    """
    checks.not_all_zero(matrix, "matrix")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(matrix.shape):
        raise InvalidArgumentError(
            f"The batch size must be a whole number from 1 to {min(matrix.shape)}, which is as far "
            f"as a gradient of shape {tuple(matrix.shape)} can tell samples apart; got {rank!r}."
        )
    eps = machine_epsilon(matrix) if eps is None else eps
    U, S, Vh = torch.linalg.svd(matrix / matrix.abs().max(), full_matrices=False)
    _check_rank(S, rank, eps)
    below = float(S[rank]) if rank < len(S) else 0.0
    left = torch.where((matrix != 0).any(dim=1, keepdim=True), U[:, :rank], 0.0)
    return Factors(left, S[:rank], Vh[:rank], max(below, eps * float(S[0])), eps)


def _check_rank(S: Tensor, rank: int, eps: float) -> None:
    rounding = 20 * eps * float(S[0])
    found = int(S.gt(rounding).sum())
    if found == len(S) > 1:  # noise everywhere: the steepest fall counts
        falls = S[:-1] / S[1:]
        found = int(falls.argmax()) + 1 if float(falls.max()) > 10 else found
    clean = rank == len(S) or float(S[rank]) <= rounding
    if (found == rank and clean) or (rank < len(S) and float(S[rank - 1]) > 100 * float(S[rank])):
        return
    if found == rank:
        raise InconsistentGradientError(
            f"The gradient has rank {rank} only roughly: it carries noise, which hides the zeros."
        )
    why = (
        "two samples are equal, one tells nothing, or the batch is smaller"
        if found < rank
        else "the batch is larger, or the gradient carries noise that hides zeros"
    )
    raise InconsistentGradientError(
        f"The gradient has rank {found}, which is not the batch size {rank}: {why}."
    )

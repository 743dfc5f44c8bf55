"""Softmax cross-entropy of a batch: every sample's input and k from one summed gradient."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from ...checks import checked
from ...errors import InvalidArgumentError, NotRecoveredError
from ..low_rank import machine_epsilon
from .registry import Head

__all__ = ["GUESSES", "SoftmaxEquations", "possible_labels", "recover_outputs"]

STARTS = 64  # random predictions tried at once for one guess of the labels
GUESSES = 200  # of the labels, at most
STEPS = 60  # of Levenberg and Marquardt from each of them
DONE = 1e-13  # norm of the equations at which the best start has nothing left to gain
NULL = 1e-9  # singular values below this share of the largest count as zero


@checked
def possible_labels(weight_gradient: Float[Tensor, " m n"], batch_size: int) -> list[int]:
    r""":math:`\exists q:\; (U q)_y < 0,\; (U q)_c \ge 0 \text{ for } c \ne y`.

    Every ``k_n`` is negative at its label and nowhere else, and lies in the column space of the
    last layer's gradient: a class for which no such vector exists is no label of the batch.
    Implements :eq:`batch-labels`.

    Parameters
    ----------
    weight_gradient : Tensor
        Of the last layer, ``(classes, n)``.
    batch_size : int
        ``N``; at most ``classes − 1`` samples can be told apart.

    Returns
    -------
    list of int
        In rising order.

    Raises
    ------
    InvalidTensorError, InvalidArgumentError
        If the gradient is not a finite matrix, or N not between 1 and ``classes − 1``.
    NotRecoveredError
        If the gradient's rank is not ``batch_size``.

    Notes
    -----
    Source: Dang et al. (2021), as a linear programme per class.
    """
    left, _ = _factors(weight_gradient, batch_size)
    return [y for y in range(len(left)) if _separable(left, y)]


def _factors(G: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """``UΣ`` and ``V`` of the rank-``N`` gradient."""
    limit = min(len(G) - 1, G.shape[1])
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not whole or not 1 <= batch_size <= limit:
        raise InvalidArgumentError(
            f"batch_size is {batch_size!r}; a last layer of shape {tuple(G.shape)} tells at most "
            f"{limit} samples apart, since each k sums to zero over the classes."
        )
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    rank = int((max(NULL, 30 * machine_epsilon(G)) * S[0] < S).sum())
    if rank != batch_size:
        raise NotRecoveredError(
            f"The last layer's gradient has rank {rank}, not {batch_size}: the batch has another "
            "size, or holds samples that this layer cannot tell apart."
        )
    return U[:, :rank] * S[:rank], Vh[:rank].T


def _separable(left: Tensor, y: int) -> bool:
    from scipy.optimize import linprog

    rows = left.cpu().numpy() / float(left.abs().max())
    others = [c for c in range(len(rows)) if c != y]
    found = linprog(rows[y], -rows[others], [1e-9] * len(others), bounds=(-1e3, 1e3))
    return bool(found.status == 0 and found.fun < -1e-6)


@checked
def recover_outputs(
    weight: Float[Tensor, " m n"],
    bias: Float[Tensor, " m"] | None,
    weight_gradient: Float[Tensor, " m n"],
    bias_gradient: Float[Tensor, " m"] | None,
    batch_size: int,
    *,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> list[Head]:
    r""":math:`N k_n = \mathrm{softmax}(W x_n + b) - e_{y_n},\ k^\top = U Q,\ X = Q^{-1} R`.

    The gradient of a last layer, ``G = Σ k_n x_nᵀ = U R``, has rank ``N``: inputs and output
    gradients follow from the ``N²`` numbers in ``Q``. The softmax gives ``N(classes − 1)``
    equations for them, solved by Levenberg and Marquardt from random predictions, for each
    multiset of the labels that are possible. Implements :eq:`batch-softmax`.

    Parameters
    ----------
    weight, bias : Tensor
        ``W`` ``(classes, n)`` and ``b`` ``(classes,)`` or None.
    weight_gradient, bias_gradient : Tensor
        Of the batch, shaped likewise; the bias gradient may be None.
    batch_size : int
        ``N``.
    reduction : {"mean", "sum"}
        Of the cross-entropy over the batch.
    generator : torch.Generator, optional
        Of the random starts; a fixed one by default.

    Returns
    -------
    list of Head
        Every answer that fits, best first; samples in the order of their labels.

    Raises
    ------
    InvalidTensorError, InvalidArgumentError
        If an argument has the wrong shape or value.
    NotRecoveredError
        If the rank is not ``N``, or no start leads to an answer.

    Notes
    -----
    The setting is that of Zhu and Blaschko's follow-up to R-GAP; the reduction to ``N²``
    unknowns is this project's.
    """
    if reduction not in ("mean", "sum"):
        raise InvalidArgumentError(f"reduction is 'mean' or 'sum'; got {reduction!r}.")
    left, V = _factors(weight_gradient, batch_size)
    count = batch_size if reduction == "mean" else 1
    total = None if bias_gradient is None else count * bias_gradient
    b = torch.zeros_like(weight[:, 0]) if bias is None else bias
    equations = SoftmaxEquations(weight @ V, b, count * left, total)
    generator = generator or torch.Generator().manual_seed(20210112)
    tolerance = max(1e-8, 3e3 * machine_epsilon(weight_gradient))
    possible = [y for y in range(len(left)) if _separable(left, y)]
    guesses = list(combinations_with_replacement(possible, batch_size))
    guesses.sort(key=lambda labels: -len(set(labels)))  # spurious labels are rare
    for labels in guesses[:GUESSES]:
        if found := equations.solve(labels, generator, tolerance):
            targets = torch.tensor(labels, device=V.device)
            return [Head(equations.k(C) / count, C @ V.T, targets, rest) for C, rest in found]
    raise NotRecoveredError(
        f"{min(len(guesses), GUESSES)} of {len(guesses)} guesses of the {batch_size} labels were "
        "tried, and no predictions explain the last layer's gradient: the loss may be another, "
        "or the predictions too confident for this precision."
    )


class SoftmaxEquations:
    """``softmax(W V c_n + b) − e_{y_n} − N k_n = 0`` in ``D = C⁻ᵀ``, for many starts at once.

    Parameters
    ----------
    WV : Tensor
        ``(classes, N)``.
    b : Tensor
        ``(classes,)``.
    left : Tensor
        ``N UΣ``, ``(classes, N)``: row n of ``D leftᵀ`` is ``N k_n``.
    total : Tensor, optional
        ``N ∂L/∂b = Σ_n N k_n``, ``(classes,)``: as many equations more.
    """

    def __init__(self, WV: Tensor, b: Tensor, left: Tensor, total: Tensor | None = None) -> None:
        self.WV, self.b, self.left, self.total = WV, b, left, total
        self.N = left.shape[1]

    def k(self, C: Tensor) -> Tensor:
        """``N k_n`` as rows."""
        found: Tensor = torch.linalg.solve(C.T, self.left.T)
        return found

    def residuals(self, D: Tensor, one_hot: Tensor) -> Tensor:
        """Of ``D``, ``(starts, N, N)``: equations end to end, ``(starts, equations)``."""
        k = D @ self.left.T
        gaps = (k + one_hot - (_inverse(D) @ self.WV.T + self.b).softmax(-1)).flatten(1)
        return gaps if self.total is None else torch.cat([gaps, k.sum(1) - self.total], dim=1)

    def jacobian(self, D: Tensor) -> Tensor:
        """Of :meth:`residuals`, ``(starts, equations, N²)``, in closed form."""
        C = _inverse(D)
        p = (C @ self.WV.T + self.b).softmax(-1)
        slope = p.unsqueeze(-1) * (self.WV - (p @ self.WV).unsqueeze(-2))  # dp_n/dc_n
        eye = torch.eye(self.N, dtype=D.dtype, device=D.device)
        from_k = torch.einsum("ni,mj->nmij", eye, self.left)
        from_p = torch.einsum("snmb,snj,sib->snmij", slope, C, C)  # dC = -C dDᵀ C
        whole = (from_k + from_p).flatten(1, 2).flatten(2)
        if self.total is None:
            return whole
        sums = self.left[:, None, :].expand(-1, self.N, -1).flatten(1)
        return torch.cat([whole, sums.expand(len(D), -1, -1)], dim=1)

    def solve(
        self, labels: tuple[int, ...], generator: torch.Generator, tolerance: float
    ) -> list[tuple[Tensor, float]]:
        """Distinct ``C`` for these labels, each with the largest gap of a sample."""
        classes = len(self.left)
        one_hot = torch.eye(classes, dtype=self.left.dtype, device=self.left.device)[list(labels)]
        shape = (STARTS, self.N, classes)  # predictions from even to confident ones
        noise = torch.randn(
            shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        spread = torch.linspace(0.1, 4.0, STARTS, dtype=torch.float64)
        p = (spread[:, None, None].to(self.left) * noise.to(self.left)).softmax(-1)
        D = self._descend((p - one_hot) @ torch.linalg.pinv(self.left).T, one_hot)
        rest = self._inconsistency(D, one_hot)
        answers: list[tuple[Tensor, float]] = []
        for i in torch.argsort(rest).tolist():
            if not float(rest[i]) <= tolerance:
                break
            C = _inverse(D[i])
            if not any(_same(C, other, labels, 1e3 * tolerance) for other, _ in answers):
                answers.append((C, float(rest[i])))
        return answers

    def _inconsistency(self, D: Tensor, one_hot: Tensor) -> Tensor:
        """Largest gap of a sample relative to its ``k``; infinite inputs with ``k = 0`` fit not."""
        k, gaps = D @ self.left.T, self.residuals(D, one_hot)
        own = gaps[:, : k[0].numel()].reshape(k.shape).norm(dim=2)
        rest: Tensor = (own / k.norm(dim=2)).amax(dim=1) + gaps[:, k[0].numel() :].norm(dim=1)
        return rest

    def _descend(self, D: Tensor, one_hot: Tensor) -> Tensor:
        """Levenberg and Marquardt, every start with its own damping."""
        damping = torch.full((len(D), 1, 1), 1e-2, dtype=D.dtype, device=D.device)
        r = self.residuals(D, one_hot)
        for step_number in range(STEPS):
            J = self.jacobian(D)
            gram = J.mT @ J
            scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
            factor, _ = torch.linalg.cholesky_ex(gram + damping * torch.diag_embed(scale))
            step = torch.cholesky_solve(J.mT @ r.unsqueeze(-1), factor)
            trial = D - step.reshape_as(D)
            new = self.residuals(trial, one_hot)
            better = (new.norm(dim=1) < r.norm(dim=1)) & torch.isfinite(new).all(1)
            D = torch.where(better[:, None, None], trial, D)
            r = torch.where(better[:, None], new, r)
            damping = torch.where(better[:, None, None], damping / 10, damping * 10)
            damping = damping.clamp(1e-15, 1e9)
            if float(r.norm(dim=1).min()) < DONE and step_number > 20:
                break
        return D


def _inverse(D: Tensor) -> Tensor:
    """``D⁻ᵀ``; not finite where there is none."""
    inverse: Tensor = torch.linalg.inv_ex(D.mT).inverse
    return inverse


def _same(C: Tensor, other: Tensor, labels: tuple[int, ...], tolerance: float) -> bool:
    """Whether two answers differ by the order of samples of equal label alone."""
    left = list(range(len(C)))
    for row, label in zip(C, labels, strict=True):
        gaps = {i: float((other[i] - row).norm()) for i in left if labels[i] == label}
        match = [i for i, gap in gaps.items() if gap <= tolerance * float(row.norm())]
        if not match:
            return False
        left.remove(match[0])
    return True

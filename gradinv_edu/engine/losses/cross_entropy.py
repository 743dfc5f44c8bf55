"""Softmax cross-entropy: ``k = softmax(W x + b) − e_y`` tells label, sign and scale."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ... import checks
from ...checks import checked
from ...errors import InconsistentGradientError, InvalidTensorError
from .logistic import logistic_scales
from .registry import Head, Rule, register
from .scale import Multiples, explained, polish_scale, rows_of
from .softmax_batch import recover_outputs

__all__ = ["CrossEntropy", "count_labels", "recover_from_cross_entropy"]


@register(nn.CrossEntropyLoss)
class CrossEntropy(Rule):
    """``k = softmax(z) − e_y``."""

    def from_weight(self, W: Tensor, G: Tensor, bias: Tensor | None) -> list[Head]:
        """By :func:`~gradinv_edu.fully_connected.recover_from_cross_entropy`."""
        return recover_from_cross_entropy(W, G, bias)

    def of_batch(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_gradient: Tensor,
        bias_gradient: Tensor | None,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> list[Head]:
        """By :func:`~gradinv_edu.batches.recover_outputs`."""
        return recover_outputs(
            weight,
            bias,
            weight_gradient,
            bias_gradient,
            batch_size,
            reduction=self.reduction,
            generator=generator,
        )

    def terms(self, samples: int, outputs: int) -> int:
        """Mean over samples, never over classes."""
        return samples if self.reduction == "mean" else 1

    def slope(self, z: Tensor, targets: Tensor) -> Tensor:
        """``softmax(z) − e_y``; targets are indices, or probabilities ``(N, m)``."""
        soft = targets.is_floating_point()
        e = targets.to(z) if soft else nn.functional.one_hot(targets, z.shape[-1]).to(z)
        return z.softmax(dim=-1) - e

    def target(self, z: Tensor, k: Tensor) -> Tensor:
        """The negative entry of ``k``."""
        return torch.tensor(_label(k, z), device=k.device)


@checked
def recover_from_cross_entropy(
    weight: Float[Tensor, " m n"],
    weight_gradient: Float[Tensor, " m n"],
    bias: Float[Tensor, " m"] | None = None,
) -> list[Head]:
    r""":math:`s = \log(c_i / c_j) \,/\, (w_i - w_j)\cdot v` from rows i, j; then :math:`x = s\,v`.

    Without any bias gradient ``G = k xᵀ = c vᵀ`` leaves the scale ``s`` open; the softmax
    closes it, since ``k = softmax(W x + b) − e_y``: the one entry of its own sign is the label
    (:eq:`label-sign`), the logarithms of all others are the logits up to a constant. Two rows
    other than the label's are enough; all are used, each by its precision. Two classes leave
    one such row, up to two scales for each label, and no contradiction even for several samples.
    Implements :eq:`softmax-scale`.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(m, n)`` with m ≥ 2.
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.

    Returns
    -------
    list of Head
        Of one sample, best first; more than one where several scales satisfy every row.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not match, or there is one class only; if the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies the rows: several samples, or another model's gradient.

    Notes
    -----
    Derived for this project; no published source is known to us.
    """
    checks.not_all_zero(weight_gradient, "weight_gradient")
    if len(weight) < 2:
        raise InvalidTensorError("Cross-entropy needs two classes or more; weight has one row.")
    b = torch.zeros_like(weight[:, 0]) if bias is None else bias
    found = explained(rows_of(weight_gradient), lambda rows: _answers(weight @ rows.v, b, rows))
    if not found:
        raise InconsistentGradientError(
            "No scale makes softmax(W x + b) − e_y agree with this weight gradient: it is the sum "
            "of several samples, or belongs to another layer, loss or model."
        )
    return found


def _answers(Wv: Tensor, b: Tensor, rows: Multiples) -> list[Head]:
    """Answers with ``c = s·(softmax(s W v + b) − e_y)`` for some label and scale ``s > 0``."""
    negative, others = (rows.c < 0) & rows.trusted, (rows.c > 0) & rows.trusted
    if int(negative.sum()) > 1 or not bool(others.any()):
        return []

    def log_p(s: float) -> tuple[Tensor, Tensor]:
        value = torch.log_softmax(s * Wv + b, 0)
        return value, Wv - (value.exp() * Wv).sum()

    scales = [
        polish_scale(start, log_p, rows.c, others, rows.precision)
        for start in _scales(Wv, b, rows, others)
    ]
    return [_head(Wv, b, rows, s) for s in scales]


def _scales(Wv: Tensor, b: Tensor, rows: Multiples, others: Tensor) -> list[float]:
    """The slope of ``log c_j − b_j`` over ``w_j · v``, by weighted least squares."""
    c = rows.c
    if int(others.sum()) < 2:
        if len(c) > 2:
            return []
        other = int(others.nonzero()[0, 0])  # two classes are the logistic loss of z_y − z_other
        beta = float(b[1 - other] - b[other])
        return logistic_scales(float(Wv[1 - other] - Wv[other]), beta, float(c[other]))
    w = rows.precision[others].pow(-2)
    left, right = Wv[others], c[others].log() - b[others]
    left, right = left - (w * left).sum() / w.sum(), right - (w * right).sum() / w.sum()
    below = float((w * left.square()).sum())
    s = float((w * left * right).sum()) / below if below > 0 else 0.0
    if abs(s) * math.sqrt(below) < 100:  # logits equal to the last digits: p is that of z = b
        s = float(c[others].sum() / torch.softmax(b, 0)[others].sum())
    return [s] if s > 0 else []


def _label(k: Tensor, z: Tensor, trusted: Tensor | None = None) -> int:
    """Row of the negative entry; where ``p_y`` was rounded to 1, the likeliest row without one."""
    trusted = torch.ones_like(k, dtype=torch.bool) if trusted is None else trusted
    negative = (k < 0) & trusted
    if bool(negative.any()):
        return int(torch.where(negative, k, math.inf).argmin())
    return int(torch.where((k <= 0) | ~trusted, z, -math.inf).argmax())


def _head(Wv: Tensor, b: Tensor, rows: Multiples, s: float) -> Head:
    z = s * Wv + b
    y = _label(rows.c, z, rows.trusted)
    k = torch.softmax(z, 0)
    k[y] = 0
    k[y] = -k.sum()  # p_y − 1 without cancellation
    gap = s * k - rows.c
    # the client computed p_y − 1 with rounding of the 1, however small the difference is
    gap[y] = (gap[y].abs() - 10 * len(k) * rows.eps * s).clamp_min(0)
    residual = max(float(gap.norm() / (s * k).norm()), rows.residual)
    c = rows.c.clone()
    c[y] = c[y] - rows.c.sum() if bool(rows.trusted.all()) else s * k[y]
    return Head(c[None] / s, s * rows.v[None], torch.tensor([y], device=c.device), residual)


@checked
def count_labels(
    bias_gradient: Float[Tensor, " classes"],
    batch_size: int,
    probabilities: Float[Tensor, " ..."] | None = None,
) -> Tensor:
    r""":math:`\text{count}_c = \sum_n p_{nc} - N\,\partial L/\partial b_c`: labels of a batch.

    For softmax cross-entropy averaged over the batch. Exact with the samples' own predictions;
    else an estimate, right if they are on average as given. Implements :eq:`label-counts`.

    Parameters
    ----------
    bias_gradient : Tensor
        Of the last layer, ``(C,)``.
    batch_size : int
        N.
    probabilities : Tensor, optional
        Predictions of the samples ``(N, C)``, or a mean prediction ``(C,)``; by default 1/C each.

    Returns
    -------
    Tensor
        ``(C,)``, int64, adds up to N.

    Raises
    ------
    InvalidTensorError, InvalidArgumentError, InconsistentGradientError
        If an argument cannot be; if exact predictions do not give whole numbers.

    Examples
    --------
    >>> count_labels(torch.tensor([-0.25, 0.25, 0.0]), 4, torch.tensor([0.25, 0.25, 0.5]))
    tensor([2, 0, 2])
    """
    N, C = checks.whole(batch_size, "batch_size"), len(bias_gradient)
    p = torch.ones_like(bias_gradient) if probabilities is None else probabilities
    p = checks.shaped(p, "probabilities", (N, C) if p.dim() == 2 else (C,))
    if bool((p < 0).any()) or not bool(p.sum(dim=-1).all()):
        raise InvalidTensorError(
            "probabilities are negative, or zero for every class: give the softmax of the logits."
        )
    counts = (p.sum(dim=0) if p.dim() == 2 else N * p / p.sum()) - N * bias_gradient
    shares = counts.clamp_min(0) if bool((counts > 0).any()) else torch.ones_like(counts)
    shares = shares / shares.sum() * N  # whole numbers near: the largest remainders go up
    rounded = shares.floor().long()
    short = N - int(rounded.sum())
    rounded[(shares - rounded).argsort(descending=True, stable=True)[:short]] += 1
    if p.dim() == 2 and float((counts - rounded).abs().max()) > 0.1:
        raise InconsistentGradientError(
            f"With these predictions the counts are {[round(c, 2) for c in counts.tolist()]}, not "
            "whole numbers: they are of other samples, or the batch size or the loss is another."
        )
    return rounded

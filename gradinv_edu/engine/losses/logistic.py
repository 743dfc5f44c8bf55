"""The binary logistic loss: ``k = sigmoid(W x + b) − y`` fixes the scale up to twins."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ... import checks
from ...checks import checked
from ...errors import InconsistentGradientError
from .registry import Head, Rule, register
from .scale import Multiples, explained, polish_scale, rows_of

__all__ = ["Logistic", "logistic_scales", "recover_from_logistic"]


@register(nn.BCEWithLogitsLoss)
class Logistic(Rule):
    """``k = sigmoid(z) − y``."""

    def from_weight(self, W: Tensor, G: Tensor, bias: Tensor | None) -> list[Head]:
        """By :func:`~gradinv_edu.fully_connected.recover_from_logistic`."""
        return recover_from_logistic(W, G, bias, reduction=self.reduction)

    def slope(self, z: Tensor, targets: Tensor) -> Tensor:
        """``sigmoid(z) − y``."""
        return torch.sigmoid(z) - targets.to(z)

    def target(self, z: Tensor, k: Tensor) -> Tensor:
        """``sigmoid(z) − k``."""
        return torch.sigmoid(z) - k


@checked
def recover_from_logistic(
    weight: Float[Tensor, " m n"],
    weight_gradient: Float[Tensor, " m n"],
    bias: Float[Tensor, " m"] | None = None,
    *,
    reduction: str = "sum",
) -> list[Head]:
    r""":math:`\langle W, G\rangle = -\mu\,\mathrm{sigmoid}(-\mu)` gives the margin by Lambert's W.

    One logit and the binary logistic loss: the margin ``μ = ±z`` has one value where the
    prediction is wrong, two where it is right: *twin data*. Either label explains the gradient
    with its own sign of ``x``. With several logits all share one scale, and every row is an
    equation; mirrored, ``−x`` with all labels changed, is always an answer too. Implements
    :eq:`logistic-root`.

    Parameters
    ----------
    weight, weight_gradient : Tensor
        ``W`` and ``∂L/∂W``, ``(m, n)``.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.
    reduction : {"sum", "mean"}
        Of the loss over the m logits.

    Returns
    -------
    list of Head
        Every answer: up to four for one logit.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not match; if the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies all rows.

    Notes
    -----
    Source: Zhu and Blaschko (2021) for the equation and its twins; the closed form and the
    treatment of several logits are this project's.
    """
    checks.not_all_zero(weight_gradient, "weight_gradient")
    b = torch.zeros_like(weight[:, 0]) if bias is None else bias
    factor = len(weight) if reduction == "mean" else 1
    rows = rows_of(weight_gradient)
    rows = replace(rows, c=factor * rows.c)  # the mean undone
    found = explained(rows, lambda rows: _answers(weight @ rows.v, b, rows))
    if not found:
        product = factor * float((weight * weight_gradient).sum())
        raise InconsistentGradientError(
            f"No scale makes sigmoid(W x + b) − y agree with this weight gradient in every row "
            f"(⟨W, ∂L/∂W⟩ = {product:.3g}, which one sample keeps above −0.2785 for "
            "each logit without a bias): it is the sum of several samples, or belongs to another "
            "layer, loss or model."
        )
    return [replace(head, k=head.k / factor) for head in found]


def _answers(Wv: Tensor, b: Tensor, rows: Multiples) -> list[Head]:
    """Answers with ``c = s·(sigmoid(s W v + b) − y)``: the signs of ``c`` are the labels."""
    side = torch.where(rows.c < 0, -1.0, 1.0).to(Wv)  # |k_j| = sigmoid(side·z_j)
    Wv, b = side * Wv, side * b
    top = int(rows.c.abs().argmax())
    starts = logistic_scales(-float(Wv[top]), -float(b[top]), float(rows.c[top].abs()))
    return [_head(Wv, b, side, rows, start) for start in starts]


def _head(Wv: Tensor, b: Tensor, side: Tensor, rows: Multiples, start: float) -> Head:
    # the client computed sigmoid(z) − 1 with rounding of the 1, however small the difference is
    size, rounding = rows.c.abs(), 10 * rows.eps * start
    precision = rows.precision + rounding / size.clamp_min(1e-300)

    def log_sigmoid(s: float) -> tuple[Tensor, Tensor]:
        z = s * Wv + b
        return nn.functional.logsigmoid(z), torch.sigmoid(-z) * Wv

    s = polish_scale(start, log_sigmoid, rows.c, precision < 0.2, precision)
    z, told = s * Wv + b, size > rounding
    y = torch.where(told, -side, side * z) > 0
    z = torch.where(told, z, -z.abs())  # no gradient: confident, and right
    gap = ((s * torch.sigmoid(z) - size).abs() - rounding).clamp_min(0)
    residual = max(float(gap.norm() / size.norm()), rows.residual)
    return Head(rows.c[None] / s, s * rows.v[None], y.to(side)[None], residual)


def logistic_scales(m: float, beta: float, a: float) -> list[float]:
    r"""Every :math:`s > 0` with :math:`s\,\mathrm{sigmoid}(-(m s + \beta)) = a`, for :math:`a > 0`.

    Multiplied out, ``s − a = a e^{m s + β}``. With ``u = m (s − a)`` that is
    ``u e^{−u} = m a e^{m a + β}``, so ``u = −W(−m a e^{m a + β})``, on both real branches of
    Lambert's W where ``m > 0`` and the argument lies above ``−1/e``, on one where ``m < 0``.
    """
    if m * a == 0:
        return [a * (1 + math.exp(min(beta, 700.0)))]
    exponent = math.log(abs(m) * a) + m * a + beta
    roots = [a + u / m for u in _lambert(exponent, -1 if m > 0 else 1)]
    return [_newton(s, m, beta, a) for s in roots if s > 0]


def _lambert(exponent: float, sign: int) -> list[float]:
    """Every ``u = −W(sign · e^exponent)``, also where the exponential over- or underflows."""
    from scipy.special import lambertw, wrightomega

    if sign > 0:
        return [-float(wrightomega(exponent))]
    if exponent > -1 + 1e-6:
        return []
    if exponent > -1:  # rounding beyond the tangent point, where both roots meet
        return [1.0]
    if exponent < -700:
        return [0.0, -exponent + math.log(-exponent)]
    return [-float(lambertw(-math.exp(exponent), branch).real) for branch in (0, -1)]


def _newton(s: float, m: float, beta: float, a: float) -> float:
    """The last digits, on ``log s + log sigmoid(−(m s + β)) = log a``."""
    for _ in range(4):
        t = m * s + beta
        e = math.exp(-abs(t))
        slope = 1 / s - m * (1 if t >= 0 else e) / (1 + e)
        error = math.log(s / a) - max(t, 0.0) - math.log1p(e)
        new = s - error / slope if abs(slope) * s > 1e-5 else s  # not where two roots meet
        if not (new > 0 and math.isfinite(new)):
            break
        s = new
    return s

"""A dense layer's gradient, and all that it says of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import checks
from .errors import (
    InconsistentGradientError,
    InvalidTensorError,
    UndeterminedScaleError,
    UnknownNameError,
    UnsupportedLossError,
)


@dataclass(frozen=True)
class RankOne:
    """Best rank-one fit ``value · left rightᵀ``; ``residual`` is what it leaves, relative."""

    left: Tensor
    value: float
    right: Tensor
    residual: float


@dataclass(frozen=True)
class Output:
    """The last layer undone: ``k = ∂L/∂z``, its input ``x``, and the label.

    Attributes
    ----------
    k : Tensor
        ``(m,)``.
    x : Tensor
        ``(n,)``.
    target : Tensor
        Class index ``()`` for cross-entropy, else ``(m,)``.
    residual : float
        How far the equations used contradict each other, relative.
    """

    k: Tensor
    x: Tensor
    target: Tensor
    residual: float


def rank_one(weight_gradient: Tensor) -> RankOne:
    r""":math:`G = \sigma_1 u v^\top + \dots`: one sample's weight gradient ``k xᵀ`` has rank one.

    Gives the direction of ``x`` (and of ``k``), not its scale or sign. Implements
    :eq:`rank-one-gradient`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``(m, n)``, floating point.

    Returns
    -------
    RankOne

    Raises
    ------
    InvalidTensorError
        If it is not a finite floating-point matrix.
    VanishingGradientError
        If it is zero everywhere.
    """
    G = checks.not_all_zero(
        checks.shaped(weight_gradient, "weight_gradient", (None, None)), "weight_gradient"
    )
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    u, v = U[:, 0], Vh[0]
    rest = float((G - S[0] * torch.outer(u, v)).norm() / G.norm())
    return RankOne(u, float(S[0]), v, rest)


def _svd(G: Tensor, b: Tensor) -> Tensor:
    v = rank_one(torch.cat([G, b[:, None]], dim=1)).right
    return v[:-1] / v[-1]


def _best_row(G: Tensor, b: Tensor) -> Tensor:
    row = int(b.abs().argmax())
    return G[row] / b[row]


def _mean(G: Tensor, b: Tensor) -> Tensor:
    alive = b != 0
    return (G[alive] / b[alive, None]).mean(dim=0)


def _least_squares(G: Tensor, b: Tensor) -> Tensor:
    return G.T @ b / b.square().sum()


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svd": _svd,
    "best_row": _best_row,
    "mean": _mean,
    "least_squares": _least_squares,
}


def recover_input(weight_gradient: Tensor, bias_gradient: Tensor, method: str = "svd") -> Tensor:
    r""":math:`x = v_{1:n} / v_{n+1}`, with :math:`[\,G \mid k\,] \approx \sigma_1 u v^\top`.

    Every row of a dense layer's gradient is one perceptron's and says the same ``x``; under
    noise in both parts the maximum-likelihood answer is total least squares, the leading right
    singular vector. Implements :eq:`rank-one-svd`; ``"least_squares"`` is
    :eq:`least-squares-row`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``.
    bias_gradient : Tensor
        ``∂L/∂b = k``, ``(m,)``.
    method : {"svd", "best_row", "mean", "least_squares"}
        The last three for comparison: the row of the largest bias gradient, the plain mean of
        all rows' ratios (as R-GAP and others take it), and ``Gᵀk / |k|²``.

    Returns
    -------
    Tensor
        ``(n,)``, float64.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    VanishingGradientError
        If the bias gradient is zero everywhere.
    UnknownNameError
        If there is no such method.

    Notes
    -----
    Source: Phong et al. (2018) for the ratio; total least squares is this project's choice.
    """
    if method not in METHODS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(METHODS)}.")
    G = checks.shaped(weight_gradient, "weight_gradient", (None, None))
    b = checks.shaped(bias_gradient, "bias_gradient", (None,))
    if len(b) != len(G):
        raise InvalidTensorError(
            f"weight_gradient has {len(G)} rows and bias_gradient {len(b)} entries: they do not "
            "belong to the same layer."
        )
    return METHODS[method](G, checks.not_all_zero(b, "bias_gradient"))


# --- the loss fixes the scale ---------------------------------------------------------------


def recover_from_cross_entropy(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None = None
) -> list[Output]:
    r""":math:`s = \log(c_j / c_k) \,/\, (w_j - w_k)\cdot v` from non-label rows ``j, k``; then :math:`x = s\,v`.

    Without any bias gradient ``G = k xᵀ = c vᵀ`` leaves the scale ``s`` open; the softmax
    closes it, since ``k = softmax(W x + b) − e_y``: the one entry of its own sign is the label
    (:eq:`label-sign`), the logarithms of all others are the logits up to a constant. Implements
    :eq:`softmax-scale`.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(m, n)`` with m ≥ 2.
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``; its dtype tells how far small probabilities may be trusted.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.

    Returns
    -------
    list of Output
        Best first; more than one where several scales satisfy every row.

    Raises
    ------
    InvalidTensorError
        If shapes do not match.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies the rows: several samples, or another model's gradient.

    Notes
    -----
    Derived for this project; no published source is known to us.
    """
    W = checks.shaped(weight, "weight", (None, None))
    G = checks.shaped(weight_gradient, "weight_gradient", tuple(W.shape))
    b = torch.zeros_like(W[:, 0]) if bias is None else checks.shaped(bias, "bias", (len(W),))
    fit = rank_one(G)
    found = []
    for sign in (1.0, -1.0):
        c, v = sign * fit.left * fit.value, sign * fit.right
        if len(W) > 2 and int((c < 0).sum()) != 1 and _trusted_negatives(c, weight_gradient) != 1:
            continue
        y = int(c.argmin())
        scales = _softmax_scales(W @ v, b, c, y, torch.finfo(weight_gradient.dtype).eps)
        found += [_softmax_output(W, b, v, c, y, s, fit.residual) for s in scales]
    found = [o for o in found if o.residual < max(10 * fit.residual, 0.2)]
    if not found:
        raise InconsistentGradientError(
            "No scale makes softmax(W x + b) − e_y agree with this weight gradient: it is the sum "
            "of several samples, or belongs to another layer, loss or model."
        )
    best = min(o.residual for o in found)
    keep = max(1e3 * best, 1e3 * torch.finfo(weight_gradient.dtype).eps)
    return sorted((o for o in found if o.residual <= keep), key=lambda o: o.residual)


def _trusted_negatives(c: Tensor, like: Tensor) -> int:
    """Negative entries that rounding cannot have made of zeros."""
    return int((c < -1e2 * torch.finfo(like.dtype).eps * c.abs().max()).sum())


def _softmax_scales(Wv: Tensor, b: Tensor, c: Tensor, y: int, eps: float) -> list[float]:
    """Scales ``s > 0`` or ``< 0`` with ``softmax(s W v + b) − e_y = c / s``."""
    # with c = s·k and 1 − p_y = −k_y: sum over the others of p = −k_y, so only s is unknown
    others = [j for j in range(len(c)) if j != y and float(c[j]) > 0]
    start = []
    if len(others) >= 2:
        start = [_log_ratio_scale(Wv[others], b[others], c[others], float(c.abs().max()), eps)]
    else:
        start = _scan_scales(Wv, b, c, y)
    return [_newton(Wv, b, c, y, s) for s in start if s > 0 and math.isfinite(s)]


def _log_ratio_scale(Wv: Tensor, b: Tensor, c: Tensor, top: float, eps: float) -> float:
    """Least squares over all non-label rows, each weighed by the precision of its logarithm."""
    weight = (c / (c + eps * top * len(c))).square() * (c / (c + 1e2 * eps * top)).square()
    left, right = Wv, c.log() - b
    mean_left = (weight * left).sum() / weight.sum()
    mean_right = (weight * right).sum() / weight.sum()
    left, right = left - mean_left, right - mean_right
    below = float((weight * left.square()).sum())
    return float((weight * left * right).sum()) / below if below > 0 else math.inf


def _mismatch(s: float, Wv: Tensor, b: Tensor, c: Tensor, y: int) -> Tensor:
    k = torch.softmax(s * Wv + b, 0)
    k[y] = -(torch.cat([k[:y], k[y + 1 :]]).sum())  # p_y − 1 without cancellation
    return s * k - c


def _scan_scales(Wv: Tensor, b: Tensor, c: Tensor, y: int) -> list[float]:
    """Roots of the norm equation ``s |softmax(s W v + b) − e_y| = |c|`` on a logarithmic grid."""
    from scipy.optimize import brentq

    def gap(log_s: float) -> float:
        s = math.exp(log_s)
        return float((_mismatch(s, Wv, b, c, y) + c).norm() - c.norm())

    grid = np.linspace(math.log(1e-8), math.log(1e8), 2000)
    values = [gap(g) for g in grid]
    pairs = zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True)
    return [math.exp(brentq(gap, l, h, xtol=1e-14)) for l, h, f, g in pairs if f * g < 0]


def _newton(Wv: Tensor, b: Tensor, c: Tensor, y: int, s: float) -> float:
    """Gauss–Newton on ``s·(softmax(s W v + b) − e_y) = c``, kept only where it helps."""
    for _ in range(8):
        gap = _mismatch(s, Wv, b, c, y)
        p = torch.softmax(s * Wv + b, 0)
        k = (gap + c) / s
        slope = k + s * p * (Wv - (p * Wv).sum())
        step = float((slope * gap).sum() / slope.square().sum())
        new = s - step
        if not (new > 0) or _mismatch(new, Wv, b, c, y).norm() >= gap.norm():
            break
        s = new
    return s


def _softmax_output(
    W: Tensor, b: Tensor, v: Tensor, c: Tensor, y: int, s: float, residual: float
) -> Output:
    gap = float(_mismatch(s, W @ v, b, c, y).norm() / c.norm())
    return Output(c / s, s * v, torch.tensor(y, device=W.device), max(gap, residual))


def recover_from_logistic(weight: Tensor, weight_gradient: Tensor) -> list[Output]:
    r""":math:`\langle W, G\rangle = -\mu\,\sigma(-\mu)`, solved for the margin :math:`\mu` by Lambert's W.

    One logit and the binary logistic loss: ``μ = ±z`` obeys ``μ / (1 + e^μ) = −⟨W, G⟩``, which
    has one root where the prediction is wrong and two where it is right: *twin data*. Either
    label explains the gradient with its own sign of ``x``. With several logits all share one
    scale, and every row is an equation. Implements :eq:`logistic-root`.

    Parameters
    ----------
    weight, weight_gradient : Tensor
        ``W`` and ``∂L/∂W``, ``(m, n)``.

    Returns
    -------
    list of Output
        Every answer: up to four for one logit.

    Raises
    ------
    InvalidTensorError
        If shapes do not match.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies all rows.

    Notes
    -----
    Source: Zhu and Blaschko (2021) for the equation and its twins; the closed form and the
    treatment of several logits are this project's.
    """
    W = checks.shaped(weight, "weight", (None, None))
    G = checks.shaped(weight_gradient, "weight_gradient", tuple(W.shape))
    checks.not_all_zero(G, "weight_gradient")
    return _one_logit(W, G) if len(W) == 1 else _many_logits(W, G)


def _one_logit(W: Tensor, G: Tensor) -> list[Output]:
    found = []
    for mu in _margins(float((W * G).sum())):
        for label in (1.0, 0.0):
            k = -_sigmoid(-mu) if label else _sigmoid(-mu)
            target = W.new_tensor([label])
            found.append(Output(W.new_tensor([k]), G[0] / k, target, 0.0))
    if not found:
        raise InconsistentGradientError(
            f"⟨W, ∂L/∂W⟩ = {float((W * G).sum()):.3g} is below −0.2785, which the logistic loss of "
            "one sample never gives: wrong loss, scaling or batch size."
        )
    return found


def _margins(product: float) -> list[float]:
    """Roots of ``−μ σ(−μ) = product`` by both real branches of Lambert's W."""
    from scipy.special import lambertw

    # μ/(1+e^μ) = q  ⇔  (q−μ) e^{q−μ} = −... ; with t = q − μ: t·e^{−t} = ... see the chapter
    q = -product
    roots = []
    for branch in (0, -1):
        w = lambertw(-q * math.exp(q), branch) if q < 300 else complex(math.nan)
        if abs(w.imag) < 1e-12 and math.isfinite(w.real):
            roots.append(_polish_margin(q - float(w.real), q))
    unique = [m for i, m in enumerate(roots) if all(abs(m - o) > 1e-9 for o in roots[:i])]
    return [m for m in unique if abs(m * _sigmoid(-m) - q) <= 1e-9 * max(abs(q), 1e-12)]


def _polish_margin(mu: float, q: float) -> float:
    for _ in range(4):
        s = _sigmoid(-mu)
        slope = s - mu * s * (1 - s)
        if slope == 0 or not math.isfinite(mu):
            break
        mu -= (mu * s - q) / slope
    return mu


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def _many_logits(W: Tensor, G: Tensor) -> list[Output]:
    fit = rank_one(G)
    found = []
    for sign in (1.0, -1.0):
        c, v = sign * fit.left * fit.value, sign * fit.right
        for s in _logit_scales(W @ v, c):
            y = (c < 0).to(W.dtype)
            gap = float((s * (torch.sigmoid(s * (W @ v)) - y) - c).norm() / c.norm())
            found.append(Output(c / s, s * v, y, max(gap, fit.residual)))
    found = [o for o in found if o.residual <= max(1e-6, 10 * fit.residual)]
    if not found:
        raise InconsistentGradientError(
            "No scale makes sigmoid(W x) − y agree with this weight gradient in every row: it is "
            "the sum of several samples, or belongs to another layer, loss or model."
        )
    return sorted(found, key=lambda o: o.residual)


def _logit_scales(Wv: Tensor, c: Tensor) -> list[float]:
    """Roots, in ``s > 0``, of the row with the largest gradient; the other rows then judge."""
    from scipy.optimize import brentq

    row = int(c.abs().argmax())
    y, w, wanted = float(c[row] < 0), float(Wv[row]), float(c[row])

    def gap(log_s: float) -> float:
        s = math.exp(log_s)
        return s * (_sigmoid(s * w) if y == 0 else -_sigmoid(-s * w)) - wanted

    grid = np.linspace(math.log(1e-8), math.log(1e8), 2000)
    values = [gap(g) for g in grid]
    pairs = zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True)
    return [math.exp(brentq(gap, l, h, xtol=1e-15)) for l, h, f, g in pairs if f * g < 0]


def recover_from_bias(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
) -> Output:
    r""":math:`k = \partial L/\partial b`, :math:`x = G^\top k/|k|^2`, and the label from ``k`` and ``z = W x + b``.

    Implements :eq:`label-sign`.

    Parameters
    ----------
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``.
    weight, bias : Tensor
        ``(m, n)`` and ``(m,)``.
    weight_gradient, bias_gradient : Tensor
        Likewise.

    Returns
    -------
    Output

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        As :func:`recover_input`.
    UnsupportedLossError
        If the loss is none of the three, or has weights, smoothing or a sum over classes.
    """
    _known_loss(loss)
    W, b = checks.shaped(weight, "weight", (None, None)), checks.finite(bias, "bias")
    x = recover_input(weight_gradient, bias_gradient)
    k = checks.finite(bias_gradient, "bias_gradient")
    whole = torch.cat([checks.finite(weight_gradient, "weight_gradient"), k[:, None]], dim=1)
    z = W @ x + b
    return Output(k, x, _target(loss, z, k), rank_one(whole).residual)


def _target(loss: nn.Module, z: Tensor, k: Tensor) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return k.argmin()
    factor = len(z) if loss.reduction == "mean" else 1
    if isinstance(loss, nn.MSELoss):
        return z - k * factor / 2
    return torch.sigmoid(z) - k * factor


def _known_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | nn.MSELoss):
        raise UnsupportedLossError(
            f"{type(loss).__name__} is not handled; CrossEntropyLoss, BCEWithLogitsLoss and MSELoss "
            "are."
        )
    weighted = getattr(loss, "weight", None) is not None
    weighted = weighted or getattr(loss, "pos_weight", None) is not None
    if weighted or getattr(loss, "label_smoothing", 0.0) or loss.reduction == "none":
        raise UnsupportedLossError(
            f"{type(loss).__name__} with class weights, label smoothing or reduction 'none' is not "
            "handled."
        )


def recover_output(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
) -> list[Output]:
    r""":math:`k = \partial L / \partial z` and ``x`` of the last layer, by whatever its loss and bias allow.

    Implements :eq:`label-sign`, :eq:`softmax-scale` and :eq:`logistic-root`.

    Parameters
    ----------
    loss : nn.Module
        Applied to the layer's output.
    weight, bias : Tensor
        ``(m, n)`` and ``(m,)`` or ``None``.
    weight_gradient, bias_gradient : Tensor
        Likewise; ``bias_gradient`` may be ``None`` where it was withheld.

    Returns
    -------
    list of Output
        Every answer that explains the layer's gradient, best first.

    Raises
    ------
    UndeterminedScaleError
        For a squared error without a bias: its unknown target leaves the scale open.
    UnsupportedLossError, InvalidTensorError, VanishingGradientError, InconsistentGradientError
        As the functions that it calls.
    """
    _known_loss(loss)
    if bias is not None and bias_gradient is not None and bool(bias_gradient.any()):
        return [recover_from_bias(loss, weight, bias, weight_gradient, bias_gradient)]
    if isinstance(loss, nn.CrossEntropyLoss):
        return recover_from_cross_entropy(weight, weight_gradient, bias)
    if isinstance(loss, nn.MSELoss):
        raise UndeterminedScaleError(
            "The last layer has no bias and the squared error has an unknown target: any scale of "
            "the input has a target that explains the gradient. A bias anywhere, or a "
            "classification loss, would fix it."
        )
    if bias is not None:
        raise UndeterminedScaleError(
            "The logistic loss with a bias whose gradient is withheld leaves the scale open here."
        )
    factor = len(weight) if loss.reduction == "mean" else 1  # the mean over logits, undone
    found = recover_from_logistic(weight, weight_gradient * factor)
    return [Output(o.k / factor, o.x, o.target, o.residual) for o in found]

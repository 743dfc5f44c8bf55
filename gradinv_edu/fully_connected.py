"""A dense layer's gradient, and all that it says of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
    u = rank_one(torch.cat([G, b[:, None]], dim=1)).left
    return (G.T @ u) / (b @ u)  # v[:n] / v[n], each relative to its own size


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


@dataclass(frozen=True)
class _Rows:
    """``G = c vᵀ``: each row's multiple of ``v``, and how precisely it is known."""

    c: Tensor
    v: Tensor
    precision: Tensor
    residual: float
    eps: float

    @property
    def trusted(self) -> Tensor:
        return self.precision < 0.2

    @property
    def tolerance(self) -> float:
        """A contradiction that rounding and noise may explain."""
        return min(0.5, max(1e3 * self.eps, 100 * self.residual))

    def mirrored(self) -> _Rows:
        return replace(self, c=-self.c, v=-self.v)


def _rows(G: Tensor) -> _Rows:
    fit, eps = rank_one(G), _rounding(G)
    v = fit.right
    c = G @ v  # and not σ₁u, whose small entries carry the rounding of its large ones
    noise = (G - torch.outer(c, v)).norm(dim=1) / math.sqrt(max(len(v) - 1, 1))
    precision = torch.where(c == 0, math.inf, eps + noise / c.abs().clamp_min(1e-300))
    return _Rows(c, v, precision, fit.residual, eps)


def _rounding(G: Tensor) -> float:
    """Machine precision of the coarsest type that holds the entries: the client's, or near it."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(G, G.to(dtype).double()):
            return torch.finfo(dtype).eps
    return torch.finfo(G.dtype).eps


def recover_from_cross_entropy(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None = None
) -> list[Output]:
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
    list of Output
        Best first; more than one where several scales satisfy every row.

    Raises
    ------
    InvalidTensorError
        If shapes do not match, or there is one class only.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies the rows: several samples, or another model's gradient.

    Notes
    -----
    Derived for this project; no published source is known to us.
    """
    W, G, b = _layer(weight, weight_gradient, bias)
    if len(W) < 2:
        raise InvalidTensorError("Cross-entropy needs two classes or more; weight has one row.")
    rows = _rows(G)
    found = [o for side in (rows, rows.mirrored()) for o in _softmax_outputs(W, b, side)]
    if not found:
        raise InconsistentGradientError(
            "No scale makes softmax(W x + b) − e_y agree with this weight gradient: it is the sum "
            "of several samples, or belongs to another layer, loss or model."
        )
    return _best(found, rows.eps)


def _layer(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    W = checks.shaped(weight, "weight", (None, None))
    G = checks.shaped(weight_gradient, "weight_gradient", tuple(W.shape)).to(W.device)
    b = torch.zeros_like(W[:, 0]) if bias is None else checks.shaped(bias, "bias", (len(W),))
    return W, checks.not_all_zero(G, "weight_gradient"), b


def _best(found: list[Output], eps: float) -> list[Output]:
    keep = 1e3 * max(eps, min(o.residual for o in found))
    return sorted((o for o in found if o.residual <= keep), key=lambda o: o.residual)


def _softmax_outputs(W: Tensor, b: Tensor, rows: _Rows) -> list[Output]:
    """Outputs with ``c = s·(softmax(s W v + b) − e_y)`` for some label and scale ``s > 0``."""
    negative = (rows.c < 0) & rows.trusted
    if int(negative.sum()) > 1:
        return []
    Wv, others = W @ rows.v, (rows.c > 0) & rows.trusted
    if not bool(others.any()):
        return []
    label = int(rows.c.argmin()) if bool(negative.any()) else None
    found = []
    for start in _softmax_starts(Wv, b, rows.c, others, rows.precision, label):
        s = _polished(start, partial(_log_softmax, Wv, b), rows.c, others, rows.precision)
        y = _label(rows.c, s * Wv + b, rows.trusted)
        found.append(_softmax_output(Wv, b, rows, y, s))
    return [o for o in found if o.residual <= rows.tolerance]


def _label(k: Tensor, z: Tensor, trusted: Tensor | None = None) -> int:
    """Row of the negative entry; where ``p_y`` was rounded to 1, the likeliest row without one."""
    negative = k < 0 if trusted is None else (k < 0) & trusted
    if bool(negative.any()):
        return int(torch.where(negative, k, math.inf).argmin())
    open_rows = k <= 0 if trusted is None else (k <= 0) | ~trusted
    return int(torch.where(open_rows, z, -math.inf).argmax())


def _softmax_starts(
    Wv: Tensor, b: Tensor, c: Tensor, others: Tensor, precision: Tensor, y: int | None
) -> list[float]:
    if int(others.sum()) == 1 and len(c) == 2:
        other = int(others.nonzero()[0, 0])
        beta = float(b[1 - other] - b[other])
        return _logistic_scales(float(Wv[1 - other] - Wv[other]), beta, float(c[other]))
    if int(others.sum()) < 2:
        return []
    w = precision[others].pow(-2)
    left, right = Wv[others], c[others].log() - b[others]
    left, right = left - (w * left).sum() / w.sum(), right - (w * right).sum() / w.sum()
    below = float((w * left.square()).sum())
    s = float((w * left * right).sum()) / below if below > 0 else 0.0
    if abs(s) * math.sqrt(below) < 100:  # logits equal to the last digits: p is that of z = b
        p = torch.softmax(b, 0)
        return [float(c[others].sum() / p[others].sum())]
    return [s] if s > 0 else []


def _log_softmax(Wv: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """``log p`` at ``z = s W v + b``, and its slope in ``s``."""
    log_p = torch.log_softmax(s * Wv + b, 0)
    return log_p, Wv - (log_p.exp() * Wv).sum()


def _polished(
    s: float,
    log_k: Callable[[float], tuple[Tensor, Tensor]],
    c: Tensor,
    rows: Tensor,
    precision: Tensor,
) -> float:
    """Gauss–Newton on ``log s + log |k_j(s)| = log |c_j|``, kept only where it helps."""
    w, wanted = precision[rows].pow(-2), c[rows].abs().log()

    def gap(s: float) -> tuple[Tensor, Tensor]:
        value, slope = log_k(s)
        return math.log(s) + value[rows] - wanted, 1 / s + slope[rows]

    for _ in range(20):
        error, slope = gap(s)
        below = float((w * slope.square()).sum())
        new = s - float((w * slope * error).sum()) / below if below > 0 else s
        if not new > 0 or (w * gap(new)[0].square()).sum() >= (w * error.square()).sum():
            break
        s = new
    return s


def _softmax_output(Wv: Tensor, b: Tensor, rows: _Rows, y: int, s: float) -> Output:
    k = torch.softmax(s * Wv + b, 0)
    k[y] = 0
    k[y] = -k.sum()  # p_y − 1 without cancellation
    gap = s * k - rows.c
    # the client computed p_y − 1 with rounding of the 1, however small the difference is
    gap[y] = (gap[y].abs() - 10 * len(k) * rows.eps * s).clamp_min(0)
    residual = max(float(gap.norm() / (s * k).norm()), rows.residual)
    c = rows.c.clone()
    c[y] = c[y] - rows.c.sum() if bool(rows.trusted.all()) else s * k[y]
    return Output(c / s, s * rows.v, torch.tensor(y, device=c.device), residual)


def recover_from_logistic(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None = None
) -> list[Output]:
    r""":math:`\langle W, G\rangle = -\mu\,\sigma(-\mu)` gives the margin by Lambert's W.

    One logit and the binary logistic loss: the margin ``μ = ±z`` has one value where the
    prediction is wrong, two where it is right: *twin data*. Either label explains the gradient
    with its own sign of ``x``. With several logits all share one scale, and every row is an
    equation; mirrored, ``−x`` with all labels changed, is always an answer too. Implements
    :eq:`logistic-root`.

    Parameters
    ----------
    weight, weight_gradient : Tensor
        ``W`` and ``∂L/∂W``, ``(m, n)``; the loss is the sum over the m logits.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.

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
    W, G, b = _layer(weight, weight_gradient, bias)
    rows = _rows(G)
    found = [o for side in (rows, rows.mirrored()) for o in _logistic_outputs(W, b, side)]
    if not found:
        raise InconsistentGradientError(
            f"No scale makes sigmoid(W x + b) − y agree with this weight gradient in every row "
            f"(⟨W, ∂L/∂W⟩ = {float((W * G).sum()):.3g}, which one sample keeps above −0.2785 for "
            "each logit without a bias): it is the sum of several samples, or belongs to another "
            "layer, loss or model."
        )
    return _best(found, rows.eps)


def _logistic_outputs(W: Tensor, b: Tensor, rows: _Rows) -> list[Output]:
    """Outputs with ``c = s·(σ(s W v + b) − y)``: the signs of ``c`` are the labels."""
    side = torch.where(rows.c < 0, -1.0, 1.0).to(W)  # |k_j| = σ(side·z_j)
    Wv, offset = side * (W @ rows.v), side * b
    top = int(rows.c.abs().argmax())
    starts = _logistic_scales(-float(Wv[top]), -float(offset[top]), float(rows.c[top].abs()))
    found = [_logistic_output(Wv, offset, side, rows, start) for start in starts]
    return [o for o in found if o.residual <= rows.tolerance]


def _logistic_output(Wv: Tensor, b: Tensor, side: Tensor, rows: _Rows, start: float) -> Output:
    # the client computed σ(z) − 1 with rounding of the 1, however small the difference is
    size, rounding = rows.c.abs(), 10 * rows.eps * start
    precision = rows.precision + rounding / size.clamp_min(1e-300)
    s = _polished(start, partial(_log_sigmoid, Wv, b), rows.c, precision < 0.2, precision)
    z = s * Wv + b
    z = torch.where(size > rounding, z, -z.abs())  # no gradient: confident, and right
    y = torch.where(size > rounding, -side, side * (s * Wv + b)) > 0
    gap = ((s * torch.sigmoid(z) - size).abs() - rounding).clamp_min(0)
    residual = max(float(gap.norm() / size.norm()), rows.residual)
    return Output(rows.c / s, s * rows.v, y.to(side), residual)


def _log_sigmoid(Wv: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    z = s * Wv + b
    return nn.functional.logsigmoid(z), torch.sigmoid(-z) * Wv


def _logistic_scales(m: float, beta: float, a: float) -> list[float]:
    """Every ``s > 0`` with ``s σ(−(m s + β)) = a``, for ``a > 0``.

    Multiplied out, ``s − a = a e^{m s + β}``. With ``u = m (s − a)`` that is
    ``u e^{−u} = m a e^{m a + β}``, so ``u = −W(−m a e^{m a + β})``, on both real branches of
    Lambert's W where ``m > 0`` and the argument lies above ``−1/e``, on one where ``m < 0``.
    """
    if m * a == 0:
        return [a * (1 + math.exp(min(beta, 700.0)))]
    exponent = math.log(abs(m) * a) + m * a + beta
    roots = [a + u / m for u in _lambert(exponent, -1 if m > 0 else 1)]
    return [_polished_scale(s, m, beta, a) for s in roots if s > 0]


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


def _polished_scale(s: float, m: float, beta: float, a: float) -> float:
    """Newton's method on ``log s + log σ(−(m s + β)) = log a``."""
    for _ in range(4):
        t = m * s + beta
        p = _sigmoid(t)
        slope = 1 / s - m * p
        error = math.log(s / a) - (max(t, 0.0) + math.log1p(math.exp(-abs(t))))
        new = s - error / slope if abs(slope) * s > 1e-5 else s  # not where two roots meet
        if not (new > 0 and math.isfinite(new)):
            break
        s = new
    return s


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def recover_from_bias(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
) -> Output:
    r""":math:`y = \arg\min_j k_j` with :math:`k = \partial L/\partial b`, and ``x`` beside it.

    The bias gradient is ``k`` itself, ``x`` follows by :func:`recover_input`, and the label from
    ``z = W x + b``: for cross-entropy the one negative entry of ``k = softmax(z) − e_y``, else
    ``sigmoid(z) − k`` or ``z − k/2``. Implements :eq:`label-sign`.

    Parameters
    ----------
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``.
    weight, bias : Tensor
        ``W`` and ``b``, ``(m, n)`` and ``(m,)``.
    weight_gradient, bias_gradient : Tensor
        ``∂L/∂W`` and ``∂L/∂b``, ``(m, n)`` and ``(m,)``.

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
    W, G, b = _layer(weight, weight_gradient, bias)
    k = checks.shaped(bias_gradient, "bias_gradient", (len(W),)).to(W.device)
    x = recover_input(G, k)
    whole = torch.cat([G, k[:, None]], dim=1)
    return Output(k, x, _target(loss, W @ x + b, k), rank_one(whole).residual)


def _target(loss: nn.Module, z: Tensor, k: Tensor) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.tensor(_label(k, z), device=k.device)
    factor = len(z) if loss.reduction == "mean" else 1
    if isinstance(loss, nn.MSELoss):
        return z - k * factor / 2
    return torch.sigmoid(z) - k * factor


def _known_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | nn.MSELoss):
        raise UnsupportedLossError(
            f"{type(loss).__name__} is not handled; CrossEntropyLoss, BCEWithLogitsLoss and "
            "MSELoss are."
        )
    weights = (getattr(loss, "weight", None), getattr(loss, "pos_weight", None))
    smoothed = getattr(loss, "label_smoothing", None)
    if any(w is not None for w in weights) or smoothed or loss.reduction == "none":
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
    r""":math:`k = \partial L / \partial z` and ``x`` of the last layer, from its own gradient.

    By the bias gradient where there is one, else by what the loss says. Implements
    :eq:`label-sign`, :eq:`softmax-scale` and :eq:`logistic-root`.

    Parameters
    ----------
    loss : nn.Module
        Applied to the layer's output.
    weight, bias : Tensor
        ``W``, ``(m, n)``, and ``b``, ``(m,)``, or ``None``.
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
    factor = len(weight) if loss.reduction == "mean" else 1  # the mean over logits, undone
    found = recover_from_logistic(weight, weight_gradient * factor, bias)
    return [Output(o.k / factor, o.x, o.target, o.residual) for o in found]

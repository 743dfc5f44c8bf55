"""A dense layer's gradient and one sample: every row says the same input.

``G = k xᵀ`` beside the bias gradient ``k`` gives ``x`` (:func:`recover_input`); without a bias
its direction (:func:`rank_one`), whose length the loss knows
(:func:`recover_from_cross_entropy`, :func:`recover_from_logistic`).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from .checks import checked
from .engine import losses
from .engine.losses import Head, recover_from_cross_entropy, recover_from_logistic
from .engine.low_rank import RankOne, leading_triple, rank_one, require_bias
from .errors import UnknownNameError

__all__ = [
    "METHODS",
    "Head",
    "RankOne",
    "rank_one",
    "recover_from_cross_entropy",
    "recover_from_logistic",
    "recover_input",
    "recover_output",
]


def _total_least_squares(G: Tensor, k: Tensor) -> Tensor:
    _, _, v = leading_triple(G, k[:, None])
    return v[:-1] / v[-1]


def _best_row(G: Tensor, k: Tensor) -> Tensor:
    row = int(k.abs().argmax())
    return G[row] / k[row]


def _mean(G: Tensor, k: Tensor) -> Tensor:
    alive = k != 0
    return (G[alive] / k[alive, None]).mean(dim=0)


def _least_squares(G: Tensor, k: Tensor) -> Tensor:
    return G.T @ k / k.square().sum()


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svd": _total_least_squares,
    "best_row": _best_row,
    "mean": _mean,
    "least_squares": _least_squares,
}


@checked
def recover_input(
    weight_gradient: Float[Tensor, " m n"],
    bias_gradient: Float[Tensor, " m"] | None,
    method: str = "svd",
) -> Float[Tensor, " n"]:
    r""":math:`x = v_{1:n} / v_{n+1}`, with :math:`[\,G \mid k\,] \approx d\,u v^\top`.

    Every row of a dense layer's gradient is one perceptron's and says the same ``x``; under
    noise in both parts the maximum-likelihood answer is total least squares, the leading right
    singular vector. Implements :eq:`rank-one-svd` and :eq:`least-squares-row`, by ``method``.

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
    UndeterminedScaleError, VanishingGradientError
        If the bias gradient is ``None``, or zero everywhere.
    UnknownNameError
        If there is no such method.

    Notes
    -----
    Source: Phong et al. (2018) for the ratio; total least squares is this project's choice.
    """
    if method not in METHODS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method](weight_gradient, require_bias(bias_gradient))


def recover_output(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
) -> list[Head]:
    r""":math:`k = \partial L/\partial b,\; y = \arg\min_j k_j`; without a bias, what the loss says.

    The last layer undone for one sample. The bias gradient is ``k`` itself, ``x`` follows by
    :func:`recover_input`, and the target from ``z = W x + b``: for cross-entropy the one
    negative entry of ``k = softmax(z) − e_y``, else ``sigmoid(z) − k`` or ``z − k/2``.
    Implements :eq:`label-sign`.

    Parameters
    ----------
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``, applied to the layer's output.
    weight, bias : Tensor
        ``W``, ``(m, n)``, and ``b``, ``(m,)``, or ``None``.
    weight_gradient, bias_gradient : Tensor
        Likewise; ``bias_gradient`` may be ``None`` where it was withheld.

    Returns
    -------
    list of Head
        Every answer that explains the layer's gradient, best first.

    Raises
    ------
    UndeterminedScaleError
        For a squared error without a bias: its unknown target leaves the scale open.
    UnsupportedLossError
        For another loss, class weights, label smoothing or no reduction.
    InvalidTensorError, VanishingGradientError, InconsistentGradientError
        As :func:`recover_input` and :func:`recover_from_cross_entropy`.
    """
    return losses.rule(loss).heads(weight, bias, weight_gradient, bias_gradient)

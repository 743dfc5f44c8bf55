"""One neuron: its weight gradient is its input, times one number that its bias gradient tells.

Every function takes finite floating-point tensors of any precision and answers in float64. It
raises InvalidTensorError for a tensor that is something else or of another shape, and
VanishingGradientError where there is nothing to divide by.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks
from .checks import checked
from .errors import VanishingGradientError

__all__ = [
    "mixture",
    "noise_error",
    "recover_direction",
    "recover_input",
    "recover_penalised_input",
]


@checked
def recover_input(
    weight_gradient: Float[Tensor, " n"], bias_gradient: Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    r""":math:`x = \frac{\partial L/\partial W}{\partial L/\partial b}`: the bias ratio.

    For a neuron :math:`z = W \cdot x + b` and one sample, whatever comes after ``z``: any
    activation, any layers, any loss. Implements :eq:`bias-ratio`.

    Parameters
    ----------
    weight_gradient : Tensor, (n,)
        :math:`\partial L/\partial W`; the input comes back on its device.
    bias_gradient : Tensor, ()
        :math:`\partial L/\partial b`, one number.

    Notes
    -----
    Source: Phong et al. (2018), for a neuron with squared loss.

    Examples
    --------
    >>> recover_input(torch.tensor([0.5, -1.0, 0.25]), torch.tensor(0.5))
    tensor([ 1.0000, -2.0000,  0.5000], dtype=torch.float64)
    """
    return _ratio(weight_gradient, checks.not_all_zero(bias_gradient, "bias_gradient"))


@checked
def recover_penalised_input(
    weight_gradient: Float[Tensor, " n"],
    bias_gradient: Float[Tensor, ""],
    weight: Float[Tensor, " n"],
    bias: Float[Tensor, ""] | None,
    penalty: float,
) -> Float[Tensor, " n"]:
    r""":math:`x = \frac{\partial L/\partial W - 2\lambda W}{\partial L/\partial b - 2\lambda b}`.

    For a loss with the known penalty :math:`\lambda\,(|W|^2 + b^2)` on its weights, the bias
    ratio after the penalty's own gradient is taken away. Implements :eq:`penalised-ratio`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor, (n,) and ()
        Of the loss with its penalty.
    weight, bias : Tensor, (n,) and ()
        :math:`W, b` where the gradient was taken; ``bias=None`` if the penalty leaves it out.
    penalty : float
        :math:`\lambda`, zero or positive; an optimiser's ``weight_decay`` is :math:`2\lambda`.
    """
    checks.number(penalty, "penalty", "zero or positive", lambda v: v >= 0)
    if bias is not None:
        bias_gradient = bias_gradient - 2 * penalty * bias
    return recover_input(weight_gradient - 2 * penalty * weight, bias_gradient)


@checked
def recover_direction(weight_gradient: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    r""":math:`\pm\frac{x}{|x|} = \frac{\partial L/\partial W}{|\partial L/\partial W|}`: no bias.

    Without a bias gradient the input is known up to one factor, which may be negative: what
    comes back has length one. Implements :eq:`direction-only`.

    Parameters
    ----------
    weight_gradient : Tensor, (n,)
        :math:`\partial L/\partial W`.
    """
    largest = checks.not_all_zero(weight_gradient, "weight_gradient").abs().max()
    scaled = weight_gradient / largest  # the squares of tiny gradients would underflow
    direction: Tensor = scaled / scaled.norm()
    return direction


@checked
def mixture(
    inputs: Float[Tensor, " N n"], output_gradients: Float[Tensor, " N"]
) -> Float[Tensor, " n"]:
    r""":math:`\hat x = \sum_i \alpha_i x_i,\ \alpha_i = k_i / \sum_j k_j`: the ratio of a batch.

    What :func:`recover_input` returns if the client's gradient is of several samples. The
    shares :math:`\alpha_i` add up to one, but may be negative or larger than one. Implements
    :eq:`batch-mixture`.

    Parameters
    ----------
    inputs : Tensor, (N, n)
        The samples :math:`x_i`.
    output_gradients : Tensor, (N,)
        Their :math:`k_i = \partial L/\partial z_i`.
    """
    total = checks.not_all_zero(output_gradients.sum(), "the sum of output_gradients")
    return _ratio(output_gradients @ inputs, total)


@checked
def noise_error(
    inputs: Float[Tensor, " n"], bias_gradient: Float[Tensor, ""], sigma: float
) -> float:
    r""":math:`\frac{\sigma}{|k|} \frac{\sqrt{n + |x|^2}}{|x|}`: relative error under noise.

    The typical error, to first order, if independent Gaussian noise was added to every entry of
    the gradient, while :math:`\sigma \ll |k|`. A ratio of Gaussians has no mean: compare medians.
    Implements :eq:`noise-error`.

    Parameters
    ----------
    inputs, bias_gradient : Tensor, (n,) and ()
        The true :math:`x` and :math:`k = \partial L/\partial b`.
    sigma : float
        Standard deviation :math:`\sigma` of the noise, zero or positive.
    """
    checks.number(sigma, "sigma", "zero or positive", lambda v: v >= 0)
    largest = float(checks.not_all_zero(inputs, "inputs").abs().max())
    size = largest * float((inputs / largest).norm())  # squares of tiny entries would vanish
    k = float(checks.not_all_zero(bias_gradient, "bias_gradient"))
    return sigma / abs(k) * math.hypot(math.sqrt(inputs.numel()) / size, 1.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    x = numerator / denominator
    if not bool(torch.isfinite(x).all()):
        raise VanishingGradientError(
            f"The ratio leaves float64's range: the divisor is {float(denominator):.1e}, the "
            f"largest numerator {float(numerator.abs().max()):.1e}. Use another layer or update."
        )
    return x

"""One neuron: its weight gradient is its input, times one number that its bias gradient tells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .errors import InvalidTensorError, VanishingGradientError


def recover_input(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    r""":math:`x = \frac{\partial L/\partial W}{\partial L/\partial b}`: the bias ratio.

    For a neuron :math:`z = W \cdot x + b` and one sample, whatever comes after ``z``: any
    activation, any layers, any loss. Implements :eq:`bias-ratio`.

    Parameters
    ----------
    weight_gradient : Tensor
        :math:`\partial L/\partial W`, ``(n,)``, any floating-point dtype.
    bias_gradient : Tensor
        :math:`\partial L/\partial b`, one number, ``()``.

    Returns
    -------
    Tensor
        The input, ``(n,)``, float64, on the device of ``weight_gradient``.

    Raises
    ------
    InvalidTensorError
        If a shape is wrong, or a tensor is not finite floating point.
    VanishingGradientError
        If the bias gradient is zero, or so small that the ratio leaves float64's range.

    Notes
    -----
    Source: Phong et al. (2018), for a neuron with squared loss.

    Examples
    --------
    >>> recover_input(torch.tensor([0.5, -1.0, 0.25]), torch.tensor(0.5))
    tensor([ 1.0000, -2.0000,  0.5000], dtype=torch.float64)
    """
    g_W = checks.shaped(weight_gradient, "weight_gradient", (None,))
    g_b = checks.not_all_zero(checks.shaped(bias_gradient, "bias_gradient", ()), "bias_gradient")
    return _ratio(g_W, g_b.to(g_W.device))


def recover_penalised_input(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    penalty: float,
) -> Tensor:
    r""":math:`x = \frac{\partial L/\partial W - 2\lambda W}{\partial L/\partial b - 2\lambda b}`.

    For a loss with the known penalty :math:`\lambda\,(|W|^2 + b^2)` on its weights, the bias
    ratio after the penalty's own gradient is taken away. Implements :eq:`penalised-ratio`.

    Parameters
    ----------
    weight_gradient : Tensor
        Of the loss with its penalty, ``(n,)``.
    bias_gradient : Tensor
        The same, ``()``.
    weight : Tensor
        :math:`W` where the gradient was taken, ``(n,)``.
    bias : Tensor or None
        :math:`b`, ``()``; ``None`` if the penalty leaves the bias out.
    penalty : float
        :math:`\lambda`; an optimiser's ``weight_decay`` is :math:`2\lambda`.

    Returns
    -------
    Tensor
        The input, ``(n,)``, float64.

    Raises
    ------
    InvalidTensorError
        If a shape is wrong, or a tensor is not finite floating point.
    ValueError
        If the penalty is negative or not finite.
    VanishingGradientError
        If nothing is left of the bias gradient once the penalty's share is gone.

    Notes
    -----
    Source: derived here.
    """
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be zero or positive, got {penalty!r}.")
    g_W = checks.shaped(weight_gradient, "weight_gradient", (None,))
    g_b = checks.shaped(bias_gradient, "bias_gradient", ())
    W = checks.shaped(weight, "weight", tuple(g_W.shape)).to(g_W.device)
    if bias is not None:
        g_b = g_b - 2 * penalty * checks.shaped(bias, "bias", ()).to(g_b.device)
    return recover_input(g_W - 2 * penalty * W, g_b)


def recover_direction(weight_gradient: Tensor) -> Tensor:
    r""":math:`\pm\frac{x}{|x|} = \frac{\partial L/\partial W}{|\partial L/\partial W|}`: no bias.

    Without a bias gradient the input is known up to one factor, which may be negative.
    Implements :eq:`direction-only`.

    Parameters
    ----------
    weight_gradient : Tensor
        :math:`\partial L/\partial W`, ``(n,)``, any floating-point dtype.

    Returns
    -------
    Tensor
        The input's direction, of length one, up to sign; ``(n,)``, float64.

    Raises
    ------
    InvalidTensorError
        If it is not a finite floating-point vector.
    VanishingGradientError
        If it is zero everywhere.
    """
    g_W = checks.shaped(weight_gradient, "weight_gradient", (None,))
    largest = checks.not_all_zero(g_W, "weight_gradient").abs().max()
    scaled = g_W / largest  # the squares of tiny gradients would underflow
    direction: Tensor = scaled / scaled.norm()
    return direction


def mixture(inputs: Tensor, output_gradients: Tensor) -> Tensor:
    r""":math:`\hat x = \sum_i \alpha_i x_i,\ \alpha_i = k_i / \sum_j k_j`: the ratio of a batch.

    What :func:`recover_input` returns if the client's gradient is of several samples. The
    shares :math:`\alpha_i` add up to one, but may be negative or larger than one. Implements
    :eq:`batch-mixture`.

    Parameters
    ----------
    inputs : Tensor
        The samples :math:`x_i`, ``(N, n)``.
    output_gradients : Tensor
        Their :math:`k_i = \partial L/\partial z_i`, ``(N,)``.

    Returns
    -------
    Tensor
        The mixture, ``(n,)``, float64.

    Raises
    ------
    InvalidTensorError
        If the shapes do not belong together, or a tensor is not finite floating point.
    VanishingGradientError
        If the output gradients cancel or the mixture leaves float64's range.
    """
    x = checks.shaped(inputs, "inputs", (None, None))
    k = checks.shaped(output_gradients, "output_gradients", (None,)).to(x.device)
    if len(k) != len(x):
        raise InvalidTensorError(f"{len(x)} inputs need as many output_gradients, got {len(k)}.")
    total = checks.not_all_zero(k.sum(), "the sum of output_gradients")
    return _ratio(k @ x, total)


def noise_error(inputs: Tensor, bias_gradient: Tensor, sigma: float) -> float:
    r""":math:`\frac{\sigma}{|k|} \frac{\sqrt{n + |x|^2}}{|x|}`: relative error under noise.

    Root mean square, to first order, if independent Gaussian noise of standard deviation
    :math:`\sigma` was added to every entry of the gradient, with :math:`k = \partial L/\partial b`.
    Implements :eq:`noise-error`.

    Parameters
    ----------
    inputs : Tensor
        The true input :math:`x`, ``(n,)``.
    bias_gradient : Tensor
        The true :math:`k`, ``()``.
    sigma : float
        Standard deviation of the noise.

    Returns
    -------
    float
        Expected relative error; trustworthy where :math:`\sigma` is small against :math:`|k|`.

    Raises
    ------
    InvalidTensorError
        If a shape is wrong, or a tensor is not finite floating point.
    VanishingGradientError
        If the input or the bias gradient is zero.
    ValueError
        If ``sigma`` is negative or not finite.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be zero or positive, got {sigma!r}.")
    x = checks.not_all_zero(checks.shaped(inputs, "inputs", (None,)), "inputs")
    k = checks.not_all_zero(checks.shaped(bias_gradient, "bias_gradient", ()), "bias_gradient")
    size = float(x.norm())
    return sigma / abs(float(k)) * math.hypot(math.sqrt(x.numel()), size) / size


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    x = numerator / denominator
    if not bool(torch.isfinite(x).all()):
        raise VanishingGradientError(
            f"The ratio leaves float64's range: the divisor is {float(denominator):.1e}, the "
            f"largest numerator {float(numerator.abs().max()):.1e}. Use another layer or update."
        )
    return x

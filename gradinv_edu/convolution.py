"""A convolution written out as a dense layer, and what the bias ratio makes of it.

``conv`` is an nn.Conv1d, Conv2d or Conv3d with any stride, padding, dilation, groups and padding
mode; anything else raises UnsupportedLayerError. Tensors that are not finite floating point or
do not fit the layer raise InvalidTensorError. Results are float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from . import checks
from .checks import checked
from .errors import InvalidTensorError, UnknownNameError, UnsupportedLayerError

__all__ = ["as_dense", "patches", "recover_input_as_dense", "signed_mean_patch", "weight_gradient"]

LARGEST_GB = 4.0  # a matrix above this is refused: LayerSystem needs none

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@checked
def as_dense(conv: Conv, input_shape: tuple[int, ...]) -> Tensor:
    r""":math:`z = \mathbf{W} x + b,\; \mathbf{W}_{(f,\ell),(c,\ell + t)} = W_{f,c,t}`, else 0.

    The matrix of a convolution: one row for each filter ``f`` and position ``p``, one column for
    each channel ``c`` and pixel ``q``. It holds every weight once for each position, and zeros:
    ``matrix @ x.flatten() + bias == conv(x).flatten()``. Implements :eq:`conv-as-dense`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer.
    input_shape : tuple of int
        ``(C, *spatial)``, of one input; InvalidTensorError if the matrix would take over 4 GB.

    Returns
    -------
    Tensor, (C_out·H'·W', C·H·W)

    Notes
    -----
    Source: Fan et al. (2020), as the survey of Zhang et al. (2022) describes them.
    """
    pixels = _pixels(conv, input_shape)
    rows, columns = conv.out_channels * pixels.shape[1], math.prod(input_shape)
    gigabytes = 8e-9 * rows * columns
    if gigabytes > LARGEST_GB:
        raise InvalidTensorError(
            f"The matrix of this layer on {tuple(input_shape)} is {rows} × {columns}: "
            f"{gigabytes:.1f} GB in float64, over the limit of {LARGEST_GB:g}; "
            "use gradinv_edu.systems.LayerSystem, which never writes it out."
        )
    W = conv.weight.detach().double().flatten(1)
    matrix = W.new_zeros(conv.out_channels, pixels.shape[1], columns)
    for f, (block, kernel) in enumerate(zip(matrix, W, strict=True)):
        seen = pixels[f * conv.groups // conv.out_channels]
        block.scatter_add_(1, seen.clamp(min=0), kernel * (seen >= 0))
    return matrix.flatten(0, 1)


@checked
def patches(conv: Conv, inputs: Float[Tensor, "N C ..."]) -> Float[Tensor, "N P J"]:
    r""":math:`\mathrm{patch}_\ell(x)_{c,t} = x_c(\ell + t)`: what the kernel sees at each position.

    Also known as *im2col*; padding included, all channels, in any dimension.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Its kernel, stride, padding and dilation are used, its weights are not.
    inputs : Tensor, (N, C, …)
        The pictures.

    Returns
    -------
    Tensor, (N, P, C·k²)
        Positions and places in row-major order.
    """
    seen = _windows(conv, inputs)
    n = len(conv.kernel_size)
    return seen.movedim(1, n + 1).flatten(n + 1).flatten(1, n)


@checked
def weight_gradient(
    conv: Conv, inputs: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N F ..."]
) -> Tensor:
    r""":math:`\partial L/\partial W_f = \sum_\ell k_f(\ell)\,\mathrm{patch}_\ell(x)`.

    A weight is used at every position, so its gradient is a sum over them, and over the samples
    of a batch: one convolution on ``P`` positions is one dense layer on a batch of ``P`` patches.
    Implements :eq:`sum-over-positions`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer; the result has the shape of its weight.
    inputs, output_gradient : Tensor, (N, C, …) and (N, C_out, …)
        ``x`` and ``k = ∂L/∂z``.
    """
    windows = _windows(conv, inputs)
    axes = len(conv.kernel_size)
    shape = (len(inputs), conv.out_channels, *windows.shape[2 : 2 + axes])
    checks.fits(output_gradient, "output_gradient", shape)
    k = output_gradient.reshape(len(inputs), conv.groups, -1, math.prod(shape[2:]))
    seen = patches(conv, inputs)
    seen = seen.reshape(*seen.shape[:2], conv.groups, -1)
    return torch.einsum("ngfp,npgj->gfj", k, seen).reshape(conv.weight.shape)


@checked
def signed_mean_patch(
    conv: Conv, inputs: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N F ..."]
) -> Tensor:
    r""":math:`\sum_\ell k_f(\ell)\,\mathrm{patch}_\ell(x) / \sum_\ell k_f(\ell)`, one a filter.

    What the bias ratio ``∂L/∂W_f ÷ ∂L/∂b_f`` must equal: a mean of all patches whose weights sum
    to one but may be negative or larger than one; NaN for a filter whose ``k`` sums to zero,
    VanishingGradientError if ``k`` is zero everywhere. Implements :eq:`fan-mean-patch`.

    Parameters
    ----------
    conv, inputs, output_gradient
        As for :func:`weight_gradient`, as is the result.
    """
    summed = weight_gradient(conv, inputs, output_gradient)
    total = checks.not_all_zero(output_gradient, "output_gradient").flatten(2).sum(dim=(0, 2))
    total = torch.where(total == 0, torch.nan, total)
    return summed / total.reshape(-1, *[1] * (summed.dim() - 1))


@checked
def recover_input_as_dense(
    conv: Conv,
    weight_gradient: Float[Tensor, "F C ..."],
    bias_gradient: Float[Tensor, " F"],
    input_shape: tuple[int, ...],
    reading: str = "filters",
) -> Tensor:
    r""":math:`\hat x^\top = g_b^\top G / \lVert g_b \rVert^2`, from the two gradients.

    The bias ratio of a dense layer, applied to a convolution whose filters are stacked to a
    matrix. It sees the signed mean of :eq:`fan-mean-patch`, not the input, and gives the input
    only if all patches that carry gradient are the same. Implements :eq:`stacked-ratio`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Only its geometry is used.
    weight_gradient, bias_gradient : Tensor, as conv.weight, and (C_out,)
        ``∂L/∂W`` and ``∂L/∂b``; VanishingGradientError if a group's is zero everywhere.
    input_shape : tuple of int
        ``(C, *spatial)``, of one input, and of the result.
    reading : {"filters", "unrolled"}
        ``"filters"``: the matrix has one row for each filter and acts on patches. The rows give
        one patch; it is laid at every position, overlaps averaged; pixels that no patch reaches
        are 0. ``"unrolled"``: the matrix is :func:`as_dense`. It needs a gradient for each of its
        rows, which no client sends; the kernel's gradient is put wherever the kernel's weights
        are, the bias gradient repeated for each position, and its structural zeros count as
        gradients that are zero. The answer is that of ``"filters"``, each pixel dimmed by the
        share of positions whose patch covers it.

    Notes
    -----
    Source: Fan et al. (2020). That filters are stacked is the characterisation of Zhang et al.
    (2022); which of the two matrices is meant, they leave open, hence both readings.
    """
    pixels = _pixels(conv, input_shape)
    checks.fits(weight_gradient, "weight_gradient", conv.weight.shape)
    checks.fits(bias_gradient, "bias_gradient", (conv.out_channels,))
    if reading not in ("filters", "unrolled"):
        raise UnknownNameError(f'reading is "filters" or "unrolled", not {reading!r}.')
    k = bias_gradient.reshape(conv.groups, -1)
    for group in k:
        checks.not_all_zero(group, "bias_gradient")
    G = weight_gradient.reshape(*k.shape, -1)
    patch = torch.einsum("gf,gfj->gj", k, G) / k.square().sum(dim=1, keepdim=True)

    def laid(one: Tensor) -> Tensor:
        """Add a patch at every position; a pixel outside, −1, falls to a place of its own."""
        picture = one.new_zeros(math.prod(input_shape) + 1)
        parts = one.unsqueeze(1).expand(pixels.shape).flatten()
        return picture.index_add_(0, pixels.flatten() + 1, parts)[1:].reshape(input_shape)

    if reading == "unrolled":
        return laid(patch) / pixels.shape[1]
    return laid(patch) / laid(torch.ones_like(patch)).clamp(min=1)


def _pixels(conv: Conv, input_shape: tuple[int, ...]) -> Tensor:
    """Which pixel each weight of a filter meets at each position, ``(groups, P, J)``; −1: none."""
    count = torch.arange(1, math.prod(input_shape) + 1, dtype=torch.float64)
    seen = patches(conv, count.reshape(1, *input_shape))[0] - 1
    by_group = seen.long().reshape(len(seen), conv.groups, -1).movedim(1, 0)
    return by_group.to(conv.weight.device)


def _windows(conv: Conv, x: Tensor) -> Tensor:
    """Cut the windows that the kernel sees, ``(N, C, *positions, *kernel_size)``."""
    if not isinstance(conv, Conv):
        raise UnsupportedLayerError(
            f"{type(conv).__name__} is not a convolution: give an nn.Conv1d, Conv2d or Conv3d."
        )
    shape, axes = tuple(x.shape[1:]), len(conv.kernel_size)
    if len(shape) != axes + 1 or shape[0] != conv.in_channels:
        raise InvalidTensorError(
            f"One input has shape {shape}, but this layer reads {conv.in_channels} channels over "
            f"{axes} axes: expected ({conv.in_channels}, {', '.join(['any'] * axes)})."
        )
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    with checks.fitting(f"An input of shape {shape} does not fit {conv}"):
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)  # as conv.forward pads
        for axis, size in enumerate(conv.kernel_size, start=2):
            dilation, stride = conv.dilation[axis - 2], conv.stride[axis - 2]
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x

"""A convolution written out as a dense layer, and what the bias ratio makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn import functional as F

from . import checks
from .errors import InvalidTensorError, UnknownNameError, UnsupportedLayerError

LARGEST_GB = 4.0  # a matrix above this is refused: LayerSystem needs none
CHUNK = 1 << 24  # entries of one block of unit inputs

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def as_dense(conv: Conv, input_shape: tuple[int, ...]) -> Tensor:
    r""":math:`z = T x + b,\quad T_{(f,p),(c,q)} = W_{f,c,u}` where :math:`q = p + u`, else 0.

    The matrix of a convolution: one row for each filter ``f`` and position ``p``, one column for
    each channel ``c`` and pixel ``q``. It holds every weight once for each position, and zeros.
    Implements :eq:`conv-as-dense`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Any stride, padding, dilation, groups and padding mode.
    input_shape : tuple of int
        ``(C, *spatial)``, of one input.

    Returns
    -------
    Tensor
        ``(C_out·H'·W', C·H·W)``, float64, such that
        ``T @ x.flatten() + bias == conv(x).flatten()``.

    Raises
    ------
    UnsupportedLayerError
        If ``conv`` is not a convolution.
    InvalidTensorError
        If the shape does not fit the layer, or the matrix would take more than 4 GB.

    Notes
    -----
    Source: Fan et al. (2020), as the survey of Zhang et al. (2022) describes them.
    """
    spatial = _output_shape(conv, input_shape)
    rows, columns = conv.out_channels * math.prod(spatial), math.prod(input_shape)
    gigabytes = 8e-9 * rows * columns
    if gigabytes > LARGEST_GB:
        raise InvalidTensorError(
            f"The matrix of this layer on {tuple(input_shape)} is {rows} × {columns}: "
            f"{gigabytes:.1f} GB in float64, over the limit of {LARGEST_GB:g}; "
            "use gradinv_edu.systems.LayerSystem, which never writes it out."
        )
    apply = _without_bias(conv)
    matrix = conv.weight.new_empty(rows, columns, dtype=torch.float64)
    step = max(1, CHUNK // max(rows, columns))
    for first in range(0, columns, step):
        units = _units(first, min(first + step, columns), columns, matrix)
        matrix[:, first : first + step] = apply(units.reshape(-1, *input_shape)).flatten(1).T
    return matrix


def patches(conv: Conv, inputs: Tensor) -> Tensor:
    r""":math:`\mathrm{patch}_p(x)_{c,u} = x_c(p + u)`: what the kernel sees at each position.

    Also known as *im2col*; padding included, all channels, in any dimension.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Its kernel, stride, padding and dilation are used, its weights are not.
    inputs : Tensor
        ``(N, C, *spatial)``, floating point.

    Returns
    -------
    Tensor
        ``(N, P, C·k²)``, float64; positions and places in row-major order.

    Raises
    ------
    UnsupportedLayerError
        If ``conv`` is not a convolution.
    InvalidTensorError
        If the inputs do not fit the layer or are not finite floating point.
    """
    x = checks.finite(inputs, "inputs")
    _output_shape(conv, tuple(x.shape[1:]))
    return _patches(conv, x)


def weight_gradient(conv: Conv, inputs: Tensor, output_gradient: Tensor) -> Tensor:
    r""":math:`\partial L/\partial W_f = \sum_p k_f(p)\,\mathrm{patch}_p(x)`, over all positions.

    A weight is used at every position, so its gradient is a sum over them, and over the samples
    of a batch: one convolution on ``P`` positions is one dense layer on a batch of ``P`` patches.
    Implements :eq:`sum-over-positions`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer.
    inputs : Tensor
        ``(N, C, *spatial)``.
    output_gradient : Tensor
        ``k = ∂L/∂z``, ``(N, C_out, *output)``.

    Returns
    -------
    Tensor
        Shaped as ``conv.weight``, float64.

    Raises
    ------
    UnsupportedLayerError
        If ``conv`` is not a convolution.
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    """
    seen, k = _seen(conv, inputs, output_gradient)
    return _weighted_sum(conv, seen, k)


def signed_mean_patch(conv: Conv, inputs: Tensor, output_gradient: Tensor) -> Tensor:
    r""":math:`\sum_p k_f(p)\,\mathrm{patch}_p(x) \,/\, \sum_p k_f(p)`, one for each filter.

    What the bias ratio ``∂L/∂W_f ÷ ∂L/∂b_f`` must equal: a mean of all patches whose weights sum
    to one but may be negative or larger than one. Implements :eq:`fan-mean-patch`.

    Parameters
    ----------
    conv, inputs, output_gradient
        As for :func:`weight_gradient`.

    Returns
    -------
    Tensor
        Shaped as ``conv.weight``, float64; NaN for a filter whose ``k`` sums to exactly zero,
        which has no such mean.

    Raises
    ------
    UnsupportedLayerError, InvalidTensorError
        As :func:`weight_gradient`.
    VanishingGradientError
        If ``k`` is zero everywhere.
    """
    seen, k = _seen(conv, inputs, output_gradient)
    checks.not_all_zero(k, "output_gradient")
    total = k.sum(dim=(0, 2), keepdim=True)
    shares = torch.where(total == 0, torch.nan, k / total)
    return _weighted_sum(conv, seen, shares)


def recover_input_as_dense(
    conv: Conv,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    input_shape: tuple[int, ...],
    reading: str = "filters",
) -> Tensor:
    r""":math:`\hat x = (B^\top B)^{-1} B^\top \partial L/\partial W,\; B = \partial L/\partial b`.

    The bias ratio of a dense layer, applied to a convolution whose filters are stacked to a
    matrix. It sees the signed mean of :eq:`fan-mean-patch`, not the input, and gives the input
    only if all patches that carry gradient are the same. Implements :eq:`stacked-ratio`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Only its geometry is used.
    weight_gradient : Tensor
        ``∂L/∂W``, shaped as ``conv.weight``.
    bias_gradient : Tensor
        ``∂L/∂b``, ``(C_out,)``.
    input_shape : tuple of int
        ``(C, *spatial)``, of one input.
    reading : {"filters", "unrolled"}
        ``"filters"``: the matrix has one row for each filter and acts on patches. The rows give
        one patch; it is laid at every position, overlaps averaged; pixels that no patch reaches
        are 0.
        ``"unrolled"``: the matrix is :func:`as_dense`. It needs a gradient for each of its rows,
        which no client sends; the kernel's gradient is put wherever the kernel's weights are,
        the bias gradient repeated for each position, and its structural zeros count as gradients
        that are zero. The answer is that of ``"filters"``, each pixel dimmed by the share of
        positions whose patch covers it.

    Returns
    -------
    Tensor
        Shaped ``input_shape``, float64.

    Raises
    ------
    UnsupportedLayerError
        If ``conv`` is not a convolution.
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    VanishingGradientError
        If the bias gradient is zero everywhere in a group.
    UnknownNameError
        If the reading is none of the two.

    Notes
    -----
    Source: Fan et al. (2020). That filters are stacked is the characterisation of Zhang et al.
    (2022); which of the two matrices is meant, they leave open, hence both readings.
    """
    spatial = _output_shape(conv, input_shape)
    G = checks.shaped(weight_gradient, "weight_gradient", tuple(conv.weight.shape))
    b = checks.shaped(bias_gradient, "bias_gradient", (conv.out_channels,))
    if reading not in ("filters", "unrolled"):
        raise UnknownNameError(f'reading is "filters" or "unrolled", not {reading!r}.')
    patch = _one_patch(conv, G, b)
    tiled = _lay(conv, patch, input_shape)
    if reading == "unrolled":
        return tiled / math.prod(spatial)
    return tiled / _lay(conv, torch.ones_like(patch), input_shape).clamp(min=1)


def _one_patch(conv: Conv, G: Tensor, b: Tensor) -> Tensor:
    """Least squares over the rows of each group: a patch of all channels, ``(C·k²,)``."""
    k = b.reshape(conv.groups, -1)
    for group in k:
        checks.not_all_zero(group, "bias_gradient")
    rows = G.reshape(conv.groups, k.shape[1], -1)
    patch = torch.einsum("gf,gfj->gj", k, rows) / k.square().sum(dim=1, keepdim=True)
    return patch.flatten()


def _lay(conv: Conv, patch: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """Add one patch at every position: the adjoint of :func:`patches`."""
    positions = math.prod(_output_shape(conv, input_shape))
    pull = vjp(lambda x: _patches(conv, x), patch.new_zeros(1, *input_shape))[1]
    laid: Tensor = pull(patch.expand(1, positions, -1))[0]
    return laid[0]


def _seen(conv: Conv, inputs: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Patches ``(N, P, C·k²)`` and output gradient ``(N, C_out, P)``."""
    seen = patches(conv, inputs)
    spatial = _output_shape(conv, tuple(inputs.shape[1:]))
    shape = (inputs.shape[0], conv.out_channels, *spatial)
    return seen, checks.shaped(output_gradient, "output_gradient", shape).flatten(2)


def _weighted_sum(conv: Conv, seen: Tensor, k: Tensor) -> Tensor:
    samples, positions, _ = seen.shape
    grouped = seen.reshape(samples, positions, conv.groups, -1)
    by_group = k.reshape(samples, conv.groups, -1, positions)
    return torch.einsum("ngfp,npgj->gfj", by_group, grouped).reshape(conv.weight.shape)


def _patches(conv: Conv, x: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    seen = F.pad(x, _padding(conv), mode=mode)
    sizes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(sizes, start=2):
        seen = seen.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n = len(conv.kernel_size)  # (N, C, *positions, *places) -> (N, *positions, C, *places)
    return seen.movedim(1, n + 1).flatten(n + 1).flatten(1, n)


def _padding(conv: Conv) -> list[int]:
    """Both ends of every axis, last axis first, as ``F.pad`` wants them."""
    ends: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            whole = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            ends += [whole // 2, whole - whole // 2]
        else:
            ends += [0 if conv.padding == "valid" else int(conv.padding[axis])] * 2
    return ends


def _output_shape(conv: Conv, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise UnsupportedLayerError(
            f"{type(conv).__name__} is not a convolution: give an nn.Conv1d, Conv2d or Conv3d."
        )
    axes = len(conv.kernel_size)
    if len(input_shape) != axes + 1 or input_shape[0] != conv.in_channels:
        raise InvalidTensorError(
            f"One input has shape {tuple(input_shape)}, but this layer reads "
            f"{conv.in_channels} channels over {axes} axes: expected "
            f"({conv.in_channels}, {', '.join(['any'] * axes)})."
        )
    ends = _padding(conv)[::-1]
    output = []
    for axis, size in enumerate(input_shape[1:]):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        room = size + ends[2 * axis] + ends[2 * axis + 1] - span
        if size < 1 or room < 0:
            raise InvalidTensorError(
                f"The kernel spans {span} places of axis {axis + 1}, more than an input of shape "
                f"{tuple(input_shape)} has with its padding."
            )
        output.append(room // conv.stride[axis] + 1)
    return tuple(output)


def _without_bias(conv: Conv) -> Callable[[Tensor], Tensor]:
    constants = {
        name: torch.zeros_like(value, dtype=torch.float64)
        if name == "bias"
        else value.detach().to(torch.float64)
        for name, value in conv.named_parameters()
    }

    def apply(x: Tensor) -> Tensor:
        output: Tensor = functional_call(conv, constants, (x,))
        return output

    return apply


def _units(first: int, last: int, size: int, like: Tensor) -> Tensor:
    """Rows ``first`` to ``last`` of the identity."""
    units = like.new_zeros(last - first, size)
    places = torch.arange(last - first, device=like.device)
    units[places, places + first] = 1
    return units

"""Convolutions: one small weight for every patch, and so two sets of equations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ...errors import InvalidTensorError
from ..solve import rank_of
from .base import Affine, Example, LayerOperator, rule_for

__all__ = [
    "Conv",
    "Convolution",
    "ConvolutionOperator",
    "DirectOperator",
    "Geometry",
    "channel_blocks",
    "places",
    "shared_rows",
]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
KINDS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
LARGEST_BLOCK = 2048  # rows or pixels of a block of K whose rank is counted
FEW_ROWS = 4  # times as many pixels: the rows are counted
ENTRIES = 3e7  # of such a block


class Geometry(NamedTuple):
    """How a convolution, transposed or not, moves over its input, and torch's own calls for it.

    Attributes
    ----------
    stride, padding, dilation : list of int
        An axis each.
    groups : int
        Of channels.
    transposed : bool
        Whether it is the adjoint of a convolution.
    extra : list of int or None
        What a transposed one appends to its output, an axis each; None: nothing.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False
    extra: list[int] | None = None

    @property
    def _settings(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        extra = self.extra or [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, extra, self.groups

    def rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """``W x``."""
        z: Tensor = torch.ops.aten.convolution(x, weight, None, *self._settings)
        return z

    def rows_adjoint(self, r: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """``Wᵀ r``, shaped as ``like``."""
        wanted = [True, False, False]
        back = torch.ops.aten.convolution_backward
        x: Tensor = back(r, like, weight, None, *self._settings, wanted)[0]
        return x

    def gradient(self, k: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """``Σ_ℓ k(ℓ) ⊗ patch_ℓ(x)``, shaped as the weight ``like``."""
        wanted = [False, True, False]
        back = torch.ops.aten.convolution_backward
        g: Tensor = back(k, x, like, None, *self._settings, wanted)[1]
        return g


@dataclass(frozen=True)
class DirectOperator:
    """Direct calls: both sets of equations are convolutions themselves."""

    weight: Tensor
    k: Tensor
    template: Tensor
    geometry: Geometry

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        rows = self.geometry.rows(x, self.weight)
        return rows, self.geometry.gradient(self.k, x, self.weight)

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input: ``(W ∣ G)ᵀ (r ∣ k)``, one call for two."""
        move, like = self.geometry, self.template
        if move.groups > 1:  # whose filters would have to be dealt out
            from_rows = move.rows_adjoint(rows, self.weight, like)
            return from_rows + move.rows_adjoint(self.k, gradient_rows, like)
        filters = torch.cat([self.weight, gradient_rows], 1 if move.transposed else 0)
        return move.rows_adjoint(torch.cat([rows, self.k], 1), filters, like)

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same map in another precision."""
        weight, k, template = self.weight.to(dtype), self.k.to(dtype), self.template.to(dtype)
        return replace(self, weight=weight, k=k, template=template)


@dataclass(frozen=True)
class ConvolutionOperator(DirectOperator):
    """Of a convolution that is not transposed: its matrix is known channel by channel."""

    def matrix(self) -> Tensor:
        """Both sets of equations of one sample, ``(equations, unknowns)``.

        Every input channel meets the same small matrix of gradient rows (:meth:`channel`).
        """
        F, c, *kernel = self.weight.shape
        C, *spatial = self.template.shape[1:]
        groups, n = self.geometry.groups, math.prod(spatial)
        units = torch.eye(C * n, dtype=self.k.dtype, device=self.k.device)
        parts = [
            self.geometry.rows(part.reshape(-1, C, *spatial), self.weight).flatten(1)
            for part in torch.split(units, 256)
        ]
        K = self.k.new_zeros(F, c, math.prod(kernel), C, n)
        each = F // groups
        for g in range(groups):
            own, rows = slice(g * each, (g + 1) * each), self.channel(g)
            for channel in range(c):
                K[own, channel, :, g * c + channel] = rows
        return torch.cat([torch.cat(parts).T, K.reshape(-1, C * n)])

    def channel(self, group: int = 0) -> Tensor:
        """Gradient rows that every input channel of a group meets, ``(filters, taps, pixels)``.

        The gradient of a layer whose channels are the unit pictures.
        """
        F, _, *kernel = self.weight.shape
        spatial, each = self.template.shape[2:], F // self.geometry.groups
        n = math.prod(spatial)
        pictures = torch.eye(n, dtype=self.k.dtype, device=self.k.device).reshape(1, n, *spatial)
        k = self.k[:, group * each : (group + 1) * each]
        alone = self.geometry._replace(groups=1)
        rows = alone.gradient(k, pictures, k.new_zeros(each, n, *kernel))
        return rows.flatten(2).transpose(1, 2)


@rule_for(*KINDS)
class Convolution(Affine):
    """:class:`torch.nn.Conv1d` to 3d: any stride, padding, dilation and groups."""

    weighted = True

    @property
    def geometry(self) -> Geometry | None:
        """How it moves; None where only the module itself knows."""
        conv = cast(Conv, self.module)
        # A subclass may have a forward pass of its own (weight norm, for one): exact types only.
        if type(conv) not in KINDS or conv.padding_mode != "zeros":
            return None
        spans = [d * (s - 1) for d, s in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same":
            if any(span % 2 for span in spans):  # padded on one side only
                return None
            padding = [span // 2 for span in spans]
        else:
            padding = (
                [0] * len(spans) if conv.padding == "valid" else [int(p) for p in conv.padding]
            )
        return Geometry(list(conv.stride), padding, list(conv.dilation), conv.groups)

    def operator(self, k: Tensor, input_shape: tuple[int, ...]) -> LayerOperator:
        """Direct calls where torch's own convolution does it all."""
        geometry = self.geometry
        if geometry is None:
            return super().operator(k, input_shape)
        template = k.new_zeros(k.shape[0], *input_shape)
        weight = cast(Conv, self.module).weight.detach().to(k.dtype)
        return ConvolutionOperator(weight, k, template, geometry)

    def shifts(self, spatial: tuple[int, ...]) -> bool:
        """Whether it keeps the picture's size, with taps that tell each place from the next."""
        geometry = self.geometry
        if geometry is None:
            return False
        kernel = cast(Conv, self.module).kernel_size
        sizes = zip(*geometry[:3], kernel, spatial, strict=True)
        return all(
            stride == taps % 2 == 1
            and 2 * padding == dilation * (taps - 1)
            and (size == 1 or (dilation == 1 and taps > 1))
            for stride, padding, dilation, taps, size in sizes
        )

    def most(self, known: Tensor, shape: tuple[int, ...]) -> int:
        """Every channel meets the same gradient rows: filters times places of the kernel."""
        conv = cast(Conv, self.module)
        rows = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
        n = math.prod(shape)
        return min(n, int(known.sum()) + shape[0] * min(rows, n // shape[0]))

    def _tiles(self, shape: tuple[int, ...]) -> bool:
        """Whether its patches cover the picture once, and enough filters see each."""
        conv, geometry = cast(Conv, self.module), self.geometry
        if geometry is None or any(geometry[1]):
            return False
        fits = zip(geometry[0], geometry[2], conv.kernel_size, shape[1:], strict=True)
        if any(s != t or (d != 1 and t > 1) or size % s for s, d, t, size in fits):
            return False
        parts = conv.weight.detach().double().flatten(1).chunk(conv.groups)
        return all(len(W) >= W.shape[1] == rank_of(W) for W in parts)

    def bounds(self, k: Tensor, known: Tensor, shape: tuple[int, ...]) -> tuple[int, str | None]:
        """Bound by the rank of ``K`` for each channel, known rows, and the rows that both hold."""
        conv = cast(Conv, self.module)
        index, pixels = places(conv, shape)
        if bool(known.all()) and self._tiles(shape):
            return math.prod(shape), "weight"
        seen, visible = int((torch.bincount(index[index > 0]) > 0).sum()), (index > 0).any(0)
        groups, channels = conv.groups, shape[0] // conv.groups
        ranks, sure = [], True
        for block in channel_blocks(conv, k, index, pixels):
            sure = sure and isinstance(block, Tensor)
            ranks.append(rank_of(block) if isinstance(block, Tensor) else min(block))
        known = known.reshape(groups, conv.out_channels // groups, -1)[:, :, visible]
        k = k.reshape(known.shape[0], known.shape[1], -1)[:, :, visible]
        shared = sum(shared_rows(k[g], known[g]) for g in range(groups))
        bound = channels * sum(ranks) + int(known.sum()) - shared
        sure = sure and all(rank == pixels for rank in ranks)
        return min(seen * shape[0], bound), "gradient" if sure else None

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Strides, paddings, dilations, groups, one to three dimensions."""
        yield nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)
        yield nn.Conv2d(2, 4, (2, 3), stride=(2, 1), groups=2, bias=False), (2, 6, 6)
        yield nn.Conv2d(1, 2, 3, dilation=2, padding=2, padding_mode="reflect"), (1, 6, 6)
        yield nn.Conv2d(2, 2, (2, 4), padding="same"), (2, 5, 6)
        yield nn.Conv2d(2, 9, 2, stride=2), (2, 4, 6)
        yield nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 9)
        yield nn.Conv3d(1, 2, 2, padding=1), (1, 3, 4, 3)


def places(conv: Conv, input_shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Pixel (from 1; 0 is padding) that each place of the kernel lies on at each position.

    Returns
    -------
    index : Tensor
        ``(places of the kernel, positions)``.
    pixels : int
        Of one channel.
    """
    spatial = tuple(input_shape[1:])
    dimensions = next(d for kind, d in KINDS.items() if isinstance(conv, kind))
    if len(spatial) != dimensions or input_shape[0] != conv.in_channels:
        raise InvalidTensorError(
            f"{type(conv).__name__} with {conv.in_channels} channels does not take inputs of "
            f"shape {tuple(input_shape)}."
        )
    n = math.prod(spatial)
    numbered = torch.arange(1.0, n + 1, dtype=torch.float64).reshape(1, 1, *spatial)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    index = nn.functional.pad(numbered, conv._reversed_padding_repeated_twice, mode=mode)[0, 0]
    for axis in range(dimensions):
        kernel, dilation = conv.kernel_size[axis], conv.dilation[axis]
        positions = (index.shape[2 * axis] - dilation * (kernel - 1) - 1) // conv.stride[axis] + 1
        if positions < 1:
            raise InvalidTensorError(
                f"The kernel {conv.kernel_size} is larger than the padded input {spatial}."
            )
        steps = conv.stride[axis] * torch.arange(positions)
        grid = steps[:, None] + dilation * torch.arange(kernel)
        index = index.index_select(2 * axis, grid.reshape(-1))
        split = (*index.shape[: 2 * axis], positions, kernel, *index.shape[2 * axis + 1 :])
        index = index.reshape(split)
    order = [2 * a + 1 for a in range(dimensions)] + [2 * a for a in range(dimensions)]
    return index.permute(order).reshape(math.prod(conv.kernel_size), -1).long(), n


def channel_blocks(
    conv: Conv, k: Tensor, index: Tensor, pixels: int
) -> Iterator[Tensor | tuple[int, int]]:
    """``K`` of one input channel, ``(filters · places, pixels)``, for each group.

    Its shape alone where it is too large to be written out, or its rank hardly in doubt.
    """
    filters = conv.out_channels // conv.groups
    rows = filters * len(index)
    for part in k.reshape(conv.groups, filters, -1):
        large = rows * pixels > ENTRIES or min(rows, pixels) > LARGEST_BLOCK
        if large or rows * FEW_ROWS <= pixels:  # so few rows hardly depend on each other
            yield rows, pixels
            continue
        block = part.new_zeros(filters, len(index), pixels + 1)
        shape = (filters, *index.shape)
        block.scatter_add_(2, index.to(k.device).expand(shape), part[:, None, :].expand(shape))
        yield block[:, :, 1:].reshape(rows, pixels)


def shared_rows(k: Tensor, known: Tensor) -> int:
    """Equations in both sets: pairs ``(f, f')`` where ``k_f`` meets known rows of ``f'`` only.

    Parameters
    ----------
    k, known : Tensor
        ``(filters, positions)``.
    """
    if len(k) == 1:  # a depthwise convolution has hundreds of groups of one
        return int(bool(k.any()) and not bool(k[~known].any()))
    if bool(known.all()):
        return len(k) * rank_of(k)
    alive = (k != 0).any(dim=1)
    meets = (k != 0).to(k.dtype) @ (~known).to(k.dtype).T  # k_f at unknown rows of f'
    kinds, times = torch.unique((meets == 0).T & alive, dim=0, return_counts=True)
    counts = kinds.sum(dim=1).tolist()
    return sum(
        often * (rank_of(k[chosen]) if count > 1 else count)
        for chosen, count, often in zip(kinds, counts, times.tolist(), strict=True)
    )

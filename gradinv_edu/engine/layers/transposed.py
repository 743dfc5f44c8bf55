"""Transposed convolutions: the adjoint of a convolution as a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .base import Affine, Example, LayerOperator, rule_for
from .convolution import DirectOperator, Geometry

__all__ = ["TransposedConvolution"]

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@rule_for(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolution(Affine):
    """:class:`torch.nn.ConvTranspose1d` to 3d: ``z = Wᵀ x + b`` of a convolution ``W``."""

    weighted = True

    def operator(self, k: Tensor, input_shape: tuple[int, ...]) -> LayerOperator:
        """Direct calls where torch's own layer does it all."""
        layer = cast(Transposed, self.module)
        # a subclass may have a forward pass of its own; its scaled copy is not this operator
        if type(layer) not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
            return super().operator(k, input_shape)
        stride, padding, dilation, more = (
            [int(n) for n in cast(tuple[int, ...], part)]
            for part in (layer.stride, layer.padding, layer.dilation, layer.output_padding)
        )
        return DirectOperator(
            layer.weight.detach().to(k.dtype),
            k,
            k.new_zeros(k.shape[0], *input_shape),
            Geometry(stride, padding, dilation, layer.groups, True, more),
        )

    def channels(self, weight: Tensor) -> Tensor:
        """The weight begins with the inputs; each group of them has outputs of its own."""
        groups, own = cast(Transposed, self.module).groups, weight.shape[1]
        first = own * (torch.arange(len(weight), device=weight.device) * groups // len(weight))
        each = first[:, None] + torch.arange(own, device=weight.device)
        return each.reshape(*each.shape, *[1] * (weight.dim() - 2))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Strides, paddings, dilations, groups, one to three dimensions."""
        yield nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)
        yield nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)
        yield nn.ConvTranspose1d(3, 2, 3, dilation=2), (3, 5)
        yield nn.ConvTranspose3d(1, 2, 2), (1, 3, 2, 2)

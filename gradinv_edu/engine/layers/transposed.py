"""Transposed convolutions: the adjoint of a convolution as a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from .base import Affine, Example, LayerOperator, rule_for

__all__ = ["TransposedConvolution", "TransposedOperator"]

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class TransposedOperator:
    """Direct calls: both sets of equations are convolutions themselves."""

    weight: Tensor
    k: Tensor
    template: Tensor
    geometry: tuple[list[int], list[int], list[int], bool, list[int], int]

    def _backward(self, k: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> list[Tensor]:
        return list(torch.ops.aten.convolution_backward(k, x, weight, None, *self.geometry, mask))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        rows = torch.ops.aten.convolution(x, self.weight, None, *self.geometry)
        return rows, self._backward(self.k, x, self.weight, [False, True, False])[1]

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        wanted = [True, False, False]
        from_rows = self._backward(rows, self.template, self.weight, wanted)[0]
        return from_rows + self._backward(self.k, self.template, gradient_rows, wanted)[0]

    def to(self, dtype: torch.dtype) -> TransposedOperator:
        """Return the same map in another precision."""
        weight, k, template = self.weight.to(dtype), self.k.to(dtype), self.template.to(dtype)
        return replace(self, weight=weight, k=k, template=template)


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
        return TransposedOperator(
            layer.weight.detach().to(k.dtype),
            k,
            k.new_zeros(k.shape[0], *input_shape),
            (stride, padding, dilation, True, more, layer.groups),
        )

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Strides, paddings, dilations, groups, one to three dimensions."""
        yield nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)
        yield nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)
        yield nn.ConvTranspose1d(3, 2, 3, dilation=2), (3, 5)
        yield nn.ConvTranspose3d(1, 2, 2), (1, 3, 2, 2)

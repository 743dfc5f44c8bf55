"""A convolution with the affine map above it folded in, and the ReLU layer that may lie below."""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import UnsupportedLayerError
from .layers import rule_of
from .layers.convolution import Conv, Convolution, places
from .solve import draw

__all__ = ["Beneath", "Folded"]


class Folded:
    r""":math:`y = W * a + b`: a convolution with what follows filter by filter folded in.

    Parameters
    ----------
    module : nn.Module
        A convolution, or a sequence of one and of layers that scale and shift each filter.
    input_shape : tuple of int
        Of one input.

    Raises
    ------
    UnsupportedLayerError
        If it is anything else.
    InvalidTensorError
        If it does not take inputs of this shape.
    """

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        parts = [part for part in module.modules() if not list(part.children())]
        rule = rule_of(parts[0])
        geometry = rule.geometry if isinstance(rule, Convolution) else None
        if geometry is None or any(rule_of(part).random for part in parts):
            raise UnsupportedLayerError(
                "Max pooling is undone above a convolution padded with zeros, and what scales and "
                f"shifts its filters; not above {_kinds(parts)}."
            )
        conv = cast(Conv, copy.deepcopy(parts[0]).double())
        self.input_shape, self.weight = tuple(input_shape), conv.weight.detach()
        with checks.fitting(f"{_kinds(parts)} does not take inputs of shape {self.input_shape}"):
            zeros = self.weight.new_zeros(1, *input_shape)
            self.output_shape = tuple(geometry.rows(zeros, self.weight).shape[1:])
        self.seen = places(conv, self.input_shape)[0].to(self.weight.device)
        columns = torch.arange(conv.in_channels * len(self.seen), device=self.weight.device)
        own = columns.reshape(conv.groups, 1, -1).expand(-1, conv.out_channels // conv.groups, -1)
        self.own = None if conv.groups == 1 else own.reshape(conv.out_channels, -1)
        above = nn.Sequential(*[copy.deepcopy(part).double() for part in parts[1:]])
        probe = draw(self.weight.new_empty(1, *self.output_shape))
        with torch.no_grad():
            zero, one, out = (above(t) for t in (0 * probe, torch.ones_like(probe), probe))
            self.bias = zero.flatten(2)[0, :, 0]
            self.scale = one.flatten(2)[0, :, 0] - self.bias
            scaled = self.column(self.scale) * probe + self.column(self.bias)
            if out.shape != scaled.shape or not torch.allclose(out, scaled, rtol=1e-9, atol=1e-9):
                raise UnsupportedLayerError(
                    f"{_kinds(parts[1:])} does not scale and shift filter by filter."
                )
            if conv.bias is not None:
                self.bias = self.bias + self.scale * conv.bias
            self.weight = self.column(self.scale).movedim(1, 0) * self.weight
        conv.weight, conv.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        self.conv = conv

    def column(self, each: Tensor) -> Tensor:
        """One number a filter, to be spread over ``(1, filters, *places)``."""
        return each.reshape(1, -1, *(1,) * (len(self.input_shape) - 1))

    def unfolded(self, gradient: Tensor) -> Tensor:
        """``∂L/∂`` of the folded weight, from that of the convolution's own."""
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return gradient / self.column(scale).movedim(1, 0)

    def patches(self, a: Tensor) -> Tensor:
        """``(channels · taps, positions)``: what each position sees of ``a``."""
        flat = torch.nn.functional.pad(a.reshape(self.input_shape[0], -1), (1, 0))
        return flat.index_select(1, self.seen.reshape(-1)).reshape(-1, self.seen.shape[1])

    def patches_adjoint(self, P: Tensor) -> Tensor:
        """Each position's share, added up where it was seen."""
        flat = P.new_zeros(self.input_shape[0], 1 + math.prod(self.input_shape[1:]))
        flat.index_add_(1, self.seen.reshape(-1), P.reshape(len(flat), -1))
        return flat[:, 1:].reshape(1, *self.input_shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """``(filters, channels · taps)``; zero for channels of another group."""
        flat = weight.flatten(1)
        if self.own is None:
            return flat
        wide = flat.new_zeros(len(flat), self.input_shape[0] * len(self.seen))
        return wide.scatter(1, self.own, flat)

    def of_matrix(self, M: Tensor) -> Tensor:
        """The adjoint of :meth:`matrix`."""
        own = M if self.own is None else M.gather(1, self.own)
        return own.reshape(self.weight.shape)

    def rows(self, a: Tensor, weight: Tensor | None = None) -> Tensor:
        """``W * a``; with another weight ``g``, the adjoint of :meth:`gradient` in ``k``."""
        weight = self.weight if weight is None else weight
        found = self.matrix(weight.to(a.dtype)) @ self.patches(a)
        return found.reshape(1, *self.output_shape)

    def rows_adjoint(self, r: Tensor, weight: Tensor | None = None) -> Tensor:
        """``Wᵀ r``; of ``k`` with a weight ``g``, the adjoint of :meth:`gradient` in ``a``."""
        weight = self.weight if weight is None else weight
        return self.patches_adjoint(self.matrix(weight.to(r.dtype)).T @ r.flatten(2)[0])

    def gradient(self, k: Tensor, a: Tensor) -> Tensor:
        """``Σ_ℓ k(ℓ) ⊗ patch_ℓ(a)``, linear in ``k`` and in ``a``."""
        return self.of_matrix(k.flatten(2)[0] @ self.patches(a).T)

    def __call__(self, a: Tensor) -> Tensor:
        """``W * a + b``."""
        return self.rows(a) + self.column(self.bias)


class Beneath:
    """What the convolution sees of the unknown: all of it, or ``D (W x + b)``, ``D`` fixed.

    Parameters
    ----------
    layer : Folded or None
        The layer below, with a ReLU between the two, if there is one.
    like : Tensor
        An input of the convolution.
    """

    def __init__(self, layer: Folded | None, like: Tensor) -> None:
        self.layer, self.offset, self.side = layer, torch.zeros_like(like), torch.ones_like(like)
        self.shape = tuple(like.shape) if layer is None else (1, *layer.input_shape)

    @property
    def arrangements(self) -> float:
        """Decimal digits of the number of ways to choose the sides."""
        return 0.0 if self.layer is None else self.side.numel() * math.log10(2)

    def look(self, x: Tensor) -> Tensor:
        """Fix the sides as they are at ``x``; what the convolution sees there."""
        if self.layer is None:
            return x
        z = self.layer(x)
        self.side = (z > 0).double()
        self.offset = self.side * self.layer.column(self.layer.bias)
        return z.clamp_min(0)

    def forward(self, x: Tensor) -> Tensor:
        """``D W x``."""
        return x if self.layer is None else self.side.to(x.dtype) * self.layer.rows(x)

    def adjoint(self, a: Tensor) -> Tensor:
        """``Wᵀ D a``."""
        return a if self.layer is None else self.layer.rows_adjoint(self.side.to(a.dtype) * a)

    def diagonal(self, d: Tensor) -> Tensor:
        """Diagonal of ``(D W)ᵀ diag(d) D W``."""
        if self.layer is None:
            return d
        return self.layer.rows_adjoint(self.side * d, self.layer.weight**2)


def _kinds(parts: list[nn.Module]) -> str:
    return " + ".join(type(part).__name__ for part in parts)

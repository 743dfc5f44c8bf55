"""Layers without a weight that are linear: upsampling, padding, folding, and calls that are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .base import Affine, Example, rule_for
from .branches import Call

__all__ = ["LinearCall", "LinearCalls", "Resampling"]

PADDINGS = [
    getattr(nn, f"{kind}Pad{d}d")
    for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for d in (1, 2, 3)
    if hasattr(nn, f"{kind}Pad{d}d")
]


@rule_for(nn.Upsample, nn.Fold, nn.Unfold, *PADDINGS)
class Resampling(Affine):
    """Each output is a fixed mean of inputs, or a constant."""

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Every interpolation that is linear, and paddings of each kind."""
        yield nn.Upsample(scale_factor=2), (2, 3, 2)
        yield nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True), (1, 3, 4)
        yield nn.Upsample(scale_factor=2, mode="linear"), (2, 4)
        yield nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4)
        yield nn.ZeroPad2d((1, 0, 2, 1)), (2, 3, 3)
        yield nn.ReflectionPad2d(1), (1, 3, 4)
        yield nn.ReplicationPad1d(2), (2, 4)
        yield nn.ConstantPad2d(1, 0.5), (1, 3, 3)
        yield nn.Unfold(2), (2, 4, 3)


class LinearCall(Call):
    """An operation of a forward pass that is linear in its only input, up to an offset."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Do it in float64: constants inside may be of that type."""
        found: Tensor = self.function(*[t.double() for t in tensors])
        return found.to(tensors[0].dtype)


@rule_for(LinearCall)
class LinearCalls(Affine):
    """Means, parts, sums with constants: rows without a weight."""

    @property
    def kind(self) -> str:
        """Name of the operation."""
        return cast(Call, self.module).name

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """A mean over places, a part, a sum with a constant."""
        yield LinearCall("mean", partial(torch.mean, dim=[2, 3])), (3, 2, 4)
        yield LinearCall("getitem", lambda x: x[:, 1:]), (3, 4)
        yield LinearCall("add", partial(torch.add, torch.ones(3, dtype=torch.float64))), (2, 3)

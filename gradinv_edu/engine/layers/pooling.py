"""Average pooling, which is linear without a weight, and max pooling, which forgets places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from .base import Affine, Example, Rule, rule_for

__all__ = ["AveragePooling", "MaxPooling", "RandomPooling"]


@rule_for(
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
class AveragePooling(Affine):
    """Means of windows: fewer rows than unknowns, so solved together with the layer below."""

    has_function = True

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """With overlap and padding, and adaptive."""
        yield nn.AvgPool2d(2, stride=1, padding=1), (2, 4, 5)
        yield nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 7)
        yield nn.AdaptiveAvgPool2d((None, 1)), (1, 3, 4)
        yield nn.AvgPool2d(3, stride=2, ceil_mode=True, count_include_pad=False), (1, 6, 5)
        yield nn.AvgPool1d(2), (3, 6)


@rule_for(*(getattr(nn, f"{kind}MaxPool{d}d") for kind in ("", "Adaptive") for d in (1, 2, 3)))
class MaxPooling(Rule):
    """Maxima of windows, whose places are found together with the input of the layer below."""

    has_function = True
    kinked = True
    pools = True
    reason: ClassVar[str] = (
        "it keeps one entry of each window and forgets which; only right after a convolution, with "
        "an increasing activation or a norm between, does that layer tell"
    )


@rule_for(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
class RandomPooling(Rule):
    """Maxima of windows that are drawn."""

    kinked = True

    reason: ClassVar[str] = "it draws its windows, and keeps one entry of each without saying which"

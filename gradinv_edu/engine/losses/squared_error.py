"""The squared error: ``k = 2 (W x + b − t)``, whose unknown target leaves the scale open."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import UndeterminedScaleError
from .registry import Head, Rule, register

__all__ = ["SquaredError"]


@register(nn.MSELoss)
class SquaredError(Rule):
    """``k = 2 (z − t)``."""

    def from_weight(self, W: Tensor, G: Tensor, bias: Tensor | None) -> list[Head]:
        """Nothing: any scale has its target."""
        raise UndeterminedScaleError(
            "The last layer has no bias and the squared error has an unknown target: any scale of "
            "the input has a target that explains the gradient. A bias anywhere, or a "
            "classification loss, would fix it."
        )

    def slope(self, z: Tensor, targets: Tensor) -> Tensor:
        """``2 (z − t)``."""
        return 2 * (z - targets.to(z))

    def target(self, z: Tensor, k: Tensor) -> Tensor:
        """``z − k/2``."""
        return z - k / 2

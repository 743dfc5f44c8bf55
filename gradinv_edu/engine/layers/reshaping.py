"""Layers that only name the entries anew."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .base import Example, Rule, rule_for

__all__ = ["Reshape", "Reshaping"]


class Reshape(nn.Module):
    """A call of ``view``, ``reshape`` or ``flatten`` in a forward pass, as a layer.

    Parameters
    ----------
    *shape : int
        Of one output, without the batch dimension.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Give the entries their new shape."""
        return x.reshape(len(x), *self.shape)


@rule_for(nn.Flatten, nn.Unflatten, nn.Identity, Reshape)
class Reshaping(Rule):
    """The same entries in the same order."""

    reshapes = True

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """There and back."""
        yield nn.Flatten(), (2, 3)
        yield nn.Unflatten(1, (2, 3)), (6,)
        yield Reshape(3, 2), (6,)

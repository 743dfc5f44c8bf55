"""Layers that only name the entries anew."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .base import Example, Rule, rule_for

__all__ = ["Permute", "Reshape", "Reshaping"]


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


class Permute(nn.Module):
    """A call of ``permute`` or ``transpose`` in a forward pass, as a layer.

    Parameters
    ----------
    *dims : int
        Where each dimension of the output comes from; the first, of the batch, stays.
    """

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Give the dimensions their new order."""
        return x.permute(self.dims)


REORDER = (Permute, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)


@rule_for(nn.Flatten, nn.Unflatten, nn.Identity, Reshape, *REORDER)
class Reshaping(Rule):
    """The same entries under other names: what pulls a gradient back also undoes it."""

    reshapes = True

    @property
    def reorders(self) -> bool:  # type: ignore[override]
        """Whether the entries' order changes."""
        return isinstance(self.module, REORDER)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """There and back, and permutations."""
        yield nn.Flatten(), (2, 3)
        yield nn.Unflatten(1, (2, 3)), (6,)
        yield Reshape(3, 2), (6,)
        yield Permute(0, 2, 3, 1), (2, 3, 4)
        yield nn.PixelShuffle(2), (8, 2, 3)
        yield nn.PixelUnshuffle(2), (1, 4, 6)
        yield nn.ChannelShuffle(2), (6, 2, 2)

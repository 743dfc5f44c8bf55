"""What a search guesses: pictures to begin from, free labels, the masks of dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..sharing import Loss

__all__ = ["GuessedDropout", "normal", "patterned", "replace_dropout", "soft_labels", "uniform"]


def soft_labels(loss: Loss, free: Tensor) -> Tensor:
    """Turn free numbers into labels that the loss takes."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return free.softmax(dim=-1)
    return free.sigmoid() if isinstance(loss, nn.BCEWithLogitsLoss) else free


class GuessedDropout(nn.Module):
    """Stands in for a dropout layer: multiplies by a guess of its mask, or by nothing."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.guess, self.shape = p, torch.empty(0), torch.Size()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the guess, and note the shape of what would be masked."""
        self.shape = x.shape
        return x * self.guess / (1 - self.p) if self.guess.numel() else x


def replace_dropout(model: nn.Module) -> dict[str, GuessedDropout]:
    """Put a guess in the place of each dropout that is at work; by the layers' names.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    """
    guesses = {}
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p:
                guess = guesses[f"{name}.{child}".strip(".")] = GuessedDropout(layer.p)
                setattr(module, child, guess)
    return guesses


def normal(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Noise to begin from."""
    return torch.randn(shape, generator=source, dtype=torch.float64, device=source.device)


def uniform(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Noise in [0, 1]."""
    return torch.rand(shape, generator=source, dtype=torch.float64, device=source.device)


def patterned(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """A random quarter, repeated twice each way: the start of Wei et al. (2020)."""
    if len(shape) != 4:
        return uniform(shape, source)
    height, width = shape[-2:]
    tile = uniform((*shape[:-2], -(-height // 2), -(-width // 2)), source)
    return tile.repeat(1, 1, 2, 2)[..., :height, :width]

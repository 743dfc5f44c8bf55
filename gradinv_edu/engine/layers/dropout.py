"""Dropout: in train mode its zeros tell which units it dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .activations import split_zeros
from .base import Example, Rule, Undone, rule_for

__all__ = ["Dropout"]


@rule_for(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
class Dropout(Rule):
    """``a = m ⊙ z / (1 − p)``: read off its zeros, whose rows are masked."""

    elementwise = homogeneous = True

    @property
    def rate(self) -> float:
        """Share of units dropped in this mode."""
        module = cast(nn.Dropout, self.module)
        return float(module.p) if module.training else 0.0

    @property
    def random(self) -> bool:
        """Whether units are dropped."""
        return self.rate > 0

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """With a mask from the generator."""
        if not self.random:
            return x * 1.0
        keep = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x) >= self.rate
        return x * keep / (1 - self.rate)

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """Kept units scaled back; dropped ones unknown."""
        if not self.random:
            return Undone(outputs, torch.ones_like(outputs), torch.ones_like(outputs).bool())
        known = ~split_zeros(outputs, noise)
        keep = 1 - self.rate
        return Undone(torch.where(known, outputs * keep, 0.0), known.to(outputs) / keep, known)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """In both modes."""
        yield nn.Dropout(0.3).train(), (4, 5)
        yield nn.Dropout(0.3).eval(), (6,)

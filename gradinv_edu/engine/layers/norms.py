"""Normalisation: batch norm in eval mode is affine, entry by entry; the others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from .base import Affine, Example, Rule, Undone, rule_for

__all__ = ["BatchNorm", "OtherNorm"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


@rule_for(_BatchNorm)
class BatchNorm(Affine):
    """``γ (z − μ)/√(σ² + ε) + β`` with known ``μ`` and ``σ`` in eval mode."""

    elementwise = True
    reason: ClassVar[str] = "in train mode it divides by statistics of its own input"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        norm = cast(_BatchNorm, module)
        self.fixed = not norm.training and norm.running_var is not None
        self.affine = self.elementwise = self.fixed

    @property
    def random(self) -> bool:
        """Statistics of the batch."""
        return not self.fixed

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """By the running statistics, in any mode: one sample has none of its own."""
        norm = cast(_BatchNorm, self.module)
        if norm.running_mean is None or norm.running_var is None:
            return x * 1.0
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """Shift and scale taken back; a channel with ``γ = 0`` stays unknown."""
        norm = cast(_BatchNorm, self.module)
        if not self.fixed:
            return super().undo(outputs, name, noise)
        assert norm.running_mean is not None and norm.running_var is not None
        shape = [1, -1] + [1] * (outputs.dim() - 2)
        factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = torch.zeros_like(factor)
        if norm.affine:
            factor, shift = factor * norm.weight.detach().double(), norm.bias.detach().double()
        gain = factor.reshape(shape).expand_as(outputs)
        known = gain != 0
        safe = torch.where(known, gain, torch.ones_like(gain))
        z = (outputs - shift.reshape(shape)) / safe + norm.running_mean.double().reshape(shape)
        return Undone(torch.where(known, z, torch.zeros_like(z)), gain, known)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """In eval mode, with and without a scale of its own."""
        yield nn.BatchNorm2d(2).eval(), (2, 4, 3)
        yield nn.BatchNorm1d(3, affine=False).eval(), (3,)


@rule_for(
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.modules.instancenorm._InstanceNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)
class OtherNorm(Rule):
    """Norms that always use their own input."""

    reason: ClassVar[str] = "it divides by statistics of its own input"

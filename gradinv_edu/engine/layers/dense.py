"""Dense layers: ``z = W x + b``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..solve import rank_of
from .base import Affine, Example, LayerOperator, rule_for
from .convolution import shared_rows

__all__ = ["Dense", "LinearOperator"]


@dataclass(frozen=True)
class LinearOperator:
    """``x ↦ (W x, k xᵀ)`` of vectors, without automatic differentiation."""

    weight: Tensor
    k: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        return x @ self.weight.T, self.k.T @ x

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        return rows @ self.weight + self.k @ gradient_rows

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the same map in another precision."""
        return LinearOperator(self.weight.to(dtype), self.k.to(dtype))


@rule_for(nn.Linear)
class Dense(Affine):
    """:class:`torch.nn.Linear`: where one entry of ``k`` is not zero, ``∂L/∂W`` gives the input."""

    weighted = True

    def operator(self, k: Tensor, input_shape: tuple[int, ...]) -> LayerOperator:
        """Direct calls on vectors."""
        if type(self.module) is not nn.Linear or len(input_shape) != 1:
            return super().operator(k, input_shape)
        return LinearOperator(self.module.weight.detach().to(k.dtype), k)

    def most(self, known: Tensor, shape: tuple[int, ...]) -> int:
        """Every entry of a row meets the same gradient rows: as many as outputs."""
        n, outputs = math.prod(shape), known.shape[-1]
        return min(n, int(known.sum()) + shape[-1] * min(outputs, n // shape[-1]))

    def bounds(self, k: Tensor, known: Tensor, shape: tuple[int, ...]) -> tuple[int, str | None]:
        """As of a convolution whose kernel is one place: each row of the input is a position."""
        k, known = (part.reshape(-1, part.shape[-1]).T for part in (k, known))
        W = cast(nn.Linear, self.module).weight.detach()
        n = math.prod(shape)
        rank = rank_of(k)
        bound = shape[-1] * rank + int(known.sum()) - shared_rows(k, known)
        if rank == k.shape[1]:
            return n, "gradient"
        alone = bool(known.all()) and len(W) >= shape[-1] == rank_of(W.double())
        return min(n, bound), "weight" if alone else None

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """On a vector, and on rows."""
        yield nn.Linear(5, 4), (5,)
        yield nn.Linear(5, 3, bias=False), (2, 5)

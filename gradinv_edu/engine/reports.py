"""What one layer's equations gave, and how far it may be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..systems import LayerSystem
from .norm_system import NormSystem
from .solve import Solution

__all__ = ["TOLERANCES", "LayerReport", "error_of"]

# what a gradient of this precision lets one ask for: (consistency, relative error of the input)
TOLERANCES = {
    torch.float64: (1e-7, 1e-6),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (2e-2, 1e-1),
    torch.bfloat16: (1e-1, 2e-1),
}


@dataclass(frozen=True)
class LayerReport:
    """What one layer's equations gave.

    Attributes
    ----------
    name : str
        Of the layer in the model; ``first+…+last`` where several are solved as one.
    unknowns, equations : int
        Entries of the layer's input, and equations left for them after masking.
    solution : Solution
        Residual, rank, singular values; ``x`` is the layer's input, of the lowest layer where
        several are solved as one.
    error : float
        Estimated relative error of this input: residual over smallest singular value.
    turned : int
        Units above this layer that rounding had put on the wrong side of their kink, and that its
        own gradient put right (:func:`gradinv_edu.segments.settle`).
    unsettled : int
        Units above this layer of which two inputs give one output, and of which its equations do
        not prove which one it was (:func:`gradinv_edu.engine.preimages.settle`).
    hidden : str
        What a norm of its own statistics leaves open of this input, and what tells it after all.
    """

    name: str
    unknowns: int
    equations: int
    solution: Solution = field(repr=False)
    error: float
    turned: int = 0
    unsettled: int = 0
    hidden: str = ""

    @property
    def inputs(self) -> Tensor:
        """What was found for the layer's input, ``(N, *input_shape)``, float64."""
        return self.solution.x

    @property
    def residual(self) -> float:
        """Relative norm of what the answer leaves unexplained."""
        return self.solution.residual

    @property
    def full_rank(self) -> bool:
        """Whether the equations determine the whole input."""
        return self.solution.full_rank

    @property
    def undetermined(self) -> float:
        """Share of the input space left open."""
        return self.solution.undetermined

    @property
    def iterations(self) -> int:
        """Applications of the system; 0 for a closed form or a dense solve."""
        return self.solution.iterations

    @property
    def smallest_singular_value(self) -> float:
        """Of the row-scaled system."""
        return self.solution.smallest_singular_value


def error_of(solution: Solution, system: LayerSystem | NormSystem, above: float) -> float:
    """Worst-case relative error: what is unexplained, over the smallest singular value."""
    spare = max(system.equations - system.unknowns, 0) / max(system.equations, 1)
    noise = solution.residual / math.sqrt(spare) if spare > 0.05 else max(solution.residual, above)
    if solution.smallest_singular_value <= 0:
        return math.inf
    return noise * solution.largest_singular_value / solution.smallest_singular_value

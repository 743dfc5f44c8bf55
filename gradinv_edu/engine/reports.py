"""What one layer's equations gave, and how far it may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..systems import LayerSystem
from .norm_system import NormSystem
from .solve import Solution

__all__ = ["TOLERANCES", "LayerReport", "error_of", "multiple", "table"]

ALIKE = 1e-9  # relative difference of two multiples: rounding alone
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

    def scaled(self, s: float) -> LayerReport:
        """Return the report of ``s`` times this input."""
        return replace(self, solution=replace(self.solution, x=s * self.inputs))


def error_of(solution: Solution, system: LayerSystem | NormSystem, above: float) -> float:
    """Worst-case relative error: what is unexplained, over the smallest singular value."""
    spare = max(system.equations - system.unknowns, 0) / max(system.equations, 1)
    noise = solution.residual / math.sqrt(spare) if spare > 0.05 else max(solution.residual, above)
    if solution.smallest_singular_value <= 0:
        return math.inf
    return noise * solution.largest_singular_value / solution.smallest_singular_value


def multiple(x: Tensor | None, other: Tensor | None) -> float:
    """``s`` of ``other = s x``; zero where there is none."""
    if x is None or other is None:
        return 0.0
    s = float((x * other).sum() / x.square().sum())
    return s if float((other - s * x).norm()) <= ALIKE * float(other.norm()) else 0.0


def table(reports: Sequence[LayerReport]) -> Iterator[str]:
    """A line for each layer, under a head."""
    yield f"{'layer':<16}{'unknowns':>9}{'equations':>10}{'residual':>10}{'rank':>11}"
    for r in reports:
        yield (
            f"{r.name:<16}{r.unknowns:>9}{r.equations:>10}{_bound(r.residual):>10}"
            f"{'full' if r.full_rank else 'deficient':>11}"
            + (f", {r.unsettled} units with two inputs unsettled" if r.unsettled else "")
            + (f", up to {r.hidden}" if r.hidden else "")
        )


def _bound(residual: float) -> str:
    """Rough upper bound, the same on every machine that rounds a little differently."""
    bounds = (1e-12, 1e-8, 1e-5, 1e-2)
    return next((f"< {b:.0e}" for b in bounds if residual < b), "> 1e-02")

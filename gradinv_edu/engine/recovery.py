"""The walk that recovers: each layer's equations solved, from what the layers above gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import InconsistentGradientError
from ..fully_connected import recover_input
from ..systems import LayerSystem
from . import block, kinks
from .graph import Step
from .layers import pack, pull_back, weight_names
from .layers.branches import Block
from .low_rank import rank_one
from .progress import bar
from .solve import Solution
from .walk import Group, State, Walk

__all__ = ["TOLERANCES", "LayerReport", "Recovering", "closed_form"]

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
        own gradient put right (:func:`gradinv_edu.engine.kinks.settle`).
    """

    name: str
    unknowns: int
    equations: int
    solution: Solution = field(repr=False)
    error: float
    turned: int = 0

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


class Recovering(Walk):
    """One descent.

    Parameters
    ----------
    steps : sequence of Step
        The model.
    gradients : mapping of str to Tensor
        What was sent, float64, by the names of the model's parameters.
    dtype : torch.dtype
        The coarsest precision in which it was sent.
    batch_size : int
        Number of samples.
    generator : torch.Generator, optional
        Of the random starts that test ranks.
    progress : bool
        Whether to show a bar for each layer.
    strict : bool
        Whether to turn back where a layer contradicts those above, for there are other answers.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        gradients: Mapping[str, Tensor],
        dtype: torch.dtype,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        progress: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(steps, generator)
        self.gradients, self.dtype, self.batch_size = gradients, dtype, batch_size
        self.progress, self.strict = progress, strict
        self.eps = torch.finfo(dtype).eps
        self.consistent, self.accurate = TOLERANCES[dtype]
        self.reports: list[LayerReport] = []
        self.kept: dict[str, Tensor] = {}  # scaled masks of dropouts in train mode

    @property
    def full_rank(self) -> bool:
        """Whether every layer so far was determined."""
        return all(report.full_rank for report in self.reports)

    @property
    def determined(self) -> bool:
        """Whether every layer was determined, and consistent within the gradient's precision."""
        return self.full_rank and all(
            r.residual <= self.consistent and r.error <= self.accurate for r in self.reports
        )

    def gradient(self, step: Step, parameter: str) -> Tensor | None:
        """Gradient of one of a step's parameters, if it was sent."""
        return self.gradients.get(f"{step.name}.{parameter}" if step.name else parameter)

    def arrive(self, state: State, below: int) -> State:
        """Turn back at a contradiction."""
        last = self.reports[-1]
        if self.strict and self.full_rank and last.residual > 1e3 * self.consistent:
            raise InconsistentGradientError(
                f"The equations of {last.name} contradict the layers above (residual "
                f"{last.residual:.1g}): this branch does not explain the gradient."
            )
        return state

    def undo(self, step: Step, state: State) -> State:
        """As every walk, with an eye on units near a kink and on the masks of dropouts."""
        turn = None
        if state.turn is None:  # of two kinks in a row, neither is settled
            turn = step.rule.turn(state.value, state.k)
        if turn is not None:
            reach = max(state.error, 10 * state.noise) * state.value.square().mean().sqrt()
            turn = turn * (state.value.abs() <= reach)
        if not self.full_rank:  # a least-norm answer may lie outside the range
            state = replace(state, value=step.rule.clamp(state.value))
        if step.rule.random:
            self.kept[step.name] = step.rule.undo(state.value, step.name, state.noise).slope
        turn = None if turn is None or not bool(turn.any()) else turn
        return replace(super().undo(step, state), turn=turn)

    # --- one layer ----------------------------------------------------------------------------

    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Solve one layer's equations; with those below where they are too few."""
        if group.dense and state.k.dim() == 2:
            solved = self._dense(group, state)
            if solved is not None:
                return solved, below
        module, gradient = group.module, self._packed(group)
        weighted = bool(weight_names(module))

        def solve(k: Tensor) -> tuple[LayerSystem, Solution]:
            system = LayerSystem(module, k, group.input_shape, state.weight)
            system = system.without(gradient=True) if weighted and gradient is None else system
            with bar(group.name, self.progress) as progress:
                solution = system.solve(
                    state.value,
                    gradient,
                    noise=self.eps,
                    generator=self.generator,
                    progress=progress,
                )
            return system, solution

        (system, solution), turned = solve(state.k), 0
        if state.turn is not None and gradient is not None and solution.full_rank:
            system, solution, turned = self.settle(system, solution, gradient, state.turn, solve)
        error = _error(solution, system, state.error)
        k = pull_back(module, system.k, solution.x)
        found = State(solution.x, None, k, max(3 * solution.residual, self.eps), error)
        if not solution.full_rank:
            borrowed = self._borrow(group, state, system, solution, k, below, gradient)
            if borrowed is not None:
                return borrowed
        report = LayerReport(group.name, system.unknowns, system.equations, solution, error, turned)
        self.reports.append(report)
        return found, below

    def settle(
        self,
        system: LayerSystem,
        solution: Solution,
        gradient: Tensor,
        turn: Tensor,
        solve: Callable[[Tensor], tuple[LayerSystem, Solution]],
    ) -> tuple[LayerSystem, Solution, int]:
        """Turn the units above that the layer's own gradient shows on the other side."""
        return kinks.settle(system, solution, gradient, turn, solve)

    def _packed(self, group: Group) -> Tensor | None:
        """Weight gradients of a group in one tensor; None where one was not sent."""
        gradients: dict[str, Tensor] = {}
        for step in group.steps:
            for name in weight_names(step.module):
                value = self.gradient(step, name)
                if value is None:
                    return None
                gradients[f"{step.name}.{name}"] = value
        return pack(gradients) if gradients else None

    def _borrow(
        self,
        group: Group,
        state: State,
        system: LayerSystem,
        solution: Solution,
        k: Tensor,
        below: int,
        gradient: Tensor | None,
    ) -> tuple[State, int] | None:
        """Solve with layers below what this one lacks."""
        missing = max(1, round(solution.undetermined * system.unknowns))
        rows = system.right_hand_side(state.value, gradient)
        with bar(f"{group.name} with layers below", self.progress) as progress:
            found = self.together(
                system, rows, missing, below, tolerance=self.consistent, progress=progress
            )
        if found is None:
            return None
        floors, solved, below = found
        account = replace(solved.solution, x=solved.inputs[0])
        error = max(account.residual, self.eps) * account.condition
        name = "+".join([*(floor.name for floor in floors), group.name])
        unknowns = solved.solution.x.numel()
        self.reports.append(LayerReport(name, unknowns, solved.equations, account, error))
        for floor, z in zip(reversed(floors), reversed(solved.outputs), strict=True):
            slope = floor.activate(z)[1].reshape(z.shape)
            k = pull_back(floor.module, k.reshape(z.shape) * slope, floor.like)
        noise = max(3 * account.residual, self.eps)
        return State(solved.inputs[0], None, k, noise, error), below

    def branches(self, step: Step, state: State) -> State:
        """Solve a block of branches as one."""
        assert isinstance(step.module, Block)
        names = step.parameters()
        sent = {own: self.gradients[known] for own, known in names if known in self.gradients}
        system = block.BlockSystem(step.module, state.k, sent, state.weight)
        with bar(step.name, self.progress) as progress:
            solution = block.solve(
                system,
                state.value,
                step.input_shape,
                noise=self.eps,
                generator=self.generator,
                progress=progress,
            )
        spread = solution.largest_singular_value / max(solution.smallest_singular_value, 1e-300)
        error = max(solution.residual, self.eps) * spread
        equations = system.weight_equations + system.gradient_equations
        self.reports.append(LayerReport(step.name, solution.x.numel(), equations, solution, error))
        k = pull_back(step.module, state.k, solution.x)
        return State(solution.x, None, k, max(3 * solution.residual, self.eps), error)

    # --- dense layers -------------------------------------------------------------------------

    def _dense(self, group: Group, state: State) -> State | None:
        """Closed form, where the layer's own gradient gives it."""
        step = group.steps[0]
        G, b = self.gradient(step, "weight"), self.gradient(step, "bias")
        if G is None:
            return None
        if len(state.k) == 1 and b is not None and bool(b.any()):
            x, k, residual, error = closed_form(G, b, self.eps)
        else:
            values = torch.linalg.svdvals(state.k)
            if len(values) < len(state.k) or not float(values[-1]) > 1e-9 * float(values[0]):
                return None
            k = state.k
            x = torch.linalg.pinv(k.T) @ G  # Kᵀ X = G, where the samples' k are independent
            residual = float((G - k.T @ x).norm()) / max(float(G.norm()), 1e-300)
            error = max(residual, state.error, self.eps) * float(values[0] / values[-1])
        with torch.no_grad():
            gap = step.module(x) - state.value
        weight = torch.ones_like(gap) if state.weight is None else state.weight
        off = float((weight * gap).norm() / (weight * state.value).norm().clamp_min(1e-300))
        return self.begin(step, x, k, max(residual, off), max(error, residual, off), error)

    def begin(
        self,
        step: Step,
        x: Tensor,
        k: Tensor,
        residual: float,
        error: float,
        below: float | None = None,
    ) -> State:
        """Report a dense layer's input, ``(N, n)``, found in closed form, and go below it."""
        solution = Solution(x, residual, 0, 0.0, 1.0, 1.0)
        outputs, inputs = math.prod(step.output_shape), math.prod(step.input_shape)
        unknowns = self.batch_size * inputs
        self.reports.append(LayerReport(step.name, unknowns, outputs * inputs, solution, error))
        noise = max(3 * residual, self.eps)
        k_below = pull_back(step.module, k, x)
        return State(x, None, k_below, noise, error if below is None else below)


def closed_form(G: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, float, float]:
    """Input and ``k`` of a dense layer with a bias, ``(1, …)``; residual, error of the input."""
    x = recover_input(G, b)
    residual = rank_one(G, b).residual
    k = (G @ x + b) / (1 + x.square().sum())
    spread = max(residual, eps) * math.hypot(float(G.norm()), float(b.norm()))
    error = spread / float(k.norm() * x.norm() + 1e-300)
    return x.unsqueeze(0), k.unsqueeze(0), residual, error


def _error(solution: Solution, system: LayerSystem, above: float) -> float:
    """Worst-case relative error: what is unexplained, over the smallest singular value."""
    spare = max(system.equations - system.unknowns, 0) / max(system.equations, 1)
    noise = solution.residual / math.sqrt(spare) if spare > 0.05 else max(solution.residual, above)
    if solution.smallest_singular_value <= 0:
        return math.inf
    return noise * solution.largest_singular_value / solution.smallest_singular_value

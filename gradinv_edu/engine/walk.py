"""One walk down the layers, from the loss to the input: what recovery and audit share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..systems import LayerSystem, ScaledSystem
from . import segment
from .graph import Step
from .krylov import Progress, Rows
from .layers import Rule
from .layers.branches import Branches

__all__ = ["Group", "State", "Walk", "head_of", "lowest_dense"]


@dataclass
class State:
    """What is known between two layers.

    Attributes
    ----------
    value : Tensor
        ``a``, the output of what is below.
    weight : Tensor or None
        Of each entry of ``a`` as an equation: 0 where it is not known; None: all are.
    k : Tensor
        ``∂L/∂a``.
    noise : float
        Of the value, relative to its largest entry.
    error : float
        Worst-case relative error so far.
    turn : Tensor or None
        What ``k`` gains where a unit is on the other side of its kink and that is in doubt.
    """

    value: Tensor
    weight: Tensor | None
    k: Tensor
    noise: float
    error: float
    turn: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Layers that are affine together: one with a weight, and the pools and norms above it."""

    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """Of the only layer, or of the first and the last."""
        first, last = self.steps[0], self.steps[-1]
        name = first.name if first is last else f"{first.name}+…+{last.name}"
        return name or first.rule.kind

    @property
    def kind(self) -> str:
        """Types of the layers."""
        return "+".join(s.rule.kind for s in self.steps if not s.rule.reshapes)

    @property
    def module(self) -> nn.Module:
        """All of them as one."""
        alone = len(self.steps) == 1
        return self.steps[0].module if alone else nn.Sequential(*[s.module for s in self.steps])

    @property
    def dense(self) -> bool:
        """Whether it is one dense layer on vectors, whose gradient gives its input away alone."""
        first = self.steps[0]
        flat = isinstance(first.module, nn.Linear) and len(first.input_shape) == 1
        return flat and len(self.steps) == 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first layer."""
        return self.steps[0].input_shape

    @classmethod
    def ending_at(cls, steps: Sequence[Step], position: int) -> Group:
        """A layer with a weight alone; a pool with everything down to the layer that feeds it."""
        group = [steps[position]]
        for below in reversed(steps[:position]):
            if group[0].rule.weighted:
                return cls(tuple(group))
            if not (below.rule.affine or below.rule.reshapes):
                break
            group.insert(0, below)
        return cls(tuple(group) if group[0].rule.weighted else (steps[position],))


def lowest_dense(steps: Sequence[Step], biased: Sequence[str]) -> int | None:
    """The dense layer on vectors closest to the input whose bias is among those named."""
    for index, step in enumerate(steps):
        bias = f"{step.name}.bias" if step.name else "bias"
        if Group((step,)).dense and bias in biased:
            return index
    return None


def head_of(steps: Sequence[Step]) -> int:
    """The dense layer whose outputs go into the loss.

    Raises
    ------
    UnsupportedLayerError
        If the model ends in something else.
    """
    weighted = [i for i, step in enumerate(steps) if step.rule.weighted]
    if not weighted:
        raise UnsupportedLayerError(
            "The model has no dense or convolutional layer: no parameter's gradient holds the "
            "input."
        )
    last = weighted[-1]
    after = [step for step in steps[last + 1 :] if not step.rule.reshapes]
    if after or not Group((steps[last],)).dense:
        culprit = after[-1] if after else steps[last]
        raise UnsupportedLayerError(
            f"The model ends in {culprit.name} ({culprit.rule.kind}); the recursion begins at a "
            "dense layer whose outputs go into the loss, or at any dense layer with a bias."
        )
    return last


class Walk(ABC):
    """From the output of a step down to the input, asking each layer's rule what it is.

    Parameters
    ----------
    steps : sequence of Step
        The model, as :func:`~gradinv_edu.engine.graph.trace` reads it.
    generator : torch.Generator, optional
        Of the random starts that test ranks.
    """

    def __init__(self, steps: Sequence[Step], generator: torch.Generator | None) -> None:
        self.steps, self.generator = steps, generator

    def descend(self, position: int, state: State) -> State:
        """Walk from the output of step ``position`` to the input of the first."""
        while position >= 0:
            step = self.steps[position]
            rule, below = step.rule, position - 1
            if rule.refusal is not None:
                state = self.refused(position, state)
            elif rule.reshapes:
                state = _reshaped(state, step)
            elif rule.elementwise:
                state = self.undo(step, state)
            elif isinstance(rule, Branches):
                state = self.branches(step, state)
            else:
                group = Group.ending_at(self.steps, position)
                state, below = self.layer(group, state, position - len(group.steps))
            state = self.arrive(state, below)
            position = below
        return state

    @abstractmethod
    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Take layers that give rows; state at their input, and the position below them."""

    @abstractmethod
    def branches(self, step: Step, state: State) -> State:
        """Take a block of branches."""

    def refused(self, position: int, state: State) -> State:
        """Meet a layer that cannot be inverted."""
        raise self.steps[position].rule.refused(self.steps[position].name)

    def arrive(self, state: State, below: int) -> State:
        """Look at what is known at the output of step ``below``."""
        return state

    def undo(self, step: Step, state: State) -> State:
        """Undo an elementwise layer; what cannot be known is masked."""
        known = torch.ones_like(state.value) if state.weight is None else state.weight
        somewhere = torch.where(known > 0, state.value, step.rule.inside)
        undone = step.rule.undo(somewhere, step.name, state.noise)
        both = known * undone.known
        weight = None if bool((both == 1).all()) else both
        k = state.k * undone.slope * (known > 0)
        return replace(state, value=undone.inputs, weight=weight, k=k)

    def together(
        self,
        system: LayerSystem,
        rows: Rows,
        missing: int,
        below: int,
        *,
        tolerance: float,
        progress: Progress | None = None,
    ) -> tuple[list[segment.Floor], segment.Segment, int] | None:
        """A deficient layer with as many of the layers below as it takes; None if none suffice."""
        floors: list[segment.Floor] = []
        while (found := self._floor(below, len(system.k))) is not None:
            floor, below = found
            floors.insert(0, floor)
            if sum(f.unknowns for f in floors) + system.unknowns > segment.LARGEST:
                return None
            if segment.spare_equations(floors, missing) < 0:
                continue
            solved = segment.solve(
                floors,
                ScaledSystem(system),
                rows,
                missing,
                tolerance=tolerance,
                progress=progress,
                generator=self.generator,
            )
            if solved.converged and solved.solution.full_rank:
                return floors, solved, below
        return None

    def _floor(self, position: int, batch: int) -> tuple[segment.Floor, int] | None:
        """The next layer below with what leads from it up, if all of it can be undone."""
        above: list[Rule] = []
        while position >= 0 and (
            self.steps[position].rule.reshapes or self.steps[position].rule.elementwise
        ):
            if self.steps[position].rule.random:
                return None
            above.insert(0, self.steps[position].rule)
            position -= 1
        if position < 0 or not self.steps[position].rule.affine:
            return None
        group = Group.ending_at(self.steps, position)
        device = next((p.device for p in group.module.parameters()), None)
        like = torch.zeros(batch, *group.input_shape, dtype=torch.float64, device=device)
        return segment.Floor(group.name, group.module, like, above), position - len(group.steps)


def _reshaped(state: State, step: Step) -> State:
    def shaped(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.reshape(len(part), *step.input_shape)

    value, k = shaped(state.value), shaped(state.k)
    assert value is not None and k is not None
    return replace(state, value=value, k=k, weight=shaped(state.weight), turn=shaped(state.turn))

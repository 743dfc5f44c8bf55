"""One walk down the layers, from the loss to the input: what recovery and audit share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import InconsistentGradientError, UnsupportedLayerError
from ..systems import LayerSystem, ScaledSystem
from . import preimages, segment
from .graph import Step
from .hidden import Hidden
from .krylov import Progress, Rows
from .layers import Rule, Undone, pack, weight_names
from .layers.branches import Branches
from .layers.convolution import Convolution
from .layers.norms import GroupNorm, Norm
from .norm_system import entries

__all__ = [
    "Group",
    "Stack",
    "State",
    "Walk",
    "head_of",
    "homogeneous",
    "lowest_dense",
    "positive",
]


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
    doubt : Doubt or None
        Both sides of units of which two inputs give one output.
    hidden : Hidden or None
        What a norm above hides of the value, such as a factor.
    floating : Tensor or None
        Bool: entries of an activation's output whose value is a guess, and whose ``k`` is not.
    """

    value: Tensor
    weight: Tensor | None
    k: Tensor
    noise: float
    error: float
    turn: Tensor | None = None
    doubt: preimages.Doubt | None = None
    hidden: Hidden | None = None
    floating: Tensor | None = None

    @property
    def sides(self) -> preimages.Sides:
        """What is known, with a weight for every entry."""
        weight = torch.ones_like(self.value) if self.weight is None else self.weight
        return preimages.Sides(self.value, self.k, weight)

    def chosen(self, sides: preimages.Sides) -> State:
        """Return the state once the sides of its units are settled."""
        weight = None if bool((sides.weight == 1).all()) else sides.weight
        return replace(self, value=sides.value, k=sides.k, weight=weight, doubt=None)


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

    def packed(self, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """Weight gradients in one tensor, by the model's names; None where one was not sent."""
        wanted: dict[str, Tensor] = {}
        for step in self.steps:
            names = dict(step.parameters())
            for own in weight_names(step.module):
                if names[own] not in gradients:
                    return None
                wanted[names[own]] = gradients[names[own]]
        return pack(wanted) if wanted else None

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


@dataclass(frozen=True)
class Stack:
    """Max pooling and the layers below it that are solved with it, lowest first.

    Attributes
    ----------
    steps : tuple of Step
        ``conv → norm → activation → pool``, with or without the norm and the activation.
    feeding : int
        How many of these lie below the convolution that feeds the pooling: none, or another
        convolution and its ReLU.
    """

    steps: tuple[Step, ...]
    feeding: int = 0

    @property
    def name(self) -> str:
        """Of the first and the last layer."""
        return f"{self.steps[0].name}+…+{self.steps[-1].name}"

    @property
    def conv(self) -> Step:
        """The convolution that feeds the pooling."""
        return self.steps[self.feeding]

    @property
    def activation(self) -> nn.Module | None:
        """Between the convolution and the pooling."""
        above = self.steps[self.feeding + 1 : -1]
        return next((s.module for s in above if not (s.rule.affine or s.rule.normalises)), None)

    @property
    def norm(self) -> Step | None:
        """Of its own statistics, right above the convolution, if there is one."""
        return next((step for step in self.steps if step.rule.normalises), None)

    @property
    def affine(self) -> nn.Module:
        """The convolution with its norm."""
        return _joined([s for s in self.steps[self.feeding : -1] if s.rule.affine])

    @property
    def biased(self) -> Step:
        """The layer whose bias is added last: the convolution, or its norm."""
        return [s for s in self.steps[self.feeding : -1] if s.rule.affine][-1]

    @property
    def below(self) -> nn.Module | None:
        """The convolution below, with its norm."""
        under = [s for s in self.steps[: self.feeding] if s.rule.affine]
        return _joined(under) if under else None

    @classmethod
    def under(cls, steps: Sequence[Step], position: int) -> Stack | None:
        """What feeds the pooling at ``position``, and the layer below where that is too little.

        None if it is fed by anything but a convolution.
        """
        first = _fed(steps, position)
        if first is None:
            return None
        conv, stack = steps[first], tuple(steps[first : position + 1])
        weights = sum(p.numel() for p in conv.module.parameters())
        relu = first > 0 and steps[first - 1].rule.rectifies
        normed = any(step.rule.normalises for step in stack)
        if relu and not normed and weights < math.prod(conv.input_shape):
            lower = _fed(steps, first)
            if lower is not None and not any(s.rule.normalises for s in steps[lower:first]):
                return cls((*steps[lower:first], *stack), first - lower)
        return cls(stack)


def _joined(steps: Sequence[Step]) -> nn.Module:
    return steps[0].module if len(steps) == 1 else nn.Sequential(*[s.module for s in steps])


def _fed(steps: Sequence[Step], position: int) -> int | None:
    """Position of the convolution that feeds a layer, through one activation and one norm."""
    bent = False
    for place in range(position - 1, -1, -1):
        rule = steps[place].rule
        if rule.refusal is not None:
            return None
        if isinstance(rule, Convolution):
            return place
        if isinstance(rule, GroupNorm) and rule.normalises:
            alone = place > 0 and isinstance(steps[place - 1].rule, Convolution)
            return place - 1 if alone else None
        if rule.random:
            return None
        if rule.elementwise and not rule.scales and not bent:
            bent = True
        elif not rule.scales:
            return None
    return None


def positive(steps: Sequence[Step], position: int) -> bool:
    """Whether no entry of a step's input is negative: it comes from a ReLU."""
    below = reversed(steps[:position])
    return next((s.rule.rectifies for s in below if not s.rule.pools), False)


def homogeneous(steps: Sequence[Step]) -> bool:
    """Whether ``f(s x) = s f(x)`` for ``s > 0``: no constant is added anywhere."""
    for step in steps:
        if step.rule.random or not (
            step.rule.affine or step.rule.reshapes or step.rule.homogeneous
        ):
            return False
        like = next(step.module.parameters(), torch.empty(0))
        with torch.no_grad():
            if bool(step.module(like.new_zeros(1, *step.input_shape)).any()):
                return False
    return True


def lowest_dense(steps: Sequence[Step], biased: Sequence[str]) -> int | None:
    """The dense layer on vectors closest to the input whose bias is among those named."""
    for index, step in enumerate(steps):
        if Group((step,)).dense and step.full_name("bias") in biased:
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
                state = self.branches(position, state)
            elif rule.pools and (stack := Stack.under(self.steps, position)) is not None:
                state, below = self.pool(stack, state, position - len(stack.steps))
            elif rule.pools:
                state = self.refused(position, state)
            elif isinstance(rule, Norm):
                state, below = self.normalised(position, state)
            else:
                group = Group.ending_at(self.steps, position)
                state, below = self.layer(group, state, position - len(group.steps))
            if state.hidden is not None:
                state = self.reveal(state, below)
            state = self.arrive(state, below)
            position = below
        return state

    @abstractmethod
    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Take layers that give rows; state at their input, and the position below them."""

    @abstractmethod
    def branches(self, position: int, state: State) -> State:
        """Take a block of branches."""

    @abstractmethod
    def pool(self, stack: Stack, state: State, below: int) -> tuple[State, int]:
        """Take max pooling with what feeds it; state at its input, and the position below."""

    @abstractmethod
    def normalised(self, position: int, state: State) -> tuple[State, int]:
        """Take a norm of its own statistics with the affine layer below it."""

    @abstractmethod
    def reveal(self, state: State, below: int) -> State:
        """Find what a norm above hides, where a bias or an activation below tells it."""

    def group_under(self, position: int, batch: int) -> Group:
        """The affine layer that a norm is taken with.

        UnsupportedLayerError where there is none, or one sample has no statistics of its own.
        """
        step = self.steps[position]
        if position > 0 and isinstance(step.rule, Norm):
            group = Group.ending_at(self.steps, position - 1)
            own = entries(step.rule, (batch, *step.input_shape))
            linear = all(s.rule.affine or s.rule.reshapes for s in group.steps)
            if linear and group.steps[0].rule.affine and own > 1:
                return group
        raise UnsupportedLayerError(
            f"{step.name} ({step.rule.kind}) cannot be inverted: {step.rule.reason}, and "
            "no dense or convolutional layer right below it says what that was."
        )

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
        if state.floating is not None:
            weight = both * ~state.floating
        found = replace(state, value=undone.inputs, weight=weight, k=k, floating=None)
        return replace(found, doubt=self._doubt(step, state, undone, found))

    def _doubt(
        self, step: Step, above: State, undone: Undone, found: State
    ) -> preimages.Doubt | None:
        """Both sides below a step: of the activation that has two, and carried on from it."""
        if above.doubt is None:
            if undone.other is None:
                return None
            known = above.sides.weight
            units = (undone.other.slope != undone.slope) & (known > 0)
            k = above.k * undone.other.slope * (known > 0)
            other = preimages.Sides(undone.other.inputs, k, known * undone.other.known)
            return preimages.Doubt(found.sides, other, units) if bool(units.any()) else None
        if undone.other is not None:
            raise UnsupportedLayerError(
                f"{step.name} ({step.rule.kind}) cannot be inverted: it is followed by another "
                "activation of which two inputs give one output, with no layer in between."
            )
        sides = above.doubt.other
        try:
            there = Walk.undo(self, step, above.chosen(sides))
        except InconsistentGradientError:  # this side cannot be: some value far from the first
            low = step.rule.clamp(sides.value)
            there = Walk.undo(self, step, above.chosen(replace(sides, value=low)))
        return preimages.Doubt(found.sides, there.sides, above.doubt.units)

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
            unknowns = sum(f.unknowns for f in floors) + system.unknowns
            if unknowns > segment.LARGEST:
                return None
            if not segment.within_reach(unknowns, segment.spare_equations(floors, missing)):
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
            if self.steps[position].rule.random or self.steps[position].rule.reorders:
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
    """Give the entries their places in the layer's input: pulling back does it, ones and all."""

    def shaped(part: Tensor) -> Tensor:
        like = state.value.new_zeros(len(part), *step.input_shape)
        return step.rule.pull(part.to(like), like).to(part.dtype)

    weight, turn = (None if t is None else shaped(t) for t in (state.weight, state.turn))
    value, k = shaped(state.value), shaped(state.k)
    doubt = None if state.doubt is None else state.doubt.map(shaped)
    return replace(state, value=value, k=k, weight=weight, turn=turn, doubt=doubt)

"""The walk that recovers: each layer's equations solved, from what the layers above gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import (
    GradientInversionError,
    InconsistentGradientError,
    InvalidTensorError,
    NotRecoveredError,
    UndeterminedScaleError,
)
from ..systems import LayerSystem
from . import blind, block, dense, kinks, normalised, preimages, unpool, unpool_normed
from .edges import Edges
from .graph import Step
from .hidden import (
    Hidden,
    bias_below,
    fitted,
    from_zero,
    last_bias,
    shifted,
    shifts,
    summed,
    unshaped,
)
from .layers import pull_back, weight_names
from .layers.branches import Block
from .layers.convolution import Conv
from .layers.norms import GroupNorm, Norm, RunningNorm
from .norm_system import NormSystem, Sent
from .progress import bar
from .propagation import total
from .reports import TOLERANCES, LayerReport, error_of
from .solve import Solution
from .walk import Group, Stack, State, Walk, positive

__all__ = ["Recovering"]

ALTERNATIONS = 5  # of a block's solution with the sides of the units above it


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
        self.buffers: Mapping[str, Tensor] = {}  # running statistics after the client's one step

    @property
    def full_rank(self) -> bool:
        """Whether every layer so far was determined."""
        return all(report.full_rank for report in self.reports)

    @property
    def doubtful(self) -> bool:
        """Whether the last layer's answer may be far from the truth without a contradiction."""
        last = self.reports[-1:]
        loose = any(r.residual <= self.consistent and r.error > self.accurate for r in last)
        return loose or not self.full_rank

    def blamed(self, error: InconsistentGradientError) -> GradientInversionError:
        """Below an answer in doubt, what does not fit says nothing of the gradient."""
        if not self.doubtful:
            return error
        return NotRecoveredError(
            f"{self.reports[-1].name} is not determined by its equations, and what was found for "
            f"it leads no further: {error}"
        )

    def determined(self, mismatch: float = math.inf) -> bool:
        """Whether every layer was determined, and consistent within the gradient's precision.

        Where the answer explains the whole gradient better, up to ``mismatch``, than one layer's
        equations were explained on the way, that layer's error is as much smaller, too.
        """
        return self.full_rank and all(
            r.residual <= self.consistent
            and r.error * (mismatch / r.residual if mismatch < r.residual else 1) <= self.accurate
            and not r.unsettled
            for r in self.reports
        )

    def gradient(self, step: Step, parameter: str) -> Tensor | None:
        """Gradient of one of a step's parameters, if it was sent."""
        return self.gradients.get(step.full_name(parameter))

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
            turn = step.rule.turn(state.value, state.k, state.noise)
        if turn is not None:
            reach = max(state.error, 10 * state.noise) * state.value.square().mean().sqrt()
            turn = turn * kinks.in_doubt(step.rule, state.value, state.noise, float(reach))
        if self.doubtful:  # it may lie outside the range
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
        module, gradient = group.module, group.packed(self.gradients)
        doubt, unsettled = state.doubt, 0
        if doubt is not None:
            sides, unsettled = preimages.settle(
                module, group.input_shape, gradient, doubt, self.generator
            )
            state = state.chosen(sides)
        weighted = bool(weight_names(module))

        def solve(
            k: Tensor, gradient: Tensor | None, before: Solution | None = None
        ) -> tuple[LayerSystem, Solution]:
            system = LayerSystem(module, k, group.input_shape, state.weight)
            system = system.without(gradient=True) if weighted and gradient is None else system
            with bar(group.name, self.progress) as progress:
                solution = system.solve(
                    state.value,
                    gradient,
                    noise=self.eps,
                    generator=self.generator,
                    progress=progress,
                    before=before,
                )
            return system, solution

        (system, solution), turned = solve(state.k, gradient), 0
        for _ in range(3 if doubt is not None and solution.full_rank else 0):
            assert doubt is not None
            with torch.no_grad():
                nearer = doubt.choose(doubt.nearer(module(solution.x)))
            if torch.equal(nearer.value, state.value):
                break
            state = state.chosen(nearer)
            system, solution = solve(state.k, gradient)
        if state.turn is not None and gradient is not None and solution.full_rank:
            system, solution, turned = self.settle(system, solution, gradient, state.turn, solve)
        error = error_of(solution, system, state.error)
        k = pull_back(module, system.k, solution.x)
        if not solution.full_rank:
            borrowed = self._borrow(group, state, system, solution, k, below, gradient)
            if borrowed is not None:
                if doubt is not None:  # fitted by what is to prove them
                    unproven = int(doubt.units.sum())
                    self.reports[-1] = replace(self.reports[-1], unsettled=unproven)
                return borrowed
        if doubt is not None:
            unsettled = self._unsettled(system, solution, doubt, unsettled)
        account = LayerReport(
            group.name, system.unknowns, system.equations, solution, error, turned, unsettled
        )
        return self.reached(account, k), below

    def reached(self, report: LayerReport, k: Tensor) -> State:
        """Note a layer whose input was found; what is known there."""
        self.reports.append(report)
        noise = max(3 * report.residual, self.eps)
        return State(report.inputs, None, k, noise, report.error)

    def _rounded(self, solution: Solution) -> float:
        """Error of an input: residual, or rounding, over the smallest singular value."""
        return max(solution.residual, self.eps) * solution.condition

    def _unsettled(
        self, system: LayerSystem, solution: Solution, doubt: preimages.Doubt, unsure: int
    ) -> int:
        """Units whose side the layer's equations do not prove."""
        if not solution.full_rank or solution.residual > self.consistent:
            return int(doubt.units.sum())
        proven = preimages.confirmed(system, doubt.units, self.generator)
        return max(unsure, int((doubt.units & ~proven).sum()))

    def settle(
        self,
        system: LayerSystem,
        solution: Solution,
        gradient: Tensor,
        turn: Tensor,
        solve: kinks.Solve,
    ) -> tuple[LayerSystem, Solution, int]:
        """Turn the units above that the layer's own gradient shows on the other side."""
        return kinks.settle(system, solution, gradient, turn, solve)

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
        name = "+".join([*(floor.name for floor in floors), group.name])
        unknowns, error = solved.solution.x.numel(), self._rounded(account)
        for floor, z in zip(reversed(floors), reversed(solved.outputs), strict=True):
            slope = floor.activate(z)[1].reshape(z.shape)
            k = pull_back(floor.module, k.reshape(z.shape) * slope, floor.like)
        return self.reached(LayerReport(name, unknowns, solved.equations, account, error), k), below

    def branches(self, position: int, state: State) -> State:
        """Solve a block of branches as one."""
        step = self.steps[position]
        assert isinstance(step.module, Block)
        if state.doubt is not None:
            return self._branches_in_doubt(position, state, state.doubt)
        if state.hidden is not None:
            raise _untold(state.hidden, step)
        system = block.BlockSystem(step.module, state.k, self._sent(step), state.weight)
        solution, hidden, rest = self._unfolded(position, state, system)
        if solution is None or rest > max(self.consistent, state.error):
            with bar(step.name, self.progress) as progress:
                joint = block.solve(
                    system,
                    state.value,
                    step.input_shape,
                    noise=self.eps,
                    generator=self.generator,
                    progress=progress,
                )
            if solution is None or system.residual(joint.x, state.value) < rest:
                solution, hidden = joint, None
        solution = system.cleaned(solution, state.value, self.eps)
        spread = solution.largest_singular_value / max(solution.smallest_singular_value, 1e-300)
        error = max(solution.residual, self.eps) * spread
        equations = system.weight_equations + system.gradient_equations
        k = pull_back(step.module, system.k, solution.x)
        report = LayerReport(step.name, solution.x.numel(), equations, solution, error)
        return replace(self.reached(report, k), hidden=hidden)

    def _sent(self, step: Step) -> dict[str, Tensor]:
        """Gradients of a step's parameters, by the names in the step."""
        names = step.parameters()
        return {own: self.gradients[known] for own, known in names if known in self.gradients}

    def _unfolded(
        self, position: int, state: State, system: block.BlockSystem
    ) -> tuple[Solution | None, Hidden | None, float]:
        """A block's input layer by layer, where their gradients are enough; what it leaves."""
        if self.batch_size > 1 or not system.gradients:
            return None, None, math.inf
        shape, below = self.steps[position].input_shape, positive(self.steps, position)
        edges = Edges(system.block, system.gradients, shape, state.noise, below)
        if not edges.settle(state.k, state.value, state.weight, state.turn):
            return None, None, math.inf
        assert edges.ks[-1] is not None
        solution, system.k = edges.solution, edges.ks[-1]
        system.row_mask = system.row_mask * (system.k == state.k)  # a unit misread tells no value
        return solution, edges.hidden, system.residual(solution.x, state.value)

    def pool(self, stack: Stack, state: State, below: int) -> tuple[State, int]:
        """Find the places of the maxima together with the input."""
        gradient = self.gradient(stack.conv, "weight")
        if gradient is None:
            raise InvalidTensorError(
                f"The update lacks {stack.conv.name}.weight, whose gradient tells where the maxima "
                f"of {stack.steps[-1].name} were."
            )
        if stack.norm is not None:
            return self._pool_normed(stack, stack.norm, gradient, state), below
        first = stack.steps[0]
        with bar(stack.name, self.progress) as progress:
            found = unpool.solve(
                stack.affine,
                stack.steps[-1].module,
                state.value,
                state.k,
                gradient,
                first.input_shape,
                activation=stack.activation,
                below=stack.below,
                noise=max(self.eps, state.noise / 10),
                weight=state.weight,
                sums=self.gradient(stack.biased, "bias"),
                generator=self.generator,
                progress=progress,
            )
        solution, x = found.solution, found.solution.x
        k = found.k
        if stack.below is not None:
            with torch.no_grad():
                inner = stack.below(x)
            k = pull_back(stack.affine, k, inner.clamp_min(0)) * (inner > 0)
        k = pull_back(stack.below or stack.affine, k, x)
        counts = (x.numel(), found.equations)
        report = LayerReport(stack.name, *counts, solution, self._rounded(solution))
        return self.reached(report, k), below

    def _pool_normed(self, stack: Stack, norm: Step, gradient: Tensor, state: State) -> State:
        """Likewise, where the norm in between takes its own statistics."""
        own = [self.gradient(norm, name) for name in ("weight", "bias")]
        if own[0] is None or own[1] is None or self.batch_size > 1:
            raise InvalidTensorError(
                f"Max pooling above {norm.name} ({norm.rule.kind}) in train mode is undone for one "
                "sample whose update holds the gradients of the norm's weight and bias."
            )
        assert isinstance(norm.rule, GroupNorm) and isinstance(stack.conv.module, Conv)
        count = math.prod(norm.output_shape[1:])
        with bar(stack.name, self.progress) as progress:
            found = unpool_normed.solve(
                stack.conv.module,
                norm.rule,
                stack.steps[-1].module,
                state.value,
                state.k,
                (gradient, own[0], own[1]),
                stack.conv.input_shape,
                activation=stack.activation,
                sent=self._statistics(norm, count),
                noise=max(self.eps, state.noise / 10),
                weight=state.weight,
                generator=self.generator,
                progress=progress,
            )
        error = self._rounded(found.solution)
        report = LayerReport(stack.name, found.unknowns, found.equations, found.solution, error)
        hidden = None if found.scaled else Hidden(norm.name, found.factor, found.unseen)
        return replace(self.reached(report, found.k), hidden=hidden)

    def _statistics(self, step: Step, entries: int) -> Sent | None:
        """What the client's buffers tell of a norm's ``μ`` and ``σ``."""
        rule = step.rule
        names = [f"{step.name}.running_{part}" for part in ("mean", "var")]
        if not isinstance(rule, RunningNorm) or not all(name in self.buffers for name in names):
            return None
        return Sent(*rule.statistics((self.buffers[names[0]], self.buffers[names[1]]), entries))

    # --- a convolution that needs nothing from above ------------------------------------------

    def blind(self, position: int) -> State | None:
        """Begin at a convolution, or a block with one inside, by its own gradient alone."""
        step = self.steps[position]
        if self.batch_size > 1:
            return None
        if isinstance(step.module, Block):
            return self._blind_block(position)
        conv, G = step.module, self.gradient(step, "weight")
        if G is None or not isinstance(conv, Conv) or not blind.possible(conv, step.input_shape):
            return None
        bias = self.gradient(step, "bias")
        if bias is None and position + 1 < len(self.steps):
            norm = self.steps[position + 1]
            bias = total(None, norm.rule, self.gradient(norm, "bias"))
        if bias is None:
            return None
        seen = blind.solve(conv, G, bias, step.input_shape, noise=self.eps)
        if seen is None:
            return None
        k = pull_back(conv, seen.k, seen.solution.x)
        return self._begun(step.name, G.numel(), seen.solution, k)

    def _blind_block(self, position: int) -> State | None:
        step = self.steps[position]
        sent = self._sent(step)
        if not sent or step.rule.refusal is not None:
            return None
        assert isinstance(step.module, Block)
        below = positive(self.steps, position)
        edges = Edges(step.module, sent, step.input_shape, self.eps, below, iterate=False)
        if not edges.settle():
            return None
        assert edges.ks[0] is not None
        equations = sum(found.equations for found in edges.found)
        state = self._begun(step.name, equations, edges.solution, edges.ks[0])
        if state is None or edges.hidden is None:
            return state
        try:
            return self.reveal(replace(state, hidden=edges.hidden), position - 1)
        except UndeterminedScaleError:
            return None

    def _begun(self, name: str, equations: int, solution: Solution, k: Tensor) -> State | None:
        error = self._rounded(solution)
        if not error <= self.accurate:
            return None
        return self.reached(LayerReport(name, solution.x.numel(), equations, solution, error), k)

    def _branches_in_doubt(self, position: int, state: State, doubt: preimages.Doubt) -> State:
        """Plain alternation; the fit is no proof, so that every unit is told as unsettled."""
        side = torch.zeros_like(doubt.units)
        for _ in range(ALTERNATIONS):
            found = self.branches(position, state.chosen(doubt.choose(side)))
            with torch.no_grad():
                new = doubt.nearer(self.steps[position].module(found.value))
            if torch.equal(new, side):
                break
            side = new
            self.reports.pop()
        else:
            found = self.branches(position, state.chosen(doubt.choose(side)))
        self.reports[-1] = replace(self.reports[-1], unsettled=int(doubt.units.sum()))
        return found

    # --- norms of their own statistics --------------------------------------------------------

    def normalised(self, position: int, state: State) -> tuple[State, int]:
        """Solve a norm and the affine layer below it as one."""
        step = self.steps[position]
        rule = step.rule
        assert isinstance(rule, Norm)
        group = self.group_under(position, len(state.value))
        if state.hidden is not None:
            raise _untold(state.hidden, step)
        sent = self._statistics(step, state.value.numel() // state.value.shape[1])
        system = NormSystem(
            group.module,
            rule,
            state.value,
            state.k,
            group.input_shape,
            group.packed(self.gradients),
            state.weight,
            sent=sent,
        )
        name = f"{group.name}+{step.name}"
        with bar(name, self.progress) as progress:
            found = normalised.solve(
                system, noise=self.eps, generator=self.generator, progress=progress
            )
        error = error_of(found.solution, system, state.error)
        report = LayerReport(name, found.unknowns, found.equations, found.solution, error)
        hidden = None if found.scaled else Hidden(step.name, found.factor, found.unseen)
        below = replace(self.reached(report, found.k), hidden=hidden)
        return below, position - 1 - len(group.steps)

    def reveal(self, state: State, below: int) -> State:
        """Factor by the gradient of the next bias, constants by what stands between."""
        hidden, x = state.hidden, state.value
        assert hidden is not None
        open_ = hidden.brief
        self.reports[-1] = replace(self.reports[-1], hidden=open_)
        index = bias_below(self.steps, below, hidden)
        by = floating = None
        unseen, place = hidden.unseen, unshaped(self.steps, below)
        if unseen is not None and place >= 0:
            if self.steps[place].rule.rectifies:
                x, floating = from_zero(x, unseen, state.noise)
                hidden, unseen = replace(hidden, unseen=None), None
                state = replace(state, value=x, hidden=hidden)
            else:
                by = shifts(self.steps, below, x, unseen)
        if unseen is not None and place >= 0 and by is None:
            last, count = self.reports[-1], int(unseen.max()) + 1
            # the layers below are solved as if the constants were zero
            solution = replace(last.solution, undetermined=count / last.unknowns)
            self.reports[-1] = replace(last, solution=solution)
        if index is None:
            return state
        told = last_bias(self.steps[index])
        assert told is not None
        sent = self.gradients.get(dict(self.steps[index].parameters())[told[0]])
        if sent is None or not bool(sent.any()):
            raise UndeterminedScaleError(
                f"{hidden.norm} leaves what is below it up to a factor, which the bias gradient of "
                f"{self.steps[index].name} would tell; it was not sent, or is zero."
            )
        between = self.steps[index + 1 : below + 1]
        curved = any(s.rule.elementwise and not s.rule.homogeneous for s in between)

        def placed(s: Tensor) -> Tensor:
            if by is None or hidden.unseen is None:
                return x
            return shifted(x, hidden.unseen, by(s))

        def predicted(s: Tensor) -> Tensor:
            value, k = hidden.times(placed(s), s), hidden.times(state.k, 1 / s)
            return summed(self.steps, below, index, value, k, state.noise, self.doubtful)

        told_by = f"{open_}, told by the bias of {self.steps[index].name}"
        self.reports[-1] = replace(self.reports[-1], hidden=told_by)
        found, spread = fitted(predicted, sent.reshape(-1), hidden, curved or by is not None)
        value, k = hidden.times(placed(found), found), hidden.times(state.k, 1 / found)
        noise, error = max(state.noise, spread), max(state.error, spread)
        state = replace(state, value=value, k=k, noise=noise, error=error, hidden=None)
        return replace(state, floating=floating)

    # --- dense layers -------------------------------------------------------------------------

    def _dense(self, group: Group, state: State) -> State | None:
        """Closed form, where the layer's own gradient gives it."""
        step = group.steps[0]
        G, b = self.gradient(step, "weight"), self.gradient(step, "bias")
        if G is None:
            return None
        if len(state.k) == 1 and b is not None and bool(b.any()):
            x, k, residual, error = dense.closed_form(G, b, self.eps)
        else:
            unsure = None if state.doubt is None else state.doubt.units
            found = dense.known_gradients(G, state.k, unsure, max(state.error, self.eps))
            if found is None:
                return None
            x, k, residual, error = found
        with torch.no_grad():
            z = step.module(x)
            if state.doubt is not None:
                state = state.chosen(state.doubt.choose(state.doubt.nearer(z)))
            gap = z - state.value
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
        report = LayerReport(step.name, self.batch_size * inputs, outputs * inputs, solution, error)
        state = self.reached(report, pull_back(step.module, k, x))
        return state if below is None else replace(state, error=below)


def _untold(hidden: Hidden, step: Step) -> UndeterminedScaleError:
    return UndeterminedScaleError(
        f"{hidden.norm} leaves what is below it up to a factor, and {step.name} "
        f"({step.rule.kind}) has no bias that tells it."
    )

"""From the loss to the picture: the layers' equations solved one after the other, last to first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from . import batches, fully_connected, joint, kinks, residual
from . import polish as polishing
from .activations import NORMS, clamp_to_range, undo
from .chain import Residual, Step, trace
from .errors import (
    GradientInversionError,
    InconsistentGradientError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from .sharing import Update, without_weight_decay
from .systems import LayerSolution, LayerSystem, pack, weight_names

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
    residual : float
        Relative norm of what the answer leaves unexplained.
    iterations : int
        Applications of the system; 0 for a closed form or a dense solve.
    full_rank : bool
        Whether the equations determine the whole input.
    undetermined : float
        Share of the input space left open.
    smallest_singular_value : float
        Of the row-scaled system.
    error : float
        Estimated relative error of this input: residual over smallest singular value.
    inputs : Tensor or None
        What was found for the layer's input, ``(N, *input_shape)``, float64; of the lowest
        layer where several are solved as one.
    turned : int
        Units above this layer that rounding had put on the wrong side of their kink, and that its
        own gradient put right (:func:`gradinv_edu.kinks.settle`).
    """

    name: str
    unknowns: int
    equations: int
    residual: float
    iterations: int
    full_rank: bool
    undetermined: float
    smallest_singular_value: float
    error: float
    inputs: Tensor | None = field(default=None, repr=False, compare=False)
    turned: int = 0


@dataclass(frozen=True)
class Candidate:
    """One answer: the input, the label, and how well it explains the whole gradient.

    Attributes
    ----------
    inputs : Tensor
        ``(N, *input_shape)``, float64.
    targets : Tensor
        Recovered labels: class indices ``(N,)`` for cross-entropy, else ``(1, outputs)``.
    layers : tuple of LayerReport
        From the layer where the recursion began down to the input.
    mismatch : float or None
        Largest relative difference, over the parameters, between the update and the gradient
        at this answer; ``None`` where the server cannot recompute it (several local steps).
    determined : bool
        Whether every layer had full rank and was consistent within the gradient's precision.
    """

    inputs: Tensor
    targets: Tensor | None
    layers: tuple[LayerReport, ...]
    mismatch: float | None
    determined: bool


@dataclass(frozen=True)
class Recovery:
    """What a server reads out of one update.

    Attributes
    ----------
    candidates : tuple of Candidate
        Every answer that explains the gradient (twins), best first; where none does, the best
        attempt.
    exact : bool
        True only where every layer was determined and consistent and one answer alone
        explains the whole gradient: the picture may be trusted.
    """

    candidates: tuple[Candidate, ...]
    exact: bool

    @property
    def inputs(self) -> Tensor:
        """Best answer, ``(N, *input_shape)``, float64."""
        return self.candidates[0].inputs

    @property
    def targets(self) -> Tensor | None:
        """Label of the best answer."""
        return self.candidates[0].targets

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Layer reports of the best answer, in the order of the recursion."""
        return self.candidates[0].layers

    @property
    def mismatch(self) -> float | None:
        """Gradient mismatch of the best answer."""
        return self.candidates[0].mismatch

    def __str__(self) -> str:
        head = f"{'layer':<16}{'unknowns':>9}{'equations':>10}{'residual':>10}{'rank':>11}"
        lines = [
            f"{r.name:<16}{r.unknowns:>9}{r.equations:>10}{_bound(r.residual):>10}"
            f"{'full' if r.full_rank else 'deficient':>11}"
            for r in self.layers
        ]
        twins = f", {len(self.candidates)} answers explain it" if len(self.candidates) > 1 else ""
        return "\n".join([head, *lines, f"exact: {self.exact}{twins}"])


def _bound(residual: float) -> str:
    """Rough upper bound, the same on every machine that rounds a little differently."""
    bounds = (1e-12, 1e-8, 1e-5, 1e-2)
    return next((f"< {b:.0e}" for b in bounds if residual < b), "> 1e-02")


@dataclass
class _State:
    """What is known at one edge of the chain, walking down."""

    value: Tensor  # a
    weight: Tensor | None  # of each entry of the value as an equation; None: all known
    k: Tensor  # ∂L/∂a
    noise: float  # of the value, relative to its largest entry
    error: float  # worst-case relative error so far
    turn: Tensor | None = None  # what k gains across a kink, where its side is in doubt


@dataclass
class _Walk:
    """One descent of the chain from a start."""

    steps: Sequence[Step]
    gradients: Mapping[str, Tensor]
    dtype: torch.dtype
    constraints: str
    progress: bool
    generator: torch.Generator | None
    polish: bool = False
    together: bool = True
    settle: bool = True
    batch_size: int = 1
    reports: list[LayerReport] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def consistent(self) -> float:
        return TOLERANCES[self.dtype][0]

    def gradient(self, step: Step, parameter: str) -> Tensor | None:
        return self.gradients.get(f"{step.name}.{parameter}" if step.name else parameter)

    @property
    def full_rank(self) -> bool:
        return all(r.full_rank for r in self.reports)

    @property
    def determined(self) -> bool:
        consistency, accuracy = TOLERANCES[self.dtype]
        return self.full_rank and all(
            r.residual <= consistency and r.error <= accuracy for r in self.reports
        )


def recover(
    model: nn.Module,
    update: Update,
    input_shape: tuple[int, ...],
    loss: nn.Module,
    *,
    constraints: str = "both",
    together: bool = True,
    settle: bool = True,
    polish: bool = False,
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Recovery:
    r""":math:`k_{\text{below}} = (W^\top k) \odot \sigma'(z_{\text{below}})`, layer after layer.

    The recursion from the loss, or from the lowest dense layer whose bias gradient gives ``k``
    directly, down to the input; a residual block
    (:class:`gradinv_edu.residual.ResidualSystem`) is one step of it.
    Implements :eq:`recursion-delta`.

    Parameters
    ----------
    model : nn.Module
        As the server sent it, in the mode the client trains in. A chain of dense and
        convolutional layers, average pooling, batch norm in eval mode, dropout, flattening
        and invertible activations or ReLU.
    update : Update
        What one client sent for one sample, or for ``batch_size`` of them in one step.
    input_shape : tuple of int
        Of one sample, such as ``(3, 32, 32)``.
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``.
    constraints : {"both", "weight", "gradient"}
        Which equations convolutions may use; one set alone for study.
    together : bool
        Solve a layer that lacks equations together with the layers below
        (:func:`gradinv_edu.joint.solve`); ``False`` for study.
    settle : bool
        Let a layer's own gradient tell on which side of their kink the units above it are, where
        rounding leaves that open (:func:`gradinv_edu.kinks.settle`); ``False`` for study.
    polish : bool
        Go on by Gauss-Newton on the whole gradient (:func:`gradinv_edu.polish.polish`), which wins
        back the digits that float32 gradients lose on the way down; its verdict replaces the
        layers'.
    batch_size : int
        Number of samples. Each keeps its own weight constraints, all share the summed gradient
        constraints; the last layer is undone by :func:`gradinv_edu.batches.recover_outputs`, so
        the loss is cross-entropy. The samples come back in the order of their labels.
    generator : torch.Generator, optional
        Of the random starts that test the rank, and of those of a batch's last layer.
    progress : bool
        Show a bar for each layer that is solved iteratively.

    Returns
    -------
    Recovery

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model or holds NaN or infinite entries.
    UnsupportedLayerError
        If a layer cannot be undone; the message names it.
    UndeterminedScaleError
        If no bias and no equation of the loss fixes the scale.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no input of this model explains the gradient.
    NotRecoveredError
        If the last layer's gradient cannot be taken apart into ``batch_size`` samples.

    Notes
    -----
    Source: Zhu and Blaschko (2021), for leaky ReLU, one logit and known labels; everything
    else here is this project's. Ground truth is never used: the label is recovered.
    """
    update.check(model)
    if update.weight_decay:
        update = without_weight_decay(model, update)
    steps = trace(model, input_shape, sums=True)
    device = next(model.parameters()).device
    dtype = _coarsest(update.gradients)
    gradients = {n: g.detach().to(device, torch.float64) for n, g in update.gradients.items()}
    walk = _Walk(steps, gradients, dtype, constraints, progress, generator, polish, together)
    walk.batch_size, walk.settle = batch_size, settle
    candidates = _candidates(walk, update, loss)
    return _judge(candidates, walk)


def _coarsest(gradients: Mapping[str, Tensor]) -> torch.dtype:
    return max((g.dtype for g in gradients.values()), key=lambda d: torch.finfo(d).eps)


def _candidates(walk: _Walk, update: Update, loss: nn.Module) -> list[Candidate]:
    starts, targets = _starts(walk, loss)
    found, failures = [], []
    for start, target in zip(starts, targets, strict=True):
        branch = replace(walk, reports=[], kept={})
        try:
            x = _descend(branch, *start, strict=len(starts) > 1)
        except InconsistentGradientError as error:
            failures.append((branch, start, target, error))
            continue
        found.append(_candidate(branch, x, target, update, loss))
    return found or [_best_effort(failures, update, loss)]


def _best_effort(
    failures: list[tuple[_Walk, tuple[int, _State], Tensor | None, InconsistentGradientError]],
    update: Update,
    loss: nn.Module,
) -> Candidate:
    """Follow the branch that got farthest, once more, without turning back at a contradiction."""
    branch, start, target, error = max(
        failures,
        key=lambda f: (
            len(f[0].reports),
            -min((r.residual for r in f[0].reports[-1:]), default=0.0),
        ),
    )
    if len(failures) == 1:
        raise error
    again = replace(branch, reports=[], kept={})
    return _candidate(again, _descend(again, *start, strict=False), target, update, loss)


def _candidate(
    walk: _Walk, x: Tensor, target: Tensor | None, update: Update, loss: nn.Module
) -> Candidate:
    mismatch = None
    if update.local_steps == 1 and target is not None:
        mismatch = _mismatch(walk, x, target, loss)
    found = Candidate(x, target, tuple(walk.reports), mismatch, walk.determined)
    return _polished(walk, found, loss) if walk.polish and mismatch is not None else found


def _polished(walk: _Walk, found: Candidate, loss: nn.Module) -> Candidate:
    """The candidate after Gauss-Newton, or as it was where that does not get off the ground."""
    assert found.targets is not None
    gradient_at = polishing.chain_gradient(walk.steps, walk.kept, loss, found.targets)
    try:
        better = polishing.polish(
            gradient_at, found.inputs, walk.gradients, walk.dtype, generator=walk.generator
        )
    except InconsistentGradientError:
        return found
    report = LayerReport(
        name="polish",
        unknowns=found.inputs.numel(),
        equations=sum(g.numel() for g in walk.gradients.values()),
        residual=better.mismatches[-1],
        iterations=better.iterations,
        full_rank=better.full_rank,
        undetermined=0.0,
        smallest_singular_value=better.smallest_singular_value,
        error=better.error,
        inputs=better.inputs,
    )
    accurate = better.error <= TOLERANCES[walk.dtype][1]
    return Candidate(
        inputs=better.inputs,
        targets=found.targets,
        layers=(*found.layers, report),
        mismatch=_mismatch(walk, better.inputs, found.targets, loss),
        determined=better.full_rank and better.at_noise and accurate,
    )


def _judge(candidates: list[Candidate], walk: _Walk) -> Recovery:
    tolerance = 100 * TOLERANCES[walk.dtype][0]

    def rank(c: Candidate) -> tuple[bool, float]:
        return (not c.determined, c.mismatch if c.mismatch is not None else 0.0)

    explaining = [c for c in candidates if c.mismatch is None or c.mismatch <= tolerance]
    best = sorted(explaining or candidates, key=rank)
    exact = len(best) == 1 and bool(explaining) and best[0].determined
    return Recovery(tuple(best), exact)


# --- where the recursion begins -------------------------------------------------------------


def _starts(walk: _Walk, loss: nn.Module) -> tuple[list[tuple[int, _State]], list[Tensor | None]]:
    """States from which to descend, each with the label that goes with it."""
    last = _last_weighted(walk.steps)
    if walk.batch_size != 1:
        return _batch_starts(walk, last, loss)
    lowest = _lowest_biased(walk)
    outputs = _outputs(walk, last, loss, needed=lowest is None)
    if lowest is not None:
        state = _from_bias(walk, lowest)
        return [(lowest, state)], [_target(outputs[0].target) if outputs else None]
    starts = []
    for output in outputs:
        x = output.x.unsqueeze(0)
        k = _pull_back(walk.steps[last].module, output.k.unsqueeze(0), x)
        error = max(output.residual, walk.eps)
        starts.append((last, _State(x, None, k, error, error)))
    return starts, [_target(o.target) for o in outputs]


def _batch_starts(
    walk: _Walk, last: int, loss: nn.Module
) -> tuple[list[tuple[int, _State]], list[Tensor | None]]:
    step, weight_gradient = _head(walk, last)
    if not isinstance(loss, nn.CrossEntropyLoss) or loss.label_smoothing or loss.weight is not None:
        raise UnsupportedLossError(
            "A batch is taken apart by the equations of softmax cross-entropy, without class "
            f"weights or label smoothing; got {loss!r}."
        )
    assert isinstance(step.module, nn.Linear)
    bias = step.module.bias
    sent = None if bias is None else walk.gradient(step, "bias")
    outputs = batches.recover_outputs(
        step.module.weight.detach(),
        None if bias is None else bias.detach(),
        weight_gradient.to(walk.dtype),
        sent,
        walk.batch_size,
        reduction=loss.reduction,
        generator=walk.generator,
    )
    starts = []
    for output in outputs:
        k = _pull_back(step.module, output.k, output.x)
        error = max(output.residual, walk.eps)
        starts.append((last, _State(output.x, None, k, error, error)))
    return starts, [o.targets for o in outputs]


def _target(target: Tensor) -> Tensor:
    return target.unsqueeze(0)


def _last_weighted(steps: Sequence[Step]) -> int:
    for index in range(len(steps) - 1, -1, -1):
        if steps[index].weighted:
            return index
    raise UnsupportedLayerError(
        "The model has no dense or convolutional layer: no parameter's gradient holds the input."
    )


def _lowest_biased(walk: _Walk) -> int | None:
    """Dense layer closest to the input whose bias gradient hands over ``k`` itself."""
    for index, step in enumerate(walk.steps):
        if isinstance(step.module, nn.Linear) and len(step.input_shape) == 1:
            bias = walk.gradient(step, "bias")
            sent = walk.gradient(step, "weight") is not None
            if sent and bias is not None and bool(bias.any()):
                return index
    return None


def _head(walk: _Walk, last: int) -> tuple[Step, Tensor]:
    """The dense layer whose outputs go into the loss, and its weight gradient."""
    step = walk.steps[last]
    after = [s for s in walk.steps[last + 1 :] if not s.reshaping]
    if not isinstance(step.module, nn.Linear) or len(step.input_shape) != 1 or after:
        culprit = after[-1] if after else step
        raise UnsupportedLayerError(
            f"The model ends in {culprit.name} ({type(culprit.module).__name__}); the recursion "
            "begins at a dense layer whose outputs go into the loss, or at any dense layer with "
            "a bias."
        )
    weight_gradient = walk.gradient(step, "weight")
    if weight_gradient is None:
        raise InvalidTensorError(
            f"The update lacks {step.name}.weight: the recursion begins at this layer's gradient."
        )
    return step, weight_gradient


def _outputs(walk: _Walk, last: int, loss: nn.Module, needed: bool) -> list[fully_connected.Output]:
    try:
        step, weight_gradient = _head(walk, last)
    except UnsupportedLayerError:
        if needed:
            raise
        return []
    assert isinstance(step.module, nn.Linear)
    bias = None if step.module.bias is None else step.module.bias.detach()
    try:
        return fully_connected.recover_output(
            loss,
            step.module.weight.detach(),
            bias,
            weight_gradient.to(walk.dtype),
            None if bias is None else walk.gradient(step, "bias"),
        )
    except GradientInversionError:
        if needed:
            raise
        return []


def _from_bias(walk: _Walk, index: int) -> _State:
    step = walk.steps[index]
    G, b = walk.gradient(step, "weight"), walk.gradient(step, "bias")
    assert G is not None and b is not None
    x, k, residual, error = _dense_from_bias(walk, G, b)
    k_below = _pull_back(step.module, k.unsqueeze(0), x.unsqueeze(0))
    return _State(x.unsqueeze(0), None, k_below, max(3 * residual, walk.eps), error)


def _dense_from_bias(walk: _Walk, G: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float, float]:
    x = fully_connected.recover_input(G, b)
    split = fully_connected.rank_one(G, b)
    k = (G @ x + b) / (1 + x.square().sum())
    spread = max(split.residual, walk.eps) * math.hypot(float(G.norm()), float(b.norm()))
    return x, k, split.residual, spread / float(k.norm() * x.norm() + 1e-300)


def _report_dense(walk: _Walk, step: Step, residual: float, error: float, x: Tensor) -> None:
    outputs, inputs = math.prod(step.output_shape), math.prod(step.input_shape)
    unknowns = walk.batch_size * inputs
    walk.reports.append(
        LayerReport(step.name, unknowns, outputs * inputs, residual, 0, True, 0.0, 1.0, error, x)
    )


# --- the walk -------------------------------------------------------------------------------


def _descend(walk: _Walk, index: int, state: _State, strict: bool) -> Tensor:
    """From the input of step ``index`` to the input of the chain."""
    if not walk.reports:
        _report_dense(walk, walk.steps[index], state.error, state.error, state.value)
    position = index - 1
    while position >= 0:
        step = walk.steps[position]
        if step.reshaping:
            state = _reshape(state, step)
        elif step.elementwise:
            state = _undo(walk, state, step)
        elif step.summing:
            state = _solve_sum(walk, state, step)
            if strict and walk.reports[-1].residual > 1e3 * walk.consistent:
                _contradict(walk)
        else:
            state, position = _solve(walk, state, position)
            if strict and walk.reports[-1].residual > 1e3 * walk.consistent:
                _contradict(walk)
            continue
        position -= 1
    return state.value


def _contradict(walk: _Walk) -> None:
    if walk.full_rank:
        last = walk.reports[-1]
        raise InconsistentGradientError(
            f"The equations of {last.name} contradict the layers above (residual "
            f"{last.residual:.1g}): this branch does not explain the gradient."
        )


def _reshape(state: _State, step: Step) -> _State:
    shape = (len(state.value), *step.input_shape)
    weight = None if state.weight is None else state.weight.reshape(shape)
    turn = None if state.turn is None else state.turn.reshape(shape)
    value, k = state.value.reshape(shape), state.k.reshape(shape)
    return replace(state, value=value, weight=weight, k=k, turn=turn)


def _undo(walk: _Walk, state: _State, step: Step) -> _State:
    known = torch.ones_like(state.value) if state.weight is None else state.weight
    somewhere = torch.where(known > 0, state.value, _inside(step.module))
    if not walk.full_rank:  # a least-norm answer may lie outside the range
        somewhere = clamp_to_range(step.module, somewhere)
    undone = undo(step.module, step.name, somewhere, state.noise)
    both = known * undone.known
    if isinstance(step.module, nn.modules.dropout._DropoutNd) and step.module.training:
        walk.kept[step.name] = undone.slope
    weight = None if bool((both == 1).all()) else both
    k = state.k * undone.slope * (known > 0)
    return replace(state, value=undone.inputs, weight=weight, k=k, turn=_turn(walk, state, step))


def _turn(walk: _Walk, state: _State, step: Step) -> Tensor | None:
    if not walk.settle or state.turn is not None:  # of two kinks in a row, neither is settled
        return None
    reach = max(state.error, 10 * state.noise)
    turn = kinks.turn(step.module, state.value, state.k, reach)
    return turn if bool(turn.any()) else None


def _inside(module: nn.Module) -> float:
    """Output at which to undo an entry that is not known anyway."""
    return 0.5 if isinstance(module, nn.Sigmoid | nn.Softplus) else 0.0


def _block(steps: Sequence[Step], position: int) -> list[Step]:
    """Steps down from ``position`` that are linear together: pools and the layer feeding them."""
    block = [steps[position]]
    if steps[position].weighted:
        return block
    if not steps[position].pooling:
        raise UnsupportedLayerError(_cannot(steps[position]))
    for below in reversed(steps[:position]):
        merges = below.pooling or below.reshaping or isinstance(below.module, NORMS)
        if below.weighted or merges:
            block.insert(0, below)
        if below.weighted:
            return block
        if not merges:
            break
    return [steps[position]]


def _cannot(step: Step) -> str:
    kind = type(step.module).__name__
    reason = "it is not linear in its input and cannot be undone entry by entry"
    if "MaxPool" in kind:
        reason = "it keeps one entry of each window and forgets which, and all the others"
    elif "Norm" in kind:
        reason = "it divides by statistics of its own input"
    return f"{step.name} ({kind}) cannot be inverted: {reason}."


def _solve(walk: _Walk, state: _State, position: int) -> tuple[_State, int]:
    """Input of the linear block that ends at ``position``, and the position below it."""
    block = _block(walk.steps, position)
    below = position - len(block)
    module = _as_module(block)
    if len(block) == 1 and isinstance(module, nn.Linear) and state.k.dim() == 2:
        solved = _solve_dense_layer(walk, state, block[0])
        if solved is not None:
            return solved, below
    gradient = _block_gradient(walk, block)
    withheld = gradient is None and walk.constraints == "both"
    constraints = "weight" if withheld else walk.constraints
    system = LayerSystem(
        module, state.k, block[0].input_shape, state.weight, constraints=constraints
    )
    turned = 0
    with _bar(walk, block) as bar:
        options: dict[str, Any] = {"progress": bar, "generator": walk.generator, "noise": walk.eps}
        solution = system.solve(state.value, gradient, **options)
        if state.turn is not None and gradient is not None and solution.full_rank:
            system, solution, turned = kinks.settle(
                system, solution, state.value, gradient, state.turn, **options
            )
    error = _error(solution, system, state.error)
    k = _pull_back(module, system.k, solution.inputs)
    noise = max(3 * solution.residual, walk.eps)
    lone = _State(solution.inputs, None, k, noise, error)
    if not solution.full_rank and walk.together and walk.constraints == "both":
        together = _solve_together(walk, state, block, system, solution, lone, below)
        if together is not None:
            return together
    walk.reports.append(_report(block, system, solution, error, turned))
    return lone, below


def _solve_sum(walk: _Walk, state: _State, step: Step) -> _State:
    """Input of a residual block."""
    assert isinstance(step.module, Residual)
    sent = {
        own: walk.gradients[known] for own, known in step.parameters() if known in walk.gradients
    }
    system = residual.ResidualSystem(
        step.module, state.k, sent, state.weight, constraints=walk.constraints
    )
    with _bar(walk, [step]) as bar:
        solved = residual.solve(
            system,
            state.value,
            step.input_shape,
            noise=walk.eps,
            generator=walk.generator,
            progress=bar,
        )
    reach = solved.largest_singular_value / max(solved.smallest_singular_value, 1e-300)
    error = max(solved.residual, walk.eps) * reach
    k = _pull_back(step.module, state.k, solved.inputs)
    walk.reports.append(
        LayerReport(
            step.name,
            solved.inputs.numel(),
            solved.equations,
            solved.residual,
            solved.iterations,
            solved.full_rank,
            solved.undetermined,
            solved.smallest_singular_value,
            error,
            solved.inputs,
        )
    )
    return _State(solved.inputs, None, k, max(3 * solved.residual, walk.eps), error)


def _as_module(block: list[Step]) -> nn.Module:
    return block[0].module if len(block) == 1 else nn.Sequential(*[s.module for s in block])


def _solve_together(
    walk: _Walk,
    state: _State,
    block: list[Step],
    system: LayerSystem,
    solution: LayerSolution,
    lone: _State,
    below: int,
) -> tuple[_State, int] | None:
    """A deficient layer with as many of the layers below as it takes; ``None`` if none suffice."""
    missing = max(1, round(solution.undetermined * system.unknowns))
    rows = system.right_hand_side(state.value, _block_gradient(walk, block))
    floors: list[joint.Floor] = []
    while (found := _next_floor(walk.steps, below, len(state.k))) is not None:
        floor, below = found
        floors.insert(0, floor)
        if sum(f.unknowns for f in floors) + system.unknowns > joint.LARGEST:
            return None
        if joint.spare_equations(floors, missing) < 0:
            continue
        with _bar(walk, block) as bar:
            solved = joint.solve(
                floors,
                system,
                rows,
                missing,
                tolerance=walk.consistent,
                progress=bar,
                generator=walk.generator,
            )
        if solved.converged and solved.full_rank:
            return _joint_state(walk, floors, block, solved, lone), below
    return None


def _next_floor(steps: Sequence[Step], position: int, batch: int) -> tuple[joint.Floor, int] | None:
    above: list[nn.Module] = []
    while position >= 0 and (steps[position].reshaping or steps[position].elementwise):
        if _random_step(steps[position]):
            return None
        above.insert(0, steps[position].module)
        position -= 1
    if position < 0 or not (steps[position].weighted or steps[position].pooling):
        return None
    block = _block(steps, position)
    floor = joint.Floor(_name(block), _as_module(block), block[0].input_shape, above, batch)
    return floor, position - len(block)


def _joint_state(
    walk: _Walk,
    floors: list[joint.Floor],
    block: list[Step],
    solved: joint.JointSolution,
    lone: _State,
) -> _State:
    error = max(solved.residual, walk.eps) * (
        solved.largest_singular_value / max(solved.smallest_singular_value, 1e-300)
    )
    name = "+".join([*(f.name for f in floors), _name(block)])
    walk.reports.append(
        LayerReport(
            name,
            solved.unknowns,
            solved.equations,
            solved.residual,
            solved.rounds,
            solved.full_rank,
            0.0,
            solved.smallest_singular_value,
            error,
            solved.inputs[0],
        )
    )
    k = lone.k
    for floor, z in zip(reversed(floors), reversed(solved.outputs), strict=True):
        _, slope = floor.activate(z)
        zero = torch.zeros(len(z), *floor.input_shape, dtype=z.dtype, device=z.device)
        k = _pull_back(floor.module, k.reshape(z.shape) * slope.reshape(z.shape), zero)
    noise = max(3 * solved.residual, walk.eps)
    return _State(solved.inputs[0], None, k, noise, error)


def _solve_dense_layer(walk: _Walk, state: _State, step: Step) -> _State | None:
    """Closed form, where the layer's own gradient gives it."""
    G, b = walk.gradient(step, "weight"), walk.gradient(step, "bias")
    assert isinstance(step.module, nn.Linear)
    if G is None:
        return None
    if len(state.k) > 1:
        return _solve_dense_batch(walk, state, step, G)
    if b is not None and bool(b.any()):
        x, k, residual, error = _dense_from_bias(walk, G, b)
    elif bool(state.k.any()):
        k = state.k[0]
        x = G.T @ k / k.square().sum()
        rest = float((G - torch.outer(k, x)).norm())
        residual = rest / max(float(G.norm()), 1e-300)
        error = max(residual, state.error, walk.eps)
    else:
        return None
    return _dense_state(walk, state, step, x.unsqueeze(0), k.unsqueeze(0), residual, error)


def _solve_dense_batch(walk: _Walk, state: _State, step: Step, G: Tensor) -> _State | None:
    """``Kᵀ X = G``, where the samples' output gradients are independent."""
    values = torch.linalg.svdvals(state.k)
    if len(values) < len(state.k) or not float(values[-1]) > 1e-9 * float(values[0]):
        return None
    x = torch.linalg.pinv(state.k.T) @ G
    residual = float((G - state.k.T @ x).norm()) / max(float(G.norm()), 1e-300)
    reach = float(values[0] / values[-1])
    error = max(residual, state.error, walk.eps) * reach
    return _dense_state(walk, state, step, x, state.k, residual, error)


def _dense_state(
    walk: _Walk, state: _State, step: Step, x: Tensor, k: Tensor, residual: float, error: float
) -> _State:
    assert isinstance(step.module, nn.Linear)
    residual = max(residual, _forward_gap(step.module, x, state))
    _report_dense(walk, step, residual, max(error, residual), x)
    k_below = _pull_back(step.module, k, x)
    return _State(x, None, k_below, max(3 * residual, walk.eps), error)


def _forward_gap(module: nn.Linear, x: Tensor, state: _State) -> float:
    """How far the layer's output at ``x`` is from the one that the layers above ask for."""
    with torch.no_grad():
        gap = module(x) - state.value
    weight = torch.ones_like(gap) if state.weight is None else state.weight
    return float((weight * gap).norm() / (weight * state.value).norm().clamp_min(1e-300))


def _block_gradient(walk: _Walk, block: list[Step]) -> Tensor | None:
    gradients: dict[str, Tensor] = {}
    for step in block:
        for name in weight_names(step.module):
            value = walk.gradient(step, name)
            if value is None:  # not sent: its equations are left out
                return None
            gradients[f"{step.name}.{name}"] = value
    return pack(gradients) if gradients else None


def _error(solution: LayerSolution, system: LayerSystem, above: float) -> float:
    """Worst-case relative error: what is unexplained, over the smallest singular value."""
    equations = system.weight_equations + system.gradient_equations
    spare = max(equations - system.unknowns, 0) / max(equations, 1)
    noise = solution.residual / math.sqrt(spare) if spare > 0.05 else max(solution.residual, above)
    if solution.smallest_singular_value <= 0:
        return math.inf
    reach = solution.largest_singular_value / solution.smallest_singular_value
    return noise * reach


def _report(
    block: list[Step], system: LayerSystem, solution: LayerSolution, error: float, turned: int
) -> LayerReport:
    return LayerReport(
        name=_name(block),
        unknowns=system.unknowns,
        equations=system.weight_equations + system.gradient_equations,
        residual=solution.residual,
        iterations=solution.iterations,
        full_rank=solution.full_rank,
        undetermined=solution.undetermined,
        smallest_singular_value=solution.smallest_singular_value,
        error=error,
        inputs=solution.inputs,
        turned=turned,
    )


def _name(block: list[Step]) -> str:
    return block[0].name if len(block) == 1 else f"{block[0].name}+…+{block[-1].name}"


def _pull_back(module: nn.Module, k: Tensor, x: Tensor) -> Tensor:
    """``Jᵀ k`` at ``x``; ``Wᵀ k`` for a layer linear in its input."""
    pull = vjp(module, x)[1]
    below: Tensor = pull(k)[0]
    return below


class _bar:
    """A tqdm bar as the solver's progress, or nothing."""

    def __init__(self, walk: _Walk, block: list[Step]) -> None:
        self.shown, self.label = walk.progress, block[0].name

    def __enter__(self) -> _bar | None:
        if not self.shown:
            return None
        from tqdm.auto import tqdm

        self.bar = tqdm(desc=self.label, unit="it", leave=False)
        return self

    def __call__(self, iterations: int, residual: float) -> None:
        self.bar.update(1)
        if iterations % 20 == 0:
            self.bar.set_postfix(residual=f"{residual:.0e}")

    def __exit__(self, *error: object) -> None:
        if self.shown:
            self.bar.close()


# --- the check --------------------------------------------------------------------------------


def _mismatch(walk: _Walk, x: Tensor, target: Tensor, loss: nn.Module) -> float | None:
    """Largest relative difference, over the parameters, to the gradient at the answer."""
    dropped = [s for s in walk.steps if _random_step(s) and s.name not in walk.kept]
    if dropped:  # a mask that was never seen: the gradient cannot be recomputed
        return None
    found = polishing.chain_gradient(walk.steps, walk.kept, loss, target)(x)
    top = max(float(g.norm()) for g in walk.gradients.values())
    gaps = [
        _distance(found[n], g) / max(float(g.norm()), 1e-3 * top)
        for n, g in walk.gradients.items()
        if n in found
    ]
    return max(gaps)


def _distance(a: Tensor, b: Tensor) -> float:
    """``‖a − b‖``, some entries at a time: a difference as large as a layer is dear to allocate."""
    size = fully_connected.CHUNK
    parts = zip(torch.split(a.flatten(), size), torch.split(b.flatten(), size), strict=True)
    return math.hypot(*(float((one - other).norm()) for one, other in parts))


def _random_step(step: Step) -> bool:
    module = step.module
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0

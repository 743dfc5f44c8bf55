"""From the loss to the picture: the layers' equations solved one after the other, last to first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from . import checks
from .checks import checked
from .engine import losses, patches
from .engine.dense import closed_form
from .engine.explained import draws, unexplained
from .engine.explained import mismatch as mismatch_of
from .engine.graph import Step, trace
from .engine.polish import GradientAt, gradient_of
from .engine.polish import polish as polish_answer
from .engine.progress import bar, end_of, until
from .engine.recovery import Recovering
from .engine.reports import TOLERANCES, LayerReport, multiple, table
from .engine.walk import Stack, State, head_of, homogeneous, lowest_dense
from .errors import (
    GradientInversionError,
    InconsistentGradientError,
    InvalidTensorError,
)
from .labels import recover_labels
from .sharing import Update, observe, without_weight_decay

__all__ = ["Candidate", "LayerReport", "Recovery", "recover"]

EXPLAINED = 100.0  # times the tolerance of a layer: the largest mismatch of a whole gradient
TIES = 1e-9  # relative size of an entry, or of a difference, that is rounding alone


@dataclass(frozen=True)
class Candidate:
    """One answer: the input, the label, and how well it explains the whole gradient.

    Attributes
    ----------
    inputs : Tensor
        ``(N, *input_shape)``, float64.
    targets : Tensor or None
        Recovered labels: class indices ``(N,)`` for cross-entropy, else ``(N, outputs)``.
    layers : tuple of LayerReport
        From the layer where the recursion began down to the input.
    mismatch : float or None
        Largest relative difference, over the parameters, between the update and the gradient
        at this answer; where the server lacks a label or a mask to recompute it, the largest part
        of a gradient that this answer cannot have given; ``None`` for several local steps.
    determined : bool
        Whether every layer had full rank and was consistent within the gradient's precision.
    hidden : tuple of str
        What no gradient of this network tells of the input: the answer is right but for that.
    """

    inputs: Tensor
    targets: Tensor | None
    layers: tuple[LayerReport, ...]
    mismatch: float | None
    determined: bool
    hidden: tuple[str, ...] = ()


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
    ran_out : bool
        Whether the time given ran out. Where no descent had reached the input by then, ``inputs``
        is NaN, and ``layers`` holds what was found above it: the last one's ``inputs`` are as far
        down as the recursion came.
    """

    candidates: tuple[Candidate, ...]
    exact: bool
    ran_out: bool = False

    @property
    def inputs(self) -> Tensor:
        """Best answer, ``(N, *input_shape)``, float64."""
        return self.candidates[0].inputs

    @property
    def targets(self) -> Tensor | None:
        """Labels of the best answer."""
        return self.candidates[0].targets

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Layer reports of the best answer, in the order of the recursion."""
        return self.candidates[0].layers

    @property
    def mismatch(self) -> float | None:
        """Gradient mismatch of the best answer."""
        return self.candidates[0].mismatch

    @property
    def hidden(self) -> tuple[str, ...]:
        """What the network hides of the input; the best answer is right but for that."""
        return self.candidates[0].hidden

    def scaled(self) -> Tensor:
        r""":math:`x / \max x`: every sample's largest entry is one, as a picture's brightest is.

        For pictures in [0, 1] whose brightness is ``hidden``.
        """
        largest = self.inputs.flatten(1).amax(1).reshape(-1, *[1] * (self.inputs.dim() - 1))
        return self.inputs / largest

    def __str__(self) -> str:
        twins = f", {len(self.candidates)} answers explain it" if len(self.candidates) > 1 else ""
        hidden = [f"hidden: {what}" for what in self.hidden]
        ended = ["the time given ran out"] if self.ran_out else []
        verdict = f"exact: {'yes' if self.exact else 'no'}{twins}"
        return "\n".join([*table(self.layers), *hidden, *ended, verdict])


@checked
def recover(
    model: nn.Module,
    update: Update,
    input_shape: tuple[int, ...],
    loss: nn.Module,
    *,
    polish: bool = False,
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
    seconds: float | None = None,
    walk: type[Recovering] = Recovering,
) -> Recovery:
    r""":math:`k_{\text{below}} = (W^\top k) \odot \phi'(z_{\text{below}})`, layer after layer.

    The recursion from the loss, or from the lowest dense layer whose bias gradient gives ``k``
    directly, down to the input. A layer that lacks equations is solved together with those below
    (:func:`gradinv_edu.segments.solve_segment`), ways that part and meet again as one
    (:func:`gradinv_edu.segments.solve_block`). Implements :eq:`recursion-delta`.

    Parameters
    ----------
    model : nn.Module
        As the server sent it, in the mode the client trains in.
    update : Update
        What one client sent for one sample, or for ``batch_size`` of them in one step.
    input_shape : tuple of int
        Of one sample, such as ``(3, 32, 32)``.
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``.
    polish : bool
        Go on by Gauss-Newton on the whole gradient (:func:`gradinv_edu.segments.polish`),
        which wins back the digits that float32 gradients lose on the way down, and reads a
        ``hidden`` brightness from a norm's ε where that suffices; its verdict replaces the layers'.
    batch_size : int
        Number of samples. Each keeps its own weight constraints, all share the summed gradient
        constraints; the loss is cross-entropy. They come back in the order of their labels.
    generator : torch.Generator, optional
        Of the random starts that test ranks, and of those of a batch's last layer.
    progress : bool
        Show a bar for each layer that is solved iteratively.
    seconds : float, optional
        Time after which the recursion goes no further and gives what it has
        (``Recovery.ran_out``), NaN where it came to no input; no limit by default.
    walk : type
        A subclass goes down otherwise; the book takes single abilities out of it.

    Returns
    -------
    Recovery

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model or holds NaN or infinite entries.
    UnsupportedLayerError
        If a layer cannot be undone; the message names it.
    UnsupportedLossError, UndeterminedScaleError
        If no equation of the loss is known, or neither it nor a bias fixes the scale.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no input of this model explains the gradient.
    NotRecoveredError
        If the last layer's gradient cannot be taken apart into ``batch_size`` samples, or nothing
        leads on from a layer that is not determined.

    Notes
    -----
    Source: Zhu and Blaschko (2021), for leaky ReLU, one logit and known labels; everything
    else here is this project's. Ground truth is never used: the label is recovered.
    """
    end = end_of(seconds)
    embedding = patches.find(model, input_shape)
    if embedding is not None:
        return _by_positions(embedding, model, update, loss, batch_size)
    recursion = _Recursion(model, update, input_shape, loss, batch_size, generator, progress, walk)
    with until(end):
        return recursion.recover(polish)
    return recursion.so_far()


def _by_positions(
    embedding: patches.PatchEmbedding,
    model: nn.Module,
    update: Update,
    loss: nn.Module,
    batch_size: int,
) -> Recovery:
    """A vision transformer's picture: in closed form, whatever stands above the embedding."""
    update.check(model)
    update = without_weight_decay(model, update) if update.weight_decay else update
    dtype = max((g.dtype for g in update.gradients.values()), key=lambda d: torch.finfo(d).eps)
    gradients = {n: g.detach().double() for n, g in update.gradients.items()}
    size = checks.whole(batch_size, "batch_size")
    x, report = embedding.solve(gradients, size, torch.finfo(dtype).eps)
    targets = None
    with suppress(GradientInversionError):
        targets = recover_labels(model, update, loss)
    consistent, accurate = TOLERANCES[dtype]
    determined = report.full_rank and report.residual <= consistent and report.error <= accurate
    mismatch, unchecked = None, embedding.bias not in gradients and update.local_steps == 1
    if unchecked and targets is not None and not draws(model):
        own = observe(model, loss, x.to(embedding.conv.weight), targets)
        mismatch = mismatch_of(own.gradients, gradients)
    candidate = Candidate(x, targets, (report,), mismatch, determined)
    return Recovery((candidate,), determined and (mismatch or 0.0) <= EXPLAINED * consistent)


class _Recursion:
    """A recovery set up: its starts, its descents and their verdict."""

    def __init__(
        self,
        model: nn.Module,
        update: Update,
        input_shape: tuple[int, ...],
        loss: nn.Module,
        batch_size: int,
        generator: torch.Generator | None,
        progress: bool,
        walk: type[Recovering],
    ) -> None:
        update.check(model)
        self.batch_size = checks.whole(batch_size, "batch_size")
        update = without_weight_decay(model, update) if update.weight_decay else update
        self.update, self.loss = update, loss
        self.generator, self.progress, self.kind = generator, progress, walk
        self.steps: Sequence[Step] = trace(model, input_shape)
        self.device = device = next(model.parameters()).device
        self.found: list[Candidate] = []
        self.begun: list[tuple[_Start, Recovering]] = []
        self.ended: list[tuple[_Start, Recovering, State | InconsistentGradientError]] = []
        sent = update.gradients
        self.dtype = max((g.dtype for g in sent.values()), key=lambda d: torch.finfo(d).eps)
        self.gradients = {n: g.detach().to(device, torch.float64) for n, g in sent.items()}

    def walk(self, strict: bool = False) -> Recovering:
        """Begin a new descent."""
        walk = self.kind(
            self.steps,
            self.gradients,
            self.dtype,
            self.batch_size,
            self.generator,
            self.progress,
            strict,
        )
        walk.buffers = self.update.buffers if self.update.local_steps == 1 else {}
        return walk

    def recover(self, polish: bool = False) -> Recovery:
        """Descend from every start; best answer first."""
        starts = self._starts()
        found, failures = self.found, []
        for start in starts:
            walk = self.walk(strict=len(starts) > 1)
            self.begun.append((start, walk))
            try:
                found.append(self._candidate(walk, start, polish))
            except InconsistentGradientError as error:
                failures.append((len(walk.reports), start, walk.blamed(error)))
        if not found:
            if len(failures) == 1:
                raise failures[0][2]
            # the branch that got farthest, once more, without turning back at a contradiction
            _, start, _ = max(failures, key=lambda f: f[0])
            self.ended.clear()
            walk = self.walk()
            try:
                found.append(self._candidate(walk, start, polish))
            except InconsistentGradientError as error:
                raise walk.blamed(error) from error
        explaining = [c for c in found if c.mismatch is None or c.mismatch <= self._explains]
        best = sorted(explaining or found, key=_doubts)
        exact = len(best) == 1 and bool(explaining) and best[0].determined and not best[0].hidden
        return Recovery(tuple(best), exact)

    @property
    def _explains(self) -> float:
        """Largest mismatch of an answer that explains the update."""
        return EXPLAINED * TOLERANCES[self.dtype][0]

    def so_far(self) -> Recovery:
        """What was found before the time ran out: nothing of it is vouched for."""
        found = sorted(self.found, key=_doubts)
        if not found:
            shape = (self.batch_size, *self.steps[0].input_shape)
            x = torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)
            deepest = max(self.begun, key=lambda b: len(b[1].reports), default=None)
            targets = None if deepest is None else deepest[0].targets
            layers = () if deepest is None else tuple(deepest[1].reports)
            found = [Candidate(x, targets, layers, None, False)]
        return Recovery(tuple(found), exact=False, ran_out=True)

    # --- where the recursion begins -------------------------------------------------------------

    def _starts(self) -> list[_Start]:
        """Where to begin: the lowest place that needs nothing from above, else at the loss."""
        biased = [name for name, g in self.gradients.items() if bool(g.any())]
        sent = [n for n in biased if n.removesuffix("bias") + "weight" in self.gradients]
        lowest = lowest_dense(self.steps, sent) if self.batch_size == 1 else None
        blind = self._blind(len(self.steps) if lowest is None else lowest)
        if blind is not None:
            self._named(blind[0])
            return [_Start(*blind, targets) for targets in self._labels()]
        if lowest is None:
            place = head_of(self.steps)
            self._named(place)
            return [
                self._closed(place, head.inputs, head.k, head.residual, head.residual, head.targets)
                for head in self._heads()
            ]
        self._named(lowest)
        step = self.steps[lowest]
        G, b = (self.gradients[step.full_name(own)] for own in ("weight", "bias"))
        found = closed_form(G, b, torch.finfo(self.dtype).eps)
        return [self._closed(lowest, *found, targets) for targets in self._labels()]

    def _closed(
        self,
        place: int,
        x: Tensor,
        k: Tensor,
        residual: float,
        error: float,
        targets: Tensor | None,
    ) -> _Start:
        """At a dense layer whose input and ``k`` are known."""
        step, error = self.steps[place], max(error, torch.finfo(self.dtype).eps)
        begin = partial(Recovering.begin, step=step, x=x, k=k, residual=residual, error=error)
        return _Start(place, begin, targets, x)

    def _named(self, place: int) -> None:
        """Name what cannot be inverted before anything is solved."""
        for position, below in enumerate(self.steps[:place]):
            lost = below.rule.pools and Stack.under(self.steps, position) is None
            if lost or below.rule.refusal is not None:
                raise below.rule.refused(below.name)

    def _blind(self, place: int) -> tuple[int, Begin] | None:
        """The lowest step whose own gradient gives its input away, however it is used above."""
        if self.batch_size > 1 or self.update.local_steps > 1:
            return None
        for position in range(place):
            walk = self.walk()
            state = walk.blind(position)
            if state is not None:
                return position, partial(_again, reports=walk.reports, state=state)
        return None

    def _labels(self) -> Sequence[Tensor | None]:
        """What the last layer tells of the label; of twins with two, the whole gradient tells."""
        labels: list[Tensor] = []
        with suppress(GradientInversionError):
            for head in self._heads():
                if not any(torch.equal(head.targets, other) for other in labels):
                    labels.append(head.targets)
        return [*labels] or [None]

    def _heads(self) -> list[losses.Head]:
        """What the gradient of the last dense layer gives, by the loss that follows it."""
        rule = losses.rule(self.loss)
        step = self.steps[head_of(self.steps)]
        G = self.gradients.get(step.full_name("weight"))
        if G is None:
            raise InvalidTensorError(
                f"The update lacks {step.full_name('weight')}: the recursion begins at this "
                "layer's gradient."
            )
        assert isinstance(step.module, nn.Linear)
        bias = None if step.module.bias is None else step.module.bias.detach()
        sent = None if bias is None else self.gradients.get(step.full_name("bias"))
        return rule.heads(
            step.module.weight.detach(),
            bias,
            G.to(self.dtype),
            sent,
            batch_size=self.batch_size,
            generator=self.generator,
        )

    # --- what became of it ----------------------------------------------------------------------

    def _candidate(self, walk: Recovering, start: _Start, polish: bool) -> Candidate:
        end = self._descended(walk, start)
        x: Tensor = end.value
        hidden: tuple[str, ...] = ()
        if end.hidden is not None:
            x, hidden = end.hidden.times(x), end.hidden.words
        if not bool(torch.isfinite(x).all()):
            raise InconsistentGradientError(
                "The equations have no finite answer: a norm's statistics vanish for this input, "
                "or the update is of another model."
            )
        mismatch, targets, layers = None, start.targets, tuple(walk.reports)
        drawn = [s for s in self.steps if s.rule.random and not s.rule.normalises]
        unseen = [s for s in drawn if s.name not in walk.kept]
        determined = walk.determined()
        if self.update.local_steps == 1 and targets is not None and not unseen:
            gradient_at = gradient_of(self.steps, walk.kept, self.loss, targets)
            if polish:
                x, layers, determined = self._polished(walk, x, gradient_at)
                hidden = () if determined else hidden
            mismatch = mismatch_of(gradient_at(x), self.gradients)
            if mismatch > self._explains and any(s.rule.kinked or s.rule.pools for s in self.steps):
                ties = max(TIES, 10 * torch.finfo(self.dtype).eps)
                again = gradient_of(self.steps, walk.kept, self.loss, targets, ties)
                mismatch = min(mismatch, mismatch_of(again(x), self.gradients))
            determined = determined or walk.determined(mismatch)
        elif self.update.local_steps == 1:
            mismatch = unexplained(self.steps, self.gradients, x, walk.kept)
        return Candidate(x, targets, layers, mismatch, determined, hidden)

    def _descended(self, walk: Recovering, start: _Start) -> State:
        """Down to the input: ``f(s x) = s f(x)`` spares twins, ``s`` apart, a second descent."""
        below, state = start.place - 1, start.begin(walk)
        for first, before, end in self.ended if homogeneous(self.steps[: below + 1]) else ():
            s = multiple(first.x, start.x) if first.place == start.place else 0.0
            if s > 0 and isinstance(end, InconsistentGradientError):
                raise end
            if s > 0 and isinstance(end, State):
                walk.reports += [r.scaled(s) for r in before.reports[len(walk.reports) :]]
                return replace(end, value=s * end.value)
        try:
            end = walk.descend(below, walk.arrive(state, below))
        except InconsistentGradientError as error:
            self.ended.append((start, walk, error))
            raise
        self.ended.append((start, walk, end))
        return end

    def _polished(
        self, walk: Recovering, x: Tensor, gradient_at: GradientAt
    ) -> tuple[Tensor, tuple[LayerReport, ...], bool]:
        """After Gauss-Newton, or as it was where that does not get off the ground."""
        try:
            with bar("polish", self.progress) as moving:
                better = polish_answer(
                    gradient_at,
                    x,
                    self.gradients,
                    self.dtype,
                    generator=self.generator,
                    progress=moving,
                )
        except InconsistentGradientError:
            return x, tuple(walk.reports), walk.determined()
        equations = sum(g.numel() for g in self.gradients.values())
        report = LayerReport("polish", x.numel(), equations, better.solution, better.error)
        determined = better.solution.full_rank and better.at_noise
        determined = determined and better.error <= walk.accurate
        return better.solution.x, (*walk.reports, report), determined


Begin = Callable[[Recovering], State]


@dataclass(frozen=True)
class _Start:
    """A step whose input is known, how a walk begins there, and the label that goes with it."""

    place: int
    begin: Begin
    targets: Tensor | None
    x: Tensor | None = None  # that input


def _doubts(answer: Candidate) -> tuple[bool, float]:
    """What an answer is ordered by: the surest first."""
    return not answer.determined, answer.mismatch or 0.0


def _again(walk: Recovering, reports: Sequence[LayerReport], state: State) -> State:
    """Begin where another walk has begun."""
    walk.reports += reports
    return state

"""The walk that audits: each layer's rank at a random sample, before any data is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..systems import LayerSystem, ScaledSystem
from . import block
from .graph import Step
from .krylov import Progress
from .layers import Affine, Rule, rule_of
from .layers.branches import Block, Node
from .layers.convolution import Conv
from .recovery import TOLERANCES
from .solve import DENSE, Linearised, Solution, inertia_rank, rank_of, rank_test
from .walk import Group, State, Walk

__all__ = ["Auditing", "LayerAudit", "Passed", "Stop", "sample_pass", "system_matrix"]

INERTIA = 4096  # unknowns up to which the rank of a deficient layer is counted exactly
ENTRIES = 3e7  # of a matrix that is written out
BUDGET = 2e11  # multiplications that one iterative rank test may take
FEWEST = 20  # steps of such a test; with fewer it is not begun
BLOCK, BLOCK_STEPS = 8192, 1000  # unknowns of a block whose rank is tested, and most steps of it
TRIED = 2048  # unknowns of a block up to which it is solved as well


@dataclass(frozen=True)
class LayerAudit:
    """What one layer's equations can tell of its input, given that the layers above are undone.

    Attributes
    ----------
    name, kind : str
        Of the layer in the model, and its type; ``first+…+last`` where pooling is solved
        together with the layer that feeds it.
    unknowns : int
        Entries of the layer's input.
    weight_equations, gradient_equations : int
        Rows of ``W`` whose right-hand side is known (a ReLU's dead units are masked), rows of
        ``K``.
    rank : int
        Of both sets together; see ``method``.
    method : str
        How the rank was found: ``"closed form"`` (dense layers), ``"svd"``, ``"inertia"`` (both
        exact), ``"law"`` (:func:`gradinv_edu.rank.rank_law`), ``"gradient"`` or ``"weight"`` (these
        constraints alone determine everything), ``"iterative"`` (full rank by a matrix-free test),
        ``"at most"`` (an upper bound below the unknowns), ``"estimate"``, ``"undecided"`` (an
        upper bound, the test's budget was spent).
    recoverable : bool or None
        Whether the layer's own equations determine its input; ``None`` where undecided.
    together : tuple of str
        Layers below that make up for what this one lacks, if they do.
    settled : bool
        Whether an answer that takes iterations of its own, of a block or together with layers
        below, was found at the sample.
    needed : bool
        Whether the recursion passes here at all: it begins at the lowest dense layer with a bias.
    """

    name: str
    kind: str
    unknowns: int
    weight_equations: int
    gradient_equations: int
    rank: int
    method: str
    recoverable: bool | None
    together: tuple[str, ...] = ()
    settled: bool = False
    needed: bool = True

    @property
    def rank_index(self) -> int:
        """``rank − unknowns``: zero where the input is determined, else minus what is missing."""
        return self.rank - self.unknowns

    @property
    def deficiency(self) -> int:
        """Dimensions of the input that the layer's own equations leave open."""
        return self.unknowns - self.rank

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.needed:
            return "not needed"
        if self.recoverable:
            return "determined"
        if self.together:
            return f"determined together with {', '.join(self.together)}"
        if self.recoverable is None:
            return "undecided"
        bound = "at least " if self.method == "at most" else ""
        about = "about " if self.method == "estimate" else ""
        return f"{bound}{about}{self.deficiency} dimensions stay open"


@dataclass(frozen=True)
class Stop:
    """A place where the recursion cannot go on, and why.

    Attributes
    ----------
    name, kind : str
        Of the layer or operation.
    reason : str
        What it does to its input.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Passed:
    """A sample's way through the steps: input of each and the output, and the gradients there."""

    values: list[Tensor]
    gradients: list[Tensor]


def sample_pass(
    steps: Sequence[Step],
    x: Tensor,
    output_gradient: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
) -> Passed:
    """Send a sample through the steps, and an output gradient, made of its output, back."""
    with torch.enable_grad():
        values = [x.detach().clone().requires_grad_()]
        for step in steps:
            values.append(step.rule.sample(values[-1], generator))
        return _pulled(values, output_gradient(values[-1].detach(), generator))


def _pulled(values: list[Tensor], k: Tensor) -> Passed:
    found = torch.autograd.grad(values[-1], values, k, allow_unused=True)
    pairs = zip(values, found, strict=True)
    gradients = [torch.zeros_like(v) if g is None else g for v, g in pairs]
    return Passed([v.detach() for v in values], gradients)


class Auditing(Walk):
    """The walk of a recovery whose every layer is handed the truth of a sample.

    Parameters
    ----------
    steps : sequence of Step
        The model.
    passed : Passed
        The sample's way through it.
    begins : int
        Step at which the recursion begins.
    generator : torch.Generator
        Of the random starts that test ranks.
    """

    def __init__(
        self, steps: Sequence[Step], passed: Passed, begins: int, generator: torch.Generator
    ) -> None:
        super().__init__(steps, generator)
        self.passed, self.begins = passed, begins
        self.layers: list[LayerAudit] = []
        self.stops: list[Stop] = []
        self.carried: set[str] = set()  # layers determined by one above, together
        self.masked = False
        self.progress: Progress | None = None

    def run(self) -> None:
        """Walk from the output to the input."""
        last = len(self.steps) - 1
        self.descend(last, self.true(last, None))

    def true(self, position: int, weight: Tensor | None) -> State:
        """What is known at the output of a step, with the sample's own values."""
        value, k = self.passed.values[position + 1], self.passed.gradients[position + 1]
        return State(value, weight, k, torch.finfo(torch.float64).eps, 0.0)

    def arrive(self, state: State, below: int) -> State:
        """Replace what was found by the truth; what is masked stays so."""
        if self.progress is not None:
            self.progress(len(self.steps) - below, 0.0)
        return self.true(below, state.weight)

    def refused(self, position: int, state: State) -> State:
        """Note the stop; below, layers are counted as if it had been undone."""
        step = self.steps[position]
        if position <= self.begins:
            reason = step.rule.refusal
            assert reason is not None
            self.stops.append(Stop(step.name, step.rule.kind, reason))
        if isinstance(step.module, Block):
            self._inside(step, position)
        return replace(state, weight=None)

    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Count what one layer determines, alone or with those below."""
        needed = below + len(group.steps) <= self.begins
        found, system = self._examined(group.name, group, state)
        found = replace(found, needed=needed)
        if needed and found.recoverable is False and found.name not in self.carried:
            assert system is not None
            rows = ScaledSystem(system).forward(self.passed.values[below + 1])  # what is sent
            tolerance = TOLERANCES[torch.float64][0]
            borrowed = self.together(system, rows, found.deficiency, below, tolerance=tolerance)
            if borrowed is not None:
                names = tuple(floor.name for floor in borrowed[0])
                found = replace(found, together=names, settled=True)
                self.carried |= set(names)
        self.layers.append(found)
        return replace(state, weight=None), below

    def _examined(
        self, name: str, group: Group, state: State
    ) -> tuple[LayerAudit, LayerSystem | None]:
        """One layer's equations at the sample."""
        self.masked |= state.weight is not None
        n, k = math.prod(group.input_shape), state.k
        if group.dense and bool(k.any()):
            rows = k.numel() if state.weight is None else int(state.weight.sum())
            counts = (n, rows, k.numel() * n)
            return LayerAudit(name, group.kind, *counts, n, "closed form", True), None
        system = LayerSystem(group.module, k, group.input_shape, state.weight)
        counts = (system.unknowns, system.weight_equations, system.gradient_equations)
        rank, method, recoverable = _rank(system, self.generator)
        return LayerAudit(name, group.kind, *counts, rank, method, recoverable), system

    def branches(self, step: Step, state: State) -> State:
        """Count a block of branches as one system, linearised at the sample."""
        assert isinstance(step.module, Block)
        position = self.steps.index(step)
        x = self.passed.values[position]
        # where the walk stops anyway, what each layer inside could tell is more than a yes or no
        stopped = any(s.rule.refusal is not None for s in self.steps[: self.begins])
        if stopped or x.numel() > BLOCK:
            if x.numel() > BLOCK and position <= self.begins:
                reason = f"ways part and meet again: {x.numel()} unknowns are one joint system"
                self.stops.append(Stop(step.name, step.rule.kind, reason))
            self._inside(step, position)
            return replace(state, weight=None)
        self.masked |= state.weight is not None
        shapes = {name: torch.zeros_like(p) for name, p in step.module.named_parameters()}
        system = block.BlockSystem(step.module, state.k, shapes, state.weight)
        system.use("all")
        rank, method, recoverable = self._block_rank(system, x)
        settled = False
        if recoverable and x.numel() <= TRIED and position <= self.begins:
            found = system.gradients_at(x)
            tried = block.BlockSystem(step.module, state.k, found, state.weight)
            answer = block.solve(tried, state.value, step.input_shape, generator=self.generator)
            settled = answer.full_rank and answer.residual <= TOLERANCES[torch.float64][0]
            method = method if settled else "undecided"
            recoverable = settled or None
        self.layers.append(
            LayerAudit(
                name=step.name,
                kind=step.rule.kind,
                unknowns=x.numel(),
                weight_equations=system.weight_equations,
                gradient_equations=system.gradient_equations,
                rank=rank,
                method=method,
                recoverable=recoverable,
                settled=settled,
                needed=position <= self.begins,
            )
        )
        return replace(state, weight=None)

    def _block_rank(self, system: block.BlockSystem, x: Tensor) -> tuple[int, str, bool | None]:
        n, equations = x.numel(), system.weight_equations + system.gradient_equations
        if equations < n:
            return equations, "at most", False
        if n <= DENSE and n * equations <= ENTRIES:
            at = Linearised(system.rows, x)
            units = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape)
            rank = rank_of(torch.stack([at.forward(unit).flat() for unit in units], dim=1))
            return rank, "svd", rank == n
        assert self.generator is not None
        system.balance(x, self.generator)
        at = Linearised(system.rows, x)
        return _verdict(
            rank_test(at, x, cap=BLOCK_STEPS, generator=self.generator, spectrum=False), n, n
        )

    def _inside(self, step: Step, position: int) -> None:
        """Count the layers inside a block, each as if all the others were undone."""
        module, generator = step.module, self.generator
        assert isinstance(module, Block) and generator is not None
        with torch.enable_grad():
            leaf = self.passed.values[position].clone().requires_grad_()
            passed = _pulled(module.values(leaf, generator), self.passed.gradients[position + 1])
        for place in reversed(range(len(module.nodes))):
            node = module.nodes[place]
            rule = rule_of(node.module)
            if not rule.affine or rule.elementwise or len(node.sources) > 1:
                continue
            shapes = (passed.values[i].shape[1:] for i in (node.sources[0], place + 1))
            inner = Step(node.name, rule, *(tuple(shape) for shape in shapes))
            weight = _mask_above(module.nodes, passed, place)
            state = State(passed.values[place + 1], weight, passed.gradients[place + 1], 1e-16, 0.0)
            self.layers.append(self._examined(node.name, Group((inner,)), state)[0])


def _mask_above(nodes: Sequence[Node], passed: Passed, place: int) -> Tensor | None:
    """Outputs that elementwise layers right above leave known."""
    weight = None
    while True:
        users = [i for i, node in enumerate(nodes) if place + 1 in node.sources]
        rule: Rule | None = rule_of(nodes[users[0]].module) if len(users) == 1 else None
        if rule is None or not rule.elementwise:
            return weight
        place = users[0]
        known = rule.undo(passed.values[place + 1], nodes[place].name, 1e-16).known
        if not bool(known.all()):
            weight = known.to(torch.float64) * (1.0 if weight is None else weight)


# --- one system's rank ------------------------------------------------------------------------


def _rank(system: LayerSystem, generator: torch.Generator | None) -> tuple[int, str, bool | None]:
    """Rank, method and verdict, by the cheapest way that is certain."""
    n = system.unknowns
    rows = system.k.numel() + system.gradient_shape.numel()
    writable = n <= INERTIA and n * rows <= ENTRIES
    if n <= DENSE and writable:
        rank = rank_of(system_matrix(system))
        return rank, "svd", rank == n
    rule = rule_of(system.module)
    rule = rule if isinstance(rule, Affine) else Affine(system.module)
    known = torch.ones_like(system.k) if system.row_mask is None else system.row_mask
    bound, sure = rule.bounds(system.k, known != 0, system.input_shape)
    if bound < n:
        if writable:
            return min(inertia_rank(system_matrix(system)), bound), "inertia", False
        lawful = system.row_mask is None and isinstance(system.module, Conv)
        return bound, "law" if lawful else "at most", False
    if sure is not None:
        return n, sure, True
    shape = system.gradient_shape
    positions = system.k.numel() // (shape[0] if len(shape) > 1 else system.k.shape[1])
    price = 4 * n + 4 * shape.numel() * positions
    cap = int(min(10_000 + 4 * math.isqrt(n), BUDGET / price))
    found: tuple[int, str, bool | None] = min(bound, n), "undecided", None
    if cap >= FEWEST:
        A = ScaledSystem(system)
        fast = A.to(torch.float32)
        test = rank_test(A, cap=cap, generator=generator, fast=fast, spectrum=False)
        found = _verdict(test, n, bound)
    if not found[2] and writable:
        rank = inertia_rank(system_matrix(system))
        return rank, "inertia", rank == n
    return found


def _verdict(test: Solution, n: int, bound: int) -> tuple[int, str, bool | None]:
    if test.undetermined == 0:
        return n, "iterative", True
    if test.converged:
        return min(bound, n - 1, round(n * (1 - test.undetermined))), "estimate", False
    return min(bound, n), "undecided", None


def system_matrix(system: LayerSystem) -> Tensor:
    """Scaled rows that the masks leave, ``(equations, unknowns)``."""
    rows = system.to_dense(scaled=True)
    return rows if system.row_mask is None else rows[rows.abs().amax(dim=1) > 0]

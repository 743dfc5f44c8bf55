"""The walk that audits: each layer's rank at a random sample, before any data is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from ..errors import UndeterminedScaleError, UnsupportedLayerError
from ..systems import ScaledSystem
from . import blind
from .evidence import LADDER, Layer, counted, refined, sided
from .graph import Step
from .hidden import Hidden, bias_below, shifts, unshaped
from .joint import LARGEST, Branching, Normalising
from .krylov import Progress
from .layers import Rule, rule_of
from .layers.branches import Block, Node
from .layers.convolution import Conv
from .layers.norms import Norm
from .norm_system import entries
from .progress import until
from .recovery import Recovering
from .reports import TOLERANCES
from .verdicts import PLACES, LayerAudit, Stop, Verdict
from .walk import Group, Stack, State, Walk, positive

__all__ = ["Auditing", "Passed", "sample_pass"]


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

    The walk itself counts equations, no more. What takes time comes after it, from the input up:
    the layers there decide what leaks.

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

    # unknowns of a layer that is solved with those below even where a stop ends the walk: it is
    # long for more, and does not make the input exact
    mended = 3072

    def __init__(
        self, steps: Sequence[Step], passed: Passed, begins: int, generator: torch.Generator
    ) -> None:
        super().__init__(steps, generator)
        self.passed, self.begins = passed, begins
        self.layers: list[LayerAudit] = []  # from the output to the input, as they are met
        self.asked: dict[
            int, Layer | Branching | Normalising
        ] = {}  # what stands behind each of them
        self.waiting: set[int] = set()  # those with tests left
        self.stops: list[Stop] = []
        self.masked = False
        self.progress: Progress | None = None
        self._given = ""  # what a search above must find before the next layer's rows are known

    def run(self, end: float | None = None, told: Callable[[], None] | None = None) -> None:
        """Count every layer's equations, then test ranks until ``time.monotonic()`` is ``end``.

        Parameters
        ----------
        end : float, optional
            Without it, every test has a budget of operations.
        told : callable, optional
            Called after the counting, and after each layer.
        """
        last = len(self.steps) - 1
        bottom = self.descend(last, self.true(last, None))
        if bottom.hidden is not None and self.layers:
            self.layers[-1] = replace(self.layers[-1], hidden="; ".join(bottom.hidden.words))
        told = told or (lambda: None)
        told()
        for done, test in enumerate(self._tests(), 1):
            with until(end) as limit:
                test()
            if limit.passed:
                break
            if self.progress is not None:
                self.progress(done, 0.0)
            told()

    def starts_at(self, position: int) -> bool:
        """Whether a recovery begins here, by this step's own gradient alone."""
        step = self.steps[position]
        sent: dict[str, Tensor] = {}
        if not _may_begin(step):
            return False
        for place in (position, position + 1):
            if place < len(self.steps):
                sent |= self._gradients(place)
        walk = Recovering(self.steps, sent, torch.float64)
        return walk.blind(position) is not None

    def _gradients(self, position: int) -> dict[str, Tensor]:
        """What a client with the sample would send of one step."""
        step = self.steps[position]
        names = dict(step.parameters())
        if not names:
            return {}
        own = {name: p.detach().requires_grad_() for name, p in step.module.named_parameters()}
        with torch.enable_grad():
            constants = {**own, **dict(step.module.named_buffers())}
            out = functional_call(step.module, constants, (self.passed.values[position],))
            k = self.passed.gradients[position + 1]
            found = torch.autograd.grad(out, list(own.values()), k, allow_unused=True)
        return {names[n]: g for n, g in zip(own, found, strict=True) if g is not None}

    @property
    def untested(self) -> tuple[str, ...]:
        """Layers whose verdict the tests that are left may change."""
        open_ = [
            place
            for place in sorted(self.waiting, reverse=True)
            if self.layers[place].recoverable is None or self._borrows(place)
        ]
        return tuple(self.layers[place].name for place in open_)

    def true(self, position: int, weight: Tensor | None) -> State:
        """What is known at the output of a step, with the sample's own values."""
        value, k = self.passed.values[position + 1], self.passed.gradients[position + 1]
        return State(value, weight, k, torch.finfo(torch.float64).eps, 0.0)

    def arrive(self, state: State, below: int) -> State:
        """Replace what was found by the truth; what is masked stays so."""
        true, doubt = self.true(below, state.weight), state.doubt
        true = replace(true, hidden=state.hidden)
        if doubt is not None:
            sides = doubt.choose(doubt.nearer(true.value))
            true = replace(true.chosen(replace(sides, value=true.value, k=true.k)), doubt=doubt)
        return true

    def refused(self, position: int, state: State) -> State:
        """Note the stop; below, layers are counted as if it had been undone."""
        step = self.steps[position]
        if position <= self.begins:
            reason = step.rule.refusal or step.rule.reason
            self.stops.append(Stop(step.name, step.rule.kind, reason, Verdict.NOT))
        if isinstance(step.module, Block):
            self._inside(step, position)
        alike = step.input_shape == step.output_shape and not isinstance(step.module, Block)
        return state if alike and self._given else self._whole(state)

    def pool(self, stack: Stack, state: State, below: int) -> tuple[State, int]:
        """What the layers below hold once the places of the maxima are found."""
        position = below + len(stack.steps)
        step = self.steps[position]
        if position <= self.begins:
            reason = "it keeps one entry of each window and forgets which"
            self.stops.append(Stop(step.name, step.rule.kind, reason, Verdict.SEARCH))
        self._given = PLACES
        x, y = self.passed.values[position : position + 2]
        weight = _selected(step.rule, state.weight, x, y)
        return replace(state, weight=weight, doubt=None), position - 1

    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Count the equations of one layer."""
        self.masked |= state.weight is not None
        top = below + len(group.steps)
        above = self.steps[top + 1].rule if top + 1 < len(self.steps) else None
        layer = Layer(
            group=group,
            x=self.passed.values[below + 1],
            k=state.k,
            known=state.weight,
            needed=top <= self.begins,
            given=self._given,
            summed=_summed(group.module, above),
            generator=self.generator,
            doubt=state.doubt,
        )
        self._ask(layer, counted(layer))
        return self._whole(state), below

    def branches(self, position: int, state: State) -> State:
        """Count the equations of a block of branches, or of the layers inside."""
        step = self.steps[position]
        assert isinstance(step.module, Block)
        x = self.passed.values[position]
        lone = _lone(step.module, x)
        if lone is not None and position <= self.begins:
            why = "it takes the mean of one number a channel away, and leaves nothing of it"
            self.stops.append(Stop(lone, "norm in train mode", why))
        # where the walk stops anyway, what each layer inside could tell is more than a yes or no
        stopped = any(s.rule.refusal is not None for s in self.steps[: self.begins])
        if stopped or x.numel() > LARGEST:
            self._inside(step, position)
        self.masked |= state.weight is not None
        needed, below = position <= self.begins, positive(self.steps, position)
        asked = Branching(step, x, state, needed, self.generator, below)
        self._ask(asked, asked.counted())
        return self._whole(state)

    def normalised(self, position: int, state: State) -> tuple[State, int]:
        """Count the equations of a norm and the affine layer below it, σ and μ among unknowns."""
        step, needed = self.steps[position], position <= self.begins
        rule, below = step.rule, position - 1
        assert isinstance(rule, Norm)
        open_ = replace(self._whole(state), hidden=None)
        try:
            group = self.group_under(position, len(state.value))
            if state.hidden is not None and needed:
                raise UndeterminedScaleError(
                    f"no bias tells the factor that {state.hidden.norm} hides"
                )
        except (UnsupportedLayerError, UndeterminedScaleError) as error:
            if needed:
                why = rule.reason if isinstance(error, UnsupportedLayerError) else str(error)
                self.stops.append(Stop(step.name, rule.kind, why))
            return open_, below
        self.masked |= state.weight is not None
        below = position - 1 - len(group.steps)
        x = self.passed.values[below + 1]
        own = [self._gradients(place) for place in range(below + 1, position)]
        gradient = group.packed({name: g for sent in own for name, g in sent.items()})
        asked = Normalising(step.name, group, rule, x, state, gradient, needed, self.generator)
        self._ask(asked, asked.counted())
        if asked.system.has_tau or not needed:
            return open_, below
        hidden = Hidden(step.name, x.new_ones(asked.system.families), asked.system.unseen)
        return replace(open_, hidden=hidden), below

    def reveal(self, state: State, below: int) -> State:
        """A bias tells the factor, or nothing does yet; what tells the constants, or nothing."""
        hidden, last = state.hidden, len(self.layers) - 1
        assert hidden is not None
        if hidden.unseen is not None and below >= 0:
            x = self.passed.values[below + 1]
            place = unshaped(self.steps, below)
            relu = place >= 0 and self.steps[place].rule.rectifies
            if not relu and shifts(self.steps, below, x, hidden.unseen) is None:
                asked = self.asked[last]
                assert isinstance(asked, Normalising)
                self.asked[last] = replace(asked, lost=int(hidden.unseen.max()) + 1)
            hidden = replace(hidden, unseen=None)
        try:
            told = bias_below(self.steps, below, hidden) is not None
        except UndeterminedScaleError as error:
            step = self.steps[below]
            self.stops.append(Stop(step.name, step.rule.kind, str(error)))
            told = True
        return replace(state, hidden=None if told else hidden)

    def _whole(self, state: State) -> State:
        """At the input of a layer all is known."""
        self._given = ""
        return replace(state, weight=None, doubt=None)

    def _ask(self, asked: Layer | Branching | Normalising, found: LayerAudit) -> None:
        place = len(self.layers)
        self.layers.append(found)
        self.asked[place] = asked
        self.waiting.add(place)

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
            source = node.sources[0]
            shapes = (passed.values[i].shape[1:] for i in (source, place + 1))
            inner = Step(node.name, rule, *(tuple(shape) for shape in shapes))
            weight, given = _mask_above(module.nodes, passed, place)
            self.masked |= weight is not None
            above = [rule_of(n.module) for n in module.nodes if place + 1 in n.sources]
            layer = Layer(
                group=Group((inner,)),
                x=passed.values[source],
                k=passed.gradients[place + 1],
                known=weight,
                needed=position <= self.begins,
                given=given,
                block=step.name,
                summed=_summed(node.module, above[0] if len(above) == 1 else None),
                generator=generator,
            )
            self._ask(layer, counted(layer))

    # --- tests, after the walk --------------------------------------------------------------------

    def _tests(self) -> list[Callable[[], None]]:
        """In the order in which they are made."""
        upwards = sorted(self.asked, reverse=True)
        quick = [lambda p=p: self._climb(p, 0) for p in upwards]
        slow = [lambda p=p: self._climb(p, 1) for p in upwards]
        return [*quick, *slow, *(lambda p=p: self._borrow(p) for p in sorted(self.asked))]

    def _climb(self, place: int, step: int) -> None:
        """Look at one layer by one step of the ladder."""
        asked, found = self.asked[place], self.layers[place]
        if not isinstance(asked, Layer):
            found = asked.joint(found) if step else found
        else:
            for evidence in LADDER[step]:
                found = refined(asked, found, evidence)
            found = sided(asked, found) if not found.unsettled else found
        self._store(place, found)
        if step and not self._borrows(place):
            self.waiting.discard(place)

    def _store(self, place: int, found: LayerAudit) -> None:
        """What must be found first leaves the verdict open; one reader of a tensor is enough."""
        if found.given and found.recoverable:
            found = replace(found, recoverable=None)
        self.layers[place] = found
        asked = self.asked[place]
        for other, layer in self.asked.items():
            if other == place or not isinstance(layer, Layer) or layer.x is not asked.x:
                continue
            here, there = self.layers[place], self.layers[other]
            if here.recoverable and not there.recoverable:
                self.layers[other] = replace(there, together=(here.name,))
            elif there.recoverable and not here.recoverable:
                self.layers[place] = replace(here, together=(there.name,))

    def _borrows(self, place: int) -> bool:
        """Whether layers below may make up for what this one lacks."""
        asked, found = self.asked[place], self.layers[place]
        if not isinstance(asked, Layer) or asked.block or asked.given or not asked.needed:
            return False
        lacks = found.recoverable is False and not (found.known or found.unsettled)
        return lacks and any(s.rule.affine for s in self.steps[: self._below(asked) + 1])

    def _below(self, asked: Layer) -> int:
        return self.steps.index(asked.group.steps[0]) - 1

    def _borrow(self, place: int) -> None:
        """Solve a deficient layer together with those below it."""
        if self._borrows(place):
            asked, found = self.asked[place], self.layers[place]
            assert isinstance(asked, Layer)
            if self.stops and asked.unknowns > self.mended:
                return
            system, tolerance = asked.system, TOLERANCES[torch.float64][0]
            rows = ScaledSystem(system).forward(asked.x)  # what is sent
            below = self._below(asked)
            solved = self.together(system, rows, found.deficiency, below, tolerance=tolerance)
            doubt = asked.doubt
            if solved is not None and doubt is not None and bool(doubt.units.any()):
                # fitted by the equations that are to prove them: recover vouches for none
                self.layers[place] = replace(found, unsettled=int(doubt.units.sum()))
            elif solved is not None:
                names = tuple(floor.name for floor in solved[0])
                self.layers[place] = replace(found, together=names, settled=True)
                for other, layer in enumerate(self.layers):
                    if layer.name in names and not layer.known:
                        self.layers[other] = replace(layer, together=(found.name,), settled=True)
        self.waiting.discard(place)


def _may_begin(step: Step) -> bool:
    """Whether a convolution here has no more positions than filters and channels."""
    if step.rule.random or step.rule.refusal is not None:
        return False
    if not isinstance(step.module, Block):
        return isinstance(step.module, Conv) and blind.possible(step.module, step.input_shape)
    edges = zip(step.module.nodes, step.module.layers, strict=True)
    zero = next(p for p in step.module.parameters()).new_zeros(1, *step.input_shape)
    with torch.no_grad():
        shapes = [value.shape[1:] for value in step.module.values(zero)]
    return any(
        isinstance(layer, Conv)
        and len(node.sources) == 1
        and blind.possible(layer, tuple(shapes[node.sources[0]]))
        for node, layer in edges
    )


def _lone(block: Block, x: Tensor) -> str | None:
    """Norm in a block whose every group is one number of the sample: its output is its shift."""
    rules = [rule_of(layer) for layer in block.layers]
    if not any(rule.normalises for rule in rules):
        return None
    with torch.no_grad():
        values = block.values(x, torch.Generator().manual_seed(0))
    for node, rule, z in zip(block.nodes, rules, values[1:], strict=True):
        if isinstance(rule, Norm) and rule.normalises and entries(rule, tuple(z.shape)) < 2:
            return node.name
    return None


def _summed(module: torch.nn.Module, above: Rule | None) -> bool:
    """Whether a bias here, or of a norm right above, has the sum of ``k`` for its gradient."""
    own = getattr(module, "bias", None) is not None
    if own or above is None or not above.scales:
        return own
    return getattr(above.module, "bias", None) is not None


def _selected(rule: Rule, weight: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """Entries of ``x`` that a selection took: 1 where a known one of ``y`` came from."""
    chosen = torch.ones_like(y) if weight is None else weight
    return (rule.pull(chosen, x) != 0).to(torch.float64)


def _mask_above(nodes: Sequence[Node], passed: Passed, place: int) -> tuple[Tensor | None, str]:
    """Outputs that elementwise layers right above leave known, and what must be found for that."""
    weight = None
    while True:
        users = [i for i, node in enumerate(nodes) if place + 1 in node.sources]
        rule: Rule | None = rule_of(nodes[users[0]].module) if len(users) == 1 else None
        if rule is None or not (rule.elementwise or rule.pools):
            return weight, ""
        below, place = place, users[0]
        y = passed.values[place + 1]
        if rule.pools:
            known = _selected(rule, None, passed.values[below + 1], y)
        else:
            known = rule.tells(passed.values[below + 1], nodes[place].name, 1e-16).to(y)
        if not bool(known.all()):
            weight = known * (1.0 if weight is None else weight)
        if rule.pools:
            return weight, PLACES

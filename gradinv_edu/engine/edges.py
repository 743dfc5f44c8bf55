"""A block's layers undone one after the other, each by its own gradient, on a graph of edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InconsistentGradientError
from ..systems import LayerSystem
from . import blind, channels, edge_norms, kinks
from .hidden import Hidden, from_zero
from .layers import Rule, pack, rule_of, weight_names
from .layers.activations import ReLU
from .layers.branches import Block, Concatenation, Node, Product, Sum
from .layers.convolution import Conv, Convolution
from .layers.norms import GroupNorm, Norm
from .norm_system import entries
from .segment import within_reach
from .solve import Solution

__all__ = ["Edges", "Found", "in_doubt", "total"]

Part = tuple[Tensor, Tensor]  # a value, and where it is known
NORMED = 16  # positions up to which a convolution under a norm of its own is read blind
ALIKE = 0.05  # relative change of a block's output that its norms' ε may make
DOUBT = 30.0  # times the noise: a residual above it may come from a unit read on the wrong side
FAINT = 1e-9  # of the largest singular value: below, patches do not tell their output gradients


@dataclass(frozen=True)
class Found:
    """A layer whose input its own gradient gave.

    Attributes
    ----------
    name : str
        In the model.
    equations : int
        That were used.
    solution : Solution
        Of its input.
    """

    name: str
    equations: int
    solution: Solution


class Edges:
    r"""Values and gradients on the edges of a block, from what their neighbours hold.

    An edge is a tensor of the forward pass. What is known at one moves on along the layers:
    a value forward by the layer itself and back where the layer is one-to-one, a sum's or a
    product's missing part by the others; a gradient ``∂L/∂(edge)`` down by the chain rule, up
    where the layer is a scale for each entry; from a known output gradient to the layer's input
    by the gradient constraints ``K x = ∂L/∂W``, from a known input to the output gradient by the
    same equations read the other way; and from nothing at all where a convolution is
    :func:`blind <gradinv_edu.networks.blind>`. No output of the block is needed.

    Parameters
    ----------
    block : Block
        Float64.
    gradients : mapping of str to Tensor
        ``∂L/∂θ`` by the parameter's name in the block.
    input_shape : tuple of int
        Of one sample.
    noise : float
        Of the gradients, relative.
    positive : bool
        Whether no entry of the block's input is negative.
    iterate : bool
        Whether a norm and the layer below it are iterated where no channel tells.
    """

    def __init__(
        self,
        block: Block,
        gradients: Mapping[str, Tensor],
        input_shape: tuple[int, ...],
        noise: float,
        positive: bool = False,
        iterate: bool = True,
    ) -> None:
        self.positive, self.iterate = positive, iterate
        self.block, self.gradients, self.noise = block, gradients, noise
        self.rules = [rule_of(layer) for layer in block.layers]
        like = next(iter(gradients.values()))
        with torch.no_grad():
            zeros = block.values(like.new_zeros(1, *input_shape), torch.Generator().manual_seed(0))
        self.shapes = [z.shape for z in zeros]
        self.like = like
        self.values: list[Tensor | None] = [None] * len(zeros)
        self.ks: list[Tensor | None] = [None] * len(zeros)
        self.users: list[list[tuple[int, int]]] = [[] for _ in zeros]
        for place, node in enumerate(block.nodes):
            for slot, source in enumerate(node.sources):
                self.users[source].append((place, slot))
        self.pulled: dict[tuple[int, int], Tensor] = {}
        self.partial: dict[int, Part] = {}
        self.turns: dict[int, Tensor] = {}
        self.tried: set[tuple[int, str]] = set()
        self.hidden: Hidden | None = None  # what the block leaves open of its input
        self.found: list[Found] = []

    @property
    def whole(self) -> bool:
        """Whether both the block's input and its gradient were found."""
        return self.values[0] is not None and self.ks[0] is not None

    @property
    def scale_free(self) -> bool:
        """Whether the block makes the same of ``x`` and ``2 x``, up to the ``ε`` of its norms."""
        x = self.values[0]
        assert x is not None
        with torch.no_grad():
            one, two = self.block(x), self.block(2 * x)
        return float((two - one).norm()) <= ALIKE * float(one.norm())

    @property
    def solution(self) -> Solution:
        """Of the block's input: the least certain of the layers on the way, all determined."""
        assert self.values[0] is not None
        return Solution(
            x=self.values[0],
            residual=max((found.solution.residual for found in self.found), default=0.0),
            iterations=0,
            undetermined=0.0,
            smallest_singular_value=min(
                (1 / f.solution.condition for f in self.found), default=1.0
            ),
            largest_singular_value=1.0,
        )

    def settle(
        self,
        k: Tensor | None = None,
        value: Tensor | None = None,
        weight: Tensor | None = None,
        turn: Tensor | None = None,
    ) -> bool:
        """Move what is known as far as it goes; whether the input is found, and its gradient.

        Parameters
        ----------
        k : Tensor, optional
            Gradient at the block's output; without it a convolution inside must be blind.
        value, weight : Tensor, optional
            Output of the block, and where it is known.
        turn : Tensor, optional
            What ``k`` gains where a unit above is on the other side of its kink, where in doubt.
        """
        self.ks[-1] = k
        if value is not None:
            self._know(len(self.values) - 1, value, None if weight is None else weight > 0)
        if turn is not None:
            self.turns[len(self.ks) - 1] = turn
        try:
            while not self.whole:
                found = self._pass() or self._solve() or self._normed()
                if not (found or self._blind(lowest=k is None)):
                    return False
        except InconsistentGradientError:  # no value inside a layer's range explains the gradient
            return False
        return self.hidden is None or self.scale_free

    def _know(self, edge: int, value: Tensor, known: Tensor | None) -> None:
        """Note a value, or the part of it that is known."""
        if self.values[edge] is not None or value.shape != self.shapes[edge]:
            return
        if known is None or bool(known.all()):
            self.values[edge] = value
        elif edge not in self.partial or int(known.sum()) > int(self.partial[edge][1].sum()):
            self.partial[edge] = value, known

    def _part(self, edge: int) -> Part | None:
        """What is known of an edge's value."""
        value = self.values[edge]
        if value is None:
            return self.partial.get(edge)
        return value, torch.ones_like(value, dtype=torch.bool)

    # --- what needs no equations --------------------------------------------------------------

    def _pass(self) -> bool:
        """One sweep up and down; whether anything new became known."""
        before = self._known()
        for place, node in enumerate(self.block.nodes):
            self._forward(place, node)
            self._rise(place, node)
        for place in reversed(range(len(self.block.nodes))):
            node = self.block.nodes[place]
            self._back(place, node)
            self._descend(place, node)
        for edge, users in enumerate(self.users):
            parts = [self.pulled[user] for user in users if user in self.pulled]
            if self.ks[edge] is None and users and len(parts) == len(users):
                self.ks[edge] = sum(parts[1:], parts[0])
        return self._known() > before

    def _known(self) -> int:
        whole = sum(t is not None for t in (*self.values, *self.ks))
        return whole + len(self.pulled) + len(self.partial)

    def _sources(self, node: Node) -> list[Tensor] | None:
        values = [self.values[source] for source in node.sources]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None

    def _forward(self, place: int, node: Node) -> None:
        """A layer applied to its inputs."""
        sources = self._sources(node)
        if self.values[place + 1] is None and sources is not None and not self._drawn(place):
            with torch.no_grad():
                self.values[place + 1] = self._layer(place)(*sources)

    def _drawn(self, place: int) -> bool:
        """Whether a layer does what only the client knows."""
        return self.rules[place].random and not self.rules[place].normalises

    def _layer(self, place: int) -> Callable[..., Tensor]:
        """What a layer does, without leaving a trace in it."""
        module, alone = self.block.layers[place], len(self.block.nodes[place].sources) == 1
        return self.rules[place].forward if alone else module

    def _back(self, place: int, node: Node) -> None:
        """Inputs that the output, and other inputs, leave no choice."""
        part, module, rule = self._part(place + 1), self.block.layers[place], self.rules[place]
        missing = [s for s in node.sources if self.values[s] is None]
        if part is None or not missing:
            return
        value, known = part
        if isinstance(module, Concatenation):
            start = 0
            for source in node.sources:
                size = self.shapes[source][module.dim]
                piece, where = (t.narrow(module.dim, start, size) for t in (value, known))
                self._know(source, piece, where)
                start += size
        elif isinstance(module, Sum | Product) and len(missing) == 1 < len(node.sources):
            (other,) = [v for s in node.sources if (v := self.values[s]) is not None]
            if isinstance(module, Sum):
                self._know(missing[0], value - other, known)
            else:
                alive = (other != 0).expand_as(value)
                safe = torch.where(alive, other, torch.ones_like(other))
                self._know(missing[0], value / safe, known & alive)
        elif rule.reshapes:
            shape = self.shapes[missing[0]]
            self._know(missing[0], value.reshape(shape), known.reshape(shape))
        elif rule.elementwise and not rule.random:
            inside = torch.where(known, value, torch.full_like(value, rule.inside))
            undone = rule.undo(inside, node.name, self.noise)
            self._know(missing[0], undone.inputs, known & undone.known)

    def _descend(self, place: int, node: Node) -> None:
        """The chain rule."""
        k, rule, module = self.ks[place + 1], self.rules[place], self.block.layers[place]
        if k is None or all((place, slot) in self.pulled for slot in range(len(node.sources))):
            return
        sources = self._sources(node)
        linear = rule.affine or rule.reshapes or isinstance(module, Sum | Concatenation)
        if sources is None and linear and not self._drawn(place):
            sources = [self.like.new_zeros(self.shapes[source]) for source in node.sources]
        turn = self.turns.get(place + 1)
        if sources is not None and not self._drawn(place):
            for slot, part in enumerate(_pull(self._layer(place), k, sources)):
                self.pulled[place, slot] = part
            if turn is not None and linear and (rule.elementwise or isinstance(module, Sum)):
                self.turns |= dict(zip(node.sources, _pull(module, turn, sources), strict=True))
        elif rule.elementwise and (value := self.values[place + 1]) is not None:
            self.pulled[place, 0] = k * rule.undo(value, node.name, self.noise).slope
            turn = rule.turn(value, k, self.noise)
            if turn is not None:
                reach = 10 * self.noise * float(value.square().mean().sqrt())
                self.turns[node.sources[0]] = turn * in_doubt(rule, value, self.noise, reach)

    def _rise(self, place: int, node: Node) -> None:
        """The chain rule the other way, where an entry below has one entry above."""
        if self.ks[place + 1] is not None:
            return
        rule, module = self.rules[place], self.block.layers[place]
        alone = [s for s in node.sources if len(self.users[s]) == 1]
        known = [k for s in alone if (k := self.ks[s]) is not None]
        if not known:
            return
        k = known[0]
        if isinstance(module, Sum):
            if k.shape == self.shapes[place + 1]:
                self.ks[place + 1] = k
        elif rule.reshapes:
            self.ks[place + 1] = k.reshape(self.shapes[place + 1])
        elif rule.scales:
            (gain,) = _pull(module, torch.ones_like(k), [torch.zeros_like(k)])
            if bool((gain != 0).all()):
                self.ks[place + 1] = k / gain
        elif isinstance(rule, Norm) and rule.normalises:
            (scale, shift), z = self._own(place), self.values[node.sources[0]]
            if z is not None and scale is not None and shift is not None:
                self.ks[place + 1] = edge_norms.risen(rule, z, k, scale, shift)

    # --- what a layer's own gradient gives ----------------------------------------------------

    def _solve(self) -> bool:
        """One layer's input from its output gradient, or its output gradient from its input."""
        for place in reversed(range(len(self.block.nodes))):
            node, k = self.block.nodes[place], self.ks[place + 1]
            G = self._gradient(place)
            if G is None or len(node.sources) != 1:
                continue
            (source,) = node.sources
            x = self.values[source]
            if x is None and k is not None and self._first(place, "input"):
                self.values[source] = self._input(place, node, k, G)
                if self.values[source] is not None:
                    return True
            if x is not None and k is None and self._first(place, "gradient"):
                self.ks[place + 1] = _output_gradient(self.rules[place], x, G, self.noise)
                if self.ks[place + 1] is not None:
                    return True
        return False

    def _first(self, place: int, what: str) -> bool:
        """Whether this has not been tried; what fails once fails again."""
        new = (place, what) not in self.tried
        self.tried.add((place, what))
        return new

    def _gradient(self, place: int) -> Tensor | None:
        """Weight gradient of a layer that has one and no other step inside it."""
        if not (self.rules[place].weighted and self.rules[place].affine):
            return None
        module = self.block.layers[place]
        names = [f"layers.{place}.{name}" for name in weight_names(module)]
        sent = {name: self.gradients[name] for name in names if name in self.gradients}
        return pack(sent) if sent and len(sent) == len(names) else None

    def _input(self, place: int, node: Node, k: Tensor, G: Tensor) -> Tensor | None:
        """By the gradient's rows alone, with what is known of the input, or with the output's."""
        module, source = self.block.layers[place], node.sources[0]
        shape = tuple(self.shapes[source][1:])
        part, above = self.partial.get(source), self._part(place + 1)
        rows = G.numel() + sum(int(known.sum()) for _, known in filter(None, (part, above)))
        n, large = math.prod(shape), math.prod(shape[1:]) > channels.PIXELS
        if rows < n or (large and not within_reach(n, rows - n)):  # too few, or steps without end
            return None
        few = G.numel() < n and above is not None and part is None

        def solve(k: Tensor, before: Solution | None = None) -> tuple[LayerSystem, Solution]:
            mask = None if above is None else above[1].to(k.dtype)
            system = LayerSystem(module, k, shape, mask)
            found = None if few else system.solve(None, G, noise=self.noise)
            if found is None or not found.full_rank:
                rows, positive = None if above is None else above[0], self._positive(source)
                found = (
                    system.by_channel(rows, G, part, positive=positive, noise=self.noise) or found
                )
            lacks = found is None or not found.full_rank
            if lacks and above is not None and part is None:
                found = system.solve(above[0], G, noise=self.noise, before=before)
            assert found is not None
            return system, found

        k = self._summing(place + 1, k, self._total(place))
        turn = self.turns.get(place + 1)
        system, solution = solve(k)
        doubtful = solution.residual > DOUBT * self.noise and solution.full_rank
        if doubtful and turn is not None and bool(turn.any()):
            system, solution, turned = kinks.settle(system, solution, G, turn, solve)
            if turned:
                self._turned(place + 1, system.k - k)
        if not solution.full_rank:
            return None
        self._note(Found(node.name, system.equations, solution))
        return self._cleaned(source, solution.x)

    # --- norms of their own statistics ----------------------------------------------------------

    def _normed(self) -> bool:
        """A norm and the layer below it, whose input is then known up to a factor, or told."""
        for above in reversed(range(len(self.block.nodes))):
            rule, k = self.rules[above], self.ks[above + 1]
            place = self.block.nodes[above].sources[0] - 1
            if not rule.normalises or k is None or place < 0 or len(self.users[place + 1]) > 1:
                continue
            G, sources = self._gradient(place), self.block.nodes[place].sources
            part, module = self._part(above + 1), self.block.layers[place]
            if G is None or self.values[sources[0]] is not None or _skips(module):
                continue
            if not self._first(above, "input" if part is None else "input by outputs"):
                continue
            assert isinstance(rule, Norm)
            shape = tuple(self.shapes[sources[0]][1:])
            scale, shift = self._own(above)
            if isinstance(rule, GroupNorm):
                k = self._summing(above + 1, k, shift)
            sent = G, scale, shift
            found = edge_norms.solve(module, rule, k, part, shape, sent, self.noise, self.iterate)
            if found is not None:
                name = f"{self.block.nodes[place].name}+{self.block.nodes[above].name}"
                self._note(Found(name, found.equations, found.solution))
                hidden = Hidden(self.block.nodes[above].name, found.factor, found.unseen)
                told = None if found.scaled else hidden
                self._place(sources[0], found.inputs, found.k, told)
                return True
        return False

    def _own(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a norm's scale and shift."""
        scale, shift = (f"layers.{place}.{name}" for name in ("weight", "bias"))
        return self.gradients.get(scale), self.gradients.get(shift)

    def _place(self, edge: int, x: Tensor, k: Tensor, hidden: Hidden | None) -> None:
        """Scale an edge's value by what is known of it, of the bias below, or by ε at last."""
        if hidden is None:
            self.values[edge] = self._cleaned(edge, x)
            return
        part, value = self.partial.get(edge), None
        if part is not None:
            value = edge_norms.by_entries(x, part, hidden.unseen)
        if value is None and hidden.unseen is not None and edge and self._positive(edge):
            moved, floating = from_zero(x, hidden.unseen, self.noise)
            if floating is None:
                x, hidden = moved, replace(hidden, unseen=None)
        below = None if value is not None or hidden.unseen is not None else self._below(edge)
        if below is not None:
            value = edge_norms.by_bias(x, k, hidden.guess, below, self.noise)
        if value is None:
            value = hidden.times(x)
            if edge == 0:
                self.hidden = replace(hidden, guess=torch.ones_like(hidden.guess))
        self.values[edge] = self._cleaned(edge, value)

    def _below(self, edge: int) -> edge_norms.Below | None:
        """Whose bias's gradient tells the factor of an edge."""
        users = [user for user in self.users[edge] if user in self.pulled]
        if edge == 0 or len(users) < len(self.users[edge]) - 1:
            return None
        beside = sum(
            (self.pulled[user] for user in users), torch.zeros(self.shapes[edge]).to(self.like)
        )
        place, activation = edge - 1, None
        if self.rules[place].elementwise and not self.rules[place].scales:
            activation, place = self.rules[place], self.block.nodes[place].sources[0] - 1
        sent = None if place < 0 else self.gradients.get(f"layers.{place}.bias")
        rule = self.rules[place]
        alone = edge == place + 1 or len(self.users[place + 1]) == 1
        if sent is None or not alone or not isinstance(rule, Norm):
            return None
        return edge_norms.Below(activation, rule.parameter_sum, sent.reshape(-1), beside)

    def _positive(self, edge: int) -> bool:
        """Whether no entry of an edge is negative."""
        return self.positive if edge == 0 else isinstance(self.rules[edge - 1], ReLU)

    def _summing(self, edge: int, k: Tensor, sums: Tensor | None) -> Tensor:
        """``∂L/∂(edge)`` with the units turned that its sum over places shows to be misread."""
        turn = self.turns.get(edge)
        if turn is None or sums is None:
            return k
        told = kinks.told_by_sums(k, turn, sums, self.noise)
        if not bool(told.any()):
            return k
        change = torch.where(told, turn, torch.zeros_like(turn))
        self.turns[edge] = torch.where(told, -turn, turn)
        self._turned(edge, change)
        return k + change

    def _turned(self, edge: int, change: Tensor) -> None:
        """Change an output gradient, and with it those above that led to it."""
        while True:
            k = self.ks[edge]
            self.ks[edge] = change if k is None else k + change
            for key in [key for key in self.pulled if key in self.users[edge]]:
                self.pulled[key] = self.pulled[key] + change
            users = self.users[edge]
            if len(users) != 1 or not self._straight(users[0][0]):
                return
            above = users[0][0]
            if isinstance(self.block.layers[above], Sum):
                for slot, source in enumerate(self.block.nodes[above].sources):
                    if source != edge:
                        self._fallen(above, slot, source, change)
            else:
                (gain,) = _pull(self.block.layers[above], torch.ones_like(change), [change])
                change = change / gain
            edge = above + 1

    def _fallen(self, above: int, slot: int, source: int, change: Tensor) -> None:
        """Take back what was derived down another way of a sum, to be derived again."""
        if (above, slot) in self.pulled:
            self.pulled[above, slot] = self.pulled[above, slot] + change
        self.ks[source] = None
        for number, below in enumerate(self.block.nodes[source - 1].sources if source else ()):
            self.pulled.pop((source - 1, number), None)
            self.ks[below] = None

    def _straight(self, place: int) -> bool:
        """Whether a layer hands its gradient down entry by entry, whatever the values."""
        return self.rules[place].scales or isinstance(self.block.layers[place], Sum)

    def _note(self, found: Found) -> None:
        self.found.append(found)
        self.noise = max(self.noise, 3 * found.solution.residual)

    def _cleaned(self, edge: int, value: Tensor) -> Tensor:
        """Without the rounding of what an activation had set to zero; refused out of its range."""
        if edge == 0 or not (rule := self.rules[edge - 1]).elementwise or rule.random:
            return value
        undone = rule.undo(value, self.block.nodes[edge - 1].name, self.noise)
        if not rule.kinked:
            return value
        return torch.where(undone.known, value, rule.forward(undone.inputs))

    def _blind(self, lowest: bool) -> bool:
        """A convolution's input and output gradient, from nothing but its own gradient."""
        places = range(len(self.block.nodes))
        for place in places if lowest else reversed(places):
            node, module = self.block.nodes[place], self.block.layers[place]
            G = self._gradient(place)
            if G is None or len(node.sources) != 1 or not isinstance(module, Conv):
                continue
            (source,) = node.sources
            shape = tuple(self.shapes[source][1:])
            new = self.values[source] is None and self.ks[place + 1] is None
            if not new or not blind.possible(module, shape) or not self._first(place, "both"):
                continue
            sums, users = self._total(place), self.users[place + 1]
            above = self.rules[users[0][0]] if len(users) == 1 else None
            normed = isinstance(above, Norm) and above.normalises
            if isinstance(above, Norm) and entries(above, tuple(self.shapes[place + 1])) < 2:
                continue
            few = math.prod(shape[1:]) <= NORMED
            if sums is None and not (normed and few and self._positive(source)):
                continue
            centred = normed and math.prod(shape[1:]) > 1 and _alone(above, self.shapes[place + 1])
            seen = blind.solve(module, G, sums, shape, centred=centred, noise=self.noise)
            if seen is None:
                continue
            self._note(Found(node.name, G.numel(), seen.solution))
            if sums is not None:
                self.values[source] = self._cleaned(source, seen.solution.x)
                self.ks[place + 1] = seen.k
                return True
            sign = seen.solution.x.sum().sign()
            x, k = sign * seen.solution.x, sign * seen.k
            hidden = Hidden(self.block.nodes[users[0][0]].name, x.new_ones(1))
            self._place(source, x, _pull(module, k, [x])[0], hidden)
            placed = cast(Tensor, self.values[source])
            self.ks[place + 1] = k * float((x * x).sum() / (x * placed).sum())
            return True
        return False

    def _total(self, place: int) -> Tensor | None:
        """``Σ_ℓ k`` at a convolution's output."""
        own = self.gradients.get(f"layers.{place}.bias")
        users = self.users[place + 1]
        if own is not None or len(users) != 1:
            return own
        return total(own, self.rules[users[0][0]], self._own(users[0][0])[1])


def in_doubt(rule: Rule, outputs: Tensor, noise: float, reach: float) -> Tensor:
    """Units that noise may have put on the wrong side of a kink: near it, or read as silent."""
    known = rule.undo(rule.clamp(outputs), "", noise).known
    return (outputs.abs() <= reach) | ~known


def total(own: Tensor | None, norm: Rule | None, bias: Tensor | None) -> Tensor | None:
    """``Σ_ℓ k`` of each filter: the bias's gradient, or that of an affine norm right above.

    Parameters
    ----------
    own : Tensor or None
        Gradient of the layer's bias.
    norm : :class:`~gradinv_edu.engine.layers.base.Rule` or None
        Of what follows the layer.
    bias : Tensor or None
        Gradient of that layer's bias.
    """
    if own is not None:
        return own
    if norm is None or bias is None or not norm.scales:
        return None
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    extra = next((d for kind, d in dims.items() if isinstance(norm.module, kind)), 0)
    one = bias.new_ones(1, len(bias), *[1] * extra)
    (gain,) = _pull(norm.module, one, [torch.zeros_like(one)])
    return bias * gain.flatten()


def _alone(norm: Rule | None, shape: torch.Size) -> bool:
    """Whether every channel of a sample has statistics of its own: its ``k`` adds up to zero."""
    assert isinstance(norm, Norm)
    return norm.centred and len(norm.groups(shape).family) == shape[0] * shape[1]


def _skips(module: nn.Module) -> bool:
    """Whether a convolution's stride leaves entries of its input out."""
    if not isinstance(module, Conv):
        return False
    spans = zip(module.stride, module.kernel_size, module.dilation, strict=True)
    return any(s > d * (n - 1) + 1 for s, n, d in spans)


def _pull(module: Callable[..., Tensor], k: Tensor, sources: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [source.detach().clone().requires_grad_() for source in sources]
        pulled = torch.autograd.grad(module(*leaves), leaves, k, allow_unused=True)
    return [torch.zeros_like(s) if p is None else p for s, p in zip(sources, pulled, strict=True)]


def _output_gradient(rule: Rule, x: Tensor, G: Tensor, noise: float) -> Tensor | None:
    """``k`` from ``Σ_ℓ k(ℓ) ⊗ patch_ℓ = ∂L/∂W`` with known patches; None where they repeat."""
    if not isinstance(rule, Convolution) or (geometry := rule.geometry) is None:
        return None
    conv = cast(Conv, rule.module)
    if geometry.groups != 1 or len(geometry.stride) != 2:
        return None
    with torch.no_grad():
        shape = conv(x).shape
    stride, padding, dilation = geometry[:3]
    spans = (tuple(part) for part in (conv.kernel_size, dilation, padding, stride))
    patches = nn.functional.unfold(x, *spans)[0]
    if patches.shape[1] > patches.shape[0]:
        return None
    values = torch.linalg.svdvals(patches)
    if not float(values[-1]) > max(FAINT, 10 * noise) * float(values[0]):
        return None
    answer: Tensor = torch.linalg.lstsq(patches, G.flatten(1).T).solution
    residual = float((patches @ answer - G.flatten(1).T).norm() / G.norm())
    if residual > 1e3 * max(noise, 1e-12) * float(values[0] / values[-1]) or math.isnan(residual):
        return None
    return answer.T.reshape(shape)

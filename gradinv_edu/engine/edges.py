"""A block's layers undone one after the other, each by its own gradient, on a graph of edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InconsistentGradientError
from ..systems import LayerSystem
from . import blind, channels, edge_norms, kinks
from .hidden import Hidden, from_zero
from .layers import Rule, pack, weight_names
from .layers.branches import Block, Node
from .layers.convolution import Conv, Convolution
from .layers.norms import GroupNorm, Norm
from .norm_system import entries
from .propagation import Propagation, pull
from .segment import within_reach
from .solve import Solution

__all__ = ["Edges", "Found"]

NORMED = 16  # positions up to which a convolution under a norm of its own is read blind
ALIKE = 0.05  # relative change of a block's output that its norms' ε may make
DOUBT = 30.0  # times those before: a residual above it may come from a unit on the wrong side
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


class Edges(Propagation):
    r"""Values and gradients on the edges of a block, from what their neighbours hold.

    What is known at one edge moves on along the layers (:class:`~.propagation.Propagation`); from
    a known output gradient to the layer's input by the gradient constraints ``K x = ∂L/∂W``, from
    a known input to the output gradient by the same equations read the other way; and from
    nothing at all where a convolution is :func:`blind <gradinv_edu.networks.blind>`. No output of
    the block is needed.

    Parameters
    ----------
    block, gradients, input_shape, noise
        As for :class:`~.propagation.Propagation`.
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
        positive: bool,
        iterate: bool = True,
    ) -> None:
        super().__init__(block, gradients, input_shape, noise)
        self.positive, self.iterate = positive, iterate
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
                found = self._pass() or self._solve()
                found = found or self._pass() or self._normed()  # again: a unit may have turned
                if not (found or self._blind(lowest=k is None)):
                    return False
        except InconsistentGradientError:  # no value inside a layer's range explains the gradient
            return False
        return self.hidden is None or self.scale_free

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

        def solve(
            k: Tensor, G: Tensor, before: Solution | None = None
        ) -> tuple[LayerSystem, Solution]:
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
        system, solution = solve(k, G)
        clean = max((found.solution.residual for found in self.found), default=self.noise)
        doubtful = solution.residual > DOUBT * clean and solution.full_rank
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
        return self.positive if edge == 0 else self.rules[edge - 1].rectifies

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
            self._place(source, x, pull(module, k, [x])[0], hidden)
            placed = cast(Tensor, self.values[source])
            self.ks[place + 1] = k * float((x * x).sum() / (x * placed).sum())
            return True
        return False


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

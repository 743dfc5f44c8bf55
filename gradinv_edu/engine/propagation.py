"""Values and gradients on the edges of a block, moved along its layers without equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import edge_norms, kinks
from .layers import Rule, rule_of
from .layers.branches import Block, Concatenation, Node, Product, Sum
from .layers.norms import Norm

__all__ = ["Part", "Propagation", "pull", "total"]

Part = tuple[Tensor, Tensor]  # a value, and where it is known


class Propagation:
    r"""What neighbours leave no choice: values up and down a block, ``∂L/∂(edge)`` likewise.

    An edge is a tensor of the forward pass. A value moves forward by the layer itself and back
    where the layer is one-to-one, a sum's or a product's missing part by the others; a gradient
    moves down by the chain rule, up where the layer is a scale for each entry.

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
    """

    def __init__(
        self,
        block: Block,
        gradients: Mapping[str, Tensor],
        input_shape: tuple[int, ...],
        noise: float,
    ) -> None:
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
            for slot, part in enumerate(pull(self._layer(place), k, sources)):
                self.pulled[place, slot] = part
            if turn is not None and linear and (rule.elementwise or isinstance(module, Sum)):
                self.turns |= dict(zip(node.sources, pull(module, turn, sources), strict=True))
        elif rule.elementwise and (value := self.values[place + 1]) is not None:
            self.pulled[place, 0] = k * rule.undo(value, node.name, self.noise).slope
            turn = rule.turn(value, k, self.noise)
            if turn is not None:
                reach = 10 * self.noise * float(value.square().mean().sqrt())
                self.turns[node.sources[0]] = turn * kinks.in_doubt(rule, value, self.noise, reach)

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
            (gain,) = pull(module, torch.ones_like(k), [torch.zeros_like(k)])
            if bool((gain != 0).all()):
                self.ks[place + 1] = k / gain
        elif isinstance(rule, Norm) and rule.normalises:
            (scale, shift), z = self._own(place), self.values[node.sources[0]]
            if z is not None and scale is not None and shift is not None:
                self.ks[place + 1] = edge_norms.risen(rule, z, k, scale, shift)

    def _own(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a norm's scale and shift."""
        scale, shift = (f"layers.{place}.{name}" for name in ("weight", "bias"))
        return self.gradients.get(scale), self.gradients.get(shift)

    def _total(self, place: int) -> Tensor | None:
        """``Σ_ℓ k`` at a convolution's output."""
        own = self.gradients.get(f"layers.{place}.bias")
        users = self.users[place + 1]
        if own is not None or len(users) != 1:
            return own
        return total(own, self.rules[users[0][0]], self._own(users[0][0])[1])

    def _turned(self, edge: int, change: Tensor) -> None:
        """Change an output gradient and those above that led to it; derive those below again."""
        self._forget(edge)
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
                (gain,) = pull(self.block.layers[above], torch.ones_like(change), [change])
                change = change / gain
            edge = above + 1

    def _fallen(self, above: int, slot: int, source: int, change: Tensor) -> None:
        """Hand a change down another way of a sum."""
        if (above, slot) in self.pulled:
            self.pulled[above, slot] = self.pulled[above, slot] + change
        self.ks[source] = None
        self._forget(source)

    def _forget(self, edge: int) -> None:
        """Take back the gradients that were derived from an edge's, to be derived again."""
        for slot, below in enumerate(self.block.nodes[edge - 1].sources if edge else ()):
            if (edge - 1, slot) in self.pulled:
                if all(user in self.pulled for user in self.users[below]):
                    self.ks[below] = None
                del self.pulled[edge - 1, slot]
                self._forget(below)

    def _straight(self, place: int) -> bool:
        """Whether a layer hands its gradient down entry by entry, whatever the values."""
        return self.rules[place].scales or isinstance(self.block.layers[place], Sum)


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
    (gain,) = pull(norm.module, one, [torch.zeros_like(one)])
    return bias * gain.flatten()


def pull(module: Callable[..., Tensor], k: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """``(∂m/∂s)ᵀ k`` for each source ``s`` of a layer ``m(s₁, …)``."""
    with torch.enable_grad():
        leaves = [source.detach().clone().requires_grad_() for source in sources]
        pulled = torch.autograd.grad(module(*leaves), leaves, k, allow_unused=True)
    return [torch.zeros_like(s) if p is None else p for s, p in zip(sources, pulled, strict=True)]

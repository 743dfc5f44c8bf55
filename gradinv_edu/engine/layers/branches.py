"""Ways that part and meet again: sums, products and concatenations, and what lies between."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .base import Rule, rule_for, rule_of

__all__ = ["Block", "Branches", "Call", "Concatenation", "Node", "Other", "Product", "Sum"]


class Sum(nn.Module):
    """``x + y``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add."""
        return x + y


class Product(nn.Module):
    """``x ⊙ y``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply."""
        return x * y


class Concatenation(nn.Module):
    """Tensors end to end along one dimension."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        """Join."""
        return torch.cat(parts, self.dim)


class Call(nn.Module):
    """An operation of a forward pass that no layer of ``torch.nn`` stands for.

    Parameters
    ----------
    name : str
        Of the operation.
    function : callable
        From the tensors that depend on the input to the result.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *tensors: Tensor) -> Any:
        """Do it."""
        return self.function(*tensors)


@rule_for(Call)
class Other(Rule):
    """An operation without a rule."""

    reason: ClassVar[str] = (
        "it is not among the operations that the recursion can undo; use the layer from torch.nn"
    )

    @property
    def kind(self) -> str:
        """Name of the operation."""
        return cast(Call, self.module).name


@dataclass(frozen=True)
class Node:
    """One operation inside a block.

    Attributes
    ----------
    name : str
        In the model.
    module : nn.Module
        What is done.
    sources : tuple of int
        Whose outputs go in: 0 is the block's input, ``i + 1`` the output of node ``i``.
    """

    name: str
    module: nn.Module
    sources: tuple[int, ...]


class Block(nn.Module):
    """Everything between the place where ways part and the place where all have met again.

    Parameters
    ----------
    nodes : sequence of Node
        In an order in which each comes after its sources; the last one gives the output.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        self.nodes = tuple(nodes)
        self.layers = nn.ModuleList(node.module for node in nodes)

    def forward(self, x: Tensor) -> Tensor:
        """Go all ways."""
        return self.values(x)[-1]

    def values(self, x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Input and output of every node; with a generator as the sample of an audit."""
        values = [x]
        for node, layer in zip(self.nodes, self.layers, strict=True):
            inputs = [values[source] for source in node.sources]
            if len(inputs) > 1:
                values.append(layer(*inputs))
            elif generator is None:  # a norm in train mode leaves its running statistics alone
                values.append(rule_of(layer).forward(inputs[0]))
            else:
                values.append(rule_of(layer).sample(inputs[0], generator))
        return values

    def smooth(self) -> set[str]:
        """Parameters whose gradient is continuous in the input: no kink above them."""
        below = [False] * (len(self.nodes) + 1)  # whether a kink lies between here and the output
        names: set[str] = set()
        for index in reversed(range(len(self.nodes))):
            node, rule = self.nodes[index], rule_of(self.layers[index])
            if not below[index + 1] and not rule.kinked:
                names |= {f"layers.{index}.{n}" for n, _ in node.module.named_parameters()}
            for source in node.sources:
                below[source] = below[source] or below[index + 1] or rule.kinked
        return names

    def ways(self) -> tuple[list[nn.Module], list[nn.Module]] | None:
        """Layers of either way, the longer first, of a sum of two chains; None for another form."""
        if not isinstance(self.nodes[-1].module, Sum):
            return None
        ways, used = [], 1
        for place in self.nodes[-1].sources:
            way: list[nn.Module] = []
            while place > 0 and len(self.nodes[place - 1].sources) == 1:
                way.insert(0, self.layers[place - 1])
                (place,) = self.nodes[place - 1].sources
            if place > 0:
                return None
            used += len(way)
            ways.append(way)
        longer, shorter = sorted(ways, key=len, reverse=True)
        return (longer, shorter) if used == len(self.nodes) else None


@rule_for(Block)
class Branches(Rule):
    """A block is solved as one, by Gauss and Newton on its output and its gradients."""

    @property
    def kind(self) -> str:
        """A residual block where two chains are added up."""
        return "Residual" if cast(Block, self.module).ways() is not None else "Branches"

    @property
    def kinked(self) -> bool:  # type: ignore[override]
        """Whether a slope jumps inside."""
        return any(rule_of(layer).kinked for layer in cast(Block, self.module).layers)

    @property
    def refusal(self) -> str | None:
        """The first layer inside that the server could not evaluate itself, or follow."""
        for node in cast(Block, self.module).nodes:
            rule = rule_of(node.module)
            inside = f"{node.name} ({rule.kind}) inside"
            if rule.random and not rule.normalises:  # statistics can be computed again
                return f"{inside} is in train mode, so that its equations are not known"
            if rule.kinked and rule.refusal is not None:
                return f"{inside} cannot be followed: {rule.refusal}"
        return None

    @property
    def random(self) -> bool:
        """Whether anything inside is."""
        rules = [rule_of(layer) for layer in cast(Block, self.module).layers]
        return any(rule.random and not rule.normalises for rule in rules)

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Every layer inside as a sample."""
        return cast(Block, self.module).values(x, generator)[-1]


OUT_OF_PLACE: dict[object, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}

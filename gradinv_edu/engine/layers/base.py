"""The rule of a layer: what a server that knows the layer can make of what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import UnsupportedLayerError

__all__ = [
    "RULES",
    "Affine",
    "Example",
    "LayerOperator",
    "ModuleOperator",
    "Rule",
    "Undone",
    "pack",
    "pull_back",
    "rule_for",
    "rule_of",
    "weight_names",
]

Example = tuple[nn.Module, tuple[int, ...]]  # a module, and the shape of one input
RULES: dict[type[nn.Module], type[Rule]] = {}
R = TypeVar("R", bound="type[Rule]")


@dataclass(frozen=True)
class Undone:
    """An elementwise layer undone.

    Attributes
    ----------
    inputs : Tensor
        ``z``; 0 where it cannot be known.
    slope : Tensor
        ``φ'(z)``; where ``z`` is unknown, the slope that the layer certainly had there (0).
    known : Tensor
        Bool: where ``z`` is determined by the output.
    other : Undone, optional
        The same with the other ``z`` wherever two of them give one output.
    """

    inputs: Tensor
    slope: Tensor
    known: Tensor
    other: Undone | None = None


class Rule:
    """What can be done with one kind of layer; this one is of layers that no other rule knows.

    A new kind of layer is a subclass under :func:`rule_for`, in one file of this folder. It says
    which of four things the layer is, by the flags, and overrides what goes with it: rows
    (:class:`Affine`), ``elementwise`` (:meth:`undo`), ``reshapes``, or none of them, with the
    reason (:attr:`refusal`).

    Parameters
    ----------
    module : nn.Module
        The layer, float64, in the mode that the client trains in.
    """

    affine: bool = False  # z = W x + b: gives rows
    weighted: bool = False  # affine, with a weight whose gradient holds the input
    elementwise: bool = False  # undone entry by entry
    reshapes: bool = False  # names the entries anew
    reorders: bool = False  # and changes their order
    pools: bool = False  # keeps the largest entry of each window, solved with the layer below
    normalises: bool = False  # divides by statistics of its own input: taken with the layer below
    kinked: bool = False  # has a slope that jumps
    homogeneous: bool = False  # φ(c z) = c φ(z) for c > 0
    rectifies: bool = False  # φ(z) = max(z, 0): no output is negative, many are zero
    has_function: bool = False  # torch has a function of its name, with the same arguments
    reason: ClassVar[str] = "it is not linear in its input and cannot be undone entry by entry"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def kind(self) -> str:
        """Name of the layer's type."""
        return type(self.module).__name__

    @property
    def refusal(self) -> str | None:
        """Why the layer cannot be inverted, or None where it can."""
        able = self.affine or self.elementwise or self.reshapes or self.pools
        return None if able else self.reason

    @property
    def scales(self) -> bool:
        """Whether it scales and shifts every entry: gradients pass it whatever its values."""
        return self.affine and self.elementwise

    @property
    def inside(self) -> float:
        """Some output that can be undone, for entries that are not known anyway."""
        return 0.0

    @property
    def random(self) -> bool:
        """Whether what the layer does cannot be computed again: a draw, statistics of a batch."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        y: Tensor = self.module(x)
        return y

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Apply the layer to the sample of an audit, with randomness of its own."""
        return self.forward(x)

    def pull(self, k: Tensor, x: Tensor) -> Tensor:
        r""":math:`\partial L/\partial x = J(x)^\top k`."""
        return pull_back(self.forward, k, x)

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """``z`` from ``a = φ(z)``; only where the rule is ``elementwise``."""
        raise self.refused(name)

    def tells(self, inputs: Tensor, name: str, noise: float) -> Tensor:
        """Which outputs tell these inputs: what :meth:`undo` would hold for known."""
        return self.undo(self.forward(inputs), name, noise).known

    def refused(self, name: str) -> UnsupportedLayerError:
        """Return the error that names the layer and says why it cannot be inverted."""
        why = self.refusal or self.reason
        return UnsupportedLayerError(f"{name} ({self.kind}) cannot be inverted: {why}.")

    def clamp(self, outputs: Tensor) -> Tensor:
        """Move ``outputs`` into the part of the layer's range that can be undone safely."""
        return outputs

    def turn(self, outputs: Tensor, k: Tensor, noise: float) -> Tensor | None:
        """What ``k`` below gains if each unit is on the other side of its kink, if it has one."""
        return None

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Modules of this kind with shapes they take: what the law tests run over."""
        yield from ()


def rule_for(*kinds: type[nn.Module]) -> Callable[[R], R]:
    """Register a rule for these types of layers and their subclasses."""

    def register(rule: R) -> R:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def rule_of(module: nn.Module) -> Rule:
    """Return the rule of a layer, by its type or the nearest type it descends from."""
    known = (RULES[kind] for kind in type(module).__mro__ if kind in RULES)
    return next(known, Rule)(module)


def pull_back(forward: Callable[[Tensor], Tensor], k: Tensor, x: Tensor) -> Tensor:
    r""":math:`J(x)^\top k`, by automatic differentiation."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (below,) = torch.autograd.grad(forward(leaf), leaf, k)
    return below


# --- layers that give rows --------------------------------------------------------------------


class LayerOperator(Protocol):
    """``x ↦ (W x, K x)`` and its adjoint, in one precision."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        ...

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        ...

    def to(self, dtype: torch.dtype) -> LayerOperator:
        """Return the same map in another precision."""
        ...


class Affine(Rule):
    """A layer that is linear in its input up to an offset: it gives rows."""

    affine = True

    def operator(self, k: Tensor, input_shape: tuple[int, ...]) -> LayerOperator:
        """Both sets of equations as a linear map, by the fastest calls that serve it."""
        return ModuleOperator(self.module, k, input_shape)

    def channels(self, weight: Tensor) -> Tensor:
        """Output channel that each entry of the weight adds to, to broadcast over it."""
        return torch.arange(len(weight), device=weight.device).reshape(
            -1, *[1] * (weight.dim() - 1)
        )

    def most(self, known: Tensor, shape: tuple[int, ...]) -> int:
        """Upper bound of the rows' rank, by counting alone: the rows, or the unknowns.

        Parameters
        ----------
        known, shape
            As for :meth:`bounds`.
        """
        weights = dict(self.module.named_parameters())
        rows = sum(weights[name].numel() for name in weight_names(self.module))
        return min(int(known.sum()) + rows, torch.Size(shape).numel())

    def bounds(self, k: Tensor, known: Tensor, shape: tuple[int, ...]) -> tuple[int, str | None]:
        """Upper bound of the rows' rank, and which rows determine all, "gradient" or "weight".

        Parameters
        ----------
        k, known : Tensor
            Output gradient of one sample, and bool: which outputs are known.
        shape : tuple of int
            Of one input.
        """
        return self.most(known, shape), None


class ModuleOperator:
    """The equations of any module affine in its input, by automatic differentiation."""

    def __init__(self, module: nn.Module, k: Tensor, input_shape: tuple[int, ...]) -> None:
        self.module, self.k, self.input_shape = module, k, input_shape
        everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.constants = {
            name: value.detach().to(k.dtype) if value.is_floating_point() else value
            for name, value in everything.items()
        }
        names = weight_names(module)
        with torch.enable_grad():
            self.weights = {n: self.constants[n].clone().requires_grad_() for n in names}
            self.leaf = k.new_zeros(k.shape[0], *input_shape).requires_grad_()
            self.out, self.gradient = self._at(self.leaf, create_graph=True)
        self.offset, self.gradient_offset = self.out.detach(), self.gradient.detach()

    def _at(self, x: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        out: Tensor = functional_call(self.module, {**self.constants, **self.weights}, (x,))
        if not self.weights:
            return out, self.k.new_zeros(0)
        own = list(self.weights.values())
        found = torch.autograd.grad(out, own, self.k, create_graph=create_graph, allow_unused=True)
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(own, found, strict=True)]
        return out, pack(dict(zip(self.weights, filled, strict=True)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        with torch.enable_grad():
            out, gradient = self._at(x)
        return out.detach() - self.offset, gradient - self.gradient_offset

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        (pulled,) = torch.autograd.grad(self.out, self.leaf, rows, retain_graph=True)
        if self.gradient.requires_grad:
            (more,) = torch.autograd.grad(
                self.gradient, self.leaf, gradient_rows, retain_graph=True, allow_unused=True
            )
            pulled = pulled if more is None else pulled + more
        return pulled

    def to(self, dtype: torch.dtype) -> ModuleOperator:
        """Return the same map in another precision."""
        return ModuleOperator(self.module, self.k.to(dtype), self.input_shape)


def weight_names(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient depends on the input: every one but the biases."""
    return [name for name, _ in module.named_parameters() if name.rpartition(".")[2] != "bias"]


def pack(gradients: Mapping[str, Tensor]) -> Tensor:
    """One tensor for a module's weight gradients: as it is for one weight, else end to end."""
    tensors = list(gradients.values())
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])

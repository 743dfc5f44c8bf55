"""Activations: undone where they are one-to-one, masked where a ReLU says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...errors import InconsistentGradientError
from .base import Example, Rule, Undone, rule_for

__all__ = [
    "INVERSES",
    "Clipped",
    "LeakyReLU",
    "OneToOne",
    "ReLU",
    "Softmax",
    "refuse_outside",
    "split_zeros",
]

Inverse = Callable[[Any, Tensor], Tensor]
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _selu(m: nn.SELU, a: Tensor) -> Tensor:
    return torch.where(a > 0, a / SELU_SCALE, torch.log1p(a / (SELU_SCALE * SELU_ALPHA)))


# activation: its inverse, and the ends of its range; one line makes a new one-to-one activation
INVERSES: dict[type[nn.Module], tuple[Inverse, Callable[[Any], tuple[float, float]]]] = {
    nn.ELU: (
        lambda m, a: torch.where(a > 0, a, torch.log1p(a / m.alpha)),
        lambda m: (-m.alpha, math.inf),
    ),
    nn.CELU: (
        lambda m, a: torch.where(a > 0, a, m.alpha * torch.log1p(a / m.alpha)),
        lambda m: (-m.alpha, math.inf),
    ),
    nn.SELU: (_selu, lambda m: (-SELU_SCALE * SELU_ALPHA, math.inf)),
    nn.Softplus: (
        lambda m, a: a + torch.log(-torch.expm1(-m.beta * a)) / m.beta,
        lambda m: (0.0, math.inf),
    ),
    nn.Tanh: (lambda m, a: torch.atanh(a), lambda m: (-1.0, 1.0)),
    nn.Sigmoid: (lambda m, a: torch.logit(a), lambda m: (0.0, 1.0)),
    nn.LogSigmoid: (
        lambda m, a: a - torch.log(-torch.expm1(a)),
        lambda m: (-math.inf, 0.0),
    ),
    nn.Softsign: (lambda m, a: a / (1 - a.abs()), lambda m: (-1.0, 1.0)),
}


@rule_for(*INVERSES)
class OneToOne(Rule):
    """``z = φ⁻¹(a)`` for every entry that is not saturated."""

    has_function = True
    elementwise = True

    @property
    def kinked(self) -> bool:  # type: ignore[override]
        """Of a table's activation: SELU, and ELU with another slope below zero than above."""
        bent = isinstance(self.module, nn.ELU) and self.module.alpha != 1
        return bent or isinstance(self.module, nn.SELU)

    @property
    def span(self) -> tuple[float, float]:
        """Ends of the range."""
        kind = next(k for k in type(self.module).__mro__ if k in INVERSES)
        return INVERSES[kind][1](self.module)

    @property
    def inside(self) -> float:
        """Some output inside the range."""
        low, high = self.span
        if math.isfinite(high - low):
            return 0.5 * (low + high)
        return 1.0 if low == 0 else -1.0 if high == 0 else 0.0

    def inverse(self, a: Tensor) -> Tensor:
        """``φ⁻¹(a)`` inside the range."""
        kind = next(k for k in type(self.module).__mro__ if k in INVERSES)
        return INVERSES[kind][0](self.module, a)

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        r""":math:`z = \phi^{-1}(a)`, with :math:`\phi'(z)`, entry by entry.

        Implements :eq:`activation-undone`.
        """
        if self.refusal is not None:
            raise self.refused(name)
        low, high = self.span
        refuse_outside(outputs, name, low, high, noise)
        inside = (outputs > low) & (outputs < high)
        z = self.inverse(torch.where(inside, outputs, self.inside))
        known = inside & torch.isfinite(z)
        z = torch.where(known, z, torch.zeros_like(z))
        slope = self.pull(torch.ones_like(z), z)
        return Undone(z, torch.where(known, slope, torch.zeros_like(z)), known)

    def clamp(self, outputs: Tensor) -> Tensor:
        """One per cent inside the range."""
        low, high = self.span
        margin = 0.01 * (high - low if math.isfinite(high - low) else 1.0)
        return outputs.clamp(low + margin, high - margin)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Each of the table."""
        yield from ((kind(), (3, 4)) for kind in INVERSES)
        yield nn.ELU(0.5), (7,)
        yield nn.Softplus(beta=2.0), (7,)


@rule_for(nn.LeakyReLU, nn.PReLU)
class LeakyReLU(OneToOne):
    """Two slopes: one-to-one, with a kink at zero."""

    kinked = homogeneous = True

    @property
    def span(self) -> tuple[float, float]:
        """Every number."""
        return -math.inf, math.inf

    @property
    def refusal(self) -> str | None:
        """A slope below zero that is not positive folds or flattens."""
        folded = bool((self.lower(torch.ones(1, self._channels)) <= 0).any())
        return (
            "its slope below zero is not positive: two inputs give one output" if folded else None
        )

    @property
    def _channels(self) -> int:
        return self.module.weight.numel() if isinstance(self.module, nn.PReLU) else 1

    def lower(self, a: Tensor) -> Tensor:
        """Slope below zero, shaped to go with ``a``."""
        if isinstance(self.module, nn.PReLU):
            return self.module.weight.detach().to(a).reshape(1, -1, *[1] * (a.dim() - 2))
        return torch.as_tensor(self.module.negative_slope, dtype=a.dtype, device=a.device)

    def inverse(self, a: Tensor) -> Tensor:
        """Divided by the slope below zero."""
        return torch.where(a > 0, a, a / self.lower(a))

    def clamp(self, outputs: Tensor) -> Tensor:
        """Every output has an input."""
        return outputs

    def turn(self, outputs: Tensor, k: Tensor, noise: float) -> Tensor | None:
        r""":math:`(\phi'_{\text{other side}} - \phi')\, k`."""
        lower = self.lower(outputs)
        return torch.where(outputs > 0, lower - 1, 1 - lower) * k

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """A fixed slope and a learned one for each channel."""
        yield nn.LeakyReLU(0.2), (3, 4)
        yield nn.PReLU(3), (3, 4)


@rule_for(nn.ReLU)
class ReLU(Rule):
    """A unit that is on is known; one that is off tells nothing, and its row is masked."""

    has_function = True
    elementwise = True
    kinked = homogeneous = rectifies = True

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """Positive entries as they are, the others unknown with slope 0."""
        refuse_outside(outputs, name, 0.0, math.inf, noise)
        known = ~(split_zeros(outputs, noise) | (outputs < 0))
        return Undone(torch.where(known, outputs, 0.0), known.to(outputs), known)

    def clamp(self, outputs: Tensor) -> Tensor:
        """No output is negative."""
        return outputs.clamp_min(0.0)

    def turn(self, outputs: Tensor, k: Tensor, noise: float) -> Tensor | None:
        """``k`` where a unit read as off is on after all, ``−k`` the other way."""
        known = self.undo(self.clamp(outputs), "", noise).known
        return torch.where(known, -k, k)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """The one there is."""
        yield nn.ReLU(), (4, 5)


class Hardsigmoid(nn.Hardsigmoid):
    """torch's own, which it cannot differentiate twice, with the slope that it takes for 1/6."""

    def forward(self, x: Tensor) -> Tensor:
        """``clamp(x, −3, 3)/6 + 1/2``."""
        with torch.enable_grad():
            middle = torch.zeros(1, dtype=x.dtype, device=x.device, requires_grad=True)
            (slope,) = torch.autograd.grad(nn.functional.hardsigmoid(middle), middle)
        inner = nn.functional.hardtanh(x, -3.0, 3.0)
        return nn.functional.hardsigmoid(x.detach()) + slope * (inner - inner.detach())


@rule_for(nn.Hardtanh, nn.ReLU6, nn.Hardsigmoid)
class Clipped(Rule):
    """Between its ends a unit is known; at an end it tells nothing, and its row is masked."""

    has_function = True
    elementwise = True
    kinked = True

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """Entries inside as they are, or on their line; the others unknown with slope 0."""
        (low, high), (steepness, offset) = self._ends, self._line
        refuse_outside(outputs, name, low, high, noise)
        at_end = split_zeros(outputs - low, noise) | split_zeros(high - outputs, noise)
        known = ~at_end & (outputs > low) & (outputs < high)
        z = torch.where(known, (outputs - offset) / steepness, 0.0)
        # torch's own slope of a hard sigmoid is 1/6 in float32, as the client's is
        return Undone(z, self.pull(known.to(outputs), z), known)

    @property
    def inside(self) -> float:
        """The middle."""
        return sum(self._ends) / 2

    def clamp(self, outputs: Tensor) -> Tensor:
        """No output lies beyond an end."""
        return outputs.clamp(*self._ends)

    @property
    def _ends(self) -> tuple[float, float]:
        if isinstance(self.module, nn.Hardsigmoid):
            return 0.0, 1.0
        module = cast(nn.Hardtanh, self.module)
        return float(module.min_val), float(module.max_val)

    @property
    def _line(self) -> tuple[float, float]:
        return (1 / 6, 0.5) if isinstance(self.module, nn.Hardsigmoid) else (1.0, 0.0)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Both ends near, and as MobileNets use it."""
        yield nn.Hardtanh(-0.5, 0.8), (4, 5)
        yield nn.ReLU6(), (7,)
        yield nn.Hardsigmoid(), (7,)


@rule_for(nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d)
class Softmax(Rule):
    """A softmax inside the network."""

    has_function = True
    reason: ClassVar[str] = "it forgets what is added to all of its inputs alike"


def refuse_outside(outputs: Tensor, name: str, low: float, high: float, noise: float) -> None:
    """Refuse outputs that the layer cannot have given."""
    outside = float(torch.clamp(torch.maximum(low - outputs, outputs - high), min=0).max())
    if outside > max(1e3 * noise, 1e-9) * float(outputs.abs().max()):
        raise InconsistentGradientError(
            f"The output found for {name} lies {outside:.2g} outside its range [{low}, {high}]: "
            "no input explains this gradient at this layer."
        )


def split_zeros(a: Tensor, noise: float) -> Tensor:
    """Tell entries that are zero from small ones: by the widest gap near the noise.

    True zeros come back as rounding noise, true values rarely that small; between the two lies
    a gap in the logarithms, looked for within four decades above the noise.
    """
    size = a.abs()
    top = float(size.max())
    low = max(noise, 1e-15) * top
    near = size[(size > low) & (size < 1e4 * low)].sort().values
    if near.numel() == 0 or top == 0:
        return size <= 10 * low
    edges = torch.cat([near.new_tensor([low]), near, near.new_tensor([1e4 * low])])
    gaps = edges[1:].log() - edges[:-1].log()
    widest = int(gaps.argmax())
    return size <= (edges[widest] * edges[widest + 1]).sqrt()

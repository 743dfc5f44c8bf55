"""Activations that fall before they rise: an output below zero has two inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .activations import refuse_outside, split_zeros
from .base import Example, Rule, Undone, rule_for

__all__ = ["TwoToOne"]

FARTHEST = -40.0  # where every one of them is zero to float64
HALVINGS = 64
RESOLVED = 10.0  # times √noise: a slope below it, at the minimum, tells no input apart from it


@rule_for(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
class TwoToOne(Rule):
    r""":math:`\phi(z) = a` has two solutions where ``min φ < a < 0``, and one where ``a > 0``.

    One lies right of the minimum and one left of it; which of them it was, the layer below tells
    (:func:`gradinv_edu.engine.preimages.settle`). Outputs that are zero are masked, as a ReLU's.
    """

    has_function = True
    elementwise = True

    @property
    def kinked(self) -> bool:  # type: ignore[override]
        """Of these, only :class:`torch.nn.Hardswish` is made of pieces."""
        return isinstance(self.module, nn.Hardswish)

    @property
    def turning(self) -> float:
        """Where the activation is least."""
        ends = torch.tensor([-3.0, -0.1], dtype=torch.float64)
        rising = lambda z: self.pull(torch.ones_like(z), z) > 0  # noqa: E731
        return float(_halve(rising, ends[:1], ends[1:]))

    @property
    def inside(self) -> float:
        """Some output with one input."""
        return 1.0

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        r"""The solution of :math:`\phi(z) = a` right of the minimum; ``other`` is left of it."""
        turning = self.turning
        least = float(self.forward(outputs.new_tensor([turning])))
        refuse_outside(outputs, name, least, math.inf, noise)
        outputs = outputs.clamp_min(least)
        zero, reliable = self._zero(outputs, noise), _reliable(noise)
        right = _halve(
            lambda z: self.forward(z) > outputs,
            torch.full_like(outputs, turning),
            outputs.clamp_min(0) - 2 * least,
        )
        left = _halve(
            lambda z: self.forward(z) < outputs,
            torch.full_like(outputs, -3.0 if self.kinked else FARTHEST),
            torch.full_like(outputs, turning),
        )
        left = torch.where(outputs < 0, left, right)
        return self._at(right, zero, reliable, self._at(left, zero, reliable))

    def tells(self, inputs: Tensor, name: str, noise: float) -> Tensor:
        """By the slope there; no need to look for the inputs."""
        zero = self._zero(self.forward(inputs), noise)
        return self._at(inputs, zero, _reliable(noise)).known

    def _zero(self, outputs: Tensor, noise: float) -> Tensor:
        top = max(float(outputs.abs().max()), 1e-300)
        zero = outputs.abs() <= 10 * max(noise, 1e-15) * top
        return zero | split_zeros(outputs, noise) if self.kinked else zero

    def _at(self, z: Tensor, zero: Tensor, reliable: float, other: Undone | None = None) -> Undone:
        slope = torch.where(zero, 0.0, self.pull(torch.ones_like(z), z))
        known = ~zero & (slope.abs() > reliable)
        return Undone(torch.where(zero, 0.0, z), slope, known, other)

    def clamp(self, outputs: Tensor) -> Tensor:
        """No output lies below the minimum."""
        return outputs.clamp_min(float(self.forward(outputs.new_tensor([self.turning]))))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Each, and both forms of GELU."""
        yield nn.GELU(), (3, 40)
        yield nn.GELU(approximate="tanh"), (30,)
        yield from ((kind(), (3, 40)) for kind in (nn.SiLU, nn.Mish, nn.Hardswish))


def _reliable(noise: float) -> float:
    """Slope below which an output tells no input."""
    return RESOLVED * math.sqrt(max(noise, 1e-15))


def _halve(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Bisect between ``low`` and ``high``, where ``above`` becomes true."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = above(middle)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2

"""What every loss answers, and which class answers for which loss of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ... import checks
from ...checks import checked
from ...errors import UnsupportedLossError
from ..low_rank import rank_one

__all__ = ["RULES", "Head", "Rule", "register", "rule"]


@dataclass(frozen=True)
class Head:
    """The last layer undone, for one sample or for the N of a batch.

    Attributes
    ----------
    k : Tensor
        ``∂L/∂z``, ``(N, m)``.
    inputs : Tensor
        Of the layer, ``(N, n)``.
    targets : Tensor
        Class indices ``(N,)`` for cross-entropy, else ``(N, m)``.
    residual : float
        How far the equations used contradict each other, relative.
    """

    k: Tensor
    inputs: Tensor
    targets: Tensor
    residual: float


class Rule(ABC):
    """One loss's equations at the last layer ``z = W x + b``.

    Parameters
    ----------
    loss : nn.Module

    Raises
    ------
    UnsupportedLossError
        For class weights, label smoothing or no reduction.
    """

    def __init__(self, loss: nn.Module) -> None:
        weights = (getattr(loss, "weight", None), getattr(loss, "pos_weight", None))
        smoothed = getattr(loss, "label_smoothing", None)
        self.reduction = str(loss.reduction)
        if any(w is not None for w in weights) or smoothed or self.reduction == "none":
            raise UnsupportedLossError(
                f"{type(loss).__name__} with class weights, label smoothing or reduction 'none' is "
                "not handled."
            )
        self.loss = loss

    @checked
    def heads(
        self,
        weight: Float[Tensor, " m n"],
        bias: Float[Tensor, " m"] | None,
        weight_gradient: Float[Tensor, " m n"],
        bias_gradient: Float[Tensor, " m"] | None,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
    ) -> list[Head]:
        """Every answer that explains the layer's gradient, best first.

        Parameters
        ----------
        weight, bias, weight_gradient, bias_gradient : Tensor
            ``(m, n)`` and ``(m,)``, as the client sent them: their numbers tell the precision.
            Either bias may be ``None``.
        batch_size : int
            Samples that the gradient is of.
        generator : torch.Generator, optional
            Of a search's random starts.

        Raises
        ------
        UndeterminedScaleError, UnsupportedLossError
            If the loss leaves the scale open, or says nothing of a batch.
        InvalidTensorError, VanishingGradientError, InconsistentGradientError, NotRecoveredError
            If a tensor cannot be, or no answer explains the gradient.
        """
        if batch_size != 1:
            return self.of_batch(
                weight, bias, weight_gradient, bias_gradient, batch_size, generator
            )
        if bias is not None and bias_gradient is not None and bool(bias_gradient.any()):
            return [self.from_bias(weight, bias, weight_gradient, bias_gradient)]
        return self.from_weight(weight, weight_gradient, bias)

    def from_bias(self, weight: Tensor, bias: Tensor, G: Tensor, k: Tensor) -> Head:
        """``k = ∂L/∂b``, ``x`` the ratio beside it, the target from ``z = W x + b``."""
        checks.not_all_zero(G, "weight_gradient")
        fit = rank_one(G, k)
        x = fit.right[:-1] / fit.right[-1]
        target = self.target(weight @ x + bias, k * self.terms(1, len(k)))
        return Head(k[None], x[None], target[None], fit.residual)

    def of_batch(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_gradient: Tensor,
        bias_gradient: Tensor | None,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> list[Head]:
        """Take a batch apart; only softmax cross-entropy does."""
        raise UnsupportedLossError(
            "A batch is taken apart by the equations of softmax cross-entropy, without class "
            f"weights or label smoothing; got {self.loss!r}."
        )

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``k = ∂L/∂z`` at outputs ``(N, m)`` and targets, ``(N, m)``, float64."""
        z = outputs.double()
        return self.slope(z, targets) / self.terms(*z.shape)

    def terms(self, samples: int, outputs: int) -> int:
        """How many terms the loss is the mean of: one for a sum."""
        return samples * outputs if self.reduction == "mean" else 1

    @abstractmethod
    def from_weight(self, W: Tensor, G: Tensor, bias: Tensor | None) -> list[Head]:
        """Answers for one sample without a bias gradient."""

    @abstractmethod
    def slope(self, z: Tensor, targets: Tensor) -> Tensor:
        """``k`` of a sum of terms, ``(N, m)``."""

    @abstractmethod
    def target(self, z: Tensor, k: Tensor) -> Tensor:
        """Target of one sample with outputs ``z`` and slope ``k``, both ``(m,)``."""


RULES: dict[type[nn.Module], type[Rule]] = {}


def register(loss: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Let the decorated class answer for this loss."""

    def entered(cls: type[Rule]) -> type[Rule]:
        RULES[loss] = cls
        return cls

    return entered


def rule(loss: nn.Module) -> Rule:
    """The equations of a loss, by its type.

    Raises
    ------
    UnsupportedLossError
        If none are known; the message lists the losses that have some.
    """
    for kind, found in RULES.items():
        if isinstance(loss, kind):
            return found(loss)
    *names, last = (kind.__name__ for kind in RULES)
    raise UnsupportedLossError(
        f"{type(loss).__name__} is not handled; {', '.join(names)} and {last} are."
    )

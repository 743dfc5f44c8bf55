"""Normalisation: affine with known statistics, else two more unknowns a group, its σ and its μ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from .base import Affine, Example, Rule, Undone, rule_for

__all__ = ["GroupNorm", "Groups", "LayerNorm", "LocalResponse", "Norm", "RunningNorm"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_InstanceNorm = nn.modules.instancenorm._InstanceNorm
_RMSNorm = getattr(nn, "RMSNorm", ())


@dataclass(frozen=True)
class Groups:
    """Which entries of a norm's input share a mean ``μ`` and a deviation ``σ``.

    Attributes
    ----------
    of : Tensor
        Group of each entry, shaped as the norm's input, batch included.
    family : Tensor
        ``(groups,)``: groups of one family stand or fall by one common factor; each sample has one
        of its own, but in a batch norm all samples share one.
    """

    of: Tensor
    family: Tensor

    def sum(self, t: Tensor) -> Tensor:
        """Over the entries of each group."""
        zero = t.new_zeros(len(self.family))
        return zero.index_add(0, self.of.reshape(-1), t.reshape(-1))

    def spread(self, v: Tensor) -> Tensor:
        """To every entry what belongs to its group."""
        return v[self.of]

    @cached_property
    def count(self) -> Tensor:
        """Entries of each group."""
        return self.of.reshape(-1).bincount(minlength=len(self.family)).double()

    def moments(self, z: Tensor, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of each group, what is left of ``z`` without it, and the mean square of that.

        Not ``centred``: the mean is zero.
        """
        mean = self.sum(z) / self.count * centred
        left = z - self.spread(mean)
        return mean, left, self.sum(left.square()) / self.count

    def total(self, v: Tensor) -> Tensor:
        """Over the groups of each family."""
        return v.new_zeros(int(self.family.max()) + 1).index_add(0, self.family, v)


class Norm(Rule):
    r""":math:`y = \gamma\,\hat x + \beta,\; \hat x = (z - \mu_g)/\sigma_g` of its own input.

    Taken together with the affine layer below, it is linear in that layer's input and in ``σ`` and
    ``μ`` (:mod:`gradinv_edu.engine.norm_system`).
    """

    normalises = True
    reason: ClassVar[str] = "it divides by statistics of its own input"

    @property
    def refusal(self) -> str | None:
        """None: the walk takes it with the layer below."""
        return None if self.normalises else super().refusal

    @property
    def centred(self) -> bool:
        """Whether it takes a mean away."""
        return not (_RMSNorm and isinstance(self.module, _RMSNorm))

    @property
    def eps(self) -> float:
        """Added to the variance."""
        eps = getattr(self.module, "eps", None)
        return torch.finfo(torch.float64).eps if eps is None else float(eps)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Of ``γ`` and ``β``, with dimensions of one where they are the same for all entries."""
        return tuple(cast(nn.LayerNorm, self.module).normalized_shape)

    def coefficients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``γ`` and ``β``, which go with every entry of ``like``."""
        shape = self.broadcast(like)
        weight, bias = (getattr(self.module, name, None) for name in ("weight", "bias"))
        gain = like.new_ones(shape) if weight is None else weight.detach().to(like).reshape(shape)
        shift = like.new_zeros(shape) if bias is None else bias.detach().to(like).reshape(shape)
        return gain.expand_as(like), shift.expand_as(like)

    def parameter_sum(self, t: Tensor) -> Tensor:
        """Over the entries that share a parameter, flat: ``∂L/∂β`` from ``∂L/∂y``."""
        return t.sum_to_size(self.broadcast(t)).reshape(-1)

    def groups(self, shape: torch.Size, device: torch.device | None = None) -> Groups:
        """Entries that share their statistics."""
        leading = shape[: len(shape) - len(self.parameter_shape)]
        number = torch.arange(math.prod(leading), device=device)
        of = number.reshape(*leading, *[1] * len(self.parameter_shape)).expand(shape)
        return Groups(of, number // max(math.prod(leading[1:]), 1))

    def broadcast(self, like: Tensor) -> tuple[int, ...]:
        """Shape in which ``γ`` and ``β`` go with ``like``."""
        return (*[1] * (like.dim() - len(self.parameter_shape)), *self.parameter_shape)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Over all that belongs to a sample, and over its last dimension."""
        yield nn.LayerNorm((3, 4, 2)), (3, 4, 2)
        yield nn.LayerNorm(6), (6,)


@rule_for(nn.LayerNorm, *((_RMSNorm,) if _RMSNorm else ()))
class LayerNorm(Norm):
    """Over the last dimensions."""


@rule_for(nn.GroupNorm)
class GroupNorm(Norm):
    """Over some channels of a sample."""

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """One for each channel."""
        return (cast(nn.GroupNorm, self.module).num_channels,)

    def groups(self, shape: torch.Size, device: torch.device | None = None) -> Groups:
        """Neighbouring channels of a sample."""
        module = cast(nn.GroupNorm, self.module)
        count = module.num_groups
        group = torch.arange(shape[1], device=device) // (shape[1] // count)
        sample = torch.arange(shape[0], device=device)
        of = (count * sample[:, None] + group).reshape(*shape[:2], *[1] * (len(shape) - 2))
        family = torch.arange(shape[0] * count, device=device) // count
        return Groups(of.expand(shape), family)

    def broadcast(self, like: Tensor) -> tuple[int, ...]:
        """Along the channels."""
        return (1, *self.parameter_shape, *[1] * (like.dim() - 2))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """With two groups."""
        yield nn.GroupNorm(2, 4), (4, 3, 2)


@rule_for(_BatchNorm, _InstanceNorm)
class RunningNorm(GroupNorm, Affine):
    """Over one channel, of the batch or a sample; affine in eval mode with running statistics."""

    reason: ClassVar[str] = "in train mode it divides by statistics of its own input"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        norm = cast(_BatchNorm, module)
        fixed = not norm.training and norm.running_var is not None
        self.affine = self.elementwise = fixed
        self.normalises = not fixed

    @property
    def random(self) -> bool:
        """Statistics of the batch."""
        return self.normalises and isinstance(self.module, _BatchNorm)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """One for each channel."""
        return (cast(_BatchNorm, self.module).num_features,)

    def groups(self, shape: torch.Size, device: torch.device | None = None) -> Groups:
        """One channel of all samples, or of one."""
        channel = torch.arange(shape[1], device=device).reshape(1, -1, *[1] * (len(shape) - 2))
        if isinstance(self.module, _BatchNorm):
            return Groups(channel.expand(shape), channel.new_zeros(shape[1]))
        sample = torch.arange(shape[0], device=device).reshape(-1, *[1] * (len(shape) - 1))
        family = torch.arange(shape[0] * shape[1], device=device) // shape[1]
        return Groups((sample * shape[1] + channel).expand(shape), family)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; its running statistics stay as they were."""
        norm = cast(_BatchNorm, self.module)
        if not self.normalises:
            y: Tensor = norm(x)
            return y
        own = nn.functional.batch_norm if self.random else nn.functional.instance_norm
        if self.random and x.numel() == x.shape[1]:  # one sample has no statistics of its own
            if norm.running_mean is None or norm.running_var is None:
                return x * 1.0
            kept = norm.running_mean, norm.running_var
            return nn.functional.batch_norm(x, *kept, norm.weight, norm.bias, eps=norm.eps)
        return own(x, None, None, norm.weight, norm.bias, True, eps=norm.eps)

    def statistics(
        self, sent: tuple[Tensor, Tensor], entries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        r""":math:`\mu = (r' - (1 - m)\,r)/m` from the running mean before and after one step.

        Parameters
        ----------
        sent : tuple of Tensor
            Running mean and variance after the client's one step.
        entries : int
            Of each channel in the client's batch.

        Returns
        -------
        mean, deviation : Tensor
            ``μ`` and ``σ``, eps included, of each channel of the client's batch.
        weight : Tensor
            Of these as equations: one unit of rounding of what was sent is more of ``σ``.
        """
        norm = cast(_BatchNorm, self.module)
        assert norm.running_mean is not None and norm.running_var is not None
        m = norm.momentum
        if m is None:  # a plain mean over all steps so far
            steps = norm.num_batches_tracked
            m = 1.0 / (1.0 + (0.0 if steps is None else float(steps)))
        before = norm.running_mean.double(), norm.running_var.double()
        mean, var = ((s.double() - (1 - m) * b) / m for s, b in zip(sent, before, strict=True))
        var = var * (entries - 1) / entries
        var = var.clamp_min(0) + self.eps
        return mean, var.sqrt(), (m * var / sent[1].double().abs()).clamp(1e-6, 1.0)

    def undo(self, outputs: Tensor, name: str, noise: float) -> Undone:
        """Shift and scale taken back; a channel with ``γ = 0`` stays unknown."""
        norm = cast(_BatchNorm, self.module)
        if self.normalises:
            return super().undo(outputs, name, noise)
        assert norm.running_mean is not None and norm.running_var is not None
        shape = [1, -1] + [1] * (outputs.dim() - 2)
        gain, shift = self.coefficients(outputs)
        gain = gain / torch.sqrt(norm.running_var.double() + norm.eps).reshape(shape)
        known = gain != 0
        safe = torch.where(known, gain, torch.ones_like(gain))
        z = (outputs - shift) / safe + norm.running_mean.double().reshape(shape)
        return Undone(torch.where(known, z, torch.zeros_like(z)), gain, known)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """In both modes, with and without a scale of its own."""
        yield nn.BatchNorm2d(2).eval(), (2, 4, 3)
        yield nn.BatchNorm1d(3, affine=False).eval(), (3,)
        yield nn.BatchNorm2d(2).train(), (2, 4, 3)
        yield nn.InstanceNorm1d(2), (2, 5)


@rule_for(nn.LocalResponseNorm, nn.CrossMapLRN2d)
class LocalResponse(Rule):
    """Norms over neighbours."""

    reason: ClassVar[str] = "it divides by the size of its neighbours"

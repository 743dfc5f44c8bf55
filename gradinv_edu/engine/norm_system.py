"""A norm of its own statistics over an affine layer: σ and μ as linear unknowns beside x."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .gauss_newton import Linearised
from .hidden import constants
from .krylov import Rows, squared_norm
from .layers import Affine, rule_of, weight_names
from .layers.norms import Groups, Norm
from .solve import draw

__all__ = ["NormSystem", "Sent", "entries", "nonzero", "per_sample"]

FIXED = 1e-12  # relative size of a bias beside its mean that counts as none


@dataclass(frozen=True)
class Sent:
    """Statistics of the client's batch, as its running buffers tell them.

    Attributes
    ----------
    mean, deviation : Tensor
        ``μ`` and ``σ`` of each group.
    weight : Tensor
        Of these as equations: what one unit of rounding of them is worth.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor


class NormSystem:
    r""":math:`W x - \mu_g - \sigma_g \hat x = 0,\; K(\tilde\kappa)\,x = \sigma_g\,G`.

    Equations of an affine layer ``z = W x + b`` under ``y = γ x̂ + β``, ``x̂ = (z − μ_g)/σ_g``, in
    the unknowns ``x``, ``σ``, ``μ`` and, for the part of ``b`` that ``μ`` does not swallow, a
    factor ``τ`` of it; ``G = ∂L/∂W``. With ``κ = γ ∂L/∂y`` the output gradient is ``k = κ̃/σ_g``,
    ``κ̃ = κ − mean κ − x̂ mean κx̂``, eps included. Five kinds of rows:

    1. the known entries of ``x̂``;
    2. the mean of ``x̂`` is zero: so is a group's sum of ``W x − μ``, unknown entries included;
    3. the weight's gradient, times ``σ`` where each filter has one ``σ``;
    4. one for each family of groups, without which ``x = σ = μ = 0`` would do: a mean of ``σ`` is
       one, and that of a wholly dead group zero. Or ``σ`` and ``μ`` themselves, where the client
       sent its running statistics;
    5. where a constant added to some entries of ``x`` changes every group by a constant, and so
       nothing (:func:`~gradinv_edu.engine.hidden.constants`): their mean is zero.

    Where all entries are known and each filter has one ``σ``, the equations are linear.

    Parameters
    ----------
    module : nn.Module
        The affine layer, float64.
    norm : Norm
        Rule of the norm.
    outputs, output_gradient : Tensor
        ``y`` and ``∂L/∂y``, ``(N, *output_shape)``; unknown entries have no gradient.
    input_shape : tuple of int
        Of one sample.
    weight_gradient : Tensor, optional
        ``∂L/∂W``; None leaves its rows out.
    row_mask : Tensor, optional
        Zero where ``y`` is unknown; None: nowhere.
    sent : Sent, optional
        Statistics of the batch.
    means : tuple of Tensor, optional
        ``mean κ`` and ``mean κx̂`` of each group, where the outputs do not tell.

    Notes
    -----
    Source: this project's.
    """

    def __init__(
        self,
        module: nn.Module,
        norm: Norm,
        outputs: Tensor,
        output_gradient: Tensor,
        input_shape: tuple[int, ...],
        weight_gradient: Tensor | None = None,
        row_mask: Tensor | None = None,
        *,
        sent: Sent | None = None,
        means: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module, self.norm, self.sent = module, norm, sent
        self.given = (module, norm, outputs, output_gradient, input_shape, weight_gradient)
        self.row_mask = row_mask
        self.like = outputs.new_zeros(len(outputs), *input_shape)
        self.groups: Groups = norm.groups(outputs.shape, outputs.device)
        gain, shift = norm.coefficients(outputs)
        self.gain, self.shift = gain, shift
        self.known = gain != 0 if row_mask is None else (gain != 0) & (row_mask > 0)
        safe = torch.where(self.known, gain, torch.ones_like(gain))
        self.xhat = torch.where(self.known, (outputs - shift) / safe, 0.0)
        self.kappa = gain * output_gradient
        self.count = self.groups.count
        mean = self.groups.sum(self.kappa), self.groups.sum(self.kappa * self.xhat)
        self.m0, self.m1 = means or (mean[0] / self.count, mean[1] / self.count)
        self.m0 = self.m0 * norm.centred
        self._layer(weight_gradient)
        self.dead = ~self.known
        self.linear = self.shared and bool(self.known.all())
        self.unseen = None
        if sent is None and norm.centred:
            self.unseen = constants(self.module, self.groups, self.like)
        self.frozen: Tensor | None = None
        sizes = [self.like.numel(), len(self.groups.family)]
        sizes += [sizes[1] if norm.centred else 0, self.families if self.has_tau else 0]
        self.sizes = sizes
        self.per_column, self.scale, self.gradient_scale = self.like.new_ones(sum(sizes)), 1.0, 1.0
        self.share, self.idle = torch.ones_like(self.count), torch.zeros_like(self.count)

    def _layer(self, gradient: Tensor | None) -> None:
        """What the affine layer adds: its bias beside the group's mean, its weight's gradient."""
        names = weight_names(self.module)
        self.constants = {
            name: p.detach().to(self.like)
            for name, p in (*self.module.named_parameters(), *self.module.named_buffers())
        }
        with torch.no_grad():
            offset: Tensor = functional_call(self.module, self.constants, (self.like,))
        self.offset = offset
        if self.norm.centred and self.sent is None:
            middle = self.groups.sum(offset) / self.count
            self.offset = offset - self.groups.spread(middle)
        self.families = int(self.groups.family.max()) + 1
        size = max((float(p.abs().max()) for p in self.constants.values()), default=0.0)
        self.has_tau = self.sent is None and float(self.offset.abs().max()) > FIXED * size
        self.bare = offset
        single = len(names) == 1 and gradient is not None
        self.weight: str | None = names[0] if single else None
        self.gradient: Tensor | None = gradient if single else None
        self.shared, self.group_of = True, self.groups.of.new_zeros(0)
        if self.weight is None:
            return
        layer = self.module.get_submodule(self.weight.rpartition(".")[0])
        channels = cast(Affine, rule_of(layer)).channels(self.constants[self.weight])
        axis = self._filters(channels)
        if axis is None:
            self.weight = self.gradient = None
            return
        of = self.groups.of.movedim(axis, 0).flatten(1)
        self.shared = bool((of == of[:, :1]).all())
        self.group_of = of[:, 0][channels]

    def _filters(self, channels: Tensor) -> int | None:
        """Axis of the output along which the channels lie: what follows may have moved it."""
        assert self.weight is not None
        weight = self.constants[self.weight]
        first = (channels == 0).to(weight).expand_as(weight)
        x = draw(self.like, torch.Generator().manual_seed(0))
        outs: list[Tensor] = [
            functional_call(self.module, {**self.constants, self.weight: w}, (x,))
            for w in (first, torch.zeros_like(weight))
        ]
        moved, rest = outs[0] != outs[1], int(channels.max())
        for axis in range(1, moved.dim()):
            if moved.shape[axis] == rest + 1 and not bool(moved.narrow(axis, 1, rest).any()):
                return axis
        return None

    def without_sent(self) -> NormSystem:
        """The same without the statistics that were sent."""
        return NormSystem(*self.given, self.row_mask)

    # --- unknowns and rows ----------------------------------------------------------------------

    @property
    def unknowns(self) -> int:
        """Entries of ``x``, ``σ``, ``μ`` and ``τ``."""
        return sum(self.sizes)

    @property
    def gradient_equations(self) -> int:
        """Entries of the weight's gradient."""
        return 0 if self.gradient is None else self.gradient.numel()

    @property
    def equations(self) -> int:
        """Rows of all kinds."""
        sums = int((self.groups.sum(self.dead.double()) > 0).sum()) if self.norm.centred else 0
        fixed = 2 * len(self.groups.family) if self.sent is not None else self.families
        return int(self.known.sum()) + sums + fixed + self.gradient_equations

    def split(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x``, ``σ``, ``μ`` of each group, ``τ`` of each family."""
        x, sigma, mu, tau = torch.split(v, self.sizes)
        mu = mu if len(mu) else torch.zeros_like(sigma)
        one = v.new_ones(self.families) if self.sent is not None else v.new_zeros(self.families)
        return x.reshape(self.like.shape), sigma, mu, tau if self.has_tau else one

    def centre(self, v: Tensor, weight: Tensor | None = None) -> Tensor:
        """``W x + τ b − μ`` of every entry."""
        x, _, mu, tau = self.split(v)
        constants = self.constants
        if weight is not None and self.weight is not None:
            constants = {**constants, self.weight: weight}
        z: Tensor = functional_call(self.module, constants, (x,))
        factor = self.groups.spread(tau[self.groups.family])
        return z - self.bare + factor * self.offset - self.groups.spread(mu)

    def normal(self, v: Tensor, centre: Tensor) -> Tensor:
        """``x̂`` of every entry: where it is not known, from the unknowns, or as it is frozen."""
        if self.frozen is not None:
            return torch.where(self.known, self.xhat, self.frozen)
        if bool(self.known.all()):
            return self.xhat
        sigma = self.groups.spread(nonzero(self.split(v)[1]))
        return torch.where(self.known, self.xhat, centre / sigma)

    def gradient_of_norm(self, xhat: Tensor) -> Tensor:
        """``κ̃ = σ k``."""
        spread = self.groups.spread
        return self.kappa - spread(self.m0) - spread(self.m1) * xhat

    def rows(self, u: Tensor) -> Rows:
        """All rows at scaled unknowns; differentiable."""
        v, spread = u * self.per_column, self.groups.spread
        with torch.enable_grad():
            weight = None
            if self.weight is not None:
                weight = self.constants[self.weight].detach().requires_grad_()
            zc = self.centre(v, weight)
            _, sigma, mu, _ = self.split(v)
            parts = [(self.known * (zc - spread(sigma) * self.xhat)).reshape(-1)]
            if self.norm.centred:
                active = self.groups.sum(self.xhat)
                sums = self.groups.sum(self.dead * zc) + sigma * active
                parts.append(sums / self.count.sqrt())
            parts += self._scale_rows(sigma, mu)
            if self.unseen is not None:
                parts.append(self.scale * _means(v[: self.sizes[0]], self.unseen))
            g = u.new_zeros(0)
            if self.gradient is not None and weight is not None:
                kappa = self.gradient_of_norm(self.normal(v, zc))
                kappa = kappa if self.shared else kappa / spread(nonzero(sigma))
                (found,) = torch.autograd.grad(zc, weight, kappa, create_graph=True)
                times = sigma[self.group_of] if self.shared else 1.0
                g = self.gradient_scale * (found - times * self.gradient)
            return Rows(torch.cat(parts), g.reshape(-1))

    def _scale_rows(self, sigma: Tensor, mu: Tensor) -> list[Tensor]:
        if self.sent is None:
            idle = self.scale * self.idle * sigma
            return [self.scale * self.groups.total(self.share * sigma), idle]
        by = self.scale * self.sent.weight
        return [by * sigma / self.sent.deviation, by * mu / self.sent.deviation]

    @property
    def target(self) -> Rows:
        """What the rows are to be."""
        zero = self.like.new_zeros(0)
        sizes = self.known.numel() + (len(self.count) if self.norm.centred else 0)
        parts = [self.like.new_zeros(sizes)]
        if self.sent is None:
            parts.append(self.scale * self.like.new_ones(self.families))
            parts.append(torch.zeros_like(self.idle))
        else:
            by = self.scale * self.sent.weight
            parts += [by, by * self.sent.mean / self.sent.deviation]
        if self.unseen is not None:
            parts.append(self.like.new_zeros(int(self.unseen.max()) + 1))
        g = zero if self.gradient is None else self.like.new_zeros(self.gradient.numel())
        return Rows(torch.cat(parts), g)

    # --- how they are weighed -------------------------------------------------------------------

    def freeze(self, v: Tensor | None = None) -> None:
        """Hold the unknown entries of ``x̂``: at ``v``, or at their mean, which is known."""
        self.frozen = None
        if v is not None:
            self.frozen = self.normal(v, self.centre(v)).detach()
            return
        dead = self.groups.sum(self.dead.double())
        mean = -self.groups.sum(self.xhat) / dead.clamp_min(1)
        self.frozen = self.groups.spread(mean)

    def balance(self, v: Tensor | None, generator: torch.Generator | None) -> None:
        """Scale columns and rows alike: those of ``σ``, ``μ``, ``τ`` by what they do.

        Rows are weighed at the unknowns ``v``, or with the unknown entries frozen.
        """
        groups, weight = self.groups, self.constants.get(self.weight or "")
        xhat = torch.where(self.known, self.xhat, self.frozen if self.frozen is not None else 0.0)
        if v is not None:
            xhat = self.normal(v, self.centre(v)).detach()
        kappa = float(self.gradient_of_norm(xhat).norm())
        if v is not None and not self.shared:
            spread = groups.spread(nonzero(self.split(v)[1]))
            kappa = float((self.gradient_of_norm(xhat) / spread).norm())
        self.gradient_scale = 1.0
        if weight is not None and kappa > 0:
            self.gradient_scale = float(weight.norm()) / kappa
        squares = groups.sum(self.xhat**2)
        if self.gradient is not None and self.shared:
            own = (self.gradient_scale * self.gradient).square().flatten()
            group_of = self.group_of.expand_as(self.gradient).flatten()
            squares = squares.index_add(0, group_of, own)
        total = groups.total(squares)[groups.family]
        self.share = squares / total.clamp_min(1e-300)
        self.idle = (squares == 0).to(squares)  # no equation holds the σ of a wholly dead group
        self.per_column, self.scale = self.like.new_ones(self.unknowns), 1.0
        direction = torch.zeros_like(self.per_column)
        probe = draw(self.like, generator or torch.Generator().manual_seed(0)).reshape(-1)
        direction[: len(probe)] = probe
        at = torch.zeros_like(direction) if v is None else v
        response = Linearised(self.rows, at).forward(direction)
        self.scale = size = math.sqrt(response.squared_norm() / squared_norm(probe)) or 1.0
        dead = groups.sum(self.dead.double())
        if self.sent is not None:
            squares = squares + (size * self.sent.weight / self.sent.deviation) ** 2
        columns = [squares + size**2 * self.idle]
        if self.norm.centred:
            mu = self.count - dead + dead**2 / self.count
            if self.sent is not None:
                mu = mu + (size * self.sent.weight / self.sent.deviation) ** 2
            columns.append(mu)
        if self.has_tau:
            columns.append(groups.total(groups.sum(self.offset**2)))
        self.per_column[len(probe) :] = size / torch.cat(columns).clamp_min(1e-300).sqrt()

    def at(self, x: Tensor) -> Tensor:
        """All unknowns, from the affine layer's input."""
        one, zero = x.new_ones(self.families), x.new_zeros(2 * len(self.count))
        tau = one if self.has_tau else one[:0]
        v = torch.cat([x.reshape(-1), zero[: self.sizes[1] + self.sizes[2]], tau])
        z, groups = self.centre(v), self.groups
        mu, _, variance = groups.moments(z, self.norm.centred)
        sigma = (variance + self.norm.eps).sqrt()
        return torch.cat([x.reshape(-1), sigma, mu[: self.sizes[2]], tau])

    def normed(self, v: Tensor) -> Tensor:
        """The unknowns with each family's factor such that its mean ``σ`` is one."""
        if self.sent is not None:
            return v
        mean = self.groups.total(self.share * self.split(v)[1])
        by = 1 / nonzero(mean)
        x, sigma, mu, tau = self.split(v)
        each = per_sample(by, x).reshape(-1, *[1] * (x.dim() - 1))
        parts = [x * each, sigma * by[self.groups.family]]
        parts += [mu * by[self.groups.family]] if self.norm.centred else []
        parts += [tau * by] if self.has_tau else []
        return torch.cat([part.reshape(-1) for part in parts])

    def scaled(self, v: Tensor) -> Tensor:
        """The unknowns in the scale of their columns."""
        return v / self.per_column

    def rest(self, u: Tensor) -> Rows:
        """What the unknowns leave unexplained."""
        rest, found = self.target, self.rows(u)
        rest.minus(Rows(found.z.detach(), found.g.detach()))
        return rest

    def size(self, v: Tensor) -> float:
        """Norm of the terms that the rows compare."""
        sigma = self.split(v)[1]
        parts = squared_norm(self.groups.spread(sigma) * self.xhat)
        if self.gradient is not None:
            times = sigma[self.group_of] if self.shared else 1.0
            parts += squared_norm(self.gradient_scale * times * self.gradient)
        return math.sqrt(parts) or 1.0


def _means(x: Tensor, pattern: Tensor) -> Tensor:
    """Sums over the entries of each number, over the root of how many they are."""
    number = pattern.reshape(-1)
    own = number >= 0
    zero = x.new_zeros(int(number.max()) + 1)
    total = zero.index_add(0, number[own], x.reshape(-1)[own])
    return total / zero.index_add(0, number[own], torch.ones_like(x.reshape(-1)[own])).sqrt()


def nonzero(sigma: Tensor) -> Tensor:
    """``σ`` to divide by: one where it is zero."""
    return torch.where(sigma.abs() < 1e-30, torch.ones_like(sigma), sigma)


def per_sample(by: Tensor, x: Tensor) -> Tensor:
    """A family's factor, for each sample."""
    return by.expand(len(x)) if len(by) == 1 else by


def entries(norm: Norm, shape: tuple[int, ...]) -> int:
    """Of the smallest group; with one alone a norm that takes the mean away leaves nothing."""
    if not norm.centred:
        return max(math.prod(shape), 2)
    groups = norm.groups(torch.Size(shape))
    return int(groups.sum(torch.ones(shape)).min())

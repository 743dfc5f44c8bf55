"""The places of max pooling's winners, as beliefs that sharpen round by round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .folded import Beneath, Folded
from .krylov import Rows, cgls, squared_norm
from .solve import Preconditioned
from .winners import Winners

__all__ = ["Annealing"]

HELD = 0.1  # share of the winners whose rows are left out of a round, to tell how far off it is
PRIOR = 0.5  # weight of total variation at first, in squared norms of a filter
EDGE = 0.04  # in standard deviations: differences of neighbours beyond it cost little more
PLAIN = 1e-3  # of the prior, on the input itself
MIXED = 0.05  # least share of the mean variance of differences that a mix of channels may have
OPINION = 3.0  # weight of what the gradient says of a winner's place
DOUBT = 1e-4  # no place is ever ruled out for good
SURE = 0.99  # belief from which a place counts as found
ALIKE = 1e-3  # in deviations: candidates as far from the value have one value
FADING = 0.985  # of the prior from one round to the next, at least
NOISY = 10.0  # times the noise of the gradients: that of the values
FEW = 1024  # positions whose inner products are all computed; winners at a time where more
MOST = 0.85  # share of sure winners from which the gradient can tell the others
OUTLYING = 0.5  # weight of a winner's row below which it counts as in doubt
PLAUSIBLE = 1e-6  # of the likeliest place: what another needs to be tried
NEAR = 1e-3  # error from which the prior may go altogether
WEAK = 0.02  # of the prior in rounds that leave places free
CAUTION = 3.0  # times the deviation that winners in doubt tell: the likeliest place flatters it
LATE = 0.985  # share of sure winners from which the prior counts a tenth


class Annealing:
    r""":math:`\min_{x,e} \lVert m(Wx{+}b{-}v)\rVert^2+\lVert K(k{+}k'e)x{-}G\rVert^2+\mu TV(x)`.

    Each round first solves for the input ``x``: with a row at each place in proportion to the
    belief that a winner is there (``m``), and with each winner's ``k`` at its expected place, which
    ``e`` moves by its own spread. Then each winner is asked anew where it is, by how far its
    candidates in ``W x + b`` are from its value. The prior ``μ`` fades with the error, which is
    told by winners whose rows were held out. Once most are found, rounds without the prior leave
    the places of all others to the gradient: near ties, which rows cannot tell apart, it can.

    Parameters
    ----------
    layer : Folded
        The convolution below the pooling.
    under : Beneath
        What leads to it from the unknown.
    winners : Winners
        With their candidates.
    gradient : Tensor
        Of ``layer``'s weight.
    noise : float
        Relative noise of the values.
    generator : torch.Generator
        Of the rows held out.

    Attributes
    ----------
    x : Tensor
        The input as it is now.
    belief : Tensor
        ``(winners, candidates)``, probability of each place.
    sure : Tensor
        ``(winners,)``, bool: which are found.
    error : float
        Estimate of how far ``W x`` is off, per filter of norm one.
    """

    def __init__(
        self,
        layer: Folded,
        under: Beneath,
        winners: Winners,
        gradient: Tensor,
        noise: float,
        generator: torch.Generator,
    ) -> None:
        self.layer, self.under, self.winners, self.gradient = layer, under, winners, gradient
        self.generator, self.round = generator, 0
        self.x = torch.full(under.shape, 0.5, dtype=torch.float64, device=layer.bias.device)
        possible = winners.possible.double()
        self.uniform = possible / possible.sum(1, keepdim=True)
        self.belief = self.uniform
        self.z = torch.full_like(winners.bounds, -torch.inf).reshape(1, *layer.output_shape)
        self.norms = layer.weight.flatten(1).norm(dim=1)
        self.strength = PRIOR * float(self.norms.square().mean())
        self.norms = self.norms / self.norms.mean()
        self.size = float(winners.values.abs().mean()) or 1.0
        self.floor = max(1e-10, NOISY * noise) * self.size  # of violations, and of the error
        self.error = self.first = math.inf
        self.outlying = torch.ones_like(winners.values)
        self.trust = torch.ones_like(layer.bias)
        self.prior = 1.0
        self.misses = self.x.new_zeros(2, *winners.map_shape)
        self.choice = self.belief.argmax(1)
        self.changed, self.sure = len(self.choice), self.choice < 0

    @property
    def settling(self) -> bool:
        """Whether so many places are sure that the gradient can tell the others."""
        return float(self.sure.double().mean()) >= MOST

    def turn(self, free: bool = False) -> None:
        """One round; ``free``: without the prior, places in doubt told by the gradient alone."""
        w, first = self.winners, self.round == 0
        held = ~(self.sure & (self.outlying > OUTLYING)) if free else self._hold()
        system, b, scales = self._system(held, free)
        late = self.error < 1e-2 * self.size and self.round > 5
        steps = (400 if self.error > NEAR * self.size else 1000) if free else 200 if late else 120
        u = torch.cat([self.x.flatten(), torch.zeros_like(self.belief).flatten()])
        near = min(1.0, self.error / self.size / NEAR)
        tolerance = min(1e-4, 1e-2 * min(1.0, self.error / self.size))
        tolerance *= max(0.1, near) if free else 1.0
        u = _solve(system, b, u, scales, steps, tolerance)
        self.x, e = system.split(u)
        told = self.belief + system.shifted(e)
        left = system.unexplained(self.x, e, self.gradient)
        self.z = self.layer(self.under.look(self.x))
        excess = (w.gather(self.z) - w.values[:, None]) / self.norms[w.filters][:, None]
        excess = torch.where(w.possible, excess, -torch.inf)
        deviation = self._deviation(excess, held, free) * (CAUTION if free else 1.0)
        self._believe(excess, deviation, told)
        if self.round > 2:
            spread = left.median() + 1e-300
            self.trust = 1 / (1 + left / (9 * spread))
        self.first = self.error if first else self.first
        self.prior = min(FADING * self.prior, self.error / (self.first or 1.0))
        self.round += 1

    def _hold(self) -> Tensor:
        source = self.generator
        drawn = torch.rand(len(self.choice), generator=source, device=source.device)
        return (
            (drawn.to(self.x.device) < HELD) & (self.winners.possible.sum(1) > 1) & (self.round > 0)
        )

    def _system(self, held: Tensor, free: bool) -> tuple[_Joint, Rows, tuple[Tensor, Tensor]]:
        w, layer, under = self.winners, self.layer, self.under
        first, late = self.round == 0, 0.1 if float(self.sure.double().mean()) >= LATE else 1.0
        late = WEAK * min(1.0, self.error / self.size / NEAR) ** 2 if free else late
        a = under.look(self.x)
        k = w.scatter(self.belief * w.k[:, None])
        weight = (0.3 * self.belief if first else self.belief**8) * (self.outlying * ~held)[:, None]
        m, target = w.scatter(weight), w.scatter(weight * w.values[:, None])
        target = torch.where(m > 0, target / m.clamp_min(1e-300), 0.0)
        bounds = w.bounds.reshape(m.shape)
        over = (self.z > bounds + self.floor) & (m < 0.3)
        m, target = torch.where(over, 0.3, m), torch.where(over, bounds, target)
        balance = float(layer.weight.norm() / k.norm()) ** 2
        filters = balance * self.trust
        off = (layer.gradient(k, a) - self.gradient).square().flatten(1)
        noise = 1e9 if first else late * balance * float((off.mean(1) * self.trust).mean())
        system = _Joint(
            layer,
            under,
            w,
            layer.patches(a),
            layer.matrix(layer.weight),
            k,
            self._spread(held, free),
            m.sqrt(),
            filters.sqrt().reshape(-1, *(1,) * (layer.weight.dim() - 1)),
            math.sqrt(noise),
            _Smooth.at(self.x, math.sqrt(late * self.prior * self.strength), flat=first),
        )
        rows = system.rows * (target - layer(under.offset))
        g = system.filters * (self.gradient - layer.gradient(k, under.offset))
        rest = g.new_zeros(system.root.numel() + sum(map(len, system.smooth.forward(self.x))))
        return system, Rows(rows, torch.cat([g.flatten(), rest])), system.scales(balance)

    def _spread(self, held: Tensor, free: bool) -> Tensor:
        """Root of the beliefs; ``free``, all plausible places of a winner in doubt are alike."""
        if not free:
            return ((1 - DOUBT) * self.belief + DOUBT * self.uniform).sqrt()
        likely = self.belief > PLAUSIBLE * self.belief.amax(1, keepdim=True)
        likely = likely & held[:, None]
        return (likely / likely.sum(1, keepdim=True).clamp_min(1)).sqrt()

    def _deviation(self, excess: Tensor, held: Tensor, anew: bool) -> Tensor:
        """Standard deviation of ``excess``, smoothed over the map, by the rows held out."""
        w = self.winners
        top = excess.max(1)
        if self.round == 0:
            self.error = 1.5 * float(top.values.abs().median())
            return torch.full_like(excess, self.error)
        self.misses *= 0.0 if anew else 0.6
        at = w.places.gather(1, top.indices[:, None])[held, 0]
        flat = self.misses.reshape(2, -1)
        flat[0].index_add_(0, at, top.values[held] ** 2)
        flat[1].index_add_(0, at, torch.ones_like(top.values[held]))
        if not bool(flat[1].any()):  # so few winners that none was held out yet
            return torch.full_like(excess, self.error)
        half, mean = 0.5 * float(flat[1].mean()), float(flat[0].sum() / flat[1].sum())
        near = (_blur(self.misses[0]) + half * mean) / (_blur(self.misses[1]) + half)
        near = near.sqrt().flatten() + 1e-5 * self.floor
        self.error = float(near.median())
        return near[w.places.clamp_min(0)]

    def _believe(self, excess: Tensor, deviation: Tensor, told: Tensor) -> None:
        """Bayes: the winner at its value, the others of its window below it."""
        score = torch.where(self.winners.possible, excess / deviation, 0.0)
        above = torch.where(self.winners.possible, score, 0.0).clamp_min(0).square()
        cost = (score.square() + above.sum(1, keepdim=True) - above) / 2
        if self.round > 0:
            cost = cost + OPINION * (1 - told).square()
        self.belief = torch.where(self.winners.possible, -cost, -torch.inf).softmax(1)
        best = self.belief.argmax(1)
        # places with one value are one: in a flat part of a picture they cannot be told apart
        alike = (score - score.gather(1, best[:, None])).abs() < ALIKE
        self.sure = (self.belief * alike).sum(1) > SURE
        self.changed = int((~alike.gather(1, self.choice[:, None])).sum())
        self.choice = choice = best
        off = score.gather(1, choice[:, None])[:, 0] / 3
        self.outlying = 1 / (1 + off**2)


@dataclass
class _Joint:
    """Rows, gradient, beliefs and prior as one linear map of ``(x, e)``, end to end."""

    layer: Folded
    under: Beneath
    winners: Winners
    seen: Tensor  # patches of the convolution's input so far
    weight: Tensor
    k: Tensor
    root: Tensor  # of the belief
    rows: Tensor  # weight of each
    filters: Tensor  # weight of each one's gradient
    stiff: float  # weight of e
    smooth: _Smooth
    dtype: torch.dtype = torch.float64

    def to(self, dtype: torch.dtype) -> _Joint:
        """Return the same map in another precision."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype)

        smooth = replace(
            self.smooth, mix=cast(self.smooth.mix), roots=[cast(r) for r in self.smooth.roots]
        )
        return replace(
            self,
            winners=replace(self.winners, k=cast(self.winners.k)),
            seen=cast(self.seen),
            weight=cast(self.weight),
            k=cast(self.k),
            root=cast(self.root),
            rows=cast(self.rows),
            filters=cast(self.filters),
            smooth=smooth,
            dtype=dtype,
        )

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        n = math.prod(self.under.shape)
        return u[:n].reshape(self.under.shape), u[n:].reshape(self.root.shape)

    def shifted(self, e: Tensor) -> Tensor:
        """Change of the beliefs: their covariance is ``diag q − q qᵀ``."""
        return self.root * (e - (self.root * e).sum(1, keepdim=True) * self.root)

    def gradient(self, x: Tensor, e: Tensor) -> Tensor:
        return self._gradient(self.layer.patches(self.under.forward(x)), e)

    def _gradient(self, P: Tensor, e: Tensor) -> Tensor:
        moved = self.winners.scatter(self.shifted(e) * self.winners.k[:, None])
        seen = self.k.flatten(2)[0] @ P.T + moved.flatten(2)[0] @ self.seen.T
        return self.layer.of_matrix(seen)

    def forward(self, u: Tensor) -> Rows:
        x, e = self.split(u)
        P = self.layer.patches(self.under.forward(x))
        g = self.filters * self._gradient(P, e)
        rows = self.rows * (self.weight @ P).reshape(self.rows.shape)
        parts = [g.flatten(), self.stiff * e.flatten(), *self.smooth.forward(x)]
        return Rows(rows, torch.cat(parts))

    def adjoint(self, r: Rows) -> Tensor:
        n, m = self.layer.weight.numel(), self.root.numel()
        g = self.layer.matrix(self.filters * r.g[:n].reshape(self.layer.weight.shape))
        P = self.weight.T @ (self.rows * r.z).flatten(2)[0] + g.T @ self.k.flatten(2)[0]
        x = self.under.adjoint(self.layer.patches_adjoint(P))
        x = x + self.smooth.adjoint(r.g[n + m :], self.under.shape)
        moved = self.winners.gather(g @ self.seen) * self.winners.k[:, None]
        moved = moved * self.winners.possible
        e = self.root * (moved - (self.root**2 * moved).sum(1, keepdim=True))
        return torch.cat(
            [x.flatten(), (e + self.stiff * r.g[n : n + m].reshape(e.shape)).flatten()]
        )

    def scales(self, balance: float) -> tuple[Tensor, Tensor]:
        """Root of the inverse of the normal equations' diagonal, and of a block a winner."""
        ones = torch.ones_like(self.layer.weight)
        d = self.layer.rows_adjoint(self.rows**2, self.layer.weight**2)
        d = self.under.diagonal(d + balance * self.layer.rows_adjoint(self.k**2, ones))
        d = d + 4 * self.smooth.strength**2 + 1e-6 * d.mean()
        return d.rsqrt(), self._turned(balance)

    def _turned(self, balance: float) -> Tensor:
        """``(N, m, m)``: root of the inverse of each winner's own normal equations in ``e``."""
        w = self.winners
        patches, at = self.seen.T, w.places.clamp_min(0)
        if len(patches) <= FEW:
            gram = (patches @ patches.T)[at[:, :, None], at[:, None, :]]
        else:
            each = (patches[part] for part in torch.split(at, FEW))
            gram = torch.cat([seen @ seen.mT for seen in each])
        along, across = self.root[:, :, None], self.root[:, None, :]
        gram = along * gram * across
        gram = gram - along * (along * gram).sum(1, keepdim=True)
        gram = gram - across * (across * gram).sum(2, keepdim=True)
        gram = balance * w.k[:, None, None] ** 2 * gram
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0) + self.stiff**2 + 1e-12 * values.amax() + 1e-300
        inverse: Tensor = (vectors * values.rsqrt()[:, None, :]) @ vectors.mT
        return inverse

    def unexplained(self, x: Tensor, e: Tensor, gradient: Tensor) -> Tensor:
        """Mean square of what is left of each filter's gradient."""
        seen = self.gradient(x, e) + self.layer.gradient(self.k, self.under.offset)
        return (seen - gradient).square().flatten(1).mean(1)


@dataclass(frozen=True)
class _Smooth:
    """Total variation as weighted squares: differences of neighbours, those across edges weak.

    Channels of a picture change together: their differences are taken in the mixes of channels
    in which they have one variance.
    """

    strength: float
    mix: Tensor  # (channels, channels)
    roots: list[Tensor]  # of the weights, an axis each

    @classmethod
    def at(cls, x: Tensor, strength: float, flat: bool) -> _Smooth:
        """Weights and mix from the differences in ``x``; all one where it is ``flat``."""
        channels, axes = x.shape[1], range(2, x.dim())
        mix = torch.eye(channels, dtype=x.dtype, device=x.device)
        if flat:
            ones = [torch.ones_like(x.diff(dim=axis)[:, :1]) for axis in axes]
            return cls(strength, mix, [strength * one for one in ones])
        edge = EDGE * float((x - x.mean(tuple(axes), keepdim=True)).square().mean().sqrt())
        for _ in range(2):
            mixed = _times(mix, x)
            jumps = [mixed.diff(dim=axis) for axis in axes]
            weights = [
                edge / (jump.square().sum(1, keepdim=True) + edge**2).sqrt() for jump in jumps
            ]
            if len(x[0, 0].flatten()) > 4 * channels:
                mix = _whitening(x, weights)
        return cls(strength, mix, [strength * weight.sqrt() for weight in weights])

    def forward(self, x: Tensor) -> list[Tensor]:
        mixed = _times(self.mix, x)
        parts = [math.sqrt(PLAIN) * self.strength * x.flatten()]
        for axis, root in enumerate(self.roots, 2):
            parts.append((root * mixed.diff(dim=axis)).flatten())
        return parts

    def adjoint(self, r: Tensor, shape: tuple[int, ...]) -> Tensor:
        n = math.prod(shape)
        plain, r = math.sqrt(PLAIN) * self.strength * r[:n].reshape(shape), r[n:]
        mixed = torch.zeros_like(plain)
        for axis, root in enumerate(self.roots, 2):
            length = shape[axis] - 1
            size = n // shape[axis] * length
            part = root * r[:size].reshape(*shape[:axis], length, *shape[axis + 1 :])
            r = r[size:]
            mixed.narrow(axis, 1, length).add_(part)
            mixed.narrow(axis, 0, length).sub_(part)
        return plain + _times(self.mix.T, mixed)


def _times(mix: Tensor, x: Tensor) -> Tensor:
    return (mix @ x.flatten(2)[0]).reshape(x.shape)


def _whitening(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Inverse root of the differences' covariance over channels, relative to their mean."""
    covariance = x.new_zeros(x.shape[1], x.shape[1])
    for axis, weight in enumerate(weights, 2):
        jump = (weight.sqrt() * x.diff(dim=axis)).flatten(2)[0]
        covariance += jump @ jump.T
    values, vectors = torch.linalg.eigh(covariance)
    values = values / values.mean() + MIXED
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root


def _solve(
    system: _Joint,
    b: Rows,
    start: Tensor,
    scales: tuple[Tensor, Tensor],
    steps: int,
    tolerance: float,
) -> Tensor:
    """Conjugate gradients, each entry and each winner scaled to one."""

    def inside(system: _Joint) -> Preconditioned:
        each, winner = (part.to(system.dtype) for part in scales)

        def scaled(u: Tensor) -> Tensor:
            x, e = system.split(u)
            return torch.cat([(each * x).flatten(), (winner @ e[..., None]).flatten()])

        return Preconditioned(system, scaled, scaled, system.dtype)

    exact = inside(system)
    x, e = system.split(start)
    begun = torch.cat([(x / scales[0]).flatten(), torch.linalg.solve(scales[1], e).flatten()])
    target = tolerance * math.sqrt(squared_norm(exact.adjoint(b)))
    fast = inside(system.to(torch.float32))
    return exact.undo(cgls(exact, b, target, steps, fast=fast, start=begun).x)


def _blur(field: Tensor) -> Tensor:
    """Gaussian mean over neighbours, 1.5 wide, axis by axis."""
    t = torch.arange(-5.0, 6.0, dtype=field.dtype, device=field.device)
    kernel = (-t * t / (2 * 1.5**2)).exp()
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    for axis in range(field.dim()):
        lines = field.movedim(axis, -1)
        flat = lines.reshape(-1, 1, lines.shape[-1])
        lines = torch.nn.functional.conv1d(flat, kernel, padding=5).reshape(lines.shape)
        field = lines.movedim(-1, axis)
    return field

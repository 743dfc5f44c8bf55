"""Max pooling above a norm of its own statistics: places of the maxima, with σ and μ unknown."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import normalised
from .annealing import Annealing
from .folded import Beneath, Folded
from .krylov import Progress
from .layers import rule_of
from .layers.convolution import Conv, places
from .layers.norms import GroupNorm
from .norm_system import NormSystem, Sent, nonzero
from .normalised import Normalised
from .solve import Solution, draw
from .unpool import ACCEPT, ANYWAY, NOISY, ROUNDS, Watch, read
from .winners import Winners

__all__ = ["solve"]

DRAWN = 20  # smooth pictures that tell what σ and μ may be
STEEP, BRIGHT, CONTRAST = 1.2, 0.5, 0.2  # their spectrum's power, mean and deviation
COARSE = 0.1  # as if so much noise: of a solution that only has to show which place is wrong
TURNS = 20  # of places that the gradient shows to be wrong
CLOSE = 2e-4  # relative residual from which a choice of places may be right
ALIKE, ALONG = 0.5, 0.5  # least cosine of a turn with what is left; least share of the best gain
KINDS: dict[int, type] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SURE = 0.998  # share of winners whose places are sure, from which a choice is tried
NEARLY = 0.9  # … where the error no longer falls
GAIN = 0.9  # of the error over its least so far, where it still falls
CHANGING = 0.004  # share of winners whose places may still change
CHUNK = 4096  # winners whose patches are compared at a time


def solve(
    conv: Conv,
    norm: GroupNorm,
    pool: nn.Module,
    value: Tensor,
    k: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    input_shape: tuple[int, ...],
    *,
    activation: nn.Module | None = None,
    sent: Sent | None = None,
    noise: float = 0.0,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Normalised:
    r""":math:`(W x)_{q_w} = \sigma \hat x_w + \mu,\; \sum_p \tilde\kappa_p \otimes x_p = \sigma G`.

    The search of :func:`gradinv_edu.networks.unpool` by turns with the norm: a round looks
    for the places as if ``σ``, ``μ`` and the part of ``k`` that the norm spreads over the whole map
    were those of the input that the last round found. A choice of places is then solved with all
    of them unknown; winners in a wrong place leave their mark on the gradient, and are moved.

    Parameters
    ----------
    conv, norm : Conv, GroupNorm
        The convolution, and the rule of the norm above it.
    pool, value, k, activation, noise, weight, generator, progress, watch
        As for :func:`gradinv_edu.networks.unpool`.
    gradients : tuple of Tensor
        ``∂L/∂W``, ``∂L/∂γ``, ``∂L/∂β``.
    input_shape : tuple of int
        Of the unknown ``x``.
    sent : Sent, optional
        Statistics of the batch.

    Returns
    -------
    Normalised
        Up to one factor; with ``solution.full_rank`` only where rows, bounds and gradient hold,
        determine every unknown, and leave no room for other places.

    Notes
    -----
    Source: this project's own.
    """
    generator = generator or torch.Generator().manual_seed(0)
    pooled = _Pooled(conv, norm, gradients, tuple(input_shape), sent)
    mean, deviation = pooled.guess(generator)
    layer, shift = pooled.folded(mean, deviation), gradients[2]
    winners = read(layer, pool, activation, value, k, weight, shift, noise)
    start = torch.zeros(1, *input_shape, dtype=torch.float64, device=value.device)
    search = Annealing(layer, Beneath(None, start), winners, gradients[0], noise, generator)
    search.gradient = pooled.spread(search.x, mean, deviation, layer)
    size, accept = float(deviation.log().mean()), max(ACCEPT, NOISY * noise)
    found, tried, wait = None, 0, 2
    least, stalled = math.inf, 0
    while search.round < ROUNDS:
        search.turn()
        stalled = 0 if search.error <= GAIN * least else stalled + 1
        least = min(least, search.error)
        mean, deviation = pooled.statistics(search.x)
        if sent is None and not pooled.biased:  # the prior would dim the picture, unseen
            by = math.exp(size - float(deviation.log().mean()))
            search.x, mean, deviation = by * search.x, by * mean, by * deviation
        elif sent is not None:
            mean, deviation = sent.mean, sent.deviation
        search.layer = layer = pooled.folded(mean, deviation)
        search.norms = layer.weight.flatten(1).norm(dim=1)
        search.norms = search.norms / search.norms.mean()
        search.gradient = pooled.spread(search.x, mean, deviation, layer)
        if progress is not None:
            progress(search.round, search.error / search.size)
        if watch is not None:
            watch(search.round, winners.at(search.choice), search.belief.max(1).values)
        share = float(search.sure.double().mean())
        calm = share >= SURE or (stalled >= 3 and share >= NEARLY)
        still = search.changed <= CHANGING * len(search.choice)
        due = still and calm and search.round - tried >= wait
        if due or search.round % ANYWAY == 0:
            tried, wait = search.round, min(wait + 1, 8)
            found, misfit = pooled.settle(winners, search.choice, search.x, noise, generator)
            if misfit <= accept:
                spare = (found.equations - found.unknowns) * -math.log10(accept)
                proven = found.solution.converged and spare > winners.arrangements
                return replace(found, solution=replace(found.solution, converged=proven))
    found = found or pooled.settle(winners, search.choice, search.x, noise, generator)[0]
    guess = Solution(search.x, found.solution.residual, search.round, 1.0, 0.0, 0.0, False)
    return replace(found, inputs=search.x, solution=guess)


class _Pooled:
    """A convolution and the norm above it, whose outputs are known in some places only."""

    def __init__(
        self,
        conv: Conv,
        norm: GroupNorm,
        gradients: tuple[Tensor, Tensor, Tensor],
        input_shape: tuple[int, ...],
        sent: Sent | None,
    ) -> None:
        self.conv, self.norm, self.input_shape, self.sent = conv, norm, input_shape, sent
        self.gradient = gradients[0]
        self.biased = conv.bias is not None
        with torch.no_grad():
            self.like = torch.zeros_like(conv(self.gradient.new_zeros(1, *input_shape)))
        self.groups = norm.groups(self.like.shape, self.like.device)
        self.gain, self.shift = norm.coefficients(self.like)
        self.of = self.groups.of[0].flatten(1)[:, 0]
        self.means = normalised.means(norm, self.like, *gradients[1:])

    def column(self, each: Tensor) -> Tensor:
        """A filter's number, to go with its weight."""
        return each.reshape(-1, *[1] * (self.gradient.dim() - 1))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``μ`` and ``σ`` of every group."""
        with torch.no_grad():
            z = self.conv(x)
        mean, _, variance = self.groups.moments(z)
        return mean, nonzero(variance.sqrt())

    def guess(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Those that were sent, or those of smooth noise, whose channels are nearly alike."""
        if self.sent is not None:
            return self.sent.mean, self.sent.deviation
        channels, *spatial = self.input_shape
        axes = [torch.fft.fftfreq(n, dtype=torch.float64, device=self.like.device) for n in spatial]
        far = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
        far.view(-1)[0] = torch.inf
        over, found = tuple(range(1, 1 + len(spatial))), []
        for _ in range(DRAWN):
            noise = draw(self.like.new_empty(1 + channels, *spatial), generator)
            smooth = torch.fft.ifftn(torch.fft.fftn(noise, dim=over) / far**STEEP, dim=over).real
            smooth = smooth / smooth.std(over, keepdim=True)
            picture = BRIGHT + CONTRAST * (0.9 * smooth[:1] + 0.3 * smooth[1:])
            found.append(self.statistics(picture[None]))
        mean, deviation = (torch.stack(part) for part in zip(*found, strict=True))
        return mean.mean(0), deviation.square().mean(0).sqrt()

    def folded(self, mean: Tensor, deviation: Tensor) -> Folded:
        """The convolution, and the norm as if its statistics were these."""
        kind: type[nn.BatchNorm2d] = KINDS[self.like.dim()]
        fixed = kind(len(self.of), eps=0.0).double().eval()
        fixed.running_mean, fixed.running_var = mean[self.of], deviation[self.of].square()
        gain, shift = (t[0].flatten(1)[:, 0] for t in (self.gain, self.shift))
        fixed.weight, fixed.bias = nn.Parameter(gain.clone()), nn.Parameter(shift.clone())
        return Folded(nn.Sequential(self.conv, fixed), self.input_shape)

    def normal(self, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """``x̂`` of every entry."""
        with torch.no_grad():
            z: Tensor = self.conv(x)
        return (z - self.groups.spread(mean)) / self.groups.spread(deviation)

    def spread(self, x: Tensor, mean: Tensor, deviation: Tensor, layer: Folded) -> Tensor:
        """``∂L/∂W`` of the folded layer without what the norm makes of the whole map's ``x̂``."""
        m0, m1 = (self.groups.spread(m) for m in self.means)
        rest = (m0 + m1 * self.normal(x, mean, deviation)) / nonzero(self.gain)
        return layer.unfolded(self.gradient) + layer.gradient(rest, x)

    def settle(
        self,
        winners: Winners,
        choice: Tensor,
        x: Tensor,
        noise: float,
        generator: torch.Generator,
    ) -> tuple[Normalised, float]:
        """Solve with every winner in its place, and move those that the gradient shows wrong."""
        coarse, least = max(COARSE, noise), math.inf
        for _ in range(TURNS):
            system = self.system(winners, choice)
            found = normalised.from_start(system, x, noise=coarse, trial=True, generator=generator)
            if not found.solution.residual < 0.9 * least:
                break
            least, x = found.solution.residual, found.inputs
            moved = self.moved(winners, choice, system, found)
            if torch.equal(moved, choice):
                break
            kept, choice = choice, moved
        else:
            kept = choice
        if found.solution.residual > least:
            system = self.system(winners, kept)
        if least <= CLOSE:  # else some places are wrong, and all digits would be for nothing
            found = normalised.from_start(system, x, noise=noise, generator=generator)
        return found, self.misfit(winners, found)

    def system(self, winners: Winners, choice: Tensor) -> NormSystem:
        """All equations, every winner in its place."""
        at = winners.at(choice)
        y, k, mask = (torch.zeros_like(self.like) for _ in range(3))
        for maps, values in ((y, winners.values), (mask, torch.ones_like(winners.values))):
            maps.view(-1)[at] = values
        k.view(-1).index_add_(0, at, winners.k)
        return NormSystem(
            self.conv,
            self.norm,
            y,
            k,
            self.input_shape,
            self.gradient,
            mask,
            sent=self.sent,
            means=self.means,
        )

    def moved(
        self, winners: Winners, choice: Tensor, system: NormSystem, found: Normalised
    ) -> Tensor:
        """Matching pursuit: a place each whose change explains what is left of a filter's rows."""
        x, sigma = found.inputs, found.deviation
        mean, _ = self.statistics(x)
        kappa = system.gradient_of_norm(self.normal(x, mean, sigma))
        rule = rule_of(self.conv)
        geometry = rule.geometry  # type: ignore[attr-defined]
        left = geometry.gradient(kappa, x, self.gradient)
        left = left - self.column(sigma[self.of]) * self.gradient
        index, _ = places(self.conv, self.input_shape)
        padded = torch.cat([x.new_zeros(x.shape[1], 1), x.flatten(2)[0]], 1)
        patches = padded[:, index.to(x.device)].flatten(0, 1)
        seen, size = left.flatten(1) @ patches, left.flatten(1).norm(dim=1)
        squares = patches.square().sum(0)
        at = winners.places.clamp_min(0)
        now = at.gather(1, choice[:, None])
        f = winners.filters
        k = (self.gain[0].flatten(1)[:, 0][f] * winners.k)[:, None]
        inner = k * (seen[f[:, None], at] - seen[f[:, None], now])
        cross = torch.cat(
            [
                (patches[:, a] * patches[:, b]).sum(0)
                for a, b in zip(torch.split(at, CHUNK), torch.split(now, CHUNK), strict=True)
            ]
        )
        far = (squares[at] + squares[now] - 2 * cross).clamp_min(1e-300).sqrt()
        cosine = -inner / (k.abs() * far * size[f][:, None]).clamp_min(1e-300)
        cosine = torch.where(winners.possible & (at != now), cosine, -1.0)
        best = cosine.max(1)
        gain = best.values * size[f]
        top = gain.new_zeros(len(size)).scatter_reduce(0, f, gain, "amax")
        turn = (gain == top[f]) & (best.values > ALIKE) & (gain > ALONG * top.max())
        return torch.where(turn, best.indices, choice)

    def misfit(self, winners: Winners, found: Normalised) -> float:
        """Largest of what the answer leaves of rows, bounds and gradient, relative."""
        mean, _ = self.statistics(found.inputs)
        y = self.gain * self.normal(found.inputs, mean, found.deviation) + self.shift
        size = float(winners.values.abs().mean()) or 1.0
        over = float((y.reshape(winners.bounds.shape) - winners.bounds).max()) / size
        return max(found.solution.residual, over)

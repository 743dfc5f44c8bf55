"""Checks of the exercises on networks."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from .verdict import Mistakes, Student, ask, demand, expect, normal, right


class Channels(Mistakes, of="networks-channels"):
    def shifted_the_other_way(k, G):
        """Mirrored taps: the gradient at tap t multiplies k(p) by the input at p + t, and yours by
        the input at p − t."""
        return _solved(k, G.flip(2, 3))

    def middle_tap(k, G):
        """You use the tap in the middle alone, as if the kernel were 1×1: eight rows of nine are
        thrown away."""
        rows = torch.linalg.lstsq(k.flatten(2)[0], G[:, :, 1, 1], driver="gelsd").solution
        return rows.T.reshape(1, G.shape[1], *k.shape[2:])

    def wraps_round(k, G):
        """Your rows wrap round at the edge of the map. Beyond the edge there are zeros."""
        return _solved(k, G, "circular")

    def filters_added_up(k, G):
        """You add the filters' rows up. Each filter and tap is an equation of its own; put them
        below one another."""
        return _solved(k.sum(1, keepdim=True), G.sum(0, keepdim=True))


def _solved(k: Tensor, G: Tensor, beyond: str = "zeros") -> Tensor:
    """The input by channel, with the matrix made by autograd."""
    filters, channels, *_ = G.shape
    conv = nn.Conv2d(1, filters, 3, padding=1, bias=False, padding_mode=beyond).double()
    positions = k[0, 0].numel()
    columns = []
    for unit in torch.eye(positions, dtype=k.dtype):
        z = conv(unit.reshape(1, 1, *k.shape[2:]))
        columns.append(torch.autograd.grad(z, conv.weight, k)[0].flatten())
    M = torch.stack(columns, dim=1)
    right_sides = G.transpose(0, 1).reshape(channels, -1).T
    x = torch.linalg.lstsq(M, right_sides, driver="gelsd").solution.T
    return x.reshape(1, channels, *k.shape[2:])


def check_channels(by_channel: Student, seed: int = 3) -> None:
    """Check: the input of a convolution, all channels by one matrix."""
    for filters, channels, side in ((2, 3, 2), (3, 5, 4)):
        x, k = normal(seed, 1, channels, side, side), normal(seed + 1, 1, filters, side, side)
        k[:, 0] = 0 if filters > 2 else k[:, 0]
        conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False).double()
        (G,) = torch.autograd.grad(conv(x), conv.weight, k)
        case = f"for {filters} filters, {channels} channels and {side}×{side} positions"
        expect("networks-channels", by_channel, (k, G), x, "the input", case)
    right("one matrix with a column for each position, and as many right-hand sides as channels.")


class Reach(Mistakes, of="networks-reach"):
    def counts_weights(filters, channels, step):
        """Blind reading needs the rank of the input and that of the output gradient, each: the
        smaller of filters and channels bounds the positions, not their product."""
        return step * int((filters * channels) ** 0.5)

    def forgets_channels(filters, channels, step):
        """You count filters alone. With fewer channels than positions the input has too little
        rank."""
        return step * int(filters**0.5)

    def takes_positions_for_a_side(filters, channels, step):
        """The positions of a square map are its side *squared*."""
        return step * min(filters, channels)

    def forgets_the_steps(filters, channels, step):
        """That is the side of the last map; the picture's is larger by the strides above it."""
        return int(min(filters, channels) ** 0.5)


def check_reach(largest: Student) -> None:
    """Check: the largest square picture whose last convolution is read blind."""
    for filters, channels, step in (
        (512, 300, 32),
        (512, 512, 32),
        (96, 320, 16),
        (200, 70, 8),
        (9, 9, 1),
    ):
        truth = step * int(min(filters, channels) ** 0.5)
        case = f"for {filters} filters, {channels} channels and strides of {step} in all"
        answer = ask(largest, filters, channels, step, case=case)
        for mistake in Mistakes.KNOWN["networks-reach"]:
            wrong = mistake(filters, channels, step)
            demand(wrong == truth or answer != wrong, mistake)
        demand(answer == truth, f"Not {answer} {case}.")
    right("ResNet-18 is read blind up to 704×704: its mean over all positions protects nobody.")


class Turned(Mistakes, of="networks-turned"):
    def largest_turn(k, turn, total):
        """You turn the unit whose turn is largest. Which one is wrong is told by the gap between
        the sum of k and the gradient of the bias."""
        return int(turn.abs().argmax())

    def largest_k(k, turn, total):
        """You turn the unit whose k is largest. A unit is misread where its *value* is near zero,
        and the gap between the sums names it."""
        return int(k.abs().argmax())

    def smallest_k(k, turn, total):
        """You turn the unit whose k is nearest zero. It is the value that is near zero at a kink,
        not k; the gap between the sums names the unit."""
        return int(k.abs().argmin())

    def gap_of_the_wrong_sign(k, turn, total):
        """The sign of your gap: what k *lacks* is what was sent minus the sum of k."""
        return int((turn - (k.sum() - total)).abs().argmin())


def check_turned(misread: Student, seed: int = 5) -> None:
    """Check: the unit that was read on the wrong side of its kink."""
    drawn = ((normal(start, 25), normal(start + 50, 25)) for start in range(seed, seed + 99))
    clear = ((k, t, i) for k, t in drawn if (i := _clear(k, t)) is not None)
    for k, turn, truth in islice(clear, 4):
        total = k.sum() + turn[truth]
        answer = ask(misread, k, turn, total)
        for mistake in Mistakes.KNOWN["networks-turned"]:
            wrong = mistake(k, turn, total)
            demand(wrong == truth or answer != wrong, mistake)
        demand(answer == truth, f"Not unit {answer}: its turn does not close the gap.")
    right("one sum a filter names the unit; the layers below are spared its error.")


def _clear(k: Tensor, turn: Tensor) -> int | None:
    """The first unit that no known mistake names, if there is one."""
    return next((i for i in range(len(k)) if _apart(k, turn, i)), None)


def _apart(k: Tensor, turn: Tensor, unit: int) -> bool:
    """Whether every known mistake names another unit than this, and than the others."""
    total = k.sum() + turn[unit]
    known = Mistakes.KNOWN["networks-turned"]
    return len({unit, *(mistake(k, turn, total) for mistake in known)}) == 1 + len(known)

"""Checks of the exercises on rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    demand,
    expect,
    known,
    normal,
    pair,
    refuse,
    right,
    tensor,
)


def _at(filter_: int, values: Tensor, like: Tensor) -> Tensor:
    placed = torch.zeros_like(like)
    placed[filter_] = values
    return placed


class SameTwice(Mistakes, of="rank-twice"):
    def each_at_its_own_filter(W, k, f, other):
        """Your numbers stand at the wrong filter. A combination of the weight constraints of one
        filter must be zero at the outputs of all others."""
        return _at(f, k[f], k), _at(other, W[other], W)

    def filters_exchanged(W, k, f, other):
        """You exchanged the two filters of the pair: which one's outputs are combined, and which
        one's k do the combining?"""
        return _at(f, k[other], k), _at(other, W[f], W)

    def one_filter_alone(W, k, f, other):
        """That holds for the pair of a filter with itself only: two different filters take part
        here, one with its weights, the other with its k."""
        return _at(f, k[f], k), _at(f, W[f], W)

    def the_other_filter_alone(W, k, f, other):
        """Like one_filter_alone."""
        return SameTwice.one_filter_alone(W, k, other, f)

    def kernel_turned(W, k, f, other):
        """The gradient side has the kernel turned: the weight that reads pixel p + u stands at
        place u."""
        return _at(other, k[f], k), _at(f, W[other].flip(1, 2), W)

    def one_side_moved_over(W, k, f, other):
        """Both sides agree up to their sign."""
        return _at(other, k[f], k), -_at(f, W[other], W)

    def nothing_equals_nothing(W, k, f, other):
        """Both of yours are zero, and 0 = 0 for every layer; find combinations that are not."""
        return torch.zeros_like(k), torch.zeros_like(W)


def check_same_twice(same_twice: Student, seed: int = 1, channels: int = 2, size: int = 6) -> None:
    """Check: one equation that is in both sets."""
    W, k = normal(seed, 3, channels, 3, 3), normal(seed + 1, 3, size - 2, size - 2)
    pictures = normal(seed + 2, 3, channels, size, size)
    patches = pictures.unfold(2, 3, 1).unfold(3, 3, 1)
    for f, other in ((0, 2), (1, 0), (1, 1)):
        given, case = (W, k, f, other), f"for the filters {f} and {other}"
        both = pair(ask(same_twice, *given, case=case), "same_twice(...)")
        outputs, weights = tensor(both[0], "the first"), tensor(both[1], "the second")
        demand(
            outputs.shape == k.shape and weights.shape == W.shape,
            f"The first must have the shape of k, {tuple(k.shape)}, the second that of the weight, "
            f"{tuple(W.shape)}.",
        )
        for hint, wrong in known("rank-twice", given) if f != other else ():
            demand(not (torch.equal(outputs, wrong[0]) and torch.equal(weights, wrong[1])), hint)
        one = (conv2d(pictures, W) * outputs).sum((1, 2, 3))
        two = torch.einsum("fcuv,fij,ncijuv->n", weights, k, patches)
        demand(one.abs().sum() + two.abs().sum() > 1e-9, SameTwice.nothing_equals_nothing)
        demand(not torch.allclose(one, -two), SameTwice.one_side_moved_over)
        demand(
            torch.allclose(one, two, rtol=1e-9),
            f"For a random picture the two sides are {float(one[0]):.3g} and {float(two[0]):.3g}. "
            "Write both as sums over positions, channels and places of the kernel: they are one "
            "sum in two orders.",
        )
    every = [same_twice(W, k, f, other)[0].flatten() for f in range(3) for other in range(3)]
    demand(
        int(torch.linalg.matrix_rank(torch.stack(every))) == 9,
        "Your combinations for all pairs of filters are not independent of each other: they must "
        "use the k of the first filter, and the weights of the second, and nothing else.",
    )
    right("For every pair of filters one equation is in both sets: F² of them say nothing new.")


def _law(
    channels, size, filters, kernel, stride, shared=1, saturate=True, joined=False, cap=True
) -> int:
    """Give the rank by the law, or by a wrong one."""
    rank_k = 0
    for i in range(stride):
        for j in range(stride):
            rows = filters * len(range(i, kernel, stride)) * len(range(j, kernel, stride))
            pixels = len(range(i, size, stride)) * len(range(j, size, stride))
            if joined:
                rank_k += min(channels * rows, pixels)
            else:
                rank_k += channels * (min(rows, pixels) if saturate else rows)
    total = filters * ((size - kernel) // stride + 1) ** 2 + rank_k - shared * filters**2
    return min(channels * size**2, total) if cap else total


class Law(Mistakes, of="rank-law", own=("gradinv_edu.rank.rank_law",)):
    def more_rank_than_unknowns(*size):
        """{size}: you say that rank is {answer}, and there are only {unknowns} unknowns."""
        return _law(*size, cap=False)

    def pairs_of_filters_forgotten(*size):
        """{size}: you counted {answer}, and some of these equations are in both sets (exercise
        7.1). How many?"""
        return _law(*size, shared=0)

    def gradient_rows_counted(*size):
        """{size}: you counted {answer}. With this stride some gradient constraints meet the same
        few pixels only, and more rows than pixels cannot be independent."""
        return _law(*size, saturate=False)

    def all_rows_counted(*size):
        """Like pairs_of_filters_forgotten."""
        return _law(*size, shared=0, saturate=False)

    def weight_constraints_alone(channels, size, filters, kernel, stride):
        """{size}: you counted the weight constraints alone, and there is a second set."""
        return min(channels * size**2, filters * ((size - kernel) // stride + 1) ** 2)

    def channels_share_their_pixels(*size):
        """{size}: you let the channels share their pixels. A gradient constraint stays within one
        channel, so that each channel has its own classes."""
        return _law(*size, joined=True)

    def division_that_makes_a_float(*size):
        """Return one whole number; yours is a {kind}."""
        return 1.0 * _law(*size)


def check_law(law: Student, seed: int = 2) -> None:
    """Check: the rank law of a convolution."""
    sizes = [(3, 8, 2, 3, 1), (8, 9, 8, 3, 2), (2, 9, 6, 3, 2), (2, 8, 20, 3, 1)]
    g = torch.Generator().manual_seed(seed)
    while len(sizes) < 24:
        channels, filters, kernel, stride, steps = (
            int(torch.randint(low, high, (), generator=g))
            for low, high in ((1, 4), (1, 7), (2, 5), (1, 4), (3, 6))
        )
        if kernel >= stride:
            sizes.append((channels, (steps - 1) * stride + kernel, filters, kernel, stride))
    for size in sizes:
        channels, pixels, filters, kernel, stride = size
        conv = nn.Conv2d(channels, filters, kernel, stride, bias=False)
        true = gi.rank.rank_law(conv, (channels, pixels, pixels)).rank
        case = f"ith {channels} channels of {pixels}×{pixels}, {filters} filters of {kernel}×"
        case += f"{kernel} and stride {stride}"
        answer = ask(law, *size, case=f"w{case}")
        whole = isinstance(answer, int)
        demand(whole, Law.division_that_makes_a_float, kind=type(answer).__name__)
        if answer != true:
            facts = {"size": f"W{case}", "answer": answer, "unknowns": channels * pixels**2}
            demand(answer <= facts["unknowns"], Law.more_rank_than_unknowns, **facts)
            for hint, wrong in known("rank-law", size):
                demand(answer != wrong, hint, **facts)
            other = "{size}: {answer} is not the rank. Go through the law's three terms one by one."
            refuse(other, **facts)
    right("Three terms and a minimum, and no matrix was formed.")


class Share(Mistakes, of="rank-share"):
    def pseudoinverse_on_the_right(A):
        """One number for each pixel; you have one for each equation. Which side of A must its
        pseudoinverse stand on?"""
        return (A @ torch.linalg.pinv(A, rtol=1e-10)).diag()

    def pixels_that_are_met(A):
        """You say 1 wherever an equation meets a pixel. That it is met does not mean that it is
        known: think of one equation for two pixels."""
        return (A != 0).any(dim=0).double()

    def sum_of_squares(A):
        """Your map changes if an equation is multiplied by ten, and what the equation says does
        not: it must depend on the rows' span only."""
        return A.square().sum(0)

    def squares_by_the_largest(A):
        """Like sum_of_squares."""
        return A.square().sum(0) / A.square().sum(0).max()

    def squares_by_their_sum(A):
        """Like sum_of_squares."""
        return A.square().sum(0) / A.square().sum()

    def length_for_share(A):
        """That is the square root of the share, or its square: which power adds up to the rank?"""
        return (torch.linalg.pinv(A, rtol=1e-10) @ A).diag().square()

    def root_of_the_share(A):
        """Like length_for_share."""
        return (torch.linalg.pinv(A, rtol=1e-10) @ A).diag().clamp(min=0).sqrt()

    def rounding_for_rank(A):
        """Your map adds up to more than the rank: dependent equations made directions out of
        rounding. Where do you cut the singular values off?"""
        return torch.linalg.svd(A, full_matrices=False)[2].square().sum(0)


def check_share(share: Student, seed: int = 3, pixels: int = 9) -> None:
    """Check: how much of each pixel a layer's equations determine."""
    wide = normal(seed, 5, pixels)
    wide[:, -1] = 0.0
    wide[:3, 0] = 0.0
    dependent = torch.cat([wide, wide[:2] - wide[2:4], 3 * wide[:2] + wide[3:5], wide[:3]])
    for A, case in ((wide, "for 5 equations"), (dependent, "for equations that repeat others")):
        true = (torch.linalg.pinv(A, rtol=1e-10) @ A).diag()
        expect("rank-share", share, (A,), true, "the map", case)
    right("The entries add up to the rank: a number for the picture became a map of it.")


_ONE = [nn.Flatten(), nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 10)]
_POOLED = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 200), nn.Tanh(), nn.Linear(200, 10)]
_COARSE = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 10)]


class Misjudged(Mistakes, of="rank-misjudged"):
    def the_other_order():
        """Return two networks (nn.Module): the talkative one and the silent one, in this order."""
        return nn.Sequential(*_POOLED), nn.Sequential(*_ONE)

    def as_small_as_a_dense_layer():
        """The talkative network has {count} parameters; make do with 100. How wide must a first
        dense layer be for its ratio to be the picture?"""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Sequential(*_POOLED)

    def silent_because_it_is_small():
        """The silent network has {count} parameters; let it have 5000 at least."""
        return nn.Sequential(*_ONE), nn.Sequential(*_COARSE)

    def small_and_pooled():
        """The talkative network's gradient determines {rank} of 64 directions only: some of the
        picture is lost before it is looked at."""
        return nn.Sequential(*_COARSE), nn.Sequential(*_POOLED)

    def dead_by_its_biases():
        """With weights drawn anew the silent network's gradient determines {rank} of 64
        directions. Its layers must do it, not its numbers; what comes first sets the limit."""
        dead = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        nn.init.constant_(dead[1].bias, -100.0)
        return nn.Sequential(*_ONE), dead


def check_misjudged(misjudged: Student, seed: int = 4) -> None:
    """Check: two networks whose numbers of parameters mislead."""
    nets = pair(ask(misjudged), "misjudged()")
    demand(all(isinstance(net, nn.Module) for net in nets), Misjudged.the_other_order)
    few, many = (sum(p.numel() for p in net.parameters()) for net in nets)
    for which, net in zip(("talkative", "silent"), nets, strict=True):
        _demand_it_runs(which, net, seed)
    demand(few <= 100 or many > 100, Misjudged.the_other_order)
    demand(few <= 100, Misjudged.as_small_as_a_dense_layer, count=few)
    demand(many >= 5000, Misjudged.silent_because_it_is_small, count=many)
    first, second = (gi.rank.jacobian_rank(net, (1, 8, 8)).rank for net in nets)
    demand(first == 64, Misjudged.small_and_pooled, rank=first)
    demand(second <= 16, Misjudged.dead_by_its_biases, rank=second)
    right(f"{few} parameters give everything, {many} a quarter of it at most ({second} of 64).")


def _demand_it_runs(which: str, net: nn.Module, seed: int) -> None:
    """Draw the weights anew, and try the network on a picture."""
    net.double().eval()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            size = parameter[0].numel() if parameter.ndim > 1 else 4.0
            parameter.copy_(normal(seed + place, *parameter.shape) / size**0.5)
        try:
            shape = tuple(net(normal(seed, 1, 1, 8, 8)).shape)
        except (RuntimeError, TypeError, ValueError) as error:
            shape = (str(error).splitlines()[0],)
    takes = f"The {which} network does not take pictures (1, 8, 8) to ten classes: it gives {shape}"
    demand(shape == (1, 10), takes)


@dataclass(frozen=True)
class Report:
    """What an audit measured, without its verdict.

    Attributes
    ----------
    unknowns : int
        Entries of one input.
    parameters : int
        Entries of the gradient.
    equations, layer_unknowns, ranks : tuple of int
        For each layer, from the input to the output.
    stops : int
        Operations that cannot be undone.
    jacobian_rank : int
        Of the whole gradient as one function of the picture.
    """

    unknowns: int
    parameters: int
    equations: tuple[int, ...]
    layer_unknowns: tuple[int, ...]
    ranks: tuple[int, ...]
    stops: int
    jacobian_rank: int


def report(found: gi.Audit) -> Report:
    """Make the :class:`Report` of an audit."""
    layers = found.layers
    return Report(
        found.unknowns,
        found.parameters,
        tuple(layer.weight_equations + layer.gradient_equations for layer in layers),
        tuple(layer.unknowns for layer in layers),
        tuple(layer.rank for layer in layers),
        len(found.stops),
        0 if found.network is None else found.network.rank,
    )


def _audited(seed: int) -> Report:
    """Audit a real network, whose second convolution lacks rank."""
    convs = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, 2, 1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net = nn.Sequential(convs[0], nn.LeakyReLU(0.2), convs[1], nn.LeakyReLU(0.2), *head).double()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(seed + place, *parameter.shape) / parameter[0].numel() ** 0.5)
    return report(gi.audit(net, (1, 8, 8)))


def _walks(r: Report, most: tuple[int, ...] | None = None) -> bool:
    """Say whether every layer's rank, or what is taken for it, is full, and nothing stops."""
    enough = zip(most or r.ranks, r.layer_unknowns, strict=True)
    return all(rank >= n for rank, n in enough) and not r.stops


def _part(r: Report) -> float:
    return r.jacobian_rank / r.unknowns


class Verdict(Mistakes, of="rank-verdict"):
    def equations_counted(r):
        """You counted equations: one layer has more of them than unknowns here, and its rank is
        still too small for a walk."""
        return _walks(r, r.equations), _part(r)

    def first_and_last_layer_only(r):
        """A layer in the middle lacks rank, so that the walk does not come past it."""
        ends = all(r.ranks[i] == r.layer_unknowns[i] for i in (0, -1))
        return ends and not r.stops, _part(r)

    def stops_overlooked(r):
        """Every layer has full rank, and between two of them something cannot be undone: the walk
        stops there."""
        return r.ranks == r.layer_unknowns, _part(r)

    def more_rank_than_unknowns_asked_for(r):
        """Every layer has full rank and nothing stops the walk, and you say that it does not
        arrive."""
        more = all(rank > n for rank, n in zip(r.ranks, r.layer_unknowns, strict=True))
        return more and not r.stops, _part(r)

    def weakest_layer_for_the_whole(r):
        """A layer lacks rank, and you call part of the picture hidden from every attack. An
        attacker need not walk: which rank speaks of the whole gradient at once?"""
        weakest = min(rank / n for rank, n in zip(r.ranks, r.layer_unknowns, strict=True))
        return _walks(r), weakest

    def parameters_counted(r):
        """You took the number of parameters for what they say. How many directions does the
        gradient see here?"""
        return _walks(r), min(1.0, r.parameters / r.unknowns)

    def more_than_the_picture(r):
        """Like parameters_counted."""
        return _walks(r), r.parameters / r.unknowns


def check_verdict(verdict: Student, seed: int = 5) -> None:
    """Check: from an audit to a verdict on two kinds of attack."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(20, 60, (), generator=g)) * 4
    low, third = n // 4, (3 * n, n - 5, 9 * n)
    walks, counted = Verdict.more_rank_than_unknowns_asked_for, Verdict.equations_counted
    middle, stops = Verdict.first_and_last_layer_only, Verdict.stops_overlooked
    cases = [
        (Report(n, 40 * n, (3 * n, n + 9), (n, n), (n, n), 0, n), True, walks),
        (Report(n, 40 * n, (3 * n, n + 9), (n, n), (n, n - 7), 0, n), False, counted),
        (Report(n, 40 * n, third, (n, n, n), (n, n - 9, n), 0, n), False, middle),
        (Report(n, 40 * n, (3 * n, 2 * n), (n, n), (n, n), 1, n), False, stops),
        (Report(n, 90 * n, (n // 2, n), (n, low), (low, low), 0, low), False, counted),
        (Report(n, 3 * n // 4, (n // 2,), (n,), (n // 2,), 0, n // 2), False, counted),
        (_audited(seed), False, counted),
    ]
    for case, arrives, hint in cases:
        said, hoped = pair(ask(verdict, case), "verdict(...)")
        demand(bool(said) == arrives, hint)
        part, true = float(tensor(hoped, "the part")), _part(case)
        if abs(part - true) > 1e-9:
            whole = true == 1.0 and part <= 1.0 and not case.stops and not _walks(case)
            demand(not whole, Verdict.weakest_layer_for_the_whole)
            for wrong in (Verdict.parameters_counted, Verdict.more_than_the_picture):
                demand(abs(part - wrong(case)[1]) > 1e-9, wrong)
            most = "The part of the picture that any attack may hope for, to first order, is "
            refuse(f"{most}{true:.2f} here.")
    right("A walk needs every layer; what bounds every attack is the rank of the whole.")

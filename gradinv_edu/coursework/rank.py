"""Checks of the exercises to chapter 7, rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..rank import Audit, audit, jacobian_rank, rank_law
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ZERO = "Both of yours are zero, and 0 = 0 for every layer; find combinations that are not."
SWAPPED = (
    "You exchanged the two filters of the pair: which one's outputs are combined, and which one's "
    "k do the combining?"
)
PLACE = (
    "Your numbers stand at the wrong filter. A combination of the weight constraints of one filter "
    "must be zero at the outputs of all others."
)
OWN = (
    "That holds for the pair of a filter with itself only: two different filters take part here, "
    "one with its weights, the other with its k."
)
TURNED = (
    "The gradient side has the kernel turned: the weight that reads pixel p + u stands at place u."
)
OPPOSITE = "Both sides agree up to their sign."
UNEQUAL = (
    "For a random picture the two sides are {one:.3g} and {two:.3g}. Write both as sums over "
    "positions, channels and places of the kernel: they are one sum in two orders."
)


def check_same_twice(same_twice: Student, seed: int = 1, channels: int = 2, size: int = 6) -> None:
    """Check 7.1: one equation that is in both sets."""
    W, k = _random(seed, 3, channels, 3, 3), _random(seed + 1, 3, size - 2, size - 2)
    pictures = _random(seed + 2, 3, channels, size, size)
    for f, other in ((0, 2), (1, 0), (1, 1)):
        case = f"for the filters {f} and {other}"
        a, b = pair(ask(same_twice, W.clone(), k.clone(), f, other, case=case), "same_twice(...)")
        outputs, weights = tensor(a, "the first"), tensor(b, "the second")
        demand(
            outputs.shape == k.shape and weights.shape == W.shape,
            f"The first must have the shape of k, {tuple(k.shape)}, the second that of the weight, "
            f"{tuple(W.shape)}.",
        )
        demand(float(outputs.abs().sum() + weights.abs().sum()) > 1e-9, ZERO)
        known = _known_pairs(W, k, f, other)
        for hint, wrong_outputs, wrong_weights in known:
            said = torch.equal(outputs, wrong_outputs) and torch.equal(weights, wrong_weights)
            demand(f == other or not said, hint)
        one, two = _sides(outputs, weights, W, k, pictures)
        demand(not torch.allclose(one, -two), OPPOSITE)
        same = torch.allclose(one, two, rtol=1e-9)
        demand(same, UNEQUAL.format(one=float(one[0]), two=float(two[0])))
    _demand_all_pairs(same_twice, W, k)
    right("For every pair of filters one equation is in both sets: F² of them say nothing new.")


def _at(filter_: int, values: Tensor, like: Tensor) -> Tensor:
    placed = torch.zeros_like(like)
    placed[filter_] = values
    return placed


def _known_pairs(W: Tensor, k: Tensor, f: int, other: int) -> list[tuple[str, Tensor, Tensor]]:
    return [
        (PLACE, _at(f, k[f], k), _at(other, W[other], W)),
        (SWAPPED, _at(f, k[other], k), _at(other, W[f], W)),
        (OWN, _at(f, k[f], k), _at(f, W[f], W)),
        (OWN, _at(other, k[other], k), _at(other, W[other], W)),
        (TURNED, _at(other, k[f], k), _at(f, W[other].flip(1, 2), W)),
    ]


def _sides(
    outputs: Tensor, weights: Tensor, W: Tensor, k: Tensor, pictures: Tensor
) -> tuple[Tensor, Tensor]:
    """Both combinations of equations, for some pictures."""
    patches = pictures.unfold(2, W.shape[2], 1).unfold(3, W.shape[3], 1)
    one = (conv2d(pictures, W) * outputs).sum((1, 2, 3))
    two = torch.einsum("fcuv,fij,ncijuv->n", weights, k, patches)
    return one, two


DEPENDENT = (
    "Your combinations for all pairs of filters are not independent of each other: they must use "
    "the k of the first filter, and the weights of the second, and nothing else."
)


def _demand_all_pairs(same_twice: Student, W: Tensor, k: Tensor) -> None:
    every = [same_twice(W, k, f, other)[0].flatten() for f in range(3) for other in range(3)]
    demand(int(torch.linalg.matrix_rank(torch.stack(every))) == 9, DEPENDENT)


WHOLE = "Return one whole number; yours is a {kind}."
SHARED = (
    "{size}: you counted {answer}, and some of these equations are in both sets (exercise 7.1). "
    "How many?"
)
SATURATED = (
    "{size}: you counted {answer}. With this stride some gradient constraints meet the same few "
    "pixels only, and more rows than pixels cannot be independent."
)
MORE = "{size}: you say that rank is {answer}, and there are only {unknowns} unknowns."
ONE_CHANNEL = (
    "{size}: you let the channels share their pixels. A gradient constraint stays within one "
    "channel, so that each channel has its own classes."
)
HALF = "{size}: you counted the weight constraints alone, and there is a second set."
OTHERWISE = "{size}: {answer} is not the rank. Go through the three terms of the law one by one."
Size = tuple[int, int, int, int, int]


def _terms(size: Size) -> tuple[int, int, int, int]:
    """|W|, rank K, F² and the unknowns, by the package's law."""
    channels, pixels, filters, kernel, stride = size
    conv = nn.Conv2d(channels, filters, kernel, stride, bias=False)
    law = rank_law(conv, (channels, pixels, pixels))
    return law.weight_equations, law.gradient_rank, filters**2, law.unknowns


def check_law(law: Student, seed: int = 2) -> None:
    """Check 7.2: the rank law of a convolution."""
    sizes: list[Size] = [(3, 8, 2, 3, 1), (8, 9, 8, 3, 2), (2, 9, 6, 3, 2), (2, 8, 20, 3, 1)]
    g = torch.Generator().manual_seed(seed)
    while len(sizes) < 24:
        channels, filters, kernel, stride, steps = (
            int(torch.randint(low, high, (), generator=g))
            for low, high in ((1, 4), (1, 7), (2, 5), (1, 4), (3, 6))
        )
        if kernel >= stride:
            sizes.append((channels, (steps - 1) * stride + kernel, filters, kernel, stride))
    for size in sizes:
        weight, gradient, shared, unknowns = _terms(size)
        case = f"with {size[0]} channels of {size[1]}×{size[1]}, {size[2]} filters of {size[3]}×"
        case += f"{size[3]} and stride {size[4]}"
        answer = ask(law, *size, case=case)
        demand(isinstance(answer, int), WHOLE.format(kind=type(answer).__name__))
        true = min(unknowns, weight + gradient - shared)
        if answer != true:
            count = size[2] * size[0] * size[3] ** 2
            facts = {"size": case[0].upper() + case[1:], "answer": answer, "unknowns": unknowns}
            terms = (weight, gradient, shared, count, unknowns)
            demand(False, _law_hint(answer, terms, _joined(size)).format(**facts))
    right("Three terms and a minimum, and no matrix was formed.")


def _joined(size: Size) -> int:
    """The rank of K if channels shared their pixels."""
    channels, pixels, filters, kernel, stride = size
    total = 0
    for i in range(stride):
        for j in range(stride):
            places = len(range(i, kernel, stride)) * len(range(j, kernel, stride))
            seen = len(range(i, pixels, stride)) * len(range(j, pixels, stride))
            total += min(filters * channels * places, seen)
    return total


def _law_hint(answer: int, terms: tuple[int, ...], joined: int) -> str:
    weight, gradient, shared, count, unknowns = terms
    if answer > unknowns:
        return MORE
    if answer in (weight + gradient, min(unknowns, weight + gradient)):
        return SHARED
    if answer in (weight + count - shared, min(unknowns, weight + count - shared)):
        return SATURATED
    if answer in (weight + count, min(unknowns, weight + count)):
        return SHARED
    if answer in (weight, min(unknowns, weight)):
        return HALF
    if answer == min(unknowns, weight + joined - shared):
        return ONE_CHANNEL
    return OTHERWISE


EQUATIONS = (
    "One number for each pixel; you have one for each equation. Which side of A must its "
    "pseudoinverse stand on?"
)
MET = (
    "You say 1 wherever an equation meets a pixel. That it is met does not mean that it is known: "
    "think of one equation for two pixels."
)
LOUD = (
    "Your map changes if an equation is multiplied by ten, and what the equation says does not: it "
    "must depend on the rows' span only."
)
SQUARED = "That is the square root of the share, or its square: which power adds up to the rank?"
TOLERANCE = (
    "Your map adds up to more than the rank: dependent equations made directions out of rounding. "
    "Where do you cut the singular values off?"
)
TRANSPOSED = (
    "You took the left singular vectors: they belong to equations, and the right ones to pixels."
)


def check_share(share: Student, seed: int = 3, pixels: int = 9) -> None:
    """Check 7.3: how much of each pixel a layer's equations determine."""
    wide = _random(seed, 5, pixels)
    wide[:, -1] = 0.0
    wide[:3, 0] = 0.0
    dependent = torch.cat([wide, wide[:2] - wide[2:4], 3 * wide[:2] + wide[3:5], wide[:3]])
    for A, case in ((wide, "5 equations"), (dependent, "equations that repeat each other")):
        true = (torch.linalg.pinv(A, rtol=1e-10) @ A).diag()
        energy, met = A.square().sum(0), (A != 0).any(0).double()
        left = A @ torch.linalg.pinv(A, rtol=1e-10)
        eager = torch.linalg.svd(A, full_matrices=False)[2].square().sum(0)
        turned = torch.linalg.svd(A)[0][: len(true)].square().sum(1)
        known: list[Wrong] = [
            (EQUATIONS, left.diag()),
            (MET, met),
            (LOUD, energy),
            (LOUD, energy / energy.max()),
            (LOUD, energy / energy.sum()),
            (SQUARED, true.sqrt()),
            (SQUARED, true.square()),
            (TOLERANCE, eager),
            (TRANSPOSED, turned),
        ]
        compare(ask(share, A.clone(), case=f"for {case}"), true, f"the map for {case}", known)
    right("The entries add up to the rank: a number for the picture became a map of it.")


TWO_NETS = "Return two networks (nn.Module): the talkative one and the silent one, in this order."
NO_NET = "The {which} network does not take pictures (1, 8, 8) to ten classes: {error}"
LARGE = (
    "The talkative network has {count} parameters; make do with 100. How wide must a first dense "
    "layer be for its ratio to be the picture?"
)
SMALL = "The silent network has {count} parameters; let it have 5000 at least."
MUTE = (
    "With weights drawn anew the silent network's gradient determines {rank} of 64 directions. Its "
    "layers must do it, not its numbers; what comes first sets the limit."
)
DUMB = (
    "The talkative network's gradient determines {rank} of 64 directions only: some of the picture "
    "is lost before it is looked at."
)


def check_misjudged(misjudged: Student, seed: int = 4) -> None:
    """Check 7.4: two networks whose numbers of parameters mislead."""
    talkative, silent = pair(ask(misjudged), "misjudged()")
    demand(isinstance(talkative, nn.Module) and isinstance(silent, nn.Module), TWO_NETS)
    few, many = (sum(p.numel() for p in net.parameters()) for net in (talkative, silent))
    for which, net in (("talkative", talkative), ("silent", silent)):
        _demand_it_runs(which, net, seed)
    swapped = few > 100 and many <= 100
    demand(not swapped, TWO_NETS)
    demand(few <= 100, LARGE.format(count=few))
    demand(many >= 5000, SMALL.format(count=many))
    first, second = (jacobian_rank(net, (1, 8, 8)).rank for net in (talkative, silent))
    demand(first == 64, DUMB.format(rank=first))
    demand(second <= 16, MUTE.format(rank=second))
    right(f"{few} parameters give everything, {many} a quarter of it at most ({second} of 64).")


def _demand_it_runs(which: str, net: nn.Module, seed: int) -> None:
    """Draw the weights anew, and try the network on a picture."""
    net.double().eval()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            size = parameter[0].numel() if parameter.ndim > 1 else 4.0
            parameter.copy_(_random(seed + place, *parameter.shape) / size**0.5)
        try:
            shape = tuple(net(_random(seed, 1, 1, 8, 8)).shape)
        except (RuntimeError, TypeError, ValueError) as error:
            shape = (str(error).splitlines()[0],)
    demand(shape == (1, 10), NO_NET.format(which=which, error=f"it gives {shape}"))


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


def report(found: Audit) -> Report:
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


COUNTED = (
    "You counted equations: one layer has more of them than unknowns here, and its rank is still "
    "too small for a walk."
)
LAST_ONLY = "A layer in the middle lacks rank, so that the walk does not come past it."
STOPPED = (
    "Every layer has full rank, and between two of them something cannot be undone: the walk stops "
    "there."
)
WALKS = "Every layer has full rank and nothing stops the walk, and you say that it does not arrive."
PROTECTED = (
    "A layer lacks rank, and you call part of the picture hidden from every attack. An attacker "
    "need not walk: which rank speaks of the whole gradient at once?"
)
PARAMETERS = (
    "You took the number of parameters for what they say. How many directions does the gradient "
    "see here?"
)
SHARE = "The part of the picture that any attack may hope for, to first order, is {true:.2f} here."


def _audited(seed: int) -> Report:
    """Audit a real network, whose second convolution lacks rank."""
    convs = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, 2, 1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net = nn.Sequential(convs[0], nn.LeakyReLU(0.2), convs[1], nn.LeakyReLU(0.2), *head).double()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            parameter.copy_(_random(seed + place, *parameter.shape) / parameter[0].numel() ** 0.5)
    return report(audit(net, (1, 8, 8), together=False))


def check_verdict(verdict: Student, seed: int = 5) -> None:
    """Check 7.5: from an audit to a verdict on two kinds of attack."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(20, 60, (), generator=g)) * 4
    cases = [
        (Report(n, 40 * n, (3 * n, n + 9), (n, n), (n, n), 0, n), (True, 1.0), WALKS),
        (Report(n, 40 * n, (3 * n, n + 9), (n, n), (n, n - 7), 0, n), (False, 1.0), COUNTED),
        (
            Report(n, 40 * n, (3 * n, n - 5, 9 * n), (n, n, n), (n, n - 9, n), 0, n),
            (False, 1.0),
            LAST_ONLY,
        ),
        (Report(n, 40 * n, (3 * n, 2 * n), (n, n), (n, n), 1, n), (False, 1.0), STOPPED),
        (
            Report(n, 90 * n, (n // 2, n), (n, n // 4), (n // 4, n // 4), 0, n // 4),
            (False, 0.25),
            PARAMETERS,
        ),
        (Report(n, 3 * n // 4, (n // 2,), (n,), (n // 2,), 0, n // 2), (False, 0.5), PARAMETERS),
        (_audited(seed), (False, 1.0), COUNTED),
    ]
    for case, (walks, part), hint in cases:
        arrives, hoped = pair(ask(verdict, case), "verdict(...)")
        demand(bool(arrives) == walks, COUNTED if hint == PARAMETERS else hint)
        _compare_parts(tensor(hoped, "the part"), part, case)
    right("A walk needs every layer; what bounds every attack is the rank of the whole.")


def _compare_parts(hoped: Tensor, part: float, case: Report) -> None:
    if abs(float(hoped) - part) < 1e-9:
        return
    lowest = min(r / u for r, u in zip(case.ranks, case.layer_unknowns, strict=True))
    demand(part != 1.0 or float(hoped) > 1.0 or case.stops or lowest == 1.0, PROTECTED)
    demand(
        abs(float(hoped) - case.parameters / case.unknowns) > 1e-9
        and abs(float(hoped) - min(1.0, case.parameters / case.unknowns)) > 1e-9,
        PARAMETERS,
    )
    demand(False, SHARE.format(true=part))

"""Checks of the exercises on defense by design."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    expect,
    known,
    normal,
    refuse,
    right,
    tensor,
)

LOSS, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])


def _most(pixels: int, positions: int, places: int, overlap: int = 1, slack: int = 0) -> int:
    """Largest F with F P + F c f² − F² < n, where ``overlap`` switches the last term."""
    counts = [F * (positions + places - overlap * F) for F in range(1, places + 1)]
    enough = [F for F, count in enumerate(counts, start=1) if count >= pixels + slack]
    return min(enough, default=places + 1) - 1


def _side(size: int, f: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - f) // stride + 1


class MostFilters(Mistakes, of="design-most", own=("gradinv_edu.design.filter_bound",)):
    def repeated_equations_counted(c, size, f, stride, padding):
        """You count every equation as news. Between the two sets some repeat what others say, once
        for each pair of filters."""
        return _most(c * size**2, _side(size, f, stride, padding) ** 2, c * f**2, overlap=0)

    def at_most_for_fewer_than(c, size, f, stride, padding):
        """As many equations as pixels need not lack rank; the layer must have fewer."""
        return _most(c * size**2, _side(size, f, stride, padding) ** 2, c * f**2, slack=1)

    def positions_of_one_side(c, size, f, stride, padding):
        """A picture has two sides: how many positions has the kernel in all?"""
        return _most(c * size**2, _side(size, f, stride, padding), c * f**2)

    def padding_forgotten(c, size, f, stride, padding):
        """Your positions are those without padding."""
        return _most(c * size**2, _side(size, f, stride, 0) ** 2, c * f**2)

    def stride_forgotten(c, size, f, stride, padding):
        """Your positions are those of stride 1."""
        return _most(c * size**2, _side(size, f, 1, padding) ** 2, c * f**2)

    def pixels_of_one_channel(c, size, f, stride, padding):
        """Your count of pixels is that of one channel."""
        return _most(size**2, _side(size, f, stride, padding) ** 2, c * f**2)

    def first_number_that_suffices(c, size, f, stride, padding):
        """One too many: that is the first number of filters at which nothing is proved any
        more."""
        return gi.design.filter_bound(c, size, f, stride, padding) + 1


FIRST_LAYERS = (
    (1, 8, 3, 2, 1),
    (3, 32, 3, 2, 1),
    (3, 6, 3, 3, 1),
    (1, 8, 3, 1, 1),
    (1, 12, 4, 3, 0),
)


def check_most_filters(
    most_filters: Student, cases: Sequence[tuple[int, int, int, int, int]] = FIRST_LAYERS
) -> None:
    """Check: the largest number of filters with which a first layer must lack rank."""
    for given in cases:
        c, size, f, stride, padding = given
        case = f"for {c}×{size}×{size}, a {f}×{f} kernel, stride {stride}, padding {padding}"
        true = gi.design.filter_bound(*given)
        expect("design-most", most_filters, given, true, "the number of filters", case)
    right("Up to so many filters the first layer hides something, whatever stands above it.")


class Another(Mistakes, of="design-another"):
    def the_same_picture(W, K, x):
        """That is the picture itself, or nearly: move it by 1/2 at least, as its norm measures."""
        return x.clone()

    def open_for_the_gradient_constraints_only(W, K, x):
        """The first layer's output z changed by {gap:.0e}, so everything above it notices. Which
        directions does Wx not see?"""
        return x + torch.linalg.svd(K)[2][-1]

    def brighter(W, K, x):
        """Like open_for_the_gradient_constraints_only."""
        return x + 0.5

    def column_for_row_of_the_svd(W, K, x):
        """Like open_for_the_gradient_constraints_only."""
        return x + torch.linalg.svd(torch.cat([W, K]))[2][:, -1]

    def open_for_the_weight_constraints_only(W, K, x):
        """z is the same, and so is every gradient above. But the first layer's own gradient
        changed by {gap:.0e}: it meets the pixels a second time."""
        return x + torch.linalg.svd(W)[2][-1]


def check_another(another: Student, seed: int = 1) -> None:
    """Check: a second picture with the same gradient in every layer."""
    conv, head = nn.Conv2d(1, 2, 3, 2, 1), nn.Linear(32, 10)
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(seed + number, *p.shape) / 3)
    x = normal(seed + 9, 1, 1, 8, 8).abs().clamp(max=1)
    z = conv(x).detach().requires_grad_()
    (k,) = torch.autograd.grad(LOSS(model[1:](z), LABEL), z)
    matrix = gi.systems.LayerSystem(conv, k, (1, 8, 8)).to_dense()
    W, K = matrix[: k.numel()], matrix[k.numel() :]
    answer = tensor(ask(another, W, K, x.flatten()), "the other picture")
    demand(answer.shape == (64,), "Return the picture as it came: one row of 64 pixels.")
    demand(float((answer - x.flatten()).norm()) >= 0.499, Another.the_same_picture)
    heard = float((W @ (answer - x.flatten())).norm())
    demand(heard < 1e-8, Another.open_for_the_gradient_constraints_only, gap=heard)
    sent = [gi.observe(model, LOSS, y, LABEL).gradients for y in (x, answer.reshape(x.shape))]
    gap = max(float((sent[1][name] - g).abs().max()) for name, g in sent[0].items())
    demand(gap < 1e-8, Another.open_for_the_weight_constraints_only, gap=gap)
    right("Two pictures, one gradient in every layer: no attack on it can tell which was sent.")


def _likely(A: Tensor, b: Tensor, C: Tensor | None = None) -> Tensor:
    """The most likely x of mean zero and covariance C (one, if none is given) with A x = b."""
    C = torch.eye(A.shape[1], dtype=A.dtype) if C is None else C
    return C @ A.T @ torch.linalg.solve(A @ C @ A.T, b)


class MostLikely(Mistakes, of="design-likely"):
    def mean_not_taken_off_the_equations(A, b, mean, C):
        """You asked the prior to explain all of A x. It need only explain what A x has beyond what
        the mean picture would give."""
        return mean + _likely(A, b, C)

    def mean_not_added(A, b, mean, C):
        """You have what is to be added to the mean picture; add it."""
        return _likely(A, b - A @ mean, C)

    def correction_subtracted(A, b, mean, C):
        """Your correction has the wrong sign."""
        return mean - _likely(A, b - A @ mean, C)

    def covariance_not_used(A, b, mean, C):
        """Your answer is the nearest to the mean that fits: the covariance, which says what pixels
        do together, was not asked."""
        return mean + _likely(A, b - A @ mean)

    def least_norm(A, b, mean, C):
        """That is the answer of least norm. What do you know from the other pictures?"""
        return _likely(A, b)


def check_most_likely(most_likely: Student, seed: int = 2, rows: int = 6) -> None:
    """Check: the most likely picture of all that fit."""
    pixels = rows + 4
    A, root = normal(seed, rows, pixels), normal(seed + 1, pixels, pixels)
    mean, x, C = normal(seed + 2, pixels), normal(seed + 3, pixels), root @ root.T
    given = (A, A @ x, mean, C)
    answer = tensor(ask(most_likely, *given), "the most likely picture")
    true = mean + _likely(A, A @ (x - mean), C)
    unfit = ("Your answer does not fit the equations: A x̂ is not what is known.", answer)
    compare(answer, true, "the most likely picture", [*known("design-likely", given), unfit], 1e-7)
    right("It fits every equation, and fills in the rest as the other pictures suggest.")


DesignRuns = tuple[str, list[float], list[float]]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _front(
    designs: list[DesignRuns],
    merit: Callable[[list[float]], float] = sum,
    leak: Callable[[list[float]], float] = _middle,
    strict: bool = False,
) -> set[str]:
    """Names that no other design beats: in both, if ``strict``, where one suffices."""
    scores = {name: (merit(accuracies), -leak(db)) for name, accuracies, db in designs}

    def beaten(a: tuple[float, float], b: tuple[float, float]) -> bool:
        if strict:
            return b[0] > a[0] and b[1] > a[1]
        return b != a and b[0] >= a[0] and b[1] >= a[1]

    return {n for n, a in scores.items() if not any(beaten(a, b) for b in scores.values())}


class Front(Mistakes, of="design-front"):
    def best_seed_for_mean(designs):
        """You took a design's best seed: the next client will not choose its seed by the test."""
        return _front(designs, merit=max)

    def mean_for_median(designs):
        """One try of 300 dB among many of 20 moves your average by far: did you take the mean of
        the recoveries where the median was asked?"""
        return _front(designs, leak=sum)

    def high_psnr_for_good(designs):
        """For the client a *low* PSNR of the recovery is good, and a high accuracy."""
        return _front(designs, leak=lambda db: -_middle(db))

    def leaking_designs_left_out(designs):
        """A design belongs to the front if no other is at least as good in both and better in one.
        You left out designs that leak much, but learn better than all that leak less."""
        leaks = {name for name, _, db in designs if _middle(db) > 100}
        return _front(designs) - leaks

    def beaten_only_if_worse_in_both(designs):
        """A design stays although another is as good in one of the two and better in the other:
        then nothing speaks for it."""
        return _front(designs, strict=True)


DESIGNS: list[DesignRuns] = [
    ("narrow", [90.0, 89.0, 91.0], [19.0, 19.0, 20.0]),
    ("narrow, wide above", [95.0, 96.0, 94.0], [20.0, 300.0, 21.0]),
    ("lucky seed", [99.0, 90.0, 91.0], [22.0, 22.0, 22.0]),
    ("no better", [95.0, 94.0, 96.0], [25.0, 25.0, 25.0]),
    ("wide", [97.0, 96.0, 98.0], [300.0, 299.0, 300.0]),
    ("small dense", [25.0, 23.0, 24.0], [300.0, 300.0, 300.0]),
    ("steady", [96.0, 94.0, 95.0], [26.0, 25.0, 26.0]),
]


def check_front(front: Student, shift: float = 0.0) -> None:
    """Check: designs that no other beats in accuracy and in recovery both."""
    designs = [(n, [a - shift for a in accuracies], db) for n, accuracies, db in DESIGNS]
    answer, names = ask(front, designs), {n for n, _, _ in designs}
    named = isinstance(answer, set | list | tuple) and set(answer) <= names
    demand(named, "Return the names of designs, as a set.")
    true, found = _front(designs), set(answer)
    for hint, wrong in known("design-front", (designs,)):
        demand(found == true or found != wrong, hint)
    for name in sorted(found - true):
        better = next(
            n
            for n in names - {name}
            if name not in _front([d for d in designs if d[0] in (n, name)])
        )
        refuse(
            f"You kept “{name}”, and “{better}” is at least as good in both figures and better in "
            "one: compare the mean of the accuracies and the median of the recoveries."
        )
    for name in sorted(true - found):
        refuse(
            f"You left out “{name}”: whatever learns better than it leaks more, and whatever leaks "
            "less learns worse."
        )
    right("The front says what there is to choose from; it does not choose.")


def _narrow(model: nn.Sequential, shape: tuple[int, ...], more: int = 0) -> bool:
    """Whether the first convolution has no more filters than the bound and ``more``."""
    first = [layer for layer in model if isinstance(layer, nn.Conv2d)][:1]
    few = gi.design.filter_bound(*shape[:2], 3, 2, 1)
    return bool(first) and first[0].out_channels <= few + more


class MustHide(Mistakes, of="design-hide"):
    def parameters_counted(model, shape):
        """Misjudged: {name}. The first layer has fewer equations than pixels, so it hides
        something, however wide, deep or rich in parameters the rest is."""
        return sum(p.numel() for p in model.parameters()) < 1000

    def narrowest_layer_anywhere(model, shape):
        """Misjudged: {name}. The narrow layer is not the first. What it loses, the first layer's
        own gradient still tells: a deficient layer further up proves nothing."""
        convs = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        return any(_narrow([conv], shape) for conv in convs)

    def dense_rows_counted_like_filters(model, shape):
        """Misjudged: {name}. Few parameters, yet the first layer is dense with a bias: one unit's
        ratio is the picture."""
        first = next(layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear))
        return first.weight.shape[0] <= gi.design.filter_bound(*shape[:2], 3, 2, 1)

    def one_filter_too_many(model, shape):
        """Misjudged: {name}. This first layer has as many equations as pixels: here the count
        proves nothing."""
        return _narrow(model, shape, more=1)

    def deep_networks_trusted(model, shape):
        """Misjudged: {name}. Depth is no count of equations: only one layer meets the picture."""
        return _narrow(model, shape) or sum(isinstance(m, nn.Conv2d) for m in model) > 5


def check_must_hide(must_hide: Student, channels: int = 1, size: int = 8) -> None:
    """Check: whether the count alone proves that a network hides part of its input."""
    few, shape = gi.design.filter_bound(channels, size, 3, 2, 1), (channels, size, size)

    def convolutions(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 3, 1 if layers else 2, 1), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))

    dense = nn.Sequential(nn.Flatten(), nn.LazyLinear(1), nn.Tanh(), nn.Linear(1, 10))
    above, too_many = "a narrow layer above a wide one", "one filter more than the bound"
    cases = [
        ("a narrow first layer", convolutions(few), MustHide.parameters_counted),
        (
            "a narrow first layer and wide ones above",
            convolutions(few, 32, 32),
            MustHide.parameters_counted,
        ),
        (above, convolutions(2 * few, 1), MustHide.narrowest_layer_anywhere),
        ("a dense layer of one unit", dense, MustHide.dense_rows_counted_like_filters),
        (too_many, convolutions(few + 1), MustHide.one_filter_too_many),
        ("six layers", convolutions(*[2 * few] * 6), MustHide.deep_networks_trusted),
    ]
    for name, model, hint in cases:
        model(torch.zeros(1, *shape))  # the classifier learns its size
        answer = ask(must_hide, model, shape, case=f"for {name}")
        demand(bool(answer) == (hint is MustHide.parameters_counted), hint, name=name)
    right("One layer meets the picture, and its width decides.")

"""Checks of the exercises to chapter 4, convolution as a dense layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..convolution import as_dense
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _seen(x: Tensor, positions: int, size: int, stride: int) -> Tensor:
    """All patches of a square picture, ``(positions, positions, size, size)``."""
    patches = x.unfold(0, size, stride).unfold(1, size, stride)
    return patches[:positions, :positions]


def _sum(k: Tensor, seen: Tensor) -> Tensor:
    return torch.einsum("ij,ijuv->uv", k, seen)


MEAN = (
    "You took the mean over the positions. The weight is used at every position, and the chain "
    "rule adds up what each of them does to the loss."
)
UNIT_STRIDE = (
    "You forgot the stride: the patches that you add begin at neighbouring pixels. Where does the "
    "kernel stand at its second position?"
)
FLIPPED = (
    "Your patches are turned by 180 degrees. What is called a convolution here does not turn its "
    "kernel: place u of it meets pixel p + u."
)
ONE_POSITION = (
    "That is what the loudest position contributes. The weight stands at all of them, and all "
    "have their share."
)
SIZES = "You added sizes: an output gradient has a sign, and it matters."
ACROSS = "Rows and columns of the kernel are exchanged."


def check_kernel_gradient(kernel_gradient: Student, seed: int = 1, positions: int = 4) -> None:
    """Check 4.1: both gradients of one filter, summed over positions."""
    for size, stride in ((3, 1), (2, 2), (3, 2)):
        x = _random(seed, *[(positions - 1) * stride + size] * 2)
        k = _random(seed + 1, positions, positions) - 0.4
        seen = _seen(x, positions, size, stride)
        true = _sum(k, seen)
        loudest = k * (k.abs() == k.abs().max())
        case = f"for a {size}×{size} kernel with stride {stride}"
        answer = ask(kernel_gradient, x.clone(), k.clone(), size, stride, case=case)
        G, g_b = pair(answer, "kernel_gradient(...)")
        known: list[Wrong] = [
            (MEAN, true / k.numel()),
            (MEAN, true / k.sum()),
            (UNIT_STRIDE, _sum(k, _seen(x, positions, size, 1))),
            (FLIPPED, true.flip(0, 1)),
            (ONE_POSITION, _sum(loudest, seen)),
            (SIZES, _sum(k.abs(), seen)),
            (ACROSS, true.T),
        ]
        compare(G, true, f"the kernel's gradient {case}", known)
        biases = [(MEAN, k.mean()), (ONE_POSITION, loudest.sum()), (SIZES, k.abs().sum())]
        compare(g_b, k.sum(), f"the bias gradient {case}", biases)
    right("A kernel's gradient is a sum over positions: a mixture, even for one picture.")


TRANSPOSED = "Your matrix is transposed: it takes a picture to an output, so columns are pixels."
NO_STRIDE = "You forgot the stride: your kernel stands at every pixel."
NO_PADDING = (
    "You forgot the padding: there are positions where the kernel hangs over the edge, and meets "
    "zeros there."
)
WITH_ZEROS = (
    "Your columns count the zeros of the padding as pixels. The padding is known; only the "
    "picture's own pixels are unknowns."
)
WIDTH = (
    "The gaps in your rows are too short or too long: to go down one row of the picture is to go "
    "on by the picture's width."
)


def _matrix(kernel: Tensor, size: int, stride: int, padding: int) -> Tensor:
    conv = nn.Conv2d(1, 1, len(kernel), stride, padding, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(kernel)
    return as_dense(conv, (1, size, size))


def check_as_matrix(as_matrix: Student, seed: int = 2, size: int = 5) -> None:
    """Check 4.2: the matrix of a convolution, entry by entry."""
    for places, stride, padding in ((2, 1, 0), (3, 2, 0), (3, 1, 1), (3, 2, 1)):
        kernel = _random(seed, places, places) + 0.1
        true = _matrix(kernel, size, stride, padding)
        case = f"with stride {stride} and padding {padding}"
        answer = tensor(
            ask(as_matrix, kernel.clone(), size, stride, padding, case=case), "as_matrix(...)"
        )
        known: list[Wrong] = [
            (TRANSPOSED, true.T),
            (NO_STRIDE, _matrix(kernel, size, 1, padding)),
            (NO_PADDING, _matrix(kernel, size, stride, 0)),
            (WITH_ZEROS, _matrix(kernel, size + 2 * padding, stride, 0)),
            (FLIPPED, _matrix(kernel.flip(0, 1), size, stride, padding)),
            (ACROSS, _matrix(kernel.T, size, stride, padding)),
        ]
        misplaced = answer.shape == true.shape and not torch.equal(answer != 0, true != 0)
        known += [(WIDTH, answer)] * misplaced
        compare(answer, true, f"the matrix {case}", known)
    right("One row for each position, one column for each pixel, and few different numbers.")


SHAPE = "One number for each position of the kernel: {wanted}; yours has {got}."
TOO_LARGE = (
    "Your output gradient reaches {most:.3g}; keep it between −1 and 1. (Its size would not help: "
    "what do the shares do when k is doubled?)"
)
CANCELLED = "Your k sums to zero: the server cannot divide. Come close, and stay away from it."
ONE_SIGN = (
    "All your k have one sign, so all shares are positive: a mean of pixels between 0 and 1 stays "
    "between 0 and 1."
)
TAME = (
    "Both signs, but the ratio stays between {low:.2f} and {high:.2f}: your shares are too tame, "
    "or the patches too alike. When does a share become large?"
)


def check_glaring(glaring: Student, seed: int = 3, size: int = 8) -> None:
    """Check 4.3: an output gradient whose ratio no photograph could contain."""
    for places in (2, 3):
        x = _random(seed + places, size, size)
        positions = size - places + 1
        k = tensor(ask(glaring, x.clone(), places), "glaring(...)")
        wanted = (positions, positions)
        demand(tuple(k.shape) == wanted, SHAPE.format(wanted=wanted, got=tuple(k.shape)))
        demand(bool(k.isfinite().all()), "Your output gradient has entries that are not finite.")
        demand(bool((k.abs() <= 1).all()), TOO_LARGE.format(most=float(k.abs().max())))
        demand(abs(float(k.sum())) > 1e-9 * float(k.abs().sum()) + 1e-300, CANCELLED)
        demand(bool((k > 0).any() and (k < 0).any()), ONE_SIGN)
        ratio = _sum(k, _seen(x, positions, places, 1)) / k.sum()
        low, high = float(ratio.min()), float(ratio.max())
        demand(low < -1 or high > 2, TAME.format(low=low, high=high))
    right("A mean whose shares sum to one, and yet far outside of what it is a mean of.")


POSITIONS = (
    "You forgot the positions: filters that all look at the same few patches cannot tell more than "
    "these few."
)
CHANNELS = "You forgot the channels: a patch is as deep as the picture has colours."
NO_BOUND = (
    "You counted filters, or equations, and bounded them by nothing. The rank of a product is at "
    "most the smallest side that occurs in it."
)
PER_FILTER = (
    "You counted one equation for each filter: that is what the ratio's divisor keeps. Each weight "
    "of the kernel has a gradient of its own."
)
PER_POSITION = (
    "You counted outputs: those are the weight constraints. The gradient has one number for each "
    "weight."
)
PLANS = (
    (3, 8, 3, 1, 0, 12),
    (3, 40, 3, 1, 0, 12),
    (3, 40, 6, 3, 0, 12),
    (1, 64, 5, 1, 0, 12),
    (3, 40, 12, 1, 0, 12),
    (3, 96, 5, 2, 2, 14),
)
Count = Callable[[int, int, int, int, int, int], int]


def _side(places: int, stride: int, padding: int, size: int) -> int:
    return (size + 2 * padding - places) // stride + 1


WRONG_EQUATIONS: list[tuple[str, Count]] = [
    (CHANNELS, lambda c, f, u, s, p, n: f * u**2),
    (PER_FILTER, lambda c, f, u, s, p, n: f),
    (PER_POSITION, lambda c, f, u, s, p, n: f * _side(u, s, p, n) ** 2),
]
WRONG_MIXTURES: list[tuple[str, Count]] = [
    (CHANNELS, lambda c, f, u, s, p, n: min(f, _side(u, s, p, n) ** 2, u**2)),
    (POSITIONS, lambda c, f, u, s, p, n: min(f, c * u**2)),
    (NO_STRIDE, lambda c, f, u, s, p, n: min(f, _side(u, 1, p, n) ** 2, c * u**2)),
    (NO_PADDING, lambda c, f, u, s, p, n: min(f, _side(u, s, 0, n) ** 2, c * u**2)),
    (NO_BOUND, lambda c, f, u, s, p, n: f),
    (NO_BOUND, lambda c, f, u, s, p, n: f * c * u**2),
]


def check_count(count: Student) -> None:
    """Check 4.4: how many equations a gradient holds, and how many mixtures of patches."""
    answers = []
    for plan in PLANS:
        counts = pair(ask(count, *plan, case=f"for {plan}"), "count(...)")
        answers.append([int(tensor(value, "a count")) for value in counts])
    equations, mixtures = zip(*answers, strict=True)
    _formula(equations, "equations", lambda c, f, u, s, p, n: f * c * u**2, WRONG_EQUATIONS)
    _formula(
        mixtures,
        "mixtures",
        lambda c, f, u, s, p, n: min(f, _side(u, s, p, n) ** 2, c * u**2),
        WRONG_MIXTURES,
    )
    right("The gradient holds many mixtures of patches; the ratio keeps one for each filter.")


def _formula(
    answers: tuple[int, ...], what: str, true: Count, wrong: list[tuple[str, Count]]
) -> None:
    """Refuse numbers that another formula gives for every plan, with that formula's hint."""
    for hint, formula in wrong:
        demand(answers != tuple(formula(*plan) for plan in PLANS), hint)
    for answer, plan in zip(answers, PLANS, strict=True):
        channels, filters, places, stride, padding, size = plan
        demand(
            answer == true(*plan),
            f"{answer} {what} is not right for {filters} filters of {places}×{places}, "
            f"{channels} channels, stride {stride}, padding {padding}, {size}×{size} pixels.",
        )


ONE = "One active position, and you say that the ratio is no true patch."
FLAT = "All patches of this picture are alike, so every mean of them is one of them."
SILENT = (
    "You let patches count that carry no gradient: where k is zero, it does not matter what the "
    "picture shows."
)
TWO = "Two different patches are mixed, and you say that the ratio is a true one."
BOTH_SIGNS = "You overlooked a position with a negative k: it takes part in the mixture."
NOTHING = "The k sum to zero, so there is no ratio, and you say that it is a true patch."
FAR = (
    "The active patches lie apart, and are alike all the same: it is the patches that must agree, "
    "not their places."
)


def check_is_true_patch(is_true_patch: Student, seed: int = 4) -> None:
    """Check 4.5: when the ratio of a filter is a true piece of the picture."""
    x, places = _random(seed, 7, 7), 2
    stripes = x[:, :2].repeat(1, 4)[:, :7]
    half = x.clone()
    half[:, :4] = 0.5
    k = _random(seed + 1, 6, 6) + 0.1
    empty = torch.zeros_like(k)

    def active(*spots: tuple[int, int, float]) -> Tensor:
        made = empty.clone()
        for row, column, value in spots:
            made[row, column] = value
        return made

    left = k.clone()
    left[:, 3:] = 0
    cases = [
        (x, active((2, 3, -0.7)), True, ONE),
        (x, k, False, TWO),
        (torch.full_like(x, 0.3), k, True, FLAT),
        (half, left, True, SILENT),
        (x, active((0, 0, 1.0), (4, 4, 1.0)), False, TWO),
        (x, active((0, 0, 1.0), (4, 4, -0.5)), False, BOTH_SIGNS),
        (x, empty, False, NOTHING),
        (torch.full_like(x, 0.3), active((0, 0, 1.0), (4, 4, -1.0)), False, NOTHING),
        (stripes, active((3, 0, 1.0), (3, 4, 0.5)), True, FAR),
    ]
    for picture, slopes, truth, hint in cases:
        answer = ask(is_true_patch, picture.clone(), slopes.clone(), places)
        demand(bool(answer) == truth, hint)
    right("What the ratio is depends on the patches that carry gradient, and on nothing else.")

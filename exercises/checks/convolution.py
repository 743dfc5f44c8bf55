"""Checks of the exercises on convolution as a dense layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    AUTOGRAD,
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    each,
    expect,
    known,
    pair,
    right,
    tensor,
    told,
)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sum(k: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """Sum of the patches of a square picture, each times its k."""
    patches = x.unfold(0, size, stride).unfold(1, size, stride)[: len(k), : len(k)]
    return torch.einsum("ij,ijuv->uv", k, patches)


class KernelGradient(Mistakes, of="convolution-gradient", own=AUTOGRAD):
    def mean_for_sum(x, k, size, stride):
        """You took the mean over the positions. The weight is used at every position, and the
        chain rule adds up what each of them does to the loss."""
        return _sum(k, x, size, stride) / k.numel(), k.mean()

    def divided_by_the_bias_gradient(x, k, size, stride):
        """Like mean_for_sum."""
        return _sum(k, x, size, stride) / k.sum(), k.sum()

    def forgotten_stride(x, k, size, stride):
        """You forgot the stride: the patches that you add begin at neighbouring pixels. Where does
        the kernel stand at its second position?"""
        return _sum(k, x, size, 1), k.sum()

    def kernel_flipped(x, k, size, stride):
        """Your patches are turned by 180 degrees. What is called a convolution here does not turn
        its kernel: place u of it meets pixel p + u."""
        return _sum(k, x, size, stride).flip(0, 1), k.sum()

    def one_position_only(x, k, size, stride):
        """That is what the loudest position contributes. The weight stands at all of them, and all
        have their share."""
        k = k * (k.abs() == k.abs().max())
        return _sum(k, x, size, stride), k.sum()

    def sizes_added(x, k, size, stride):
        """You added sizes: an output gradient has a sign, and it matters."""
        return _sum(k.abs(), x, size, stride), k.abs().sum()

    def rows_and_columns_exchanged(x, k, size, stride):
        """Rows and columns of the kernel are exchanged."""
        return _sum(k, x, size, stride).T, k.sum()


def check_kernel_gradient(kernel_gradient: Student, seed: int = 1, positions: int = 4) -> None:
    """Check: both gradients of one filter, summed over positions."""
    parts = ("the kernel's gradient", "the bias gradient")
    for size, stride in ((3, 1), (2, 2), (3, 2)):
        x = _random(seed, *[(positions - 1) * stride + size] * 2)
        k = _random(seed + 1, positions, positions) - 0.4
        truth = (_sum(k, x, size, stride), k.sum())
        case = f"for a {size}×{size} kernel with stride {stride}"
        expect("convolution-gradient", kernel_gradient, (x, k, size, stride), truth, parts, case)
    right("A kernel's gradient is a sum over positions: a mixture, even for one picture.")


def _matrix(kernel: Tensor, size: int, stride: int, padding: int) -> Tensor:
    conv = nn.Conv2d(1, 1, len(kernel), stride, padding, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(kernel)
    return gi.convolution.as_dense(conv, (1, size, size))


class AsMatrix(Mistakes, of="convolution-matrix", own=("gradinv_edu.convolution.as_dense",)):
    def transposed_matrix(kernel, size, stride, padding):
        """Your matrix is transposed: it takes a picture to an output, so columns are pixels."""
        return _matrix(kernel, size, stride, padding).T

    def stride_of_one(kernel, size, stride, padding):
        """You forgot the stride: your kernel stands at every pixel."""
        return _matrix(kernel, size, 1, padding)

    def padding_of_none(kernel, size, stride, padding):
        """You forgot the padding: there are positions where the kernel hangs over the edge, and
        meets zeros there."""
        return _matrix(kernel, size, stride, 0)

    def padding_as_pixels(kernel, size, stride, padding):
        """Your columns count the zeros of the padding as pixels. The padding is known; only the
        picture's own pixels are unknowns."""
        return _matrix(kernel, size + 2 * padding, stride, 0)

    def matrix_of_the_flipped_kernel(kernel, size, stride, padding):
        """Your patches are turned by 180 degrees. What is called a convolution here does not turn
        its kernel: place u of it meets pixel p + u."""
        return _matrix(kernel.flip(0, 1), size, stride, padding)

    def kernel_across(kernel, size, stride, padding):
        """Rows and columns of the kernel are exchanged."""
        return _matrix(kernel.T, size, stride, padding)

    def gap_of_the_output_width(kernel, size, stride, padding):
        """The gaps in your rows are too short or too long: to go down one row of the picture is to
        go on by the picture's width."""
        rows = _matrix(kernel, size, stride, padding).reshape(-1, size, size)
        side = int(len(rows) ** 0.5)
        moved = torch.zeros_like(rows).flatten(1)
        for row, column, pixel in rows.nonzero():
            moved[row, (int(row) * side + int(column) * side + int(pixel)) % size**2] = 1.0
        return moved


def check_as_matrix(as_matrix: Student, seed: int = 2, size: int = 5) -> None:
    """Check: the matrix of a convolution, entry by entry."""
    for places, stride, padding in ((2, 1, 0), (3, 2, 0), (3, 1, 1), (3, 2, 1)):
        given = (_random(seed, places, places) + 0.1, size, stride, padding)
        true, case = _matrix(*given), f"with stride {stride} and padding {padding}"
        answer = tensor(ask(as_matrix, *given, case=case), "as_matrix(...)")
        wrong = [*known("convolution-matrix", given)][:-1]
        if answer.shape == true.shape and not torch.equal(answer != 0, true != 0):
            wrong.append((told(AsMatrix.gap_of_the_output_width), answer))
        compare(answer, true, f"the matrix {case}", wrong)
    right("One row for each position, one column for each pixel, and few different numbers.")


class Glaring(Mistakes, of="convolution-glaring"):
    def the_same_everywhere(x, size):
        """All your k have one sign, so all shares are positive: a mean of pixels between 0 and 1
        stays between 0 and 1."""
        return torch.ones(len(x) - size + 1, len(x) - size + 1, dtype=x.dtype)

    def exactly_cancelled(x, size):
        """Your k sums to zero: the server cannot divide. Come close, and stay away from it."""
        k = 0 * Glaring.the_same_everywhere(x, size)
        k[0, 0], k[-1, -1] = 1.0, -1.0
        return k

    def tame_shares(x, size):
        """Both signs, but the ratio stays between {low:.2f} and {high:.2f}: your shares are too
        tame, or the patches too alike. When does a share become large?"""
        k = Glaring.the_same_everywhere(x, size)
        k[0, 0] = -0.1
        return k

    def only_louder(x, size):
        """Your output gradient reaches {most:.3g}; keep it between −1 and 1. (Its size would not
        help: what do the shares do when k is doubled?)"""
        return 100 * Glaring.the_same_everywhere(x, size)

    def one_number_for_each_pixel(x, size):
        """One number for each position of the kernel: {wanted}; yours has {got}."""
        return 2 * x - 1


def check_glaring(glaring: Student, seed: int = 3, size: int = 8) -> None:
    """Check: an output gradient whose ratio no photograph could contain."""
    for places in (2, 3):
        x = _random(seed + places, size, size)
        k = tensor(ask(glaring, x, places), "glaring(...)")
        wanted, got = (size - places + 1,) * 2, tuple(k.shape)
        demand(got == wanted, Glaring.one_number_for_each_pixel, wanted=wanted, got=got)
        demand(k.isfinite().all(), "Your output gradient has entries that are not finite.")
        demand((k.abs() <= 1).all(), Glaring.only_louder, most=float(k.abs().max()))
        open_ = abs(float(k.sum())) > 1e-9 * float(k.abs().sum()) + 1e-300
        demand(open_, Glaring.exactly_cancelled)
        demand((k > 0).any() and (k < 0).any(), Glaring.the_same_everywhere)
        ratio = _sum(k, x, places, 1) / k.sum()
        low, high = float(ratio.min()), float(ratio.max())
        demand(low < -1 or high > 2, Glaring.tame_shares, low=low, high=high)
    right("A mean whose shares sum to one, and yet far outside of what it is a mean of.")


def _count(c: int, f: int, u: int, s: int, p: int, n: int) -> tuple[int, int]:
    """Equations of a gradient, and mixtures of patches."""
    return f * c * u**2, min(f, ((n + 2 * p - u) // s + 1) ** 2, c * u**2)


class Count(Mistakes, of="convolution-count"):
    def channels_forgotten(c, f, u, s, p, n):
        """You forgot the channels: a patch is as deep as the picture has colours."""
        return _count(1, f, u, s, p, n)

    def one_equation_a_filter(c, f, u, s, p, n):
        """You counted one equation for each filter: that is what the ratio's divisor keeps. Each
        weight of the kernel has a gradient of its own."""
        return f, _count(c, f, u, s, p, n)[1]

    def outputs_counted(c, f, u, s, p, n):
        """You counted outputs: those are the weight constraints. The gradient has one number for
        each weight."""
        return f * ((n + 2 * p - u) // s + 1) ** 2, _count(c, f, u, s, p, n)[1]

    def positions_forgotten(c, f, u, s, p, n):
        """You forgot the positions: filters that all look at the same few patches cannot tell more
        than these few."""
        return f * c * u**2, min(f, c * u**2)

    def stride_forgotten(c, f, u, s, p, n):
        """You forgot the stride: your kernel stands at every pixel."""
        return _count(c, f, u, 1, p, n)

    def padding_forgotten(c, f, u, s, p, n):
        """You forgot the padding: there are positions where the kernel hangs over the edge, and
        meets zeros there."""
        return _count(c, f, u, s, 0, n)

    def filters_counted(c, f, u, s, p, n):
        """You counted filters, or equations, and bounded them by nothing. The rank of a product is
        at most the smallest side that occurs in it."""
        return f * c * u**2, f

    def equations_counted(c, f, u, s, p, n):
        """Like filters_counted."""
        return f * c * u**2, f * c * u**2


PLANS = (
    (3, 8, 3, 1, 0, 12),
    (3, 40, 3, 1, 0, 12),
    (3, 40, 6, 3, 0, 12),
    (1, 64, 5, 1, 0, 12),
    (3, 40, 12, 1, 0, 12),
    (3, 96, 5, 2, 2, 14),
)


def check_count(count: Student) -> None:
    """Check: how many equations a gradient holds, and how many mixtures of patches."""
    answers = [pair(ask(count, *plan, case=f"for {plan}"), "count(...)") for plan in PLANS]
    for i, what in enumerate(("equations", "mixtures")):
        numbers = [int(tensor(both[i], "a count")) for both in answers]
        true = [_count(*plan)[i] for plan in PLANS]
        for mistake in Mistakes.KNOWN[
            "convolution-count"
        ]:  # one that gives these numbers for every plan
            demand(numbers != [mistake(*plan)[i] for plan in PLANS] or numbers == true, mistake)
        for number, wanted, (c, f, u, s, p, n) in zip(numbers, true, PLANS, strict=True):
            demand(
                number == wanted,
                f"{number} {what} is not right for {f} filters of {u}×{u}, {c} channels, "
                f"stride {s}, padding {p}, {n}×{n} pixels.",
            )
    right("The gradient holds many mixtures of patches; the ratio keeps one for each filter.")


def _alike(x: Tensor, active: Tensor, size: int) -> bool:
    patches = x.unfold(0, size, 1).unfold(1, size, 1)[active]
    return bool((patches == patches[0]).all())


class TruePatch(Mistakes, of="convolution-true"):
    def one_position_or_one_colour(x, k, size):
        """The active patches lie apart, and are alike all the same: it is the patches that must
        agree, not their places."""
        active = x.unfold(0, size, 1).unfold(1, size, 1)[k != 0].flatten(1)
        return bool(k.sum() != 0) and (len(active) == 1 or len(active.unique()) == 1)

    def one_active_position(x, k, size):
        """All patches of this picture are alike, so every mean of them is one of them."""
        return int((k != 0).sum()) == 1

    def all_patches_compared(x, k, size):
        """You let patches count that carry no gradient: where k is zero, it does not matter what
        the picture shows."""
        alike = _alike(x, torch.ones_like(k, dtype=torch.bool), size)
        return k.sum() != 0 and (alike or int((k != 0).sum()) == 1)

    def positive_entries_only(x, k, size):
        """You overlooked a position with a negative k: it takes part in the mixture."""
        sign = 1 if (k > 0).any() else -1
        return bool((k != 0).any()) and _alike(x, sign * k > 0, size)

    def zero_sum_forgotten(x, k, size):
        """The k sum to zero, so there is no ratio, and you say that it is a true patch."""
        return not (k != 0).any() or _alike(x, k != 0, size)


def check_is_true_patch(is_true_patch: Student, seed: int = 4) -> None:
    """Check: when the ratio of a filter is a true piece of the picture."""
    x, flat = _random(seed, 7, 7), torch.full((7, 7), 0.3, dtype=torch.float64)
    stripes, half = x[:, :2].repeat(1, 4)[:, :7], x.clone()
    half[:, :4] = 0.5
    k = _random(seed + 1, 6, 6) + 0.1
    left = k.clone()
    left[:, 3:] = 0

    def at(*spots: tuple[int, int, float]) -> Tensor:
        made = torch.zeros_like(k)
        for row, column, value in spots:
            made[row, column] = value
        return made

    one = "One active position, and you say that the ratio is no true patch."
    two = "Two different patches are mixed, and you say that the ratio is a true one."
    cases = [
        (x, at((2, 3, -0.7)), 2, True, one),
        (x, k, 2, False, two),
        (flat, k, 2, True, TruePatch.one_active_position),
        (half, left, 2, True, TruePatch.all_patches_compared),
        (x, at((0, 0, 1.0), (4, 4, 1.0)), 2, False, two),
        (x, at((0, 0, 1.0), (4, 4, -0.5)), 2, False, TruePatch.positive_entries_only),
        (x, at(), 2, False, TruePatch.zero_sum_forgotten),
        (flat, at((0, 0, 1.0), (4, 4, -1.0)), 2, False, TruePatch.zero_sum_forgotten),
        (stripes, at((3, 0, 1.0), (3, 4, 0.5)), 2, True, TruePatch.one_position_or_one_colour),
    ]
    each(is_true_patch, cases)
    right("What the ratio is depends on the patches that carry gradient, and on nothing else.")

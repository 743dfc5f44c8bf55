"""Checks of the exercises on convolution as a linear system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

import gradinv_edu as gi

from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, right, tensor


def _rows(k: Tensor, places: int, size: int, stride: int) -> Tensor:
    rows = k.new_zeros(places, places, size, size)
    reach = stride * (len(k) - 1) + 1
    for u in range(places):
        for v in range(places):
            rows[u, v, u : u + reach : stride, v : v + reach : stride] = k
    return rows.reshape(places**2, size**2)


class GradientRows(Mistakes, of="systems-rows"):
    def transposed_rows(k, places, size, stride):
        """Your matrix is transposed: one row for each equation, that is for each weight of the
        kernel, and one column for each pixel."""
        return _rows(k, places, size, stride).T

    def forgotten_stride(k, places, size, stride):
        """You forgot the stride: a weight meets every pixel only where the kernel moves by one
        pixel at a time."""
        return _rows(k, places, size, 1)

    def places_counted_backwards(k, places, size, stride):
        """Your equations are in the opposite order: place u of the kernel, counted from its upper
        left corner, meets pixel p + u."""
        return _rows(k, places, size, stride).flip(0)

    def mean_for_sum(k, places, size, stride):
        """Your rows are divided by the number of positions; the gradient is a sum over them."""
        return _rows(k, places, size, stride) / k.numel()

    def ones_for_k(k, places, size, stride):
        """Your coefficients are all alike. In a gradient constraint the pixels are multiplied by
        k, each by the k of the position where the weight met it."""
        return _rows(torch.ones_like(k), places, size, stride)


def check_gradient_rows(gradient_rows: Student, seed: int = 1, side: int = 3) -> None:
    """Check: the matrix of the gradient constraints, from k alone."""
    for places, stride in ((2, 1), (3, 2), (2, 2)):
        given = (normal(seed + places, side, side), places, (side - 1) * stride + places, stride)
        case = f"for a {places}×{places} kernel with stride {stride}"
        expect("systems-rows", gradient_rows, given, _rows(*given), "the matrix", case)
    right("One equation for each weight, and its coefficients are the output gradient.")


def _filter(signal: Tensor, w: Tensor) -> Tensor:
    """Each entry with the two before it, times the taps."""
    padded = torch.cat([signal.new_zeros(2), signal])
    return w[0] * padded[2:] + w[1] * padded[1:-1] + w[2] * padded[:-2]


def _solve(z: Tensor, w: Tensor, *signs: float) -> Tensor:
    """Substitution with each tap multiplied by a number."""
    w0, w1, w2 = w * torch.tensor(signs, dtype=w.dtype)
    found = [0.0 * w0, 0.0 * w0]
    for output in z:
        found.append((output - w1 * found[-1] - w2 * found[-2]) / w0)
    return torch.stack(found[2:])


class Substitute(Mistakes, of="systems-substitute"):
    def taps_reversed(z, w):
        """Your taps are in the opposite order: w[0] meets the newest pixel."""
        return _solve(z, w.flip(0), 1, 1, 1)

    def added_for_subtracted(z, w):
        """What is already known must be taken away from the output, and you added it."""
        return _solve(z, w, 1, -1, -1)

    def division_forgotten(z, w):
        """The new pixel is still multiplied by a weight: which one, and how do you undo that?"""
        return _solve(z, w, 1 / w[0], 1, 1)

    def one_earlier_pixel(z, w):
        """You took one earlier pixel away; the kernel reaches two pixels back."""
        return _solve(z, w, 1, 1, 0)

    def outputs_for_pixels(z, w):
        """You took earlier outputs away where earlier pixels stand in the equation."""
        return (z - _filter(z, w * w.new_tensor([0, 1, 1]))) / w[0]

    def outputs_as_they_are(z, w):
        """Like outputs_for_pixels."""
        return z


def check_substitute(substitute: Student, seed: int = 2, pixels: int = 6) -> None:
    """Check: a row of pixels out of a convolution, by substitution."""
    w, x = torch.tensor([2.0, 0.7, -0.4], dtype=torch.float64), normal(seed, pixels).abs()
    expect("systems-substitute", substitute, (_filter(x, w), w), x, "the row of pixels")
    # with these taps rounding doubles from pixel to pixel
    w, x = torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64), normal(7, 200).abs()
    lost = bool((ask(substitute, _filter(x, w), w) - x).abs().max() > 100 * x.max())
    right(
        "Every output brings one new pixel; all the others are known by then. On two hundred "
        f"pixels and the kernel (1, 2.5, 1) the same lines lose every digit: {lost}."
    )


class Misleading(Mistakes, of="systems-count"):
    def too_few_filters():
        """{equations} equations for {unknowns} unknowns: here the count already says that it is
        lost. Find a layer where the count says the opposite."""
        return nn.Conv2d(1, 1, 2, stride=2), (1, 4, 4)

    def too_many_filters():
        """{equations} equations for {unknowns} unknowns, and the rank is full: with other weights
        the picture is determined. Which patches would share no pixel, so that they cannot help
        each other?"""
        return nn.Conv2d(1, 4, 2, stride=2), (1, 4, 4)

    def overlapping_patches():
        """Like too_many_filters."""
        return nn.Conv2d(1, 3, 2), (1, 4, 4)

    def weights_set_to_zero():
        """Like too_many_filters."""
        conv = nn.Conv2d(1, 4, 2, stride=2)
        conv.weight.data.zero_()
        return conv, (1, 4, 4)

    def shape_with_samples():
        """The input's shape is (channels, height, width), without the number of samples."""
        return nn.Conv2d(1, 3, 2, stride=2), (1, 1, 4, 4)


def check_misleading(misleading: Student, seed: int = 3) -> None:
    """Check: a layer with equations to spare that does not determine its input."""
    conv, shape = pair(ask(misleading), "misleading()")
    both = isinstance(conv, nn.Conv2d) and isinstance(shape, tuple | torch.Size)
    demand(both, "Return an nn.Conv2d and the shape of its input, (channels, height, width).")
    demand(len(shape) == 3, Misleading.shape_with_samples)
    small = shape[1] * shape[2] <= 400 and torch.Size(shape).numel() <= 1200
    demand(small, "Keep the input below 400 pixels, so that its matrix can be looked at.")
    matrix = _redrawn(conv, tuple(shape), seed).to_dense(scaled=True)
    (equations, unknowns), rank = matrix.shape, int(torch.linalg.matrix_rank(matrix))
    counts = {"equations": equations, "unknowns": unknowns}
    demand(equations >= unknowns, Misleading.too_few_filters, **counts)
    demand(rank < unknowns, Misleading.too_many_filters, **counts)
    right(f"{equations} equations for {unknowns} unknowns, and rank {rank}. The rank decides.")


def _redrawn(conv: nn.Conv2d, shape: tuple[int, ...], seed: int) -> gi.systems.LayerSystem:
    """The layer's system with weights of ours: the layer's plan must do it, not its numbers."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    drawn = nn.Conv2d(conv.in_channels, conv.out_channels, *sizes, bias=False).double()
    with torch.no_grad():
        drawn.weight.copy_(normal(seed, *drawn.weight.shape))
        outputs = drawn(torch.zeros(1, *shape, dtype=torch.float64)).shape
    return gi.systems.LayerSystem(drawn, normal(seed + 1, *outputs), shape)


def _back(values: Tensor, weight: Tensor, stride: int) -> Tensor:
    return conv_transpose2d(values[None], weight, stride=stride)[0]


class Adjoint(Mistakes, of="systems-adjoint"):
    def weight_equations_alone(W, k, r, g, size, stride):
        """That is Wᵀ r alone: the gradient equations speak of the pixels too."""
        return _back(r, W, stride)

    def gradient_equations_alone(W, k, r, g, size, stride):
        """That is Kᵀ g alone: the weight equations speak of the pixels too."""
        return _back(k, g, stride)

    def partners_exchanged(W, k, r, g, size, stride):
        """Partners are exchanged: the weight goes with the outputs' values r, and k with the
        gradient equations' values g."""
        return _back(k, W, stride) + _back(r, g, stride)

    def difference_for_sum(W, k, r, g, size, stride):
        """Both parts are added: a pixel hears what all equations say of it."""
        return _back(r, W, stride) - _back(k, g, stride)

    def difference_the_other_way(W, k, r, g, size, stride):
        """Like difference_for_sum."""
        return _back(k, g, stride) - _back(r, W, stride)

    def stride_left_out(W, k, r, g, size, stride):
        """Your answer has the shape that it would have without the stride. Where does output
        (1, 1) put its share?"""
        return _back(r, W, 1) + _back(k, g, 1)

    def kernel_turned(W, k, r, g, size, stride):
        """Your kernel is turned. What the forward pass reads at pixel p + u the adjoint writes
        back at pixel p + u: nothing turns round by itself."""
        return _back(r, W.flip(2, 3), stride) + _back(k, g, stride)

    def both_kernels_turned(W, k, r, g, size, stride):
        """Like kernel_turned."""
        return _back(r, W.flip(2, 3), stride) + _back(k, g.flip(2, 3), stride)


def check_adjoint(adjoint: Student, seed: int = 4, size: int = 9, channels: int = 2) -> None:
    """Check: the adjoint of both sets of equations, without a matrix."""
    for places, stride in ((3, 1), (3, 2)):
        side = (size - places) // stride + 1
        W, g = (normal(seed + i, 4, channels, places, places) for i in (0, 1))
        k, r = (normal(seed + i, 4, side, side) for i in (2, 3))
        given, true = (W, k, r, g, size, stride), _back(r, W, stride) + _back(k, g, stride)
        expect("systems-adjoint", adjoint, given, true, "the adjoint", f"with stride {stride}")
    right("The transpose of a matrix that nobody ever wrote down.")


def check_law(adjoint: Student, seed: int = 5, size: int = 224) -> None:
    """Check on a photograph's 150 528 unknowns: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
    side, places, stride = (size - 4) // 2 + 1, 4, 2
    x = normal(seed, 3, size, size)
    W, g = (normal(seed + i, 4, 3, places, places) for i in (1, 2))
    k, r = (normal(seed + i, 4, side, side) for i in (3, 4))
    Wx = conv2d(x[None], W, stride=stride)[0]
    Kx = torch.einsum("fij,cijuv->fcuv", k, x.unfold(1, places, stride).unfold(2, places, stride))
    back = tensor(ask(adjoint, W, k, r, g, size, stride), "the adjoint")
    there = float((Wx * r).sum() + (Kx * g).sum())
    gap = abs(there - float((x * back).sum())) / float(Wx.norm() * r.norm())
    demand(
        gap < 1e-10,
        f"The law fails on a picture of {x.numel()} unknowns: ⟨A x, y⟩ and ⟨x, Aᵀ y⟩ differ by "
        f"{gap:.1e}.",
    )
    right(f"And the law holds for {x.numel()} unknowns.")


def _system(seed: int, rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and an input for it."""
    matrix = normal(seed, rows, columns)
    if rows >= columns:
        turn = torch.linalg.qr(normal(seed + 1, columns, columns))[0]
        matrix = torch.linalg.qr(matrix)[0] * values @ turn
    return matrix, normal(seed + 2, columns).abs() / 4


def _explained(A: Tensor, b: Tensor, x: Tensor) -> bool:
    return bool((A @ x - b).norm() < 1e-6 * b.norm())


class Trust(Mistakes, of="systems-trust"):
    def residual_alone(A, b, x):
        """An answer that explains every equation to the last digit, and is wrong: {equations}
        equations of rank {rank} for {unknowns} unknowns. What does a small residual not see?"""
        return _explained(A, b, x)

    def count_for_rank(A, b, x):
        """Like residual_alone."""
        return len(A) >= len(x) and _explained(A, b, x)

    def rank_alone(A, b, x):
        """The equations contradict each other: the answer leaves {residual:.0%} of their
        right-hand side unexplained, and you trust it."""
        return int(torch.linalg.matrix_rank(A)) == len(x)

    def conditioning_forgotten(A, b, x):
        """Full rank on paper, but the smallest singular value is {smallest:.0e}: a rounding error
        of {residual:.0e} in the equations becomes an error of {error:.0%} in the answer."""
        return int(torch.linalg.matrix_rank(A)) == len(x) and _explained(A, b, x)

    def float64_equality(A, b, x):
        """Full rank, well conditioned, and a residual of {residual:.0e}: here you may trust it."""
        full = int(torch.linalg.matrix_rank(A)) == len(x)
        return full and bool((A @ x - b).abs().max() < 1e-12)


def check_trust(trust: Student, seed: int = 6) -> None:
    """Check: when an answer of least squares may be believed to one per cent."""
    ones = torch.ones(12, dtype=torch.float64)
    holed, weak = ones.clone(), ones.clone()
    holed[-2:], weak[-1] = 0.0, 1e-9
    cases = [
        (30, ones, 0.0, True, Trust.float64_equality),
        (30, holed, 0.0, False, Trust.residual_alone),
        (30, ones, 0.5, False, Trust.rank_alone),
        (8, ones, 0.0, False, Trust.residual_alone),
        (30, 0.001 * ones, 1e-7, True, Trust.float64_equality),
        (30, weak, 1e-7, False, Trust.conditioning_forgotten),
    ]
    for number, (rows, values, noise, truth, hint) in enumerate(cases):
        A, x = _system(seed + 10 * number, rows, 12, values)
        b = A @ x
        b = b + noise * b.norm() * nn.functional.normalize(normal(seed, rows), dim=0)
        answer = torch.linalg.pinv(A, rcond=1e-14) @ b
        facts: dict[str, Any] = {
            "equations": rows,
            "unknowns": 12,
            "rank": int(torch.linalg.matrix_rank(A)),
            "residual": float((A @ answer - b).norm() / b.norm()),
            "smallest": float(torch.linalg.svdvals(A)[-1]),
            "error": float((answer - x).norm() / x.norm()),
        }
        demand(bool(ask(trust, A, b, answer)) == truth, hint, **facts)
    right("Rank, residual and conditioning: an answer needs all three to be believed.")

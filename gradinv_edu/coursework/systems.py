"""Checks of the exercises to chapter 5, convolution as a linear system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from ..systems import LayerSystem
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRANSPOSED = (
    "Your matrix is transposed: one row for each equation, that is for each weight of the kernel, "
    "and one column for each pixel."
)
UNIT_STRIDE = (
    "You forgot the stride: a weight meets every pixel only where the kernel moves by one pixel at "
    "a time."
)
FLIPPED = (
    "Your equations are in the opposite order: place u of the kernel, counted from its upper left "
    "corner, meets pixel p + u."
)
MEAN = "Your rows are divided by the number of positions; the gradient is a sum over them."
WEIGHTS = (
    "Your coefficients are all alike. In a gradient constraint the pixels are multiplied by k, "
    "each by the k of the position where the weight met it."
)


def _gradient_rows(k: Tensor, places: int, size: int, stride: int) -> Tensor:
    rows = k.new_zeros(places, places, size, size)
    side = len(k)
    reach = stride * (side - 1) + 1
    for u in range(places):
        for v in range(places):
            rows[u, v, u : u + reach : stride, v : v + reach : stride] = k
    return rows.reshape(places**2, size**2)


def check_gradient_rows(gradient_rows: Student, seed: int = 1, side: int = 3) -> None:
    """Check 5.1: the matrix of the gradient constraints, from k alone."""
    for places, stride in ((2, 1), (3, 2), (2, 2)):
        size = (side - 1) * stride + places
        k = _random(seed + places, side, side)
        true = _gradient_rows(k, places, size, stride)
        case = f"for a {places}×{places} kernel with stride {stride}"
        answer = ask(gradient_rows, k.clone(), places, size, stride, case=case)
        known: list[Wrong] = [
            (TRANSPOSED, true.T),
            (UNIT_STRIDE, _gradient_rows(k, places, size, 1)),
            (FLIPPED, true.flip(0)),
            (MEAN, true / k.numel()),
            (WEIGHTS, (true != 0).double()),
        ]
        compare(answer, true, f"the matrix {case}", known)
    right("One equation for each weight, and its coefficients are the output gradient.")


REVERSED = "Your taps are in the opposite order: w[0] meets the newest pixel."
ADDED = "What is already known must be taken away from the output, and you added it."
UNDIVIDED = "The new pixel is still multiplied by a weight: which one, and how do you undo that?"
SHORT = "You took one earlier pixel away; the kernel reaches two pixels back."
OUTPUTS = "You took earlier outputs away where earlier pixels stand in the equation."


def _substitute(z: Tensor, w: Tensor) -> Tensor:
    diagonals = [torch.diag(w[lag].expand(len(z) - lag), -lag) for lag in range(len(w))]
    return torch.as_tensor(torch.linalg.solve(torch.stack(diagonals).sum(0), z))


def _filter(signal: Tensor, w: Tensor) -> Tensor:
    """Each entry with the two before it, times the taps."""
    padded = torch.cat([signal.new_zeros(2), signal])
    return w[0] * padded[2:] + w[1] * padded[1:-1] + w[2] * padded[:-2]


def check_substitute(substitute: Student, seed: int = 2, pixels: int = 6) -> None:
    """Check 5.2: a row of pixels out of a convolution, by substitution."""
    w = torch.tensor([2.0, 0.7, -0.4], dtype=torch.float64)
    x = _random(seed, pixels).abs()
    z = _filter(x, w)
    gone = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    known: list[Wrong] = [
        (REVERSED, _substitute(z, w.flip(0))),
        (ADDED, _substitute(z, torch.stack([w[0], -w[1], -w[2]]))),
        (UNDIVIDED, _substitute(z, torch.stack([w[0] / w[0], w[1], w[2]]))),
        (SHORT, _substitute(z, torch.stack([w[0], w[1], 0 * w[2]]))),
        (OUTPUTS, (z - _filter(z, w * gone)) / w[0]),
        (OUTPUTS, _filter(z, one)),
    ]
    compare(ask(substitute, z.clone(), w.clone()), x, "the row of pixels", known)
    lost = _lost(substitute)
    right(
        "Every output brings one new pixel; all the others are known by then. On two hundred "
        f"pixels and the kernel (1, 2.5, 1) the same lines lose every digit: {lost}."
    )


def _lost(substitute: Student) -> bool:
    """Whether rounding has grown beyond the pixels themselves, as it doubles with each."""
    w = torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64)
    x = _random(7, 200).abs()
    return bool((ask(substitute, _filter(x, w), w) - x).abs().max() > 100 * x.max())


NO_CONV = "Return an nn.Conv2d and the shape of its input, (channels, height, width)."
TOO_LARGE = "Keep the input below 400 pixels, so that its matrix can be looked at."
TOO_FEW = (
    "{equations} equations for {unknowns} unknowns: here the count already says that it is lost. "
    "Find a layer where the count says the opposite."
)
DETERMINED = (
    "{equations} equations for {unknowns} unknowns, and the rank is full: with other weights the "
    "picture is determined. Which patches would share no pixel, so that they cannot help each "
    "other?"
)
SAMPLE = "The input's shape is (channels, height, width), without the number of samples."


def check_misleading(misleading: Student, seed: int = 3) -> None:
    """Check 5.3: a layer with equations to spare that does not determine its input."""
    conv, shape = pair(ask(misleading), "misleading()")
    demand(isinstance(conv, nn.Conv2d) and isinstance(shape, tuple | torch.Size), NO_CONV)
    demand(len(shape) == 3, SAMPLE)
    demand(shape[1] * shape[2] <= 400 and torch.Size(shape).numel() <= 1200, TOO_LARGE)
    system = _redrawn(conv, tuple(shape), seed)
    matrix = system.to_dense(scaled=True)
    equations, unknowns = matrix.shape
    counts = {"equations": equations, "unknowns": unknowns}
    demand(equations >= unknowns, TOO_FEW.format(**counts))
    rank = int(torch.linalg.matrix_rank(matrix))
    demand(rank < unknowns, DETERMINED.format(**counts))
    right(f"{equations} equations for {unknowns} unknowns, and rank {rank}. The rank decides.")


def _redrawn(conv: nn.Conv2d, shape: tuple[int, ...], seed: int) -> LayerSystem:
    """The layer's system with weights of ours: the layer's plan must do it, not its numbers."""
    drawn = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        bias=False,
    ).double()
    with torch.no_grad():
        drawn.weight.copy_(_random(seed, *drawn.weight.shape))
        outputs = drawn(torch.zeros(1, *shape, dtype=torch.float64)).shape
    return LayerSystem(drawn, _random(seed + 1, *outputs), shape)


HALF_W = "That is Wᵀ r alone: the gradient equations speak of the pixels too."
HALF_K = "That is Kᵀ g alone: the weight equations speak of the pixels too."
EXCHANGED = (
    "Partners are exchanged: the weight goes with the outputs' values r, and k with the gradient "
    "equations' values g."
)
MINUS = "Both parts are added: a pixel hears what all equations say of it."
NO_STRIDE = (
    "Your answer has the shape that it would have without the stride. Where does output (1, 1) "
    "put its share?"
)
TURNED = (
    "Your kernel is turned. What the forward pass reads at pixel p + u the adjoint writes back at "
    "pixel p + u: nothing turns round by itself."
)
LAW = (
    "The law fails on a picture of {unknowns} unknowns: ⟨A x, y⟩ and ⟨x, Aᵀ y⟩ differ by {gap:.1e}."
)


def _adjoint(W: Tensor, k: Tensor, r: Tensor, g: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return (
        conv_transpose2d(r[None], W, stride=stride)[0],
        conv_transpose2d(k[None], g, stride=stride)[0],
    )


def check_adjoint(adjoint: Student, seed: int = 4, size: int = 9, channels: int = 2) -> None:
    """Check 5.4: the adjoint of both sets of equations, without a matrix."""
    for places, stride in ((3, 1), (3, 2)):
        side = (size - places) // stride + 1
        W, g = (_random(seed + i, 4, channels, places, places) for i in (0, 1))
        k, r = (_random(seed + i, 4, side, side) for i in (2, 3))
        first, second = _adjoint(W, k, r, g, stride)
        true = first + second
        case = f"with stride {stride}"
        answer = ask(adjoint, W.clone(), k.clone(), r.clone(), g.clone(), size, stride, case=case)
        known: list[Wrong] = [
            (HALF_W, first),
            (HALF_K, second),
            (EXCHANGED, sum(_adjoint(W, r, k, g, stride), torch.zeros_like(true))),
            (MINUS, first - second),
            (MINUS, second - first),
            (NO_STRIDE, torch.stack(_adjoint(W, k, r, g, 1)).sum(0)),
            (TURNED, _adjoint(W.flip(2, 3), k, r, g, stride)[0] + second),
            (
                TURNED,
                torch.stack(_adjoint(W.flip(2, 3), k, r, g.flip(2, 3), stride)).sum(0),
            ),
        ]
        compare(answer, true, f"the adjoint {case}", known)
    right("The transpose of a matrix that nobody ever wrote down.")


def check_law(adjoint: Student, seed: int = 5, size: int = 224) -> None:
    """Check 5.4 on a photograph's 150 528 unknowns: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
    side, places, stride = (size - 4) // 2 + 1, 4, 2
    x, W, g = (
        _random(seed + i, *shape)
        for i, shape in enumerate([(3, size, size), (4, 3, places, places), (4, 3, places, places)])
    )
    k, r = (_random(seed + i, 4, side, side) for i in (3, 4))
    Wx = conv2d(x[None], W, stride=stride)[0]
    Kx = torch.einsum("fij,cijuv->fcuv", k, x.unfold(1, places, stride).unfold(2, places, stride))
    back = tensor(ask(adjoint, W, k, r, g, size, stride), "the adjoint")
    there = float((Wx * r).sum() + (Kx * g).sum())
    gap = abs(there - float((x * back).sum())) / float(Wx.norm() * r.norm())
    demand(gap < 1e-10, LAW.format(unknowns=x.numel(), gap=gap))
    right(f"And the law holds for {x.numel()} unknowns.")


def _system(seed: int, rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and an input for it."""
    left = torch.linalg.qr(_random(seed, rows, columns))[0] if rows >= columns else None
    if left is None:
        matrix = _random(seed, rows, columns)
    else:
        matrix = left * values @ torch.linalg.qr(_random(seed + 1, columns, columns))[0]
    return matrix, _random(seed + 2, columns).abs() / 4


OPEN = (
    "An answer that explains every equation to the last digit, and is wrong: {equations} equations "
    "of rank {rank} for {unknowns} unknowns. What does a small residual not see?"
)
CONTRADICTED = (
    "The equations contradict each other: the answer leaves {residual:.0%} of their right-hand "
    "side unexplained, and you trust it."
)
SHAKY = (
    "Full rank on paper, but the smallest singular value is {smallest:.0e}: a rounding error of "
    "{residual:.0e} in the equations becomes an error of {error:.0%} in the answer."
)
SOUND = "Full rank, well conditioned, and a residual of {residual:.0e}: here you may trust it."


def check_trust(trust: Student, seed: int = 6) -> None:
    """Check 5.5: when an answer of least squares may be believed to one per cent."""
    ones = torch.ones(12, dtype=torch.float64)
    holed, weak = ones.clone(), ones.clone()
    holed[-2:], weak[-1] = 0.0, 1e-9
    cases: list[tuple[int, Tensor, float, bool, str]] = [
        (30, ones, 0.0, True, SOUND),
        (30, holed, 0.0, False, OPEN),
        (30, ones, 0.5, False, CONTRADICTED),
        (8, ones, 0.0, False, OPEN),
        (30, 0.001 * ones, 1e-7, True, SOUND),
        (30, weak, 1e-7, False, SHAKY),
    ]
    for number, (rows, values, noise, truth, hint) in enumerate(cases):
        A, x = _system(seed + 10 * number, rows, 12, values)
        b = A @ x
        b = b + noise * b.norm() * torch.nn.functional.normalize(_random(seed, rows), dim=0)
        answer = torch.linalg.pinv(A, rcond=1e-14) @ b
        residual = float((A @ answer - b).norm() / b.norm())
        facts: dict[str, Any] = {
            "equations": rows,
            "unknowns": 12,
            "rank": int(torch.linalg.matrix_rank(A)),
            "residual": residual,
            "smallest": float(torch.linalg.svdvals(A)[-1]),
            "error": float((answer - x).norm() / x.norm()),
        }
        demand(bool(ask(trust, A, b, answer)) == truth, hint.format(**facts))
    right("Rank, residual and conditioning: an answer needs all three to be believed.")

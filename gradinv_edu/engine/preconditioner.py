r"""A preconditioner for convolutions that knows the border: Fourier inside, exact along each edge.

Inside a picture ``WᵀW`` shifts with the picture, so that Fourier space inverts it: one small
matrix a frequency. That takes the picture as periodic, which zero padding is not. On the torus
one line of outputs is *missing* and a line of pixels is *zero*; Woodbury's formula puts both
right, along each edge by one more small matrix a frequency. Where two edges meet, that double
correction is wrong, and a dense solve on each corner makes it good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import EllipsisType

import torch
from torch import Tensor

from .layers.convolution import ConvolutionOperator, Geometry

__all__ = ["Bordered"]

SHIFT = 0.01  # of the mean eigenvalue, added: with less, the corners make the inverse indefinite
SHIFTED = 0.001  # the same where corners are as wide as can be
CORNER = 1300  # unknowns of a corner that are solved at once
ROUNDED = 1e-5  # of a corner's mean eigenvalue, added for float32's rounding
WIDEST = 12  # pixels of its side
BYTES = 2e9  # of the inverses over all frequencies
SMALLEST = 56  # side of a map below which plain iterations are few and cheap
ENDS = tuple(product((False, True), repeat=2))  # corners, in the order that they are kept in
RATIOS = (1.04, 1.7)  # equations an unknown between which the preconditioner pays


@dataclass(frozen=True)
class _Edge:
    """One border across an axis, its cells told in Fourier space along it."""

    axis: int
    seen: Tensor  # (cells, frequencies across): from Fourier space to the cells
    back: Tensor  # (cells, frequencies across): from the cells to Fourier space
    inverse: Tensor  # (frequencies along, cells · n, cells · n): what the cells add to each other

    def added(self, z: Tensor) -> Tensor:
        """``B (J − Bᵀ D B)⁻¹ Bᵀ z``, both in Fourier space, ``(rows, half, N, n)``."""
        a = torch.tensordot(self.seen, z, ([1], [self.axis]))
        along, half = a.shape[1], len(self.inverse)
        if self.axis == 1:  # half of the frequencies across is stored, all of those along
            a = ((a + a[:, -torch.arange(along) % along].conj()) / 2)[:, :half]
        told = _times(self.inverse, a.permute(1, 2, 0, 3).flatten(2))
        told = told.reshape(*told.shape[:2], len(self.seen), -1)
        if self.axis == 1:
            told = torch.cat([told, told[1 : along - half + 1].flip(0).conj()])
        added: Tensor = torch.tensordot(self.back, told, ([0], [2])).transpose(0, self.axis)
        return added


class Bordered:
    r""":math:`M^{-1} = S + (1 - S N)\, C\, (1 - N S)`, near ``N⁻¹`` for ``N = WᵀW``.

    ``C = D + D B (J − Bᵀ D B)⁻¹ Bᵀ D`` is right inside and along every edge: ``D`` is the
    inverse on the torus, with a hundredth of the mean eigenvalue added, ``B`` the missing outputs
    (``J = 1``) and the zero pixels (``J = 0``) of an edge; ``S`` the exact inverse on the four
    corners. Symmetric, and positive definite where the corners are large enough; an iteration that
    meets a negative curvature turns to plain steps.

    Parameters
    ----------
    weight : Tensor
        ``(filters, channels, k, k)``, as it is solved.
    geometry : Geometry
        Of a convolution on pictures, without groups.
    shape : torch.Size
        Of a picture, ``(channels, height, width)``.

    Notes
    -----
    Source: Strang (1986) for the circulant part; the border is this project's.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> None:
        W = weight.double()
        self.geometry, self.weight = geometry, weight.float()
        self.channels, self.size = shape[0], shape[1:]
        self.stride, self.padding = geometry.stride, geometry.padding
        spans = _spans(W, geometry)
        self.outputs, self.cells = _torus(geometry, self.size, spans)
        self.taps = _polyphase(W, geometry, spans)
        self.phases = self.channels * math.prod(self.stride)
        self.side, self.crop, self.corners = self._corners(W, spans)
        self.inverse = self._inverse()
        self.edges = [self._edge(axis) for axis in (0, 1)]

    @classmethod
    def of(cls, operator: object) -> Bordered | None:
        """None for another layer, and where it would not pay or not fit."""
        if not isinstance(operator, ConvolutionOperator):
            return None
        W, move, shape = operator.weight, operator.geometry, operator.template.shape[1:]
        if W.dim() != 4 or move.groups != 1 or min(shape[1:]) < SMALLEST:
            return None
        phases = shape[0] * math.prod(move.stride)
        ratio = len(W) * math.prod(operator.k.shape[2:]) / math.prod(shape)
        narrow = any(s > k for s, k in zip(move.stride, _spans(W, move), strict=True))
        size = 4.0 * math.prod(shape) * phases  # complex64, half of the frequencies
        if narrow or not RATIOS[0] <= ratio <= RATIOS[1] or len(W) <= phases or size > BYTES:
            return None
        return cls(W, move, tuple(shape))

    def __call__(self, r: Tensor) -> Tensor:
        """``M⁻¹ r``, shaped and in the precision of ``r``."""
        x = r.float()
        first = self._solve(x)
        moved = self._at_corners(self._normal(self._placed(first, self.crop)), x, -1)
        inner = self._inner(moved)
        back = self._normal(self._cut(inner, self.crop))
        second = first - self._solve_cut(back)
        return self._at_corners(second, inner, 1).to(r.dtype)

    # --- the torus ----------------------------------------------------------------------------

    def _inverse(self) -> Tensor:
        """``D = (WᵀW + shift)⁻¹`` at each frequency, ``(rows, half of the rest, n, n)``."""
        (a, b), (rows, columns), n = self.taps.shape[:2], self.cells, self.phases
        pairs = torch.einsum("klfn,pqfm->klpqnm", self.taps, self.taps)
        shifts: dict[tuple[int, int], Tensor] = {}
        for i, j, k, m in product(range(a), range(b), range(a), range(b)):
            at = (k - i, m - j)
            shifts[at] = shifts.get(at, 0) + pairs[i, j, k, m]
        own = shifts[0, 0].diagonal()
        own += (SHIFT if self.side < WIDEST else SHIFTED) * own.mean()
        parts = torch.stack([*shifts.values()]).flatten(1).to(torch.complex64)
        across = torch.stack([_wave(columns, e, columns // 2 + 1) for _, e in shifts], 1)
        made = parts.new_empty(rows, len(across), n, n)
        for row, out in enumerate(made):
            turned = torch.stack([_wave(rows, d, row + 1)[-1] for d, _ in shifts])
            gram = (turned * across).to(parts) @ parts
            factor = torch.linalg.cholesky(gram.reshape(-1, n, n))
            torch.cholesky_inverse(factor, out=out)
        return made

    def _inner(self, x: Tensor) -> Tensor:
        """``C x``: on the torus, and once more what the edges add."""
        z = _times(self.inverse, torch.fft.rfft2(self._to_torus(x)).permute(2, 3, 0, 1))
        z = z + _times(self.inverse, self.edges[0].added(z) + self.edges[1].added(z))
        return self._to_picture(torch.fft.irfft2(z.permute(2, 3, 0, 1), s=self.cells))

    def _to_torus(self, x: Tensor) -> Tensor:
        """Pixels at their cells, one channel for each phase of the stride."""
        (T, U), (s, t), (p, q) = self.cells, self.stride, self.padding
        y = x.new_zeros(len(x), self.channels, T * s, U * t)
        y[:, :, p : p + self.size[0], q : q + self.size[1]] = x
        y = y.reshape(len(x), self.channels, T, s, U, t).permute(0, 1, 3, 5, 2, 4)
        return y.reshape(len(x), self.phases, T, U)

    def _to_picture(self, y: Tensor) -> Tensor:
        (T, U), (s, t), (p, q) = self.cells, self.stride, self.padding
        y = y.reshape(len(y), self.channels, s, t, T, U).permute(0, 1, 4, 2, 5, 3)
        y = y.reshape(len(y), self.channels, T * s, U * t)
        return y[:, :, p : p + self.size[0], q : q + self.size[1]]

    # --- an edge ------------------------------------------------------------------------------

    def _edge(self, axis: int) -> _Edge:
        """``B (J − Bᵀ D B)⁻¹ Bᵀ`` for one axis, at each frequency along the edge."""
        n, T = self.phases, self.cells[axis]
        along = self.cells[1 - axis] // 2 + 1
        s, p, end = self.stride[axis], self.padding[axis], self.padding[axis] + self.size[axis]
        reach = self.taps.shape[axis] - 1
        first, after = min(self.outputs[axis], end // s), max(-(-p // s), reach)
        numbers = list(range(first, T + after))
        span = len(numbers)
        columns = list(self._missing(axis, first, span))
        outputs = sum(c.shape[2] for c in columns)
        place = torch.arange(n, device=self.weight.device).reshape(self.channels, *self.stride)
        for i, cell in enumerate(numbers):
            for phase in range(s):
                if not p <= (cell % T) * s + phase < end:  # a pixel of the padding
                    own = place.select(1 + axis, phase).flatten()
                    unit = self.taps.new_zeros(along, span, n, len(own), dtype=torch.complex64)
                    unit[:, i, own, range(len(own))] = 1
                    columns.append(unit.flatten(1, 2))
        B = torch.cat(columns, dim=2)
        J = B.new_zeros(B.shape[2])
        J[:outputs] = 1
        Q = torch.diag(J) - B.mH @ self._covariance(axis, span) @ B
        made = B @ torch.linalg.solve((Q + Q.mH) / 2, B.mH)
        count = self.inverse.shape[axis]
        back = torch.stack([_wave(T, -c, count) for c in numbers]).to(made)
        seen = back.conj() / T
        if axis == 1:  # each stored frequency stands for two
            seen[:, 1 : (T + 1) // 2] *= 2
        return _Edge(axis, seen, back, made)

    def _missing(self, axis: int, first: int, span: int) -> Iterator[Tensor]:
        """Outputs that the torus has and the layer has not: what they see, adjoint."""
        taps = self.taps.movedim(axis, 0)
        length = self.cells[1 - axis]
        waves = torch.stack([_wave(length, u, length // 2 + 1) for u in range(taps.shape[1])], 1)
        waves, taps = waves.conj().to(taps.device, torch.complex64), taps.to(torch.complex64)
        seen = torch.einsum("hl,klfn->hknf", waves, taps)
        for output in range(self.outputs[axis], self.cells[axis]):
            block = seen.new_zeros(len(seen), span, *seen.shape[2:])
            block[:, output - first : output - first + taps.shape[0]] = seen
            yield block.flatten(1, 2)

    def _covariance(self, axis: int, span: int) -> Tensor:
        """``D`` between cells near an edge, at each frequency along it."""
        T, half = self.cells[axis], self.inverse.shape[axis]
        waves = torch.stack([_wave(T, d, half) for d in range(1 - span, span)]) / T
        waves = waves.to(self.inverse)
        by = self._across(axis, waves)
        if axis == 1:  # only half of these frequencies is stored
            inner = waves.new_ones(half)
            inner[0] = 0
            inner[-1] = float(T % 2)
            other = self._across(axis, waves * inner)
            negative = -torch.arange(self.cells[0]) % self.cells[0]
            by = (by + other[:, negative].conj())[:, : self.cells[0] // 2 + 1]
        rows = [torch.cat([by[i - j + span - 1] for j in range(span)], 2) for i in range(span)]
        return torch.cat(rows, dim=1)

    def _across(self, axis: int, waves: Tensor) -> Tensor:
        """Fourier sums of ``D`` across an edge, without a copy of it."""
        D = self.inverse.flatten(2)
        found = waves @ D.flatten(1) if axis == 0 else torch.stack([waves @ row for row in D], 1)
        return found.reshape(len(waves), -1, *self.inverse.shape[2:])

    # --- the corners --------------------------------------------------------------------------

    def _corners(self, W: Tensor, spans: list[int]) -> tuple[int, tuple[int, int], Tensor]:
        """Side of a corner, side of what it reaches, and ``N⁻¹`` on the four of them."""
        side = min(WIDEST, math.isqrt(CORNER // self.channels), min(self.size) // 3)
        side = max(side, 2)
        crop = []
        for size, k, s in zip(self.size, spans, self.stride, strict=True):
            reach = side + k + s
            crop.append(min(size, reach + (size - reach) % s))
        taps = self.weight.permute(2, 3, 0, 1).flatten(0, 1)
        C, places = self.channels, len(taps)
        flat = taps.transpose(0, 1).reshape(len(self.weight), -1)
        pairs = (flat.T @ flat).reshape(places, C, places, C).transpose(1, 2).contiguous()
        grams = []
        for end in ENDS:
            seen = [self._seen(axis, side, end[axis], W.shape[2 + axis]) for axis in (0, 1)]
            gram = pairs.new_zeros(side**2, side**2, C, C)
            for rows, u in seen[0]:
                for columns, v in seen[1]:
                    tap = (u[:, None] * W.shape[3] + v).flatten()
                    pixel = (rows[:, None] * side + columns).flatten()
                    gram[pixel[:, None], pixel] += pairs[tap[:, None], tap]
            N = gram.permute(2, 0, 3, 1).reshape(C * side**2, -1)
            N.diagonal().add_(ROUNDED * N.diagonal().mean())
            grams.append(N)
        made = torch.cholesky_inverse(torch.linalg.cholesky(torch.stack(grams)))
        return side, (crop[0], crop[1]), made

    def _seen(self, axis: int, side: int, last: bool, k: int) -> list[tuple[Tensor, Tensor]]:
        """For each output along an axis, the corner's pixels that it sees, and by which taps."""
        start = self.size[axis] - side if last else 0
        pixels, found = torch.arange(side, device=self.weight.device), []
        d = self.geometry.dilation[axis]
        for output in range(self.outputs[axis]):
            tap = start + pixels + self.padding[axis] - self.stride[axis] * output
            seen = (tap >= 0) & (tap < d * (k - 1) + 1) & (tap % d == 0)
            if bool(seen.any()):
                found.append((pixels[seen], tap[seen] // d))
        return found

    def _cut(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The four corners of a picture, ``(4 N, C, …)``."""
        return torch.cat([x[_corner(end, size)] for end in ENDS])

    def _placed(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Small corners in larger ones."""
        out = x.new_zeros(len(x), self.channels, *size)
        for end, part, whole in zip(ENDS, x.chunk(4), out.chunk(4), strict=True):
            whole[_corner(end, part.shape[2:])] = part
        return out

    def _at_corners(self, parts: Tensor, x: Tensor, sign: int) -> Tensor:
        """A picture with something added at its corners."""
        out = x.clone()
        for end, part in zip(ENDS, parts.chunk(4), strict=True):
            out[_corner(end, part.shape[2:])] += sign * part
        return out

    def _solve(self, x: Tensor) -> Tensor:
        """``N⁻¹`` on each corner of a picture."""
        return self._by_corner(self._cut(x, (self.side, self.side)))

    def _solve_cut(self, crops: Tensor) -> Tensor:
        """The same in pictures of which the larger corners are cut already."""
        side = self.side, self.side
        parts = zip(ENDS, crops.chunk(4), strict=True)
        return self._by_corner(torch.cat([whole[_corner(end, side)] for end, whole in parts]))

    def _by_corner(self, parts: Tensor) -> Tensor:
        found = [
            part.flatten(1) @ inverse  # one after the other: torch is slow at them together
            for part, inverse in zip(parts.chunk(4), self.corners, strict=True)
        ]
        return torch.cat(found).reshape(parts.shape)

    def _normal(self, x: Tensor) -> Tensor:
        """``WᵀW`` on crops: right where it matters, near their outer corners."""
        rows = self.geometry.rows(x, self.weight)
        return self.geometry.rows_adjoint(rows, self.weight, x)


def _times(matrices: Tensor, rows: Tensor) -> Tensor:
    """Matrices times row vectors, ``(…, N, n)``; torch is three times as fast at fresh strides."""
    return (matrices @ rows.clone(memory_format=torch.contiguous_format).mT).mT


def _corner(end: Sequence[bool], size: Sequence[int]) -> tuple[EllipsisType | slice, ...]:
    """Where a corner of that size lies: ``end`` says of each axis whether at its last entries."""
    return (
        ...,
        *(slice(-n, None) if last else slice(n) for last, n in zip(end, size, strict=True)),
    )


def _spans(W: Tensor, geometry: Geometry) -> list[int]:
    """Pixels from the first tap to the last, along each axis."""
    return [d * (k - 1) + 1 for d, k in zip(geometry.dilation, W.shape[2:], strict=True)]


def _wave(length: int, shift: int, count: int) -> Tensor:
    """``exp(2πi f · shift / length)`` for the first frequencies ``f``."""
    angle = 2 * math.pi * shift * torch.arange(count, dtype=torch.float64) / length
    return torch.polar(torch.ones_like(angle), angle)


def _torus(
    geometry: Geometry, size: tuple[int, ...], spans: list[int]
) -> tuple[list[int], list[int]]:
    """Outputs along each axis, and cells of the smallest torus on which none sees another edge."""
    outputs, cells = [], []
    for s, p, n, k in zip(geometry.stride, geometry.padding, size, spans, strict=True):
        out = (n + 2 * p - k) // s + 1
        outputs.append(out)
        cells.append(max(out, -(-(p + n) // s), -(-(s * (out - 1) + k - p) // s)))
    return outputs, cells


def _polyphase(W: Tensor, geometry: Geometry, spans: list[int]) -> Tensor:
    """The kernel by cells of the stride, ``(cells, cells, filters, channels · phases)``."""
    (s, t), (d, e) = geometry.stride, geometry.dilation
    a, b = (-(-k // step) for k, step in zip(spans, (s, t), strict=True))
    K = W.new_zeros(*W.shape[:2], a * s, b * t)
    K[:, :, : spans[0] : d, : spans[1] : e] = W
    cut = K.reshape(*W.shape[:2], a, s, b, t).permute(2, 4, 0, 1, 3, 5)
    return cut.reshape(a, b, len(W), -1)

"""Sparse directions of a column space: what tells one sample of a batch from another.

A ReLU layer's gradient is ``G = K X``: N columns of ``K``, one for each sample, each zero in the
rows where its sample's unit is off. Its column space is known from ``G``; its sparsest vectors
are the columns of ``K``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .errors import (
    InconsistentGradientError,
    InvalidArgumentError,
    NotRecoveredError,
    UnknownNameError,
)

Progress = Callable[[int, int, int], None]

ROUNDS = {"descent": 256, "sampling": 4096}
BUDGETS = {"descent": 2**14, "sampling": 2**20}
STEPS = 40
QUIET = 2


@dataclass(frozen=True)
class Split:
    """``matrix = left · diag(values) · right`` to within ``noise``.

    Attributes
    ----------
    left : Tensor
        ``(m, N)``, orthonormal columns: the column space.
    values : Tensor
        ``(N,)``, the singular values, falling.
    right : Tensor
        ``(N, n)``, orthonormal rows.
    noise : float
        The first singular value left out, or what rounding makes of it.
    eps : float
        Machine precision of the numbers that came in.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    noise: float
    eps: float

    @property
    def living(self) -> Tensor:
        """Rows that are not zero, ``(m,)``."""
        return (self.left != 0).any(dim=1)


@dataclass(frozen=True)
class Basis:
    """Sparse vectors ``left @ directions`` that span the column space.

    Attributes
    ----------
    directions : Tensor
        ``(N, N)``, one in each column.
    zero_shares : Tensor
        ``(N,)``, the share of zero rows of each.
    spent : int
        Starts or draws that were needed.
    """

    directions: Tensor
    zero_shares: Tensor
    spent: int


def split(matrix: Tensor, rank: int, eps: float | None = None) -> Split:
    r""":math:`G = K X = L R`: both factors are known up to an invertible :math:`N \times N` matrix.

    The gradient of N samples has rank N. Its singular vectors are one factorisation, the samples
    another, and ``K = L Q``, ``X = Q⁻¹ R``. Implements :eq:`low-rank-split`.

    Parameters
    ----------
    matrix : Tensor
        ``(m, n)``, floating point.
    rank : int
        N.
    eps : float, optional
        Machine precision of the numbers; by default, of the coarsest type that holds them.

    Returns
    -------
    Split

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If it is not a finite floating-point matrix, or zero everywhere.
    InvalidArgumentError
        If ``rank`` is not a whole number from 1 to min(m, n).
    InconsistentGradientError
        If the rank is another one; the message says which.
    """
    A = checks.not_all_zero(checks.shaped(matrix, "matrix", (None, None)), "matrix")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(A.shape):
        raise InvalidArgumentError(
            f"The batch size must be a whole number from 1 to {min(A.shape)}, which is as far as "
            f"a gradient of shape {tuple(A.shape)} can tell samples apart; got {rank!r}."
        )
    eps = rounding(A) if eps is None else eps
    U, S, Vh = torch.linalg.svd(A / A.abs().max(), full_matrices=False)
    _check_rank(S, rank, eps)
    below = float(S[rank]) if rank < len(S) else 0.0
    noise = max(below, eps * float(S[0]))
    left = torch.where((A != 0).any(dim=1, keepdim=True), U[:, :rank], 0.0)
    return Split(left, S[:rank], Vh[:rank], noise, eps)


def rounding(matrix: Tensor) -> float:
    """Machine precision of the coarsest type that holds every entry.

    Parameters
    ----------
    matrix : Tensor
        Floating point, any shape; a gradient keeps the mark of the client's type when it is
        converted to a finer one.

    Returns
    -------
    float
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(matrix, matrix.to(dtype).to(matrix.dtype)):
            return torch.finfo(dtype).eps
    return torch.finfo(matrix.dtype).eps


def _check_rank(S: Tensor, rank: int, eps: float) -> None:
    found = _rank(S, eps)
    clean = rank == len(S) or float(S[rank]) <= 20 * eps * float(S[0])
    if (found == rank and clean) or (rank < len(S) and float(S[rank - 1]) > 100 * float(S[rank])):
        return
    if found == rank:
        raise InconsistentGradientError(
            f"The gradient has rank {rank} only roughly: it carries noise, which hides the zeros."
        )
    why = (
        "two samples are equal, one tells nothing, or the batch is smaller"
        if found < rank
        else "the batch is larger, or the gradient carries noise that hides zeros"
    )
    raise InconsistentGradientError(
        f"The gradient has rank {found}, which is not the batch size {rank}: {why}."
    )


def _rank(S: Tensor, eps: float) -> int:
    """Where the singular values fall most steeply, of those above rounding."""
    above = int(S.gt(20 * eps * float(S[0])).sum())
    if above < len(S):
        return above
    falls = S[:-1] / S[1:]
    return int(falls.argmax()) + 1 if above > 1 and float(falls.max()) > 10 else above


def sampled(left: Tensor, draws: int, generator: torch.Generator | None = None) -> Tensor:
    r""":math:`L_A\,q = 0` for N − 1 rows A: SPEAR's draw.

    If one sample is off in all rows of A, then ``q`` is its direction: the only one that
    vanishes there. Implements :eq:`null-vector`.

    Parameters
    ----------
    left : Tensor
        ``L``, ``(m, N)``, without zero rows.
    draws : int
        How many sets of rows.
    generator : torch.Generator, optional
        Source of the rows; ``None``: a fixed seed.

    Returns
    -------
    Tensor
        ``(draws, N)``, of length one.

    Notes
    -----
    Source: Dimitrov et al. (2024).
    """
    m, N = left.shape
    rows = _uniform((draws, N - 1), generator, left)
    sets = left[(rows * m).long().clamp_max(m - 1)]
    last = _uniform((draws, 1, N), generator, left) - 0.5
    square = torch.cat([sets, last], dim=1)
    wanted = torch.zeros(draws, N, 1).to(left)
    wanted[:, -1] = 1
    q, _ = torch.linalg.solve_ex(square, wanted)  # a row drawn twice leaves no answer
    return _directions(q[:, :, 0])


def descended(
    left: Tensor,
    starts: int,
    generator: torch.Generator | None = None,
    known: Tensor | None = None,
    vary: bool = False,
) -> Tensor:
    r""":math:`\min_q \sum_j w_j\,|l_j \cdot q|` over :math:`\lVert q \rVert = 1`, from many starts.

    Of all vectors of one length in the column space, sparse ones have the smallest sum of
    absolute values, at least among their neighbours. The weights ``w_j`` give every row one
    length, in coordinates in which no direction is preferred. Each start goes down by reweighted
    least squares: divide each row by its present ``|l_j · q|``, and take one step of inverse
    iteration. Implements :eq:`sparse-direction`.

    Parameters
    ----------
    left : Tensor
        ``L``, ``(m, N)``, without zero rows.
    starts : int
        How many.
    generator : torch.Generator, optional
        Source of the starts; ``None``: a fixed seed.
    known : Tensor, optional
        Directions ``(r, N)`` with r < N not to be found again.
    vary : bool
        Give each start its own random part of the rows, its own preference for short rows, and
        every other one the sum of square roots to go down on: other paths, for directions that
        the plain ones miss.

    Returns
    -------
    Tensor
        ``(starts, N)``, of length one; what is sparse among them is for the caller to see.

    Notes
    -----
    The objective is dictionary learning's; weights, steps and variation are this project's.
    """
    even, frame = _evened(left)
    away = _away(even, None if known is None else known @ torch.linalg.inv(frame).T)
    sizes = left.norm(dim=1) / left.norm() * len(left) ** 0.5
    weights, power = _variation(starts, even, sizes, generator, vary)
    products = _products(even)
    q = _directions(_normal((starts, left.shape[1]), generator, left) @ away)
    for step in range(STEPS):
        width = max(1e-9, 0.6**step) / left.shape[1] ** 0.5
        size = (q @ even.T).square() + width**2
        gram = ((weights * size**power) @ products).unflatten(1, (left.shape[1], -1))
        gram = gram / gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        q, _ = torch.linalg.solve_ex(gram, (q @ away)[:, :, None])
        q = _directions(q[:, :, 0])
    found: Tensor = _directions(q @ frame.T)
    return found


def _evened(left: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of one length in new coordinates, and the frame that leads back to the old ones."""
    _, r = torch.linalg.qr(left / left.norm(dim=1, keepdim=True))
    frame = torch.linalg.inv(r)
    even = left @ frame
    return even / even.norm(dim=1, keepdim=True), frame


def _variation(
    starts: int, left: Tensor, sizes: Tensor, generator: torch.Generator | None, vary: bool
) -> tuple[Tensor, Tensor]:
    """Weights of the rows, ``(starts, m)``, and the power of ``|l_j · q|²`` that divides them."""
    power = torch.full((starts, 1), -0.5).to(left)
    if not vary:
        return torch.ones(starts, len(left)).to(left), power
    power[::2] = -0.75
    share = 0.4 + 0.6 * _uniform((starts, 1), generator, left)
    chosen = _uniform((starts, len(left)), generator, left) < share
    tilt = 2 * _uniform((starts, 1), generator, left)
    return chosen * sizes.clamp_min(1e-3) ** -tilt, power


def _away(left: Tensor, known: Tensor | None) -> Tensor:
    """Projector onto what is orthogonal to the known directions."""
    eye = torch.eye(left.shape[1]).to(left)
    if known is None or len(known) == 0:
        return eye
    span, _ = torch.linalg.qr(known.T)
    projector: Tensor = eye - span @ span.T
    return projector


def sparse_basis(
    parts: Split,
    *,
    method: str = "descent",
    generator: torch.Generator | None = None,
    progress: Progress | bool = False,
    budget: int | None = None,
    accept: Callable[[Basis], bool] | None = None,
) -> Basis:
    r""":math:`\operatorname{rank} L_{Z \setminus j} = N - 1,\ Z = \{i : l_i \cdot q = 0\}`.

    Which candidates are samples? In general position a vector of the column space that mixes s
    samples is zero where all of them are off, which leaves s dimensions open, and where s − 1
    single rows happen to cancel: it hangs on each of those. A single sample's direction is
    witnessed instead: leave out any one row j of its zeros Z, and the others still fix it.
    Witnessed candidates are taken sparsest first, each independent of those before, until they
    are N. Implements :eq:`witness`.

    Parameters
    ----------
    parts : Split
        Of the gradient.
    method : {"descent", "sampling"}
        Where candidates come from: :func:`descended` or :func:`sampled`.
    generator : torch.Generator, optional
        ``None``: a fixed seed.
    progress : bool or callable
        Called with what was spent, the directions found and those wanted; ``True`` prints them.
    budget : int, optional
        Starts (draws) at most; by default 16 384 (1 048 576).
    accept : callable, optional
        Whether a basis is right, for who can tell; the search goes on until it is. Without it, a
        basis is returned once further rounds find nothing sparser.

    Returns
    -------
    Basis

    Raises
    ------
    UnknownNameError
        If there is no such method.
    InvalidArgumentError
        If the budget is not a positive whole number.
    NotRecoveredError
        If fewer than N directions were found, or the N found are not the only ones possible; the
        message says how far it got.

    Notes
    -----
    Source: Dimitrov et al. (2024) for draws and greedy choice, where candidates are kept by a
    threshold on their zeros; the witness is this project's.
    """
    if method not in ROUNDS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(ROUNDS)}.")
    budget = _budget(BUDGETS[method] if budget is None else budget)
    if len(parts.values) == 1:
        return Basis(torch.ones(1, 1).to(parts.left), _zero_share(parts.left), 0)
    search = _Search(parts, method, generator or torch.Generator().manual_seed(0))
    report = _reporter(progress, method)
    while search.spent < budget:
        search.round(min(ROUNDS[method], budget - search.spent))
        report(search.spent, len(search.found), search.wanted)
        if search.complete and (search.quiet >= QUIET if accept is None else search.changed):
            if accept is None:
                search.refuse_ambiguity()
            basis = search.basis()
            if accept is None or accept(basis):
                return basis
    raise NotRecoveredError(
        f"Found {len(search.found)} of {search.wanted} sparse directions in {search.spent} "
        f"{_UNITS[method]}. {_advice(search)}"
    )


def _zero_share(left: Tensor) -> Tensor:
    return (left == 0).double().mean(dim=0)


_UNITS = {"descent": "starts", "sampling": "draws"}


def _budget(budget: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise InvalidArgumentError(f"budget must be a whole number, one or more; got {budget!r}.")
    return budget


def _advice(search: _Search) -> str:
    if search.complete:
        return (
            "They were not confirmed within the budget, by the forward pass where the weights are "
            "given, else by further rounds: a larger budget, or fewer outputs above than samples?"
        )
    if len(search.found):
        return (
            "A larger budget or a layer with more rows may give the others, unless samples are "
            "multiples of each other or on in every row."
        )
    return (
        "No direction has more zeros than chance: no ReLU follows the layer, the batch is too "
        "large for its rows, or there is noise."
    )


def _reporter(progress: Progress | bool, method: str) -> Progress:
    if callable(progress):
        return progress
    return _printer(_UNITS[method]) if progress else _silent


def _printer(unit: str) -> Progress:
    def report(spent: int, found: int, wanted: int) -> None:
        print(f"{spent} {unit}: {found} of {wanted} found", file=sys.stderr)

    return report


def _silent(spent: int, found: int, wanted: int) -> None: ...


class _Search:
    """The witnessed directions so far, none of them twice."""

    def __init__(self, parts: Split, method: str, generator: torch.Generator) -> None:
        self.rows = _Rows(parts)
        self.method, self.generator = method, generator
        self.spent = self.rounds = self.quiet = 0
        self.wanted = parts.left.shape[1]
        self.found = parts.left.new_zeros(0, self.wanted)

    def round(self, count: int) -> None:
        self.spent += count
        new = self.rows.witnessed(self._candidates(count))
        before = self.found
        if len(new):
            self._add(new)
        same = len(before) == len(self.found) and bool(torch.equal(before, self.found))
        self.quiet = self.quiet + 1 if same else 0

    @property
    def complete(self) -> bool:
        return len(self.found) == self.wanted

    @property
    def changed(self) -> bool:
        return self.quiet == 0

    def _candidates(self, count: int) -> Tensor:
        if self.method == "sampling":
            return sampled(self.rows.left, count, self.generator)
        self.rounds += 1
        return descended(self.rows.left, count, self.generator, self._known(), self.rounds > 1)

    def _known(self) -> Tensor:
        """Part of what was found; all of it would shut out what a false one stands for."""
        kept = (
            _uniform((len(self.found),), self.generator, self.found) < (0, 1, 0.5)[self.rounds % 3]
        )
        known = self.found[kept]
        return known[: self.wanted - 1]

    def _add(self, new: Tensor) -> None:
        """Sparsest first, each independent of those before it; then no pair hides another."""
        self._choose(new)
        for _ in range(self.wanted):
            hidden = self.rows.hidden(self.found)
            if not len(hidden):
                break
            self._choose(hidden)

    def _choose(self, new: Tensor) -> None:
        q = torch.cat([self.found, new])
        count = self.rows.zeros(q).sum(dim=1)
        count[: len(self.found)] += 1  # the found stay, unless something is sparser by far
        order = count.argsort(descending=True, stable=True)
        self.found = _independent(q[order])

    def refuse_ambiguity(self) -> None:
        if self.rows.proportional(self.found):
            raise NotRecoveredError(
                f"Found {self.wanted} of {self.wanted} sparse directions in {self.spent} "
                f"{_UNITS[self.method]}, but others are sparse as well: many rows of the gradient "
                "mix two samples in one proportion, as under a network with a single output, and "
                "sparsity cannot tell the samples apart."
            )
        if self.rows.scarce(self.found) or self.rows.exclusive(self.found):
            raise NotRecoveredError(
                f"Found {self.wanted} of {self.wanted} sparse directions in {self.spent} "
                f"{_UNITS[self.method]}, but they need not be the samples': most units are on, so "
                "that zeros are few, or shared by mixtures, as with more samples than outputs "
                "above. Give the layer's weight and bias, which tell."
            )

    def basis(self) -> Basis:
        zero = self.rows.zeros(self.found)
        q = torch.stack([torch.linalg.svd(self.rows.left[z]).Vh[-1] for z in zero])
        dead = self.rows.total - len(self.rows.left)
        return Basis(q.T, (zero.sum(dim=1) + dead).double() / self.rows.total, self.spent)


def _independent(q: Tensor) -> Tensor:
    """The first of these directions, and each next one outside the span of those before it."""
    span, rest, chosen = q.new_zeros(q.shape[1], 0), q, []
    for _ in range(q.shape[1]):
        fresh = (rest.norm(dim=1) > 1e-3).nonzero().flatten()
        if len(fresh) == 0:
            break
        chosen.append(int(fresh[0]))
        span = torch.cat([span, _directions(rest[chosen[-1]][None]).T], dim=1)
        rest = q - (q @ span) @ span.T
    return q[chosen]


class _Rows:
    """The rows of ``L`` that are not zero, and what noise leaves to be seen of their zeros."""

    def __init__(self, parts: Split) -> None:
        self.left, self.total = parts.left[parts.living], len(parts.left)
        m, self.eps = len(self.left), parts.eps
        self.products = _products(self.left)
        self.values, self.least = parts.values, max(1e-9, 1e-2 * parts.eps) / m**0.5
        self.ratio_noise = max(1e-8, 100 * parts.eps)
        self.noise = parts.eps * (self.left * parts.values).norm(dim=1) + parts.noise / m**0.5

    def zeros(self, q: Tensor, slack: float = 1.0) -> Tensor:
        """Where ``l_j · q`` vanishes as far as noise lets one tell, ``(…, m)``."""
        grown = (q / self.values).norm(dim=1, keepdim=True)
        bound = (8 * slack * grown * self.noise).clamp_min(self.least)
        vanishes: Tensor = (q @ self.left.T).abs() <= bound
        return vanishes

    def witnessed(self, q: Tensor) -> Tensor:
        """Those that vanish in more rows than they must: solved again from these rows."""
        size = (q @ self.left.T).abs() * len(self.left) ** 0.5
        sharp = self.zeros(q, 10)  # a descent stops near its end, sooner or later
        return torch.cat([self._witnessed(sharp | (size <= width)) for width in (1e-7, 1e-4)])

    def _witnessed(self, zero: Tensor) -> Tensor:
        N = self.left.shape[1]
        for _ in range(3):
            q, fixed = self._solved(zero[zero.sum(dim=1) >= N])
            zero = self.zeros(q)
        return q[fixed & (zero.sum(dim=1) >= N)]

    def _solved(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Directions smallest on their zero rows; whether each stays without any one of these."""
        N = self.left.shape[1]
        gram = (zero.to(self.left) @ self.products).reshape(-1, N, N)
        values, vectors = torch.linalg.eigh(gram)
        inverse = torch.where(values > 1e-10, 1 / values, 0.0)
        inverse[:, 0] = 0
        pseudo = (vectors * inverse[:, None, :]) @ vectors.mT
        leverage = pseudo.flatten(1) @ self.products.T
        fixed = torch.where(zero, leverage, 0.0).amax(dim=1) < 0.999
        return vectors[:, :, 0], fixed & (values[:, 1] > 1e-10)

    def hidden(self, q: Tensor) -> Tensor:
        """What is sparser than one of these and comes of two: mixtures that share a sample."""
        count, found = self.zeros(q).sum(dim=1), [q[:0]]
        for i, j, ratio in self._repeats(q, _FEW):
            new = self.witnessed(_directions((q[i] - ratio * q[j])[None]))
            found.append(new[self.zeros(new).sum(dim=1) > count[i]])
        return torch.cat(found)

    def proportional(self, q: Tensor) -> bool:
        """Whether two vectors ``L q`` keep one ratio through many rows."""
        return bool(self._repeats(q, max(_FEW, round(0.04 * len(self.left)))))

    def scarce(self, q: Tensor) -> bool:
        """Whether a direction has hardly more zeros than chance leaves under this rounding."""
        N = self.left.shape[1]
        least = 2 * N if self.eps > 1e-12 else N + 1
        return bool((self.zeros(q).sum(dim=1) < least).any())

    def exclusive(self, q: Tensor) -> bool:
        """Whether two avoid each other's zeros, as do a sample and a mixture of which it is part.

        A mixture that cancels wherever all of its samples are on is not zero where one is off.
        """
        zero = self.zeros(q).double()
        share = zero.mean(dim=1)
        both, expected = zero @ zero.T / len(zero.T), torch.outer(share, share)
        spread = (expected * torch.outer(1 - share, 1 - share) / len(zero.T)).sqrt()
        apart = (both < expected / 2) & (both < expected - 4 * spread)
        return len(q) > 2 and bool(apart.fill_diagonal_(False).any())

    def _repeats(self, q: Tensor, rows: int) -> list[tuple[int, int, float]]:
        """Pairs i, j and the ratio of ``L q_i`` to ``L q_j`` that occurs in so many rows."""
        K, on = q @ self.left.T, ~self.zeros(q)
        safe, found = torch.where(on, K, 1.0), []
        for i in range(len(q)):
            ratios = torch.where(on & on[i], K[i] / safe, torch.nan).sort(dim=1).values
            low, high = ratios[:, : 1 - rows], ratios[:, rows - 1 :]
            tight = (high - low) <= self.ratio_noise * torch.maximum(low.abs(), high.abs())
            tight[i] = False
            first = tight.int().argmax(dim=1)
            for j in tight.any(dim=1).nonzero().flatten().tolist():
                found.append((i, j, float(ratios[j, first[j] + rows // 2])))
        return found


_FEW = 5


def _products(left: Tensor) -> Tensor:
    """``l_j l_jᵀ`` of every row, flat: ``(m, N²)``."""
    return (left[:, :, None] * left[:, None, :]).flatten(1)


def _directions(q: Tensor) -> Tensor:
    return torch.nan_to_num(q / q.norm(dim=1, keepdim=True), 0.0, 0.0, 0.0)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    g = generator or torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=g, device=g.device, dtype=torch.float64).to(like)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    g = generator or torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, device=g.device, dtype=torch.float64).to(like)

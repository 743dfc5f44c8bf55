"""Least squares, dense or matrix-free, with the rank that says whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .krylov import (
    LinearMap,
    Precondition,
    Progress,
    Rows,
    Run,
    cgls,
    open_share,
    ritz_values,
    squared_norm,
)

__all__ = [
    "Operator",
    "Preconditioned",
    "Solution",
    "Truncated",
    "answered",
    "draw",
    "extreme_directions",
    "extreme_eigenvalues",
    "inertia_rank",
    "least_squares",
    "patience",
    "preconditioned",
    "rank_of",
    "rank_test",
]

DENSE = 512  # unknowns below which an SVD is cheaper than one doubt about the rank
TOLERANCE = 1e-10  # singular values below this share of the largest count as zero
ROUNDING = 2e-15  # normal-equation residual, relative, at which float64 has nothing left to give
NEAREST, FARTHEST = 1e-4, 1e-2  # of the noise, at which an iteration ends; in between,
BELOW = 0.3  # over the condition: what the weakest direction makes of it stays below the noise
INERTIA = 1e-13  # eigenvalues of the normal equations below this share of their sum are zero
FEW = 150  # steps that a preconditioned iteration may take: past these, plain ones are no dearer
INVERSE = 4  # power steps to the weakest direction, by the preconditioner, and to the strongest


@runtime_checkable
class Operator(LinearMap, Protocol):
    """A linear map of ``like``'s shape that can be had in another precision and as a matrix."""

    like: Tensor

    def to(self, dtype: torch.dtype) -> LinearMap:
        """Return the same map in another precision."""
        ...

    def matrix(self) -> Tensor:
        """``(equations, unknowns)``."""
        ...


@dataclass(frozen=True)
class Solution:
    """What solving some equations gave, and whether it may be believed.

    Attributes
    ----------
    x : Tensor
        The least-squares answer, float64; of least norm where part of it is open.
    residual : float
        Norm of what the answer leaves unexplained, relative to the right-hand side: small is
        necessary, not sufficient.
    iterations : int
        Applications of the map and its adjoint; 0 where a matrix was factorised.
    undetermined : float
        Share of the unknowns' space that the equations leave open: exact for a matrix, else
        estimated from what is left of a random start.
    smallest_singular_value, largest_singular_value : float
        Over the determined part; estimates by Ritz values where matrix-free.
    converged : bool
        Whether the iteration reached rounding before its cap.
    """

    x: Tensor
    residual: float
    iterations: int
    undetermined: float
    smallest_singular_value: float
    largest_singular_value: float
    converged: bool = True

    @property
    def full_rank(self) -> bool:
        """Whether the equations determine every unknown."""
        return self.undetermined == 0 and self.converged

    @property
    def condition(self) -> float:
        """Largest over smallest singular value; infinite without full rank."""
        if not self.full_rank or self.smallest_singular_value <= 0:
            return math.inf
        return self.largest_singular_value / self.smallest_singular_value


def least_squares(
    A: Operator,
    b: Rows,
    *,
    noise: float = 0.0,
    dense: bool | None = None,
    cap: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    before: Solution | None = None,
) -> Solution:
    r""":math:`\hat x = \arg\min_x \lVert A x - b \rVert`, and the rank of ``A``.

    Small systems by SVD; larger ones by conjugate gradients on the normal equations, float32
    steps with float64 corrections, and then a dye that tells what stays open.

    Parameters
    ----------
    A : Operator
        The map, float64.
    b : Rows
        Right-hand side.
    noise : float
        Relative noise of ``b``: iterations that would only fit it are not spent.
    dense : bool, optional
        Force or forbid the SVD; by default it serves up to 512 unknowns.
    cap : int, optional
        Most iterations, ``10 000 + 4 √unknowns`` by default.
    generator : torch.Generator, optional
        Of the dye; a fixed one by default.
    progress : callable, optional
        Called with iterations done and the normal equations' residual.
    before : Solution, optional
        Of equations of which a few were wrong: where to start from; its rank is kept, and its
        singular values where these steps see none beyond.
    """
    n = A.like.numel()
    if dense if dense is not None else n <= DENSE:
        return _by_svd(A, b)
    cap = cap or patience(n)
    size, fast = math.sqrt(squared_norm(A.adjoint(b))) or 1.0, A.to(torch.float32)
    known = before if before is not None and before.full_rank else None
    test = known or rank_test(A, cap=cap, generator=generator, fast=fast, progress=progress)
    # a residual of the normal equations that the weakest direction carries no further than noise
    share = min(max(BELOW / test.condition, NEAREST), FARTHEST)
    target = max(ROUNDING, share * noise) * size
    start = None if known is None else known.x
    run = cgls(A, b, target, cap, fast=fast, progress=progress, start=start)
    found = answered(test, run, b)
    return replace(found, converged=test.converged and _ended(run, size))


def answered(test: Solution, run: Run, b: Rows) -> Solution:
    """An answer and the test of its rank as one; each has seen some singular values."""
    least, most = test.smallest_singular_value, test.largest_singular_value
    if run.alphas:
        own = ritz_values(run.alphas, run.betas)
        least, most = min(least, own[0]), max(most, own[1])
    return replace(
        test,
        x=run.x,
        residual=_left(run, b),
        iterations=test.iterations + run.iterations,
        smallest_singular_value=least,
        largest_singular_value=most,
    )


def _left(run: Run, b: Rows) -> float:
    """Relative norm of what an iteration leaves unexplained."""
    return _ratio(math.sqrt(run.unexplained.squared_norm()), math.sqrt(b.squared_norm()))


def _ended(run: Run, size: float) -> bool:
    """Whether it arrived, or at rounding."""
    return run.converged or run.norm <= 1e4 * ROUNDING * size


def preconditioned(
    A: Operator,
    b: Rows,
    precondition: Precondition,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Solution | None:
    """:func:`least_squares` in few steps, each dearer, by a preconditioner.

    None unless it ends at rounding and leaves nothing open: the answer of least norm needs plain
    steps.
    """
    size, fast = math.sqrt(squared_norm(A.adjoint(b))) or 1.0, A.to(torch.float32)
    options = {"fast": fast, "progress": progress, "precondition": precondition}
    left, test = open_share(A, draw(A.like, generator), FEW, **options)  # type: ignore[arg-type]
    if left > 0:
        return None
    run = cgls(A, b, ROUNDING * size, FEW, **options)  # type: ignore[arg-type]
    if not _ended(run, size):
        return None
    low = high = draw(A.like, torch.Generator().manual_seed(1)).float()
    for _ in range(INVERSE):
        low = precondition(low / low.norm())
        high = fast.adjoint(fast.forward(high / high.norm()))
    least, most = (math.sqrt(fast.forward(v / v.norm()).squared_norm()) for v in (low, high))
    return Solution(run.x, _left(run, b), run.iterations + test.iterations, 0.0, least, most)


def _by_svd(A: Operator, b: Rows) -> Solution:
    M, rhs = A.matrix(), b.flat()
    found = Truncated.of(M)
    x = found.refined(M, rhs)
    return Solution(
        x=x.reshape(A.like.shape),
        residual=_ratio(float((rhs - M @ x).norm()), float(rhs.norm())),
        iterations=0,
        undetermined=1 - found.rank / x.numel(),
        smallest_singular_value=found.smallest,
        largest_singular_value=float(found.values[0]),
    )


@dataclass(frozen=True)
class Truncated:
    """A matrix by its singular values above a limit: ``M ≈ U diag(values) Vh`` up to ``rank``.

    Attributes
    ----------
    U, values, Vh : Tensor
        Of all singular values, descending.
    rank : int
        How many lie above the limit.
    """

    U: Tensor
    values: Tensor
    Vh: Tensor
    rank: int

    @classmethod
    def of(cls, M: Tensor, share: float = TOLERANCE, largest: float | None = None) -> Truncated:
        """Factorise; values above a share of the largest count, or of another matrix's largest."""
        U, values, Vh = torch.linalg.svd(M, full_matrices=len(M) < M.shape[1])
        largest = float(values[0]) if largest is None else largest
        rank = int((values > share * largest).sum()) if largest > 0 else 0
        return cls(U, values, Vh, rank)

    @property
    def smallest(self) -> float:
        """Least of the singular values that count; zero where none does."""
        return float(self.values[self.rank - 1]) if self.rank else 0.0

    @property
    def null(self) -> Tensor:
        """Directions that the matrix does not see, a row each."""
        return self.Vh[self.rank :]

    def solve(self, rhs: Tensor) -> Tensor:
        """Least-squares answers of least norm, a column each."""
        r = self.rank
        answers: Tensor = (self.Vh[:r].T / self.values[:r]) @ (self.U[:, :r].T @ rhs)
        return answers

    def refined(self, M: Tensor, rhs: Tensor) -> Tensor:
        """The same, with one refinement: the factorisation's own rounding."""
        x = self.solve(rhs)
        return x + self.solve(rhs - M @ x)


def rank_test(
    A: LinearMap,
    like: Tensor | None = None,
    *,
    cap: int | None = None,
    generator: torch.Generator | None = None,
    fast: LinearMap | None = None,
    progress: Progress | None = None,
    spectrum: bool = True,
) -> Solution:
    """Solve ``A x = 0`` from a random start: what is left of it, nothing determines.

    Parameters
    ----------
    A, fast : LinearMap
        The map in float64, and in float32 where there is one.
    like : Tensor, optional
        Of the unknowns' shape; by default the map's own ``like``.
    cap : int, optional
        Most iterations; a test that they cut short is not ``converged``.
    generator, progress
        As for :func:`least_squares`.
    spectrum : bool
        Whether to tell the smallest and the largest singular value; zero where not.

    Returns
    -------
    Solution
        With ``x`` what is left of the start.
    """
    like = A.like if like is None else like  # type: ignore[attr-defined]
    cap = cap or patience(like.numel())
    dye = draw(like, generator)
    left, run = open_share(A, dye, cap, fast=fast, progress=progress)
    smallest, largest = ritz_values(run.alphas, run.betas) if spectrum else (0.0, 0.0)
    finished = left == 0 or run.iterations < cap
    return Solution(run.x, 0.0, run.iterations, left, smallest, largest, finished)


def draw(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal numbers of a tensor's shape, float64, on its device."""
    generator = generator or torch.Generator().manual_seed(20180502)
    drawn = torch.randn(
        like.shape, generator=generator, dtype=torch.float64, device=generator.device
    )
    return drawn.to(like.device)


def patience(n: int) -> int:
    """Steps of conjugate gradients that ``n`` unknowns may take."""
    return 10_000 + 4 * math.isqrt(n)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else part


@dataclass
class Preconditioned:
    """``A R⁻¹``: conjugate gradients on it are preconditioned ones on ``A`` with ``RᵀR``.

    Attributes
    ----------
    A : LinearMap
        The map itself.
    undo, undo_transposed : callable
        ``R⁻¹`` and ``R⁻ᵀ``.
    """

    A: LinearMap
    undo: Callable[[Tensor], Tensor]
    undo_transposed: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64

    def forward(self, x: Tensor) -> Rows:
        """``A R⁻¹ x``."""
        return self.A.forward(self.undo(x))

    def adjoint(self, r: Rows) -> Tensor:
        """``R⁻ᵀ Aᵀ r``."""
        return self.undo_transposed(self.A.adjoint(r))


# --- the rank of a matrix ---------------------------------------------------------------------


def rank_of(A: Tensor) -> int:
    """Rank of a matrix, or of blocks along a diagonal: by SVD while cheap, else by inertia."""
    if min(A.shape[-2:]) > DENSE:
        return inertia_rank(A if A.shape[0] >= A.shape[1] else A.T)
    values = torch.linalg.svdvals(A)
    return int((values > TOLERANCE * values.max()).sum()) if values.numel() else 0


def inertia_rank(A: Tensor) -> int:
    """Rank by Sylvester's law: a factorisation counts the eigenvalues of ``AᵀA`` above zero."""
    gram = A.T @ A
    scale = float(torch.linalg.matrix_norm(gram, 2 if len(gram) < 64 else "fro"))
    if scale == 0:
        return 0
    gram.diagonal().sub_(INERTIA * scale)
    LD, pivots = torch.linalg.ldl_factor(gram)
    single = pivots > 0
    below = int((LD.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2
    return len(gram) - below


def extreme_directions(gram: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of the smallest and the largest eigenvalue, by power iteration.

    Parameters
    ----------
    gram, factor : Tensor
        The matrix, and its Cholesky factor.
    """
    start = draw(gram[0], torch.Generator().manual_seed(1))
    start = start / start.norm()
    high = low = start
    for _ in range(30):
        high = gram @ high
        high = high / high.norm()
    for _ in range(10):
        low = torch.cholesky_solve(low[:, None], factor)[:, 0]
        low = low / low.norm()
    return low, high


def extreme_eigenvalues(gram: Tensor, factor: Tensor) -> tuple[float, float]:
    """Smallest and largest, by :func:`extreme_directions`."""
    low, high = extreme_directions(gram, factor)
    return float(low @ (gram @ low)), float(high @ (gram @ high))

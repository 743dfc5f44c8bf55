"""Conjugate gradients on the normal equations: float32's speed, float64's answer, and the rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

UPDATE = 0.03  # share of its last peak at which a residual is computed anew, in float64
RARE = 1e-3  # the same where a preconditioner makes steps few, and each new residual dear
STEPS_WITHOUT_GAIN = 1000  # at least; then the iteration has lost its way to rounding
STEPS_A_DIGIT = 600  # that float32 may take; slower, float64 keeps its conjugacy better
ASKED = 4  # steps between two questions whether an answer will do
DYE_LEFT = 1e-3  # of the one that a single open direction keeps, on average, of a random start
ARRIVED = 4.0  # times the target: a renewed residual that the recurrence puts below it
INVISIBLE = 2e-15  # share of what AᵀA makes of a dye that rounding hides: from here on, open

Progress = Callable[[int, float], None]
Precondition = Callable[[Tensor], Tensor]


__all__ = [
    "LinearMap",
    "Precondition",
    "Progress",
    "Rows",
    "Run",
    "cgls",
    "open_share",
    "ritz_values",
]


@dataclass
class Rows:
    """Right-hand side or residual: weight rows and gradient rows, scaled."""

    z: Tensor
    g: Tensor

    @classmethod
    def like(cls, rows: Rows) -> Rows:
        """Zeros of the same shapes."""
        return cls(torch.zeros_like(rows.z), torch.zeros_like(rows.g))

    def minus(self, other: Rows, step: float = 1.0) -> None:
        """Take ``step`` times ``other`` away, in place."""
        self.z.sub_(other.z, alpha=step)
        self.g.sub_(other.g, alpha=step)

    def squared_norm(self) -> float:
        """Sum of squares, added up in float64."""
        return squared_norm(self.z) + squared_norm(self.g)

    def flat(self) -> Tensor:
        """All rows end to end, weight rows first."""
        return torch.cat([self.z.reshape(-1), self.g.reshape(-1)])

    def to(self, dtype: torch.dtype, factor: float = 1.0) -> Rows:
        """Return the rows times ``factor`` in another precision; always a copy."""
        return Rows((self.z * factor).to(dtype), (self.g * factor).to(dtype))


class LinearMap(Protocol):
    """``A`` and its adjoint, in one precision."""

    dtype: torch.dtype

    def forward(self, x: Tensor) -> Rows:
        """``A x``."""
        ...

    def adjoint(self, r: Rows) -> Tensor:
        """``Aᵀ r``."""
        ...


@dataclass
class Run:
    """What an iteration gave.

    Attributes
    ----------
    x : Tensor
        The answer, float64.
    unexplained : Rows
        ``b − A x``.
    norm : float
        Of the normal equations' residual ``Aᵀ(b − A x)``.
    iterations : int
        Applications of ``A`` and of its adjoint.
    alphas, betas : list of float
        Coefficients of the first sweep, for :func:`ritz_values`.
    converged : bool
        Whether it reached its target, or the rounding of what no ``x`` explains.
    """

    x: Tensor
    unexplained: Rows
    norm: float
    iterations: int = 0
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    converged: bool = False


def cgls(
    exact: LinearMap,
    b: Rows,
    target: float,
    cap: int,
    *,
    fast: LinearMap | None = None,
    start: Tensor | None = None,
    enough: Callable[[Tensor], bool] | None = None,
    progress: Progress | None = None,
    precondition: Precondition | None = None,
) -> Run:
    r""":math:`A^\top A\,x = A^\top h` by conjugate gradients.

    ``AᵀA`` is never formed. With ``fast``, the same map in float32, every step is taken in
    float32, and each time the residual has lost a digit it is computed anew in float64 while
    the search direction is kept ("reliable updates"): as many steps as in float64, each at
    float32's price. Where float32 gets no further, ``exact`` goes on.
    Implements :eq:`normal-equations`.

    Parameters
    ----------
    exact : LinearMap
        ``A`` and its adjoint in float64.
    b : Rows
        Right-hand side ``h``, float64.
    target : float
        Norm of ``Aᵀ(b − A x)`` at which to stop.
    cap : int
        Most iterations.
    fast : LinearMap, optional
        ``A`` in float32.
    start : Tensor, optional
        Where to begin; zero by default.
    enough : callable, optional
        Asked every few steps whether ``x`` will do.
    progress : callable, optional
        Called with iterations done and the residual's norm relative to the first.
    precondition : callable, optional
        ``M⁻¹``, symmetric and positive definite, near ``(AᵀA)⁻¹``. Where it turns out not to be,
        the iteration ends there, without having converged.

    Returns
    -------
    Run

    Notes
    -----
    Source of the reliable updates: Clark et al. (2010), for lattice field theory.
    """
    x = torch.zeros_like(exact.adjoint(b)) if start is None else start
    run = Run(x, *_residual(exact, b, x))
    first = run.norm or 1.0
    told = None if progress is None else lambda n, norm: progress(n, norm / first)
    for system in (exact,) if fast is None else (fast, exact):
        sweep = _Sweep(exact, system, b, run, target, cap, told, enough, precondition)
        if sweep.go():
            break
    return run


def _residual(exact: LinearMap, b: Rows, x: Tensor) -> tuple[Rows, float]:
    rest = exact.forward(x)
    rest = Rows(b.z - rest.z, b.g - rest.g)
    return rest, math.sqrt(squared_norm(exact.adjoint(rest)))


def squared_norm(x: Tensor) -> float:
    """Sum of squares, added up in float64."""
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return norm * norm


def _inner(s: Tensor, z: Tensor) -> float:
    """Inner product, added up in float64 where the two are one."""
    if s is z:
        return squared_norm(s)
    return float(s.flatten().double() @ z.flatten().double())


class _Sweep:
    """Conjugate gradients in one precision, from where ``run`` stands."""

    def __init__(
        self,
        exact: LinearMap,
        system: LinearMap,
        b: Rows,
        run: Run,
        target: float,
        cap: int,
        progress: Progress | None,
        enough: Callable[[Tensor], bool] | None,
        precondition: Precondition | None = None,
    ) -> None:
        self.precondition = precondition
        self.exact, self.system, self.b, self.run = exact, system, b, run
        self.target, self.cap, self.progress, self.enough = target, cap, progress, enough
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.gain = 0.0  # largest |Ap|²/|p|² seen: at most |A|²
        self.scale = run.norm / math.sqrt(run.x.numel()) or 1.0  # entries about one in float32
        self.base, self.last, self.rest, self.stalled = run.x, run.norm, 0.0, False
        self.floor = (8 * torch.finfo(system.dtype).eps) ** 2
        self.size = math.sqrt(b.squared_norm())

    def go(self) -> bool:
        """Iterate; whether there is nothing left to do in any precision."""
        if self.run.norm <= self.target:
            self.run.converged = True
            return True
        s = self._renew(self.run.unexplained)
        z = self._preconditioned(s)
        p, self.d = z.clone(), torch.zeros_like(s)
        gamma, size = _inner(s, z), squared_norm(s)
        peak = least = size
        since, count, renewed = 0, 0, 0
        length = squared_norm(p)
        while self.run.iterations < self.cap:
            q = self.system.forward(p)
            curvature = q.squared_norm()
            if min(curvature, gamma) <= 0 or not math.isfinite(curvature):
                return self._update(0.0) or self.system is self.exact
            alpha = gamma / curvature
            self.gain = max(self.gain, curvature / length)
            self.d.add_(p, alpha=alpha)
            self.r.minus(q, alpha)
            self.rest = max(self.rest - alpha * gamma, 0.0)
            s = self.system.adjoint(self.r)
            z, size = self._preconditioned(s), squared_norm(s)
            gamma, previous = _inner(s, z), gamma
            count += 1
            self._note(alpha, gamma / previous, size)
            peak = max(peak, size)
            least, since = (size, count) if size < least else (least, since)
            lost = count > STEPS_WITHOUT_GAIN + 3 * since or size <= self._rounding()
            lost = lost or (self.system is not self.exact and count - renewed > STEPS_A_DIGIT)
            arrived = self.scale * math.sqrt(size) <= self.target or self._enough(count)
            if lost or arrived or size <= self.digit**2 * peak:
                if self._update(self.scale * math.sqrt(size)):
                    return True
                if lost or self.stalled:
                    return self.system is self.exact
                s, renewed = self._renew(self.fresh), count
                z, peak = self._preconditioned(s), squared_norm(s)
                gamma = _inner(s, z)
                self.betas[-1] = gamma / previous
            beta = self.betas[-1]
            p.mul_(beta).add_(z)
            length = gamma + beta**2 * length if self.precondition is None else squared_norm(p)
        self._update(0.0)
        return True

    @property
    def digit(self) -> float:
        return UPDATE if self.precondition is None else RARE

    def _preconditioned(self, s: Tensor) -> Tensor:
        return s if self.precondition is None else self.precondition(s)

    def _enough(self, count: int) -> bool:
        """Whether the present answer will do, asked now and then."""
        if self.enough is None or count % ASKED:
            return False
        return self.enough(self.base + self.d.double() * self.scale)

    def _rounding(self) -> float:
        return self.floor * self.gain * self.rest

    def _note(self, alpha: float, beta: float, size: float) -> None:
        self.alphas.append(alpha)
        self.betas.append(beta)
        self.run.iterations += 1
        if self.progress is not None:
            self.progress(self.run.iterations, self.scale * math.sqrt(size))

    def _renew(self, r: Rows) -> Tensor:
        self.r = r.to(self.system.dtype, 1 / self.scale)
        self.rest = self.r.squared_norm()
        return self.system.adjoint(self.r)

    def _update(self, recursed: float) -> bool:
        """Residual in float64 at the present answer; whether that answer will do."""
        x = self.base + self.d.double() * self.scale
        self.d.zero_()
        self.fresh, norm = _residual(self.exact, self.b, x)
        if not math.isfinite(norm):
            self.stalled = True
            return False
        self.stalled = norm > 2 * recursed and norm > self.last / 2
        run = self.run
        if norm < run.norm:
            run.x, run.unexplained, run.norm = x, self.fresh, norm
        if not run.alphas or self.system is not self.exact:
            run.alphas, run.betas = self.alphas, self.betas
        self.base, self.last = x, norm
        eps = torch.finfo(torch.float64).eps
        rest = max(8 * math.sqrt(self.rest) * self.scale, self.size)
        run.converged = run.norm <= max(self.target, 4 * eps * math.sqrt(self.gain) * rest)
        # The recurrence arrived, and the residual as computed anew differs by rounding alone.
        run.converged = run.converged or max(recursed, run.norm / ARRIVED) <= self.target
        return run.converged or (self.enough is not None and self.enough(run.x))


def open_share(
    exact: LinearMap,
    start: Tensor,
    cap: int,
    *,
    fast: LinearMap | None = None,
    progress: Progress | None = None,
    precondition: Precondition | None = None,
) -> tuple[float, Run]:
    r""":math:`\lVert (I - A^+A)\,x_0 \rVert^2 / \lVert x_0 \rVert^2`, from a random start.

    The iteration solves ``A x = 0`` from a start of random colour, a **dye**: each step moves
    only where the equations speak, so exactly the part of the start that they do not see is
    left at the end. A single open direction keeps a standard normal share of the start; with a
    preconditioner at least that much, ``nᵀMc/nᵀMn``, for the part is then taken obliquely.
    Implements :eq:`dye`.

    Parameters
    ----------
    exact : LinearMap
        ``A`` and its adjoint in float64.
    start : Tensor
        Standard normal entries.
    cap : int
        Most iterations.
    fast : LinearMap, optional
        ``A`` in float32.
    progress, precondition : callable, optional
        As in :func:`cgls`.

    Returns
    -------
    share : float
        0 where the equations determine everything; else an estimate of the share of the space
        that they leave open.
    run : Run
        The iteration.
    """
    response = exact.forward(start)
    run = cgls(
        exact,
        Rows.like(response),
        INVISIBLE * math.sqrt(squared_norm(exact.adjoint(response))),
        cap,
        fast=fast,
        start=start,
        enough=lambda x: squared_norm(x) < DYE_LEFT**2,
        progress=progress,
        precondition=precondition,
    )
    left = squared_norm(run.x)
    return (0.0 if left < DYE_LEFT**2 else left / squared_norm(start)), run


def ritz_values(alphas: Sequence[float], betas: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest singular value that the iteration has seen, from its coefficients."""
    from scipy.linalg import eigvalsh_tridiagonal

    if not alphas:
        return 0.0, 0.0
    a, b = np.array(alphas), np.array(betas[: len(alphas) - 1])
    diagonal = 1 / a
    diagonal[1:] += b / a[:-1]
    values = eigvalsh_tridiagonal(diagonal, np.sqrt(b) / a[:-1])
    return math.sqrt(max(float(values[0]), 0.0)), math.sqrt(max(float(values[-1]), 0.0))

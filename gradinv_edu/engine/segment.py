"""Several layers solved together, where one alone has too few equations."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .krylov import LinearMap, Progress, Rows, cgls, squared_norm
from .layers import Rule
from .solve import (
    ROUNDING,
    Operator,
    Solution,
    Truncated,
    extreme_directions,
    least_squares,
    rank_test,
)

__all__ = ["LARGEST", "Floor", "Segment", "solve", "spare_equations", "within_reach"]

ROUNDS = 60
DENSE = 6144  # unknowns up to which the system is written out as a matrix
LARGEST = 65_536  # unknowns up to which it is solved at all: every round is a long iteration
STEPS = 4000  # of conjugate gradients that one linearisation of a larger one may take
FORCING = 1e-6  # of the residual before it, to which the normal equations of a round are solved
DROPPED = 0.25  # share of the spare equations given up for units too near the kink to tell
SETTLED = 1e-9  # relative residual of a round that explains everything
NULL = 1e-9  # singular values below this share of the largest count as zero


class Weights:
    """``x ↦ W x`` of a module affine in its input, in one precision.

    Parameters
    ----------
    module : nn.Module
        Of one layer, or several that are affine together.
    like : Tensor
        Of the input's shape, batch included.
    """

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        self.module = copy.deepcopy(module).to(like.dtype).requires_grad_(False)
        self.like, self.dtype = torch.zeros_like(like), like.dtype
        with torch.enable_grad():
            self.leaf = self.like.clone().requires_grad_()
            self.out = self.module(self.leaf)
        self.offset = self.out.detach()

    def to(self, dtype: torch.dtype) -> Weights:
        """Return the same map in another precision."""
        return Weights(self.module, self.like.to(dtype))

    def through(self, x: Tensor) -> Tensor:
        """``W x + b``."""
        with torch.no_grad():
            z: Tensor = self.module(x.reshape(-1, *self.like.shape[1:]))
        return z

    def pull(self, rows: Tensor) -> Tensor:
        """``Wᵀ r``."""
        k = rows.reshape(self.out.shape)
        pulled: Tensor = torch.autograd.grad(self.out, self.leaf, k, retain_graph=True)[0]
        return pulled

    def forward(self, x: Tensor) -> Rows:
        """``W x``."""
        return Rows(self.through(x) - self.offset, x.new_zeros(0))

    def adjoint(self, r: Rows) -> Tensor:
        """``Wᵀ r``."""
        return self.pull(r.z)

    def matrix(self) -> Tensor:
        """``W``, a block for each sample."""
        size = math.prod(self.like.shape[1:])
        identity = torch.eye(size, dtype=self.dtype, device=self.like.device)
        parts = [self.through(part).flatten(1) for part in torch.split(identity, 256)]
        one: Tensor = (torch.cat(parts) - self.offset[0].flatten()).T.contiguous()
        if len(self.like) == 1:
            return one
        each = torch.eye(len(self.like), dtype=one.dtype, device=one.device)
        blocks: Tensor = torch.kron(each, one)
        return blocks


@dataclass
class Floor:
    """One layer below the deficient one, and what leads from its output to the layer above.

    Attributes
    ----------
    name : str
        In the model.
    module : nn.Module
        Affine in its input, float64.
    like : Tensor
        Zeros of its input's shape, batch included.
    above : list of :class:`~gradinv_edu.engine.layers.base.Rule`
        Activations and reshapes between its output and the input of the layer above.
    """

    name: str
    module: nn.Module
    like: Tensor
    above: list[Rule] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = Weights(self.module, self.like)
        self.kinked = any(rule.kinked for rule in self.above)

    @property
    def unknowns(self) -> int:
        """Entries of its input, over all samples."""
        return math.prod(self.like.shape)

    def activate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``φ(z)`` and ``φ'(z)``, both flat."""
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            a = leaf
            for rule in self.above:
                a = rule.forward(a)
            (slope,) = torch.autograd.grad(a.sum(), leaf)
        return a.detach().flatten(), slope.flatten()

    def undo(self, a: Tensor) -> Tensor:
        """``z`` from ``a``, after moving ``a`` into the activations' range."""
        inputs, z = [], self.weights.offset
        for rule in self.above:
            inputs.append(z)
            z = rule.forward(z)
        a = a.reshape(z.shape)
        for rule, before in zip(reversed(self.above), reversed(inputs), strict=True):
            if rule.elementwise:
                a = rule.undo(rule.clamp(a), self.name, 1e-12).inputs
            else:
                a = rule.pull(a, before)
        return a.reshape(self.weights.offset.shape)


@dataclass(frozen=True)
class Segment:
    """What several layers solved together gave.

    Attributes
    ----------
    inputs : tuple of Tensor
        Of the floors, lowest first, then of the deficient layer.
    outputs : tuple of Tensor
        Of the floors, lowest first.
    equations : int
        Of the joint system.
    solution : Solution
        Its account at the answer, nothing left out; ``iterations`` counts linearisations.
    converged : bool
        Whether the rounds ended with every equation satisfied.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    equations: int
    solution: Solution
    converged: bool


def spare_equations(floors: Sequence[Floor], missing: int) -> int:
    """Equations that the floors have beyond their own unknowns and the ``missing`` ones."""
    spare = -missing
    for floor in floors:
        spare += floor.weights.out.numel() - floor.unknowns
    return spare


def within_reach(unknowns: int, spare: int) -> bool:
    r""":math:`\kappa = (\sqrt{\rho} + 1)/(\sqrt{\rho} - 1)` for ``ρ`` equations an unknown.

    The condition of a random matrix of that shape (Marchenko and Pastur), which convolutions come
    near: whether conjugate gradients could be done within their steps. A matrix that is written
    out needs one equation for each unknown, no more.
    """
    if spare < 0 or unknowns <= DENSE:
        return spare >= 0
    root = math.sqrt(1 + spare / unknowns)
    digits = -math.log(FORCING * SETTLED)
    return (root + 1) * digits / 2 <= STEPS * (root - 1)


def solve(
    floors: Sequence[Floor],
    top: Operator,
    b: Rows,
    missing: int,
    *,
    tolerance: float = SETTLED,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Segment:
    r""":math:`\phi(W_l x_l + b_l) = x_{l+1}` below, :math:`x_{\min} + B c` above.

    A layer that lacks equations borrows from the layers below it: what they put out lives in
    the range of ``W``, which has fewer dimensions than entries ("virtual constraints"). The
    deficient layer's input is its least-norm answer plus an unknown part ``B c`` of its null
    space; the activations are linearised at the present answer and everything is solved again.
    With kinked activations (ReLU, leaky ReLU) each round decides anew which side of the kink a
    unit is on, and the units nearest to it are left out: **a row that may be wrong is masked,
    not guessed**. Up to 6144 unknowns the matrix is written out; beyond, the rounds are solved
    by conjugate gradients, with the deficient layer's whole input as unknown in place of ``c``.
    Implements :eq:`joint-system`.

    Parameters
    ----------
    floors : sequence of Floor
        The layers below, lowest first.
    top : Operator
        Equations of the layer that lacks some, scaled.
    b : Rows
        Their right-hand side.
    missing : int
        About how many dimensions ``top`` leaves open.
    tolerance : float
        Relative residual that the noise of ``b`` allows, for rounds that get no further.
    generator, progress
        As for :func:`~gradinv_edu.engine.solve.least_squares`.

    Returns
    -------
    Segment
        Of use only where ``converged`` and ``solution.full_rank``.

    Notes
    -----
    Virtual constraints: Zhu and Blaschko (2021). Solving them together, and the masking of
    near-kink rows, are this project's.
    """
    small = max(sum(f.unknowns for f in floors) + missing, top.like.numel()) <= DENSE
    kind = _Dense if small else _MatrixFree
    problem = kind(floors, top, b, missing, generator)
    rounds, converged = problem.settle(tolerance, progress)
    return Segment(
        inputs=tuple(problem.inputs()),
        outputs=tuple(problem.z),
        equations=problem.unknowns + problem.spare,
        solution=problem.account(rounds),
        converged=converged,
    )


class _Problem(ABC):
    """The equations of all floors, linearised at ``z`` and solved until they hold.

    Not plain Gauss and Newton: ``z`` is taken from the unknown above it, rows near a kink are left
    out, and the share left out falls as the sides settle. On the input alone, with every kink as
    it falls, the same equations end at wrong sides.
    """

    sizes: list[int]  # of the unknowns, end to end
    v: Tensor  # the unknowns
    spare: int

    def __init__(
        self,
        floors: Sequence[Floor],
        top: Operator,
        b: Rows,
        missing: int,
        generator: torch.Generator | None,
    ) -> None:
        self.floors, self.top, self.b, self.generator = list(floors), top, b, generator
        self.kinked = any(f.kinked for f in floors)
        self.share = DROPPED
        above = self.prepare(missing)
        self.z: list[Tensor] = []
        for level in reversed(range(len(self.floors))):  # undone from the least-norm answer down
            floor = self.floors[level]
            self.z.insert(0, floor.undo(above))
            if level:
                above = self.least_squares(level, self.z[0] - floor.weights.offset)

    @abstractmethod
    def prepare(self, missing: int) -> Tensor:
        """Set up the unknowns; the deficient layer's least-norm answer."""

    @abstractmethod
    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        """Least-squares input of one floor."""

    @abstractmethod
    def top_input(self, part: Tensor) -> Tensor:
        """Input of the deficient layer from its part of the unknowns."""

    @abstractmethod
    def solve(self, gap: float) -> bool:
        """Solve the equations linearised at ``z``; whether they determined their unknowns."""

    @abstractmethod
    def account(self, rounds: int) -> Solution:
        """Residual, rank and singular values at the answer, nothing left out."""

    @property
    def unknowns(self) -> int:
        return sum(self.sizes)

    def inputs(self) -> list[Tensor]:
        *parts, top = torch.split(self.v, self.sizes)
        shaped = [p.reshape(f.like.shape) for p, f in zip(parts, self.floors, strict=True)]
        return [*shaped, self.top_input(top)]

    @property
    def dropped(self) -> int:
        return int(self.share * max(self.spare, 0) / len(self.floors))

    def kept(self, level: int, masked: bool) -> Tensor:
        """1 for the rows of a floor that are used, 0 for those nearest to the kink."""
        mask = torch.ones_like(self.z[level]).flatten()
        if masked and self.floors[level].kinked:
            most = min(self.dropped, mask.numel())
            mask[self.z[level].abs().flatten().topk(most, largest=False).indices] = 0.0
        return mask

    def settle(self, tolerance: float, progress: Progress | None) -> tuple[int, bool]:
        """Linearise and solve until every equation holds, or it stops getting anywhere."""
        best, least, stalls, residual = math.inf, math.inf, 0, 1.0
        for turn in range(1, ROUNDS + 1):
            if not self.solve(residual):  # what is left of the rows is too little
                return turn, False
            residual, changed = self._move()
            if progress is not None:
                progress(turn, residual)
            if residual < SETTLED or least / 2 < residual <= tolerance:  # noise allows no more
                return turn, True
            least = min(least, residual)
            if changed * len(self.floors) < self.dropped:  # most sides are known by now
                self.share /= 2
            measure = float(changed) if self.kinked else residual
            stalls = 0 if measure < best else stalls + 1
            best = min(best, measure)
            if stalls > 10 or not math.isfinite(residual):
                break
        return turn, residual <= tolerance

    def _move(self) -> tuple[float, int]:
        """Take the outputs from the new answer; its true residual, and units that changed sides."""
        inputs, gap, size, changed, outputs = self.inputs(), 0.0, 0.0, 0, []
        for level, floor in enumerate(self.floors):
            through = floor.weights.through(inputs[level])
            a, _ = floor.activate(through)
            gap += squared_norm(a - inputs[level + 1].flatten())
            size += squared_norm(inputs[level + 1])
            z = floor.undo(inputs[level + 1]) if floor.kinked else through
            changed += int(((z > 0) != (self.z[level] > 0)).sum())
            outputs.append(z)
        self.z = outputs
        return math.sqrt(gap / max(size, 1e-300)), changed


class _Dense(_Problem):
    """Written out, in the unknowns ``(x_1, …, x_m, c)`` end to end."""

    def prepare(self, missing: int) -> Tensor:
        self.least, self.null = _split_top(self.top.matrix(), self.b.flat(), missing)
        self.matrices = [f.weights.matrix() for f in self.floors]
        self.sizes = [f.unknowns for f in self.floors] + [self.null.shape[1]]
        self.spare = sum(len(W) for W in self.matrices) - self.unknowns
        self.v = self.least.new_zeros(self.unknowns)
        return self.least.reshape(self.top.like.shape)

    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        answer: Tensor = torch.linalg.lstsq(self.matrices[level], rows.reshape(-1, 1)).solution
        return answer.reshape(self.floors[level].like.shape)

    def top_input(self, part: Tensor) -> Tensor:
        return (self.least + self.null @ part).reshape(self.top.like.shape)

    def solve(self, gap: float) -> bool:
        answer = _by_cholesky(*self.linearised(masked=True))
        self.v = self.v if answer is None else answer
        return answer is not None

    def account(self, rounds: int) -> Solution:
        A, b = self.linearised(masked=False)
        gram = A.T @ A
        gram.diagonal().add_(1e-14 * float(gram.diagonal().max()))
        # by the rows themselves: in their squares the shift hides an open direction
        directions = extreme_directions(gram, torch.linalg.cholesky(gram))
        smallest, largest = (float((A @ v).norm()) for v in directions)
        residual = float((A @ self.v - b).norm() / b.norm())
        left = 0.0 if smallest > NULL * largest else 1 / len(self.v)
        return Solution(self.v, residual, rounds, left, smallest, largest)

    def linearised(self, masked: bool) -> tuple[Tensor, Tensor]:
        r"""Rows :math:`\phi'(z)(W x_l + b - z) + \phi(z) - x_{l+1} = 0` at present ``z``."""
        rows, rhs, left = [], [], 0
        for level, (floor, W) in enumerate(zip(self.floors, self.matrices, strict=True)):
            a, slope = floor.activate(self.z[level])
            row = W.new_zeros(len(W), len(self.v))
            row[:, left : left + W.shape[1]] = slope[:, None] * W
            right = slope * (self.z[level] - floor.weights.offset).flatten() - a
            left += W.shape[1]
            if level + 1 < len(self.floors):
                row[:, left : left + len(W)] = -torch.eye(len(W), dtype=W.dtype, device=W.device)
            else:
                row[:, left:] = -self.null
                right = right + self.least
            kept = self.kept(level, masked)
            rows.append(kept[:, None] * row if masked else row)
            rhs.append(kept * right)
        return torch.cat(rows), torch.cat(rhs)


@dataclass
class _Stack:
    """All floors and the deficient layer, as one map of ``(x_1, …, x_m, x_top)`` end to end."""

    weights: list[Weights]
    slopes: list[Tensor]
    kept: list[Tensor]
    top: LinearMap
    shapes: tuple[torch.Size, torch.Size, torch.Size]  # of its input and of its rows
    dtype: torch.dtype = torch.float64

    def to(self, dtype: torch.dtype) -> _Stack:
        slopes, kept = ([p.to(dtype) for p in part] for part in (self.slopes, self.kept))
        weights = [W.to(dtype) for W in self.weights]
        assert isinstance(self.top, Operator)
        return _Stack(weights, slopes, kept, self.top.to(dtype), self.shapes, dtype)

    def forward(self, v: Tensor) -> Rows:
        sizes = [w.like.numel() for w in self.weights] + [self.shapes[0].numel()]
        parts, rows = torch.split(v, sizes), []
        for i, W in enumerate(self.weights):
            z = W.forward(parts[i]).z.flatten()
            rows.append(self.slopes[i] * z - self.kept[i] * parts[i + 1])
        top = self.top.forward(parts[-1].reshape(self.shapes[0]))
        return Rows(torch.cat(rows), top.flat())

    def adjoint(self, r: Rows) -> Tensor:
        parts = torch.split(r.z, [len(s) for s in self.slopes])
        _, z, g = self.shapes
        top = Rows(r.g[: z.numel()].reshape(z), r.g[z.numel() :].reshape(g))
        pulled = [
            W.pull(slope * part).flatten()
            for W, slope, part in zip(self.weights, self.slopes, parts, strict=True)
        ]
        pulled.append(self.top.adjoint(top).flatten())
        for i, part in enumerate(parts):
            pulled[i + 1] = pulled[i + 1] - self.kept[i] * part
        return torch.cat(pulled)


class _MatrixFree(_Problem):
    """Nothing written out; the deficient layer's whole input is unknown, its equations are rows."""

    def prepare(self, missing: int) -> Tensor:
        self.sizes = [f.unknowns for f in self.floors] + [self.top.like.numel()]
        self.spare = spare_equations(self.floors, missing)
        target = ROUNDING * math.sqrt(squared_norm(self.top.adjoint(self.b)))
        least = cgls(self.top, self.b, target, STEPS, fast=self.top.to(torch.float32)).x
        below = [least.new_zeros(f.unknowns) for f in self.floors]
        self.v = torch.cat([*below, least.flatten()])
        return least

    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        W = self.floors[level].weights
        return least_squares(W, Rows(rows, rows.new_zeros(0)), generator=self.generator).x

    def top_input(self, part: Tensor) -> Tensor:
        return part.reshape(self.top.like.shape)

    def linearised(self, masked: bool) -> tuple[_Stack, Rows]:
        slopes, kept, rhs = [], [], []
        for level, floor in enumerate(self.floors):
            a, slope = floor.activate(self.z[level])
            kept.append(self.kept(level, masked))
            slopes.append(kept[-1] * slope)
            shift = (self.z[level] - floor.weights.offset).flatten()
            rhs.append(kept[-1] * (slope * shift - a))
        shapes = self.top.like.shape, self.b.z.shape, self.b.g.shape
        stack = _Stack([f.weights for f in self.floors], slopes, kept, self.top, shapes)
        return stack, Rows(torch.cat(rhs), self.b.flat())

    def solve(self, gap: float) -> bool:
        exact, b = self.linearised(masked=True)
        target = max(ROUNDING, FORCING * min(gap, 1.0)) * math.sqrt(squared_norm(exact.adjoint(b)))
        self.v = cgls(exact, b, target, STEPS, fast=exact.to(torch.float32), start=self.v).x
        return True

    def account(self, rounds: int) -> Solution:
        exact, b = self.linearised(masked=False)
        test = rank_test(
            exact, self.v, cap=5 * STEPS, fast=exact.to(torch.float32), generator=self.generator
        )
        rest = exact.forward(self.v)
        rest.minus(b)
        residual = math.sqrt(rest.squared_norm() / b.squared_norm())
        spectrum = test.smallest_singular_value, test.largest_singular_value
        return Solution(self.v, residual, rounds, test.undetermined, *spectrum)


# --- dense linear algebra ---------------------------------------------------------------------


def _split_top(A: Tensor, b: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Least-norm answer of the deficient layer, and an orthonormal basis of what it leaves open."""
    gram = A.T @ A
    largest = math.sqrt(float(torch.linalg.matrix_norm(gram, 1)))
    shift = NULL * largest**2
    gram.diagonal().add_(shift)
    factor = torch.linalg.cholesky(gram)
    null = _null_space(A, factor, shift, largest, missing)
    x = torch.zeros_like(A[0])
    for _ in range(6):  # the shift slows each correction down only in directions that are dropped
        x = x + torch.cholesky_solve((A.T @ (b - A @ x))[:, None], factor)[:, 0]
        x = x - null @ (null.T @ x)
    return x, null


def _null_space(A: Tensor, factor: Tensor, shift: float, largest: float, missing: int) -> Tensor:
    """By filtering random vectors with ``(AᵀA + shift)⁻¹``, which damps all that A sees."""
    generator = torch.Generator().manual_seed(0)
    width = min(A.shape[1], int(1.3 * missing) + 32)
    while True:
        basis = torch.randn(A.shape[1], width, generator=generator, dtype=A.dtype).to(A.device)
        for _ in range(3):
            basis, _ = torch.linalg.qr(torch.cholesky_solve(basis, factor) * shift)
        found = Truncated.of(A @ basis, 10 * NULL, largest)
        if found.rank > 0 or width == A.shape[1]:
            orthonormal: Tensor = torch.linalg.qr(basis @ found.null.T).Q
            return orthonormal
        width = min(A.shape[1], 2 * width)


def _by_cholesky(A: Tensor, b: Tensor) -> Tensor | None:
    """Normal equations with column scaling, each correction taken against the true residual."""
    scale = A.norm(dim=0).clamp_min(1e-300)
    A = A / scale
    gram = A.T @ A
    gram.diagonal().add_(1e-13 * len(A))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return None
    x = torch.zeros_like(A[0])
    for _ in range(5):
        x = x + torch.cholesky_solve((A.T @ (b - A @ x))[:, None], factor)[:, 0]
    unscaled: Tensor = x / scale
    return unscaled

"""Several layers solved together, where one alone has too few equations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .activations import clamp_to_range, is_elementwise, undo
from .krylov import Rows, Run, cgls, open_share, ritz_values, squared_norm
from .systems import ROUNDING, LayerSystem, ScaledSystem

KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
ROUNDS = 60
DENSE = 6144  # unknowns up to which the joint system is written out as a matrix
LARGEST = 65_536  # unknowns up to which it is solved at all: every round is a long iteration
STEPS = 4000  # of conjugate gradients that one linearisation of a larger one may take
FORCING = 1e-6  # of the residual before it, to which the normal equations of a round are solved
DROPPED = 0.25  # share of the spare equations given up for units too near the kink to tell
SETTLED = 1e-9  # relative residual of a round that explains everything
NULL = 1e-9  # singular values below this share of the largest count as zero

Progress = Callable[[int, float], None]


@dataclass
class Floor:
    """One layer below the deficient one, and what leads from its output to the layer above.

    Attributes
    ----------
    name : str
        In the model, for reports.
    module : nn.Module
        Linear in its input, float64.
    input_shape : tuple of int
        Of one sample.
    above : list of nn.Module
        Activations and reshapes between its output and the input of the layer above.
    batch : int
        Number of samples.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    above: list[nn.Module] = field(default_factory=list)
    batch: int = 1

    @property
    def unknowns(self) -> int:
        """Entries of its input, over all samples."""
        return self.batch * math.prod(self.input_shape)

    @property
    def kinked(self) -> bool:
        """Whether an activation above has a slope that jumps."""
        return any(isinstance(m, KINKED) for m in self.above)

    def offset(self, like: Tensor) -> Tensor:
        """Output at zero: the bias, in the output's shape."""
        with torch.no_grad():
            z: Tensor = self.module(like.new_zeros(self.batch, *self.input_shape))
        return z

    def matrix(self, like: Tensor) -> Tensor:
        """Weight constraints as a dense matrix, ``(outputs, inputs)``, a block for each sample."""
        size = math.prod(self.input_shape)
        identity = torch.eye(size, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            rows = [
                self.module(part.reshape(-1, *self.input_shape)).flatten(1)
                for part in torch.split(identity, 256)
            ]
        one = (torch.cat(rows) - self.offset(like)[0].flatten()).T.contiguous()
        blocks: Tensor = torch.kron(torch.eye(self.batch, dtype=one.dtype, device=one.device), one)
        return blocks

    def through(self, x: Tensor) -> Tensor:
        """``W x + b``."""
        with torch.no_grad():
            z: Tensor = self.module(x)
        return z

    def activate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``σ(z)`` and ``σ'(z)``, both flat."""
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            a = leaf
            for module in self.above:
                a = module(a)
            (slope,) = torch.autograd.grad(a.sum(), leaf)
        return a.detach().flatten(), slope.flatten()

    def undo(self, a: Tensor) -> Tensor:
        """``z`` from ``a``, after moving ``a`` into the activations' range."""
        shapes = [self.offset(a)]
        for module in self.above:
            shapes.append(module(shapes[-1]))
        for module, before in zip(reversed(self.above), reversed(shapes[:-1]), strict=True):
            if is_elementwise(module):
                a = undo(module, self.name, clamp_to_range(module, a), 1e-12).inputs
            a = a.reshape(before.shape)
        return a


@dataclass(frozen=True)
class JointSolution:
    """Inputs of every floor, lowest first, and the account of the joint system.

    Attributes
    ----------
    inputs : tuple of Tensor
        Of the floors below, lowest first, then of the deficient layer.
    outputs : tuple of Tensor
        Of the floors below, lowest first.
    unknowns, equations : int
        Of the joint system.
    residual : float
        Relative, of the last round, nothing left out.
    smallest_singular_value, largest_singular_value : float
        Of the joint system at the answer.
    full_rank : bool
        Whether the joint system determines all its unknowns there.
    rounds : int
        How often it was linearised.
    converged : bool
        Whether the rounds ended with every equation satisfied.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    unknowns: int
    equations: int
    residual: float
    smallest_singular_value: float
    largest_singular_value: float
    full_rank: bool
    rounds: int
    converged: bool


def spare_equations(floors: Sequence[Floor], missing: int) -> int:
    """Equations that the floors below have beyond their own unknowns and the ``missing`` ones."""
    zero = torch.zeros((), dtype=torch.float64)
    return sum(f.offset(zero).numel() - f.unknowns for f in floors) - missing


def solve(
    floors: Sequence[Floor],
    top: LayerSystem,
    right_hand_side: Rows,
    missing: int,
    *,
    tolerance: float = SETTLED,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> JointSolution:
    r""":math:`\sigma(W_l x_l + b_l) = x_{l+1}` below, :math:`x_{\min} + N c` above.

    A layer that lacks equations borrows from the layers below it: what they put out lives in
    the range of ``W``, which has fewer dimensions than entries ("virtual constraints"). The
    deficient layer's input is its least-norm answer plus an unknown part ``N c`` of its null
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
    top : LayerSystem
        Of the layer that lacks equations.
    right_hand_side : Rows
        Of ``top``, from its :meth:`~gradinv_edu.systems.LayerSystem.right_hand_side`.
    missing : int
        About how many dimensions ``top`` leaves open.
    tolerance : float
        Relative residual that the noise of the right-hand side allows, for rounds that get no
        further.
    progress : callable, optional
        Called with the round and its relative residual.
    generator : torch.Generator, optional
        Of the random starts; a fixed one by default.

    Returns
    -------
    JointSolution
        Of use only where ``converged`` and ``full_rank``.

    Notes
    -----
    Virtual constraints: Zhu and Blaschko (2021). Solving them together, and the masking of
    near-kink rows, are this project's.
    """
    problem: _Problem
    if max(sum(f.unknowns for f in floors) + missing, top.unknowns) <= DENSE:
        problem = _Dense(floors, top, right_hand_side, missing)
    else:
        problem = _MatrixFree(floors, top, right_hand_side, missing, generator)
    rounds, converged = problem.settle(tolerance, progress)
    account = problem.account()
    return JointSolution(
        inputs=tuple(problem.inputs()),
        outputs=tuple(problem.z),
        unknowns=problem.unknowns,
        equations=problem.equations,
        residual=account.residual,
        smallest_singular_value=account.smallest,
        largest_singular_value=account.largest,
        full_rank=account.full_rank,
        rounds=rounds,
        converged=converged,
    )


@dataclass(frozen=True)
class _Account:
    residual: float
    smallest: float
    largest: float
    full_rank: bool


def _split_top(top: LayerSystem, b: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Least-norm answer of the deficient layer, and an orthonormal basis of what it leaves open."""
    A = top.to_dense(scaled=True)
    gram = A.T @ A
    largest = math.sqrt(float(torch.linalg.matrix_norm(gram, 1)))
    shift = NULL * largest**2
    factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram), device=b.device).to(b))
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
        _, seen, V = torch.linalg.svd(A @ basis, full_matrices=False)
        open_ = seen < 10 * NULL * largest
        if not bool(open_.all()) or width == A.shape[1]:
            null: Tensor = basis @ V.T[:, open_]
            orthonormal: Tensor = torch.linalg.qr(null).Q
            return orthonormal
        width = min(A.shape[1], 2 * width)


class _Problem:
    """The equations of all floors, linearised at ``z`` and solved until they hold."""

    unknowns: int
    equations: int
    spare: int

    def __init__(self, floors: Sequence[Floor], top: LayerSystem) -> None:
        self.floors, self.top_shape = list(floors), tuple(top.input_shape)
        self.kinked = any(f.kinked for f in floors)
        self.z: list[Tensor] = []
        self.share = DROPPED

    def inputs(self) -> list[Tensor]:
        """Input of every floor, then of the deficient layer."""
        raise NotImplementedError

    def solve(self, gap: float) -> bool:
        """Solve the equations linearised at ``z``; whether they determined their unknowns."""
        raise NotImplementedError

    def account(self) -> _Account:
        """Residual, rank and singular values at the answer, nothing left out."""
        raise NotImplementedError

    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        """Least-squares input of one floor."""
        raise NotImplementedError

    def first_outputs(self, above: Tensor) -> list[Tensor]:
        """Outputs of the floors under the least-norm answer, each undone from the one above."""
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.floors))):
            floor = self.floors[level]
            z = floor.undo(above)
            outputs.insert(0, z)
            if level:
                x = self.least_squares(level, z - floor.offset(z))
                above = x.reshape(-1, *floor.input_shape)
        return outputs

    @property
    def dropped(self) -> int:
        return int(self.share * max(self.spare, 0) / len(self.floors))

    def kept(self, level: int) -> Tensor:
        """1 for the rows of a floor that are used, 0 for those nearest to the kink."""
        mask = torch.ones_like(self.z[level]).flatten()
        if self.floors[level].kinked:
            mask[self.z[level].abs().flatten().topk(self.dropped, largest=False).indices] = 0.0
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
        inputs = self.inputs()
        gap, size, changed = 0.0, 0.0, 0
        outputs = []
        for level, floor in enumerate(self.floors):
            through = floor.through(inputs[level])
            a, _ = floor.activate(through)
            gap += float((a - inputs[level + 1].flatten()).square().sum())
            size += float(inputs[level + 1].square().sum())
            z = floor.undo(inputs[level + 1]) if floor.kinked else through
            changed += int(((z > 0) != (self.z[level] > 0)).sum())
            outputs.append(z)
        self.z = outputs
        return math.sqrt(gap / max(size, 1e-300)), changed


class _Dense(_Problem):
    """Written out, in the unknowns ``(x_1, …, x_m, c)`` end to end."""

    def __init__(
        self, floors: Sequence[Floor], top: LayerSystem, right_hand_side: Rows, missing: int
    ) -> None:
        super().__init__(floors, top)
        self.least, self.null = _split_top(top, right_hand_side.flat(), missing)
        self.matrices = [f.matrix(self.least) for f in self.floors]
        self.offsets = [f.offset(self.least) for f in self.floors]
        self.sizes = [f.unknowns for f in self.floors] + [self.null.shape[1]]
        self.unknowns, self.equations = sum(self.sizes), sum(len(W) for W in self.matrices)
        self.spare = self.equations - self.unknowns
        self.v = self.least.new_zeros(self.unknowns)
        self.z = self.first_outputs(self.least.reshape(-1, *self.top_shape))

    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        answer: Tensor = torch.linalg.lstsq(self.matrices[level], rows.reshape(-1, 1)).solution
        return answer

    def inputs(self) -> list[Tensor]:
        *parts, c = torch.split(self.v, self.sizes)
        shaped = [p.reshape(-1, *f.input_shape) for p, f in zip(parts, self.floors, strict=True)]
        return [*shaped, (self.least + self.null @ c).reshape(-1, *self.top_shape)]

    def solve(self, gap: float) -> bool:
        answer = _least_squares(*self.linearised(masked=True))
        if answer is not None:
            self.v = answer
        return answer is not None

    def account(self) -> _Account:
        A, b = self.linearised(masked=False)
        smallest, largest = _extreme_singular_values(A)
        residual = float((A @ self.v - b).norm() / b.norm())
        return _Account(residual, smallest, largest, smallest > NULL * largest)

    def linearised(self, masked: bool) -> tuple[Tensor, Tensor]:
        r"""Rows :math:`\sigma'(z)(W x_l + b - z) + \sigma(z) - x_{l+1} = 0` at present ``z``."""
        rows, rhs, left = [], [], 0
        for level, (floor, W) in enumerate(zip(self.floors, self.matrices, strict=True)):
            z = self.z[level]
            a, slope = floor.activate(z)
            row = W.new_zeros(len(W), len(self.v))
            row[:, left : left + W.shape[1]] = slope[:, None] * W
            right = slope * (z - self.offsets[level]).flatten() - a
            left += W.shape[1]
            if level + 1 < len(self.floors):
                width = self.sizes[level + 1]
                row[:, left : left + width] = -torch.eye(len(W), dtype=W.dtype, device=W.device)
            else:
                row[:, left:] = -self.null
                right = right + self.least
            if masked:
                kept = self.kept(level)
                row, right = kept[:, None] * row, kept * right
            rows.append(row)
            rhs.append(right)
        return torch.cat(rows), torch.cat(rhs)


@dataclass
class _Link:
    """One floor as it enters the linearised map: its adjoint comes from a graph built once."""

    floor: Floor
    slope: Tensor  # of the activation, times the mask
    kept: Tensor

    def __post_init__(self) -> None:
        dtype, floor = self.slope.dtype, self.floor
        self.module = copy.deepcopy(floor.module).to(dtype).requires_grad_(False)
        shape = (floor.batch, *floor.input_shape)
        with torch.enable_grad():
            self.leaf = self.slope.new_zeros(shape).requires_grad_()
            self.out = self.module(self.leaf)
        self.offset = self.out.detach()

    def to(self, dtype: torch.dtype) -> _Link:
        return _Link(self.floor, self.slope.to(dtype), self.kept.to(dtype))

    def rows(self, x: Tensor, above: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = self.module(x.reshape(self.leaf.shape)) - self.offset
        return self.slope * z.flatten() - self.kept * above

    def pull(self, r: Tensor) -> Tensor:
        k = (self.slope * r).reshape(self.out.shape)
        (x,) = torch.autograd.grad(self.out, self.leaf, k, retain_graph=True)
        return x.flatten()


@dataclass
class _Stack:
    """All floors and the deficient layer, as one map of ``(x_1, …, x_m, x_top)`` end to end."""

    links: list[_Link]
    top: ScaledSystem
    top_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.sizes = [link.leaf.numel() for link in self.links]
        self.sizes.append(len(self.links[0].leaf) * math.prod(self.top_shape))
        self.heights = [link.out.numel() for link in self.links]

    def forward(self, v: Tensor) -> Rows:
        parts = torch.split(v, self.sizes)
        rows = [link.rows(*parts[i : i + 2]) for i, link in enumerate(self.links)]
        top = self.top.forward(parts[-1].reshape(-1, *self.top_shape)).flat()
        return Rows(torch.cat(rows), top)

    def adjoint(self, r: Rows) -> Tensor:
        parts = torch.split(r.z, self.heights)
        pulled = [link.pull(part) for link, part in zip(self.links, parts, strict=True)]
        pulled.append(self.top.adjoint(self._top_rows(r.g)).flatten())
        for i, (link, part) in enumerate(zip(self.links, parts, strict=True)):
            pulled[i + 1] = pulled[i + 1] - link.kept * part
        return torch.cat(pulled)

    def _top_rows(self, flat: Tensor) -> Rows:
        system = self.top.system
        z, g = torch.split(flat, [system.k.numel(), system.gradient_shape.numel()])
        return Rows(z.reshape(system.k.shape), g.reshape(system.gradient_shape))


class _MatrixFree(_Problem):
    """Nothing written out; the deficient layer's whole input is unknown, its equations are rows."""

    def __init__(
        self,
        floors: Sequence[Floor],
        top: LayerSystem,
        right_hand_side: Rows,
        missing: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(floors, top)
        self.top, self.b, self.generator = top, right_hand_side, generator
        self.unknowns = sum(f.unknowns for f in floors) + top.unknowns
        self.spare = spare_equations(floors, missing)
        self.equations = self.unknowns + self.spare
        self.systems = [ScaledSystem(top, d) for d in (torch.float64, torch.float32)]
        least = self._least(top, right_hand_side)
        self.z = self.first_outputs(least)
        self.v = torch.cat([*(least.new_zeros(f.unknowns) for f in floors), least.flatten()])
        self.run: Run | None = None

    def _least(self, top: LayerSystem, b: Rows) -> Tensor:
        exact, fast = self.systems
        target = ROUNDING * math.sqrt(squared_norm(exact.adjoint(b)))
        return cgls(exact, b, target, STEPS, fast=fast).x

    def least_squares(self, level: int, rows: Tensor) -> Tensor:
        floor = self.floors[level]
        system = LayerSystem(floor.module, rows, floor.input_shape, constraints="weight")
        return system.solve(rows + floor.offset(rows), None, generator=self.generator).inputs

    def inputs(self) -> list[Tensor]:
        *parts, top = torch.split(self.v, [f.unknowns for f in self.floors] + [self.top.unknowns])
        shaped = [p.reshape(-1, *f.input_shape) for p, f in zip(parts, self.floors, strict=True)]
        return [*shaped, top.reshape(-1, *self.top_shape)]

    def _linearised(self, masked: bool) -> tuple[_Stack, _Stack, Rows]:
        links, rhs = [], []
        for level, floor in enumerate(self.floors):
            z = self.z[level]
            a, slope = floor.activate(z)
            kept = self.kept(level) if masked else torch.ones_like(a)
            links.append(_Link(floor, kept * slope, kept))
            rhs.append(kept * (slope * (z - links[-1].offset).flatten() - a))
        exact = _Stack(links, self.systems[0], self.top_shape)
        single = [link.to(torch.float32) for link in links]
        fast = _Stack(single, self.systems[1], self.top_shape, torch.float32)
        return exact, fast, Rows(torch.cat(rhs), self.b.flat())

    def solve(self, gap: float) -> bool:
        exact, fast, b = self._linearised(masked=True)
        size = math.sqrt(squared_norm(exact.adjoint(b)))
        target = max(ROUNDING, FORCING * min(gap, 1.0)) * size
        self.run = cgls(exact, b, target, STEPS, fast=fast, start=self.v)
        self.v = self.run.x
        return True

    def account(self) -> _Account:
        exact, fast, b = self._linearised(masked=False)
        generator = self.generator or torch.Generator(self.v.device).manual_seed(20180502)
        dye = torch.randn(
            len(self.v), generator=generator, dtype=torch.float64, device=generator.device
        )
        left, washed = open_share(exact, dye.to(self.v.device), 5 * STEPS, fast=fast)
        smallest, largest = ritz_values(washed.alphas, washed.betas)
        rest = exact.forward(self.v)
        rest.minus(b)
        residual = math.sqrt(rest.squared_norm() / b.squared_norm())
        return _Account(residual, smallest, largest, left == 0.0)


def _least_squares(A: Tensor, b: Tensor) -> Tensor | None:
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


def _extreme_singular_values(A: Tensor) -> tuple[float, float]:
    """By (inverse) power iteration on the normal equations."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(A.shape[1], generator=generator, dtype=A.dtype).to(A.device)
    gram = A.T @ A
    v = start / start.norm()
    for _ in range(30):
        v = gram @ v
        v = v / v.norm()
    largest = float((A @ v).norm())
    gram.diagonal().add_(1e-14 * largest**2)
    factor = torch.linalg.cholesky(gram + 1e-14 * largest**2 * torch.eye(len(gram)).to(gram))
    v = start / start.norm()
    for _ in range(10):
        v = torch.cholesky_solve(v[:, None], factor)[:, 0]
        v = v / v.norm()
    return float((A @ v).norm()), largest

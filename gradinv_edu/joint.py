"""Several layers solved together, where one alone has too few equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .activations import clamp_to_range, is_elementwise, undo
from .krylov import Rows
from .systems import LayerSystem

KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
ROUNDS = 60
LARGEST = 6144  # unknowns up to which the joint system is solved, as a dense matrix
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
) -> JointSolution:
    r""":math:`\sigma(W_l x_l + b_l) = x_{l+1}` below, :math:`x_{\min} + N c` above.

    A layer that lacks equations borrows from the layers below it: what they put out lives in
    the range of ``W``, which has fewer dimensions than entries ("virtual constraints"). The
    deficient layer's input is its least-norm answer plus an unknown part ``N c`` of its null
    space; the activations are linearised at the present answer and everything is solved again.
    With kinked activations (ReLU, leaky ReLU) each round decides anew which side of the kink a
    unit is on, and the units nearest to it are left out: **a row that may be wrong is masked,
    not guessed**. Implements :eq:`joint-system`.

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

    Returns
    -------
    JointSolution
        Of use only where ``converged`` and ``full_rank``.

    Notes
    -----
    Virtual constraints: Zhu and Blaschko (2021). Solving them together, and the masking of
    near-kink rows, are this project's.
    """
    least, null = _split_top(top, right_hand_side.flat(), missing)
    problem = _Problem(list(floors), least, null, tuple(top.input_shape))
    rounds, converged = problem.settle(tolerance, progress)
    A, b = problem.linearised(masked=False)
    smallest, largest = _extreme_singular_values(A)
    return JointSolution(
        inputs=tuple(problem.inputs()),
        outputs=tuple(problem.z),
        unknowns=A.shape[1],
        equations=A.shape[0],
        residual=float((A @ problem.v - b).norm() / b.norm()),
        smallest_singular_value=smallest,
        largest_singular_value=largest,
        full_rank=smallest > NULL * largest,
        rounds=rounds,
        converged=converged,
    )


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
    """The linearised equations of all floors, in the unknowns ``(x_1, …, x_m, c)`` end to end."""

    def __init__(
        self, floors: list[Floor], least: Tensor, null: Tensor, top_shape: tuple[int, ...]
    ) -> None:
        self.floors, self.least, self.null, self.top_shape = floors, least, null, top_shape
        self.matrices = [f.matrix(least) for f in floors]
        self.offsets = [f.offset(least) for f in floors]
        self.sizes = [f.unknowns for f in floors] + [null.shape[1]]
        self.v = least.new_zeros(sum(self.sizes))
        self.spare = sum(len(W) for W in self.matrices) - len(self.v)
        self.kinked = any(f.kinked for f in floors)
        self.z = self._first_outputs()

    def _first_outputs(self) -> list[Tensor]:
        """Outputs of the floors under the least-norm answer, each undone from the one above."""
        above = self.least.reshape(-1, *self.top_shape)
        outputs: list[Tensor] = []
        for floor, W, offset in zip(
            reversed(self.floors), reversed(self.matrices), reversed(self.offsets), strict=True
        ):
            z = floor.undo(above)
            outputs.insert(0, z)
            if floor is not self.floors[0]:
                x = torch.linalg.lstsq(W, (z - offset).reshape(-1, 1)).solution
                above = x.reshape(-1, *floor.input_shape)
        return outputs

    def inputs(self) -> list[Tensor]:
        """Input of every floor, then of the deficient layer."""
        *parts, c = torch.split(self.v, self.sizes)
        shaped = [p.reshape(-1, *f.input_shape) for p, f in zip(parts, self.floors, strict=True)]
        return [*shaped, (self.least + self.null @ c).reshape(-1, *self.top_shape)]

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
            if masked and floor.kinked:
                nearest = z.abs().flatten().topk(self.dropped, largest=False).indices
                row[nearest], right[nearest] = 0.0, 0.0
            rows.append(row)
            rhs.append(right)
        return torch.cat(rows), torch.cat(rhs)

    @property
    def dropped(self) -> int:
        return int(DROPPED * max(self.spare, 0) / len(self.floors))

    def settle(self, tolerance: float, progress: Progress | None) -> tuple[int, bool]:
        """Linearise and solve until every equation holds, or it stops getting anywhere."""
        best, stalls, residual = math.inf, 0, math.inf
        for turn in range(1, ROUNDS + 1):
            step = _least_squares(*self.linearised(masked=True))
            if step is None:  # what is left of the rows no longer determines the unknowns
                return turn, False
            self.v = step
            residual, changed = self._move()
            if progress is not None:
                progress(turn, residual)
            if residual < SETTLED:
                return turn, True
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
            through = self.offsets[level] + (
                self.matrices[level] @ inputs[level].flatten()
            ).reshape(self.z[level].shape)
            a, _ = floor.activate(through)
            gap += float((a - inputs[level + 1].flatten()).square().sum())
            size += float(inputs[level + 1].square().sum())
            z = floor.undo(inputs[level + 1]) if floor.kinked else through
            changed += int(((z > 0) != (self.z[level] > 0)).sum())
            outputs.append(z)
        self.z = outputs
        return math.sqrt(gap / max(size, 1e-300)), changed


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

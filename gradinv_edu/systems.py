"""A layer linear in its input, as a system of linear equations that is never written out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from . import checks
from .errors import InvalidArgumentError, InvalidTensorError, UnsupportedLayerError
from .krylov import Progress, Rows, Run, cgls, open_share, ritz_values

DENSE_UNKNOWNS = 512  # below this an SVD is cheaper than one doubt about the rank
RANK_TOLERANCE = 1e-10  # singular values below this share of the largest count as zero
ROUNDING = 2e-15  # normal-equation residual, relative, at which float64 has nothing left to give
BALANCE = 0.1  # of the mean eigenvalue, added before filters are made alike: noise stays below it


class Operator(Protocol):
    """The two sets of equations as one linear map and its adjoint."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        ...

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        ...

    def to(self, dtype: torch.dtype) -> Operator:
        """Return the same map in another precision."""
        ...


@dataclass(frozen=True)
class ConvolutionOperator:
    """Direct calls for a convolution: both sets of equations are convolutions themselves."""

    weight: Tensor
    k: Tensor
    template: Tensor
    geometry: tuple[list[int], list[int], list[int], int]

    def _backward(self, k: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> list[Tensor]:
        stride, padding, dilation, groups = self.geometry
        none = [0] * len(stride)
        return list(
            torch.ops.aten.convolution_backward(
                k, x, weight, None, stride, padding, dilation, False, none, groups, mask
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        stride, padding, dilation, groups = self.geometry
        rows = torch.ops.aten.convolution(
            x, self.weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return rows, self._backward(self.k, x, self.weight, [False, True, False])[1]

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        wanted = [True, False, False]
        from_rows = self._backward(rows, self.template, self.weight, wanted)[0]
        return from_rows + self._backward(self.k, self.template, gradient_rows, wanted)[0]

    def to(self, dtype: torch.dtype) -> ConvolutionOperator:
        """Return the same map in another precision."""
        return replace(
            self,
            weight=self.weight.to(dtype),
            k=self.k.to(dtype),
            template=self.template.to(dtype),
        )


@dataclass(frozen=True)
class LinearOperator:
    """Direct calls for a dense layer on vectors."""

    weight: Tensor
    k: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        return x @ self.weight.T, self.k.T @ x

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        return rows @ self.weight + self.k @ gradient_rows

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the same map in another precision."""
        return LinearOperator(self.weight.to(dtype), self.k.to(dtype))


class ModuleOperator:
    """Any module affine in its input: the adjoints come from automatic differentiation."""

    def __init__(self, module: nn.Module, k: Tensor, input_shape: tuple[int, ...]) -> None:
        self.module, self.k = module, k
        self.zero = k.new_zeros(k.shape[0], *input_shape)
        everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.constants = {
            name: value.detach().to(k.dtype) if value.is_floating_point() else value
            for name, value in everything.items()
        }
        self.weights = {name: self.constants[name] for name in weight_names(module)}
        self.offset = self._call(self.weights, self.zero)
        self.gradient_offset = self._weight_pull(self.zero)

    def _call(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(self.module, {**self.constants, **weights}, (x,))
        return output

    def _weight_pull(self, x: Tensor) -> Tensor:
        if not self.weights:
            return self.k.new_zeros(0)
        pull = vjp(lambda weights: self._call(weights, x), self.weights)[1]
        return pack(pull(self.k)[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows and gradient rows of ``x``."""
        rows = self._call(self.weights, x) - self.offset
        return rows, self._weight_pull(x) - self.gradient_offset

    def adjoint(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        """Both kinds of rows, pulled back to the input."""
        pull = vjp(lambda x: self._call(self.weights, x), self.zero)[1]
        from_rows: Tensor = pull(rows)[0]
        if not self.weights:
            return from_rows
        # What the gradient rows are made of is affine in x; its derivative's adjoint, at zero.
        from_gradient: Tensor = vjp(self._weight_pull, self.zero)[1](gradient_rows)[0]
        return from_rows + from_gradient

    def to(self, dtype: torch.dtype) -> ModuleOperator:
        """Return the same map in another precision."""
        return ModuleOperator(self.module, self.k.to(dtype), tuple(self.zero.shape[1:]))


def weight_names(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient depends on the input: every one but the biases."""
    return [name for name, _ in module.named_parameters() if name.split(".")[-1] != "bias"]


def pack(gradients: Mapping[str, Tensor]) -> Tensor:
    """One tensor for a module's weight gradients: as it is for one weight, else end to end."""
    tensors = list(gradients.values())
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _geometry(module: nn.Module) -> tuple[list[int], list[int], list[int], int] | None:
    # A subclass may have a forward pass of its own (weight norm, for one): exact types only.
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if module.padding_mode != "zeros":
        return None
    spans = [d * (s - 1) for d, s in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same":
        if any(span % 2 for span in spans):  # padded on one side only: left to the module itself
            return None
        padding = [span // 2 for span in spans]
    else:
        padding = (
            [0] * len(spans) if module.padding == "valid" else [int(p) for p in module.padding]
        )
    return list(module.stride), padding, list(module.dilation), module.groups


def operator(module: nn.Module, k: Tensor, input_shape: tuple[int, ...]) -> Operator:
    """Both sets of equations of ``module`` as a linear map, by the fastest calls that serve it."""
    geometry = _geometry(module)
    if geometry is not None:
        template = k.new_zeros(k.shape[0], *input_shape)
        assert isinstance(module.weight, Tensor)
        return ConvolutionOperator(module.weight.detach().to(k.dtype), k, template, geometry)
    if type(module) is nn.Linear and len(input_shape) == 1:
        return LinearOperator(module.weight.detach().to(k.dtype), k)
    return ModuleOperator(module, k, input_shape)


@dataclass(frozen=True)
class LayerSolution:
    """What solving one layer's equations gave, and whether it may be believed.

    Attributes
    ----------
    inputs : Tensor
        The least-squares answer, float64, ``(N, *input_shape)``; of least norm (to 1e-6) where
        the equations leave part of it open.
    residual : float
        Norm of what the answer leaves unexplained, relative to the right-hand side, with the
        row scaling of :eq:`row-scaling`. Small is necessary, not sufficient.
    iterations : int
        Applications of the system and its adjoint; 0 where a dense factorisation was cheaper.
    full_rank : bool
        Whether the equations determine every entry of the input.
    undetermined : float
        Share of the input space that they leave open: exact for small systems, else estimated
        from what is left of a random start.
    smallest_singular_value, largest_singular_value : float
        Of the row-scaled system, over the determined part; Ritz estimates where matrix-free.
    converged : bool
        Whether the iteration reached rounding level before its cap.
    """

    inputs: Tensor
    residual: float
    iterations: int
    full_rank: bool
    undetermined: float
    smallest_singular_value: float
    largest_singular_value: float
    converged: bool = True


class LayerSystem:
    r""":math:`W x = z - b,\; w_k K x = w_k\,\partial L/\partial W`.

    All that a server knows of the input ``x`` of a layer ``z = W·x + b``: the *weight
    constraints* ``W·x = z − b`` and the *gradient constraints* ``K x = ∂L/∂W``, where
    ``K x = Σ_p k_p ⊗ patch_p(x)`` and ``k = ∂L/∂z``. For a batch each sample keeps its own
    weight constraints, and all share the summed gradient constraints.
    Implements :eq:`weight-constraints`, :eq:`gradient-constraints`, :eq:`row-scaling` and
    :eq:`masked-rows`.

    Parameters
    ----------
    module : nn.Module
        Affine in its input: linear, convolution (any stride, padding, dilation, groups),
        average pooling, batch norm in eval mode, or a sequence of such.
    output_gradient : Tensor
        ``k``, shape ``(N, *output_shape)`` or ``output_shape`` for one sample.
    input_shape : tuple of int
        Shape of one input, without the batch dimension.
    row_mask : Tensor, optional
        Shaped as ``output_gradient``: 0 leaves a weight constraint out, 1 keeps it; values
        between weigh it.
    gradient_mask : Tensor, optional
        Shaped as the weight, likewise for the gradient constraints.
    constraints : {"both", "weight", "gradient"}
        Which set to use; one alone for study ("gradient" is what R-CONV solves).

    Raises
    ------
    InvalidTensorError
        If a tensor has the wrong shape or type or holds NaN or infinite entries.
    UnsupportedLayerError
        If the module is not affine in its input.

    Notes
    -----
    Source: Zhu and Blaschko (2021) for the equations; masks, row scaling and the matrix-free
    form are this project's.
    """

    def __init__(
        self,
        module: nn.Module,
        output_gradient: Tensor,
        input_shape: tuple[int, ...],
        row_mask: Tensor | None = None,
        gradient_mask: Tensor | None = None,
        *,
        constraints: str = "both",
    ) -> None:
        if constraints not in ("both", "weight", "gradient"):
            raise InvalidArgumentError(
                f'constraints is "both", "weight" or "gradient", not {constraints!r}.'
            )
        k = checks.finite(output_gradient, "output_gradient")
        self.input_shape = tuple(input_shape)
        output_shape, self.offset = _affine(module, self.input_shape, k)
        k = k.unsqueeze(0) if k.shape == output_shape else k
        if k.shape[1:] != output_shape:
            raise InvalidTensorError(
                f"output_gradient has shape {tuple(k.shape)}, but the layer turns "
                f"{self.input_shape} into {tuple(output_shape)}: expected "
                f"({', '.join(['N', *map(str, output_shape)])})."
            )
        self.module, self.k, self.constraints = module, k, constraints
        self.operator = operator(module, k, self.input_shape)
        parameters = dict(module.named_parameters())
        shapes = {name: parameters[name].detach() for name in weight_names(module)}
        self.gradient_shape = pack(shapes).shape if shapes else torch.Size([0])
        self.row_mask = self._mask(row_mask, k.shape, "row_mask", constraints != "gradient")
        self.gradient_mask = self._mask(
            gradient_mask, self.gradient_shape, "gradient_mask", constraints != "weight"
        )
        self.gradient_scale = _row_scale(shapes, k)
        self.balance = _balance(self.operator, self.row_mask, self.gradient_mask)

    def _mask(self, mask: Tensor | None, shape: torch.Size, name: str, used: bool) -> Tensor | None:
        if not used:
            return self.k.new_zeros(shape)
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = mask.to(torch.float64)
        mask = mask.unsqueeze(0) if mask.shape == shape[1:] and name == "row_mask" else mask
        return checks.shaped(mask, name, tuple(shape))

    @property
    def unknowns(self) -> int:
        """Number of unknowns: entries of the input, over all samples."""
        return self.k.shape[0] * math.prod(self.input_shape)

    @property
    def weight_equations(self) -> int:
        """Number of weight constraints that the mask leaves."""
        return self.k.numel() if self.row_mask is None else int((self.row_mask != 0).sum())

    @property
    def gradient_equations(self) -> int:
        """Number of gradient constraints that the mask leaves."""
        full = self.gradient_shape.numel()
        return full if self.gradient_mask is None else int((self.gradient_mask != 0).sum())

    def matvec(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`x \mapsto (W x,\; K x)`, both masked, neither scaled.

        Parameters
        ----------
        x : Tensor
            ``(N, *input_shape)``, float64.

        Returns
        -------
        tuple of Tensor
            Rows ``(N, *output_shape)`` and gradient rows shaped as the weight.
        """
        rows, gradient_rows = self.operator.forward(x)
        return _times(self.row_mask, rows), _times(self.gradient_mask, gradient_rows)

    def rmatvec(self, rows: Tensor, gradient_rows: Tensor) -> Tensor:
        r""":math:`(r, g) \mapsto W^\top r + K^\top g`, the adjoint of :meth:`matvec`.

        Parameters
        ----------
        rows, gradient_rows : Tensor
            Shaped as :meth:`matvec` returns them.

        Returns
        -------
        Tensor
            ``(N, *input_shape)``.
        """
        return self.operator.adjoint(
            _times(self.row_mask, rows), _times(self.gradient_mask, gradient_rows)
        )

    def to_dense(self, scaled: bool = False) -> Tensor:
        """Matrix of :meth:`matvec`, ``(equations, unknowns)``; for small systems and for tests.

        Parameters
        ----------
        scaled : bool
            Whether as it is solved: rows scaled (:eq:`row-scaling`) and filters balanced
            (:eq:`filter-balance`).
        """
        solved = ScaledSystem(self)
        rows = solved.forward if scaled else lambda x: Rows(*self.matvec(x))
        identity = torch.eye(self.unknowns, dtype=torch.float64, device=self.k.device)
        shape = (self.k.shape[0], *self.input_shape)
        return torch.stack([rows(unit.reshape(shape)).flat() for unit in identity], dim=1)

    def right_hand_side(self, outputs: Tensor | None, weight_gradient: Tensor | None) -> Rows:
        """Right-hand side, masked and scaled, from ``z`` and ``∂L/∂W``; zero for one not given."""
        z = self.k.new_zeros(self.k.shape)
        if outputs is not None and self.constraints != "gradient":
            given = _given(outputs, "outputs", self.k.shape, self.row_mask)
            z = _times(self.row_mask, given - self.offset)
        g = self.k.new_zeros(self.gradient_shape)
        if weight_gradient is not None and self.constraints != "weight" and g.numel():
            given = _given(weight_gradient, "weight_gradient", g.shape, self.gradient_mask)
            g = _times(self.gradient_mask, given - self._gradient_offset())
        g = self.gradient_scale * _mix(self.balance.gradient, g, 0)
        return Rows(_mix(self.balance.rows, z, 1), g)

    def _gradient_offset(self) -> Tensor | float:
        known = isinstance(self.operator, ModuleOperator)
        return self.operator.gradient_offset if known else 0.0  # type: ignore[attr-defined]

    def solve(
        self,
        outputs: Tensor | None,
        weight_gradient: Tensor | None,
        *,
        max_iterations: int | None = None,
        progress: Progress | None = None,
        generator: torch.Generator | None = None,
        dense: bool | None = None,
        noise: float = 0.0,
    ) -> LayerSolution:
        r""":math:`\hat x = \arg\min_x \lVert Wx - z + b\rVert^2 + w_k^2\lVert Kx - G\rVert^2`.

        ``G`` is the weight gradient ``∂L/∂W``.
        Small systems by SVD; larger ones by conjugate gradients on the normal equations
        (:eq:`normal-equations`), in float32 with float64 corrections, from a random start:
        what the equations do not determine keeps the colour of the start, and so gives
        itself away.

        Parameters
        ----------
        outputs : Tensor or None
            ``z`` (bias included), shaped as the output gradient; entries under a zero mask are
            ignored. None only where ``constraints="gradient"``.
        weight_gradient : Tensor or None
            ``∂L/∂W``, shaped as the weight, likewise; several weights as :func:`pack` joins
            them. None where the module has no weight or ``constraints="weight"``.
        max_iterations : int, optional
            Cap over all rounds; by default ``10 000 + 4 √unknowns``.
        progress : callable, optional
            Called with iterations done and the normal-equation residual.
        generator : torch.Generator, optional
            Of the random start; a fixed one by default.
        dense : bool, optional
            Force or forbid the SVD; by default it serves up to 512 unknowns.
        noise : float
            Relative noise of the right-hand side, such as the rounding of float32 gradients:
            iterations that would only fit this noise are not spent.

        Returns
        -------
        LayerSolution

        Raises
        ------
        InvalidTensorError
            If a right-hand side has the wrong shape or holds NaN or infinite entries.
        """
        needed = {
            "outputs": outputs is not None or self.constraints == "gradient",
            "weight_gradient": weight_gradient is not None
            or self.constraints == "weight"
            or not self.gradient_shape.numel(),
        }
        if missing := [name for name, there in needed.items() if not there]:
            raise InvalidTensorError(
                f"{missing[0]} is None, but its equations are in the system; to solve without "
                'them, build it with constraints="weight" or "gradient".'
            )
        b = self.right_hand_side(outputs, weight_gradient)
        if dense if dense is not None else self.unknowns <= DENSE_UNKNOWNS:
            return self._solve_dense(b)
        cap = max_iterations or 10_000 + 4 * math.isqrt(self.unknowns)
        return _solve_iteratively(self, b, cap, progress, generator, noise)

    def _solve_dense(self, b: Rows) -> LayerSolution:
        A = self.to_dense(scaled=True)
        rhs = b.flat()
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        largest = float(S[0])
        rank = int((largest * RANK_TOLERANCE < S).sum()) if largest > 0 else 0
        inverse = (Vh[:rank].T / S[:rank]) @ U[:, :rank].T
        x = inverse @ rhs
        x = x + inverse @ (rhs - A @ x)  # one refinement: the SVD's own rounding
        shape = (self.k.shape[0], *self.input_shape)
        return LayerSolution(
            inputs=x.reshape(shape),
            residual=_ratio(float((rhs - A @ x).norm()), float(rhs.norm())),
            iterations=0,
            full_rank=rank == self.unknowns,
            undetermined=1 - rank / self.unknowns,
            smallest_singular_value=float(S[rank - 1]) if rank else 0.0,
            largest_singular_value=largest,
        )


@dataclass(frozen=True)
class Balance:
    """What makes the filters of a convolution alike, where no mask tells their entries apart.

    Attributes
    ----------
    rows, gradient : Tensor or None
        ``S`` and ``T``, ``(filters, filters)``, for weight and gradient rows.
    """

    rows: Tensor | None = None
    gradient: Tensor | None = None


class ScaledSystem:
    r""":math:`A = \bigl(S W;\; w_k\, T K\bigr)`, masked.

    The map that is solved, in one precision. Implements :eq:`filter-balance`.

    Parameters
    ----------
    system : LayerSystem
        The layer's equations.
    dtype : torch.dtype
        Precision to compute in.
    """

    def __init__(self, system: LayerSystem, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, self.system = dtype, system
        self.operator = _scaled(system).to(dtype)
        self.row_mask = None if system.row_mask is None else system.row_mask.to(dtype)
        mask = system.gradient_mask
        self.gradient_mask = None if mask is None else mask.to(dtype)

    def forward(self, x: Tensor) -> Rows:
        """Masked and scaled rows of ``x``."""
        z, g = self.operator.forward(x)
        return Rows(_times(self.row_mask, z), _times(self.gradient_mask, g))

    def adjoint(self, r: Rows) -> Tensor:
        """Masked and scaled rows, pulled back to the input."""
        return self.operator.adjoint(_times(self.row_mask, r.z), _times(self.gradient_mask, r.g))


def _scaled(system: LayerSystem) -> Operator:
    """The operator with ``S W`` for ``W`` and ``w_k T k`` for ``k``: no cost per application."""
    op, k = system.operator, system.gradient_scale * system.k
    if isinstance(op, ConvolutionOperator):
        weight = _mix(system.balance.rows, op.weight, 0)
        return replace(op, weight=weight, k=_mix(system.balance.gradient, k, 1))
    if isinstance(op, LinearOperator):
        return replace(op, k=k)
    return ModuleOperator(system.module, k, system.input_shape)


def _mix(matrix: Tensor | None, t: Tensor, dim: int) -> Tensor:
    """Apply a matrix along the filters."""
    return t if matrix is None else torch.tensordot(matrix, t.movedim(dim, 0), 1).movedim(0, dim)


def _balance(op: Operator, row_mask: Tensor | None, gradient_mask: Tensor | None) -> Balance:
    if not isinstance(op, ConvolutionOperator) or op.geometry[3] != 1:
        return Balance()
    return Balance(
        None if row_mask is not None else _alike(op.weight.flatten(1)),
        None if gradient_mask is not None else _alike(op.k.transpose(0, 1).flatten(1)),
    )


def _alike(M: Tensor) -> Tensor | None:
    r""":math:`(M M^\top + \lambda)^{-1/2}`, of a size that leaves the norm of ``M`` as it is."""
    values, vectors = torch.linalg.eigh(M @ M.T)
    if not float(values.sum()) > 0:
        return None
    shrunk = (values.clamp_min(0) + BALANCE * values.mean()).rsqrt()
    matrix = (vectors * shrunk) @ vectors.T
    balanced: Tensor = matrix * (M.norm() / (matrix @ M).norm())
    return balanced


def _solve_iteratively(
    system: LayerSystem,
    b: Rows,
    cap: int,
    progress: Progress | None,
    generator: torch.Generator | None,
    noise: float,
) -> LayerSolution:
    """Solve from zero for the answer of least norm, then let a dye tell what stays open."""
    exact, fast = ScaledSystem(system), ScaledSystem(system, torch.float32)
    dye = _dye(system, generator)
    size = float(exact.adjoint(b).norm()) or 1.0
    run = cgls(exact, b, max(ROUNDING, 1e-4 * noise) * size, cap, fast=fast, progress=progress)
    left, washed = open_share(exact, dye, cap, fast=fast, progress=progress)
    smallest, largest = ritz_values(*_longest(run, washed))
    converged = run.converged or run.norm <= 1e4 * ROUNDING * size
    return LayerSolution(
        inputs=run.x,
        residual=_ratio(math.sqrt(run.unexplained.squared_norm()), math.sqrt(b.squared_norm())),
        iterations=run.iterations + washed.iterations,
        full_rank=left == 0 and converged,
        undetermined=left,
        smallest_singular_value=smallest,
        largest_singular_value=largest,
        converged=converged,
    )


def _longest(*runs: Run) -> tuple[list[float], list[float]]:
    longest = max(runs, key=lambda run: len(run.alphas))
    return longest.alphas, longest.betas


def _dye(system: LayerSystem, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = torch.Generator(system.k.device).manual_seed(20180502)
    shape = (system.k.shape[0], *system.input_shape)
    colour = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return colour.to(system.k.device)


def _given(side: Tensor, name: str, shape: torch.Size, mask: Tensor | None) -> Tensor:
    """Right-hand side after its checks; what the mask leaves out may be anything, NaN included."""
    if not isinstance(side, Tensor):
        raise InvalidTensorError(f"{name} must be a torch.Tensor, got {type(side).__name__}.")
    side = side.unsqueeze(0) if side.dim() == len(shape) - 1 and name == "outputs" else side
    if mask is not None and side.shape == shape and side.is_floating_point():
        side = torch.where(mask != 0, side, torch.zeros_like(side))
    return checks.shaped(side, name, tuple(shape))


def _times(mask: Tensor | None, rows: Tensor) -> Tensor:
    return rows if mask is None else mask * rows


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else part


def _row_scale(weights: Mapping[str, Tensor], k: Tensor) -> float:
    r""":math:`w_k = \lVert W \rVert / \lVert k \rVert`, so that both sets of rows weigh alike."""
    size = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
    norm = float(k.norm())
    return size / norm if norm > 0 and size > 0 else 1.0


def _affine(
    module: nn.Module, input_shape: tuple[int, ...], k: Tensor
) -> tuple[torch.Size, Tensor]:
    """Output shape and value at zero, after checking that the module is affine in its input."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, *input_shape, generator=generator, dtype=torch.float64).to(k.device)
    if any(m.training and _random(m) for m in module.modules()):  # before it is ever run
        raise UnsupportedLayerError(
            f"{type(module).__name__} is in train mode and random or batch-dependent: not affine."
        )
    with torch.no_grad():
        try:
            values = [_evaluate(module, t * probe) for t in (0.0, 1.0, -2.0)]
        except RuntimeError as error:
            raise InvalidTensorError(
                f"{type(module).__name__} does not take inputs of shape {input_shape}: {error}"
            ) from None
    zero, one, minus_two = values
    bend = float((minus_two - zero + 2 * (one - zero)).norm())
    if bend > 1e-9 * float((one - zero).norm() + zero.norm() + 1e-300):
        raise UnsupportedLayerError(
            f"{type(module).__name__} is not affine in its input, so its equations are not linear "
            "in x; undo the activation first and give the linear part alone."
        )
    return zero.shape[1:], zero


def _random(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)


def _evaluate(module: nn.Module, x: Tensor) -> Tensor:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    double = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    output: Tensor = functional_call(module, double, (x,))
    return output

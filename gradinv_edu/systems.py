"""A layer linear in its input, as a system of linear equations that is never written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .checks import checked
from .engine import channels
from .engine.krylov import Progress, Rows
from .engine.layers import Affine, ModuleOperator, pack, rule_of, weight_names
from .engine.layers.base import LayerOperator
from .engine.layers.convolution import ConvolutionOperator, DirectOperator
from .engine.layers.dense import LinearOperator
from .engine.preconditioner import Bordered
from .engine.solve import Solution, least_squares, preconditioned
from .errors import InvalidTensorError, UnsupportedLayerError

__all__ = ["Balance", "LayerSystem", "ScaledSystem"]

CLEAN = 1e-12  # relative noise up to which weight rows alone would do, and a preconditioner serves
WELL, QUIET = 100.0, 30.0  # condition, residual over noise: so far gradient rows are enough
BALANCE = 0.1  # of the mean eigenvalue, added before filters are made alike: noise stays below it


class LayerSystem:
    r""":math:`W x = z - b,\; w_k K x = w_k\,\partial L/\partial W`.

    All that a server knows of the input ``x`` of a layer ``z = W·x + b``: the *weight
    constraints* ``W·x = z − b`` and the *gradient constraints* ``K x = ∂L/∂W``, where
    ``K x = Σ_ℓ k(ℓ) ⊗ patch_ℓ(x)`` and ``k = ∂L/∂z``. For a batch each sample keeps its own
    weight constraints, and all share the summed gradient constraints.
    Implements :eq:`weight-constraints`, :eq:`gradient-constraints`, :eq:`row-scaling` and
    :eq:`masked-rows`.

    Parameters
    ----------
    module : nn.Module
        Affine in its input: dense, convolution, average pooling, batch norm in eval mode, or a
        sequence of such.
    output_gradient : Tensor
        ``k``, ``(N, *output_shape)``, or ``output_shape`` for one sample.
    input_shape : tuple of int
        Of one input, without the batch dimension.
    row_mask : Tensor, optional
        Shaped as ``k``: 0 leaves a weight constraint out, 1 keeps it, between weighs it.
    gradient_mask : Tensor, optional
        Shaped as the weight, likewise for the gradient constraints.

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

    @checked
    def __init__(
        self,
        module: nn.Module,
        output_gradient: Tensor,
        input_shape: tuple[int, ...],
        row_mask: Tensor | None = None,
        gradient_mask: Tensor | None = None,
    ) -> None:
        k = checks.finite(output_gradient, "output_gradient")
        self.module, self.input_shape = module, tuple(input_shape)
        output_shape, self.offset = _affine(module, self.input_shape, k)
        k = k.unsqueeze(0) if k.shape == output_shape else k
        if k.shape[1:] != output_shape:
            raise InvalidTensorError(
                f"output_gradient has shape {tuple(k.shape)}, but the layer turns "
                f"{self.input_shape} into {tuple(output_shape)}: expected "
                f"({', '.join(['N', *map(str, output_shape)])})."
            )
        self.k = k
        rule = rule_of(module)
        rule = rule if isinstance(rule, Affine) else Affine(module)
        self.operator: LayerOperator = rule.operator(k, self.input_shape)
        parameters = dict(module.named_parameters())
        weights = {name: parameters[name].detach() for name in weight_names(module)}
        self.gradient_shape = pack(weights).shape if weights else torch.Size([0])
        self.row_mask = self._mask(row_mask, k.shape, "row_mask")
        self.gradient_mask = self._mask(gradient_mask, self.gradient_shape, "gradient_mask")
        size = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
        norm = float(k.norm())
        # w_k = ‖W‖/‖k‖, so that both sets of rows weigh alike
        self.gradient_scale = size / norm if norm > 0 and size > 0 else 1.0

    def _mask(self, mask: Tensor | None, shape: torch.Size, name: str) -> Tensor | None:
        if mask is None:
            return None
        mask = mask.to(torch.float64) if mask.dtype == torch.bool else mask
        mask = mask.unsqueeze(0) if mask.shape == shape[1:] and name == "row_mask" else mask
        return checks.shaped(mask, name, tuple(shape)).to(self.k.device)

    def without(self, *, weight: bool = False, gradient: bool = False) -> LayerSystem:
        """Return the system without one set of its constraints."""
        less = copy.copy(self)
        if weight:
            less.row_mask = torch.zeros_like(self.k)
        if gradient:
            less.gradient_mask = self.k.new_zeros(self.gradient_shape)
        less.__dict__.pop("balance", None)
        return less

    @cached_property
    def balance(self) -> Balance:
        """What makes filters alike; not every way to solve the system needs it."""
        return Balance.of(self.operator, self.row_mask, self.gradient_mask)

    @property
    def like(self) -> Tensor:
        """Zeros of the unknowns' shape, ``(N, *input_shape)``."""
        return self.k.new_zeros(len(self.k), *self.input_shape)

    @property
    def unknowns(self) -> int:
        """Number of unknowns: entries of the input, over all samples."""
        return len(self.k) * math.prod(self.input_shape)

    @property
    def weight_equations(self) -> int:
        """Number of weight constraints that the mask leaves."""
        return self.k.numel() if self.row_mask is None else int((self.row_mask != 0).sum())

    @property
    def gradient_equations(self) -> int:
        """Number of gradient constraints that the mask leaves."""
        mask = self.gradient_mask
        return self.gradient_shape.numel() if mask is None else int((mask != 0).sum())

    @property
    def equations(self) -> int:
        """Number of constraints of both kinds."""
        return self.weight_equations + self.gradient_equations

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
        r""":math:`(r_z, r_G) \mapsto W^\top r_z + K^\top r_G`, the adjoint of :meth:`matvec`.

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
        if scaled:
            return ScaledSystem(self).matrix()
        return _columns(lambda x: Rows(*self.matvec(x)).flat(), self.like)

    def right_hand_side(self, outputs: Tensor | None, weight_gradient: Tensor | None) -> Rows:
        """Right-hand side, masked and scaled, from ``z`` and ``∂L/∂W``; zero for one not given."""
        z, g = torch.zeros_like(self.k), self.k.new_zeros(self.gradient_shape)
        if outputs is not None:
            given = _given(outputs, "outputs", self.k.shape, self.row_mask)
            z = _times(self.row_mask, given.to(self.k.device) - self.offset)
        if weight_gradient is not None and g.numel():
            given = _given(weight_gradient, "weight_gradient", g.shape, self.gradient_mask)
            at_zero = getattr(self.operator, "gradient_offset", 0.0)
            g = _times(self.gradient_mask, given.to(self.k.device) - at_zero)
        g = self.gradient_scale * _mix(self.balance.gradient, g, 0)
        return Rows(_mix(self.balance.rows, z, 1), g)

    def solve(
        self,
        outputs: Tensor | None,
        weight_gradient: Tensor | None,
        *,
        noise: float = 0.0,
        dense: bool | None = None,
        max_iterations: int | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        before: Solution | None = None,
    ) -> Solution:
        r""":math:`\hat x = \arg\min_x \lVert Wx - z + b\rVert^2 + w_k^2\lVert Kx - G\rVert^2`.

        ``G`` is the weight gradient ``∂L/∂W``; see
        :func:`~gradinv_edu.engine.solve.least_squares` for how it is solved and how the rank is
        told. Where a map is small and the gradient without noise, ``K x = G`` alone gives ``x`` if
        it can, channel by channel (:meth:`by_channel`): rounding that ``z`` has gathered in the
        layers above stays out.

        Parameters
        ----------
        outputs : Tensor or None
            ``z``, bias included, shaped as ``k``; entries under a zero mask may be anything. None
            leaves the weight constraints out.
        weight_gradient : Tensor or None
            ``∂L/∂W``, likewise; several weights as
            :func:`~gradinv_edu.engine.layers.base.pack` joins them. None leaves the gradient
            constraints out.
        noise, dense, generator, progress, before
            As for :func:`~gradinv_edu.engine.solve.least_squares`.
        max_iterations : int, optional
            Cap on each of its two iterations.

        Returns
        -------
        Solution

        Raises
        ------
        InvalidTensorError
            If a side has the wrong shape or holds NaN or infinite entries, or none is given.
        """
        if outputs is None and weight_gradient is None:
            raise InvalidTensorError("outputs and weight_gradient are both None: nothing is known.")
        direct = dense is None and max_iterations is None
        if direct and outputs is None and weight_gradient is not None:
            found = self.by_channel(None, weight_gradient)
            if found is not None:
                return found
        hasty = outputs is None or (weight_gradient is None and self.gradient_shape.numel() > 0)
        system = self
        if hasty:
            system = self.without(weight=outputs is None, gradient=weight_gradient is None)
        options: dict[str, Any] = {"noise": noise, "generator": generator, "progress": progress}
        made = None
        plain = dense or max_iterations is not None or before is not None
        if not plain and system.row_mask is None and noise <= CLEAN:
            made = Bordered.of(_scaled(system))
        A, rows = ScaledSystem(system), system.right_hand_side(outputs, weight_gradient)
        found = self._directly(weight_gradient, noise) if direct else None
        if found is None and made is not None:  # gradient rows would spoil it, and add nothing
            bare = ScaledSystem(system.without(gradient=True))
            alone = replace(rows, g=torch.zeros_like(rows.g))
            found = preconditioned(bare, alone, made, generator=generator, progress=progress)
        if found is not None:
            rest = A.forward(found.x)
            rest.minus(rows)
            size = rows.squared_norm() or 1.0
            return replace(found, residual=math.sqrt(rest.squared_norm() / size))
        return least_squares(A, rows, dense=dense, cap=max_iterations, before=before, **options)

    def _directly(self, weight_gradient: Tensor | None, noise: float) -> Solution | None:
        """By channel, where that is cheap and enough: no iteration is as fast."""
        if weight_gradient is None or not channels.cheap(self.operator):
            return None
        found = self.by_channel(None, weight_gradient)
        if found is None or not found.full_rank or found.condition > WELL:
            return None
        return found if found.residual <= QUIET * max(noise, CLEAN) else None

    def by_channel(
        self,
        outputs: Tensor | None,
        weight_gradient: Tensor,
        known: tuple[Tensor, Tensor] | None = None,
        *,
        positive: bool = False,
        noise: float = 0.0,
    ) -> Solution | None:
        r""":math:`\sum_\ell k_f(\ell)\, x_c(\ell + t) = G_{f,c,t}`: one matrix for all ``c``.

        The gradient constraints of a convolution act alike on every input channel. What they leave
        open is settled by the weight constraints, in these directions alone.
        Implements :eq:`by-channel`.

        Parameters
        ----------
        outputs : Tensor or None
            ``z``, as for :meth:`solve`.
        weight_gradient : Tensor
            ``∂L/∂W``, shaped as the weight.
        known : tuple of Tensor, optional
            Entries of the input that are known already, and where: each ``(1, *input_shape)``.
        positive : bool
            Whether no entry of the input is negative, as behind a ReLU: what no equation sees may
            then be told by signs (:func:`~gradinv_edu.engine.channels.nonnegative`).
        noise : float
            Relative noise of the gradient.

        Returns
        -------
        Solution or None
            None for another layer, for a batch, under a mask of gradients, or for a large map.

        Notes
        -----
        Source: Eltaras et al. (2024) solve these rows; once for all channels, this project's.
        """
        op, one = self.operator, len(self.k) == 1 and self.gradient_mask is None
        if not isinstance(op, ConvolutionOperator) or not one or not channels.small(op):
            return None
        G = _given(weight_gradient, "weight_gradient", self.gradient_shape, None).to(self.k.device)
        found = channels.solve(op, G, known)
        if found.missing and outputs is not None:
            plain = ScaledSystem(self.without(gradient=True))
            rest = self.right_hand_side(outputs, None).z - plain.forward(found.x).z
            found = channels.settled(found, lambda step: plain.forward(step).z, rest)
        found = channels.nonnegative(found, noise) if positive else found
        left = float((self.matvec(found.x)[1] - G).norm()) / max(float(G.norm()), 1e-300)
        share = found.missing / found.x.numel()
        return Solution(found.x, left, 0, share, found.smallest, found.largest)


@dataclass(frozen=True)
class Balance:
    """What makes the filters of a convolution alike, where no mask tells their entries apart.

    Attributes
    ----------
    rows, gradient : Tensor or None
        ``S_W`` and ``S_k``, ``(filters, filters)``, for weight and gradient rows.
    """

    rows: Tensor | None = None
    gradient: Tensor | None = None

    @classmethod
    def of(
        cls, operator: LayerOperator, row_mask: Tensor | None, gradient_mask: Tensor | None
    ) -> Balance:
        """Balance a convolution without groups; of anything else, nothing."""
        if not isinstance(operator, ConvolutionOperator) or operator.geometry.groups != 1:
            return cls()
        return cls(
            None if row_mask is not None else _alike(operator.weight.flatten(1)),
            None if gradient_mask is not None else _alike(operator.k.transpose(0, 1).flatten(1)),
        )


class ScaledSystem:
    r""":math:`A = \bigl(S_W W;\; w_k\, S_k K\bigr)`, masked: the map that is solved.

    Implements :eq:`filter-balance`.

    Parameters
    ----------
    system : LayerSystem
        The layer's equations.
    dtype : torch.dtype
        Precision to compute in.
    """

    def __init__(self, system: LayerSystem, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, self.system = dtype, system
        self.like = system.like
        self.operator = _scaled(system).to(dtype)
        masks = system.row_mask, system.gradient_mask
        self.row_mask, self.gradient_mask = (None if m is None else m.to(dtype) for m in masks)
        bare = system.gradient_mask is not None and not bool(system.gradient_mask.any())
        self.rowed = self.operator if bare and isinstance(self.operator, DirectOperator) else None

    def to(self, dtype: torch.dtype) -> ScaledSystem:
        """Return the same map in another precision."""
        return ScaledSystem(self.system, dtype)

    def forward(self, x: Tensor) -> Rows:
        """Masked and scaled rows of ``x``."""
        if self.rowed is not None:  # no gradient rows: half the work
            z = self.rowed.geometry.rows(x, self.rowed.weight)
            return Rows(_times(self.row_mask, z), x.new_zeros(self.system.gradient_shape))
        z, g = self.operator.forward(x)
        return Rows(_times(self.row_mask, z), _times(self.gradient_mask, g))

    def adjoint(self, r: Rows) -> Tensor:
        """Masked and scaled rows, pulled back to the input."""
        if self.rowed is not None:
            z, move = _times(self.row_mask, r.z), self.rowed.geometry
            return move.rows_adjoint(z, self.rowed.weight, self.rowed.template)
        return self.operator.adjoint(_times(self.row_mask, r.z), _times(self.gradient_mask, r.g))

    def matrix(self) -> Tensor:
        """``(equations, unknowns)``."""
        if not isinstance(self.operator, ConvolutionOperator) or len(self.like) > 1:
            return _columns(lambda x: self.forward(x).flat(), self.like)
        rows = self.operator.matrix()
        masks = (self.row_mask, self.gradient_mask)
        sizes = [self.system.k.numel(), self.system.gradient_shape.numel()]
        for mask, part in zip(masks, torch.split(rows, sizes), strict=True):
            if mask is not None:
                part *= mask.reshape(-1, 1)
        return rows

    def blocks(self, groups: int) -> Tensor:
        """One matrix a group of channels, ``(groups, equations, unknowns)``: no other reads it."""
        each = self.like.numel() // groups

        def seen(unit: Tensor) -> Tensor:  # the same entry of every group at once
            rows = self.forward(unit.repeat(groups).reshape(self.like.shape))
            return torch.cat([rows.z.reshape(groups, -1), rows.g.reshape(groups, -1)], dim=1)

        return torch.stack([seen(unit) for unit in torch.eye(each).to(self.like)], dim=2)


def _columns(rows: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.stack([rows(unit.reshape(like.shape)) for unit in identity], dim=1)


def _scaled(system: LayerSystem) -> LayerOperator:
    """The operator with ``S_W W`` for ``W``, ``w_k S_k k`` for ``k``: no cost per application."""
    op, k = system.operator, system.gradient_scale * system.k
    if isinstance(op, ConvolutionOperator):
        weight = _mix(system.balance.rows, op.weight, 0)
        return replace(op, weight=weight, k=_mix(system.balance.gradient, k, 1))
    if isinstance(op, LinearOperator | DirectOperator):
        return replace(op, k=k)
    return ModuleOperator(system.module, k, system.input_shape)


def _mix(matrix: Tensor | None, t: Tensor, dim: int) -> Tensor:
    """Apply a matrix along the filters."""
    return t if matrix is None else torch.tensordot(matrix, t.movedim(dim, 0), 1).movedim(0, dim)


def _alike(M: Tensor) -> Tensor | None:
    r""":math:`(M M^\top + \lambda)^{-1/2}`, of a size that leaves the norm of ``M`` as it is."""
    values, vectors = torch.linalg.eigh(M @ M.T)
    if not float(values.sum()) > 0:
        return None
    shrunk = (values.clamp_min(0) + BALANCE * values.mean()).rsqrt()
    matrix = (vectors * shrunk) @ vectors.T
    balanced: Tensor = matrix * (M.norm() / (matrix @ M).norm())
    return balanced


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


def _affine(
    module: nn.Module, input_shape: tuple[int, ...], k: Tensor
) -> tuple[torch.Size, Tensor]:
    """Output shape and value at zero, after checking that the module is affine in its input."""
    if any(rule_of(part).random for part in module.modules()):  # before it is ever run
        raise UnsupportedLayerError(
            f"{type(module).__name__} is in train mode and random or batch-dependent: not affine."
        )
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, *input_shape, generator=generator, dtype=torch.float64).to(k.device)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    double = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    refusal = f"{type(module).__name__} does not take inputs of shape {input_shape}"
    with torch.no_grad(), checks.fitting(refusal):
        zero, one, minus_two = (
            functional_call(module, double, t * probe) for t in (0.0, 1.0, -2.0)
        )
    bend = float((minus_two - zero + 2 * (one - zero)).norm())
    if bend > 1e-9 * float((one - zero).norm() + zero.norm() + 1e-300):
        raise UnsupportedLayerError(
            f"{type(module).__name__} is not affine in its input, so its equations are not linear "
            "in x; undo the activation first and give the linear part alone."
        )
    return zero.shape[1:], zero

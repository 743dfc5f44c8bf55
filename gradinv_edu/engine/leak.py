"""The leak map, what part of each pixel the equations determine, and the floor under its error."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import checked
from ..errors import InvalidArgumentError, UnsupportedLayerError
from ..systems import LayerSystem, ScaledSystem
from .auditing import Auditing
from .evidence import system_matrix
from .jacobian import GAP, WholeGradient, forked_randomness
from .krylov import cgls, squared_norm
from .sample import Shape, begin, sample, seeded
from .solve import TOLERANCE, draw
from .walk import Group, State

__all__ = ["leak_map", "noise_floor", "system_leak_map"]

EXACT_MAP = 1024  # unknowns up to which a leak map is exact
PROJECTED, PROJECTIONS = 1e-5, 500  # relative residual of a probe's projection, and most steps


@checked
def leak_map(
    model: nn.Module,
    input_shape: Shape,
    *,
    whole: bool = False,
    inputs: Tensor | None = None,
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    r""":math:`\operatorname{diag}(A^+ A)`: what part of each pixel the equations determine.

    ``A⁺A`` projects onto the row space of the equations ``A``: what they see of a picture. Its
    diagonal is 1 where a pixel is determined, 0 where no equation meets it, and between where
    only combinations with other pixels are; it sums to the rank. Implements :eq:`leak-map`.

    Parameters
    ----------
    model : nn.Module
        As for :func:`~gradinv_edu.rank.audit`.
    input_shape : tuple of int
        Of one sample.
    whole : bool
        Take the rows of the whole network's Jacobian (:func:`~gradinv_edu.rank.jacobian_rank`);
        by default those of the first layer's equations, the layers above taken as undone.
    inputs : Tensor, optional
        ``(1, *input_shape)``: at this picture; by default at a random one.
    probes : int
        Random vectors of Hutchinson's kind for inputs of more than 1024 entries; the error of
        an entry falls as one over their root.
    generator : torch.Generator, optional
        Of all that is random; a fixed one by default.

    Returns
    -------
    Tensor
        ``input_shape``, float64, in [0, 1].

    Raises
    ------
    UnsupportedLayerError
        If the model cannot be traced or does not begin with a layer that is linear.
    InvalidArgumentError
        If ``probes`` is less than 1.
    """
    checks.whole(probes, "probes")
    shape, generator = tuple(input_shape), seeded(generator)
    with forked_randomness():
        x = sample(shape, inputs, generator)
        if whole:
            rows = WholeGradient(model, x, None, None, generator).rows()
            return _projected(rows, GAP).reshape(shape)
        return system_leak_map(_first_system(model, x, generator), probes, generator)


@checked
def noise_floor(
    model: nn.Module,
    inputs: Tensor,
    sigma: float,
    *,
    loss: nn.Module | None = None,
    targets: Tensor | None = None,
    prior: float = math.inf,
) -> Tensor:
    r""":math:`\sqrt{\operatorname{diag}(J^\top J/\sigma^2 + I/\tau^2)^{-1}}`, a floor of errors.

    ``J`` is the derivative of the whole gradient by the input. Where Gaussian noise of standard
    deviation σ was added to each entry of the gradient, no unbiased estimate of a pixel has a
    smaller standard deviation (Cramér and Rao). With a Gaussian ``prior`` τ on each pixel, the
    floor holds for every estimate on the average over pictures, as far as one ``J`` stands for
    them all (van Trees). Implements :eq:`noise-floor`.

    Parameters
    ----------
    model : nn.Module
        Evaluated on a float64 copy in eval mode.
    inputs : Tensor
        ``(1, *input_shape)``: at which picture.
    sigma : float
        σ, in units of the gradient.
    loss, targets
        As for :func:`~gradinv_edu.rank.jacobian_rank`.
    prior : float
        τ, in units of the picture; by default there is none.

    Returns
    -------
    Tensor
        ``input_shape``, float64, in units of the picture; infinite where ``J`` lacks rank and
        there is no prior.

    Raises
    ------
    InvalidArgumentError
        If σ or τ is not positive.
    """
    for name, value in (("sigma", sigma), ("prior", prior)):
        if not isinstance(value, int | float) or not value > 0:
            raise InvalidArgumentError(f"{name} is a positive number; got {value!r}.")
    shape = tuple(inputs.shape[1:])
    with forked_randomness():
        x = sample(shape, inputs, seeded(None))
        J = WholeGradient(model, x, loss, targets, seeded(None)).columns(weighted=False).T
    values, V = torch.linalg.svd(J, full_matrices=len(J) < J.shape[1])[1:]
    told = J.new_zeros(J.shape[1])
    told[: len(values)] = torch.where(values > GAP * values.max(), values, 0.0) / sigma
    part = torch.where(V.abs() > GAP, V, 0.0).square()
    variances = part / (told.square() + prior**-2)[:, None]
    spread: Tensor = variances.nan_to_num(0.0, math.inf).sum(dim=0)  # 0/0: no part in what is open
    return spread.sqrt().reshape(shape)


def system_leak_map(
    system: LayerSystem, probes: int = 32, generator: torch.Generator | None = None
) -> Tensor:
    r""":math:`\mathrm{diag}(A^+ A) \approx \frac1s \sum_{i=1}^s v_i \odot A^+ A\, v_i`.

    :func:`leak_map` of one layer's equations: exact for up to 1024 unknowns, else by random
    signs ``v_i``, whose projection is the least-norm solution of ``A x = A v_i``.
    See :eq:`leak-map`.

    Parameters
    ----------
    system : LayerSystem
        Of one sample.
    probes : int
        Number of random vectors.
    generator : torch.Generator, optional
        Of the random vectors; a fixed one by default.
    """
    generator = seeded(generator)
    if system.unknowns <= EXACT_MAP:
        return _projected(system_matrix(system), TOLERANCE).reshape(system.input_shape)
    exact = ScaledSystem(system)
    fast, total = exact.to(torch.float32), torch.zeros_like(system.like)
    for _ in range(probes):
        v = draw(total, generator).sign()
        b = exact.forward(v)
        target = PROJECTED * math.sqrt(squared_norm(exact.adjoint(b)))
        total += v * cgls(exact, b, target, PROJECTIONS, fast=fast).x
    return (total[0] / probes).clamp(0, 1)


def _projected(A: Tensor, tolerance: float) -> Tensor:
    _, values, V = torch.linalg.svd(A, full_matrices=False)
    diagonal: Tensor = V[values > tolerance * values.max()].square().sum(dim=0).clamp(0, 1)
    return diagonal


class _First(Auditing):
    """Keeps the system of the lowest layer that gives rows."""

    system: LayerSystem | None = None

    def layer(self, group: Group, state: State, below: int) -> tuple[State, int]:
        """Keep it: the one met last is the lowest."""
        self.system = LayerSystem(group.module, state.k, group.input_shape, state.weight)
        return replace(state, weight=None), below

    def refused(self, position: int, state: State) -> State:
        """The layers above are taken as undone."""
        return replace(state, weight=None)


def _first_system(model: nn.Module, x: Tensor, generator: torch.Generator) -> LayerSystem:
    walk, _, _ = begin(model, x, generator)
    first = next((s for s in walk.steps if not s.rule.reshapes), walk.steps[0])
    if not first.rule.affine:
        raise UnsupportedLayerError(
            f"The model begins with {first.rule.kind}, which is not linear."
        )
    place = walk.steps.index(first)
    top = next(
        (
            i
            for i in range(place + 1, len(walk.steps))
            if walk.steps[i].rule.affine and not walk.steps[i].rule.elementwise
        ),
        len(walk.steps),
    )
    lowest = _First(walk.steps, walk.passed, walk.begins, generator)
    lowest.descend(top - 1, lowest.true(top - 1, None))
    assert lowest.system is not None
    return lowest.system

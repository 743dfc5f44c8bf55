"""Units so near a kink that their side was misread, found by the next layer's own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .systems import LayerSolution, LayerSystem, weight_names

COSINE = 0.5  # of the best match: what chance alone does not reach
ASIDE = 0.5  # of the best match, that another filter's must have to be turned along
GAIN = 0.9  # of the residual: what a solution on the other sides must stay under
ROUNDS = 20
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def turn(module: nn.Module, outputs: Tensor, output_gradient: Tensor, reach: float) -> Tensor:
    r""":math:`t_j = \bigl(\sigma'_{\text{other side}} - \sigma'\bigr)\, k_j`.

    What an entry of the output gradient below an activation gains if its unit is on the other
    side of the kink; zero where the side is certain, and where there is no kink.

    Parameters
    ----------
    module : nn.Module
        The activation; those of :class:`torch.nn.LeakyReLU` and :class:`torch.nn.PReLU` have a
        kink whose both sides tell what went in.
    outputs, output_gradient : Tensor
        ``a = σ(z)`` and ``∂L/∂a``, of one shape.
    reach : float
        Error of ``outputs`` relative to its root mean square: what is nearer to zero may be on
        either side.

    Returns
    -------
    Tensor
        Shaped as ``outputs``.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    """
    a = checks.finite(outputs, "outputs")
    k = checks.shaped(output_gradient, "output_gradient", tuple(a.shape))
    lower = _lower_slope(module, a)
    if lower is None:
        return torch.zeros_like(k)
    near = a.abs() <= reach * a.square().mean().sqrt()
    return torch.where(a > 0, lower - 1, 1 - lower) * near * k


def _lower_slope(module: nn.Module, a: Tensor) -> Tensor | None:
    if isinstance(module, nn.LeakyReLU):
        return torch.as_tensor(module.negative_slope, dtype=a.dtype, device=a.device)
    if isinstance(module, nn.PReLU):
        return module.weight.detach().to(a).reshape(1, -1, *[1] * (a.dim() - 2))
    return None


def misread(system: LayerSystem, inputs: Tensor, weight_gradient: Tensor, turn: Tensor) -> Tensor:
    r""":math:`\arg\max_j\,\lvert\langle Tr,Te_j\rangle\rvert/(\lVert Tr\rVert\lVert Te_j\rVert)`.

    A step of matching pursuit: ``r = K x − ∂L/∂W`` is what the gradient's equations leave over at
    the solution, ``e_j = t_j · (filter of j) ⊗ patch_j(x)`` what the turn of one unit would add,
    ``T`` the filters' balance. Best matches of other filters that come near it are turned along.
    Implements :eq:`kink-pursuit`.

    Parameters
    ----------
    system : LayerSystem
        Of one convolution or dense layer.
    inputs : Tensor
        What its equations gave, ``(N, *input_shape)``.
    weight_gradient : Tensor
        ``∂L/∂W``, shaped as the weight.
    turn : Tensor
        ``t``, shaped as the system's output gradient; zero where no unit is in doubt.

    Returns
    -------
    Tensor
        Shaped as ``turn``, bool; nowhere true if nothing matches.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.

    Notes
    -----
    Source: Mallat and Zhang (1993) for matching pursuit; what is pursued here is this project's.
    """
    x = checks.shaped(inputs, "inputs", (len(system.k), *system.input_shape))
    g = checks.shaped(weight_gradient, "weight_gradient", tuple(system.gradient_shape))
    t = checks.shaped(turn, "turn", tuple(system.k.shape))
    cosine = _cosines(system, x, g, t).transpose(0, 1)
    best = cosine.flatten(1).max(1)
    top = best.values.max()
    near = (best.values >= ASIDE * top) & (top >= COSINE)
    found = torch.zeros_like(cosine, dtype=torch.bool).flatten(1)
    found[near, best.indices[near]] = True
    return found.reshape(cosine.shape).transpose(0, 1)


def _cosines(system: LayerSystem, x: Tensor, g: Tensor, t: Tensor) -> Tensor:
    """Of what is left with what each turn would add; zero where a turn would add to it."""
    T = system.balance.gradient
    T = torch.eye(len(g), dtype=g.dtype, device=g.device) if T is None else T
    left = torch.tensordot(T, system.matvec(x)[1] - g, 1)
    inner = _layer(system.module, torch.tensordot(T.mT, left, 1), x)  # ⟨T r, T (filter ⊗ patch)⟩
    sizes = _layer(system.module, torch.ones_like(g), x.square()).clamp_min(0).sqrt()
    sizes = sizes * T.norm(dim=0).reshape(-1, *[1] * (t.dim() - 2)) * left.norm()
    fits = (inner * t < 0) & (sizes > 0)
    return torch.where(fits, inner.abs() / sizes, torch.zeros_like(inner))


def _layer(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    parameters = {name: torch.zeros_like(p, dtype=x.dtype) for name, p in module.named_parameters()}
    (name,) = weight_names(module)
    answer: Tensor = functional_call(module, {**parameters, name: weight}, (x,))
    return answer


def _whole(system: LayerSystem) -> bool:
    """Whether both sets of equations of one layer with one filter an output channel are there."""
    simple = type(system.module) in LAYERS and getattr(system.module, "groups", 1) == 1
    flat = not isinstance(system.module, nn.Linear) or system.k.dim() == 2
    return simple and flat and system.constraints == "both" and system.gradient_mask is None


def settle(
    system: LayerSystem,
    solution: LayerSolution,
    outputs: Tensor,
    weight_gradient: Tensor,
    turn: Tensor,
    **options: Any,
) -> tuple[LayerSystem, LayerSolution, int]:
    r""":math:`K(k + t_j) = K(k) + e_j`, as long as turns explain what is left.

    Turns the units that :func:`misread` names and solves again; a solution that leaves less
    unexplained is kept, and the search goes on from it. Where no turn explains anything, as under
    noise, the first solution stays, and so it does where the layer is grouped or a set of
    equations is withheld.

    Parameters
    ----------
    system, solution : LayerSystem, LayerSolution
        As they were solved.
    outputs, weight_gradient : Tensor
        As :meth:`gradinv_edu.systems.LayerSystem.solve` takes them.
    turn : Tensor
        ``t``, as :func:`turn` gives it.
    **options
        Of :meth:`gradinv_edu.systems.LayerSystem.solve`.

    Returns
    -------
    tuple of LayerSystem, LayerSolution and int
        What holds now, and how many units were turned.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    """
    if not _whole(system):
        return system, solution, 0
    first = system.k
    for _ in range(ROUNDS):
        found = misread(system, solution.inputs, weight_gradient, turn)
        if not bool(found.any()):
            break
        k = system.k + turn * found
        turned = LayerSystem(system.module, k, system.input_shape, system.row_mask)
        again = turned.solve(outputs, weight_gradient, **options)
        if not again.full_rank or again.residual > GAIN * solution.residual:
            break
        system, solution, turn = turned, again, torch.where(found, -turn, turn)
    return system, solution, int((system.k != first).sum())

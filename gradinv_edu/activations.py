"""Elementwise layers, undone: from what came out to what went in, and the slope there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InconsistentGradientError, UnsupportedLayerError

Inverse = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Undone:
    """An elementwise layer undone.

    Attributes
    ----------
    inputs : Tensor
        ``z``; 0 where it cannot be known.
    slope : Tensor
        ``σ'(z)``; where ``z`` is unknown, the slope that the layer certainly had there (0).
    known : Tensor
        Bool: where ``z`` is determined by the output.
    """

    inputs: Tensor
    slope: Tensor
    known: Tensor


def _leaky_relu(module: nn.Module, a: Tensor) -> Tensor:
    slope: float = module.negative_slope  # type: ignore[assignment]
    return torch.where(a > 0, a, a / slope)


def _prelu(module: nn.Module, a: Tensor) -> Tensor:
    weight = module.weight.detach().double()  # type: ignore[operator]
    shape = [1, -1] + [1] * (a.dim() - 2)
    return torch.where(a > 0, a, a / weight.reshape(shape))


def _elu(module: nn.Module, a: Tensor) -> Tensor:
    alpha: float = module.alpha  # type: ignore[assignment]
    return torch.where(a > 0, a, torch.log1p(a / alpha))


def _celu(module: nn.Module, a: Tensor) -> Tensor:
    alpha: float = module.alpha  # type: ignore[assignment]
    return torch.where(a > 0, a, alpha * torch.log1p(a / alpha))


def _selu(module: nn.Module, a: Tensor) -> Tensor:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return torch.where(a > 0, a / scale, torch.log1p(a / (scale * alpha)))


def _softplus(module: nn.Module, a: Tensor) -> Tensor:
    beta: float = module.beta  # type: ignore[assignment]
    return a + torch.log(-torch.expm1(-beta * a)) / beta


def _tanh(module: nn.Module, a: Tensor) -> Tensor:
    return torch.atanh(a)


def _sigmoid(module: nn.Module, a: Tensor) -> Tensor:
    return torch.logit(a)


# activation: (inverse, lower and upper end of its range)
INVERSES: dict[type[nn.Module], tuple[Inverse, Callable[[nn.Module], tuple[float, float]]]] = {
    nn.LeakyReLU: (_leaky_relu, lambda m: (-torch.inf, torch.inf)),
    nn.PReLU: (_prelu, lambda m: (-torch.inf, torch.inf)),
    nn.ELU: (_elu, lambda m: (-float(m.alpha), torch.inf)),  # type: ignore[arg-type]
    nn.CELU: (_celu, lambda m: (-float(m.alpha), torch.inf)),  # type: ignore[arg-type]
    nn.SELU: (_selu, lambda m: (-1.0507009873554805 * 1.6732632423543772, torch.inf)),
    nn.Softplus: (_softplus, lambda m: (0.0, torch.inf)),
    nn.Tanh: (_tanh, lambda m: (-1.0, 1.0)),
    nn.Sigmoid: (_sigmoid, lambda m: (0.0, 1.0)),
}

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_elementwise(module: nn.Module) -> bool:
    """Whether :func:`undo` serves this layer."""
    return isinstance(module, (*INVERSES, nn.ReLU, nn.modules.dropout._DropoutNd, *NORMS))


def slope(module: nn.Module, z: Tensor) -> Tensor:
    """Differentiate an elementwise layer at ``z``, by automatic differentiation."""
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        (derivative,) = torch.autograd.grad(module(z).sum(), z)
    return derivative


def undo(module: nn.Module, name: str, outputs: Tensor, noise: float) -> Undone:
    r""":math:`z = \sigma^{-1}(a)`, with :math:`\sigma'(z)`, entry by entry.

    A ReLU's zero and a dropped unit do not tell what went in: those entries are returned as
    unknown with slope 0, to be masked, not guessed. Implements :eq:`activation-undone`.

    Parameters
    ----------
    module : nn.Module
        In float64; a dropout in train mode is undone by its zeros.
    name : str
        Of the layer, for messages.
    outputs : Tensor
        ``a = σ(z)``, any shape.
    noise : float
        Error of ``outputs`` relative to its largest entry: what is this close to zero is zero.

    Returns
    -------
    Undone

    Raises
    ------
    UnsupportedLayerError
        If the layer cannot be undone entry by entry.
    InconsistentGradientError
        If ``outputs`` lies outside the layer's range by more than ``noise``.
    """
    if isinstance(module, NORMS):
        return _undo_norm(module, name, outputs)
    if isinstance(module, nn.ReLU | nn.modules.dropout._DropoutNd):
        return _undo_zeroing(module, name, outputs, noise)
    inverse, span = next((v for t, v in INVERSES.items() if isinstance(module, t)), (None, None))
    if inverse is None or span is None:
        raise UnsupportedLayerError(
            f"{name} ({type(module).__name__}) cannot be undone entry by entry: several inputs "
            "give the same output."
        )
    low, high = span(module)
    _within(outputs, name, low, high, noise)
    inside = (outputs > low) & (outputs < high)
    z = inverse(module, torch.where(inside, outputs, _somewhere(low, high)))
    known = inside & torch.isfinite(z)
    z = torch.where(known, z, torch.zeros_like(z))
    return Undone(z, torch.where(known, slope(module, z), torch.zeros_like(z)), known)


def _somewhere(low: float, high: float) -> float:
    return 0.5 * (low + high) if high < torch.inf else (1.0 if low == 0 else 0.0)


def _within(outputs: Tensor, name: str, low: float, high: float, noise: float) -> None:
    outside = float(torch.clamp(torch.maximum(low - outputs, outputs - high), min=0).max())
    if outside > max(1e3 * noise, 1e-9) * float(outputs.abs().max()):
        raise InconsistentGradientError(
            f"The output found for {name} lies {outside:.2g} outside its range [{low}, {high}]: "
            "no input explains this gradient at this layer."
        )


def _undo_zeroing(module: nn.Module, name: str, a: Tensor, noise: float) -> Undone:
    keep = 1.0
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if not module.training or module.p == 0:
            return Undone(a, torch.ones_like(a), torch.ones_like(a, dtype=torch.bool))
        keep = 1 - module.p
    zero = a.abs() <= zero_level(a, noise)
    if isinstance(module, nn.ReLU):
        _within(a, name, 0.0, torch.inf, noise)
        zero = zero | (a < 0)
    known = ~zero
    return Undone(torch.where(known, a * keep, 0.0), known.to(a.dtype) / keep, known)


def clamp_to_range(module: nn.Module, outputs: Tensor) -> Tensor:
    """Move ``outputs`` into the part of the activation's range that can be undone safely."""
    if isinstance(module, nn.ReLU):
        return outputs.clamp_min(0.0)
    _, span = next((v for t, v in INVERSES.items() if isinstance(module, t)), (None, None))
    if span is None:
        return outputs
    low, high = span(module)
    margin = 0.01 * (high - low if high < torch.inf else 1.0)
    return outputs.clamp(low + margin, high - margin)


def zero_level(a: Tensor, noise: float) -> float:
    """Size under which an entry of ``a`` counts as zero: the widest gap near the noise.

    True zeros come back as rounding noise, true values rarely that small; between the two lies
    a gap in the logarithms, sought within four decades above the noise.
    """
    size = a.abs().flatten()
    top = float(size.max())
    low = max(noise, 1e-15) * top
    near = size[(size > low) & (size < 1e4 * low)].sort().values
    if near.numel() == 0 or top == 0:
        return 10 * low
    edges = torch.cat([near.new_tensor([low]), near, near.new_tensor([1e4 * low])])
    gaps = edges[1:].log() - edges[:-1].log()
    widest = int(gaps.argmax())
    return float((edges[widest] * edges[widest + 1]).sqrt())


def _undo_norm(module: nn.Module, name: str, outputs: Tensor) -> Undone:
    assert isinstance(module, NORMS)
    if module.training or module.running_var is None or module.running_mean is None:
        raise UnsupportedLayerError(
            f"{name} is a batch norm in train mode: it mixes the whole batch and forgets its mean "
            "and scale, so it cannot be undone; for a model in eval mode it can."
        )
    shape = [1, -1] + [1] * (outputs.dim() - 2)
    factor = 1 / torch.sqrt(module.running_var.double() + module.eps)
    shift = torch.zeros_like(factor)
    if module.affine:
        factor, shift = factor * module.weight.detach().double(), module.bias.detach().double()
    gain = factor.reshape(shape).expand_as(outputs)
    known = gain != 0
    safe = torch.where(known, gain, torch.ones_like(gain))
    z = (outputs - shift.reshape(shape)) / safe + module.running_mean.double().reshape(shape)
    return Undone(torch.where(known, z, torch.zeros_like(z)), gain, known)

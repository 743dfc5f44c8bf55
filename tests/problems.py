"""Layers whose input is known: what the tests of the engine share."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_edu.engine.layers import pack, weight_names
from gradinv_edu.systems import LayerSystem

Shape = tuple[int, ...]


def normal(shape: Shape | torch.Size, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def mask(shape: Shape | torch.Size, seed: int) -> Tensor:
    """Zeros, halves and ones."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(4, tuple(shape), generator=g).clamp(max=2) / 2).double()


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """A float64 copy with weights, biases and running statistics from one seed."""
    g, module = torch.Generator().manual_seed(seed), copy.deepcopy(module).double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            drawn = torch.rand(buffer.shape, generator=g, dtype=torch.float64)
            buffer.data = drawn + 0.5 if name.endswith("var") else drawn
    for part in module.modules():
        if isinstance(part, nn.PReLU):  # a slope below zero that is not positive is refused
            part.weight.data.abs_()
    return module


def weight_gradient(module: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """Automatic differentiation's own answer for the layer's weights."""
    wanted = {name: module.get_parameter(name) for name in weight_names(module)}
    if not wanted:
        return k.new_zeros(0)
    found = torch.autograd.grad((module(x) * k).sum(), list(wanted.values()))
    return pack(dict(zip(wanted, found, strict=True)))


@dataclass
class Problem:
    """A layer affine in its input, that input, and all that a server learns of it."""

    module: nn.Module
    x: Tensor
    k: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.x.shape[1:])

    @property
    def z(self) -> Tensor:
        with torch.no_grad():
            return self.module(self.x)

    @property
    def gradient(self) -> Tensor:
        return weight_gradient(self.module, self.x, self.k)

    def system(self, rows: Tensor | None = None, gradient: Tensor | None = None) -> LayerSystem:
        return LayerSystem(self.module, self.k, self.shape, rows, gradient)


def problem(module: nn.Module, shape: Shape, batch: int = 1, seed: int = 0) -> Problem:
    module, x = seeded(module, seed), normal((batch, *shape), seed + 1)
    with torch.no_grad():
        return Problem(module, x, normal(module(x).shape, seed + 2))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to what is wanted."""
    found, wanted = found.detach().reshape(-1), wanted.detach().reshape(-1)
    return float((found - wanted).norm() / wanted.norm())

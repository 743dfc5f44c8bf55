"""Checks of the exercises on convolution as a linear system.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from typing import Any
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, right, tensor
class Misleading(Mistakes, of='systems-count'):

    def too_few_filters(*_):
        """{equations} equations for {unknowns} unknowns: here the count already says that it is
        lost. Find a layer where the count says the opposite."""
        raise NotImplementedError

    def too_many_filters(*_):
        """{equations} equations for {unknowns} unknowns, and the rank is full: with other weights
        the picture is determined. Which patches would share no pixel, so that they cannot help
        each other?"""
        raise NotImplementedError

    def overlapping_patches(*_):
        """Like too_many_filters."""
        raise NotImplementedError

    def weights_set_to_zero(*_):
        """Like too_many_filters."""
        raise NotImplementedError

    def shape_with_samples(*_):
        """The input's shape is (channels, height, width), without the number of samples."""
        raise NotImplementedError
def check_misleading(misleading: Student, seed: int=3) -> None:
    """Check: a layer with equations to spare that does not determine its input."""
    conv, shape = pair(ask(misleading), 'misleading()')
    both = isinstance(conv, nn.Conv2d) and isinstance(shape, tuple | torch.Size)
    demand(both, 'Return an nn.Conv2d and the shape of its input, (channels, height, width).')
    demand(len(shape) == 3, Misleading.shape_with_samples)
    small = shape[1] * shape[2] <= 400 and torch.Size(shape).numel() <= 1200
    demand(small, 'Keep the input below 400 pixels, so that its matrix can be looked at.')
    matrix = _redrawn(conv, tuple(shape), seed).to_dense(scaled=True)
    (equations, unknowns), rank = (matrix.shape, int(torch.linalg.matrix_rank(matrix)))
    counts = {'equations': equations, 'unknowns': unknowns}
    demand(equations >= unknowns, Misleading.too_few_filters, **counts)
    demand(rank < unknowns, Misleading.too_many_filters, **counts)
    right(f'{equations} equations for {unknowns} unknowns, and rank {rank}. The rank decides.')
def _redrawn(conv: nn.Conv2d, shape: tuple[int, ...], seed: int) -> gi.systems.LayerSystem:
    """The layer's system with weights of ours: the layer's plan must do it, not its numbers."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    drawn = nn.Conv2d(conv.in_channels, conv.out_channels, *sizes, bias=False).double()
    with torch.no_grad():
        drawn.weight.copy_(normal(seed, *drawn.weight.shape))
        outputs = drawn(torch.zeros(1, *shape, dtype=torch.float64)).shape
    return gi.systems.LayerSystem(drawn, normal(seed + 1, *outputs), shape)
def check_law(adjoint: Student, seed: int=5, size: int=224) -> None:
    """Check on a photograph's 150 528 unknowns: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
    side, places, stride = ((size - 4) // 2 + 1, 4, 2)
    x = normal(seed, 3, size, size)
    W, g = (normal(seed + i, 4, 3, places, places) for i in (1, 2))
    k, r = (normal(seed + i, 4, side, side) for i in (3, 4))
    Wx = conv2d(x[None], W, stride=stride)[0]
    Kx = torch.einsum('fij,cijuv->fcuv', k, x.unfold(1, places, stride).unfold(2, places, stride))
    back = tensor(ask(adjoint, W, k, r, g, size, stride), 'the adjoint')
    there = float((Wx * r).sum() + (Kx * g).sum())
    gap = abs(there - float((x * back).sum())) / float(Wx.norm() * r.norm())
    demand(gap < 1e-10, f'The law fails on a picture of {x.numel()} unknowns: ⟨A x, y⟩ and ⟨x, Aᵀ y⟩ differ by {gap:.1e}.')
    right(f'And the law holds for {x.numel()} unknowns.')
from .recorded import recorded

check_gradient_rows = recorded("check_gradient_rows")
check_substitute = recorded("check_substitute")
check_adjoint = recorded("check_adjoint")
check_trust = recorded("check_trust")

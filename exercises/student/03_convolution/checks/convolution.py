"""Checks of the exercises on convolution as a dense layer.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import AUTOGRAD, Mistakes, Student, ask, compare, demand, each, expect, known, pair, right, tensor, told
def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def _sum(k: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """Sum of the patches of a square picture, each times its k."""
    patches = x.unfold(0, size, stride).unfold(1, size, stride)[:len(k), :len(k)]
    return torch.einsum('ij,ijuv->uv', k, patches)
class Glaring(Mistakes, of='convolution-glaring'):

    def the_same_everywhere(*_):
        """All your k have one sign, so all shares are positive: a mean of pixels between 0 and 1
        stays between 0 and 1."""
        raise NotImplementedError

    def exactly_cancelled(*_):
        """Your k sums to zero: the server cannot divide. Come close, and stay away from it."""
        raise NotImplementedError

    def tame_shares(*_):
        """Both signs, but the ratio stays between {low:.2f} and {high:.2f}: your shares are too
        tame, or the patches too alike. When does a share become large?"""
        raise NotImplementedError

    def only_louder(*_):
        """Your output gradient reaches {most:.3g}; keep it between −1 and 1. (Its size would not
        help: what do the shares do when k is doubled?)"""
        raise NotImplementedError

    def one_number_for_each_pixel(*_):
        """One number for each position of the kernel: {wanted}; yours has {got}."""
        raise NotImplementedError
def check_glaring(glaring: Student, seed: int=3, size: int=8) -> None:
    """Check: an output gradient whose ratio no photograph could contain."""
    for places in (2, 3):
        x = _random(seed + places, size, size)
        k = tensor(ask(glaring, x, places), 'glaring(...)')
        wanted, got = ((size - places + 1,) * 2, tuple(k.shape))
        demand(got == wanted, Glaring.one_number_for_each_pixel, wanted=wanted, got=got)
        demand(k.isfinite().all(), 'Your output gradient has entries that are not finite.')
        demand((k.abs() <= 1).all(), Glaring.only_louder, most=float(k.abs().max()))
        open_ = abs(float(k.sum())) > 1e-09 * float(k.abs().sum()) + 1e-300
        demand(open_, Glaring.exactly_cancelled)
        demand((k > 0).any() and (k < 0).any(), Glaring.the_same_everywhere)
        ratio = _sum(k, x, places, 1) / k.sum()
        low, high = (float(ratio.min()), float(ratio.max()))
        demand(low < -1 or high > 2, Glaring.tame_shares, low=low, high=high)
    right('A mean whose shares sum to one, and yet far outside of what it is a mean of.')
from .recorded import recorded

check_kernel_gradient = recorded("check_kernel_gradient")
check_as_matrix = recorded("check_as_matrix")
check_count = recorded("check_count")
check_is_true_patch = recorded("check_is_true_patch")

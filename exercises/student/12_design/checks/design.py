"""Checks of the exercises on defense by design.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from collections.abc import Callable, Sequence
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, compare, demand, expect, known, normal, refuse, right, tensor
LOSS, LABEL = (nn.CrossEntropyLoss(), torch.tensor([3]))
class Another(Mistakes, of='design-another'):

    def the_same_picture(*_):
        """That is the picture itself, or nearly: move it by 1/2 at least, as its norm measures."""
        raise NotImplementedError

    def open_for_the_gradient_constraints_only(*_):
        """The first layer's output z changed by {gap:.0e}, so everything above it notices. Which
        directions does Wx not see?"""
        raise NotImplementedError

    def brighter(*_):
        """Like open_for_the_gradient_constraints_only."""
        raise NotImplementedError

    def column_for_row_of_the_svd(*_):
        """Like open_for_the_gradient_constraints_only."""
        raise NotImplementedError

    def open_for_the_weight_constraints_only(*_):
        """z is the same, and so is every gradient above. But the first layer's own gradient
        changed by {gap:.0e}: it meets the pixels a second time."""
        raise NotImplementedError
def check_another(another: Student, seed: int=1) -> None:
    """Check: a second picture with the same gradient in every layer."""
    conv, head = (nn.Conv2d(1, 2, 3, 2, 1), nn.Linear(32, 10))
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(seed + number, *p.shape) / 3)
    x = normal(seed + 9, 1, 1, 8, 8).abs().clamp(max=1)
    z = conv(x).detach().requires_grad_()
    k, = torch.autograd.grad(LOSS(model[1:](z), LABEL), z)
    matrix = gi.systems.LayerSystem(conv, k, (1, 8, 8)).to_dense()
    W, K = (matrix[:k.numel()], matrix[k.numel():])
    answer = tensor(ask(another, W, K, x.flatten()), 'the other picture')
    demand(answer.shape == (64,), 'Return the picture as it came: one row of 64 pixels.')
    demand(float((answer - x.flatten()).norm()) >= 0.499, Another.the_same_picture)
    heard = float((W @ (answer - x.flatten())).norm())
    demand(heard < 1e-08, Another.open_for_the_gradient_constraints_only, gap=heard)
    sent = [gi.observe(model, LOSS, y, LABEL).gradients for y in (x, answer.reshape(x.shape))]
    gap = max((float((sent[1][name] - g).abs().max()) for name, g in sent[0].items()))
    demand(gap < 1e-08, Another.open_for_the_weight_constraints_only, gap=gap)
    right('Two pictures, one gradient in every layer: no attack on it can tell which was sent.')
from .recorded import recorded

check_most_filters = recorded("check_most_filters")
check_most_likely = recorded("check_most_likely")
check_front = recorded("check_front")
check_must_hide = recorded("check_must_hide")

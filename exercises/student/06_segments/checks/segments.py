"""Checks of the exercises on segments.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, right
class Design(Mistakes, of='segments-design'):

    def a_real_network(*_):
        """Return two whole numbers from 1 to 8: the filters of the first layer and of the
        second."""
        raise NotImplementedError

    def plenty_of_filters(*_):
        """With {first} and {second} filters the second layer has full rank: no analysis would call
        it safe. Take filters away, or make its input larger."""
        raise NotImplementedError

    def hardly_any_filters(*_):
        """With {first} and {second} filters the whole gradient leaves {open} directions of the
        picture open: this network is safe from one gradient of one sample. Find one that only
        looks so."""
        raise NotImplementedError

    def too_few_to_count(*_):
        """The second layer has {equations} equations for {unknowns} unknowns: a count already says
        that it lacks some. Find one where the count is content, the rank is not, and the picture
        falls all the same."""
        raise NotImplementedError
def check_design(design: Student, seed: int=4) -> None:
    """Check: a layer that lacks rank in a network that does not."""
    first, second = answer = pair(ask(design), 'design()')
    demand(all((isinstance(n, int) and 1 <= n <= 8 for n in answer)), Design.a_real_network)
    model, x = (_two_layers(first, second, seed), normal(seed + 9, 1, 1, 8, 8).abs())
    equations, unknowns, rank = _second_layer(model, x)
    facts = {'first': first, 'second': second, 'equations': equations, 'unknowns': unknowns}
    demand(rank < unknowns, Design.plenty_of_filters, **facts)
    open_ = x.numel() - _whole_rank(model, x)
    demand(open_ == 0, Design.hardly_any_filters, **facts, open=open_)
    demand(equations >= unknowns, Design.too_few_to_count, **facts)
    right(f'{equations} equations, rank {rank} for {unknowns} unknowns, and yet the whole gradient determines every pixel: a layer without rank is not a safe network.')
def _two_layers(first: int, second: int, seed: int) -> nn.Sequential:
    """The network of the exercise, with weights of its own generator."""
    one = nn.Conv2d(1, first, 3, 1, 1, bias=False)
    two = nn.Conv2d(first, second, 3, 2, 1, bias=False)
    head = nn.Linear(16 * second, 10, bias=False)
    model = nn.Sequential(one, nn.LeakyReLU(0.2), two, nn.LeakyReLU(0.2), nn.Flatten(), head)
    with torch.no_grad():
        for place, parameter in enumerate(model.double().parameters()):
            parameter.copy_(normal(seed + place, *parameter.shape) / parameter[0].numel() ** 0.5)
    return model
def _second_layer(model: nn.Sequential, x: Tensor) -> tuple[int, int, int]:
    inner = model[:2](x).detach()
    z = model[2](inner).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model[3:](z), torch.tensor([3]))
    k, = torch.autograd.grad(loss, z)
    matrix = gi.systems.LayerSystem(model[2], k, tuple(inner.shape[1:])).to_dense(scaled=True)
    return (*matrix.shape, int(torch.linalg.matrix_rank(matrix, rtol=1e-10)))
def _whole_rank(model: nn.Sequential, x: Tensor) -> int:
    """Rank of the derivative of the whole gradient with respect to the picture."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.tensor([3]))
    sent = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    parts = []
    for gradient in sent:
        flat = gradient.flatten()
        every = torch.eye(len(flat), dtype=flat.dtype)
        rows, = torch.autograd.grad(flat, x, every, retain_graph=True, is_grads_batched=True)
        parts.append(rows.flatten(1) / gradient.detach().abs().max())
    return int(torch.linalg.matrix_rank(torch.cat(parts), rtol=1e-10))
from .recorded import recorded

check_pursue = recorded("check_pursue")

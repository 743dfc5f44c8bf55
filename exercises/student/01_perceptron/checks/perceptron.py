"""Checks of the exercises on the perceptron.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import AUTOGRAD, Mistakes, Student, ask, compare, demand, distance, each, expect, right, tensor
def _neuron(seed: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(pixels, generator=g, dtype=torch.float64)
    b = torch.randn((), generator=g, dtype=torch.float64)
    return (W, b, torch.rand(pixels, generator=g, dtype=torch.float64))
class LabelsFor(Mistakes, of='perceptron-labels'):

    def shares_for_labels(*_):
        """You returned the shares themselves. A share is made of slopes k = z − y: which labels
        give these slopes?"""
        raise NotImplementedError

    def shares_exchanged(*_):
        """The two shares are exchanged: the first sample has the second one's."""
        raise NotImplementedError

    def perfect_answers(*_):
        """With these labels every answer is perfect, so all slopes are zero and nothing is sent:
        there is no mixture to speak of."""
        raise NotImplementedError

    def outputs_scaled(*_):
        """You scaled the outputs by the shares: then k = z (1 − share). Which labels make
        k = z − y proportional to the shares?"""
        raise NotImplementedError

    def one_label_for_both(*_):
        """Both labels are the same, so the outputs alone decide the shares. Choose each label
        freely."""
        raise NotImplementedError
def check_labels_for(labels_for: Student, seed: int=3, pixels: int=8) -> None:
    """Check: labels that make the ratio of a batch any mixture one likes."""
    W, b, _ = _neuron(seed, pixels)
    g = torch.Generator().manual_seed(seed + 1)
    pictures = torch.rand(2, pixels, generator=g, dtype=torch.float64)
    z = pictures @ W + b
    for share in (0.25, -2.0, 1.0, 7.0):
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        case = f'for shares {share:g} and {1 - share:g}'
        y = tensor(ask(labels_for, z, shares, case=case), 'the labels')
        demand(y.shape == z.shape, f'Two outputs need two labels; you gave {tuple(y.shape)}.')
        demand(distance(y, shares) > 1e-09, LabelsFor.shares_for_labels)
        demand(distance(y, z) > 1e-09, LabelsFor.perfect_answers)
        demand(distance(y, z * shares) > 1e-09, LabelsFor.outputs_scaled)
        demand(abs(float(y[0] - y[1])) > 1e-09, LabelsFor.one_label_for_both)
        leaked, wanted = (_mixed(W, b, pictures, y), gi.perceptron.mixture(pictures, shares))
        swapped = gi.perceptron.mixture(pictures, shares.flip(0))
        demand(distance(leaked, swapped) > 1e-06, LabelsFor.shares_exchanged)
        compare(leaked, wanted, f"{case}, the server's picture", tolerance=1e-06)
    right('What a server reads out of a batch can be any mixture, one with negative shares too.')
def _mixed(W: Tensor, b: Tensor, pictures: Tensor, labels: Tensor) -> Tensor:
    """What a server divides out of the client's real gradient."""
    neuron = nn.Linear(len(W), 1).double()
    with torch.no_grad():
        neuron.weight.copy_(W[None])
        neuron.bias.copy_(b[None])
    sent = gi.observe(neuron, nn.MSELoss(), pictures, labels[:, None]).gradients
    zero = 'The two slopes cancel: the bias gradient is zero and the server cannot divide.'
    demand(sent['bias'].abs() > 1e-12, zero)
    return gi.perceptron.recover_input(sent['weight'][0], sent['bias'][0])
from .recorded import recorded

check_gradients = recorded("check_gradients")
check_recover = recorded("check_recover")
check_recover_from_training = recorded("check_recover_from_training")
check_leaks = recorded("check_leaks")

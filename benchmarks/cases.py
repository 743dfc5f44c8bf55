"""What a system is given, and what a system is: shared by all adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradinv_edu as gi

CLASS = 3  # label of the nets of several classes


@dataclass(frozen=True)
class Case:
    """One net with its weights, one picture, one label."""

    net: str
    model: nn.Sequential
    x: Tensor
    loss: nn.Module
    target: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the picture, without the batch dimension."""
        return tuple(self.x.shape[1:])

    def update(self) -> gi.Update:
        """Let a client compute its gradient, in the net's own dtype."""
        return gi.observe(self.model, self.loss, self.x, self.target)


@dataclass(frozen=True)
class System:
    """Something that recovers pictures, and what it must be given to run.

    ``prepare`` imports what is needed and returns the recovery, which alone is measured.
    """

    prepare: Callable[[Case, str], Callable[[], Tensor]]
    nets: tuple[str, ...]
    given: str = ""
    source: str = ""
    option: str = ""  # names the checkout on the command line; none: nothing is needed
    holds: str = ""  # a file by which its checkout is known
    needs: tuple[tuple[str, str], ...] = ()  # (module, package that has it)
    dtype: torch.dtype = torch.float32
    climbs: bool = True  # to other sizes and two threads


def case(net: str, size: int, dtype: torch.dtype = torch.float32) -> Case:
    """Build a net and give it the photograph, in 8 bits as published code reads files."""
    x = gi.data.photo("astronaut", size).mul(255).round().div(255).to(dtype)
    model = NETS[net]((3, size, size)).to(dtype)
    if net in ONE_LOGIT:  # as published R-GAP takes it: the label against the prediction
        return Case(net, model, x, nn.BCEWithLogitsLoss(), (model(x) <= 0).to(x))
    return Case(net, model, x, nn.CrossEntropyLoss(), torch.tensor([CLASS]))


Shape = tuple[int, int, int]


def with_last_bias(model: nn.Sequential) -> nn.Sequential:
    """Give the last layer a bias, as ``breaching`` does in its CNN6 of ten classes."""
    old = model[-1]
    assert isinstance(old, nn.Linear)
    model[-1] = nn.Linear(old.in_features, old.out_features)
    model[-1].weight.data = old.weight.data
    bound, drawing = old.in_features**-0.5, torch.Generator().manual_seed(0)
    model[-1].bias.data.uniform_(-bound, bound, generator=drawing)
    return model


def published_lenet(shape: Shape) -> nn.Sequential:
    """LeNet of DLG's published code: three convolutions, 100 classes; weights of its own draw."""
    model, drawing = gi.models.lenet_dlg(shape), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.5, 0.5, generator=drawing)
    return model


def dense(shape: Shape, *hidden: int) -> nn.Sequential:
    """Dense layers for ten classes."""
    return gi.models.mlp((shape[0] * shape[1] * shape[2], *hidden, 10))


ONE_LOGIT = ("CNN6", "CNN6-d")
NETS: dict[str, Callable[[Shape], nn.Sequential]] = {
    "CNN6": gi.models.cnn6,
    "CNN6-d": gi.models.cnn6_d,
    "CNN6, 10 classes": lambda shape: with_last_bias(gi.models.cnn6(shape, outputs=10)),
    "LeNet": published_lenet,
    "perceptron": dense,
    "MLP": lambda shape: dense(shape, 1024, 1024, 1024),
}

"""Defenses by name: what a client does to the model, to its step, and to what it sends.

Chapters, scoreboard, guard and benchmarks share this table. A new defense is one entry.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import compression, design, dropout, noise, privacy, pruning
from ..errors import DoesNotApplyError, InvalidArgumentError, UnknownNameError
from ..sharing import Loss, Update, observe

__all__ = ["DEFENSES", "Defense", "get", "narrow_first_layer", "register"]

Build = Callable[[nn.Sequential, tuple[int, ...], torch.Generator], nn.Sequential]
Observe = Callable[[nn.Sequential, Loss, Tensor, Tensor, float, torch.Generator], Update]
Change = Callable[[Update, torch.Generator], Update]


def _plain(
    model: nn.Sequential, loss: Loss, x: Tensor, y: Tensor, rate: float, source: torch.Generator
) -> Update:
    return observe(model, loss, x, y, generator=source)


@dataclass(frozen=True)
class Defense:
    """One defense with its setting, known to a server down to its parameters.

    Attributes
    ----------
    name : str
        As it is printed.
    kind : str
        What is done; an aware attacker looks here for what to do about it.
    model : callable
        ``model(network, input_shape, generator)``: the network that the client trains.
    observe : callable
        ``observe(model, loss, inputs, targets, learning_rate, generator)``: the client's step.
    change : callable
        ``change(update, generator)``: what is sent in place of the update.
    samples : int
        In one update.
    rate : float
        Factor on the server's learning rate, to suit the size of what it gets.
    noise_multiplier : float or None
        Of DP-SGD, whose training is Opacus's own.
    """

    name: str
    kind: str
    model: Build = lambda network, shape, source: network
    observe: Observe = _plain
    change: Change = lambda update, source: update
    samples: int = 1
    rate: float = 1.0
    noise_multiplier: float | None = None

    def build(
        self, network: nn.Sequential, input_shape: tuple[int, ...], generator: torch.Generator
    ) -> nn.Sequential:
        """A copy of the network with the defense's own layers, in training mode."""
        return self.model(copy.deepcopy(network).train(), input_shape, generator).train()

    def send(
        self,
        model: nn.Sequential,
        loss: Loss,
        inputs: Tensor,
        targets: Tensor,
        learning_rate: float,
        generator: torch.Generator,
    ) -> Update:
        """One round of a client behind the defense; ``model`` comes from :meth:`build`."""
        update = self.observe(model, loss, inputs, targets, learning_rate, generator)
        return self.change(update, generator)


DEFENSES: dict[str, Defense] = {}


def register(defense: Defense) -> Defense:
    """Add a defense to the table.

    Raises
    ------
    InvalidArgumentError
        If there is one of that name.
    """
    if defense.name in DEFENSES:
        raise InvalidArgumentError(f"There is a defense {defense.name!r} already.")
    DEFENSES[defense.name] = defense
    return defense


def get(name: str) -> Defense:
    """Find a defense by its name.

    Raises
    ------
    UnknownNameError
        If there is none; the message lists those that there are.
    """
    if name not in DEFENSES:
        raise UnknownNameError(f"No defense {name!r}; there are {', '.join(DEFENSES)}.")
    return DEFENSES[name]


def narrow_first_layer(
    network: nn.Sequential, input_shape: tuple[int, ...], stride: int = 1
) -> nn.Sequential:
    """Keep as many filters of the first layer as must lack rank; or one, in longer strides.

    Parameters
    ----------
    network : torch.nn.Sequential
        Changed in place: the first two convolutions, and the inputs of the last layer.
    input_shape : tuple of int
        Of a picture.
    stride : int
        1: as it is; more: a single filter with this stride.

    Raises
    ------
    DoesNotApplyError
        If the network does not begin with two convolutions.
    """
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    if not convolutions or network[0] is not convolutions[0]:
        raise DoesNotApplyError("A dense first layer tells every pixel, however few its units.")
    if len(convolutions) < 2:
        raise DoesNotApplyError("The second convolution is inside a block, whose sums need all.")
    (first, second), head = convolutions[:2], network[-1]
    assert isinstance(head, nn.Linear)
    channels, size, _ = input_shape
    kept = design.filter_bound(
        channels, size, first.kernel_size[0], first.stride[0], int(first.padding[0])
    )
    if stride > 1:
        kept, first.stride = 1, (stride, stride)
    assert first.bias is not None
    first.weight, first.bias = (nn.Parameter(p[:kept].detach()) for p in (first.weight, first.bias))
    first.out_channels = second.in_channels = kept
    _fewer_inputs(second, kept)
    head.in_features = network[:-1](torch.zeros(1, *input_shape).to(head.weight)).shape[1]
    _fewer_inputs(head, head.in_features)
    return network


def _fewer_inputs(layer: nn.Conv2d | nn.Linear, inputs: int) -> None:
    """The first inputs' weights, as large as so few need."""
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(weight[:, :inputs] * math.sqrt(weight.shape[1] / inputs))


def _local(steps: int) -> Observe:
    return lambda model, loss, x, y, rate, source: observe(
        model, loss, x, y, local_steps=steps, learning_rate=rate / steps, generator=source
    )


def _private(sigma: float) -> Observe:
    def observed(
        model: nn.Sequential, loss: Any, x: Tensor, y: Tensor, rate: float, source: torch.Generator
    ) -> Update:
        return privacy.dp_sgd(model, loss, x, y, noise_multiplier=sigma, generator=source).update

    return observed


def _soteria(
    model: nn.Sequential, loss: Loss, x: Tensor, y: Tensor, rate: float, source: torch.Generator
) -> Update:
    update = observe(model, loss, x, y, generator=source)
    return compression.soteria(model, update, x[:1], 0.2)  # a batch: ranked on its first sample


def _precode(
    network: nn.Sequential, shape: tuple[int, ...], source: torch.Generator
) -> nn.Sequential:
    block = compression.Bottleneck(network[-1].in_features, 32, generator=source)  # type: ignore[arg-type]
    return nn.Sequential(*network[:-1], block, network[-1])


for _defense in (
    Defense("none", "none"),
    Defense("batch of 2", "batch", samples=2),
    Defense("batch of 4", "batch", samples=4),
    Defense("batch of 8", "batch", samples=8),
    Defense("1 local step", "local steps", observe=_local(1)),
    Defense("10 local steps", "local steps", observe=_local(10)),
    Defense("dropout 0.5", "dropout", model=lambda m, *_: dropout.with_dropout(m, 0.5)),
    Defense("clipping to 0.1", "clipping", change=lambda u, _: noise.clip(u, 0.1), rate=6.0),
    *(
        Defense(
            f"noise {sigma:g}" if sigma > 1e-4 else "noise 0.0001",
            "noise",
            change=lambda u, g, sigma=sigma: noise.add_noise(noise.clip(u, 1.0), sigma, g),  # type: ignore[misc]
        )
        for sigma in (1e-4, 1e-3, 1e-2)
    ),
    *(
        Defense(f"DP-SGD, σ = {s:g}", "privacy", observe=_private(s), noise_multiplier=s)
        for s in (0.01, 0.1, 1.0)
    ),
    Defense("largest 10 %", "largest", change=lambda u, _: pruning.keep_largest(u, 0.1)),
    Defense("random 10 %", "random", change=lambda u, g: pruning.keep_random(u, 0.1, g), rate=3.3),
    Defense("8 bits", "bits", change=lambda u, _: compression.quantize(u, 8)),
    Defense("4 bits", "bits", change=lambda u, _: compression.quantize(u, 4)),
    Defense("half precision", "half", change=lambda u, _: compression.half(u)),
    Defense("sign", "sign", change=lambda u, _: compression.sign(u), rate=0.02),
    Defense("Soteria, 20 % kept", "soteria", observe=_soteria),
    Defense("PRECODE", "precode", model=_precode),
    Defense("rank below the pixels", "rank", model=lambda m, s, _: narrow_first_layer(m, s)),
    Defense("rank far below", "rank", model=lambda m, s, _: narrow_first_layer(m, s, 4)),
):
    register(_defense)

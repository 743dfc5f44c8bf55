"""What a server holds, and the two ways it has to answer: by equations, or by a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import optimization, recursion
from ..errors import DoesNotApplyError
from ..sharing import Update
from .defenses import Defense
from .recovery import Recovering
from .walk import State

__all__ = [
    "Answer",
    "FromAbove",
    "Received",
    "first_layer",
    "gradient_of",
    "match",
    "recover",
    "with_gradients",
]


@dataclass(frozen=True)
class Received:
    """What a server holds: everything but the client's data and draws.

    Attributes
    ----------
    model : torch.nn.Module
        As the client trains it.
    update : Update
        What the client sent.
    loss : torch.nn.Module
        The client's.
    input_shape : tuple of int
        Of one picture.
    defense : Defense or None
        The client's; aware attackers alone look at it.
    public : Tensor or None
        Pictures of the same kind.
    steps : int
        What a search may spend: of signed Adam; of L-BFGS a twentieth, of 20 iterations each.
    seed : int
        Of the attacker's own draws.
    """

    model: nn.Sequential
    update: Update
    loss: nn.Module
    input_shape: tuple[int, ...]
    defense: Defense | None = None
    public: Tensor | None = None
    steps: int = 100
    seed: int = 0

    @property
    def generator(self) -> torch.Generator:
        """Of the attacker's own draws, from their beginning."""
        return torch.Generator().manual_seed(self.seed)


class Answer(NamedTuple):
    """Pictures, float64, and whether the attacker is sure of them."""

    inputs: Tensor
    exact: bool


def first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the first layer that has weights."""
    for name, layer in model.named_modules():
        if next(layer.parameters(recurse=False), None) is not None:
            return name, layer
    raise DoesNotApplyError("The model has no layer with weights.")


def gradient_of(received: Received, name: str) -> Tensor:
    """What was sent for a parameter.

    Raises
    ------
    DoesNotApplyError
        If nothing was.
    """
    name = name.strip(".")
    if name not in received.update.gradients:
        raise DoesNotApplyError(f"No gradient of {name} was sent.")
    return received.update.gradients[name]


def with_gradients(received: Received, gradients: dict[str, Tensor]) -> Received:
    """The same with other gradients in its update."""
    return replace(received, update=replace(received.update, gradients=gradients))


class FromAbove(Recovering):
    """The recursion as published: every layer from the one above, no convolution by itself."""

    def blind(self, position: int) -> State | None:
        """Begin nowhere below a dense layer."""
        return None


def recover(
    received: Received,
    *,
    below: bool = False,
    batch_size: int = 1,
    walk: type[Recovering] = Recovering,
) -> Answer:
    """The recursion; ``below``: where it begins, nothing above can contradict it."""
    found = recursion.recover(
        received.model, received.update, received.input_shape, received.loss,
        batch_size=batch_size, generator=received.generator, walk=walk,
    )  # fmt: skip
    if not below:
        return Answer(found.inputs, found.exact)
    sure = all(layer.full_rank and layer.residual < 1e-3 for layer in found.layers)
    return Answer(found.inputs, sure)


def match(
    received: Received, method: str, *, naive: bool = False, steps: int | None = None, **how: Any
) -> Answer:
    """Gradient matching; ``naive``: one picture, one step."""
    update = received.update
    update = replace(update, samples=1, batch_size=1) if naive else update
    update = replace(update, gradients={n: g.float() for n, g in update.gradients.items()})
    with _seeded(received):
        match = optimization.match_gradients(
            received.model, update, received.input_shape, received.loss, method=method,
            steps=steps or received.steps, simulate=not naive, generator=received.generator, **how,
        )  # fmt: skip
    return Answer(match.inputs, False)


@contextmanager
def _seeded(received: Received) -> Iterator[None]:
    """Draws of the model itself, such as PRECODE's, from the attacker's seed."""
    devices = sorted({p.device.index for p in received.model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(received.seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(received.seed)
        yield

"""What a defense costs: the accuracy of a federation whose clients stand behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import design, privacy
from ..errors import InvalidTensorError
from .defenses import Defense

__all__ = ["Data", "Net", "price", "trained"]

LOSS, ROUND = nn.CrossEntropyLoss(), 50
LEARNED = 0.8  # of the training pictures; less, and another rate is tried


@dataclass(frozen=True)
class Net:
    """A network, from a picture's shape and a generator; rounds and rate of its training."""

    make: Callable[[tuple[int, ...], torch.Generator], nn.Sequential]
    rounds: int
    rate: float


@dataclass(frozen=True)
class Data:
    """Pictures to train on, public as far as priors go; others, of which the first are attacked."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def price(
    defense: Defense, pictures: Data, networks: Iterable[tuple[nn.Module, float | None]]
) -> dict[str, Any]:
    r"""Accuracy of a federation whose clients send what the defense makes of 50 pictures' update.

    Parameters
    ----------
    defense : Defense
        The clients'.
    pictures : Data
        To test with.
    networks : iterable
        Of each training, from :func:`trained`: the network and its :math:`\varepsilon`.

    Returns
    -------
    dict
        ``accuracy`` of each network and, for DP-SGD, ``epsilon_of_one_update`` and
        ``epsilon_of_the_training``.
    """
    cell: dict[str, Any] = {"accuracy": []}
    sigma = defense.noise_multiplier
    if sigma is not None:
        cell["epsilon_of_one_update"] = float(f"{privacy.privacy_spent(sigma, 1.0, 1):.3g}")
    for model, epsilon in networks:
        if epsilon is not None:
            cell["epsilon_of_the_training"] = float(f"{epsilon:.3g}")
        score = design.accuracy(model, pictures.test_x, pictures.test_y)
        cell["accuracy"].append(round(score, 4))
    return cell


def trained(
    net: Net, defense: Defense, pictures: Data, seed: int
) -> tuple[nn.Sequential, float | None]:
    r"""The network that such a federation ends with, and the :math:`\varepsilon` of its training.

    Parameters
    ----------
    net : Net
        With its training.
    defense, pictures
        As for :func:`price`, to train on.
    seed : int
        Of first weights, batches and draws.
    """
    shape, weights = tuple(pictures.x.shape[1:]), torch.Generator().manual_seed(1000 + seed)
    model: nn.Module = defense.build(net.make(shape, weights), shape, weights)
    epsilon = None
    if defense.noise_multiplier is not None:
        model, epsilon = privacy.train_privately(
            model, LOSS, pictures.x, pictures.y, noise_multiplier=defense.noise_multiplier,
            steps=net.rounds, batch_size=ROUND, learning_rate=net.rate,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    else:
        model = _trained(model, defense, pictures, net, seed)
    assert isinstance(model, nn.Sequential)
    return model, epsilon


def _trained(model: nn.Module, defense: Defense, pictures: Data, net: Net, seed: int) -> nn.Module:
    """Federated SGD; at a quarter of the rate, and again, while it fails on its own data."""
    best, most = model, -1.0
    for rate in (net.rate * defense.rate / factor for factor in (1, 4, 16)):

        def client(
            net: Any, loss: Any, x: Tensor, y: Tensor, generator: torch.Generator, r: float = rate
        ) -> Any:
            return defense.send(net, loss, x, y, r, generator)

        try:
            student = design.train(
                model, LOSS, pictures.x, pictures.y, steps=net.rounds, batch_size=ROUND,
                learning_rate=rate, client=client, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            score = design.accuracy(student, pictures.x, pictures.y)
        except InvalidTensorError:  # it overflowed
            continue
        if score > most:
            best, most = student, score
        if score > LEARNED:
            break
    return best

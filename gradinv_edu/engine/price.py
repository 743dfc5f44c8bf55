"""What a defense costs: the accuracy of a federation whose clients stand behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import design, privacy
from ..errors import InvalidTensorError
from ..sharing import Update
from .defenses import Defense

__all__ = ["Data", "Net", "price", "trained", "tuned"]

LOSS, ROUND = nn.CrossEntropyLoss(), 50
RATES = (4.0, 1.0, 0.25, 0.0625)  # tried, times the network's and the defense's own
TUNING = 999  # seed of the tries, none of the trainings'


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


def tuned(net: Net, defense: Defense, pictures: Data) -> float:
    """The learning rate of :data:`RATES` that learns most in a fifth of the rounds.

    Every network and defense gets the same tries; judged on pictures of the training.

    Parameters
    ----------
    net, defense, pictures
        As for :func:`trained`.
    """
    short, scores = replace(net, rounds=-(-net.rounds // 5)), dict[float, float]()
    for rate in sorted((net.rate * defense.rate * factor for factor in RATES), reverse=True):
        try:
            model, _ = trained(short, defense, pictures, TUNING, rate)
            scores[rate] = design.accuracy(model, pictures.x[:1000], pictures.y[:1000])
        except InvalidTensorError:  # it overflowed
            scores[rate] = 0.0
    return max(scores, key=lambda rate: scores[rate])


def trained(
    net: Net, defense: Defense, pictures: Data, seed: int, rate: float
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
    rate : float
        Of learning, from :func:`tuned`.

    Raises
    ------
    InvalidTensorError
        If the training overflows.
    """
    shape, weights = tuple(pictures.x.shape[1:]), torch.Generator().manual_seed(1000 + seed)
    model: nn.Module = defense.build(net.make(shape, weights), shape, weights)
    source, epsilon = torch.Generator().manual_seed(seed), None
    if defense.noise_multiplier is not None:
        model, epsilon = privacy.train_privately(
            model, LOSS, pictures.x, pictures.y, noise_multiplier=defense.noise_multiplier,
            steps=net.rounds, batch_size=ROUND, learning_rate=rate, generator=source,
        )  # fmt: skip
    else:

        def client(
            model: Any, loss: Any, x: Tensor, y: Tensor, generator: torch.Generator
        ) -> Update:
            return defense.send(model, loss, x, y, rate, generator)

        model = design.train(
            model, LOSS, pictures.x, pictures.y, steps=net.rounds, batch_size=ROUND,
            learning_rate=rate, client=client, generator=source,
        )  # fmt: skip
    assert isinstance(model, nn.Sequential)
    return model, epsilon

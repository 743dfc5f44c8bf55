"""Attackers by name: from what a server holds to an answer that says whether to trust it.

Chapters, scoreboard, guard and benchmarks share this registry. A new attacker is one function with
a line above it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import checks, fully_connected
from ..errors import DoesNotApplyError, InvalidArgumentError, UnknownNameError
from ..sharing import Update
from . import aware
from .received import Answer, FromAbove, Received, first_layer, gradient_of, match, recover

__all__ = ["ATTACKERS", "OWN", "Answer", "Attacker", "Received", "get", "register"]

Attack = Callable[[Received], Answer]


@dataclass(frozen=True)
class Attacker:
    """One attack, to be called with what a server has received.

    Attributes
    ----------
    name : str
        As it is printed.
    attack : callable
        From :class:`Received` to :class:`Answer`.
    aware : bool
        Whether it knows of the defense.
    promises : bool
        Whether it can be sure of an answer at all; a search never is.
    searches : bool
        Whether it descends step by step, and so costs what its steps cost.
    """

    name: str
    attack: Attack
    aware: bool
    promises: bool
    searches: bool = False

    def __call__(self, received: Received) -> Answer:
        """Attack; typed errors say that there is no answer, or that the attack does not apply.

        Raises
        ------
        InvalidTensorError
            If update or picture do not fit the model.
        """
        received.update.check(received.model)
        model, shape = copy.deepcopy(received.model).eval(), (1, *received.input_shape)
        like = next(model.parameters())
        unfit = checks.fitting(f"The model does not take pictures of shape {shape[1:]}")
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unfit:  # some models draw
            model(torch.zeros(shape, dtype=like.dtype, device=like.device))
        return self.attack(received)


ATTACKERS: dict[str, Attacker] = {}
OWN: dict[str, Attacker] = {}  # of a client on its own update, whose samples and steps it knows


def register(
    name: str,
    *,
    aware: bool = False,
    promises: bool = False,
    searches: bool = False,
    own: bool = False,
) -> Callable[[Attack], Attack]:
    """Put the decorated function into the table, as an attacker of this name.

    Parameters
    ----------
    name : str
        As it is printed.
    aware, promises, searches : bool
        As in :class:`Attacker`.
    own : bool
        Whether it is a client's, on its own update (the guard of a federation).

    Raises
    ------
    InvalidArgumentError
        If there is one of that name.
    """
    table = OWN if own else ATTACKERS
    if name in table:
        raise InvalidArgumentError(f"There is an attacker {name!r} already.")

    def add(attack: Attack) -> Attack:
        table[name] = Attacker(name, attack, aware, promises, searches)
        return attack

    return add


def get(name: str, *, own: bool = False) -> Attacker:
    """Find an attacker by its name, a server's or a client's own.

    Raises
    ------
    UnknownNameError
        If there is none; the message lists those that there are.
    """
    table = OWN if own else ATTACKERS
    if name not in table:
        raise UnknownNameError(f"No attacker {name!r}; there are {', '.join(table)}.")
    return table[name]


@register("ratio")
def ratio(received: Received) -> Answer:
    r""":math:`x = \operatorname{mean}_i\, G_i / b_i`: the bias ratio, every row alike."""
    name, layer = first_layer(received.model)
    if not isinstance(layer, nn.Linear):
        raise DoesNotApplyError("The first layer is a convolution; its ratio is a mean of patches.")
    G, b = (gradient_of(received, f"{name}.{part}") for part in ("weight", "bias"))
    x = fully_connected.recover_input(G, b, method="mean")
    return Answer(x.reshape(1, *received.input_shape), False)


@register("recursion", promises=True)
def walk(received: Received) -> Answer:
    """The published recursion, from the last layer down, as if there were no defense."""
    plain = {n: g / received.update.local_steps for n, g in received.update.gradients.items()}
    model = copy.deepcopy(received.model).eval()  # dropout is not known of
    return recover(replace(received, model=model, update=Update(plain)), walk=FromAbove)


@register("DLG", searches=True)
def dlg(received: Received) -> Answer:
    """Deep Leakage from Gradients: L-BFGS, the label guessed along."""
    return match(received, "dlg", steps=received.steps // 20, naive=True)


@register("cosine + TV", searches=True)
def cosine(received: Received) -> Answer:
    """Inverting Gradients: signed Adam on the cosine, with total variation."""
    return match(received, "inverting_gradients", naive=True)


register("aware algebra", aware=True, promises=True)(aware.algebra)
register("aware search", aware=True, searches=True)(aware.search)

"""Attackers who know of the defense: what each does about each kind of it.

What is done about a new kind is one function, with a line above it that says so; about a kind that
has none, the algebra asks for fewer digits, and the search begins where the algebra ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .. import batches, design, dropout, fully_connected, pruning, recursion
from ..errors import DoesNotApplyError, GradientInversionError, NotRecoveredError
from ..sharing import Update
from . import patches
from .losses import GUESSES
from .received import Answer, Received, first_layer, gradient_of, match, recover, with_gradients

__all__ = ["ALGEBRA", "SEARCH", "against", "algebra", "search"]

Attack = Callable[[Received], Answer]
ALGEBRA: dict[str, Attack] = {}  # by the kind of a defense
SEARCH: dict[str, Attack] = {}


def against(table: dict[str, Attack], *kinds: str) -> Callable[[Attack], Attack]:
    """Make the decorated function what is done about these kinds of defense.

    Parameters
    ----------
    table : dict
        :data:`ALGEBRA` or :data:`SEARCH`.
    kinds : str
        The ``kind`` of a :class:`~gradinv_edu.engine.defenses.Defense`.
    """

    def add(attack: Attack) -> Attack:
        table.update(dict.fromkeys(kinds, attack))
        return attack

    return add


def algebra(received: Received) -> Answer:
    """The equations that the defense leaves, solved.

    Masks what is known to be unknown, undoes what is known to be changed, takes batches apart,
    asks for no more digits than there are, and fills in what rank hides from public pictures.
    """
    return ALGEBRA.get(_kind(received), _fewer_digits)(received)


def search(received: Received) -> Answer:
    """A picture whose gradient agrees, with the defense in the guess.

    Imitates local steps, guesses as many pictures as the batch has, guesses dropout masks along,
    leaves pruned entries out of the comparison, or begins where the algebra ended.
    """
    return SEARCH.get(_kind(received), _from_algebra)(received)


def _kind(received: Received) -> str:
    return "none" if received.defense is None else received.defense.kind


@against(ALGEBRA, "none")
@against(SEARCH, "none")
def _nothing(received: Received) -> Answer:
    raise DoesNotApplyError("There is nothing to know of: the naive columns are this attack.")


def _fewer_digits(received: Received) -> Answer:
    """The recursion, in coarser and coarser numbers until nothing contradicts."""
    gradients = received.update.gradients
    coarsest = max(torch.finfo(g.dtype).eps for g in gradients.values())
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    *finer, last = [d for d in dtypes if torch.finfo(d).eps >= coarsest]
    for dtype in finer:
        try:
            return recover(with_gradients(received, {n: g.to(dtype) for n, g in gradients.items()}))
        except GradientInversionError:  # too fine, or over float16's largest number
            pass
    return recover(with_gradients(received, {n: g.to(last) for n, g in gradients.items()}))


@against(ALGEBRA, "batch")
def _apart(received: Received) -> Answer:
    """A batch: by sparse directions under a dense first layer, else by the softmax of the last."""
    size, (name, first) = received.update.samples, first_layer(received.model)
    if isinstance(first, nn.Linear):
        G, b = (gradient_of(received, f"{name}.{part}") for part in ("weight", "bias"))
        x = batches.recover_batch(
            G, b, size, weight=first.weight.detach(), bias=first.bias.detach(),
            generator=received.generator,
        )  # fmt: skip
        return Answer(x.reshape(-1, *received.input_shape), True)  # accepted by the forward pass
    place = dropout.classifier(received.model)
    possible = len(batches.possible_labels(gradient_of(received, f"{place}.weight"), size))
    guesses = math.comb(possible + size - 1, size)
    if guesses > GUESSES:
        raise NotRecoveredError(f"{guesses} guesses of the labels, and only {GUESSES} tries.")
    return recover(received, batch_size=size)


@against(ALGEBRA, "clipping")
def _unclipped(received: Received) -> Answer:
    """Give the gradient its size back: the last layer's input tells what its bias gradient was."""
    place = dropout.classifier(received.model)
    head = received.model[place]
    G, b = (gradient_of(received, f"{place}.{part}").double() for part in ("weight", "bias"))
    z = fully_connected.recover_input(G, b) @ head.weight.double().T + head.bias.double()  # type: ignore[operator]
    k = z.detach().softmax(0)
    k[b.argmin()] -= 1
    factor = k.norm() / b.norm()
    gradients = received.update.gradients
    return recover(
        with_gradients(
            received, {n: (g.double() * factor).to(g.dtype) for n, g in gradients.items()}
        )
    )


@against(ALGEBRA, "largest", "random")
def _completed(received: Received) -> Answer:
    """Pruned entries left out. Where a whole column is, and not at random, nothing is sure."""
    whole = pruning.complete_pruned(received.model, received.update, received.loss)  # type: ignore[arg-type]
    x, exact = recover(replace(received, update=whole))
    name = next(n for n, m in received.model.named_children() if isinstance(m, nn.Linear))
    empty = bool((gradient_of(received, f"{name}.weight") == 0).all(0).any())
    assert received.defense is not None
    return Answer(x, exact and not (empty and received.defense.kind == "largest"))


@against(ALGEBRA, "soteria")
def _columns(received: Received) -> Answer:
    """Soteria: the classifier's pruned columns left out, as if dropped; only it has them."""
    first = first_layer(received.model)[1]
    if isinstance(first, nn.Linear) or patches.find(received.model, received.input_shape):
        return recover(received, below=True)  # it says it all
    masked = dropout.with_dropout(received.model, 1e-12).train()
    place = dropout.classifier(received.model)
    head = (f"{place}.weight", f"{place}.bias")
    # k is not known below the masked units, so the rows of the weights must do
    moved = {f"{place + 1}.{n.split('.')[1]}": gradient_of(received, n) for n in head}
    return recover(replace(with_gradients(received, moved), model=masked), below=True)


@against(ALGEBRA, "precode")
def _below(received: Received) -> Answer:
    """PRECODE: the recursion begins at the bottleneck's encoder, below the draw."""
    place = len(received.model) - 2
    below = nn.Sequential(*received.model[:place], received.model[place].encode)  # type: ignore[arg-type]
    sent = {n.replace("encode.", ""): g for n, g in received.update.gradients.items()}
    known = {name: sent[name] for name, _ in below.named_parameters()}
    return recover(replace(received, model=below, update=Update(known)), below=True)


@against(ALGEBRA, "rank")
def _prior(received: Received) -> Answer:
    """What rank hides, filled in from public pictures."""
    if received.public is None:
        raise DoesNotApplyError("What rank hides is filled in from public pictures; give some.")
    model, shape, loss = received.model, received.input_shape, received.loss
    found = recursion.recover(model, received.update, shape, loss)
    return Answer(design.most_likely_input(model, found, loss, received.public), found.exact)


@against(SEARCH, "clipping")
def _unchanged(received: Received) -> Answer:
    raise DoesNotApplyError("The cosine does not see a factor: the naive column is this attack.")


@against(SEARCH, "precode")
def _drawn_anew(received: Received) -> Answer:
    raise DoesNotApplyError("The draw is new in every guess; the algebra does not need it.")


@against(SEARCH, "local steps")
def _imitating(received: Received) -> Answer:
    return match(received, "idlg", steps=received.steps // 20, start="patterned")


@against(SEARCH, "batch")
def _as_many(received: Received) -> Answer:
    return match(received, "inverting_gradients")


@against(SEARCH, "dropout")
def _masks_along(received: Received) -> Answer:
    return match(received, "inverting_gradients", guess_masks=True)


@against(SEARCH, "largest", "random", "soteria")
def _where_sent(received: Received) -> Answer:
    known = {name: g != 0 for name, g in received.update.gradients.items()}
    return match(received, "inverting_gradients", known=known)


def _from_algebra(received: Received) -> Answer:
    try:
        start = algebra(received).inputs.nan_to_num(0.5).clamp(0, 1)
    except GradientInversionError:
        start = torch.full(received.input_shape, 0.5)[None].double()
        start = start if received.public is None else received.public.mean(0, keepdim=True)
    return match(received, "inverting_gradients", start=start, learning_rate=0.02)

"""The capstone: what a federation's clients sent; graded on messages held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import Mistakes, Student, WrongAnswerError, ask, demand, pair, right, told

RIGHT = 40.0  # dB: a picture that nobody can tell from the client's
SURE = 0.9
FULL = 0.95  # share of what can be had from which on all points are given
DOUBLE, LOSS, SHAPE = torch.float64, nn.CrossEntropyLoss(), (1, 8, 8)
Sent = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What the server has of one round.

    Attributes
    ----------
    sent : list of dict
        What arrived, gradients by name: one message, or the secure sums of two rounds.
    model : nn.Module or None
        The network that was sent out; ``None`` for the language model.
    protocol : dict
        What was agreed: ``optimizer``, ``kept`` (share of the entries that a client sends),
        ``dropout`` (rate in front of the last layer, put there by the client), ``same_weights``
        (whether both rounds began from the same weights).
    weights : dict
        Of the language model: ``embedding``, ``positions``, and the first norm's ``scale`` and
        ``shift``; it sends the gradients of its first block's q, k and v.
    """

    sent: list[Sent]
    model: nn.Module | None
    protocol: dict[str, Any]
    weights: Sent = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """A case with its truth: one picture a row, or the words; ``None`` where none is to be had."""

    name: str
    case: Case
    truth: Tensor | list[int] | None
    idea: str


def evidence(seed: int) -> list[Evidence]:
    """Make the cases of ``seed``: of each kind one that can be read, and one that cannot."""
    return list(_evidence(seed))


def _evidence(seed: int) -> Iterator[Evidence]:
    g = torch.Generator().manual_seed(seed)

    def digits(count: int) -> Tensor:
        order = torch.randperm(1700, generator=g)[:count].tolist()
        return gi.data.digits(order, dtype=DOUBLE)[0]

    def gradient(model: nn.Module, x: Tensor, **settings: Any) -> Sent:
        labels = torch.randperm(10, generator=g).repeat(4)[: len(x)]
        return dict(gi.observe(model, LOSS, x, labels, generator=g, **settings).gradients)

    def made(name: str, model: nn.Module, sent: list[Sent], truth: Any, idea: str, **said: Any):
        plain = {"optimizer": "sgd", "kept": 1.0, "dropout": 0.0, "same_weights": True}
        return Evidence(name, Case(sent, model, {**plain, **said}), truth, idea)

    dense = gi.models.mlp([64, 40, 10], activation="leaky_relu", dtype=DOUBLE, generator=g)
    wide = gi.models.mlp([64, 120, 10], dtype=DOUBLE, generator=g)
    x = digits(1)
    yield made("one sample", dense, [gradient(dense, x)], x, "the ratio of the first layer")
    adam = {"optimizer": "adam", "learning_rate": 0.01}
    for name, single in (("a step of Adam", False), ("a step of Adam, sent in float32", True)):
        x = digits(1)
        sent = gradient(dense, x, **adam)
        sent = {n: t.float().double() if single else t for n, t in sent.items()}
        idea = "Adam's first step is one-to-one in each entry, to so many digits"
        yield made(name, dense, [sent], None if single else x, idea, optimizer="adam")
    for name, kept in (("a pruned update", 0.3), ("an update pruned to 3 %", 0.03)):
        x = digits(1)
        pruned = gi.pruning.keep_random(gi.Update(gradient(wide, x)), kept, generator=g).gradients
        idea = "zeros are left out: each pixel needs one entry whose row's bias was kept"
        yield made(name, wide, [dict(pruned)], x if kept > 0.1 else None, idea, kept=kept)
    for name, filters in (("dropout above a convolution", 6), ("dropout above one filter", 1)):
        x, bare = digits(1), _conv(filters, g)
        dropped = gi.dropout.with_dropout(bare, 0.5).train()
        sent = gradient(dropped, x)
        sent = dict(zip(dict(bare.named_parameters()), sent.values(), strict=True))
        idea = "the network that the client used had a dropout; build it, and its zeros are masked"
        yield made(name, bare, [sent], x if filters > 1 else None, idea, dropout=0.5)
    for name, count in (("a batch", 4), ("a batch of thirty", 30)):
        x = digits(count)
        idea = "the rank of the first layer's gradient is how many samples there were"
        yield made(name, wide, [gradient(wide, x)], x if count < 9 else None, idea)
    for name, same in (("two secure sums", True), ("two sums from different weights", False)):
        x = digits(3)
        moved = gi.models.mlp([64, 40, 10], activation="leaky_relu", dtype=DOUBLE, generator=g)
        each = [gradient(dense, one[None]) for one in x]
        later = each if same else [gradient(moved, one[None]) for one in x]
        sums = [{n: sum(s[n] for s in part) for n in each[0]} for part in (each, later[:2])]
        truth = x[2:] if same else None
        idea = "who is in one sum and not in the other is their difference"
        yield made(name, dense, sums, truth, idea, same_weights=same)
    for name, sigma in (("a norm in train mode", 0.0), ("a norm in train mode, and noise", 0.05)):
        x, normed = digits(1), _normed(g)
        sent = {
            n: t + sigma * t.abs().max() * torch.randn(t.shape, generator=g, dtype=DOUBLE)
            for n, t in gradient(normed, x).items()
        }
        idea = "a norm hides one factor, the brightness; full ranks tell the rest"
        yield made(name, normed, [sent], None if sigma else x, idea)
    for name, length in (("a sentence", 14), ("a long text", 60)):
        yield _sentence(name, length, g)


def _drawn(model: nn.Sequential, g: torch.Generator) -> nn.Sequential:
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=DOUBLE) / p[0].numel() ** 0.5)
    return model


def _conv(filters: int, g: torch.Generator) -> nn.Sequential:
    conv = nn.Conv2d(1, filters, 3, 1, 1)
    layers = [conv, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * filters, 10)]
    return _drawn(nn.Sequential(*layers), g)


def _normed(g: torch.Generator) -> nn.Sequential:
    conv, norm = nn.Conv2d(1, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
    act = [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(384, 10)]
    return _drawn(nn.Sequential(conv, norm, *act), g).train()


def _sentence(name: str, length: int, g: torch.Generator) -> Evidence:
    from gradinv_edu.kit import language

    net = language.gpt(200, width=48, length=64, generator=g, dtype=DOUBLE)
    ids = torch.randint(0, 200, (1, length + 1), generator=g)
    loss, names = LOSS(net(ids[:, :-1]), ids[:, 1:]), [f"h.0.attn.{p}_proj.weight" for p in "qkv"]
    found = torch.autograd.grad(loss, [net.get_parameter(n) for n in names])
    norm = net.h[0].ln_1
    weights = {"embedding": net.wte.weight, "positions": net.wpe.weight[:length]}
    weights |= {"scale": norm.weight, "shift": norm.bias}
    known = {n: t.detach() for n, t in weights.items()}
    case = Case([dict(zip(names, found, strict=True))], None, {"kept": 1.0}, known)
    truth = ids[0, :-1].tolist() if length < 48 else None
    return Evidence(name, case, truth, "only inputs of the block lie in the span of its rows")


def _is_right(answer: object, given: Evidence) -> bool:
    """Whether an answer is the client's: every picture in any order, or every word in order."""
    if given.truth is None or answer is None:
        return False
    if isinstance(given.truth, list):
        words = answer.tolist() if isinstance(answer, Tensor) else answer
        return isinstance(words, list) and words == given.truth
    demand(isinstance(answer, Tensor), f"For {given.name}, return pictures as one tensor.")
    with suppress(RuntimeError):
        found = answer.detach().double().reshape(-1, 64)  # type: ignore[union-attr]
        true = given.truth.reshape(-1, 64)
        if len(found) != len(true) or not found.isfinite().all():
            return False
        if "norm" in given.name:  # brightness is hidden
            found = found * (found * true).sum() / found.square().sum().clamp(min=1e-300)
        near = [[gi.metrics.psnr(a, b) > RIGHT for a in found] for b in true]
        return all(any(row) for row in near)
    return False


class Investigate(Mistakes, of="capstone-investigate"):
    def _walk(case, sure=None):
        """What one call of recover makes of the first message."""
        try:
            model, update = case.model, gi.Update(case.sent[0])
            recovery = gi.recover(model, update, SHAPE, LOSS)
        except (gi.errors.GradientInversionError, AttributeError):
            return None, 0.03
        return recovery.inputs, (0.95 if recovery.exact else 0.03) if sure is None else sure

    def one_call_for_everything(case):
        """You earn {points:.0%} of what these messages hold: one call of recover reads what it is
        made for. Nothing of {name} was recovered, and it can be: {idea}."""
        return Investigate._walk(case)

    def sure_of_everything(case):
        """You are {sure:.0%} sure of your answer to {name}, and it is wrong. Some of these
        messages hold nothing, and some nothing to you: what in this one tells you which?"""
        return Investigate._walk(case, 1.0)

    def nothing_dared(case):
        """You answered {name} rightly and are {sure:.0%} sure of it: an answer earns
        1 − (1 − sure)², so that what you do not dare to say earns nothing."""
        return Investigate._solved(case)[0], 0.05

    def half_sure_of_everything(case):
        """You are {sure:.0%} sure of all your answers. Some of them are right to the last digits,
        some hold nothing at all; a number that never moves says nothing."""
        return Investigate._solved(case)[0], 0.5

    def adam_taken_for_a_gradient(case):
        """Like sure_of_everything."""
        plain = {**case.protocol, "optimizer": "sgd"}
        return Investigate._solved(Case(case.sent, case.model, plain, case.weights))

    def _solved(case):
        """The solution of the source, for mistakes that differ from it in one place."""
        said, sent = case.protocol, case.sent[0]
        if case.model is None:
            return Investigate._words(case.weights, sent)
        if len(case.sent) == 2:
            if not said["same_weights"]:
                return None, 0.02
            sent = {n: t - case.sent[1][n] for n, t in sent.items()}
        if said["optimizer"] == "adam":
            if all(torch.equal(t, t.float().double()) for t in sent.values()):
                return None, 0.02
            sent = {n: 1e-8 * t / (1 - t.abs()) for n, t in sent.items()}
        G, b = list(sent.values())[:2]
        if said["kept"] < 1:
            met = (1 - (1 - said["kept"]) ** int((b != 0).sum())) ** 64
            return gi.pruning.recover_pruned(G, b).nan_to_num(), met
        model = case.model
        if said["dropout"]:
            model = gi.dropout.with_dropout(model, said["dropout"]).train()
            sent = dict(zip(dict(model.named_parameters()), sent.values(), strict=True))
        try:
            n = Investigate._rank(G, b) if G.ndim == 2 else 1
            if n > 1:
                return (gi.batches.recover_batch(G, b, n), 0.97) if n <= 8 else (None, 0.02)
            recovery = gi.recover(model, gi.Update(sent), SHAPE, LOSS)
        except gi.errors.GradientInversionError:
            return None, 0.02
        full = all(layer.full_rank for layer in recovery.layers)
        small = recovery.mismatch is not None and recovery.mismatch < 1e-9
        return recovery.inputs, 0.98 if recovery.exact or (full and small) else 0.02

    def _rank(G, b):
        return int(torch.linalg.matrix_rank(torch.cat([G, b[:, None]], 1), rtol=1e-6))

    def _words(weights, sent):
        values, V = torch.linalg.svd(torch.cat(list(sent.values())))[1:]
        rank = int((values > 1e-9 * values[0]).sum())
        if rank == V.shape[1] or rank < len(weights["positions"]):
            return None, 0.02
        streams = weights["embedding"][None] + weights["positions"][:, None]
        size = streams.shape[-1:]
        u = nn.functional.layer_norm(streams, size, weights["scale"], weights["shift"])
        return (u @ V[rank:].T).norm(dim=-1).argmin(dim=1).tolist(), 0.98


def share(said: list[tuple[Evidence, bool, float]]) -> float:
    """Σ (1 − (1 − s)²) over right answers less Σ s² over wrong ones, by how many can be right.

    A proper score: who says how probable an answer is earns most on average; saying nothing
    earns nothing.
    """
    earned = sum(1 - (1 - s) ** 2 if true else -(s**2) for _, true, s in said)
    return max(0.0, earned / sum(given.truth is not None for given, _, _ in said))


def answers(investigate: Student, seed: int) -> list[tuple[Evidence, bool, float]]:
    """Put every case to a student: whether the answer is right, and how sure they are."""
    said = []
    for given in evidence(seed):
        both = pair(ask(investigate, given.case, case=f"on {given.name}"), "investigate(...)")
        sure = both[1].item() if isinstance(both[1], Tensor) else both[1]
        number = isinstance(sure, int | float) and math.isfinite(sure) and 0 <= sure <= 1
        demand(number, f"How sure you are is a number from 0 to 1; yours is {sure!r}.")
        said.append((given, _is_right(both[0], given), float(sure)))
    return said


def check_investigate(investigate: Student, seed: int = 1) -> None:
    """Check: what was recovered, weighed by how sure its finder was."""
    said = answers(investigate, seed)
    points = share(said)
    if points >= FULL:
        right(f"{points:.0%} of what could be had, and you knew where there was nothing.")
        return
    raise _verdict(said, points)


def _verdict(said: list[tuple[Evidence, bool, float]], points: float) -> WrongAnswerError:
    sures = [sure for *_, sure in said]
    fooled = [(g, s) for g, true, s in said if not true and s >= SURE]
    missed = [(g, s) for g, true, s in said if g.truth is not None and not true]
    dared = [(g, s) for g, true, s in said if true and s < SURE]
    hint, worst = Investigate.one_call_for_everything, (missed or dared or said)[0]
    if fooled:
        hint, worst = Investigate.sure_of_everything, fooled[0]
    elif dared and max(sures) < 0.3:
        hint, worst = Investigate.nothing_dared, dared[0]
    elif max(sures) - min(sures) < 1e-6:
        hint = Investigate.half_sure_of_everything
    elif not missed:
        hint, worst = Investigate.nothing_dared, dared[0]
    found = {"name": worst[0].name, "idea": worst[0].idea, "sure": worst[-1]}
    verdict = WrongAnswerError(told(hint, points=points, **found))
    verdict.share = points
    return verdict

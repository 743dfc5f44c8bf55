"""Checks of the exercises to chapter 14, a real federation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import federation
from ..data import digits
from ..federation import CuriousServer, LeakAudit, Schedule
from ..fully_connected import recover_input
from ..models import mlp
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

if TYPE_CHECKING:
    from flwr.app import Context, Message

Weights = dict[str, Tensor]
LOSS = nn.CrossEntropyLoss()
FIRST, LAST = "1", "3"  # names of the dense layers in the networks here


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TURNED = "The sign is turned round: a step goes *against* the gradient."
MULTIPLIED = "You multiplied by the learning rate where the step is to be undone."
UNSCALED = "That is the step itself; the gradient was multiplied by the learning rate to make it."
NO_DECAY = "There is still the decay in your answer: the client's step had two parts."
RETURNED = "You took the decay of the weights that came back; the client's step used those it got."
SCALED_DECAY = (
    "Your decay has the learning rate in it twice, or not at all: write the step down once more, "
    "brackets included."
)


def check_gradient(gradient: Student, seed: int = 1) -> None:
    """Check 14.1: what one step with decay was made of."""
    start, g = _random(seed, 4, 6), _random(seed + 1, 4, 6)
    for rate, decay in ((0.1, 0.0), (0.05, 0.3)):
        end = start - rate * (g + decay * start)
        step = start - end
        known: list[Wrong] = [
            (TURNED, -step / rate - decay * start),
            (TURNED, -step / rate + decay * start),
            (TURNED, -g),
            (MULTIPLIED, step * rate - decay * start),
            (UNSCALED, step - decay * start),
            (UNSCALED, step),
            (NO_DECAY, step / rate),
            (RETURNED, step / rate - decay * end),
            (SCALED_DECAY, step / rate - rate * decay * start),
            (SCALED_DECAY, (step - decay * start) / rate),
        ]
        case = f"for a rate of {rate} and a decay of {decay}"
        answer = ask(gradient, start.clone(), end.clone(), rate, decay, case=case)
        compare(answer, g, f"the gradient {case}", known)
    right("All of it was the server's own: the weights it sent, and the settings it chose.")


def _network(seed: int) -> nn.Sequential:
    return mlp([64, 40, 10], generator=torch.Generator().manual_seed(seed)).double()


def _start(model: nn.Module) -> Weights:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _trained(model: nn.Module, x: Tensor, label: int, steps: int, rate: float = 0.1) -> Weights:
    """What a client returns that has one picture."""
    mine = _network(0)
    mine.load_state_dict(model.state_dict())
    weights = list(mine.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(LOSS(mine(x[None]), torch.tensor([label])), weights)
        with torch.no_grad():
            for weight, g in zip(weights, gradients, strict=True):
                weight.sub_(rate * g)
    return _start(mine)


def _average(replies: Sequence[tuple[Weights, int]], weighted: bool = True) -> Weights:
    counts = [count if weighted else 1 for _, count in replies]
    return {
        name: torch.stack([n * end[name] for n, (end, _) in zip(counts, replies, strict=True)])
        .sum(0)
        .div(sum(counts))
        for name in replies[0][0]
    }


def _ratio(start: Weights, end: Weights, layer: str = FIRST) -> Tensor:
    G, b = (start[f"{layer}.{p}"] - end[f"{layer}.{p}"] for p in ("weight", "bias"))
    return b @ G / b.square().sum()


def _ratios(start: Weights, end: Weights) -> tuple[Tensor, Tensor]:
    """Combine rows that do not agree in either way that students do."""
    G, b = (start[f"{FIRST}.{p}"] - end[f"{FIRST}.{p}"] for p in ("weight", "bias"))
    return b @ G / b.square().sum(), recover_input(G, b)


def _row_by_row(start: Weights, end: Weights) -> Tensor:
    G, b = (start[f"{FIRST}.{p}"] - end[f"{FIRST}.{p}"] for p in ("weight", "bias"))
    return (G / b[:, None]).mean(0)


TWO = "Return two things: the pictures, one a row, and the new weights by name."
PLAIN = (
    "Your new weights weigh every client alike. FedAvg weighs by the samples, and clients would "
    "notice a server that does not."
)
SUMMED = "Your new weights are a sum; divide by the number of all samples."
MIXED = (
    "Your pictures are those of the averaged weights, the same for everybody. The server has each "
    "client's weights before it averages."
)
ABOVE = "That is the last layer's input. Which layer meets the picture itself?"
RAW = "You divided weights, not what the training changed of them: which difference was a gradient?"
DEAD = "A unit that never fired gives 0/0; let those rows have no say."


def check_curious(curious: Student, seed: int = 2) -> None:
    """Check 14.2: a server that reads, and does its work."""
    model = _network(seed)
    pictures, labels = digits(range(seed % 50, seed % 50 + 4), dtype=torch.float64)
    counts = [1, 3, 2, 5]
    replies = [
        (_trained(model, x, int(y), n), n) for x, y, n in zip(pictures, labels, counts, strict=True)
    ]
    start, copies = _start(model), [(dict(w), n) for w, n in replies]
    found, weights = pair(ask(curious, dict(start), copies), TWO)
    demand(isinstance(weights, dict) and set(weights) == set(start), TWO)
    if isinstance(found, list | tuple):
        found = torch.stack([tensor(x, "a picture").flatten() for x in found])
    found = tensor(found, "the stack of pictures").reshape(len(found), -1)
    ends, mean = [end for end, _ in replies], _average(replies)
    known: list[Wrong] = [
        *((MIXED, mixture.expand(4, -1)) for mixture in _ratios(start, mean)),
        *((MIXED, mixture[None]) for mixture in _ratios(start, mean)),
        (ABOVE, torch.stack([_ratio(start, end, LAST) for end in ends])),
        (RAW, torch.stack([_ratio({n: 0 * t for n, t in end.items()}, end) for end in ends])),
        (DEAD, torch.stack([_row_by_row(start, end) for end in ends])),
    ]
    truth = pictures.flatten(1)
    demand(found.shape == truth.shape or found.shape[0] != 4 or found.shape[1] != 40, ABOVE)
    demand(bool(found.isfinite().all()), DEAD)
    compare(found, truth, "the stack of pictures", known, tolerance=1e-7)
    for name, true in _average(replies).items():
        wrongs = [
            (PLAIN, _average(replies, weighted=False)[name]),
            (SUMMED, true * sum(counts)),
            (SUMMED, sum((end[name] for end in ends), 0 * true)),
        ]
        compare(weights[name], true, f"the new {name}", wrongs)
    right("Every picture, through up to five local steps; and the round went on as it should.")


SUBTRACTED = (
    "You subtracted averages. They are of different numbers of samples: only sums can be taken "
    "from each other."
)
EXCHANGED = "Each average goes with its own round's number of samples; yours are exchanged."
ONE_SUM = (
    "That is a mixture of everybody's pictures, out of one round alone. What differs between the "
    "two?"
)
ADDED = "You added the two rounds; the clients of both are to cancel."


def check_unmask(unmask: Student, seed: int = 3) -> None:
    """Check 14.3: the client who was in one secure sum, and not in the other."""
    model = _network(seed)
    pictures, labels = digits(range(60 + seed % 50, 65 + seed % 50), dtype=torch.float64)
    counts = [2, 1, 4, 3, 2]
    replies = [
        (_trained(model, x, int(y), 1), n) for x, y, n in zip(pictures, labels, counts, strict=True)
    ]
    start, both = _start(model), (replies, replies[:-1])
    sums = [(_average(some), sum(n for _, n in some)) for some in both]
    (a, n), (b, m) = sums

    wrong = (
        (SUBTRACTED, 1, 1),
        (EXCHANGED, m, n),
        (ONE_SUM, 1, 0),
        (ONE_SUM, 0, 1),
        (ADDED, n, -m),
        (ADDED, 1, -1),
    )
    known: list[Wrong] = []
    for hint, p, q in wrong:
        end = {name: t - p * (t - a[name]) + q * (t - b[name]) for name, t in start.items()}
        known += [(hint, picture) for picture in _ratios(start, end)]
    answer = tensor(ask(unmask, dict(start), *((dict(w), c) for w, c in sums)), "the picture")
    compare(answer.flatten(), pictures[-1].flatten(), "the picture", known, tolerance=1e-6)
    right("Two sums that were each safe to see: together they are one client's update.")


NO_LIST = "Return the list of mods, in the order in which they stand around the client."
NO_GUARD = "There is no LeakAudit in your list: nobody looks before the update leaves."
NO_NOISE = "The client's own noise is not in your list any more; the guard comes beside it."
JUDGED_EARLY = (
    "An update that the client's noise makes harmless was kept back: your guard judged what never "
    "leaves. The first mod of the list is the outermost, and sees the reply last."
)
WARNED = "A leaking update left: your guard only says so. Which policy keeps it back?"
OWN_NOISE = (
    "Your guard put noise of its own into a leaking update and let it go. Here it is to be kept "
    "back: such noise promises nothing."
)
LAX = "A leaking update left, since your limits call nothing a leak. The default limits will do."
OTHERS = (
    "A leaking update left: your guard compared it with somebody else's picture. Each client must "
    "be asked for its own, `data(context)`."
)
ALWAYS = "An update that the client's noise makes harmless was kept back: {reason}."


class _Blur:
    """A mod that adds noise to the weights that a client returns."""

    def __init__(self, sigma: float, seed: int) -> None:
        self.sigma, self.generator = sigma, torch.Generator().manual_seed(seed)

    def __call__(
        self,
        message: Message,
        context: Context,
        call_next: Callable[[Message, Context], Message],
    ) -> Message:
        from flwr.app import ArrayRecord

        reply = call_next(message, context)
        name, arrays = next(iter(reply.content.array_records.items()))
        noisy = {
            n: t + self.sigma * torch.randn(t.shape, generator=self.generator)
            for n, t in arrays.to_torch_state_dict().items()
        }
        reply.content.array_records[name] = ArrayRecord(noisy)
        return reply


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the guard's warnings for the reports, and out of the notebook."""
    logger = logging.getLogger("gradinv_edu.federation")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_guarded(guarded: Student, seed: int = 4) -> None:
    """Check 14.4: a guard that judges what leaves, in a federation of Flower's."""
    federation.flower()
    model = mlp([64, 40, 10], generator=torch.Generator().manual_seed(seed))
    pictures, labels = digits(range(seed % 50, seed % 50 + 3))

    def data(context: Context) -> tuple[Tensor, Tensor]:
        i = int(context.node_config["partition-id"])
        return pictures[i : i + 1], labels[i : i + 1]

    harmless, leaking = _Blur(1.0, seed), _Blur(1e-7, seed)
    for noise in (harmless, leaking):
        mods = ask(guarded, model, LOSS, data, noise)
        demand(isinstance(mods, list) and all(callable(mod) for mod in mods), NO_LIST)
        audits = [mod for mod in mods if isinstance(mod, LeakAudit)]
        demand(audits, NO_GUARD)
        demand(noise in mods, NO_NOISE)
        with _silent():
            server = _round(model, data, mods)
        if noise is harmless:
            reason = audits[0].reports[0].reason if audits[0].reports else "it saw nothing"
            early = mods.index(noise) < mods.index(audits[0])
            hint = JUDGED_EARLY if early else ALWAYS.format(reason=reason)
            demand(len(server.received) == len(pictures), hint)
        else:
            demand(not server.received, _why_it_left(audits[0]))
    right("What the noise hides may leave, and what leaks stays: the server learns of neither why.")


def _round(model: nn.Module, data: Any, mods: list[Any]) -> CuriousServer:
    from flwr.serverapp.strategy import FedAvg

    with federation.quiet():
        server = CuriousServer(FedAvg(fraction_evaluate=0.0), model)
    app = federation.client_app(model, LOSS, data, mods)
    federation.simulate(server, app, model, Schedule(0.1), clients=3)
    return server


def _why_it_left(audit: LeakAudit) -> str:
    if audit.policy == "warn":
        return WARNED
    if audit.policy == "noise":
        return OWN_NOISE
    limits, default = audit.limits, federation.Limits()
    return LAX if limits.psnr > default.psnr or limits.ssim > default.ssim else OTHERS


@dataclass(frozen=True)
class Round:
    """One round of a federation, as it was announced.

    Attributes
    ----------
    name : str
        What it is called here.
    clients : int
        How many take part.
    samples : int
        Of each client.
    steps : int
        Optimiser steps of each client, all of its samples in each.
    secure : bool
        Whether the server sees the sum alone.
    colluding : int
        How many of the clients tell the server what they sent.
    epsilon : float or None
        Of differential privacy, for one update.
    noise_at : {"client", "server", None}
        Where its noise is added.
    """

    name: str
    clients: int = 4
    samples: int = 1
    steps: int = 1
    secure: bool = False
    colluding: int = 0
    epsilon: float | None = None
    noise_at: str | None = None


WORDS = ("whose", "what", "nothing shown")
CENTRAL = "that noise is added after the server has seen each update."
FEW = "the sum of so few pictures is a small batch, which comes apart."
HIDDEN = "the pictures come out of the sum, and nobody can tell who sent which."
MASKS = "a masked update says nothing by itself, and the sum holds far more than comes apart."
EPOCHS = "the first dense layer's input is the same in every step, and so is its ratio."
FRIENDS = (
    "those who tell the server can be taken out of the sum. Whose updates are in what is left?"
)
WEAK = "an ε of {epsilon:g} is too large to hide a picture."
HIDES = "at so small an ε, noise that is added before the update leaves hides the picture."
CROWD = "so many pictures in one update do not come apart by what the course has shown."
BLEND = "after several steps of several clients, neither ratio nor batch attack holds for the sum."
OPEN = "nothing stands between the server and this update."


def _rounds(seed: int) -> list[tuple[Round, str, str]]:
    """Rounds, what the server learns of the honest clients, and why."""
    n = int(torch.randint(0, 20, (), generator=torch.Generator().manual_seed(seed)))
    return [
        (Round("plain FedAvg"), "whose", OPEN),
        (Round("twenty local steps", steps=20 + n), "whose", EPOCHS),
        (Round("noise at the server", epsilon=1.0, noise_at="server"), "whose", CENTRAL),
        (Round("noise of the client", epsilon=0.5, noise_at="client"), "nothing shown", HIDES),
        (Round("a little noise", epsilon=1000.0 + n, noise_at="client"), "whose", WEAK),
        (Round("four in a secure sum", secure=True), "what", HIDDEN),
        (Round("hundreds in a sum", clients=300 + n, secure=True), "nothing shown", MASKS),
        (Round("two clients of 100", clients=2, samples=100 + n), "nothing shown", CROWD),
        (Round("two clients of 100, secure", 2, 100 + n, secure=True), "nothing shown", MASKS),
        (
            Round("a server with friends", 100 + n, secure=True, colluding=99 + n),
            "whose",
            FRIENDS,
        ),
        (Round("fewer friends", 100 + n, secure=True, colluding=96 + n), "what", FRIENDS),
        (Round("a secure sum of epochs", steps=5 + n, secure=True), "nothing shown", BLEND),
        (
            Round("secure, noise at the server", secure=True, epsilon=1.0, noise_at="server"),
            "what",
            CENTRAL,
        ),
        (Round("small batches", clients=50, samples=2), "whose", FEW),
    ]


def check_learns(learns: Student, seed: int = 5) -> None:
    """Check 14.5: what the server can read in a round, and of whom."""
    for case, true, why in _rounds(seed):
        answer = ask(learns, case, case=f"for “{case.name}”")
        demand(answer in WORDS, f"Return one of {', '.join(map(repr, WORDS))}; got {answer!r}.")
        hint = why.format(epsilon=case.epsilon or 0)
        demand(answer == true, f"“{case.name}”: not “{answer}”. Think again: {hint}")
    right("Ask in this order: what does the server see, of how many pictures, before which noise?")

"""Checks of the exercises on a real federation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    expect,
    known,
    normal,
    pair,
    right,
    tensor,
    told,
)

if TYPE_CHECKING:
    from flwr.app import Context, Message

Weights = dict[str, Tensor]
LOSS = nn.CrossEntropyLoss()


class Gradient(Mistakes, of="federation-gradient"):
    def sign_turned(sent, returned, rate, decay):
        """The sign is turned round: a step goes *against* the gradient."""
        return (returned - sent) / rate - decay * sent

    def all_signs_turned(sent, returned, rate, decay):
        """Like sign_turned."""
        return (returned - sent) / rate + decay * sent

    def rate_multiplied(sent, returned, rate, decay):
        """You multiplied by the learning rate where the step is to be undone."""
        return (sent - returned) * rate - decay * sent

    def rate_forgotten(sent, returned, rate, decay):
        """That is the step itself; the gradient was multiplied by the learning rate to make it."""
        return sent - returned - decay * sent

    def step_itself(sent, returned, rate, decay):
        """Like rate_forgotten."""
        return sent - returned

    def decay_forgotten(sent, returned, rate, decay):
        """There is still the decay in your answer: the client's step had two parts."""
        return (sent - returned) / rate

    def decay_of_the_returned_weights(sent, returned, rate, decay):
        """You took the decay of the weights that came back; the client's step used those it
        got."""
        return (sent - returned) / rate - decay * returned

    def decay_divided_by_the_rate(sent, returned, rate, decay):
        """Your decay has the learning rate in it twice, or not at all: write the step down once
        more, brackets included."""
        return (sent - returned - decay * sent) / rate

    def decay_times_the_rate(sent, returned, rate, decay):
        """Like decay_divided_by_the_rate."""
        return (sent - returned) / rate - rate * decay * sent


def check_gradient(gradient: Student, seed: int = 1) -> None:
    """Check: what one step with decay was made of."""
    start, g = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    for rate, decay in ((0.1, 0.0), (0.05, 0.3)):
        given = (start, start - rate * (g + decay * start), rate, decay)
        case = f"for a rate of {rate} and a decay of {decay}"
        expect("federation-gradient", gradient, given, g, "the gradient", case)
    right("All of it was the server's own: the weights it sent, and the settings it chose.")


def _network(seed: int) -> nn.Sequential:
    return gi.models.mlp([64, 40, 10], generator=torch.Generator().manual_seed(seed)).double()


def _state(model: nn.Module) -> Weights:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _trained(model: nn.Module, x: Tensor, label: int, steps: int, rate: float = 0.1) -> Weights:
    """What a client returns that has one picture."""
    mine = _network(0)
    mine.load_state_dict(model.state_dict())
    weights = list(mine.parameters())
    for _ in range(steps):
        slopes = torch.autograd.grad(LOSS(mine(x[None]), torch.tensor([label])), weights)
        with torch.no_grad():  # torch.optim would load its compiler, which takes two seconds
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= rate * slope
    return _state(mine)


def _average(replies: Sequence[tuple[Weights, int]], weighted: bool = True) -> Weights:
    counts = [count if weighted else 1 for _, count in replies]
    parts = [(n / sum(counts), end) for n, (end, _) in zip(counts, replies, strict=True)]
    return {name: sum(share * end[name] for share, end in parts) for name in replies[0][0]}


def _change(start: Weights, end: Weights, layer: str = "1") -> tuple[Tensor, Tensor]:
    return tuple(start[f"{layer}.{p}"] - end[f"{layer}.{p}"] for p in ("weight", "bias"))


def _least(G: Tensor, b: Tensor) -> Tensor:
    """Combine rows by least squares; students do it so, or by the package's way."""
    return b @ G / b.square().sum()


WAYS = (gi.fully_connected.recover_input, _least)


def _pictures(start, replies, layer="1", way=WAYS[0]) -> Tensor:
    return torch.stack([way(*_change(start, end, layer)) for end, _ in replies])


class Curious(Mistakes, of="federation-curious"):
    def plain_mean(start, replies):
        """Your new weights weigh every client alike. FedAvg weighs by the samples, and clients
        would notice a server that does not."""
        return _pictures(start, replies), _average(replies, weighted=False)

    def sum_for_mean(start, replies):
        """Your new weights are a sum; divide by the number of all samples."""
        total = {name: sum(n * end[name] for end, n in replies) for name in start}
        return _pictures(start, replies), total

    def sum_of_the_weights(start, replies):
        """Like sum_for_mean."""
        total = {name: sum(end[name] for end, _ in replies) for name in start}
        return _pictures(start, replies), total

    def pictures_of_the_average(start, replies, way=WAYS[0], rows=4):
        """Your pictures are those of the averaged weights, the same for everybody. The server has
        each client's weights before it averages."""
        mean = _average(replies)
        return _pictures(start, [(mean, 1)] * rows, way=way), mean

    def mixture_by_least_squares(start, replies):
        """Like pictures_of_the_average."""
        return Curious.pictures_of_the_average(start, replies, WAYS[1])

    def one_mixture(start, replies):
        """Like pictures_of_the_average."""
        return Curious.pictures_of_the_average(start, replies, rows=1)

    def one_mixture_by_least_squares(start, replies):
        """Like pictures_of_the_average."""
        return Curious.pictures_of_the_average(start, replies, WAYS[1], rows=1)

    def gradient_of_the_wrong_layer(start, replies):
        """That is the last layer's input. Which layer meets the picture itself?"""
        return _pictures(start, replies, "3"), _average(replies)

    def weights_divided(start, replies):
        """You divided weights, not what the training changed of them: which difference was a
        gradient?"""
        zero = {name: 0 * t for name, t in start.items()}
        return _pictures(zero, replies, way=_least), _average(replies)

    def dead_units_averaged(start, replies):
        """A unit that never fired gives 0/0; let those rows have no say."""
        return _pictures(start, replies, way=lambda G, b: (G / b[:, None]).mean(0)), start


def check_curious(curious: Student, seed: int = 2) -> None:
    """Check: a server that reads, and does its work."""
    model, counts = _network(seed), [1, 3, 2, 5]
    pictures, labels = gi.data.digits(range(seed % 50, seed % 50 + 4), dtype=torch.float64)
    clients = zip(pictures, labels, counts, strict=True)
    replies = [(_trained(model, x, int(y), n), n) for x, y, n in clients]
    start, two = _state(model), "Return two things: the pictures, one a row, and the new weights."
    found, weights = pair(ask(curious, dict(start), [(dict(w), n) for w, n in replies]), two)
    demand(isinstance(weights, dict) and set(weights) == set(start), two)
    if isinstance(found, list | tuple):
        found = torch.stack([tensor(x, "a picture").flatten() for x in found])
    found = tensor(found, "the stack of pictures").reshape(len(found), -1)
    wrong = [*known("federation-curious", (start, replies))]
    demand(found.shape != (4, 40), Curious.gradient_of_the_wrong_layer)
    demand(found.isfinite().all(), Curious.dead_units_averaged)
    said = ((hint, both[0]) for hint, both in wrong)
    compare(found, pictures.flatten(1), "the stack of pictures", said, tolerance=1e-7)
    for name, true in _average(replies).items():
        compare(weights[name], true, f"the new {name}", ((h, both[1][name]) for h, both in wrong))
    right("Every picture, through up to five local steps; and the round went on as it should.")


def _combined(start, first, second, p, q, way):
    """What p times the first round's change, less q times the second's, shows."""
    changes = zip(_change(start, first[0]), _change(start, second[0]), strict=True)
    return way(*(p * a - q * b for a, b in changes))


class Unmask(Mistakes, of="federation-unmask"):
    def averages_subtracted(start, first, second, way=WAYS[0]):
        """You subtracted averages. They are of different numbers of samples: only sums can be
        taken from each other."""
        return _combined(start, first, second, 1, 1, way)

    def counts_exchanged(start, first, second, way=WAYS[0]):
        """Each average goes with its own round's number of samples; yours are exchanged."""
        return _combined(start, first, second, second[1], first[1], way)

    def first_round_alone(start, first, second, way=WAYS[0]):
        """That is a mixture of everybody's pictures, out of one round alone. What differs between
        the two?"""
        return _combined(start, first, second, 1, 0, way)

    def second_round_alone(start, first, second, way=WAYS[0]):
        """Like first_round_alone."""
        return _combined(start, first, second, 0, -1, way)

    def rounds_added(start, first, second, way=WAYS[0]):
        """You added the two rounds; the clients of both are to cancel."""
        return _combined(start, first, second, first[1], -second[1], way)

    def averages_added(start, first, second, way=WAYS[0]):
        """Like rounds_added."""
        return _combined(start, first, second, 1, -1, way)


def check_unmask(unmask: Student, seed: int = 3) -> None:
    """Check: the client who was in one secure sum, and not in the other."""
    model, counts = _network(seed), [2, 1, 4, 3, 2]
    pictures, labels = gi.data.digits(range(60 + seed % 50, 65 + seed % 50), dtype=torch.float64)
    clients = zip(pictures, labels, counts, strict=True)
    replies = [(_trained(model, x, int(y), 1), n) for x, y, n in clients]
    sums = [(_average(some), sum(n for _, n in some)) for some in (replies, replies[:-1])]
    given = (_state(model), *sums)
    wrong = [
        (told(m), m(*given, way=way)) for m in Mistakes.KNOWN["federation-unmask"] for way in WAYS
    ]
    answer = tensor(ask(unmask, dict(given[0]), *((dict(w), c) for w, c in sums)), "the picture")
    compare(answer.flatten(), pictures[-1].flatten(), "the picture", wrong, tolerance=1e-6)
    right("Two sums that were each safe to see: together they are one client's update.")


def _audit(model, loss, data, **settings):
    return gi.federation.LeakAudit(model, loss, data, **{"seconds": 60, **settings})


class Guarded(Mistakes, of="federation-guarded"):
    def guard_inside_the_noise(model, loss, data, noise):
        """An update that the client's noise makes harmless was kept back: your guard judged what
        never leaves. The first mod of the list is the outermost, and sees the reply last."""
        return [noise, _audit(model, loss, data)]

    def no_guard(model, loss, data, noise):
        """There is no LeakAudit in your list: nobody looks before the update leaves."""
        return [noise]

    def noise_thrown_out(model, loss, data, noise):
        """The client's own noise is not in your list any more; the guard comes beside it."""
        return [_audit(model, loss, data)]

    def a_warning_only(model, loss, data, noise):
        """A leaking update left: your guard only says so. Which policy keeps it back?"""
        return [_audit(model, loss, data, policy="warn"), noise]

    def noise_of_the_guard(model, loss, data, noise):
        """Your guard put noise of its own into a leaking update and let it go. Here it is to be
        kept back: such noise promises nothing."""
        return [_audit(model, loss, data, policy="noise"), noise]

    def limits_out_of_reach(model, loss, data, noise):
        """A leaking update left, since your limits call nothing a leak. The default limits will
        do."""
        limits = gi.federation.Limits(psnr=1000, ssim=1.1)
        return [_audit(model, loss, data, limits=limits), noise]

    def one_picture_for_all(model, loss, data, noise):
        """A leaking update left: your guard compared it with somebody else's picture. Each client
        must be asked for its own, `data(context)`."""

        def blank(context):
            inputs, targets = data(context)
            return torch.zeros_like(inputs), targets

        return [_audit(model, loss, blank), noise]


class _Blur:
    """A mod that adds noise to the weights that a client returns."""

    def __init__(self, sigma: float, seed: int) -> None:
        self.sigma, self.generator = sigma, torch.Generator().manual_seed(seed)

    def __call__(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
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


def check_guarded(guarded: Student, seed: int = 4) -> None:
    """Check: a guard that judges what leaves, in a federation of Flower's."""
    model = gi.models.mlp([64, 40, 10], generator=torch.Generator().manual_seed(seed))
    pictures, labels = gi.data.digits(range(seed % 50, seed % 50 + 3))

    def data(context: Context) -> tuple[Tensor, Tensor]:
        i = int(context.node_config["partition-id"])
        return pictures[i : i + 1], labels[i : i + 1]

    in_order = "Return the list of mods, in the order in which they stand around the client."
    for sigma in (1.0, 1e-7):
        noise = _Blur(sigma, seed)
        mods = ask(guarded, model, LOSS, data, noise)
        demand(isinstance(mods, list) and all(callable(mod) for mod in mods), in_order)
        audits = [mod for mod in mods if isinstance(mod, gi.federation.LeakAudit)]
        demand(audits, Guarded.no_guard)
        demand(noise in mods, Guarded.noise_thrown_out)
        with gi.federation.quiet(logging.CRITICAL):  # warnings are for the reports
            received = _round(model, data, mods).received
        guard = audits[0]
        if sigma == 1.0:
            early = mods.index(noise) < mods.index(guard)
            demand(len(received) == 3 or not early, Guarded.guard_inside_the_noise)
            reason = guard.reports[0].reason if guard.reports else "it saw nothing"
            kept = f"An update that the client's noise makes harmless was kept back: {reason}."
            demand(len(received) == 3, kept)
        elif received:
            limits, default = guard.limits, gi.federation.Limits()
            lax = limits.psnr > default.psnr or limits.ssim > default.ssim
            demand(guard.policy != "warn", Guarded.a_warning_only)
            demand(guard.policy != "noise", Guarded.noise_of_the_guard)
            demand(False, Guarded.limits_out_of_reach if lax else Guarded.one_picture_for_all)
    right("What the noise hides may leave, and what leaks stays: the server learns of neither why.")


def _round(model: nn.Module, data: Any, mods: list[Any]) -> Any:
    from flwr.serverapp.strategy import FedAvg

    with gi.federation.quiet():
        server = gi.federation.CuriousServer(FedAvg(fraction_evaluate=0.0), model)
    app = gi.federation.client_app(model, LOSS, data, mods)
    gi.federation.simulate(server, app, model, gi.federation.Schedule(0.1), clients=3)
    return server


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


def _learned(r: Round, noise=("client",), colluding=True, samples=True) -> str:
    """Solve the exercise, with something believed or forgotten."""
    if r.noise_at in noise and r.epsilon <= 1:
        return "nothing shown"
    together = r.clients - (r.colluding if colluding else 0) if r.secure else 1
    pictures = together * (r.samples if samples else 1)
    if pictures > 1 and (pictures > 8 or r.steps > 1):
        return "nothing shown"
    return "what" if together > 1 else "whose"


class Learns(Mistakes, of="federation-learns"):
    def noise_of_the_server_trusted(r):
        """“{name}”: not “{said}”. Think again: that noise is added after the server has seen each
        update."""
        return _learned(r, noise=("client", "server"))

    def masks_hide_the_sum_too(r):
        """“{name}”: not “{said}”. Think again: the pictures come out of the sum, and nobody can
        tell who sent which."""
        return "nothing shown" if r.secure else _learned(r)

    def sum_read_with_names(r):
        """Like masks_hide_the_sum_too."""
        return _learned(r).replace("what", "whose")

    def local_steps_trusted(r):
        """“{name}”: not “{said}”. Think again: the first dense layer's input is the same in every
        step, and so is its ratio."""
        return "nothing shown" if r.steps > 1 else _learned(r)

    def colluding_clients_forgotten(r):
        """“{name}”: not “{said}”. Think again: those who tell the server can be taken out of the
        sum. Whose updates are in what is left?"""
        return _learned(r, colluding=False)

    def any_epsilon_believed(r):
        """“{name}”: not “{said}”. Think again: an ε of {epsilon:g} is too large to hide a
        picture."""
        return "nothing shown" if r.noise_at == "client" else _learned(r)

    def clients_counted_instead_of_samples(r):
        """“{name}”: not “{said}”. Think again: so many pictures in one update do not come apart by
        what the course has shown."""
        return _learned(r, samples=False)


def check_learns(learns: Student, seed: int = 5) -> None:
    """Check: what the server can read in a round, and of whom."""
    n = int(torch.randint(0, 20, (), generator=torch.Generator().manual_seed(seed)))
    again, none = "“{name}”: not “{said}”. Think again: ", "nothing shown"
    plain = again + "nothing stands between the server and this update."
    few = again + "the sum of so few pictures is a small batch, which comes apart."
    masks = "a masked update says nothing by itself, and the sum holds far more than comes apart."
    hides = "at so small an ε, noise that is added before the update leaves hides the picture."
    blend = "after several steps of several clients, neither ratio nor batch attack holds."
    epochs, central = Learns.local_steps_trusted, Learns.noise_of_the_server_trusted
    friends, masks, large = Learns.colluding_clients_forgotten, again + masks, "two clients of 100"
    server, client = {"noise_at": "server", "epsilon": 1.0}, {"noise_at": "client"}
    cases = [
        (Round("plain FedAvg"), "whose", plain),
        (Round("twenty local steps", steps=20 + n), "whose", epochs),
        (Round("noise at the server", **server), "whose", central),
        (Round("noise of the client", epsilon=0.5, **client), none, again + hides),
        (
            Round("a little noise", epsilon=1000.0 + n, **client),
            "whose",
            Learns.any_epsilon_believed,
        ),
        (Round("four in a secure sum", secure=True), "what", Learns.masks_hide_the_sum_too),
        (Round("hundreds in a sum", clients=300 + n, secure=True), none, masks),
        (Round(large, 2, 100 + n), none, Learns.clients_counted_instead_of_samples),
        (Round(f"{large}, secure", 2, 100 + n, secure=True), none, masks),
        (Round("a server with friends", 100 + n, secure=True, colluding=99 + n), "whose", friends),
        (Round("fewer friends", 100 + n, secure=True, colluding=96 + n), "what", friends),
        (Round("a secure sum of epochs", steps=5 + n, secure=True), none, again + blend),
        (Round("secure, noise at the server", secure=True, **server), "what", central),
        (Round("small batches", clients=50, samples=2), "whose", few),
    ]
    options = ("whose", "what", none)
    for case, true, hint in cases:
        answer = ask(learns, case, case=f"for “{case.name}”")
        demand(answer in options, f"Return one of {', '.join(map(repr, options))}; got {answer!r}.")
        facts = {"name": case.name, "said": answer, "epsilon": case.epsilon or 0}
        demand(answer == true, hint, **facts)
    right("Ask in this order: what does the server see, of how many pictures, before which noise?")

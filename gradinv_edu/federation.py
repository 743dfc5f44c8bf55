"""A real federation, seen from both ends: a server that reads, and a client that looks first."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from . import checks, metrics, rank
from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    MissingExtraError,
    UnknownNameError,
)
from .sharing import Update

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy
except ImportError as missing:
    raise MissingExtraError(
        f"This part needs Flower, which is not installed here ({missing}): "
        "pip install 'gradinv_edu[federation]'."
    ) from missing
from .engine import client
from .engine.attackers import get as get_attacker
from .engine.client import (
    Attempt,
    Limits,
    Report,
    Schedule,
    Weights,
    client_app,
    first_layer_ratio,
    similar_rows,
)
from .engine.flower import error_reply, quiet, secure_aggregation, simulate
from .engine.progress import Deadline, OutOfTime

__all__ = [
    "Attempt", "CuriousServer", "Failure", "LeakAudit", "Limits", "Received", "Report",
    "Schedule", "SecureRound", "client_app", "first_layer_ratio", "quiet", "relative_leakage",
    "secure_round", "similar_rows", "simulate", "update_from_weights",
]  # fmt: skip

log = logging.getLogger("gradinv_edu.federation")
Policy = Literal["warn", "noise", "withhold"]
CRAFTED = 0.5  # share of similar rows from which weights are no accident
STATE = "gradinv_edu.audit"  # the audit's place in a client's context, which does not travel


def update_from_weights(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    schedule: Schedule,
    samples: int = 1,
) -> Update:
    r""":math:`(\theta_0 - \theta_T)/\eta`, from the two sets of weights that cross the network.

    Implements :eq:`weights-returned`.

    Parameters
    ----------
    model : torch.nn.Module
        Says which entries are parameters; buffers are left out.
    start, end : mapping of str to Tensor
        :math:`\theta_0`, sent, and :math:`\theta_T`, returned: state dictionaries.
    schedule : Schedule
        With the learning rate :math:`\eta`.
    samples : int
        That the client says it used.

    Raises
    ------
    InvalidTensorError
        If what came back is of another architecture, or is not finite.
    """
    _same_architecture(start, end)
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: (start[name] - end[name]) / schedule.learning_rate for name in names}
    update = schedule.update(gradients, samples)
    update.check(model)
    return update


def _same_architecture(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    if set(start) != set(end):
        odd = ", ".join(sorted(set(start) ^ set(end)))
        raise InvalidTensorError(f"The update is of another architecture: {odd} not in both.")
    for name, tensor in start.items():
        if tensor.shape != end[name].shape:
            raise InvalidTensorError(
                f"The update is of another architecture: {name} has shape "
                f"{tuple(end[name].shape)}, {tuple(tensor.shape)} was sent."
            )


# --- a server that reads ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Received:
    """One client's update of one round, and the model with the weights that the round began with.

    ``gi.recover(seen.model, seen.update, …)`` reads it; Flower numbers the nodes.
    """

    round: int
    node: int
    update: Update
    model: nn.Module = field(repr=False)


@dataclass(frozen=True)
class Failure:
    """One client that sent no usable update in one round, and why: its reason or the server's."""

    round: int
    node: int
    reason: str


class CuriousServer:
    """An honest but curious server: does all that its strategy does, and keeps what passes by.

    Wraps any strategy of ``flwr.serverapp.strategy``, Flower's wrappers for differential
    privacy among them; nothing that the clients see changes. An update of another architecture,
    or with entries that are not finite, is refused by name, and the round goes on with the others.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        The one that does the work.
    model : torch.nn.Module
        The architecture; not changed.

    Attributes
    ----------
    received : list of Received
        Every update, in the order of rounds and nodes.
    failures : list of Failure
        Every client without one, and why.
    """

    def __init__(self, strategy: Strategy, model: nn.Module) -> None:
        self.strategy, self.model = strategy, model
        self.received: list[Received] = []
        self.failures: list[Failure] = []

    def start(self, grid: Grid, *args: Any, **settings: Any) -> Result:
        """Run the federation, as Flower's ``Strategy.start`` does."""
        tapped = copy.copy(grid)
        tapped.send_and_receive = partial(self._exchange, grid)  # type: ignore[method-assign]
        return self.strategy.start(tapped, *args, **settings)

    def _exchange(
        self, grid: Grid, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send and receive, and keep each update; broken ones the strategy does not see."""
        messages = list(messages)
        if not messages or not messages[0].metadata.message_type.startswith("train"):
            return list(grid.send_and_receive(messages, timeout=timeout))
        start, told = client.sent(messages[0])
        schedule, round_ = Schedule.read(told), int(told.get("server-round", 0))
        model, usable = copy.deepcopy(self.model), list[Message]()
        _same_architecture(model.state_dict(), start)
        model.load_state_dict(start)
        replies = grid.send_and_receive(messages, timeout=timeout)
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node, reason = reply.metadata.src_node_id, None
            if reply.has_error():
                reason = reply.error.reason or f"error {reply.error.code}"
                usable.append(reply)  # the strategy counts these
            else:
                try:
                    end, samples = client.returned(reply)
                    update = update_from_weights(model, start, end, schedule, samples)
                    self.received.append(Received(round_, node, update, model))
                    usable.append(reply)
                except GradientInversionError as error:
                    reason = str(error)
            if reason is not None:
                log.warning("Round %d: no update of client %d: %s", round_, node, reason)
                self.failures.append(Failure(round_, node, reason))
        return usable


class SecureRound(NamedTuple):
    """What the server has after one round of secure aggregation."""

    masked: tuple[Weights, ...]
    """What each client sent: whole numbers modulo :math:`2^{32}`, by parameter name."""
    update: Update
    """The average, as the update of one client with everybody's samples."""
    failures: tuple[Failure, ...]
    """Clients without an answer in some stage of the protocol."""


def secure_round(
    app: ClientApp,
    model: nn.Module,
    schedule: Schedule,
    *,
    clients: int,
    samples: int | None = None,
    max_weight: float = 1000.0,
    clipping_range: float = 8.0,
    unreachable: Iterable[int] = (),
) -> SecureRound:
    r""":math:`\frac1\eta\bigl(\theta_0 - \sum_i n_i \theta_i / \sum_i n_i\bigr)`, alone.

    One round of Flower's own SecAgg+ workflow, in this process. After one full-batch step each,
    the sum is the gradient of one batch that holds everybody's samples. Implements
    :eq:`secure-sum`.

    Parameters
    ----------
    app : flwr.clientapp.ClientApp
        Of :func:`client_app`, with Flower's ``secaggplus_mod`` among its mods.
    model : torch.nn.Module
        Whose weights :math:`\theta_0` the round begins with.
    schedule : Schedule
        What the clients are told.
    clients : int
        How many; three or more, or InvalidArgumentError. InvalidTensorError if fewer answer.
    samples : int, optional
        :math:`\sum_i n_i`; by default one of each client.
    max_weight : float
        Largest :math:`n_i` that the protocol provides for; weights are rounded in steps of
        ``2 · clipping_range · max_weight / 2²²`` over :math:`n_i`.
    clipping_range : float
        Largest weight that the protocol can carry.
    unreachable : iterable of int
        Partitions that never answer.
    """
    if clients < 3:
        raise InvalidArgumentError(
            f"Secure aggregation takes three clients or more, not {clients}."
        )
    start = {n: t.detach() for n, t in model.state_dict().items()}
    protocol = {"max_weight": max_weight, "clipping_range": clipping_range}
    end, masked, lost = secure_aggregation(app, start, schedule, clients, unreachable, protocol)
    update = update_from_weights(model, start, end, schedule, samples or clients - len(lost))
    return SecureRound(masked, update, tuple(Failure(1, node, "no answer") for node in lost))


# --- a client that looks first ----------------------------------------------------------------


def relative_leakage(truth: Tensor, recovered: Tensor, prior: Tensor) -> float:
    r""":math:`\bigl(s(x, \hat x) - s(x, x_0)\bigr) / s(x, x_0)`: how far beyond a prior.

    0: the recovered picture is no nearer to the truth than what anybody would have guessed; 1:
    twice as similar; infinite where the prior is not similar at all. Implements
    :eq:`relative-leakage`. Source: NVIDIA FLARE's client filter for data leakage.

    Parameters
    ----------
    truth, recovered, prior : Tensor, (…, H, W)
        :math:`x`, :math:`\hat x` and :math:`x_0`; :math:`s` is SSIM, and raises as it does.
    """
    base = metrics.ssim(truth, prior)
    gained = metrics.ssim(truth, recovered) - base
    return gained / base if base > 0 else math.copysign(math.inf, gained) if gained else 0.0


class LeakAudit:
    """A Flower mod that attacks its own client's update before it leaves.

    One line in a client app: ``ClientApp(mods=[LeakAudit(model, loss, data)])``. Put it first, so
    that it sees what leaves last, after the other mods. Before it trains, it looks at the weights
    that came (:func:`similar_rows`); once, it audits the architecture; on each update it runs the
    course's attacks within a budget of seconds, scores what they recover against the client's own
    data, logs a report, and acts. Nothing of the report is sent.

    It fails closed: under ``"noise"`` and ``"withhold"`` an update is kept back also if the budget
    ended any of the attacks, or if the audit itself failed; on weights that look crafted the
    client does not train at all. An update that passes has withstood these attacks, no more.

    Parameters
    ----------
    model, loss : torch.nn.Module
        The client's.
    data : callable
        ``data(context)`` gives this client's inputs and targets, as for :func:`client_app`.
    policy : {"withhold", "noise", "warn"}
        Keep a leaking update back; add Gaussian noise until no attack reaches a limit, then twice
        as much; or send it and say so. Noise that stops these attacks promises nothing about
        others: for a promise take Flower's ``LocalDpMod``. UnknownNameError if there is no such.
    attackers : iterable of str
        Those to try, in this order, until one reaches a limit; UnknownNameError if not known.
    limits : Limits
        What counts as a leak.
    seconds : float
        Budget for each update, noise included; InvalidArgumentError if there is none.
    prior : Tensor, optional
        :math:`x_0` of :func:`relative_leakage`; by default mid-grey.
    folder : str or path, optional
        Where to append the reports, a file for each client, as lines of JSON.
    generator : torch.Generator, optional
        Of the noise, for tests; by default the noise cannot be predicted.

    Attributes
    ----------
    reports : list of Report
        All that were made in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        data: client.Data,
        *,
        policy: Policy = "withhold",
        attackers: Iterable[str] = ("ratio", "recursion"),
        limits: Limits | None = None,
        seconds: float = 10.0,
        prior: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.attackers = tuple(attackers)
        if policy not in get_args(Policy):
            raise UnknownNameError(
                f"No policy {policy!r}; there are {', '.join(get_args(Policy))}."
            )
        for name in self.attackers:
            get_attacker(name, own=True)
        if not seconds > 0:
            raise InvalidArgumentError(f"seconds must be positive, got {seconds!r}.")
        self.model, self.loss, self.data, self.policy = model, loss, data, policy
        self.limits, self.seconds, self.prior = limits or Limits(), seconds, prior
        self.folder, self.generator = folder, generator
        self.reports: list[Report] = []

    def __call__(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Give the client's reply, the same with noise, or an error without a reason."""
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        start, told = client.sent(message)  # read first: a mod below may work in place
        number = int(context.node_config.get("partition-id", context.node_id))
        blank = Report(number, int(told.get("server-round", 0)))
        share = similar_rows(start)
        if share > CRAFTED and self.policy != "warn":
            reason = f"not trained: {share:.0%} of the first layer's rows are alike, as if crafted"
            return self._keep(replace(blank, action="withheld", reason=reason), message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        began = time.monotonic()
        report = self._audit(context, start, told, reply, blank)
        return self._keep(replace(report, seconds=time.monotonic() - began), message, reply)

    def _keep(self, report: Report, message: Message, reply: Message | None = None) -> Message:
        """Log and store the report, and answer as it says."""
        self.reports.append(report)
        log.log(logging.INFO if report.action == "sent" else logging.WARNING, "%s", report)
        if self.folder is not None:
            with (Path(self.folder) / f"client-{report.client}.jsonl").open("a") as file:
                file.write(json.dumps(asdict(report)) + "\n")
        if reply is None or report.action == "withheld":
            reason = "update withheld by the client's own audit"
            return error_reply(message, ErrorCode.MOD_FAILED_PRECONDITION, reason)
        return reply

    def _audit(
        self, context: Context, start: Weights, told: dict[str, Any], reply: Message, report: Report
    ) -> Report:  # fmt: skip
        """Attack, decide, and put noise into the reply if that is the policy."""
        unsure = "sent with a warning" if self.policy == "warn" else "withheld"
        end = time.monotonic() + self.seconds
        try:
            inputs = self.data(context)[0]
            if inputs.dtype != torch.long:  # words of a language model are no numbers
                inputs = checks.finite(inputs, "The client's inputs")
            report = replace(report, architecture=self._architecture(context, inputs, end))
            model = copy.deepcopy(self.model)
            _same_architecture(model.state_dict(), start)
            model.load_state_dict(start)
            schedule, (weights, samples) = Schedule.read(told), client.returned(reply)
            update = update_from_weights(model, start, weights, schedule, samples)
            attempts = self._attack(model, update, inputs, end)
        except GradientInversionError as error:
            return replace(report, action=unsure, reason=f"the audit failed: {error}")
        except OutOfTime:
            return replace(report, action=unsure, reason="the audit ran out of time")
        report = replace(report, attempts=attempts)
        leak = next((a for a in attempts if a.leaks), None)
        if leak is None:
            cut = [a.attack for a in attempts if a.outcome == "out of time"]
            if cut:
                reason = f"no attack reached a limit, and time ran out for {', '.join(cut)}"
                return replace(report, action=unsure, reason=reason)
            return replace(report, action="sent", reason="no attack reached a limit")
        report = replace(report, action=unsure, reason=f"{leak.attack} recovers the data")
        if self.policy != "noise":
            return report
        noised = self._noised(model, update, inputs, end)
        if noised is None:
            return replace(report, reason=f"{report.reason}; no noise found in time")
        gradients, sigma = noised
        for name, gradient in gradients.items():
            weights[name] = start[name] - schedule.learning_rate * gradient
        reply.content[next(iter(reply.content.array_records))] = ArrayRecord(weights)
        return replace(report, action="sent with noise", sigma=sigma)

    def _architecture(self, context: Context, inputs: Tensor, end: float) -> str:
        """Whether the network gives one sample away, in words; computed once a client."""
        records = context.state.config_records
        if STATE not in records:
            verdict = "a language model: no pictures to audit, its words are looked for"
            if inputs.dtype != torch.long:
                try:
                    with Deadline(end):
                        shape = tuple(inputs.shape[1:])
                        verdict = rank.audit(self.model, shape, jacobian=False).reason
                except GradientInversionError as error:
                    verdict = f"not audited: {error}"
            records[STATE] = ConfigRecord({"verdict": verdict})
        return str(records[STATE]["verdict"])

    def _attack(
        self, model: nn.Module, update: Update, inputs: Tensor, end: float
    ) -> tuple[Attempt, ...]:
        """Try the attackers until one of them is enough to decide."""
        if inputs.dtype == torch.long:
            return (client.read(model, update, inputs, self.limits, end),)
        attempts: list[Attempt] = []
        shape, limits = tuple(inputs.shape[1:]), self.limits
        low, high = min(float(inputs.min()), 0.0), max(float(inputs.max()), 1.0)
        for name in self.attackers:
            found = client.attack(name, model, update, shape, self.loss, end)
            if isinstance(found, str):
                attempts.append(Attempt(name, outcome=found))
                continue
            found = found.double().nan_to_num().clamp(low, high)
            nearest = [found[int((found - x).flatten(1).norm(dim=1).argmin())] for x in inputs]
            pairs = zip(inputs, nearest, strict=True)
            x, guess = max(pairs, key=lambda pair: metrics.psnr(*pair))  # who fared worst
            psnr, ssim, relative = metrics.psnr(x, guess), 0.0, 0.0
            leaks = psnr >= limits.psnr
            if x.dim() > 1 and min(x.shape[-2:]) > 2:
                prior = torch.full_like(x, 0.5) if self.prior is None else self.prior.to(x)
                ssim = metrics.ssim(x, guess)
                relative = relative_leakage(x, guess, prior.reshape(x.shape))
                beyond = limits.relative is not None and relative >= limits.relative
                leaks = leaks or ssim >= limits.ssim or beyond
            attempts.append(Attempt(name, psnr, ssim, relative, leaks))
            if leaks:
                break
        return tuple(attempts)

    def _noised(
        self, model: nn.Module, update: Update, inputs: Tensor, end: float
    ) -> tuple[Weights, float] | None:
        """Double the noise until no attack reaches a limit, then once more; in time, or None."""
        source = self.generator
        if source is None:  # a seed that the server cannot know
            source = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))

        def noise(sigma: float) -> Weights:
            return {
                name: g + sigma * torch.randn(g.shape, generator=source, dtype=torch.float64).to(g)
                for name, g in update.gradients.items()
            }

        entries = torch.cat([g.double().flatten() for g in update.gradients.values()])
        sigma = 0.1 * float(entries.square().mean().sqrt())
        while time.monotonic() < end:
            tried = self._attack(model, replace(update, gradients=noise(sigma)), inputs, end)
            if any(a.outcome == "out of time" for a in tried):
                break
            if not any(a.leaks for a in tried):
                return noise(2 * sigma), 2 * sigma  # the attacks of tomorrow are better
            sigma *= 2
        return None

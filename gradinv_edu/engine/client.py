"""What a client of Flower's does: train as it is told, and attack its update before it leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from .. import fully_connected, optimization, recursion, tokens
from ..errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
)
from ..sharing import Loss, Update, loss_gradient, stepping
from . import attackers
from .progress import Deadline, OutOfTime
from .received import Answer, Received

__all__ = [
    "Attempt",
    "Limits",
    "Report",
    "Schedule",
    "attack",
    "client_app",
    "first_layer_ratio",
    "read",
    "returned",
    "sent",
    "similar_rows",
    "tensors",
]

Shape = tuple[int, ...]
Weights = dict[str, Tensor]
Data = Callable[[Context], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How the server tells its clients to train by SGD: the settings in each of its messages.

    Parameters
    ----------
    learning_rate, momentum, weight_decay : float
        Of :class:`torch.optim.SGD`.
    local_epochs : int
        Passes over the client's data.
    batch_size : int or None
        Samples in a step; ``None``: all the client has.
    """

    learning_rate: float = 0.1
    local_epochs: int = 1
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.update({}, samples=1)  # refuses what cannot be

    def config(self) -> dict[str, int | float]:
        """Return the settings as a message holds them; a batch size of 0 stands for ``None``."""
        values = {name.replace("_", "-"): value for name, value in asdict(self).items()}
        return {**values, "batch-size": self.batch_size or 0}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Schedule:
        """Read :meth:`config` back out of a message, whatever else is in it.

        Raises InvalidArgumentError if the learning rate is missing.
        """
        names = {name.replace("_", "-"): name for name in cls.__dataclass_fields__}
        found = {names[key]: value for key, value in config.items() if key in names}
        if "learning_rate" not in found:
            raise InvalidArgumentError(
                "The server's message names no 'learning-rate', so its update cannot be scaled; "
                f"it has {', '.join(map(repr, config)) or 'no settings'}. Send Schedule.config()."
            )
        return cls(**{**found, "batch_size": found.get("batch_size") or None})

    def update(self, gradients: Weights, samples: int) -> Update:
        """Wrap gradients, by parameter name, as a client's with so many samples."""
        size = min(self.batch_size or samples, samples)
        return Update(
            gradients,
            local_steps=self.local_epochs * math.ceil(samples / size),
            learning_rate=self.learning_rate,
            batch_size=size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            samples=samples,
        )


# --- messages ---------------------------------------------------------------------------------


def tensors(arrays: ArrayRecord) -> Weights:
    """Copy the arrays of a message; raises InvalidTensorError if they cannot be read."""
    try:
        return {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
    except (TypeError, ValueError) as error:
        raise InvalidTensorError(f"The reply's arrays cannot be read: {error}.") from error


def sent(message: Message) -> tuple[Weights, dict[str, Any]]:
    """Return the weights and the settings in a message of the server."""
    arrays = next(iter(message.content.array_records.values()))
    return tensors(arrays), dict(next(iter(message.content.config_records.values()), {}))


def returned(reply: Message) -> tuple[Weights, int]:
    """Return the weights and the number of samples in a client's reply.

    Raises InvalidTensorError if there is not one set of the one and one count of the other.
    """
    arrays, numbers = reply.content.array_records, reply.content.metric_records
    counts = [record.get("num-examples") for record in numbers.values()]
    if len(arrays) != 1 or len(counts) != 1 or not isinstance(counts[0], int) or counts[0] < 1:
        raise InvalidTensorError(
            f"The reply holds {len(arrays)} sets of arrays and metrics {list(numbers)}; one set, "
            "and one record with a whole 'num-examples', are needed."
        )
    return tensors(next(iter(arrays.values()))), counts[0]


def client_app(model: nn.Module, loss: Loss, data: Data, mods: Sequence[Any] = ()) -> ClientApp:
    """Make an ordinary Flower client that trains by SGD, as the server's message says.

    It also answers in the older form in which Flower's SecAgg+ asks.

    Parameters
    ----------
    model : torch.nn.Module
        The architecture; each round a copy gets the server's weights.
    loss : callable
        ``loss(model(inputs), targets)``, one number.
    data : callable
        ``data(context)`` gives this client's inputs and targets;
        ``context.node_config["partition-id"]`` says which client it is.
    mods : sequence
        Flower mods, the outermost first, so that the first sees what leaves last.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        inputs, targets = data(context)
        client, (weights, config) = copy.deepcopy(model), sent(message)
        older = "fitins.parameters" in message.content.array_records  # in order, without names
        names = client.state_dict() if older else weights
        client.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        schedule = Schedule.read(config)
        trained: list[Tensor] = [p for p in client.parameters() if p.requires_grad]
        size, step = schedule.batch_size or len(inputs), stepping(trained, schedule.update({}, 1))
        for _ in range(schedule.local_epochs):
            for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
                gradients = loss_gradient(client, loss, trained, x, y)
                with torch.no_grad():
                    step(gradients)
        return Message(_answer(client.state_dict(), len(inputs), older), reply_to=message)

    return app


def _answer(weights: Weights, samples: int, older: bool) -> RecordDict:
    arrays = ArrayRecord(weights)
    if not older:
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": samples})})
    return RecordDict(
        {
            "fitres.parameters": arrays,
            "fitres.num_examples": MetricRecord({"num_examples": samples}),
            "fitres.metrics": ConfigRecord(),
            "fitres.status": ConfigRecord({"code": 0, "message": ""}),
        }
    )


# --- what a client can see and try -----------------------------------------------------------


def similar_rows(weights: Mapping[str, Tensor]) -> float:
    r""":math:`\tfrac1m \#\{i : \max_{j \ne i} |\cos(w_i, w_j)| > 0.999\}` of the first layer.

    Rows that are drawn or learned point in different directions; a server that sorts the samples
    of a batch into bins needs many that point in one.

    Parameters
    ----------
    weights : mapping of str to Tensor
        A state dictionary; the first tensor with two dimensions or more counts.

    Notes
    -----
    Source: Fowl et al. (2022) for the bins.
    """
    matrix = next((w for w in weights.values() if w.dim() > 1), torch.zeros(1, 1))
    rows = torch.nn.functional.normalize(matrix.double().flatten(1), dim=1)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    return float((cosines > 0.999).any(1).double().mean())


# --- attacks on the client's own update -------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What an attack may reach before it counts as a leak; reaching one of them is enough.

    ``psnr`` in decibels; ``ssim``, and ``relative`` of
    :func:`gradinv_edu.federation.relative_leakage`, for data with height and width; ``words``,
    the share of a sentence's tokens that come back in their places, for text.
    """

    psnr: float = 15.0
    ssim: float = 0.3
    words: float = 0.3
    relative: float | None = None


@dataclass(frozen=True)
class Attempt:
    """One attack of the client on its own update, scored on the sample that fared worst.

    ``leaks`` if a limit was reached; ``outcome`` is ``"recovered"``, ``"out of time"``, or why
    the attack came to nothing.
    """

    attack: str
    psnr: float = -math.inf
    ssim: float = 0.0
    relative: float = 0.0
    leaks: bool = False
    outcome: str = "recovered"
    words: float | None = None


@dataclass(frozen=True)
class Report:
    """What the audit of one update found, and what was done; it stays with the client.

    Attributes
    ----------
    client, round : int
        Partition of the client, and the server's count of rounds; 0 where it does not say.
    architecture : str
        Verdict of :func:`gradinv_edu.rank.audit` on the network.
    attempts : tuple of Attempt
        On the update as it was.
    action : str
        ``"sent"``, ``"sent with a warning"``, ``"sent with noise"`` or ``"withheld"``.
    sigma : float
        Standard deviation of the noise, in units of the gradient.
    reason : str
        For the action.
    seconds : float
        Of the audit, by the clock.
    """

    client: int
    round: int
    architecture: str = "not audited"
    attempts: tuple[Attempt, ...] = ()
    action: str = ""
    sigma: float = 0.0
    reason: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> Attempt:
        """The attempt that came nearest."""
        return max(self.attempts, key=lambda a: a.psnr, default=Attempt("none", outcome="none"))

    def __str__(self) -> str:
        rows = [f"client {self.client}, round {self.round}: {self.action} ({self.reason})"]
        for a in self.attempts:
            found = f"PSNR {min(a.psnr, 99):.0f} dB, SSIM {a.ssim:.2f}"
            found = found if a.words is None else f"{100 * a.words:.0f} % of the words"
            rows.append(f"  {a.attack}: {found if a.outcome == 'recovered' else a.outcome}")
        return "\n".join([*rows, f"  architecture: {self.architecture}"])


def first_layer_ratio(model: nn.Module, update: Update, input_shape: Shape) -> Tensor:
    r""":math:`(\partial L/\partial W)_i \,/\, (\partial L/\partial b)_i` of the first dense layer.

    For any number of steps: its input is the sample itself in each of them.

    Parameters
    ----------
    model : torch.nn.Module
        As the server sent it.
    update : Update
        Of one client.
    input_shape : tuple of int
        Of one sample.

    Returns
    -------
    Tensor, (M, *input_shape)
        One answer from all rows together if there is one sample; else one for each row.
        UnknownNameError if no such layer sent both gradients.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == math.prod(input_shape):
            W, b = (update.gradients.get(f"{name}.{p}".strip(".")) for p in ("weight", "bias"))
            if W is not None and b is not None:
                if update.samples == 1:
                    return fully_connected.recover_input(W, b).reshape(1, *input_shape)
                live = b != 0
                ratios = W[live].double() / b[live, None].double()
                return ratios.reshape(-1, *input_shape)
    raise UnknownNameError("no dense layer with a bias that sees the sample itself")


@attackers.register("ratio", own=True, promises=True)
def _ratio(received: Received) -> Answer:
    update = received.update
    x = first_layer_ratio(received.model, update, received.input_shape)
    return Answer(x, update.samples == 1)


@attackers.register("recursion", own=True, promises=True)
def _recursion(received: Received) -> Answer:
    update = received.update
    size = update.samples if update.local_steps == 1 else 1
    found = recursion.recover(
        received.model, update, received.input_shape, received.loss, batch_size=size
    )
    return Answer(found.inputs, found.exact)


@attackers.register("matching", own=True)
def _matching(received: Received) -> Answer:
    given = received.model, received.update, received.input_shape, received.loss
    return Answer(optimization.match_gradients(*given).inputs, False)


def attack(
    name: str, model: nn.Module, update: Update, shape: Shape, loss: nn.Module, end: float
) -> Tensor | str:
    """Return what one attack recovers, or why it came to nothing."""
    try:
        with Deadline(end):
            received = Received(model, update, loss, shape)  # type: ignore[arg-type]
            return attackers.get(name, own=True)(received).inputs
    except GradientInversionError as error:
        return str(error)
    except OutOfTime:
        return "out of time"


def read(model: nn.Module, update: Update, ids: Tensor, limits: Limits, end: float) -> Attempt:
    """Look for the client's own sentences, ``(N, T)``, in its update to a language model."""
    try:
        with Deadline(end):
            found = tokens.recover_tokens(model, update).sequences
    except GradientInversionError as error:
        return Attempt("words", outcome=str(error), words=0.0)
    except OutOfTime:
        return Attempt("words", outcome="out of time", words=0.0)
    shares = [
        sum(int(a == b) for a, b in zip(true.tolist(), guess.tolist(), strict=False)) / len(true)
        for true in ids
        for guess in found
    ]
    share = max(shares, default=0.0)
    return Attempt("words", words=share, leaks=share >= limits.words)

"""A real federation, seen from both ends: a server that reads, and a client that looks first."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import checks, fully_connected, metrics, optimization, rank, recursion
from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    MissingExtraError,
    UnknownNameError,
)
from .sharing import Loss, Update

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy

log = logging.getLogger("gradinv_edu.federation")

Weights = dict[str, Tensor]
Data = Callable[["Context"], tuple[Tensor, Tensor]]
Policy = Literal["warn", "noise", "withhold"]
CallNext = Callable[["Message", "Context"], "Message"]

SILENCE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns of its next version
}
# what Flower and Ray set for themselves and leave behind
LEFT_BEHIND = (
    "PYTHONPATH",
    "PYTHONBREAKPOINT",
    "RAY_CLIENT_MODE",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
)
PORTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
    "dashboard_agent_listen_port",
)
POLICIES = ("warn", "noise", "withhold")
STATE = "gradinv_edu.audit"  # the audit's place in a client's context
FIRST_NODE = 100  # Flower keeps 1 for the server


# --- Flower, imported when it is needed, and quiet --------------------------------------------


def flower() -> Any:
    """Import Flower with its telemetry off.

    Returns
    -------
    module
        ``flwr``. The environment is afterwards what it was.

    Raises
    ------
    MissingExtraError
        If Flower is not installed; the message says how to install it.
    """
    with _environment(SILENCE):
        try:
            import flwr
            import flwr.supercore.telemetry
        except ImportError as error:
            raise MissingExtraError(
                f"This part needs Flower, which is not installed here ({error}): "
                "pip install 'gradinv_edu[federation]'."
            ) from error
    return flwr


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Silence Flower's and Ray's logs and telemetry, and put everything back.

    Parameters
    ----------
    level : int
        Of ``logging``: what is below it is not shown.

    Yields
    ------
    None
        Nothing: ``with quiet(): …``.
    """
    flower()
    from flwr.supercore import telemetry

    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    levels, sent = [logger.level for logger in loggers], telemetry.FLWR_TELEMETRY_ENABLED
    kept = {name: os.environ.get(name) for name in LEFT_BEHIND} | SILENCE
    try:
        telemetry.FLWR_TELEMETRY_ENABLED = "0"
        for logger in loggers:
            logger.setLevel(level)
        with _environment(kept):
            yield
    finally:
        telemetry.FLWR_TELEMETRY_ENABLED = sent
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# --- what the server asks for, and what comes back --------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How the server tells its clients to train: the settings in each of its messages.

    Parameters
    ----------
    learning_rate : float
        Of SGD.
    local_epochs : int
        Passes over the client's data.
    batch_size : int or None
        Samples in a step; ``None``: all the client has.
    momentum, weight_decay : float
        Of SGD.
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

        Parameters
        ----------
        config : mapping
            A ``ConfigRecord`` or dict.

        Returns
        -------
        Schedule

        Raises
        ------
        InvalidArgumentError
            If the learning rate is missing.
        """
        names = {name.replace("_", "-"): name for name in cls.__dataclass_fields__}
        found = {names[key]: value for key, value in config.items() if key in names}
        if "learning_rate" not in found:
            raise InvalidArgumentError(
                "The server's message names no 'learning-rate', so its update cannot be scaled; "
                f"it has {', '.join(map(repr, config)) or 'no settings'}. Send Schedule.config()."
            )
        return cls(**{**found, "batch_size": found.get("batch_size") or None})

    def steps(self, samples: int) -> int:
        """Return the number of optimiser steps that a client with so many samples makes.

        Parameters
        ----------
        samples : int
            Of the client.
        """
        return self.local_epochs * math.ceil(samples / (self.batch_size or samples))

    def update(self, gradients: Weights, samples: int) -> Update:
        """Wrap gradients as an update of a client that followed this schedule.

        Parameters
        ----------
        gradients : dict of str to Tensor
            By parameter name.
        samples : int
            Of the client.

        Returns
        -------
        Update
        """
        return Update(
            gradients,
            local_steps=self.steps(samples),
            learning_rate=self.learning_rate,
            batch_size=min(self.batch_size or samples, samples),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            samples=samples,
        )


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

    Returns
    -------
    Update
        In the weights' dtype.

    Raises
    ------
    InvalidTensorError
        If what came back is of another architecture, or is not finite.
    """
    _same_architecture(start, end)
    names = [name for name, _ in model.named_parameters()]
    rate = schedule.learning_rate
    update = schedule.update({n: (start[n] - end[n]) / rate for n in names}, samples)
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


@dataclass(frozen=True, eq=False)
class Received:
    """One client's update of one round.

    Attributes
    ----------
    round, node : int
        Of the federation; nodes are numbered by Flower.
    update : Update
        What :func:`gradinv_edu.recursion.recover` takes.
    model : torch.nn.Module
        With the weights that this round began with.
    """

    round: int
    node: int
    update: Update
    model: nn.Module = field(repr=False)


@dataclass(frozen=True)
class Failure:
    """One client that sent no usable update in one round.

    Attributes
    ----------
    round, node : int
        Of the federation.
    reason : str
        The client's, or the server's for refusing the update.
    """

    round: int
    node: int
    reason: str


class CuriousServer:
    """An honest but curious strategy: does all that the one inside does, and keeps the updates.

    Wraps any strategy of ``flwr.serverapp.strategy``, Flower's wrappers for differential
    privacy among them, and stands where it stood. Nothing that the clients see changes. An update of
    another architecture, or with entries that are not finite, is refused by name and the round
    goes on with the others.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        The one that does the work.
    model : torch.nn.Module
        The architecture; not changed.
    schedule : Schedule, optional
        What the clients are told; by default read from each round's own messages.

    Attributes
    ----------
    received : list of Received
        Every update, in the order in which they came.
    failures : list of Failure
        Every client without one, and why.
    """  # noqa: E501

    def __init__(
        self, strategy: Strategy, model: nn.Module, schedule: Schedule | None = None
    ) -> None:
        flower()
        from flwr.serverapp.strategy import Strategy as Base

        Base.register(CuriousServer)  # as good as a subclass, without importing Flower above
        self.strategy, self.model, self.schedule = strategy, model, schedule
        self.received: list[Received] = []
        self.failures: list[Failure] = []
        self._start: nn.Module = model
        self._told: Schedule | None = schedule

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as the strategy inside does, and remember what is sent.

        Parameters
        ----------
        server_round, arrays, config, grid
            As Flower gives them.

        Returns
        -------
        iterable of Message
        """
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._start = copy.deepcopy(self.model)
        self._start.load_state_dict(_weights(arrays, self.model))
        if self.schedule is None and messages:
            self._told = Schedule.read(next(iter(messages[0].content.config_records.values())))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep each update, then aggregate as the strategy inside does.

        Parameters
        ----------
        server_round, replies
            As Flower gives them.

        Returns
        -------
        tuple
            Arrays and metrics of the strategy inside.
        """
        ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        usable = [reply for reply in ordered if self._keep(server_round, reply)]
        return self.strategy.aggregate_train(server_round, usable)

    def _keep(self, server_round: int, reply: Message) -> bool:
        """Whether the strategy inside may have the reply; errors it may, broken updates not."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            self._fail(server_round, node, reply.error.reason or f"error {reply.error.code}")
            return True
        try:
            update = self._read(reply)
        except GradientInversionError as error:
            self._fail(server_round, node, str(error))
            return False
        self.received.append(Received(server_round, node, update, self._start))
        return True

    def _read(self, reply: Message) -> Update:
        arrays, samples = _returned(reply)
        start = {n: t.detach() for n, t in self._start.state_dict().items()}
        assert self._told is not None
        return update_from_weights(self.model, start, _tensors(arrays), self._told, samples)

    def _fail(self, server_round: int, node: int, reason: str) -> None:
        log.warning("Round %d: no update of client %d: %s", server_round, node, reason)
        self.failures.append(Failure(server_round, node, reason))

    def start(self, *args: Any, **settings: Any) -> Result:
        """Run the federation, as Flower's ``Strategy.start`` does.

        Parameters
        ----------
        *args, **settings
            As Flower's.

        Returns
        -------
        Result
        """
        from flwr.serverapp.strategy import Strategy as Base

        return Base.start(cast(Any, self), *args, **settings)

    def __getattr__(self, name: str) -> Any:
        # evaluation, summary and settings are those of the strategy inside
        if name.startswith("__") or name == "strategy":
            raise AttributeError(name)
        return getattr(self.strategy, name)


def _returned(reply: Message) -> tuple[ArrayRecord, int]:
    arrays, numbers = reply.content.array_records, reply.content.metric_records
    counts = [record.get("num-examples") for record in numbers.values()]
    if len(arrays) != 1 or len(counts) != 1 or not isinstance(counts[0], int) or counts[0] < 1:
        raise InvalidTensorError(
            f"The reply holds {len(arrays)} sets of arrays and metrics {list(numbers)}; one set, "
            "and one record with a whole 'num-examples', are needed."
        )
    return next(iter(arrays.values())), counts[0]


def _tensors(arrays: ArrayRecord) -> Weights:
    try:
        return {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
    except (TypeError, ValueError) as error:
        raise InvalidTensorError(f"The reply's arrays cannot be read: {error}.") from error


def _weights(arrays: ArrayRecord, model: nn.Module) -> Weights:
    found = _tensors(arrays)
    _same_architecture(model.state_dict(), found)
    return found


# --- clients ----------------------------------------------------------------------------------


def client_app(
    model: nn.Module, loss: Loss, data: Data, mods: Sequence[Any] = (), *, secure: bool = False
) -> ClientApp:
    """Make an ordinary Flower client that trains by SGD, as the server's message says.

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
    secure : bool
        Write the client in the older form that Flower's SecAgg+ still asks for.

    Returns
    -------
    flwr.clientapp.ClientApp
    """
    flower()
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.app import Message as Reply
    from flwr.clientapp import ClientApp as App

    if secure:
        return _older_client_app(model, loss, data, mods)
    app = App(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        inputs, targets = data(context)
        client = copy.deepcopy(model)
        client.load_state_dict(_weights(_sent(message), client))
        _train(client, loss, inputs, targets, _settings(message))
        metrics = MetricRecord({"num-examples": len(inputs)})
        content = RecordDict({"arrays": ArrayRecord(client.state_dict()), "metrics": metrics})
        return Reply(content, reply_to=message)

    return app


def _older_client_app(model: nn.Module, loss: Loss, data: Data, mods: Sequence[Any]) -> ClientApp:
    from flwr.client import NumPyClient
    from flwr.clientapp import ClientApp as App

    class Client(NumPyClient):
        def __init__(self, context: Context) -> None:
            self.data = data(context)

        def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, Any]:
            client = copy.deepcopy(model)
            tensors = [torch.from_numpy(p.copy()) for p in parameters]
            client.load_state_dict(dict(zip(client.state_dict(), tensors, strict=True)))
            _train(client, loss, *self.data, Schedule.read(config))
            end = [tensor.numpy() for tensor in client.state_dict().values()]
            return end, len(self.data[0]), {}

    return App(client_fn=lambda context: Client(context).to_client(), mods=list(mods))


def _train(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, schedule: Schedule
) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
    size = schedule.batch_size or len(inputs)
    for _ in range(schedule.local_epochs):
        for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(loss(model(x), y))
            optimizer.step()


def _sent(message: Message) -> ArrayRecord:
    return next(iter(message.content.array_records.values()))


def _settings(message: Message) -> Schedule:
    return Schedule.read(next(iter(message.content.config_records.values())))


# --- running one ------------------------------------------------------------------------------


class InProcessGrid:
    """Flower's messages, delivered by a call instead of a network: no processes, same everything else.

    The client app, its mods, the strategy and the messages are Flower's own. A client that
    raises, or that is out of reach, is reported as Flower's simulation reports it.

    Parameters
    ----------
    app : flwr.clientapp.ClientApp
        Runs as every client.
    clients : int
        How many; numbered from 0 as partitions, from 100 as nodes.
    unreachable : iterable of int
        Partitions that never answer.
    """  # noqa: E501

    def __init__(self, app: ClientApp, clients: int, unreachable: Iterable[int] = ()) -> None:
        flower()
        from flwr.app import Context as State
        from flwr.app import RecordDict
        from flwr.serverapp import Grid as Base

        Base.register(InProcessGrid)
        self.app, self.replies = app, cast("list[list[Message]]", [])
        self.unreachable = {FIRST_NODE + partition for partition in unreachable}
        self.contexts = {
            FIRST_NODE + partition: State(
                run_id=1,
                node_id=FIRST_NODE + partition,
                node_config={"partition-id": partition, "num-partitions": clients},
                state=RecordDict(),
                run_config={},
            )
            for partition in range(clients)
        }

    @property
    def run(self) -> Any:
        """The run, as Flower describes it."""
        from flwr.supercore.run import Run

        return Run.create_empty(run_id=1)

    def get_node_ids(self) -> list[int]:
        """Return the numbers of all nodes, those out of reach included."""
        return list(self.contexts)

    def get_nodes(self) -> list[Any]:
        """Return the nodes as Flower describes them."""
        from flwr.proto.node_pb2 import NodeInfo

        return [NodeInfo(node_id=node) for node in self.contexts]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver each message to its client, and return the replies.

        Parameters
        ----------
        messages : iterable of Message
            With their destinations.
        timeout : float, optional
            Of no consequence here.
        """
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        replies = [self._deliver(copy.deepcopy(message)) for message in ordered]
        self.replies.append(replies)
        return replies

    def _deliver(self, message: Message) -> Message:
        from flwr.common.constant import ErrorCode

        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = f"{len(self.replies)}-{node}"
        if node in self.unreachable:
            return _error(message, ErrorCode.NODE_UNAVAILABLE, f"Client {node} is out of reach.")
        try:
            return copy.deepcopy(self.app(message, self.contexts[node]))
        except Exception as error:  # whatever a client does wrong, the federation goes on
            reason = f"{type(error).__name__}: {error}"
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _error(message: Message, code: int, reason: str) -> Message:
    from flwr.app import Error
    from flwr.app import Message as Reply

    return Reply(Error(code=code, reason=reason), reply_to=message)


def simulate(
    strategy: Strategy | CuriousServer,
    app: ClientApp,
    model: nn.Module,
    schedule: Schedule,
    *,
    clients: int,
    rounds: int = 1,
    processes: int = 0,
    unreachable: Iterable[int] = (),
) -> Result:
    """Run a federation on this machine.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy or CuriousServer
        The server's.
    app : flwr.clientapp.ClientApp
        Of every client.
    model : torch.nn.Module
        Whose weights the first round begins with.
    schedule : Schedule
        What the clients are told.
    clients, rounds : int
        How many.
    processes : int
        0: all in this process (:class:`InProcessGrid`). More: Flower's simulation, on so many
        Ray processes; Ray's files are removed afterwards.
    unreachable : iterable of int
        Partitions that never answer; only in this process.

    Returns
    -------
    flwr.serverapp.strategy.Result
        With the last round's weights in ``.arrays``.

    Raises
    ------
    InvalidArgumentError
        If the strategy waits for more clients than there are, which Flower does for ever; or if
        ``unreachable`` is asked of Ray.
    RayStartError
        If the machine is too busy for Ray.
    MissingExtraError
        If Flower is not installed.
    """
    flower()
    from flwr.app import ArrayRecord, ConfigRecord

    _enough(strategy, clients)
    unreachable = tuple(unreachable)

    def start(grid: Any) -> Result:
        arrays, config = ArrayRecord(model.state_dict()), ConfigRecord({**schedule.config()})
        return strategy.start(grid, arrays, num_rounds=rounds, train_config=config)

    with quiet():
        if not processes:
            with _task():
                return start(InProcessGrid(app, clients, unreachable))
        if unreachable:
            raise InvalidArgumentError("unreachable needs processes=0; Ray reaches every client.")
        return _on_ray(start, app, clients, processes)


@contextmanager
def _task() -> Iterator[None]:
    """Give this process the identity without which Flower makes no message."""
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id = 1, 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def _enough(strategy: Any, clients: int) -> None:
    names = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
    while hasattr(strategy, "strategy"):
        strategy = strategy.strategy
    wanted = max((int(getattr(strategy, name, 0)) for name in names), default=0)
    if wanted > clients:
        raise InvalidArgumentError(
            f"The strategy waits for {wanted} clients and there are {clients}: it would wait for "
            f"ever. Set {', '.join(names)}, or add clients."
        )


def _on_ray(start: Callable[[Any], Result], app: ClientApp, clients: int, processes: int) -> Result:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    results: list[Result] = []
    server, over = ServerApp(), threading.Event()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        results.append(start(_EndingGrid(grid, over)))

    with _folder() as folder:
        settings: dict[str, Any] = {
            "num_cpus": processes,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "_temp_dir": folder,
        }
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
        _start_ray(settings)
        try:
            run_simulation(
                server, app, num_supernodes=clients, backend_config={"client_resources": resources}
            )
        finally:
            over.set()
    return results[0]


def _start_ray(settings: dict[str, Any], attempts: int = 3) -> None:
    """Start Ray before Flower does: on a busy machine its half a minute may not be enough."""
    import ray

    paths = os.pathsep.join(sys.path)
    for _ in range(0 if ray.is_initialized() else attempts):
        try:
            with _ports_told():
                ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, **settings)
            return
        except Exception as error:  # Ray raises no narrower type
            failure = error
            ray.shutdown()
    if not ray.is_initialized():
        raise RayStartError(
            f"Ray did not start in {attempts} attempts ({str(failure).splitlines()[0]}): try again "
            "when the machine is less busy, or run with processes=0."
        ) from failure


@contextmanager
def _ports_told() -> Iterator[None]:
    """Choose the ports of Ray's helpers: it gives up if they take 15 s to choose their own."""
    from ray._private.parameter import RayParams

    before = RayParams.__init__

    def told(self: Any, *args: Any, **settings: Any) -> None:
        before(self, *args, **settings)
        for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True):
            setattr(self, name, port)

    RayParams.__init__ = told  # type: ignore[method-assign]
    try:
        with _environment({"RAY_agent_register_timeout_ms": "180000"}):
            yield
    finally:
        RayParams.__init__ = before  # type: ignore[method-assign]


def _free_ports(many: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(many)]
        for one in sockets:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class RayStartError(GradientInversionError, RuntimeError):
    """Ray does not start on this machine now."""


class _EndingGrid:
    """Flower's grid, but a server whose clients' processes have died does not wait for them."""

    def __init__(self, grid: Any, over: threading.Event) -> None:
        self.grid, self.over = grid, over

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        waiting, replies = set(self.grid.push_messages(messages)), list[Any]()
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while waiting and time.monotonic() < end and not self.over.wait(0.1):
            got = list(self.grid.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
            replies += got
        if waiting and self.over.is_set():
            raise RuntimeError("Flower's simulation ended before every client had answered.")
        return replies


@contextmanager
def _folder() -> Iterator[str]:
    # Ray puts sockets there, whose paths must be shorter than many a temporary folder's
    short = "/tmp" if sys.platform != "win32" and os.path.isdir("/tmp") else None
    folder = tempfile.mkdtemp(prefix="gi-", dir=short)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- secure aggregation -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SecureRound:
    """What the server has after one round of secure aggregation.

    Attributes
    ----------
    masked : tuple of dict of str to Tensor
        What each client sent: whole numbers modulo :math:`2^{32}`, by parameter name.
    update : Update
        The average, as the update of one client with everybody's samples.
    failures : tuple of Failure
        Clients without an answer in some stage of the protocol.
    """

    masked: tuple[Weights, ...] = field(repr=False)
    update: Update
    failures: tuple[Failure, ...]


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
        Of :func:`client_app` with ``secure=True`` and Flower's ``secaggplus_mod`` among its mods.
    model : torch.nn.Module
        Whose weights :math:`\theta_0` the round begins with.
    schedule : Schedule
        What the clients are told.
    clients : int
        How many; three or more.
    samples : int, optional
        :math:`\sum_i n_i`; by default one of each client.
    max_weight : float
        Largest :math:`n_i` that the protocol provides for; weights are rounded in steps of
        ``2 · clipping_range · max_weight / 2²²`` over :math:`n_i`.
    clipping_range : float
        Largest weight that the protocol can carry.
    unreachable : iterable of int
        Partitions that never answer.

    Returns
    -------
    SecureRound

    Raises
    ------
    InvalidArgumentError
        If there are fewer than three clients.
    InvalidTensorError
        If fewer than three clients answered, and so nothing was aggregated.
    """
    flower()
    if clients < 3:
        raise InvalidArgumentError(
            f"Secure aggregation takes three clients or more, not {clients}."
        )
    start = {n: t.detach() for n, t in model.state_dict().items()}
    grid, lost = InProcessGrid(app, clients, unreachable), set[int]()
    while True:
        grid.replies.clear()
        with quiet(logging.CRITICAL), _task():
            end = _secagg(grid, model, schedule, max_weight, clipping_range)
        lost |= _lost(grid)
        if not all(torch.equal(end[n], start[n]) for n in start):
            break
        _begin_again(grid, lost)
    failures = tuple(Failure(1, node, "no answer") for node in sorted(lost))
    used = samples or clients - len(failures)
    update = update_from_weights(model, start, end, schedule, used)
    return SecureRound(tuple(_masked(grid.replies, model)), update, failures)


def _lost(grid: InProcessGrid) -> set[int]:
    """Return those who failed first; others may fail because of them."""
    stages = ({m.metadata.src_node_id for m in stage if m.has_error()} for stage in grid.replies)
    return next(filter(None, stages), set())


def _begin_again(grid: InProcessGrid, lost: set[int]) -> None:
    """Leave clients out: the protocol halts where one is lost before it has shared its keys."""
    left = {node: context for node, context in grid.contexts.items() if node not in lost}
    if len(left) < 3 or len(left) == len(grid.contexts):
        raise InvalidTensorError(
            f"Nothing was aggregated: no answer from {sorted(lost)}, and {len(left)} clients "
            "are left; three are needed."
        )
    grid.contexts = left


def _secagg(
    grid: InProcessGrid, model: nn.Module, schedule: Schedule, max_weight: float, clip: float
) -> Weights:
    from flwr.app import Context, RecordDict
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

    clients = len(grid.contexts)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=lambda _: {**schedule.config()},
        initial_parameters=ndarrays_to_parameters([t.numpy() for t in model.state_dict().values()]),
    )
    server = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    context = LegacyContext(server, ServerConfig(num_rounds=1), strategy)
    threshold = max(2, clients // 2 + 1) / clients
    steps = SecAggPlusWorkflow(1.0, threshold, max_weight=max_weight, clipping_range=clip)
    DefaultWorkflow(fit_workflow=steps)(cast(Any, grid), context)
    arrays = next(iter(context.state.array_records.values()))
    end = [torch.from_numpy(a.copy()) for a in arrays.to_numpy_ndarrays()]
    return {
        name: tensor.to(was.dtype)
        for (name, was), tensor in zip(model.state_dict().items(), end, strict=True)
    }


def _masked(stages: Iterable[list[Message]], model: nn.Module) -> Iterator[Weights]:
    from flwr.common import bytes_to_ndarray
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

    for reply in chain.from_iterable(stages):
        record = None if reply.has_error() else reply.content.config_records.get(RECORD_KEY_CONFIGS)
        vectors = None if record is None else record.get(Key.MASKED_PARAMETERS)
        if vectors is not None:  # the first entry is the weight, masked as well
            arrays = [bytes_to_ndarray(v) for v in cast("list[bytes]", vectors)[1:]]
            tensors = [torch.from_numpy(a.copy()) for a in arrays]
            yield dict(zip(model.state_dict(), tensors, strict=True))


# --- the client looks first -------------------------------------------------------------------


def relative_leakage(truth: Tensor, recovered: Tensor, prior: Tensor) -> float:
    r""":math:`\bigl(s(x, \hat x) - s(x, x_0)\bigr) / s(x, x_0)`: how far beyond a prior.

    0: the recovered picture is no nearer to the truth than what anybody would have guessed; 1:
    twice as similar. Implements :eq:`relative-leakage`.

    Parameters
    ----------
    truth, recovered, prior : Tensor, (…, H, W)
        :math:`x`, :math:`\hat x` and :math:`x_0`; :math:`s` is SSIM.

    Returns
    -------
    float
        Infinite where the prior is not similar at all.

    Raises
    ------
    InvalidTensorError
        As :func:`gradinv_edu.metrics.ssim`.

    Notes
    -----
    NVIDIA FLARE's client filter for data leakage scores with this ratio.
    """
    base = metrics.ssim(truth, prior)
    gained = metrics.ssim(truth, recovered) - base
    return gained / base if base > 0 else math.copysign(math.inf, gained) if gained else 0.0


@dataclass(frozen=True)
class Limits:
    """What an attack may reach before it counts as a leak; reaching one of them is enough.

    Parameters
    ----------
    psnr : float
        In decibels.
    ssim : float
        Between 0 and 1; for data with height and width.
    relative : float or None
        Of :func:`relative_leakage`; for data with height and width.
    """

    psnr: float = 15.0
    ssim: float = 0.3
    relative: float | None = None


@dataclass(frozen=True)
class Attempt:
    """One attack of the client on its own update.

    Attributes
    ----------
    attack : str
        Its name.
    psnr, ssim, relative : float
        Of the sample that fared worst; minus infinity, 0 and 0 where nothing was recovered.
    leaks : bool
        Whether a limit was reached.
    outcome : str
        ``"recovered"``, ``"out of time"``, or why the attack came to nothing.
    """

    attack: str
    psnr: float = -math.inf
    ssim: float = 0.0
    relative: float = 0.0
    leaks: bool = False
    outcome: str = "recovered"


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
    """

    client: int
    round: int
    architecture: str
    attempts: tuple[Attempt, ...]
    action: str
    sigma: float
    reason: str

    @property
    def worst(self) -> Attempt:
        """The attempt that came nearest."""
        return max(self.attempts, key=lambda a: a.psnr, default=Attempt("none", outcome="none"))

    def __str__(self) -> str:
        rows = [f"client {self.client}, round {self.round}: {self.action} ({self.reason})"]
        for a in self.attempts:
            found = f"PSNR {min(a.psnr, 99):.0f} dB, SSIM {a.ssim:.2f}"
            rows.append(f"  {a.attack}: {found if a.outcome == 'recovered' else a.outcome}")
        return "\n".join([*rows, f"  architecture: {self.architecture}"])


class _OutOfTime(Exception):
    """The budget is spent."""


class _Deadline(TorchFunctionMode):
    """Ends whatever computes with torch once its time is up."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.end:
            raise _OutOfTime
        return func(*args, **(kwargs or {}))


def first_layer_ratio(model: nn.Module, update: Update, input_shape: tuple[int, ...]) -> Tensor:
    """Bias ratios of a dense layer that sees the sample itself, for any number of steps.

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

    Raises
    ------
    UnknownNameError
        If no such layer sent both gradients.
    VanishingGradientError
        If its gradient is zero.
    """
    unknowns = math.prod(input_shape)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == unknowns:
            W, b = (update.gradients.get(f"{name}.{p}".strip(".")) for p in ("weight", "bias"))
            if W is not None and b is not None:
                return _ratios(W, b, update.samples).reshape(-1, *input_shape)
    raise UnknownNameError("no dense layer with a bias that sees the sample itself")


def _ratios(W: Tensor, b: Tensor, samples: int) -> Tensor:
    if samples == 1:
        return fully_connected.recover_input(W, b)
    rows = b.double() != 0
    return W.double()[rows] / b.double()[rows, None]


class LeakAudit:
    """A Flower mod that attacks its own client's update before it leaves.

    One line in a client app: ``ClientApp(mods=[LeakAudit(model, loss, data)])``. Put it first, so
    that it sees what leaves last, after the other mods. Once, it audits the architecture; on each
    update it runs the course's attacks within a budget of seconds, scores what they recover
    against the client's own data, logs a report, and acts. Nothing of the report is sent.

    It fails closed: under ``"noise"`` and ``"withhold"`` an update is kept back also if no attack
    came to an end in time on a network whose architecture leaks, or if the audit itself failed.
    An update that passes has withstood these attacks, no more.

    Parameters
    ----------
    model : torch.nn.Module
        The client's architecture.
    loss : torch.nn.Module
        The client's.
    data : callable
        ``data(context)`` gives this client's inputs and targets, as for :func:`client_app`.
    policy : {"withhold", "noise", "warn"}
        Keep a leaking update back; add Gaussian noise until no attack reaches a limit, then twice
        as much; or send it and say so. Noise that stops these attacks promises nothing about
        others: for a promise take Flower's ``LocalDpMod``.
    limits : Limits
        What counts as a leak.
    seconds : float
        Budget for each update, noise included.
    prior : Tensor, optional
        :math:`x_0` of :func:`relative_leakage`; by default mid-grey.
    matching : bool
        Whether to spend what is left of the budget on gradient matching
        (:func:`gradinv_edu.optimization.match_gradients`) where the exact attacks find nothing.
    folder : str or path, optional
        Where to append the reports, a file for each client, as lines of JSON.
    generator : torch.Generator, optional
        Of the noise, for tests; by default the noise cannot be predicted.

    Attributes
    ----------
    reports : list of Report
        All that were made in this process.

    Raises
    ------
    UnknownNameError
        If there is no such policy.
    InvalidArgumentError
        If there is no time.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        data: Data,
        *,
        policy: Policy = "withhold",
        limits: Limits | None = None,
        seconds: float = 10.0,
        prior: Tensor | None = None,
        matching: bool = False,
        folder: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise UnknownNameError(f"No policy {policy!r}; there are {', '.join(POLICIES)}.")
        if not seconds > 0:
            raise InvalidArgumentError(f"seconds must be positive, got {seconds!r}.")
        self.model, self.loss, self.data, self.policy = model, loss, data, policy
        self.limits, self.seconds, self.prior = limits or Limits(), seconds, prior
        self.matching, self.folder, self.generator = matching, folder, generator
        self.reports: list[Report] = []

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """Let the client train, look at what it would send, and act.

        Parameters
        ----------
        message, context, call_next
            As Flower gives them.

        Returns
        -------
        flwr.app.Message
            The client's reply, the same with noise, or an error that says only that the update
            was withheld.
        """
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        sent = _tensors(_sent(message))  # a mod below may work in place
        settings = dict(next(iter(message.content.config_records.values()), {}))
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        case = _Case(self, context, sent, settings, reply)
        report = case.act()
        self._publish(report, context)
        if report.action == "withheld":
            return self._withheld(message)
        return case.reply

    def _withheld(self, message: Message) -> Message:
        from flwr.common.constant import ErrorCode

        reason = "update withheld by the client's own audit"
        return _error(message, ErrorCode.MOD_FAILED_PRECONDITION, reason)

    def _publish(self, report: Report, context: Context) -> None:
        self.reports.append(report)
        log.log(logging.INFO if report.action == "sent" else logging.WARNING, "%s", report)
        if self.folder is not None:
            line = json.dumps(asdict(report)) + "\n"
            with (Path(self.folder) / f"client-{report.client}.jsonl").open("a") as file:
                file.write(line)

    def architecture(self, context: Context, input_shape: tuple[int, ...]) -> tuple[bool, str]:
        """Whether the network gives one sample away, and the verdict in words.

        Computed once for each client and kept in its context, which does not travel.

        Parameters
        ----------
        context : flwr.app.Context
            Of the client.
        input_shape : tuple of int
            Of one sample.

        Returns
        -------
        exact : bool
        verdict : str
        """
        from flwr.app import ConfigRecord

        records = context.state.config_records
        if STATE not in records:
            exact, verdict = _architecture(self.model, input_shape)
            records[STATE] = ConfigRecord({"exact": exact, "verdict": verdict})
        return bool(records[STATE]["exact"]), str(records[STATE]["verdict"])


def _architecture(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[bool, str]:
    try:
        found = rank.audit(model, input_shape, jacobian=False)
        return found.exact, found.verdict
    except GradientInversionError as error:
        return False, f"not audited: {error}"


class _Case:
    """One update under audit."""

    def __init__(
        self,
        audit: LeakAudit,
        context: Context,
        sent: Weights,
        settings: Mapping[str, Any],
        reply: Message,
    ) -> None:
        self.audit, self.context, self.sent, self.settings = audit, context, sent, settings
        self.reply, self.verdict = reply, "not audited"
        self.end = time.monotonic() + audit.seconds

    def act(self) -> Report:
        try:
            self._open()
            attempts = self._attempts(self.update)
            return self._decide(attempts)
        except GradientInversionError as error:
            return self._unsure((), f"the audit failed: {error}")
        except _OutOfTime:
            return self._unsure((), "the audit ran out of time")

    def _open(self) -> None:
        with _Deadline(self._left()):
            inputs = self.audit.data(self.context)[0]
            self.inputs = checks.finite(inputs, "The client's inputs")
            self.shape = tuple(self.inputs.shape[1:])
            self.leaky, self.verdict = self.audit.architecture(self.context, self.shape)
        self.model = copy.deepcopy(self.audit.model)
        _same_architecture(self.model.state_dict(), self.sent)
        self.model.load_state_dict(self.sent)
        self.schedule = Schedule.read(self.settings)
        arrays, samples = _returned(self.reply)
        self.update = update_from_weights(
            self.model, self.sent, _tensors(arrays), self.schedule, samples
        )

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _decide(self, attempts: tuple[Attempt, ...]) -> Report:
        leak = next((a for a in attempts if a.leaks), None)
        if leak is None:
            timely = any(a.outcome != "out of time" for a in attempts)
            if timely or not self.leaky:
                return self._report(attempts, "sent", "no attack reached a limit")
            return self._unsure(attempts, "no attack ended in time, and the architecture leaks")
        reason = f"{leak.attack} recovers the data"
        if self.audit.policy == "warn":
            return self._report(attempts, "sent with a warning", reason)
        if self.audit.policy == "noise":
            return self._with_noise(attempts, reason)
        return self._report(attempts, "withheld", reason)

    def _unsure(self, attempts: tuple[Attempt, ...], reason: str) -> Report:
        warn = self.audit.policy == "warn"
        return self._report(attempts, "sent with a warning" if warn else "withheld", reason)

    def _report(
        self, attempts: tuple[Attempt, ...], action: str, reason: str, sigma: float = 0.0
    ) -> Report:
        client = int(self.context.node_config.get("partition-id", self.context.node_id))
        server_round = int(self.settings.get("server-round", 0))
        return Report(client, server_round, self.verdict, attempts, action, sigma, reason)

    # --- attacks

    def _attempts(self, update: Update) -> tuple[Attempt, ...]:
        done: list[Attempt] = []
        for name, attack in self._attacks().items():
            done.append(self._attempt(name, attack, update))
            if done[-1].leaks:  # one is enough to decide
                break
        return tuple(done)

    def _attacks(self) -> dict[str, Callable[[Update], Tensor]]:
        found: dict[str, Callable[[Update], Tensor]] = {
            "ratio": lambda u: first_layer_ratio(self.model, u, self.shape),
            "recursion": self._recursion,
        }
        if self.audit.matching:
            found["matching"] = lambda u: (
                optimization.match_gradients(self.model, u, self.shape, self.audit.loss).inputs
            )
        return found

    def _recursion(self, update: Update) -> Tensor:
        size = update.samples if update.local_steps == 1 else 1
        found = recursion.recover(self.model, update, self.shape, self.audit.loss, batch_size=size)
        return found.inputs

    def _attempt(self, name: str, attack: Callable[[Update], Tensor], update: Update) -> Attempt:
        try:
            with _Deadline(self._left()):
                recovered = attack(update)
            return self._scored(name, recovered)
        except GradientInversionError as error:
            return Attempt(name, outcome=str(error))
        except _OutOfTime:
            return Attempt(name, outcome="out of time")

    def _scored(self, name: str, recovered: Tensor) -> Attempt:
        low, high = float(self.inputs.min()), float(self.inputs.max())
        recovered = recovered.double().nan_to_num().clamp(min(low, 0.0), max(high, 1.0))
        pairs = [(x, self._nearest(x, recovered)) for x in self.inputs]
        x, guess = max(pairs, key=lambda pair: metrics.psnr(*pair))
        psnr, limits = metrics.psnr(x, guess), self.audit.limits
        if x.dim() < 2 or min(x.shape[-2:]) < 3:
            return Attempt(name, psnr, leaks=psnr >= limits.psnr)
        ssim, relative = metrics.ssim(x, guess), relative_leakage(x, guess, self._prior(x))
        over = limits.relative is not None and relative >= limits.relative
        leaks = psnr >= limits.psnr or ssim >= limits.ssim or over
        return Attempt(name, psnr, ssim, relative, leaks)

    def _nearest(self, x: Tensor, recovered: Tensor) -> Tensor:
        distances = (recovered - x).flatten(1).norm(dim=1)
        return recovered[int(distances.argmin())]

    def _prior(self, x: Tensor) -> Tensor:
        grey = torch.full_like(x, 0.5) if self.audit.prior is None else self.audit.prior
        return grey.to(x).reshape(x.shape)

    # --- noise

    def _with_noise(self, attempts: tuple[Attempt, ...], reason: str) -> Report:
        entries = torch.cat([g.double().flatten() for g in self.update.gradients.values()])
        sigma = 0.1 * float(entries.square().mean().sqrt())
        while self._left() > 0:
            tried = self._attempts(self._noised(sigma))
            if any(a.outcome == "out of time" for a in tried):
                break
            if not any(a.leaks for a in tried):
                self._replace(self._noised(2 * sigma))  # the attacks of tomorrow are better
                return self._report(attempts, "sent with noise", reason, 2 * sigma)
            sigma *= 2
        return self._report(attempts, "withheld", f"{reason}; no noise found in time")

    def _noised(self, sigma: float) -> Update:
        source = self.audit.generator
        if source is None:  # a seed that the server cannot know
            source = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))
        noisy = {
            name: g + sigma * torch.randn(g.shape, generator=source, dtype=torch.float64).to(g)
            for name, g in self.update.gradients.items()
        }
        return self.schedule.update(noisy, self.update.samples)

    def _replace(self, update: Update) -> None:
        from flwr.app import Array, ArrayRecord

        name, arrays = next(iter(self.reply.content.array_records.items()))
        end = _tensors(arrays)
        for n, g in update.gradients.items():
            end[n] = self.sent[n] - self.schedule.learning_rate * g
        fresh = {n: Array(t.numpy()) for n, t in end.items()}
        self.reply.content.array_records[name] = ArrayRecord(fresh)

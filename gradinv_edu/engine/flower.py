"""Flower, quiet and on this machine: in this process, on Ray, and with secure aggregation."""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.proto.node_pb2 import NodeInfo
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from ..errors import InvalidArgumentError, InvalidTensorError, RayStartError
from .client import Schedule, Weights, tensors

__all__ = ["InProcessGrid", "error_reply", "quiet", "secure_aggregation", "simulate"]

telemetry.FLWR_TELEMETRY_ENABLED = "0"  # Flower reports to nobody in this process
SILENCE = {  # nor Flower and Ray in the processes that they start
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns of its next version
}
FRAMEWORK = ("flwr", "ray")  # whose logs
LOGS = (*FRAMEWORK, "gradinv_edu.federation")
FIRST_NODE = 100  # Flower keeps 1 for the server


@contextmanager
def quiet(level: int = logging.ERROR, logs: Sequence[str] = LOGS) -> Iterator[None]:
    """Show nothing of these logs, the guard's among them, below ``level``; then put all back."""
    loggers = [logging.getLogger(name) for name in logs]
    levels, environment = [logger.level for logger in loggers], dict(os.environ)
    os.environ.update(SILENCE)
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Return the message that stands in place of a client's answer."""
    return Message(Error(code=code, reason=reason), reply_to=message)


@Grid.register
class InProcessGrid:
    """Flower's messages, delivered by a call: the app, its mods and the strategy are Flower's own.

    Flower's ``run_simulation`` knows one backend, Ray: it takes half a minute to start, numbers
    its nodes anew each time, and has no client out of reach. The chapter and the tests run a
    hundred rounds, and compare them with each other. Clients are numbered from 0 as partitions,
    from 100 as nodes. One that raises, or that is ``unreachable``, is reported as Flower does.
    """

    def __init__(self, app: ClientApp, clients: int, unreachable: Iterable[int] = ()) -> None:
        self.app, self.replies = app, list[list[Message]]()
        self.unreachable = {FIRST_NODE + partition for partition in unreachable}
        self.contexts = {
            FIRST_NODE + i: _context(FIRST_NODE + i, {"partition-id": i, "num-partitions": clients})
            for i in range(clients)
        }
        self.run = Run.create_empty(run_id=1)

    def get_node_ids(self) -> list[int]:
        """Return the numbers of all nodes, those out of reach included."""
        return list(self.contexts)

    def get_nodes(self) -> list[NodeInfo]:
        """Return the nodes as Flower describes them."""
        return [NodeInfo(node_id=node) for node in self.contexts]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver each message to its client, in order of nodes, and return the replies."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        self.replies.append([self._deliver(copy.deepcopy(message)) for message in ordered])
        return self.replies[-1]

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = f"{len(self.replies)}-{node}"
        if node in self.unreachable:
            reason = f"Client {node} is out of reach."
            return error_reply(message, ErrorCode.NODE_UNAVAILABLE, reason)
        try:
            return copy.deepcopy(self.app(message, self.contexts[node]))
        except Exception as error:  # whatever a client does wrong, the federation goes on
            reason = f"{type(error).__name__}: {error}"
            return error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _context(node: int, config: dict[str, Any]) -> Context:
    return Context(1, node, cast(UserConfig, config), RecordDict(), cast(UserConfig, {}))


@contextmanager
def _task() -> Iterator[None]:
    """Give this process the identity without which Flower makes no message."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id = 1, 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def simulate(
    strategy: Any,
    app: ClientApp,
    model: nn.Module,
    schedule: Schedule,
    *,
    clients: int,
    rounds: int = 1,
    processes: int = 0,
    unreachable: Iterable[int] = (),
) -> Result:
    """Run a federation on this machine, and return Flower's result: last weights in ``.arrays``.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy or CuriousServer
        The server's. InvalidArgumentError if it waits for more clients than there are.
    app : flwr.clientapp.ClientApp
        Of every client.
    model : torch.nn.Module
        Whose weights the first round begins with.
    schedule : Schedule
        What the clients are told.
    clients, rounds : int
        How many.
    processes : int
        0: all in this process. More: Flower's simulation on so many Ray processes, whose files
        are removed afterwards; RayStartError if the machine is too busy.
    unreachable : iterable of int
        Partitions that never answer; only in this process.
    """
    names, inner = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"), strategy
    while hasattr(inner, "strategy"):
        inner = inner.strategy
    wanted = max(int(getattr(inner, name, 0)) for name in names)
    if wanted > clients:
        raise InvalidArgumentError(
            f"The strategy waits for {wanted} clients and there are {clients}: it would wait for "
            f"ever. Set {', '.join(names)}, or add clients."
        )
    unreachable = tuple(unreachable)
    if processes and unreachable:
        raise InvalidArgumentError("unreachable needs processes=0; Ray reaches every client.")

    def start(grid: Any) -> Result:
        arrays, config = ArrayRecord(model.state_dict()), ConfigRecord({**schedule.config()})
        result: Result = strategy.start(grid, arrays, num_rounds=rounds, train_config=config)
        return result

    with quiet(logs=FRAMEWORK):  # what the guard has to say is the caller's to hear
        if processes:
            return _on_ray(start, app, clients, processes)
        with _task():
            return start(InProcessGrid(app, clients, unreachable))


def _on_ray(start: Callable[[Any], Result], app: ClientApp, clients: int, processes: int) -> Result:
    import ray
    from flwr.simulation import run_simulation

    results, failures, over = list[Result](), list[Exception](), threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def pull_until_over(message_ids: Iterable[str]) -> Iterable[Message]:
            if over.is_set():  # or the server waits an hour for clients whose processes died
                raise RuntimeError("Flower's simulation ended before every client had answered.")
            return pull(message_ids)

        grid.pull_messages = pull_until_over  # type: ignore[method-assign]
        try:
            results.append(start(grid))
        except Exception as error:
            failures.append(error)
            raise

    # Ray puts sockets there, whose paths must be shorter than many a temporary folder's
    short = "/tmp" if sys.platform != "win32" and os.path.isdir("/tmp") else None
    with tempfile.TemporaryDirectory("", "gi-", short, ignore_cleanup_errors=True) as folder:
        settings: dict[str, Any] = {
            "num_cpus": processes,
            "object_store_memory": 80 * 2**20,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "_temp_dir": folder,
        }
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
        backend = {"init_args": settings, "client_resources": resources}
        try:
            run_simulation(server, app, num_supernodes=clients, backend_config=backend)
        except RuntimeError as error:
            if failures:  # the strategy's own
                raise
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise RayStartError(
                f"Ray did not start, or did not last ({str(cause).splitlines()[0]}): try again "
                "when the machine is less busy, or run with processes=0."
            ) from error
        finally:
            over.set()
            ray.shutdown()
    return results[0]


# --- secure aggregation -----------------------------------------------------------------------


def secure_aggregation(
    app: ClientApp,
    start: Weights,
    schedule: Schedule,
    clients: int,
    unreachable: Iterable[int],
    protocol: Mapping[str, Any],
) -> tuple[Weights, tuple[Weights, ...], list[int]]:
    """Run one round of Flower's SecAgg+, with settings of its ``SecAggPlusWorkflow``.

    Returns the averaged weights, what each client sent, and the nodes without an answer. The
    protocol halts where a client is lost before it has shared its keys; then the round begins
    again without it. InvalidTensorError if fewer than three clients are left.
    """
    grid, lost = InProcessGrid(app, clients, unreachable), set[int]()
    while True:
        grid.replies.clear()
        with quiet(logging.CRITICAL), _task():
            end = _run_workflow(grid, start, schedule, protocol)
        # those who failed first; others may fail because of them
        stages = ({m.metadata.src_node_id for m in r if m.has_error()} for r in grid.replies)
        lost |= next(filter(None, stages), set())
        if not all(torch.equal(end[n], start[n]) for n in start):
            return end, tuple(_masked(grid, start)), sorted(lost)
        left = {node: context for node, context in grid.contexts.items() if node not in lost}
        if len(left) < 3 or len(left) == len(grid.contexts):
            raise InvalidTensorError(
                f"Nothing was aggregated: no answer from {sorted(lost)}, and {len(left)} clients "
                "are left; three are needed."
            )
        grid.contexts = left


def _run_workflow(
    grid: InProcessGrid, start: Weights, schedule: Schedule, protocol: Mapping[str, Any]
) -> Weights:
    clients = len(grid.contexts)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=lambda _: {**schedule.config()},
        initial_parameters=ndarrays_to_parameters([t.numpy() for t in start.values()]),
    )
    context = LegacyContext(_context(0, {}), ServerConfig(num_rounds=1), strategy)
    threshold = max(2, clients // 2 + 1) / clients
    steps = SecAggPlusWorkflow(1.0, threshold, **protocol)
    DefaultWorkflow(fit_workflow=steps)(cast(Grid, grid), context)
    end = tensors(next(iter(context.state.array_records.values()))).values()
    return {n: t.to(was.dtype) for (n, was), t in zip(start.items(), end, strict=True)}


def _masked(grid: InProcessGrid, start: Weights) -> Iterator[Weights]:
    for reply in (reply for stage in grid.replies for reply in stage if not reply.has_error()):
        vectors = reply.content.config_records[RECORD_KEY_CONFIGS].get(Key.MASKED_PARAMETERS)
        if vectors is not None:  # the first entry is the client's weight, masked as well
            arrays = [bytes_to_ndarray(v).copy() for v in cast("list[bytes]", vectors)[1:]]
            yield dict(zip(start, map(torch.from_numpy, arrays), strict=True))

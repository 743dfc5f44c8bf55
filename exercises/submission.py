"""The grader's end: a submission's functions, each call of which runs in a process shut in.

The checks are called with a :class:`Session`'s answers in place of functions. They draw their
data, send it out, get values back and compare them here: what runs a submission never sees a
check, a truth or a mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checks.values import BadMessageError
from checks.verdict import WrongAnswerError
from checks.wire import Remote, Wire
from torch import Tensor

HERE = Path(__file__).resolve().parent
START = 120.0  # seconds for importing torch
LONGEST = 500  # characters of what is told


class EndedError(Exception):
    """A submission's process gave no answer: it ended, talked nonsense, or took too long."""


class Runner:
    """A process that has torch and the package, and makes one process for each exercise."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k in KEPT}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "answering.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**environment, **dict.fromkeys(THREADS, "1"), "MPLBACKEND": "Agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self.channel, self.ready = ours, False
        ours.settimeout(START)

    def _line(self) -> str:
        content = b""
        while not content.endswith(b"\n"):
            part = self.channel.recv(64)
            if not part:
                raise EndedError("the process that runs submissions could not be started")
            content += part
        return content.decode().strip()

    def start(self, job: dict[str, Any]) -> tuple[int, socket.socket, int]:
        """Start the process of one exercise: its number, its channel, and where it tells."""
        if not self.ready:  # it imports what it needs while the grader does
            self.ready = bool(self._line())
        ours, theirs = socket.socketpair()
        told, tell = os.pipe()
        content = json.dumps(job).encode() + b"\n"
        sent = socket.send_fds(self.channel, [content], [theirs.fileno(), tell])
        self.channel.sendall(content[sent:])
        theirs.close()
        os.close(tell)
        return int(self._line()), ours, told

    def close(self) -> None:
        """End it."""
        self.channel.close()
        self.process.wait()


KEPT = {"PATH", "PYTHONPATH", "HOME", "LANG", "PYTHONPYCACHEPREFIX", "VIRTUAL_ENV"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Session:
    """One exercise of one submission, while it is graded.

    Attributes
    ----------
    kind : str
        ``"function"``, or what else stands under the name of the answer.
    failed : dict
        From a cell's place to the error that it ended with.
    notes : list of str
        What the process tried that no exercise needs.
    ended : str
        Why it gave no more answers; empty while it does.
    """

    runner: Runner
    cells: Sequence[tuple[int, str]]
    target: str
    own: Sequence[str] = ()
    seconds: float = 60.0
    gigabytes: float = 4.0
    kind: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended: str = ""
    _verdict: WrongAnswerError | None = None
    _id: int = 0

    def __enter__(self) -> Session:
        self._folder = tempfile.TemporaryDirectory(prefix="answer-")
        os.chmod(self._folder.name, 0o777)
        job = {
            "cells": list(self.cells),
            "target": self.target,
            "own": list(self.own),
            "gigabytes": self.gigabytes,
            "scratch": self._folder.name,
        }
        self._end = time.monotonic() + self.seconds
        self.pid, self._channel, self._told = self.runner.start(job)
        self._wire = Wire(self._channel, self._call)
        hello = self._ask(None)
        self.kind = str(hello.get("ready"))[:40]
        failed = hello.get("failed")
        pairs = failed.items() if isinstance(failed, dict) else ()
        self.failed = {int(k): tidy(v) for k, v in pairs if str(k).isdigit()}
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        time.sleep(0.01)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        self._channel.close()
        os.set_blocking(self._told, False)
        with contextlib.suppress(BlockingIOError):
            lines = os.read(self._told, 2**16).decode(errors="replace").splitlines()
            self.notes += dict.fromkeys(tidy(line) for line in lines)
        os.close(self._told)
        self._folder.cleanup()

    def answer(self) -> Callable[..., Any]:
        """Return the student's function, as the checks see it."""
        function = Remote(self._call, 0)
        function.__name__ = self.target
        return function

    def _ask(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Send a message, serve what the other side calls meanwhile, and return its answer."""
        try:
            if message is not None:
                self._wire.send(message)
            while True:
                self._channel.settimeout(max(0.01, self._end - time.monotonic()))
                reply = self._wire.receive()
                if "back" not in reply:
                    return reply
                self._wire.send(self._called_back(reply))
        except TimeoutError:
            loop = "is there a loop without an end?"
            self._end_by(f"Time ran out after {self.seconds:g} s: {loop}")
        except (EOFError, OSError):
            self._end_by("It ended its own process (a call of exit, out of memory, or a crash).")
        except BadMessageError as error:
            self._end_by(f"Its answer was not taken: {error}.")
        raise AssertionError

    def _end_by(self, why: str) -> None:
        self.ended = why
        raise EndedError(why) from None

    def _called_back(self, reply: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self._wire.functions[int(reply["back"])]
            arguments = self._wire.unpack(reply["arguments"])
            return {"returned": self._wire.pack(function(*arguments))}
        except WrongAnswerError as verdict:
            self._verdict = verdict
            return {"raised": ["RuntimeError", "the check has its verdict"]}
        except Exception as error:
            return {"raised": [type(error).__name__, str(error)[:LONGEST]]}

    def _call(self, number: int, arguments: tuple[Any, ...]) -> Any:
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        if not leaves:
            return self._value(number, arguments)[0]
        outputs = _Far.apply(self, number, arguments, *leaves)
        shape, open_ = self._last
        parts = [
            v if o else v.detach() if isinstance(v, Tensor) else v
            for v, o in zip(outputs, open_, strict=True)
        ]
        return tuple(parts) if shape else parts[0]

    def _value(
        self, number: int, arguments: tuple[Any, ...], leaves: Iterable[Tensor] = ()
    ) -> tuple[Any, list[bool]]:
        """Call a function there; its value, and which parts of it depend on the leaves."""
        self._id += 1
        wanted, tensors = list(leaves), [a for a in arguments if isinstance(a, Tensor)]
        places = [i for i, a in enumerate(tensors) if any(a is leaf for leaf in wanted)]
        packed = self._wire.pack(list(arguments))
        call = {"call": number, "id": self._id, "arguments": packed, "leaves": places}
        reply = self._ask(call)
        if self._verdict is not None:
            raise self._verdict
        if "error" in reply:
            raise _error(reply["error"])
        try:
            value, open_ = self._wire.unpack(reply.get("value")), reply.get("open") or []
        except BadMessageError as error:
            self._end_by(f"Its answer was not taken: {error}.")
        parts = value if isinstance(value, tuple | list) else [value]
        open_ = [bool(o) for o in open_][: len(parts)]
        return value, open_ + [False] * (len(parts) - len(open_))

    def slope(self, call: int, weights: list[Tensor]) -> list[Tensor | None]:
        """Ask for the derivative of what an earlier call returned, times ``weights``."""
        reply = self._ask({"slope": call, "weights": self._wire.pack(weights)})
        if "error" in reply:
            raise _error(reply["error"])
        return list(self._wire.unpack(reply.get("value")))


class _Far(torch.autograd.Function):
    """A call whose derivative is asked of the other side as well."""

    @staticmethod
    def forward(
        context: Any, session: Session, number: int, arguments: tuple[Any, ...], *leaves: Tensor
    ) -> tuple[Any, ...]:
        value, open_ = session._value(number, arguments, leaves)
        several = isinstance(value, tuple | list)
        parts = tuple(value) if several else (value,)
        session._last = several, open_
        context.session, context.call, context.open = session, session._id, open_
        return parts

    @staticmethod
    def backward(context: Any, *weights: Tensor) -> tuple[Any, ...]:
        sent = [w for w, o in zip(weights, context.open, strict=True) if o]
        found = context.session.slope(context.call, sent)
        return (None, None, None, *found)


def _error(said: object) -> Exception:
    """What went wrong there, as an exception of the same name and of no other power."""
    kind, words = said if isinstance(said, list) and len(said) == 2 else ("Error", "")
    name = str(kind) if str(kind).isidentifier() else "Error"
    if name == "NotImplementedError":
        return NotImplementedError()
    if "allocate memory" in str(words) or name == "MemoryError":
        name, words = "MemoryError", "out of the memory that grading allows"
    return type(name, (Exception,), {})(tidy(words))


def tidy(words: object, most: int = LONGEST) -> str:
    """One printable line, not too long."""
    line = "".join(c if c.isprintable() else " " for c in str(words))
    line = " ".join(line.split())
    return line if len(line) <= most else line[:most] + " …"

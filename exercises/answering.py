"""The process that runs a submission: it answers questions, and knows no check.

``grade.py`` starts it once. It imports torch and the package, and then makes a child of itself
for every exercise that is to be graded: a process shut in by ``sandbox``, which runs the student's
cells and calls the student's functions with what the grader sends.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import inspect
import io
import json
import os
import signal
import socket
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
sys.path.insert(0, str(HERE))
import sandbox  # noqa: E402
from checks import wire  # noqa: E402

del sys.path[0]  # so that no submission finds the checks
for name in [n for n in sys.modules if n.split(".")[0] == "checks"]:
    del sys.modules[name]

LOUD = 10 * 2**20  # characters that may be printed before it is told
LONGEST = 400  # characters of an error's message


class OwnWorkError(Exception):
    """A function of the package did what the exercise asks for."""


def readable() -> list[Path]:
    """Folders that a submission may read: Python's, the package's, the system's libraries."""
    import gradinv_edu

    package = Path(gradinv_edu.__file__).resolve().parent
    roots = {Path(p) for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
    installed = {Path(p) for p in sys.path if p and "site-packages" in p}
    system = {Path("/usr"), Path("/lib"), Path("/lib64"), Path("/etc"), Path("/dev")}
    folders = {p.resolve() for p in roots | installed | system if p.exists()} | {package}
    return sorted(p for p in folders if p not in HERE.parents and p != Path("/"))


def serve(channel: socket.socket) -> None:
    """Make a child for every request: its job as JSON, with a socket and a pipe of its own."""
    folders = readable()
    while True:
        job, descriptors = _request(channel)
        if job is None:
            return
        child = os.fork()
        if child == 0:
            channel.close()
            _shut_in(job, descriptors, folders)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.sendall(f"{child}\n".encode())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _request(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    content, descriptors = b"", array.array("i")
    while not content.endswith(b"\n"):
        part, extra, _, _ = channel.recvmsg(2**20, socket.CMSG_SPACE(8))
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if not part:
            return None, []
        content += part
    return json.loads(content), list(descriptors)


def _shut_in(job: dict[str, Any], descriptors: list[int], folders: list[Path]) -> None:
    """Become the process of one exercise, in namespaces of its own where there are some."""
    os.setsid()
    if sandbox.alone():
        inner = os.fork()
        if inner:  # stays outside, and takes all of them along when it is told to end
            signal.signal(signal.SIGTERM, lambda *_: (os.kill(inner, signal.SIGKILL), os._exit(0)))
            os.close(descriptors[0])
            os.close(descriptors[1])
            os.waitpid(inner, 0)
            os._exit(0)
    scratch = Path(job["scratch"])
    os.chdir(scratch)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.environ.clear()
    os.environ.update(HOME=str(scratch), TMPDIR=str(scratch), MPLBACKEND="Agg")
    own = tuple(job["own"])
    sandbox.limit(job["gigabytes"])
    sandbox.lock(folders, scratch)

    def tell(words: str) -> None:
        os.write(descriptors[1], (words.replace("\n", " ")[:300] + "\n").encode())

    for name in own:
        _forbid(name, tell)
    sys.stdout = sys.stderr = _Counted(tell)  # type: ignore[assignment]
    sandbox.watch(tell, folders, scratch)
    _answer(socket.socket(fileno=descriptors[0]), job, scratch, tell)


class _Counted(io.TextIOBase):
    """Nobody reads what is printed; too much of it is told."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.left, self.tell = LOUD, tell

    def write(self, text: str) -> int:
        """Count it."""
        if 0 <= self.left < len(text):
            self.tell(f"printed more than {LOUD >> 20} MB")
        self.left -= len(text) if self.left >= 0 else 0
        return len(text)


def _forbid(name: str, tell: Callable[[str], None]) -> None:
    """Let the function of this name refuse, under every name by which it is reached."""

    def refuse(*_: object, **__: object) -> None:
        tell(f"called {name}, which the exercise asks to write")
        raise OwnWorkError(f"you called {name}: this exercise asks you to do that yourself")

    module, _, attribute = name.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        outer, _, inner = module.rpartition(".")
        owner = getattr(importlib.import_module(outer), inner)
    target = getattr(owner, attribute)
    for place in [owner, *(m for n, m in sys.modules.items() if n.startswith("gradinv_edu"))]:
        for known, value in list(vars(place).items()):
            if value is target:
                setattr(place, known, refuse)
    setattr(owner, attribute, refuse)
    whole = inspect.unwrap(target)
    if isinstance(whole, FunctionType):  # for whoever holds it by another name
        words = f"you called {name}: this exercise asks you to do that yourself"
        code, free = _refused.__code__, whole.__code__.co_freevars
        consts = tuple(words if const == "WORDS" else const for const in code.co_consts)
        with contextlib.suppress(ValueError):
            whole.__code__ = code.replace(co_consts=consts, co_freevars=free)


def _refused(*_: object, **__: object) -> None:
    raise PermissionError("WORDS")


def _answer(
    channel: socket.socket, job: dict[str, Any], scratch: Path, tell: Callable[[str], None]
) -> None:
    """Run the cells, say what became of them, and call what the grader asks for."""

    def call_back(number: int, arguments: tuple[Any, ...]) -> Any:
        line.send({"back": number, "arguments": line.pack(list(arguments))})
        while True:
            message = line.receive()
            if "returned" in message:
                return line.unpack(message["returned"])
            if "raised" in message:
                raise _known_error(*message["raised"])
            serve_one(message)

    line = wire.Wire(channel, call_back, scratch, trusting=True)
    sys.dont_write_bytecode = True
    names, graphs = _run(job["cells"], tell), {}
    target = names.get(job["target"])
    line.functions.append(target)
    kind = "function" if callable(target) else type(target).__name__
    failed = names.get("__failed__", {})
    line.send({"ready": kind, "failed": {str(k): v for k, v in failed.items()}})

    def serve_one(message: dict[str, Any]) -> None:
        import torch

        try:
            if "slope" in message:
                outputs, inputs = graphs[message["slope"]]
                weights = line.unpack(message["weights"])
                found = torch.autograd.grad(
                    outputs, inputs, weights, allow_unused=True, retain_graph=True
                )
                line.send({"value": line.pack(list(found)), "open": []})
                return
            arguments = line.unpack(message["arguments"])
            inputs = [a for a in arguments if isinstance(a, torch.Tensor)]
            inputs = [inputs[place].requires_grad_() for place in message["leaves"]]
            value = line.functions[message["call"]](*arguments)
            parts = value if isinstance(value, tuple | list) else [value]
            open_ = [isinstance(p, torch.Tensor) and bool(p.requires_grad) for p in parts]
            if inputs:
                outputs = [p for p, o in zip(parts, open_, strict=True) if o]
                graphs[message["id"]] = outputs, inputs
            line.send({"value": line.pack(value), "open": open_ if inputs else []})
        except BaseException as error:  # also SystemExit
            words = " ".join(str(error).split())[:LONGEST]
            line.send({"error": [_kind(error), words]})

    while True:
        try:
            serve_one(line.receive())
        except EOFError:
            os._exit(0)


def _kind(error: BaseException) -> str:
    return type(error).__name__[:60]


def _known_error(kind: str, words: str) -> Exception:
    """The error of that name, if the package or Python has one."""
    import builtins

    import gradinv_edu as gi

    for place in (gi.errors, gi.scoreboard, builtins):
        found = getattr(place, kind, None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found(words)
    return RuntimeError(f"{kind}: {words}")


def _run(cells: list[list[Any]], tell: Callable[[str], None]) -> dict[str, Any]:
    """Run every cell, whether or not those before it failed; what they defined."""
    names: dict[str, Any] = {"__name__": "__main__"}
    failed: dict[int, str] = {}
    for place, source in cells:
        plain = "\n".join(
            f"pass  # {line}" if line.lstrip()[:1] in "%!?" and line.strip() else line
            for line in source.splitlines()
        )
        try:
            exec(compile(plain, f"<cell {place}>", "exec"), names)
        except BaseException as error:
            if isinstance(error, SystemExit | KeyboardInterrupt):
                tell(f"ended a cell by {_kind(error)}")
            last = traceback.format_exception_only(error)[-1] if _plain(error) else _kind(error)
            failed[place] = " ".join(last.split())[:LONGEST]
    names["__failed__"] = failed
    return names


def _plain(error: BaseException) -> bool:
    return type(error).__module__ in ("builtins", "gradinv_edu.errors")


def main() -> None:
    """Import what takes long, then serve."""
    import torch

    torch.set_num_threads(1)
    import gradinv_edu as gi

    for part in ("scoreboard", "errors", "metrics", "systems"):
        getattr(gi, part)
    gi.data.photo("cat", size=8)
    gi.data.digits([0])
    for name in ("torch.utils._device", "torch.fx.experimental.symbolic_shapes", "threadpoolctl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sandbox.hide_memory()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.sendall(b"ready\n")
    serve(channel)


if __name__ == "__main__":
    main()

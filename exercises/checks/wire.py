"""What passes between the grader and a process that it does not trust, as JSON lines.

Values are :mod:`values`; functions are numbers to call back by.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .values import BadMessageError, Values

LONGEST = 16 * 2**20  # bytes of one message


class Wire(Values):
    """One end of a socket: sends and receives messages, and knows the functions of both sides.

    Parameters
    ----------
    channel : socket
        To the other side.
    call : function
        ``call(number, arguments)`` calls the function ``number`` of the other side.
    folder : Path or None
        Where files that arrive are put; ``None`` refuses them.
    trusting : bool
        As for :class:`Values`.
    """

    def __init__(
        self,
        channel: socket.socket,
        call: Callable[[int, tuple[Any, ...]], Any],
        folder: Path | None = None,
        trusting: bool = False,
    ) -> None:
        super().__init__(trusting)
        self.channel, self.call, self.folder = channel, call, folder
        self.functions: list[Callable[..., Any]] = []
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for one message.

        Raises
        ------
        BadMessageError
            If it is too long, no JSON, or the other side has ended.
        """
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            part = self.channel.recv(2**20)
            size += len(part)
            if not part:
                raise EOFError
            if size > LONGEST:
                raise BadMessageError(f"an answer of more than {LONGEST >> 20} MB")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadMessageError("what it wrote to the grader is no answer") from error
        if not isinstance(message, dict):
            raise BadMessageError("what it wrote to the grader is no answer")
        return message

    def _pack_other(self, value: Any, depth: int) -> Any:
        if isinstance(value, Path) and not self.trusting:
            return {"file": [value.name, base64.b64encode(value.read_bytes()).decode()]}
        if _is_audit(value):
            return {"audit": self.pack(_settings(value), depth + 1)}
        if isinstance(value, Remote):
            return {"yours": value.number}
        if callable(value):
            if value not in self.functions:
                self.functions.append(value)
            return {"mine": self.functions.index(value)}
        return None

    def _unpack_other(self, kind: str, content: Any) -> Any:
        if kind == "mine":
            return Remote(self.call, int(content))
        if kind == "yours":
            return self.functions[int(content)]
        if kind == "audit":
            return _audit(self._unpack(content))
        if kind == "file" and self.folder is not None:
            path = self.folder / Path(content[0]).name
            path.write_bytes(base64.b64decode(content[1]))
            return path
        return super()._unpack_other(kind, content)


class Remote:
    """A function of the other side, differentiable where the other side's is."""

    def __init__(self, call: Callable[[int, tuple[Any, ...]], Any], number: int) -> None:
        self._call, self.number = call, number
        self.__name__ = "your function"

    def __call__(self, *arguments: Any) -> Any:
        """Call it there, and return what comes back."""
        return self._call(self.number, arguments)


_SETTINGS = ("model", "loss", "data", "policy", "seconds")


def _is_audit(value: object) -> bool:
    return type(value).__name__ == "LeakAudit"


def _settings(audit: Any) -> dict[str, Any]:
    limits = {"psnr": float(audit.limits.psnr), "ssim": float(audit.limits.ssim)}
    return {**{name: getattr(audit, name) for name in _SETTINGS}, "limits": limits}


def _audit(settings: dict[str, Any]) -> Any:
    import gradinv_edu as gi

    limits = gi.federation.Limits(**settings.pop("limits"))
    return gi.federation.LeakAudit(**settings, limits=limits)

"""A bar for what takes long, and an end to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode

from .. import checks
from .krylov import Progress

__all__ = ["Deadline", "Limit", "OutOfTime", "bar", "end_of", "until"]


class OutOfTime(Exception):
    """The time given has run out."""


class Deadline(TorchFunctionMode):
    """Ends whatever computes with torch once ``time.monotonic()`` is past ``end``."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.end:
            raise OutOfTime
        return func(*args, **(kwargs or {}))


@dataclass
class Limit:
    """Whether the time ran out."""

    passed: bool = False


def end_of(seconds: float | None) -> float | None:
    """``time.monotonic()`` after so many seconds; None for None.

    InvalidArgumentError if it is no number of seconds.
    """
    if seconds is None:
        return None
    checks.number(seconds, "seconds", "a number of seconds, 0 or more", lambda s: s >= 0)
    return time.monotonic() + seconds


@contextmanager
def until(end: float | None) -> Iterator[Limit]:
    """Leave what is inside once ``time.monotonic()`` is past ``end``; never for None.

    What it gives says so afterwards. A caller's own :class:`Deadline` goes through.
    """
    limit = Limit()
    if end is None:
        yield limit
        return
    try:
        with Deadline(end):
            yield limit
    except OutOfTime:
        if time.monotonic() <= end:
            raise
        limit.passed = True


@contextmanager
def bar(label: str, shown: bool) -> Iterator[Progress | None]:
    """Show a tqdm bar that a solver moves by its iterations and residual; None where not shown."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=label, unit="it", leave=False) as moving:

        def move(iterations: int, residual: float) -> None:
            moving.update(1)
            if iterations % 20 == 0:
                moving.set_postfix(residual=f"{residual:.0e}")

        yield move

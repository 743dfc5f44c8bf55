"""A bar for what takes long, and an end to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from .krylov import Progress

__all__ = ["Deadline", "OutOfTime", "bar"]


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

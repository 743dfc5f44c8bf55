"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .krylov import Progress

__all__ = ["bar"]


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

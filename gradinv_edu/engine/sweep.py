"""A table of measurements in one file: what is missing is made, and nothing made is lost.

The file is JSON, a head and a line a cell, and is written whole after each cell, in one step: a
run can be killed at any time and goes on where it was. Cells are made here, by joblib's processes
on this machine, or on a Ray cluster.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..checks import whole
from ..errors import MissingExtraError, ResultsFileError
from .files import write_whole

__all__ = ["fill", "load", "save", "versions"]

AT_ONCE = 4  # cells a worker between two times of writing, on Ray
Table = dict[str, Any]


def load(file: str | Path, head: Mapping[str, Any] | None = None) -> Table:
    """Read a results file, or begin one where there is none.

    Parameters
    ----------
    file : path
        Of the results.
    head : mapping, optional
        What new cells are made with: format, settings, versions, seeds. The file's own must be
        the same, but for Python. ``None``: to read, whatever made it.

    Returns
    -------
    dict
        The head, ``baselines``, and ``cells`` by their names.

    Raises
    ------
    ResultsFileError
        If the file is missing (to read), damaged, or made with something else (to go on with). It
        is left as it is.
    """
    path = Path(file)
    if not path.exists():
        if head is None:
            raise ResultsFileError(f"There is no results file {path}: make it, or name another.")
        return {**head, "baselines": {}, "cells": {}}
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
        parts = [table[name] for name in ("settings", "versions", "baselines", "cells")]
        text = isinstance(table["seeds"], str) and isinstance(table["format"], int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsFileError(f"{path} is no results file of this program: {error!r}.") from error
    if not text or not all(isinstance(part, dict) for part in parts):
        raise ResultsFileError(f"{path} is damaged: it has another format; move it away.")
    for name, now in (head or {}).items():
        then, now = (
            part if isinstance(part, dict) else {name: part} for part in (table[name], now)
        )
        differing = [n for n in now if n != "python" and then.get(n) != now[n]]
        if differing:
            said = ", ".join(f"{n} {then.get(n)!r}, now {now[n]!r}" for n in differing)
            raise ResultsFileError(
                f"{path} was made with other {name} ({said}). Its cells and new ones do not belong "
                "together: give another --file, or move this one away."
            )
    return table


def save(table: Table, file: str | Path, order: Sequence[str] = ()) -> None:
    """Write a results file in one step: whole, or not at all.

    Parameters
    ----------
    table : dict
        As from :func:`load`.
    file : path
        Replaced.
    order : sequence of str
        Of the cells; others come last.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {name: place for place, name in enumerate(order)}
    cells = sorted(table["cells"], key=lambda name: places.get(name, len(places)))
    head = {name: part for name, part in table.items() if name != "cells"}
    top = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    dumped = (
        json.dumps(part, ensure_ascii=False)
        for name in cells
        for part in (name, table["cells"][name])
    )
    lines = ",\n".join(f"  {name}: {cell}" for name, cell in zip(dumped, dumped, strict=True))
    write_whole(path, f'{top},\n "cells": {{\n{lines}\n }}\n}}\n')


def fill(
    table: Table,
    file: str | Path,
    names: Sequence[str],
    measure: Callable[[str], Any],
    *,
    order: Sequence[str] = (),
    whole_cell: Callable[[str, Any], bool] = lambda name, cell: True,
    workers: int = 1,
    ray: bool = False,
    progress: bool = True,
) -> Table:
    """Make the cells that a table lacks, and write the file after each.

    Parameters
    ----------
    table : dict
        As from :func:`load`; changed in place.
    file : path
        To be written.
    names : sequence of str
        Cells that are wanted.
    measure : callable
        Makes a cell of a name; found by its own name in a worker.
    order : sequence of str
        Of all cells in the file.
    whole_cell : callable
        Whether a cell that is there holds as much as is wanted; otherwise it is made again.
    workers : int
        Processes of joblib on this machine; 1: none but this.
    ray : bool
        Send cells to a Ray cluster instead: the one that ``RAY_ADDRESS`` names, or one of this
        machine alone.
    progress : bool
        Show a bar.

    Raises
    ------
    InvalidArgumentError, MissingExtraError
        If there are no workers; if joblib or Ray is needed and not installed.
    """
    from tqdm.auto import tqdm

    whole(workers, "workers")
    cells = table["cells"]
    missing = [n for n in names if n not in cells or not whole_cell(n, cells[n])]
    made = _parallel(missing, measure, workers, ray) if ray or workers > 1 else None
    with tqdm(total=len(missing), desc="cells", unit="cell", disable=not progress) as bar:
        for name, cell in made or ((name, measure(name)) for name in missing):
            table["cells"][name] = cell
            save(table, file, order)
            bar.set_postfix_str(name)
            bar.update()
    return table


def _parallel(
    names: Sequence[str], measure: Callable[[str], Any], workers: int, ray: bool
) -> Iterator[tuple[str, Any]]:
    """Cells as they are finished, in whatever order."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home otherwise
    try:
        import joblib

        if ray:
            from ray.util.joblib import register_ray

            register_ray()  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise MissingExtraError(
            f"{error.name} is not installed: uv pip install 'gradinv_edu[scoreboard]'."
        ) from error
    calls = [joblib.delayed(_alone)(name, measure) for name in names]
    if not ray:
        pool = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
        yield from pool(calls)
        return
    with joblib.parallel_config(backend="ray", n_jobs=-1):
        # Ray's backend returns whole lists only: rounds of a few cells a worker are kept.
        size = AT_ONCE * joblib.effective_n_jobs()
        for start in range(0, len(calls), size):
            yield from joblib.Parallel(batch_size=1)(calls[start : start + size])


def _alone(name: str, measure: Callable[[str], Any]) -> tuple[str, Any]:
    torch.set_num_threads(1)  # in a worker of our own
    return name, measure(name)


def versions() -> dict[str, str]:
    """Versions of this package, torch, Opacus and Python: what results are made with."""
    from .. import __version__

    try:
        opacus = version("opacus")
    except PackageNotFoundError:
        opacus = "none"
    made = {"gradinv_edu": __version__, "torch": torch.__version__.split("+")[0], "opacus": opacus}
    return {**made, "python": platform.python_version()}

"""A scoreboard's file as a table and as a drawing."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError, UnknownNameError
from ..kit.metrics import clustered_rate
from .attackers import ATTACKERS
from .defenses import DEFENSES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SUCCESS", "best", "draw", "draw_leaks", "leaks", "table"]

SUCCESS = 25.0  # dB; a threshold that looking up a digit of the same class seldom passes


def table(board: dict[str, Any]) -> pd.DataFrame:
    """A board as a table: a row a cell, with medians over its pictures.

    Parameters
    ----------
    board : dict
        From :func:`load`.

    Returns
    -------
    pandas.DataFrame
        By ``net``, ``defense``, ``attacker`` (or ``"price"``): ``psnr``, ``ssim``, ``successes``
        and ``pictures``, the share ``exact`` that the attacker is sure of (NaN: it never is),
        ``seconds``, ``accuracy`` and the two ``epsilon``; NaN where something does not apply.
    """
    rows = []
    for name, cell in board["cells"].items():
        row = dict(zip(("net", "defense", "attacker"), name.split("/"), strict=True))
        for column in ("psnr", "ssim"):
            row[column] = median(cell.get(column, [math.nan]))
        for column in ("exact", "accuracy"):
            row[column] = fmean(cell.get(column, [math.nan]))
        row["successes"] = sum(psnr > SUCCESS for psnr in cell.get("psnr", []))
        row["pictures"] = len(cell.get("psnr", []))
        epsilons = ("epsilon_of_one_update", "epsilon_of_the_training")
        rows.append(row | {n: cell.get(n, math.nan) for n in ("seconds", *epsilons)})
    return _pandas().DataFrame(rows).set_index(["net", "defense", "attacker"])


def best(board: dict[str, Any], *, naive: bool = False) -> pd.DataFrame:
    """The attacker of highest median PSNR in each row of the board; one who knows may use any.

    Parameters
    ----------
    board : dict
        From :func:`load`.
    naive : bool
        Among those who do not know of the defense, only.

    Returns
    -------
    pandas.DataFrame
        By ``net`` and ``defense``, with the columns of :func:`table` and ``attacker``; no row
        where the defense does not apply to the network.
    """
    names = [n for n, a in ATTACKERS.items() if not (naive and a.aware)]
    cells = table(board).dropna(subset="psnr").reset_index("attacker")
    cells = cells[cells["attacker"].isin(names)].sort_values("psnr", ascending=False, kind="stable")
    return cells[~cells.index.duplicated()]


def leaks(board: dict[str, Any], net: str) -> pd.DataFrame:
    """What leaks from a network beside what it has learned, each with its interval.

    Parameters
    ----------
    board : dict
        From :func:`load`, of several seeds.
    net : str
        As on the board.

    Returns
    -------
    pandas.DataFrame
        By ``defense``: ``accuracy`` and ``reach``, the half of its 95 % interval over trainings;
        for the ``naive`` attacker who reads most (of highest median PSNR among such) and for the
        best of all, ``aware``, the median, the ``low`` and ``high`` of the networks' own medians,
        and ``read``, the :class:`~gradinv_edu.kit.metrics.Rate` over :data:`SUCCESS`, counted by
        networks.

    Raises
    ------
    UnknownNameError
        If no attack on the network is on the board.
    """
    from scipy.stats import t

    cells, rows = board["cells"], list[dict[str, Any]]()
    # at its first weights every picture has a network of its own
    seeds = board["settings"]["seeds"] if "trained" in net else None
    for defense in dict.fromkeys(name.split("/")[1] for name in cells):
        row: dict[str, Any] = {"defense": defense}
        for side in ("naive", "aware"):
            names = (n for n, a in ATTACKERS.items() if side == "aware" or not a.aware)
            found = [cells.get(f"{net}/{defense}/{name}", {}).get("psnr") for name in names]
            psnr = max((p for p in found if p), key=_reached, default=None)
            if psnr is None:
                continue
            groups = [
                psnr[k :: seeds or len(psnr)] for k in range(min(seeds or len(psnr), len(psnr)))
            ]
            middles = [median(group) for group in groups]
            row |= {side: median(psnr), f"{side} low": min(middles), f"{side} high": max(middles)}
            row[f"{side} read"] = clustered_rate([p > SUCCESS for p in g] for g in groups)
        if "aware" not in row:
            continue
        trained = "none" if DEFENSES[defense].kind == "batch" else defense
        price = cells.get(f"{net.split(',')[0]}/{trained}/price", {}).get("accuracy", [math.nan])
        n = len(price)
        spread = float(np.std(price, ddof=1)) if n > 1 else math.nan
        reach = float(t.ppf(0.975, max(n - 1, 1))) * spread / math.sqrt(n)
        rows.append(row | {"accuracy": fmean(price), "reach": reach})
    if not rows:
        raise UnknownNameError(f"No attack on {net!r} is on the board yet.")
    return _pandas().DataFrame(rows).set_index("defense")


def _reached(psnr: list[float]) -> tuple[float, float]:
    return fmean(decibel > SUCCESS for decibel in psnr), median(psnr)


def draw_leaks(board: dict[str, Any], net: str) -> Figure:
    """Draw what :func:`leaks` says, a line a defense: decibels, hollow for the naive; accuracy.

    Parameters
    ----------
    board, net
        As for :func:`leaks`.
    """
    import matplotlib.pyplot as plt

    from ..kit.plotting import COLOURS, style

    found = leaks(board, net).dropna(subset="accuracy")
    size = 5, 1.3 + 0.27 * len(found)
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=size, sharey=True, width_ratios=(3, 2), layout="constrained"
        )
        for place, (_, row) in enumerate(found.iterrows()):
            for side, colour in (("naive", COLOURS.known), ("aware", COLOURS.leaked)):
                middle, low, high = (min(row[f"{side}{e}"], 120) for e in ("", " low", " high"))
                ends = [[middle - low], [high - middle]]
                look = {"color": colour, "mfc": "white" if side == "naive" else colour}
                y = place + (0.17 if side == "naive" else -0.17)
                left.errorbar(middle, y, xerr=ends, fmt="o", lw=0.8, **look)
            right.errorbar(
                row["accuracy"], place, xerr=row["reach"], fmt="D", lw=0.8, color=COLOURS.third
            )
        left.axvline(SUCCESS, color=COLOURS.quiet, lw=0.8, ls=":")
        left.plot([], [], "o", color=COLOURS.known, mfc="white", label="naive")
        left.plot([], [], "o", color=COLOURS.leaked, label="any attacker")
        left.set(xlabel="median PSNR, dB", xlim=(-4, 128), xticks=[0, 25, 50, 75, 100])
        left.set_yticks(range(len(found)), list(found.index))
        left.invert_yaxis()
        right.set(xlabel="accuracy")
        right.locator_params(axis="x", nbins=2)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def draw(board: dict[str, Any], net: str) -> Figure:
    """Draw a network's part of the board: defenses down, attackers across.

    Parameters
    ----------
    board, net
        As for :func:`leaks`, with no cell of the network missing.

    Returns
    -------
    matplotlib.figure.Figure
        Registered with pyplot. Numbers are median PSNR in dB, darker is more of the picture; a
        dot says that the attacker is sure of every picture, a dash that it does not apply.
    """
    import matplotlib.pyplot as plt

    from ..kit.plotting import style

    cells, columns = table(board), list(ATTACKERS)
    defenses = list(cells.index.unique("defense"))
    psnr, exact = (
        cells[name].unstack()[columns].loc[net].loc[defenses] for name in ("psnr", "exact")
    )
    colours = plt.colormaps["GnBu"].with_extremes(bad="#f4f3f1")
    with style():
        figure, axes = plt.subplots(figsize=(5, 7.4), layout="constrained")
        axes.imshow(psnr.clip(upper=60), cmap=colours, vmin=0, vmax=75, aspect="auto")
        for (i, j), value in np.ndenumerate(psnr):
            sure = "•" if exact.iat[i, j] == 1 else ""
            entry = "–" if math.isnan(value) else f"{value:.0f}{sure}"
            ink = "white" if value > 50 else "#23292e"
            axes.text(j, i, entry, ha="center", va="center", fontsize=9.5, color=ink)
        axes.axvline(sum(not a.aware for a in ATTACKERS.values()) - 0.5, color="white", lw=3)
        axes.set_xticks(range(len(columns)), [name.replace(" ", "\n", 1) for name in columns])
        axes.tick_params(length=0, labelsize=9.5)
        axes.set_yticks(range(len(defenses)), defenses)
    return figure


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError(
            "pandas is not installed: uv pip install 'gradinv_edu[scoreboard]'."
        ) from error
    return pandas

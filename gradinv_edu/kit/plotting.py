"""Figures in one calm style, legible on light and dark pages alike.

Figures are drawn on opaque white: their ink is dark, and greys that are data must not change with
the page behind them. The book clears the white from around them (``book/figures.py``). Every figure
comes back registered with pyplot, so that ``plt.show()`` shows it.

A picture is a tensor, (H, W), (1, H, W) or (3, H, W), in [0, 1]; pictures are one such, a batch
(N, C, H, W), or a sequence of either, whose sizes may differ. Something else, or NaN and infinite
entries, raises InvalidTensorError; settings that cannot be raise InvalidArgumentError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from .. import checks
from ..errors import InvalidArgumentError, InvalidTensorError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Palette", "compare", "curves", "gallery", "style"]

Pictures = Tensor | Sequence[Tensor]
Gain = float | Literal["auto"]
Pixels = np.ndarray[Any, np.dtype[np.float64]]


class Palette(NamedTuple):
    """Colours that stay apart under every common kind of colour blindness, on white."""

    known: str
    leaked: str
    third: str
    fourth: str
    fifth: str
    quiet: str


COLOURS = Palette(
    known="#17687a",
    leaked="#c36d0b",
    third="#360350",
    fourth="#8b0036",
    fifth="#7b88d9",
    quiet="#918c81",
)

# A figure 5 inches wide with letters of this size can still be read on a telephone.
_INK, _FRAME, _PANEL, _LETTERS = "#23292e", "#c9ced2", 1.75, 11
_MARKERS = "osD^vP"
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (8, 3)))


@contextmanager
def style() -> Iterator[None]:
    """Draw in the course's style inside ``with style():``; settings are put back afterwards."""
    import matplotlib.pyplot as plt

    settings: Any = _settings()  # matplotlib's stubs name each key, in some versions
    with plt.rc_context(settings):
        yield


def compare(
    truth: Pictures,
    recovered: Pictures,
    titles: Sequence[str] = ("truth", "recovered", "difference"),
    gain: Gain = "auto",
) -> Figure:
    """Show pictures beside their recoveries and the difference, one row each.

    In the third column mid-grey is zero, brighter is too bright, darker is too dark.

    Parameters
    ----------
    truth, recovered : pictures
        A flat recovery, of one picture or of all, takes its truth's shape. Recoveries are
        clipped to [0, 1] to be shown.
    titles : sequence of str
        Of the three columns.
    gain : float or "auto"
        Factor by which differences are multiplied, printed in the third title. ``"auto"``: the
        power of ten that brings their root mean square, in the worst row, between 0.1 and 1.
    """
    truths = _pictures(truth, "truth")
    answers = _answers(recovered, truths)
    differences = [b - a for a, b in zip(truths, answers, strict=True)]
    factor = _gain(differences, gain)
    if len(titles) != 3:
        raise InvalidArgumentError(
            f"titles are three, for truth, recovery and difference; got {titles!r}."
        )
    grey = [0.5 + factor * d / 2 for d in differences]
    heads = [titles[0], titles[1], _difference_title(titles[2], factor, differences)]
    rows = list(zip(truths, answers, grey, strict=True))
    return _grid([p for row in rows for p in row], heads, columns=3)


def gallery(
    pictures: Pictures, titles: Sequence[str] | None = None, columns: int | None = None
) -> Figure:
    """Show pictures in a grid of at most ``columns`` (three), each under its own title."""
    shown = _pictures(pictures, "pictures")
    if titles is not None and len(titles) != len(shown):
        raise InvalidArgumentError(f"{len(shown)} pictures need as many titles, got {len(titles)}.")
    columns = 3 if columns is None else checks.whole(columns, "columns")
    return _grid(shown, list(titles or []), min(columns, len(shown)))


def curves(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    log: Literal["", "x", "y", "xy"] = "",
    title: str | None = None,
) -> Figure:
    """Draw curves over the places ``x``, told apart by colour, dash and marker.

    ``ys`` has their values by their labels; NaN leaves a gap. ``log`` says which axes are
    logarithmic, ``xlabel`` and ``ylabel`` with units what they show.
    """
    import matplotlib.pyplot as plt

    with style():
        figure, axes = plt.subplots(figsize=(6.2, 3.3), layout="constrained")
        for place, (label, y) in enumerate(ys.items()):
            if len(y) != len(x):
                raise InvalidTensorError(f"{label!r} has {len(y)} points, x has {len(x)}.")
            kind = place % len(COLOURS)
            look = {"color": COLOURS[kind], "marker": _MARKERS[kind], "linestyle": _LINES[kind]}
            axes.plot(x, y, label=label, **look)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
        axes.set_xscale("log" if "x" in log else "linear")
        axes.set_yscale("log" if "y" in log else "linear")
        axes.grid(True)
        if len(ys) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _settings() -> dict[str, Any]:
    from cycler import cycler

    return {
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "axes.facecolor": "white",
        "font.family": "DejaVu Sans",
        "font.size": _LETTERS,
        "text.color": _INK,
        "axes.titlesize": _LETTERS,
        "axes.titlecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FRAME,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=list(COLOURS)),
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": "#e6e9eb",
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "image.interpolation": "nearest",
        "image.cmap": "gray",
    }


def _grid(pictures: Sequence[Pixels], titles: Sequence[str], columns: int) -> Figure:
    """Lay pictures out row by row; titles go to the first cells."""
    import matplotlib.pyplot as plt

    rows = math.ceil(len(pictures) / columns)
    aspect = max(p.shape[0] / p.shape[1] for p in pictures)
    titled = math.ceil(len(titles) / columns)
    side = min(_PANEL, 3 * _PANEL / columns)  # no wider than three: a phone shows it
    with style():
        size = (side * columns, side * aspect * rows + 0.3 * titled)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for place, cell in enumerate(axes.flat):
            _panel(cell, pictures[place] if place < len(pictures) else None)
            if place < len(titles):
                cell.set_title(titles[place], fontsize=_LETTERS if columns < 4 else 9)
    return figure


def _panel(axes: Axes, picture: Pixels | None) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=picture is not None, linewidth=0.6)
    if picture is not None:
        axes.imshow(np.clip(picture, 0, 1), vmin=0, vmax=1)


def _pictures(pictures: Pictures, name: str) -> list[Pixels]:
    if isinstance(pictures, Tensor):
        shown = [_pixels(p, name) for p in (pictures if pictures.dim() == 4 else [pictures])]
    elif isinstance(pictures, Sequence) and not isinstance(pictures, str):
        shown = [p for entry in pictures for p in _pictures(entry, name)]
    else:
        raise InvalidTensorError(
            f"{name} must be a torch.Tensor or a sequence of them, got {type(pictures).__name__}."
        )
    if not shown:
        raise InvalidTensorError(f"{name} holds no picture.")
    return shown


def _pixels(picture: Tensor, name: str) -> Pixels:
    """Bring a picture to (H, W) or (H, W, 3), float64, on the CPU."""
    values = checks.finite(picture, name).cpu()
    if values.dim() == 2:
        values = values.unsqueeze(0)
    if values.dim() != 3 or values.shape[0] not in (1, 3):
        raise InvalidTensorError(
            f"{name} has shape {tuple(picture.shape)}; a picture is (H, W), (1, H, W) or (3, H, "
            "W): reshape it first, as by .reshape(1, height, width)."
        )
    pixels: Pixels = values.permute(1, 2, 0).squeeze(-1).numpy()
    return pixels


def _answers(recovered: Pictures, truths: list[Pixels]) -> list[Pixels]:
    """Recoveries as pictures; flat ones take their truths' shapes."""
    sizes = [t.size for t in truths]
    if _flat(recovered, sum(sizes), len(truths)):
        recovered = list(recovered.detach().flatten().split(sizes))  # type: ignore[union-attr]
    if isinstance(recovered, Sequence) and len(recovered) == len(truths):
        pairs = zip(recovered, truths, strict=True)
        recovered = [r.reshape(-1, *t.shape[:2]) if _flat(r, t.size, 1) else r for r, t in pairs]
    answers = _pictures(recovered, "recovered")
    if [a.shape for a in answers] != [t.shape for t in truths]:
        raise InvalidTensorError(
            f"recovered has {len(answers)} pictures {[a.shape for a in answers]}, "
            f"truth {len(truths)} of {[t.shape for t in truths]}: they must pair up."
        )
    return answers


def _flat(pictures: Pictures, size: int, rows: int) -> bool:
    if not isinstance(pictures, Tensor) or pictures.numel() != size or pictures.dim() > 2:
        return False
    return pictures.dim() < 2 or len(pictures) in (1, rows)


def _gain(differences: Sequence[Pixels], gain: Gain) -> float:
    if gain == "auto":
        typical = math.sqrt(max(float(np.square(d).mean()) for d in differences))
        # a double has no smaller normal number: 300 is as far as a gain can help
        exponent = min(300, math.floor(-math.log10(typical))) if typical else 0
        return 10.0 ** max(0, exponent)
    if isinstance(gain, str) or not (math.isfinite(gain) and gain > 0):
        raise InvalidArgumentError(f'gain is a positive number or "auto", got {gain!r}.')
    return float(gain)


def _difference_title(title: str, gain: float, differences: Sequence[Pixels]) -> str:
    if not any(d.any() for d in differences):
        return f"{title}: none"
    if gain == 1:
        return title
    exponent = math.log10(gain)
    number = f"1e{exponent:.0f}" if gain >= 1e4 and exponent.is_integer() else f"{gain:g}"
    return f"{title} × {number}"

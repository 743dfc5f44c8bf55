"""Figures in one calm style, legible on light and dark pages alike.

Figures are drawn on opaque white: their ink is dark, so on a transparent ground it would vanish
on a dark page, and greys that are data must not change with the page behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from . import checks
from .errors import InvalidArgumentError, InvalidTensorError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

_INK, _FRAME, _PANEL = "#23292e", "#c9ced2", 2.1
_MARKERS = "osD^vP"
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (8, 3)))


@contextmanager
def style() -> Iterator[None]:
    """Draw in the course's style inside this context; settings are put back afterwards.

    Yields
    ------
    None
        Nothing: ``with style(): plt.plot(…)``.
    """
    import matplotlib.pyplot as plt

    settings: Any = _settings()  # matplotlib's stubs name each key, in some versions
    with plt.rc_context(settings):
        yield


def compare(
    truth: Tensor | Sequence[Tensor],
    recovered: Tensor | Sequence[Tensor],
    titles: Sequence[str] = ("truth", "recovered", "difference"),
    gain: Gain = "auto",
) -> Figure:
    """Show pictures beside their recoveries and the difference, one row each.

    In the third column mid-grey is zero, brighter is too bright, darker is too dark.

    Parameters
    ----------
    truth : Tensor, (N, C, H, W), (C, H, W) or (H, W), or a sequence of such
        In [0, 1], one or three channels.
    recovered : Tensor or sequence
        As ``truth``; a flat recovery, or one in a list, takes its truth's shape. Clipped to
        [0, 1] to be shown.
    titles : sequence of str
        Of the three columns.
    gain : float or "auto"
        Factor by which differences are multiplied, printed in the third title. ``"auto"``: the
        power of ten that brings their root mean square, in the worst row, between 0.1 and 1.

    Returns
    -------
    matplotlib.figure.Figure
        Registered with pyplot, so that ``plt.show()`` shows it.

    Raises
    ------
    InvalidTensorError
        If the pictures do not pair up, are not pictures, or hold NaN or infinite entries.
    InvalidArgumentError
        If there are not three titles or the gain is not positive.
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
    pictures: Tensor | Sequence[Tensor],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Show pictures in a grid.

    Parameters
    ----------
    pictures : Tensor, (N, C, H, W), (C, H, W) or (H, W), or a sequence of such
        In [0, 1], one or three channels; sizes may differ in a sequence.
    titles : sequence of str, optional
        One for each picture.
    columns : int, optional
        At most this many in a row; ``None``: up to six.

    Returns
    -------
    matplotlib.figure.Figure
        Registered with pyplot, so that ``plt.show()`` shows it.

    Raises
    ------
    InvalidTensorError
        If something is not a picture or holds NaN or infinite entries.
    InvalidArgumentError
        If there are not as many titles as pictures, or ``columns`` is not positive.
    """
    shown = _pictures(pictures, "pictures")
    if titles is not None and len(titles) != len(shown):
        raise InvalidArgumentError(f"{len(shown)} pictures need as many titles, got {len(titles)}.")
    if columns is not None and columns < 1:
        raise InvalidArgumentError(f"columns must be one or more, got {columns}.")
    return _grid(shown, list(titles or []), min(columns or 6, len(shown)))


def curves(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    log: Literal["", "x", "y", "xy"] = "",
    title: str | None = None,
) -> Figure:
    """Draw labelled curves over one axis, told apart by colour, dash and marker.

    Parameters
    ----------
    x : sequence of float
        Places, shared by all curves.
    ys : mapping of str to sequence of float
        Curves by their labels; NaN leaves a gap.
    xlabel, ylabel : str
        Of the axes, with units.
    log : {"", "x", "y", "xy"}
        Which axes are logarithmic.
    title : str, optional
        Above the axes.

    Returns
    -------
    matplotlib.figure.Figure
        Registered with pyplot, so that ``plt.show()`` shows it.

    Raises
    ------
    InvalidTensorError
        If a curve has not as many points as ``x``.
    """
    import matplotlib.pyplot as plt

    with style():
        figure, axes = plt.subplots(figsize=(6.2, 3.3), layout="constrained")
        for place, (label, y) in enumerate(ys.items()):
            if len(y) != len(x):
                raise InvalidTensorError(f"{label!r} has {len(y)} points, x has {len(x)}.")
            axes.plot(x, y, label=label, **_pen(place))
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
        "font.size": 9.5,
        "text.color": _INK,
        "axes.titlesize": 9.5,
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


def _pen(place: int) -> dict[str, Any]:
    kind = place % len(COLOURS)
    return {"color": COLOURS[kind], "marker": _MARKERS[kind], "linestyle": _LINES[kind]}


def _grid(pictures: Sequence[Pixels], titles: Sequence[str], columns: int) -> Figure:
    """Lay pictures out row by row; titles go to the first cells."""
    import matplotlib.pyplot as plt

    rows = math.ceil(len(pictures) / columns)
    aspect = max(p.shape[0] / p.shape[1] for p in pictures)
    titled = math.ceil(len(titles) / columns)
    with style():
        size = (_PANEL * columns, _PANEL * aspect * rows + 0.3 * titled)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for place, cell in enumerate(axes.flat):
            _panel(cell, pictures[place] if place < len(pictures) else None)
            if place < len(titles):
                cell.set_title(titles[place])
    return figure


def _panel(axes: Axes, picture: Pixels | None) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=picture is not None, linewidth=0.6)
    if picture is not None:
        axes.imshow(np.clip(picture, 0, 1), vmin=0, vmax=1)


def _pictures(pictures: Tensor | Sequence[Tensor], name: str) -> list[Pixels]:
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


def _answers(recovered: Tensor | Sequence[Tensor], truths: list[Pixels]) -> list[Pixels]:
    answers = _reshaped(recovered, truths) or _pictures(recovered, "recovered")
    if [a.shape for a in answers] != [t.shape for t in truths]:
        raise InvalidTensorError(
            f"recovered has {len(answers)} pictures {[a.shape for a in answers]}, "
            f"truth {len(truths)} of {[t.shape for t in truths]}: they must pair up."
        )
    return answers


def _reshaped(recovered: Tensor | Sequence[Tensor], truths: list[Pixels]) -> list[Pixels] | None:
    """Flat recoveries in the truths' shapes; ``None`` where these are no flat ones of this size."""
    if isinstance(recovered, Tensor):
        flat = recovered.dim() < 2 or len(recovered) in (1, len(truths))
        if recovered.dim() > 2 or not flat or recovered.numel() != sum(t.size for t in truths):
            return None
        return _shared_out(recovered.detach().flatten(), truths)
    if not isinstance(recovered, Sequence) or len(recovered) != len(truths):
        return None
    found = [_reshaped(r, [t]) for r, t in zip(recovered, truths, strict=True)]
    alone = [f[0] for f in found if f is not None]
    return alone if len(alone) == len(truths) else None


def _shared_out(flat: Tensor, truths: list[Pixels]) -> list[Pixels]:
    answers, start = [], 0
    for pixels in truths:
        part = flat[start : start + pixels.size].reshape(-1, *pixels.shape[:2])
        answers.append(_pixels(part, "recovered"))
        start += pixels.size
    return answers


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

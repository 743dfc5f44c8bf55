"""Widgets that live on a page without a kernel, and compute afresh where there is one.

Each carries its own small module for the browser (``frontend/``), anywidget's way. What it shows
is part of its state, and notebooks store that; so the page of the book needs nobody to ask.
"""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import torch
import traitlets
from torch import Tensor

from ..errors import GradientInversionError, InvalidArgumentError
from . import data, metrics, models, plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FRONTEND", "Frame", "Pad", "Slider", "compared", "pad", "slider"]

FRONTEND = Path(__file__).parent / "frontend"
SIDE = 28
QUALITY = 82  # of a frame's WebP: no artefact to be seen at twice its size

SEEN = (
    (40, "which looks the same"),
    (25, "with small flaws"),
    (15, "with coarse flaws"),
    (-math.inf, "in which it is hardly to be recognised or not at all"),
)


@dataclass(frozen=True)
class Frame:
    """What a slider shows at one value: a figure, and what it tells readers who hear the page.

    ``numbers`` stand under the picture, and are a row of the table: the same names in every frame.
    """

    figure: Figure
    alt: str
    numbers: Mapping[str, str]


def compared(truth: Tensor, recovered: Tensor, what: str, **numbers: str) -> Frame:
    """Draw :func:`~gradinv_edu.kit.plotting.compare` as a slider's frame.

    ``what`` the picture shows goes into the alternative text, which says too how good the recovery
    is; ``numbers`` are more figures for the table, beside PSNR and relative error.
    """
    answer = recovered.reshape(truth.shape).double()
    decibel = metrics.psnr(answer.clamp(0, 1), truth.double())
    error = metrics.relative_error(answer, truth.double())
    seen = next(words for floor, words in SEEN if decibel >= floor)
    alt = f"Three pictures: {what}; its recovery, {seen}; and their difference"
    figures = {"PSNR": f"{decibel:.0f} dB", "relative error": f"{error:.0e}"}
    figures |= {name.replace("_", " "): value for name, value in numbers.items()}
    return Frame(plotting.compare(truth, answer), alt, figures)


class Slider(anywidget.AnyWidget):
    """A slider, ``label``, over ``frames``, of which ``index`` is shown; made by :func:`slider`."""

    _esm = FRONTEND / "slider.js"
    _css = FRONTEND / "widgets.css"
    label = traitlets.Unicode().tag(sync=True)
    frames: Any = traitlets.List().tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)

    def __init__(self, show: Callable[[Any], dict[str, Any]], values: list[Any], **state: Any):
        super().__init__(**state)
        self._show, self._values = show, values
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        names = [frame["name"] for frame in self.frames]
        return f"a slider, {self.label}: {', '.join(names)}"

    def compute(self, value: float) -> None:
        """Work out the frame of another value, put it in its place among the others, show it."""
        if value not in self._values:
            frames = {**dict(zip(self._values, self.frames, strict=True)), value: self._show(value)}
            self._values = sorted(frames)
            self.frames = [frames[one] for one in self._values]
        self.index = self._values.index(value)

    @property
    def _numeric(self) -> bool:
        plain = all(type(value) in (int, float) for value in self._values)
        return plain and self._values == sorted(self._values)

    def _answer(self, _: object, content: dict[str, Any], __: object) -> None:
        try:
            if "compute" in content:
                self.compute(content["compute"])
            self.send({"live": self._numeric})
        except (GradientInversionError, ValueError, TypeError, RuntimeError) as error:
            self.send({"error": str(error)})


def slider(
    frame: Callable[[Any], Frame],
    values: Sequence[Any],
    label: str,
    *,
    start: int = 0,
    name: Callable[[Any], str] = str,
) -> Slider:
    """Draw a frame for each value, and put them behind a slider.

    Moves by mouse, touch and arrow keys; the numbers of all frames are in a table, folded away.
    In a live notebook, if the values are numbers in rising order, a field computes the frame of
    any other.

    Parameters
    ----------
    frame : callable
        From a value to its :class:`Frame`; the figure is closed once it is drawn.
    values : sequence
        Of the places of the slider, in their order.
    label : str
        What it moves.
    start : int
        The place that is shown first.
    name : callable
        From a value to how it is written.
    """
    if len(values) < 2 or not 0 <= start < len(values):
        raise InvalidArgumentError(
            f"A slider needs two values or more and a start among them, got {len(values)} values "
            f"and start={start}."
        )
    _welcome_widgets()

    def show(value: Any) -> dict[str, Any]:
        return _stored(frame(value), name(value))

    frames = [show(value) for value in values]
    if len({tuple(key for key, _ in one["numbers"]) for one in frames}) != 1:
        raise InvalidArgumentError("Every frame needs the same numbers: they are a table's rows.")
    return Slider(show, list(values), label=label, frames=frames, index=start)


class Pad(anywidget.AnyWidget):
    """A neuron to draw for, of this ``weight``; made by :func:`pad`.

    ``picture`` is what is drawn, row by row, in [0, 1], and follows the pen in a live notebook;
    ``examples`` are drawings to begin with.
    """

    _esm = FRONTEND / "pad.js"
    _css = FRONTEND / "widgets.css"
    side = traitlets.Int(SIDE).tag(sync=True)
    weight: Any = traitlets.List().tag(sync=True)
    picture: Any = traitlets.List().tag(sync=True)
    examples = traitlets.Dict().tag(sync=True)

    def __repr__(self) -> str:
        return f"a drawing pad of {self.side} by {self.side} pixels"

    @property
    def drawn(self) -> Tensor:
        """What is on the pad, ``(1, 1, side, side)``, float64."""
        return torch.tensor(self.picture, dtype=torch.float64).reshape(1, 1, self.side, self.side)


def pad() -> Pad:
    r""":math:`\hat x = \frac{k\,x + \sigma e}{k + \sigma e_b}` in the page: draw, send, recover.

    The gradient of one neuron with the logistic loss, and its bias ratio, computed by the
    browser for whatever is drawn or dropped on it, at any bias, noise and number format.
    """
    _welcome_widgets()
    neuron: Any = models.perceptron(SIDE * SIDE, dtype=torch.float64)
    drawings = {f"A {digit}": _drawing(digit) for digit in (3, 5, 8)}
    weight = [round(w, 5) for w in neuron[1].weight.flatten().tolist()]
    return Pad(weight=weight, picture=drawings["A 3"], examples=drawings)


def _drawing(index: int) -> list[float]:
    """Return a digit of 8 by 8 pixels at the pad's size."""
    small = data.digit(index, size=8)
    large = torch.nn.functional.interpolate(small, SIDE, mode="bicubic", align_corners=False)
    return [round(v, 2) for v in large.clamp(0, 1).flatten().tolist()]


def _stored(frame: Frame, name: str) -> dict[str, Any]:
    if not frame.alt.strip():
        raise InvalidArgumentError(f"The frame {name!r} has no alternative text.")
    numbers = [list(pair) for pair in frame.numbers.items()]  # notebooks sort a mapping's keys
    return {"name": name, "src": _webp(frame.figure), "alt": frame.alt, "numbers": numbers}


def _webp(figure: Figure) -> str:
    import matplotlib.pyplot as plt

    stream = io.BytesIO()
    look: Any = {"bbox_inches": "tight", "pad_inches": 0.05, "dpi": 132}
    figure.savefig(stream, format="webp", pil_kwargs={"quality": QUALITY, "method": 6}, **look)
    plt.close(figure)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _welcome_widgets() -> None:
    """Colab shows widgets of other makers only when it is asked to."""
    if "google.colab" in sys.modules:
        sys.modules["google.colab"].output.enable_custom_widget_manager()

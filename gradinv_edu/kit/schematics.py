"""Line drawings of what is told in words: SVG, in the page's own colours, by day and by night.

A :class:`Drawing` is as wide as a phone, 380 units, so that its text is never too small there.
As the last value of a cell it shows itself, in the built page and in JupyterLab alike.
"""

from __future__ import annotations

import re
from html import escape

from ..errors import UnknownNameError

__all__ = ["Drawing", "ladder", "two_layers_as_one"]

WIDTH = 380
# the book's own colours where there is a page of it, else those by day
COLOURS = {
    "plain": "var(--pst-color-text-base, currentColor)",
    "quiet": "var(--pst-color-text-muted, #59636a)",
    "known": "var(--pst-color-primary, #17687a)",
    "found": "var(--pst-color-secondary, #a94c17)",
}
MARKS = re.compile(r"([_^])\{([^}]*)\}")


class Drawing:
    """Boxes, arrows and words, from the top down.

    Parameters
    ----------
    height : int
        In units; the width is 380.
    alt : str
        What the drawing shows, for who does not see it.
    """

    def __init__(self, height: int, alt: str) -> None:
        self.height, self.alt = height, alt
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, text: str, kind: str = "plain") -> Drawing:
        """Draw a box of 34 units' height with its text; ``x`` and ``y`` are its upper left."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="34" rx="5" fill="none" '
            f'stroke="{_colour(kind)}" stroke-width="1.6"/>'
        )
        return self.text(x + width / 2, y + 22, text, kind, "middle")

    def text(
        self, x: float, y: float, text: str, kind: str = "plain", anchor: str = "start"
    ) -> Drawing:
        """Write a line; ``_{…}`` and ``^{…}`` set small what is in them, below and above."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{_colour(kind)}" text-anchor="{anchor}">'
            f"{_marked(text)}</text>"
        )
        return self

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, kind: str = "plain", dashed: bool = False
    ) -> Drawing:
        """Draw an arrow from the first point to the second."""
        length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1e-9)
        u, v = 7 * (x2 - x1) / length, 7 * (y2 - y1) / length
        tip = f"M{x2:g} {y2:g}l{-u - v / 2:.1f} {-v + u / 2:.1f}l{v:.1f} {-u:.1f}z"
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        colour = _colour(kind)
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2 - u:.1f} {y2 - v:.1f}" fill="none" stroke="{colour}" '
            f'stroke-width="1.6"{dash}/><path d="{tip}" fill="{colour}"/>'
        )
        return self

    def __repr__(self) -> str:
        """Say what is drawn."""
        return f"a drawing: {self.alt}"

    def _repr_html_(self) -> str:
        """SVG that needs nothing else."""
        return (
            f'<svg class="gi-drawing" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(self.alt)}" font-size="14" '
            'style="width: 100%; max-width: 34rem; height: auto; '
            'font-family: var(--pst-font-family-heading, sans-serif)">'
            + "".join(self.parts)
            + "</svg>"
        )


def _colour(kind: str) -> str:
    if kind not in COLOURS:
        raise UnknownNameError(
            f"There is no kind {kind!r} of line; there are {', '.join(COLOURS)}."
        )
    return COLOURS[kind]


def _marked(text: str) -> str:
    """Small letters, below the line or above it."""

    def small(found: re.Match[str]) -> str:
        shift = 4 if found[1] == "_" else -5
        back = f'<tspan dy="{-shift}">\u200b</tspan>'  # an empty letter, back on the line
        return f'<tspan font-size="11" dy="{shift}">{found[2]}</tspan>{back}'

    return MARKS.sub(small, escape(text, quote=False))


def ladder() -> Drawing:
    """Draw what the recursion carries: x, z and k, from the last layer down to the picture."""
    drawing = Drawing(
        396,
        "A ladder of three layers. From the top, the dense layer gives its input x3 and its output "
        "gradient k3. An arrow down undoes the activation and gives z2; beside it another carries "
        "k3 down and gives k2. Layer 2 is solved for x2 from z2 and k2. The same step gives z1 and "
        "k1, and layer 1 is solved for x1, the picture.",
    )
    drawing.text(10, 20, "the client's loss L", "quiet")
    for rung, y in ((3, 34), (2, 164), (1, 294)):
        name = "dense layer" if rung == 3 else "convolution"
        drawing.box(10, y, 156, f"W_{{{rung}}}: {name}", "known")
        drawing.box(196, y, 70, f"x_{{{rung}}}", "found").arrow(166, y + 17, 194, y + 17)
        drawing.text(280, y + 22, f"k_{{{rung}}} known", "found")
        if rung > 1:
            below = rung - 1
            drawing.arrow(231, y + 36, 231, y + 72, "plain")
            drawing.text(238, y + 60, "σ^{−1}").box(196, y + 74, 70, f"z_{{{below}}}", "found")
            drawing.arrow(316, y + 36, 316, y + 72, "plain")
            drawing.text(323, y + 60, f"W_{{{rung}}}^{{⊤}}, σ′")
            drawing.box(281, y + 74, 70, f"k_{{{below}}}", "found")
            drawing.arrow(194, y + 91, 100, y + 128, "plain", dashed=True)
    drawing.text(10, 62 + 66, "solve W x = z,", "quiet").text(10, 62 + 84, "K x = ∂L/∂W", "quiet")
    drawing.text(10, 192 + 66, "solve W x = z,", "quiet").text(10, 192 + 84, "K x = ∂L/∂W", "quiet")
    drawing.arrow(231, 330, 231, 356, "found")
    return drawing.text(231, 376, "the picture", "found", "middle")


def two_layers_as_one() -> Drawing:
    """Draw a layer that lacks equations, and the one below that has some to spare."""
    drawing = Drawing(
        250,
        "Two layers. The upper one has too few equations: its input is a least-norm answer and an "
        "unknown part N c. The lower one has more outputs than the picture has pixels. Both are "
        "joined by a bracket to one system for the picture x and the coefficients c.",
    )
    drawing.box(10, 14, 150, "layer 2: W_{2}, k_{2}", "known")
    drawing.text(176, 28, "too few equations:", "quiet").text(
        176, 46, "x_{2} = x_{min} + N c", "found"
    )
    drawing.arrow(85, 50, 85, 82).text(94, 71, "σ^{−1}")
    drawing.box(10, 84, 150, "z_{1} = W_{1} x + b_{1}", "plain")
    drawing.text(176, 98, "more outputs than pixels:", "quiet")
    drawing.text(176, 116, "z_{1} is not free", "plain")
    drawing.arrow(85, 120, 85, 152).box(10, 154, 150, "picture x", "found")
    drawing.text(10, 214, "one system for x and c:", "quiet")
    return drawing.text(10, 236, "σ(W_{1} x + b_{1}) = x_{min} + N c", "found")

"""Line drawings of what is told in words: SVG, in the page's own colours, by day and by night.

A :class:`Drawing` is as wide as a phone, 380 units, so that its text is never too small there.
As the last value of a cell it shows itself, in the built page and in JupyterLab alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from ..errors import UnknownNameError

__all__ = [
    "Drawing",
    "ladder",
    "noise_floor",
    "rows_as_points",
    "shared_equations",
    "trust_models",
    "two_layers_as_one",
    "who_cheats",
]

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

    def circle(self, x: float, y: float, radius: float, text: str, kind: str = "plain") -> Drawing:
        """Draw a circle around its middle, with its text."""
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="none" '
            f'stroke="{_colour(kind)}" stroke-width="1.6"/>'
        )
        return self.text(x, y + 5, text, kind, "middle")

    def frame(
        self, x: float, y: float, width: float, height: float, kind: str = "quiet"
    ) -> Drawing:
        """Draw a dashed line around what belongs together."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="none" '
            f'stroke="{_colour(kind)}" stroke-width="1.4" stroke-dasharray="6 4"/>'
        )
        return self

    def cells(
        self,
        x: float,
        y: float,
        rows: Sequence[Sequence[str | float]],
        kind: str = "known",
        side: float = 26,
    ) -> Drawing:
        """Draw squares in rows, the first with its upper left at ``x`` and ``y``.

        A square with a text is shaded and holds it; with ``""`` it is empty. A number shades it by
        its size, at most one: positive in the colour of ``known``, negative in that of ``found``.
        """
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                a, b = x + j * side, y + i * side
                number = isinstance(value, int | float)
                strength = 0.85 * min(abs(float(value)), 1) if number else 0.2 * (value != "")
                tone = ("known" if float(value) >= 0 else "found") if number else kind
                self.parts.append(
                    f'<rect x="{a:g}" y="{b:g}" width="{side:g}" height="{side:g}" '
                    f'fill="{_colour(tone)}" fill-opacity="{strength:.2f}" '
                    f'stroke="{COLOURS["quiet"]}" stroke-width="0.8"/>'
                )
                if not number and value:
                    self.text(a + side / 2, b + side / 2 + 5, str(value), "plain", "middle")
        return self

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

    def line(
        self, x1: float, y1: float, x2: float, y2: float, kind: str = "plain", dashed: bool = False
    ) -> Drawing:
        """Draw a thin line between two points."""
        dash = ' stroke-dasharray="2 4"' if dashed else ""
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{_colour(kind)}" '
            f'stroke-width="1.4" fill="none"{dash}/>'
        )
        return self

    def dot(self, x: float, y: float, kind: str = "plain", radius: float = 5) -> Drawing:
        """Draw a filled point."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{_colour(kind)}"/>')
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
            drawing.text(238, y + 60, "φ^{−1}").box(196, y + 74, 70, f"z_{{{below}}}", "found")
            drawing.arrow(316, y + 36, 316, y + 72, "plain")
            drawing.text(323, y + 60, f"W_{{{rung}}}^{{⊤}}, φ′")
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
        "unknown part B c. The lower one has more outputs than the picture has pixels. Both are "
        "joined by a bracket to one system for the picture x and the coefficients c.",
    )
    drawing.box(10, 14, 150, "layer 2: W_{2}, k_{2}", "known")
    drawing.text(176, 28, "too few equations:", "quiet").text(
        176, 46, "x_{2} = x_{min} + B c", "found"
    )
    drawing.arrow(85, 50, 85, 82).text(94, 71, "φ^{−1}")
    drawing.box(10, 84, 150, "z_{1} = W_{1} x + b_{1}", "plain")
    drawing.text(176, 98, "more outputs than pixels:", "quiet")
    drawing.text(176, 116, "z_{1} is not free", "plain")
    drawing.arrow(85, 120, 85, 152).box(10, 154, 150, "picture x", "found")
    drawing.text(10, 214, "one system for x and c:", "quiet")
    return drawing.text(10, 236, "φ(W_{1} x + b_{1}) = x_{min} + B c", "found")


def rows_as_points() -> Drawing:
    """Draw a batch of two: rows of U as points, and a line that many of them lie on."""
    drawing = Drawing(
        330,
        "Rows of U as points in a plane. Four points lie on a line through the origin: these rows "
        "are zero for sample 1, and the arrow q stands at a right angle to the line. Three others "
        "lie on a second line: these rows are zero for sample 2. The remaining five points, rows "
        "that both samples excite, lie on no common line. A dotted line through one of them alone "
        "carries a single point.",
    )
    x, y = 190, 165
    drawing.line(x - 150, y + 75, x + 150, y - 75, "known")
    drawing.line(x - 50, y + 125, x + 50, y - 125, "found")
    drawing.line(x - 150, y - 45, x + 150, y + 45, "quiet", dashed=True)
    for at in (-0.85, -0.4, 0.5, 0.95):
        drawing.dot(x + 150 * at, y - 75 * at, "known")
    for at in (-0.9, 0.55, 0.9):
        drawing.dot(x + 50 * at, y - 125 * at, "found")
    for dx, dy in ((110, 33), (-60, -70), (-100, 10), (20, 95), (130, -18)):
        drawing.dot(x + dx, y + dy, "plain")
    drawing.arrow(x, y, x - 31, y - 62, "known").text(x - 52, y - 70, "q", "known")
    drawing.text(258, 78, "zero for sample 1", "known")
    drawing.text(196, 22, "zero for sample 2", "found")
    drawing.text(372, 222, "one row alone: chance", "quiet", "end")
    drawing.text(10, 300, "A point is a row u_{j} of U.", "quiet")
    return drawing.text(10, 320, "It lies on the line where u_{j} · q = 0.", "quiet")


def shared_equations() -> Drawing:
    """Draw the weight and the gradient equations of a layer, and those that are in both."""
    drawing = Drawing(
        224,
        "Two overlapping boxes. The left one holds the weight equations W x = z, 1620 of them; the "
        "right one the gradient equations K x = G, 2160 of them, of rank 1968. The overlap holds "
        "the 400 equations that both sets contain, one for each pair of filters. Together they are "
        "worth 3188, fewer than the 3468 unknowns.",
    )
    for left, kind in ((10, "known"), (140, "found")):
        drawing.parts.append(
            f'<rect x="{left}" y="30" width="230" height="110" rx="8" fill="none" '
            f'stroke="{_colour(kind)}" stroke-width="1.8"/>'
        )
    drawing.text(20, 20, "weights: W x = z", "known")
    drawing.text(370, 20, "gradients: K x = G", "found", "end")
    drawing.text(75, 82, "1620", "known", "middle").text(305, 82, "2160", "found", "middle")
    drawing.text(305, 102, "rank 1968", "found", "middle")
    drawing.text(190, 74, "20 × 20 pairs", "plain", "middle")
    drawing.text(190, 94, "of filters:", "plain", "middle")
    drawing.text(190, 114, "in both sets", "plain", "middle")
    drawing.text(190, 172, "1620 + 1968 − 400 = 3188", "plain", "middle")
    return drawing.text(190, 198, "for 3468 unknowns", "quiet", "middle")


def noise_floor() -> Drawing:
    """Draw what noise on the gradient leaves uncertain: an ellipse around the picture."""
    drawing = Drawing(
        270,
        "An ellipse around the true picture x. Its short axis has length sigma over d1, along the "
        "direction that the gradient tells best; its long axis sigma over dn, along the direction "
        "that it tells worst. An unbiased attacker's answers scatter at least as widely as "
        "the ellipse. A grey band across its middle is what prior knowledge adds. It cuts ends.",
    )
    drawing.parts.append(
        f'<rect x="105" y="20" width="170" height="190" rx="4" fill="{_colour("quiet")}" '
        'fill-opacity="0.14"/>'
        f'<ellipse cx="190" cy="115" rx="160" ry="46" fill="none" stroke="{_colour("known")}" '
        'stroke-width="1.8"/>'
    )
    drawing.arrow(190, 115, 190, 71, "known").text(197, 96, "σ / d_{1}", "known")
    drawing.arrow(190, 115, 348, 115, "known").text(286, 108, "σ / d_{n}", "known")
    drawing.dot(190, 115, "found")
    drawing.text(182, 134, "x", "found", "end")
    for dx, dy in ((-140, -8), (-95, 30), (-52, -39), (66, 36), (118, -25), (-20, 22), (40, -12)):
        drawing.dot(190 + dx, 115 + dy, "quiet", 3)
    drawing.text(190, 40, "with a prior", "quiet", "middle")
    drawing.text(10, 236, "grey dots: answers of unbiased attackers", "quiet")
    return drawing.text(10, 258, "d: singular values of J = ∂g/∂x", "quiet")


def trust_models() -> Drawing:
    """Draw where noise is added under local and central privacy and secure aggregation."""
    drawing = Drawing(
        452,
        "Three trust models. Local privacy: each client adds noise, and the server sees noisy "
        "updates. Central privacy: the clients send their updates as they are, the server sees "
        "them, adds them up, and adds noise to the sum that it publishes. Secure aggregation: the "
        "clients send masked updates, the server sees the sum alone, with the noise that the "
        "clients added together.",
    )
    rows = (
        ("local", "update + noise", "each noisy update", "nobody", "found"),
        ("central", "update, as it is", "every update", "the server", "known"),
        ("secure aggregation", "update + a little noise + mask", "the sum alone", "no single one",
         "plain"),
    )  # fmt: skip
    for place, (name, sent, seen, trusted, kind) in enumerate(rows):
        y = 22 + 150 * place
        drawing.text(10, y, name, kind).box(10, y + 14, 82, "client", "plain")
        drawing.arrow(94, y + 31, 196, y + 31, kind, dashed=place == 2)
        drawing.text(10, y + 70, f"sent: {sent}", "quiet")
        drawing.box(198, y + 14, 82, "server", "known")
        drawing.arrow(282, y + 31, 318, y + 31, "plain").text(322, y + 36, "model")
        drawing.text(10, y + 90, f"the server sees: {seen}", kind)
        drawing.text(10, y + 110, f"who must be trusted: {trusted}", "quiet")
    return drawing


def who_cheats() -> Drawing:
    """Draw the three kinds of server in a federation, and what a client can see of each."""
    drawing = Drawing(
        330,
        "Three servers. An honest server follows the protocol and forgets. A curious server "
        "follows the protocol and keeps what it gets; no client can see that. A server that "
        "cheats sends weights that it made up; a client can look at the weights before it trains.",
    )
    rows = (
        ("honest", "trained weights", "forgets the updates", "nothing", "plain"),
        ("curious", "trained weights", "reads the updates", "nothing", "known"),
        ("cheating", "crafted weights", "reads more than it should", "the weights", "found"),
    )
    for place, (name, sends, does, visible, kind) in enumerate(rows):
        y = 10 + 108 * place
        drawing.box(10, y, 96, name, kind).box(294, y, 76, "client", "plain")
        drawing.arrow(108, y + 12, 292, y + 12, kind).text(200, y + 6, sends, kind, "middle")
        drawing.arrow(292, y + 24, 108, y + 24, "plain").text(
            200, y + 41, "update", "plain", "middle"
        )
        drawing.text(10, y + 60, does, "quiet")
        drawing.text(10, y + 80, f"a client can see: {visible}", kind)
    return drawing

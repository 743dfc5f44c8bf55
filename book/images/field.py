"""The drawing of the page "The field": families of attacks and defenses, and when each came.

``python book/images/field.py`` writes ``field.html`` beside it, in the page's own colours.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).with_suffix(".html")
# family, what its server must know or its client must do, and (year, name, chapter)
ATTACKS = (
    (
        "Closed form, one layer",
        "needs: the layer's weight and bias gradients",
        (
            (2018, "Phong: one neuron", 1),
            (2020, "Geiping: dense nets", 2),
            (2020, "Fan: filters", 3),
        ),
    ),
    (
        "Layer by layer",
        "needs: model, loss, one sample's gradient",
        ((2021, "R-GAP", 5), (2022, "Chen, Campbell", 10), (2024, "R-CONV", 8)),
    ),
    (
        "Batches by algebra",
        "needs: a dense layer's gradient, batch size",
        ((2020, "Qian, Hansen", 7), (2023, "Cocktail Party", 7), (2024, "SPEAR", 7)),
    ),
    (
        "Transformers",
        "needs: model, gradients of its first layers",
        ((2022, "APRIL: patches", 9), (2024, "DAGER: words", 9)),
    ),
    (
        "Optimisation",
        "needs: model, loss, many steps, often a prior",
        (
            (2019, "DLG", 11),
            (2020, "iDLG", 11),
            (2020, "CPL", 13),
            (2020, "Inverting Gradients", 11),
            (2022, "Bayesian framework", 16),
            (2022, "Local steps", 13),
            (2023, "Dropout inversion", 14),
        ),
    ),
    (
        "Labels",
        "needs: the last layer's gradient",
        ((2020, "iDLG", 2), (2021, "RLG", 7), (2022, "LLG", 11)),
    ),
    (
        "A server that cheats",
        "needs: to choose weights or architecture",
        ((2022, "Robbing the Fed", 7), (2023, "Trap weights", 7)),
    ),
)
DEFENSES = (
    (
        "Noise that is counted",
        "costs: accuracy; comes with a promise",
        ((2016, "DP-SGD", 15),),
    ),
    (
        "Sums instead of updates",
        "costs: a protocol; hides one client in many",
        ((2017, "Secure aggregation", 18),),
    ),
    (
        "Less is sent",
        "made to save traffic; coarse, not secret",
        ((2017, "QSGD", 16), (2018, "signSGD", 16)),
    ),
    (
        "The model is changed",
        "made against optimisation attacks",
        (
            (2020, "Secret branch", 3),
            (2021, "Dropout", 14),
            (2021, "Soteria", 16),
            (2022, "PRECODE", 16),
        ),
    ),
)
STEMS = {
    1: "01_perceptron", 2: "02_fully_connected", 3: "03_convolution", 5: "05_recursion",
    7: "07_batches", 8: "08_networks", 9: "09_tokens", 10: "10_rank", 11: "11_optimization",
    13: "13_schedule", 14: "14_dropout", 15: "15_noise", 16: "16_compression",
    18: "18_federation",
}  # fmt: skip
WIDTH, ROW, LEFT, RIGHT, FIRST, LAST = 380, 21, 250, 370, 2016, 2025


def place(year: int) -> float:
    """Where a year lies on the axis."""
    return LEFT + (RIGHT - LEFT) * (year - FIRST) / (LAST - FIRST)


def drawing() -> str:
    """Give the whole drawing."""
    parts, y = [], 22
    for title, families, colour in (
        ("Attacks", ATTACKS, "secondary"),
        ("Defenses", DEFENSES, "primary"),
    ):
        parts.append(
            f'<text x="6" y="{y}" font-size="17" font-weight="650">{title}</text>'
        )
        years = [(2016, "start"), (2020, "middle"), (2024, "middle")]
        for year, anchor in years:
            parts.append(
                f'<text class="quiet" x="{place(year):.0f}" y="{y}" text-anchor="{anchor}">{year}</text>'
            )
        top, below = y + 8, len(parts)
        for name, needs, works in families:
            y += 30
            parts.append(f'<text x="6" y="{y}" font-weight="650">{escape(name)}</text>')
            y += 17
            parts.append(f'<text class="quiet" x="6" y="{y}">{escape(needs)}</text>')
            for year, work, chapter in works:
                y += ROW
                x = place(year)
                href = f"{STEMS[chapter]}.html"
                parts.append(
                    f'<text x="16" y="{y}">{escape(work)}</text>'
                    f'<a href="{href}"><text x="162" y="{y}">chapter {chapter}</text></a>'
                    f'<path d="M{LEFT} {y - 4}H{x:.0f}"/>'
                    f'<circle cx="{x:.0f}" cy="{y - 4}" r="4.5" '
                    f'fill="var(--pst-color-{colour})"><title>{year}</title></circle>'
                )
        lines = "".join(
            f'<path class="year" d="M{place(year):.0f} {top}V{y + 6}"/>'
            for year, _ in years
        )
        parts.insert(below, lines)  # under the dots
        y += 44
    label = (
        "Families of attacks and of defenses, one below the other. Each work is a dot at its year, "
        "from 2016 to 2024, with the chapter of this course that treats it. The table below the "
        "drawing says the same in words."
    )
    return (
        f'<div class="field"><svg viewBox="0 0 {WIDTH} {y - 30}" role="group" '
        f'aria-label="{label}" font-size="13">' + "".join(parts) + "</svg></div>\n"
    )


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")

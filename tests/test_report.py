"""Figures with their bounds, and line drawings: what chapters print and show."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gradinv_edu.errors import UnknownNameError
from gradinv_edu.kit import layer_drawings, schematics
from gradinv_edu.kit.report import show
from gradinv_edu.kit.schematics import Drawing


@pytest.mark.parametrize(
    ("value", "bounds", "printed"),
    [
        (3.4e-16, {"below": 1e-12}, "error ≈ 3e-16 (below 1e-12)"),
        (0.0, {"below": 1e-12}, "error ≈ 0 (below 1e-12)"),
        (132.4, {"above": 110, "unit": "dB"}, "error ≈ 132 dB (above 110 dB)"),
        (41.0, {"above": 20, "below": 60}, "error ≈ 41 (below 60, above 20)"),
        (0.163, {}, "error ≈ 0.16"),
    ],
)
def test_a_figure_is_printed_with_its_bounds(
    value: float, bounds: dict, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show("error", value, **bounds)
    told = capsys.readouterr().out
    assert told == printed + "\n"
    sanitizer = ConfigParser()
    sanitizer.read(Path(__file__).parent / "nbval.cfg")
    left = re.sub(sanitizer["figures"]["regex"], sanitizer["figures"]["replace"], told)
    digits = printed.split("≈ ")[1].split()[0]
    assert left == told.replace(f"≈ {digits}", "≈ FIGURE")  # the digits, and nothing else


@pytest.mark.parametrize("bounds", [{"below": 1e-12}, {"above": 2.0}])
def test_a_bound_that_does_not_hold_is_an_error(bounds: dict) -> None:
    with pytest.raises(AssertionError, match="error is 1"):
        show("error", 1.0, **bounds)
    with pytest.raises(AssertionError):
        show("error", float("nan"), **bounds)


DRAWINGS = {
    name: getattr(module, name)
    for module in (schematics, layer_drawings)
    for name in module.__all__
    if name[0].islower()
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_stands_for_itself_and_says_what_it_shows(name: str) -> None:
    drawing = DRAWINGS[name]()
    svg = ElementTree.fromstring(drawing._repr_html_())
    assert len(svg.attrib["aria-label"].split()) > 10
    assert repr(drawing) == f"a drawing: {svg.attrib['aria-label']}"
    for part in svg:  # in the page's colours, with others where there is no page, and inside
        colours = [part.attrib.get(kind, "none") for kind in ("fill", "stroke")]
        assert all(c == "none" or c.startswith("var(--pst-color-") for c in colours)
        for x, length in (("x", 380), ("y", drawing.height)):
            assert 0 <= float(part.attrib.get(x, 0)) <= length


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_keeps_inside_a_phone(name: str) -> None:
    """By the middle width of a letter: nothing is cut off at its sides."""
    svg = ElementTree.fromstring(DRAWINGS[name]()._repr_html_())
    for line in svg.iter("text"):
        x, told = float(line.attrib["x"]), "".join(line.itertext()).replace("\u200b", "")
        length = 6.6 * len(told)
        left = x - {"start": 0, "middle": length / 2, "end": length}[line.attrib["text-anchor"]]
        assert left >= -4 and left + length <= 388, told


def test_squares_are_shaded_by_what_they_hold() -> None:
    svg = Drawing(50, "a").cells(0, 0, [["", "3", 1.0, -0.5]])._repr_html_()
    squares = list(ElementTree.fromstring(svg).iter("rect"))
    shades = [float(square.attrib["fill-opacity"]) for square in squares]
    assert shades == pytest.approx([0, 0.2, 0.85, 0.42], abs=0.01)
    known, found = squares[2].attrib["fill"], squares[3].attrib["fill"]
    assert "primary" in known and "secondary" in found and ">3</text>" in svg


def test_letters_are_set_small_and_text_is_text() -> None:
    svg = Drawing(50, "a").text(0, 10, "x_{2} < W^{⊤}")._repr_html_()
    assert ">2</tspan>" in svg and ">⊤</tspan>" in svg and "&lt;" in svg
    with pytest.raises(UnknownNameError, match="no kind 'red'"):
        Drawing(50, "a").box(0, 0, 9, "x", "red")

"""Extensions of the book: figures without their paper, the bibliography oldest first, the field."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pybtex.database import parse_file
from scripts import load

BOOK = Path(__file__).parents[1] / "book"


figures, oldest_first, field = load("figures"), load("oldest_first"), load("images/field")


def _paper() -> np.ndarray:
    return np.full((200, 300, 3), 255, dtype=np.uint8)


def _on(ground: int, cleared: np.ndarray) -> np.ndarray:
    part = cleared[..., 3:] / 255
    return cleared[..., :3] * part + ground * (1 - part)


def test_a_chart_is_the_same_on_white_and_has_no_paper() -> None:
    chart = _paper()
    chart[100, 20:280] = (23, 104, 122)
    chart[20:180, 40] = (120, 120, 120)
    assert figures.pictures(chart) == []
    cleared = figures.clear(chart)
    assert np.abs(_on(255, cleared) - chart).max() <= 2
    assert not cleared[0, :, 3].any()


def test_pictures_are_kept_and_their_titles_can_be_read_in_both_modes() -> None:
    drawn = _paper()
    drawn[60:180, 100:220] = np.random.default_rng(0).integers(0, 240, (120, 120, 3))
    drawn[20:30, 120:126] = 35  # a letter of the title
    assert figures.pictures(drawn) == [(slice(60, 180), slice(100, 220))]
    cleared = figures.clear(drawn)
    assert (cleared[60:180, 100:220, :3] == drawn[60:180, 100:220]).all()
    assert (cleared[60:180, 100:220, 3] == 255).all() and not cleared[0, :, 3].any()
    for ground in (253, 21):
        assert np.abs(_on(ground, cleared)[25, 122] - ground).min() > 60
    drawn[60:180, 225] = drawn[60:180, 295] = drawn[60, 225:296] = drawn[179, 225:296] = 200
    assert (figures.clear(drawn)[60:180, 225:296, 3] == 255).all()  # a white picture, framed


def test_a_white_picture_in_its_frame_is_one_and_bars_or_a_grid_are_none() -> None:
    white, bars, grid = _paper(), _paper(), _paper()
    white[60:180, 100:220], white[62:178, 102:218] = 90, 255
    assert figures.pictures(white) == [(slice(60, 180), slice(100, 220))]
    bars[20:180, 40] = 90
    for top in range(20, 180, 40):
        bars[top : top + 32, 40:250] = (23, 104, 122)
    grid[20:181:40, 40:251] = grid[20:181, 40:251:70] = 200
    assert figures.pictures(bars) == figures.pictures(grid) == []


@pytest.mark.parametrize("chart", [True, False])
def test_the_frame_of_a_slider_loses_its_paper_once(chart: bool) -> None:
    drawn = _paper()
    if chart:
        drawn[98:102, 20:280] = (23, 104, 122)
    else:
        drawn[60:180, 100:220] = 90
    stream = io.BytesIO()
    Image.fromarray(drawn).save(stream, "WEBP", quality=82)
    source = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    page = figures.FRAME.sub(figures.clear_frame, f'"{source}"')
    found = figures.FRAME.search(page)
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        alpha = np.asarray(image)[..., 3]
    assert not alpha[:40].any() and alpha[100, 150] > 200
    assert page.endswith('#chart"') is chart
    assert figures.FRAME.sub(figures.clear_frame, page) == page


def test_references_are_in_the_order_of_time() -> None:
    entries = list(parse_file(str(BOOK / "references.bib")).entries.values())
    years = [entry.fields["year"] for entry in oldest_first.ByYear().sort(entries)]
    assert years == sorted(years) and len(years) == len(entries)


def test_the_drawing_of_the_field_is_up_to_date_and_leads_to_chapters() -> None:
    assert field.FILE.read_text() == field.drawing(), "run python book/images/field.py"
    stems = {path.stem for path in BOOK.glob("[0-9]*.ipynb")}
    assert set(field.STEMS.values()) <= stems


@pytest.mark.parametrize("families", [field.ATTACKS, field.DEFENSES])
def test_the_table_of_the_field_has_every_drawn_work(families: tuple) -> None:
    entries = parse_file(str(BOOK / "references.bib")).entries
    cited = [key for key in entries if f"`{key}`" in (BOOK / "field.md").read_text()]
    years = {(entries[key].fields["year"]) for key in cited}
    assert {str(year) for _, _, works in families for year, _, _ in works} <= years

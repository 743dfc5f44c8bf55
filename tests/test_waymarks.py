"""The map, the sources and the glossary say what the chapters say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pybtex.database import parse_file
from scripts import load

BOOK = Path(__file__).parents[1] / "book"
CHAPTERS = sorted(BOOK.glob("[0-9]*.ipynb"))
TERM = re.compile(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`")


waymarks = load("waymarks")


def _text(chapter: Path) -> str:
    cells = json.loads(chapter.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("name", sorted(waymarks.PAGES))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (BOOK / name).read_text() == waymarks.PAGES[name](), "run python book/waymarks.py"


@pytest.mark.parametrize("chapter", waymarks.chapters(), ids=lambda chapter: chapter.stem)
def test_a_chapter_says_how_long_how_hard_and_what_it_needs(chapter: object) -> None:
    assert chapter.minutes and chapter.minutes % 5 == 0
    assert chapter.difficulty in {"easy", "moderate", "hard"}
    earlier = {c.stem for c in waymarks.chapters() if c.number < chapter.number}
    assert set(chapter.needs) <= earlier
    assert chapter.needs or chapter.number == 0


def test_the_map_names_every_chapter_and_every_need() -> None:
    course = waymarks.chapters()
    assert [c.stem for c in course] == [path.stem for path in CHAPTERS]
    drawn = waymarks.drawing(course)
    assert drawn.count("<path") == sum(map(len, waymarks.direct(course).values()))
    assert all(f'href="{chapter.stem}.html"' in drawn for chapter in course)


def test_what_is_implied_is_not_drawn() -> None:
    def chapter(stem: str, *needs: str) -> object:
        return waymarks.Chapter(stem, "", stem, 5, "easy", needs)

    course = [chapter("00_a"), chapter("01_b", "00_a"), chapter("02_c", "00_a", "01_b")]
    assert waymarks.direct(course) == {"00_a": set(), "01_b": {"00_a"}, "02_c": {"01_b"}}


def test_every_source_leads_to_a_chapter_that_cites_it() -> None:
    page = waymarks.sources_page()
    cited = {
        key for chapter in CHAPTERS for key in re.findall(r"\{cite:\w+\}`([^`]+)`", _text(chapter))
    }
    keys = {key.strip() for group in cited for key in group.split(",")}
    assert keys <= set(parse_file(str(BOOK / "references.bib")).entries)
    assert set(re.findall(r"\{cite:t\}`(\w+)`", page)) == keys


def test_a_word_of_the_glossary_is_linked_where_it_is_first_used() -> None:
    words = set(re.findall(r"^(\S.*)\n  \S", (BOOK / "glossary.md").read_text(), re.MULTILINE))
    linked = [word for chapter in CHAPTERS for word in TERM.findall(_text(chapter))]
    assert len(words) > 25
    assert words == set(linked)
    assert len(linked) == len(set(linked)), "a word is linked once, where it is first used"

"""Writes the pages that help a reader find the way: the map, the sources, the package's reference.

Everything on the first two is read from the chapters: titles, minutes, difficulty and
prerequisites from each first cell, citations from every cell, the parts from the table of contents.
The reference lists every module that there is.

    python book/waymarks.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path

import yaml
from pybtex.database import Entry, parse_file

BOOK = Path(__file__).parent
MINUTES = re.compile(r"[Aa]bout (\d+) minutes")
DIFFICULTY = re.compile(r"[Dd]ifficulty: (easy|moderate|hard)")
NEEDS = re.compile(r"^You need (.+)$", re.MULTILINE)
OPTIONAL = re.compile(r"^Optional: ", re.MULTILINE)
DOC = re.compile(r"\{doc\}`(\d\d_\w+)`")
CITED = re.compile(r"\{cite:\w+\}`([^`]+)`")
HEADING = re.compile(r"^#{2,3} (.+)$", re.MULTILINE)
ROW, LEFT, WIDTH = 34, 66, 396


@dataclass(frozen=True)
class Chapter:
    """What a chapter says about itself in its first cell, and the part that it stands in."""

    stem: str
    part: str
    title: str
    minutes: int | None
    difficulty: str
    needs: tuple[str, ...]
    optional: bool = False

    @property
    def short(self) -> str:
        """The title, up to its colon."""
        return re.split(r"[:,]", self.title)[0]

    @property
    def number(self) -> int:
        """The chapter's number, from its file's name."""
        return int(self.stem[:2])


def _markdown(stem: str) -> list[str]:
    cells = json.loads((BOOK / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def _places() -> Iterator[tuple[str, str]]:
    toc = yaml.safe_load((BOOK.parent / "_toc.yml").read_text(encoding="utf-8"))
    yield "", toc["root"]
    for part in toc["parts"]:
        for entry in part["chapters"]:
            yield part["caption"], entry["file"]


def chapters() -> list[Chapter]:
    """Read every chapter, in the order of the table of contents."""
    places = ((part, Path(file).name) for part, file in _places())
    return [_chapter(part, stem) for part, stem in places if re.match(r"\d\d_", stem)]


def _chapter(part: str, stem: str) -> Chapter:
    texts = _markdown(stem)
    opening = "\n".join(texts[:3])
    minutes, difficulty = MINUTES.search(opening), DIFFICULTY.search(opening)
    needs = NEEDS.search(opening)
    return Chapter(
        stem,
        part,
        texts[0].splitlines()[0].removeprefix("# "),
        int(minutes[1]) if minutes else None,
        difficulty[1] if difficulty else "",
        tuple(DOC.findall(needs[1])) if needs else (),
        bool(OPTIONAL.search(opening)),
    )


# --- the map ---------------------------------------------------------------------------------


def _arc(low: int, high: int) -> str:
    x = LEFT - 7
    bend = x - min(LEFT - 10, 12 + (high - low) // 4)
    return f'<path d="M{x} {low}C{bend} {low} {bend} {high} {x} {high}"/>'


def direct(course: list[Chapter]) -> dict[str, set[str]]:
    """Leave out what a chapter needs anyway, because something else that it needs does."""
    known: dict[str, set[str]] = {}
    for chapter in course:
        known[chapter.stem] = set(chapter.needs).union(
            *(known[need] for need in chapter.needs)
        )
    return {
        chapter.stem: set(chapter.needs).difference(
            *(known[need] for need in chapter.needs)
        )
        for chapter in course
    }


def _rows(course: list[Chapter]) -> dict[str, int]:
    """Where each chapter stands, from the top; a new part leaves room for its name."""
    rows, y, part = {}, 18, ""
    for chapter in course:
        y += ROW - 4 if chapter.part != part else 0
        part = chapter.part
        rows[chapter.stem] = y
        y += ROW
    return rows


def _station(chapter: Chapter, y: int) -> str:
    minutes = f"{chapter.minutes} min" if chapter.minutes else ""
    name = f"{chapter.number} · {escape(chapter.short)}"
    kind = ' class="optional"' if chapter.optional else ""
    return (
        f'<circle{kind} cx="{LEFT}" cy="{y}" r="5"/>'
        f'<a href="{chapter.stem}.html"><text x="{LEFT + 14}" y="{y + 5}">{name}</text></a>'
        f'<text class="minutes" x="{WIDTH}" y="{y + 5}" text-anchor="end">{minutes}</text>'
    )


def drawing(course: list[Chapter]) -> str:
    """Draw the course: a chapter on each line, an arc from it to each one that it needs."""
    rows = _rows(course)
    parts = {
        chapter.part: rows[chapter.stem] for chapter in reversed(course) if chapter.part
    }
    lines = [
        '<div class="course-map">',
        f'<svg viewBox="0 0 {WIDTH} {max(rows.values()) + 20}" role="group" '
        'aria-label="Map of the course; the table below says the same">',
        *(
            _arc(rows[need], rows[c])
            for c, needs in direct(course).items()
            for need in sorted(needs)
        ),
        *(_station(chapter, rows[chapter.stem]) for chapter in course),
        *(
            f'<text class="part" x="{LEFT - 6}" y="{y - 21}">{escape(name)}</text>'
            for name, y in parts.items()
        ),
        "</svg>",
        "</div>",
    ]
    return "\n".join(lines)


def _line(chapter: Chapter, numbers: dict[str, int]) -> str:
    needs = ", ".join(f"{{doc}}`{numbers[need]} <{need}>`" for need in chapter.needs)
    minutes = chapter.minutes or ""
    title = f"{{doc}}`{chapter.short} <{chapter.stem}>`{' (optional)' * chapter.optional}"
    return f"| {chapter.number} | {title} | {minutes} | {chapter.difficulty} | {needs} |"


def map_page() -> str:
    """Write the page that shows what depends on what."""
    course = chapters()
    numbers = {chapter.stem: chapter.number for chapter in course}
    hours = sum(chapter.minutes or 0 for chapter in course) / 60
    return "\n".join(
        [
            "# Map of the course",
            "",
            "Each line is a chapter; an arc leads down from a chapter to one that builds on it.",
            "What those before it need is not drawn again; the table has it.",
            "A hollow circle is an optional chapter: those after it can be read without it.",
            f"All of it takes about {hours:.0f} hours, by the minutes that the chapters give.",
            "",
            "```{raw} html",
            drawing(course),
            "```",
            "",
            "| | Chapter | Minutes | Difficulty | Needs |",
            "|---|---|---|---|---|",
            *(_line(chapter, numbers) for chapter in course),
            "",
            "Easy asks for the chain rule and vectors, moderate for rank or least squares too;",
            "hard puts several ideas of earlier chapters together.",
            "{doc}`00_sharing` names three ways through.",
            "",
        ]
    )


# --- the sources -----------------------------------------------------------------------------


def _cited(stem: str) -> Iterator[tuple[str, str]]:
    """Yield every citation of a chapter with the heading that it stands under."""
    heading = ""
    for text in _markdown(stem):
        for line in text.splitlines():
            found = HEADING.match(line)
            heading = found[1] if found else heading
            for keys in CITED.findall(line):
                yield from ((key.strip(), heading) for key in keys.split(","))


def _taught(course: list[Chapter]) -> dict[str, dict[str, list[str]]]:
    taught: dict[str, dict[str, list[str]]] = {}
    for chapter in course:
        for key, heading in _cited(chapter.stem):
            headings = taught.setdefault(key, {}).setdefault(chapter.stem, [])
            if heading and heading not in headings:
                headings.append(heading)
    return taught


def _title(entry: Entry) -> str:
    return re.sub(r"[{}]", "", entry.fields["title"]).replace(" -- ", " – ")


def _year(entry: Entry) -> int:
    return int(entry.fields.get("year", 0))


def _source(
    key: str, entry: Entry, where: dict[str, list[str]], titles: dict[str, str]
) -> str:
    lines = [f"{{cite:t}}`{key}`", f": *{_title(entry)}*", ""]
    for stem, headings in where.items():
        places = f" ({'; '.join(headings)})" if headings else ""
        lines.append(f"  - {{doc}}`{titles[stem]} <{stem}>`{places}")
    return "\n".join([*lines, ""])


def sources_page() -> str:
    """Write the page that leads from each source to where it is taught."""
    course = chapters()
    titles = {chapter.stem: f"{chapter.number} · {chapter.short}" for chapter in course}
    entries = parse_file(str(BOOK / "references.bib")).entries
    taught = _taught(course)
    order = sorted(entries, key=lambda key: (_year(entries[key]), key))
    body = [
        _source(key, entries[key], taught[key], titles) for key in order if key in taught
    ]
    return "\n".join(
        [
            "# Sources, and where they are taught",
            "",
            "Every source that a chapter cites, oldest first, with the sections that use it.",
            "{doc}`claims` says what became of what they claim.",
            "{doc}`references` gives them in full.",
            "",
            *body,
        ]
    )


# --- the reference ---------------------------------------------------------------------------

# What ipywidgets and traitlets put into a class; our own names are told by the class itself.
TRAITS = {
    "kit.widgets": {"label", "frames", "index", "side", "weight", "picture", "examples"}
}


def modules() -> dict[str, list[str]]:
    """Every module of the package, by the part of the reference that it stands in."""
    package = BOOK.parent / "gradinv_edu"

    def inside(folder: str) -> list[str]:
        files = sorted((package / folder).glob("*.py"))
        return [
            ".".join([*folder.split("/"), f.stem]).strip(".")
            for f in files
            if f.stem[0] != "_"
        ]

    stems = [chapter.stem[3:] for chapter in chapters()]
    return {
        "The chapters": stems,
        "Beside the chapters": [name for name in inside("") if name not in stems],
        "The engine": inside("engine"),
        "The engine: one rule a layer": inside("engine/layers"),
        "The engine: one class a loss": inside("engine/losses"),
        "The kit": inside("kit"),
    }


def _reference(name: str, told: dict[int, str]) -> Iterator[str]:
    """Yield the directive of a module; what an earlier one has told already is named, not told."""
    module = import_module(f"gradinv_edu.{name}")
    again, hidden = [], set(TRAITS.get(name, ()))
    for member in module.__all__:
        value = getattr(module, member)
        if not callable(value):
            continue
        if id(value) in told:
            again.append(f"{{py:obj}}`~gradinv_edu.{told[id(value)]}`")
            hidden.add(member)
        told.setdefault(id(value), f"{name}.{member}")
    yield from (
        f"### `{name}`",
        "",
        "```{eval-rst}",
        f".. automodule:: gradinv_edu.{name}",
    )
    yield "   :members:"
    yield from (f"   :exclude-members: {', '.join(sorted(hidden))}",) * bool(hidden)
    yield from ("```", "")
    yield from (f"Told above: {', '.join(again)}.", "") * bool(again)


def api_page() -> str:
    """Write the page that has every public name of every module."""
    told: dict[int, str] = {}
    lines = [
        "# The package, function by function",
        "",
        "A function that is an equation opens with it, and names the equation of the chapter that "
        "explains it.",
        "`import gradinv_edu as gi` gives all of it; submodules load when they are first used.",
        "",
    ]
    for part, names in modules().items():
        lines += [
            f"## {part}",
            "",
            *(line for name in names for line in _reference(name, told)),
        ]
    return "\n".join(lines)


PAGES = {"map.md": map_page, "sources.md": sources_page, "api.md": api_page}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (BOOK / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Make a deck of slides out of a chapter, by rule: ``make slides``.

A heading begins a slide. Equations, figures, lists, claims, what code prints, and short paragraphs
are shown; long prose goes into the speaker's notes (press S), with the code that drew a figure.
nbconvert writes the deck, reveal.js shows it; both it and MathJax come as files, no network.
"""

from __future__ import annotations

import re
import shutil
import sys
from html import escape
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbconvert.exporters import SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode

BLOCK = re.compile(
    r"(?P<fence>^(?P<mark>`{3,}|:{3,})[^\n]*\n.*?^(?P=mark)[ \t]*$)|(?P<math>^\$\$.*?\$\$)",
    re.DOTALL | re.MULTILINE,
)
DIRECTIVE = re.compile(r"^[`:]{3,}\{(\w+)\}[ \t]*(.*)\n((?::[\w-]+:.*\n)*)", re.MULTILINE)
ROLES = (
    (re.compile(r"\{(?:func|class|meth)\}`~?(?:[\w.]*\.)?(\w+)`"), r"`\1`"),
    (re.compile(r"\{eq\}`([\w-]+)`"), lambda m: f"*{m[1].replace('-', ' ')}*"),
    (re.compile(r"\{numref\}`[\w-]+`"), "the figure"),
    (re.compile(r"\{doc\}`([^`<]+?) <\w+>`"), r"\1"),
    (re.compile(r"\{doc\}`0?(\d+)_\w+`"), r"chapter \1"),
    (re.compile(r"\{doc\}`(\w+)`"), r"*\1*"),
    (re.compile(r"\{cite:p\}`([^`]+)`"), lambda m: f"({_sources(m[1])})"),
    (re.compile(r"\{cite:t\}`([^`]+)`"), lambda m: _sources(m[1])),
)
BOLD = re.compile(r"\*\*[^*]+\*\*$")  # a sentence that its chapter stresses
SHORT = 30  # words of a paragraph that is shown; a longer one is for the speaker
FULL = 105  # of a slide, in words
ALONE = 20  # a heading, perhaps with a line, waits for what it announces
MATH, PICTURE, CODE_LINE = 22, 80, 8  # what else takes room, in words
NO_TEXT = re.compile('alt="No description has been provided for this image"')
WIDGET = "application/vnd.jupyter.widget-view+json"
LONGEST_CODE = 8  # lines that are shown

TEMPLATE = """
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script>
window.MathJax = {
  tex: {inlineMath: [["$", "$"]], displayMath: [["$$", "$$"]], processEscapes: true,
        macros: {loss: "L"}},
  options: {enableMenu: false}
};
</script>
<script defer src="mathjax/tex-chtml.js"></script>
<style>
.reveal .slides { text-align: left; font-size: 28px; }
.reveal .slides h1 { font-size: 2em; text-transform: none; }
.reveal .slides h2, .reveal .slides h3 { font-size: 1.4em; text-transform: none; }
.reveal .slides p, .reveal .slides li { font-size: 28px; line-height: 1.35; }
.reveal .slides blockquote {
  width: 94%; margin: 0.5em 0; padding: 0.1em 1em; font-style: normal; box-shadow: none;
  border-left: 0.3em solid #2a76ab; background: #f3f6f8;
}
.reveal .slides blockquote p { font-style: normal; }
.reveal .slides img { width: 88%; max-height: 490px; object-fit: contain; margin: 0.3em auto; }
.reveal .slides .jp-InputPrompt, .reveal .slides .jp-OutputPrompt { display: none; }
.reveal .slides pre {
  width: 100%; margin: 0.2em 0; font-size: 21px; white-space: pre-wrap; box-shadow: none;
}
.reveal .slides table { font-size: 24px; }
.reveal .slides .gi-quiz { font-size: 22px; max-height: 560px; overflow-y: auto; }
.reveal .slides .gi-quiz p { font-size: 22px; }
</style>
{%- endblock -%}
{%- block footer_js -%}
<script src="reveal/dist/reveal.js"></script>
<script src="reveal/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({hash: true, slideNumber: "c/t", width: 1100, height: 720, center: false,
                   plugins: [RevealNotes]});
</script>
{%- endblock -%}
"""


def _sources(keys: str) -> str:
    """``phong2018,wei2020`` as ``Phong 2018; Wei 2020``."""
    named = [
        re.sub(r"^([a-z]+)(\d{4}).*", r"\1 \2", key.strip()) for key in keys.split(",")
    ]
    return "; ".join(name[:1].upper() + name[1:] for name in named)


def plain(text: str) -> str:
    """Turn what only MyST understands into plain Markdown."""
    for pattern, replacement in ROLES:
        text = pattern.sub(replacement, text)
    return text


def blocks(text: str) -> list[str]:
    """Split a cell into headings, paragraphs, equations and directives."""
    parts, end = [], 0
    for found in BLOCK.finditer(text):
        parts += [*_paragraphs(text[end : found.start()]), found[0]]
        end = found.end()
    return [*parts, *_paragraphs(text[end:])]


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines, and around headings."""
    text = re.sub(r"^(#+ .*)$", r"\n\1\n", text, flags=re.MULTILINE)
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _directive(block: str) -> str:
    """An equation as ``$$``, a figure as a picture, an admonition as a quotation.

    A page that is included is left out.
    """
    head = DIRECTIVE.match(block)
    if not head:
        return block
    kind, title = head[1], head[2]
    body = block[head.end() :].rsplit("\n", 1)[0].strip()
    if kind == "include":
        return ""
    if kind == "math":
        return f"$$\n{body}\n$$"
    if kind == "figure":
        return f"![{body.splitlines()[-1] if body else ''}]({title})"
    told = [f"**{title}**", "", *body.splitlines()] if title else body.splitlines()
    return "\n".join(f"> {line}".rstrip() for line in told)


def _words(block: str) -> int:
    if block.startswith("$$"):
        return MATH
    return PICTURE if block.startswith("![") else len(block.split())


def _spoken(block: str) -> bool:
    """Long prose: neither an equation, a list, a table, a claim nor a picture."""
    shown = ("$$", "- ", "* ", "> ", "|", "![", "#", "1. ")
    return not block.startswith(shown) and _words(block) > SHORT


def _cell(source: str, kind: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(
        source, metadata={"slideshow": {"slide_type": kind}}
    )


class _Deck:
    """The slides made so far, and how much room the last one has left."""

    def __init__(self) -> None:
        self.cells: list[NotebookNode] = []
        self.used = 0

    def room(self, words: int) -> str:
        """Say where the next thing goes: on this slide, or on one below it."""
        full = self.used > ALONE and self.used + words > FULL
        self.used = words if full else self.used + words
        return "subslide" if full else "-"

    def text(self, block: str) -> None:
        block = plain(_directive(block))
        if not block:
            return
        if _spoken(block):
            self.cells.append(_cell(block, "notes"))
            for line in filter(BOLD.match, block.splitlines()):
                self.text(line)
        elif block.startswith("#"):
            self.used = 5
            self.cells.append(_cell(block, "subslide" if "### " in block else "slide"))
        else:
            self.cells.append(_cell(block, self.room(_words(block))))

    def code(self, cell: NotebookNode) -> None:
        """What a cell shows, and the cell itself where it is short; both or neither."""
        outputs = [still for output in cell.outputs if (still := _still(output))]
        if not outputs:
            return
        pictures = [output for output in outputs if _is_picture(output)]
        hidden = pictures or len(cell.source.splitlines()) > LONGEST_CODE
        hidden = hidden or "remove-input" in cell.metadata.get("tags", [])
        lines = 0 if hidden else len(cell.source.splitlines())
        printed = sum(len(o.get("text", "").splitlines()) for o in outputs)
        kind = self.room(PICTURE if pictures else CODE_LINE * (lines + min(printed, 8)))
        if hidden:
            self.cells.append(_cell(f"```python\n{cell.source}\n```", "notes"))
        shown = nbformat.from_dict({**cell, "outputs": outputs})
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        shown.metadata = nbformat.from_dict(
            {"slideshow": {"slide_type": kind}, "alt": alt}
        )
        if hidden:
            shown.metadata["tags"] = ["remove-input"]
        self.cells.append(shown)


def _still(output: NotebookNode) -> NotebookNode | None:
    """Leave out a widget, which needs a kernel or the network; keep its picture, if it has one."""
    if WIDGET not in output.get("data", {}):
        return output
    data = {kind: value for kind, value in output.data.items() if kind != WIDGET}
    still = nbformat.from_dict({**output, "data": data})
    return still if _is_picture(still) else None


def _is_picture(output: NotebookNode) -> bool:
    return any(
        kind.startswith("image/") or kind == "text/html"
        for kind in output.get("data", {})
    )


def deck(chapter: NotebookNode) -> NotebookNode:
    """Arrange a chapter as slides."""
    made = _Deck()
    for cell in chapter.cells:
        if cell.cell_type == "code":
            made.code(cell)
        for block in blocks(cell.source) if cell.cell_type == "markdown" else []:
            made.text(block)
    return nbformat.v4.new_notebook(
        cells=_notes_behind(made.cells),
        metadata={"title": chapter.cells[0].source.splitlines()[0][2:]},
    )


def _notes_behind(cells: list[NotebookNode]) -> list[NotebookNode]:
    """A note that comes before its slide begins would open an empty one."""
    first = next(
        i for i, cell in enumerate(cells) if cell.metadata.slideshow.slide_type == "slide"
    )
    return cells[first:]


def export(chapter: Path, folder: Path) -> Path:
    """Write the deck of a chapter, and the files that it needs, and say where it is."""
    exporter = SlidesExporter(
        raw_template=TEMPLATE,
        reveal_url_prefix="reveal",
        reveal_theme="white",
        embed_images=True,
        exclude_anchor_links=True,
    )
    exporter.register_preprocessor(
        TagRemovePreprocessor(enabled=True, remove_input_tags={"remove-input"}),
        enabled=True,
    )
    slides = deck(nbformat.read(chapter, as_version=4))
    resources = {
        "metadata": {"name": slides.metadata["title"], "path": str(chapter.parent)}
    }
    body, _ = exporter.from_notebook_node(slides, resources)
    _copy_files(folder)
    place = folder / f"{chapter.stem}.html"
    place.write_text(_with_alternatives(body, slides), encoding="utf-8")
    return place


def _with_alternatives(body: str, slides: NotebookNode) -> str:
    """Give every picture the text that its cell has for it, which this template leaves out."""
    outputs = [
        (cell.metadata.get("alt", ""), o)
        for cell in slides.cells
        for o in cell.get("outputs", [])
    ]
    texts = iter(
        [alt for alt, output in outputs if "image/png" in output.get("data", {})]
    )
    return NO_TEXT.sub(lambda _: f'alt="{escape(next(texts))}"', body)


def _copy_files(folder: Path) -> None:
    """Copy reveal.js and MathJax out of the packages that carry them."""
    reveal, mathjax = (
        _inside("sphinx_revealjs", "_static/revealjs"),
        _inside("sphinx-mathjax-offline", "static/mathjax"),
    )
    for part in ("plugin/notes", "dist/theme/fonts/source-sans-pro"):
        shutil.copytree(reveal / part, folder / "reveal" / part, dirs_exist_ok=True)
    for part in ("dist/reveal.js", "dist/reveal.css", "dist/theme/white.css"):
        shutil.copy(reveal / part, folder / "reveal" / part)
    fonts = "output/chtml/fonts"
    shutil.copytree(mathjax / fonts, folder / "mathjax" / fonts, dirs_exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", folder / "mathjax")


def _inside(package: str, path: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"Slides need the package {package}: install the extra [book].")
    return Path(next(iter(found.submodule_search_locations))) / path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(export(Path(name), Path("_build/slides")), flush=True)

"""A Sphinx extension: where a chapter had another address, a page leads on to the new one.

``moved_chapters`` in ``_config.yml`` has the old and the new stem of each.
"""

from __future__ import annotations

import os
from pathlib import Path

from sphinx.application import Sphinx

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>This chapter has moved</title>
<meta http-equiv="refresh" content="0; url={to}">
<link rel="canonical" href="{to}">
</head>
<body>
<main><h1>This chapter has moved</h1><p><a href="{to}">Go to its new page.</a></p></main>
</body>
</html>
"""
PLACES = ("book/{0}", "exercises/student/{0}/{0}")  # a chapter, and its exercises


def pages(moved: dict[str, str]) -> dict[str, str]:
    """Give the text of each page that leads on, by its address."""
    made = {}
    for old, new in moved.items():
        for place in PLACES:
            here, there = f"{place.format(old)}.html", f"{place.format(new)}.html"
            made[here] = PAGE.format(to=os.path.relpath(there, os.path.dirname(here)))
    return made


def write(app: Sphinx, error: Exception | None) -> None:
    """Write them beside the pages of the book."""
    if error is not None or app.builder.format != "html":
        return
    for address, text in pages(app.config.moved_chapters).items():
        path = Path(app.outdir) / address
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the setting and what is done with it."""
    app.add_config_value("moved_chapters", {}, "html", [dict])
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

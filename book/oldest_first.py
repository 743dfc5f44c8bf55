"""A Sphinx extension: the bibliography style ``oldest_first``, by year and then by author."""

from __future__ import annotations

from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as Plain
from pybtex.style.sorting.author_year_title import SortingStyle
from sphinx.application import Sphinx


class ByYear(SortingStyle):
    """Year, then authors, then title."""

    def sorting_key(self, entry: Entry) -> tuple[str, ...]:
        """Give what an entry is ordered by."""
        return (entry.fields.get("year", ""), *super().sorting_key(entry))


class OldestFirst(Plain):
    """The plain style in the order of time."""

    default_sorting_style = "by_year"


def setup(app: Sphinx) -> dict[str, bool]:
    """Make both known by their names."""
    register_plugin("pybtex.style.sorting", "by_year", ByYear)
    register_plugin("pybtex.style.formatting", "oldest_first", OldestFirst)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The zoo's page shows what was measured and nothing else; a budget ends what is too slow."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import page, store, trained, zoo  # noqa: E402

DATA: dict[str, Any] = store.load()
PAGE: dict[str, Any] = json.loads((ROOT / "book" / "zoo.ipynb").read_text("utf-8"))
EMPTY: dict[str, Any] = {"format": store.FORMAT, "runs": [], "sections": {}}
TABLES = ("families", "reasons", "rated", "learned")


def shown(name: str) -> str:
    """What a table left on the page."""
    (cell,) = [c for c in PAGE["cells"] if f"zoo.{name}(data)" in "".join(c["source"])]
    return "".join(cell["outputs"][0]["data"]["text/markdown"])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_on_the_page_is_what_the_data_gives(name: str) -> None:
    assert getattr(zoo, name)(DATA).data == shown(name)
    assert page.NONE in getattr(zoo, name)(EMPTY).data


def test_the_text_tells_no_figure() -> None:
    for cell in PAGE["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"`[^`]*`|ResNet-18|float\d\d|Float32", "", "".join(cell["source"]))
            assert not re.findall(r"\d", text), text


def test_stored_cells_are_those_that_would_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}
    for module in (zoo, trained):
        monkeypatch.setattr(
            module, "fill", lambda what, jobs, _: asked.setdefault(what, set()).update(jobs)
        )
    zoo.zoo(zoo.Options())
    zoo.rates(zoo.Options())
    trained.learned(zoo.Options())
    for section in (zoo.ZOO, zoo.RATES, "learned"):
        assert set(DATA["sections"].get(section, {})) <= asked[section]


def test_a_budget_of_cpu_seconds_ends_what_runs_inside() -> None:
    start = time.process_time()
    with pytest.raises(zoo.Spent), zoo.within(0.05):
        while time.process_time() < start + 5:
            pass
    with zoo.within(5):
        pass


def test_a_cell_tells_what_came_out_and_what_did_not() -> None:
    cell = zoo.recover_one("squeezenet1_1", 32, "cat", budget=0.01)
    assert cell["ended"] == "not finished" and cell["seconds"] < 5
    tried = [{"psnr": 280.4, "exact": True}, {"psnr": 21.0, "exact": False}, cell]
    assert zoo.reached(tried) == "280, (21), not within 30 CPU s"
    assert zoo.reached([cell, cell]) == "not within 30 CPU s" and zoo.reached([]) is None

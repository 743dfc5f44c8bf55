"""Measurements are stored whole, fitted rightly, and the page shows them and nothing else.

What was measured is not measured again here: no test asserts a time.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradinv_edu as gi

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import budgets, measure, nets, page, scaling, store  # noqa: E402
from benchmarks.measure import Job, Options  # noqa: E402

DATA: dict[str, Any] = store.load()
PAGE: dict[str, Any] = json.loads((ROOT / "book" / "benchmarks.ipynb").read_text("utf-8"))
TABLES = (
    "runs", "goals", "side_by_side", "given", "pixels", "growths", "surplus", "precisions",
    "against_dense", "threads", "chapters", "resistant", "audits", "layers", "tried", "course",
)  # fmt: skip
EMPTY: dict[str, Any] = {"format": store.FORMAT, "runs": [], "sections": {}}
HTML = ROOT / "_build" / "html"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "FILE", tmp_path / "data" / "benchmarks.json")
    return store.FILE


# --- the data file ----------------------------------------------------------------------------


def test_a_cell_comes_back_with_its_stamp(file: Path) -> None:
    store.put("one", "key", {"seconds": 1.5})
    store.put("two", "key", {"seconds": 2.5, "threads": 2, "seed": 7})
    assert store.cells("one") == {
        "key": {"seconds": 1.5, "seed": 0, "run": 0, "threads": store.threads()}
    }
    assert store.cells("two")["key"] == {"seconds": 2.5, "threads": 2, "seed": 7, "run": 0}
    assert store.cells("three") == {}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_runs_are_kept_as_long_as_a_cell_names_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        monkeypatch.setattr(store, "here", lambda name=name: {"machine": name})
        store.put("s", name, {})
    assert store.load()["runs"] == [{"machine": "a"}, {"machine": "b"}]
    store.drop("s", ["a"])
    assert store.load()["runs"] == [{"machine": "b"}] and store.cells("s")["b"]["run"] == 0
    store.drop("s")
    assert store.load() == EMPTY


def test_two_processes_lose_no_cell(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks import store; "
        "store.FILE = Path(sys.argv[1]); store.here = dict; "
        "[store.put('s', f'{sys.argv[2]}{i}', {}) for i in range(20)]"
    )
    commands = [[sys.executable, "-c", code, str(file), name] for name in "ab"]
    processes = [subprocess.Popen(c, cwd=ROOT) for c in commands]
    assert [p.wait() for p in processes] == [0, 0]
    assert len(store.cells("s")) == 40


def test_the_machine_is_described_in_general_terms() -> None:
    found = store.here()
    assert {"system", "cpu", "cores", "memory"} <= set(found["machine"])
    assert {"python", "torch"} <= set(found["versions"])
    assert not any("+" in version for version in found["versions"].values())
    text = json.dumps(found)
    assert platform.node() not in text and str(Path.home()) not in text


def test_the_stored_file_is_whole() -> None:
    assert DATA["format"] == store.FORMAT
    for section in DATA["sections"].values():
        for cell in section.values():
            assert {"seed", "threads", "run"} <= set(cell)
            assert 0 <= cell["run"] < len(DATA["runs"])
            figures = [value for value in cell.values() if isinstance(value, float)]
            assert all(math.isfinite(value) for value in figures)


def test_the_stored_file_names_no_folder() -> None:
    text = store.FILE.read_text("utf-8")
    assert not re.search(r"(?<![\w.])/(home|work|tmp|root|usr|opt|Users)/|[A-Z]:\\\\", text)


# --- measuring ----------------------------------------------------------------------------------


def test_what_is_stored_is_not_measured_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(measure, "run", lambda job: asked.append(job.arguments) or {"n": 1.0})
    jobs = {f"a/{n}": Job("m", "f", {"n": n}) for n in (1, 2)} | {"b/3": Job("m", "f", {"n": 3})}
    measure.fill("s", jobs, Options(only="a/"))
    assert asked == [{"n": 1}, {"n": 2}]
    measure.fill("s", jobs, Options())
    assert asked[2:] == [{"n": 3}]
    measure.fill("s", jobs, Options(again=True, only="a/2"))
    assert asked[3:] == [{"n": 2}] and set(store.cells("s")) == set(jobs)


def test_a_cell_that_breaks_down_is_left_for_the_next_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "run", lambda _: None)
    measure.fill("s", {"k": Job("m", "f")}, Options())
    assert store.load() == EMPTY


def test_a_child_breaks_down_or_takes_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.run(Job("measure", "rounded", {"value": 2.0}, threads=1, limit=0.01)) == {
        "failed": "over 0 s",
        "threads": 1,
    }
    assert measure.run(Job("measure", "nothing")) is None
    assert "nothing" in capsys.readouterr().out


def test_memory_is_counted_from_where_a_cell_begins() -> None:
    measure.forget_peak()
    before = measure.memory("VmRSS")
    block = torch.ones(2**23, dtype=torch.float64)
    block += 1
    del block
    assert measure.memory() - before > 60  # MiB, of 64


def test_figures_are_rounded_to_what_they_are_worth() -> None:
    assert measure.rounded(0.123456) == 0.1235
    assert measure.rounded(98765.4, 3) == 98800.0


def test_every_section_can_be_called() -> None:
    wanted = command.parser().parse_args(["scaling", "budgets", "--again", "--only", "x"])
    assert wanted.sections == ["scaling", "budgets"] and wanted.again
    for module, function, _ in command.SECTIONS.values():
        assert callable(getattr(__import__(f"benchmarks.{module}", fromlist=["_"]), function))
    with pytest.raises(SystemExit):
        command.parser().parse_args(["nothing"])


def test_a_section_passes_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []
    monkeypatch.setattr(scaling, "main", lambda options: asked.append(options) or 0)
    assert command.main(["growth"]) == 0 and command.main(["scaling", "--again"]) == 0
    assert asked == [Options(False, "pixels/"), Options(True, "")]


# --- own scaling --------------------------------------------------------------------------------


def test_the_common_network_is_photo_cnn() -> None:
    ours, chapter = scaling.network(16), gi.models.photo_cnn((3, 16, 16), dtype=torch.float64)
    pairs = zip(ours.parameters(), chapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    x = gi.data.photo("cat", 16, dtype=torch.float64)
    assert torch.equal(ours(x), chapter(x))


@pytest.mark.parametrize("depth", scaling.DEPTHS)
def test_depth_counts_convolutions(depth: int) -> None:
    convolutions = [m for m in scaling.network(16, depth) if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == depth
    wide = [m for m in scaling.network(16, depth, 2.0) if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in wide] == [2 * m.out_channels for m in convolutions]


def test_a_cell_counts_what_the_recovery_did() -> None:
    cell = scaling.cell(size=16)
    net, x = scaling.network(16), scaling.pictures(16, 1)
    loss = torch.nn.CrossEntropyLoss()
    recovery = gi.recover(net, gi.observe(net, loss, x, torch.tensor([3])), (3, 16, 16), loss)
    assert cell["exact"] and cell["iterations"] == sum(r.iterations for r in recovery.layers)
    assert cell["error"] == pytest.approx(gi.metrics.relative_error(recovery.inputs, x), rel=0.01)
    assert [layer["name"] for layer in cell["layers"]] == ["6", "4", "2", "0"]
    assert sum(layer["seconds"] for layer in cell["layers"]) <= 1.01 * cell["seconds"]
    assert all(0 <= layer["test"] < layer["seconds"] for layer in cell["layers"])


def test_watching_the_solver_leaves_it_as_it_was() -> None:
    from gradinv_edu.engine import solve as solver

    solve, test = gi.systems.LayerSystem.solve, solver.rank_test
    with scaling.timed():
        assert gi.systems.LayerSystem.solve is not solve and solver.rank_test is not test
    assert gi.systems.LayerSystem.solve is solve and solver.rank_test is test


def test_a_batch_cell_compares_samples_in_their_order() -> None:
    cell = scaling.cell(size=16, batch=2, width=1.5)
    assert cell["batch"] == 2 and cell["error"] < 1e-6


def test_dense_least_squares_takes_the_same_systems() -> None:
    cell = scaling.against_dense(8)
    assert cell["unknowns"] == 3 * 8 * 8 + 16 * 4 * 4 + 72 * 2 * 2 + 80 * 2 * 2
    assert cell["matrix"] == pytest.approx(8 * 69440 * 320 / 2**20, rel=0.01)


def test_an_exact_power_law_has_its_exponent() -> None:
    x = [1.0, 4.0, 9.0, 25.0]
    found = scaling.growth(x, [3 * v**1.3 for v in x])
    assert (found.exponent, found.low, found.high) == pytest.approx((1.3, 1.3, 1.3))
    assert str(scaling.growth(x, [v**-0.5 for v in x])) == "−0.50 (−0.50 to −0.50)"


def test_the_interval_holds_the_exponent_as_often_as_it_says() -> None:
    source, held = np.random.default_rng(0), 0
    x = np.array([16.0, 32.0, 64.0, 128.0, 256.0])
    for _ in range(400):
        found = scaling.growth(x, x**1.1 * np.exp(0.1 * source.standard_normal(5)))
        held += found.low <= 1.1 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_a_slope_needs_three_points() -> None:
    with pytest.raises(ValueError, match="three points, got 2"):
        scaling.growth([1, 2], [1, 2])


def test_the_stored_cells_are_those_that_would_be_measured() -> None:
    stored = {key for key in DATA["sections"]["scaling"] if not key.startswith("gpu/")}
    assert stored == {key for key in scaling.jobs() if not key.startswith("gpu/")}


def test_the_nets_of_the_chapters_come_out() -> None:
    cell = nets.recover_one("lenet", "float64")
    assert cell["psnr"] > 100 and cell["exact"]
    assert nets.audit_one("lenet")["size"] == 32


# --- budgets --------------------------------------------------------------------------------------


def test_a_budget_is_exceeded_or_not() -> None:
    fast, slow = ({"seconds": {"chapter": s}, "run": 0} for s in (1.0, 1e5))
    over = list(budgets.exceeded({"fast": fast, "slow": slow, "failed": {"failed": "x"}}))
    assert [(key, value) for key, _, value, _ in over] == [("slow", 1e5)]


def test_the_exit_status_tells(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"chapter/a": 1.0}
    monkeypatch.setattr(budgets, "jobs", lambda: {key: Job("m", "f") for key in cells})
    monkeypatch.setattr(measure, "run", lambda _: {"seconds": {"chapter": cells["chapter/a"]}})
    assert budgets.main(Options()) == 0
    cells["chapter/a"] = 1e5
    assert budgets.main(Options()) == 1


def test_the_measured_course_is_within_its_budgets() -> None:
    assert not list(budgets.exceeded(DATA["sections"].get("budgets", {})))


def test_files_are_within_their_budgets() -> None:
    assert not list(budgets.exceeded({"files": budgets.files()}))


@pytest.mark.skipif(not HTML.exists(), reason="the book is not built: run `make book` first")
def test_pages_are_within_their_budget() -> None:
    weights = {p.stem: budgets.mib(budgets.weight(p)) for p in budgets.pages(HTML)}
    assert weights
    assert {k: v for k, v in weights.items() if v > budgets.allowed()["mib"]["page"]} == {}


def test_a_page_weighs_what_it_loads(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"1" * 100)
    (tmp_path / "x.css").write_bytes(b"1" * 10)
    text = (
        '<link rel="stylesheet" href="x.css?v=1"><img src="a%20b.png"><img src="a%20b.png">'
        '<a href="other.html"></a><link rel="next" href="x.css"><img src="data:image/png;base64,">'
    )
    (tmp_path / "page.html").write_text(text)
    (tmp_path / "other.html").write_bytes(b"1" * 1000)
    assert budgets.weight(tmp_path / "page.html") == len(text) + 110


# --- the page ---------------------------------------------------------------------------------


def _outputs() -> list[tuple[str, str]]:
    """Calls of the page's tables, with what they left on the page."""
    found = []
    for cell in PAGE["cells"]:
        call = re.search(r"^page\.(\w+)\(\w*\)$", "".join(cell["source"]), re.MULTILINE)
        texts = [o["data"].get("text/markdown") for o in cell.get("outputs", []) if "data" in o]
        if call and any(texts):
            found.append((call[1], "".join(texts[0])))
    return found


@pytest.mark.parametrize(("name", "shown"), _outputs(), ids=lambda v: v if len(v) < 20 else "")
def test_a_table_on_the_page_is_what_the_data_gives(name: str, shown: str) -> None:
    function = getattr(page, name)
    assert (function() if name == "tried" else function(DATA)).data == shown


def test_every_table_and_figure_is_on_the_page() -> None:
    code = "\n".join("".join(c["source"]) for c in PAGE["cells"] if c["cell_type"] == "code")
    drawn = ("draw_pixels", "draw_series", "draw_layers")
    assert not [name for name in (*TABLES, *drawn) if f"page.{name}(" not in code]
    assert {name for name, _ in _outputs()} == set(TABLES)


def test_the_text_tells_no_figure_that_the_cells_do_not_show() -> None:
    # sizes of the pictures, the level of the intervals, numbers of chapters
    allowed = {"32", "95", "6"}
    for cell in PAGE["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = re.sub(r"(?s)```.*?```|`[^`]*`|\$[^$]*\$|CNN6|float64", "", "".join(cell["source"]))
        assert set(re.findall(r"\d+(?:\.\d+)?", text)) <= allowed, text


def test_what_nobody_measured_is_said_so() -> None:
    for name in set(TABLES) - {"runs", "tried"}:
        assert page.NONE in getattr(page, name)(EMPTY).data
    assert "| yes |" not in page.goals(EMPTY).data


@pytest.mark.parametrize("name", ["draw_pixels", "draw_series", "draw_layers"])
@pytest.mark.parametrize("data", [EMPTY, DATA], ids=["empty", "stored"])
def test_figures_are_drawn_from_whatever_there_is(name: str, data: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure = getattr(page, name)(data)
    figure.canvas.draw()
    plt.close(figure)


def test_a_failed_cell_is_told_with_its_reason() -> None:
    cell = {"failed": "over 16 GiB | of memory"}
    data = {**EMPTY, "sections": {"side_by_side": {"R-GAP/CNN6/32/1": cell}}}
    row = next(r for r in page.side_by_side(data).data.splitlines() if "| R-GAP |" in r)
    assert "over 16 GiB / of memory" in row and "none" in row
    assert "| no |" not in page.goals(data).data


def test_aims_are_judged() -> None:
    ours = {"cpu_seconds": 0.5, "mib": 50.0, "psnr": 130.0}
    theirs = {"cpu_seconds": 270.0, "mib": 6800.0, "psnr": 32.0}
    side = {"own/CNN6/32/1": ours, "R-GAP/CNN6/32/1": theirs, "own/CNN6-d/32/1": ours,
            "R-GAP/CNN6-d/32/1": {**theirs, "psnr": -2.0}}  # fmt: skip
    lines = page.goals({**EMPTY, "sections": {"side_by_side": side}}).data.splitlines()[2:6]
    assert [line.split("|")[-2].strip() for line in lines] == ["yes"] * 4
    side["own/CNN6/32/1"] = {"cpu_seconds": 5.0, "mib": 500.0, "psnr": 100.0}
    lines = page.goals({**EMPTY, "sections": {"side_by_side": side}}).data.splitlines()[2:5]
    assert [line.split("|")[-2].strip() for line in lines] == ["no"] * 3


def test_every_attempt_is_whole() -> None:
    for attempt in page.attempts():
        assert set(attempt) == {"what", "figures", "kept", "why"}
        assert attempt["kept"] in (True, False, "found")
    assert any(attempt["kept"] is False for attempt in page.attempts())

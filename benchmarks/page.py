"""Tables and figures of the book's page: everything on it is read from the data files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import budgets, scaling, store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = dict[str, Any]
ATTEMPTS = Path(__file__).parents[1] / "book" / "data" / "attempts.toml"
NONE = "not measured here"
TOLD = 20  # dB; below, a picture does not count as recovered
FROM = 64  # where constant costs no longer count
LARGEST, PHOTO = max(scaling.SIZES), 224
EVEN = f"{scaling.EVEN} equations for each unknown"
QUANTITIES = {"seconds": "CPU seconds", "memory": "memory", "iterations": "iterations",
              "error": "error"}  # fmt: skip


# --- what is read -------------------------------------------------------------------------------


def cells(data: Data, section: str) -> dict[str, store.Cell]:
    """Cells of a section that came to an end."""
    found = data["sections"].get(section, {})
    return {key: cell for key, cell in found.items() if "failed" not in cell}


def series(data: Data, name: str) -> list[store.Cell]:
    """Cells of one series in order; the common cell of 32×32 in float64 belongs to three."""
    measured = cells(data, scaling.SECTION)
    found = [cell for key, cell in measured.items() if key.startswith(f"{name}/")]
    what = name.split("/")[0]
    if what in ("depth", "width", "batch") and found:
        found += [c for k, c in measured.items() if k == "pixels/float64/32"]
    by = "size" if "/" in name or what in ("dense", "even") else what
    return sorted(found, key=lambda cell: cell[by])


def attempts() -> list[dict[str, Any]]:
    """What was tried, as the file has it."""
    found: list[dict[str, Any]] = tomllib.loads(ATTEMPTS.read_text("utf-8"))["attempt"]
    return found


# --- how it is told -----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A Markdown table; numbers stand to the right, long names may break after a mark."""
    from IPython.display import Markdown

    body = [[number(entry) for entry in row] for row in rows] or [[NONE, *["–"] * (len(head) - 1)]]
    columns = list(zip(*body, strict=True))
    right = [all(e[:1].isdigit() or e in (NONE, "–") for e in column) for column in columns]
    rule = ["--:" if flag else ":--" for flag in right]
    mark = re.compile(r"(?<=[\w…])([/+.])(?=[A-Za-z…])")  # a space of no width behind
    body = [[mark.sub("\\1\u200b", e.replace("|", "/")) for e in row] for row in body]
    whole = [list(head), rule, *body]
    lines = [f"| {' | '.join(row)} |" for row in whole]
    return Markdown("\n".join(lines))


def number(value: Any) -> str:
    """Three digits of a number; ``None`` says so."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}"
    return (
        f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
    )


def runs(data: Data) -> Any:
    """Where and with what the figures were measured."""
    rows = [
        (
            place + 1,
            ", ".join(
                [m["cpu"], f"{m['cores']} cores", f"{m['memory']:.0f} GiB", m.get("gpu", "no GPU")]
            ),
            ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        )
        for place, run in enumerate(data["runs"])
        for m in [run["machine"]]
    ]
    return table(["run", "machine", "versions"], rows)


# --- side by side -------------------------------------------------------------------------------


def pairs() -> list[tuple[str, str]]:
    """Every net with every system that takes it, the systems of one net together."""
    from .adapters import SYSTEMS
    from .cases import NETS

    return [(net, name) for net in NETS for name, system in SYSTEMS.items() if net in system.nets]


def side(data: Data, system: str, net: str, size: int = 32, threads: int = 1) -> store.Cell:
    """One cell; empty where there is none."""
    found = data["sections"].get("side_by_side", {})
    cell: store.Cell = found.get(f"{system}/{net}/{size}/{threads}", {})
    return cell


def side_by_side(data: Data) -> Any:
    """Systems beside each other on each net at 32×32."""
    rows = [(net, system, *_row(data, system, net)) for net, system in pairs()]
    head = ["net", "system", "CPU s", "on two threads", "MiB", "dB", "largest"]
    return table(head, rows)


def _row(data: Data, system: str, net: str) -> list[Any]:
    one, two = side(data, system, net), side(data, system, net, threads=2)
    if "cpu_seconds" not in one:
        return [one.get("failed"), "–", "–", "–", largest(data, system, net)]
    both = two.get("cpu_seconds", two.get("failed"))
    return [one["cpu_seconds"], both, one["mib"], one["psnr"], largest(data, system, net)]


def largest(data: Data, system: str, net: str) -> str:
    """Largest picture recovered."""
    found = data["sections"].get("side_by_side", {})
    own = {k: c for k, c in found.items() if k.startswith(f"{system}/{net}/")}
    good = [int(key.split("/")[2]) for key, cell in own.items() if cell.get("psnr", -1) >= TOLD]
    return "–" if not own else f"{max(good)}×{max(good)}" if good else "none"


def given(data: Data) -> Any:
    """What each published system had to be given to run today."""
    about = data["sections"].get("side_by_side_systems", {})
    rows = [
        (name, cell.get("source") or "this package", cell.get("commit", "")[:7] or "–",
         cell.get("given") or "nothing")
        for name, cell in about.items()
    ]  # fmt: skip
    return table(["system", "source", "commit", "what it was given"], rows)


def goals(data: Data) -> Any:
    """What was aimed at, and what came of it."""
    return table(["aim", "measured", "reached"], _goals(data))


def _goals(data: Data) -> Iterator[tuple[str, Any, Any]]:
    own, published = side(data, "own", "CNN6"), side(data, "R-GAP", "CNN6")
    for aim, least, ratio in (
        ("times less CPU time than R-GAP, CNN6", 500, _ratio(published, own, "cpu_seconds")),
        ("times less memory than R-GAP, CNN6", 20, _ratio(published, own, "mib")),
        ("dB more exact than R-GAP, CNN6", 80, _gain(own, published)),
    ):
        yield f"at least {least} {aim}", ratio, None if ratio is None else ratio >= least
    mine, theirs = side(data, "own", "CNN6-d").get("psnr"), side(data, "R-GAP", "CNN6-d")
    both = None if None in (mine, theirs.get("psnr")) else f"{mine:.0f} and {theirs['psnr']:.0f} dB"
    yield (
        "CNN6-d recovered where R-GAP fails",
        both,
        both and bool(mine >= TOLD > theirs["psnr"]),
    )
    for dtype in scaling.DTYPES:
        photo = cells(data, scaling.SECTION).get(f"pixels/{dtype}/{PHOTO}", {})
        passes = photo.get("passes")
        aim = f"3×{PHOTO}×{PHOTO} in under 60 passes of {dtype}"
        yield aim, passes, None if passes is None else passes < 60
    passes = cells(data, scaling.SECTION).get(f"even/{PHOTO}", {}).get("passes")
    aim = f"the same in float64, {EVEN}"
    yield aim, passes, None if passes is None else passes < 60
    top = cells(data, scaling.SECTION).get(f"pixels/float64/{LARGEST}", {})
    yield f"3×{LARGEST}×{LARGEST} done at all", top.get("error"), top.get("exact")
    vast = cells(data, scaling.SECTION).get(f"pixels/float64/{scaling.LARGEST}", {})
    mib = vast.get("memory") if vast.get("exact") else None
    side_of = f"{scaling.LARGEST}×{scaling.LARGEST}"
    yield f"3×{side_of} done in under 4 GiB (MiB)", mib, None if mib is None else mib < 4096
    for net in ("resnet18", "vit_b_16", "convnext_tiny"):
        spent = cells(data, "audit").get(f"{net}/{PHOTO}", {}).get("seconds")
        aim = f"{net} at {PHOTO}×{PHOTO} audited in under 60 CPU s"
        yield aim, spent, None if spent is None else spent <= 60
    for dtype in scaling.DTYPES:
        for least in (min(scaling.SIZES), FROM):
            found = [c for c in series(data, f"pixels/{dtype}") if c["size"] >= least]
            whole = LARGEST in [c["size"] for c in found]
            grown = _growth(found, "seconds") if whole else None
            end = max([LARGEST, *(c["size"] for c in found)])
            aim = f"time grows at most as $n^{{1.2}}$, {dtype}, {least}² to {end}²"
            yield aim, grown and str(grown), grown and grown.exponent <= 1.2
    grown = _growth(series(data, "even"), "seconds")
    aim = f"the same in float64, {EVEN}, {min(scaling.EVEN_SIZES)}² to {max(scaling.EVEN_SIZES)}²"
    yield aim, grown and str(grown), grown and grown.exponent <= 1.2


def _ratio(a: store.Cell, b: store.Cell, what: str) -> float | None:
    return a[what] / max(b[what], 1e-9) if what in a and what in b else None


def _gain(a: store.Cell, b: store.Cell) -> float | None:
    return a["psnr"] - b["psnr"] if "psnr" in a and "psnr" in b else None


# --- own scaling --------------------------------------------------------------------------------


def pixels(data: Data) -> Any:
    """Every size, in both precisions."""
    head = ["picture", "gradients", "CPU s", "passes", "MiB", "iterations", "error", "exact"]
    rows = [
        (f"{c['size']}×{c['size']}", c["dtype"], c["seconds"], c["passes"], c["memory"],
         c["iterations"], c["error"], c["exact"])
        for dtype in scaling.DTYPES for c in series(data, f"pixels/{dtype}")
    ]  # fmt: skip
    return table(head, rows)


def draw_pixels(data: Data) -> Figure:
    """Seconds of a recovery, of one pass, and of dense least squares, against pixels."""
    import matplotlib.pyplot as plt

    from gradinv_edu.kit.plotting import COLOURS, style

    lines = [line for line in _lines(data) if line[1]]
    with style():
        figure, axis = plt.subplots(figsize=(5, 4.6), layout="constrained")
        axis.set(xlabel="pixels", ylabel="seconds", title="" if lines else NONE)
        for place, (label, sizes, y) in enumerate(lines):
            pen = {"color": COLOURS[place], "marker": "osD^vP"[place], "label": label}
            pen["linestyle"] = ("-", "--", "-.", ":")[place % 4]
            axis.loglog([size**2 for size in sizes], y, **pen)
        axis.grid(True)
        if lines:
            figure.legend(loc="outside lower center")
    return figure


def _lines(data: Data) -> Iterator[tuple[str, list[int], list[float]]]:
    def line(label: str, found: list[store.Cell], *what: str) -> tuple[str, list[int], list[float]]:
        return label, [c["size"] for c in found], [sum(c[w] for w in what) for c in found]

    for dtype in scaling.DTYPES:
        yield line(f"recovery, {dtype}", series(data, f"pixels/{dtype}"), "seconds")
    yield line(f"recovery, {EVEN}", series(data, "even"), "seconds")
    yield line("one pass, float64", series(data, "pixels/float64"), "pass")
    yield line("dense least squares", series(data, "dense"), "written", "solved")
    for dtype in scaling.DTYPES:
        if found := series(data, f"gpu/{dtype}"):
            yield line(f"recovery on a GPU, {dtype}", found, "wall")


def growths(data: Data) -> Any:
    """Exponents with 95 % intervals."""
    head = ["against", "range", *QUANTITIES.values()]
    return table(head, _growths(data))


def _growths(data: Data) -> Iterator[tuple[Any, ...]]:
    for dtype in scaling.DTYPES:
        for least in (min(scaling.SIZES), FROM):
            found = [c for c in series(data, f"pixels/{dtype}") if c["size"] >= least]
            yield _grown(f"pixels, {dtype}", found, "size", "²")
    yield _grown(f"pixels, {EVEN}", series(data, "even"), "size", "²")
    for name in ("depth", "width", "batch"):
        yield _grown(name, series(data, name), name)


def _grown(what: str, found: list[store.Cell], varied: str, unit: str = "") -> tuple[Any, ...]:
    values = [c[varied] for c in found]
    where = f"{min(values):g}{unit} to {max(values):g}{unit}" if found else "–"
    return what, where, *(_told(found, q) for q in QUANTITIES)


def _told(found: list[store.Cell], quantity: str) -> str | None:
    grown = _growth(found, quantity)
    return None if grown is None else str(grown)


def _growth(found: list[store.Cell], quantity: str) -> scaling.Growth | None:
    """Against what differs most in a series: pixels, or depth, width, batch."""
    usable = [c for c in found if c[quantity] > 0]
    if len(usable) < 3:
        return None
    return scaling.growth([_variable(usable, c) for c in usable], [c[quantity] for c in usable])


def _variable(found: list[store.Cell], cell: store.Cell) -> float:
    name = next(n for n in ("size", "depth", "width", "batch") if len({c[n] for c in found}) > 1)
    return float(cell[name] ** 2 if name == "size" else cell[name])


def draw_series(data: Data) -> Figure:
    """CPU seconds against depth, width and batch, with the fitted growth."""
    import matplotlib.pyplot as plt

    from gradinv_edu.kit.plotting import COLOURS, style

    with style():
        figure, axes = plt.subplots(3, 1, figsize=(5, 7.2), layout="constrained")
        for place, (axis, name) in enumerate(zip(axes, ("depth", "width", "batch"), strict=True)):
            found = series(data, name)
            axis.set(xlabel=LABELS[name], title=NONE)
            if not found:
                continue
            x, y = [c[name] for c in found], [c["seconds"] for c in found]
            axis.loglog(x, y, "osD"[place], color=COLOURS[place], clip_on=False)
            grown = _growth(found, "seconds")
            if grown:
                middle = scaling.centre(x), scaling.centre(y)
                fitted = [middle[1] * (v / middle[0]) ** grown.exponent for v in x]
                axis.loglog(x, fitted, "-", color=COLOURS[place], alpha=0.6)
            axis.set_title(f"exponent {number(grown and str(grown))}")
            axis.set_xticks(x, [f"{v:g}" for v in x])
            axis.grid(True)
        seconds = [c["seconds"] for name in LABELS for c in series(data, name)] or [1.0]
        ticks = [t for t in TICKS if min(seconds) / 2 < t < max(seconds) * 2]
        for axis in axes:
            axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
            axis.set(ylabel="CPU seconds", ylim=(min(seconds) / 1.3, max(seconds) * 1.3))
            axis.minorticks_off()
    return figure


TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
LABELS = {"depth": "convolutions", "width": "times the filters", "batch": "photographs"}


def surplus(data: Data) -> Any:
    """Price of a recovery against how many equations there are for each unknown."""
    head = ["equations for each unknown", "picture", "CPU s", "passes", "iterations",
            "condition of a random matrix"]  # fmt: skip
    rows = [
        (c["surplus"], f"{c['size']}×{c['size']}", c["seconds"], c["passes"], c["iterations"],
         round((1 + c["surplus"] ** -0.5) / (1 - c["surplus"] ** -0.5)))
        for c in [*series(data, "surplus"), *series(data, "even")]
    ]  # fmt: skip
    return table(head, rows)


def precisions(data: Data) -> Any:
    """What gradients of each precision allow, at 64×64."""
    measured = cells(data, scaling.SECTION)
    keys = ["pixels/float64/64", "pixels/float32/64", "dtype/float16", "dtype/bfloat16"]
    rows = [
        (c["dtype"], c["seconds"], c["iterations"], c["error"], c["exact"])
        for key in keys if (c := measured.get(key))
    ]  # fmt: skip
    return table(["gradients", "CPU s", "iterations", "error", "vouched for"], rows)


def against_dense(data: Data) -> Any:
    """The systems of all layers, without a matrix and with it."""
    rows = [
        (f"{c['size']}×{c['size']}", c["unknowns"], c["seconds"], c["written"] + c["solved"],
         c["ratio"], c["matrix"])
        for c in series(data, "dense")
    ]  # fmt: skip
    head = ["picture", "unknowns", "without a matrix, s", "dense, s", "times", "matrix, MiB"]
    return table(head, rows)


def threads(data: Data) -> Any:
    """One thread and two; the GPU beside the CPU where there was one."""
    measured = cells(data, scaling.SECTION)
    keys = {"one thread": "pixels/float64/128", "two threads": f"threads/{scaling.THREADS}"}
    rows = [(name, c.get("seconds"), c.get("wall")) for name, key in keys.items()
            for c in [measured.get(key, {})]]  # fmt: skip
    gpu = measured.get("gpu/float64/128", {})
    rows.append(("GPU", None if not gpu else "–", gpu.get("wall")))
    return table(["3×128×128 in float64", "CPU s", "wall s"], rows)


def chapters(data: Data) -> Any:
    """The networks of chapter recursion."""
    rows = [
        (*key.split("/"), c["seconds"], c["passes"], c["memory"], c["psnr"], c["exact"])
        for key, c in cells(data, "recovery").items()
    ]
    return table(["net", "gradients", "CPU s", "passes", "MiB", "dB", "vouched for"], rows)


def resistant(data: Data) -> Any:
    """CNN6-d, over photographs."""
    rows = [
        (photo, "one" if outputs == "1" else "ten classes", c["seconds"], c["psnr"], c["exact"])
        for key, c in cells(data, "resistant").items() for photo, outputs in [key.split("/")]
    ]  # fmt: skip
    return table(["photograph", "outputs", "CPU s", "dB", "vouched for"], rows)


def audits(data: Data) -> Any:
    """What an audit costs."""
    rows = [
        (net, f"{size}×{size}", c.get("first"), c["seconds"], c["memory"])
        for key, c in cells(data, "audit").items() for net, size in [key.split("/")]
        if "failed" not in c
    ]  # fmt: skip
    return table(["net", "picture", "first verdict, CPU s", "CPU s", "MiB"], rows)


# --- where time goes ----------------------------------------------------------------------------


def draw_layers(data: Data) -> Figure:
    """Share of each layer in the time of a recovery, for several sizes."""
    import matplotlib.pyplot as plt

    from gradinv_edu.kit.plotting import COLOURS, style

    found = [c for c in series(data, "pixels/float64") if c["size"] >= 32]
    names = list(dict.fromkeys(layer["name"] for c in found for layer in c["layers"]))
    with style():
        figure, axis = plt.subplots(figsize=(5, 4.2), layout="constrained")
        start = [0.0] * len(found)
        for place, name in enumerate(names):
            widths = [_share(c, name, "seconds") for c in found]
            rows = range(len(found))
            axis.barh(rows, widths, left=start, color=COLOURS[place], label=f"convolution {name}",
                      edgecolor="white")  # fmt: skip
            start = [a + b for a, b in zip(start, widths, strict=True)]
        rest = [1 - s for s in start]
        axis.barh(range(len(found)), rest, left=start, color="#e6e9eb", label="all else")
        axis.set_yticks(range(len(found)), [f"{c['size']}×{c['size']}" for c in found])
        axis.set(xlabel="share of the CPU seconds", xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _share(cell: store.Cell, name: str, what: str) -> float:
    spent = sum(layer[what] for layer in cell["layers"] if layer["name"] == name)
    return float(spent / cell["seconds"])


def layers(data: Data) -> Any:
    """Layers of the 224×224 recovery, from the last to the first."""
    cell = cells(data, scaling.SECTION).get(f"pixels/float64/{PHOTO}", {"layers": []})
    rows = [
        (f"convolution {x['name']}", x["unknowns"], x["equations"], x["iterations"], x["seconds"],
         f"{100 * x['test'] / x['seconds']:.0f} %")
        for x in cell["layers"]
    ]  # fmt: skip
    head = ["layer", "unknowns", "equations", "iterations", "CPU s", "of it the test of the rank"]
    return table(head, rows)


def tried() -> Any:
    """Every attempt, the failed ones too."""
    said = {True: "kept", False: "dropped", "found": "found"}
    rows = [(a["what"], a["figures"], said[a["kept"]], a["why"]) for a in attempts()]
    return table(["attempt", "what it gave", "and then", "why"], rows)


# --- the course itself --------------------------------------------------------------------------


def course(data: Data) -> Any:
    """Budgets of the course, and what was measured."""
    found, allowed = cells(data, budgets.SECTION), budgets.allowed()
    chapters = {k: c["seconds"]["chapter"] for k, c in found.items() if k.startswith("chapter/")}
    longest = max(chapters, key=chapters.__getitem__, default="chapter/–")
    heaviest = found.get("book", {}).get("heaviest", "–")
    seconds, mib = allowed["seconds"], allowed["mib"]
    pick: Callable[[str, str, str], Any] = lambda key, unit, what: (  # noqa: E731
        found.get(key, {}).get(unit, {}).get(what)
    )
    rows = [
        ("importing the package, after torch", pick("import", "seconds", "import"), "s",
         seconds["import"]),
        (f"longest chapter ({longest.split('/')[1]})", chapters.get(longest), "s",
         seconds["chapter"]),
        ("all chapters one after the other", sum(chapters.values()) or None, "s", "–"),
        ("whole test suite", pick("tests", "seconds", "tests"), "s", seconds["tests"]),
        ("building the book", pick("book", "seconds", "book"), "s", seconds["book"]),
        (f"heaviest page ({heaviest})", pick("book", "mib", "page"), "MiB", mib["page"]),
        ("all pages and what they load", pick("book", "mib", "site"), "MiB", mib["site"]),
        ("largest notebook", pick("files", "mib", "notebook"), "MiB", mib["notebook"]),
        ("largest data file", pick("files", "mib", "data"), "MiB", mib["data"]),
    ]  # fmt: skip
    return table(["what", "measured", "unit", "budget"], rows)

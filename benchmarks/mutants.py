"""Mutants: one small change to the package at a time, and whether a test notices it.

A seeded sample of all that a comparison, an operator, a constant, a condition, a return or a
statement could be instead. The suite runs once, and notes which test calls which function; a mutant
is judged by the tests that call the function it lies in, the quickest first. Each runs in a fork of
a process that has torch loaded; its source is changed on import, no file is touched.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import store
from .measure import ROOT, Options
from .page import cells, table

SECTION, MANY, SEED = "mutants", 200, 0
SECONDS = 120  # CPU seconds of all tests that judge a mutant
APART = (  # tests of what runs in processes of its own, or calls nothing of the package
    "benchmarks", "book", "dependencies", "exercises", "figures", "grade", "house", "launch",
    "lite", "nbgrader", "notation", "notebooks", "pages", "quizzes", "slides", "waymarks",
    "widgets_browser",
)  # fmt: skip
PACKAGE = ROOT / "gradinv_edu"
Called = dict[str, dict[str, Any]]  # a test: its seconds, and the functions it calls

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.MatMult: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


class Sites(ast.NodeTransformer):
    """Counts what could be changed, and changes the one whose number is ``chosen``."""

    def __init__(self, chosen: int = -1) -> None:
        self.chosen, self.found = chosen, list[tuple[int, str]]()
        self.functions, self.inside = list[int](), [0]  # first lines; 0 where it is in none

    def hit(self, node: Any, what: str) -> bool:
        """Note one site; whether it is the one."""
        self.found.append((node.lineno, what))
        self.functions.append(self.inside[-1])
        return len(self.found) - 1 == self.chosen

    def visit(self, node: ast.AST) -> Any:
        """Change a node, or look into it; not into annotations, texts and decorators."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            outside = {name: getattr(node, name, None) for name in ("decorator_list", "returns")}
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            self.inside.append(first if isinstance(node, ast.FunctionDef) else self.inside[-1])
            node.decorator_list, node.returns = [], None  # type: ignore[union-attr]
            self.generic_visit(node)
            self.inside.pop()
            for name, kept in outside.items():
                setattr(node, name, kept)
            return node
        if isinstance(node, ast.arguments):
            node.defaults = [self.visit(default) for default in node.defaults]
            return node
        if isinstance(node, ast.AnnAssign):
            node.value = node.value and self.visit(node.value)
            return node
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
            return node
        node = self.generic_visit(node)
        change = getattr(self, f"change_{type(node).__name__}", None)
        return node if change is None else change(node)

    def _swap(self, node: Any, field: str, place: int | None = None) -> Any:
        old = getattr(node, field) if place is None else getattr(node, field)[place]
        new = SWAPPED.get(type(old))
        if new is not None and self.hit(node, f"{type(old).__name__} → {new.__name__}"):
            if place is None:
                setattr(node, field, new())
            else:
                getattr(node, field)[place] = new()
        return node

    def change_Compare(self, node: ast.Compare) -> Any:
        for place in range(len(node.ops)):
            self._swap(node, "ops", place)
        return node

    def change_BinOp(self, node: ast.BinOp) -> Any:
        return self._swap(node, "op")

    def change_BoolOp(self, node: ast.BoolOp) -> Any:
        return self._swap(node, "op")

    def change_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self.hit(node, f"not {node.value}") else node
        if isinstance(node.value, int | float) and self.hit(node, f"{node.value} → + 1"):
            return ast.Constant(node.value + 1)
        return node

    def change_UnaryOp(self, node: ast.UnaryOp) -> Any:
        plain = isinstance(node.op, ast.USub | ast.Not | ast.Invert)
        return node.operand if plain and self.hit(node, "sign or not dropped") else node

    def change_If(self, node: ast.If) -> Any:
        if self.hit(node, "if → never"):
            node.test = ast.Constant(False)
        return node

    def change_Return(self, node: ast.Return) -> Any:
        if ast.unparse(node) not in ("return", "return None") and self.hit(node, "return None"):
            node.value = ast.Constant(None)
        return node

    def change_AugAssign(self, node: ast.AugAssign) -> Any:
        return ast.Pass() if self.hit(node, "statement dropped") else node

    def change_Expr(self, node: ast.Expr) -> Any:
        call = isinstance(node.value, ast.Call)
        return ast.Pass() if call and self.hit(node, "statement dropped") else node


def mutants(options: Options) -> int:
    """Try those of the sample that are not stored yet."""
    stored = {} if options.again else store.cells(SECTION)
    called = calls()
    for key, path, number in sample():
        if options.only in key and key not in stored:
            cell = judged(path, number, called)
            store.put(SECTION, key, cell)
            print(key, cell, flush=True)
    return 0


def sample() -> list[tuple[str, Path, int]]:
    """Name, file and number of the mutants that are tried."""
    drawn = []
    paths = [*PACKAGE.glob("[a-z]*.py"), *PACKAGE.rglob("engine/**/[a-z]*.py")]
    for path in sorted({*paths} - {PACKAGE / "cli.py"}):
        sites = Sites()
        sites.visit(ast.parse(path.read_text("utf-8")))
        where = path.relative_to(PACKAGE).as_posix()
        drawn += [
            (f"{where}:{line}, {what} ({n})", path, n) for n, (line, what) in enumerate(sites.found)
        ]
    return random.Random(SEED).sample(drawn, min(MANY, len(drawn)))


def tests_of(path: Path, number: int, called: Called) -> list[str]:
    """Tests that call the function of a mutant, or any of its file; the quick ones first."""
    sites = Sites()
    sites.visit(ast.parse(path.read_text("utf-8")))
    place, line = path.relative_to(ROOT).as_posix(), sites.functions[number]
    own = f"{place}:{line}"
    found = [
        (test["seconds"], name)
        for name, test in called.items()
        if (own in test["calls"] if line else any(c.startswith(f"{place}:") for c in test["calls"]))
    ]
    chosen, spent = [], 0.0
    for seconds, name in sorted(found):
        spent += seconds
        if chosen and spent > SECONDS / 2:
            break
        chosen.append(name)
    return chosen


def judged(path: Path, number: int, called: Called) -> dict[str, Any]:
    """Whether a test fails that passes where nothing is changed, and after how many CPU seconds."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    tests, caught, by = tests_of(path, number, called), False, ""
    while tests and not caught:
        status, by = _forked(path, number, tests)
        if status in (0, 5):
            break
        caught = not by or _forked(path, -1, [by])[0] == 0
        tests = [test for test in tests if test != by]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    return {"caught": caught, "by": by if caught else None, "cpu": round(spent, 1)}


def calls() -> Called:
    """Which test calls what; kept in the system's folder for temporary files for these sources."""
    sources = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")])
    seal = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"gradinv-calls-{seal}.json"
    if not kept.exists():
        print("which test calls what: the suite runs once", flush=True)
        _loaded()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _watched(kept)
            os._exit(99)
        os.waitpid(child, 0)
    found: Called = json.loads(kept.read_text("utf-8"))
    return found


def _watched(kept: Path) -> None:
    import pytest

    found: Called = {}

    class Watch:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            seen: set[str] = set()

            def note(frame: Any, event: str, arg: Any) -> None:
                code = frame.f_code
                if code.co_filename.startswith(f"{PACKAGE}/"):
                    seen.add(f"{code.co_filename[len(str(ROOT)) + 1 :]}:{code.co_firstlineno}")

            start = time.process_time()
            sys.settrace(note)  # type: ignore[arg-type]
            try:
                result = yield
            finally:
                sys.settrace(None)
            seconds = round(time.process_time() - start, 3)
            found[item.nodeid] = {"seconds": seconds, "calls": sorted(seen)}
            return result

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" and report.passed:
                passed.add(report.nodeid)

    passed: set[str] = set()
    _quiet()
    tests = [str(t) for t in sorted((ROOT / "tests").glob("test_*.py")) if t.stem[5:] not in APART]
    pytest.main([*tests, *PLAIN], plugins=[Watch()])
    kept.write_text(json.dumps({k: v for k, v in found.items() if k in passed and v["calls"]}))
    os._exit(0)


PLAIN = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "0", "--rootdir", str(ROOT))


def _quiet() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _forked(path: Path, number: int, tests: list[str]) -> tuple[int, str]:
    """Exit code of pytest in a fork, −1 where its time ran out; the test that fails."""
    _loaded()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _child(path, number, tests, tell)
        os._exit(99)
    os.close(tell)
    with os.fdopen(told) as said:
        by = said.readline().strip()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1
    if code == 99:
        raise RuntimeError(f"{path.name} could not be changed at site {number}.")
    return code, by


def _child(path: Path, number: int, tests: list[str], tell: int) -> None:
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
    _quiet()
    for name in [n for n in sys.modules if n.split(".")[0] in ("gradinv_edu", "benchmarks")]:
        del sys.modules[name]
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        if Path(self.path) != path:
            return plain(self, name)
        tree = Sites(number).visit(ast.parse(path.read_text("utf-8")))
        return compile(ast.fix_missing_locations(tree), str(path), "exec")

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    import pytest

    class Tell:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                os.write(tell, f"{report.nodeid}\n".encode())

    os.chdir(ROOT)
    os._exit(int(pytest.main([*tests, "-x", *PLAIN], plugins=[Tell()])))


def _loaded() -> None:
    """What every test imports, once."""
    import hypothesis
    import pytest
    import torch._dynamo
    import torchvision

    torch.set_num_threads(1)
    assert hypothesis and pytest and torchvision


def caught(data: dict[str, Any]) -> Any:
    """Mutants of chapters and engine: how many a test notices."""
    from gradinv_edu.kit.metrics import wilson_interval

    rows, stored = [], {k: c for k, c in cells(data, SECTION).items() if "caught" in c}
    for part, engine in (("modules of the chapters", False), ("the engine", True)):
        own = [c["caught"] for key, c in stored.items() if key.startswith("engine/") == engine]
        rows.append((part, own))
    rows.append(("together", [c["caught"] for c in stored.values()]))
    shown = []
    for part, own in rows:
        low, high = wilson_interval(sum(own), len(own))
        share = f"{100 * sum(own) / max(len(own), 1):.0f} %"
        shown.append(
            [part, f"{len(own)}", f"{sum(own)}", share, f"{100 * low:.0f} to {100 * high:.0f} %"]
        )
    return table(["mutants of", "tried", "caught", "share", "95 % interval"], shown)

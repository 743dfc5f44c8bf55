"""Mutants: one small change to the package at a time, and whether a test notices it.

A seeded sample of all that a comparison, an operator, a constant, a condition, a return or a
statement could be instead. Each runs in a fork of a process that has torch loaded; its source is
changed on import, no file is touched.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import os
import random
import re
import resource
import sys
from pathlib import Path
from typing import Any

from . import store
from .measure import ROOT, Options
from .page import cells, table

SECTION, MANY, SEED = "mutants", 200, 0
FILES, SECONDS = 3, 60  # test files that judge a mutant, CPU seconds for each
PACKAGE = ROOT / "gradinv_edu"

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

    def hit(self, node: Any, what: str) -> bool:
        """Note one site; whether it is the one."""
        self.found.append((node.lineno, what))
        return len(self.found) - 1 == self.chosen

    def visit(self, node: ast.AST) -> Any:
        """Change a node, or look into it; not into annotations, texts and decorators."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            outside = {name: getattr(node, name, None) for name in ("decorator_list", "returns")}
            node.decorator_list, node.returns = [], None  # type: ignore[union-attr]
            self.generic_visit(node)
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
    for key, path, number in sample():
        if options.only in key and key not in stored:
            cell = judged(path, number)
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


def tests_of(path: Path) -> list[Path]:
    """The test files that name a module and what is public in it, or the modules that import it."""
    sources = {source: source.read_text("utf-8") for source in PACKAGE.rglob("*.py")}
    tests = {test: test.read_text("utf-8") for test in sorted((ROOT / "tests").glob("test_*.py"))}
    score, own = dict.fromkeys(tests, 0.0), {path}
    for weight in (1.0, 0.1, 0.01):
        for one in own:
            public = re.search(r"__all__ = \[(.*?)\]", sources[one], re.S)
            home = one.parent.name if one.parent.name in ("layers", "losses") else one.stem
            names = [one.stem, home, *(re.findall(r"\"(\w+)\"", public[1]) if public else [])]
            words = re.compile(rf"\b({'|'.join(names)})\b")
            for test, text in tests.items():
                seen = words.findall(text)
                score[test] += weight * (len({*seen}) + len(seen) / 100) / len(own)
                score[test] += 9 * weight * (test.stem[5:] in (one.stem, home)) / len(own)
        stems = "|".join(one.stem for one in own)
        imports = re.compile(rf"^\s*(from|import) .*\b({stems})\b", re.M)
        own = {source for source, text in sources.items() if imports.search(text)} - {path}
        own = {source for source in own if source.stem != "__init__"} or {path}
    return sorted(tests, key=lambda test: -score[test])[:FILES]


def judged(path: Path, number: int) -> dict[str, Any]:
    """Whether one of its tests fails, and after how many CPU seconds."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    by = None
    for test in tests_of(path):
        status = _forked(path, number, test)
        if status not in (0, 5) and _passes(test):
            by = test.stem + (" (time)" if status == -1 else "")
            break
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    return {"caught": by is not None, "by": by, "cpu": round(spent, 1)}


def _passes(test: Path) -> bool:
    """Whether it does in time where nothing is changed."""
    key = f"unchanged/{test.stem}"
    if key not in store.cells(SECTION):
        store.put(SECTION, key, {"passes": _forked(test, -1, test) == 0})
    return bool(store.cells(SECTION)[key]["passes"])


def _forked(path: Path, number: int, test: Path) -> int:
    """Exit code of pytest on one file in a fork; −1 where its time ran out."""
    _loaded()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _child(path, number, test)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1


def _child(path: Path, number: int, test: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
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

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "0"]
    os._exit(int(pytest.main([str(test), *options])))


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

"""Makes the checks that students get: no solution, no mistake, no way of computing the truth.

Where an answer is unique, what the check asks and what is right is recorded, with the hints that
known mistakes earn. Where many answers are right, the check is code that says what an answer must
do, without the mistakes that it knows.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from checks.recorded import sketch, with_slope
from checks.values import Values
from checks.verdict import Mistakes, WrongAnswerError, _fresh
from editions import HERE, HIDDEN, Exercise, Notebook, exercises_of, mark_of, solutions, source_of

OPEN = {  # many answers are right, or the check works with functions
    *("perceptron-labels", "fully_connected-combine", "fully_connected-twin"),
    *("convolution-glaring", "systems-count", "segments-design", "batches-lonely"),
    *("batches-apart", "rank-twice", "rank-misjudged", "optimization-contest"),
    *("optimization-another", "design-another", "schedule-schedules", "dropout-protecting"),
    *("compression-leaks", "scoreboard-flatter", "federation-guarded", "capstone-investigate"),
}
CODE_TOO = {"check_law"}  # of an exercise that is recorded: its data is a photograph's
FREE = {"recursion-step"}  # what the solution leaves NaN may be anything
SHARED = ("__init__.py", "verdict.py", "recorded.py", "values.py")
TOLERANCES = (1e-3, 1e-6, 1e-7)


def module_of(notebook: Notebook) -> str:
    """Name the module of checks that an assignment imports."""
    cell = next(source_of(c) for c in notebook["cells"] if mark_of(c).get("grade"))
    return cell.split()[1].removeprefix("checks.")


def checks_for_students(notebook: Notebook, old: Path | None = None) -> dict[str, str]:
    """Make the files of an assignment's ``checks`` as students get it.

    ``old`` is a folder of such files: what was recorded there is kept while it is of the same
    sources.
    """
    name = module_of(notebook)
    files = {n: (HERE / "checks" / n).read_text("utf-8") for n in SHARED}
    source = (HERE / "checks" / f"{name}.py").read_text("utf-8")
    files[f"{name}.py"] = stripped(source, notebook)
    code = "".join(source_of(c) for c in notebook["cells"] if c["cell_type"] == "code")
    makers = files["recorded.py"] + Path(__file__).read_text("utf-8")
    mark = hashlib.sha256((source + code + makers).encode()).hexdigest()[:16]
    known = old / "cases.json" if old else None
    if known and known.exists() and json.loads(known.read_text("utf-8")).get("") == mark:
        files["cases.json"] = known.read_text("utf-8")
        return files
    cases = {"": mark, **record(notebook)}
    files["cases.json"] = json.dumps(cases, sort_keys=True, separators=(",", ":")) + "\n"
    return files


def _checks(notebook: Notebook) -> Iterator[tuple[Exercise, str]]:
    """Each exercise with each function that checks it."""
    cells = {mark_of(c).get("grade_id"): source_of(c) for c in notebook["cells"]}
    for exercise in exercises_of(notebook):
        tree = ast.parse(cells[exercise.check].split(HIDDEN[0])[0])
        imported = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        for alias in (a for n in imported for a in n.names):
            yield exercise, alias.name


def is_open(exercise: Exercise, check: str) -> bool:
    """Say whether a check is handed out as code."""
    return exercise.solution in OPEN or check in CODE_TOO


def stripped(source: str, notebook: Notebook) -> str:
    """Leave of a module of checks what its open checks need, and no mistake's body."""
    every = list(_checks(notebook))
    open_ = {check for exercise, check in every if is_open(exercise, check)}
    closed = [check for exercise, check in every if not is_open(exercise, check)]
    tree = ast.parse(source)
    needed, before = set(open_) | {"evidence"}, set()
    while needed != before:
        before = set(needed)
        for node in tree.body:
            if _names(node) & needed:
                needed |= {n.id for n in ast.walk(_bare(node)) if isinstance(n, ast.Name)}
    kept = [_bare(n) for n in tree.body if _is_import(n) or _names(n) & needed]
    if not open_:
        kept = [n for n in kept if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    first = ast.get_docstring(tree) or ""
    lines = [f'"""{first}\n\nMade by exercises/recording.py: what students get.\n"""\n']
    lines += [ast.unparse(node) for node in kept]
    if closed:
        lines.append("from .recorded import recorded\n")
    lines += [f'{check} = recorded("{check}")' for check in closed]
    return "\n".join(lines) + "\n"


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {node.name} if hasattr(node, "name") else set()


def _bare(node: ast.stmt) -> ast.stmt:
    """A class of mistakes with its hints, and nothing that answers."""
    mistakes = isinstance(node, ast.ClassDef) and any(
        isinstance(base, ast.Name) and base.id == "Mistakes" for base in node.bases
    )
    if not mistakes:
        return node
    bare = ast.ClassDef(node.name, node.bases, [], [], [])
    bare.keywords = [k for k in node.keywords if k.arg == "of"]
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
            shell = ast.parse(f"def {part.name}(*_):\n    raise NotImplementedError").body[0]
            assert isinstance(shell, ast.FunctionDef)
            shell.body = [part.body[0], *shell.body]
            bare.body.append(shell)
    return ast.fix_missing_locations(bare)


def record(notebook: Notebook) -> dict[str, Any]:
    """Record every check of an assignment that is not handed out as code."""
    room: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        for cell in solutions(notebook)["cells"]:
            if cell["cell_type"] == "code" and mark_of(cell) and not mark_of(cell).get("grade"):
                exec(source_of(cell), room)
    module, cases = import_module(f"checks.{module_of(notebook)}"), {}
    for exercise, check in _checks(notebook):
        if not is_open(exercise, check):
            with torch.random.fork_rng():  # networks of a check may be drawn without a generator
                torch.manual_seed(0)
                answer = room[exercise.target]
                cases[check] = _recorded(getattr(module, check), answer, exercise)
    return cases


def _run(check: Callable[..., None], answer: Callable[..., Any]) -> tuple[str, list[Any], str]:
    """What a check says of an answer: its refusal, what it asked for, and what it printed."""
    asked: list[Any] = []

    def student(*given: Any) -> Any:
        asked.append([_fresh(given), None])  # answers may write into what they get
        asked[-1][1] = answer(*given)
        return asked[-1][1]

    student.__name__ = getattr(answer, "__name__", "your answer")
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            check(student)
    except WrongAnswerError as verdict:
        return " ".join(str(verdict).split()), asked, ""
    return "", asked, " ".join(printed.getvalue().split()).removeprefix("Right. ")


def _leaf(given: tuple[Any, ...]) -> int | None:
    leaves = [i for i, a in enumerate(given) if isinstance(a, torch.Tensor) and a.requires_grad]
    return leaves[0] if leaves else None


def _recorded(
    check: Callable[..., None], solution: Callable[..., Any], exercise: Exercise
) -> dict[str, Any]:
    values = Values()
    refused, asked, said = _run(check, solution)
    assert not refused, (exercise.number, refused)
    truths = [_answered(solution, given) for given, _ in asked]
    calls = [
        {
            "given": values.pack([g.detach() if isinstance(g, torch.Tensor) else g for g in given]),
            "truth": values.pack(truth),
            "what": "your answer",
            "judged": True,
            **({"leaf": _leaf(given)} if _leaf(given) is not None else {}),
        }
        for (given, _), truth in zip(asked, truths, strict=True)
    ]
    for place, call in enumerate(calls):
        if isinstance(truths[place], torch.Tensor) and truths[place].numel() > 100:
            call["judged"] = bool(_run(check, _at(place, truths, lambda t: 1.5 * t))[0])
    close = [t for t in TOLERANCES if not _run(check, _nudged(solution, t / 2))[0]]
    words = sorted({t for t in truths if isinstance(t, str)})
    flips: dict[str, Any] = {}
    for place, truth in enumerate(truths):
        others = [not truth] if isinstance(truth, bool) else []
        others += [w for w in words if w != truth] if isinstance(truth, str) else []
        for other in others:
            hint = _run(check, _at(place, truths, lambda _, o=other: o))[0]
            flips.setdefault(str(place), []).append([other, hint])
    return {
        "calls": calls,
        "tolerance": close[0] if close else 1e-9,
        "free": exercise.solution in FREE,
        "flips": flips,
        "mistakes": list(_mistakes(check, exercise, truths, asked)),
        "right": said,
    }


def _answered(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """An answer to one question, with its slope where the question is differentiable."""
    leaf = _leaf(given)
    fresh = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in given]
    if leaf is not None:
        fresh[leaf].requires_grad_()
    answer = with_slope(function(*fresh), fresh, leaf)
    return answer.detach() if isinstance(answer, torch.Tensor) else answer


def _mistakes(
    check: Callable[..., None], exercise: Exercise, truths: list[Any], asked: list[Any]
) -> Iterator[dict[str, Any]]:
    for mistake in Mistakes.KNOWN[exercise.solution]:
        hint, theirs, _ = _run(check, mistake)
        answers = {}
        for place in range(min(len(theirs), len(truths))):
            try:
                answers[str(place)] = sketch(_answered(mistake, asked[place][0]))
            except Exception:  # it does not stand this case
                break
        yield {"hint": hint, "answers": answers, "name": mistake.__name__}


def _at(place: int, truths: list[Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A student who is right but for one answer."""
    count = iter(range(10**6))

    def student(*_: Any) -> Any:
        number = next(count)
        truth = truths[number % len(truths)]
        return change(truth) if number == place else truth

    return student


def _nudged(solution: Callable[..., Any], by: float) -> Callable[..., Any]:
    """A student who is off by a little, everywhere."""

    def nudge(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value * (1 + by)
        if isinstance(value, tuple | list):
            return type(value)(nudge(part) for part in value)
        return value * (1 + by) if isinstance(value, float) else value

    return lambda *given: nudge(solution(*given))

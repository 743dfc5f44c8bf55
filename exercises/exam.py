"""A paper: ``python exercises/exam.py --chapters 1 2 --points 40 --for ada``, out of the exam bank.

Numbers are drawn by the name: each student has a paper of one's own. ``--solutions`` prints
the answers. The bank is ``exam/bank.toml``.

``--sheets FOLDER --class names.txt`` writes a sheet for each name, of those questions whose answer
is a number, the same for all but for their numbers; ``--mark FOLDER`` marks what came back.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gradinv_edu as gi

BANK = Path(__file__).resolve().parent / "exam" / "bank.toml"


def _conv(filters: int) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(1, filters, 2, stride=2, bias=False).double()


ROOM = {"math": math, "torch": torch, "gi": gi, "_conv": _conv}


@dataclass(frozen=True)
class Question:
    """One question with its numbers in place, its answer, points, objective and difficulty."""

    chapter: str
    objective: int
    difficulty: int
    points: int
    ask: str
    answer: str
    numbers: dict[str, float]
    result: float | None = None
    checked: float | None = None
    tolerance: float = 1e-4


def bank(name: str = "") -> list[Question]:
    """Read the bank with the numbers of a name."""
    seed = hashlib.sha256(name.encode()).hexdigest()
    entries = tomllib.loads(BANK.read_text("utf-8"))["question"]
    return [_question(e, random.Random(f"{seed}{i}")) for i, e in enumerate(entries)]


def _question(entry: dict[str, Any], chance: random.Random) -> Question:
    entry = dict(entry)
    ends = entry.pop("draw", {})
    numbers: dict[str, Any] = {name: chance.randint(*both) for name, both in ends.items()}
    way, other = entry.pop("compute", None), entry.pop("check", None)
    room = {**ROOM, **numbers}
    if way:
        entry["result"] = float(eval(way, room))
        entry["checked"] = float(eval(other, room))
    shown = {**numbers, "result": f"{entry.get('result', 0):.4g}"}
    for text in ("ask", "answer"):
        entry[text] = re.sub(r"<(\w+)>", lambda m: str(shown[m[1]]), entry[text])
    return Question(**entry, numbers=numbers)


def paper(questions: Sequence[Question], points: int, name: str = "") -> list[Question]:
    """Choose questions worth about so many points: by lot, easy ones first."""
    chance, chosen = random.Random(f"paper {name}"), []
    for question in chance.sample(list(questions), len(questions)):
        if sum(q.points for q in chosen) + question.points <= points:
            chosen.append(question)
    return sorted(chosen, key=lambda q: (q.difficulty, q.chapter))


def write_sheets(papers: dict[str, list[Question]], folder: Path) -> None:
    """Write ``NAME.md`` to hand out, and ``NAME.csv`` to be filled in and handed back."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in papers.items():
        numbered = list(enumerate(questions, start=1))
        asked = [f"**{i}.** ({q.points} points) {q.ask}\n" for i, q in numbered]
        asked.append(f"Write each answer, a number, behind its comma in `{name}.csv`.\n")
        (folder / f"{name}.md").write_text("\n".join(asked), "utf-8")
        (folder / f"{name}.csv").write_text("".join(f"{i},\n" for i, _ in numbered), "utf-8")


def mark_sheets(papers: dict[str, list[Question]], folder: Path) -> list[tuple[str, int, str]]:
    """Name, points, and whose number stands in the place of one's own."""
    rows = []
    for name, questions in papers.items():
        file, earned, told = folder / f"{name}.csv", 0, []
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        given = {line.partition(",")[0].strip(): line.partition(",")[2] for line in lines}
        for place, question in enumerate(questions):
            answer = _number(given.get(str(place + 1), ""))
            if _near(answer, question):
                earned += question.points
                continue
            whose = [n for n, q in papers.items() if n != name and _near(answer, q[place])]
            told += [f"{place + 1} is right for {', '.join(whose)}"] if whose else []
        rows.append((name, earned, "; ".join(told)))
    return rows


def _number(text: str) -> float:
    try:
        return float(text.replace("−", "-"))
    except ValueError:
        return math.nan


def _near(answer: float, question: Question) -> bool:
    return math.isclose(answer, question.result or 0.0, rel_tol=5e-3, abs_tol=1e-9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a paper, or write or mark a class's sheets."""
    parser = argparse.ArgumentParser(prog="exam.py", description=__doc__)
    parser.add_argument("--chapters", type=int, nargs="*", help="numbers; default all")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--for", dest="name", default="", help="whose numbers")
    parser.add_argument("--paper", default="", help="another word chooses other questions")
    parser.add_argument("--solutions", action="store_true")
    parser.add_argument("--class", dest="names", type=Path, help="a file with a name a line")
    parser.add_argument("--sheets", type=Path, help="write a sheet for each of the class here")
    parser.add_argument("--mark", type=Path, help="mark the sheets in this folder")
    parser.add_argument("--secret", default="", help="of the class's numbers, with the names")
    options = parser.parse_args(arguments)

    def chosen_for(name: str, figures: bool = False) -> list[Question]:
        every = [q for q in bank(name) if not figures or (q.result is not None and q.numbers)]
        some = [q for q in every if int(q.chapter[:2]) in (options.chapters or range(99))]
        return paper(some, options.points, options.paper)

    if folder := options.sheets or options.mark:
        names = options.names.read_text("utf-8").split("\n")
        papers = {n: chosen_for(f"{options.secret}|{n}", True) for n in names if n.strip()}
        if options.sheets:
            write_sheets(papers, folder)
        else:
            print("student,points,of,look at")
            for name, earned, told in mark_sheets(papers, folder):
                print(f"{name},{earned},{sum(q.points for q in papers[name])},{told}")
        return 0
    chosen = chosen_for(options.name)
    for number, q in enumerate(chosen, start=1):
        print(f"**{number}.** ({q.points} points) {q.ask}\n")
        if options.solutions:
            where = f"{q.chapter}, objective {q.objective}, difficulty {q.difficulty}"
            print(f"> {q.answer} *({where})*\n")
    print(f"*{sum(q.points for q in chosen)} points in all.*")
    return 0


if __name__ == "__main__":
    sys.exit(main())

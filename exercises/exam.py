"""A paper: ``python exercises/exam.py --chapters 1 2 --points 40 --for ada``, out of the exam bank.

Numbers are drawn by the name: each student has a paper of one's own. ``--solutions`` prints
the answers. The bank is ``exam/bank.toml``.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a paper."""
    parser = argparse.ArgumentParser(prog="exam.py", description=__doc__)
    parser.add_argument("--chapters", type=int, nargs="*", help="numbers; default all")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--for", dest="name", default="", help="whose numbers")
    parser.add_argument("--paper", default="", help="another word chooses other questions")
    parser.add_argument("--solutions", action="store_true")
    options = parser.parse_args(arguments)
    chapters = options.chapters
    every = [q for q in bank(options.name) if not chapters or int(q.chapter[:2]) in chapters]
    chosen = paper(every, options.points, options.paper)
    for number, q in enumerate(chosen, start=1):
        print(f"**{number}.** ({q.points} points) {q.ask}\n")
        if options.solutions:
            where = f"{q.chapter}, objective {q.objective}, difficulty {q.difficulty}"
            print(f"> {q.answer} *({where})*\n")
    print(f"*{sum(q.points for q in chosen)} points in all.*")
    return 0


if __name__ == "__main__":
    sys.exit(main())

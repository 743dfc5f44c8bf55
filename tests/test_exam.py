"""The exam bank: enough of every kind, and every figure computed in two ways."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import exam
import guide
import leaderboard
import pytest
from editions import HERE
from safetensors.torch import load_file

NAMES = ("", "ada", "bob", "eve")
CHAPTERS = {path.stem: path for path in guide.chapters(HERE)}


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_the_same_in_two_ways(name: str) -> None:
    for question in exam.bank(name):
        if question.result is not None:
            near = pytest.approx(question.checked, rel=question.tolerance, abs=1e-9)
            assert question.result == near, question.ask


def test_the_bank_is_large_and_balanced() -> None:
    questions = exam.bank()
    assert len(questions) >= 60
    assert sum(q.result is not None for q in questions) >= 25
    assert {q.chapter for q in questions} == set(CHAPTERS)
    assert set(Counter(q.difficulty for q in questions)) == {1, 2, 3}
    for q in questions:
        assert 1 <= q.objective <= len(guide.objectives_of(CHAPTERS[q.chapter])), q.ask
        assert 1 <= q.points <= 5 and q.ask[-1] in ".?)" and len(q.answer) > 10
        assert "<" not in q.ask.replace("< ", "")


def test_each_student_has_numbers_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    ada, bob = (exam.bank(name) for name in ("ada", "bob"))
    drawn = [(a.numbers, b.numbers) for a, b in zip(ada, bob, strict=True) if a.numbers]
    assert sum(a != b for a, b in drawn) > 0.6 * len(drawn)
    assert exam.bank("ada") == ada
    exam.main(["--chapters", "1", "2", "--points", "12", "--for", "ada", "--solutions"])
    said = capsys.readouterr().out
    assert "objective" in said and "points in all" in said
    chosen = exam.paper(ada, 40)
    assert 36 <= sum(q.points for q in chosen) <= 40


def test_sheets_are_marked_and_anothers_number_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("ada\nbob\neve\n")
    options = ["--chapters", "1", "2", "3", "--points", "12", "--secret", "s"]
    options += ["--class", str(tmp_path / "names.txt")]
    exam.main([*options, "--sheets", str(tmp_path)])
    asked = [(tmp_path / f"{name}.md").read_text() for name in ("ada", "bob")]
    assert asked[0] != asked[1] and "<" not in asked[0].replace("< ", "")
    every = [q for q in exam.bank("s|ada") if int(q.chapter[:2]) in (1, 2, 3)]
    right = exam.paper([q for q in every if q.result is not None and q.numbers], 12)
    lines = "".join(f"{i}, {q.result:.4g}\n" for i, q in enumerate(right, start=1))
    for name in ("ada", "bob"):  # who copies from her
        (tmp_path / f"{name}.csv").write_text(lines)
    exam.main([*options, "--mark", str(tmp_path)])
    ada, bob, eve = (row.split(",", 3) for row in capsys.readouterr().out.splitlines()[1:])
    assert ada[1] == ada[2] and int(bob[1]) < int(bob[2]) and eve[1] == "0"
    assert "is right for ada" in bob[3] and not ada[3] and not eve[3]


# The leaderboard.


@pytest.mark.parametrize("protocol", leaderboard.PROTOCOLS)
def test_a_case_can_be_made_handed_out_and_scored(protocol: str, tmp_path: Path) -> None:
    leaderboard.make(tmp_path, 3, protocol)
    names = {path.name for path in (tmp_path / "public").iterdir()}
    assert names == {"model.safetensors", "update.safetensors", "README.md"}
    truth = load_file(str(tmp_path / "private" / "truth.safetensors"))["picture"].tolist()
    near = [value + 0.01 * (-1) ** i for i, value in enumerate(truth)]
    handed = {
        "exact": {"picture": truth, "psnr": 60, "sure": 1},
        "modest": {"picture": truth, "psnr": 0, "sure": 0},
        "near": {"picture": near, "psnr": 35, "sure": 0.9},
        "boast": {"picture": [0.5] * 64, "psnr": 60, "sure": 1},
        "broken": {"picture": [0.5] * 9, "psnr": 60, "sure": 1},
    }
    for name, content in handed.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows = leaderboard.board(tmp_path, [tmp_path / f"{name}.json" for name in handed])
    assert [row[0] for row in rows] == ["exact", "near", "modest", "broken", "boast"]
    assert rows[0][1] == pytest.approx(2) and rows[2][1] == pytest.approx(1)

"""The client's steps are imitated, and the stored figures come out again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradinv_edu import data, models, schedule, sharing
from gradinv_edu.errors import InvalidTensorError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import schedule as benchmark  # noqa: E402

DATA: dict[str, Any] = json.loads(benchmark.FILE.read_text())
KEYS = ("attacker", "learning_rate", "local_steps", "seeds", "trained")
CE, CLASS = nn.CrossEntropyLoss(), torch.tensor([3])
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.01},
    {"local_steps": 4, "learning_rate": 0.1},
    {"local_steps": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"local_steps": 5, "learning_rate": 0.1, "batch_size": 2},
    {"local_steps": 3, "learning_rate": 0.01, "optimizer": "adam", "weight_decay": 0.01},
]


def _net() -> nn.Sequential:
    return models.mlp((64, 24, 10), "sigmoid", dtype=torch.float64)


def _digit() -> Tensor:
    return data.digit(3, dtype=torch.float64)


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_the_client_s_steps_are_imitated_exactly(settings: dict[str, Any]) -> None:
    net, (x, y) = _net(), data.digits([3, 1, 4], dtype=torch.float64)
    update = sharing.observe(net, CE, x, y, **settings)
    found = schedule.simulated_update(net, update, CE, x, y)
    assert list(found) == list(update.gradients)
    for name, gradient in update.gradients.items():
        torch.testing.assert_close(found[name].detach(), gradient, rtol=1e-9, atol=1e-12)


def test_the_imitation_is_differentiable() -> None:
    net, x = _net(), _digit().requires_grad_()
    update = sharing.observe(net, CE, _digit(), CLASS, local_steps=3, learning_rate=0.5)

    def size(guess: Tensor) -> Tensor:
        sent = schedule.simulated_update(net, update, CE, guess, CLASS)
        return sum((g.square().sum() for g in sent.values()), torch.zeros(()))

    assert torch.autograd.gradcheck(size, (x,))


def test_a_guess_that_does_not_fit_is_told_in_shapes() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    with pytest.raises(InvalidTensorError, match=r"inputs \(2, 1, 8, 8\) and targets \(1,\)"):
        schedule.simulated_update(net, update, CE, torch.cat([_digit()] * 2), CLASS)


def test_every_cell_is_there_and_whole() -> None:
    assert {tuple(cell[k] for k in KEYS) for cell in DATA["cells"]} == set(benchmark.CELLS)
    places = [tuple(row[k] for k in ("learning_rate", "local_steps", "batch_size"))
              for row in DATA["accuracy"]]  # fmt: skip
    assert places == benchmark.SCHEDULES
    assert all(len(row["accuracy"]) == benchmark.SEEDS for row in DATA["accuracy"])
    assert DATA["pictures"] == benchmark.PICTURES and DATA["steps"] == benchmark.STEPS
    assert set(DATA["versions"]) == {"torch", "python"}
    for cell in DATA["cells"]:
        for column in ("psnr", "ssim", "label"):
            assert len(cell[column]) == cell["seeds"] * benchmark.PICTURES


@pytest.mark.parametrize(
    ("attacker", "steps"), [("unaware", 1), ("unaware", 10), ("recursion", 10)]
)
def test_a_slice_comes_out_again(attacker: str, steps: int) -> None:
    (cell,) = (
        c for c in DATA["cells"]
        if tuple(c[k] for k in KEYS if k != "seeds") == (attacker, 0.01, steps, False)
    )  # fmt: skip
    for digit, seed in ((0, 0), (7, 1)):
        place = seed * benchmark.PICTURES + digit
        found = benchmark.trial(attacker, 0.01, steps, digit, seed)
        assert found["label"] == cell["label"][place]
        # searches end elsewhere on other processors; which side of 20 dB, they do not change
        assert (found["psnr"] > 20) == (cell["psnr"][place] > 20)
        assert attacker != "recursion" or found["psnr"] == pytest.approx(cell["psnr"][place], abs=1)


def test_a_finished_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "schedule.json"
    copy.write_text(benchmark.FILE.read_text())
    monkeypatch.setattr(benchmark, "FILE", copy)
    monkeypatch.setattr(benchmark, "cell", lambda *_: pytest.fail("nothing is missing"))
    benchmark.main()
    assert copy.read_text() == (ROOT / "book" / "data" / "schedule.json").read_text()

"""Attack success against the number of local iterations: what chapter schedule draws from.

Usage: python -m benchmarks schedule          (every cell that the data file lacks; resumable)

Each cell is an attacker, a learning rate, a number of local steps, on 20 digits and 1 or 3 seeds; a
seed draws the network and the start. The file is written after each cell. Attack and network are
those of Wei et al. (2020): L-BFGS on the squared distance of the gradients, a patterned start, the
label read from the last layer, the DLG paper's LeNet with sigmoid; pictures of 8x8 pixels.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradinv_edu as gi

FILE = Path(__file__).parents[1] / "book" / "data" / "schedule.json"
PICTURES, STEPS = 20, 8
CE = nn.CrossEntropyLoss()
Key = tuple[str, float, int, int]  # attacker, learning rate, local steps, seeds
CELLS: list[Key] = [
    *(("unaware", 0.01, steps, 3) for steps in (1, 2, 5, 10)),
    ("unaware", 0.001, 10, 3),
    *(("recursion", 0.01, steps, 3) for steps in (1, 2, 5, 10)),
    ("aware", 0.01, 10, 1),  # each of its gradients takes ten of the others'
]


def trial(attacker: str, rate: float, steps: int, digit: int, seed: int) -> dict[str, float]:
    """One attack: PSNR and SSIM of the picture that the attacker chose, and whether the label."""
    generator = torch.Generator().manual_seed(1000 + seed)
    net = gi.models.lenet((1, 8, 8), generator=generator)
    x, y = gi.data.digits([digit])
    update = gi.observe(net, CE, x, y, local_steps=steps, learning_rate=rate)
    found, label = attack(attacker, net, update, generator)
    shown = found.clamp(0, 1)
    return {
        "psnr": round(gi.metrics.psnr(shown, x.double()), 2),
        "ssim": round(gi.metrics.ssim(shown, x.double()), 4),
        "label": bool((label == y).all()),
    }


def attack(
    attacker: str, net: nn.Module, update: gi.Update, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and a label; mid-grey where the recursion finds a contradiction and stops."""
    if attacker == "recursion":
        try:
            recovery = gi.recover(net, update, (1, 8, 8), CE)
        except gi.errors.InconsistentGradientError:
            return torch.full((1, 1, 8, 8), 0.5).double(), torch.tensor([-1])
        assert recovery.targets is not None
        return recovery.inputs, recovery.targets
    with torch.backends.mkldnn.flags(enabled=False):  # tiny convolutions are faster without
        match = gi.optimization.match_gradients(
            net, update, (1, 8, 8), CE, method="idlg", start="patterned",
            simulate=attacker == "aware", steps=STEPS, generator=generator,
        )  # fmt: skip
    return match.inputs, match.targets


def cell(attacker: str, rate: float, steps: int, seeds: int) -> dict[str, Any]:
    """All trials of one cell, digit by digit within a seed."""
    trials = [
        trial(attacker, rate, steps, digit, seed)
        for seed in range(seeds)
        for digit in range(PICTURES)
    ]
    columns = {name: [t[name] for t in trials] for name in ("psnr", "ssim", "label")}
    where = {"attacker": attacker, "learning_rate": rate, "local_steps": steps, "seeds": seeds}
    return {**where, **columns}


def load() -> dict[str, Any]:
    """Read the data file, or begin one for these versions."""
    if FILE.exists():
        data: dict[str, Any] = json.loads(FILE.read_text())
        return data
    return {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "pictures": PICTURES,
        "steps": STEPS,
        "cells": [],
    }


def main(most: int | None = None) -> None:
    """Fill in the cells that are missing, at most so many."""
    data = load()
    names = ("attacker", "learning_rate", "local_steps", "seeds")
    done = {tuple(c[name] for name in names) for c in data["cells"]}
    for key in [c for c in CELLS if c not in done][:most]:
        data["cells"].append(cell(*key))
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(data, indent=1) + "\n")
        print(key, gi.metrics.success_rate(p > 20 for p in data["cells"][-1]["psnr"]), flush=True)


def measure(_: object) -> int:
    """As a section of ``python -m benchmarks``."""
    main()
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else None)

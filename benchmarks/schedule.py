"""Attack success against the number of local iterations: what chapter schedule draws from.

Usage: python -m benchmarks schedule          (every cell that the data file lacks; resumable)

Each cell is an attacker, a learning rate, a number of local steps, on 20 digits and 1 or 3 seeds; a
seed draws the network and the start; in some cells the network has been trained before the attack.
Beside them stands what each schedule teaches: accuracy on held-out digits after so many rounds of a
federation whose clients hold 50 digits each. A third part has ten digits, another in each step. A
fourth does the same for the size of a batch, on a small dense network: one batch attacked in each
of five networks, and what it teaches, at the best of some rates. The file is written after each
cell.

Attack and network are those of Wei et al. (2020): L-BFGS on the squared distance of the gradients,
a patterned start, the label read from the last layer, the DLG paper's LeNet with sigmoid; pictures
of 8x8 pixels.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu.engine.files import write_whole

from .measure import Options

FILE = Path(__file__).parents[1] / "book" / "data" / "schedule.json"
PICTURES, STEPS = 20, 8
CE = nn.CrossEntropyLoss()
ROUNDS, TRAINING, HELD, SEEDS = 200, 1500, 50, 3  # HELD: digits of a client
Key = tuple[str, float, int, int, bool]  # attacker, learning rate, local steps, seeds, trained
CELLS: list[Key] = [
    *(("unaware", 0.01, steps, 3, False) for steps in (1, 2, 5, 10)),
    ("unaware", 0.001, 10, 3, False),
    *(("recursion", 0.01, steps, 3, False) for steps in (1, 2, 5, 10)),
    ("aware", 0.01, 10, 1, False),  # each of its gradients takes ten of the others'
    # a rate at which the network learns, and the network after 400 rounds of it
    *((who, 0.3, 10, 3, False) for who in ("recursion", "unaware")),
    *(("recursion", 0.3, steps, 3, True) for steps in (1, 10)),
    *(("unaware", 0.3, steps, 3, True) for steps in (1, 10)),
    *(("aware", 0.3, 10, 1, after) for after in (False, True)),
]
# attacker, learning rate, trained: ten digits, another in each of ten local steps
DIFFERENT = [(who, 0.01, False) for who in ("unaware", "aware")]
DIFFERENT += [(who, 0.3, after) for after in (False, True) for who in ("unaware", "aware")]
SIZES, NETS, RATES = (1, 2, 4, 8, 16, 32), 5, (0.3, 1.0, 3.0, 10.0)
# learning rate, local steps, digits of a client in one step
SCHEDULES = [(0.01, 1, 50), (0.01, 10, 50), (0.3, 1, 50), (1.5, 1, 50), (0.3, 10, 50)]
SCHEDULES += [(0.01, 10, 5), (0.3, 10, 5)]


@cache
def network(seed: int, trained: bool = False) -> nn.Module:
    """LeNet with weights of this seed; trained at rate 1.5, which the scoreboard found for it."""
    net = gi.models.lenet((1, 8, 8), generator=torch.Generator().manual_seed(1000 + seed))
    return learned(net, seed, 1.5, 1, HELD, 2 * ROUNDS) if trained else net


def learned(
    net: nn.Module, seed: int, rate: float, steps: int, batch: int, rounds: int = ROUNDS
) -> nn.Module:
    """What a federation with this schedule makes of a network."""
    x, y, _, _ = shuffled()

    def client(model: nn.Module, loss: Any, x: Any, y: Any, generator: Any) -> gi.Update:
        return gi.observe(
            model, loss, x, y, local_steps=steps, learning_rate=rate, batch_size=batch
        )

    source = torch.Generator().manual_seed(seed)
    return gi.design.train(
        net, CE, x, y, steps=rounds, batch_size=HELD, client=client, generator=source
    )


def shuffled() -> tuple[torch.Tensor, ...]:
    """Digits to learn from, without the twenty that are attacked, and others to judge by."""
    x, y = gi.data.digits(range(PICTURES, 1797))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def accuracies(rate: float, steps: int, batch: int) -> list[float]:
    """Accuracy on held-out digits of each seed's federation."""
    _, _, x, y = shuffled()
    with torch.backends.mkldnn.flags(enabled=False):
        nets = (learned(network(s), s, rate, steps, batch) for s in range(SEEDS))
        return [round(gi.design.accuracy(net, x, y), 4) for net in nets]


def trial(
    attacker: str, rate: float, steps: int, digit: int, seed: int, trained: bool = False
) -> dict[str, float]:
    """One attack: PSNR and SSIM of the picture that the attacker chose, and whether the label."""
    generator = torch.Generator().manual_seed(1000 + seed)
    gi.models.lenet((1, 8, 8), generator=generator)  # the start is drawn after the weights
    net = network(seed, trained)
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
    attacker: str, net: nn.Module, update: gi.Update, generator: torch.Generator, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and labels; mid-grey where the recursion finds a contradiction and stops."""
    if attacker == "recursion":
        try:
            recovery = gi.recover(net, update, (1, 8, 8), CE)
        except (gi.errors.InconsistentGradientError, gi.errors.NotRecoveredError):
            return torch.full((1, 1, 8, 8), 0.5).double(), torch.tensor([-1])
        assert recovery.targets is not None
        return recovery.inputs, recovery.targets
    with torch.backends.mkldnn.flags(enabled=False):  # tiny convolutions are faster without
        match = gi.optimization.match_gradients(
            net, update, (1, 8, 8), CE, method="idlg", start="patterned",
            simulate=attacker == "aware", generator=generator, **{"steps": STEPS, **settings},
        )  # fmt: skip
    return match.inputs, match.targets


def cell(
    attacker: str, rate: float, steps: int, seeds: int, trained: bool = False
) -> dict[str, Any]:
    """All trials of one cell, digit by digit within a seed."""
    trials = [
        trial(attacker, rate, steps, digit, seed, trained)
        for seed in range(seeds)
        for digit in range(PICTURES)
    ]
    columns = {name: [t[name] for t in trials] for name in ("psnr", "ssim", "label")}
    where = {"attacker": attacker, "learning_rate": rate, "local_steps": steps, "seeds": seeds}
    return {**where, "trained": trained, **columns}


def different(attacker: str, rate: float, trained: bool) -> dict[str, Any]:
    """Ten digits, another in each step, twice in each of three networks.

    The unaware search takes the update for a batch's gradient; labels and order are told to the
    aware one alone, which has no use for its steps without them.
    """
    found: list[list[float]] = []
    for seed in range(SEEDS):
        net, scores = network(seed, trained), []
        for first in (0, 10):
            x, y = gi.data.digits(range(first, first + 10))
            update = gi.observe(net, CE, x, y, local_steps=10, learning_rate=rate, batch_size=1)
            told = {"targets": y} if attacker == "aware" else {}
            source = torch.Generator().manual_seed(first + seed)
            answer, _ = attack(attacker, net, update, source, steps=20, **told)
            scores += paired(answer, x)
        found.append(scores)
    return {"attacker": attacker, "learning_rate": rate, "trained": trained, "psnr": found}


def paired(found: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """PSNR of each picture, by the best pairing."""
    shown = gi.scoreboard.matched(found.nan_to_num(0.5).clamp(0, 1), truth)
    pairs = zip(shown, truth.double(), strict=True)
    return [round(gi.metrics.psnr(a, b), 1) for a, b in pairs]


def of_size(size: int) -> dict[str, Any]:
    """A batch of this size in five networks, fresh and trained: how much is found, and learned.

    The rate is the one of RATES that teaches most in a network of its own; every size gets as many
    rounds.
    """
    x, y, held_x, held_y = shuffled()

    def sigmoid(seed: int) -> nn.Module:
        source = torch.Generator().manual_seed(1000 + seed)
        return gi.models.mlp((64, 24, 10), "sigmoid", generator=source)

    def taught(rate: float, seed: int) -> nn.Module:
        source = torch.Generator().manual_seed(seed)
        return gi.design.train(
            sigmoid(seed), CE, x, y, steps=2 * ROUNDS, batch_size=size, learning_rate=rate,
            generator=source,
        )  # fmt: skip

    rate = max(RATES, key=lambda rate: gi.design.accuracy(taught(rate, 999), x, y))
    nets = [taught(rate, seed) for seed in range(NETS)]
    scores = [round(gi.design.accuracy(net, held_x, held_y), 4) for net in nets]
    cell: dict[str, Any] = {"size": size, "rate": rate, "accuracy": scores}
    for when, group in (("fresh", [sigmoid(seed) for seed in range(NETS)]), ("trained", nets)):
        cell[when] = []
        for seed, net in enumerate(group):
            victims = slice(seed * size, (seed + 1) * size)
            truth = held_x[victims]
            update = gi.observe(net, CE, truth, held_y[victims])
            match = gi.optimization.match_gradients(
                net, update, (1, 8, 8), CE, method="idlg", steps=10,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            cell[when].append(paired(match.inputs, truth))
    return cell


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
        "accuracy": [],
        "batches": [],
        "different": [],
    }


def _key(part: str, cell: dict[str, Any]) -> str:
    return "/".join([part, *(str(v) for v in cell.values() if not isinstance(v, list))])


def main(again: bool = False, only: str = "") -> None:
    """Fill in the cells that are missing, or that are to be measured again."""
    data = load()
    for part in ("accuracy", "batches", "different", "cells") if again else ():
        data[part] = [cell for cell in data[part] if only not in _key(part, cell)]
    names = ("attacker", "learning_rate", "local_steps", "seeds", "trained")
    for rate, steps, batch in SCHEDULES:
        known = [list(c.values())[:3] for c in data["accuracy"]]
        if [rate, steps, batch] not in known:
            where = {"learning_rate": rate, "local_steps": steps, "batch_size": batch}
            data["accuracy"].append({**where, "accuracy": accuracies(rate, steps, batch)})
            write_whole(FILE, json.dumps(data, indent=1) + "\n")
    for size in SIZES:
        if size not in [c["size"] for c in data["batches"]]:
            data["batches"].append(of_size(size))
            write_whole(FILE, json.dumps(data, indent=1) + "\n")
            print("batch", size, data["batches"][-1]["accuracy"], flush=True)
    for key in DIFFERENT:
        known = [(c["attacker"], c["learning_rate"], c["trained"]) for c in data["different"]]
        if key not in known:
            data["different"].append(different(*key))
            write_whole(FILE, json.dumps(data, indent=1) + "\n")
            print("different", key, data["different"][-1]["psnr"], flush=True)
    done = {tuple(c[name] for name in names) for c in data["cells"]}
    for key in [c for c in CELLS if c not in done]:
        data["cells"].append(cell(*key))
        FILE.parent.mkdir(exist_ok=True)
        write_whole(FILE, json.dumps(data, indent=1) + "\n")
        print(key, gi.metrics.success_rate(p > 20 for p in data["cells"][-1]["psnr"]), flush=True)


def measure(options: Options) -> int:
    """As a section of ``python -m benchmarks``."""
    main(options.again, options.only)
    return 0

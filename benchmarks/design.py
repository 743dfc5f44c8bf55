"""Accuracy of a network against what its gradient gives away: what chapter design draws from.

Usage: python -m benchmarks design          (every cell that the data file lacks; resumable)

Each cell is an architecture and a seed: trained on 1500 of scikit-learn's digits and judged on the
other 297, then attacked on 3 of those, at its first weights and at its last. The file is written
after each cell.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi

FILE = Path(__file__).parents[1] / "book" / "data" / "design.json"
LOSS, SHAPE = nn.CrossEntropyLoss(), (1, 8, 8)
SEEDS, VICTIMS, TRAINING = 3, 3, 1500
STEPS, BATCH, RATE = 800, 50, 0.2

# filters of each 3x3 convolution, the first of stride 2; or hidden units of dense layers
DESIGNS: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"conv {f}": ("conv", (f,)) for f in (1, 2, 3, 4, 8, 16)},
    **{f"conv {f}-32": ("conv", (f, 32)) for f in (1, 2, 4)},
    **{f"dense {h}": ("dense", (h,)) for h in (1, 4, 16, 64)},
    **{f"depth {d}": ("conv", (8,) * d) for d in (2, 4, 6)},
}


def network(name: str, seed: int) -> nn.Sequential:
    """Build a design with weights of its own seed, float64."""
    kind, sizes = DESIGNS[name]
    torch_generator = torch.Generator().manual_seed(100 + seed)
    if kind == "dense":
        model = gi.models.mlp([64, *sizes, 10], "tanh", generator=torch_generator)
        return model.double()
    layers: list[nn.Module] = []
    channels = 1
    for place, filters in enumerate(sizes):
        layers += [nn.Conv2d(channels, filters, 3, 1 if place else 2, 1), nn.LeakyReLU(0.2)]
        channels = filters
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 10))
    for parameter in model.parameters():
        limit = (parameter[0].numel() if parameter.dim() > 1 else 16) ** -0.5
        parameter.data.uniform_(-limit, limit, generator=torch_generator)
    return model.double()


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffle the digits once and cut them into training and test samples."""
    x, y = gi.data.digits(dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def attack(model: nn.Module, x: Tensor, y: Tensor, examples: Tensor) -> dict[str, Any]:
    """Recover one digit from its gradient, and guess what rank hides from public digits."""
    update = gi.observe(model, LOSS, x, y)
    try:
        found = gi.recover(model, update, SHAPE, LOSS)
    except gi.errors.GradientInversionError as error:
        return {"exact": False, "psnr": None, "prior": None, "error": type(error).__name__}
    cell = {"exact": found.exact, "psnr": round(min(gi.metrics.psnr(found.inputs, x), 300.0), 1)}
    likely = found.inputs
    if not found.exact and isinstance(model[0], nn.Conv2d):  # type: ignore[index]
        likely = gi.design.most_likely_input(model, found, LOSS, examples)  # type: ignore[arg-type]
    return {**cell, "prior": round(min(gi.metrics.psnr(likely.clamp(0, 1), x), 300.0), 1)}


def cell(name: str, seed: int) -> dict[str, Any]:
    """Train and attack one design with one seed."""
    x, y, test_x, test_y = data()
    model = network(name, seed)
    trained = gi.design.train(
        model.float(), LOSS, x.float(), y, steps=STEPS, batch_size=BATCH, learning_rate=RATE,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    victims = range(seed * VICTIMS, (seed + 1) * VICTIMS)
    states = {"first": network(name, seed), "last": trained.double()}
    attacks = {
        when: [attack(net, test_x[i : i + 1], test_y[i : i + 1], x) for i in victims]
        for when, net in states.items()
    }
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": round(gi.design.accuracy(trained, test_x, test_y), 4),
        **attacks,
    }


def baselines() -> dict[str, float]:
    """PSNR of the mean training digit, and of the nearest training digit of the same class."""
    x, y, test_x, test_y = data()
    mean, nearest = [], []
    for i in range(SEEDS * VICTIMS):
        same = x[y == test_y[i]]
        closest = same[(same - test_x[i]).flatten(1).norm(dim=1).argmin()]
        mean.append(gi.metrics.psnr(x.mean(0), test_x[i]))
        nearest.append(gi.metrics.psnr(closest, test_x[i]))
    return {"mean": round(sum(mean) / len(mean), 1), "nearest": round(sum(nearest) / len(mean), 1)}


def main() -> None:
    """Fill in the cells that are missing."""
    done: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    versions = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    done |= {"versions": versions, "seeds": SEEDS, "victims": VICTIMS, "steps": STEPS}
    done["baselines"] = baselines()
    for name in DESIGNS:
        for seed in range(SEEDS):
            key = f"{name}/{seed}"
            if key not in done["cells"]:
                done["cells"][key] = cell(name, seed)
                FILE.write_text(json.dumps(done, indent=1) + "\n")
                found = done["cells"][key]
                print(key, found["parameters"], found["accuracy"], found["last"][0], flush=True)


def measure(_: object) -> int:
    """As a section of ``python -m benchmarks``."""
    main()
    return 0


if __name__ == "__main__":
    main()

"""Accuracy of a network against what its gradient gives away: what chapter design draws from.

Usage: python -m benchmarks design          (every cell that the data file lacks; resumable)

Each cell is an architecture and a seed: trained on 1500 of scikit-learn's digits and judged on the
other 297, then attacked on 3 of those, at its first weights and at its last; or trained to tell
faces from other crops, on 140 of scikit-image's, judged on the other 60 and attacked on 4 of those.
The file is written after each cell.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine.files import write_whole

from .measure import Options

FILE = Path(__file__).parents[1] / "book" / "data" / "design.json"
LOSS = nn.CrossEntropyLoss()
SEEDS, VICTIMS, TRAINING = 3, 3, 1500
FACE_SEEDS, FACE_VICTIMS, FACE_TRAINING = 5, 4, 140
STEPS, BATCH, RATE = 800, 50, 0.2

# filters of each 3x3 convolution, the first of stride 2 (tiny: 4); hidden units of dense layers;
# for faces, filters of one 5x5 convolution of stride 4
DESIGNS: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"conv {f}": ("conv", (f,)) for f in (1, 2, 3, 4, 8, 16)},
    **{f"conv {f}-32": ("conv", (f, 32)) for f in (1, 2, 4)},
    **{f"dense {h}": ("dense", (h,)) for h in (1, 4, 16, 64)},
    **{f"depth {d}": ("conv", (8,) * d) for d in (2, 4, 6)},
    "tiny": ("tiny", (1,)),
    **{f"face conv {f}": ("face", (f,)) for f in (1, 2, 4, 6, 8, 12, 16)},
    "face dense 1": ("face dense", (1,)),
}


def seeds(name: str) -> int:
    """Seeds of a design."""
    return FACE_SEEDS if name.startswith("face") else SEEDS


def network(name: str, seed: int) -> nn.Sequential:
    """Build a design with weights of its own seed, float64."""
    kind, sizes = DESIGNS[name]
    torch_generator = torch.Generator().manual_seed(100 + seed)
    if kind.endswith("dense"):
        ends = (625, 2) if kind == "face dense" else (64, 10)
        model = gi.models.mlp([ends[0], *sizes, ends[1]], "tanh", generator=torch_generator)
        return model.double()
    layers: list[nn.Module] = []
    kernel, stride, padding = {"face": (5, 4, 0), "tiny": (3, 4, 1)}.get(kind, (3, 2, 1))
    channels = 1
    for filters in sizes:
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding), nn.LeakyReLU(0.2)]
        channels, stride = filters, 1
    places, classes = {"face": (36, 2), "tiny": (4, 10)}.get(kind, (16, 10))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(places * channels, classes))
    for parameter in model.parameters():
        limit = (parameter[0].numel() if parameter.dim() > 1 else 16) ** -0.5
        parameter.data.uniform_(-limit, limit, generator=torch_generator)
    return model.double()


def data(name: str = "digits") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffle a design's pictures once and cut them into training and test samples."""
    faces = name.startswith("face")
    x, y = (gi.data.faces if faces else gi.data.digits)(dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order], y[order], FACE_TRAINING if faces else TRAINING
    return x[:cut], y[:cut], x[cut:], y[cut:]


def attack(model: nn.Module, x: Tensor, y: Tensor, examples: Tensor) -> dict[str, Any]:
    """Recover one digit from its gradient, and guess what rank hides from public digits."""
    update = gi.observe(model, LOSS, x, y)
    try:
        found = gi.recover(model, update, tuple(x.shape[1:]), LOSS)
    except gi.errors.GradientInversionError as error:
        return {"exact": False, "psnr": None, "prior": None, "error": type(error).__name__}
    cell = {"exact": found.exact, "psnr": round(min(gi.metrics.psnr(found.inputs, x), 300.0), 1)}
    likely = found.inputs
    if not found.exact and isinstance(model[0], nn.Conv2d):  # type: ignore[index]
        likely = gi.design.most_likely_input(model, found, LOSS, examples)  # type: ignore[arg-type]
    return {**cell, "prior": round(min(gi.metrics.psnr(likely.clamp(0, 1), x), 300.0), 1)}


def cell(name: str, seed: int) -> dict[str, Any]:
    """Train and attack one design with one seed."""
    x, y, test_x, test_y = data(name)
    model = network(name, seed)
    trained = gi.design.train(
        model.float(), LOSS, x.float(), y, steps=STEPS, batch_size=BATCH, learning_rate=RATE,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    count = FACE_VICTIMS if name.startswith("face") else VICTIMS
    victims = range(seed * count, (seed + 1) * count)
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


def baselines(name: str = "digits") -> dict[str, float]:
    """PSNR of the mean training picture, and of the nearest training picture of the same class."""
    x, y, test_x, test_y = data(name)
    count = FACE_SEEDS * FACE_VICTIMS if name.startswith("face") else SEEDS * VICTIMS
    mean, nearest = [], []
    for i in range(count):
        same = x[y == test_y[i]]
        closest = same[(same - test_x[i]).flatten(1).norm(dim=1).argmin()]
        mean.append(gi.metrics.psnr(x.mean(0), test_x[i]))
        nearest.append(gi.metrics.psnr(closest, test_x[i]))
    return {"mean": round(sum(mean) / count, 1), "nearest": round(sum(nearest) / count, 1)}


def main(options: Options) -> None:
    """Fill in the cells that are missing, or that are to be measured again."""
    done: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    versions = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    done |= {"versions": versions, "seeds": SEEDS, "victims": VICTIMS, "steps": STEPS}
    done |= {"baselines": baselines(), "face_baselines": baselines("face")}
    if options.again:
        done["cells"] = {k: c for k, c in done["cells"].items() if options.only not in k}
    for name in DESIGNS:
        for seed in range(seeds(name)):
            key = f"{name}/{seed}"
            if key not in done["cells"]:
                done["cells"][key] = cell(name, seed)
                write_whole(FILE, json.dumps(done, indent=1) + "\n")
                found = done["cells"][key]
                print(key, found["parameters"], found["accuracy"], found["last"][0], flush=True)


def measure(options: Options) -> int:
    """As a section of ``python -m benchmarks``."""
    main(options)
    return 0

"""A leaderboard without a server: ``leaderboard.py make FOLDER`` and ``leaderboard.py score``.

``make`` hides a digit in a client's update; ``score`` reads submissions, JSON files with a picture,
the PSNR that it is claimed to have, and how sure its authors are: both count.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gradinv_edu as gi

BEST = 60.0  # dB: more is not seen
PROTOCOLS = ("plain", "adam", "pruned", "noise")
TASK = """# Whose digit?

A client trained `gi.models.mlp([64, 120, 10], dtype=torch.float64)`, whose weights are
`model.safetensors`, on one digit of 8×8 pixels in [0, 1], with softmax cross-entropy, and sent
`update.safetensors` (`gi.Update.load`). Protocol: {protocol}.

Hand in NAME.json: {{"picture": [64 numbers], "psnr": what it has at least, "sure": 0 to 1}}.
"""


def make(folder: Path, seed: int, protocol: str) -> None:
    """Write a case: a public folder to hand out, and a private one."""
    g = torch.Generator().manual_seed(seed)
    model = gi.models.mlp([64, 120, 10], dtype=torch.float64, generator=g)
    picture = gi.data.digit(int(torch.randint(0, 1700, (), generator=g)), dtype=torch.float64)
    label = torch.randint(0, 10, (1,), generator=g)
    adam = {"optimizer": "adam", "learning_rate": 0.01} if protocol == "adam" else {}
    update = gi.observe(model, nn.CrossEntropyLoss(), picture, label, **adam)
    if protocol == "pruned":
        update = gi.pruning.keep_random(update, 0.2, generator=g)
    if protocol == "noise":
        update = gi.noise.add_noise(update, 1e-3, generator=g)
    public, private = folder / "public", folder / "private"
    for place in (public, private):
        place.mkdir(parents=True)
    save_file(model.state_dict(), str(public / "model.safetensors"))
    update.save(public / "update.safetensors")
    (public / "README.md").write_text(TASK.format(protocol=protocol), encoding="utf-8")
    save_file({"picture": picture.flatten()}, str(private / "truth.safetensors"))


def points(submission: dict[str, Any], truth: Tensor) -> tuple[float, float]:
    """Score a submission: what it found, and what was claimed of it; and its PSNR."""
    picture = torch.tensor(submission["picture"], dtype=torch.float64).flatten()
    claimed, sure = float(submission["psnr"]), float(submission["sure"])
    sound = picture.shape == truth.shape and bool(picture.isfinite().all())
    if not (sound and 0 <= sure <= 1 and math.isfinite(claimed)):
        raise ValueError(f"64 finite numbers, a PSNR, and a number from 0 to 1: got {sure}")
    found = gi.metrics.psnr(picture.reshape(1, 1, 8, 8), truth.reshape(1, 1, 8, 8))
    kept = 1 - (1 - sure) ** 2 if found >= claimed else -(sure**2)
    shares = [min(max(value, 0.0), BEST) / BEST for value in (found, claimed)]
    return shares[0] + shares[1] * kept if found >= claimed else shares[0] + kept, found


def board(folder: Path, files: Sequence[Path]) -> list[tuple[str, float, float]]:
    """Score files: name, points and PSNR, best first; what cannot be read has none."""
    truth = load_file(str(folder / "private" / "truth.safetensors"))["picture"]
    rows = []
    for file in files:
        try:
            rows.append((file.stem, *points(json.loads(file.read_text("utf-8")), truth)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            rows.append((file.stem, 0.0, float("nan")))
    return sorted(rows, key=lambda row: -row[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a case, or print the board."""
    parser = argparse.ArgumentParser(prog="leaderboard.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making, scoring = commands.add_parser("make"), commands.add_parser("score")
    for command in (making, scoring):
        command.add_argument("folder", type=Path)
    making.add_argument("--seed", type=int, default=1)
    making.add_argument("--protocol", choices=PROTOCOLS, default="plain")
    scoring.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "make":
        make(options.folder, options.seed, options.protocol)
        return 0
    for place, (name, score, found) in enumerate(board(options.folder, options.files), start=1):
        print(f"{place:>3}. {name:<24} {score:6.3f} points  {found:6.1f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

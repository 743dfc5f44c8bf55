"""CNN6 while it learns: what chapter 10 draws from.

Usage: python -m benchmarks trained          (every cell that the data file lacks; resumable)

The network learns which of eight photographs a piece of 32×32 pixels was cut from. After 0, 1 and
10 epochs one gradient is taken of each of twenty pieces that it was not trained on, in float32 and
in float64, and the recursion is run. The file is written after each cell.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import GradientInversionError

from .measure import Options

FILE = Path(__file__).parents[1] / "book" / "data" / "learning.json"
LOSS, EPOCHS, PIECES, SEEN = nn.CrossEntropyLoss(), (0, 1, 10), 320, 20
NAMES = ("astronaut", "cat", "coffee", "rocket", "retina", "china", "flower", "brick")


def pieces(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut so many pieces of 32×32 from each photograph at half its size; labels say which."""
    source, found = torch.Generator().manual_seed(seed), []
    for name in NAMES:
        whole = gi.data.photo(name, size=128)[0]
        corners = torch.randint(0, 97, (count, 2), generator=source).tolist()
        found += [whole[:, i : i + 32, j : j + 32] for i, j in corners]
    return torch.stack(found), torch.arange(len(NAMES)).repeat_interleave(count)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One pass over the pieces for training, in batches of 32."""
    x, y = pieces(PIECES, 0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(32):
        optimizer.zero_grad()
        LOSS(model(x[batch]), y[batch]).backward()
        optimizer.step()


def cell(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Recover each piece from its gradient."""
    net = copy.deepcopy(model).to(dtype)
    x, y = pieces(SEEN, 1)
    chosen = torch.arange(len(x)).reshape(len(NAMES), SEEN)[:, 0 : SEEN // len(NAMES) + 1]
    told: list[dict[str, Any]] = []
    for place in chosen.T.flatten()[:SEEN].tolist():
        picture, label = x[place : place + 1].to(dtype), y[place : place + 1]
        update = gi.observe(net, LOSS, picture, label)
        with torch.no_grad():
            p = net(picture).softmax(dim=1)
        k = float((p - nn.functional.one_hot(label, 10)).norm())
        entry: dict[str, Any] = {"k": k, "label": NAMES[int(label)]}
        began = time.process_time()
        try:
            found = gi.recover(net, update, (3, 32, 32), LOSS)
        except GradientInversionError as error:
            entry |= {"dB": None, "exact": False, "error": type(error).__name__}
        else:
            entry |= {
                "dB": gi.metrics.psnr(found.inputs, picture.double()),
                "exact": bool(found.exact),
                "turned": sum(layer.turned for layer in found.layers),
                "condition": max(layer.solution.condition for layer in found.layers),
                "seconds": time.process_time() - began,
            }
        told.append(entry)
    return {"pieces": told, "k": median(entry["k"] for entry in told)}


def accuracy(model: nn.Module) -> float:
    """On pieces that the network was not trained on."""
    x, y = pieces(SEEN, 1)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


def measure(options: Options) -> int:
    """Train as far as cells are missing, and measure these."""
    stored = json.loads(FILE.read_text()) if FILE.exists() and not options.again else {}
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    wanted = [(done, name) for done in EPOCHS for name in dtypes]
    missing = [(d, n) for d, n in wanted if f"{n}/{d}" not in stored and options.only in f"{n}/{d}"]
    model, trained = gi.models.cnn6(outputs=10), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for done, name in missing:
        while trained < done:
            trained += 1
            epoch(model, optimizer, trained)
        key = f"{name}/{done}"
        stored[key] = cell(model, dtypes[name]) | {"accuracy": accuracy(model)}
        FILE.write_text(json.dumps(stored, indent=1) + "\n")
        print(key, json.dumps({k: v for k, v in stored[key].items() if k != "pieces"}))
    return 0

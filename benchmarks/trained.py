"""Networks that have learned: CNN6 for chapter 10, torchvision's for the zoo.

Usage: python -m benchmarks trained | learned    (every cell that the data file lacks; resumable)

CNN6 learns which of eight photographs a piece of 32×32 pixels was cut from. After 0, 1 and 10
epochs one gradient is taken of each of twenty pieces that it was not trained on, in float32 and in
float64, and the recursion is run. The file is written after each cell.

Torchvision's networks learn that, or MNIST's digits; then the same, beside the network as drawn.
Their weights lie in the system's folder for temporary files, and are trained again where they do
not.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine.files import write_whole
from gradinv_edu.errors import GradientInversionError

from .measure import Job, Options, fill, rounded

FILE = Path(__file__).parents[1] / "book" / "data" / "learning.json"
LOSS, EPOCHS, PIECES, SEEN = nn.CrossEntropyLoss(), (0, 1, 10), 320, 20
SETS = ("crops", "digits")  # of photographs, of MNIST
LEARNING, BLOCK = 3, 5  # epochs of torchvision's networks; samples a cell
LEARNED = ("resnet18",)
NAMES = ("astronaut", "cat", "coffee", "rocket", "retina", "china", "flower", "brick")


def pieces(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut so many pieces of 32×32 from each photograph at half its size; labels say which."""
    source, found = torch.Generator().manual_seed(seed), []
    for name in NAMES:
        whole = gi.data.photo(name, size=128)[0]
        corners = torch.randint(0, 97, (count, 2), generator=source).tolist()
        found += [whole[:, i : i + 32, j : j + 32] for i, j in corners]
    return torch.stack(found), torch.arange(len(NAMES)).repeat_interleave(count)


def digits(train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's at 32×32 in three equal channels; the tests in an order of their own."""
    x, y = gi.data.mnist(train=train)
    if not train:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        x, y = x[order], y[order]
    return nn.functional.interpolate(x, 32, mode="bilinear").expand(-1, 3, -1, -1), y


def crops(train: bool) -> tuple[Tensor, Tensor]:
    """Pieces of all photographs in turn."""
    x, y = pieces(PIECES if train else SEEN, 0 if train else 1)
    turn = torch.arange(len(x)).reshape(len(NAMES), -1).T.flatten()
    return x[turn], y[turn]


def epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, x: Tensor, y: Tensor
) -> None:
    """One pass in batches of 32."""
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
            epoch(model, optimizer, trained, *pieces(PIECES, 0))
        key = f"{name}/{done}"
        stored[key] = cell(model, dtypes[name]) | {"accuracy": accuracy(model)}
        write_whole(FILE, json.dumps(stored, indent=1) + "\n")
        print(key, json.dumps({k: v for k, v in stored[key].items() if k != "pieces"}))
    return 0


# --- torchvision's networks -----------------------------------------------------------------------


def learned(options: Options) -> int:
    """As drawn and after training, float64 before float32, a few samples a cell."""
    jobs = {
        f"{name}/{data}/{state}/{dtype}/{first}": Job(
            "trained", "learned_one",
            {"name": name, "data": data, "state": state, "dtype": dtype, "first": first},
            limit=3600.0,
        )
        for dtype in ("float64", "float32") for first in range(0, SEEN, BLOCK)
        for name in LEARNED for data in SETS for state in ("trained", "fresh")
    }  # fmt: skip
    fill("learned", jobs, options)
    return 0


def network(name: str, data: str, state: str) -> nn.Module:
    """With the weights that torchvision draws, or those after some epochs, in eval mode."""
    from .zoo import network as drawn

    net = drawn(name, 32, dtype="float32")
    if state == "fresh":
        return net
    file = Path(tempfile.gettempdir()) / "gradinv-edu" / f"{name}_{data}_{LEARNING}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file))
        return net.eval()
    x, y = crops(True) if data == "crops" else digits(True)
    optimizer = torch.optim.Adam(net.train().parameters(), lr=1e-3)
    for done in range(LEARNING):
        epoch(net, optimizer, done, x, y)
    file.parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), file)
    return net.eval()


def learned_one(name: str, data: str, state: str, dtype: str, first: int) -> dict[str, Any]:
    """Accuracy, and of each sample the loss, the size of ``k`` and what the recovery reached."""
    from .zoo import Spent, within

    x, y = crops(False) if data == "crops" else digits(False)
    net = network(name, data, state)
    with torch.no_grad():
        right = float((net(x[:400]).argmax(dim=1) == y[:400]).double().mean())
    net, told = net.to(getattr(torch, dtype)), list[dict[str, Any]]()
    for place in range(first, first + BLOCK):
        picture, label = x[place : place + 1].to(getattr(torch, dtype)), y[place : place + 1]
        update = gi.observe(net, LOSS, picture, label)
        with torch.no_grad():
            z = net(picture)
        k = z.softmax(dim=1) - nn.functional.one_hot(label, z.shape[1])
        run = {"loss": rounded(float(LOSS(z, label))), "k": rounded(float(k.norm()))}
        began = time.process_time()
        try:
            with within(60):
                found = gi.recover(net, update, (3, 32, 32), LOSS)
            decibel = gi.metrics.psnr(found.inputs, picture.double())
            run |= {"psnr": round(min(decibel, 400.0), 1), "exact": found.exact}
        except GradientInversionError as error:
            run |= {"ended": type(error).__name__, "reason": str(error)}
        except Spent:
            run |= {"ended": "not finished"}
        told.append(run | {"seconds": rounded(time.process_time() - began)})
    return {"accuracy": rounded(right), "runs": told}

"""How a recovery grows: with pixels, depth, width, batch and precision, each cell by itself.

A series varies one thing about ``photo_cnn``, the network of chapter recursion that gives
photographs of ordinary size away. Each cell has CPU seconds, wall seconds, peak memory,
iterations and error, what each layer took, and one forward and backward pass of the same net
in the same dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import store
from .measure import Job, Options, fill, forget_peak, memory, rounded, seconds, typical

SECTION = "scaling"
SIZES = (16, 24, 32, 48, 64, 96, 128, 224, 512)
LARGEST = 1024  # in float64 alone
DTYPES = ("float32", "float64")
# beside 4 layers, width 1 and one picture, which the cell of 32×32 in float64 is
DEPTHS = (2, 3, 6, 8, 10, 12)
WIDTHS = (1.5, 2.0, 3.0, 4.0)
BATCHES = (2, 4, 8)
SURPLUS = (1.1, 1.2, 1.35, 1.5, 2.0)  # weight equations for each unknown, at 112×112
PHOTO_SURPLUS = 1.7  # at 224×224
EVEN = 2  # weight equations for each unknown, at every one of these:
EVEN_SIZES = (16, 32, 64, 128, 224)
COARSE = ("float16", "bfloat16")  # at 64×64
DENSE = (8, 12, 16, 20)
THREADS = 2  # at 128×128
FILTERS = (16, 72, 80, 96)  # of photo_cnn; more layers repeat the third
PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina", "china", "flower", "brick")


def main(options: Options) -> int:
    fill(SECTION, jobs(), options)
    for dtype in DTYPES:
        measured = store.cells(SECTION)
        found = [c for k, c in measured.items() if k.startswith(f"pixels/{dtype}/")]
        if len(found) > 2:
            grown = growth([c["size"] ** 2 for c in found], [c["seconds"] for c in found])
            print(f"CPU seconds grow as pixels^{grown}, from {dtype}")
    return 0


def jobs() -> dict[str, Job]:
    """Every cell by its key, ``series/value``; small pictures first, the GPU's last."""
    found = {
        f"pixels/{dtype}/{size}": _job(size=size, dtype=dtype) for size in SIZES for dtype in DTYPES
    }
    found[f"pixels/float64/{LARGEST}"] = _job(size=LARGEST)
    found |= {f"depth/{depth}": _job(size=32, depth=depth) for depth in DEPTHS}
    found |= {f"width/{width:g}": _job(size=32, width=width) for width in WIDTHS}
    found |= {f"batch/{batch}": _job(size=32, batch=batch) for batch in BATCHES}
    found |= {f"surplus/{s:g}": _job(size=112, surplus=s) for s in SURPLUS}
    found[f"surplus/{PHOTO_SURPLUS:g}"] = _job(size=224, surplus=PHOTO_SURPLUS)
    found |= {f"even/{size}": _job(size=size, surplus=EVEN) for size in EVEN_SIZES}
    found |= {f"dtype/{dtype}": _job(size=64, dtype=dtype) for dtype in COARSE}
    found[f"threads/{THREADS}"] = _job(size=128, threads=THREADS)
    found |= {f"dense/{size}": Job("scaling", "against_dense", {"size": size}) for size in DENSE}
    found = dict(sorted(found.items(), key=lambda item: item[1].arguments["size"]))
    if _cuda():
        found |= {
            f"gpu/{dtype}/{size}": _job(size=size, dtype=dtype, device="cuda")
            for size in SIZES for dtype in DTYPES
        }  # fmt: skip
    return found


def _job(threads: int = 1, **arguments: Any) -> Job:
    limit = 600 if arguments["size"] < 256 else 3600
    return Job("scaling", "cell", arguments, threads, limit)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# --- in the child -------------------------------------------------------------------------------


def network(
    size: int,
    depth: int = 4,
    width: float = 1.0,
    dtype: str = "float64",
    surplus: float | None = None,
) -> Any:
    """``photo_cnn``, with other depths and widths: ``depth`` convolutions and a dense layer.

    With ``surplus``, each layer has filters for so many weight equations an unknown.
    """
    import torch
    from torch import nn

    filters = [*FILTERS[:3][:depth], *[FILTERS[2]] * (depth - 4), *FILTERS[3:][: depth - 3]]
    layers: list[nn.Module] = []
    channels, side = 3, size
    for place, wide in enumerate(int(width * f) for f in filters):
        kernel, stride = (4, 2) if place < 2 else (3, 1)
        wide = wide if surplus is None else round(surplus * channels * stride**2)
        layers += [nn.Conv2d(channels, wide, kernel, stride, 1, bias=False), nn.LeakyReLU(0.2)]
        channels, side = wide, side // stride
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 10, bias=False))
    source = torch.Generator().manual_seed(0)
    net = net.double()
    for parameter in net.parameters():
        limit = 1 / math.sqrt(parameter[0].numel())
        parameter.data.uniform_(-limit, limit, generator=source)
    return net.to(getattr(torch, dtype))


def pictures(size: int, batch: int) -> Any:
    """Photographs, float64; the astronaut alone for one."""
    import torch

    import gradinv_edu as gi

    return torch.cat([gi.data.photo(name, size, dtype=torch.float64) for name in PHOTOS[:batch]])


def cell(
    size: int,
    depth: int = 4,
    width: float = 1.0,
    batch: int = 1,
    dtype: str = "float64",
    device: str = "cpu",
    surplus: float | None = None,
) -> dict[str, Any]:
    """One recovery and all that is counted about it."""
    import torch
    from torch import nn

    import gradinv_edu as gi

    loss = nn.CrossEntropyLoss()
    warm(dtype, device)
    net = network(size, depth, width, dtype, surplus).to(device)
    truth = pictures(size, batch).to(device)
    inputs, targets = (
        truth.to(getattr(torch, dtype)),
        torch.arange(2, 2 + batch, device=device),
    )
    once = clock(device)(lambda: loss(net(inputs), targets).backward())
    update = gi.observe(net, loss, inputs, targets)
    forget_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    found: list[Any] = []
    with timed() as solves:
        spent = seconds(lambda: found.append(recovered(net, update, size, loss, batch)))
    wall = time.perf_counter() - start
    recovery = found[0]
    taken = wall if device != "cpu" else spent
    return {
        "size": size,
        "depth": depth,
        "width": width,
        "batch": batch,
        "surplus": surplus,
        "dtype": dtype,
        "device": device,
        "seconds": rounded(spent),
        "wall": rounded(wall),
        "pass": rounded(once),
        "passes": rounded(taken / once, 3),
        "memory": rounded(memory() - before),
        "iterations": sum(layer.iterations for layer in recovery.layers),
        "exact": recovery.exact,
        "error": rounded(error(recovery.inputs, truth), 3),
        "layers": list(shares(recovery.layers, solves)),
    }


def warm(dtype: str, device: str = "cpu") -> None:
    """What a process does once only, such as imports, is no part of a cell: do it first."""
    import torch

    import gradinv_edu as gi

    loss, kind = torch.nn.CrossEntropyLoss(), getattr(torch, dtype)
    net = gi.models.lenet((3, 16, 16), dtype=kind, device=device, bias=False)
    x, target = pictures(16, 1).to(device, kind), torch.tensor([3], device=device)
    recovered(net, gi.observe(net, loss, x, target), 16, loss, 1)


def recovered(net: Any, update: Any, size: int, loss: Any, batch: int) -> Any:
    import gradinv_edu as gi

    return gi.recover(net, update, (3, size, size), loss, batch_size=batch)


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """CPU seconds on a CPU; on a GPU, seconds until it is done."""
    if device == "cpu":
        return typical
    import torch

    def synchronised(call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(9):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 9

    return synchronised


def error(found: Any, truth: Any) -> float:
    """Largest relative error over a batch; its order is that of the labels, as the truth's is."""
    import gradinv_edu as gi

    return max(gi.metrics.relative_error(a, b) for a, b in zip(found, truth, strict=True))


@contextmanager
def timed() -> Iterator[list[dict[str, float]]]:
    """CPU seconds of each layer's solve, of its test of the rank too, while the context lasts."""
    from gradinv_edu.engine import solve as solver
    from gradinv_edu.systems import LayerSystem

    notes: list[dict[str, float]] = []
    solve, rank_test = LayerSystem.solve, solver.rank_test
    tests: list[float] = []

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        tests.clear()
        start = time.process_time()
        solution = solve(self, *args, **options)
        spent = time.process_time() - start
        notes.append({"seconds": spent, "test": sum(tests), "residual": solution.residual})
        return solution

    def tested(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        answer = rank_test(*args, **options)
        tests.append(time.process_time() - start)
        return answer

    LayerSystem.solve, solver.rank_test = noted, tested  # type: ignore[method-assign]
    try:
        yield notes
    finally:
        LayerSystem.solve, solver.rank_test = solve, rank_test  # type: ignore[method-assign]


def shares(reports: Any, solves: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Layers solved iteratively or by SVD, with the time of the solve of the same residual."""
    for report in reports:
        note = next((n for n in solves if n["residual"] == report.residual), None)
        if note is not None:
            yield {
                "name": report.name,
                "unknowns": report.unknowns,
                "equations": report.equations,
                "iterations": report.iterations,
                "seconds": rounded(note["seconds"], 3),
                "test": rounded(note["test"], 3),
            }


def against_dense(size: int) -> dict[str, Any]:
    """The same layers' systems, without a matrix and as dense least squares by QR."""
    import torch

    import gradinv_edu as gi

    loss = torch.nn.CrossEntropyLoss()
    warm("float64")
    net, truth = network(size), pictures(size, 1)
    update = gi.observe(net, loss, truth, torch.tensor([3]))
    layers: list[dict[str, Any]] = []
    solve = gi.systems.LayerSystem.solve

    def both(self: Any, outputs: Any, gradient: Any, **options: Any) -> Any:
        spent = seconds(lambda: solve(self, outputs, gradient, **{**options, "dense": False}))
        b = self.right_hand_side(outputs, gradient).flat()
        A: list[Any] = []
        written = seconds(lambda: A.append(self.to_dense(scaled=True)))
        solved = seconds(lambda: torch.linalg.lstsq(A[0], b[:, None], driver="gels"))
        layers.append({"unknowns": self.unknowns, "equations": len(b), "seconds": spent,
                       "written": written, "solved": solved})  # fmt: skip
        return solve(self, outputs, gradient, **options)

    gi.systems.LayerSystem.solve = both  # type: ignore[method-assign]
    try:
        recovered(net, update, size, loss, 1)
    finally:
        gi.systems.LayerSystem.solve = solve  # type: ignore[method-assign]
    totals = {k: rounded(sum(x[k] for x in layers)) for k in ("seconds", "written", "solved")}
    ratio = (totals["written"] + totals["solved"]) / totals["seconds"]
    largest = max(x["unknowns"] * x["equations"] for x in layers)
    matrix = rounded(8 * largest / 2**20)
    return {"size": size, **totals, "ratio": rounded(ratio, 3), "matrix": matrix,
            "unknowns": sum(x["unknowns"] for x in layers)}  # fmt: skip


# --- growth -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """``y ∝ x^exponent``, with the ends of the 95 % interval, and on how many points."""

    exponent: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        told = f"{self.exponent:.2f} ({self.low:.2f} to {self.high:.2f})"
        return told.replace("-", "−")


def growth(x: Iterable[float], y: Iterable[float], level: float = 0.95) -> Growth:
    """Least squares on logarithms; the interval is Student's, so the points must be three."""
    from scipy import stats

    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    if len(logs) < 3:
        raise ValueError(f"a slope with an interval needs three points, got {len(logs)}.")
    fit = stats.linregress(*zip(*logs, strict=True))
    reach = float(stats.t.ppf((1 + level) / 2, len(logs) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return Growth(slope, slope - reach, slope + reach, len(logs))


def centre(values: Iterable[float]) -> float:
    """Geometric mean: a fitted line on logarithms goes through those of both axes."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))

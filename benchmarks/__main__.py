"""Import time; recoveries as ratios to one forward and backward pass of the same net; audits.

Usage: python -m benchmarks [import] [recovery] [growth] [resistant] [audit]   (all by default)
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import gradinv_edu as gi

CE = nn.CrossEntropyLoss()
LABEL = torch.tensor([3])


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def import_time(runs: int = 5) -> None:
    """What ``import gradinv_edu`` adds to ``import torch``, in fresh processes."""
    code = (
        "import time, torch; t = time.perf_counter(); import gradinv_edu as gi; gi.recover; "
        "print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", code]
    spent = [float(subprocess.check_output(command)) for _ in range(runs)]
    print(f"import gradinv_edu after torch: {median(spent):.3f} s (median of {runs})")


def one_pass(model: nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass, median of nine."""

    def both() -> None:
        CE(model(x), LABEL).backward()

    both()
    return median(seconds(both) for _ in range(9))


def measure(model: nn.Module, x: torch.Tensor) -> tuple[float, float, gi.Recovery]:
    """CPU seconds of a recovery, its ratio to one pass, and the recovery."""
    update = gi.observe(model, CE, x, LABEL)
    found: list[gi.Recovery] = []
    spent = seconds(lambda: found.append(gi.recover(model, update, tuple(x.shape[1:]), CE)))
    return spent, spent / one_pass(model, x), found[0]


def recovery() -> None:
    """The nets of chapter 6, from float64 and float32 gradients."""
    nets = {
        "cnn6 32": (gi.models.cnn6, 32, {"outputs": 10}),
        "lenet 32": (gi.models.lenet, 32, {"bias": False}),
        "photo_cnn 224": (gi.models.photo_cnn, 224, {}),
    }
    print(f"{'net':<15}{'gradient':>9}{'CPU s':>8}{'passes':>8}{'dB':>7}{'exact':>7}")
    for name, (make, size, options) in nets.items():
        for dtype in (torch.float64, torch.float32):
            model = make((3, size, size), dtype=dtype, **options)
            x = gi.data.photo("astronaut", size, dtype=dtype)
            spent, ratio, found = measure(model, x)
            decibel = gi.metrics.psnr(found.inputs, x.double())
            kind = str(dtype).removeprefix("torch.")
            print(f"{name:<15}{kind:>9}{spent:>8.1f}{ratio:>8.0f}{decibel:>7.0f}{found.exact!s:>7}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.1f} GiB")


def growth(sizes: tuple[int, ...] = (32, 64, 128, 224)) -> None:
    """Exponent of CPU seconds against the number of pixels, by least squares on logarithms."""
    logs = []
    for size in sizes:
        model = gi.models.photo_cnn((3, size, size), dtype=torch.float64)
        spent, ratio, found = measure(model, gi.data.photo("astronaut", size, dtype=torch.float64))
        work = sum(layer.iterations * layer.unknowns for layer in found.layers)
        print(
            f"{size:>4}²: {spent:6.1f} CPU s, {ratio:5.0f} passes, {work:.2e} unknowns × iterations"
        )
        logs.append((2 * torch.tensor(float(size)).log(), torch.tensor(spent).log()))
    x, y = (torch.stack(column) for column in zip(*logs, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    print(f"CPU seconds grow as pixels^{float(slope):.2f}")


def resistant() -> None:
    """CNN6-d, called protected by its ranks: five photographs, ten classes and one logit."""
    for name in ("astronaut", "cat", "coffee", "rocket", "retina"):
        x = gi.data.photo(name, 32, dtype=torch.float64)
        for outputs, loss in ((10, CE), (1, nn.BCEWithLogitsLoss())):
            model = gi.models.cnn6_d(outputs=outputs, dtype=torch.float64)
            label = LABEL if outputs > 1 else (model(x) < 0).double()
            update = gi.observe(model, loss, x, label)
            found: list[gi.Recovery] = []
            spent = seconds(lambda: found.append(gi.recover(model, update, (3, 32, 32), loss)))  # noqa: B023
            decibel = gi.metrics.psnr(found[0].inputs, x)
            print(f"{name:<10}{outputs:>3} outputs {spent:>6.1f} CPU s {decibel:>5.0f} dB, exact: "
                  f"{found[0].exact}")  # fmt: skip


def audits() -> None:
    """CPU seconds and peak memory of audits, each in a process of its own."""
    nets = {
        "cnn6 32": "gi.models.cnn6(outputs=10), (3, 32, 32)",
        "lenet 32": "gi.models.lenet(), (3, 32, 32)",
        "resnet18 224": "torchvision.models.resnet18(weights=None), (3, 224, 224)",
    }
    for name, arguments in nets.items():
        code = (
            "import resource, time, torch, torchvision, gradinv_edu as gi; torch.manual_seed(0); "
            f"t = time.process_time(); gi.audit({arguments}, jacobian=False); "
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20; "
            "print(f'{time.process_time() - t:.1f} CPU s, peak {peak:.1f} GiB')"
        )
        spent = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True)
        print(f"audit of {name}: {spent.strip()}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["import", "recovery", "growth", "resistant", "audit"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    runs = {
        "import": import_time,
        "recovery": recovery,
        "growth": growth,
        "resistant": resistant,
        "audit": audits,
    }
    for name, run in runs.items():
        if name in wanted:
            run()

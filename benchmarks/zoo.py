"""torchvision's classification networks, unmodified: audited, and attacked with photographs.

Section ``zoo`` takes one small member of each family at three sizes; section ``rates`` repeats the
recovery of a few over photographs and draws of the weights. A cell has a budget of CPU seconds;
what it does not finish is a result too.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from .measure import Job, Options, fill, forget_peak, memory, rounded
from .page import cells, table

ZOO, RATES = "zoo", "rates"
BUDGET = 60  # CPU seconds of one audit or one recovery
WALL = 900.0  # of a process, on a machine that others use
PHOTOS = ("rocket", "cat", "coffee")
SIZES = (32, 64, 224)
CLASSES, LABEL = 10, 3

# one small member of a family: the least size that it takes, and what its constructor is told
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "vgg11": (32, {}),
    "alexnet": (64, {}),
    "squeezenet1_1": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "densenet121": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (32, {"aux_logits": False, "init_weights": False}),
    "convnext_tiny": (32, {}),
    "vit_b_16": (32, {"image_size": "size"}),
    "resnet50": (32, {}),
    "mnasnet0_5": (32, {}),
    "regnet_y_400mf": (32, {}),
    "swin_t": (32, {}),
}

# network, size; pictures and seeds beyond those that the attack was built with
RATED = (("resnet18", 32), ("resnet34", 32), ("alexnet", 64), ("vgg11", 32), ("resnet50", 32),
         ("vgg16", 32), ("resnet18", 64))  # fmt: skip
DTYPES = ("float64", "float32")
RATED_PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina")
SEEDS = (101, 102, 103, 104)


def zoo(options: Options) -> int:
    """Every family: an audit and some photographs, the small sizes first."""
    jobs = {}
    for size in SIZES:
        for name, (least, _) in FAMILIES.items():
            if least <= size:
                where = {"name": name, "size": size}
                jobs[f"{name}/{size}/audit"] = Job("zoo", "audit_one", where, limit=WALL)
                for photo in PHOTOS:
                    what = {**where, "photo": photo}
                    jobs[f"{name}/{size}/{photo}"] = Job("zoo", "recover_one", what, limit=WALL)
    fill(ZOO, jobs, options)
    return 0


def rates(options: Options) -> int:
    """Photographs times draws of the weights, a draw of all networks before the next."""
    jobs = {
        f"{name}/{size}/{dtype}/{photo}/{seed}": Job(
            "zoo", "recover_one",
            {"name": name, "size": size, "dtype": dtype, "photo": photo, "seed": seed}, limit=WALL,
        )
        for seed in SEEDS for photo in RATED_PHOTOS for name, size in RATED for dtype in DTYPES
    }  # fmt: skip
    fill(RATES, jobs, options)
    return 0


# --- in the child -------------------------------------------------------------------------------


class Spent(BaseException):
    """The budget is; not an ``Exception``, which an attack may be waiting for."""


@contextmanager
def within(budget: float) -> Iterator[None]:
    """End what runs inside after so many CPU seconds, with :class:`Spent`."""

    def end(*_: object) -> None:
        raise Spent

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, budget)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def network(name: str, size: int, seed: int = 0, dtype: str = "float64") -> Any:
    """As torchvision draws it, ten classes, in eval mode."""
    import torch
    import torchvision

    torch.manual_seed(seed)
    more = FAMILIES.get(name, (0, {}))[1]
    told = {key: size if value == "size" else value for key, value in more.items()}
    net = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **told)
    return net.eval().to(getattr(torch, dtype))


def audit_one(name: str, size: int, budget: float = BUDGET) -> dict[str, Any]:
    """Verdict, in a word and in a sentence."""
    import gradinv_edu as gi

    net = network(name, size)
    forget_peak()
    before, start = memory("VmRSS"), time.process_time()
    cell: dict[str, Any] = {"verdict": "not finished", "reason": f"over {budget:g} CPU s"}
    try:
        with within(budget):
            found = gi.audit(net, (3, size, size), jacobian=False)
        cell = {"verdict": str(found.verdict), "reason": found.reason}
    except gi.errors.GradientInversionError as error:
        cell = {"verdict": "refused", "reason": str(error)}
    except Spent:
        pass
    return cell | _spent(before, start)


def recover_one(
    name: str, size: int, photo: str, seed: int = 0, dtype: str = "float64", budget: float = BUDGET
) -> dict[str, Any]:
    """How near the answer is, whether it is vouched for, or what ended the attack."""
    import torch
    from torch import nn

    import gradinv_edu as gi

    net, loss = network(name, size, seed, dtype), nn.CrossEntropyLoss()
    x = gi.data.photo(photo, size, dtype=getattr(torch, dtype))
    update = gi.observe(net, loss, x, torch.tensor([LABEL]))
    forget_peak()
    before, start = memory("VmRSS"), time.process_time()
    cell: dict[str, Any] = {"ended": "not finished"}
    try:
        with within(budget):
            found = gi.recover(net, update, tuple(x.shape[1:]), loss)
        decibel = gi.metrics.psnr(found.inputs, x.double())
        cell = {"psnr": round(min(decibel, 400.0), 1), "exact": found.exact}
    except gi.errors.GradientInversionError as error:
        cell = {"ended": type(error).__name__, "reason": str(error)}
    except Spent:
        pass
    return cell | _spent(before, start)


def _spent(before: float, start: float) -> dict[str, Any]:
    used = time.process_time() - start
    return {"seconds": rounded(used), "memory": rounded(memory() - before)}


# --- how it is told -----------------------------------------------------------------------------


def families(data: dict[str, Any]) -> Any:
    """A row for each network and size that was begun."""
    measured = cells(data, ZOO)
    rows = []
    for name in FAMILIES:
        for size in SIZES:
            audit = measured.get(f"{name}/{size}/audit", {})
            tried = [c for p in PHOTOS if (c := measured.get(f"{name}/{size}/{p}"))]
            if audit or tried:
                seconds = [c["seconds"] for c in tried]
                most = max((c["memory"] for c in tried), default=None)
                rows.append((
                    f"`{name}`", f"{size}×{size}", audit.get("verdict"), audit.get("seconds"),
                    reached(tried), median(seconds) if seconds else None, most,
                ))  # fmt: skip
    head = ["network", "picture", "audit", "its CPU s", "recovered, dB", "CPU s", "MiB"]
    return table(head, rows)


def reached(tried: list[dict[str, Any]]) -> str | None:
    """What each photograph came to: decibels, in brackets where the attack does not vouch."""
    told = []
    for cell in tried:
        if "psnr" not in cell:
            told.append({"not finished": "not finished"}.get(cell["ended"], "refused"))
        else:
            told.append(f"{cell['psnr']:.0f}" if cell["exact"] else f"({cell['psnr']:.0f})")
    if not told:
        return None
    return told[0] if len(set(told)) == 1 and not told[0].strip("()").isdigit() else ", ".join(told)


def reasons(data: dict[str, Any]) -> Any:
    """What the audit says of each at its least size, in its own words."""
    measured = cells(data, ZOO)
    rows = [
        (f"`{name}`", f"{least}×{least}", audit["reason"].split("; other attacks")[0])
        for name, (least, _) in FAMILIES.items()
        if (audit := measured.get(f"{name}/{least}/audit"))
    ]
    return table(["network", "picture", "what the audit says"], rows)


def rated(data: dict[str, Any]) -> Any:
    """How often a recovery is exact, and vouched for, over photographs and draws of weights."""
    import gradinv_edu as gi

    rows = []
    for name, size in RATED:
        for dtype in DTYPES:
            start = f"{name}/{size}/{dtype}/"
            runs = [c for key, c in cells(data, RATES).items() if key.startswith(start)]
            if runs:
                rate = gi.metrics.success_rate(c.get("exact", False) for c in runs)
                ours = [c["psnr"] for c in runs if c.get("exact")]
                least, most = (f(ours) if ours else None for f in (min, max))
                rows.append((
                    f"`{name}`", f"{size}×{size}", dtype, f"{rate.successes} of {rate.trials}",
                    f"{rate.low:.0%} to {rate.high:.0%}", least, most,
                    median(c["seconds"] for c in runs),
                ))  # fmt: skip
    head = ["network", "picture", "gradients", "vouched for", "95 % interval", "least dB",
            "most dB", "CPU s"]  # fmt: skip
    return table(head, rows)

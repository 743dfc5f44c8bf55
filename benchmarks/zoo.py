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
from itertools import product
from statistics import median
from typing import Any

from . import store
from .measure import Job, Options, fill, forget_peak, memory, rounded
from .page import cells, table

ZOO, RATES = "zoo", "rates"
AUDITED, BUDGET, LONG = 60, 30, 120  # CPU seconds of an audit, a recovery, one of the rates
NEAR = 80  # dB from which the rates count a picture as reached, vouched for or not
WALL = 900.0  # of a process, on a machine that others use
PHOTOS = ("rocket", "cat", "coffee")
SIZES, MODES = (32, 64, 224), ("eval", "train")
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
    "mnasnet0_5": (32, {}),
    "regnet_y_400mf": (32, {}),
    "swin_t": (32, {}),
    "resnext50_32x4d": (32, {}),
    "wide_resnet50_2": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "maxvit_t": (224, {"input_size": "sizes"}),
    "inception_v3": (224, {"aux_logits": False, "init_weights": False}),
}

# network, size; pictures and seeds beyond those that the attack was built with
RATED = (("resnet18", 32), ("resnet34", 32), ("alexnet", 64), ("vgg11", 32), ("resnet50", 32),
         ("vgg16", 32), ("resnet18", 64))  # fmt: skip
DTYPES = ("float64", "float32")
RATED_PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina")
SEEDS = (101, 102, 103, 104)


def zoo(options: Options) -> int:
    """Every family: an audit and a photograph; two more where that one came to an answer."""
    for size, mode in product(SIZES, MODES):
        ways = list(_ways(size, mode))
        fill(ZOO, {f"{way}/audit": Job("zoo", "audit_one", told, limit=WALL)
                   for way, told in ways}, options)  # fmt: skip
        for photos in (PHOTOS[:1], PHOTOS[1:]):
            stored = cells(store.load(), ZOO)
            jobs = {
                f"{way}/{photo}": Job("zoo", "recover_one", {**told, "photo": photo}, limit=WALL)
                for way, told in ways for photo in photos
                if photo == PHOTOS[0] or "psnr" in stored.get(f"{way}/{PHOTOS[0]}", {})
            }  # fmt: skip
            fill(ZOO, jobs, options)
    return 0


def _ways(size: int, mode: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each family that takes this size."""
    for name, (least, _) in FAMILIES.items():
        if least <= size:
            yield f"{name}/{size}/{mode}", {"name": name, "size": size, "mode": mode}


def rates(options: Options) -> int:
    """Photographs times draws of the weights, a draw of all networks before the next."""
    jobs = {
        f"{name}/{size}/{dtype}/{photo}/{seed}": Job(
            "zoo", "recover_one",
            {"name": name, "size": size, "dtype": dtype, "photo": photo, "seed": seed,
             "budget": LONG}, limit=WALL,
        )
        for dtype in DTYPES for seed in SEEDS for photo in RATED_PHOTOS for name, size in RATED
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


def network(name: str, size: int, seed: int = 0, dtype: str = "float64", mode: str = "eval") -> Any:
    """As torchvision draws it, ten classes; a head of zeros (ViT's) as a first step leaves it."""
    import torch
    import torchvision

    torch.manual_seed(seed)
    words = {"size": size, "sizes": (size, size)}
    told = {k: words.get(v, v) for k, v in FAMILIES.get(name, (0, {}))[1].items()}
    net = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **told)
    head = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1:]
    if head and not head[0].weight.any():
        torch.nn.init.normal_(head[0].weight, std=0.02)
    return net.train(mode == "train").to(getattr(torch, dtype))


def audit_one(name: str, size: int, mode: str, budget: float = AUDITED) -> dict[str, Any]:
    """Verdict in a word and in a sentence: what the audit knows when its budget is spent."""
    import gradinv_edu as gi

    net = network(name, size, mode=mode)
    forget_peak()
    before, start = memory("VmRSS"), time.process_time()
    known: list[Any] = []
    first: list[float] = []

    def learn(audit: Any) -> None:
        known.append(audit)
        first.append(time.process_time() - start)

    cell: dict[str, Any] = {}
    try:
        with within(budget):
            known.append(gi.audit(net, (3, size, size), jacobian=False, progress=learn))
    except (gi.errors.GradientInversionError, ValueError) as error:
        cell = {"verdict": "refused", "reason": str(error)}
    except Spent:
        cell = {"verdict": "not finished", "reason": "nothing is known yet", "spent": True}
    if known and cell.get("verdict") != "refused":
        cell |= {"verdict": str(known[-1].verdict), "reason": known[-1].reason}
    if first:
        cell["first"] = rounded(first[0])
    return cell | _spent(before, start)


def recover_one(
    name: str, size: int, photo: str, seed: int = 0, dtype: str = "float64", mode: str = "eval",
    budget: float = BUDGET,
) -> dict[str, Any]:  # fmt: skip
    """How near the answer is, whether it is vouched for, or what ended the attack.

    Where the network hides the brightness, both pictures are scaled to the same largest entry.
    """
    import torch
    from torch import nn

    import gradinv_edu as gi

    net, loss = network(name, size, seed, dtype, mode), nn.CrossEntropyLoss()
    x = gi.data.photo(photo, size, dtype=getattr(torch, dtype))
    before, start = memory("VmRSS"), time.process_time()
    cell: dict[str, Any] = {"ended": "not finished"}
    try:
        update = gi.observe(net, loss, x, torch.tensor([LABEL]))
        forget_peak()
        before, start = memory("VmRSS"), time.process_time()
        with within(budget):
            found = gi.recover(net, update, tuple(x.shape[1:]), loss)
        answer, truth = found.inputs, x.double()
        if found.hidden:
            answer, truth = found.scaled(), truth / truth.max()
        cell = {"psnr": round(min(gi.metrics.psnr(answer, truth), 400.0), 1), "exact": found.exact}
        lowest = found.layers[-1]
        if 0 < lowest.undetermined < 1 and not found.exact:
            cell["open"] = max(1, round(lowest.undetermined * lowest.unknowns))
        if found.hidden:
            cell["hidden"] = "; ".join(found.hidden)
    except (gi.errors.GradientInversionError, ValueError) as error:
        cell = {"ended": type(error).__name__, "reason": str(error)}
    except Spent:
        pass
    return cell | _spent(before, start)


def _spent(before: float, start: float) -> dict[str, Any]:
    used = time.process_time() - start
    return {"seconds": rounded(used), "memory": rounded(memory() - before)}


# --- how it is told -----------------------------------------------------------------------------


def families(data: dict[str, Any]) -> Any:
    """A row for each network, size and mode that was begun."""
    measured = cells(data, ZOO)
    rows = []
    for name, size, mode in product(FAMILIES, SIZES, MODES):
        way = f"{name}/{size}/{mode}"
        audit = measured.get(f"{way}/audit", {})
        tried = [c for p in PHOTOS if (c := measured.get(f"{way}/{p}"))]
        if audit or tried:
            seconds = [c["seconds"] for c in tried]
            most = max((c["memory"] for c in tried), default=None)
            rows.append((
                f"`{name}`", f"{size}×{size}", mode, audit.get("verdict"), audit.get("first"),
                audit.get("seconds"), reached(tried), median(seconds) if seconds else None, most,
            ))  # fmt: skip
    head = ["network", "picture", "mode", "audit", "first verdict, CPU s", "whole, CPU s",
            "recovered, dB", "CPU s", "MiB"]  # fmt: skip
    return table(head, rows)


def reached(tried: list[dict[str, Any]]) -> str | None:
    """What each photograph came to: decibels, in brackets where the attack does not vouch."""
    told = []
    for cell in tried:
        if "psnr" not in cell:
            spent = cell["ended"] == "not finished"
            told.append(f"not within {BUDGET} CPU s" if spent else "refused")
        elif cell["exact"] or "hidden" in cell:
            told.append(f"{cell['psnr']:.0f}" + (" (scaled)" if "hidden" in cell else ""))
        else:
            told.append(f"({cell['psnr']:.0f})")
    if not told:
        return None
    return told[0] if len(set(told)) == 1 and not told[0].strip("()").isdigit() else ", ".join(told)


def reasons(data: dict[str, Any]) -> Any:
    """What the audit says at the least size, and what the attack says that ends or hides."""
    measured = cells(data, ZOO)
    rows = []
    for (name, (least, _)), mode in product(FAMILIES.items(), MODES):
        way = f"{name}/{least}/{mode}"
        audit, tried = measured.get(f"{way}/audit"), measured.get(f"{way}/{PHOTOS[0]}", {})
        if audit:
            told = tried.get("reason") or tried.get("hidden") or "–"
            said = audit["reason"].split("; other attacks")[0]
            rows.append((f"`{name}`", f"{least}×{least}", mode, said, told))
    return table(["network", "picture", "mode", "the audit", "the attack"], rows)


def rated(data: dict[str, Any]) -> Any:
    """How often a recovery is near, and how often vouched for, over photographs and weights."""
    import gradinv_edu as gi

    rows = []
    for name, size in RATED:
        for dtype in DTYPES:
            start = f"{name}/{size}/{dtype}/"
            runs = [c for key, c in cells(data, RATES).items() if key.startswith(start)]
            if runs:
                rate = gi.metrics.success_rate(c.get("exact", False) for c in runs)
                near = [c["psnr"] for c in runs if c.get("psnr", 0) >= NEAR]
                open_ = sum("open" in c for c in runs)
                least, most = (f(near) if near else None for f in (min, max))
                rows.append((
                    f"`{name}`", f"{size}×{size}", dtype, f"{len(near)} of {rate.trials}",
                    f"{rate.successes} of {rate.trials}", f"{rate.low:.0%} to {rate.high:.0%}",
                    open_, least, most,
                    median(c["seconds"] for c in runs),
                ))  # fmt: skip
    head = ["network", "picture", "gradients", f"{NEAR} dB", "vouched for", "95 % interval",
            "undetermined", "least dB", "most dB", "CPU s"]  # fmt: skip
    return table(head, rows)


def learned(data: dict[str, Any]) -> Any:
    """The same after training, beside the networks as drawn, all of one kind together."""
    import gradinv_edu as gi

    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, cell in cells(data, "learned").items():
        found.setdefault(tuple(key.split("/")[:4]), []).append(cell)
    rows = []
    for (name, pictures, state, dtype), blocks in sorted(found.items()):
        runs = [run for block in blocks for run in block["runs"]]
        rate = gi.metrics.success_rate(run.get("exact", False) for run in runs)
        reach = [run["psnr"] for run in runs if "psnr" in run]
        rows.append((
            f"`{name}`", pictures, state, dtype, f"{blocks[0]['accuracy']:.0%}",
            median(run["loss"] for run in runs), f"{rate.successes} of {rate.trials}",
            f"{rate.low:.0%} to {rate.high:.0%}", median(reach) if reach else None,
            median(run["seconds"] for run in runs),
        ))  # fmt: skip
    head = ["network", "pictures", "weights", "gradients", "right labels", "median loss",
            "vouched for", "95 % interval", "median dB", "CPU s"]  # fmt: skip
    return table(head, rows)

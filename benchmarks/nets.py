"""Networks of the chapters, each recovery and each audit in a process of its own."""

from __future__ import annotations

import time
from typing import Any

from .measure import Job, Options, fill, forget_peak, memory, rounded, seconds, typical

# chapter recursion: (constructor, size, options)
CHAPTER: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cnn6": ("cnn6", 32, {"outputs": 10}),
    "lenet": ("lenet", 32, {"bias": False}),
    "photo_cnn": ("photo_cnn", 224, {}),
}
PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina")
AUDITED = {"cnn6": 32, "lenet": 32, "resnet18": 224, "vit_b_16": 224, "convnext_tiny": 224}


def recovery(options: Options) -> int:
    """The nets of chapter recursion, from float64 and float32 gradients."""
    jobs = {
        f"{name}/{dtype}": Job("nets", "recover_one", {"name": name, "dtype": dtype})
        for name in CHAPTER for dtype in ("float64", "float32")
    }  # fmt: skip
    fill("recovery", jobs, options)
    return 0


def resistant(options: Options) -> int:
    """CNN6-d, called protected by its ranks: five photographs, ten classes and one logit."""
    jobs = {
        f"{name}/{outputs}": Job("nets", "recover_cnn6_d", {"photo": name, "outputs": outputs})
        for name in PHOTOS for outputs in (10, 1)
    }  # fmt: skip
    fill("resistant", jobs, options)
    return 0


def audit(options: Options) -> int:
    """What an audit of a network costs before any data is sent."""
    jobs = {
        f"{n}/{size}": Job("nets", "audit_one", {"name": n}, limit=3600)
        for n, size in AUDITED.items()
    }
    fill("audit", jobs, options)
    return 0


# --- in the child -------------------------------------------------------------------------------


def recover_one(name: str, dtype: str) -> dict[str, Any]:
    import torch

    import gradinv_edu as gi

    constructor, size, more = CHAPTER[name]
    kind = getattr(torch, dtype)
    net = getattr(gi.models, constructor)((3, size, size), dtype=kind, **more)
    x = gi.data.photo("astronaut", size, dtype=kind)
    loss, label = torch.nn.CrossEntropyLoss(), torch.tensor([3])
    once = typical(lambda: loss(net(x), label).backward())
    cell = measured(net, loss, x, label)
    return {"size": size, **cell, "pass": rounded(once), "passes": rounded(cell["seconds"] / once)}


def recover_cnn6_d(photo: str, outputs: int) -> dict[str, Any]:
    import torch
    from torch import nn

    import gradinv_edu as gi

    x = gi.data.photo(photo, 32, dtype=torch.float64)
    net = gi.models.cnn6_d(outputs=outputs, dtype=torch.float64)
    if outputs == 1:  # as R-GAP needs it: the label against the prediction
        return measured(net, nn.BCEWithLogitsLoss(), x, (net(x) < 0).double())
    return measured(net, nn.CrossEntropyLoss(), x, torch.tensor([3]))


def measured(net: Any, loss: Any, x: Any, target: Any) -> dict[str, Any]:
    """CPU seconds, memory above what was there, and how near the answer is."""
    import gradinv_edu as gi
    from benchmarks.scaling import warm

    warm("float64")
    update = gi.observe(net, loss, x, target)
    forget_peak()
    before, found = memory("VmRSS"), []
    spent = seconds(lambda: found.append(gi.recover(net, update, tuple(x.shape[1:]), loss)))
    decibel = gi.metrics.psnr(found[0].inputs, x.double())
    return {
        "seconds": rounded(spent),
        "memory": rounded(memory() - before),
        "psnr": round(min(decibel, 400.0), 1),
        "exact": found[0].exact,
        "iterations": sum(layer.iterations for layer in found[0].layers),
    }


def audit_one(name: str) -> dict[str, Any]:
    import torch
    import torchvision

    import gradinv_edu as gi

    torch.manual_seed(0)
    size = AUDITED[name]
    if name in CHAPTER:
        net = getattr(gi.models, name)(**CHAPTER[name][2])
    else:
        net = getattr(torchvision.models, name)(weights=None)
    forget_peak()
    before, start, told = memory("VmRSS"), time.process_time(), list[float]()

    def note(_: Any) -> None:
        told.append(time.process_time() - start)

    gi.audit(net, (3, size, size), jacobian=False, progress=note)
    spent = time.process_time() - start
    return {"size": size, "seconds": rounded(spent), "first": rounded(told[0] if told else spent),
            "memory": rounded(memory() - before)}  # fmt: skip

"""The capstone: an update file and a model, and nothing else; graded on files held out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import digit
from ..metrics import psnr
from ..models import mlp
from ..sharing import Update, observe
from .verdict import Student, ask, demand, pair, right, tensor

SHAPE = (1, 8, 8)
RIGHT = 40.0  # dB: a picture that nobody can tell from the client's
DOUBLE = torch.float64


@dataclass(frozen=True)
class Evidence:
    """One update of one client.

    Attributes
    ----------
    name : str
        What is said of it.
    model : nn.Module
        The network that the server sent.
    file : Path
        The client's update.
    picture, label : Tensor, int
        What the client had; of several samples the first.
    kind : {"leaks", "open", "mixed", "noisy"}
        Whether one sample is determined, is not, is mixed with others, or is under noise.
    """

    name: str
    model: nn.Module
    file: Path
    picture: Tensor
    label: int
    kind: str


@contextmanager
def evidence(seed: int) -> Iterator[list[Evidence]]:
    """Write the update files of ``seed``, and remove them afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield list(_evidence(seed, Path(folder)))


def _evidence(seed: int, folder: Path) -> Iterator[Evidence]:
    dense, bare, wide = _dense(seed, True), _dense(seed + 1, False), _conv(seed + 2, 8, 1)
    plan = {"local_steps": 5, "learning_rate": 0.05, "weight_decay": 0.1}
    files: list[tuple[str, nn.Module, str, int, float]] = [
        ("a dense network", dense, "leaks", 1, 0.0),
        ("a network without a bias", bare, "leaks", 1, 0.0),
        ("convolutions", wide, "leaks", 1, 0.0),
        ("narrow convolutions", _conv(seed + 3, 1, 2), "open", 1, 0.0),
        ("a few filters", _conv(seed + 4, 2, 2), "open", 1, 0.0),
        ("two samples", dense, "mixed", 2, 0.0),
        ("two samples, no bias", bare, "mixed", 2, 0.0),
        ("two samples, convolutions", wide, "mixed", 2, 0.0),
        ("convolutions under noise", wide, "noisy", 1, 0.05),
    ]
    for place, (name, model, kind, samples, sigma) in enumerate(files):
        pictures = torch.cat([digit(_index(seed, place, i), dtype=DOUBLE) for i in range(samples)])
        labels = torch.arange(samples) * 3 + (seed + place) % 7
        update = _noisy(observe(model, nn.CrossEntropyLoss(), pictures, labels), sigma, seed)
        yield _filed(
            folder, place, update, Evidence(name, model, folder, pictures[:1], int(labels[0]), kind)
        )
    picture, label = digit(_index(seed, 99, 0), dtype=DOUBLE), torch.tensor([seed % 10])
    update = observe(dense, nn.CrossEntropyLoss(), picture, label, **plan)  # type: ignore[arg-type]
    told = Evidence("five local steps", dense, folder, picture, int(label), "leaks")
    yield _filed(folder, 99, update, told)


def _filed(folder: Path, place: int, update: Update, told: Evidence) -> Evidence:
    file = folder / f"update-{place:02d}.safetensors"
    update.save(file)
    return Evidence(told.name, told.model, file, told.picture, told.label, told.kind)


def _index(seed: int, place: int, sample: int) -> int:
    return (37 * seed + 11 * place + 5 * sample) % 1700


def _dense(seed: int, bias: bool) -> nn.Module:
    sizes = [64, 40, 10] if bias else [64, 80, 70, 10]
    g = torch.Generator().manual_seed(seed)
    return mlp(sizes, activation="leaky_relu", bias=bias, dtype=DOUBLE, generator=g)


def _conv(seed: int, filters: int, stride: int) -> nn.Module:
    side = 8 // stride // 2
    one = nn.Conv2d(1, filters, 3, stride, 1, bias=False)
    two = nn.Conv2d(filters, 2 * filters, 3, 2, 1, bias=False)
    head = nn.Linear(2 * filters * side**2, 10, bias=False)
    model = nn.Sequential(one, nn.LeakyReLU(0.2), two, nn.LeakyReLU(0.2), nn.Flatten(), head)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            drawn = torch.randn(parameter.shape, generator=g, dtype=DOUBLE)
            parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    return model


def _noisy(update: Update, sigma: float, seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    noisy = {
        name: t + sigma * t.abs().max() * torch.randn(t.shape, generator=g, dtype=t.dtype)
        for name, t in update.gradients.items()
    }
    return Update(noisy) if sigma else update


NOTHING = (
    "From {name} ({kind}) everything can be recovered, and you return nothing. Which layer, which "
    "loss, which local steps does it need?"
)
KINDS = {
    "leaks": "one sample, a layer plan that leaves nothing open",
    "open": "a layer that lacks rank",
    "mixed": "more than one sample",
    "noisy": "noise on every entry",
}
FAR = (
    "Your picture from {name} is at {decibel:.0f} dB, and {right:.0f} dB are within reach: the "
    "equations determine it."
)
LABEL = "The picture from {name} is right and the label is not: the last layer's gradient tells it."


def check_investigate(investigate: Student, seed: int = 1) -> None:
    """Check C.1: what can be recovered is recovered, and nothing makes it fall over."""
    with evidence(seed) as files:
        for told in files:
            answer = _investigated(investigate, told)
            if told.kind == "leaks":
                demand(answer is not None, NOTHING.format(name=told.name, kind=KINDS[told.kind]))
                _demand_recovered(answer, told)
    right("What the equations determine, you have; and no update makes your code fall over.")


def _investigated(investigate: Student, told: Evidence) -> object:
    """What a student finds, ``None`` being an honest answer here."""

    def found(*arguments: object) -> object:
        return (investigate(*arguments),)

    found.__name__ = getattr(investigate, "__name__", "investigate")
    return ask(found, told.model, told.file, case=f"on {told.name}")[0]


def _demand_recovered(answer: object, told: Evidence) -> None:
    picture, label = pair(answer, "investigate(...)")
    decibel = _decibel(picture, told)
    demand(decibel > RIGHT, FAR.format(name=told.name, decibel=decibel, right=RIGHT))
    demand(int(tensor(label, "the label").reshape(())) == told.label, LABEL.format(name=told.name))


def _decibel(picture: object, told: Evidence) -> float:
    found = tensor(picture, "the picture")
    demand(found.numel() == told.picture.numel(), f"A picture has {SHAPE} entries.")
    return psnr(found.reshape(told.picture.shape), told.picture)


RANGE = "How sure you are is a number from 0 to 1; yours is {sure}."
SAME = (
    "You are {sure:.0%} sure of every update, whatever it is. Some of these pictures are right and "
    "some are not; a number that never moves says nothing."
)
FOOLED = {
    "open": (
        "You are {sure:.0%} sure of your picture from {name}, and it is wrong. It explains every "
        "gradient to the last digit; so do many others, because a layer lacks rank."
    ),
    "mixed": (
        "You are {sure:.0%} sure of your picture from {name}, and it is wrong: compute the "
        "gradient at your answer again. More than one sample was in this update."
    ),
    "noisy": (
        "You are {sure:.0%} sure of your picture from {name}, and it is wrong: the equations are "
        "met only roughly, and the smallest singular value makes much of a little."
    ),
    "leaks": "You are {sure:.0%} sure of your picture from {name}, and it is wrong.",
}
TIMID = (
    "You are {sure:.0%} sure of your picture from {name}, and it is right to the last digits: "
    "every layer has full rank, nothing is left unexplained. Dare to say so."
)
BRIER = (
    "The mean squared difference between how sure you were and what came true is {score:.2f}; "
    "below {most} passes. Where were you sure of the wrong thing?"
)
MOST = 0.1


def check_how_sure(investigate: Student, how_sure: Student, seed: int = 1) -> None:
    """Check C.2: confidence that comes true, by the Brier score, on files held out."""
    with evidence(seed) as files:
        said = [(told, *_said(investigate, how_sure, told)) for told in files]
    sures = [sure for _, sure, _ in said]
    demand(max(sures) - min(sures) > 1e-6, SAME.format(sure=sures[0]))
    for told, sure, true in said:
        demand(true or sure < 0.9, FOOLED[told.kind].format(sure=sure, name=told.name))
        demand(
            not true or sure > 0.1 or told.kind != "leaks", TIMID.format(sure=sure, name=told.name)
        )
    score = sum((sure - true) ** 2 for _, sure, true in said) / len(said)
    demand(score < MOST, BRIER.format(score=score, most=MOST))
    right(f"Your confidence comes true: Brier score below {MOST}.")


def _said(investigate: Student, how_sure: Student, told: Evidence) -> tuple[float, bool]:
    answer = _investigated(investigate, told)
    sure = float(tensor(ask(how_sure, told.model, told.file, case=f"on {told.name}"), "how_sure"))
    demand(0 <= sure <= 1, RANGE.format(sure=sure))
    true = answer is not None and _decibel(pair(answer, "investigate(...)")[0], told) > RIGHT
    return sure, true

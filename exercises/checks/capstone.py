"""The capstone: an update file and a model, and nothing else; graded on files held out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import Mistakes, Student, ask, demand, pair, right, tensor

SHAPE = (1, 8, 8)
RIGHT = 40.0  # dB: a picture that nobody can tell from the client's
DOUBLE, LOSS = torch.float64, nn.CrossEntropyLoss()


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
    files = [
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
        pictures = [gi.data.digit(_index(seed, place, i), dtype=DOUBLE) for i in range(samples)]
        labels = torch.arange(samples) * 3 + (seed + place) % 7
        update = _noisy(gi.observe(model, LOSS, torch.cat(pictures), labels), sigma, seed)
        file = _saved(update, folder, place)
        yield Evidence(name, model, file, pictures[0], int(labels[0]), kind)
    picture, label = gi.data.digit(_index(seed, 99, 0), dtype=DOUBLE), seed % 10
    file = _saved(gi.observe(dense, LOSS, picture, torch.tensor([label]), **plan), folder, 99)
    yield Evidence("five local steps", dense, file, picture, label, "leaks")


def _saved(update: gi.Update, folder: Path, place: int) -> Path:
    file = folder / f"update-{place:02d}.safetensors"
    update.save(file)
    return file


def _index(seed: int, place: int, sample: int) -> int:
    return (37 * seed + 11 * place + 5 * sample) % 1700


def _dense(seed: int, bias: bool) -> nn.Module:
    sizes = [64, 40, 10] if bias else [64, 80, 70, 10]
    g = torch.Generator().manual_seed(seed)
    return gi.models.mlp(sizes, activation="leaky_relu", bias=bias, dtype=DOUBLE, generator=g)


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


def _noisy(update: gi.Update, sigma: float, seed: int) -> gi.Update:
    g = torch.Generator().manual_seed(seed)
    noisy = {
        name: t + sigma * t.abs().max() * torch.randn(t.shape, generator=g, dtype=t.dtype)
        for name, t in update.gradients.items()
    }
    return gi.Update(noisy) if sigma else update


def _recovery(model: nn.Module, file: Path) -> gi.Recovery | None:
    try:
        return gi.recover(model, gi.Update.load(file), SHAPE, LOSS)
    except gi.errors.GradientInversionError:
        return None


class Investigate(Mistakes, of="capstone-investigate"):
    def no_update_is_ever_odd(model, file):
        """… stopped on two samples …"""
        recovery = gi.recover(model, gi.Update.load(file), SHAPE, LOSS)
        return recovery.inputs, recovery.targets

    def bias_ratio_or_nothing(model, file):
        """From {name} (one sample, a layer plan that leaves nothing open) everything can be
        recovered, and you return nothing. Which layer, which loss, which local steps does it
        need?"""
        gradients = list(gi.Update.load(file).gradients.values())
        if gradients[1].dim() != 1:
            return None
        return gi.fully_connected.recover_input(gradients[0], gradients[1]), torch.tensor(1)

    def stretched_to_be_looked_at(model, file):
        """Your picture from {name} is at {decibel:.0f} dB, and 40 dB are within reach: the
        equations determine it."""
        recovery = _recovery(model, file)
        if recovery is None:
            return None
        x = recovery.inputs - recovery.inputs.mean()
        return x / x.abs().max(), recovery.targets

    def prediction_for_label(model, file):
        """The picture from {name} is right and the label is not: the last layer's gradient tells
        it."""
        recovery = _recovery(model, file)
        return recovery and (recovery.inputs, model(recovery.inputs).argmax())


def check_investigate(investigate: Student, seed: int = 1) -> None:
    """Check C.1: what can be recovered is recovered, and nothing makes it fall over."""
    with evidence(seed) as files:
        for given in files:
            answer, name = _investigated(investigate, given), given.name
            if given.kind == "leaks":
                demand(answer is not None, Investigate.bias_ratio_or_nothing, name=name)
                picture, label = pair(answer, "investigate(...)")
                facts = {"name": name, "decibel": _decibel(picture, given)}
                near = facts["decibel"] > RIGHT
                demand(near, Investigate.stretched_to_be_looked_at, **facts)
                same = int(tensor(label, "the label").reshape(())) == given.label
                demand(same, Investigate.prediction_for_label, name=name)
    right("What the equations determine, you have; and no update makes your code fall over.")


def _investigated(investigate: Student, given: Evidence) -> object:
    """What a student finds, ``None`` being an honest answer here."""

    def found(*arguments: object) -> object:
        return (investigate(*arguments),)

    found.__name__ = getattr(investigate, "__name__", "investigate")
    return ask(found, given.model, given.file, case=f"on {given.name}")[0]


def _decibel(picture: object, given: Evidence) -> float:
    found = tensor(picture, "the picture")
    demand(found.numel() == given.picture.numel(), f"A picture has {SHAPE} entries.")
    return gi.metrics.psnr(found.reshape(given.picture.shape), given.picture)


class HowSure(Mistakes, of="capstone-sure"):
    def always_sure(model, file):
        """You are {sure:.0%} sure of every update, whatever it is. Some of these pictures are right
        and some are not; a number that never moves says nothing."""
        return 1.0

    def whoever_explains_the_gradient_is_right(model, file):
        """You are {sure:.0%} sure of your picture from {name}, and it is wrong. It explains every
        gradient to the last digit; so do many others, because a layer lacks rank."""
        recovery = _recovery(model, file)
        if recovery is None:
            return 0.0
        return 0.95 if recovery.mismatch is None or recovery.mismatch < 1e-6 else 0.05

    def full_rank_is_enough(model, file):
        """You are {sure:.0%} sure of your picture from {name}, and it is wrong: compute the
        gradient at your answer again. More than one sample was in this update."""
        recovery = _recovery(model, file)
        if recovery is None:
            return 0.0
        return 0.95 if all(layer.full_rank for layer in recovery.layers) else 0.05

    def never_sure(model, file):
        """You are {sure:.0%} sure of your picture from {name}, and it is right to the last digits:
        every layer has full rank, nothing is left unexplained. Dare to say so."""
        return 0.05 if _recovery(model, file) is not None else 0.0

    def hardly_committed(model, file):
        """The mean squared difference between how sure you were and what came true is {score:.2f};
        below 0.1 passes. Where were you sure of the wrong thing?"""
        recovery = _recovery(model, file)
        return 0.55 if recovery is not None and recovery.exact else 0.45


FOOLED = {
    "open": HowSure.whoever_explains_the_gradient_is_right,
    "mixed": HowSure.full_rank_is_enough,
    "noisy": "You are {sure:.0%} sure of your picture from {name}, and it is wrong: the equations "
    "are met only roughly, and the smallest singular value makes much of a little.",
    "leaks": "You are {sure:.0%} sure of your picture from {name}, and it is wrong.",
}


def check_how_sure(investigate: Student, how_sure: Student, seed: int = 1) -> None:
    """Check C.2: confidence that comes true, by the Brier score, on files held out."""
    with evidence(seed) as files:
        said = [(given, *_said(investigate, how_sure, given)) for given in files]
    sures = [sure for _, sure, _ in said]
    demand(max(sures) - min(sures) > 1e-6, HowSure.always_sure, sure=sures[0])
    for given, sure, true in said:
        facts = {"sure": sure, "name": given.name}
        demand(true or sure < 0.9, FOOLED[given.kind], **facts)
        demand(not true or sure > 0.1 or given.kind != "leaks", HowSure.never_sure, **facts)
    score = sum((sure - true) ** 2 for _, sure, true in said) / len(said)
    demand(score < 0.1, HowSure.hardly_committed, score=score)
    right("Your confidence comes true: Brier score below 0.1.")


def _said(investigate: Student, how_sure: Student, given: Evidence) -> tuple[float, bool]:
    """How sure a student is of a picture, and whether it is right."""
    answer = _investigated(investigate, given)
    number = ask(how_sure, given.model, given.file, case=f"on {given.name}")
    sure = float(tensor(number, "how_sure"))
    demand(0 <= sure <= 1, f"How sure you are is a number from 0 to 1; yours is {sure}.")
    if answer is None:
        return sure, False
    return sure, _decibel(pair(answer, "investigate(...)")[0], given) > RIGHT

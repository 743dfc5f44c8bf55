"""Every defense against every attacker on three networks: what leaks, and what it costs.

Usage: python -m gradinv_edu.scoreboard [--workers N | --ray] [--nets …] [--defenses …]

Each cell is a network, a defense and an attacker, or a network, a defense and its price. The file
is rewritten whole after each cell, so that a run can be stopped at any time and goes on where it
was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import (
    batches,
    checks,
    data,
    defenses,
    fully_connected,
    metrics,
    models,
    optimization,
    recursion,
)
from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    ResultsFileError,
    UnknownNameError,
)
from .sharing import Update, observe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = Path(__file__).parents[1] / "book" / "data" / "scoreboard.json"
FORMAT = 1
LOSS = nn.CrossEntropyLoss()
CLASSES, ROUND, PRICE = 10, 50, "price"
AT_ONCE = 4  # cells a worker between two times of writing, on Ray
SUCCESS = 25.0  # dB; a threshold that looking up a digit of the same class seldom passes
LEARNED = 0.8  # of the training pictures; less, and another rate is tried
CEILING = 200.0  # dB; beyond, figures are the machine's

Cell = dict[str, Any]
Key = tuple[str, str, str]  # network, defense, attacker or PRICE


# --- who plays --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defense:
    """One row of the board.

    Attributes
    ----------
    name : str
        As it is printed.
    kind : str
        What is done.
    value : float
        How much of it.
    rate : float
        Factor on the server's learning rate, to suit the size of what it gets.
    """

    name: str
    kind: str
    value: float = 0.0
    rate: float = 1.0


DEFENSES = {
    defense.name: defense
    for defense in (
        Defense("none", "none"),
        Defense("batch of 2", "batch", 2),
        Defense("batch of 4", "batch", 4),
        Defense("batch of 8", "batch", 8),
        Defense("1 local step", "local", 1),
        Defense("10 local steps", "local", 10),
        Defense("dropout 0.5", "dropout", 0.5),
        Defense("clipping to 0.1", "clip", 0.1, rate=6.0),
        Defense("noise 0.0001", "noise", 1e-4),
        Defense("noise 0.001", "noise", 1e-3),
        Defense("noise 0.01", "noise", 1e-2),
        Defense("DP-SGD, σ = 0.01", "private", 0.01),
        Defense("DP-SGD, σ = 0.1", "private", 0.1),
        Defense("DP-SGD, σ = 1", "private", 1.0),
        Defense("largest 10 %", "largest", 0.1),
        Defense("10 % by lot", "lot", 0.1, rate=3.3),
        Defense("8 bits", "bits", 8),
        Defense("4 bits", "bits", 4),
        Defense("half precision", "half"),
        Defense("sign", "sign", rate=0.02),
        Defense("Soteria, 20 % kept", "soteria", 0.2),
        Defense("PRECODE", "precode", 32),
        Defense("rank below the pixels", "rank", 1),
        Defense("rank far below", "rank", 4),
    )
}


@dataclass(frozen=True)
class Net:
    """A network, and how it is trained where the price is asked.

    Attributes
    ----------
    make : callable
        From the picture's shape and a generator of the weights.
    rounds : int
        Of federated SGD.
    rate : float
        The server's learning rate.
    """

    make: Callable[[tuple[int, ...], torch.Generator], nn.Sequential]
    rounds: int
    rate: float


def _dense(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    return models.mlp([math.prod(shape), 256, CLASSES], "relu", generator=generator)


def _lenet(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    return models.lenet(shape, CLASSES, generator=generator)


def _wide(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    return models.wide_cnn(shape, CLASSES, 0.5, bias=True, generator=generator)


NETS = {
    "dense": Net(_dense, 200, 0.5),
    "lenet": Net(_lenet, 400, 1.5),
    "wide": Net(_wide, 200, 0.5),
}


DATA = ("digits", "cifar10")


@dataclass(frozen=True)
class Settings:
    """What a results file was made with; files of other settings are not mixed.

    Attributes
    ----------
    data : {"digits", "cifar10"}
        scikit-learn's 8×8 digits, or CIFAR-10 where the reader has it.
    pictures : int
        Attacked in each cell, at least; a batch takes the next multiple of its size.
    seeds : int
        Trainings for each price.
    steps : int
        Of signed Adam; of L-BFGS, twenty iterations each, a twentieth of them.

    Raises
    ------
    UnknownNameError
        If there is no such data.
    InvalidArgumentError
        If a number is not a whole one, or less than one (``steps``: 20).
    """

    data: str = "digits"
    pictures: int = 4
    seeds: int = 1
    steps: int = 100

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise UnknownNameError(f"No data {self.data!r}; there are {', '.join(DATA)}.")
        for name, least in (("pictures", 1), ("seeds", 1), ("steps", 20)):
            _whole(getattr(self, name), name, least)


@dataclass(frozen=True)
class Data:
    """Pictures to train on, and others to judge by and to attack.

    Attributes
    ----------
    x, y : Tensor
        For training; public, as far as priors and baselines go.
    test_x, test_y : Tensor
        Held out; the victims come first.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return tuple(self.x.shape[1:])


@lru_cache(maxsize=2)
def load_data(name: str = "digits", root: str | None = None) -> Data:
    """Load the pictures of a board, shuffled once and for all.

    Parameters
    ----------
    name : {"digits", "cifar10"}
        Which.
    root : str, optional
        torchvision's folder, where CIFAR-10 already lies; nothing is downloaded.

    Returns
    -------
    Data
        1500 digits to train on and 297 others, or 5000 and 1000 pictures.

    Raises
    ------
    FileNotFoundError
        If CIFAR-10 is not in ``root``.
    UnknownNameError
        If there is no such data.
    """
    if name not in DATA:
        raise UnknownNameError(f"No data {name!r}; there are {', '.join(DATA)}.")
    x, y = data.digits() if name == "digits" else data.cifar10(root or "data", indices=range(6000))
    order = torch.randperm(len(x), generator=_seeded(0))
    x, y = x[order], y[order]
    cut = 1500 if name == "digits" else 5000
    return Data(x[:cut], y[:cut], x[cut:], y[cut:])


# --- the client -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What reaches the server, and what it knows beside it: everything but the draws.

    Attributes
    ----------
    model : torch.nn.Sequential
        As the client trains it.
    update : Update
        What the client sent.
    defense : Defense
        Known to an aware attacker alone.
    shape : tuple of int
        Of one picture.
    public : Tensor
        Pictures of the same kind.
    steps : int
        What a search may spend, as in :class:`Settings`.
    seed : int
        Of the attacker's own draws.
    """

    model: nn.Sequential
    update: Update
    defense: Defense
    shape: tuple[int, ...]
    public: Tensor
    steps: int
    seed: int


class DoesNotApplyError(GradientInversionError):
    """An attacker or a defense has no meaning in a cell; the message is the reason."""


def defended_model(
    model: nn.Sequential, defense: Defense, shape: tuple[int, ...], generator: torch.Generator
) -> nn.Sequential:
    """Build what the client trains: a copy of the network with the defense's own layers, if any.

    Parameters
    ----------
    model : torch.nn.Sequential
        Without a defense.
    defense : Defense
        To be built in.
    shape : tuple of int
        Of a picture.
    generator : torch.Generator
        Of new weights.

    Returns
    -------
    torch.nn.Sequential
        In training mode.

    Raises
    ------
    DoesNotApplyError
        If rank is to be removed from a first layer that is dense.
    """
    if defense.kind == "dropout":
        return defenses.with_dropout(model.train(), defense.value)
    if defense.kind == "precode":
        block = defenses.Bottleneck(model[-1].in_features, int(defense.value), generator=generator)  # type: ignore[arg-type]
        return nn.Sequential(*model[:-1], block, model[-1]).train()
    return (_narrowed(model, defense, shape) if defense.kind == "rank" else model).train()


def _narrowed(model: nn.Sequential, defense: Defense, shape: tuple[int, ...]) -> nn.Sequential:
    """Keep as many filters of the first layer as must lack rank; or one, in strides of four."""
    first = model[0]
    if not isinstance(first, nn.Conv2d):
        raise DoesNotApplyError(
            "A dense first layer tells every pixel, however few its units (chapter 9)."
        )
    second = next(layer for layer in model[1:] if isinstance(layer, nn.Conv2d))
    (kernel, _), (stride, _), padding = first.kernel_size, first.stride, int(first.padding[0])
    kept = defenses.filter_bound(shape[0], shape[1], kernel, stride, padding)
    if defense.value > 1:
        kept, first.stride = 1, (int(defense.value),) * 2
    first.weight, first.bias = _cut(first.weight[:kept]), _cut(first.bias[:kept])  # type: ignore[index]
    second.weight = _fewer(second.weight, kept)
    first.out_channels = second.in_channels = kept
    head = model[-1]
    head.in_features = model[:-1](torch.zeros(1, *shape)).shape[1]
    head.weight = _fewer(head.weight, head.in_features)  # type: ignore[arg-type]
    return model


def _fewer(weight: Tensor, inputs: int) -> nn.Parameter:
    """The first inputs' weights, as large as so few ask for."""
    return _cut(weight[:, :inputs] * math.sqrt(weight.shape[1] / inputs))


def _cut(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def send(
    model: nn.Sequential,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    rate: float,
    generator: torch.Generator,
) -> Update:
    """Take one round of a client behind a defense.

    Parameters
    ----------
    model : torch.nn.Sequential
        From :func:`defended_model`.
    defense : Defense
        The client's.
    x, y : Tensor
        The client's data.
    rate : float
        Of the server; local steps share it out among themselves.
    generator : torch.Generator
        Of masks, noise and lots.

    Returns
    -------
    Update
    """
    kind, value = defense.kind, defense.value
    if kind == "private":
        return defenses.dp_sgd(
            model, LOSS, x, y, noise_multiplier=value, generator=generator
        ).update
    local: dict[str, Any] = {}
    if kind == "local":
        local = {"local_steps": int(value), "learning_rate": rate / value}
    update = observe(model, LOSS, x, y, generator=generator, **local)
    if kind == "soteria":  # a batch: ranked on its first sample
        return defenses.soteria(model, update, x[:1], value)
    return BENT[kind](update, value, generator) if kind in BENT else update


BENT: dict[str, Callable[[Update, float, torch.Generator], Update]] = {
    "clip": lambda u, norm, _: defenses.clip(u, norm),
    "noise": lambda u, sigma, g: defenses.add_noise(defenses.clip(u, 1.0), sigma, g),
    "largest": lambda u, share, _: defenses.keep_largest(u, share),
    "lot": lambda u, share, g: defenses.keep_random(u, share, g),
    "bits": lambda u, bits, _: defenses.quantize(u, int(bits)),
    "half": lambda u, *_: defenses.half(u),
    "sign": lambda u, *_: defenses.sign(u),
}


# --- attackers who take what arrives for one picture's plain gradient -------------------------

Answer = tuple[Tensor, bool | None]  # pictures, and whether the attacker vouches for them


def ratio(sent: Sent) -> Answer:
    r""":math:`x = \operatorname{mean}_i\, G_i / b_i`: chapter 1's ratio, every row alike, as published.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, None
        One picture; this attacker vouches for nothing.

    Raises
    ------
    DoesNotApplyError
        If the first layer is a convolution.
    """  # noqa: E501
    if isinstance(sent.model[0], nn.Conv2d):
        raise DoesNotApplyError(
            "The first layer is a convolution; its ratio is a mean of patches (chapter 4)."
        )
    G, b = (sent.update.gradients[f"1.{part}"] for part in ("weight", "bias"))
    return fully_connected.recover_input(G, b, method="mean"), None


def walk(sent: Sent) -> Answer:
    """Run the recursion of chapter 6 as if there were no defense.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, bool
        One picture, and the recovery's ``exact``.
    """
    # dropout is not known of
    model = defenses._layers(sent.model)
    return _recovered(nn.Sequential(*model).eval(), _plain(sent.update), sent)


def dlg(sent: Sent) -> Answer:
    """Deep Leakage from Gradients: L-BFGS, the label guessed along.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, None
    """
    return _searched(sent, replace(sent.update), "dlg", naive=True)


def cosine(sent: Sent) -> Answer:
    """Inverting Gradients: signed Adam on the cosine, with total variation.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, None
    """
    return _searched(sent, replace(sent.update), "inverting_gradients", naive=True)


def _plain(update: Update) -> Update:
    steps = update.local_steps
    return Update({name: g / steps for name, g in update.gradients.items()})


def _recovered(
    model: nn.Sequential, update: Update, sent: Sent, *, partly: bool = False, **options: Any
) -> Answer:
    """The recursion; ``partly``: layers above where it begins need not agree with it."""
    generator = _seeded(sent.seed)
    found = recursion.recover(model, update, sent.shape, LOSS, generator=generator, **options)
    return found.inputs, found.candidates[0].determined if partly else found.exact


def _searched(
    sent: Sent,
    update: Update,
    method: optimization.Method,
    *,
    naive: bool = False,
    steps: int | None = None,
    **options: Any,
) -> Answer:
    most = steps or (sent.steps if method == "inverting_gradients" else sent.steps // 20)
    seen = replace(update, samples=1, batch_size=1) if naive else update
    full = {name: g.float() for name, g in seen.gradients.items()}
    with torch.random.fork_rng(devices=[]):  # PRECODE's draws
        torch.manual_seed(sent.seed)
        match = optimization.match_gradients(
            sent.model, replace(seen, gradients=full), sent.shape, LOSS, method=method,
            steps=most, simulate=not naive, generator=_seeded(sent.seed), **options,
        )  # fmt: skip
    return match.inputs, None


# --- attackers who know -----------------------------------------------------------------------


def algebra(sent: Sent) -> Answer:
    """Solve the equations that the defense leaves.

    Masks what is knowably unknown, undoes what is knowably changed, takes batches apart, asks for
    no more digits than there are, and fills in what rank hides from public pictures.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, bool
        Pictures, and whether the attacker vouches for them.

    Raises
    ------
    DoesNotApplyError
        If there is no defense to know of.
    GradientInversionError
        If the equations have no answer.
    """
    return ALGEBRA.get(sent.defense.kind, _tolerant)(sent)


def search(sent: Sent) -> Answer:
    """Guess a picture whose gradient agrees, with the defense in the guess.

    Imitates local steps, guesses as many pictures as the batch has, guesses dropout masks along,
    leaves pruned entries out of the comparison, or begins where the algebra ended.

    Parameters
    ----------
    sent : Sent
        What the server has.

    Returns
    -------
    Tensor, None

    Raises
    ------
    DoesNotApplyError
        If knowing of the defense changes nothing in a search.
    """
    return SEARCH.get(sent.defense.kind, _from_algebra)(sent)


def _nothing(sent: Sent) -> Answer:
    raise DoesNotApplyError("There is nothing to know of: the naive columns are this attack.")


def _tolerant(sent: Sent) -> Answer:
    """The recursion, asking for fewer digits until nothing contradicts."""
    coarsest = max(torch.finfo(g.dtype).eps for g in sent.update.gradients.values())
    dtypes = [d for d in (torch.float32, torch.float16) if torch.finfo(d).eps >= coarsest]
    for dtype in dtypes:
        coarse = {name: g.to(dtype) for name, g in sent.update.gradients.items()}
        try:
            return _recovered(sent.model, replace(sent.update, gradients=coarse), sent)
        except GradientInversionError:  # too fine, or over float16's largest number
            pass
    coarse = {name: g.bfloat16() for name, g in sent.update.gradients.items()}
    return _recovered(sent.model, replace(sent.update, gradients=coarse), sent)


def _apart(sent: Sent) -> Answer:
    """A batch: by sparse directions under a dense first layer, else by the softmax of the last."""
    first, size = sent.model[1], sent.update.samples
    if isinstance(sent.model[0], nn.Conv2d):
        _affordable(sent)
        return _recovered(sent.model, sent.update, sent, batch_size=size)
    assert isinstance(first, nn.Linear)
    G, b = (sent.update.gradients[f"1.{part}"] for part in ("weight", "bias"))
    x = fully_connected.recover_batch(
        G, b, size, weight=first.weight.detach(), bias=first.bias.detach(),
        generator=_seeded(sent.seed),
    )  # fmt: skip
    return x, True  # accepted by the forward pass


def _affordable(sent: Sent) -> None:
    """Give up where there are more guesses of the labels than are ever tried."""
    size = sent.update.samples
    G = sent.update.gradients[f"{len(sent.model) - 1}.weight"]
    possible = len(batches.possible_labels(G, size))
    guesses = math.comb(possible + size - 1, size)
    if guesses > batches.GUESSES:
        raise NotRecoveredError(
            f"{guesses} guesses of the labels, and only {batches.GUESSES} tries."
        )


def _unclipped(sent: Sent) -> Answer:
    """Give the gradient its size back: the last layer's input tells what its bias gradient was."""
    head, name = sent.model[-1], str(len(sent.model) - 1)
    G, b = (sent.update.gradients[f"{name}.{part}"].double() for part in ("weight", "bias"))
    z = fully_connected.recover_input(G, b) @ head.weight.double().T + head.bias.double()  # type: ignore[operator]
    k = z.detach().softmax(0)
    k[b.argmin()] -= 1
    factor = k.norm() / b.norm()
    whole = {n: (g.double() * factor).to(g.dtype) for n, g in sent.update.gradients.items()}
    return _recovered(sent.model, replace(sent.update, gradients=whole), sent)


def _completed(sent: Sent) -> Answer:
    """Pruned entries left out; where a whole column is, and not by lot, nothing is vouched for."""
    whole = defenses.complete_pruned(sent.model, sent.update, LOSS)
    x, exact = _recovered(sent.model, whole, sent)
    name = next(n for n, m in sent.model.named_children() if isinstance(m, nn.Linear))
    empty = bool((sent.update.gradients[f"{name}.weight"] == 0).all(0).any())
    return x, exact and not (empty and sent.defense.kind == "largest")


def _columns(sent: Sent) -> Answer:
    """Soteria: the classifier's pruned columns left out, as if dropped."""
    name = f"{len(sent.model) - 1}.weight"
    if not isinstance(sent.model[0], nn.Conv2d):  # the first layer says it all
        return _recovered(sent.model, sent.update, sent, partly=True)
    masked = defenses.with_dropout(sent.model, 1e-12).train()
    moved = {
        (f"{len(sent.model)}.{n.split('.')[1]}" if n.startswith(name.split(".")[0]) else n): g
        for n, g in sent.update.gradients.items()
    }
    return _recovered(masked, replace(sent.update, gradients=moved), sent, constraints="weight")


def _below(sent: Sent) -> Answer:
    """PRECODE: the recursion begins at the bottleneck's encoder, below the draw."""
    place = len(sent.model) - 2
    below = nn.Sequential(*sent.model[:place], sent.model[place].encode)  # type: ignore[arg-type]
    names = [name for name, _ in below.named_parameters()]
    renamed = {n.replace("encode.", ""): g for n, g in sent.update.gradients.items()}
    known = {name: renamed[name] for name in names}
    return _recovered(below, Update(known), sent, partly=True)


def _prior(sent: Sent) -> Answer:
    """What rank hides, filled in from public pictures."""
    found = recursion.recover(sent.model, sent.update, sent.shape, LOSS)
    return defenses.most_likely_input(sent.model, found, LOSS, sent.public), found.exact


ALGEBRA: dict[str, Callable[[Sent], Answer]] = {
    "none": _nothing,
    "batch": _apart,
    "clip": _unclipped,
    "largest": _completed,
    "lot": _completed,
    "soteria": _columns,
    "precode": _below,
    "rank": _prior,
}


def _unchanged(sent: Sent) -> Answer:
    raise DoesNotApplyError("The cosine does not see a factor: the naive column is this attack.")


def _drawn_anew(sent: Sent) -> Answer:
    raise DoesNotApplyError("The draw is new in every guess; the algebra does not need it.")


def _imitating(sent: Sent) -> Answer:
    return _searched(sent, sent.update, "idlg", start="patterned")


def _as_many(sent: Sent) -> Answer:
    return _searched(sent, sent.update, "inverting_gradients")


def _masks_along(sent: Sent) -> Answer:
    return _searched(sent, sent.update, "inverting_gradients", guess_masks=True)


def _believing(sent: Sent) -> Answer:
    known = {name: g != 0 for name, g in sent.update.gradients.items()}
    return _searched(sent, sent.update, "inverting_gradients", known=known)


def _from_algebra(sent: Sent) -> Answer:
    try:
        start = algebra(sent)[0].reshape(-1, *sent.shape).nan_to_num(0.5).clamp(0, 1)
    except GradientInversionError:
        start = sent.public.mean(0, keepdim=True)
    return _searched(sent, sent.update, "inverting_gradients", start=start, learning_rate=0.02)


SEARCH: dict[str, Callable[[Sent], Answer]] = {
    "none": _nothing,
    "batch": _as_many,
    "local": _imitating,
    "dropout": _masks_along,
    "clip": _unchanged,
    "largest": _believing,
    "lot": _believing,
    "soteria": _believing,
    "precode": _drawn_anew,
}

ATTACKERS: dict[str, Callable[[Sent], Answer]] = {
    "ratio": ratio,
    "recursion": walk,
    "DLG": dlg,
    "cosine + TV": cosine,
    "aware algebra": algebra,
    "aware search": search,
}
AWARE = ("aware algebra", "aware search")


# --- one cell ---------------------------------------------------------------------------------


def matched(found: Tensor, truth: Tensor) -> Tensor:
    r""":math:`\hat x_{\pi(n)},\; \pi = \arg\min_\pi \sum_n \lVert \hat x_{\pi(n)} - x_n \rVert^2`: a batch in the truth's order.

    A batch's gradient is a sum, which has no order; a score must not depend on one. Implements
    :eq:`matched-order`.

    Parameters
    ----------
    found : Tensor, (M, …)
        Recovered, in any order and of any shape that fits.
    truth : Tensor, (N, …)
        The pictures.

    Returns
    -------
    Tensor, (N, …)
        float64; NaN where nothing is left for a picture, if M < N.

    Raises
    ------
    InvalidTensorError
        If sizes do not fit, or an entry is NaN or infinite.
    """  # noqa: E501
    from scipy.optimize import linear_sum_assignment

    truth = checks.finite(truth, "truth")
    if found.numel() % truth[0].numel():
        raise InvalidTensorError(
            f"found has {found.numel()} entries, one picture {truth[0].numel()}: it holds no "
            "whole number of pictures."
        )
    pictures = checks.finite(found, "found").reshape(-1, *truth.shape[1:])
    gaps = torch.cdist(truth.flatten(1), pictures.flatten(1)).square()
    places, chosen = linear_sum_assignment(gaps.cpu().numpy())
    ordered = torch.full_like(truth, math.nan)
    ordered[torch.as_tensor(places)] = pictures[torch.as_tensor(chosen)]
    return ordered


def measure(key: Key, settings: Settings | None = None, root: str | None = None) -> Cell:
    """Make one cell of the board afresh.

    Parameters
    ----------
    key : tuple of str
        Network, defense, and attacker or ``"price"``.
    settings : Settings, optional
        ``None``: those of the committed board.
    root : str, optional
        Where CIFAR-10 lies.

    Returns
    -------
    dict
        ``psnr`` and ``ssim`` of each picture, ``exact`` (what the attacker vouches for) and
        ``errors`` where there are any, ``seconds`` of CPU for each attack; or ``accuracy`` of
        each seed; or ``does_not_apply``, the reason.

    Raises
    ------
    UnknownNameError
        If a part of the key is unknown.
    """
    _known(key)
    settings = settings or Settings()
    pictures = load_data(settings.data, root)
    net, defense = NETS[key[0]], DEFENSES[key[1]]
    with _quick():
        try:
            if key[2] == PRICE:
                return _price(net, defense, pictures, settings)
            return _attacked(net, defense, key[2], pictures, settings)
        except DoesNotApplyError as reason:
            return {"does_not_apply": str(reason)}


def _attacked(
    net: Net, defense: Defense, attacker: str, pictures: Data, settings: Settings
) -> Cell:
    size = int(defense.value) if defense.kind == "batch" else 1
    rows: list[Cell] = []
    errors: dict[str, int] = {}
    began = time.process_time()
    spent = 0.0
    for trial in range(-(-settings.pictures // size)):
        sent = _sent(net, defense, trial, size, pictures, settings.steps)
        truth = pictures.test_x[trial * size : (trial + 1) * size]
        began = time.process_time()
        try:
            found, exact = ATTACKERS[attacker](sent)
        except DoesNotApplyError:
            raise
        except GradientInversionError as error:
            name = type(error).__name__
            errors[name] = errors.get(name, 0) + 1
            found, exact = truth.new_empty(0), False if attacker in EXACT else None
        spent += time.process_time() - began
        rows += _scores(found, truth, pictures.x.mean(0), exact)
    trials = len(rows) // size
    cell = {name: [row[name] for row in rows] for name in rows[0]}
    return {**cell, **({"errors": errors} if errors else {}), "seconds": round(spent / trials, 3)}


EXACT = ("recursion", "aware algebra")  # attackers who say whether they may be trusted


def _sent(net: Net, defense: Defense, trial: int, size: int, pictures: Data, steps: int) -> Sent:
    weights = _seeded(1000 + trial)
    model = defended_model(net.make(pictures.shape, weights), defense, pictures.shape, weights)
    chosen = slice(trial * size, (trial + 1) * size)
    update = send(
        model, defense, pictures.test_x[chosen], pictures.test_y[chosen], net.rate, _seeded(trial)
    )
    return Sent(model, update, defense, pictures.shape, pictures.x, steps, 2000 + trial)


def _scores(found: Tensor, truth: Tensor, floor: Tensor, exact: bool | None) -> list[Cell]:
    """Score picture by picture; where there is none, the mean picture, which anyone can show."""
    shown = matched(found.nan_to_num(0.5).clamp(0, 1), truth) if found.numel() else truth * math.nan
    shown = torch.where(shown.isnan(), floor.to(shown), shown)
    vouched = {} if exact is None else {"exact": exact}
    return [
        {
            "psnr": round(min(metrics.psnr(a, b.double()), CEILING), 1),
            "ssim": round(metrics.ssim(a, b.double()), 3),
            **vouched,
        }
        for a, b in zip(shown, truth, strict=True)
    ]


def _price(net: Net, defense: Defense, pictures: Data, settings: Settings) -> Cell:
    """Accuracy of a federation whose clients send what the defense makes of 50 pictures' update."""
    cell: Cell = {"accuracy": []}
    if defense.kind == "private":
        cell["epsilon_of_one_update"] = _short(defenses.privacy_spent(defense.value, 1.0, 1))
    for seed in range(settings.seeds):
        weights = _seeded(1000 + seed)
        model = defended_model(net.make(pictures.shape, weights), defense, pictures.shape, weights)
        if defense.kind == "private":
            trained, epsilon = defenses.train_privately(
                model, LOSS, pictures.x, pictures.y, noise_multiplier=defense.value,
                steps=net.rounds, batch_size=ROUND, learning_rate=net.rate, generator=_seeded(seed),
            )  # fmt: skip
            cell["epsilon_of_the_training"] = _short(epsilon)
        else:
            trained = _trained(model, defense, pictures, net, seed)
        cell["accuracy"].append(
            round(defenses.accuracy(trained, pictures.test_x, pictures.test_y), 4)
        )
    return cell


def _short(number: float) -> float:
    return float(f"{number:.3g}")


def _trained(
    model: nn.Sequential, defense: Defense, pictures: Data, net: Net, seed: int
) -> nn.Module:
    """Federated SGD; at a quarter of the rate, and again, while it fails on its own data."""
    best, most = model, -1.0
    for rate in (net.rate * defense.rate / factor for factor in (1, 4, 16)):
        student = copy.deepcopy(model)
        try:
            _rounds(student, defense, pictures, net.rounds, rate, _seeded(seed))
        except InvalidTensorError:  # it overflowed
            continue
        score = defenses.accuracy(student, pictures.x, pictures.y)
        if score > most:
            best, most = student, score
        if score > LEARNED:
            break
    return best


def _rounds(
    student: nn.Sequential,
    defense: Defense,
    pictures: Data,
    rounds: int,
    rate: float,
    source: torch.Generator,
) -> None:
    for _ in range(rounds):
        chosen = torch.randperm(len(pictures.x), generator=source)[:ROUND]
        update = send(student, defense, pictures.x[chosen], pictures.y[chosen], rate, source)
        defenses._step(student, update, update.learning_rate or rate)


def baselines(settings: Settings | None = None, root: str | None = None) -> dict[str, list[float]]:
    """PSNR that needs no gradient: the mean picture, and the nearest of the victim's class.

    Parameters
    ----------
    settings : Settings, optional
        ``None``: those of the committed board.
    root : str, optional
        Where CIFAR-10 lies.

    Returns
    -------
    dict
        ``mean`` and ``nearest``, for each of the pictures that are attacked one at a time.
    """
    settings = settings or Settings()
    pictures = load_data(settings.data, root)
    mean, nearest = [], []
    for x, y in zip(
        pictures.test_x[: settings.pictures], pictures.test_y[: settings.pictures], strict=True
    ):
        same = pictures.x[pictures.y == y]
        closest = same[(same - x).flatten(1).norm(dim=1).argmin()]
        mean.append(round(metrics.psnr(pictures.x.mean(0), x), 1))
        nearest.append(round(metrics.psnr(closest, x), 1))
    return {"mean": mean, "nearest": nearest}


# --- the file ---------------------------------------------------------------------------------


def keys(
    nets: Iterable[str] | None = None,
    rows: Iterable[str] | None = None,
    columns: Iterable[str] | None = None,
) -> list[Key]:
    """List the board's cells, or part of them.

    Parameters
    ----------
    nets, rows, columns : iterable of str, optional
        Networks, defenses, and attackers or ``"price"``; ``None``: all.

    Returns
    -------
    list of tuple of str

    Raises
    ------
    UnknownNameError
        If one of them is unknown.
    """
    found = [
        (net, row, column)
        for net in (NETS if nets is None else nets)
        for row in (DEFENSES if rows is None else rows)
        for column in ((*ATTACKERS, PRICE) if columns is None else columns)
    ]
    for key in found:
        _known(key)
    return found


def _known(key: Key) -> None:
    for name, known in zip(key, (list(NETS), list(DEFENSES), [*ATTACKERS, PRICE]), strict=True):
        if name not in known:
            raise UnknownNameError(f"No {name!r} on the board; there are {', '.join(known)}.")


def versions() -> dict[str, str]:
    """Versions that a results file is made with.

    Returns
    -------
    dict of str to str
        Of this package, torch, Opacus and Python.
    """
    from . import __version__

    try:
        opacus = version("opacus")
    except PackageNotFoundError:
        opacus = "none"
    own = {"gradinv_edu": __version__, "torch": torch.__version__.split("+")[0], "opacus": opacus}
    return {**own, "python": platform.python_version()}


def load(file: str | Path = FILE, settings: Settings | None = None) -> dict[str, Any]:
    """Read a results file, or begin one where there is none.

    Parameters
    ----------
    file : path
        Of the results.
    settings : Settings, optional
        To go on with: the file's own settings and versions must then be these. ``None``: to
        read, whatever made it.

    Returns
    -------
    dict
        ``format``, ``settings``, ``versions``, ``seeds``, ``baselines`` and ``cells``, by
        ``network/defense/attacker``.

    Raises
    ------
    ResultsFileError
        If the file is missing (to read), damaged, or made with other versions or settings (to go
        on with). It is left as it is.
    """
    path = Path(file)
    if not path.exists():
        if settings is None:
            raise ResultsFileError(f"There is no results file {path}: make it, or name another.")
        return {"format": FORMAT, "settings": asdict(settings), "versions": versions(),
                "seeds": SEEDS, "baselines": {}, "cells": {}}  # fmt: skip
    try:
        board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        parts = [board[n] for n in ("cells", "settings", "versions", "baselines")]
        current = board["format"] == FORMAT and isinstance(board["seeds"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsFileError(f"{path} is no results file of this program: {error!r}.") from error
    if not current or not all(isinstance(p, dict) for p in parts):
        raise ResultsFileError(f"{path} has another format than {FORMAT}; move it away.")
    _whole_cells(path, board["cells"])
    if settings is not None:
        _same(path, board, settings)
    return board


def _whole_cells(path: Path, cells: dict[str, Any]) -> None:
    for name, cell in cells.items():
        kind = "accuracy" if name.endswith(f"/{PRICE}") else "psnr"
        if not isinstance(cell, dict) or not {kind, "does_not_apply"} & set(cell):
            raise ResultsFileError(f"{path} is damaged: its cell {name!r} holds no {kind}.")


SEEDS = (
    "trial t: weights 1000 + t, client t, attacker 2000 + t; training s: weights 1000 + s, client s"
)


def _same(path: Path, board: dict[str, Any], settings: Settings) -> None:
    current = {"settings": asdict(settings), "versions": versions(), "seeds": {"seeds": SEEDS}}
    board = {**board, "seeds": {"seeds": board["seeds"]}}
    for part, now in current.items():
        then = board.get(part, {})
        differing = [n for n in now if n != "python" and then.get(n) != now[n]]
        if differing:
            said = ", ".join(f"{n} {then.get(n)!r}, now {now[n]!r}" for n in differing)
            raise ResultsFileError(
                f"{path} was made with other {part} ({said}). Its cells and new ones do not belong "
                "together: give another --file, or move this one away."
            )


def save(board: dict[str, Any], file: str | Path) -> None:
    """Write a results file in one step: whole, or not at all.

    Parameters
    ----------
    board : dict
        As from :func:`load`; one line a cell, in the board's own order.
    file : path
        Replaced.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    order = {"/".join(key): place for place, key in enumerate(keys())}
    cells = sorted(board["cells"], key=lambda name: order.get(name, len(order)))
    head = _json({n: v for n, v in board.items() if n != "cells"}, indent=1)
    lines = ",\n".join(f"  {_json(name)}: {_json(board['cells'][name])}" for name in cells)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(f'{head[:-2]},\n "cells": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    os.replace(part, path)


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


# --- reading it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What one attacker did in one cell.

    Attributes
    ----------
    attacker : str
        Its name.
    psnr, ssim : float
        Medians over the pictures.
    successes : metrics.Rate
        Share of pictures over :data:`SUCCESS`, with Wilson's interval.
    exact : float or None
        Share that the attacker vouched for; ``None``: this one never does.
    seconds : float
        Of CPU, for one attack.
    """

    attacker: str
    psnr: float
    ssim: float
    successes: metrics.Rate
    exact: float | None
    seconds: float


def summary(board: dict[str, Any], key: Key) -> Summary | None:
    """Sum up one cell.

    Parameters
    ----------
    board : dict
        From :func:`load`.
    key : tuple of str
        Network, defense, attacker.

    Returns
    -------
    Summary or None
        ``None`` where the attacker does not apply.

    Raises
    ------
    UnknownNameError
        If the board has no such cell.
    """
    _known(key)
    cell = board["cells"].get("/".join(key))
    if cell is None:
        raise UnknownNameError(f"This board has no cell {'/'.join(key)!r} yet: run it.")
    if "does_not_apply" in cell:
        return None
    exact = sum(cell["exact"]) / len(cell["exact"]) if "exact" in cell else None
    passed = metrics.success_rate(psnr > SUCCESS for psnr in cell["psnr"])
    return Summary(
        key[2], median(cell["psnr"]), median(cell["ssim"]), passed, exact, cell["seconds"]
    )


def best(board: dict[str, Any], net: str, defense: str, *, naive: bool = False) -> Summary | None:
    """Find the attacker of highest median PSNR; one who knows may use any.

    Parameters
    ----------
    board : dict
        From :func:`load`.
    net, defense : str
        The row.
    naive : bool
        Among those who do not know of the defense, only.

    Returns
    -------
    Summary or None
        ``None`` where the defense does not apply to the network.
    """
    asked = [a for a in ATTACKERS if not (naive and a in AWARE)]
    found = [summary(board, (net, defense, attacker)) for attacker in asked]
    return max((s for s in found if s is not None), key=lambda s: s.psnr, default=None)


def draw(board: dict[str, Any]) -> Figure:
    """Draw the whole board: defenses down, attackers across, a panel for each network.

    Parameters
    ----------
    board : dict
        From :func:`load`, with no cell missing.

    Returns
    -------
    matplotlib.figure.Figure
        Registered with pyplot. Numbers are median PSNR in dB, darker is more of the picture; a
        dot says that the attacker vouched for every picture, a dash that it does not apply.
    """
    import matplotlib.pyplot as plt

    from .plotting import style

    with style():
        figure, panels = plt.subplots(
            1, len(NETS), figsize=(8.6, 7.6), sharey=True, layout="constrained"
        )
        for panel, net in zip(panels, NETS, strict=True):
            _draw_net(panel, board, net)
            panel.set_title(net)
        panels[0].set_yticks(range(len(DEFENSES)), list(DEFENSES))
    return figure


def _draw_net(panel: Axes, board: dict[str, Any], net: str) -> None:
    from matplotlib import colormaps

    found = [[summary(board, (net, d, a)) for a in ATTACKERS] for d in DEFENSES]
    shown = [[math.nan if s is None else min(s.psnr, 60.0) for s in row] for row in found]
    colours = colormaps["GnBu"].with_extremes(bad="#f4f3f1")
    panel.imshow(shown, cmap=colours, vmin=0, vmax=75, aspect="auto")
    for i, row in enumerate(found):
        for j, cell in enumerate(row):
            ink = "white" if shown[i][j] > 50 else "#23292e"
            panel.text(j, i, _entry(cell), ha="center", va="center", fontsize=7.5, color=ink)
    panel.axvline(len(ATTACKERS) - len(AWARE) - 0.5, color="white", lw=3)
    panel.set_xticks(range(len(ATTACKERS)), list(ATTACKERS), rotation=60, ha="right")
    panel.tick_params(length=0)


def _entry(cell: Summary | None) -> str:
    if cell is None:
        return "–"
    return f"{cell.psnr:.0f}{'•' if cell.exact == 1 else ''}"


# --- the run ----------------------------------------------------------------------------------


def run(
    file: str | Path = FILE,
    *,
    settings: Settings | None = None,
    cells: Sequence[Key] | None = None,
    root: str | None = None,
    workers: int = 1,
    ray: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fill in the cells that a results file lacks.

    Parameters
    ----------
    file : path
        To go on with, or to begin.
    settings : Settings, optional
        ``None``: those of the committed board.
    cells : sequence of key, optional
        Which are wanted; ``None``: all.
    root : str, optional
        Where CIFAR-10 lies, readable by every worker.
    workers : int
        Processes of joblib on this machine; 1: none but this.
    ray : bool
        Send cells to a Ray cluster instead, by joblib's Ray backend: the one that
        ``RAY_ADDRESS`` names, or one of this machine alone.
    progress : bool
        Show a bar.

    Returns
    -------
    dict
        The board, as it now is in the file.

    Raises
    ------
    ResultsFileError
        If the file was made by other versions or with other settings, or is damaged; it stays.
    InvalidArgumentError
        If a number cannot be, or joblib or Ray is asked for and not installed.
    UnknownNameError
        If a cell is not on the board.
    """
    _whole(workers, "workers", 1)
    settings = settings or Settings()
    wanted = keys() if cells is None else list(cells)
    for key in wanted:
        _known(key)
    board = load(file, settings)
    missing = [key for key in wanted if "/".join(key) not in board["cells"]]
    if missing and not board["baselines"]:
        board["baselines"] = baselines(settings, root)
    for key, cell in _shown(
        _computed(missing, settings, root, workers, ray), len(missing), progress
    ):
        board["cells"]["/".join(key)] = cell
        save(board, file)
    return board


def _computed(
    missing: list[Key], settings: Settings, root: str | None, workers: int, ray: bool
) -> Iterator[tuple[Key, Cell]]:
    """Cells as they are finished, in whatever order."""
    if not ray and workers == 1:
        yield from ((key, measure(key, settings, root)) for key in missing)
        return
    with _backend(workers, ray) as joblib:
        calls = [joblib.delayed(_alone)(key, settings, root) for key in missing]
        if not ray:
            pool = joblib.Parallel(
                return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs"
            )
            yield from pool(calls)
            return
        # Ray's backend returns whole lists only: rounds of a few cells a worker are kept.
        size = AT_ONCE * joblib.effective_n_jobs()
        for start in range(0, len(calls), size):
            yield from joblib.Parallel(batch_size=1)(calls[start : start + size])


def _alone(key: Key, settings: Settings, root: str | None) -> tuple[Key, Cell]:
    torch.set_num_threads(1)  # in a worker of our own
    return key, measure(key, settings, root)


@contextmanager
def _backend(workers: int, ray: bool) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home otherwise
    try:
        import joblib

        if ray:
            from ray.util.joblib import register_ray

            register_ray()  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise InvalidArgumentError(
            f"{error.name} is not installed: uv pip install 'gradinv_edu[scoreboard]'."
        ) from error
    how = {"backend": "ray", "n_jobs": -1} if ray else {"backend": "loky", "n_jobs": workers}
    with joblib.parallel_config(**how):
        yield joblib


def _shown(
    cells: Iterator[tuple[Key, Cell]], total: int, progress: bool
) -> Iterator[tuple[Key, Cell]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="scoreboard", unit="cell", disable=not progress) as bar:
        for key, cell in cells:
            yield key, cell
            bar.set_postfix_str("/".join(key))
            bar.update()


@contextmanager
def _quick() -> Iterator[None]:
    """Tiny convolutions are faster without oneDNN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it looks up in passing
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _whole(value: int, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{name} must be a whole number from {least}, got {value!r}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        ``None``: those of the process.

    Returns
    -------
    int
        0, or 2 where an argument or the file cannot be used; the reason is printed.
    """
    parser = argparse.ArgumentParser(prog="python -m gradinv_edu.scoreboard", description=__doc__)
    parser.add_argument("--file", default=str(FILE))
    for name in ("nets", "defenses", "attackers"):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME")
    for name in ("pictures", "seeds", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings(), name))
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--ray", action="store_true", help="a Ray cluster (RAY_ADDRESS)")
    parser.add_argument("--cifar10", metavar="FOLDER", help="where CIFAR-10 already lies")
    given = parser.parse_args(arguments)
    try:
        settings = Settings(
            "cifar10" if given.cifar10 else "digits", given.pictures, given.seeds, given.steps
        )
        cells = keys(given.nets, given.defenses, given.attackers)
        run(given.file, settings=settings, cells=cells, root=given.cifar10,
            workers=given.workers, ray=given.ray)  # fmt: skip
    except (GradientInversionError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from gradinv_edu.scoreboard import main as _main  # so that workers find it by this name

    sys.exit(_main())

"""Every defense against every attacker on five networks: what leaks, and what it costs.

Usage: python -m gradinv_edu.scoreboard [--quick] [--workers N | --ray] [--nets …] [--defenses …]

Each cell is a network, a defense and an attacker, or a network, a defense and its price. The file
is rewritten whole after each cell, so that a run can be stopped at any time and goes on where it
was; a cell that holds fewer pictures than are asked for is gone on with, too. MNIST's figures are
the study; `--quick` measures scikit-learn's small digits, in seconds a cell.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, data, metrics, models
from .engine import attackers, sweep
from .engine.attackers import ATTACKERS
from .engine.defenses import DEFENSES
from .engine.price import Data, Net, price, trained, tuned
from .engine.results import SUCCESS, best, draw, draw_leaks, leaks, table
from .errors import (
    DoesNotApplyError,
    GradientInversionError,
    InvalidTensorError,
    ResultsFileError,
    UnknownNameError,
    UnsupportedLayerError,
)

__all__ = [
    "ATTACKERS",
    "DEFENSES",
    "FILE",
    "NETS",
    "PRICE",
    "QUICK_FILE",
    "QUICK_SETTINGS",
    "SUCCESS",
    "TRAINED",
    "DoesNotApplyError",
    "Settings",
    "baselines",
    "best",
    "draw",
    "draw_leaks",
    "keys",
    "leaks",
    "load",
    "load_data",
    "main",
    "matched",
    "measure",
    "run",
    "table",
]

QUICK_FILE = Path(__file__).parents[1] / "book" / "data" / "scoreboard.json"
FILE = QUICK_FILE.with_name("study.json")
LOSS = nn.CrossEntropyLoss()
CLASSES, PRICE, TRAINED = 10, "price", ", trained"
CEILING = 200.0  # dB; beyond, figures are the machine's
SEEDS = (
    "trial t: weights 1000 + t, client t, attacker 2000 + t; "
    "training s: weights 1000 + s, client s; a trained network's trial t: training t mod seeds"
)

Cell = dict[str, Any]
Board = dict[str, Any]
Key = tuple[str, str, str]  # network, defense, attacker or PRICE


NETS = {
    "dense": Net(
        lambda s, g: models.mlp([math.prod(s), 256, CLASSES], "relu", generator=g), 300, 0.5
    ),
    "lenet": Net(lambda s, g: models.lenet(s, CLASSES, generator=g), 400, 1.5),
    "wide": Net(
        lambda s, g: models.wide_cnn(s, CLASSES, 0.5, bias=True, generator=g), 300, 0.2
    ),
    "vit": Net(lambda s, g: models.vit(s, CLASSES, depth=1, generator=g), 300, 0.5),
    "resnet": Net(lambda s, g: models.norm_resnet(s, CLASSES, 8, generator=g), 300, 0.2),
}  # fmt: skip
QUICK = tuple(NETS)[:3]
DATA = ("mnist", "digits", "cifar10")
KNOWN = [*NETS, *(f"{name}{TRAINED}" for name in NETS)]  # each also after its training


@dataclass(frozen=True)
class Settings:
    """What a results file was made with; files of other settings are not mixed.

    Attributes
    ----------
    data : {"mnist", "digits", "cifar10"}
        5 000 digits of MNIST, scikit-learn's 8×8 digits, or CIFAR-10 where the reader has it.
    pictures, searched : int
        Attacked in each cell by equations, and by a search, at least (a batch takes the next
        multiple of its size). A file's cells may hold different numbers.
    seeds : int
        Trainings for each price; their networks are those that are attacked as trained ones, in
        turn.
    steps : int
        Of signed Adam; of L-BFGS, twenty iterations each, a twentieth of them.

    Raises
    ------
    InvalidArgumentError, UnknownNameError
        If a number is not whole or too small; if there is no such data.
    """

    data: str = "mnist"
    pictures: int = 100
    searched: int = 10
    seeds: int = 5
    steps: int = 300

    def __post_init__(self) -> None:
        _one_of(self.data, DATA)
        for name, least in (("pictures", 1), ("searched", 1), ("seeds", 1), ("steps", 20)):
            checks.whole(getattr(self, name), name, least)


@lru_cache(maxsize=2)
def load_data(name: str = "mnist", root: str | None = None) -> Data:
    """Pictures of a board, shuffled once and for all, and others, of which the first are attacked.

    Parameters
    ----------
    name : {"mnist", "digits", "cifar10"}
        Which: 4000 and 1000, 1500 and 297, or 5000 and 1000; nothing is downloaded.
    root : str, optional
        torchvision's folder, where CIFAR-10 already lies; without it, ``FileNotFoundError``.
    """
    _one_of(name, DATA)
    if name == "mnist":
        halves = [(x[o], y[o]) for x, y in (data.mnist(train=True), data.mnist())
                  for o in [torch.randperm(len(x), generator=_seeded(0))]]  # fmt: skip
        return Data(*halves[0], *halves[1])
    x, y = data.digits() if name == "digits" else data.cifar10(root or "data", indices=range(6000))
    order = torch.randperm(len(x), generator=_seeded(0))
    x, y = x[order], y[order]
    cut = 1500 if name == "digits" else 5000
    return Data(x[:cut], y[:cut], x[cut:], y[cut:])


# --- one cell ---------------------------------------------------------------------------------


def matched(found: Tensor, truth: Tensor) -> Tensor:
    r""":math:`\hat x_{\pi(n)},\; \pi = \arg\min_\pi \sum_n \lVert \hat x_{\pi(n)} - x_n \rVert^2`.

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
    """
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


def measure(
    key: Key, settings: Settings | None = None, root: str | None = None, begun: Cell | None = None
) -> Cell:
    """Make one cell of the board, afresh or from where it was left.

    Parameters
    ----------
    key : tuple of str
        Network, defense, and attacker or ``"price"``; others raise ``UnknownNameError``.
    settings : Settings, optional
        ``None``: the quick board's.
    root : str, optional
        Where CIFAR-10 lies.
    begun : dict, optional
        The cell with fewer pictures.

    Returns
    -------
    dict
        ``psnr`` and ``ssim`` of each picture, ``exact`` (what the attacker is sure of) and
        ``errors`` where there are any, ``seconds`` of CPU for each attack; or ``accuracy`` of
        each seed; or ``does_not_apply``, the reason.
    """
    _known(key)
    settings = settings or QUICK_SETTINGS
    name, defense = settings.data, DEFENSES[key[1]]
    pictures = load_data(name, root)
    quiet = warnings.catch_warnings(action="ignore")  # torch warns of what it looks up in passing
    # tiny convolutions are faster without
    with quiet, torch.backends.mkldnn.flags(enabled=name != "digits"):
        try:
            if key[2] == PRICE:
                rate = _rate(*_row(*key[:2]), name, root)
                seeds = range(settings.seeds)
                nets = (_trained(*_row(*key[:2]), s, name, root) for s in seeds)
                return price(defense, pictures, nets) | {"rate": rate}
            return _attacked(key, pictures, settings, root, begun or {})
        except (DoesNotApplyError, UnsupportedLayerError) as reason:
            return {"does_not_apply": str(reason)}
        except InvalidTensorError as reason:
            return {"does_not_apply": f"Training overflows at the rate chosen for it. {reason}"}


def _wanted(key: Key, settings: Settings) -> int:
    """Pictures of a cell, whole batches."""
    count = settings.searched if ATTACKERS[key[2]].searches else settings.pictures
    return -(-count // DEFENSES[key[1]].samples) * DEFENSES[key[1]].samples


def _attacked(key: Key, pictures: Data, settings: Settings, root: str | None, begun: Cell) -> Cell:
    defense, attacker = DEFENSES[key[1]], ATTACKERS[key[2]]
    net, after = NETS[key[0].removesuffix(TRAINED)], key[0].endswith(TRAINED)
    rate = _rate(*_row(*key[:2]), settings.data, root) if after else net.rate
    columns = ("psnr", "ssim", *(["exact"] if attacker.promises else []))
    cell: Cell = {name: list(begun.get(name, [])) for name in columns}
    errors: dict[str, int] = dict(begun.get("errors", {}))
    done, trials = (n // defense.samples for n in (len(cell["psnr"]), _wanted(key, settings)))
    spent, shape = begun.get("seconds", 0.0) * done, pictures.x.shape[1:]
    for trial in range(done, trials):
        if after:
            model, _ = _trained(*_row(*key[:2]), trial % settings.seeds, settings.data, root)
        else:
            weights = _seeded(1000 + trial)
            model = defense.build(net.make(shape, weights), shape, weights)
        victims = slice(trial * defense.samples, (trial + 1) * defense.samples)
        truth = pictures.test_x[victims]
        began = time.process_time()
        try:
            update = defense.send(
                model, LOSS, truth, pictures.test_y[victims], rate, _seeded(trial)
            )
            received = attackers.Received(
                model, update, LOSS, shape, defense, pictures.x, settings.steps, 2000 + trial
            )
            began = time.process_time()
            found, exact = attacker(received)
        except DoesNotApplyError:
            raise
        except GradientInversionError as error:  # of the attack, or of steps that overflow
            errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
            found, exact = truth.new_empty(0), False
        spent += time.process_time() - began
        # where there is no answer, the mean picture, which anyone can show
        shown = truth * math.nan
        if found.numel():
            shown = matched(found.nan_to_num(0.5).clamp(0, 1), truth)
        shown = torch.where(shown.isnan(), pictures.x.mean(0).to(shown), shown)
        for a, b in zip(shown, truth.double(), strict=True):
            cell["psnr"].append(round(min(metrics.psnr(a, b), CEILING), 1))
            cell["ssim"].append(round(metrics.ssim(a, b), 3))
            if attacker.promises:
                cell["exact"].append(exact)
    return {**cell, **({"errors": errors} if errors else {}), "seconds": round(spent / trials, 3)}


def _row(net: str, defense: str) -> tuple[str, str]:
    """Network and defense of a training; a batch is what training takes anyway."""
    row = "none" if DEFENSES[defense].kind == "batch" else defense
    return net.removesuffix(TRAINED), row


@cache
def _rate(net: str, defense: str, data: str, root: str | None) -> float:
    return tuned(NETS[net], DEFENSES[defense], load_data(data, root))


@cache
def _trained(
    net: str, defense: str, seed: int, data: str, root: str | None
) -> tuple[nn.Sequential, float | None]:
    """Trained once behind its defense, for its price and all attackers."""
    rate = _rate(net, defense, data, root)
    model, epsilon = trained(NETS[net], DEFENSES[defense], load_data(data, root), seed, rate)
    return model.train(), epsilon


def baselines(settings: Settings | None = None, root: str | None = None) -> dict[str, list[float]]:
    """PSNR that needs no gradient: of the mean picture, and of the nearest of the victim's class.

    Parameters
    ----------
    settings, root
        As for :func:`measure`; only pictures attacked one at a time are looked up.
    """
    settings = settings or Settings()
    pictures = load_data(settings.data, root)
    found: dict[str, list[float]] = {"mean": [], "nearest": []}
    for x, y in zip(pictures.test_x, pictures.test_y[: settings.pictures], strict=False):
        same = pictures.x[pictures.y == y]
        closest = same[(same - x).flatten(1).norm(dim=1).argmin()]
        found["mean"].append(round(metrics.psnr(pictures.x.mean(0), x), 1))
        found["nearest"].append(round(metrics.psnr(closest, x), 1))
    return found


# --- the file ---------------------------------------------------------------------------------


def keys(
    nets: Iterable[str] | None = None,
    rows: Iterable[str] | None = None,
    columns: Iterable[str] | None = None,
) -> list[Key]:
    """List the board's cells, or those of some networks, defenses, and attackers or the price.

    Without ``nets``: the three small networks at their first weights; without ``columns``: every
    attacker, and the price of a network that is attacked after training, too.

    Raises
    ------
    UnknownNameError
        If one of them is unknown.
    """
    nets = list(QUICK if nets is None else nets)
    found = [
        (net, row, column)
        for net in nets
        for row in (DEFENSES if rows is None else rows)
        for column in ((*ATTACKERS, PRICE) if columns is None else columns)
        if column != PRICE or (columns and not net.endswith(TRAINED)) or net + TRAINED in nets
    ]
    for key in found:
        _known(key)
    return found


def _known(key: Key) -> None:
    for name, known in zip(key, (KNOWN, list(DEFENSES), [*ATTACKERS, PRICE]), strict=True):
        _one_of(name, known)


def _one_of(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UnknownNameError(f"No {name!r} on the board; there are {', '.join(known)}.")


QUICK_SETTINGS = Settings("digits", 4, 4, 1, 100)


def load(file: str | Path = FILE, settings: Settings | None = None) -> Board:
    """Read a results file, or begin one where there is none (:func:`~.engine.sweep.load`).

    Parameters
    ----------
    file : path
        Of the results.
    settings : Settings, optional
        To go on with: the file's own settings and versions must then be these. ``None``: to
        read, whatever made it.

    Raises
    ------
    ResultsFileError
        If it is missing, damaged, or made with something else; it is left as it is.
    """
    head = None
    if settings is not None:
        head = {
            "format": 1,
            "settings": {name: getattr(settings, name) for name in ("data", "seeds", "steps")},
            "versions": sweep.versions(),
            "seeds": SEEDS,
        }
    board = sweep.load(file, head)
    for name, cell in board["cells"].items():
        kind = "accuracy" if name.endswith(f"/{PRICE}") else "psnr"
        if not isinstance(cell, dict) or not {kind, "does_not_apply"} & set(cell):
            raise ResultsFileError(f"{file} is damaged: its cell {name!r} holds no {kind}.")
    return board


def run(
    file: str | Path = FILE,
    *,
    settings: Settings | None = None,
    cells: Sequence[Key] | None = None,
    root: str | None = None,
    **how: Any,
) -> Board:
    """Fill in the cells that a results file lacks.

    Parameters
    ----------
    file, settings : path, Settings
        To go on with, or to begin, as for :func:`load`.
    cells : sequence of key, optional
        Which are wanted; ``None``: all.
    root : str, optional
        Where CIFAR-10 lies, readable by every worker.
    **how
        ``workers``, ``ray`` and ``progress``, as for :func:`gradinv_edu.engine.sweep.fill`.
    """
    settings = settings or Settings()
    wanted = keys() if cells is None else cells
    for key in wanted:
        _known(key)
    board, names = load(file, settings), ["/".join(key) for key in wanted]
    if not board["baselines"] and not set(names) <= set(board["cells"]):
        board["baselines"] = baselines(settings, root)
    order = ["/".join(key) for key in keys(KNOWN)]

    def whole_cell(name: str, cell: Cell) -> bool:
        net, defense, column = name.split("/")
        held = len(cell.get("psnr", []))
        return "psnr" not in cell or held >= _wanted((net, defense, column), settings)

    call = partial(_named, settings, root, {name: board["cells"].get(name) for name in names})
    return sweep.fill(board, file, names, call, order=order, whole_cell=whole_cell, **how)


def _named(settings: Settings, root: str | None, begun: dict[str, Cell | None], name: str) -> Cell:
    net, defense, column = name.split("/")
    return measure((net, defense, column), settings, root, begun[name])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, or 2 where an argument or the file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m gradinv_edu.scoreboard", description=__doc__)
    parser.add_argument("--file", help="of the results")
    for name in ("nets", "defenses", "attackers"):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME")
    for name in ("pictures", "searched", "seeds", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, a few")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--ray", action="store_true", help="a Ray cluster (RAY_ADDRESS)")
    parser.add_argument("--cifar10", metavar="FOLDER", help="where CIFAR-10 already lies")
    given = parser.parse_args(arguments)
    file: Path | None
    usual, file = (QUICK_SETTINGS, QUICK_FILE) if given.quick else (Settings(), FILE)
    named: Path | str | None = given.file or file
    if given.cifar10:
        usual, named = replace(usual, data="cifar10"), given.file
    chosen = {f.name: getattr(given, f.name, None) for f in fields(Settings)}
    try:
        settings = replace(usual, **{n: v for n, v in chosen.items() if v is not None})
        nets = given.nets or (QUICK if given.quick else KNOWN)
        cells = keys(nets, given.defenses, given.attackers)
        if named is None:
            raise ResultsFileError("CIFAR-10's figures have a file of their own: name it, --file.")
        run(named, settings=settings, cells=cells, root=given.cifar10,
            workers=given.workers, ray=given.ray)  # fmt: skip
    except (GradientInversionError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from gradinv_edu.scoreboard import main as _main  # so that workers find it by this name

    sys.exit(_main())

"""Checks of the exercises to chapter 13, the scoreboard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ..data import digits
from ..metrics import psnr, wilson_interval
from ..scoreboard import SUCCESS, DoesNotApplyError
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

Z = 1.959963984540054  # of 95 %, two-sided


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ENDS = "Return both ends of the interval, the lower one first."
WALD = (
    "You put the observed share under the root, where the true rate p belongs. That interval has "
    "no width when all of the pictures came out: are four of four a proof?"
)
NO_ROOT = "You used p (1 - p) / n itself: that is a variance, and a distance is compared with it."
ONE_SIDED = "Your z leaves 5 % on each side, 10 % in all; 95 % between the ends asks for 1.96."
SWAPPED = "Your lower end is the higher one."
UNSHIFTED = (
    "Your interval is centred on the observed share. The roots of the quadratic lie on either side "
    "of something nearer to one half: solve it again, with its linear term."
)


def _roots(share: float, n: int, z: float, shift: bool = True) -> tuple[float, float]:
    """Ends of Wilson's interval."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n) if shift else share
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return middle - reach, middle + reach


def _wald(share: float, n: int, power: float = 0.5) -> tuple[float, float]:
    reach = Z * (share * (1 - share) / n) ** power
    return share - reach, share + reach


def _solved_without_a_root(share: float, n: int) -> tuple[float, float]:
    """Solve |share - p| = z p (1 - p) / n for p, on both sides of the share."""
    ends = []
    for sign in (1, -1):  # sign (share - p) = c p (1 - p)
        c = sign * Z / n
        root = math.sqrt((1 + c) ** 2 - 4 * c * share)
        ends.append((1 + c - root) / (2 * c))
    return ends[0], ends[1]


COUNTS = ((9, 12), (4, 4), (0, 4), (1, 20))


def check_interval(interval: Student, counts: Sequence[tuple[int, int]] = COUNTS) -> None:
    """Check 13.1: what so few pictures allow the true rate to be."""
    for successes, n in counts:
        share, case = successes / n, f"for {successes} of {n}"
        answer = pair(ask(interval, successes, n, case=case), ENDS)
        ends = torch.stack([tensor(end, "an end of the interval") for end in answer])
        low, high = wilson_interval(successes, n)
        known = [
            (SWAPPED, (high, low)),
            (WALD, _wald(share, n)),
            (WALD, tuple(min(max(end, 0.0), 1.0) for end in _wald(share, n))),
            (NO_ROOT, _wald(share, n, power=1)),
            (NO_ROOT, _solved_without_a_root(share, n)),
            (ONE_SIDED, _roots(share, n, 1.6448536269514722)),
            (UNSHIFTED, _roots(share, n, Z, shift=False)),
        ]
        wrongs = [(hint, torch.tensor(wrong).double()) for hint, wrong in known]
        compare(ends, torch.tensor([low, high]).double(), f"the interval {case}", wrongs, 1e-3)
    right("Four of four: the true rate may still be one half. That is what four pictures can say.")


UNORDERED = (
    "You compared the pictures in the order in which they were found; a batch's gradient has no "
    "order."
)
REUSED = (
    "You gave each picture its nearest answer, and used one answer twice. Each may be used once."
)
GREEDY = (
    "You paired the nearest first and left the rest to what remained: compare whole pairings, by "
    "the sum of their squared distances."
)
BY_DECIBELS = (
    "You chose the pairing of most decibels. The logarithm rewards one perfect pair for any number "
    "of bad ones; the chapter's pairing has the least sum of squared distances."
)
SKIPPED = (
    "A picture for which no answer is left has to count: it gets the picture that anybody could "
    "show, `floor`."
)
WHOLE = "You gave one figure for the batch; asked is one for each of its pictures."


def _scores(found: Tensor, truth: Tensor, order: Sequence[int]) -> Tensor:
    pairs = zip(order, truth, strict=True)
    return torch.tensor([psnr(found[m], x) for m, x in pairs], dtype=torch.float64)


def _orders(pool: Tensor, truth: Tensor) -> dict[str, Sequence[int]]:
    """Pairings, right and wrong, of the answers with the pictures."""
    gaps = torch.cdist(truth.flatten(1), pool.flatten(1)).square()
    every = list(permutations(range(len(pool)), len(truth)))
    rows = range(len(truth))
    greedy, left = [0] * len(truth), gaps.clone()
    for _ in rows:
        n, m = divmod(int(left.argmin()), len(pool))
        greedy[n] = m
        left[n], left[:, m] = torch.inf, torch.inf
    return {
        "right": min(every, key=lambda order: float(gaps[rows, order].sum())),
        "kept": list(rows),
        "nearest": gaps.argmin(dim=1).tolist(),
        "greedy": greedy,
        "decibels": min(every, key=lambda order: float(gaps[rows, order].log().sum())),
    }


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures and answers to them on which all ways to pair disagree."""
    generator = _seeded(seed)
    public = digits(range(50), dtype=torch.float64)[0]
    for _ in range(2000):
        truth = public[torch.randperm(50, generator=generator)[:3]]
        mixed = torch.rand(3, 3, generator=generator, dtype=torch.float64).square()
        weights = mixed / mixed.sum(1, keepdim=True)
        found = (weights @ truth.flatten(1)).reshape(truth.shape)
        orders = _orders(found, truth)
        if len({tuple(order) for order in orders.values()}) == len(orders):
            return found, truth, public.mean(0)
    raise AssertionError("no batch tells all pairings apart")


def check_scores(scores: Student, seed: int = 1) -> None:
    """Check 13.2: the figures of a batch, in the order that is best for the attacker."""
    found, truth, floor = _batch(seed)
    orders = _orders(found, truth)
    known: list[Wrong] = [
        (hint, _scores(found, truth, orders[name]))
        for name, hint in (
            ("kept", UNORDERED),
            ("nearest", REUSED),
            ("greedy", GREEDY),
            ("decibels", BY_DECIBELS),
        )
    ]
    true = _scores(found, truth, orders["right"])
    answer = tensor(ask(scores, found.clone(), truth.clone(), floor.clone()), "the figures")
    demand(answer.numel() > 1, WHOLE)
    compare(answer, true, "the list of figures", known)
    short, case = found[:2], "with two answers to three pictures"
    fewer = torch.cat([short, floor[None]])
    best = _least(short, truth, floor)
    answer = ask(scores, short.clone(), truth.clone(), floor.clone(), case=case)
    demand(
        isinstance(answer, Tensor) and answer.shape == (3,) and bool(answer.isfinite().all()),
        SKIPPED,
    )
    wrongs = [(SKIPPED, _scores(fewer, truth, orders["right"]).nan_to_num() * 0)]
    compare(answer, best, f"the list of figures {case}", wrongs)
    right("Whoever scores a batch in the order of the answers measures a lottery.")


def _least(found: Tensor, truth: Tensor, floor: Tensor) -> Tensor:
    """Scores if there are too few answers: these are placed first, the floor fills in."""
    gaps = torch.cdist(truth.flatten(1), found.flatten(1)).square()
    places = min(
        permutations(range(len(truth)), len(found)),
        key=lambda chosen: float(sum(gaps[n, m] for m, n in enumerate(chosen))),
    )
    shown = {n: found[m] for m, n in enumerate(places)}
    values = [psnr(shown.get(n, floor), x) for n, x in enumerate(truth)]
    return torch.tensor(values, dtype=torch.float64)


Run = Callable[[str, str, str], list[float]]

NAMES = ("dense", "lenet", "wide")
NAIVE = ("ratio", "recursion", "DLG", "cosine + TV")

CELL = "Return two names: a network, then an attacker."
POWERLESS = (
    "That attacker fails on that network without any defense: its figure says nothing about this "
    "one, and a careful reviewer asks for the undefended row first."
)
EMPTY = (
    "In that cell the defense has no meaning, and `run` said so by an error; a figure that does "
    "not exist flatters nobody."
)
LOUDER = (
    "That pair reads the defended pictures better than another one does: a paper that wants to "
    "flatter shows the *lowest* figure."
)
DROP = (
    "You took the largest drop. What a table prints is what is left under the defense; which pair "
    "leaves the least, of those that read undefended pictures?"
)
BY_MEAN = (
    "One lucky picture moves a mean by a lot. The board's figure is the median of the pictures."
)


class _Board:
    """A board that never was, on which every mistake picks another cell."""

    def __init__(self, seed: int) -> None:
        draws = torch.rand(len(NAMES) * len(NAIVE), 4, generator=_seeded(seed)).double()
        keys = [(net, attacker) for net in NAMES for attacker in NAIVE]
        order = torch.randperm(len(keys), generator=_seeded(seed + 1)).tolist()
        self.cells: dict[tuple[str, str, str], list[float]] = {}
        self.empty = keys[order[0]]
        plain = dict.fromkeys(keys, 60.0)
        bent = dict.fromkeys(keys, 30.0)
        plain[keys[order[1]]], bent[keys[order[1]]] = 14.0, 5.0  # powerless without a defense
        plain[keys[order[2]]], bent[keys[order[2]]] = 45.0, 10.0  # what flatters most
        plain[keys[order[3]]], bent[keys[order[3]]] = 170.0, 16.0  # the largest drop
        plain[keys[order[4]]], bent[keys[order[4]]] = 50.0, 12.0  # the lowest mean
        for place, key in enumerate(keys):
            jitter = draws[place] - 0.5
            self.cells[(key[0], "none", key[1])] = (plain[key] + jitter).tolist()
            self.cells[(key[0], "D", key[1])] = (bent[key] + jitter).tolist()
        self.cells[(keys[order[2]][0], "D", keys[order[2]][1])][1] = 60.0
        self.powerless, self.flatters, self.drop, self.mean = (keys[n] for n in order[1:5])

    def run(self, net: str, defense: str, attacker: str) -> list[float]:
        """Rerun a cell."""
        if (net, attacker) == self.empty and defense != "none":
            raise DoesNotApplyError(
                "the defense has no meaning in this cell. Catch that error, and go on with the "
                "next cell."
            )
        return list(self.cells[net, "none" if defense == "none" else "D", attacker])


def check_flatter(flatter: Student, seed: int = 2) -> None:
    """Check 13.3: how a paper would show a defense."""
    for trial in range(3):
        board = _Board(seed + 10 * trial)
        answer = ask(flatter, board.run, "dropout 0.5", NAMES, NAIVE)
        net, attacker = pair(answer, CELL)
        demand(net in NAMES and attacker in NAIVE, CELL)
        chosen = (net, attacker)
        for cell, hint in (
            (board.powerless, POWERLESS),
            (board.empty, EMPTY),
            (board.drop, DROP),
            (board.mean, BY_MEAN),
        ):
            demand(chosen != cell, hint)
        demand(chosen == board.flatters, LOUDER)
    right(
        "So easily is a defense made to look good: nothing was invented, only chosen. Ask for the "
        "attacker who knows."
    )


MASK = "Return a tensor of True and False, one entry for each setting."
ONLY_NAIVE = (
    "A setting that only the attackers who know of it can read is in your answer. A server may run "
    "any attack, and knows what it has asked its clients to do."
)
AVERAGED = (
    "One attacker who reads the pictures is enough, and you let those who fail make up for it: "
    "which one does a server take?"
)
POISONED = (
    "A setting is missing in which one attacker has no meaning (NaN): a maximum over NaN is NaN, "
    "and no comparison with it is true. The other attackers still count."
)
LEAKING_BEST = (
    "You compared with the best accuracy of all settings. One that leaks is no rival: compare with "
    "the best of those that hold."
)
ONE_WINNER = (
    "You kept the best count alone. So few test pictures cannot tell it from the next one: how far "
    "does the interval of each reach?"
)
NO_REACH = (
    "You compared a share with the interval of the best. Its own interval counts too: could its "
    "true accuracy lie as high as the lower end of the best one's?"
)
NO_PRICE = "All that hold are in your answer, whatever they cost."
OTHERWISE = (
    "Setting {n}, with {right} right, leaks up to {leak:.0f} dB: should it be in your answer?"
)

TESTS = 297
SETTINGS = (  # two attackers who do not know of it, two who do; test pictures right
    ((170.0, 160.0, 171.0, 150.0), 285),
    ((11.0, 12.0, 140.0, 30.0), 295),
    ((9.0, 8.0, 10.0, 11.0), 262),
    ((8.0, 9.0, 11.0, 10.0), 276),
    ((12.0, torch.nan, 20.0, 14.0), 150),
    ((14.0, 13.0, 20.0, 18.0), 268),
    ((12.0, 11.0, 15.0, torch.nan), 266),
    ((5.0, 6.0, 7.0, 60.0), 280),
    ((13.0, 12.0, 16.0, 15.0), 249),
)


def _cheapest(leak: Tensor, right_: Tensor, how: str = "") -> Tensor:
    most = leak.nan_to_num(-torch.inf).amax(1)
    if how == "naive":
        most = leak[:, :2].nan_to_num(-torch.inf).amax(1)
    if how == "mean":
        most = leak.nanmean(1)
    if how == "poisoned":
        most = leak.amax(1)
    holds = most <= SUCCESS
    low, high = torch.tensor([wilson_interval(int(n), TESTS) for n in right_]).T
    rivals = torch.ones_like(holds) if how == "all" else holds
    best = int(torch.where(rivals, right_, -1).argmax())
    reach = {"winner": right_ >= right_[best], "share": right_ / TESTS >= low[best], "free": holds}
    return torch.as_tensor(holds & reach.get(how, high >= low[best]))


def check_cheapest(cheapest: Student, seed: int = 3) -> None:
    """Check 13.4: which settings hold, and cost no more than the cheapest that does."""
    generator = _seeded(seed)
    order = torch.randperm(len(SETTINGS), generator=generator)
    leak = torch.tensor([row for row, _ in SETTINGS], dtype=torch.float64)[order]
    leak = leak + torch.rand(leak.shape, generator=generator).double()
    counts = torch.tensor([count for _, count in SETTINGS])[order]
    knows = torch.tensor([False, False, True, True])
    answer = ask(cheapest, leak.clone(), knows, counts.clone(), TESTS)
    demand(isinstance(answer, Tensor) and answer.shape == counts.shape, MASK)
    demand(answer.dtype == torch.bool, MASK)
    for how, hint in (
        ("naive", ONLY_NAIVE),
        ("mean", AVERAGED),
        ("poisoned", POISONED),
        ("all", LEAKING_BEST),
        ("winner", ONE_WINNER),
        ("share", NO_REACH),
        ("free", NO_PRICE),
    ):
        demand(not torch.equal(answer, _cheapest(leak, counts, how)), hint)
    for n in (answer != _cheapest(leak, counts)).nonzero().flatten().tolist():
        most = float(leak[n].nan_to_num(-torch.inf).max())
        demand(False, OTHERWISE.format(n=n, right=int(counts[n]), leak=most))
    right("Four settings hold and cannot be told apart in price. Choose among them by what else?")


@dataclass(frozen=True)
class Attack:
    """What one attacker made of a defense.

    Attributes
    ----------
    knows : bool
        Whether it was written for this defense.
    psnr : tuple of float
        Of each picture, in decibels.
    exact : tuple of bool
        Whether it vouched for each.
    """

    knows: bool
    psnr: tuple[float, ...]
    exact: tuple[bool, ...]


@dataclass(frozen=True)
class Dossier:
    """All that is known of a defense.

    Attributes
    ----------
    name : str
        What it is.
    attacks : tuple of Attack
        That were tried.
    baseline : float
        Decibels of the nearest public picture.
    epsilon : float or None
        What is promised, if anything is.
    noise_at : {"client", "server", None}
        Where noise is added.
    """

    name: str
    attacks: tuple[Attack, ...]
    baseline: float
    epsilon: float | None = None
    noise_at: str | None = None


PROMISE = 10.0  # an ε above it is no promise here
VERDICTS = ("broken", "promised", "open", "untested")


def _attack(low: float, high: float, *, knows: bool = False, exact: int = 0) -> Attack:
    values = tuple(low + (high - low) * n / 3 for n in range(4))
    return Attack(knows, values, tuple(n >= 4 - exact for n in range(4)))


BEST_COUNTS = (
    "one attack is enough, also one that does not know of the defense; you looked at others' "
    "failures."
)
VOUCHED = (
    "an attacker vouched for one of its pictures. One picture that is proved is a leak, whatever "
    "the median says."
)
GUESSABLE = "these figures are no better than those of a public picture of the same kind."
LARGE = "an ε of {epsilon:g} bounds nothing that anybody would notice: that is no promise."
TOO_LATE = "this noise is added by the server, after it has seen the update."
NOBODY_KNEW = "no attacker here was written for this defense, so their failing tells nothing."
NO_PROOF = (
    "attackers failed, those that know of the defense too. That is neither a leak nor a promise."
)
KEPT = "its noise leaves with a small ε, and no attack speaks against it: say so."
MEASURED_FIRST = "a promise does not undo a measurement: these pictures have been recovered."
FEW = "a single lucky picture under no one's word is not most of the pictures."


def _dossiers(seed: int) -> list[tuple[Dossier, str, str]]:
    """Cases, what is true of each, and why."""
    d = float(torch.rand((), generator=_seeded(seed))) * 3
    poor, good, known = _attack(6 + d, 11), _attack(60 + d, 90), _attack(8, 12 + d, knows=True)
    read = _attack(90, 140 + d, knows=True, exact=4)
    one = Attack(True, (9, 10, 11, 70 + d), (False, False, False, True))
    lucky = _attack(9, 27 + d, knows=True)
    near = _attack(26 + d, 29 + d, knows=True)
    case = Dossier
    return [
        (case("dropout", (poor, poor, read), 17), "broken", BEST_COUNTS),
        (case("clipping", (good, known), 17), "broken", BEST_COUNTS),
        (case("a new loss", (poor, poor, poor), 17), "untested", NOBODY_KNEW),
        (case("rank removed", (poor, known), 17), "open", NO_PROOF),
        (case("local noise", (poor, known), 17, 3.0, "client"), "promised", KEPT),
        (case("a little noise", (poor, known), 17, 5480.0, "client"), "open", LARGE),
        (case("noise on the average", (poor, known), 17, 2.0, "server"), "open", TOO_LATE),
        (case("a large batch", (poor, one), 17), "broken", VOUCHED),
        (case("pictures all alike", (poor, near), 33 + d), "open", GUESSABLE),
        (case("noise with an error", (poor, read), 17, 1.0, "client"), "broken", MEASURED_FIRST),
        (case("noise of tomorrow", (poor, poor), 17, 4.0, "client"), "promised", KEPT),
        (case("signs", (poor, lucky), 17), "open", FEW),
    ]


def check_judge(judge: Student, seed: int = 4) -> None:
    """Check 13.5: what may be said of a defense."""
    for dossier, true, why in _dossiers(seed):
        answer = ask(judge, dossier, case=f"for {dossier.name}")
        demand(answer in VERDICTS, f"Return one of {', '.join(VERDICTS)}; yours is {answer!r}.")
        hint = why.format(epsilon=dossier.epsilon or 0)
        demand(answer == true, f"The defense “{dossier.name}” is not “{answer}”: {hint}")
    right("A leak needs one attack, a promise an ε; everything else is a question left open.")

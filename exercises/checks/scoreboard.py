"""Checks of the exercises on the scoreboard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean, median

import torch
from torch import Tensor

import gradinv_edu as gi

from .verdict import Mistakes, Student, ask, compare, demand, known, pair, refuse, right, tensor

SUCCESS = gi.scoreboard.SUCCESS


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    share = successes / n
    middle = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)


class Interval(
    Mistakes, of="scoreboard-interval", own=("gradinv_edu.kit.metrics.wilson_interval",)
):
    def ends_exchanged(successes, n):
        """Your lower end is the higher one."""
        return _wilson(successes, n)[::-1]

    def observed_share_under_the_root(successes, n, power=0.5):
        """You put the observed share under the root, where the true rate p belongs. That interval
        has no width when all of the pictures came out: are four of four a proof?"""
        share = successes / n
        reach = 1.96 * (share * (1 - share) / n) ** power
        return share - reach, share + reach

    def cut_off_at_zero_and_one(successes, n):
        """Like observed_share_under_the_root."""
        ends = Interval.observed_share_under_the_root(successes, n)
        return tuple(min(max(end, 0.0), 1.0) for end in ends)

    def variance_for_deviation(successes, n):
        """You used p (1 - p) / n itself: that is a variance, and a distance is compared with
        it."""
        return Interval.observed_share_under_the_root(successes, n, power=1)

    def variance_solved_for_the_rate(successes, n):
        """Like variance_for_deviation."""
        ends = []
        for c in (1.96 / n, -1.96 / n):  # share - p = c p (1 - p)
            ends.append((1 + c - math.sqrt((1 + c) ** 2 - 4 * c * successes / n)) / (2 * c))
        return tuple(ends)

    def one_side_only(successes, n):
        """Your z leaves 5 % on each side, 10 % in all; 95 % between the ends asks for 1.96."""
        return _wilson(successes, n, z=1.645)

    def centred_on_the_share(successes, n):
        """Your interval is centred on the observed share. The roots of the quadratic lie on either
        side of something nearer to one half: solve it again, with its linear term."""
        low, high = _wilson(successes, n)
        return successes / n - (high - low) / 2, successes / n + (high - low) / 2


COUNTS = ((9, 12), (4, 4), (0, 4), (1, 20))


def check_interval(interval: Student, counts: Sequence[tuple[int, int]] = COUNTS) -> None:
    """Check: what so few pictures allow the true rate to be."""
    for given in counts:
        case = "for {} of {}".format(*given)
        answer = pair(ask(interval, *given, case=case), "The ends of the interval")
        ends = torch.stack([tensor(end, "an end of the interval") for end in answer])
        wrong = (
            (hint, torch.tensor(w).double()) for hint, w in known("scoreboard-interval", given)
        )
        true = torch.tensor(gi.metrics.wilson_interval(*given)).double()
        compare(ends, true, f"the interval {case}", wrong, 1e-3)
    right("Four of four: the true rate may still be one half. That is what four pictures can say.")


def _figures(found: Tensor, truth: Tensor, order: Sequence[int] = (0, 1, 2)) -> Tensor:
    pairs = zip(order, truth, strict=True)
    return torch.tensor([gi.metrics.psnr(found[m], x) for m, x in pairs], dtype=torch.float64)


def _filled(found: Tensor, truth: Tensor, floor: Tensor) -> Tensor:
    return torch.cat([found, *[floor[None]] * (len(truth) - len(found))])


def _orders(pool: Tensor, truth: Tensor) -> dict[str, Sequence[int]]:
    """Pairings, right and wrong, of the answers with the pictures."""
    gaps, rows = torch.cdist(truth.flatten(1), pool.flatten(1)).square(), range(len(truth))
    every = list(permutations(range(len(pool)), len(truth)))
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


def _ordered(found: Tensor, truth: Tensor, floor: Tensor, how: str) -> Tensor:
    pool = _filled(found, truth, floor)
    return _figures(pool, truth, _orders(pool, truth)[how])


def _placed(found: Tensor, truth: Tensor) -> dict[int, Tensor]:
    """Which answer goes with which picture, where there may be fewer answers."""
    gaps = torch.cdist(truth.flatten(1), found.flatten(1)).square()
    every = permutations(range(len(truth)), len(found))
    places = min(every, key=lambda at: float(sum(gaps[n, m] for m, n in enumerate(at))))
    return {n: found[m] for m, n in enumerate(places)}


class Scores(Mistakes, of="scoreboard-scores"):
    def order_kept(found, truth, floor):
        """You compared the pictures in the order in which they were found; a batch's gradient has
        no order."""
        return _ordered(found, truth, floor, "kept")

    def nearest_for_each(found, truth, floor):
        """You gave each picture its nearest answer, and used one answer twice. Each may be used
        once."""
        return _ordered(found, truth, floor, "nearest")

    def nearest_pair_first(found, truth, floor):
        """You paired the nearest first and left the rest to what remained: compare whole pairings,
        by the sum of their squared distances."""
        return _ordered(found, truth, floor, "greedy")

    def most_decibels(found, truth, floor):
        """You chose the pairing of most decibels. The logarithm rewards one perfect pair for any
        number of bad ones; the chapter's pairing has the least sum of squared distances."""
        return _ordered(found, truth, floor, "decibels")

    def missing_answers_left_out(found, truth, floor):
        """A picture for which no answer is left has to count: it gets the picture that anybody
        could show, `floor`."""
        shown = _placed(found, truth)
        return torch.stack([_figures([shown[n]], truth[n : n + 1], [0])[0] for n in sorted(shown)])

    def mean_of_the_batch(found, truth, floor):
        """You gave one figure for the batch; asked is one for each of its pictures."""
        return torch.tensor(gi.metrics.psnr(found, truth[: len(found)]))


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures and answers to them on which all ways to pair disagree."""
    generator, public = _seeded(seed), gi.data.digits(range(50), dtype=torch.float64)[0]
    while True:
        truth = public[torch.randperm(50, generator=generator)[:3]]
        mixed = torch.rand(3, 3, generator=generator, dtype=torch.float64).square()
        found = ((mixed / mixed.sum(1, keepdim=True)) @ truth.flatten(1)).reshape(truth.shape)
        if len({tuple(order) for order in _orders(found, truth).values()}) == 5:
            return found, truth, public.mean(0)


def check_scores(scores: Student, seed: int = 1) -> None:
    """Check: the figures of a batch, in the order that is best for the attacker."""
    found, truth, floor = given = _batch(seed)
    answer = tensor(ask(scores, *given), "the figures")
    demand(answer.numel() > 1, Scores.mean_of_the_batch)
    true = _ordered(*given, "right")
    compare(answer, true, "the list of figures", known("scoreboard-scores", given))
    case = "with two answers to three pictures"
    answer = ask(scores, found[:2], truth, floor, case=case)
    whole = isinstance(answer, Tensor) and answer.shape == (3,) and answer.isfinite().all()
    demand(whole, Scores.missing_answers_left_out)
    shown = _placed(found[:2], truth)
    best = _figures([shown.get(n, floor) for n in range(3)], truth)
    compare(answer, best, f"the list of figures {case}")
    right("Whoever scores a batch in the order of the answers measures a lottery.")


NAMES = ("dense", "lenet", "wide")
NAIVE = ("ratio", "recursion", "DLG", "cosine + TV")


class _Board:
    """A board that never was, on which every mistake picks another cell."""

    def __init__(self, seed: int) -> None:
        keys = [(net, attacker) for net in NAMES for attacker in NAIVE]
        draws = torch.rand(len(keys), 4, generator=_seeded(seed)).double()
        order = torch.randperm(len(keys), generator=_seeded(seed + 1)).tolist()
        levels = dict.fromkeys(keys, (60.0, 30.0))  # without the defense, and with it
        self.empty, self.powerless, self.flatters, self.drop, self.mean = (
            keys[n] for n in order[:5]
        )
        levels |= {self.powerless: (14.0, 5.0), self.flatters: (45.0, 10.0)}
        levels |= {self.drop: (170.0, 16.0), self.mean: (50.0, 12.0)}
        self.cells: dict[tuple[str, ...], list[float]] = {}
        for place, (net, attacker) in enumerate(keys):
            for kind, level in zip(("none", "D"), levels[net, attacker], strict=True):
                self.cells[net, kind, attacker] = (level + draws[place] - 0.5).tolist()
        self.cells[self.flatters[0], "D", self.flatters[1]][1] = 60.0

    def run(self, net: str, defense: str, attacker: str) -> list[float]:
        """Rerun a cell."""
        if (net, attacker) == self.empty and defense != "none":
            raise gi.scoreboard.DoesNotApplyError(
                "the defense has no meaning in this cell. Catch that error, and go on with the "
                "next cell."
            )
        return list(self.cells[net, "none" if defense == "none" else "D", attacker])


def _cells(run, defense, nets, attackers, middle=median):
    """Cells with their figures without the defense and with it."""
    for net in nets:
        for attacker in attackers:
            try:
                plain, defended = run(net, "none", attacker), run(net, defense, attacker)
            except gi.scoreboard.DoesNotApplyError:
                continue
            yield (net, attacker), middle(plain), middle(defended)


class Flatter(Mistakes, of="scoreboard-flatter"):
    def undefended_row_not_asked(*given):
        """That attacker fails on that network without any defense: its figure says nothing about
        this one, and a careful reviewer asks for the undefended row first."""
        return min(_cells(*given), key=lambda cell: cell[2])[0]

    def missing_figure_taken_for_zero(run, defense, nets, attackers):
        """In that cell the defense has no meaning, and `run` said so by an error; a figure that
        does not exist flatters nobody."""
        shown = {cell for cell, _, _ in _cells(run, defense, nets, attackers)}
        return next((n, a) for n in nets for a in attackers if (n, a) not in shown)

    def stopped_by_the_first_gap(run, defense, nets, attackers):
        """… stopped with DoesNotApplyError: the defense has no meaning in this cell. Catch …"""
        cells = [(net, attacker) for net in nets for attacker in attackers]
        return min(cells, key=lambda cell: median(run(cell[0], defense, cell[1])))

    def largest_drop(*given):
        """You took the largest drop. What a table prints is what is left under the defense; which
        pair leaves the least, of those that read undefended pictures?"""
        return max(_cells(*given), key=lambda cell: cell[1] - cell[2])[0]

    def mean_for_median(*given):
        """One lucky picture moves a mean by a lot. The board's figure is the median of the
        pictures."""
        return min((c[2], c[0]) for c in _cells(*given, fmean) if c[1] > SUCCESS)[1]

    def best_attacker_shown(*given):
        """That pair reads the defended pictures better than another one does: a paper that wants
        to flatter shows the *lowest* figure."""
        return sorted((c[2], c[0]) for c in _cells(*given) if c[1] > SUCCESS)[4][1]


def check_flatter(flatter: Student, seed: int = 2) -> None:
    """Check: how a paper would show a defense."""
    for trial in range(3):
        board = _Board(seed + 10 * trial)
        names = "Return two names: a network, then an attacker."
        chosen = pair(ask(flatter, board.run, "dropout 0.5", NAMES, NAIVE), names)
        demand(chosen[0] in NAMES and chosen[1] in NAIVE, names)
        demand(chosen != board.powerless, Flatter.undefended_row_not_asked)
        demand(chosen != board.empty, Flatter.missing_figure_taken_for_zero)
        demand(chosen != board.drop, Flatter.largest_drop)
        demand(chosen != board.mean, Flatter.mean_for_median)
        demand(chosen == board.flatters, Flatter.best_attacker_shown)
    right(
        "So easily is a defense made to look good: nothing was invented, only chosen. Ask for the "
        "attacker who knows."
    )


def _most(leak: Tensor) -> Tensor:
    return leak.nan_to_num(-torch.inf).amax(dim=1)


def _cheapest(most, counts, tests, reach=None, rivals=None):
    """Solve the exercise, or with another reach or other rivals."""
    holds = most <= SUCCESS
    low, high = torch.tensor([gi.metrics.wilson_interval(int(n), tests) for n in counts]).T
    best = int(torch.where(holds if rivals is None else rivals, counts, 0).argmax())
    return holds & ((high if reach is None else reach) >= low[best])


class Cheapest(Mistakes, of="scoreboard-cheapest"):
    def attackers_who_do_not_know(leak, knows, counts, tests):
        """A setting that only the attackers who know of it can read is in your answer. A server
        may run any attack, and knows what it has asked its clients to do."""
        return _cheapest(_most(leak[:, ~knows]), counts, tests)

    def mean_of_the_attackers(leak, knows, counts, tests):
        """One attacker who reads the pictures is enough, and you let those who fail make up for
        it: which one does a server take?"""
        return _cheapest(leak.nanmean(dim=1), counts, tests)

    def maximum_with_nan(leak, knows, counts, tests):
        """A setting is missing in which one attacker has no meaning (NaN): a maximum over NaN is
        NaN, and no comparison with it is true. The other attackers still count."""
        return _cheapest(leak.amax(dim=1), counts, tests)

    def compared_with_what_leaks(leak, knows, counts, tests):
        """You compared with the best accuracy of all settings. One that leaks is no rival: compare
        with the best of those that hold."""
        return _cheapest(_most(leak), counts, tests, rivals=counts > 0)

    def highest_count_only(leak, knows, counts, tests):
        """You kept the best count alone. So few test pictures cannot tell it from the next one:
        how far does the interval of each reach?"""
        holds = _most(leak) <= SUCCESS
        return holds & (counts == counts[holds].max())

    def share_in_the_interval_of_the_best(leak, knows, counts, tests):
        """You compared a share with the interval of the best. Its own interval counts too: could
        its true accuracy lie as high as the lower end of the best one's?"""
        return _cheapest(_most(leak), counts, tests, reach=counts / tests)

    def price_forgotten(leak, knows, counts, tests):
        """All that hold are in your answer, whatever they cost."""
        return _most(leak) <= SUCCESS


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


def check_cheapest(cheapest: Student, seed: int = 3) -> None:
    """Check: which settings hold, and cost no more than the cheapest that does."""
    generator = _seeded(seed)
    order = torch.randperm(len(SETTINGS), generator=generator)
    leak = torch.tensor([row for row, _ in SETTINGS], dtype=torch.float64)[order]
    leak = leak + torch.rand(leak.shape, generator=generator).double()
    counts = torch.tensor([count for _, count in SETTINGS])[order]
    given = (leak, torch.tensor([False, False, True, True]), counts, TESTS)
    answer = ask(cheapest, *given)
    mask = isinstance(answer, Tensor) and answer.shape == counts.shape
    mask = mask and answer.dtype == torch.bool
    demand(mask, "Return a tensor of True and False, one entry for each setting.")
    for hint, wrong in known("scoreboard-cheapest", given):
        demand(not torch.equal(answer, wrong), hint)
    for n in (answer != _cheapest(_most(leak), counts, TESTS)).nonzero().flatten().tolist():
        refuse(
            f"Setting {n}, with {int(counts[n])} right, leaks up to {float(_most(leak)[n]):.0f} "
            "dB: should it be in your answer?"
        )
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


def _read(d: Dossier, bar: float | None = None, exact: bool = True) -> list[bool]:
    bar = max(SUCCESS, d.baseline) if bar is None else bar
    return [(exact and any(a.exact)) or median(a.psnr) > bar for a in d.attacks]


def _judged(d: Dossier, broken: bool | None = None, most: float = 10.0, at=("client",)) -> str:
    """Solve the exercise, or judge by something else."""
    if any(_read(d)) if broken is None else broken:
        return "broken"
    if d.epsilon is not None and d.epsilon <= most and d.noise_at in at:
        return "promised"
    return "open" if any(a.knows for a in d.attacks) else "untested"


class Judge(Mistakes, of="scoreboard-judge"):
    def only_if_most_attackers_succeed(d):
        """The defense “{name}” is not “{said}”: one attack is enough, also one that does not know
        of the defense; you looked at others' failures."""
        return _judged(d, sum(_read(d)) > len(d.attacks) / 2)

    def median_alone(d):
        """The defense “{name}” is not “{said}”: an attacker vouched for one of its pictures. One
        picture that is proved is a leak, whatever the median says."""
        return _judged(d, any(_read(d, exact=False)))

    def no_baseline(d):
        """The defense “{name}” is not “{said}”: these figures are no better than those of a public
        picture of the same kind."""
        return _judged(d, any(_read(d, bar=SUCCESS)))

    def any_epsilon_is_a_promise(d):
        """The defense “{name}” is not “{said}”: an ε of {epsilon:g} bounds nothing that anybody
        would notice: that is no promise."""
        return _judged(d, most=math.inf)

    def noise_anywhere(d):
        """The defense “{name}” is not “{said}”: this noise is added by the server, after it has
        seen the update."""
        return _judged(d, at=("client", "server"))

    def promise_before_measurement(d):
        """The defense “{name}” is not “{said}”: a promise does not undo a measurement: these
        pictures have been recovered."""
        promised = _judged(d, broken=False) == "promised"
        return "promised" if promised else _judged(d)

    def failed_is_failed(d):
        """The defense “{name}” is not “{said}”: no attacker here was written for this defense, so
        their failing tells nothing."""
        return _judged(d).replace("untested", "open")


def _attack(low: float, high: float, *, knows: bool = False, exact: int = 0) -> Attack:
    values = tuple(low + (high - low) * n / 3 for n in range(4))
    return Attack(knows, values, tuple(n >= 4 - exact for n in range(4)))


def check_judge(judge: Student, seed: int = 4) -> None:
    """Check: what may be said of a defense."""
    d = float(torch.rand((), generator=_seeded(seed))) * 3
    poor, good, aware = _attack(6 + d, 11), _attack(60 + d, 90), _attack(8, 12 + d, knows=True)
    read = _attack(90, 140 + d, knows=True, exact=4)
    one = Attack(True, (9, 10, 11, 70 + d), (False, False, False, True))
    lucky, near = _attack(9, 27 + d, knows=True), _attack(26 + d, 29 + d, knows=True)
    is_not = "The defense “{name}” is not “{said}”: "
    failed = "attackers failed, those that know of the defense too. That is no leak and no promise."
    kept = "its noise leaves with a small ε, and no attack speaks against it: say so."
    few = "a single lucky picture under no one's word is not most of the pictures."
    one_is_enough, kept = Judge.only_if_most_attackers_succeed, is_not + kept
    large, late = Judge.any_epsilon_is_a_promise, Judge.noise_anywhere
    measured = Judge.promise_before_measurement
    cases = [
        ("broken", one_is_enough, "dropout", (poor, poor, read), 17),
        ("broken", one_is_enough, "clipping", (good, aware), 17),
        ("untested", Judge.failed_is_failed, "a new loss", (poor, poor, poor), 17),
        ("open", is_not + failed, "rank removed", (poor, aware), 17),
        ("promised", kept, "local noise", (poor, aware), 17, 3.0, "client"),
        ("open", large, "a little noise", (poor, aware), 17, 5480.0, "client"),
        ("open", late, "noise on the average", (poor, aware), 17, 2.0, "server"),
        ("broken", Judge.median_alone, "a large batch", (poor, one), 17),
        ("open", Judge.no_baseline, "pictures all alike", (poor, near), 33 + d),
        ("broken", measured, "noise with an error", (poor, read), 17, 1.0, "client"),
        ("promised", kept, "noise of tomorrow", (poor, poor), 17, 4.0, "client"),
        ("open", is_not + few, "signs", (poor, lucky), 17),
    ]
    options = ("broken", "promised", "open", "untested")
    for true, hint, *known_of_it in cases:
        dossier = Dossier(*known_of_it)
        answer = ask(judge, dossier, case=f"for {dossier.name}")
        demand(answer in options, f"Return one of {', '.join(options)}; yours is {answer!r}.")
        facts = {"name": dossier.name, "said": answer, "epsilon": dossier.epsilon or 0}
        demand(answer == true, hint, **facts)
    right("A leak needs one attack, a promise an ε; everything else is a question left open.")

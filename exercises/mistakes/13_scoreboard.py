"""Plausible mistakes in the exercises to chapter 13; each must be refused by the right hint."""

from __future__ import annotations

import math
from itertools import permutations
from statistics import fmean, median

import torch

import gradinv_edu as gi
from gradinv_edu.coursework.mistakes import planted
from gradinv_edu.scoreboard import SUCCESS, DoesNotApplyError


def _wilson(share, n, z=1.96, linear=None):
    middle = share + (z**2 / (2 * n) if linear is None else linear)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)


@planted("13-interval", says="no width")
def observed_share_under_the_root(successes, trials):
    share = successes / trials
    reach = 1.96 * math.sqrt(share * (1 - share) / trials)
    return share - reach, share + reach


@planted("13-interval", says="that is a variance")
def variance_for_deviation(successes, trials):
    share = successes / trials
    reach = 1.96 * share * (1 - share) / trials
    return share - reach, share + reach if reach else share + 1e-9


@planted("13-interval", says="on each side")
def one_side_only(successes, trials):
    return _wilson(successes / trials, trials, z=1.645)


@planted("13-interval", says="lower end is the higher one")
def ends_exchanged(successes, trials):
    return _wilson(successes / trials, trials)[::-1]


@planted("13-interval", says="linear term")
def centred_on_the_share(successes, trials):
    share = successes / trials
    low, high = _wilson(share, trials)
    return share - (high - low) / 2, share + (high - low) / 2


def _figures(pictures, truth):
    values = [gi.metrics.psnr(a, b) for a, b in zip(pictures, truth, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _filled(found, truth, floor):
    return torch.cat([found, *[floor[None]] * (len(truth) - len(found))])


@planted("13-scores", says="has no order")
def order_kept(found, truth, floor):
    return _figures(_filled(found, truth, floor), truth)


@planted("13-scores", says="used one answer twice")
def nearest_for_each(found, truth, floor):
    gaps = torch.cdist(truth.flatten(1), found.flatten(1))
    return _figures(found[gaps.argmin(dim=1)], truth)


@planted("13-scores", says="compare whole pairings")
def nearest_pair_first(found, truth, floor):
    found = _filled(found, truth, floor)
    gaps = torch.cdist(truth.flatten(1), found.flatten(1))
    chosen = {}
    for _ in truth:
        n, m = divmod(int(gaps.argmin()), len(found))
        chosen[n] = m
        gaps[n], gaps[:, m] = torch.inf, torch.inf
    return _figures([found[chosen[n]] for n in range(len(truth))], truth)


@planted("13-scores", says="rewards one perfect pair")
def most_decibels(found, truth, floor):
    orders = permutations(_filled(found, truth, floor))
    return max((_figures(order, truth) for order in orders), key=lambda figures: figures.sum())


@planted("13-scores", says="anybody could")
def missing_answers_left_out(found, truth, floor):
    def cost(places):
        return sum(float((x - truth[n]).square().sum()) for n, x in zip(places, found, strict=True))

    places = min(permutations(range(len(truth)), len(found)), key=cost)
    order = sorted(range(len(found)), key=lambda m: places[m])
    return _figures(found[order], truth[sorted(places)])


@planted("13-scores", says="one for each")
def mean_of_the_batch(found, truth, floor):
    return torch.tensor(gi.metrics.psnr(found, truth[: len(found)]))


def _cells(run, defense, nets, attackers, middle=median):
    for net in nets:
        for attacker in attackers:
            try:
                plain, defended = run(net, "none", attacker), run(net, defense, attacker)
            except DoesNotApplyError:
                continue
            yield (net, attacker), middle(plain), middle(defended)


@planted("13-flatter", says="fails on that network without any defense")
def undefended_row_not_asked(run, defense, nets, attackers):
    return min(_cells(run, defense, nets, attackers), key=lambda cell: cell[2])[0]


@planted("13-flatter", says="largest drop")
def largest_drop(run, defense, nets, attackers):
    return max(_cells(run, defense, nets, attackers), key=lambda cell: cell[1] - cell[2])[0]


@planted("13-flatter", says="One lucky picture")
def mean_for_median(run, defense, nets, attackers):
    cells = [c for c in _cells(run, defense, nets, attackers, fmean) if c[1] > SUCCESS]
    return min(cells, key=lambda cell: cell[2])[0]


@planted("13-flatter", says="no meaning in this cell")
def stopped_by_the_first_gap(run, defense, nets, attackers):
    cells = [(net, attacker) for net in nets for attacker in attackers]
    return min(cells, key=lambda cell: median(run(cell[0], defense, cell[1])))


@planted("13-flatter", says="does not exist")
def missing_figure_taken_for_zero(run, defense, nets, attackers):
    shown = {cell: after for cell, before, after in _cells(run, defense, nets, attackers) if before}
    every = [(net, attacker) for net in nets for attacker in attackers]
    return min(every, key=lambda cell: shown.get(cell, 0.0))


@planted("13-flatter", says="*lowest* figure")
def best_attacker_shown(run, defense, nets, attackers):
    cells = [c for c in _cells(run, defense, nets, attackers) if c[1] > SUCCESS]
    return sorted(cells, key=lambda cell: cell[2])[4][0]


def _chosen(most, right, tests, reach=None, rivals=None):
    holds = most <= SUCCESS
    rivals = holds if rivals is None else rivals
    low, high = torch.tensor([gi.metrics.wilson_interval(int(n), tests) for n in right]).T
    best = int(torch.where(rivals, right, 0).argmax())
    return holds & ((high if reach is None else reach) >= low[best])


def _most(leak):
    return leak.nan_to_num(-torch.inf).amax(dim=1)


@planted("13-cheapest", says="may run any attack")
def attackers_who_do_not_know(leak, knows, right, tests):
    return _chosen(_most(leak[:, ~knows]), right, tests)


@planted("13-cheapest", says="make up for it")
def mean_of_the_attackers(leak, knows, right, tests):
    return _chosen(leak.nanmean(dim=1), right, tests)


@planted("13-cheapest", says="maximum over NaN")
def maximum_with_nan(leak, knows, right, tests):
    return _chosen(leak.amax(dim=1), right, tests)


@planted("13-cheapest", says="no rival")
def compared_with_what_leaks(leak, knows, right, tests):
    return _chosen(_most(leak), right, tests, rivals=right > 0)


@planted("13-cheapest", says="best count alone")
def highest_count_only(leak, knows, right, tests):
    holds = _most(leak) <= SUCCESS
    return holds & (right == right[holds].max())


@planted("13-cheapest", says="Its own interval counts too")
def share_in_the_interval_of_the_best(leak, knows, right, tests):
    return _chosen(_most(leak), right, tests, reach=right / tests)


@planted("13-cheapest", says="whatever they cost")
def price_forgotten(leak, knows, right, tests):
    return _most(leak) <= SUCCESS


def _judged(d, broken, promised=None):
    if broken:
        return "broken"
    stated = d.epsilon is not None and d.epsilon <= 10 and d.noise_at == "client"
    if stated if promised is None else promised:
        return "promised"
    return "open" if any(a.knows for a in d.attacks) else "untested"


def _read(attack, bar):
    return any(attack.exact) or median(attack.psnr) > bar


def _broken(d):
    return any(_read(a, max(SUCCESS, d.baseline)) for a in d.attacks)


@planted("13-judge", says="one attack is enough")
def only_if_most_attackers_succeed(dossier):
    read = [_read(a, max(SUCCESS, dossier.baseline)) for a in dossier.attacks]
    return _judged(dossier, sum(read) > len(read) / 2)


@planted("13-judge", says="vouched for one")
def median_alone(dossier):
    bar = max(SUCCESS, dossier.baseline)
    return _judged(dossier, any(median(a.psnr) > bar for a in dossier.attacks))


@planted("13-judge", says="no better than those of a public picture")
def no_baseline(dossier):
    return _judged(dossier, any(_read(a, SUCCESS) for a in dossier.attacks))


@planted("13-judge", says="bounds nothing")
def any_epsilon_is_a_promise(dossier):
    promised = dossier.epsilon is not None and dossier.noise_at == "client"
    return _judged(dossier, _broken(dossier), promised)


@planted("13-judge", says="after it has seen")
def noise_anywhere(dossier):
    promised = dossier.epsilon is not None and dossier.epsilon <= 10
    return _judged(dossier, _broken(dossier), promised)


@planted("13-judge", says="does not undo a measurement")
def promise_before_measurement(dossier):
    if dossier.epsilon is not None and dossier.epsilon <= 10 and dossier.noise_at == "client":
        return "promised"
    return _judged(dossier, _broken(dossier))


@planted("13-judge", says="their failing tells nothing")
def failed_is_failed(dossier):
    verdict = _judged(dossier, _broken(dossier))
    return "open" if verdict == "untested" else verdict

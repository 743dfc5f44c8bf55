"""Checks of the exercises on defense by dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    expect,
    known,
    normal,
    pair,
    right,
    tensor,
)

LOSS, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])


def _mask(seed: int, count: int, rate: float) -> Tensor:
    """Whether each feature was kept; both kinds occur."""
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return places >= round(rate * count)


class Features(Mistakes, of="dropout-features"):
    def scale_left_in(G, b, rate):
        """Those are the features as the classifier met them: dropout scaled those that it kept,
        and the encoder's are asked."""
        return G[0] / b[0], G[0] != 0

    def scaled_up_for_down(G, b, rate):
        """You scaled the features once more; what did dropout do to those that it kept?"""
        return G[0] / b[0] / (1 - rate), G[0] != 0

    def rate_for_what_is_kept(G, b, rate):
        """You undid the scale with the share that was dropped; it is made of the share that
        stays."""
        return G[0] / b[0] * rate, G[0] != 0

    def divided_by_the_rate(G, b, rate):
        """Like rate_for_what_is_kept."""
        return G[0] / b[0] / rate, G[0] != 0

    def ratio_upside_down(G, b, rate):
        """You divided the wrong way round: the ratio is weight gradient over bias gradient."""
        return b[0] / G[0], G[0] != 0

    def dropped_for_kept(G, b, rate):
        """Your mask says which features were dropped; asked is which were *kept*."""
        return G[0] / b[0] * (1 - rate), G[0] == 0

    def rows_for_columns(G, b, rate):
        """Your mask has an entry for each of the classifier's outputs. A feature is an input of
        the classifier: is that a row of its weight gradient, or a column?"""
        return G[0] / b[0] * (1 - rate), (G != 0).any(dim=1)

    def small_taken_for_dropped(G, b, rate):
        """Your mask misses features that are small and were kept. A dropped feature's column is
        zero exactly."""
        return G[0] / b[0] * (1 - rate), (G[0] / b[0]).abs() > 1e-2


def check_features(features: Student, seed: int = 1, count: int = 12) -> None:
    """Check: the encoder's features and the mask, out of the classifier's gradient."""
    boolean = "The mask must be a tensor of bool, one entry for each feature."
    for rate in (0.25, 0.5, 0.75):
        a, kept, k = normal(seed, count), _mask(seed, count, rate), normal(seed + 1, 5)
        a[kept.nonzero()[0]] = 1e-5
        given, case = (torch.outer(k, a * kept / (1 - rate)), k, rate), f"at rate {rate}"
        first, mask = pair(ask(features, *given, case=case), "features and mask")
        found = tensor(first, "features")
        wrong = ((hint, both[0]) for hint, both in known("dropout-features", given))
        compare(torch.where(found.isnan(), 0, found), a * kept, f"the features {case}", wrong)
        demand(isinstance(mask, Tensor) and mask.dtype == torch.bool, boolean)
        demand(mask.shape != (5,), Features.rows_for_columns)
        demand(mask.shape == kept.shape, boolean)
        demand(not torch.equal(mask, ~kept), Features.dropped_for_kept)
        demand(torch.equal(mask, kept), Features.small_taken_for_dropped)
    right("The mask was never sent, and stands in the gradient all the same.")


def _mismatch(model, x, label, observed, mask, last=0, graph=True):
    value = LOSS(model[-1](model[:-1](x) * mask), label)
    found = torch.autograd.grad(value, list(model.parameters()), create_graph=graph)
    pairs = zip(found[-last:], observed[-last:], strict=True)
    return sum((g - seen).square().sum() for g, seen in pairs)


class Mismatch(Mistakes, of="dropout-mismatch"):
    def mask_ignored(model, x, label, observed, mask):
        """You left the mask out: your attacker searches with the network that was not used."""
        return _mismatch(model, x, label, observed, torch.ones_like(mask))

    def mask_made_of_zeros_and_ones(model, x, label, observed, mask):
        """You multiplied by zeros and ones. The mask that you get holds dropout's scale already:
        use it as it is."""
        return _mismatch(model, x, label, observed, (mask > 0).double())

    def distance_for_its_square(model, x, label, observed, mask):
        """That is the distance; its square was asked."""
        return _mismatch(model, x, label, observed, mask).sqrt()

    def classifier_only(model, x, label, observed, mask):
        """You compare the classifier's gradients alone; take every layer's."""
        return _mismatch(model, x, label, observed, mask, last=2)

    def graph_not_kept(model, x, label, observed, mask):
        """The value is right, but no derivative reaches the picture: a search could not use it.
        Does torch.autograd.grad know that it will be differentiated once more (create_graph)?"""
        return _mismatch(model, x, label, observed, mask, graph=False)


def check_mismatch(mismatch: Student, seed: int = 2) -> None:
    """Check: the objective of gradient matching, with a mask or without one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(seed + number, *p.shape) / 2)
    x, mask = normal(seed + 7, 1, 3, 2, 2), 2.0 * _mask(seed, 8, 0.5)
    value = LOSS(model[-1](model[:-1](x) * mask), LABEL)
    observed = list(torch.autograd.grad(value, list(model.parameters())))
    guess = (x + 0.3 * normal(seed + 8, *x.shape)).requires_grad_()
    true = _mismatch(model, guess, LABEL, observed, mask)
    given = (model, guess, LABEL, observed, mask)
    answer = expect("dropout-mismatch", mismatch, given, true.detach(), "the objective")
    demand(isinstance(answer, Tensor) and answer.requires_grad, Mismatch.graph_not_kept)
    slopes = [torch.autograd.grad(v, guess, allow_unused=True)[0] for v in (answer, true)]
    same = slopes[0] is not None and torch.allclose(*slopes, rtol=1e-6)
    demand(same, Mismatch.graph_not_kept)
    naive, aware = (
        float(ask(mismatch, model, x, LABEL, observed, m).detach()) for m in (mask**0, mask)
    )
    demand(aware < 1e-20 < naive, Mismatch.mask_ignored)
    right(
        f"At the true picture the naive objective is {naive:.2g}, the aware one zero: who does not "
        "know of the mask passes the truth by."
    )


def _solve(*parts: tuple[Tensor, Tensor]) -> Tensor:
    A, b = (torch.cat(column) for column in zip(*parts, strict=True))
    return torch.linalg.pinv(A) @ b


class LeaveOut(Mistakes, of="dropout-leave-out"):
    def zeros_as_numbers(W, z, kept, K, g):
        """You took the zeros for numbers: a dropped feature's value is not zero, it is unknown,
        and its equation must go."""
        return _solve((W, z), (K, g))

    def values_masked_rows_not(W, z, kept, K, g):
        """Like zeros_as_numbers."""
        return _solve((W, torch.where(kept, z, 0.0)), (K, g))

    def gradient_equations_left_out(W, z, kept, K, g):
        """You left the gradient equations out as well. At a dropped feature k is zero, so they
        lose nothing."""
        return _solve((W[kept], z[kept]))

    def mask_the_wrong_way_round(W, z, kept, K, g):
        """You kept the rows that were dropped, and dropped those that were kept."""
        return _solve((W[~kept], z[~kept]), (K, g))

    def every_weight_equation_left_out(W, z, kept, K, g):
        """You left all weight equations out; only the dropped ones are unknown."""
        return _solve((K, g))


def check_leave_out(leave_out: Student, seed: int = 3, pixels: int = 10) -> None:
    """Check: least squares without the rows of dropped features."""
    x, W, K = normal(seed, pixels), normal(seed + 1, 14, pixels), normal(seed + 2, 4, pixels)
    kept = _mask(seed, 14, 0.5)
    given = (W, (W @ x) * kept, kept, K, K @ x)
    expect("dropout-leave-out", leave_out, given, x, "the picture", tolerance=1e-7)
    right("Half the features were dropped, and the picture is exact: enough rows are left.")


class Protecting(Mistakes, of="dropout-protecting"):
    def exchanged():
        """The first is a number of filters, a whole number, at least 1; the second a rate."""
        return 0.5, 3

    def rate_too_high():
        """The rate may be one half at most; yours is {rate}."""
        return 4, 0.8

    def narrow_in_any_case():
        """With {filters} filters the layer hides part of the picture without any dropout: it is
        not the dropout that protects."""
        return 2, 0.5

    def rate_too_low():
        """{filters} filters at rate {rate} leave about {count:.0f} equations that are news, for
        192 pixels: dropout takes rows that the layer can spare."""
        return 3, 0.2

    def one_filter_too_many():
        """Like rate_too_low."""
        return 4, 0.5


def check_protecting(protecting: Student, seed: int = 4) -> None:
    """Check: a layer that gives a picture away without dropout, and keeps it with."""
    filters, rate = pair(ask(protecting), "protecting()")
    numbers = isinstance(filters, int | float) and isinstance(rate, int | float)
    demand(numbers, "Return two numbers, the filters and the rate: `return filters, rate`.")
    demand(filters == int(filters) and filters >= 1 and 0 < rate < 1, Protecting.exchanged)
    filters = int(filters)
    facts = {"filters": filters, "rate": rate, "count": filters * (64 * (1 - rate) + 27 - 1)}
    demand(rate <= 0.5, Protecting.rate_too_high, **facts)
    bound = gi.design.filter_bound(3, 8, 3, padding=1)
    demand(filters > bound, Protecting.narrow_in_any_case, **facts)
    bound = gi.design.filter_bound(3, 8, 3, padding=1, rate=rate)
    demand(filters <= bound, Protecting.rate_too_low, **facts)
    exact = sum(_determined(filters, rate, seed + number) for number in range(3))
    demand(
        exact == 0,
        f"The count at {filters} filters and rate {rate} is so near to the pixels that {exact} of "
        "3 masks left full rank. Leave chance less room.",
    )
    demand(_determined(filters, 0.0, seed), Protecting.narrow_in_any_case, **facts)
    right(
        f"{filters} filters: exact without dropout, never with. One filter more, and it is exact "
        "with dropout too."
    )


def _determined(filters: int, rate: float, seed: int) -> bool:
    """Whether what is left of the layer's equations has full rank."""
    conv, head = nn.Conv2d(3, filters, 3, padding=1), nn.Linear(64 * filters, 10)
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(seed + 7 * number, *p.shape) / 10)
    kept = torch.rand(64 * filters, generator=torch.Generator().manual_seed(seed)) >= rate
    z = conv(gi.data.photo("rocket", 8, dtype=torch.float64)).detach().requires_grad_()
    (k,) = torch.autograd.grad(LOSS(head(model[1:3](z) * kept), LABEL), z)
    matrix = gi.systems.LayerSystem(conv, k, (3, 8, 8)).to_dense()
    left = torch.cat([kept, kept.new_ones(len(matrix) - len(kept))])
    return int(torch.linalg.matrix_rank(matrix[left])) == 192


def _rounds(place: str, p: float, hidden: float, redrawn: bool, count=None) -> float:
    """Solve the exercise, or count the rounds in another way."""
    if place == "above" or p < hidden:
        return 0
    count = math.log(hidden) / math.log(p) if count is None else count
    return math.floor(count + 1e-9) if redrawn else math.inf


class SafeRounds(Mistakes, of="dropout-rounds"):
    def kept_for_dropped(place, p, hidden, redrawn):
        """You took the share that is kept for the share that is dropped."""
        return _rounds(place, p, hidden, redrawn, math.log(hidden) / math.log(1 - p))

    def seen_for_hidden(place, p, hidden, redrawn):
        """The share that is to stay *hidden* is given, not the share that may be seen."""
        return _rounds(place, p, 1 - hidden, redrawn)

    def shares_added(place, p, hidden, redrawn):
        """A pixel is unseen only if it was dropped in every round: such shares multiply."""
        return _rounds(place, p, hidden, redrawn, (1 - hidden) / (1 - p))

    def shares_divided(place, p, hidden, redrawn):
        """Like shares_added."""
        return _rounds(place, p, hidden, redrawn, p / hidden)

    def rounded_up(place, p, hidden, redrawn):
        """After that many rounds already more has been seen than allowed: which way do you
        round?"""
        return _rounds(place, p, hidden, redrawn, 1 + math.log(hidden) / math.log(p))

    def fresh_masks_assumed(place, p, hidden, redrawn):
        """The mask is drawn once and kept: what it hides in the first round it hides in every
        round. Use math.inf for any number of rounds."""
        return _rounds(place, p, hidden, True)

    def place_not_looked_at(place, p, hidden, redrawn):
        """The mask lies above the dense layer: it changes k, and the layer's ratio divides k away.
        What is hidden in round one?"""
        return _rounds("input", p, hidden, redrawn)

    def one_kept_mask_always_enough(place, p, hidden, redrawn):
        """Nothing is hidden to begin with: one mask drops a smaller share than is to stay hidden,
        kept or drawn anew."""
        kept = place == "input" and not redrawn
        return math.inf if kept else _rounds(place, p, hidden, redrawn)


ROUNDS = ((0.5, 0.1), (0.9, 0.5), (0.8, 0.3))


def check_safe_rounds(
    safe_rounds: Student, cases: tuple[tuple[float, float], ...] = ROUNDS
) -> None:
    """Check: for how many rounds a mask keeps a share of the pixels hidden."""
    for p, hidden in cases:
        given, case = ("input", p, hidden, True), f"at rate {p}, {hidden:.0%} to stay hidden"
        expect("dropout-rounds", safe_rounds, given, _rounds(*given), "the number of rounds", case)
        stays = ask(safe_rounds, "input", p, hidden, False, case=case)
        demand(stays == math.inf, SafeRounds.fresh_masks_assumed)
        above = [ask(safe_rounds, "above", p, hidden, drawn, case=case) for drawn in (True, False)]
        demand(above == [0, 0], SafeRounds.place_not_looked_at)
    bare = [ask(safe_rounds, "input", 0.2, 0.5, drawn) for drawn in (True, False)]
    demand(bare == [0, 0], SafeRounds.one_kept_mask_always_enough)
    right("A fresh mask each round is good for training, and bad for hiding.")

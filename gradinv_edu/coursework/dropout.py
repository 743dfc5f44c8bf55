"""Checks of the exercises to chapter 11, defense by dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..data import photo
from ..defenses import filter_bound
from ..systems import LayerSystem
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

LOSS, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(seed: int, count: int, rate: float) -> Tensor:
    """Whether each feature was kept; both kinds occur."""
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return places >= round(rate * count)


SCALED = (
    "Those are the features as the classifier met them: dropout scaled those that it kept, and "
    "the encoder's are asked."
)
TWICE = "You scaled the features once more; what did dropout do to those that it kept?"
OTHER_SHARE = (
    "You undid the scale with the share that was dropped; it is made of the share that stays."
)
RATIO = "You divided the wrong way round: the ratio is weight gradient over bias gradient."
SWAPPED = "Your mask says which features were dropped; asked is which were *kept*."
UNITS = (
    "Your mask has an entry for each of the classifier's outputs. A feature is an input of the "
    "classifier: is that a row of its weight gradient, or a column?"
)
BY_SIZE = (
    "Your mask misses features that are small and were kept. A dropped feature's column is zero "
    "exactly."
)
BOOLEAN = "The mask must be a tensor of bool, one entry for each feature."


def check_features(features: Student, seed: int = 1, count: int = 12) -> None:
    """Check 11.1: the encoder's features and the mask, out of the classifier's gradient."""
    for rate in (0.25, 0.5, 0.75):
        a, kept, k = _random(seed, count), _mask(seed, count, rate), _random(seed + 1, 5)
        a[kept.nonzero()[0]] = 1e-5
        true, met = a * kept, a * kept / (1 - rate)
        case = f"at rate {rate}"
        answer = ask(features, torch.outer(k, met), k.clone(), rate, case=case)
        first, mask = pair(answer, "features and mask")
        known: list[Wrong] = [
            (SCALED, met),
            (TWICE, met / (1 - rate)),
            (OTHER_SHARE, met * rate),
            (OTHER_SHARE, met / rate),
            (RATIO, 1 / met),
        ]
        compare(torch.nan_to_num(tensor(first, "features")), true, f"the features {case}", known)
        demand(isinstance(mask, Tensor) and mask.dtype == torch.bool, BOOLEAN)
        demand(mask.shape != (5,), UNITS)
        demand(mask.shape == kept.shape, BOOLEAN)
        demand(not torch.equal(mask, ~kept), SWAPPED)
        demand(torch.equal(mask, kept), BY_SIZE)
    right("The mask was never sent, and stands in the gradient all the same.")


IGNORED = "You left the mask out: your attacker searches with the network that was not used."
UNSCALED = (
    "You multiplied by zeros and ones. The mask that you get holds dropout's scale already: use "
    "it as it is."
)
ROOT = "That is the distance; its square was asked."
TOP = "You compare the classifier's gradients alone; take every layer's."
NO_SLOPE = (
    "The value is right, but no derivative reaches the picture: a search could not use it. Does "
    "torch.autograd.grad know that it will be differentiated once more (create_graph)?"
)


def _gradients(model: nn.Sequential, x: Tensor, mask: Tensor) -> list[Tensor]:
    value = LOSS(model[-1](model[:-1](x) * mask), LABEL)
    return list(torch.autograd.grad(value, list(model.parameters()), create_graph=True))


def _mismatch(
    model: nn.Sequential, x: Tensor, observed: list[Tensor], mask: Tensor, last: int = 0
) -> Tensor:
    pairs = zip(_gradients(model, x, mask)[-last:], observed[-last:], strict=True)
    return torch.stack([(g - seen).square().sum() for g, seen in pairs]).sum()


def _small(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(_random(seed + number, *p.shape) / 2)
    return model


def check_mismatch(mismatch: Student, seed: int = 2) -> None:
    """Check 11.2: the objective of gradient matching, with a mask or without one."""
    model, x = _small(seed), _random(seed + 7, 1, 3, 2, 2)
    mask, ones = 2.0 * _mask(seed, 8, 0.5), torch.ones(8, dtype=torch.float64)
    observed = [g.detach() for g in _gradients(model, x, mask)]
    guess = (x + 0.3 * _random(seed + 8, *x.shape)).requires_grad_()
    true = _mismatch(model, guess, observed, mask)
    answer = ask(mismatch, model, guess, LABEL, observed, mask)
    known: list[Wrong] = [
        (IGNORED, _mismatch(model, guess, observed, ones)),
        (UNSCALED, _mismatch(model, guess, observed, (mask > 0).double())),
        (ROOT, true.sqrt()),
        (TOP, _mismatch(model, guess, observed, mask, last=2)),
    ]
    compare(answer, true, "the objective", known)
    demand(isinstance(answer, Tensor) and answer.requires_grad, NO_SLOPE)
    slopes = [torch.autograd.grad(v, guess, allow_unused=True)[0] for v in (answer, true)]
    demand(slopes[0] is not None and torch.allclose(slopes[0], slopes[1], rtol=1e-6), NO_SLOPE)
    naive, aware = (
        float(ask(mismatch, model, x, LABEL, observed, m).detach()) for m in (ones, mask)
    )
    demand(aware < 1e-20 < naive, IGNORED)
    right(
        f"At the true picture the naive objective is {naive:.2g}, the aware one zero: who does not "
        "know of the mask passes the truth by."
    )


ZEROS = (
    "You took the zeros for numbers: a dropped feature's value is not zero, it is unknown, and its "
    "equation must go."
)
ONLY_WEIGHT = (
    "You left the gradient equations out as well. At a dropped feature k is zero, so they lose "
    "nothing."
)
DROPPED = "You kept the rows that were dropped, and dropped those that were kept."
HALF_MASKED = "You masked the values, and left their rows in the matrix."
ONLY_GRADIENT = "You left all weight equations out; only the dropped ones are unknown."


def check_leave_out(leave_out: Student, seed: int = 3, pixels: int = 10) -> None:
    """Check 11.3: least squares without the rows of dropped features."""
    x, W, K = _random(seed, pixels), _random(seed + 1, 14, pixels), _random(seed + 2, 4, pixels)
    kept = _mask(seed, 14, 0.5)
    z, g = (W @ x) * kept, K @ x

    def solve(*parts: tuple[Tensor, Tensor]) -> Tensor:
        A, b = (torch.cat(column) for column in zip(*parts, strict=True))
        return torch.as_tensor(torch.linalg.pinv(A) @ b)

    known: list[Wrong] = [
        (ZEROS, solve((W, z), (K, g))),
        (ONLY_WEIGHT, solve((W[kept], z[kept]))),
        (DROPPED, solve((W[~kept], z[~kept]), (K, g))),
        (ONLY_GRADIENT, solve((K, g))),
    ]
    given = (W.clone(), z.clone(), kept.clone(), K.clone(), g.clone())
    compare(ask(leave_out, *given), x, "the picture", known, 1e-7)
    right("Half the features were dropped, and the picture is exact: enough rows are left.")


NUMBERS = "Return two numbers, the filters and the rate: `return filters, rate`."
WHOLE = "The first is a number of filters, a whole number, at least 1; the second a rate."
HIGH = "The rate may be one half at most; yours is {rate}."
ALREADY = (
    "With {filters} filters the layer hides part of the picture without any dropout: it is not "
    "the dropout that protects."
)
SPARE = (
    "{filters} filters at rate {rate} leave about {count:.0f} equations that are news, for 192 "
    "pixels: dropout takes rows that the layer can spare."
)
LUCK = (
    "The count at {filters} filters and rate {rate} is so near to the pixels that {exact} of 3 "
    "masks left full rank. Leave chance less room."
)


def check_protecting(protecting: Student, seed: int = 4) -> None:
    """Check 11.4: a layer that gives a picture away without dropout, and keeps it with."""
    filters, rate = pair(ask(protecting), "protecting()")
    demand(isinstance(filters, int | float) and isinstance(rate, int | float), NUMBERS)
    demand(filters == int(filters) and filters >= 1 and 0 < rate < 1, WHOLE)
    filters = int(filters)
    facts = {"filters": filters, "rate": rate}
    demand(rate <= 0.5, HIGH.format(rate=rate))
    demand(filters > filter_bound(3, 8, 3, padding=1), ALREADY.format(**facts))
    count = filters * (64 * (1 - rate) + 27 - 1)
    demand(
        filters <= filter_bound(3, 8, 3, padding=1, rate=rate), SPARE.format(**facts, count=count)
    )
    exact = sum(_determined(filters, rate, seed + number) for number in range(3))
    demand(exact == 0, LUCK.format(**facts, exact=exact))
    demand(_determined(filters, 0.0, seed), ALREADY.format(**facts))
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
            p.copy_(_random(seed + 7 * number, *p.shape) / 10)
    kept = torch.rand(64 * filters, generator=torch.Generator().manual_seed(seed)) >= rate
    z = conv(photo("rocket", 8, dtype=torch.float64)).detach().requires_grad_()
    (k,) = torch.autograd.grad(LOSS(head(model[1:3](z) * kept), LABEL), z)
    matrix = LayerSystem(conv, k, (3, 8, 8)).to_dense()
    left = torch.cat([kept, kept.new_ones(len(matrix) - len(kept))])
    return int(torch.linalg.matrix_rank(matrix[left])) == 192


KEPT_SHARE = "You took the share that is kept for the share that is dropped."
LINEAR = "A pixel is unseen only if it was dropped in every round: such shares multiply."
UP = "After that many rounds already more has been seen than allowed: which way do you round?"
FRESH = (
    "The mask is drawn once and kept: what it hides in the first round it hides in every round. "
    "Use math.inf for any number of rounds."
)
AT_ONCE = (
    "Nothing is hidden to begin with: one mask drops a smaller share than is to stay hidden, kept "
    "or drawn anew."
)
ABOVE = (
    "The mask lies above the dense layer: it changes k, and the layer's ratio divides k away. "
    "What is hidden in round one?"
)
COMPLEMENT = "The share that is to stay *hidden* is given, not the share that may be seen."


def _rounds(p: float, hidden: float) -> float:
    rounds = 0
    while p ** (rounds + 1) >= hidden - 1e-12:
        rounds += 1
    return float(rounds)


ROUNDS = ((0.5, 0.1), (0.9, 0.5), (0.8, 0.3))


def check_safe_rounds(
    safe_rounds: Student, cases: tuple[tuple[float, float], ...] = ROUNDS
) -> None:
    """Check 11.5: for how many rounds a mask keeps a share of the pixels hidden."""
    for p, hidden in cases:
        true = _rounds(p, hidden)
        wrongs = [
            (KEPT_SHARE, _rounds(1 - p, hidden)),
            (COMPLEMENT, _rounds(p, 1 - hidden)),
            (LINEAR, float(math.floor((1 - hidden) / (1 - p) + 1e-12))),
            (LINEAR, float(math.floor(p / hidden + 1e-12))),
            (UP, true + 1),
        ]
        case = f"at rate {p}, {hidden:.0%} to stay hidden"
        answer = ask(safe_rounds, "input", p, hidden, True, case=case)
        known = [(hint, torch.tensor(wrong)) for hint, wrong in wrongs]
        compare(answer, torch.tensor(true), f"the number of rounds {case}", known)
        stays = ask(safe_rounds, "input", p, hidden, False, case=case)
        demand(stays == math.inf, FRESH)
        above = [ask(safe_rounds, "above", p, hidden, drawn, case=case) for drawn in (True, False)]
        demand(above == [0, 0], ABOVE)
    bare = [ask(safe_rounds, "input", 0.2, 0.5, drawn) for drawn in (True, False)]
    demand(bare == [0, 0], AT_ONCE)
    right("A fresh mask each round is good for training, and bad for hiding.")

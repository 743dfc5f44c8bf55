"""Checks of the exercises to chapter 12, defense by noise and compression."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data import digits
from ..defenses import Bottleneck, privacy_spent
from ..sharing import observe
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

Client = Callable[[Tensor], tuple[Tensor, Tensor]]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUMMED = (
    "Your standard deviation is that of the summed, not of the averaged gradient: did you divide "
    "by the batch?"
)
ROOT_N = (
    "You divided the noise by the root of the batch, as if each sample had noise of its own. It is "
    "added once, to the sum."
)
UNIT_C = "Your noise does not know the clipping norm: it must hide one sample, whatever its length."
AFTER = (
    "You clipped the mean. A single sample may still be as long as it likes there, so nothing is "
    "promised to it."
)
STRETCHED = "You bring short gradients up to the clipping norm as well; clipping only shortens."
UNCLIPPED = "You clipped nothing: one sample may then count for any amount."
UNAVERAGED = "That is the sum over the batch; the client sends its mean."


def _private(g: Tensor, C: float, sigma: float, noise: Tensor) -> Tensor:
    factors = (C / g.norm(dim=1, keepdim=True)).clamp(max=1)
    return torch.as_tensor(((g * factors).sum(0) + sigma * C * noise) / len(g))


def check_private(private: Student, seed: int = 1, samples: int = 6) -> None:
    """Check 12.1: clipped, averaged, and noise by what one sample can change."""
    lengths = torch.linspace(0.2, 4, samples, dtype=torch.float64)[:, None]
    alike = _random(seed, samples, 9) + 1.5 * _random(seed + 2, 9)
    g = nn.functional.normalize(alike, dim=1) * lengths
    noise, C, sigma = _random(seed + 1, 9), 1.2, 0.8
    true, quiet = _private(g, C, sigma, noise), 0 * noise
    mean, clipped = g.mean(0), _private(g, C, sigma, quiet)
    short = min(1.0, C / float(mean.norm()))
    known: list[Wrong] = [
        (SUMMED, clipped + sigma * C * noise),
        (ROOT_N, clipped + sigma * C * noise / samples**0.5),
        (UNIT_C, clipped + sigma * noise / samples),
        (AFTER, mean * short + sigma * C * noise / samples),
        (STRETCHED, true - clipped + C * (g / lengths).mean(0)),
        (UNCLIPPED, mean + sigma * C * noise / samples),
        (UNAVERAGED, samples * true),
    ]
    compare(ask(private, g.clone(), C, sigma, noise.clone()), true, "the private gradient", known)
    one = _private(g[3:4], C, 0.0, quiet)
    same = nn.functional.cosine_similarity(one, g[3], dim=0)
    right(
        f"Clipping alone leaves a gradient's direction, cosine {float(same):.3f}: only the noise "
        "hides, and its size is what one sample can change."
    )


LINEAR = (
    "You multiplied the ε of one round by the rounds. Rényi divergences add up over the rounds; "
    "convert to ε after that, and it grows more slowly."
)
FIXED = "You took one order α for all; the best one depends on σ and the rounds."
NO_BOUND = "You left out the price of δ, the second term."
HALF_TERM = "You left out the first term: T rounds have a divergence of their own."
LOG_TEN = "Your logarithm is that of base ten."
DOUBLE = "You lost the 2 in α / (2 σ²)."
FLAT_ROUNDS = "The rounds do not show in your answer."


def _spent(s: float, log: float) -> float:
    """Smallest over the orders α of s α + log / (α - 1)."""
    return s + 2 * math.sqrt(s * log)


BUDGETS = ((1.0, 1, 1e-5), (4.0, 100, 1e-5), (2.0, 20, 1e-6))


def check_epsilon(epsilon: Student, cases: tuple[tuple[float, int, float], ...] = BUDGETS) -> None:
    """Check 12.2: ε of several rounds, against Opacus's accountant."""
    for sigma, rounds, delta in cases:
        s, log = rounds / (2 * sigma**2), math.log(1 / delta)
        true = _spent(s, log)
        wrongs = [
            (LINEAR, rounds * _spent(s / rounds, log)),
            (FIXED, 2 * s + log),
            (NO_BOUND, s),
            (HALF_TERM, 2 * math.sqrt(s * log)),
            (LOG_TEN, _spent(s, log / math.log(10))),
            (DOUBLE, _spent(2 * s, log)),
            (FLAT_ROUNDS, _spent(s / rounds, log)),
        ]
        case = f"for σ = {sigma}, {rounds} rounds and δ = {delta}"
        known = [(hint, torch.tensor(wrong).double()) for hint, wrong in wrongs]
        answer = ask(epsilon, sigma, rounds, delta, case=case)
        compare(answer, torch.tensor(true).double(), f"ε {case}", known, tolerance=1e-3)
    reference = privacy_spent(sigma, 1.0, rounds, delta)
    right(f"ε = {true:.2f}; Opacus, which converts a little more sharply, says {reference:.2f}.")


ZEROS = "You took the zeros for numbers: what was pruned is unknown, and has no say in the average."
AVERAGED = (
    "You averaged the rows' ratios. Noise of rounding is loudest where k is small: which weights "
    "does least squares give?"
)
FIRST = "You used one row; pixels that it lost were seen by others."
FILLED = "Pixels of which no entry is left are unknown: say so, with NaN."
TRANSPOSED = "Your answer has an entry for each row; a pixel is a column."


def check_fill(fill: Student, seed: int = 3, pixels: int = 30) -> None:
    """Check 12.3: the picture out of a pruned and rounded gradient."""
    x, k = _random(seed, pixels).abs() + 0.1, _random(seed + 1, 8)
    places = torch.rand(8, pixels, generator=torch.Generator().manual_seed(seed)) < 0.3
    places[:, 4] = False
    G = (torch.outer(k, x) + 0.01 * _random(seed + 2, 8, pixels)) * places
    share = (k[:, None].square() * places).sum(0)
    true, ratios = (k @ G) / share, torch.where(places, G / k[:, None], 0)
    answer = tensor(ask(fill, G.clone(), k.clone()), "the picture")
    known: list[Wrong] = [
        (ZEROS, (k @ G) / k.square().sum()),
        (ZEROS, ratios.mean(0)),
        (AVERAGED, torch.nan_to_num(ratios.sum(0) / places.sum(0))),
        (AVERAGED, ratios.sum(0) / places.sum(0)),
        (FIRST, G[0] / k[0]),
        (FIRST, G[k.abs().argmax()] / k[k.abs().argmax()]),
    ]
    demand(answer.shape != (8,), TRANSPOSED)
    told = [(hint, wrong.nan_to_num()) for hint, wrong in known]
    compare(answer.nan_to_num(), true.nan_to_num(), "the picture", told)
    demand(torch.equal(answer.isnan(), true.isnan()), FILLED)
    right("Known zeros are left out, and what is left is averaged by its loudness.")


PAIR = "Return both pictures, Soteria's and PRECODE's, in this order."
NUMBERS = "Soteria: you took features of pruned columns for zeros; they are unknown."
BENT = "Soteria: those equations speak of z, before the tanh."
NO_BIAS = "Soteria: the encoder has a bias, and it is still in your right-hand side."
INVERTED = "Soteria: you used the columns that were pruned."
ABOVE = (
    "PRECODE: that is the input of the layer above the draw, ratio of the last layer's gradients. "
    "Which layer meets the picture before anything is drawn?"
)
DRAWN = "PRECODE: that is the draw itself, from the decoder's gradient."
SHAPE = "{name}: the picture has {wanted} pixels; your answer has shape {shape}."


def _soteria(seed: int, pixels: int) -> tuple[nn.Linear, dict[str, Tensor], Tensor]:
    """An encoder, the classifier's gradient with a third of its columns left, and the picture."""
    encoder = nn.Linear(pixels, 6 * pixels).double()
    with torch.no_grad():
        encoder.weight.copy_(_random(seed, 6 * pixels, pixels) / (2 * pixels**0.5))
        encoder.bias.copy_(_random(seed + 1, 6 * pixels) / 4)
    x = _random(seed + 2, pixels).abs()
    features = encoder(x).tanh().detach()
    pruned = torch.randperm(6 * pixels, generator=torch.Generator().manual_seed(seed))
    features[pruned[: 4 * pixels]] = 0
    k = _random(seed + 3, 10)
    return encoder, {"weight": torch.outer(k, features), "bias": k}, x


def _precode(seed: int, pixels: int) -> tuple[dict[str, Tensor], Tensor]:
    block = Bottleneck(pixels, 7, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), block, nn.Linear(pixels, 10).double())
    x, label = _random(seed + 4, 1, pixels).abs(), torch.tensor([2])
    generator = torch.Generator().manual_seed(seed)
    return observe(model, nn.CrossEntropyLoss(), x, label, generator=generator).gradients, x[0]


def _ratio(G: Tensor, b: Tensor) -> Tensor:
    return b @ G / b.square().sum()


def check_see_through(see_through: Student, seed: int = 4, pixels: int = 16) -> None:
    """Check 12.4: two published defenses, undone."""
    encoder, classifier, x = _soteria(seed, pixels)
    gradients, y = _precode(seed, pixels)
    given = {name: g.clone() for name, g in classifier.items()}
    answer = ask(see_through, encoder, given, {n: g.clone() for n, g in gradients.items()})
    first, second = (tensor(part, "the picture").flatten() for part in pair(answer, PAIR))
    for name, found in (("Soteria", first), ("PRECODE", second)):
        short = found.shape == (pixels,) or (name == "PRECODE" and found.shape == (7,))
        demand(short, SHAPE.format(name=name, wanted=pixels, shape=tuple(found.shape)))
    W, b = encoder.weight.detach(), encoder.bias.detach()
    r, kept = _ratio(**_named(classifier)), (classifier["weight"] != 0).any(0)
    z = r.clamp(-1 + 1e-15, 1 - 1e-15).atanh()
    wrongs = (
        (NUMBERS, W, z - b),
        (BENT, W[kept], r[kept] - b[kept]),
        (NO_BIAS, W[kept], z[kept]),
        (INVERTED, W[~kept], z[~kept] - b[~kept]),
    )
    known = [(hint, torch.linalg.pinv(A) @ values) for hint, A, values in wrongs]
    compare(first, x, "Soteria: the picture", known, 1e-7)
    drawn = [_ratio(gradients[f"{n}.weight"], gradients[f"{n}.bias"]) for n in ("2", "1.decode")]
    compare(second, y, "PRECODE: the picture", [(ABOVE, drawn[0]), (DRAWN, drawn[1])], 1e-7)
    right("Known zeros and draws above the layer that tells: neither hides a picture.")


def _named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"G": gradients["weight"], "b": gradients["bias"]}


FACTOR = (
    "A factor stands before G and b alike; however small the message, its ratio is the picture."
)
ESTIMATOR = (
    "A server that combines the rows better reads the pictures out of this noise. Judge by the "
    "best attack you know of, not by the first."
)
PRUNED = "The zeros in this message are pruned entries, and a server leaves them out."
ROUNDED = "So few levels look coarse; all rows together still tell the picture."
DROWNED = (
    "What can be recovered here is no nearer than the mean of the pictures, for which nobody needs "
    "a gradient. Which baseline did you compare with?"
)


def _message(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of one dense layer of 48 units, of norm 1."""
    k = _random(11, 48)
    k = k * (0.05 + torch.rand(48, generator=torch.Generator().manual_seed(2)).double().square())
    size = float(k.norm() * torch.cat([x, x.new_ones(1)]).norm())
    return torch.outer(k, x) / size, k / size


def _clients(seed: int) -> list[tuple[str, bool, str, Client]]:
    generator = torch.Generator().manual_seed(seed)

    def noisy(sigma: float) -> Client:
        def client(x: Tensor) -> tuple[Tensor, Tensor]:
            G, b = _message(x)
            draws = torch.randn(48, len(x) + 1, generator=generator, dtype=torch.float64) * sigma
            return G + draws[:, :-1], b + draws[:, -1]

        return client

    def clipped(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return 1e-3 * G, 1e-3 * b

    def pruned(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return G * (torch.rand(G.shape, generator=generator) < 0.15), b

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = ((2 * g / g.abs().max()).round() / 2 * g.abs().max() for g in _message(x))
        return G, b

    return [
        ("clipped to a thousandth", True, FACTOR, clipped),
        ("with a little noise", True, ESTIMATOR, noisy(0.01)),
        ("pruned by lot", True, PRUNED, pruned),
        ("of five levels an entry", True, ROUNDED, rounded),
        ("with the noise of a promise", False, DROWNED, noisy(1.0)),
        ("with noise of a tenth", False, DROWNED, noisy(0.1)),
    ]


def check_leaks(leaks: Student, seed: int = 5, first: int = 200) -> None:
    """Check 12.5: whether a client's messages give its pictures away."""
    pictures = digits(range(first, first + 15), dtype=torch.float64)[0].flatten(1)
    for name, true, hint, client in _clients(seed):
        answer = ask(leaks, client, pictures.clone(), case=f"for messages {name}")
        demand(bool(answer) == true, f"Messages {name}: {hint}")
    right("Rescaled, masked, rounded: it leaks. Blurred beyond the baseline: it does not.")

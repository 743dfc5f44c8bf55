"""Checks of the exercises to chapter 9, defense by design."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..defenses import filter_bound
from ..sharing import observe
from ..systems import LayerSystem
from .verdict import Student, Wrong, ask, compare, demand, right, tensor

LOSS, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REPEATS = (
    "You count every equation as news. Between the two sets some repeat what others say, once for "
    "each pair of filters."
)
EQUAL = "As many equations as pixels need not lack rank; the layer must have fewer."
SIDE = "A picture has two sides: how many positions has the kernel in all?"
PADDING = "Your positions are those without padding."
STRIDE = "Your positions are those of stride 1."
CHANNELS = "Your count of pixels is that of one channel."
NEXT = "One too many: that is the first number of filters at which nothing is proved any more."


def _most(pixels: int, positions: int, places: int, overlap: int = 1, slack: int = 0) -> int:
    """Largest F with F P + F c f² − F² < n, where ``overlap`` switches the last term."""
    filters = 0
    while filters < places:
        F = filters + 1
        if F * (positions + places - overlap * F) >= pixels + slack:
            break
        filters = F
    return filters


def _side(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


FIRST_LAYERS = (
    (1, 8, 3, 2, 1),
    (3, 32, 3, 2, 1),
    (3, 6, 3, 3, 1),
    (1, 8, 3, 1, 1),
    (1, 12, 4, 3, 0),
)


def check_most_filters(
    most_filters: Student, cases: Sequence[tuple[int, int, int, int, int]] = FIRST_LAYERS
) -> None:
    """Check 9.1: the largest number of filters with which a first layer must lack rank."""
    for c, size, f, stride, padding in cases:
        n, places, P = c * size**2, c * f**2, _side(size, f, stride, padding) ** 2
        true = filter_bound(c, size, f, stride, padding)
        case = f"for {c}×{size}×{size}, a {f}×{f} kernel, stride {stride}, padding {padding}"
        answer = ask(most_filters, c, size, f, stride, padding, case=case)
        wrongs = [
            (REPEATS, _most(n, P, places, overlap=0)),
            (EQUAL, _most(n, P, places, slack=1)),
            (SIDE, _most(n, _side(size, f, stride, padding), places)),
            (PADDING, _most(n, _side(size, f, stride, 0) ** 2, places)),
            (STRIDE, _most(n, _side(size, f, 1, padding) ** 2, places)),
            (CHANNELS, _most(size**2, P, places)),
            (NEXT, true + 1),
        ]
        known = [(hint, torch.tensor(float(wrong))) for hint, wrong in wrongs]
        compare(answer, torch.tensor(float(true)), f"the number of filters {case}", known)
    right("Up to so many filters the first layer hides something, whatever stands above it.")


MOVED = "That is the picture itself, or nearly: move it by 1/2 at least, as its norm measures."
HEARD = (
    "The first layer's output z changed by {gap:.0e}, so everything above it notices. Which "
    "directions does Wx not see?"
)
OWN = (
    "z is the same, and so is every gradient above. But the first layer's own gradient changed by "
    "{gap:.0e}: it meets the pixels a second time."
)
FLAT = "Return the picture as it came: one row of {n} pixels."


def _narrow(seed: int, filters: int = 2) -> nn.Sequential:
    conv, head = nn.Conv2d(1, filters, 3, 2, 1), nn.Linear(16 * filters, 10)
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(_random(seed + number, *p.shape) / 3)
    return model


def _equations(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of the first layer's two sets of equations."""
    z = model[0](x).detach().requires_grad_()
    (k,) = torch.autograd.grad(LOSS(model[1:](z), LABEL), z)
    matrix = LayerSystem(model[0], k, (1, 8, 8)).to_dense()
    return matrix[: k.numel()], matrix[k.numel() :]


def check_another(another: Student, seed: int = 1) -> None:
    """Check 9.2: a second picture with the same gradient in every layer."""
    model, x = _narrow(seed), _random(seed + 9, 1, 1, 8, 8).abs().clamp(max=1)
    W, K = _equations(model, x)
    answer = tensor(ask(another, W.clone(), K.clone(), x.flatten()), "the other picture")
    demand(answer.shape == (64,), FLAT.format(n=64))
    demand(float((answer - x.flatten()).norm()) >= 0.499, MOVED)
    heard = float((W @ (answer - x.flatten())).norm())
    demand(heard < 1e-8, HEARD.format(gap=heard))
    sent = [observe(model, LOSS, y, LABEL).gradients for y in (x, answer.reshape(x.shape))]
    gap = max(float((sent[1][name] - g).abs().max()) for name, g in sent[0].items())
    demand(gap < 1e-8, OWN.format(gap=gap))
    right("Two pictures, one gradient in every layer: no attack on it can tell which was sent.")


RAW = (
    "You asked the prior to explain all of A x. It need only explain what A x has beyond what the "
    "mean picture would give."
)
NO_MEAN = "You have what is to be added to the mean picture; add it."
SUBTRACTED = "Your correction has the wrong sign."
NO_PRIOR = (
    "Your answer is the nearest to the mean that fits: the covariance, which says what pixels do "
    "together, was not asked."
)
LEAST = "That is the answer of least norm. What do you know from the other pictures?"
UNFIT = "Your answer does not fit the equations: A x̂ is not what is known."


def _likely(A: Tensor, known: Tensor, mean: Tensor, C: Tensor) -> Tensor:
    return torch.as_tensor(C @ A.T @ torch.linalg.solve(A @ C @ A.T, known - A @ mean))


def check_most_likely(most_likely: Student, seed: int = 2, rows: int = 6) -> None:
    """Check 9.3: the most likely picture of all that fit."""
    pixels = rows + 4
    A, root = _random(seed, rows, pixels), _random(seed + 1, pixels, pixels)
    mean, x, C = _random(seed + 2, pixels), _random(seed + 3, pixels), root @ root.T
    one, zero = torch.eye(pixels, dtype=torch.float64), torch.zeros_like(mean)
    step = _likely(A, A @ x, mean, C)
    known: list[Wrong] = [
        (RAW, mean + _likely(A, A @ x, zero, C)),
        (NO_MEAN, step),
        (SUBTRACTED, mean - step),
        (NO_PRIOR, mean + _likely(A, A @ x, mean, one)),
        (LEAST, _likely(A, A @ x, zero, one)),
    ]
    given = (A.clone(), A @ x, mean.clone(), C.clone())
    answer = tensor(ask(most_likely, *given), "the most likely picture")
    compare(answer, mean + step, "the most likely picture", [*known, (UNFIT, answer)], 1e-7)
    right("It fits every equation, and fills in the rest as the other pictures suggest.")


Design = tuple[str, list[float], list[float]]
BEST_SEED = "You took a design's best seed: the next client will not choose its seed by the test."
MEAN_DB = (
    "One try of 300 dB among many of 20 moves your average by far: did you take the mean of the "
    "recoveries where the median was asked?"
)
WRONG_WAY = "For the client a *low* PSNR of the recovery is good, and a high accuracy."
EXACT_ONLY = (
    "A design belongs to the front if no other is at least as good in both and better in one. "
    "You left out designs that leak much, but learn better than all that leak less."
)
WEAK = (
    "A design stays although another is as good in one of the two and better in the other: then "
    "nothing speaks for it."
)


def _front(
    designs: list[Design],
    middle: Callable[[list[float]], float],
    merit: Callable[[list[float]], float],
    way: int = 1,
    strict: bool = False,
) -> set[str]:
    """Names that no other design beats."""
    scores = {name: (merit(acc), -way * middle(db)) for name, acc, db in designs}

    def beaten(a: tuple[float, float], b: tuple[float, float]) -> bool:
        if strict:
            return b[0] > a[0] and b[1] > a[1]
        return b != a and b[0] >= a[0] and b[1] >= a[1]

    return {n for n, a in scores.items() if not any(beaten(a, b) for b in scores.values())}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


DESIGNS: list[Design] = [
    ("narrow", [90.0, 89.0, 91.0], [19.0, 19.0, 20.0]),
    ("narrow, wide above", [95.0, 96.0, 94.0], [20.0, 300.0, 21.0]),
    ("lucky seed", [99.0, 90.0, 91.0], [22.0, 22.0, 22.0]),
    ("no better", [95.0, 94.0, 96.0], [25.0, 25.0, 25.0]),
    ("wide", [97.0, 96.0, 98.0], [300.0, 299.0, 300.0]),
    ("small dense", [25.0, 23.0, 24.0], [300.0, 300.0, 300.0]),
    ("steady", [96.0, 94.0, 95.0], [26.0, 25.0, 26.0]),
]


def check_front(front: Student, shift: float = 0.0) -> None:
    """Check 9.4: designs that no other beats in accuracy and in recovery both."""
    designs = [(n, [a - shift for a in acc], db) for n, acc, db in DESIGNS]
    answer = ask(front, [(n, list(acc), list(db)) for n, acc, db in designs])
    names = {n for n, _, _ in designs}
    demand(
        isinstance(answer, set | list | tuple) and set(answer) <= names,
        "Return the names of designs, as a set.",
    )
    true, found = _front(designs, _median, _mean), set(answer)
    known = [
        (BEST_SEED, _front(designs, _median, max)),
        (MEAN_DB, _front(designs, _mean, _mean)),
        (WRONG_WAY, _front(designs, _median, _mean, way=-1)),
        (EXACT_ONLY, {n for n in true if n != "wide"}),
        (WEAK, _front(designs, _median, _mean, strict=True)),
    ]
    for hint, wrong in known:
        demand(found == true or found != wrong, hint)
    demand(found == true, f"Of {len(names)} designs {len(found ^ true)} are misjudged.")
    right("The front says what there is to choose from; it does not choose.")


UNSEEN = (
    "The first layer has fewer equations than pixels, so it hides something, however wide, deep "
    "or rich in parameters the rest is."
)
UPPER = (
    "The narrow layer is not the first. What it loses, the first layer's own gradient still "
    "tells: a deficient layer further up proves nothing."
)
DENSE = "Few parameters, yet the first layer is dense with a bias: one unit's ratio is the picture."
ENOUGH = "This first layer has as many equations as pixels: here the count proves nothing."
DEEP = "Depth is no count of equations: only one layer meets the picture."


def _convolutions(*widths: int, channels: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, width in zip((channels, *widths[:-1]), widths, strict=True):
        layers += [nn.Conv2d(before, width, 3, 1 if layers else 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


def check_must_hide(must_hide: Student, channels: int = 1, size: int = 8) -> None:
    """Check 9.5: whether the count alone proves that a network hides part of its input."""
    few = filter_bound(channels, size, 3, 2, 1)
    pixels = channels * size**2
    shape = (channels, size, size)
    cases = [
        ("a narrow first layer", _convolutions(few, channels=channels), True, UNSEEN),
        (
            "a narrow first layer and wide ones above",
            _convolutions(few, 32, 32, channels=channels),
            True,
            UNSEEN,
        ),
        (
            "a narrow layer above a wide one",
            _convolutions(2 * few, 1, channels=channels),
            False,
            UPPER,
        ),
        (
            "a dense layer of one unit",
            nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1), nn.Tanh(), nn.Linear(1, 10)),
            False,
            DENSE,
        ),
        (
            "one filter more than the bound",
            _convolutions(few + 1, channels=channels),
            False,
            ENOUGH,
        ),
        (
            "six layers",
            _convolutions(*[2 * few] * 6, channels=channels),
            False,
            DEEP,
        ),
    ]
    for name, model, true, hint in cases:
        model(torch.zeros(1, *shape))  # the classifier learns its size
        answer = ask(must_hide, model, shape, case=f"for {name}")
        demand(bool(answer) == true, f"Misjudged: {name}. {hint}")
    right("One layer meets the picture, and its width decides.")

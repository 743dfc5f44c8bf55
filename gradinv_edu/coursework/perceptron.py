"""Checks of the exercises to chapter 1, the perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..perceptron import mixture, recover_input
from ..sharing import observe
from .verdict import Student, Wrong, ask, compare, demand, distance, pair, refuse, right, tensor

SQUARED = (
    "That is the slope of a squared error, a multiple of z − y. Here the loss is "
    "log(1 + exp z) − y z: differentiate that."
)
TURNED = "The sign is turned round: for label 1 the loss falls as z grows, so k is negative there."
HALF = "That is the slope of log(1 + exp z) alone: what became of the term − y z?"
NO_BIAS = "That would be right for a neuron without a bias. Write down what z is."
BIAS_TIMES = (
    "Your bias gradient is k times the bias. By how much does z change when the bias moves a "
    "little: does that depend on how large the bias is?"
)
ALONE = (
    "Each weight has the slope k alone. How much z changes with W_i depends on the pixel it meets."
)
PIXELS = (
    "k times the weight is how the loss changes with a pixel; asked is how it changes with a "
    "weight."
)


def _neuron(seed: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(pixels, generator=g, dtype=torch.float64)
    b = torch.randn((), generator=g, dtype=torch.float64)
    return W, b, torch.rand(pixels, generator=g, dtype=torch.float64)


def check_gradients(gradients: Student, seed: int = 1, pixels: int = 3) -> None:
    """Check 1.1: both gradients of the logistic loss of one neuron, by hand."""
    W, b, x = _neuron(seed, pixels)
    for y in (0.0, 1.0):
        z = W @ x + b
        k = z.sigmoid() - y
        slopes: list[Wrong] = [
            (SQUARED, z - y),
            (SQUARED, 2 * (z - y)),
            (TURNED, -k),
            (HALF, z.sigmoid()),
            (NO_BIAS, (W @ x).sigmoid() - y),
        ]
        case = f"for label {y:g}"
        answer = ask(gradients, W.clone(), b.clone(), x.clone(), y, case=case)
        g_W, g_b = pair(answer, "gradients(...)")
        compare(g_b, k, "the bias gradient", [*slopes, (BIAS_TIMES, k * b)])
        weights = [(ALONE, k.expand(pixels)), (PIXELS, k * W)]
        weights += [(hint, slope * x) for hint, slope in slopes]
        compare(g_W, k * x, "the weight gradient", weights)
    right("One number k, and the weight gradient is the picture times it.")


UPSIDE_DOWN = "The fraction is upside down: which of the two gradients holds the picture times k?"
TIMES = "You multiplied. The weight gradient is k times the picture already: how do you undo that?"
STRETCHED = (
    "Your picture is stretched to the range from 0 to 1. Nothing in the equation does that: leave "
    "the pixels as the division gives them."
)
PREDICTED = (
    "Your label is what the neuron predicts, not what the client said. Where the neuron is wrong "
    "the two differ; which equation has y in it?"
)
ADDED = "Your label is σ(z) + k; look at the sign of y in the equation k = σ(z) − y."
BLIND = "Your label uses z without the bias. The server knows the bias's value: it wrote it."
AS_Z = "Your label is z − k, which belongs to the squared error; here k = σ(z) − y."


def check_recover(recover: Student, seed: int = 2, pixels: int = 12) -> None:
    """Check 1.2: picture and label of one neuron with the logistic loss."""
    W, b, x = _neuron(seed, pixels)
    for y in (1.0, 0.0):
        for bias in (b, -b, b - 6):
            z = W @ x + bias
            k = z.sigmoid() - y
            G = k * x
            answer = ask(recover, W.clone(), bias.clone(), G.clone(), k.clone())
            picture, label = pair(answer, "recover(...)")
            span = (x - x.min()) / (x.max() - x.min())
            compare(
                picture,
                x,
                "the picture",
                [
                    (UPSIDE_DOWN, k / G),
                    (TIMES, k * G),
                    (STRETCHED, span),
                    (STRETCHED, x / x.max()),
                ],
            )
            label = tensor(label, "the label")
            compare(
                label.reshape(()),
                torch.tensor(y),
                "the label",
                [
                    (ADDED, z.sigmoid() + k),
                    (BLIND, (W @ x).sigmoid() - k),
                    (AS_Z, z - k),
                    (PREDICTED, (z > 0).double()),
                ],
                tolerance=1e-6,
            )
    right("The picture by one division, and then the label, since nothing else is left unknown.")


ARE_SLOPES = (
    "You returned the shares themselves. A share is made of slopes k = z − y: which labels give "
    "these slopes?"
)
SWAPPED = "The two shares are exchanged: the first sample has the second one's."
PERFECT = (
    "With these labels every answer is perfect, so all slopes are zero and nothing is sent: there "
    "is no mixture to speak of."
)
ALIKE = (
    "Both labels are the same, so the outputs alone decide the shares. Choose each label freely."
)
SCALED = (
    "You scaled the outputs by the shares: then k = z (1 − share). Which labels make k = z − y "
    "proportional to the shares?"
)


def check_labels_for(labels_for: Student, seed: int = 3, pixels: int = 8) -> None:
    """Check 1.3: labels that make the ratio of a batch any mixture one likes."""
    W, b, _ = _neuron(seed, pixels)
    g = torch.Generator().manual_seed(seed + 1)
    pictures = torch.rand(2, pixels, generator=g, dtype=torch.float64)
    outputs = pictures @ W + b
    for share in (0.25, -2.0, 1.0, 7.0):
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        case = f"for shares {share:g} and {1 - share:g}"
        y = tensor(ask(labels_for, outputs.clone(), shares.clone(), case=case), "the labels")
        demand(y.shape == outputs.shape, f"Two outputs need two labels; you gave {tuple(y.shape)}.")
        demand(distance(y, shares) > 1e-9, ARE_SLOPES)
        demand(distance(y, outputs) > 1e-9, PERFECT)
        demand(distance(y, outputs * shares) > 1e-9, SCALED)
        demand(abs(float(y[0] - y[1])) > 1e-9, ALIKE)
        leaked = _mixed(W, b, pictures, y)
        wanted = mixture(pictures, shares)
        compare(
            leaked,
            wanted,
            f"{case}, the server's picture",
            [
                (SWAPPED, mixture(pictures, shares.flip(0))),
            ],
            tolerance=1e-6,
        )
    right("What a server reads out of a batch can be any mixture, one with negative shares too.")


def _mixed(W: Tensor, b: Tensor, pictures: Tensor, labels: Tensor) -> Tensor:
    """What a server divides out of the client's real gradient."""
    neuron = nn.Linear(len(W), 1).double()
    with torch.no_grad():
        neuron.weight.copy_(W[None])
        neuron.bias.copy_(b[None])
    sent = observe(neuron, nn.MSELoss(), pictures, labels[:, None]).gradients
    if not bool(sent["bias"].abs() > 1e-12):
        refuse("The two slopes cancel: the bias gradient is zero and the server cannot divide.")
    return recover_input(sent["weight"][0], sent["bias"][0])


ENDS = (
    "You divided the weights themselves. They hold your own numbers; what the client changed "
    "holds the picture."
)
SUMMED = "You added start and end. The client's steps are what lies between them."
NEGATIVE = "Your picture is a photographic negative: subtract in the same order above and below."
COUNTED = (
    "One of the two differences is divided by the number of steps, or by the learning rate, and "
    "the other is not. What both share cancels: leave it in both, or in neither."
)
ONE_STEP = "You used the weights' difference but not the bias's."


def check_recover_from_training(
    recover_from_training: Student, seed: int = 4, pixels: int = 16, steps: int = 50
) -> None:
    """Check 1.4: the picture out of the weights before and after local training."""
    W, b, x = _neuron(seed, pixels)
    for momentum in (0.0, 0.9):
        start, end = (W, b), _trained(W, b, x, steps, momentum)
        moved_W, moved_b = end[0] - W, end[1] - b
        case = f"after {steps} steps with momentum {momentum:g}"
        compare(
            ask(recover_from_training, *start, *end, case=case),
            x,
            "the picture",
            [
                (ENDS, end[0] / end[1]),
                (ENDS, W / b),
                (SUMMED, (W + end[0]) / (b + end[1])),
                (NEGATIVE, -x),
                (ONE_STEP, moved_W),
                (ONE_STEP, moved_W / end[1]),
                (ONE_STEP, moved_W / b),
                (UPSIDE_DOWN, moved_b / moved_W),
                *((COUNTED, x * factor) for factor in (steps, 1 / steps, 0.05, 20.0)),
            ],
            tolerance=1e-7,
        )
    right(f"{steps} steps, any momentum: both differences are sums with the same factors.")


def _trained(W: Tensor, b: Tensor, x: Tensor, steps: int, momentum: float) -> tuple[Tensor, Tensor]:
    """Weights after local SGD on the logistic loss of one sample with label 1."""
    v_W, v_b = torch.zeros_like(W), torch.zeros_like(b)
    for _ in range(steps):
        k = (W @ x + b).sigmoid() - 1
        v_W, v_b = momentum * v_W + k * x, momentum * v_b + k
        W, b = W - 0.05 * v_W, b - 0.05 * v_b
    return W, b


SMALL = (
    "A bias gradient of {k:.0e} without noise, and you say that it hides the picture. Rounding "
    "keeps the leading digits of a small number as of a large one: the division brings them back."
)
SIGNED = "A negative bias gradient, and you say that nothing leaks. Does the sign of k matter?"
NOTHING = "The bias gradient is exactly zero: nothing was sent, and you say that it leaks."
NOISE_ALONE = (
    "The noise alone does not decide: σ = {sigma:g} is {word} beside k = {k:g}. Which quotient "
    "does the chapter's formula contain?"
)
EVERY_PIXEL = (
    "You compare σ with k, and forget that each of the {n} pixels brings its own noise beside "
    "a dark picture: see how √(n + |x|²) / |x| enters the formula."
)


def check_leaks(leaks: Student, seed: int = 5) -> None:
    """Check 1.5: whether a noisy gradient gives its picture to within a tenth."""
    x = _neuron(seed, 100)[2]
    dark = 0.02 * x
    cases = [
        (x, 0.3, 0.0, True, "One clean division gives the picture, and you say that it does not."),
        (x, 1e-30, 0.0, True, SMALL.format(k=1e-30)),
        (x, -0.3, 1e-9, True, SIGNED),
        (x, 0.0, 0.0, False, NOTHING),
        (x, 10.0, 0.1, True, NOISE_ALONE.format(sigma=0.1, k=10.0, word="little")),
        (x, 1e-4, 1e-3, False, NOISE_ALONE.format(sigma=1e-3, k=1e-4, word="much")),
        (dark, 1.0, 0.02, False, EVERY_PIXEL.format(n=100)),
    ]
    for picture, k, sigma, truth, hint in cases:
        G, g_b = k * picture, torch.tensor(k, dtype=torch.float64)
        answer = ask(leaks, G, g_b, sigma, case=f"for k = {k:g}, σ = {sigma:g}")
        demand(bool(answer) == truth, hint)
    right("Only σ / k counts, and how bright the picture is; a small k by itself hides nothing.")

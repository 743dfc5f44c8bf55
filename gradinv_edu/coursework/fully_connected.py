"""Checks of the exercises to chapter 2, fully connected networks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fully_connected as fc
from ..metrics import relative_error
from .verdict import Student, Wrong, ask, compare, demand, distance, pair, refuse, right, tensor


def _layer(seed: int, outputs: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, pixels, generator=g, dtype=torch.float64) / pixels**0.5
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    return W, b, torch.rand(pixels, generator=g, dtype=torch.float64)


def _softmax_slopes(z: Tensor, label: int) -> Tensor:
    k = z.softmax(0)
    k[label] -= 1
    return k


UNLABELLED = (
    "Your k is the softmax alone: all its entries are positive, so training would lower every "
    "output. Which output should rise?"
)
TURNED = "The sign of k is turned round: the loss falls when the label's output rises."
NO_BIAS = "That would be right for a layer without a bias. Write down what z is."
SIGMOIDS = "You squashed each output by itself. With cross-entropy the probabilities add up to one."
TRANSPOSED = (
    "Your weight gradient is transposed: row j belongs to output j, as in the weight itself."
)
ALONE = "Every row is the picture itself. Which number tells the rows apart?"


def check_dense_gradients(
    dense_gradients: Student, seed: int = 1, outputs: int = 4, pixels: int = 6
) -> None:
    """Check 2.1: both gradients of a dense layer under cross-entropy, by hand."""
    W, b, x = _layer(seed, outputs, pixels)
    for label in range(outputs):
        z = W @ x + b
        k = _softmax_slopes(z, label)
        slopes: list[Wrong] = [
            (UNLABELLED, z.softmax(0)),
            (TURNED, -k),
            (NO_BIAS, _softmax_slopes(W @ x, label)),
            (SIGMOIDS, z.sigmoid() - k.new_zeros(outputs).index_fill(0, torch.tensor(label), 1)),
        ]
        answer = ask(dense_gradients, W.clone(), b.clone(), x.clone(), label)
        G, g_b = pair(answer, "dense_gradients(...)")
        compare(g_b, k, "the bias gradient", slopes)
        outer = torch.outer(k, x)
        compare(
            G, outer, "the weight gradient", [(TRANSPOSED, outer.T), (ALONE, outer / k[:, None])]
        )
    right("The weight gradient is an outer product: every row is the same picture.")


DEAD = (
    "A neuron whose output gradient is zero made your answer NaN: 0 / 0. One silent row must not "
    "spoil what the others say."
)
MEAN = (
    "You averaged the rows' answers. A row with a tiny k divides its noise by almost nothing, and "
    "the plain mean gives it a vote like any other."
)
SUMS = (
    "You added all rows, and divided by the sum of all k. The k have both signs: where they nearly "
    "cancel, you divide by almost nothing."
)
SMALLEST = (
    "You divided by the smallest bias gradient. The noise is the same in every row: which k makes "
    "it matter least?"
)
LARGEST = "That is one row alone, the loudest. It is a good one, but the others know something too."
SQUARES = (
    "Least squares takes k for exact, but k is as noisy as the weight gradient: the |k|² below is "
    "then too long and the picture too dark. Treat both alike."
)
LENGTH = (
    "The direction is right, and its length is that of a singular vector: 1. Which entry fixes it?"
)


def check_combine(combine: Student, seed: int = 2, outputs: int = 12, pixels: int = 30) -> None:
    """Check 2.2: the best picture out of all rows under noise."""
    g = torch.Generator().manual_seed(seed)
    errors = []
    for sigma in (0.0, *[0.15] * 15):
        k = torch.randn(outputs, generator=g, dtype=torch.float64)
        k[0], k[1] = 0.0 if sigma == 0 else k[0], 0.02
        x = torch.rand(pixels, generator=g, dtype=torch.float64)
        noise = sigma * torch.randn(outputs, pixels + 1, generator=g, dtype=torch.float64)
        G, k = torch.outer(k, x) + noise[:, :-1], k + noise[:, -1]
        case = f"for noise of {sigma:g}"
        answer = tensor(ask(combine, G.clone(), k.clone(), case=case), "combine(...)")
        _refuse_known(answer, G, k, sigma)
        best = fc.recover_input(G, k)
        demand(answer.shape == x.shape, f"A picture has shape {tuple(x.shape)}.")
        errors.append((relative_error(answer, x), relative_error(best, x)))
        demand(sigma or errors[0][0] < 1e-9, "Even without noise your answer is not the picture.")
    theirs, ours = torch.tensor(errors).T.mean(1).tolist()
    demand(
        theirs <= 1.05 * ours,
        f"Over fifteen draws of noise your answer is wrong by {theirs:.0%} on average; the best "
        f"combination of the chapter by {ours:.0%}.",
    )
    right("All rows have a say, each as loud as it deserves.")


def _refuse_known(answer: Tensor, G: Tensor, k: Tensor, sigma: float) -> None:
    demand(bool(answer.isfinite().all()) or sigma > 0, DEAD)
    if sigma == 0:
        return
    rows = G / k[:, None]
    loudest, quietest = int(k.abs().argmax()), int(k.abs().argmin())
    v = torch.linalg.svd(torch.cat([G, k[:, None]], 1))[2][0][:-1]
    squares, direction = G.T @ k / (k @ k), torch.linalg.svd(G)[2][0]
    for hint, wrong in (
        (MEAN, rows.mean(0)),
        (SUMS, G.sum(0) / k.sum()),
        (SMALLEST, rows[quietest]),
        (SMALLEST, rows[int(k.argmin())]),
        (LARGEST, rows[loudest]),
        (SQUARES, squares),
        *((LENGTH, sign * part) for sign in (1, -1) for part in (v, direction)),
    ):
        demand(distance(answer, wrong) > 1e-9, hint)


DIRECTION = "That is the direction without its length: the softmax knows the length too."
NEGATIVE = (
    "Your picture is a negative. In the ratio of two rows, i over j, the same order must stand "
    "above and below."
)
INVERTED = "You divided by the length where you should multiply, or the fraction is upside down."
LABEL_ROW = (
    "NaN: a logarithm of a negative number. One row has another sign than all others; a "
    "probability is what the others are."
)
GUESSED = (
    "Your label is what the network predicts. The client's label is told by the gradient: which "
    "entry of k is alone in its sign?"
)
MIRRORED = (
    "Your label is wrong where the singular vector came with the other sign: G v is k times a "
    "number that may be negative. What is true of the label's entry in both cases?"
)


def check_recover_without_bias(
    recover_without_bias: Student, seed: int = 3, outputs: int = 5, pixels: int = 20
) -> None:
    """Check 2.3: picture and label out of a bias-free layer under cross-entropy."""
    labels = []
    for case in range(8):
        W, _, x = _layer(seed + 10 * case, outputs, pixels)
        W, label = 3 * W, case % outputs
        x = x if case % 2 else -x  # inputs of inner layers may be negative
        G = torch.outer(_softmax_slopes(W @ x, label), x)
        answer = ask(recover_without_bias, W.clone(), G.clone())
        picture, found = pair(answer, "recover_without_bias(...)")
        _length(picture, x, x / x.norm(), x.norm())
        labels.append((int(tensor(found, "the label")), label, int((W @ x).argmax())))
    demand(not all(found == predicted for found, _, predicted in labels), GUESSED)
    demand(all(found == label for found, label, _ in labels), MIRRORED)
    right("Length and label, without a bias anywhere.")


def _length(picture: object, x: Tensor, v: Tensor, s: Tensor) -> None:
    demand(bool(tensor(picture, "the picture").isfinite().all()), LABEL_ROW)
    known = [(DIRECTION, v), (DIRECTION, -v), (NEGATIVE, -x), (INVERTED, v / s), (INVERTED, -v / s)]
    compare(picture, x, "the picture", known, tolerance=1e-6)


ITSELF = "That is the same picture again. Its twin is another one."
MIRROR = (
    "The mirrored picture has a negative margin: for label 1 that is a wrong prediction, and a "
    "wrong prediction has one root only. (It would do for label 0.)"
)
SIDEWAYS = (
    "Your twin has the same margin, and so the same k; but the gradient is k *times the picture*. "
    "So in which direction must the twin lie?"
)
LONGER = (
    "The twin lies in the right direction, but its gradient is {factor:.3g} times the client's. "
    "Both k and the picture change with the length: their product must not."
)


def check_twin(twin: Student, seed: int = 4, pixels: int = 10) -> None:
    """Check 2.4: another picture with the very same gradient, under the logistic loss."""
    W, _, x = _layer(seed, 1, pixels)
    for margin in (2.5, 0.5, 4.0):
        w = W[0] * (margin / (W[0] @ x))
        case = f"for margin {margin:g}"
        answer = tensor(ask(twin, w.clone(), x.clone(), case=case), "twin(...)")
        demand(answer.shape == x.shape, f"A picture has shape {tuple(x.shape)}.")
        demand(distance(answer, x) > 1e-6, ITSELF)
        demand(distance(answer, -x) > 1e-6, MIRROR)
        demand(abs(float(w @ answer) - margin) > 1e-6, SIDEWAYS)
        _same_gradient(answer, x, w)
    right("Two pictures, one gradient: nobody can tell which of them was sent.")


def _same_gradient(answer: Tensor, x: Tensor, w: Tensor) -> None:
    ours, theirs = (-(-(w @ p)).sigmoid() * p for p in (x, answer))
    if distance(theirs, ours) < 1e-6:
        return
    factor = float(theirs @ ours / (ours @ ours))
    demand(distance(theirs / factor, ours) > 1e-6, LONGER.format(factor=factor))
    refuse("The twin's gradient points elsewhere: it is k times the picture, so must be the twin.")


ANY_BIAS = (
    "A bias in layer {place} of {count}, none elsewhere, and you say that not all of the input "
    "leaks. Is one layer with a bias enough?"
)
SOFTMAX = (
    "No bias, but softmax over {outputs} classes: what does the ratio of two probabilities tell?"
)
TWO = (
    "Two classes leave one row besides the label's: there are no two probabilities to compare. "
    "Show that this is the logistic loss in disguise."
)
ONE_LOGIT = "One logit without a bias: how many margins explain the gradient of a right prediction?"
OPEN = (
    "Squared error, no bias, and a target that the server does not know: for every length there is "
    "a target that explains the gradient."
)
DEEP = (
    "You let {count} layers protect the input. Did the error grow with depth where the chapter "
    "measured it?"
)


def check_what_leaks(what_leaks: Student) -> None:
    """Check 2.5: what one sample's gradient gives away, told before any data is sent."""
    none = [False]
    cases = [
        ([True, True], 10, "cross-entropy", "input", ANY_BIAS.format(place=1, count=2)),
        (none * 2, 10, "cross-entropy", "input", SOFTMAX.format(outputs=10)),
        ([*none * 2, True, False], 10, "squared", "input", ANY_BIAS.format(place=3, count=4)),
        (none * 3, 10, "squared", "direction", OPEN),
        (none * 8, 10, "cross-entropy", "input", DEEP.format(count=8)),
        (none * 2, 1, "logistic", "several", ONE_LOGIT),
        ([False, True], 1, "logistic", "input", ANY_BIAS.format(place=2, count=2)),
        (none * 2, 2, "cross-entropy", "several", TWO),
        (none * 2, 3, "cross-entropy", "input", SOFTMAX.format(outputs=3)),
        ([*none * 7, True], 1, "squared", "input", ANY_BIAS.format(place=8, count=8)),
    ]
    for biases, outputs, loss, truth, hint in cases:
        answer = ask(what_leaks, list(biases), outputs, loss)
        said = ("input", "several", "direction")
        demand(answer in said, f"Answer with one of {', '.join(said)}; yours is {answer!r}.")
        demand(answer == truth, hint)
    right("You can tell what leaks from the plan of a network alone.")

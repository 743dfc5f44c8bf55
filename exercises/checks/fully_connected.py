"""Checks of the exercises on fully connected networks."""

from __future__ import annotations

import torch
from torch import Tensor

import gradinv_edu as gi

from .verdict import (
    AUTOGRAD,
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    distance,
    each,
    expect,
    known,
    pair,
    refuse,
    right,
    tensor,
    told,
)


def _layer(seed: int, outputs: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, pixels, generator=g, dtype=torch.float64) / pixels**0.5
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    return W, b, torch.rand(pixels, generator=g, dtype=torch.float64)


def _slopes(z: Tensor, label: int) -> Tensor:
    k = z.softmax(0)
    k[label] -= 1
    return k


class Gradients(Mistakes, of="fully_connected-gradients", own=AUTOGRAD):
    def label_forgotten(W, b, x, label):
        """Your k is the softmax alone: all its entries are positive, so training would lower every
        output. Which output should rise?"""
        k = (W @ x + b).softmax(0)
        return torch.outer(k, x), k

    def label_minus_softmax(W, b, x, label):
        """The sign of k is turned round: the loss falls when the label's output rises."""
        k = -_slopes(W @ x + b, label)
        return torch.outer(k, x), k

    def forgotten_bias(W, b, x, label):
        """That would be right for a layer without a bias. Write down what z is."""
        k = _slopes(W @ x, label)
        return torch.outer(k, x), k

    def sigmoid_for_softmax(W, b, x, label):
        """You squashed each output by itself. With cross-entropy the probabilities add up to
        one."""
        k = (W @ x + b).sigmoid()
        k[label] -= 1
        return torch.outer(k, x), k

    def transposed_weight_gradient(W, b, x, label):
        """Your weight gradient is transposed: row j belongs to output j, as in the weight
        itself."""
        k = _slopes(W @ x + b, label)
        return torch.outer(x, k), k

    def the_picture_in_every_row(W, b, x, label):
        """Every row is the picture itself. Which number tells the rows apart?"""
        return x.expand(len(b), -1), _slopes(W @ x + b, label)


def check_dense_gradients(
    dense_gradients: Student, seed: int = 1, outputs: int = 4, pixels: int = 6
) -> None:
    """Check: both gradients of a dense layer under cross-entropy, by hand."""
    W, b, x = _layer(seed, outputs, pixels)
    parts = ("the weight gradient", "the bias gradient")
    for label in range(outputs):
        k = _slopes(W @ x + b, label)
        expect(
            "fully_connected-gradients",
            dense_gradients,
            (W, b, x, label),
            (torch.outer(k, x), k),
            parts,
        )
    right("The weight gradient is an outer product: every row is the same picture.")


class Combine(
    Mistakes, of="fully_connected-combine", own=("gradinv_edu.fully_connected.recover_input",)
):
    def mean_of_living_rows(G, k):
        """You averaged the rows' answers. A row with a tiny k divides its noise by almost nothing,
        and the plain mean gives it a vote like any other."""
        return (G[k != 0] / k[k != 0, None]).mean(0)

    def mean_of_all_rows(G, k):
        """A neuron whose output gradient is zero made your answer NaN: 0 / 0. One silent row must
        not spoil what the others say."""
        return (G / k[:, None]).mean(0)

    def sum_for_mean(G, k):
        """You added all rows, and divided by the sum of all k. The k have both signs: where they
        nearly cancel, you divide by almost nothing."""
        return G.sum(0) / k.sum()

    def division_by_the_smallest_bias_gradient(G, k):
        """You divided by the smallest bias gradient. The noise is the same in every row: which k
        makes it matter least?"""
        row = torch.where(k == 0, torch.inf, k.abs()).argmin()
        return G[row] / k[row]

    def division_by_the_lowest_bias_gradient(G, k):
        """Like division_by_the_smallest_bias_gradient."""
        return G[k.argmin()] / k.min()

    def loudest_row_alone(G, k):
        """That is one row alone, the loudest. It is a good one, but the others know something
        too."""
        row = k.abs().argmax()
        return G[row] / k[row]

    def least_squares(G, k):
        """Least squares takes k for exact, but k is as noisy as the weight gradient: the |k|² below
        is then too long and the picture too dark. Treat both alike."""
        return G.T @ k / (k @ k)

    def singular_vector(G, k):
        """The direction is right, and its length is that of a singular vector: 1. Which entry
        fixes it?"""
        return torch.linalg.svd(torch.cat([G, k[:, None]], 1), full_matrices=False)[2][0][:-1]

    def singular_vector_of_the_weights(G, k):
        """Like singular_vector."""
        return torch.linalg.svd(G, full_matrices=False)[2][0]


def check_combine(combine: Student, seed: int = 2, outputs: int = 12, pixels: int = 30) -> None:
    """Check: the best picture out of all rows under noise."""
    g = torch.Generator().manual_seed(seed)
    errors = []
    for sigma in (0.0, *[0.15] * 15):
        k = torch.randn(outputs, generator=g, dtype=torch.float64)
        k[0], k[1] = 0.0 if sigma == 0 else k[0], 0.02
        x = torch.rand(pixels, generator=g, dtype=torch.float64)
        noise = sigma * torch.randn(outputs, pixels + 1, generator=g, dtype=torch.float64)
        G, k = torch.outer(k, x) + noise[:, :-1], k + noise[:, -1]
        answer = tensor(ask(combine, G, k, case=f"for noise of {sigma:g}"), "combine(...)")
        demand(answer.isfinite().all() or sigma, Combine.mean_of_all_rows)
        for hint, wrong in known("fully_connected-combine", (G, k)) if sigma else ():
            demand(min(distance(s * answer, wrong) for s in (1, -1)) > 1e-9, hint)
        demand(answer.shape == x.shape, f"A picture has shape {tuple(x.shape)}.")
        best = gi.fully_connected.recover_input(G, k)
        errors.append([gi.metrics.relative_error(p, x) for p in (answer, best)])
    demand(errors[0][0] < 1e-9, "Even without noise your answer is not the picture.")
    theirs, ours = torch.tensor(errors).T.mean(1).tolist()
    demand(
        theirs <= 1.05 * ours,
        f"Over fifteen draws of noise your answer is wrong by {theirs:.0%} on average; the best "
        f"combination of the chapter by {ours:.0%}.",
    )
    right("All rows have a say, each as loud as it deserves.")


def _direction(G: Tensor) -> tuple[Tensor, Tensor, int]:
    """Singular vector, its multiples in the rows, and the label."""
    v = torch.linalg.svd(G, full_matrices=False)[2][0]
    c = G @ v
    negative = c < 0
    return v, c, int((negative if negative.sum() == 1 else ~negative).nonzero()[0])


def _length(W: Tensor, v: Tensor, c: Tensor, label: int) -> Tensor:
    i, j = [row for row in range(len(c)) if row != label][:2]
    return torch.log(c[i] / c[j]) / ((W[i] - W[j]) @ v)


class WithoutBias(
    Mistakes,
    of="fully_connected-softmax",
    own=("gradinv_edu.fully_connected.recover_from_cross_entropy",),
):
    def direction_for_input(W, G):
        """That is the direction without its length: the softmax knows the length too."""
        v, _, label = _direction(G)
        return v, label

    def direction_the_other_way(W, G):
        """Like direction_for_input."""
        v, _, label = _direction(G)
        return -v, label

    def rows_in_another_order(W, G):
        """Your picture is a negative. In the ratio of two rows, i over j, the same order must
        stand above and below."""
        v, c, label = _direction(G)
        return -_length(W, v, c, label) * v, label

    def length_upside_down(W, G):
        """You divided by the length where you should multiply, or the fraction is upside down."""
        v, c, label = _direction(G)
        return v / _length(W, v, c, label), label

    def label_row_in_the_ratio(W, G):
        """NaN: a logarithm of a negative number. One row has another sign than all others; a
        probability is what the others are."""
        v, c, label = _direction(G)
        other = (label + 1) % len(c)
        return torch.log(c[label] / c[other]) / ((W[label] - W[other]) @ v) * v, label

    def prediction_for_label(W, G):
        """Your label is what the network predicts. The client's label is told by the gradient:
        which entry of k is alone in its sign?"""
        v, c, label = _direction(G)
        x = _length(W, v, c, label) * v
        return x, int((W @ x).argmax())

    def sign_of_the_singular_vector_forgotten(W, G):
        """Your label is wrong where the singular vector came with the other sign: G v is k times a
        number that may be negative. What is true of the label's entry in both cases?"""
        v, c, label = _direction(G)
        return _length(W, v, c, label) * v, int(c.argmin())


def check_recover_without_bias(
    recover_without_bias: Student, seed: int = 3, outputs: int = 5, pixels: int = 20
) -> None:
    """Check: picture and label out of a bias-free layer under cross-entropy."""
    labels = []
    for case in range(8):
        W, _, x = _layer(seed + 10 * case, outputs, pixels)
        W, label = 3 * W, case % outputs
        x = x if case % 2 else -x  # inputs of inner layers may be negative
        given = (W, torch.outer(_slopes(W @ x, label), x))
        picture, found = pair(ask(recover_without_bias, *given), "recover_without_bias(...)")
        finite = tensor(picture, "the picture").isfinite().all()
        demand(finite, WithoutBias.label_row_in_the_ratio)
        wrong = ((hint, both[0]) for hint, both in known("fully_connected-softmax", given))
        compare(picture, x, "the picture", wrong, tolerance=1e-6)
        labels.append((int(tensor(found, "the label")), label, int((W @ x).argmax())))
    predicted = all(found == likeliest for found, _, likeliest in labels)
    demand(not predicted, WithoutBias.prediction_for_label)
    same = all(found == label for found, label, _ in labels)
    demand(same, WithoutBias.sign_of_the_singular_vector_forgotten)
    right("Length and label, without a bias anywhere.")


class Twin(Mistakes, of="fully_connected-twin"):
    def the_picture_itself(w, x):
        """That is the same picture again. Its twin is another one."""
        return x.clone()

    def mirrored_picture(w, x):
        """The mirrored picture has a negative margin: for label 1 that is a wrong prediction, and
        a wrong prediction has one root only. (It would do for label 0.)"""
        return -x

    def moved_sideways(w, x):
        """Your twin has the same margin, and so the same k; but the gradient is k *times the
        picture*. So in which direction must the twin lie?"""
        step = torch.linspace(0, 1, len(x), dtype=x.dtype)
        return x + step - (step @ w) / (w @ w) * w

    def twice_as_bright(w, x):
        """The twin lies in the right direction, but its gradient is {factor:.3g} times the
        client's. Both k and the picture change with the length: their product must not."""
        return 2 * x

    def margin_for_picture(w, x):
        """… A picture has shape …"""
        return w @ x / 2


def check_twin(twin: Student, seed: int = 4, pixels: int = 10) -> None:
    """Check: another picture with the very same gradient, under the logistic loss."""
    W, _, x = _layer(seed, 1, pixels)
    for margin in (2.5, 0.5, 4.0):
        w = W[0] * (margin / (W[0] @ x))
        answer = tensor(ask(twin, w, x, case=f"for margin {margin:g}"), "twin(...)")
        demand(answer.shape == x.shape, f"A picture has shape {tuple(x.shape)}.")
        demand(distance(answer, x) > 1e-6, Twin.the_picture_itself)
        demand(distance(answer, -x) > 1e-6, Twin.mirrored_picture)
        demand(abs(float(w @ answer) - margin) > 1e-6, Twin.moved_sideways)
        ours, theirs = (-(-(w @ p)).sigmoid() * p for p in (x, answer))
        if distance(theirs, ours) > 1e-6:
            factor = float(theirs @ ours / (ours @ ours))
            demand(distance(theirs / factor, ours) > 1e-6, Twin.twice_as_bright, factor=factor)
            refuse(
                "The twin's gradient points elsewhere: it is k times the picture, so is the twin."
            )
    right("Two pictures, one gradient: nobody can tell which of them was sent.")


class WhatLeaks(Mistakes, of="fully_connected-leaks"):
    def first_bias_only(biases, outputs, loss):
        """A bias in layer {place} of {count}, none elsewhere, and you say that not all of the
        input leaks. Is one layer with a bias enough?"""
        if biases[0] or loss == "squared":
            return "input" if biases[0] else "direction"
        return "input" if outputs > 2 else "several"

    def depth_protects(biases, outputs, loss):
        """You let 8 layers protect the input. Did the error grow with depth where the chapter
        measured it?"""
        if any(biases):
            return "input"
        if loss == "squared" or len(biases) > 4:
            return "direction"
        return "input" if outputs > 2 else "several"

    def every_loss_fixes_the_length(biases, outputs, loss):
        """Squared error, no bias, and a target that the server does not know: for every length
        there is a target that explains the gradient."""
        return "input" if any(biases) or outputs > 2 else "several"

    def two_classes_are_many(biases, outputs, loss):
        """Two classes leave one row besides the label's: there are no two probabilities to
        compare. Show that this is the logistic loss in disguise."""
        if any(biases) or loss == "squared":
            return "input" if any(biases) else "direction"
        return "several" if loss == "logistic" else "input"

    def no_bias_no_length(biases, outputs, loss):
        """No bias, but softmax over {outputs} classes: what does the ratio of two probabilities
        tell?"""
        return "input" if any(biases) else "direction"

    def one_logit_is_enough(biases, outputs, loss):
        """One logit without a bias: how many margins explain the gradient of a right
        prediction?"""
        return "input" if any(biases) or loss != "squared" else "direction"


def check_what_leaks(what_leaks: Student) -> None:
    """Check: what one sample's gradient gives away, told before any data is sent."""
    none = [False]

    def bias(place: int, count: int) -> str:
        return told(WhatLeaks.first_bias_only, place=place, count=count)

    def softmax(outputs: int) -> str:
        return told(WhatLeaks.no_bias_no_length, outputs=outputs)

    cases = [
        ([True, True], 10, "cross-entropy", "input", bias(1, 2)),
        (none * 2, 10, "cross-entropy", "input", softmax(10)),
        ([*none * 2, True, False], 10, "squared", "input", bias(3, 4)),
        (none * 3, 10, "squared", "direction", WhatLeaks.every_loss_fixes_the_length),
        (none * 8, 10, "cross-entropy", "input", WhatLeaks.depth_protects),
        (none * 2, 1, "logistic", "several", WhatLeaks.one_logit_is_enough),
        ([False, True], 1, "logistic", "input", bias(2, 2)),
        (none * 2, 2, "cross-entropy", "several", WhatLeaks.two_classes_are_many),
        (none * 2, 3, "cross-entropy", "input", softmax(3)),
        ([*none * 7, True], 1, "squared", "input", bias(8, 8)),
    ]
    each(what_leaks, cases, options=("input", "several", "direction"))
    right("You can tell what leaks from the plan of a network alone.")

"""Checks of the exercises on the perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    right,
    tensor,
)


def _neuron(seed: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(pixels, generator=g, dtype=torch.float64)
    b = torch.randn((), generator=g, dtype=torch.float64)
    return W, b, torch.rand(pixels, generator=g, dtype=torch.float64)


class Gradients(Mistakes, of="perceptron-gradients", own=AUTOGRAD):
    def slope_of_the_squared_error(W, b, x, y, factor=1):
        """That is the slope of a squared error, a multiple of z − y. Here the loss is
        log(1 + exp z) − y z: differentiate that."""
        k = factor * (W @ x + b - y)
        return k * x, k

    def slope_of_the_square_itself(W, b, x, y):
        """Like slope_of_the_squared_error."""
        return Gradients.slope_of_the_squared_error(W, b, x, y, factor=2)

    def label_minus_prediction(W, b, x, y):
        """The sign is turned round: for label 1 the loss falls as z grows, so k is negative
        there."""
        k = y - (W @ x + b).sigmoid()
        return k * x, k

    def label_left_out(W, b, x, y):
        """That is the slope of log(1 + exp z) alone: what became of the term − y z?"""
        k = (W @ x + b).sigmoid()
        return k * x, k

    def forgotten_bias(W, b, x, y):
        """That would be right for a neuron without a bias. Write down what z is."""
        k = (W @ x).sigmoid() - y
        return k * x, k

    def bias_as_its_own_input(W, b, x, y):
        """Your bias gradient is k times the bias. By how much does z change when the bias moves a
        little: does that depend on how large the bias is?"""
        k = (W @ x + b).sigmoid() - y
        return k * x, k * b

    def slope_for_every_weight(W, b, x, y):
        """Each weight has the slope k alone. How much z changes with W_i depends on the pixel it
        meets."""
        k = (W @ x + b).sigmoid() - y
        return k.expand(len(x)), k

    def gradient_of_the_input(W, b, x, y):
        """k times the weight is how the loss changes with a pixel; asked is how it changes with a
        weight."""
        k = (W @ x + b).sigmoid() - y
        return k * W, k

    def computed_in_float32(W, b, x, y):
        """… right to a few digits only … float32 …"""
        k = (W.float() @ x.float() + b.float()).sigmoid() - y
        return k * x.float(), k


def check_gradients(gradients: Student, seed: int = 1, pixels: int = 3) -> None:
    """Check: both gradients of the logistic loss of one neuron, by hand."""
    W, b, x = _neuron(seed, pixels)
    parts = ("the weight gradient", "the bias gradient")
    for y in (0.0, 1.0):
        k = (W @ x + b).sigmoid() - y
        expect(
            "perceptron-gradients", gradients, (W, b, x, y), (k * x, k), parts, f"for label {y:g}"
        )
    right("One number k, and the weight gradient is the picture times it.")


class Recover(Mistakes, of="perceptron-recover", own=("gradinv_edu.perceptron.recover_input",)):
    def fraction_upside_down(W, b, G, k):
        """The fraction is upside down: which of the two gradients holds the picture times k?"""
        return k / G, 1.0

    def product_for_quotient(W, b, G, k):
        """You multiplied. The weight gradient is k times the picture already: how do you undo
        that?"""
        return k * G, 1.0

    def stretched_to_white(W, b, G, k, low=0.0):
        """Your picture is stretched to the range from 0 to 1. Nothing in the equation does that:
        leave the pixels as the division gives them."""
        x = G / k
        return (x - low) / (x.max() - low), (W @ x + b).sigmoid() - k

    def stretched_to_both_ends(W, b, G, k):
        """Like stretched_to_white."""
        return Recover.stretched_to_white(W, b, G, k, low=(G / k).min())

    def label_added(W, b, G, k):
        """Your label is σ(z) + k; look at the sign of y in the equation k = σ(z) − y."""
        return G / k, (W @ G / k + b).sigmoid() + k

    def label_without_bias(W, b, G, k):
        """Your label uses z without the bias. The server knows the bias's value: it wrote it."""
        return G / k, (W @ G / k).sigmoid() - k

    def label_of_the_squared_error(W, b, G, k):
        """Your label is z − k, which belongs to the squared error; here k = σ(z) − y."""
        return G / k, W @ G / k + b - k

    def prediction_for_label(W, b, G, k):
        """Your label is what the neuron predicts, not what the client said. Where the neuron is
        wrong the two differ; which equation has y in it?"""
        return G / k, (W @ G / k + b > 0).double()


def check_recover(recover: Student, seed: int = 2, pixels: int = 12) -> None:
    """Check: picture and label of one neuron with the logistic loss."""
    W, b, x = _neuron(seed, pixels)
    for y in (1.0, 0.0):
        for bias in (b, -b, b - 6):
            k = (W @ x + bias).sigmoid() - y
            given, parts = (W, bias, k * x, k), ("the picture", "the label")
            picture, _ = expect("perceptron-recover", recover, given, (x, y), parts, tolerance=1e-6)
            compare(picture, x, "the picture")
    right("The picture by one division, and then the label, since nothing else is left unknown.")


class LabelsFor(Mistakes, of="perceptron-labels"):
    def shares_for_labels(z, shares):
        """You returned the shares themselves. A share is made of slopes k = z − y: which labels
        give these slopes?"""
        return shares

    def shares_exchanged(z, shares):
        """The two shares are exchanged: the first sample has the second one's."""
        return z - shares.flip(0)

    def perfect_answers(z, shares):
        """With these labels every answer is perfect, so all slopes are zero and nothing is sent:
        there is no mixture to speak of."""
        return z

    def outputs_scaled(z, shares):
        """You scaled the outputs by the shares: then k = z (1 − share). Which labels make
        k = z − y proportional to the shares?"""
        return z * shares

    def one_label_for_both(z, shares):
        """Both labels are the same, so the outputs alone decide the shares. Choose each label
        freely."""
        return torch.ones_like(z)


def check_labels_for(labels_for: Student, seed: int = 3, pixels: int = 8) -> None:
    """Check: labels that make the ratio of a batch any mixture one likes."""
    W, b, _ = _neuron(seed, pixels)
    g = torch.Generator().manual_seed(seed + 1)
    pictures = torch.rand(2, pixels, generator=g, dtype=torch.float64)
    z = pictures @ W + b
    for share in (0.25, -2.0, 1.0, 7.0):
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        case = f"for shares {share:g} and {1 - share:g}"
        y = tensor(ask(labels_for, z, shares, case=case), "the labels")
        demand(y.shape == z.shape, f"Two outputs need two labels; you gave {tuple(y.shape)}.")
        demand(distance(y, shares) > 1e-9, LabelsFor.shares_for_labels)
        demand(distance(y, z) > 1e-9, LabelsFor.perfect_answers)
        demand(distance(y, z * shares) > 1e-9, LabelsFor.outputs_scaled)
        demand(abs(float(y[0] - y[1])) > 1e-9, LabelsFor.one_label_for_both)
        leaked, wanted = _mixed(W, b, pictures, y), gi.perceptron.mixture(pictures, shares)
        swapped = gi.perceptron.mixture(pictures, shares.flip(0))
        demand(distance(leaked, swapped) > 1e-6, LabelsFor.shares_exchanged)
        compare(leaked, wanted, f"{case}, the server's picture", tolerance=1e-6)
    right("What a server reads out of a batch can be any mixture, one with negative shares too.")


def _mixed(W: Tensor, b: Tensor, pictures: Tensor, labels: Tensor) -> Tensor:
    """What a server divides out of the client's real gradient."""
    neuron = nn.Linear(len(W), 1).double()
    with torch.no_grad():
        neuron.weight.copy_(W[None])
        neuron.bias.copy_(b[None])
    sent = gi.observe(neuron, nn.MSELoss(), pictures, labels[:, None]).gradients
    zero = "The two slopes cancel: the bias gradient is zero and the server cannot divide."
    demand(sent["bias"].abs() > 1e-12, zero)
    return gi.perceptron.recover_input(sent["weight"][0], sent["bias"][0])


class Training(Mistakes, of="perceptron-training", own=("gradinv_edu.perceptron.recover_input",)):
    def weights_for_differences(W, b, V, c):
        """You divided the weights themselves. They hold your own numbers; what the client changed
        holds the picture."""
        return V / c

    def first_weights_divided(W, b, V, c):
        """Like weights_for_differences."""
        return W / b

    def sum_for_difference(W, b, V, c):
        """You added start and end. The client's steps are what lies between them."""
        return (V + W) / (c + b)

    def orders_mixed(W, b, V, c):
        """Your picture is a photographic negative: subtract in the same order above and below."""
        return (V - W) / (b - c)

    def no_division(W, b, V, c):
        """You used the weights' difference but not the bias's."""
        return V - W

    def divided_by_the_last_bias(W, b, V, c):
        """Like no_division."""
        return (V - W) / c

    def divided_by_the_first_bias(W, b, V, c):
        """Like no_division."""
        return (V - W) / b

    def differences_upside_down(W, b, V, c):
        """The fraction is upside down: which of the two differences holds the picture?"""
        return (c - b) / (V - W)

    def rate_divided_out_once(W, b, V, c, once=0.05):
        """One of the two differences is divided by the number of steps, or by the learning rate,
        and the other is not. What both share cancels: leave it in both, or in neither."""
        return (W - V) / once / (b - c)

    def rate_divided_out_of_the_bias(W, b, V, c):
        """Like rate_divided_out_once."""
        return Training.rate_divided_out_once(W, b, V, c, 1 / 0.05)

    def steps_divided_out_once(W, b, V, c):
        """Like rate_divided_out_once."""
        return Training.rate_divided_out_once(W, b, V, c, 50)


def check_recover_from_training(
    recover_from_training: Student, seed: int = 4, pixels: int = 16, steps: int = 50
) -> None:
    """Check: the picture out of the weights before and after local training."""
    W, b, x = _neuron(seed, pixels)
    for momentum in (0.0, 0.9):
        given = (W, b, *_trained(W, b, x, steps, momentum))
        case = f"after {steps} steps with momentum {momentum:g}"
        expect(
            "perceptron-training",
            recover_from_training,
            given,
            x,
            "the picture",
            case,
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


class Leaks(Mistakes, of="perceptron-leaks"):
    def small_means_safe(G, k, sigma):
        """A bias gradient of 1e-30 without noise, and you say that it hides the picture. Rounding
        keeps the leading digits of a small number as of a large one: the division brings them
        back."""
        return bool(k.abs() > 1e-8) and bool(sigma < 0.1 * k.abs())

    def sign_of_k(G, k, sigma):
        """A negative bias gradient, and you say that nothing leaks. Does the sign of k matter?"""
        return bool(k > 0) and bool(sigma / k < 0.05)

    def zero_forgotten(G, k, sigma):
        """The bias gradient is exactly zero: nothing was sent, and you say that it leaks."""
        return sigma <= 0.1 * k.abs()

    def noise_alone(G, k, sigma):
        """The noise alone does not decide: σ = 0.1 is little beside k = 10, and σ = 0.001 is much
        beside k = 0.0001. Which quotient does the chapter's formula contain?"""
        return bool(k != 0) and sigma < 0.05

    def brightness_forgotten(G, k, sigma):
        """You compare σ with k, and forget that each of the 100 pixels brings its own noise beside
        a dark picture: see how √(n + |x|²) / |x| enters the formula."""
        return bool(k != 0) and bool(sigma / k.abs() < 0.1)


def check_leaks(leaks: Student, seed: int = 5) -> None:
    """Check: whether a noisy gradient gives its picture to within a tenth."""
    x = _neuron(seed, 100)[2]
    clean = "One clean division gives the picture, and you say that it does not."
    cases = [
        (x, 0.3, 0.0, True, clean),
        (x, 1e-30, 0.0, True, Leaks.small_means_safe),
        (x, -0.3, 1e-9, True, Leaks.sign_of_k),
        (x, 0.0, 0.0, False, Leaks.zero_forgotten),
        (x, 10.0, 0.1, True, Leaks.noise_alone),
        (x, 1e-4, 1e-3, False, Leaks.noise_alone),
        (0.02 * x, 1.0, 0.02, False, Leaks.brightness_forgotten),
    ]
    given = [(k * x, torch.tensor(k, dtype=torch.float64), *rest) for x, k, *rest in cases]
    each(leaks, given, "for k = {1:g}, σ = {2:g}")
    right("Only σ / k counts, and how bright the picture is; a small k by itself hides nothing.")

"""Checks of the exercises to chapter 6, recursion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..fully_connected import recover_from_cross_entropy
from ..models import mlp
from ..recursion import Recovery, recover
from ..sharing import observe
from ..systems import LayerSystem
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOT_TRANSPOSED = (
    "You multiplied by W where k must go the other way: from the outputs back to the inputs. "
    "Which index is summed?"
)
NO_SLOPE = "You handed k through the layer, but not through the activation below it."
ACTIVATED = (
    "You multiplied by the activation itself. The chain rule asks how fast it changes: its slope."
)
INVERSE = "You divided by the slope. The chain rule multiplies; what is undone by dividing is z."
WRONG_LAYER = (
    "The slopes are those of another layer: they belong to the z below, which went into the "
    "activation, and not to this layer's own output."
)
GUESSED = (
    "You say that every z of a ReLU is known. Where its output is zero, all one knows is that z is "
    "not positive: it could be anything there."
)
TURNED = "Your mask is turned round: the dead units of a ReLU are the unknown ones."
TOO_CAREFUL = "{name} is one-to-one: nothing is unknown there, and you left entries out."
MULTIPLIED = (
    "You applied the leaky slope once more. To undo it, divide where the output is negative."
)
OTHER = "You undid tanh with the sigmoid's inverse, or the other way round."
EVERYWHERE = "You divided by the slope everywhere; positive outputs went through unchanged."
THREE = "Return three things: the output gradient below, z below, and the mask."
ZERO_SLOPE = "The slope of a dead ReLU is zero: nothing of k passes there."
SLOPE_OF_Z = (
    "You took the outputs for z in the slope of {name}: there σ′ is asked at z, and you have σ(z)."
)


def _slopes(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope))


def _activations(z: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output and slope of each activation, and what its slope would be if outputs were z."""
    tanh, sigmoid = z.tanh(), z.sigmoid()
    leaky = _slopes(z, 0.2)
    return {
        "leaky_relu": (z * leaky, leaky, leaky),
        "tanh": (tanh, 1 - tanh**2, 1 - tanh.tanh() ** 2),
        "sigmoid": (sigmoid, sigmoid * (1 - sigmoid), sigmoid.sigmoid() * (-sigmoid).sigmoid()),
        "relu": (z.relu(), _slopes(z, 0.0), _slopes(z, 0.0)),
    }


def check_step_down(step_down: Student, seed: int = 1, units: int = 7) -> None:
    """Check 6.1: the output gradient, handed one layer down, and an activation undone."""
    z = _random(seed + 2, units)
    for outputs in (units, units - 2):
        W, k = _random(seed, outputs, units), _random(seed + 1, outputs)
        for name, (a, slope, again) in _activations(z).items():
            case = f"for {name}"
            answer = ask(step_down, W.clone(), k.clone(), a.clone(), name, case=case)
            demand(isinstance(answer, tuple | list) and len(answer) == 3, THREE)
            _handed_down(answer[0], W, k, (a, slope, again), name)
            _undone(answer[1], answer[2], a, z, name)
    right("One transpose, one slope, one inverse: what is known goes down, the rest is left open.")


def _handed_down(
    answer: object, W: Tensor, k: Tensor, layer: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    a, slope, again = layer
    back = W.T @ k
    known: list[Wrong] = [
        (NO_SLOPE if name != "relu" else ZERO_SLOPE, back),
        (ACTIVATED, back * a),
        (INVERSE, back / slope),
        (SLOPE_OF_Z.format(name=name), back * again),
        (ZERO_SLOPE, back * _slopes(a, 0.2)),
    ]
    if len(W) == W.shape[1]:
        known += [(NOT_TRANSPOSED, (W @ k) * slope), (NOT_TRANSPOSED, W @ k)]
        known += [(WRONG_LAYER, back * _slopes(W @ a, 0.2)), (WRONG_LAYER, W.T @ (k * slope))]
    compare(answer, back * slope, f"the output gradient below {name}", known)


def _undone(answer: object, mask: object, a: Tensor, z: Tensor, name: str) -> None:
    known: dict[str, list[Wrong]] = {
        "leaky_relu": [
            (MULTIPLIED, a),
            (MULTIPLIED, torch.where(a > 0, a, 0.2 * a)),
            (EVERYWHERE, a / 0.2),
        ],
        "tanh": [(OTHER, a.logit()), (OTHER, a.atanh() * 2)],
        "sigmoid": [(OTHER, a.atanh()), (OTHER, 2 * a.atanh())],
    }
    marked = tensor(mask, "the mask") != 0
    demand(marked.shape == z.shape, f"The mask of {name} needs one entry for each unit.")
    if name == "relu":
        demand(not torch.equal(marked, z <= 0), TURNED)
        demand(not bool(marked[z <= 0].any()), GUESSED)
        found = torch.where(marked, tensor(answer, "z"), 0.0)
        compare(found, torch.where(z > 0, z, 0.0), "the known part of relu's z")
    else:
        compare(answer, z, f"z below {name}", known[name], tolerance=1e-7)
    demand(bool(marked[z > 0].all()), TOO_CAREFUL.format(name=name))
    demand(name == "relu" or bool(marked.all()), TOO_CAREFUL.format(name=name))


EARLY = "That is the input of an inner layer: you stopped before the bottom."
LAYER_ABOVE = (
    "You used the gradient of the layer above. Each layer's own gradient is its k times its own "
    "input."
)
LENGTH = "You divided by |k| where least squares divides by |k|²: the picture's length is wrong."
LABEL = "The label comes from the last layer, which `recover_from_cross_entropy` solves for you."
Walk = Callable[[list[Tensor], list[Tensor]], Tensor]


def _walk(
    weights: list[Tensor],
    gradients: list[Tensor],
    slopes: bool = True,
    shift: int = 0,
    power: int = 2,
    bottom: int = 0,
) -> Tensor:
    """The walk down, right by default and wrong in one respect by choice."""
    top = recover_from_cross_entropy(weights[-1], gradients[-1])[0]
    x, k = top.x, top.k
    for layer in range(len(weights) - 2, bottom - 1, -1):
        k = weights[layer + 1].T @ k
        k = k * _slopes(x, 0.2) if slopes else k
        G = gradients[min(layer + shift, len(weights) - 2)]
        x = (G.T if G.shape[0] != len(k) else G).T @ k / k.norm() ** power
    return x


def check_walk(walk: Student, seed: int = 3, units: int = 12, depth: int = 3) -> None:
    """Check 6.2: picture and label through a bias-free network."""
    for label in (2, 0):
        sizes = [units] * (depth + 1) + [6]
        weights = [_random(seed + i, m, n) / n**0.5 for i, (n, m) in enumerate(pairwise(sizes))]
        x = _random(seed + 99, units).abs()
        gradients = _gradients(weights, x, label)
        answer = ask(walk, [w.clone() for w in weights], [g.clone() for g in gradients])
        picture, found = pair(answer, "walk(...)")
        known: list[Wrong] = [
            (NO_SLOPE, _walk(weights, gradients, slopes=False)),
            (LAYER_ABOVE, _walk(weights, gradients, shift=1)),
            (LENGTH, _walk(weights, gradients, power=1)),
            *((EARLY, _walk(weights, gradients, bottom=b)) for b in range(1, depth + 1)),
        ]
        compare(picture, x, "the picture", known, tolerance=1e-6)
        demand(int(tensor(found, "the label")) == label, LABEL)
    right(f"Through {depth + 1} layers without a bias, and nobody told you the label.")


def _gradients(weights: list[Tensor], x: Tensor, label: int) -> list[Tensor]:
    """What the client sends: leaky ReLU of slope 0.2 between layers, softmax cross-entropy."""
    leaves = [w.clone().requires_grad_() for w in weights]
    for layer, w in enumerate(leaves):
        x = w @ (x if layer == 0 else nn.functional.leaky_relu(x, 0.2))
    loss = nn.functional.cross_entropy(x[None], torch.tensor([label]))
    return list(torch.autograd.grad(loss, leaves))


WHOLE = "Return two whole numbers from 1 to 8: the filters of the first layer and of the second."
FULL = (
    "With {first} and {second} filters the second layer has full rank: no analysis would call it "
    "safe. Take filters away, or make its input larger."
)
LOST = (
    "With {first} and {second} filters the whole gradient leaves {open} directions of the picture "
    "open: this network is safe from one gradient of one sample. Find one that only looks so."
)
COUNTED = (
    "The second layer has {equations} equations for {unknowns} unknowns: a count already says that "
    "it lacks some. Find one where the count is content, the rank is not, and the picture falls "
    "all the same."
)


def check_design(design: Student, seed: int = 4) -> None:
    """Check 6.3: a layer that lacks rank in a network that does not."""
    answer = pair(ask(design), "design()")
    demand(all(isinstance(n, int) and 1 <= n <= 8 for n in answer), WHOLE)
    first, second = answer
    model, x = _two_layers(first, second, seed), _random(seed + 9, 1, 1, 8, 8).abs()
    equations, unknowns, rank = _second_layer(model, x)
    counts = {"first": first, "second": second, "equations": equations, "unknowns": unknowns}
    demand(rank < unknowns, FULL.format(**counts))
    open_directions = x.numel() - _whole_rank(model, x)
    demand(open_directions == 0, LOST.format(open=open_directions, **counts))
    demand(equations >= unknowns, COUNTED.format(**counts))
    right(
        f"{equations} equations, rank {rank} for {unknowns} unknowns, and yet the whole gradient "
        "determines every pixel: a layer without rank is not a safe network."
    )


def _two_layers(first: int, second: int, seed: int) -> nn.Sequential:
    """The network of exercise 6.4, with weights of its own generator."""
    one = nn.Conv2d(1, first, 3, 1, 1, bias=False)
    two = nn.Conv2d(first, second, 3, 2, 1, bias=False)
    head = nn.Linear(16 * second, 10, bias=False)
    model = nn.Sequential(one, nn.LeakyReLU(0.2), two, nn.LeakyReLU(0.2), nn.Flatten(), head)
    with torch.no_grad():
        for place, parameter in enumerate(model.double().parameters()):
            parameter.copy_(_random(seed + place, *parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def _second_layer(model: nn.Sequential, x: Tensor) -> tuple[int, int, int]:
    inner = model[:2](x).detach()
    z = model[2](inner).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model[3:](z), torch.tensor([3]))
    (k,) = torch.autograd.grad(loss, z)
    matrix = LayerSystem(model[2], k, tuple(inner.shape[1:])).to_dense(scaled=True)
    return (*matrix.shape, int(torch.linalg.matrix_rank(matrix, rtol=1e-10)))


def _whole_rank(model: nn.Sequential, x: Tensor) -> int:
    """Rank of the derivative of the whole gradient with respect to the picture."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.tensor([3]))
    sent = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    parts = []
    for gradient in sent:
        flat = gradient.flatten()
        each = torch.eye(len(flat), dtype=flat.dtype)
        (rows,) = torch.autograd.grad(flat, x, each, retain_graph=True, is_grads_batched=True)
        parts.append(rows.flatten(1) / gradient.detach().abs().max())
    return int(torch.linalg.matrix_rank(torch.cat(parts), rtol=1e-10))


@dataclass(frozen=True)
class Account:
    """What a recovery says of itself, without its verdict.

    Attributes
    ----------
    full_rank : tuple of bool
        For each layer, from the last to the first.
    residuals : tuple of float
        Likewise: what the layer's answer leaves unexplained, relative.
    mismatch : float
        How far the gradient at the answer is from the one that was sent, relative.
    answers : int
        How many pictures explain the gradient.
    precision : float
        Rounding of the gradients that were sent: about 1e-16 for float64, 1e-7 for float32.
    """

    full_rank: tuple[bool, ...]
    residuals: tuple[float, ...]
    mismatch: float
    answers: int
    precision: float


def account(recovery: Recovery, precision: float) -> Account:
    """Make the :class:`Account` of a recovery."""
    return Account(
        tuple(layer.full_rank for layer in recovery.layers),
        tuple(layer.residual for layer in recovery.layers),
        float("inf") if recovery.mismatch is None else recovery.mismatch,
        len(recovery.candidates),
        precision,
    )


ACCEPT = "Everything is in order in this account, down to rounding, and you do not trust it."
SINGLE = (
    "These gradients were float32, so 1e-7 is rounding, and you take it for an error. Measure what "
    "is left by the precision that was sent."
)
TWINS = "Two pictures explain this gradient, and you trust the first: which was the client's?"
LACKING = (
    "A layer lacks rank, and you trust the picture: its residual is small because there are many "
    "answers, of which it is one."
)
INNER = "The layer that lacks rank is not the last in the table: look at all of them."
MISMATCH = (
    "The gradient at the answer is not the one that was sent: they differ by {size:.0%}. All "
    "layers had their say, and the whole does not fit."
)
LEFT = "A layer in the middle leaves {size:.0%} of its equations unexplained, and you trust it."


def check_may_trust(may_trust: Student, seed: int = 5) -> None:
    """Check 6.4: from the account of a recovery to a verdict."""
    double, single = (torch.finfo(t).eps for t in (torch.float64, torch.float32))
    honest = _recovered(torch.float64, 10, seed)
    twins = _recovered(torch.float64, 1, seed)
    tiny, middle = (1e-15, 1e-14, 3e-14), (1e-15, 0.02, 1e-14)
    cases = [
        (honest, True, ACCEPT),
        (_recovered(torch.float32, 10, seed), True, SINGLE),
        (Account((True,) * 3, (1e-8, 2e-7, 3e-7), 4e-7, 1, single), True, SINGLE),
        (twins, False, TWINS),
        (Account((True, True, False), tiny, 1e-14, 1, double), False, LACKING),
        (Account((True, False, True), tiny, 1e-14, 1, double), False, INNER),
        (Account((True,) * 3, tiny, 0.3, 1, double), False, MISMATCH.format(size=0.3)),
        (Account((True,) * 3, middle, 1e-14, 1, double), False, LEFT.format(size=0.02)),
    ]
    for case, truth, hint in cases:
        demand(bool(ask(may_trust, case)) == truth, hint)
    right("Rank and residual of every layer, one answer, and the gradient itself once more.")


def _recovered(dtype: torch.dtype, outputs: int, seed: int) -> Account:
    """The account of a real recovery: twins where one logit is all there is."""
    model = mlp([16, 24, outputs], activation="leaky_relu", bias=False, dtype=dtype)
    x = _random(seed, 1, 16).abs().to(dtype)
    with torch.no_grad():
        sure = (model(x) > 0).to(dtype)
    loss: nn.Module = nn.BCEWithLogitsLoss() if outputs == 1 else nn.CrossEntropyLoss()
    update = observe(model, loss, x, sure if outputs == 1 else torch.tensor([3]))
    return account(recover(model, update, (16,), loss), torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Plan:
    """What a count of equations asks of a convolution without a bias.

    Attributes
    ----------
    name : str
        Which layer it is.
    unknowns, outputs : int
        Entries of its input and of its output, for one sample.
    weights : int
        Entries of its weight.
    filters : int
        How many filters they belong to.
    """

    name: str
    unknowns: int
    outputs: int
    weights: int
    filters: int


def plan(name: str, channels: int, size: int, filters: int, kernel: int) -> Plan:
    """Make the :class:`Plan` of a convolution with stride 1 and no padding."""
    side = size - kernel + 1
    return Plan(
        name,
        channels * size**2,
        filters * side**2,
        filters * channels * kernel**2,
        filters,
    )


UNLIMITED = 10**6


def fits(layer: Plan, shared: bool = True) -> int:
    """Count the samples that a layer determines: the rank law, for a batch."""
    missing = layer.unknowns - layer.outputs
    spare = layer.weights - (layer.filters**2 if shared else 0)
    return UNLIMITED if missing <= 0 else max(spare // missing, 0)


TWO_THINGS = (
    "Return two things: how many samples, a whole number, and the name of what limits them."
)
EACH = (
    "You gave every sample its own gradient constraints. The client sends one sum: a layer has "
    "them once, however many samples share them."
)
TWICE = (
    "You counted equations that are in both sets as if they said something new. How many are there "
    "for F filters, and does their number grow with the batch?"
)
CLASSES = (
    "The last layer cannot tell that many apart: each k of a softmax sums to zero over the "
    "classes. How many of them can be independent?"
)
STRICT = (
    "In one of these networks a layer has exactly as many equations as unknowns, which is enough, "
    "and you stop one sample earlier."
)
FREE = (
    "A layer whose outputs are no fewer than its unknowns determines every sample by itself, and "
    "you let it limit the batch."
)
NO_HEAD = "Every layer has its say here, but not the last one: the softmax has a limit of its own."
NONE = (
    "Here not even one sample has equations enough, so that none fits, and you say that {number} "
    "do."
)
LIMITING = (
    "The number is right, and {name} is not what limits it: which of them gives out first as the "
    "batch grows?"
)


def _networks(seed: int) -> list[tuple[list[Plan], int]]:
    """Make networks that each limit the batch in another way, then some drawn at random."""
    wide, exact = plan("wide", 2, 6, 10, 3), plan("exact", 2, 5, 4, 3)
    roomy, tight = plan("roomy", 3, 5, 7, 3), plan("tight", 3, 5, 5, 3)
    networks = [
        ([wide, exact], 10),
        ([roomy, wide], 5),
        ([roomy, tight], 10),
        ([tight, wide, roomy], 20),
        ([wide], 100),
        ([wide, plan("poor", 3, 6, 3, 2)], 10),
    ]
    g = torch.Generator().manual_seed(seed)
    for _ in range(20):
        size, first, second, classes = (
            int(torch.randint(low, high, (), generator=g))
            for low, high in ((5, 9), (3, 9), (3, 12), (3, 30))
        )
        low = plan("conv1", 3, size, first, 3)
        networks.append(([low, plan("conv2", first, size - 2, second, 2)], classes))
    return [(layers, classes) for layers, classes in networks if _one_limits(layers, classes)]


def _limits(layers: list[Plan], classes: int) -> dict[str, int]:
    return {"softmax": classes - 1, **{layer.name: fits(layer) for layer in layers}}


def _one_limits(layers: list[Plan], classes: int) -> bool:
    lowest, second = sorted(_limits(layers, classes).values())[:2]
    return lowest < second


def check_largest_batch(largest_batch: Student, seed: int = 6) -> None:
    """Check 6.5: the largest batch that a convolutional network gives away, and its limit."""
    for layers, classes in _networks(seed):
        limits = _limits(layers, classes)
        true = min(limits.values())
        answer = ask(largest_batch, list(layers), classes, case=f"for {classes} classes")
        number, name = pair(answer, "largest_batch(...)")
        demand(isinstance(number, int | float) and isinstance(name, str), TWO_THINGS)
        demand(number == true, _why_not(number, layers, classes))
        demand(limits.get(name) == true, LIMITING.format(name=name))
    right("Weight constraints grow with the batch; gradient constraints do not. Hence a limit.")


def _why_not(number: float, layers: list[Plan], classes: int) -> str:
    """Say which mistake gives ``number``."""
    below = [fits(layer) for layer in layers]
    true = min(classes - 1, *below)
    overlooked = min(classes - 1, *(fits(layer, shared=False) for layer in layers))
    if number < 0 or (number == 0 and UNLIMITED in below and 0 not in below):
        return FREE
    if number == overlooked != true:
        return TWICE
    if true == 0:
        return NONE.format(number=number)
    if number == true - 1:
        return STRICT
    if number == classes and classes - 1 == true:
        return CLASSES
    if true == classes - 1 and number in below:
        return NO_HEAD
    if number >= classes - 1:
        return EACH
    return f"Of {classes} classes and these layers, {number} samples are not the most."

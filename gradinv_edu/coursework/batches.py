"""Checks of the exercises to chapter 3, batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .verdict import Student, Wrong, ask, compare, demand, right, tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class _Batch:
    """A dense layer with ReLU, a batch, and what its client sends of the layer."""

    W: Tensor
    bias: Tensor
    X: Tensor
    k: Tensor

    @property
    def G(self) -> Tensor:
        return self.k.T @ self.X

    @property
    def b(self) -> Tensor:
        return self.k.sum(0)


def _batch(seed: int, samples: int, rows: int, size: int = 20, classes: int = 6) -> _Batch:
    """Gaussian samples; the loss is softmax cross-entropy, averaged over the batch."""
    W, bias, X = (
        _random(seed, rows, size),
        0.3 * _random(seed + 1, rows),
        _random(seed, samples, size),
    )
    head = _random(seed + 2, classes, rows) / rows**0.5
    z = (X @ W.T + bias).requires_grad_()
    labels = torch.arange(samples) % classes
    loss = nn.functional.cross_entropy(z.relu() @ head.T, labels)
    (k,) = torch.autograd.grad(loss, z)
    return _Batch(W, bias, X, k)


WRONG_SUM = (
    "You divided by a sum over the rows of the layer. A row's ratio mixes the samples of that row: "
    "which index is summed?"
)
SIZES = (
    "You took sizes without their signs. Nothing in the chain rule makes k positive, so a share "
    "need not be, either."
)
EVEN = "You gave every sample the same share: the ratio of a batch is not the mean of its samples."
UNSHARED = "These are the k themselves: divided by what do the shares of a row add up to one?"
SOFTMAX = "You made the shares positive by a softmax. The ratio divides, and nothing else."


def check_shares(shares: Student, seed: int = 1, samples: int = 4, rows: int = 7) -> None:
    """Check 3.1: in which shares each row's ratio mixes the samples."""
    k = _random(seed, samples, rows)
    true = k / k.sum(0)
    known: list[Wrong] = [
        (WRONG_SUM, k / k.sum(1, keepdim=True)),
        (SIZES, k.abs() / k.abs().sum(0)),
        (EVEN, torch.full_like(k, 1 / samples)),
        (UNSHARED, k),
        (UNSHARED, k / samples),
        (SOFTMAX, k.softmax(0)),
    ]
    compare(ask(shares, k.clone()), true, "the table of shares", known)
    right(f"They add up to one in every row; the lowest here is {float(true.min()):.1f}.")


PER_SAMPLE = (
    "Your counts add up to far less than the batch: the gradient is averaged over the samples, and "
    "you did not undo that."
)
OPPOSITE = "A label pulls its own entry of the gradient down, and you count it the other way."
ALIKE = (
    "You took every class for equally likely. The predictions are given: this network is trained, "
    "and they are anything but alike."
)
NO_PREDICTION = "You left the predictions out, so that your counts add up to nothing at all."
NEGATIVE = (
    "You looked at signs only. That tells which label one sample has; here several samples may "
    "share one, and a label may hide behind sure predictions of others."
)


def check_counted(counted: Student, seed: int = 2, samples: int = 9, classes: int = 5) -> None:
    """Check 3.2: how often each label occurs in a batch."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.tensor([0, 0]), torch.randint(1, classes, (samples - 2,), generator=g)]
    )
    logits = 1.5 * _random(seed, samples, classes)
    p = logits.softmax(1)
    one_hot = nn.functional.one_hot(labels, classes).double()
    bias_gradient = (p - one_hot).mean(0)
    true = one_hot.sum(0)
    total = p.sum(0)
    known: list[Wrong] = [
        (PER_SAMPLE, true / samples),
        (PER_SAMPLE, total - bias_gradient),
        (PER_SAMPLE, (total - bias_gradient).round()),
        (OPPOSITE, total + samples * bias_gradient),
        (OPPOSITE, samples * bias_gradient - total),
        (OPPOSITE, (total + samples * bias_gradient).round()),
        (ALIKE, samples / classes - samples * bias_gradient),
        (ALIKE, (samples / classes - samples * bias_gradient).round()),
        (NO_PREDICTION, -samples * bias_gradient),
        (NO_PREDICTION, (-samples * bias_gradient).round()),
        (NEGATIVE, (bias_gradient < 0).double()),
    ]
    compare(ask(counted, bias_gradient.clone(), p.clone()), true, "the table of counts", known)
    right("Every duplicate counted, and no picture has been recovered yet.")


MATRIX = "Return one matrix, a row for each sample: torch.stack makes one of a list."
UNCERTIFIED = (
    "There are mixtures among your {count} answers. Nobody has confirmed those rows: what do two "
    "rows that speak of the same sample have in common?"
)
REPEATED = "You name a sample once for every row that speaks of it; name it once."
DEAD = "Some rows are dead: their gradient is zero, and so is what you divide by."
AVERAGED = "That is the mean over rows. Rows that agree must be found before anything is averaged."
MISSED = (
    "You named {found} of {count} samples. Rows of one sample agree up to rounding: did you ask "
    "for equality, or stop at the first pair?"
)
DIRECTION = (
    "A row's direction is right here, and its length is not: divide each row by its own entry of "
    "the bias gradient."
)


def check_lonely(lonely: Student, seed: int = 5, samples: int = 4, rows: int = 60) -> None:
    """Check 3.3: the samples that rows confirm to each other."""
    batch = _batch(seed, samples, rows)
    batch.k[:, ::11] = 0.0
    answer = tensor(ask(lonely, batch.G, batch.b), "your answer")
    demand(answer.ndim == 2 and answer.shape[1] == batch.X.shape[1], MATRIX)
    demand(bool(answer.isfinite().all()), DEAD)
    alone = (batch.k != 0).sum(0) == 1
    owners = batch.k.abs().argmax(0)[alone].bincount(minlength=samples)
    certain = batch.X[owners > 1]
    gaps = _gaps(answer, certain)
    aligned = _turns(answer, certain)
    if len(answer) and bool((aligned.amin(1) < 1e-6).all()):
        demand(bool((gaps.amin(1) < 1e-6).all()), DIRECTION)
    demand(len(answer) != 1 or bool(gaps.amin() < 1e-6), AVERAGED)
    demand(bool((gaps.amin(1) < 1e-6).all()), UNCERTIFIED.format(count=len(answer)))
    found = int((gaps.amin(0) < 1e-6).sum())
    demand(found == len(certain), MISSED.format(found=found, count=len(certain)))
    demand(len(answer) == found, REPEATED)
    right(f"{found} samples of {samples}, each confirmed by rows that agree, and no truth needed.")


def _gaps(found: Tensor, true: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    gaps: Tensor = torch.cdist(found, true, compute_mode=exact) / true.norm(dim=1)
    return gaps


def _turns(found: Tensor, true: Tensor) -> Tensor:
    """How far directions are apart, whichever way they point."""
    a, b = nn.functional.normalize(found), nn.functional.normalize(true)
    return torch.minimum(_gaps(a, b), _gaps(-a, b))


HOW_MANY = "Return one matrix with a row for each of the {samples} samples."
OPEN_LENGTH = (
    "These are the samples up to a factor each: a direction has no length. Which column of the "
    "matrix tells how long it must be?"
)
NO_ZEROS = (
    "Mixtures: of your {samples} answers {wrong} are no samples. A draw is only a guess; which "
    "mark, that it was not asked for, does one leave that has hit?"
)
ONE_TWICE = (
    "The same sample comes more than once. Different draws hit the same direction: keep one only "
    "if it is independent of those that you have."
)
SINGULAR = (
    "Singular vectors span the same space as the samples and are not the samples; turning them is "
    "the whole exercise."
)


def check_apart(apart: Student, seed: int = 4, samples: int = 4, rows: int = 80) -> None:
    """Check 3.4: all samples of a batch, by draws."""
    batch = _batch(seed, samples, rows)
    whole = torch.cat([batch.G, batch.b[:, None]], 1)
    g = torch.Generator().manual_seed(seed)
    draws = torch.rand(400, rows, generator=g).topk(samples - 1).indices
    answer = tensor(ask(apart, whole, samples, draws), "your answer")
    demand(answer.shape == batch.X.shape, HOW_MANY.format(samples=samples))
    R = torch.linalg.svd(whole, full_matrices=False)[2][:samples, :-1]
    demand(bool(_turns(answer, R).amin(1).max() > 1e-6), SINGULAR)
    demand(bool(answer.isfinite().all()), "Your answer has entries that are NaN or infinite.")
    gaps = _gaps(answer, batch.X)
    aligned = _turns(answer, batch.X)
    wrong = int((aligned.amin(1) > 1e-6).sum())
    twice = _turns(answer, answer).fill_diagonal_(1).min() < 1e-6
    demand(not bool(twice), ONE_TWICE)
    demand(wrong == 0, NO_ZEROS.format(samples=samples, wrong=wrong))
    demand(bool((gaps.amin(1) < 1e-6).all()), OPEN_LENGTH)
    demand(bool((gaps.amin(0) < 1e-6).all()), ONE_TWICE)
    right(
        f"{samples} samples out of one sum. About {samples} draws in {2 ** (samples - 1)} hit; "
        "at 24 samples it is 24 in 8 million, and walking down beats drawing."
    )


SMALL_RANK = (
    "Fewer samples than the gradient has rank: they cannot be all that this batch was made of."
)
UNEXPLAINED = "These samples do not explain the weight gradient, and you believe them."
BIAS = (
    "These explain the weight gradient to the last digit and are too bright all the same: which "
    "other gradient was sent, and what must the same k give there?"
)
MIXED = (
    "Mixtures of the samples. They explain both gradients to the last digit, because they span the "
    "same space; but the server wrote W and b. Which units would these switch on?"
)
EXACT = "The samples themselves, every equation and every unit in order, and you do not believe it."
ROUNDED = (
    "These gradients were float32, so that about 1e-7 is rounding: zeros of K and residuals are "
    "zero only up to that."
)


def check_believe(believe: Student, seed: int = 5, samples: int = 4, rows: int = 60) -> None:
    """Check 3.5: whether these are the samples of the batch."""
    batch = _batch(seed, samples, rows)
    W, bias, X, G, b = batch.W, batch.bias, batch.X, batch.G, batch.b
    mixing = torch.eye(samples, dtype=X.dtype) + 0.4 * _random(seed + 7, samples, samples)
    mixing = mixing / mixing.sum(1, keepdim=True)
    scaled = X * torch.linspace(1.2, 1.5, samples)[:, None].double()
    strange = torch.cat([X[1:], _random(seed + 8, 1, X.shape[1])])
    noise = 3e-8 * _random(seed + 9, *X.shape)
    cases = [
        (X, G, b, True, EXACT),
        (X.flip(0), G, b, True, EXACT),
        (X + noise, G.float().double(), b.float().double(), True, ROUNDED),
        (X[1:], G, b, False, SMALL_RANK),
        (strange, G, b, False, UNEXPLAINED),
        (scaled, G, b, False, BIAS),
        (mixing @ X, G, b, False, MIXED),
    ]
    for candidate, weight_gradient, bias_gradient, truth, hint in cases:
        told = ask(believe, W, bias, weight_gradient, bias_gradient, candidate)
        demand(bool(told) == truth, hint)
    right("Both gradients, and the forward pass: the server checks a batch by its own weights.")

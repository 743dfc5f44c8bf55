"""Checks of the exercises on batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .verdict import (
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    each,
    expect,
    known,
    normal,
    pair,
    refuse,
    right,
    tensor,
)


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
    W, bias = normal(seed, rows, size), 0.3 * normal(seed + 1, rows)
    X, head = normal(seed, samples, size), normal(seed + 2, classes, rows) / rows**0.5
    z = (X @ W.T + bias).requires_grad_()
    loss = nn.functional.cross_entropy(z.relu() @ head.T, torch.arange(samples) % classes)
    (k,) = torch.autograd.grad(loss, z)
    return _Batch(W, bias, X, k)


class Shares(Mistakes, of="batches-shares"):
    def summed_over_rows(k):
        """You divided by a sum over the rows of the layer. A row's ratio mixes the samples of that
        row: which index is summed?"""
        return k / k.sum(1, keepdim=True)

    def signs_dropped(k):
        """You took sizes without their signs. Nothing in the chain rule makes k positive, so a
        share need not be, either."""
        return k.abs() / k.abs().sum(0)

    def mean_of_the_samples(k):
        """You gave every sample the same share: the ratio of a batch is not the mean of its
        samples."""
        return torch.full_like(k, 1 / len(k))

    def division_forgotten(k):
        """These are the k themselves: divided by what do the shares of a row add up to one?"""
        return k

    def divided_by_the_number_of_samples(k):
        """Like division_forgotten."""
        return k / len(k)

    def softmax_for_ratio(k):
        """You made the shares positive by a softmax. The ratio divides, and nothing else."""
        return k.softmax(0)


def check_shares(shares: Student, seed: int = 1, samples: int = 4, rows: int = 7) -> None:
    """Check: in which shares each row's ratio mixes the samples."""
    k = normal(seed, samples, rows)
    expect("batches-shares", shares, (k,), k / k.sum(0), "the table of shares")
    lowest = float((k / k.sum(0)).min())
    right(f"They add up to one in every row; the lowest here is {lowest:.1f}.")


class Counted(Mistakes, of="batches-count"):
    def mean_for_sum(b, p):
        """Your counts add up to far less than the batch: the gradient is averaged over the
        samples, and you did not undo that."""
        return p.mean(0) - b

    def mean_for_one_sum(b, p):
        """Like mean_for_sum."""
        return p.sum(0) - b

    def sign_turned(b, p):
        """A label pulls its own entry of the gradient down, and you count it the other way."""
        return p.sum(0) + len(p) * b

    def all_signs_turned(b, p):
        """Like sign_turned."""
        return len(p) * b - p.sum(0)

    def untrained_network_assumed(b, p):
        """You took every class for equally likely. The predictions are given: this network is
        trained, and they are anything but alike."""
        return len(p) / p.shape[1] - len(p) * b

    def predictions_left_out(b, p):
        """You left the predictions out, so that your counts add up to nothing at all."""
        return -len(p) * b

    def negative_entries(b, p):
        """You looked at signs only. That tells which label one sample has; here several samples may
        share one, and a label may hide behind sure predictions of others."""
        return (b < 0).double()


def check_counted(counted: Student, seed: int = 2, samples: int = 9, classes: int = 5) -> None:
    """Check: how often each label occurs in a batch."""
    g = torch.Generator().manual_seed(seed)
    more = torch.randint(1, classes, (samples - 2,), generator=g)
    p = (1.5 * normal(seed, samples, classes)).softmax(1)
    one_hot = nn.functional.one_hot(torch.cat([torch.tensor([0, 0]), more]), classes).double()
    given = ((p - one_hot).mean(0), p)
    wrong = (
        (h, f(w)) for h, w in known("batches-count", given) for f in (torch.clone, torch.round)
    )
    compare(ask(counted, *given), one_hot.sum(0), "the table of counts", wrong)
    right("Every duplicate counted, and no picture has been recovered yet.")


def _ratios(G: Tensor, b: Tensor) -> Tensor:
    return G[b != 0] / b[b != 0, None]


def _agreeing(ratios: Tensor) -> Tensor:
    return (torch.cdist(ratios, ratios) < 1e-6 * ratios.norm(dim=1)).sum(1) > 1


class Lonely(Mistakes, of="batches-lonely", own=("gradinv_edu.batches.isolated_samples",)):
    def every_ratio_believed(G, b):
        """There are mixtures among your {count} answers. Nobody has confirmed those rows: what do
        two rows that speak of the same sample have in common?"""
        return _ratios(G, b)

    def mean_of_all_rows(G, b):
        """That is the mean over rows. Rows that agree must be found before anything is averaged."""
        return _ratios(G, b).mean(0, keepdim=True)

    def one_for_every_row(G, b):
        """You name a sample once for every row that speaks of it; name it once."""
        ratios = _ratios(G, b)
        return ratios[_agreeing(ratios)]

    def dead_rows_divided(G, b):
        """Some rows are dead: their gradient is zero, and so is what you divide by."""
        return G / b[:, None]

    def gradient_rows_for_ratios(G, b):
        """A row's direction is right here, and its length is not: divide each row by its own entry
        of the bias gradient."""
        return G[b != 0][_agreeing(_ratios(G, b))]

    def first_pair_only(G, b):
        """You named {found} of {count} samples. Rows of one sample agree up to rounding: did you
        ask for equality, or stop at the first pair?"""
        ratios = _ratios(G, b)
        return ratios[_agreeing(ratios)][:1]


def check_lonely(lonely: Student, seed: int = 5, samples: int = 4, rows: int = 60) -> None:
    """Check: the samples that rows confirm to each other."""
    batch = _batch(seed, samples, rows)
    batch.k[:, ::11] = 0.0
    answer = tensor(ask(lonely, batch.G, batch.b), "your answer")
    matrix = "Return one matrix, a row for each sample: torch.stack makes one of a list."
    demand(answer.ndim == 2 and answer.shape[1] == batch.X.shape[1], matrix)
    demand(answer.isfinite().all(), Lonely.dead_rows_divided)
    alone = (batch.k != 0).sum(0) == 1
    owners = batch.k.abs().argmax(0)[alone].bincount(minlength=samples)
    certain = batch.X[owners > 1]
    exact = _gaps(answer, certain) < 1e-6
    mixed = (_turns(answer, certain) > 1e-6).all(1).any()
    demand(mixed or exact.any(1).all(), Lonely.gradient_rows_for_ratios)
    demand(len(answer) != 1 or exact.any(), Lonely.mean_of_all_rows)
    demand(exact.any(1).all(), Lonely.every_ratio_believed, count=len(answer))
    found = int(exact.any(0).sum())
    demand(found == len(certain), Lonely.first_pair_only, found=found, count=len(certain))
    demand(len(answer) == found, Lonely.one_for_every_row)
    right(f"{found} samples of {samples}, each confirmed by rows that agree, and no truth needed.")


def _gaps(found: Tensor, true: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(found, true, compute_mode=exact) / true.norm(dim=1)


def _turns(found: Tensor, true: Tensor) -> Tensor:
    """How far directions are apart, whichever way they point."""
    a, b = nn.functional.normalize(found), nn.functional.normalize(true)
    return torch.minimum(_gaps(a, b), _gaps(-a, b))


def _rows(whole: Tensor, samples: int, draws: Tensor, sort=True, independent=True) -> Tensor:
    """Solve the exercise, with a part of it left out."""
    left = torch.linalg.svd(whole, full_matrices=False)[0][:, :samples]
    q = torch.stack([torch.linalg.svd(left[rows])[2][-1] for rows in draws])
    zeros = ((q @ left.T).abs() < 1e-9).sum(dim=1)
    kept: list[Tensor] = []
    for direction in q[zeros.argsort(descending=True)] if sort else q:
        more = torch.stack([*kept, direction])
        if not independent or torch.linalg.matrix_rank(more, rtol=1e-6) == len(more):
            kept.append(direction)
    return torch.linalg.pinv(left @ torch.stack(kept[:samples]).T) @ whole


class Apart(Mistakes, of="batches-apart", own=("gradinv_edu.batches.recover_batch",)):
    def last_column_not_used(whole, samples, draws):
        """These are the samples up to a factor each: a direction has no length. Which column of the
        matrix tells how long it must be?"""
        return _rows(whole, samples, draws)[:, :-1]

    def every_draw_believed(whole, samples, draws):
        """Mixtures: of your {samples} answers {wrong} are no samples. A draw is only a guess;
        which mark, that it was not asked for, does one leave that has hit?"""
        rows = _rows(whole, samples, draws, sort=False)
        return rows[:, :-1] / rows[:, -1:]

    def one_direction_twice(whole, samples, draws):
        """The same sample comes more than once. Different draws hit the same direction: keep one
        only if it is independent of those that you have."""
        rows = _rows(whole, samples, draws, independent=False)
        return rows[:, :-1] / rows[:, -1:]

    def singular_vectors_for_samples(whole, samples, draws):
        """Singular vectors span the same space as the samples and are not the samples; turning
        them is the whole exercise."""
        rows = torch.linalg.svd(whole, full_matrices=False)[2][:samples]
        return rows[:, :-1] / rows[:, -1:]

    def one_column_for_each_sample(whole, samples, draws):
        """Return one matrix with a row for each of the {samples} samples."""
        rows = _rows(whole, samples, draws)
        return (rows[:, :-1] / rows[:, -1:]).T


def check_apart(apart: Student, seed: int = 4, samples: int = 4, rows: int = 80) -> None:
    """Check: all samples of a batch, by draws."""
    batch = _batch(seed, samples, rows)
    whole = torch.cat([batch.G, batch.b[:, None]], 1)
    g = torch.Generator().manual_seed(seed)
    draws = torch.rand(400, rows, generator=g).topk(samples - 1).indices
    answer = tensor(ask(apart, whole, samples, draws), "your answer")
    demand(answer.shape == batch.X.shape, Apart.one_column_for_each_sample, samples=samples)
    R = torch.linalg.svd(whole, full_matrices=False)[2][:samples, :-1]
    demand(_turns(answer, R).amin(1).max() > 1e-6, Apart.singular_vectors_for_samples)
    demand(answer.isfinite().all(), "Your answer has entries that are NaN or infinite.")
    exact = _gaps(answer, batch.X) < 1e-6
    wrong = int((_turns(answer, batch.X).amin(1) > 1e-6).sum())
    twice = _turns(answer, answer).fill_diagonal_(1).min() < 1e-6
    demand(not twice, Apart.one_direction_twice)
    demand(wrong == 0, Apart.every_draw_believed, samples=samples, wrong=wrong)
    demand(exact.any(1).all(), Apart.last_column_not_used)
    demand(exact.any(0).all(), Apart.one_direction_twice)
    right(
        f"{samples} samples out of one sum. About {samples} draws in {2 ** (samples - 1)} hit; "
        "at 24 samples it is 24 in 8 million, and walking down beats drawing."
    )


def _explained(X: Tensor, G: Tensor, b: Tensor | None = None) -> tuple[Tensor, bool]:
    """Which k makes the gradients out of these samples, and whether it does."""
    if b is not None:
        X, G = torch.cat([X, X.new_ones(len(X), 1)], 1), torch.cat([G, b[:, None]], 1)
    k = G @ torch.linalg.pinv(X)
    return k, bool((k @ X - G).norm() < 1e-4 * G.norm())


def _agree(W: Tensor, bias: Tensor, k: Tensor, X: Tensor, rounding=1e-4, share=0.95) -> bool:
    on = (X @ W.T + bias).T > 0
    return bool(((k.abs() > rounding * k.abs().max()) == on).double().mean() > share)


class Believe(Mistakes, of="batches-believe"):
    def count_not_compared(W, bias, G, b, X):
        """Fewer samples than the gradient has rank: they cannot be all that this batch was made
        of."""
        return _explained(X, G, b)[1] or len(X) < torch.linalg.matrix_rank(G)

    def rank_for_evidence(W, bias, G, b, X):
        """These samples do not explain the weight gradient, and you believe them."""
        return torch.linalg.matrix_rank(X) == torch.linalg.matrix_rank(G, rtol=1e-6)

    def bias_gradient_ignored(W, bias, G, b, X):
        """These explain the weight gradient to the last digit and are too bright all the same:
        which other gradient was sent, and what must the same k give there?"""
        k, explained = _explained(X, G)
        return explained and _agree(W, bias, k, X, share=0.9)

    def equations_alone(W, bias, G, b, X):
        """Mixtures of the samples. They explain both gradients to the last digit, because they
        span the same space; but the server wrote W and b. Which units would these switch on?"""
        return _explained(X, G, b)[1]

    def exact_equality(W, bias, G, b, X):
        """The samples themselves, every equation and every unit in order, and you do not believe
        it."""
        return bool((G @ torch.linalg.pinv(X) @ X == G).all())

    def zeros_to_the_last_digit(W, bias, G, b, X):
        """These gradients were float32, so that about 1e-7 is rounding: zeros of K and residuals
        are zero only up to that."""
        k, explained = _explained(X, G, b)
        return explained and _agree(W, bias, k, X, rounding=1e-12)


def check_believe(believe: Student, seed: int = 5, samples: int = 4, rows: int = 60) -> None:
    """Check: whether these are the samples of the batch."""
    batch = _batch(seed, samples, rows)
    W, bias, X, G, b = batch.W, batch.bias, batch.X, batch.G, batch.b
    mixing = torch.eye(samples, dtype=X.dtype) + 0.4 * normal(seed + 7, samples, samples)
    mixing = mixing / mixing.sum(1, keepdim=True)
    scaled = X * torch.linspace(1.2, 1.5, samples)[:, None].double()
    strange = torch.cat([X[1:], normal(seed + 8, 1, X.shape[1])])
    near, rounded = X + 3e-8 * normal(seed + 9, *X.shape), (G.float().double(), b.float().double())
    cases = [
        (W, bias, G, b, X, True, Believe.exact_equality),
        (W, bias, G, b, X.flip(0), True, Believe.exact_equality),
        (W, bias, *rounded, near, True, Believe.zeros_to_the_last_digit),
        (W, bias, G, b, X[1:], False, Believe.count_not_compared),
        (W, bias, G, b, strange, False, Believe.rank_for_evidence),
        (W, bias, G, b, scaled, False, Believe.bias_gradient_ignored),
        (W, bias, G, b, mixing @ X, False, Believe.equations_alone),
    ]
    each(believe, cases)
    right("Both gradients, and the forward pass: the server checks a batch by its own weights.")


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
    outputs = filters * (size - kernel + 1) ** 2
    return Plan(name, channels * size**2, outputs, filters * channels * kernel**2, filters)


UNLIMITED = 10**6


def fits(layer: Plan, shared: bool = True, own: bool = False, strict: bool = False) -> int:
    """Count the samples that a layer determines: the rank law, for a batch; or a wrong law."""
    missing = layer.unknowns - layer.outputs - (layer.weights if own else 0)
    spare = (0 if own else layer.weights) - (layer.filters**2 if shared else 0)
    return UNLIMITED if missing <= 0 else max((spare - strict) // missing, 0)


def _limits(layers: list[Plan], classes: int, **law: bool) -> dict[str, int]:
    return {"softmax": classes - 1, **{layer.name: fits(layer, **law) for layer in layers}}


def _lowest(limits: dict[str, int]) -> tuple[int, str]:
    name = min(limits, key=limits.__getitem__)
    return limits[name], name


class LargestBatch(Mistakes, of="batches-largest"):
    def wide_layers_divided_by_a_negative(layers, classes):
        """A layer whose outputs are no fewer than its unknowns determines every sample by itself,
        and you let it limit the batch."""
        spare = {each: each.weights - each.filters**2 for each in layers}
        limits = {e.name: spare[e] // (e.unknowns - e.outputs) for e in layers}
        return _lowest({"softmax": classes - 1, **limits})

    def shared_equations_overlooked(layers, classes):
        """You counted equations that are in both sets as if they said something new. How many are
        there for F filters, and does their number grow with the batch?"""
        return _lowest(_limits(layers, classes, shared=False))

    def more_equations_than_unknowns(layers, classes):
        """In one of these networks a layer has exactly as many equations as unknowns, which is
        enough, and you stop one sample earlier."""
        return _lowest(_limits(layers, classes, strict=True))

    def gradient_constraints_for_each(layers, classes):
        """You gave every sample its own gradient constraints. The client sends one sum: a layer
        has them once, however many samples share them."""
        return _lowest(_limits(layers, classes, own=True))

    def as_many_as_classes(layers, classes):
        """The last layer cannot tell that many apart: each k of a softmax sums to zero over the
        classes. How many of them can be independent?"""
        return _lowest(_limits(layers, classes + 1))

    def softmax_forgotten(layers, classes):
        """Every layer has its say here, but not the last one: the softmax has a limit of its
        own."""
        return _lowest(_limits(layers, UNLIMITED))

    def first_layer_blamed(layers, classes):
        """The number is right, and {name} is not what limits it: which of them gives out first as
        the batch grows?"""
        return _lowest(_limits(layers, classes))[0], layers[0].name


def _networks(seed: int) -> list[tuple[list[Plan], int]]:
    """Make networks that each limit the batch in another way, then some drawn at random."""
    wide, exact = plan("wide", 2, 6, 10, 3), plan("exact", 2, 5, 4, 3)
    roomy, tight = plan("roomy", 3, 5, 7, 3), plan("tight", 3, 5, 5, 3)
    poor = plan("poor", 3, 6, 3, 2)
    networks = [([wide, exact], 10), ([roomy, wide], 5), ([roomy, tight], 10)]
    networks += [([tight, wide, roomy], 20), ([wide], 100), ([wide, poor], 10)]
    g = torch.Generator().manual_seed(seed)
    for _ in range(20):
        size, first, second, classes = (
            int(torch.randint(low, high, (), generator=g))
            for low, high in ((5, 9), (3, 9), (3, 12), (3, 30))
        )
        low = plan("conv1", 3, size, first, 3)
        networks.append(([low, plan("conv2", first, size - 2, second, 2)], classes))
    limits = [sorted(_limits(*network).values()) for network in networks]
    return [n for n, (lowest, second, *_) in zip(networks, limits, strict=True) if lowest < second]


def check_largest_batch(largest_batch: Student, seed: int = 6) -> None:
    """Check: the largest batch that a convolutional network gives away, and its limit."""
    two = "Return two things: how many samples, a whole number, and the name of what limits them."
    for layers, classes in _networks(seed):
        given, limits = (layers, classes), _limits(layers, classes)
        true = min(limits.values())
        answer = ask(largest_batch, *given, case=f"for {classes} classes")
        number, name = pair(answer, "largest_batch(...)")
        demand(isinstance(number, int | float) and isinstance(name, str), two)
        if number != true:
            for hint, (wrong, _) in known("batches-largest", given):
                demand(number != wrong, hint)
            none = "Here not even one sample has equations enough, and you say that {number} fit."
            demand(true, none, number=number)
            tight = min(limits, key=lambda name: limits[name])
            refuse(
                f"With {classes} classes you say that {number} samples fit, and of {tight} alone "
                f"that is {'too many' if number > true else 'fewer than it bears'}: count its "
                "equations for N samples, with the gradient constraints once, against N times its "
                "unknowns."
            )
        demand(limits.get(name) == true, LargestBatch.first_layer_blamed, name=name)
    right("Weight constraints grow with the batch; gradient constraints do not. Hence a limit.")

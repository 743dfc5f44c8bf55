"""Checks of the exercises on batches.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from .verdict import Mistakes, Student, ask, compare, demand, each, expect, known, normal, pair, refuse, right, tensor
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
def _batch(seed: int, samples: int, rows: int, size: int=20, classes: int=6) -> _Batch:
    """Gaussian samples; the loss is softmax cross-entropy, averaged over the batch."""
    W, bias = (normal(seed, rows, size), 0.3 * normal(seed + 1, rows))
    X, head = (normal(seed, samples, size), normal(seed + 2, classes, rows) / rows ** 0.5)
    z = (X @ W.T + bias).requires_grad_()
    loss = nn.functional.cross_entropy(z.relu() @ head.T, torch.arange(samples) % classes)
    k, = torch.autograd.grad(loss, z)
    return _Batch(W, bias, X, k)
class Lonely(Mistakes, of='batches-lonely'):

    def every_ratio_believed(*_):
        """There are mixtures among your {count} answers. Nobody has confirmed those rows: what do
        two rows that speak of the same sample have in common?"""
        raise NotImplementedError

    def mean_of_all_rows(*_):
        """That is the mean over rows. Rows that agree must be found before anything is averaged."""
        raise NotImplementedError

    def one_for_every_row(*_):
        """You name a sample once for every row that speaks of it; name it once."""
        raise NotImplementedError

    def dead_rows_divided(*_):
        """Some rows are dead: their gradient is zero, and so is what you divide by."""
        raise NotImplementedError

    def gradient_rows_for_ratios(*_):
        """A row's direction is right here, and its length is not: divide each row by its own entry
        of the bias gradient."""
        raise NotImplementedError

    def first_pair_only(*_):
        """You named {found} of {count} samples. Rows of one sample agree up to rounding: did you
        ask for equality, or stop at the first pair?"""
        raise NotImplementedError
def check_lonely(lonely: Student, seed: int=5, samples: int=4, rows: int=60) -> None:
    """Check: the samples that rows confirm to each other."""
    batch = _batch(seed, samples, rows)
    batch.k[:, ::11] = 0.0
    answer = tensor(ask(lonely, batch.G, batch.b), 'your answer')
    matrix = 'Return one matrix, a row for each sample: torch.stack makes one of a list.'
    demand(answer.ndim == 2 and answer.shape[1] == batch.X.shape[1], matrix)
    demand(answer.isfinite().all(), Lonely.dead_rows_divided)
    alone = (batch.k != 0).sum(0) == 1
    owners = batch.k.abs().argmax(0)[alone].bincount(minlength=samples)
    certain = batch.X[owners > 1]
    exact = _gaps(answer, certain) < 1e-06
    mixed = (_turns(answer, certain) > 1e-06).all(1).any()
    demand(mixed or exact.any(1).all(), Lonely.gradient_rows_for_ratios)
    demand(len(answer) != 1 or exact.any(), Lonely.mean_of_all_rows)
    demand(exact.any(1).all(), Lonely.every_ratio_believed, count=len(answer))
    found = int(exact.any(0).sum())
    demand(found == len(certain), Lonely.first_pair_only, found=found, count=len(certain))
    demand(len(answer) == found, Lonely.one_for_every_row)
    right(f'{found} samples of {samples}, each confirmed by rows that agree, and no truth needed.')
def _gaps(found: Tensor, true: Tensor) -> Tensor:
    exact = 'donot_use_mm_for_euclid_dist'
    return torch.cdist(found, true, compute_mode=exact) / true.norm(dim=1)
def _turns(found: Tensor, true: Tensor) -> Tensor:
    """How far directions are apart, whichever way they point."""
    a, b = (nn.functional.normalize(found), nn.functional.normalize(true))
    return torch.minimum(_gaps(a, b), _gaps(-a, b))
class Apart(Mistakes, of='batches-apart'):

    def last_column_not_used(*_):
        """These are the samples up to a factor each: a direction has no length. Which column of the
        matrix tells how long it must be?"""
        raise NotImplementedError

    def every_draw_believed(*_):
        """Mixtures: of your {samples} answers {wrong} are no samples. A draw is only a guess;
        which mark, that it was not asked for, does one leave that has hit?"""
        raise NotImplementedError

    def one_direction_twice(*_):
        """The same sample comes more than once. Different draws hit the same direction: keep one
        only if it is independent of those that you have."""
        raise NotImplementedError

    def singular_vectors_for_samples(*_):
        """Singular vectors span the same space as the samples and are not the samples; turning
        them is the whole exercise."""
        raise NotImplementedError

    def one_column_for_each_sample(*_):
        """Return one matrix with a row for each of the {samples} samples."""
        raise NotImplementedError
def check_apart(apart: Student, seed: int=4, samples: int=4, rows: int=80) -> None:
    """Check: all samples of a batch, by draws."""
    batch = _batch(seed, samples, rows)
    whole = torch.cat([batch.G, batch.b[:, None]], 1)
    g = torch.Generator().manual_seed(seed)
    draws = torch.rand(400, rows, generator=g).topk(samples - 1).indices
    answer = tensor(ask(apart, whole, samples, draws), 'your answer')
    demand(answer.shape == batch.X.shape, Apart.one_column_for_each_sample, samples=samples)
    R = torch.linalg.svd(whole, full_matrices=False)[2][:samples, :-1]
    demand(_turns(answer, R).amin(1).max() > 1e-06, Apart.singular_vectors_for_samples)
    demand(answer.isfinite().all(), 'Your answer has entries that are NaN or infinite.')
    exact = _gaps(answer, batch.X) < 1e-06
    wrong = int((_turns(answer, batch.X).amin(1) > 1e-06).sum())
    twice = _turns(answer, answer).fill_diagonal_(1).min() < 1e-06
    demand(not twice, Apart.one_direction_twice)
    demand(wrong == 0, Apart.every_draw_believed, samples=samples, wrong=wrong)
    demand(exact.any(1).all(), Apart.last_column_not_used)
    demand(exact.any(0).all(), Apart.one_direction_twice)
    right(f'{samples} samples out of one sum. About {samples} draws in {2 ** (samples - 1)} hit; at 24 samples it is 24 in 8 million, and walking down beats drawing.')
from .recorded import recorded

check_shares = recorded("check_shares")
check_counted = recorded("check_counted")
check_largest_batch = recorded("check_largest_batch")
check_believe = recorded("check_believe")

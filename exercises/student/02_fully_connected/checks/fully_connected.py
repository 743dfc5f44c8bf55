"""Checks of the exercises on fully connected networks.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import torch
from torch import Tensor
import gradinv_edu as gi
from .verdict import AUTOGRAD, Mistakes, Student, ask, compare, demand, distance, each, expect, known, pair, refuse, right, tensor, told
def _layer(seed: int, outputs: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, pixels, generator=g, dtype=torch.float64) / pixels ** 0.5
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    return (W, b, torch.rand(pixels, generator=g, dtype=torch.float64))
class Combine(Mistakes, of='fully_connected-combine'):

    def mean_of_living_rows(*_):
        """You averaged the rows' answers. A row with a tiny k divides its noise by almost nothing,
        and the plain mean gives it a vote like any other."""
        raise NotImplementedError

    def mean_of_all_rows(*_):
        """A neuron whose output gradient is zero made your answer NaN: 0 / 0. One silent row must
        not spoil what the others say."""
        raise NotImplementedError

    def sum_for_mean(*_):
        """You added all rows, and divided by the sum of all k. The k have both signs: where they
        nearly cancel, you divide by almost nothing."""
        raise NotImplementedError

    def division_by_the_smallest_bias_gradient(*_):
        """You divided by the smallest bias gradient. The noise is the same in every row: which k
        makes it matter least?"""
        raise NotImplementedError

    def division_by_the_lowest_bias_gradient(*_):
        """Like division_by_the_smallest_bias_gradient."""
        raise NotImplementedError

    def loudest_row_alone(*_):
        """That is one row alone, the loudest. It is a good one, but the others know something
        too."""
        raise NotImplementedError

    def least_squares(*_):
        """Least squares takes k for exact, but k is as noisy as the weight gradient: the |k|² below
        is then too long and the picture too dark. Treat both alike."""
        raise NotImplementedError

    def singular_vector(*_):
        """The direction is right, and its length is that of a singular vector: 1. Which entry
        fixes it?"""
        raise NotImplementedError

    def singular_vector_of_the_weights(*_):
        """Like singular_vector."""
        raise NotImplementedError
def check_combine(combine: Student, seed: int=2, outputs: int=12, pixels: int=30) -> None:
    """Check: the best picture out of all rows under noise."""
    g = torch.Generator().manual_seed(seed)
    errors = []
    for sigma in (0.0, *[0.15] * 15):
        k = torch.randn(outputs, generator=g, dtype=torch.float64)
        k[0], k[1] = (0.0 if sigma == 0 else k[0], 0.02)
        x = torch.rand(pixels, generator=g, dtype=torch.float64)
        noise = sigma * torch.randn(outputs, pixels + 1, generator=g, dtype=torch.float64)
        G, k = (torch.outer(k, x) + noise[:, :-1], k + noise[:, -1])
        answer = tensor(ask(combine, G, k, case=f'for noise of {sigma:g}'), 'combine(...)')
        demand(answer.isfinite().all() or sigma, Combine.mean_of_all_rows)
        for hint, wrong in known('fully_connected-combine', (G, k)) if sigma else ():
            demand(min((distance(s * answer, wrong) for s in (1, -1))) > 1e-09, hint)
        demand(answer.shape == x.shape, f'A picture has shape {tuple(x.shape)}.')
        best = gi.fully_connected.recover_input(G, k)
        errors.append([gi.metrics.relative_error(p, x) for p in (answer, best)])
    demand(errors[0][0] < 1e-09, 'Even without noise your answer is not the picture.')
    theirs, ours = torch.tensor(errors).T.mean(1).tolist()
    demand(theirs <= 1.05 * ours, f'Over fifteen draws of noise your answer is wrong by {theirs:.0%} on average; the best combination of the chapter by {ours:.0%}.')
    right('All rows have a say, each as loud as it deserves.')
class Twin(Mistakes, of='fully_connected-twin'):

    def the_picture_itself(*_):
        """That is the same picture again. Its twin is another one."""
        raise NotImplementedError

    def mirrored_picture(*_):
        """The mirrored picture has a negative margin: for label 1 that is a wrong prediction, and
        a wrong prediction has one root only. (It would do for label 0.)"""
        raise NotImplementedError

    def moved_sideways(*_):
        """Your twin has the same margin, and so the same k; but the gradient is k *times the
        picture*. So in which direction must the twin lie?"""
        raise NotImplementedError

    def twice_as_bright(*_):
        """The twin lies in the right direction, but its gradient is {factor:.3g} times the
        client's. Both k and the picture change with the length: their product must not."""
        raise NotImplementedError

    def margin_for_picture(*_):
        """… A picture has shape …"""
        raise NotImplementedError
def check_twin(twin: Student, seed: int=4, pixels: int=10) -> None:
    """Check: another picture with the very same gradient, under the logistic loss."""
    W, _, x = _layer(seed, 1, pixels)
    for margin in (2.5, 0.5, 4.0):
        w = W[0] * (margin / (W[0] @ x))
        answer = tensor(ask(twin, w, x, case=f'for margin {margin:g}'), 'twin(...)')
        demand(answer.shape == x.shape, f'A picture has shape {tuple(x.shape)}.')
        demand(distance(answer, x) > 1e-06, Twin.the_picture_itself)
        demand(distance(answer, -x) > 1e-06, Twin.mirrored_picture)
        demand(abs(float(w @ answer) - margin) > 1e-06, Twin.moved_sideways)
        ours, theirs = (-(-(w @ p)).sigmoid() * p for p in (x, answer))
        if distance(theirs, ours) > 1e-06:
            factor = float(theirs @ ours / (ours @ ours))
            demand(distance(theirs / factor, ours) > 1e-06, Twin.twice_as_bright, factor=factor)
            refuse("The twin's gradient points elsewhere: it is k times the picture, so is the twin.")
    right('Two pictures, one gradient: nobody can tell which of them was sent.')
from .recorded import recorded

check_dense_gradients = recorded("check_dense_gradients")
check_recover_without_bias = recorded("check_recover_without_bias")
check_what_leaks = recorded("check_what_leaks")

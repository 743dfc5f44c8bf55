"""Checks of the exercises on rank.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, demand, expect, known, normal, pair, refuse, right, tensor
class SameTwice(Mistakes, of='rank-twice'):

    def each_at_its_own_filter(*_):
        """Your numbers stand at the wrong filter. A combination of the weight constraints of one
        filter must be zero at the outputs of all others."""
        raise NotImplementedError

    def filters_exchanged(*_):
        """You exchanged the two filters of the pair: which one's outputs are combined, and which
        one's k do the combining?"""
        raise NotImplementedError

    def one_filter_alone(*_):
        """That holds for the pair of a filter with itself only: two different filters take part
        here, one with its weights, the other with its k."""
        raise NotImplementedError

    def the_other_filter_alone(*_):
        """Like one_filter_alone."""
        raise NotImplementedError

    def kernel_turned(*_):
        """The gradient side has the kernel turned: the weight that reads pixel p + u stands at
        place u."""
        raise NotImplementedError

    def one_side_moved_over(*_):
        """Both sides agree up to their sign."""
        raise NotImplementedError

    def nothing_equals_nothing(*_):
        """Both of yours are zero, and 0 = 0 for every layer; find combinations that are not."""
        raise NotImplementedError
def check_same_twice(same_twice: Student, seed: int=1, channels: int=2, size: int=6) -> None:
    """Check: one equation that is in both sets."""
    W, k = (normal(seed, 3, channels, 3, 3), normal(seed + 1, 3, size - 2, size - 2))
    pictures = normal(seed + 2, 3, channels, size, size)
    patches = pictures.unfold(2, 3, 1).unfold(3, 3, 1)
    for f, other in ((0, 2), (1, 0), (1, 1)):
        given, case = ((W, k, f, other), f'for the filters {f} and {other}')
        both = pair(ask(same_twice, *given, case=case), 'same_twice(...)')
        outputs, weights = (tensor(both[0], 'the first'), tensor(both[1], 'the second'))
        demand(outputs.shape == k.shape and weights.shape == W.shape, f'The first must have the shape of k, {tuple(k.shape)}, the second that of the weight, {tuple(W.shape)}.')
        for hint, wrong in known('rank-twice', given) if f != other else ():
            demand(not (torch.equal(outputs, wrong[0]) and torch.equal(weights, wrong[1])), hint)
        one = (conv2d(pictures, W) * outputs).sum((1, 2, 3))
        two = torch.einsum('fcuv,fij,ncijuv->n', weights, k, patches)
        demand(one.abs().sum() + two.abs().sum() > 1e-09, SameTwice.nothing_equals_nothing)
        demand(not torch.allclose(one, -two), SameTwice.one_side_moved_over)
        demand(torch.allclose(one, two, rtol=1e-09), f'For a random picture the two sides are {float(one[0]):.3g} and {float(two[0]):.3g}. Write both as sums over positions, channels and places of the kernel: they are one sum in two orders.')
    every = [same_twice(W, k, f, other)[0].flatten() for f in range(3) for other in range(3)]
    demand(int(torch.linalg.matrix_rank(torch.stack(every))) == 9, 'Your combinations for all pairs of filters are not independent of each other: they must use the k of the first filter, and the weights of the second, and nothing else.')
    right('For every pair of filters one equation is in both sets: F² of them say nothing new.')
class Law(Mistakes, of='rank-law'):

    def more_rank_than_unknowns(*_):
        """{size}: you say that rank is {answer}, and there are only {unknowns} unknowns."""
        raise NotImplementedError

    def pairs_of_filters_forgotten(*_):
        """{size}: you counted {answer}, and some of these equations are in both sets (exercise
        7.1). How many?"""
        raise NotImplementedError

    def gradient_rows_counted(*_):
        """{size}: you counted {answer}. With this stride some gradient constraints meet the same
        few pixels only, and more rows than pixels cannot be independent."""
        raise NotImplementedError

    def all_rows_counted(*_):
        """Like pairs_of_filters_forgotten."""
        raise NotImplementedError

    def weight_constraints_alone(*_):
        """{size}: you counted the weight constraints alone, and there is a second set."""
        raise NotImplementedError

    def channels_share_their_pixels(*_):
        """{size}: you let the channels share their pixels. A gradient constraint stays within one
        channel, so that each channel has its own classes."""
        raise NotImplementedError

    def division_that_makes_a_float(*_):
        """Return one whole number; yours is a {kind}."""
        raise NotImplementedError
def check_law(law: Student, seed: int=2) -> None:
    """Check: the rank law of a convolution."""
    sizes = [(3, 8, 2, 3, 1), (8, 9, 8, 3, 2), (2, 9, 6, 3, 2), (2, 8, 20, 3, 1)]
    g = torch.Generator().manual_seed(seed)
    while len(sizes) < 24:
        channels, filters, kernel, stride, steps = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 4), (1, 7), (2, 5), (1, 4), (3, 6)))
        if kernel >= stride:
            sizes.append((channels, (steps - 1) * stride + kernel, filters, kernel, stride))
    for size in sizes:
        channels, pixels, filters, kernel, stride = size
        conv = nn.Conv2d(channels, filters, kernel, stride, bias=False)
        true = gi.rank.rank_law(conv, (channels, pixels, pixels)).rank
        case = f'ith {channels} channels of {pixels}×{pixels}, {filters} filters of {kernel}×'
        case += f'{kernel} and stride {stride}'
        answer = ask(law, *size, case=f'w{case}')
        whole = isinstance(answer, int)
        demand(whole, Law.division_that_makes_a_float, kind=type(answer).__name__)
        if answer != true:
            facts = {'size': f'W{case}', 'answer': answer, 'unknowns': channels * pixels ** 2}
            demand(answer <= facts['unknowns'], Law.more_rank_than_unknowns, **facts)
            for hint, wrong in known('rank-law', size):
                demand(answer != wrong, hint, **facts)
            other = "{size}: {answer} is not the rank. Go through the law's three terms one by one."
            refuse(other, **facts)
    right('Three terms and a minimum, and no matrix was formed.')
class Misjudged(Mistakes, of='rank-misjudged'):

    def the_other_order(*_):
        """Return two networks (nn.Module): the talkative one and the silent one, in this order."""
        raise NotImplementedError

    def as_small_as_a_dense_layer(*_):
        """The talkative network has {count} parameters; make do with 100. How wide must a first
        dense layer be for its ratio to be the picture?"""
        raise NotImplementedError

    def silent_because_it_is_small(*_):
        """The silent network has {count} parameters; let it have 5000 at least."""
        raise NotImplementedError

    def small_and_pooled(*_):
        """The talkative network's gradient determines {rank} of 64 directions only: some of the
        picture is lost before it is looked at."""
        raise NotImplementedError

    def dead_by_its_biases(*_):
        """With weights drawn anew the silent network's gradient determines {rank} of 64
        directions. Its layers must do it, not its numbers; what comes first sets the limit."""
        raise NotImplementedError
def check_misjudged(misjudged: Student, seed: int=4) -> None:
    """Check: two networks whose numbers of parameters mislead."""
    nets = pair(ask(misjudged), 'misjudged()')
    demand(all((isinstance(net, nn.Module) for net in nets)), Misjudged.the_other_order)
    few, many = (sum((p.numel() for p in net.parameters())) for net in nets)
    for which, net in zip(('talkative', 'silent'), nets, strict=True):
        _demand_it_runs(which, net, seed)
    demand(few <= 100 or many > 100, Misjudged.the_other_order)
    demand(few <= 100, Misjudged.as_small_as_a_dense_layer, count=few)
    demand(many >= 5000, Misjudged.silent_because_it_is_small, count=many)
    first, second = (gi.rank.jacobian_rank(net, (1, 8, 8)).rank for net in nets)
    demand(first == 64, Misjudged.small_and_pooled, rank=first)
    demand(second <= 16, Misjudged.dead_by_its_biases, rank=second)
    right(f'{few} parameters give everything, {many} a quarter of it at most ({second} of 64).')
def _demand_it_runs(which: str, net: nn.Module, seed: int) -> None:
    """Draw the weights anew, and try the network on a picture."""
    net.double().eval()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            size = parameter[0].numel() if parameter.ndim > 1 else 4.0
            parameter.copy_(normal(seed + place, *parameter.shape) / size ** 0.5)
        try:
            shape = tuple(net(normal(seed, 1, 1, 8, 8)).shape)
        except (RuntimeError, TypeError, ValueError) as error:
            shape = (str(error).splitlines()[0],)
    takes = f'The {which} network does not take pictures (1, 8, 8) to ten classes: it gives {shape}'
    demand(shape == (1, 10), takes)
from .recorded import recorded

check_share = recorded("check_share")
check_verdict = recorded("check_verdict")

"""Checks of the exercises on defense by dropout.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import math
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, compare, demand, expect, known, normal, pair, right, tensor
LOSS, LABEL = (nn.CrossEntropyLoss(), torch.tensor([3]))
class Protecting(Mistakes, of='dropout-protecting'):

    def exchanged(*_):
        """The first is a number of filters, a whole number, at least 1; the second a rate."""
        raise NotImplementedError

    def rate_too_high(*_):
        """The rate may be one half at most; yours is {rate}."""
        raise NotImplementedError

    def narrow_in_any_case(*_):
        """With {filters} filters the layer hides part of the picture without any dropout: it is
        not the dropout that protects."""
        raise NotImplementedError

    def rate_too_low(*_):
        """{filters} filters at rate {rate} leave about {count:.0f} equations that are news, for
        192 pixels: dropout takes rows that the layer can spare."""
        raise NotImplementedError

    def one_filter_too_many(*_):
        """Like rate_too_low."""
        raise NotImplementedError
def check_protecting(protecting: Student, seed: int=4) -> None:
    """Check: a layer that gives a picture away without dropout, and keeps it with."""
    filters, rate = pair(ask(protecting), 'protecting()')
    numbers = isinstance(filters, int | float) and isinstance(rate, int | float)
    demand(numbers, 'Return two numbers, the filters and the rate: `return filters, rate`.')
    demand(filters == int(filters) and filters >= 1 and (0 < rate < 1), Protecting.exchanged)
    filters = int(filters)
    facts = {'filters': filters, 'rate': rate, 'count': filters * (64 * (1 - rate) + 27 - 1)}
    demand(rate <= 0.5, Protecting.rate_too_high, **facts)
    bound = gi.design.filter_bound(3, 8, 3, padding=1)
    demand(filters > bound, Protecting.narrow_in_any_case, **facts)
    bound = gi.design.filter_bound(3, 8, 3, padding=1, rate=rate)
    demand(filters <= bound, Protecting.rate_too_low, **facts)
    exact = sum((_determined(filters, rate, seed + number) for number in range(3)))
    demand(exact == 0, f'The count at {filters} filters and rate {rate} is so near to the pixels that {exact} of 3 masks left full rank. Leave chance less room.')
    demand(_determined(filters, 0.0, seed), Protecting.narrow_in_any_case, **facts)
    right(f'{filters} filters: exact without dropout, never with. One filter more, and it is exact with dropout too.')
def _determined(filters: int, rate: float, seed: int) -> bool:
    """Whether what is left of the layer's equations has full rank."""
    conv, head = (nn.Conv2d(3, filters, 3, padding=1), nn.Linear(64 * filters, 10))
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(seed + 7 * number, *p.shape) / 10)
    kept = torch.rand(64 * filters, generator=torch.Generator().manual_seed(seed)) >= rate
    z = conv(gi.data.photo('rocket', 8, dtype=torch.float64)).detach().requires_grad_()
    k, = torch.autograd.grad(LOSS(head(model[1:3](z) * kept), LABEL), z)
    matrix = gi.systems.LayerSystem(conv, k, (3, 8, 8)).to_dense()
    left = torch.cat([kept, kept.new_ones(len(matrix) - len(kept))])
    return int(torch.linalg.matrix_rank(matrix[left])) == 192
from .recorded import recorded

check_features = recorded("check_features")
check_mismatch = recorded("check_mismatch")
check_leave_out = recorded("check_leave_out")
check_safe_rounds = recorded("check_safe_rounds")

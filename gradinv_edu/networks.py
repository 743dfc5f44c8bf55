r"""Networks people use: blind convolutions, residual edges, the places of max pooling.

:func:`~gradinv_edu.recursion.recover` takes these turns by itself, where a network as torchvision
builds it has no dense layer that gives its input away: below an average over all positions a
convolution is read *blind*, values and gradients travel along the edges of a residual block, and
max pooling is undone by a search that is then verified.
"""

from .engine.blind import Blind
from .engine.blind import possible as may_be_blind
from .engine.blind import solve as blind
from .engine.edges import Edges
from .engine.kinks import told_by_sums
from .engine.unpool import Unpooled
from .engine.unpool import solve as unpool
from .engine.winners import Winners, find_winners, windows

__all__ = [
    "Blind",
    "Edges",
    "Unpooled",
    "Winners",
    "blind",
    "find_winners",
    "may_be_blind",
    "told_by_sums",
    "unpool",
    "windows",
]

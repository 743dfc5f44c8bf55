r"""Several layers as one unknown: deficient layers, kinks, the whole gradient, residual blocks.

:func:`~gradinv_edu.recursion.recover` turns to these where one layer alone is not enough.
"""

from .engine.block import BlockSystem, two_systems
from .engine.block import solve as solve_block
from .engine.kinks import misread, settle
from .engine.polish import polish
from .engine.segment import solve as solve_segment

__all__ = [
    "BlockSystem",
    "misread",
    "polish",
    "settle",
    "solve_block",
    "solve_segment",
    "two_systems",
]

"""What gradients reveal: analytic gradient inversion, one module per chapter of the book.

Submodules and the names below are loaded when they are first used, so that importing the
package costs next to nothing beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .kit import __all__ as _KIT

if TYPE_CHECKING:
    from . import (
        batches,
        checks,
        cli,
        compression,
        convolution,
        design,
        dropout,
        engine,
        errors,
        federation,
        fully_connected,
        kit,
        labels,
        networks,
        noise,
        optimization,
        perceptron,
        privacy,
        pruning,
        rank,
        recursion,
        schedule,
        scoreboard,
        segments,
        sharing,
        systems,
        tokens,
        update,
    )
    from .kit import (
        data,
        language,
        layer_drawings,
        metrics,
        models,
        plotting,
        quiz,
        report,
        schematics,
        widgets,
    )
    from .rank import Audit, audit
    from .recursion import Recovery, recover
    from .sharing import observe
    from .update import Update

__version__ = "0.1.0"

_HOMES = {
    "Audit": "rank",
    "audit": "rank",
    "Update": "update",
    "observe": "sharing",
    "Recovery": "recursion",
    "recover": "recursion",
}

__all__ = [
    "Audit",
    "Recovery",
    "Update",
    "audit",
    "batches",
    "checks",
    "cli",
    "compression",
    "convolution",
    "data",
    "design",
    "dropout",
    "engine",
    "errors",
    "federation",
    "fully_connected",
    "kit",
    "labels",
    "language",
    "layer_drawings",
    "metrics",
    "models",
    "networks",
    "noise",
    "observe",
    "optimization",
    "perceptron",
    "plotting",
    "privacy",
    "pruning",
    "quiz",
    "rank",
    "recover",
    "recursion",
    "report",
    "schedule",
    "schematics",
    "scoreboard",
    "segments",
    "sharing",
    "systems",
    "tokens",
    "update",
    "widgets",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    else:
        value = import_module(f".kit.{name}" if name in _KIT else f".{name}", __name__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

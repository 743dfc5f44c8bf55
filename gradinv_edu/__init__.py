"""What gradients reveal: analytic gradient inversion, one module per chapter of the book.

Submodules and the names below are loaded when they are first used, so that importing the
package costs next to nothing beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        activations,
        batches,
        chain,
        checks,
        cli,
        convolution,
        coursework,
        data,
        defenses,
        errors,
        exported,
        federation,
        fully_connected,
        grade,
        joint,
        kinks,
        krylov,
        metrics,
        models,
        optimization,
        perceptron,
        plotting,
        polish,
        rank,
        recursion,
        residual,
        scoreboard,
        sharing,
        sparse,
        systems,
        widgets,
    )
    from .rank import Audit, audit
    from .recursion import Recovery, recover
    from .sharing import Update, observe

__version__ = "0.1.0"

_HOMES = {
    "Audit": "rank",
    "audit": "rank",
    "Update": "sharing",
    "observe": "sharing",
    "Recovery": "recursion",
    "recover": "recursion",
}

__all__ = [
    "Audit",
    "Recovery",
    "Update",
    "activations",
    "audit",
    "batches",
    "chain",
    "checks",
    "cli",
    "convolution",
    "coursework",
    "data",
    "defenses",
    "errors",
    "exported",
    "federation",
    "fully_connected",
    "grade",
    "joint",
    "kinks",
    "krylov",
    "metrics",
    "models",
    "observe",
    "optimization",
    "perceptron",
    "plotting",
    "polish",
    "rank",
    "recover",
    "recursion",
    "residual",
    "scoreboard",
    "sharing",
    "sparse",
    "systems",
    "widgets",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name)
    value = getattr(import_module(f".{home}", __name__), name) if home else _module(name)
    globals()[name] = value
    return value


def _module(name: str) -> object:
    return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

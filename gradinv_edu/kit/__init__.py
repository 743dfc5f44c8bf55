"""What every chapter uses and none is about: pictures, networks, measures, figures, widgets."""

from __future__ import annotations

from importlib import import_module

__all__ = [
    "data",
    "language",
    "layer_drawings",
    "metrics",
    "models",
    "plotting",
    "quiz",
    "report",
    "schematics",
    "widgets",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)

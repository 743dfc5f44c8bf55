"""Scripts of the book, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BOOK = Path(__file__).parents[1] / "book"


def load(name: str) -> ModuleType:
    """``book/NAME.py``."""
    spec = importlib.util.spec_from_file_location(Path(name).name, BOOK / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

"""Files written whole or not at all, whenever the process may be killed."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside, then exchange it for the old one; OSError as the system gives it.

    Text is UTF-8. A device or a pipe is written as it is.
    """
    path = Path(os.path.realpath(path))
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        if path.exists():
            part.chmod(path.stat().st_mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

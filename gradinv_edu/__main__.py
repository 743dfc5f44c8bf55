"""``python -m gradinv_edu``, and what ``gradinv`` runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; Ctrl-C ends it quietly while torch is still loading, too."""
    try:
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The verdict on a wrong answer; apart from the checks, so that it costs no import of torch."""

from __future__ import annotations


class WrongAnswerError(AssertionError):
    """An answer is wrong; the message says in which way, and does not give the right one."""

    def _render_traceback_(self) -> list[str]:
        """Show one sentence in a notebook, not a page of the check's own code."""
        return [f"Not right yet. {self}"]

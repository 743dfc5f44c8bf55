"""Checks of the exercises to chapter 9, tokens.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from .recorded import recorded

check_read_patches = recorded("check_read_patches")
check_distances = recorded("check_distances")
check_rounds_needed = recorded("check_rounds_needed")
check_readable = recorded("check_readable")

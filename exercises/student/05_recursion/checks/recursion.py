"""Checks of the exercises on recursion.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from .recorded import recorded

check_step_down = recorded("check_step_down")
check_walk = recorded("check_walk")
check_may_trust = recorded("check_may_trust")

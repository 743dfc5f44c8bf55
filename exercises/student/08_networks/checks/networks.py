"""Checks of the exercises on networks.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from .recorded import recorded

check_channels = recorded("check_channels")
check_reach = recorded("check_reach")
check_turned = recorded("check_turned")

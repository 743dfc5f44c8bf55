"""One file a kind of layer: its rule, all of it, in one place."""

from . import (
    activations,
    branches,
    convolution,
    dense,
    dropout,
    norms,
    pooling,
    resampling,
    reshaping,
    transposed,
    two_to_one,
)
from .base import RULES, Affine, ModuleOperator, Rule, Undone, pack, pull_back, rule_for, rule_of
from .base import weight_names as weight_names

__all__ = [
    "RULES",
    "Affine",
    "ModuleOperator",
    "Rule",
    "Undone",
    "activations",
    "branches",
    "convolution",
    "dense",
    "dropout",
    "norms",
    "pack",
    "pooling",
    "pull_back",
    "resampling",
    "reshaping",
    "rule_for",
    "rule_of",
    "transposed",
    "two_to_one",
    "weight_names",
]

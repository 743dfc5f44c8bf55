"""One file a kind of layer: its rule, all of it, in one place."""

from . import activations, branches, convolution, dense, dropout, norms, pooling, reshaping
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
    "reshaping",
    "rule_for",
    "rule_of",
    "weight_names",
]

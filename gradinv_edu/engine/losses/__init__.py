"""One class a loss: what its equations say of the last layer's input, k and target."""

from .cross_entropy import CrossEntropy, count_labels, recover_from_cross_entropy
from .logistic import Logistic, recover_from_logistic
from .registry import RULES, Head, Rule, register, rule
from .softmax_batch import GUESSES, SoftmaxEquations, possible_labels, recover_outputs
from .squared_error import SquaredError

__all__ = [
    "GUESSES",
    "RULES",
    "CrossEntropy",
    "Head",
    "Logistic",
    "Rule",
    "SoftmaxEquations",
    "SquaredError",
    "count_labels",
    "possible_labels",
    "recover_from_cross_entropy",
    "recover_from_logistic",
    "recover_outputs",
    "register",
    "rule",
]

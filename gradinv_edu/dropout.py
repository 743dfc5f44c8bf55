r"""Dropout as a defense: a random mask before the classifier."""

from __future__ import annotations

import copy

from torch import nn

from . import checks
from .checks import checked
from .errors import UnsupportedLayerError

__all__ = ["classifier", "recovery_chance", "with_dropout"]


@checked
def with_dropout(model: nn.Sequential, rate: float) -> nn.Sequential:
    r""":math:`a \leftarrow M \odot a / (1 - p_\text{drop})`, :math:`M_i` one unless it is dropped.

    A copy of the model with a dropout layer between encoder and classifier, its last dense layer.
    Implements :eq:`dropout-layer`.

    Parameters
    ----------
    model : torch.nn.Sequential
        With a dense layer.
    rate : float
        :math:`p_\text{drop}`, the probability with which training mode drops a unit, in [0, 1).

    Returns
    -------
    torch.nn.Sequential
        A copy, in the same mode and with equal weights; later layers count one more.

    Raises
    ------
    InvalidArgumentError
        If ``rate`` is not in [0, 1).
    UnsupportedLayerError
        If the model is not sequential or has no dense layer.

    Notes
    -----
    Source: Zheng (2021).
    """
    checks.number(rate, "rate", "in [0, 1)", lambda p: 0 <= p < 1)
    place = classifier(model)
    layers = list(copy.deepcopy(model))
    return nn.Sequential(*layers[:place], nn.Dropout(rate), *layers[place:]).train(model.training)


@checked
def classifier(model: nn.Module) -> int:
    """Place of a sequential model's classifier, its last dense layer.

    Parameters
    ----------
    model : torch.nn.Sequential
        To look through.

    Returns
    -------
    int
        ``model[place]`` is a ``torch.nn.Linear``.

    Raises
    ------
    UnsupportedLayerError
        If the model is not sequential or has no dense layer.
    """
    if not isinstance(model, nn.Sequential):
        raise UnsupportedLayerError(
            f"The model is a {type(model).__name__}; this needs an nn.Sequential, whose layers "
            "can be told apart."
        )
    places = [place for place, layer in enumerate(model) if isinstance(layer, nn.Linear)]
    if not places:
        raise UnsupportedLayerError("The model has no dense layer, so no classifier.")
    return places[-1]


def recovery_chance(
    filters: int, channels: int, size: int, kernel: int, rate: float, *,
    stride: int = 1, padding: int = 0,
) -> float:  # fmt: skip
    r""":math:`\Pr[|M| \ge n - C' C F^2 + C'],\; |M| \sim \text{Bin}(C' P, 1 - p_\text{drop})`.

    The chance that a mask leaves enough features for one convolution below it: :math:`|M|` of its
    :math:`C' P` outputs are kept, its gradient gives :math:`C' C F^2` equations, and :math:`C'`
    depend on others. Implements :eq:`dropout-chance`.

    Parameters
    ----------
    filters, kernel, stride, padding : int
        Of the convolution: :math:`C'`, :math:`F` and the rest.
    channels, size : int
        Of the square picture: :math:`C`, and :math:`n = C \cdot \text{size}^2`.
    rate : float
        :math:`p_\text{drop}`, in (0, 1).

    Raises
    ------
    InvalidArgumentError
        If a number is impossible.
    """
    from scipy.stats import binom

    wholes = ((filters, "filters"), (channels, "channels"), (size, "size"), (kernel, "kernel"))
    for value, name in (*wholes, (stride, "stride")):
        checks.whole(value, name)
    checks.whole(padding, "padding", 0)
    checks.number(rate, "rate", "in (0, 1)", lambda p: 0 < p < 1)
    positions = ((size + 2 * padding - kernel) // stride + 1) ** 2
    needed = channels * size**2 - filters * channels * kernel**2 + filters
    return float(binom.sf(needed - 1, filters * positions, 1 - rate))

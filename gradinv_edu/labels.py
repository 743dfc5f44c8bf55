r"""Labels first: what the last layer's gradient tells of them."""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn

from . import checks, fully_connected, schedule
from .checks import checked
from .errors import GradientInversionError, InvalidArgumentError, UnsupportedLayerError
from .sharing import Loss, Update

__all__ = ["recover_labels"]


@checked
def recover_labels(
    model: nn.Module,
    update: Update,
    loss: Loss,
    input_shape: tuple[int, ...] | None = None,
) -> Tensor:
    r""":math:`\partial L/\partial b_c = \frac1N \sum_n p_{nc} - \frac{\#\{n : y_n = c\}}{N}`.

    Each sample pulls its own class's entry down by ``1/N``: the lowest entry is a label; give the
    pull back and look again. Implements :eq:`label-count`. Without a bias, sums over the rows of
    the weight gradient take its place, which is right where the features are not negative (iDLG's
    rule); one sample's plain gradient is handed to
    :func:`gradinv_edu.fully_connected.recover_output`, which needs no such assumption.

    Parameters
    ----------
    model : torch.nn.Module
        Its last dense layer is taken for the classifier.
    update : Update
        What one client sent.
    loss : callable
        ``CrossEntropyLoss``; for one sample's plain gradient also ``BCEWithLogitsLoss`` and
        ``MSELoss``.
    input_shape : tuple of int, optional
        Of one sample: the network's mean probabilities on random pictures then stand for those on
        the client's, which helps where the classes are not alike to an untrained network.

    Returns
    -------
    Tensor
        ``(samples,)`` classes in ascending order, or ``(1, outputs)`` for the other losses.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If update or ``input_shape`` do not fit the model; if the classifier's gradient is zero.
    UnsupportedLayerError, InvalidArgumentError
        If the classifier's gradient was not sent; if loss and update do not give labels away.

    Notes
    -----
    Sources: Zhao et al. (2020), Wainakh et al. (2022).
    """
    update.check(model)
    dense = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    name, layer = dense[-1] if dense else ("", None)
    weight, bias = (update.gradients.get(f"{name}.{p}".strip(".")) for p in ("weight", "bias"))
    if layer is None or weight is None:
        raise UnsupportedLayerError(
            "Labels are read in the gradient of the last dense layer, and none was sent: "
            "give them as targets."
        )
    checks.not_all_zero(weight if bias is None else bias, "The classifier's gradient")
    if update.samples == 1 and update.local_steps == 1 and update.optimizer == "sgd":
        with suppress(GradientInversionError):  # noisy, pruned or masked: below asks for less
            b = None if layer.bias is None else layer.bias.detach()
            found = fully_connected.recover_output(loss, layer.weight.detach(), b, weight, bias)  # type: ignore[arg-type]
            return found[0].targets
    if not isinstance(loss, nn.CrossEntropyLoss):
        raise InvalidArgumentError(
            f"No rule gives the labels of this update away under {type(loss).__name__}: "
            "give them as targets."
        )
    pulls = weight.double().sum(dim=1) if bias is None else bias.double()
    pulls = pulls / schedule.effective_steps(update)
    share = 1.0 if loss.reduction == "sum" else 1 / update.samples
    if bias is None:
        share = float(-pulls.clamp(max=0).sum()) / update.samples * (1 + 1 / len(pulls))
    elif input_shape is not None and update.samples > 1:  # one sample pulls alone
        pulls = pulls - share * update.samples * _mean_probabilities(model, input_shape)
    labels = []
    for _ in range(update.samples):
        labels.append(int(pulls.argmin()))
        pulls[labels[-1]] += share
    return torch.tensor(sorted(labels))


def _mean_probabilities(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Of a network's classes, on random pictures."""
    own = copy.deepcopy(model).eval()
    source = torch.Generator().manual_seed(0)
    noise = torch.rand((32, *input_shape), generator=source, dtype=torch.float64)
    noise = noise.to(next(own.parameters()))
    with torch.no_grad():
        with checks.fitting(f"Model and loss do not take inputs {tuple(noise.shape)}"):
            output = own(noise)
        expected: Tensor = output.double().softmax(dim=-1).mean(dim=0)
    return expected

r"""Differential privacy: clip every sample, add noise, account for it."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from . import checks
from .checks import checked
from .errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from .sharing import Update, observe

__all__ = [
    "PrivateUpdate",
    "dp_sgd",
    "gaussian_delta",
    "gaussian_sigma",
    "privacy_spent",
    "train_privately",
]


@dataclass(frozen=True)
class PrivateUpdate:
    """An update with the promise that goes with it.

    Attributes
    ----------
    update : Update
        Clipped sample by sample, summed, noised, divided by the batch size.
    epsilon, delta : float
        The (ε, δ) of all rounds together, from Opacus's accountant.
    """

    update: Update
    epsilon: float
    delta: float


@checked
def dp_sgd(
    model: nn.Module,
    loss: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    noise_multiplier: float,
    norm: float = 1.0,
    delta: float = 1e-5,
    dataset_size: int | None = None,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> PrivateUpdate:
    r""":math:`\tfrac1N (\sum_i g_i \min(1, g_{\max}/|g_i|) + \mathcal N(0, \sigma^2 g_{\max}^2))`.

    One round of DP-SGD by Opacus's own engine, on a copy of the model. Implements :eq:`dp-sgd`.

    Parameters
    ----------
    model, loss : torch.nn.Module
        What the server sent; the loss reduced to a mean or a sum.
    inputs, targets : Tensor, (N, …)
        The batch.
    noise_multiplier, norm : float
        :math:`\sigma`, in units of the second: the clipping norm :math:`g_{\max}` of one sample.
    delta : float
        :math:`\delta` for which :math:`\varepsilon` is stated.
    dataset_size : int, optional
        Samples from which the batch was drawn; ``None``: the batch is all there is.
    steps : int
        Rounds that :math:`\varepsilon` accounts for.
    generator : torch.Generator, optional
        Of the noise; ``None``: a fixed seed. A real client never fixes it.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If a number is impossible or Opacus not installed; if samples, targets, model do not fit.
    UnsupportedLayerError, UnsupportedLossError
        If Opacus has no per-sample gradient for a layer, or the loss is not one number.

    Notes
    -----
    The accountant assumes Poisson sampling: every sample joins a batch independently of the
    others. Source: Abadi et al. (2016).
    """
    _check(model, loss, inputs, targets, norm)
    population = len(inputs) if dataset_size is None else dataset_size
    checks.whole(population, "dataset_size", len(inputs))
    epsilon = privacy_spent(noise_multiplier, len(inputs) / population, steps, delta)
    client = copy.deepcopy(model).train()
    device = next(client.parameters()).device
    x, y = inputs.to(device), targets.to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus, of its fast random numbers; torch, of its hooks
        private, optimizer, _ = _engine(
            client, loss, DataLoader(TensorDataset(x, y), len(x)), generator,
            noise_multiplier=noise_multiplier, max_grad_norm=norm, poisson_sampling=False,
        )  # fmt: skip
        loss(private(x), y).backward()
        optimizer.pre_step()
    named = client.named_parameters()
    gradients = {n: p.grad.detach().clone() for n, p in named if p.grad is not None}
    return PrivateUpdate(Update(gradients, batch_size=len(x), samples=len(x)), epsilon, delta)


@checked
def privacy_spent(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float = 1e-5
) -> float:
    r""":math:`\varepsilon` of ``steps`` rounds of DP-SGD, from Opacus's Rényi accountant.

    Parameters
    ----------
    noise_multiplier : float
        :math:`\sigma`, in units of the clipping norm; without noise, ε is infinite.
    sample_rate : float
        Share of the data in a batch.
    steps : int
        Number of rounds.
    delta : float
        :math:`\delta` for which it is stated.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or Opacus is not installed.
    """
    checks.number(noise_multiplier, "noise_multiplier", "zero or more", lambda v: v >= 0)
    checks.number(sample_rate, "sample_rate", "in (0, 1]", lambda v: 0 < v <= 1)
    checks.number(delta, "delta", "between 0 and 1", lambda v: 0 < v < 1)
    checks.whole(steps, "steps")
    if noise_multiplier == 0:
        return math.inf
    accountant = _opacus("opacus.accountants").RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    orders = [1 + 10 ** (x / 40 - 5) for x in range(240)] + list(range(12, 512))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a best order at the end of the list: still a bound
        return float(accountant.get_epsilon(delta, alphas=orders))


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    r""":math:`\delta = \Phi(\tfrac1{2c} - \varepsilon c) - e^\varepsilon \Phi(-\tfrac1{2c} - \varepsilon c)`.

    :math:`c = \sigma/\Delta`: the smallest :math:`\delta` with which one answer under Gaussian
    noise is :math:`(\varepsilon, \delta)`-private, for every :math:`\varepsilon > 0`. Implements
    :eq:`gaussian-mechanism`.

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise, an entry.
    epsilon : float
        :math:`\varepsilon`.
    sensitivity : float
        :math:`\Delta`: how far apart, in norm, two neighbouring data sets can bring the answer.

    Raises
    ------
    InvalidArgumentError
        If a number is not positive.

    Notes
    -----
    Source: Balle and Wang (2018).
    """  # noqa: E501
    from scipy.special import log_ndtr

    for value, name in ((sigma, "sigma"), (epsilon, "epsilon"), (sensitivity, "sensitivity")):
        checks.number(value, name, "a positive number", lambda v: v > 0)
    half, shift = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    first, second = log_ndtr(half - shift), log_ndtr(-half - shift)
    return float(math.exp(first) - math.exp(min(epsilon + second, 0.0)))


def gaussian_sigma(epsilon: float, delta: float = 1e-5, sensitivity: float = 1.0) -> float:
    r"""The least :math:`\sigma` for which :func:`gaussian_delta` is :math:`\delta` or less.

    Parameters
    ----------
    epsilon, delta : float
        The promise wanted.
    sensitivity : float
        As for :func:`gaussian_delta`.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible.
    """
    from scipy.optimize import brentq

    checks.number(epsilon, "epsilon", "a positive number", lambda v: v > 0)
    checks.number(delta, "delta", "between 0 and 1", lambda v: 0 < v < 1)
    checks.number(sensitivity, "sensitivity", "a positive number", lambda v: v > 0)
    least, most = 1e-6, 1.0
    while gaussian_delta(most, epsilon) > delta:
        most *= 2
    return float(sensitivity * brentq(lambda s: gaussian_delta(s, epsilon) - delta, least, most))


@checked
def train_privately(
    model: nn.Module,
    loss: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    noise_multiplier: float,
    steps: int,
    norm: float = 1.0,
    batch_size: int = 50,
    learning_rate: float = 0.5,
    delta: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, float]:
    r""":math:`\theta \leftarrow \theta - \eta\,\tilde g`, :math:`\tilde g` as in :func:`dp_sgd`.

    A trained copy in evaluation mode, and the :math:`\varepsilon` of its training.

    Parameters
    ----------
    model, loss, inputs, targets, noise_multiplier, norm, delta
        As for :func:`dp_sgd`, with all data there is.
    steps, batch_size : int
        Rounds; every sample joins one with probability ``batch_size / N``.
    learning_rate : float
        :math:`\eta`.
    generator : torch.Generator, optional
        Of draws and noise; ``None``: a fixed seed.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError, UnsupportedLayerError, UnsupportedLossError
        As :func:`dp_sgd`.
    """
    _check(model, loss, inputs, targets, norm)
    checks.number(learning_rate, "learning_rate", "a positive number", lambda v: v > 0)
    checks.whole(batch_size, "batch_size")
    epsilon = privacy_spent(noise_multiplier, batch_size / len(inputs), steps, delta)
    student = copy.deepcopy(model).train()
    source = torch.Generator().manual_seed(0) if generator is None else generator
    loader = DataLoader(TensorDataset(inputs, targets), batch_size, generator=source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for one gradient
        private, optimizer, batches = _engine(
            student, loss, loader, source, learning_rate,
            noise_multiplier=noise_multiplier, max_grad_norm=norm,
        )  # fmt: skip
        for x, y in islice((batch for _ in range(steps) for batch in batches), steps):
            optimizer.zero_grad()
            loss(private(x), y).backward()
            optimizer.step()
    trained = copy.deepcopy(model)
    trained.load_state_dict(private._module.state_dict())
    return trained.eval(), epsilon


def _engine(
    model: nn.Module,
    loss: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    generator: torch.Generator | None,
    learning_rate: float = 1.0,
    **settings: Any,
) -> Any:
    """Model, optimiser and loader as Opacus's engine makes them private."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return _opacus("opacus").PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(trainable, lr=learning_rate), data_loader=loader,
        loss_reduction=getattr(loss, "reduction", "mean"),
        noise_generator=torch.Generator().manual_seed(0) if generator is None else generator,
        **settings,
    )  # fmt: skip


def _check(model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor, norm: float) -> None:
    """Refuse what Opacus would stumble over, or answer with NaN."""
    checks.number(norm, "norm", "a positive number", lambda v: v > 0)
    if getattr(loss, "reduction", "mean") not in ("mean", "sum"):
        raise UnsupportedLossError(f"{loss!r} is no one number: use reduction='mean' or 'sum'.")
    checks.as_many(inputs, targets)
    types = {p.dtype for p in model.parameters()} | {inputs.dtype}
    if len(types) > 1:
        said = ", ".join(sorted(map(str, types)))
        raise InvalidTensorError(f"Model and inputs must have one dtype; they have {said}.")
    validator = _opacus("opacus.validators").ModuleValidator
    problems = validator.validate(copy.deepcopy(model).train(), strict=False)
    if problems:
        reason = str(problems[0]).split("\n")[0]
        raise UnsupportedLayerError(f"Opacus has no per-sample gradient for this model: {reason}")
    observe(model, loss, inputs[:1], targets[:1])  # says what does not fit
    checks.finite(inputs, "inputs")


def _opacus(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InvalidArgumentError(
            "DP-SGD runs on Opacus, which is not installed: uv pip install opacus."
        ) from error

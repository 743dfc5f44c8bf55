r"""A client's schedule, imitated by a server that knows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .checks import checked
from .errors import UnsupportedLossError
from .sharing import Loss, Update, without_weight_decay

__all__ = ["average_gradient", "effective_steps", "simulated_update"]

Gradients = Mapping[str, Tensor]


@checked
def simulated_update(
    model: nn.Module, update: Update, loss: Loss, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    r""":math:`g(x') = (\theta_0 - \theta_T(x'))/\eta`: the client's steps on a guess.

    Differentiable with respect to the guess. Implements :eq:`simulated-steps`.

    Parameters
    ----------
    model : torch.nn.Module
        With the weights :math:`\theta_0`.
    update : Update
        Whose settings are followed: steps, rate, batch size, optimiser, momentum, decay.
    loss : callable
        The client's.
    inputs, targets : Tensor, (N, …)
        The guess, in the model's dtype.

    Returns
    -------
    dict of str to Tensor
        By the names of the parameters that are trainable, or were trained.

    Raises
    ------
    InvalidTensorError, UnsupportedLossError
        If the guess does not fit model and loss; if the loss is not one number.

    Notes
    -----
    Sources: Geiping et al. (2020), Dimitrov et al. (2022).
    """
    named = list(model.named_parameters())
    trained = {n for n, p in named if p.requires_grad or n in update.gradients}
    start = {n: p.detach().requires_grad_() for n, p in named if n in trained}
    frozen = {n: p.detach() for n, p in named if n not in trained}

    def pull(theta: Gradients, x: Tensor, y: Tensor) -> Gradients:
        """Gradient at ``theta`` and, if there is decay, its share of the weights."""
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        given = f"inputs {tuple(x.shape)} and targets {tuple(y.shape)}, {y.dtype}"
        with checks.fitting(f"Model and loss do not take {given}"):
            value = loss(functional_call(model, {**theta, **frozen, **buffers}, (x,)), y)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise UnsupportedLossError(
                "The loss must be one number that depends on the output: use reduction='mean' or "
                "'sum'."
            )
        found = torch.autograd.grad(
            value.sum(), list(theta.values()),
            create_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        decay = update.weight_decay
        return {n: g + decay * theta[n] if decay else g for n, g in zip(theta, found, strict=True)}

    if update.learning_rate is None:
        return dict(pull(start, inputs, targets))
    size = min(update.batch_size or len(inputs), len(inputs))
    theta: Gradients = start
    move = _Adam() if update.optimizer == "adam" else _Momentum(update.momentum)
    for step in range(update.local_steps):
        places = (torch.arange(size, device=inputs.device) + step * size) % len(inputs)
        direction = move(pull(theta, inputs[places], targets[places]))
        theta = {n: theta[n] - update.learning_rate * direction[n] for n in theta}
    return {n: (start[n] - theta[n]) / update.learning_rate for n in theta}


class _Momentum:
    """SGD's direction. ``torch.optim`` steps in place, where no second derivative goes through."""

    def __init__(self, mu: float) -> None:
        self.mu, self.velocity = mu, dict[str, Tensor]()

    def __call__(self, pull: Gradients) -> Gradients:
        v = self.velocity
        self.velocity = {n: self.mu * v[n] + g if n in v else g for n, g in pull.items()}
        return self.velocity


class _Adam:
    """Adam's direction, with the default constants of ``torch.optim``."""

    def __init__(self) -> None:
        self.step, self.mean, self.square = 0, dict[str, Tensor](), dict[str, Tensor]()

    def __call__(self, pull: Gradients) -> Gradients:
        self.step += 1
        one, two = 1 - 0.9**self.step, 1 - 0.999**self.step
        m, s = self.mean, self.square
        self.mean = {n: 0.9 * m.get(n, torch.zeros_like(g)) + 0.1 * g for n, g in pull.items()}
        self.square = {
            n: 0.999 * s.get(n, torch.zeros_like(g)) + 0.001 * g**2 for n, g in pull.items()
        }
        # the root has no slope at zero, where dead units are; 1e-30 moves nothing beside 1e-8
        sizes = {n: (s / two + 1e-30).sqrt() + 1e-8 for n, s in self.square.items()}
        return {n: self.mean[n] / one / sizes[n] for n in pull}


@checked
def effective_steps(update: Update) -> float:
    r""":math:`\sum_t c_t`: as how many plain gradients an update of small steps counts.

    Parameters
    ----------
    update : Update
        Of any number of steps; :math:`c_t` as in :func:`~gradinv_edu.sharing.observe`.
    """
    velocity = total = 0.0
    for _ in range(update.local_steps):
        velocity = update.momentum * velocity + 1
        total += velocity
    return total


@checked
def average_gradient(model: nn.Module, update: Update) -> Update:
    r""":math:`\bar g = \sum_t c_t g_t / \sum_t c_t`: an update, taken for one plain gradient.

    Parameters
    ----------
    model : torch.nn.Module
        With the weights at the start of the round, for known weight decay.
    update : Update
        What the client sent.

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model.
    """
    if update.optimizer == "sgd":
        update = without_weight_decay(model, update)
    count = effective_steps(update)
    mean = {n: g / count for n, g in update.gradients.items()}
    return Update(mean, batch_size=update.batch_size, samples=update.samples)

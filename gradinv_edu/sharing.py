"""What a client of a federation sends: one gradient, or the sum of its local steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam  # their classes would load torch's compiler
from torch.optim.sgd import sgd

from . import checks
from .checks import checked
from .errors import InvalidArgumentError, InvalidTensorError, UnsupportedLossError
from .update import Update

__all__ = ["Loss", "Update", "observe", "without_weight_decay"]

Loss = Callable[[Tensor, Tensor], Tensor]


@checked
def observe(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    local_steps: int = 1,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    buffers: bool = False,
) -> Update:
    r""":math:`(\theta_0 - \theta_T)/\eta = \sum_{t=1}^{T} c_t\, g_t`, what the server sees.

    Without a learning rate: one plain gradient :math:`g = \partial L / \partial \theta`
    (FedSGD), plus ``weight_decay`` times the weights if there is decay. With one: the
    difference of weights that a FedAvg client makes in ``local_steps`` optimiser steps, over
    the learning rate. Everything happens on a copy of the model.

    Parameters
    ----------
    model : torch.nn.Module
        The network that the server sent, in the mode (training or evaluation) that counts.
    loss : callable
        ``loss(model(inputs), targets)``, one number; else UnsupportedLossError.
    inputs, targets : Tensor, (N, …)
        The client's samples and labels; floating-point ones are brought to the model's dtype,
        whole numbers stay as they are: words of a language model.
    local_steps, learning_rate, optimizer, momentum, weight_decay
        As in :class:`Update`; with torch.optim's arithmetic and defaults.
    batch_size : int, optional
        Samples in each step, taken in order and from the start again at the end; ``None``: all.
    generator : torch.Generator, optional
        Seeds the model's own randomness (dropout); ``None``: a fixed seed.
    buffers : bool
        Whether the client sends its running statistics too, as FedAvg's usual clients do.

    Notes
    -----
    Implements :eq:`sum-of-steps`. :math:`g_t` is the gradient at step :math:`t`; plain SGD has
    :math:`c_t = 1`, momentum :math:`\beta` has :math:`c_t = (1 - \beta^{T-t+1})/(1 - \beta)`. For
    weight decay see :func:`without_weight_decay`; Adam has no such :math:`c_t`.
    Raises as :class:`Update` does, and InvalidTensorError if samples, targets, loss and model do
    not fit together, an entry is not finite, or there is nothing to train.
    Source: McMahan et al. (2017).

    Examples
    --------
    >>> import gradinv_edu as gi
    >>> x, y = gi.data.digits([0])
    >>> update = gi.observe(gi.models.mlp((64, 10)), torch.nn.CrossEntropyLoss(), x, y)
    >>> {name: tuple(g.shape) for name, g in update.gradients.items()}
    {'1.weight': (10, 64), '1.bias': (10,)}
    """
    update = Update(
        {}, local_steps, learning_rate, batch_size, optimizer, momentum, weight_decay
    )  # refuses what is impossible before anything is computed
    with torch.inference_mode(False), torch.enable_grad():
        client = copy.deepcopy(model)
        named = {name: p for name, p in client.named_parameters() if p.requires_grad}
        if not named:
            raise InvalidTensorError("The model has no parameter that takes a gradient to send.")
        weights: list[Tensor] = list(named.values())
        x, y = _samples(inputs, targets, weights[0].dtype)
        size = batch_size or len(x)
        if size > len(x):
            raise InvalidArgumentError(
                f"batch_size {size} is more than the {len(x)} samples there are."
            )

        def gradient(step: int) -> list[Tensor]:
            places = torch.arange(step * size, (step + 1) * size) % len(x)
            return loss_gradient(client, loss, weights, x[places], y[places])

        with _own_randomness(client, generator):
            if learning_rate is None:
                pairs = zip(gradient(0), weights, strict=True)
                sent = [g.add(w.detach(), alpha=weight_decay) for g, w in pairs]
            else:
                start, step = [w.detach().clone() for w in weights], stepping(weights, update)
                for t in range(local_steps):
                    pulls = gradient(t)
                    with torch.no_grad():
                        step(pulls)
                pairs = zip(start, weights, strict=True)
                sent = [(before - after.detach()) / learning_rate for before, after in pairs]
    state = {name: b.detach().clone() for name, b in client.named_buffers()} if buffers else {}
    update = replace(
        update,
        gradients=dict(zip(named, sent, strict=True)),
        batch_size=size,
        samples=min(len(x), local_steps * size),
        buffers=state,
    )
    update.check(model)
    return update


@checked
def without_weight_decay(model: nn.Module, update: Update) -> Update:
    r""":math:`\sum_t c_t\, g_t = (\alpha_T \theta_0 - \theta_T)/\eta`: known decay, taken out.

    SGD with momentum :math:`\beta` and decay :math:`\lambda` is linear in the first weights
    :math:`\theta_0`, those of ``model``, and the gradients :math:`g_t`:

    .. math::

       v_t = \beta\, v_{t-1} + g_t + \lambda\, \theta_{t-1}, \qquad
       \theta_t = \theta_{t-1} - \eta\, v_t
       \quad\Longrightarrow\quad
       \theta_T = \alpha_T\, \theta_0 - \eta \sum_t c_t\, g_t .

    The scalar :math:`\alpha_T` follows from the same recurrence with :math:`\theta_0 = 1` and
    no gradients, so a server that knows the settings knows the sum exactly. All parameters share
    the :math:`c_t`, so a weight gradient and its bias gradient fit together again. The result
    says ``weight_decay=0``.

    Notes
    -----
    So :eq:`sum-of-steps` holds of the result. InvalidTensorError if the update is not the model's;
    InvalidArgumentError for Adam, which normalises the decay together with the gradient.
    """
    update.check(model)
    if not update.weight_decay:
        return update
    if update.optimizer != "sgd":
        raise InvalidArgumentError(
            "Weight decay cannot be taken out of an Adam update: Adam divides the sum of decay "
            "and gradient, entry by entry, by its running size."
        )
    theta, v, share = 1.0, 0.0, 0.0  # share: (1 − α_T)/η, summed and so without cancellation
    for _ in range(update.local_steps):
        v = update.momentum * v + update.weight_decay * theta
        theta -= (update.learning_rate or 0.0) * v
        share += v
    start = dict(model.named_parameters())
    gradients = {}
    for name, g in update.gradients.items():
        decay = share * start[name].detach().to(g.device, torch.float64)
        gradients[name] = (g.detach().double() - decay).to(g.dtype)
    return replace(update, gradients=gradients, weight_decay=0.0)


def stepping(weights: list[Tensor], u: Update) -> Callable[[list[Tensor]], None]:
    """Return one step of the client's optimiser, in torch's arithmetic; it takes gradients."""
    known: dict[str, Any] = {"lr": u.learning_rate, "weight_decay": u.weight_decay}
    known |= {"maximize": False, "foreach": False}
    if u.optimizer == "sgd":
        speeds: list[Tensor | None] = [None for _ in weights]
        known |= {"momentum": u.momentum, "dampening": 0, "nesterov": False}
        return lambda gradients: sgd(weights, gradients, speeds, **known)
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    counts = [torch.zeros(()) for _ in weights]
    known |= {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    return lambda gradients: adam(weights, gradients, means, squares, [], counts, **known)


def loss_gradient(
    model: nn.Module, loss: Loss, weights: list[Tensor], x: Tensor, y: Tensor
) -> list[Tensor]:
    """Return ``∂L/∂w`` of each weight; zero for one that the loss does not depend on."""
    given = f"inputs {tuple(x.shape)} with targets {tuple(y.shape)}, {y.dtype}"
    with checks.fitting(f"Model and loss do not take {given}"):
        outputs = model(x)
        try:
            value = loss(outputs, y)
        except (TypeError, AttributeError) as error:
            if isinstance(outputs, Tensor):
                raise
            raise UnsupportedLossError(
                f"{type(model).__name__} gives a {type(outputs).__name__}, which the loss does not "
                "take: wrap the model so that its forward pass returns one tensor; a network with "
                "auxiliary outputs, in train mode, is built with aux_logits=False."
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UnsupportedLossError(
            f"The loss must be one number that depends on the model, got {shape}: "
            "use reduction='mean' or 'sum'."
        )
    return [*torch.autograd.grad(value.sum(), weights, allow_unused=True, materialize_grads=True)]


def _samples(inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Check what the client trains on, and copy it: autograd may keep it, in whatever mode."""
    if not isinstance(targets, Tensor):
        raise InvalidTensorError(f"targets must be a torch.Tensor, got {type(targets).__name__}.")
    words = isinstance(inputs, Tensor) and inputs.dtype == torch.long and inputs.numel() > 0
    x = inputs.detach().clone() if words else checks.finite(inputs, "inputs")
    if x.dim() < 1 or targets.dim() < 1 or len(x) != len(targets):
        raise InvalidTensorError(
            f"inputs has shape {tuple(x.shape)} and targets {tuple(targets.shape)}: their "
            "first dimensions must both be the number of samples, one or more."
        )
    if not words:
        x = x.to(dtype, copy=True)
    if targets.is_floating_point():
        return x, checks.finite(targets, "targets").to(dtype, copy=True)
    return x, targets.detach().clone()


@contextmanager
def _own_randomness(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also reseed the devices that are not forked
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield

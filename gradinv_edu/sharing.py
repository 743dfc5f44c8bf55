"""What a client of a federation sends: one gradient, or the sum of its local steps."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checks
from .errors import (
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLossError,
    UpdateFileError,
)

Loss = Callable[[Tensor, Tensor], Tensor]

FORMAT = "gradinv_edu.Update/1"
_SETTINGS = (
    "local_steps",
    "learning_rate",
    "batch_size",
    "optimizer",
    "momentum",
    "weight_decay",
    "samples",
)


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    r"""What the server receives from one client in one round.

    Parameters
    ----------
    gradients : dict of str to Tensor
        By the names of ``model.named_parameters()``, in the model's own dtype. After local
        steps: :math:`(\theta_0 - \theta_T) / \eta`. A name that is absent was not sent.
    local_steps : int
        Number :math:`T` of optimiser steps.
    learning_rate : float or None
        :math:`\eta`; ``None`` for a plain gradient.
    batch_size : int or None
        Samples in each step; ``None`` if the server does not know.
    optimizer : str
        ``"sgd"`` or ``"adam"``.
    momentum, weight_decay : float
        Of the optimiser.
    samples : int
        Number of samples that the client used.

    Raises
    ------
    ValueError
        If a setting is impossible.
    UnknownNameError
        If there is no such optimiser.
    """

    gradients: dict[str, Tensor]
    local_steps: int = 1
    learning_rate: float | None = None
    batch_size: int | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        _Rule(
            self.local_steps,
            self.learning_rate,
            self.batch_size,
            self.optimizer,
            self.momentum,
            self.weight_decay,
        )
        _whole(self.samples, "samples")

    def __repr__(self) -> str:
        numbers = sum(g.numel() for g in self.gradients.values())
        kinds = ", ".join(sorted({str(g.dtype)[6:] for g in self.gradients.values()}))
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"Update({len(self.gradients)} tensors of {numbers:,} numbers, {kinds}; {settings})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the update as safetensors, which hold numbers and text but never code.

        Parameters
        ----------
        path : str or path
            File to write, by habit ``….safetensors``; its folder must exist.

        Raises
        ------
        UpdateFileError
            If the file cannot be written.
        """
        from safetensors.torch import save

        settings = {name: getattr(self, name) for name in _SETTINGS}
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(settings),
            "names": json.dumps(list(self.gradients)),
        }
        # cloned: safetensors refuses tensors that share memory
        tensors = {n: g.detach().cpu().clone().contiguous() for n, g in self.gradients.items()}
        try:
            Path(path).write_bytes(save(tensors, metadata))
        except OSError as error:
            raise UpdateFileError(f"Cannot write {path}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Update:
        """Read what :meth:`save` wrote, onto the CPU.

        Parameters
        ----------
        path : str or path
            File to read.

        Returns
        -------
        Update
            With the gradients' dtypes, order and settings as saved.

        Raises
        ------
        UpdateFileError
            If the file is missing, truncated, or holds something else.
        """
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UpdateFileError(f"{path} {what}; give the file that Update.save wrote.")
        tensors, metadata = _read(path)
        return _assembled(cls, path, tensors, metadata)

    def check(self, model: nn.Module) -> None:
        """Compare the update with the model that it is said to be of.

        Parameters
        ----------
        model : torch.nn.Module
            The network whose parameters the update names.

        Raises
        ------
        InvalidTensorError
            If the update is empty, a name or shape is not the model's, or an entry is NaN,
            infinite or not a floating-point number.
        """
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if not self.gradients:
            raise InvalidTensorError("The update holds no gradient at all.")
        for name, gradient in self.gradients.items():
            if name not in shapes:
                raise InvalidTensorError(
                    f"The update has a gradient for {name!r}, the model no such parameter: it has "
                    f"{', '.join(shapes) or 'none'}. Give the model that the client trained."
                )
            checks.shaped(gradient, f"The gradient of {name}", shapes[name])


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
        ``loss(model(inputs), targets)``, one number.
    inputs : Tensor, (N, …)
        The client's samples; brought to the model's dtype.
    targets : Tensor, (N, …)
        Their labels; floating-point ones are brought to the model's dtype.
    local_steps : int
        Number :math:`T` of optimiser steps.
    learning_rate : float, optional
        :math:`\eta`.
    batch_size : int, optional
        Samples in each step, taken in order and from the start again at the end; ``None``: all.
    optimizer : str
        ``"sgd"`` or ``"adam"``, with the formulas and defaults of :mod:`torch.optim`.
    momentum, weight_decay : float
        Of the optimiser; Adam takes no momentum.
    generator : torch.Generator, optional
        Seeds the model's own randomness (dropout); ``None``: a fixed seed.

    Returns
    -------
    Update
        Gradients of all trainable parameters, in the model's dtype and on its device.

    Raises
    ------
    ValueError
        If a setting is impossible: no step, a learning rate that is not positive, a batch
        larger than the data.
    UnknownNameError
        If there is no such optimiser.
    InvalidTensorError
        If the samples are not floating-point, hold NaN or infinite entries, are not as many as
        the targets, do not fit model or loss; if the gradient is not finite; if the model has
        nothing to train.
    UnsupportedLossError
        If the loss is not one number that depends on the model.

    Notes
    -----
    Implements :eq:`sum-of-steps`. :math:`g_t` is the gradient at step :math:`t`; plain SGD has
    :math:`c_t = 1`, momentum :math:`\mu` has :math:`c_t = (1 - \mu^{T-t+1})/(1 - \mu)`. For
    weight decay see :func:`without_weight_decay`; Adam has no such :math:`c_t`.
    Source: McMahan et al. (2017).

    Examples
    --------
    >>> import gradinv_edu as gi
    >>> x, y = gi.data.digits([0])
    >>> update = gi.observe(gi.models.mlp((64, 10)), torch.nn.CrossEntropyLoss(), x, y)
    >>> {name: tuple(g.shape) for name, g in update.gradients.items()}
    {'1.weight': (10, 64), '1.bias': (10,)}
    """
    rule = _Rule(local_steps, learning_rate, batch_size, optimizer, momentum, weight_decay)
    with torch.inference_mode(False), torch.enable_grad():
        client = copy.deepcopy(model)
        parameters = _trainable(client)
        samples = _samples(next(iter(parameters.values())), inputs, targets)
        batches = _Batches(*samples, batch_size)
        with _own_randomness(client, generator):
            sent = rule.send(client, loss, parameters, batches)
    gradients = dict(zip(parameters, sent, strict=True))
    for name, gradient in gradients.items():
        checks.finite(gradient, f"The gradient of {name}")
    used = min(len(inputs), local_steps * batches.size)
    return Update(gradients, **asdict(replace(rule, batch_size=batches.size)), samples=used)


def without_weight_decay(model: nn.Module, update: Update) -> Update:
    r""":math:`\sum_t c_t\, g_t = (\alpha_T \theta_0 - \theta_T)/\eta`: known decay, taken out.

    SGD with momentum :math:`\mu` and decay :math:`\lambda` is linear in the first weights
    :math:`\theta_0` and the gradients :math:`g_t`:

    .. math::

       v_t = \mu\, v_{t-1} + g_t + \lambda\, \theta_{t-1}, \qquad
       \theta_t = \theta_{t-1} - \eta\, v_t
       \quad\Longrightarrow\quad
       \theta_T = \alpha_T\, \theta_0 - \eta \sum_t c_t\, g_t .

    The scalar :math:`\alpha_T` follows from the same recurrence with :math:`\theta_0 = 1` and
    no gradients, so a server that knows the settings knows the sum exactly. All parameters share
    the :math:`c_t`, so a weight gradient and its bias gradient fit together again.

    Parameters
    ----------
    model : torch.nn.Module
        The network at the start of the round, with the weights :math:`\theta_0`.
    update : Update
        What the client sent.

    Returns
    -------
    Update
        With the decay's share removed and ``weight_decay=0``; dtypes as they were.

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model.
    ValueError
        If the optimiser is Adam and there is decay: Adam normalises the decay together with
        the gradient, and the two do not come apart.

    Notes
    -----
    Implements :eq:`sum-of-steps`.
    """
    update.check(model)
    if not update.weight_decay:
        return update
    if update.optimizer != "sgd":
        raise ValueError(
            "Weight decay cannot be taken out of an Adam update: Adam divides the sum of decay "
            "and gradient, entry by entry, by its running size."
        )
    share = _decay_share(update)
    start = {n: p.detach() for n, p in model.named_parameters()}
    gradients = {n: _less(g, share, start[n]) for n, g in update.gradients.items()}
    return replace(update, gradients=gradients, weight_decay=0.0)


def _less(gradient: Tensor, share: float, start: Tensor) -> Tensor:
    decay = share * start.to(gradient.device, torch.float64)
    return (gradient.detach().double() - decay).to(gradient.dtype)


def _decay_share(update: Update) -> float:
    """Return ``(1 − α_T)/η``, summed as the recurrence makes it and so without cancellation."""
    rate = update.learning_rate or 0.0  # a plain gradient: one step, and no rate in its share
    theta, v, share = 1.0, 0.0, 0.0
    for _ in range(update.local_steps):
        v = update.momentum * v + update.weight_decay * theta
        theta -= rate * v
        share += v
    return share


# --- the client ------------------------------------------------------------------------------


class _Optimizer(Protocol):
    def step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None: ...


class _Sgd:
    """As ``torch.optim.SGD``, whose import alone takes longer than the steps of a chapter."""

    def __init__(self, learning_rate: float, momentum: float, weight_decay: float) -> None:
        self.rate, self.momentum, self.decay = learning_rate, momentum, weight_decay
        self.velocities: list[Tensor] = []

    def step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        pulls = _decayed(parameters, gradients, self.decay)
        if self.velocities:
            pairs = zip(self.velocities, pulls, strict=True)
            pulls = [v.mul(self.momentum).add(g) for v, g in pairs]
        self.velocities = pulls
        for p, v in zip(parameters, pulls, strict=True):
            p.add_(v, alpha=-self.rate)


class _Adam:
    """As ``torch.optim.Adam`` with its default constants."""

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, learning_rate: float, momentum: float, weight_decay: float) -> None:
        self.rate, self.decay, self.steps = learning_rate, weight_decay, 0
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []

    def step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        pulls = _decayed(parameters, gradients, self.decay)
        self.means = self.means or [torch.zeros_like(g) for g in pulls]
        self.squares = self.squares or [torch.zeros_like(g) for g in pulls]
        self.steps += 1
        for p, g, m, s in zip(parameters, pulls, self.means, self.squares, strict=True):
            m.lerp_(g, 1 - self.beta1)
            s.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            size = (s.sqrt() / math.sqrt(1 - self.beta2**self.steps)).add_(self.epsilon)
            p.addcdiv_(m, size, value=-self.rate / (1 - self.beta1**self.steps))


def _decayed(parameters: list[Tensor], gradients: list[Tensor], decay: float) -> list[Tensor]:
    if not decay:
        return gradients
    return [g.add(p, alpha=decay) for p, g in zip(parameters, gradients, strict=True)]


_OPTIMIZERS: dict[str, Callable[[float, float, float], _Optimizer]] = {"sgd": _Sgd, "adam": _Adam}


@dataclass(frozen=True)
class _Batches:
    inputs: Tensor
    targets: Tensor
    batch_size: int | None

    def __post_init__(self) -> None:
        if self.size > len(self.inputs):
            raise ValueError(
                f"batch_size {self.size} is more than the {len(self.inputs)} samples there are."
            )

    @property
    def size(self) -> int:
        return self.batch_size or len(self.inputs)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(self.size, device=self.inputs.device) + step * self.size
        places = places % len(self.inputs)
        return self.inputs[places], self.targets[places.to(self.targets.device)]


@dataclass(frozen=True)
class _Rule:
    """How a client trains; refuses what is impossible before anything is computed."""

    local_steps: int
    learning_rate: float | None
    batch_size: int | None
    optimizer: str
    momentum: float
    weight_decay: float

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            names = ", ".join(_OPTIMIZERS)
            raise UnknownNameError(f"No optimizer {self.optimizer!r}; there are {names}.")
        _whole(self.local_steps, "local_steps")
        if self.batch_size is not None:
            _whole(self.batch_size, "batch_size")
        self._check_rates()

    def _check_rates(self) -> None:
        if self.learning_rate is not None:
            _number(self.learning_rate, "learning_rate", "positive", lambda v: v > 0)
        elif self.local_steps > 1 or self.optimizer == "adam":
            what = f"{self.local_steps} local step(s) of {self.optimizer}"
            raise ValueError(f"{what} need a learning_rate; without one, a plain gradient is sent.")
        _number(self.momentum, "momentum", "in [0, 1)", lambda v: 0 <= v < 1)
        _number(self.weight_decay, "weight_decay", "zero or more", lambda v: v >= 0)
        if self.optimizer == "adam" and self.momentum:
            raise ValueError("Adam takes no momentum; leave it 0.")

    def send(
        self, model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], batches: _Batches
    ) -> list[Tensor]:
        weights = list(parameters.values())
        if self.learning_rate is None:
            gradient = _gradient(model, loss, weights, *batches[0])
            with torch.no_grad():
                return _decayed([w.detach() for w in weights], gradient, self.weight_decay)
        start = [w.detach().clone() for w in weights]
        self._train(model, loss, weights, batches)
        pairs = zip(start, weights, strict=True)
        return [(before - after.detach()) / self.learning_rate for before, after in pairs]

    def _train(
        self, model: nn.Module, loss: Loss, weights: list[nn.Parameter], batches: _Batches
    ) -> None:
        rate = self.learning_rate or 0.0
        optimizer = _OPTIMIZERS[self.optimizer](rate, self.momentum, self.weight_decay)
        for step in range(self.local_steps):
            gradient = _gradient(model, loss, weights, *batches[step])
            with torch.no_grad():
                optimizer.step(list(weights), gradient)


def _gradient(
    model: nn.Module, loss: Loss, weights: list[nn.Parameter], x: Tensor, y: Tensor
) -> list[Tensor]:
    given = f"inputs {tuple(x.shape)} with targets {tuple(y.shape)}, {y.dtype}"
    with checks.fitting(f"Model and loss do not take {given}"):
        value = loss(model(x), y)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UnsupportedLossError(
            f"The loss must be one number that depends on the model, got {shape}: "
            "use reduction='mean' or 'sum'."
        )
    return list(
        torch.autograd.grad(value.sum(), weights, allow_unused=True, materialize_grads=True)
    )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InvalidTensorError(
            "The model has no parameter that takes a gradient, so nothing would be sent."
        )
    return found


def _samples(weight: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InvalidTensorError(
            f"inputs must be a floating-point tensor, got {kind}: convert pictures to [0, 1]."
        )
    if not isinstance(targets, Tensor):
        raise InvalidTensorError(f"targets must be a torch.Tensor, got {type(targets).__name__}.")
    if inputs.dim() < 1 or targets.dim() < 1 or not 0 < len(inputs) == len(targets):
        raise InvalidTensorError(
            f"inputs has shape {tuple(inputs.shape)} and targets {tuple(targets.shape)}: their "
            "first dimensions must both be the number of samples, one or more."
        )
    return _clean(inputs, "inputs", weight.dtype), _clean(targets, "targets", weight.dtype)


def _clean(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return a copy that autograd may keep, whatever mode the original was made in."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InvalidTensorError(
            f"{name} has {bad} NaN or infinite entries of {tensor.numel()}; clean the data first."
        )
    return tensor.detach().to(dtype, copy=True)


@contextmanager
def _own_randomness(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
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


def _whole(value: int, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, one or more, got {value!r}.")


def _number(value: float, name: str, wanted: str, fits: Callable[[float], bool]) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not fits(value):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


# --- the file --------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise UpdateFileError(
            f"{path} ({size} bytes) is truncated or is not a safetensors file: {error}. "
            "Ask the client for it again."
        ) from error


def _assembled(
    cls: type[Update], path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Update:
    if metadata.get("format") != FORMAT:
        raise UpdateFileError(
            f"{path} is a safetensors file but not an update: its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}. Update.save writes such files."
        )
    try:
        names = json.loads(metadata["names"])
        settings: dict[str, Any] = json.loads(metadata["settings"])
        return cls({name: tensors[name] for name in names}, **settings)
    except (KeyError, TypeError, ValueError, UnknownNameError) as error:
        raise UpdateFileError(f"{path} describes itself wrongly: {error}.") from error

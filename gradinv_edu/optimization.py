"""The other family: guess a picture, compute its gradient, and correct the guess."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks, fully_connected
from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from .sharing import Loss, Update, without_weight_decay

Gradients = Mapping[str, Tensor]
Start = Literal["normal", "uniform", "patterned"]
Method = Literal["dlg", "idlg", "inverting_gradients"]

INNER = 20  # L-BFGS iterations in one step, as DLG and its descendants run it
HISTORY = 100
DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of the steps: there signed Adam's rate is divided by ten
MASK_PENALTY = 1e-4  # Scheliga et al. (2023)
IMPROVED = 1e-3  # relative; less is no progress


@dataclass(frozen=True)
class _Plan:
    """What makes a published attack itself."""

    cosine: bool
    guess_labels: bool
    signed_adam: bool
    start: Start
    rate: float
    total_variation: float
    patience: int | None


METHODS: dict[str, _Plan] = {
    "dlg": _Plan(False, True, False, "normal", 1.0, 0.0, 30),
    "idlg": _Plan(False, False, False, "normal", 1.0, 0.0, 30),
    "inverting_gradients": _Plan(True, False, True, "normal", 0.1, 1e-4, None),
}


@dataclass(frozen=True)
class Match:
    """What a search found, chosen by its own objective and by nothing else.

    Attributes
    ----------
    inputs : Tensor
        ``(samples, *input_shape)``, float64, the iterate of lowest objective.
    targets : Tensor
        The labels it goes with: recovered, guessed along (DLG), or as they were given.
    objective : float
        At ``inputs``, without total variation and penalty: squared relative distance of the
        gradients, or one minus their cosine.
    history : tuple of float
        Objective of the winning run at its start and after each step, regulariser included.
    histories : tuple of tuple of float
        The same for every run, in the order in which they were tried.
    evaluations : int
        Gradients of guesses that were computed and differentiated, in all runs together.
    converged : bool
        Whether the objective came down to ``tolerance``. It says that the gradients agree, not
        that the pictures do.
    masks : dict of str to Tensor
        Dropout masks guessed along, by the name of their layer.
    seconds : float
        Spent, on this machine.
    """

    inputs: Tensor
    targets: Tensor
    objective: float
    history: tuple[float, ...]
    histories: tuple[tuple[float, ...], ...] = field(repr=False)
    evaluations: int
    converged: bool
    masks: dict[str, Tensor] = field(repr=False)
    seconds: float = field(repr=False, compare=False)


def match_gradients(
    model: nn.Module,
    update: Update,
    input_shape: tuple[int, ...],
    loss: Loss,
    *,
    method: Method = "dlg",
    targets: Tensor | None = None,
    steps: int = 300,
    restarts: int = 1,
    start: Start | Tensor | None = None,
    simulate: bool = True,
    guess_masks: bool = False,
    known: Mapping[str, Tensor] | None = None,
    total_variation: float | None = None,
    learning_rate: float | None = None,
    line_search: bool = False,
    tolerance: float | None = None,
    patience: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Match:
    r""":math:`\hat x = \arg\min_{x'} \lVert g(x') - g \rVert^2 / \lVert g \rVert^2`, by descent.

    Implements :eq:`gradient-matching`. Method ``"inverting_gradients"`` minimises
    :math:`1 - \cos(g(x'), g) + \alpha\,\mathrm{TV}(x')` instead (:eq:`cosine-matching`).

    Parameters
    ----------
    model : torch.nn.Module
        As the server sent it, in the client's mode. Dropout in training mode is ignored, as by an
        attacker who does not know of it, unless ``guess_masks``.
    update : Update
        What one client sent.
    input_shape : tuple of int
        Of one sample; the number of samples is the update's.
    loss : callable
        The client's.
    method : {"dlg", "idlg", "inverting_gradients"}
        DLG: L-BFGS on the squared distance, labels guessed along. iDLG: the same with
        :func:`recover_labels`. Inverting Gradients: Adam on the signs of the gradient, pixels
        kept in [0, 1], the rate divided by ten at 3/8, 5/8 and 7/8 of the steps.
    targets : Tensor, optional
        True labels, for an attacker who is said to have them; ``None``: recovered.
    steps, restarts : int
        Most steps of one run (20 iterations of L-BFGS each, or one of Adam), and number of runs
        from fresh starts; the run of lowest objective wins.
    start : {"normal", "uniform", "patterned"} or Tensor, optional
        Where a run begins; ``"patterned"`` is the random quarter, repeated, of Wei et al.
        (2020). A tensor ``(samples, *input_shape)`` serves the first run, the method's own start
        the others.
    simulate : bool
        Take the client's local steps along with the guess (:func:`simulated_update`). If false,
        the update is taken for the plain gradient that it is on average.
    guess_masks : bool
        Optimise the masks of dropout layers along, as Scheliga et al. (2023) do.
    known : mapping of str to Tensor, optional
        By parameter, boolean: where the update is believed. Other entries, such as those that a
        client is known to have pruned, are left out of the objective.
    total_variation : float, optional
        :math:`\alpha`; ``None``: 1e-4 for pictures under ``"inverting_gradients"``, else 0.
    learning_rate : float, optional
        Of L-BFGS (published: 1) or Adam (0.1).
    line_search : bool
        Strong Wolfe conditions for L-BFGS; the published attacks have none.
    tolerance : float, optional
        Objective at which the search ends; ``None``: some roundings of the model's dtype.
    patience : int, optional
        Steps without progress after which a run ends; ``None``: 30 for L-BFGS, never for Adam.
    generator : torch.Generator, optional
        Of the starts; ``None``: a fixed seed.
    progress : bool
        Show a bar.

    Returns
    -------
    Match

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model, or a mask, start, target or ``input_shape``
        has the wrong shape or type.
    InvalidArgumentError
        If a number cannot be, labels are needed and cannot be recovered, or masks are to be
        guessed over several local steps or where there is no dropout.
    UnknownNameError
        If there is no such method or start.

    Notes
    -----
    Sources: Zhu, Liu and Han (2019); Zhao et al. (2020); Geiping et al. (2020). Nothing here sees
    the truth: neither the iterate nor the run is chosen by it.

    Examples
    --------
    >>> import gradinv_edu as gi
    >>> model, loss = gi.models.mlp((64, 24, 10), "sigmoid"), torch.nn.CrossEntropyLoss()
    >>> update = gi.observe(model, loss, gi.data.digit(3), torch.tensor([3]))
    >>> match = gi.optimization.match_gradients(model, update, (1, 8, 8), loss, method="idlg")
    >>> match.targets.item(), gi.metrics.psnr(match.inputs, gi.data.digit(3)) > 30
    (3, True)
    """
    began = time.perf_counter()
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        raise InvalidArgumentError(
            f"input_shape is a tuple such as (3, 32, 32); got {input_shape!r}."
        )
    plan = _plan(method, total_variation, learning_rate, patience, input_shape)
    _whole(steps, "steps")
    _whole(restarts, "restarts")
    update.check(model)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.inference_mode(False), torch.enable_grad():
        attacker = _attacker(model, update, loss, simulate, guess_masks, known, plan, input_shape)
        roundings = (10 * torch.finfo(attacker.dtype).eps) ** 2
        limit = _number(tolerance, "tolerance", roundings, lambda v: v >= 0)
        search = _Search(attacker, plan, steps, limit, line_search, progress)
        labels = None if plan.guess_labels and targets is None else attacker.labels(model, targets)
        runs = _runs(search, labels, start, restarts, source)
    best = min(runs, key=lambda run: run.score)
    return Match(
        inputs=best.inputs.double(),
        targets=best.targets,
        objective=best.score,
        history=best.history,
        histories=tuple(run.history for run in runs),
        evaluations=attacker.evaluations,
        converged=best.score <= limit,
        masks=best.masks,
        seconds=time.perf_counter() - began,
    )


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
    inputs, targets : Tensor
        The guess, in the model's dtype.

    Returns
    -------
    dict of str to Tensor
        By the names of the trainable parameters.

    Notes
    -----
    Sources: Geiping et al. (2020), Dimitrov et al. (2022).
    """
    return _Client(model, loss, update).send(inputs, targets)


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
    InvalidTensorError
        If the update does not belong to the model, or the model takes no inputs of this shape.
    VanishingGradientError
        If the gradient of the last dense layer is zero everywhere.
    UnsupportedLayerError
        If the gradient of a dense layer was not sent.
    InvalidArgumentError
        If the loss and this update do not give labels away.

    Notes
    -----
    Sources: Zhao et al. (2020), Wainakh et al. (2022).
    """
    update.check(model)
    name, layer = _classifier(model, update)
    bias = update.gradients.get(f"{name}bias")
    weight = update.gradients[f"{name}weight"]
    checks.not_all_zero(weight if bias is None else bias, "The classifier's gradient")
    one = update.samples == 1 and update.local_steps == 1 and update.optimizer == "sgd"
    if one:
        try:
            own = None if layer.bias is None else layer.bias.detach()
            found = fully_connected.recover_output(loss, layer.weight.detach(), own, weight, bias)  # type: ignore[arg-type]
            return found[0].target.unsqueeze(0)
        except GradientInversionError:
            pass  # noisy, pruned or masked: the rule below asks for less
    if not isinstance(loss, nn.CrossEntropyLoss):
        raise InvalidArgumentError(
            f"No rule gives the labels of this update away under {type(loss).__name__}: "
            "give them as targets."
        )
    expected = None if input_shape is None else _probabilities(model, input_shape)
    return _greedy(weight, bias, update, loss.reduction == "sum", expected)


def _probabilities(model: nn.Module, input_shape: tuple[int, ...], pictures: int = 32) -> Tensor:
    own = copy.deepcopy(model).eval()
    weight = next(own.parameters())
    noise = _uniform((pictures, *input_shape), torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        with checks.fitting(f"Model and loss do not take inputs {tuple(noise.shape)}"):
            output = own(noise)
        expected: Tensor = output.double().softmax(dim=-1).mean(dim=0)
    return expected


def _greedy(
    weight: Tensor, bias: Tensor | None, update: Update, summed: bool, expected: Tensor | None
) -> Tensor:
    pulls = weight.double().sum(dim=1) if bias is None else bias.double()
    pulls = pulls.clone() / _weight_of_steps(update)
    if bias is not None and expected is not None:
        pulls -= expected * (update.samples if summed else 1)
    share = 1.0 if summed else 1 / update.samples
    if bias is None:
        share = float(-pulls.clamp(max=0).sum()) / update.samples * (1 + 1 / len(pulls))
    labels = []
    for _ in range(update.samples):
        labels.append(int(pulls.argmin()))
        pulls[labels[-1]] += share
    return torch.tensor(sorted(labels))


def _classifier(model: nn.Module, update: Update) -> tuple[str, nn.Linear]:
    found = [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not found or f"{found[-1][0]}weight" not in update.gradients:
        raise UnsupportedLayerError(
            "Labels are read in the gradient of the last dense layer, and none was sent: "
            "give them as targets."
        )
    return found[-1]


# --- the client, imitated ---------------------------------------------------------------------


class _Mask(nn.Module):
    """Stands in for a dropout layer: multiplies by a guess."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.guess = p, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.guess / (1 - self.p) if self.guess.numel() else x


@dataclass
class _Client:
    """The client's training as a differentiable function of its data."""

    model: nn.Module
    loss: Loss
    update: Update

    def __post_init__(self) -> None:
        self.theta = {
            n: p.detach().clone().requires_grad_()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        self.frozen = {
            n: p.detach() for n, p in self.model.named_parameters() if not p.requires_grad
        }

    def gradient(self, theta: Gradients, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        with checks.fitting(_refusal(x, y)):
            output = functional_call(self.model, {**theta, **self.frozen, **buffers}, (x,))
            value = self.loss(output, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UnsupportedLossError(
                "The loss must be one number: use reduction='mean' or 'sum'."
            )
        parameters = list(theta.values())
        found = torch.autograd.grad(
            value.sum(), parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(theta, found, strict=True))

    def send(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        update = self.update
        if update.learning_rate is None:
            return self._pull(self.theta, x, y)
        theta: Gradients = self.theta
        velocity: dict[str, Tensor] = {}
        square: dict[str, Tensor] = {}
        for step in range(update.local_steps):
            pull = self._pull(theta, *self._batch(step, x, y))
            rule = _adam if update.optimizer == "adam" else _momentum
            move = rule(pull, velocity, square, step + 1, update.momentum)
            theta = {n: theta[n] - update.learning_rate * move[n] for n in theta}
        return {n: (self.theta[n] - theta[n]) / update.learning_rate for n in theta}

    def _pull(self, theta: Gradients, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = self.gradient(theta, x, y)
        decay = self.update.weight_decay
        return {n: g + decay * theta[n] for n, g in found.items()} if decay else found

    def _batch(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        size = min(self.update.batch_size or len(x), len(x))
        places = (torch.arange(size, device=x.device) + step * size) % len(x)
        return x[places], y[places]


def _refusal(x: Tensor, y: Tensor) -> str:
    given = f"inputs {tuple(x.shape)} and targets {tuple(y.shape)}, {y.dtype}"
    return f"Model and loss do not take {given}"


def _momentum(
    pull: Gradients, v: dict[str, Tensor], _: dict[str, Tensor], step: int, mu: float
) -> Gradients:
    v.update({n: mu * v[n] + g if n in v else g for n, g in pull.items()})
    return dict(v)


def _adam(
    pull: Gradients, m: dict[str, Tensor], s: dict[str, Tensor], step: int, _: float
) -> Gradients:
    m.update({n: 0.9 * m.get(n, torch.zeros_like(g)) + 0.1 * g for n, g in pull.items()})
    s.update({n: 0.999 * s.get(n, torch.zeros_like(g)) + 0.001 * g**2 for n, g in pull.items()})
    one, two = 1 - 0.9**step, 1 - 0.999**step
    # the root has no slope at zero, where dead units are; 1e-30 moves nothing beside 1e-8
    return {n: (m[n] / one) / ((s[n] / two + 1e-30).sqrt() + 1e-8) for n in pull}


def _weight_of_steps(update: Update) -> float:
    """Sum of the ``c_t``: how many plain gradients an update of small steps amounts to."""
    v = total = 0.0
    for _ in range(update.local_steps):
        v = update.momentum * v + 1
        total += v
    return total


# --- the attacker -----------------------------------------------------------------------------


@dataclass
class _Attacker:
    """The objective as a function of a guess."""

    client: _Client
    seen: dict[str, Tensor]
    known: dict[str, Tensor]
    masks: dict[str, _Mask]
    plan: _Plan
    shape: tuple[int, ...]
    evaluations: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.client.theta.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.client.theta.values())).device

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare the guess's gradient with the one that was sent, where it is known."""
        self.evaluations += 1
        sent = self.client.send(x, y)
        pairs = [(self._entries(n, sent[n]), self._entries(n, g)) for n, g in self.seen.items()]
        size = sum(b.square().sum() for _, b in pairs)
        if not self.plan.cosine:
            return sum(((a - b).square().sum() for a, b in pairs), x.new_zeros(())) / size
        along = sum((a * b).sum() for a, b in pairs)
        own = sum((a.square().sum() for a, _ in pairs), x.new_zeros(()))
        return 1 - along / (own * size).sqrt().clamp(min=torch.finfo(x.dtype).tiny)

    def _entries(self, name: str, gradient: Tensor) -> Tensor:
        return gradient[self.known[name]] if name in self.known else gradient

    def regularizer(self, x: Tensor) -> Tensor:
        value = x.new_zeros(())
        if self.plan.total_variation:
            value = value + self.plan.total_variation * total_variation(x)
        for mask in self.masks.values():
            value = value + MASK_PENALTY * (1 - mask.guess.mean() - mask.p).abs()
        return value

    def labels(self, model: nn.Module, targets: Tensor | None) -> Tensor:
        samples = self.client.update.samples
        if targets is None:
            targets = recover_labels(model, self.client.update, self.client.loss, self.shape)
        if not isinstance(targets, Tensor) or len(targets) != samples:
            raise InvalidTensorError(f"targets must be a tensor of {samples} labels.")
        dtype = self.dtype if targets.is_floating_point() else targets.dtype
        return targets.detach().to(self.device, dtype)


def total_variation(x: Tensor) -> Tensor:
    r""":math:`\mathrm{TV}(x) = \overline{|\partial_j x|} + \overline{|\partial_i x|}`.

    Parameters
    ----------
    x : Tensor, (…, H, W)
        Pictures.

    Returns
    -------
    Tensor
        One number, differentiable.
    """
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def _attacker(
    model: nn.Module,
    update: Update,
    loss: Loss,
    simulate: bool,
    guess_masks: bool,
    known: Mapping[str, Tensor] | None,
    plan: _Plan,
    shape: tuple[int, ...],
) -> _Attacker:
    if not simulate and update.learning_rate is not None:
        update = _averaged(model, update)
    own = copy.deepcopy(model)
    masks = _without_dropout(own)
    if guess_masks and (not masks or update.local_steps > 1):
        raise InvalidArgumentError(
            "guess_masks needs a dropout layer in training mode and one local step."
        )
    client = _Client(own, loss, update)
    seen = {n: g.detach().to(client.theta[n]) for n, g in update.gradients.items()}
    chosen = _believed(known, seen)
    if not any(bool(g[chosen.get(n, ...)].any()) for n, g in seen.items()):
        checks.not_all_zero(torch.zeros(1), "Every known entry of the update")
    return _Attacker(client, seen, chosen, masks if guess_masks else {}, plan, tuple(shape))


def _averaged(model: nn.Module, update: Update) -> Update:
    if update.optimizer == "sgd":
        update = without_weight_decay(model, update)
    weight = _weight_of_steps(update)
    mean = {n: g / weight for n, g in update.gradients.items()}
    return Update(mean, batch_size=update.batch_size, samples=update.samples)


def _without_dropout(model: nn.Module) -> dict[str, _Mask]:
    """Put a transparent mask in the place of each dropout that is at work."""
    masks = {}
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p:
                masks[f"{name}.{child}" if name else child] = _Mask(layer.p)
                setattr(module, child, masks[f"{name}.{child}" if name else child])
    return masks


def _believed(known: Mapping[str, Tensor] | None, seen: Gradients) -> dict[str, Tensor]:
    for name, mask in (known or {}).items():
        if name not in seen:
            raise InvalidTensorError(f"known has a mask for {name!r}, which was not sent.")
        if mask.dtype != torch.bool or mask.shape != seen[name].shape:
            raise InvalidTensorError(
                f"known[{name!r}] must be boolean of shape {tuple(seen[name].shape)}, "
                f"got {mask.dtype} of {tuple(mask.shape)}."
            )
    return {n: m.to(seen[n].device) for n, m in (known or {}).items()}


def _plan(
    method: str,
    total_variation: float | None,
    learning_rate: float | None,
    patience: int | None,
    shape: Sequence[int],
) -> _Plan:
    if method not in METHODS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(METHODS)}.")
    plan = METHODS[method]
    picture = len(shape) == 3 and min(shape[1:]) > 1  # a column has no neighbours
    if total_variation and not picture:
        raise InvalidArgumentError(
            f"total_variation is for pictures (C, H, W); input_shape is {tuple(shape)}."
        )
    alpha = _number(total_variation, "total_variation", plan.total_variation, lambda v: v >= 0)
    rate = _number(learning_rate, "learning_rate", plan.rate, lambda v: v > 0)
    if patience is not None:
        _whole(patience, "patience")
    return replace(
        plan,
        total_variation=alpha if picture else 0.0,
        rate=rate,
        patience=plan.patience if patience is None else patience,
    )


def _number(value: float | None, name: str, default: float, fits: Callable[[float], bool]) -> float:
    if value is None:
        return default
    if not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise InvalidArgumentError(f"{name} is {value!r}; it must be positive and finite.")
    return value


def _whole(value: int, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgumentError(f"{name} must be a whole number, one or more, got {value!r}.")


# --- the search -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    inputs: Tensor
    targets: Tensor
    masks: dict[str, Tensor]
    score: float
    history: tuple[float, ...]


@dataclass
class _Search:
    """How a run descends."""

    attacker: _Attacker
    plan: _Plan
    steps: int
    tolerance: float
    line_search: bool
    progress: bool

    def run(self, x: Tensor, labels: Tensor | None, guess: Tensor) -> _Result:
        """Descend from ``x``; every point that was evaluated competes, by its objective alone."""
        run = _Run(self, x.requires_grad_(), labels, guess)
        descent = self._optimizer(run.variables)
        history: list[float] = []
        for _ in self._counted():
            history.append(float(descent.step(run.closure)))
            self._project(x)
            if run.score <= self.tolerance or _stuck(history, self.plan.patience):
                break
            if not math.isfinite(history[-1]):
                break
        history.append(float(run.closure()))
        return run.result([h for h in history if math.isfinite(h)])

    def _counted(self) -> Iterator[int]:
        if not self.progress:
            return iter(range(self.steps))
        from tqdm.auto import tqdm

        return iter(tqdm(range(self.steps), desc="matching gradients"))

    def _optimizer(self, variables: list[Tensor]) -> Any:
        from torch import optim

        if not self.plan.signed_adam:
            search = "strong_wolfe" if self.line_search else None
            return optim.LBFGS(
                variables, self.plan.rate, INNER, history_size=HISTORY, line_search_fn=search,
                tolerance_grad=0.0, tolerance_change=0.0,
            )  # fmt: skip
        return _DecayedAdam(optim.Adam(variables, self.plan.rate), self.steps)

    def _project(self, x: Tensor) -> None:
        with torch.no_grad():
            if self.plan.signed_adam:
                x.clamp_(0, 1)
            for mask in self.attacker.masks.values():
                mask.guess.clamp_(0, 1)


@dataclass
class _Run:
    """One descent: the guess as it moves, and the best that it came by."""

    search: _Search
    x: Tensor
    labels: Tensor | None
    guess: Tensor

    def __post_init__(self) -> None:
        self.variables = [self.x, *(m.guess for m in self.search.attacker.masks.values())]
        if self.labels is None:
            self.variables.append(self.guess.requires_grad_())
        self.value = self.score = math.inf
        self._keep()

    def closure(self) -> Tensor:
        """Evaluate the objective, leave its slopes in the variables, remember the best point."""
        attacker, signed = self.search.attacker, self.search.plan.signed_adam
        distance = attacker.distance(self.x, self._targets())
        value = distance + attacker.regularizer(self.x)
        slopes = torch.autograd.grad(
            value, self.variables, allow_unused=True, materialize_grads=True
        )
        for variable, slope in zip(self.variables, slopes, strict=True):
            variable.grad = slope.sign() if signed else slope
        if float(value.detach()) < self.value:
            self.value, self.score = float(value.detach()), float(distance.detach())
            self._keep()
        return value.detach()

    def result(self, history: list[float]) -> _Result:
        targets = self._hard() if self.labels is None else self.labels
        return _Result(self.best, targets, self.masks, self.score, tuple(history))

    def _keep(self) -> None:
        self.best, self.best_guess = self.x.detach().clone(), self.guess.detach().clone()
        masks = self.search.attacker.masks
        self.masks = {n: m.guess.detach().clone() for n, m in masks.items()}

    def _targets(self) -> Tensor:
        return (
            _soft(self.search.attacker.client.loss, self.guess)
            if self.labels is None
            else self.labels
        )

    def _hard(self) -> Tensor:
        loss = self.search.attacker.client.loss
        soft = _soft(loss, self.best_guess)
        return soft.argmax(dim=-1) if isinstance(loss, nn.CrossEntropyLoss) else soft


def _soft(loss: Loss, guess: Tensor) -> Tensor:
    """Turn free numbers into labels that the loss takes."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return guess.softmax(dim=-1)
    return guess.sigmoid() if isinstance(loss, nn.BCEWithLogitsLoss) else guess


@dataclass
class _DecayedAdam:
    """Adam whose rate is divided by ten at each of :data:`DECAYS`."""

    adam: Any
    steps: int
    taken: int = 0

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        value: Tensor = self.adam.step(closure)
        self.taken += 1
        if self.taken in {int(self.steps * part) for part in DECAYS}:
            for group in self.adam.param_groups:
                group["lr"] /= 10
        return value


def _stuck(history: Sequence[float], patience: int | None) -> bool:
    if patience is None or len(history) <= patience:
        return False
    return min(history[-patience:]) > (1 - IMPROVED) * min(history[:-patience])


def _runs(
    search: _Search,
    labels: Tensor | None,
    start: Start | Tensor | None,
    restarts: int,
    generator: torch.Generator,
) -> list[_Result]:
    runs: list[_Result] = []
    for place in range(restarts):
        own = place > 0 and isinstance(start, Tensor)
        begin = search.plan.start if start is None or own else start
        x = _start(search.attacker, begin, generator)
        guess = _guesses(search.attacker, x, labels is None, generator)
        runs.append(search.run(x, labels, guess))
        if runs[-1].score <= search.tolerance:
            break
    return runs


def _start(attacker: _Attacker, start: Start | Tensor, generator: torch.Generator) -> Tensor:
    shape = (attacker.client.update.samples, *attacker.shape)
    if isinstance(start, Tensor):
        x = checks.shaped(start, "start", shape)
    elif start in STARTS:
        x = STARTS[start](shape, generator)
    else:
        raise UnknownNameError(f"No start {start!r}; there are {', '.join(STARTS)}.")
    return x.to(attacker.device, attacker.dtype, copy=True)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    like = {"dtype": torch.float64, "device": generator.device}
    return torch.randn(shape, generator=generator, **like)  # type: ignore[call-overload, no-any-return]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.empty(shape, dtype=torch.float64, device=generator.device)
    return x.uniform_(generator=generator)


def _patterned(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random quarter, repeated twice each way."""
    if len(shape) != 4:
        return _uniform(shape, generator)
    height, width = shape[-2:]
    tile = _uniform((*shape[:-2], -(-height // 2), -(-width // 2)), generator)
    return tile.repeat(1, 1, 2, 2)[..., :height, :width]


STARTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "patterned": _patterned,
}


def _guesses(
    attacker: _Attacker, x: Tensor, with_labels: bool, generator: torch.Generator
) -> Tensor:
    """Draw the masks to begin from, and the labels' logits where they are guessed along."""
    shapes: dict[str, torch.Size] = {}
    hooks = [
        mask.register_forward_hook(lambda _, args, out, n=name: shapes.update({n: out.shape}))
        for name, mask in attacker.masks.items()
    ]
    with torch.no_grad():
        for mask in attacker.masks.values():
            mask.guess = torch.empty(0)
        with checks.fitting(f"Model and loss do not take inputs {tuple(x.shape)}"):
            output = attacker.client.model(x)
    for hook in hooks:
        hook.remove()
    for name, mask in attacker.masks.items():
        kept = _uniform(tuple(shapes[name]), generator) < 1 - mask.p
        mask.guess = kept.to(attacker.device, attacker.dtype).requires_grad_()
    if not with_labels:
        return torch.empty(0)
    return _normal(tuple(output.shape), generator).to(attacker.device, attacker.dtype)

r"""Defenses, each beside the closed-form attack of a server that knows of it.

A defense on what is sent maps an :class:`~gradinv_edu.sharing.Update` to another, so that it goes
behind :func:`~gradinv_edu.sharing.observe`; one by design maps a model to another. A server knows
the protocol: the defense and its parameters, never its random draws.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from . import checks
from .errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from .recursion import Recovery
from .sharing import Loss, Update, observe
from .systems import LayerSystem

Defense = Callable[[Update], Update]

# --- after the gradient: norm and noise ---------------------------------------------------


def clip(update: Update, norm: float) -> Update:
    r""":math:`g \leftarrow g \cdot \min(1,\, C / \lVert g \rVert)`, over all parameters together.

    A rescaling by one number; a ratio of two entries does not see it. Implements :eq:`clipping`.

    Parameters
    ----------
    update : Update
        What the client would send.
    norm : float
        :math:`C`, the largest norm that leaves the client.

    Returns
    -------
    Update
        In the same dtypes.

    Raises
    ------
    InvalidArgumentError
        If ``norm`` is not a positive number.
    InvalidTensorError
        If the update holds NaN or infinite entries.

    Notes
    -----
    Source: Abadi et al. (2016).
    """
    _positive(norm, "norm")
    factor = norm / max(_norm(update), norm)
    return _each(update, lambda g: g * factor)


def add_noise(update: Update, sigma: float, generator: torch.Generator | None = None) -> Update:
    r""":math:`g \leftarrow g + \mathcal N(0, \sigma^2)`, to every entry on its own.

    Noise without clipping promises nothing, since no bound is known on what one sample can
    change: for a promise take :func:`dp_sgd`. Implements :eq:`noise`.

    Parameters
    ----------
    update : Update
        What the client would send.
    sigma : float
        Standard deviation, in units of the gradient.
    generator : torch.Generator, optional
        Of the noise; ``None``: a fixed seed.

    Returns
    -------
    Update
        In the same dtypes.

    Raises
    ------
    InvalidArgumentError
        If ``sigma`` is negative or not a number.
    InvalidTensorError
        If the update holds NaN or infinite entries.
    """
    _number(sigma, "sigma", lambda v: v >= 0, "zero or more")
    source = _source(generator)
    return _each(update, lambda g: g + sigma * _normal(g, source))


# --- after the gradient: fewer entries ----------------------------------------------------


def keep_largest(update: Update, fraction: float) -> Update:
    r""":math:`g \leftarrow M \odot g`, :math:`M = 1` at the entries of largest size.

    Top-k sparsification, tensor by tensor: of each, :math:`\lceil` ``fraction`` · entries
    :math:`\rceil` are kept, the others are zero.

    Parameters
    ----------
    update : Update
        What the client would send.
    fraction : float
        Share that is kept, in (0, 1].

    Returns
    -------
    Update
        In the same dtypes; the pruned entries are its zeros.

    Raises
    ------
    InvalidArgumentError
        If ``fraction`` is not in (0, 1].
    InvalidTensorError
        If the update holds NaN or infinite entries.
    """
    _share(fraction)
    return _each(update, lambda g: _masked(g, g.abs().flatten().topk(_kept(g, fraction)).indices))


def keep_random(
    update: Update,
    fraction: float,
    generator: torch.Generator | None = None,
    *,
    unbiased: bool = False,
) -> Update:
    r""":math:`g \leftarrow M \odot g`, :math:`M = 1` at entries drawn by lot.

    Parameters
    ----------
    update : Update
        What the client would send.
    fraction : float
        Share that is kept of each tensor, in (0, 1]; rounded up to whole entries.
    generator : torch.Generator, optional
        Of the lots; ``None``: a fixed seed.
    unbiased : bool
        Divide what is kept by the share kept, so that the expectation is the gradient.

    Returns
    -------
    Update
        In the same dtypes.

    Raises
    ------
    InvalidArgumentError
        If ``fraction`` is not in (0, 1].
    InvalidTensorError
        If the update holds NaN or infinite entries.
    """
    _share(fraction)
    source = _source(generator)

    def prune(g: Tensor) -> Tensor:
        order = torch.randperm(g.numel(), generator=source, device=source.device)
        kept = _kept(g, fraction)
        pruned = _masked(g, order[:kept].to(g.device))
        return pruned * (g.numel() / kept) if unbiased else pruned

    return _each(update, prune)


# --- after the gradient: fewer digits -----------------------------------------------------


def quantize(update: Update, bits: int, generator: torch.Generator | None = None) -> Update:
    r""":math:`g \leftarrow \tfrac{s}{q}\,\operatorname{round}(\tfrac{q}{s}\, g)`, :math:`s = \max|g|`, :math:`q = 2^{\text{bits}-1}-1`.

    Every tensor keeps its largest size :math:`s` and, for each entry, one of :math:`2q + 1`
    evenly spaced levels. Implements :eq:`quantization`.

    Parameters
    ----------
    update : Update
        What the client would send.
    bits : int
        Bits for an entry, sign included: 2 to 16.
    generator : torch.Generator, optional
        If given, an entry is rounded up or down by lot, so that its expectation is the entry;
        ``None``: to the nearest level.

    Returns
    -------
    Update
        The values that the bits stand for, in the same dtypes.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is not a whole number from 2 to 16. For one bit see :func:`sign`.
    InvalidTensorError
        If the update holds NaN or infinite entries.

    Notes
    -----
    Source: Alistarh et al. (2017) for rounding by lot.
    """  # noqa: E501
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise InvalidArgumentError(
            f"bits must be a whole number from 2 to 16, got {bits!r}; for one bit take sign()."
        )
    q = 2 ** (bits - 1) - 1
    return _each(update, lambda g: _rounded(g, q, generator))


def sign(update: Update) -> Update:
    r""":math:`g \leftarrow \operatorname{sign}(g)`: one bit an entry, all sizes gone.

    Parameters
    ----------
    update : Update
        What the client would send.

    Returns
    -------
    Update
        Of entries −1, 0 and 1, in the same dtypes.

    Raises
    ------
    InvalidTensorError
        If the update holds NaN or infinite entries.

    Notes
    -----
    Source: Bernstein et al. (2018).
    """
    return _each(update, torch.sign)


def half(update: Update) -> Update:
    r""":math:`g \leftarrow \operatorname{float16}(g)`: eleven binary digits, and nothing under 6e-8.

    Parameters
    ----------
    update : Update
        What the client would send.

    Returns
    -------
    Update
        In float16, so that attacks ask for no more digits than it has.

    Raises
    ------
    InvalidTensorError
        If an entry is larger than float16 can hold, 65504, or is NaN.
    """  # noqa: E501
    for name, g in _gradients(update).items():
        checks.finite(g.to(torch.float16), f"The float16 gradient of {name}")
    return replace(update, gradients={n: g.to(torch.float16) for n, g in update.gradients.items()})


# --- differential privacy -----------------------------------------------------------------


@dataclass(frozen=True)
class PrivateUpdate:
    """An update with the promise that goes with it.

    Attributes
    ----------
    update : Update
        Clipped sample by sample, summed, noised, divided by the batch size.
    epsilon, delta : float
        The (ε, δ) of all ``steps`` rounds together, from Opacus's accountant.
    """

    update: Update
    epsilon: float
    delta: float


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
    r""":math:`\tfrac1N (\sum_i g_i \min(1, C/\lVert g_i\rVert) + \mathcal N(0, \sigma^2 C^2))`.

    One round of DP-SGD by Opacus's own engine, on a copy of the model. Implements :eq:`dp-sgd`.

    Parameters
    ----------
    model : torch.nn.Module
        The network that the server sent.
    loss : torch.nn.Module
        With ``reduction`` "mean" or "sum".
    inputs, targets : Tensor, (N, …)
        The batch.
    noise_multiplier : float
        :math:`\sigma`, in units of the clipping norm.
    norm : float
        :math:`C`, the clipping norm of one sample's gradient.
    delta : float
        :math:`\delta` for which :math:`\varepsilon` is stated.
    dataset_size : int, optional
        Samples from which the batch was drawn; ``None``: the batch is all there is.
    steps : int
        Rounds that :math:`\varepsilon` accounts for.
    generator : torch.Generator, optional
        Of the noise; ``None``: a fixed seed. A real client never fixes it.

    Returns
    -------
    PrivateUpdate

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or Opacus is not installed.
    InvalidTensorError
        If the samples are not finite floating point, or do not fit the targets or the model.
    UnsupportedLayerError
        If Opacus has no per-sample gradient for a layer, such as batch norm.
    UnsupportedLossError
        If the loss is reduced neither to a mean nor to a sum.

    Notes
    -----
    Opacus's accountant assumes that each sample is drawn by lot (Poisson sampling); the engine's
    Rényi accountant is used. Source: Abadi et al. (2016).
    """
    _number(noise_multiplier, "noise_multiplier", lambda v: v >= 0, "zero or more")
    _positive(norm, "norm")
    _batch(model, loss, inputs, targets)
    _number(delta, "delta", lambda v: 0 < v < 1, "between 0 and 1")
    population = len(inputs) if dataset_size is None else dataset_size
    _whole(steps, "steps", 1)
    _whole(population, "dataset_size", len(inputs))
    gradients = _private_gradient(
        model, loss, (inputs, targets), (noise_multiplier, norm), _source(generator)
    )
    epsilon = privacy_spent(noise_multiplier, len(inputs) / population, steps, delta)
    update = Update(gradients, batch_size=len(inputs), samples=len(inputs))
    return PrivateUpdate(update, epsilon, delta)


def privacy_spent(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float = 1e-5
) -> float:
    r""":math:`\varepsilon` of ``steps`` rounds of DP-SGD, from Opacus's Rényi accountant.

    Parameters
    ----------
    noise_multiplier : float
        :math:`\sigma`, in units of the clipping norm.
    sample_rate : float
        Share of the data in a batch.
    steps : int
        Number of rounds.
    delta : float
        :math:`\delta` for which it is stated.

    Returns
    -------
    float
        Infinite without noise.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or Opacus is not installed.
    """
    _number(noise_multiplier, "noise_multiplier", lambda v: v >= 0, "zero or more")
    _number(sample_rate, "sample_rate", lambda v: 0 < v <= 1, "in (0, 1]")
    _number(delta, "delta", lambda v: 0 < v < 1, "between 0 and 1")
    _whole(steps, "steps", 1)
    if noise_multiplier == 0:
        return math.inf
    accountant = _opacus("accountants").RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    orders = [1 + 10 ** (x / 40 - 5) for x in range(240)] + list(range(12, 512))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a best order at the end of the list: still a bound
        return float(accountant.get_epsilon(delta, alphas=orders))


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
    r""":math:`\theta \leftarrow \theta - \eta\,\tilde g`, :math:`\tilde g` as in :func:`dp_sgd`: DP-SGD by Opacus's engine.

    Parameters
    ----------
    model : torch.nn.Module
        To start from; it is not changed.
    loss : torch.nn.Module
        With ``reduction`` "mean" or "sum".
    inputs, targets : Tensor, (N, …)
        All data; each round draws every sample with probability ``batch_size / N``.
    noise_multiplier : float
        :math:`\sigma`, in units of the clipping norm.
    steps : int
        Number of rounds.
    norm : float
        Clipping norm of one sample's gradient.
    batch_size : int
        Expected number of samples in a round.
    learning_rate : float
        :math:`\eta`.
    delta : float
        For which :math:`\varepsilon` is stated.
    generator : torch.Generator, optional
        Of draws and noise; ``None``: a fixed seed.

    Returns
    -------
    torch.nn.Module, float
        A trained copy in evaluation mode, and :math:`\varepsilon`.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or Opacus is not installed.
    InvalidTensorError
        If the samples are not finite floating point, or do not fit the targets or the model.
    UnsupportedLayerError
        If Opacus has no per-sample gradient for a layer.
    UnsupportedLossError
        If the loss is reduced neither to a mean nor to a sum.
    """  # noqa: E501
    _positive(norm, "norm")
    _positive(learning_rate, "learning_rate")
    _whole(batch_size, "batch_size", 1)
    _batch(model, loss, inputs, targets)
    epsilon = privacy_spent(noise_multiplier, batch_size / len(inputs), steps, delta)
    student, source = copy.deepcopy(model).train(), _source(generator)
    samples = torch.utils.data.TensorDataset(inputs, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for one gradient
        private, optimizer, loader = (
            _opacus("")
            .PrivacyEngine(accountant="rdp")
            .make_private(
                module=student,
                optimizer=torch.optim.SGD(student.parameters(), lr=learning_rate),
                data_loader=torch.utils.data.DataLoader(samples, batch_size, generator=source),
                noise_multiplier=noise_multiplier,
                max_grad_norm=norm,
                loss_reduction=getattr(loss, "reduction", "mean"),
                noise_generator=source,
            )
        )
        rounds = (batch for _ in range(steps) for batch in loader)
        for x, y in islice(rounds, steps):
            optimizer.zero_grad()
            loss(private(x), y).backward()
            optimizer.step()
    trained = copy.deepcopy(model)
    trained.load_state_dict(private._module.state_dict())
    return trained.eval(), epsilon


def _batch(model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Refuse a batch that Opacus would stumble over, or answer with NaN."""
    if getattr(loss, "reduction", "mean") not in ("mean", "sum"):
        raise UnsupportedLossError(f"{loss!r} is no one number: use reduction='mean' or 'sum'.")
    _opacus_supports(copy.deepcopy(model).train())
    observe(model, loss, inputs[:1], targets[:1])
    checks.finite(inputs, "inputs")
    _as_many(inputs, targets)


def _as_many(inputs: Tensor, targets: Tensor) -> None:
    if not 0 < len(inputs) == len(targets):
        raise InvalidTensorError(
            f"There are {len(inputs)} inputs and {len(targets)} targets: there must be as many of "
            "one as of the other, one or more."
        )


def _private_gradient(
    model: nn.Module,
    loss: nn.Module,
    batch: tuple[Tensor, Tensor],
    noise: tuple[float, float],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    client = copy.deepcopy(model).train()
    device = next(client.parameters()).device
    samples = torch.utils.data.TensorDataset(*(t.to(device) for t in batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus, of its fast random numbers; torch, of its hooks
        _fill_gradients(client, loss, samples, noise, generator)
    found = {n: p.grad for n, p in client.named_parameters() if p.grad is not None}
    return {n: g.detach().clone() for n, g in found.items()}


def _fill_gradients(
    client: nn.Module,
    loss: nn.Module,
    samples: torch.utils.data.TensorDataset,
    noise: tuple[float, float],
    generator: torch.Generator,
) -> None:
    engine = _opacus("").PrivacyEngine(accountant="rdp")
    private, optimizer, _ = engine.make_private(
        module=client,
        optimizer=torch.optim.SGD([p for p in client.parameters() if p.requires_grad], lr=1.0),
        data_loader=torch.utils.data.DataLoader(samples, batch_size=len(samples)),
        noise_multiplier=noise[0],
        max_grad_norm=noise[1],
        poisson_sampling=False,
        loss_reduction=getattr(loss, "reduction", "mean"),
        noise_generator=generator,
    )
    loss(private(samples.tensors[0]), samples.tensors[1]).backward()
    optimizer.pre_step()


def _opacus_supports(model: nn.Module) -> None:
    problems = _opacus("validators").ModuleValidator.validate(model, strict=False)
    if problems:
        raise UnsupportedLayerError(
            f"Opacus has no per-sample gradient for this model: {problems[0]}".split("\n")[0]
        )


def _opacus(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"opacus.{module}" if module else "opacus")
    except ImportError as error:
        raise InvalidArgumentError(
            "DP-SGD runs on Opacus, which is not installed: uv pip install opacus."
        ) from error


# --- by design ----------------------------------------------------------------------------


def with_dropout(model: nn.Sequential, rate: float) -> nn.Sequential:
    r""":math:`a \leftarrow \tfrac{1}{1-p}\, m \odot a`, :math:`m_i \sim \text{Bernoulli}(1-p)`, before the classifier.

    A copy of the model with a dropout layer between encoder and classifier, its last dense
    layer. Implements :eq:`dropout-layer`.

    Parameters
    ----------
    model : torch.nn.Sequential
        Ends in a dense layer, or has one.
    rate : float
        :math:`p`, the probability with which a unit is dropped in training mode, in [0, 1).

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
    """  # noqa: E501
    _number(rate, "rate", lambda v: 0 <= v < 1, "in [0, 1)")
    layers = _layers(model)
    place = _last_dense(layers)
    dropout = nn.Dropout(rate).train(model.training)
    return nn.Sequential(*layers[:place], dropout, *layers[place:]).train(model.training)


def filter_bound(
    channels: int, size: int, kernel: int, stride: int = 1, padding: int = 0, *, rate: float = 0.0
) -> int:
    r""":math:`F P + F c f^2 - F^2 < n`: the most filters with which a first layer must lack rank.

    A layer of :math:`F` filters, :math:`f \times f`, on :math:`c` channels gives :math:`F P`
    weight constraints, :math:`P` its positions, and :math:`F c f^2` gradient constraints, among
    which :math:`F^2` are dependent; :math:`n` is the number of pixels. A picture can be changed
    along what is missing and gives the same gradient in *every* layer. Implements
    :eq:`filter-bound`.

    Parameters
    ----------
    channels, size : int
        Of the square picture.
    kernel, stride, padding : int
        Of the convolution.
    rate : float
        Of dropout right above it. A share :math:`1 - p` of the weight constraints stays; and
        of the dependences :math:`F`, since the others need outputs that were dropped.

    Returns
    -------
    int
        Largest :math:`F`, up to :math:`c f^2`, for which the count falls short of the pixels;
        0 if even one filter's does not.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or the kernel does not fit.
    """
    for value, name in ((channels, "channels"), (size, "size"), (kernel, "kernel")):
        _whole(value, name, 1)
    _whole(stride, "stride", 1)
    _whole(padding, "padding", 0)
    _number(rate, "rate", lambda v: 0 <= v < 1, "in [0, 1)")
    if kernel > size + 2 * padding:
        raise InvalidArgumentError(f"A kernel of {kernel} does not fit a picture of {size}.")
    positions = ((size + 2 * padding - kernel) // stride + 1) ** 2
    pixels, places = channels * size**2, channels * kernel**2
    filters = 0
    # more filters than places of the kernel are not independent
    while filters < places and _count(filters + 1, positions, places, rate) < pixels:
        filters += 1
    return filters


def _count(filters: int, positions: int, places: int, rate: float) -> float:
    dependent = 1 if rate else filters
    return filters * ((1 - rate) * positions + places - dependent)


def soteria(model: nn.Sequential, update: Update, inputs: Tensor, fraction: float) -> Update:
    r""":math:`\partial L/\partial W_{:,i} \leftarrow 0` for the largest :math:`|r_i| / \lVert \partial r_i/\partial x\rVert`.

    Columns of the classifier's weight gradient are pruned, one for each feature :math:`r_i` whose
    loss is said to put the reconstruction farthest off; everything else is sent as it is. Implements
    :eq:`soteria-columns`.

    Parameters
    ----------
    model : torch.nn.Sequential
        Of the client; its last dense layer is the one defended.
    update : Update
        What the client would send.
    inputs : Tensor, (1, …)
        The client's sample.
    fraction : float
        Share of the features whose columns are kept, in (0, 1].

    Returns
    -------
    Update
        In the same dtypes.

    Raises
    ------
    InvalidArgumentError
        If ``fraction`` is not in (0, 1].
    InvalidTensorError
        If the update does not belong to the model, or the input is not one finite sample.
    UnsupportedLayerError
        If the model is not sequential or has no dense layer.

    Notes
    -----
    Source: Sun et al. (2021), whose published code ranks the features by the size of their
    derivative over that of the feature.
    """  # noqa: E501
    _share(fraction)
    update.check(model)
    layers = _layers(model)
    place = _last_dense(layers)
    if len(checks.finite(inputs, "inputs")) != 1:
        raise InvalidTensorError(
            f"inputs has {len(inputs)} samples; Soteria defends one at a time."
        )
    encoder = copy.deepcopy(nn.Sequential(*layers[:place])).eval()
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs.detach().to(next(model.parameters()).dtype).requires_grad_()
        with checks.fitting(f"The model does not take inputs of shape {tuple(x.shape[1:])}"):
            r = encoder(x).flatten()
        unit = torch.eye(len(r), dtype=r.dtype, device=r.device)
        slopes = vmap(lambda v: torch.autograd.grad(r, x, v, retain_graph=True)[0])(unit)
    score = slopes.flatten(1).norm(dim=1) / (r.detach().abs() + 0.1)
    pruned = score.argsort()[: len(r) - _kept(score, fraction)]
    name = f"{_names(model)[place]}.weight"
    defended = update.gradients[name].clone()
    defended[:, pruned] = 0
    return replace(update, gradients={**update.gradients, name: defended})


class Bottleneck(nn.Module):
    r""":math:`\mu, \log\sigma^2 = E h,\ b = \mu + \sigma \odot \epsilon,\ \hat h = D b`: PRECODE's block.

    A variational bottleneck: the gradient of everything above the draw :math:`\epsilon`
    depends on it. Implements :eq:`variational-bottleneck`.

    Parameters
    ----------
    features : int
        Of :math:`h` and :math:`\hat h`.
    size : int
        Of :math:`b`.
    generator : torch.Generator, optional
        Of the weights; ``None``: a fixed seed.
    dtype : torch.dtype
        Of the weights.

    Notes
    -----
    Source: Scheliga, Mäder and Seeland (2022). Draws come from torch's global generator, as
    dropout's do, so that :func:`~gradinv_edu.sharing.observe` seeds them.
    """  # noqa: E501

    def __init__(
        self,
        features: int,
        size: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from .models import _drawn

        super().__init__()
        _whole(features, "features", 1)
        _whole(size, "size", 1)
        encode = nn.Linear(features, 2 * size, device="meta")
        decode = nn.Linear(size, features, device="meta")
        pair = _drawn(nn.Sequential(encode, decode), generator, dtype, None)
        self.encode, self.decode = pair[0], pair[1]

    def forward(self, h: Tensor) -> Tensor:
        """Draw once and decode.

        Parameters
        ----------
        h : Tensor, (N, features)

        Returns
        -------
        Tensor, (N, features)
        """
        mean, log_variance = self.encode(h).chunk(2, dim=-1)
        drawn: Tensor = self.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        return drawn


# --- what it costs ------------------------------------------------------------------------


def train(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    defense: Defense | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r""":math:`\theta \leftarrow \theta - \eta\, D(g)`: federated SGD behind a defense :math:`D`.

    Each step a client draws a batch, and the server steps along what it receives.

    Parameters
    ----------
    model : torch.nn.Module
        To start from; it is not changed.
    loss : callable
        The clients'.
    inputs, targets : Tensor, (N, …)
        All clients' data.
    steps : int
        Number of rounds.
    batch_size : int
        Samples in a round, drawn without replacement.
    learning_rate : float
        :math:`\eta`.
    defense : callable, optional
        Update to update; ``None``: nothing in between.
    generator : torch.Generator, optional
        Of the batches and of dropout; ``None``: a fixed seed.

    Returns
    -------
    torch.nn.Module
        A trained copy, in the mode of ``model``.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible.
    """
    _whole(steps, "steps", 0)
    _whole(batch_size, "batch_size", 1)
    _positive(learning_rate, "learning_rate")
    _as_many(inputs, targets)
    source = _source(generator)
    student = copy.deepcopy(model)
    for _ in range(steps):
        order = torch.randperm(len(inputs), generator=source, device=source.device)
        chosen = order[:batch_size].to(inputs.device)
        update = observe(student, loss, inputs[chosen], targets[chosen], generator=source)
        _step(student, defense(update) if defense else update, learning_rate)
    return student


def _step(model: nn.Module, update: Update, learning_rate: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in update.gradients:
                parameter.sub_(learning_rate * update.gradients[name].to(parameter.dtype))


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of samples whose largest logit is at their label, in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier; its mode is not changed.
    inputs, targets : Tensor, (N, …)
        Samples and class indices.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    InvalidTensorError
        If there are not as many inputs as targets, or none, or a logit is NaN or infinite.
    """
    _as_many(inputs, targets)
    judge = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = judge(inputs.to(next(judge.parameters()).dtype))
    checks.finite(logits, "The model's output")
    return float((logits.argmax(1) == targets).double().mean())


# --- the server that knows ----------------------------------------------------------------


def recover_pruned(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    r""":math:`x_i = \sum_j M_{ji} k_j G_{ji} \,/\, \sum_j M_{ji} k_j^2`: a pruned dense layer's input.

    Zeros are taken for pruned entries and left out. Rows whose bias gradient was pruned get
    their :math:`k_j` from the entries of the input that are known already, and serve in turn.
    Implements :eq:`pruned-rank-one`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``, zero where pruned.
    bias_gradient : Tensor
        ``∂L/∂b``, ``(m,)``, zero where pruned.

    Returns
    -------
    Tensor
        ``(n,)``, float64; NaN where the whole column is empty. There the input is zero, or too
        small for any entry to have been kept, or out of luck.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    VanishingGradientError
        If the bias gradient is zero everywhere.
    """  # noqa: E501
    x, _ = _complete(weight_gradient, bias_gradient)
    return x


def complete_pruned(model: nn.Sequential, update: Update, loss: nn.CrossEntropyLoss) -> Update:
    r""":math:`\partial L/\partial W = k\,x^\top` where it was pruned; what stays unknown, left out.

    The lowest dense layer gives its input by :func:`recover_pruned`. From there the server runs
    the layers above itself, and so knows their gradients whole. Of the layers below, a gradient
    with zeros is taken out of the update, since a zero may be a pruned entry. What comes out
    goes into :func:`~gradinv_edu.recursion.recover`, whose ``exact`` then speaks of this update:
    an input of the dense layer whose column is empty is taken for zero.

    Parameters
    ----------
    model : torch.nn.Sequential
        The network that the server sent.
    update : Update
        One client's, for one sample.
    loss : torch.nn.CrossEntropyLoss
        The client's; the label is at the most negative entry of its last output gradient.

    Returns
    -------
    Update
        Without zeros that stand for unknown numbers.

    Raises
    ------
    InvalidTensorError
        If the update does not belong to the model.
    InvalidArgumentError
        If it is of several samples or local steps, whose gradient is no single product.
    UnsupportedLossError
        If the loss is not cross-entropy.
    UnsupportedLayerError
        If the model is not sequential, no dense layer has sent a bias gradient, or dropout is
        at work above it.
    VanishingGradientError
        If that bias gradient is zero everywhere.
    """
    update.check(model)
    _one_sample(update, loss)
    layers, names = _layers(model), _names(model)
    place = _lowest_dense(layers, names, update)
    x, _ = _complete(*_dense_gradients(update, names[place]))
    _, k = _complete(*_dense_gradients(update, names[_last_dense(layers)]))
    label = torch.nan_to_num(k).argmin()
    known = _gradients_above(layers[place:], names[place:], torch.nan_to_num(x), label, loss)
    below = {n: g for n, g in update.gradients.items() if n not in known and bool((g != 0).all())}
    like = {n: known[n].to(g.dtype) for n, g in update.gradients.items() if n in known}
    return replace(update, gradients={**below, **like})


def _one_sample(update: Update, loss: nn.Module) -> None:
    if update.samples != 1 or update.local_steps != 1:
        raise InvalidArgumentError(
            f"The update is of {update.samples} samples and {update.local_steps} local steps; what "
            "was pruned can be completed for one sample and one step."
        )
    if not isinstance(loss, nn.CrossEntropyLoss):
        raise UnsupportedLossError(
            f"The label is read for CrossEntropyLoss, not for {type(loss).__name__}."
        )


def _dense_gradients(update: Update, name: str) -> tuple[Tensor, Tensor]:
    return update.gradients[f"{name}.weight"], update.gradients[f"{name}.bias"]


def _lowest_dense(layers: list[nn.Module], names: list[str], update: Update) -> int:
    for place, (layer, name) in enumerate(zip(layers, names, strict=True)):
        sent = {f"{name}.weight", f"{name}.bias"} <= set(update.gradients)
        if isinstance(layer, nn.Linear) and sent:
            return place
    raise UnsupportedLayerError("No dense layer sent a weight and a bias gradient to begin at.")


def _gradients_above(
    layers: list[nn.Module], names: list[str], x: Tensor, label: Tensor, loss: nn.Module
) -> dict[str, Tensor]:
    for layer, name in zip(layers, names, strict=True):
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p:
            raise UnsupportedLayerError(f"{name} drops units at random, above the layer to begin.")
    above = nn.Sequential(*layers).double()
    with torch.inference_mode(False), torch.enable_grad():
        value = loss(above(x.clone()[None]), label.clone()[None])
        found = torch.autograd.grad(value, list(above.parameters()))
    renamed = [f"{names[int(n.split('.')[0])]}.{n.split('.', 1)[1]}" for n, _ in _named(above)]
    return dict(zip(renamed, found, strict=True))


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def most_likely_input(
    model: nn.Sequential, recovery: Recovery, loss: Loss, examples: Tensor
) -> Tensor:
    r""":math:`\hat x = \bar x + C A^\top (A C A^\top)^+ (A x - A \bar x)`: guessed.

    Where the first layer's equations :math:`A` leave directions open, a server with examples of
    the same kind takes the most likely input among those that fit: the examples' mean
    :math:`\bar x` and covariance :math:`C` make a Gaussian, conditioned on the equations.
    Implements :eq:`gaussian-prior`.

    Parameters
    ----------
    model : torch.nn.Sequential
        Begins with a dense or convolutional layer.
    recovery : Recovery
        Of an update of this model; its answer satisfies the equations.
    loss : callable
        The client's.
    examples : Tensor, (N, …)
        Public samples, of the input's shape.

    Returns
    -------
    Tensor, (1, …)
        Of the input's shape, float64.

    Raises
    ------
    InvalidTensorError
        If the examples are not finite or of another shape.
    UnsupportedLayerError
        If the model is not sequential.
    """
    x = recovery.inputs
    public = checks.finite(examples, "examples")
    if public.shape[1:] != x.shape[1:]:
        raise InvalidTensorError(
            f"examples have shape {tuple(public.shape)}; the input is {tuple(x.shape[1:])}."
        )
    A = _first_equations(model, x, recovery.targets, loss)
    mean = public.mean(0, keepdim=True)
    spread = (public - mean).flatten(1)
    C = spread.T @ spread / len(spread)
    gain: Tensor = C @ A.T @ torch.linalg.pinv(A @ C @ A.T, hermitian=True, rtol=1e-10)
    likely: Tensor = mean + (gain @ A @ (x - mean).flatten()).reshape(x.shape)
    return likely


def _first_equations(model: nn.Sequential, x: Tensor, target: Tensor | None, loss: Loss) -> Tensor:
    """Orthonormal rows that span what the first layer's equations say, at an answer ``x``."""
    layers = [copy.deepcopy(layer).double().eval() for layer in _layers(model)]
    with torch.inference_mode(False), torch.enable_grad():
        z = layers[0](x).detach().requires_grad_()
        value = loss(nn.Sequential(*layers[1:])(z), target)  # type: ignore[arg-type]
        (k,) = torch.autograd.grad(value, z)
    matrix = LayerSystem(layers[0], k, tuple(x.shape[1:])).to_dense()
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    told: Tensor = right[values > 1e-9 * values[0]]
    return told


def _complete(weight_gradient: Tensor, bias_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a pruned dense layer, NaN where nothing tells them."""
    G = checks.shaped(weight_gradient, "weight_gradient", (None, None))
    b = checks.shaped(bias_gradient, "bias_gradient", (len(G),))
    k = checks.not_all_zero(b, "bias_gradient").clone()
    k[k == 0] = math.nan
    M = (G != 0).to(G.dtype)
    x = torch.full_like(G[0], math.nan)
    before = -1
    while before < (before := int(x.isfinite().sum() + k.isfinite().sum())):
        x = _fitted(G, M, k)
        k = torch.where(k.isnan(), _fitted(G.T, M.T, x), k)
    return x, k


def _fitted(G: Tensor, M: Tensor, k: Tensor) -> Tensor:
    """Each column's least-squares multiple of ``k`` over its known entries."""
    known = torch.nan_to_num(k)
    weight = M.T @ known.square()
    return torch.where(weight > 0, (M * G).T @ known, math.nan) / weight


# --- small parts --------------------------------------------------------------------------


def _gradients(update: Update) -> dict[str, Tensor]:
    if not isinstance(update, Update):
        raise InvalidTensorError(
            f"A defense takes an Update, as from observe(), got {type(update).__name__}."
        )
    return update.gradients


def _each(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    """Change every tensor in float64 and give it back in its own dtype."""
    gradients = {
        name: change(checks.finite(g, f"The gradient of {name}")).to(g.dtype)
        for name, g in _gradients(update).items()
    }
    return replace(update, gradients=gradients)


def _norm(update: Update) -> float:
    return math.sqrt(
        sum(
            float(checks.finite(g, f"The gradient of {n}").square().sum())
            for n, g in _gradients(update).items()
        )
    )


def _normal(g: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(g.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.to(g.device)


def _masked(g: Tensor, kept: Tensor) -> Tensor:
    mask = torch.zeros(g.numel(), dtype=g.dtype, device=g.device)
    mask[kept] = 1
    return g * mask.reshape(g.shape)


def _kept(g: Tensor, fraction: float) -> int:
    # 0.07 · 100 is a little more than 7
    return min(g.numel(), math.ceil(fraction * g.numel() - 1e-9))


def _rounded(g: Tensor, q: int, generator: torch.Generator | None) -> Tensor:
    largest = g.abs().max()
    if not largest:
        return g
    level = g / largest * q
    if generator is None:
        return level.round() * (largest / q)
    lot = torch.rand(g.shape, generator=generator, device=generator.device, dtype=g.dtype)
    return (level + lot.to(g.device)).floor().clamp(-q, q) * (largest / q)


def _layers(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Sequential):
        raise UnsupportedLayerError(
            f"The model is a {type(model).__name__}; this needs an nn.Sequential, whose layers "
            "can be told apart."
        )
    return [copy.deepcopy(layer) for layer in model]


def _names(model: nn.Sequential) -> list[str]:
    return [name for name, _ in model.named_children()]


def _last_dense(layers: list[nn.Module]) -> int:
    for place in range(len(layers) - 1, -1, -1):
        if isinstance(layers[place], nn.Linear):
            return place
    raise UnsupportedLayerError("The model has no dense layer, so there is no classifier to find.")


def _source(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _number(value: float, name: str, possible: Callable[[float], bool], which: str) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not possible(value):
        raise InvalidArgumentError(f"{name} must be {which}, got {value!r}.")


def _positive(value: float, name: str) -> None:
    _number(value, name, lambda v: v > 0, "a positive number")


def _share(fraction: float) -> None:
    _number(fraction, "fraction", lambda v: 0 < v <= 1, "the share that is kept, in (0, 1]")


def _whole(value: int, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{name} must be a whole number from {least}, got {value!r}.")

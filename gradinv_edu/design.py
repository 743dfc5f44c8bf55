r"""Defense by design: networks that cannot tell the picture, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import checks
from .checks import checked
from .errors import InvalidArgumentError, InvalidTensorError, UnsupportedLayerError
from .recursion import Recovery
from .sharing import Loss, Update, observe
from .systems import LayerSystem

__all__ = ["accuracy", "filter_bound", "most_likely_input", "train"]


@checked
def filter_bound(
    channels: int, size: int, kernel: int, stride: int = 1, padding: int = 0, *, rate: float = 0.0
) -> int:
    r""":math:`C' P + C' C F^2 - C'^2 < n`: the most filters of a first layer that must lack rank.

    A layer of :math:`C'` filters, :math:`F \times F`, on :math:`C` channels gives :math:`C' P`
    weight constraints, :math:`P` its positions, and :math:`C' C F^2` gradient constraints, among
    which :math:`C'^2` are dependent; :math:`n` is the number of pixels. A picture can be changed
    along what is missing and gives the same gradient in *every* layer. Implements
    :eq:`filter-bound`.

    Parameters
    ----------
    channels, size : int
        Of the square picture.
    kernel, stride, padding : int
        Of the convolution.
    rate : float
        Of dropout right above it. On the mean a share :math:`1 - p_\text{drop}` of the weight
        constraints stays, so that with a rate the bound is one of the mean: a mask may keep more
        (:func:`~gradinv_edu.dropout.recovery_chance`). Of the dependences :math:`C'` are left,
        since the others need outputs that were dropped.

    Returns
    -------
    int
        Largest :math:`C'`, up to :math:`C F^2`, for which the count falls short of the pixels;
        0 if even one filter's does not.

    Raises
    ------
    InvalidArgumentError
        If a number is impossible, or the kernel does not fit.
    """
    for value, name in ((channels, "channels"), (size, "size"), (kernel, "kernel")):
        checks.whole(value, name)
    checks.whole(stride, "stride")
    checks.whole(padding, "padding", 0)
    checks.number(rate, "rate", "in [0, 1)", lambda p: 0 <= p < 1)
    if kernel > size + 2 * padding:
        raise InvalidArgumentError(f"A kernel of {kernel} does not fit a picture of {size}.")
    positions = ((size + 2 * padding - kernel) // stride + 1) ** 2
    pixels, places = channels * size**2, channels * kernel**2

    def equations(filters: int) -> float:
        dependent = filters if rate else filters**2
        return filters * ((1 - rate) * positions + places) - dependent

    filters = 0
    # more filters than places of the kernel are not independent
    while filters < places and equations(filters + 1) < pixels:
        filters += 1
    return filters


def most_likely_input(
    model: nn.Sequential, recovery: Recovery, loss: Loss, examples: Tensor
) -> Tensor:
    r""":math:`\hat x = \bar x + \Sigma A^\top (A \Sigma A^\top)^+ (A x - A \bar x)`.

    Where the first layer's equations :math:`A` leave directions open, a server with examples of
    the same kind takes the most likely input among those that fit: the examples' mean
    :math:`\bar x` and covariance :math:`\Sigma` make a Gaussian, conditioned on the equations.
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
    if not isinstance(model, nn.Sequential):
        raise UnsupportedLayerError(f"A {type(model).__name__} has no first layer to begin at.")
    x, public = recovery.inputs, checks.finite(examples, "examples")
    if public.shape[1:] != x.shape[1:]:
        raise InvalidTensorError(
            f"examples have shape {tuple(public.shape)}; the input is {tuple(x.shape[1:])}."
        )
    # the equations: orthonormal rows that span what the first layer says, at an answer x
    first, above = _halves(model)
    with torch.inference_mode(False), torch.enable_grad():
        z = first(x).detach().requires_grad_()
        (k,) = torch.autograd.grad(loss(above(z), recovery.targets), z)  # type: ignore[arg-type]
    matrix = LayerSystem(first, k, tuple(x.shape[1:])).to_dense()
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    A = rows[values > 1e-9 * values[0]]
    mean = public.mean(0, keepdim=True)
    spread = (public - mean).flatten(1)
    C = spread.T @ spread / len(spread)
    gain = C @ A.T @ torch.linalg.pinv(A @ C @ A.T, hermitian=True, rtol=1e-10)
    likely: Tensor = mean + (gain @ A @ (x - mean).flatten()).reshape(x.shape)
    return likely


def _halves(model: nn.Sequential) -> tuple[nn.Module, nn.Sequential]:
    layers = [copy.deepcopy(layer).double().eval() for layer in model]
    return layers[0], nn.Sequential(*layers[1:])


@checked
def train(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    client: Callable[..., Update] = observe,
    defense: Callable[[Update], Update] | None = None,
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
        :math:`\eta`, where the update does not name its own.
    client : callable
        ``client(model, loss, inputs, targets, generator=…)`` gives the update of one batch.
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
    InvalidTensorError
        If there are not as many inputs as targets, or none.
    """
    checks.whole(steps, "steps", 0)
    checks.whole(batch_size, "batch_size")
    checks.number(learning_rate, "learning_rate", "a positive number", lambda v: v > 0)
    checks.as_many(inputs, targets)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    student = copy.deepcopy(model)
    for _ in range(steps):
        order = torch.randperm(len(inputs), generator=source, device=source.device)
        chosen = order[:batch_size].to(inputs.device)
        update = client(student, loss, inputs[chosen], targets[chosen], generator=source)
        update = defense(update) if defense else update
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name in update.gradients:
                    pull = update.gradients[name].to(parameter.dtype)
                    parameter.sub_((update.learning_rate or learning_rate) * pull)
    return student


@checked
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
    checks.as_many(inputs, targets)
    network = copy.deepcopy(model).eval()
    like = next(network.parameters(), inputs)
    with torch.no_grad(), checks.fitting("Model and inputs do not fit"):
        logits = network(inputs.to(like))
    checks.finite(logits, "The model's output")
    return float((logits.argmax(1) == targets.to(logits.device)).double().mean())

r"""The networks of the papers, small enough to read, seeded by an explicit generator.

Every network is a plain :class:`torch.nn.Sequential` whose layers have PyTorch's usual initial
weights, uniform in :math:`\pm 1/\sqrt{\text{fan in}}` (LeNet: uniform in :math:`\pm 0.5`, as in
its paper). Weights are drawn in float64 and rounded to ``dtype``, so a float32 network is the
rounding of the float64 one with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import UnknownNameError

Shape = Sequence[int]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def perceptron(
    inputs: int,
    bias: bool = True,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """One neuron on all pixels of a picture: ``Flatten``, ``Linear(inputs, 1)``.

    Parameters
    ----------
    inputs : int
        Number of pixels times channels; pictures of any shape are flattened.
    bias : bool
        Whether the neuron has a bias.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Parameters ``1.weight`` of shape ``(1, inputs)`` and ``1.bias`` of shape ``(1,)``.

    Raises
    ------
    ValueError
        If ``inputs`` is not a positive whole number.
    """
    return mlp((inputs, 1), bias=bias, generator=generator, dtype=dtype, device=device)


def mlp(
    sizes: Shape,
    activation: str = "relu",
    bias: bool = True,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Dense layers with an activation between them, none after the last.

    Parameters
    ----------
    sizes : sequence of int
        ``(inputs, hidden, …, outputs)``: two sizes make one layer.
    activation : str
        One of :data:`ACTIVATIONS`.
    bias : bool
        Whether the layers have biases.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        ``Flatten``, then the dense layers at places 1, 3, 5, …

    Raises
    ------
    ValueError
        If there are fewer than two sizes or one is not a positive whole number.
    UnknownNameError
        If there is no such activation.
    """
    sizes = _positive(sizes, "sizes")
    if len(sizes) < 2:
        raise ValueError(f"sizes needs at least inputs and outputs, got {sizes}.")
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m, bias=bias, device="meta"), _activation(activation)]
    return _drawn(nn.Sequential(*layers[:-1]), generator, dtype, device)


def cnn6(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 1,
    activation: str = "leaky_relu",
    bias: bool = False,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Six convolutions and a dense layer: the network of the R-GAP paper.

    Every layer has full column rank at 32×32, so the recursion reaches the picture.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    outputs : int
        Number of logits; the paper has one.
    activation : str
        One of :data:`ACTIVATIONS`; the paper's is leaky ReLU of slope 0.2.
    bias : bool
        Whether the layers have biases; the paper's have none.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Convolutions at places 0, 2, …, 10, ``Flatten`` at 12, the dense layer at 13.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, or the picture is too small.
    UnknownNameError
        If there is no such activation.

    Notes
    -----
    Source: Zhu and Blaschko (2021).
    """
    layers = _rgap_layers(input_shape, 36, activation, bias)
    return _drawn(_classifier(layers, input_shape, outputs, bias), generator, dtype, device)


def cnn6_d(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 1,
    activation: str = "leaky_relu",
    bias: bool = False,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """As :func:`cnn6`, with 20 instead of 36 filters in the second layer, which lacks rank.

    The paper's example of a network that defends itself by its architecture.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    outputs : int
        Number of logits; the paper has one.
    activation : str
        One of :data:`ACTIVATIONS`; the paper's is leaky ReLU of slope 0.2.
    bias : bool
        Whether the layers have biases; the paper's have none.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Layers at the places of :func:`cnn6`.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, or the picture is too small.
    UnknownNameError
        If there is no such activation.

    Notes
    -----
    Source: Zhu and Blaschko (2021).
    """
    layers = _rgap_layers(input_shape, 20, activation, bias)
    return _drawn(_classifier(layers, input_shape, outputs, bias), generator, dtype, device)


def lenet(
    input_shape: Shape = (3, 32, 32),
    classes: int = 10,
    activation: str = "sigmoid",
    bias: bool = True,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Four 5×5 convolutions of 12 filters and a dense layer: the network of the DLG paper.

    Sigmoids instead of ReLUs, strides instead of pooling, and weights and biases uniform in
    ±0.5, all of which ease attacks by optimisation.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    classes : int
        Number of logits.
    activation : str
        One of :data:`ACTIVATIONS`.
    bias : bool
        Whether the layers have biases.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Convolutions at places 0, 2, 4, 6, ``Flatten`` at 8, the dense layer at 9.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, or the picture is too small.
    UnknownNameError
        If there is no such activation.

    Notes
    -----
    Source: Zhu, Liu and Han (2019).
    """
    channels = _picture_shape(input_shape)[0]
    plan = [(channels, 12, 5, 2, 2), (12, 12, 5, 2, 2), (12, 12, 5, 1, 2), (12, 12, 5, 1, 2)]
    net = _classifier(_convolutions(plan, activation, bias), input_shape, classes, bias)
    return _drawn(net, generator, dtype, device, bound=0.5)


def wide_cnn(
    input_shape: Shape = (3, 32, 32),
    classes: int = 10,
    width: float = 1.0,
    activation: str = "leaky_relu",
    dropout: float = 0.0,
    bias: bool = False,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Three convolutions whose number of filters scales with ``width``, and a dense layer.

    Width decides what is left once rows are masked: ReLU's dead units, dropout's zeros.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    classes : int
        Number of logits.
    width : float
        The layers have 16, 72 and 80 times ``width`` filters, rounded down.
    activation : str
        One of :data:`ACTIVATIONS`.
    dropout : float
        Probability with which a unit before the dense layer is dropped in training mode;
        0 leaves the dropout layer out.
    bias : bool
        Whether the layers have biases.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Convolutions at places 0, 2, 4, ``Flatten`` at 6, then dropout if any, then the dense
        layer.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, ``width`` leaves a layer without filters,
        ``dropout`` is not in [0, 1), or the picture is too small.
    UnknownNameError
        If there is no such activation.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability in [0, 1), got {dropout}.")
    if not (math.isfinite(width) and width * 16 >= 1):
        raise ValueError(f"width {width} leaves a layer without filters; use 1/16 or more.")
    f1, f2, f3 = (int(filters * width) for filters in (16, 72, 80))
    channels = _picture_shape(input_shape)[0]
    plan = [(channels, f1, 4, 2, 1), (f1, f2, 4, 2, 1), (f2, f3, 3, 1, 1)]
    layers = _convolutions(plan, activation, bias)
    net = _classifier(layers, input_shape, classes, bias, dropout)
    return _drawn(net, generator, dtype, device)


def photo_cnn(
    input_shape: Shape = (3, 224, 224),
    outputs: int = 10,
    activation: str = "leaky_relu",
    bias: bool = False,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Four convolutions (16, 72, 80, 96 filters, two of stride 2) and a dense layer.

    Its equations determine photographs of ordinary size.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    outputs : int
        Number of logits.
    activation : str
        One of :data:`ACTIVATIONS`.
    bias : bool
        Whether the layers have biases.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Convolutions at places 0, 2, 4, 6, ``Flatten`` at 8, the dense layer at 9.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, or the picture is too small.
    UnknownNameError
        If there is no such activation.
    """
    channels = _picture_shape(input_shape)[0]
    plan = [(channels, 16, 4, 2, 1), (16, 72, 4, 2, 1), (72, 80, 3, 1, 1), (80, 96, 3, 1, 1)]
    layers = _convolutions(plan, activation, bias)
    net = _classifier(layers, input_shape, outputs, bias)
    return _drawn(net, generator, dtype, device)


class ResidualBlock(nn.Module):
    r""":math:`x \mapsto g(x) + W_2\,\sigma(W_1 x)`: two 3×3 convolutions and a shortcut.

    Parameters
    ----------
    channels, filters : int
        Of the input, and of both convolutions.
    stride : int
        Of the first convolution. The shortcut is the identity where neither size nor channels
        change, else a 1×1 convolution of the same stride.
    activation : str
        One of :data:`ACTIVATIONS`.
    bias : bool
        Whether the convolutions have biases.
    """

    def __init__(
        self, channels: int, filters: int, stride: int, activation: str, bias: bool
    ) -> None:
        super().__init__()

        def convolution(inputs: int, kernel: int, stride: int) -> nn.Conv2d:
            padding = kernel // 2
            return nn.Conv2d(inputs, filters, kernel, stride, padding, bias=bias, device="meta")

        self.first, self.act = convolution(channels, 3, stride), _activation(activation)
        self.second = convolution(filters, 3, 1)
        alike = channels == filters and stride == 1
        self.shortcut = nn.Identity() if alike else convolution(channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both ways."""
        total: Tensor = self.shortcut(x) + self.second(self.act(self.first(x)))
        return total


def resnet(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 10,
    width: int = 16,
    activation: str = "leaky_relu",
    bias: bool = False,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A 3×3 convolution, a residual block, another that halves the picture, a dense layer.

    A small network of the kind of He et al. (2016), without batch norm and pooling.

    Parameters
    ----------
    input_shape : sequence of int
        ``(C, H, W)`` of a picture.
    outputs : int
        Number of logits.
    width : int
        Filters of the first convolution and block; the second block has twice as many.
    activation : str
        One of :data:`ACTIVATIONS`.
    bias : bool
        Whether the layers have biases.
    generator : torch.Generator, optional
        Source of the weights; ``None``: a fixed seed.
    dtype, device
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        The convolution at place 0, :class:`ResidualBlock` at 2 and 4, the dense layer at 7.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, or the picture is too small.
    UnknownNameError
        If there is no such activation.
    """
    channels = _picture_shape(input_shape)[0]
    (width,) = _positive((width,), "width")
    layers = _convolutions([(channels, width, 3, 1, 1)], activation, bias)
    for block in (
        ResidualBlock(width, width, 1, activation, bias),
        ResidualBlock(width, 2 * width, 2, activation, bias),
    ):
        layers += [block, _activation(activation)]
    net = _classifier(layers, input_shape, outputs, bias)
    return _drawn(net, generator, dtype, device)


def _rgap_layers(input_shape: Shape, second: int, activation: str, bias: bool) -> list[nn.Module]:
    plan = [
        (_picture_shape(input_shape)[0], 12, 4, 2, 2),
        (12, second, 3, 2, 1),
        (second, 36, 3, 1, 1),
        (36, 36, 3, 1, 1),
        (36, 64, 3, 2, 1),
        (64, 128, 3, 1, 1),
    ]
    return _convolutions(plan, activation, bias)


def _convolutions(
    plan: Sequence[tuple[int, int, int, int, int]], activation: str, bias: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for channels, filters, kernel, stride, padding in plan:
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=bias, device="meta")
        layers += [conv, _activation(activation)]
    return layers


def _classifier(
    layers: list[nn.Module], input_shape: Shape, outputs: int, bias: bool, dropout: float = 0.0
) -> nn.Sequential:
    (outputs,) = _positive([outputs], "the number of outputs")
    layers = [*layers, nn.Flatten()]
    head = nn.Linear(_features(layers, input_shape), outputs, bias=bias, device="meta")
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), head)


def _features(layers: list[nn.Module], input_shape: Shape) -> int:
    """Count the inputs of the dense layer by sending a picture without memory through."""
    try:
        with torch.no_grad():
            out: Tensor = nn.Sequential(*layers)(torch.empty(1, *input_shape, device="meta"))
    except RuntimeError as error:
        shape = tuple(input_shape)
        raise ValueError(f"A picture of shape {shape} is too small: {error}") from error
    return out.shape[1]


def _drawn(
    net: nn.Sequential,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    bound: float | None = None,
) -> nn.Sequential:
    """Give a network without memory its weights; the global generator is not asked."""
    source = generator or torch.Generator().manual_seed(0)
    net = net.to(dtype).to_empty(device=device or "cpu")
    for layer in net.modules():
        for parameter in layer.parameters(recurse=False):
            limit = bound or 1 / math.sqrt(layer.weight[0].numel())  # type: ignore[index]
            _fill(parameter, limit, source)
    return net


def _fill(parameter: nn.Parameter, limit: float, generator: torch.Generator) -> None:
    values = torch.empty(parameter.shape, dtype=torch.float64, device=generator.device)
    values.uniform_(-limit, limit, generator=generator)
    with torch.no_grad():
        parameter.copy_(values)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UnknownNameError(f"No activation {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def _picture_shape(input_shape: Shape) -> list[int]:
    shape = _positive(input_shape, "input_shape")
    if len(shape) != 3:
        raise ValueError(f"input_shape is (channels, height, width), got {tuple(shape)}.")
    return shape


def _positive(sizes: Shape, name: str) -> list[int]:
    if any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in sizes):
        raise ValueError(f"{name} must be positive whole numbers, got {tuple(sizes)}.")
    return list(sizes)

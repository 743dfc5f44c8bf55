r"""The networks of the papers, small enough to read, seeded by an explicit generator.

Every network is a plain :class:`torch.nn.Sequential` whose layers have PyTorch's usual initial
weights, uniform in :math:`\pm 1/\sqrt{\text{fan in}}` (the two LeNets: uniform in :math:`\pm 0.5`,
as DLG has it). Weights are drawn in float64 and rounded to ``dtype``, so a float32 network is the
rounding of the float64 one with the same seed.

What all of them take: ``input_shape``, ``(C, H, W)`` of a picture; ``outputs`` or ``classes``,
the number of logits; ``activation``, a name of :data:`ACTIVATIONS`; ``bias``, whether the layers
have biases; and by name ``generator``, the source of the weights (without one, a fixed seed),
``dtype`` and ``device``. They raise InvalidArgumentError for a size that is not a positive whole
number or a picture that is too small, and UnknownNameError for an unknown activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import InvalidArgumentError, UnknownNameError

__all__ = [
    "ACTIVATIONS",
    "ResidualBlock",
    "Weights",
    "cnn6",
    "cnn6_d",
    "lenet",
    "lenet_dlg",
    "mlp",
    "perceptron",
    "photo_cnn",
    "resnet",
    "wide_cnn",
]

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


class Weights(TypedDict, total=False):
    """How the parameters are made, given by name to every network."""

    generator: torch.Generator | None
    dtype: torch.dtype
    device: torch.device | str | None


def perceptron(inputs: int, bias: bool = True, **weights: Unpack[Weights]) -> nn.Sequential:
    """One neuron on all pixels of a picture of any shape: ``Flatten``, ``Linear(inputs, 1)``."""
    return mlp((inputs, 1), bias=bias, **weights)


def mlp(
    sizes: Shape, activation: str = "relu", bias: bool = True, **weights: Unpack[Weights]
) -> nn.Sequential:
    """Dense layers of ``sizes`` (inputs, hidden, …, outputs), an activation between any two.

    ``Flatten``, then the dense layers at places 1, 3, 5, …; two sizes make one layer.
    """
    for size in sizes:
        checks.whole(size, "every one of sizes")
    if len(sizes) < 2:
        raise InvalidArgumentError(f"sizes needs at least inputs and outputs, got {sizes}.")
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m, bias=bias, device="meta"), _activation(activation)]
    return _drawn(nn.Sequential(*layers[:-1]), **weights)


def cnn6(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 1,
    activation: str = "leaky_relu",
    bias: bool = False,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """Six convolutions and a dense layer: the network of the R-GAP paper, with its defaults.

    Every layer has full column rank at 32×32, so the recursion reaches the picture. Convolutions
    at places 0, 2, …, 10, the dense layer at 13. Source: Zhu and Blaschko (2021).
    """
    return _rgap(36, input_shape, outputs, activation, bias, **weights)


def cnn6_d(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 1,
    activation: str = "leaky_relu",
    bias: bool = False,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """As :func:`cnn6`, with 20 instead of 36 filters in the second layer, which lacks rank.

    The paper's example of a network that defends itself by its architecture.
    """
    return _rgap(20, input_shape, outputs, activation, bias, **weights)


def lenet(
    input_shape: Shape = (3, 32, 32),
    classes: int = 10,
    activation: str = "sigmoid",
    bias: bool = True,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """Four 5×5 convolutions of 12 filters and a dense layer: a variant of :func:`lenet_dlg`.

    Sigmoids instead of ReLUs, strides instead of pooling, and weights and biases uniform in
    ±0.5, all of which ease attacks by optimisation. Convolutions at places 0, 2, 4, 6, the dense
    layer at 9; one convolution more than the published network, and ten classes.
    """
    return _lenet(4, input_shape, classes, activation, bias, **weights)


def lenet_dlg(
    input_shape: Shape = (3, 32, 32),
    classes: int = 100,
    activation: str = "sigmoid",
    bias: bool = True,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """Three 5×5 convolutions of 12 filters, then 768 → 100 at 32×32: the LeNet that DLG published.

    With biases, for CIFAR-100, sigmoids, and weights and biases uniform in ±0.5. Convolutions at
    places 0, 2, 4, the dense layer at 7. Source: the code of Zhu, Liu and Han (2019).
    """
    return _lenet(3, input_shape, classes, activation, bias, **weights)


def wide_cnn(
    input_shape: Shape = (3, 32, 32),
    classes: int = 10,
    width: float = 1.0,
    activation: str = "leaky_relu",
    dropout: float = 0.0,
    bias: bool = False,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """Three convolutions of 16, 72 and 80 times ``width`` filters, and a dense layer.

    Width decides what is left once rows are masked: ReLU's dead units, dropout's zeros. A unit
    before the dense layer is dropped with probability ``dropout`` in training mode; 0 leaves the
    dropout layer out. Convolutions at places 0, 2, 4, then ``Flatten``, dropout if any, dense.
    """
    checks.number(dropout, "dropout", "a probability in [0, 1)", lambda p: 0 <= p < 1)
    wanted = "1/16 or more: less leaves a layer without filters"
    checks.number(width, "width", wanted, lambda w: w * 16 >= 1)
    f1, f2, f3 = (int(filters * width) for filters in (16, 72, 80))
    plan = [(f1, 4, 2, 1), (f2, 4, 2, 1), (f3, 3, 1, 1)]
    layers = _convolutions(input_shape, plan, activation, bias)
    return _drawn(_classifier(layers, input_shape, classes, bias, dropout), **weights)


def photo_cnn(
    input_shape: Shape = (3, 224, 224),
    outputs: int = 10,
    activation: str = "leaky_relu",
    bias: bool = False,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """Four convolutions (16, 72, 80, 96 filters, two of stride 2) and a dense layer.

    Its equations determine photographs of ordinary size. Convolutions at places 0, 2, 4, 6, the
    dense layer at 9.
    """
    plan = [(16, 4, 2, 1), (72, 4, 2, 1), (80, 3, 1, 1), (96, 3, 1, 1)]
    layers = _convolutions(input_shape, plan, activation, bias)
    return _drawn(_classifier(layers, input_shape, outputs, bias), **weights)


class ResidualBlock(nn.Module):
    r""":math:`x \mapsto g(x) + W_2\,\sigma(W_1 x)`: two 3×3 convolutions and a shortcut.

    The first convolution has the ``stride``. The shortcut is the identity where neither size nor
    channels change, else a 1×1 convolution of the same stride.
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
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """A 3×3 convolution, a residual block, another that halves the picture, a dense layer.

    A small network of the kind of He et al. (2016), without batch norm and pooling. The
    convolution and the first block have ``width`` filters, the second block twice as many. The
    convolution at place 0, :class:`ResidualBlock` at 2 and 4, the dense layer at 7.
    """
    checks.whole(width, "width")
    layers = _convolutions(input_shape, [(width, 3, 1, 1)], activation, bias)
    for block in (
        ResidualBlock(width, width, 1, activation, bias),
        ResidualBlock(width, 2 * width, 2, activation, bias),
    ):
        layers += [block, _activation(activation)]
    return _drawn(_classifier(layers, input_shape, outputs, bias), **weights)


def _lenet(
    depth: int,
    input_shape: Shape,
    outputs: int,
    activation: str,
    bias: bool,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    plan = [(12, 5, 2 if place < 2 else 1, 2) for place in range(depth)]
    layers = _convolutions(input_shape, plan, activation, bias)
    return _drawn(_classifier(layers, input_shape, outputs, bias), bound=0.5, **weights)


def _rgap(
    second: int,
    input_shape: Shape,
    outputs: int,
    activation: str,
    bias: bool,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    plan = [(12, 4, 2, 2), (second, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1)]
    layers = _convolutions(input_shape, [*plan, (128, 3, 1, 1)], activation, bias)
    return _drawn(_classifier(layers, input_shape, outputs, bias), **weights)


def _convolutions(
    input_shape: Shape, plan: list[tuple[int, int, int, int]], activation: str, bias: bool
) -> list[nn.Module]:
    """Convolutions of (filters, kernel, stride, padding), each with its activation."""
    for size in input_shape:
        checks.whole(size, "every size of input_shape")
    if len(input_shape) != 3:
        raise InvalidArgumentError(
            f"input_shape is (channels, height, width), got {tuple(input_shape)}."
        )
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for filters, kernel, stride, padding in plan:
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=bias, device="meta")
        layers += [conv, _activation(activation)]
        channels = filters
    return layers


def _classifier(
    layers: list[nn.Module], input_shape: Shape, outputs: int, bias: bool, dropout: float = 0.0
) -> nn.Sequential:
    checks.whole(outputs, "the number of outputs")
    net = nn.Sequential(*layers, nn.Flatten())
    try:
        with torch.no_grad():  # a picture without memory
            features: int = net(torch.empty(1, *input_shape, device="meta")).shape[1]
    except RuntimeError as error:
        shape = tuple(input_shape)
        raise InvalidArgumentError(f"A picture of shape {shape} is too small: {error}") from error
    if dropout:
        net.append(nn.Dropout(dropout))
    return net.append(nn.Linear(features, outputs, bias=bias, device="meta"))


def _drawn(
    net: nn.Sequential,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    bound: float | None = None,
) -> nn.Sequential:
    """Give a network without memory its weights; the global generator is not asked."""
    source = generator or torch.Generator().manual_seed(0)
    net = net.to(dtype).to_empty(device=device or "cpu")
    for layer in net.modules():
        for parameter in layer.parameters(recurse=False):
            limit = bound or 1 / math.sqrt(layer.weight[0].numel())  # type: ignore[index]
            values = torch.empty(parameter.shape, dtype=torch.float64, device=source.device)
            values.uniform_(-limit, limit, generator=source)
            with torch.no_grad():
                parameter.copy_(values)
    return net


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UnknownNameError(f"No activation {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()

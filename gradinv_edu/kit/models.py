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
    "norm_resnet",
    "perceptron",
    "photo_cnn",
    "resnet",
    "vit",
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
    r""":math:`x \mapsto W_s x + W_2\,\phi(W_1 x)`: two 3×3 convolutions and a shortcut.

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


class NormedBlock(nn.Module):
    r""":math:`x \mapsto x + N(W_2\,\sigma(N(W_1 x)))`: a residual block with group norms."""

    def __init__(self, filters: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(filters, filters, 3, padding=1, device="meta") for _ in range(2)
        )
        self.norm, self.last_norm = (nn.GroupNorm(groups, filters, device="meta") for _ in range(2))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both ways."""
        total: Tensor = x + self.last_norm(self.second(self.act(self.norm(self.first(x)))))
        return total


def norm_resnet(
    input_shape: Shape = (3, 32, 32), outputs: int = 10, width: int = 16, **weights: Unpack[Weights]
) -> nn.Sequential:
    """A 4×4 convolution of stride 2, a residual block of the same width, and a dense layer.

    Each of the three convolutions has ``width`` filters, a bias and a group norm of its own.
    The convolution at place 0, the block at 3, the dense layer at 6. Source: Wu and He (2018).
    """
    checks.whole(width, "width")
    groups = math.gcd(width, 4)
    conv, act = _convolutions(input_shape, [(width, 4, 2, 1)], "leaky_relu", True)
    norm = nn.GroupNorm(groups, width, device="meta")
    layers = [conv, norm, act, NormedBlock(width, groups), nn.LeakyReLU(0.2)]
    return _drawn(_classifier(layers, input_shape, outputs, True), **weights)


class Patches(nn.Module):
    """Tokens of a picture: a convolution without overlap, and a learned position for each."""

    def __init__(self, input_shape: Shape, size: int, width: int) -> None:
        super().__init__()
        channels, height, across = input_shape
        self.conv = nn.Conv2d(channels, width, size, size, device="meta")
        tokens = (height // size) * (across // size)
        self.positions = nn.Parameter(torch.empty(tokens, width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, tokens, width)."""
        tokens: Tensor = self.conv(x).flatten(2).mT + self.positions
        return tokens


class TransformerBlock(nn.Module):
    """Attention and a dense part, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.last_norm = (nn.LayerNorm(width, device="meta") for _ in range(2))
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, width, device="meta") for _ in range(4)
        )
        self.up = nn.Linear(width, 2 * width, device="meta")
        self.act, self.down = nn.GELU(), nn.Linear(2 * width, width, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        h = self.norm(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        total: Tensor = x + self.down(self.act(self.up(self.last_norm(x))))
        return total


class MeanToken(nn.Module):
    """The mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to (N, width)."""
        return x.mean(dim=1)


def vit(
    input_shape: Shape = (3, 32, 32),
    outputs: int = 10,
    width: int = 64,
    depth: int = 2,
    **weights: Unpack[Weights],
) -> nn.Sequential:
    """A vision transformer: 16 patches, ``depth`` blocks of four heads, their mean, a dense layer.

    The patches with their positions at place 0, the dense layer last. Sides of the picture and
    the width are multiples of four. Source: Dosovitskiy et al. (2021).
    """
    for size in (*input_shape[1:], width):
        wanted = "a multiple of 4, as sides of a picture and width must be"
        checks.number(size, "size", wanted, lambda s: s > 0 and s % 4 == 0)
    checks.whole(depth, "depth")
    patches = Patches(input_shape, input_shape[1] // 4, width)
    blocks = [TransformerBlock(width, 4) for _ in range(depth)]
    norm, head = (nn.LayerNorm(width, device="meta"), nn.Linear(width, outputs, device="meta"))
    return _drawn(nn.Sequential(patches, *blocks, norm, MeanToken(), head), **weights)


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
    # A picture without memory, by what changes its shape: some of the rest loads torch's compiler.
    keeping = (*(type(bend()) for bend in ACTIVATIONS.values()), nn.GroupNorm, NormedBlock)
    shaping = nn.Sequential(
        *(getattr(layer, "shortcut", layer) for layer in net if not isinstance(layer, keeping))
    )
    try:
        with torch.no_grad():
            features: int = shaping(torch.empty(1, *input_shape, device="meta")).shape[1]
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
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.reset_parameters()  # ones and zeros
            continue
        for parameter in layer.parameters(recurse=False):
            weight = getattr(layer, "weight", parameter)
            limit = bound or 1 / math.sqrt(weight[0].numel())
            values = torch.empty(parameter.shape, dtype=torch.float64, device=source.device)
            values.uniform_(-limit, limit, generator=source)
            with torch.no_grad():
                parameter.copy_(values)
    return net


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UnknownNameError(f"No activation {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()

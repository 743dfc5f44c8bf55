"""Random small networks of every kind of layer that the engine knows, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine.layers import rule_of
from gradinv_edu.engine.layers.activations import INVERSES
from gradinv_edu.engine.layers.norms import Norm
from gradinv_edu.errors import GradientInversionError, UndeterminedScaleError

Shape = tuple[int, ...]
Pick = Callable[..., int]
LOSS = nn.CrossEntropyLoss()
BENDS = [*INVERSES, lambda: nn.LeakyReLU(0.2), nn.PReLU, nn.ReLU, nn.ReLU6, nn.Hardsigmoid]
BENDS += [nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.SiLU, nn.Mish, nn.Hardswish]


class Residual(nn.Module):
    """``short(x) + body(x)``."""

    def __init__(self, body: nn.Module, short: nn.Module) -> None:
        super().__init__()
        self.body, self.short = body, short

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.body(x)


class Concatenation(nn.Module):
    """Two ways side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x)], 1)


def random_net(seed: int) -> tuple[nn.Module, Shape]:
    """One to five layers with weights on vectors, signals or pictures; float64."""
    return _net(_Draw, seed)


def normed_net(seed: int) -> tuple[nn.Module, Shape]:
    """The same with a norm of its own statistics above most layers, in training mode."""
    return _net(_Normed, seed)


def pooled_net(seed: int) -> tuple[nn.Module, Shape]:
    """One or two convolutions on a small picture, max pooling above each, and a dense layer."""
    return _net(_Pooled, seed)


def dropped_net(seed: int) -> tuple[nn.Module, Shape]:
    """The same, with dropout in training mode above half the layers; at least one."""
    return _net(_Dropped, seed)


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """With scales and shifts of its own in every norm."""
    source = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(rule_of(module), Norm):
            for p in module.parameters(recurse=False):
                p.data += 0.3 * torch.randn(p.shape, generator=source)
    return net.double().train()


def _net(kind: type[_Draw], seed: int) -> tuple[nn.Module, Shape]:
    attempt = 0
    while True:
        try:
            model, shape = kind(torch.Generator().manual_seed(100 * seed + attempt)).net()
            model(torch.zeros(1, *shape).double())
        except (RuntimeError, ValueError):  # a kernel too large, a norm of one value
            attempt += 1
        else:
            return model, shape


class _Draw:
    def __init__(self, source: torch.Generator) -> None:
        self.source = source
        self.layers: list[nn.Module] = []

    def number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.source))

    def pick(self, *options: int) -> int:
        return options[self.number(len(options))]

    def net(self) -> tuple[nn.Module, Shape]:
        with torch.random.fork_rng():
            torch.manual_seed(self.number(10**6))
            self.dimensions, depth = self.pick(0, 1, 2, 2, 2), self.pick(1, 2, 2, 3, 4, 5)
            self.size = self.pick(4, 5, 6, 7)
            shape = (self.pick(1, 2, 3), *[self.size] * self.dimensions)
            shape = shape if self.dimensions else (self.pick(3, 8, 16),)
            self.shape = shape
            for _ in range(depth - 1):
                self.piece()
            if self.dimensions:
                self.add(nn.Flatten())
            bias = self.pick(0, 0, 1) == 1
            self.add(nn.Linear(self.shape[0], self.pick(2, 3, 5, 5), bias=bias))
            return nn.Sequential(*self.layers).double(), shape

    def add(self, layer: nn.Module) -> None:
        self.layers.append(layer)
        self.shape = tuple(layer.double()(torch.zeros(1, *self.shape).double()).shape[1:])

    def piece(self) -> None:
        kind = self.pick(*range(8))
        if kind == 0:
            short = nn.Identity() if self.pick(0, 1) else self.linear(self.shape[0], same=True)
            hidden = self.pick(1, 4, 8)
            way = [self.linear(hidden, same=True), self.bend()]
            way += [self.linear(self.shape[0], same=True, channels=hidden)]
            self.add(Residual(nn.Sequential(*way), short))
        elif kind == 1:
            one = nn.Sequential(self.linear(self.pick(2, 6), same=True), self.bend())
            other = self.linear(self.pick(1, 4), same=True) if self.pick(0, 1) else nn.Identity()
            self.add(Concatenation(one, other))
        else:
            self.add(self.linear(self.pick(1, 2, 4, 8, 12, 16, 24)))
        if self.pick(0, 0, 0, 0, 1):
            self.add(self.norm())
        if self.dimensions and self.pick(0, 0, 0, 0, 1):
            pool = nn.AvgPool1d if self.dimensions == 1 else nn.AvgPool2d
            self.add(pool(2, self.pick(1, 2)))
        if self.pick(*[0] * 7, 1):
            self.add(nn.Dropout(0.3).train(bool(self.pick(0, 1))))
        if self.dimensions and self.pick(*[0] * 9, 1):
            scale = {"scale_factor": 2} if self.size < 6 else {"size": self.shape[-1] + 1}
            self.add(nn.Upsample(**scale, mode="nearest"))
        if self.dimensions == 2 and self.shape[0] % 4 == 0 and self.pick(*[0] * 5, 1):
            self.add([nn.PixelShuffle(2), nn.ChannelShuffle(2)][self.pick(0, 1)])
        self.add(self.bend() if self.pick(*range(40)) else nn.Softmax(1))

    def linear(self, width: int, same: bool = False, channels: int | None = None) -> nn.Module:
        channels, bias = channels or self.shape[0], bool(self.pick(0, 1))
        if not self.dimensions:
            return nn.Linear(channels, width, bias=bias)
        kind = nn.Conv1d if self.dimensions == 1 else nn.Conv2d
        if same:
            return kind(channels, width, 3, padding=1, bias=bias)
        if self.pick(*[0] * 6, 1):
            kind = nn.ConvTranspose1d if self.dimensions == 1 else nn.ConvTranspose2d
            kernel, stride = self.pick(1, 2, 3), self.pick(1, 1, 2)
            return kind(channels, width, kernel, stride=stride, padding=kernel // 2, bias=bias)
        groups = self.pick(1, 1, 1, channels)
        options = {"stride": self.pick(1, 1, 2), "padding": self.pick(0, 1), "bias": bias}
        width += -width % groups
        return kind(channels, width, self.pick(1, 2, 3), groups=groups, **options)

    def norm(self) -> nn.Module:
        kind = nn.BatchNorm2d if self.dimensions == 2 else nn.BatchNorm1d
        norm = kind(self.shape[0])
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.uniform_(-1.0, 1.0)
        return norm.eval()

    def bend(self) -> nn.Module:
        return BENDS[self.pick(*range(len(BENDS)))]()


class _Normed(_Draw):
    """Nets with a norm of its own statistics above most layers."""

    def add(self, layer: nn.Module) -> None:
        self.layers.append(layer.double())
        with torch.no_grad():
            z = self.layers[-1](torch.rand(2, *self.shape).double())
        self.shape = tuple(z.shape[1:])

    def piece(self) -> None:
        self.add(self.linear(self.pick(4, 8, 12, 16, 24)))
        channels, affine, d = self.shape[0], bool(self.pick(0, 1, 1)), self.dimensions
        batch = nn.BatchNorm1d if d < 2 else nn.BatchNorm2d
        instance = nn.InstanceNorm1d if d < 2 else nn.InstanceNorm2d
        norms = [
            lambda: nn.GroupNorm(2, channels),
            lambda: nn.LayerNorm(self.shape, elementwise_affine=affine),
            nn.Identity,
        ]
        if d:
            norms += [
                lambda: batch(channels, affine=affine),
                lambda: instance(channels, affine=affine),
            ]
        self.add(drawn(norms[self.pick(*range(len(norms)))](), self.pick(*range(99))))
        bent = self.bend() if self.pick(0, 0, 1) else None
        self.add(bent or (nn.LeakyReLU(0.2) if self.pick(0, 1) else nn.ReLU()))


class _Dropped(_Draw):
    """Nets with dropout in training mode."""

    def piece(self) -> None:
        super().piece()
        if self.pick(0, 1) or not any(isinstance(layer, nn.Dropout) for layer in self.layers):
            self.add(nn.Dropout([0.1, 0.3, 0.5][self.pick(0, 1, 2)]))


class _Pooled(_Draw):
    def net(self) -> tuple[nn.Module, Shape]:
        with torch.random.fork_rng():
            torch.manual_seed(self.number(10**6))
            self.dimensions = 2
            self.shape = shape = (self.pick(1, 3), *[self.pick(6, 8, 9)] * 2)
            for _ in range(self.pick(1, 1, 2)):
                self.piece()
            self.add(nn.Flatten())
            self.add(nn.Linear(self.shape[0], self.pick(3, 5, 10)))
            return nn.Sequential(*self.layers).double(), shape

    def piece(self) -> None:
        width, kernel = self.pick(8, 16, 32), self.pick(3, 5)
        self.add(nn.Conv2d(self.shape[0], width, kernel, padding=kernel // 2))
        self.add([nn.ReLU(), nn.Tanh()][self.pick(0, 1)])
        window = self.pick(2, 2, 3)
        self.add(nn.MaxPool2d(window, self.pick(2, window), padding=self.pick(0, 0, 1)))


@dataclass(frozen=True)
class Verdicts:
    """What an audit told of one gradient, and what recovery made of it."""

    audit: gi.Audit
    found: gi.Recovery | None
    refusal: GradientInversionError | None
    error: float
    drawn: bool  # whether the two saw different dropout masks

    @property
    def agree(self) -> bool:
        return self.audit.exact == (self.found is not None and self.found.exact)

    @property
    def outcome(self) -> str:
        """How they agree, or the class of their disagreement."""
        audit, found = self.audit, self.found
        if audit.untested or (found and found.ran_out):
            return "out of time"
        if self.agree:
            if audit.exact:
                return "both exact"
            return "neither exact" if found else f"refused: {type(self.refusal).__name__}"
        if self.drawn:
            return "each draws its own dropout mask"
        if isinstance(self.refusal, UndeterminedScaleError) or (
            found and len(found.candidates) > 1
        ):
            return "the loss leaves twins or a scale"
        if found is None:
            return f"OTHER: audit exact, recovery raises {type(self.refusal).__name__}"
        if found.exact:
            return "OTHER: recovery alone is exact"
        if all(layer.full_rank for layer in found.layers):
            return "full rank, but not accurate enough"
        return "OTHER: audit alone is exact"


def verdicts(
    model: nn.Module, shape: Shape, seed: int = 0, seconds: float | None = None
) -> Verdicts:
    """Audit and recover the same random input, each within so many seconds of the clock."""
    source, same = (torch.Generator().manual_seed(seed) for _ in range(2))
    target = torch.randint(model(torch.zeros(1, *shape).double()).shape[1], (1,), generator=same)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = any(isinstance(m, nn.Dropout) and m.training for m in model.modules())
    audit = gi.audit(  # the same label
        model, shape, inputs=x, jacobian=False, generator=source, seconds=seconds
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        update = gi.observe(model, LOSS, x, target)
    try:
        found = gi.recover(model, update, shape, LOSS, seconds=seconds)
    except GradientInversionError as refusal:
        return Verdicts(audit, None, refusal, float("inf"), drawn)
    error = float("inf") if found.ran_out else gi.metrics.relative_error(found.inputs, x)
    return Verdicts(audit, found, None, error, drawn)

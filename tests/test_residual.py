"""Residual blocks: undone where their equations determine the input, and honest where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.chain import Residual, trace
from gradinv_edu.errors import UnsupportedLayerError
from gradinv_edu.residual import Linearised, ResidualSystem, solve

CE = nn.CrossEntropyLoss()


class Block(nn.Module):
    """As in ResNet: two convolutions with norms, and what they are added to."""

    def __init__(
        self, channels: int, hidden: int, act: nn.Module, out: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        out = out or channels
        self.one = nn.Conv2d(channels, hidden, 3, stride, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(hidden), act
        self.two = nn.Conv2d(hidden, out, 3, 1, 1, bias=False)
        alike = stride == 1 and out == channels
        self.short = nn.Identity() if alike else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.act(self.norm(self.one(x))))
        out += self.short(x)
        return out


def block(*arguments: object, shape: tuple[int, ...], **options: object) -> Residual:
    """A block by itself, float64 and in eval mode, as the tracer makes it one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), Block(*arguments, **options)).eval()  # type: ignore[arg-type]
    (found,) = (s.module for s in trace(model, shape, sums=True) if s.summing)
    assert isinstance(found, Residual)
    return found


def observed(
    found: Residual, x: Tensor, masked: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """Sum, output gradient, gradients and mask, as the layers above hand them down."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in found.named_parameters()}
    s = torch.func.functional_call(found, weights, (x,))
    mask = (s > 0).to(s) if masked else None
    k = torch.randn(s.shape, generator=torch.Generator().manual_seed(1), dtype=s.dtype)
    k = k if mask is None else k * mask
    gradients = torch.autograd.grad(s, list(weights.values()), k)
    return s.detach(), k, dict(zip(weights, gradients, strict=True)), mask


def uniform(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


CASES = {
    "identity, tanh": ((4, 4, nn.Tanh()), {}, False),
    "identity, leaky": ((4, 4, nn.LeakyReLU(0.2)), {}, False),
    "identity, ReLU inside and above": ((4, 12, nn.ReLU()), {}, True),
    "strided, ELU": ((4, 8, nn.ELU()), {"out": 8, "stride": 2}, False),
    "strided, leaky": ((4, 8, nn.LeakyReLU(0.2)), {"out": 8, "stride": 2}, False),
    "strided, ReLU inside and above": ((4, 16, nn.ReLU()), {"out": 16, "stride": 2}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_input_of_a_block_comes_back(case: str) -> None:
    arguments, options, masked = CASES[case]
    found = block(*arguments, shape=(4, 6, 6), **options)
    x = uniform((4, 6, 6)) if masked else uniform((4, 6, 6)) - 0.5
    s, k, gradients, mask = observed(found, x, masked)
    hidden = s if mask is None else torch.where(mask > 0, s, torch.nan)
    solution = solve(ResidualSystem(found, k, gradients, mask), hidden, (4, 6, 6))
    assert gi.metrics.relative_error(solution.inputs, x) < 1e-9
    assert solution.full_rank and solution.residual < 1e-10


def test_the_linearised_rows_obey_the_adjoint_law_and_are_a_derivative() -> None:
    found = block(3, 5, nn.Tanh(), shape=(3, 4, 4))
    x = uniform((3, 4, 4))
    _, k, gradients, _ = observed(found, x)
    system = ResidualSystem(found, k, gradients)
    at, generator = Linearised(system, x), torch.Generator().manual_seed(3)
    d = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    r = at.forward(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    forward = at.forward(d)
    there = float((forward.flat() * r.flat()).sum())
    assert there == pytest.approx(float((d * at.adjoint(r)).sum()), rel=1e-10)
    plus, minus = (torch.cat([t.flatten() for t in system.rows(x + e * d)]) for e in (1e-5, -1e-5))
    assert torch.allclose((plus - minus) / 2e-5, forward.flat(), rtol=1e-6, atol=1e-8)


def test_a_block_that_loses_its_input_says_so() -> None:
    found = block(4, 1, nn.Tanh(), shape=(4, 6, 6), out=1, stride=2)
    s, k, gradients, _ = observed(found, uniform((4, 6, 6)))
    solution = solve(ResidualSystem(found, k, gradients), s, (4, 6, 6))
    assert not solution.full_rank and solution.undetermined > 0.1


def test_a_gradient_of_another_sample_leaves_a_residual() -> None:
    found = block(4, 4, nn.LeakyReLU(0.2), shape=(4, 6, 6))
    s, k, gradients, _ = observed(found, uniform((4, 6, 6)))
    gradients = {name: g.flip(0) for name, g in gradients.items()}
    assert solve(ResidualSystem(found, k, gradients), s, (4, 6, 6)).residual > 1e-2


def test_random_layers_inside_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(2, 2, nn.Dropout(0.5)))
    (step,) = trace(model, (2, 4, 4), sums=True)
    x = uniform((2, 4, 4))
    with pytest.raises(UnsupportedLayerError, match=r"BatchNorm2d\) is in train mode inside"):
        ResidualSystem(step.module, x, {})  # type: ignore[arg-type]
    model = nn.Sequential(Block(2, 2, nn.MaxPool2d(3, 1, 1))).eval()
    (step,) = trace(model, (2, 4, 4), sums=True)
    with pytest.raises(UnsupportedLayerError, match=r"MaxPool2d\) inside a residual block"):
        ResidualSystem(step.module, x, {})  # type: ignore[arg-type]


def small_resnet(act: type[nn.Module], width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        act(),
        Block(width, width, act()),
        act(),
        Block(width, 2 * width, act(), 2 * width, 2),
        act(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10, bias=False),
    ).eval()


@pytest.mark.parametrize(
    ("act", "width", "dtype", "floor"),
    [
        (nn.Tanh, 8, torch.float64, 200),
        (nn.LeakyReLU, 16, torch.float64, 200),
        (nn.ReLU, 24, torch.float64, 200),
        (nn.Tanh, 8, torch.float32, 60),
    ],
)
def test_a_residual_network_gives_its_picture_away(
    act: type[nn.Module], width: int, dtype: torch.dtype, floor: float
) -> None:
    net = small_resnet(act, width).to(dtype)
    picture = gi.data.photo("cat", 8, dtype=dtype)
    update = gi.observe(net, CE, picture, torch.tensor([3]))
    recovery = gi.recover(net, update, (3, 8, 8), CE)
    assert recovery.exact and int(recovery.targets) == 3
    assert gi.metrics.psnr(recovery.inputs, picture.double()) > floor
    assert [r.name for r in recovery.layers] == ["7", "4.add", "2.add", "0"]


def test_a_narrow_residual_network_is_not_called_exact() -> None:
    net = small_resnet(nn.ReLU, 2).double()
    update = gi.observe(net, CE, gi.data.photo("cat", 8, dtype=torch.float64), torch.tensor([3]))
    assert not gi.recover(net, update, (3, 8, 8), CE).exact

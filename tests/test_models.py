"""The papers' networks have the papers' shapes and their own seeds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradinv_edu.errors import InvalidArgumentError, UnknownNameError
from gradinv_edu.kit import models

Net = Callable[..., nn.Sequential]
PICTURES: list[Net] = [
    models.cnn6, models.cnn6_d, models.lenet, models.lenet_dlg,
    models.wide_cnn, models.photo_cnn, models.resnet, models.norm_resnet,
]  # fmt: skip
NETS: dict[str, Net] = {
    "perceptron": lambda **k: models.perceptron(3072, **k),
    "mlp": lambda **k: models.mlp((3072, 20, 10), **k),
    **{n.__name__: lambda n=n, **k: n((3, 32, 32), **k) for n in (*PICTURES, models.vit)},
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_weights_come_from_the_generator_alone_and_are_rounded(net: Net) -> None:
    first, again, fine = net(), net(), net(dtype=torch.float64)
    other = net(generator=torch.Generator().manual_seed(1))
    nets = (first, again, other, fine, net(dtype=torch.float16), net(dtype=torch.bfloat16))
    for a, b, c, d, half, brain in zip(*(m.parameters() for m in nets), strict=True):
        norm = a.dim() == 1 and len(a.unique()) == 1  # of ones or zeros
        assert torch.equal(a, b) and (norm or not torch.equal(a, c)) and a.requires_grad
        assert (a.dtype, d.dtype) == (torch.float32, torch.float64)
        assert torch.equal(a, d.float())
        assert torch.equal(half, d.half()) and torch.equal(brain, d.bfloat16())


def test_weights_have_torch_s_usual_spread_and_lenet_s_fill_half() -> None:
    torch_s = nn.Linear(3072, 200, dtype=torch.float64, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    nn.init.kaiming_uniform_(torch_s.weight, a=5**0.5, generator=generator)
    ours: Any = models.mlp((3072, 200), dtype=torch.float64)[1]
    torch.testing.assert_close(ours.weight, torch_s.weight, rtol=1e-12, atol=0)
    assert float(ours.bias.detach().abs().max()) <= 3072**-0.5
    for parameter in models.lenet().parameters():
        assert 0.3 < float(parameter.detach().abs().max()) <= 0.5


@pytest.mark.parametrize(
    ("net", "widths"),
    [
        (models.cnn6(), [3468, 2916, 2916, 2916, 1600, 3200, 1]),
        (models.cnn6_d(), [3468, 1620, 2916, 2916, 1600, 3200, 1]),
        (models.lenet(), [3072, 768, 768, 768, 10]),
        (models.lenet_dlg(), [3072, 768, 768, 100]),
        (models.wide_cnn(width=2), [8192, 9216, 10240, 10]),
        (models.photo_cnn((3, 32, 32)), [4096, 4608, 5120, 6144, 10]),
        (models.resnet(), [16384, 16384, 8192, 10]),
    ],
)
def test_layers_have_the_papers_sizes(net: nn.Sequential, widths: list[int]) -> None:
    found, x = [], torch.zeros(1, 3, 32, 32)
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.Linear | models.ResidualBlock):
            found.append(x.numel())
    assert found == widths


def test_biases_and_dropout_are_where_they_are_asked_for() -> None:
    for net in (models.cnn6(), models.mlp((4, 3, 2), bias=False)):
        assert all("bias" not in name for name, _ in net.named_parameters())
    assert [n for n, _ in models.perceptron(4).named_parameters()] == ["1.weight", "1.bias"]
    assert not any(isinstance(m, nn.Dropout) for m in models.wide_cnn())
    assert [m.p for m in models.wide_cnn(dropout=0.3) if isinstance(m, nn.Dropout)] == [0.3]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 23), (3, 64, 64)])
@pytest.mark.parametrize("net", PICTURES)
def test_any_picture_fits(net: Net, shape: tuple[int, ...]) -> None:
    assert net(input_shape=shape)(torch.zeros(2, *shape)).shape[0] == 2


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_every_activation_is_used(activation: str) -> None:
    net = models.mlp((4, 3, 2), activation)
    assert isinstance(net[2], type(models.ACTIVATIONS[activation]()))


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("every one of sizes must be a whole number", lambda: models.mlp((4, 0, 2))),
        ("at least inputs and outputs", lambda: models.mlp((4,))),
        (r"input_shape is \(channels, height, width\)", lambda: models.lenet((32, 32))),
        ("every size of input_shape must be", lambda: models.lenet((3, 32.0, 32))),
        (r"shape \(3, 1, 1\) is too small", lambda: models.wide_cnn((3, 1, 1))),
        ("leaves a layer without filters", lambda: models.wide_cnn(width=0.01)),
        ("dropout must be a probability", lambda: models.wide_cnn(dropout=1.0)),
        ("number of outputs must be a whole number", lambda: models.cnn6(outputs=0)),
        ("width must be a whole number", lambda: models.resnet(width=1.5)),
        ("width must be a whole number", lambda: models.norm_resnet(width=0)),
        ("must be a multiple of 4", lambda: models.vit((1, 30, 30))),
        ("depth must be a whole number", lambda: models.vit(depth=0)),
    ],
)
def test_impossible_networks_are_refused(message: str, build: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        build()
    with pytest.raises(UnknownNameError, match="No activation 'swish'; there are relu, leaky_relu"):
        models.mlp((4, 3, 2), "swish")


FIRST_CALLS = """
import sys, torch, gradinv_edu as gi
for name in ("cnn6", "lenet", "resnet", "norm_resnet", "vit"):
    model, loss = getattr(gi.models, name)((1, 12, 12)), torch.nn.CrossEntropyLoss()
    update = gi.observe(model, loss, torch.rand(1, 1, 12, 12), torch.tensor([0]))
    gi.audit(model, (1, 12, 12), jacobian=False)
gi.recover(model, update, (1, 12, 12), loss)
assert "torch._dynamo" not in sys.modules
"""


def test_no_first_call_loads_a_compiler() -> None:
    """It takes some CPU seconds, and nothing is compiled."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The papers' networks have the papers' shapes and their own seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradinv_edu import models
from gradinv_edu.errors import UnknownNameError

Net = Callable[..., nn.Sequential]
NETS: dict[str, Net] = {
    "perceptron": lambda **k: models.perceptron(3072, **k),
    "mlp": lambda **k: models.mlp((3072, 20, 10), **k),
    "cnn6": models.cnn6,
    "cnn6_d": models.cnn6_d,
    "lenet": models.lenet,
    "wide_cnn": models.wide_cnn,
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_weights_come_from_the_generator_alone(net: Net) -> None:
    first, again = net(), net()
    other = net(generator=torch.Generator().manual_seed(1))
    for a, b, c in zip(*(m.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.requires_grad


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_coarse_network_is_the_rounded_fine_one(net: Net, dtype: torch.dtype) -> None:
    for coarse, fine in zip(
        net(dtype=dtype).parameters(), net(dtype=torch.float64).parameters(), strict=True
    ):
        assert coarse.dtype == dtype
        assert torch.equal(coarse, fine.to(dtype))


def test_weights_have_torch_s_usual_spread() -> None:
    torch_s = nn.Linear(3072, 200, dtype=torch.float64, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    nn.init.kaiming_uniform_(torch_s.weight, a=5**0.5, generator=generator)
    ours = models.mlp((3072, 200), dtype=torch.float64)[1]
    assert torch.allclose(ours.weight, torch_s.weight, rtol=1e-12)
    assert float(ours.bias.detach().abs().max()) <= 3072**-0.5


def test_lenet_s_parameters_fill_half() -> None:
    for parameter in models.lenet().parameters():
        assert 0.3 < float(parameter.detach().abs().max()) <= 0.5


@pytest.mark.parametrize(
    ("net", "widths"),
    [
        (models.cnn6(), [3468, 2916, 2916, 2916, 1600, 3200, 1]),
        (models.cnn6_d(), [3468, 1620, 2916, 2916, 1600, 3200, 1]),
        (models.lenet(), [3072, 768, 768, 768, 10]),
        (models.wide_cnn(width=2), [8192, 9216, 10240, 10]),
    ],
)
def test_layers_have_the_papers_sizes(net: nn.Sequential, widths: list[int]) -> None:
    found, x = [], torch.zeros(1, 3, 32, 32)
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            found.append(x.numel())
    assert found == widths


def test_biases_are_where_they_are_asked_for() -> None:
    assert all("bias" not in name for name, _ in models.cnn6().named_parameters())
    assert all(
        "bias" not in name for name, _ in models.mlp((4, 3, 2), bias=False).named_parameters()
    )
    assert [n for n, _ in models.perceptron(4).named_parameters()] == ["1.weight", "1.bias"]


def test_dropout_is_there_only_if_asked_for() -> None:
    assert not any(isinstance(m, nn.Dropout) for m in models.wide_cnn())
    assert [m.p for m in models.wide_cnn(dropout=0.3) if isinstance(m, nn.Dropout)] == [0.3]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 23), (3, 64, 64)])
@pytest.mark.parametrize(
    "net",
    [models.cnn6, models.cnn6_d, models.lenet, models.wide_cnn, models.photo_cnn, models.resnet],
)
def test_any_picture_fits(net: Net, shape: tuple[int, ...]) -> None:
    assert net(input_shape=shape)(torch.zeros(2, *shape)).shape[0] == 2


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_every_activation_is_used(activation: str) -> None:
    net = models.mlp((4, 3, 2), activation)
    assert isinstance(net[2], type(models.ACTIVATIONS[activation]()))


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="No activation 'swish'; there are relu, leaky_relu"):
        models.mlp((4, 3, 2), "swish")
    with pytest.raises(ValueError, match="sizes must be positive whole numbers"):
        models.mlp((4, 0, 2))
    with pytest.raises(ValueError, match="at least inputs and outputs"):
        models.mlp((4,))
    with pytest.raises(ValueError, match=r"input_shape is \(channels, height, width\)"):
        models.lenet((32, 32))
    with pytest.raises(ValueError, match=r"shape \(3, 1, 1\) is too small"):
        models.wide_cnn((3, 1, 1))
    with pytest.raises(ValueError, match="leaves a layer without filters"):
        models.wide_cnn(width=0.01)
    with pytest.raises(ValueError, match="dropout is a probability"):
        models.wide_cnn(dropout=1.0)
    with pytest.raises(ValueError, match="number of outputs must be positive"):
        models.cnn6(outputs=0)

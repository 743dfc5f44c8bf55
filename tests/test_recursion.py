"""Recursion: exact where the equations determine the input, and never exact where they do not."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import (
    GradientInversionError,
    InvalidTensorError,
    UndeterminedScaleError,
    UnsupportedLayerError,
)
from gradinv_edu.sharing import Update

CE = nn.CrossEntropyLoss()
SMOOTH = ["tanh", "sigmoid", "elu", "softplus", "leaky_relu"]


def recover(model: nn.Module, x: Tensor, target: Tensor, loss: nn.Module = CE) -> gi.Recovery:
    update = gi.observe(model, loss, x, target)
    return gi.recover(model, update, tuple(x.shape[1:]), loss)


def error(recovery: gi.Recovery, x: Tensor) -> float:
    return gi.metrics.relative_error(recovery.inputs, x.double())


def double_photo(name: str, size: int) -> Tensor:
    return gi.data.photo(name, size, dtype=torch.float64)


# --- dense networks --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(activation: str, bias: bool) -> None:
    model = gi.models.mlp([192, 64, 32, 10], activation=activation, bias=bias).double()
    x = double_photo("astronaut", 8).flatten(1)
    found = recover(model, x, torch.tensor([3]))
    assert found.exact
    assert error(found, x) < 1e-11
    assert found.targets is not None and found.targets.tolist() == [3]


def test_bias_free_relu_mlp_of_eight_layers_in_both_precisions() -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = gi.models.mlp([3 * 64 * 64] + [96] * 7 + [10], bias=False, dtype=dtype)
        x = gi.data.photo("coffee", 64, dtype=dtype).flatten(1)
        found = recover(model, x, torch.tensor([7]))
        assert error(found, x) < bound
        assert found.exact
        assert found.targets is not None and found.targets.tolist() == [7]


def test_one_bias_anywhere_starts_the_recursion() -> None:
    layers = [nn.Linear(30, 24, bias=False), nn.Tanh(), nn.Linear(24, 20), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(20, 4, bias=False)).double()
    x, y = torch.randn(1, 30).double(), torch.randn(1, 4).double()
    found = recover(model, x, y, nn.MSELoss())
    assert error(found, x) < 1e-10


def test_squared_error_without_bias_leaves_the_scale_open() -> None:
    model = gi.models.mlp([12, 8, 3], bias=False).double()
    with pytest.raises(UndeterminedScaleError, match="squared error"):
        recover(model, torch.randn(1, 12).double(), torch.randn(1, 3).double(), nn.MSELoss())


def test_squared_error_target_is_recovered() -> None:
    model = gi.models.mlp([12, 8, 3]).double()
    x, y = torch.randn(1, 12).double(), torch.randn(1, 3).double()
    found = recover(model, x, y, nn.MSELoss())
    assert found.exact
    assert found.targets is not None and torch.allclose(found.targets, y, atol=1e-9)


def test_fifty_local_steps_leave_a_first_dense_layer_open_and_adam_does_not() -> None:
    model = gi.models.mlp([48, 32, 10]).double()
    x = double_photo("astronaut", 4).flatten(1)
    kwargs = {"local_steps": 50, "learning_rate": 0.01}
    sgd = gi.observe(model, CE, x, torch.tensor([1]), **kwargs)
    found = gi.recover(model, sgd, (48,), CE)
    assert found.exact and error(found, x) < 1e-12
    adam = gi.observe(model, CE, x, torch.tensor([1]), optimizer="adam", **kwargs)
    found = gi.recover(model, adam, (48,), CE)
    assert not found.exact and error(found, x) > 0.1


# --- convolutional networks ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_cnn6_from_both_precisions(name: str) -> None:
    for dtype, bound in ((torch.float64, 200.0), (torch.float32, 110.0)):
        model = gi.models.cnn6(outputs=10, dtype=dtype)
        x = gi.data.photo(name, 32, dtype=dtype)
        found = recover(model, x, torch.tensor([3]))
        assert gi.metrics.psnr(found.inputs, x.double()) > bound
        assert found.exact
        assert found.targets is not None and found.targets.tolist() == [3]


def test_one_logit_returns_twins_where_the_prediction_is_right() -> None:
    model = gi.models.cnn6().double()
    x = double_photo("astronaut", 32)
    loss = nn.BCEWithLogitsLoss()
    with torch.no_grad():
        right = (model(x) > 0).double()
    wrong = recover(model, x, 1 - right, loss)
    assert len(wrong.candidates) == 1 and wrong.exact and error(wrong, x) < 1e-9
    twins = recover(model, x, right, loss)
    assert len(twins.candidates) == 2 and not twins.exact
    assert min(gi.metrics.relative_error(c.inputs, x) for c in twins.candidates) < 1e-9
    assert all(c.mismatch is not None and c.mismatch < 1e-8 for c in twins.candidates)


def test_twins_are_told_apart_by_a_bias_below() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1, bias=False)]
    model = nn.Sequential(*layers).double()
    x = torch.rand(1, 1, 8, 8).double()
    with torch.no_grad():
        right = (model(x) > 0).double()
    found = recover(model, x, right, nn.BCEWithLogitsLoss())
    assert found.exact and error(found, x) < 1e-9


@pytest.mark.parametrize("activation", SMOOTH)
def test_every_invertible_activation(activation: str) -> None:
    model = gi.models.wide_cnn((3, 16, 16), activation=activation, dtype=torch.float64)
    x = double_photo("cat", 16)
    found = recover(model, x, torch.tensor([0]))
    assert found.exact and error(found, x) < 1e-8


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_relu_and_dropout_by_masking_where_the_net_is_wide(dropout: float) -> None:
    x = double_photo("rocket", 16)
    wide = gi.models.wide_cnn((3, 16, 16), activation="relu", width=3, dropout=dropout).double()
    found = recover(wide.train(), x, torch.tensor([2]))
    assert found.exact and error(found, x) < 1e-9
    narrow = gi.models.wide_cnn((3, 16, 16), activation="relu", width=0.5, dropout=dropout)
    with suppress(GradientInversionError):
        assert not recover(narrow.double().train(), x, torch.tensor([2])).exact


def test_average_pooling_and_batch_norm_in_eval_mode() -> None:
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.AvgPool2d(2), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 5)).double()
    model(torch.rand(16, 3, 8, 8).double())
    x = double_photo("coffee", 8)
    found = recover(model.eval(), x, torch.tensor([4]))
    assert found.exact and error(found, x) < 1e-9


GEOMETRIES = {
    "stride 3": ({"kernel_size": 4, "stride": 3}, (3, 13, 13)),
    "dilation": ({"kernel_size": 3, "dilation": 2, "padding": 2}, (3, 10, 10)),
    "reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (3, 8, 8)),
    "circular": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (3, 8, 8)),
    "not square": ({"kernel_size": (2, 5), "padding": (0, 2)}, (3, 7, 12)),
    "same": ({"kernel_size": 4, "padding": "same"}, (3, 8, 8)),
}


@pytest.mark.parametrize("case", GEOMETRIES)
def test_convolution_geometries(case: str) -> None:
    options, shape = GEOMETRIES[case]
    conv = nn.Conv2d(3, 40, **options)
    flat = conv(torch.zeros(1, *shape)).numel()
    model = nn.Sequential(conv, nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(flat, 6)).double()
    x = torch.rand(1, *shape).double()
    found = recover(model, x, torch.tensor([1]))
    assert found.exact and error(found, x) < 1e-8


def test_groups_signals_and_volumes() -> None:
    grouped = [nn.Conv2d(4, 32, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(32 * 36, 4)]
    signal = [nn.Conv1d(2, 12, 5, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 40, 4)]
    volume = [nn.Conv3d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 4)]
    cases = ((grouped, (4, 8, 8)), (signal, (2, 40)), (volume, (1, 4, 4, 4)))
    for layers, shape in cases:
        x = torch.rand(1, *shape).double()
        found = recover(nn.Sequential(*layers).double(), x, torch.tensor([1]))
        assert found.exact and error(found, x) < 1e-8


class Functional(nn.Module):
    """A forward pass written with functions, as most models in the wild are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding=1)
        self.head = nn.Linear(20 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.conv(x), 0.2)
        return self.head(torch.flatten(h, 1))


def test_traced_model() -> None:
    x = double_photo("astronaut", 8)
    found = recover(Functional().double(), x, torch.tensor([1]))
    assert found.exact and error(found, x) < 1e-9


def test_which_equations_do_the_work() -> None:
    model = gi.models.cnn6((3, 16, 16), outputs=10, dtype=torch.float64)
    x = double_photo("cat", 16)
    update = gi.observe(model, CE, x, torch.tensor([0]))
    both = gi.recover(model, update, (3, 16, 16), CE)
    assert both.exact and error(both, x) < 1e-9
    gradient = gi.recover(model, update, (3, 16, 16), CE, constraints="gradient")
    assert gradient.layers[-1].equations < both.layers[-1].equations
    assert not gradient.exact and error(gradient, x) > 0.1


# --- honesty ---------------------------------------------------------------------------------


def random_net(generator: torch.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    """A small random chain: one to three convolutions of random geometry, then a dense layer."""

    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def activation() -> nn.Module:
        kinds = [nn.Tanh(), nn.LeakyReLU(0.2), nn.ReLU(), nn.ELU(), nn.Sigmoid(), nn.Softplus()]
        return kinds[pick(*range(6))]

    channels, size = pick(1, 2, 3), pick(5, 6, 7, 8)
    shape = (channels, size, size)
    layers: list[nn.Module] = []
    torch.manual_seed(pick(*range(10**6)))
    for _ in range(pick(1, 1, 2, 3)):
        width = pick(2, 4, 8, 16, 24)
        options = {"stride": pick(1, 1, 2), "padding": pick(0, 1), "bias": bool(pick(0, 1))}
        layers += [nn.Conv2d(channels, width, pick(2, 3), **options), activation()]
        channels = width
        if pick(0, 0, 0, 1):
            layers.append(nn.AvgPool2d(2, 1))
    layers.append(nn.Flatten())
    stack = nn.Sequential(*layers)
    flat = stack(torch.zeros(1, *shape)).numel()
    return nn.Sequential(stack, nn.Linear(flat, pick(3, 5), bias=bool(pick(0, 1)))).double(), shape


def dense_verdict(model: nn.Module, x: Tensor, recovery: gi.Recovery) -> bool:
    """Whether every layer that was solved had full rank by its own report."""
    return all(layer.full_rank for layer in recovery.layers)


@pytest.mark.parametrize("block", range(4))
def test_exact_is_never_claimed_wrongly(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    claimed, determined = 0, 0
    for _ in range(66):
        try:
            model, shape = random_net(generator)
        except RuntimeError:  # a kernel larger than what is left of the picture
            continue
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        try:
            found = recover(model, x, torch.tensor([1]))
        except GradientInversionError:
            continue
        determined += dense_verdict(model, x, found)
        claimed += found.exact
        if found.exact:
            assert error(found, x) < 1e-6
    assert claimed >= 0.9 * determined and claimed >= 10


def test_foreign_truncated_and_quantized_gradients_are_never_trusted() -> None:
    model = gi.models.wide_cnn((3, 16, 16), activation="leaky_relu", dtype=torch.float64)
    other = gi.models.wide_cnn(
        (3, 16, 16), activation="leaky_relu", dtype=torch.float64,
        generator=torch.Generator().manual_seed(99),
    )  # fmt: skip
    x, y = double_photo("cat", 16), torch.tensor([0])
    good = gi.observe(model, CE, x, y)
    foreign = gi.observe(other, CE, x, y)
    batch = gi.observe(model, CE, torch.cat([x, x.flip(-1)]), torch.tensor([0, 1]))
    step = {n: g.abs().max() / 127 for n, g in good.gradients.items()}
    coarse = {n: (g / step[n]).round() * step[n] for n, g in good.gradients.items()}
    noisy = {n: g + 1e-3 * g.abs().max() * torch.randn_like(g) for n, g in good.gradients.items()}
    for update in (foreign, batch, Update(coarse), Update(noisy)):
        with suppress(GradientInversionError):
            assert not gi.recover(model, update, (3, 16, 16), CE).exact
    unsent = Update({n: g for n, g in good.gradients.items() if not n.startswith("0.")})
    partly = gi.recover(model, unsent, (3, 16, 16), CE)
    assert partly.layers[-1].equations == 16 * 8 * 8
    headless = Update({n: g for n, g in good.gradients.items() if n.startswith("0.")})
    with pytest.raises(InvalidTensorError, match=r"lacks 7\.weight"):
        gi.recover(model, headless, (3, 16, 16), CE)
    broken = dict(good.gradients)
    broken["0.weight"] = broken["0.weight"].clone().fill_(float("nan"))
    with pytest.raises(InvalidTensorError, match="NaN"):
        gi.recover(model, Update(broken), (3, 16, 16), CE)


def test_layers_that_cannot_be_inverted_are_named() -> None:
    x, y = torch.rand(1, 3, 8, 8).double(), torch.tensor([0])
    cases = [
        ([nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)], "1 .MaxPool2d"),
        ([nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 4)], "1 .GELU"),
        ([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4)], "1 .GroupNorm"),
    ]
    for layers, message in cases:
        with pytest.raises(UnsupportedLayerError, match=message):
            recover(nn.Sequential(*layers).double(), x, y)
    normed = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)
    ).double()
    with pytest.raises(UnsupportedLayerError, match="train mode"):
        recover(normed.train(), x, y)


def test_nothing_of_the_callers_is_changed() -> None:
    model = gi.models.wide_cnn((3, 16, 16), activation="leaky_relu", dropout=0.5)
    model.train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    recover(model, gi.data.photo("cat", 16), torch.tensor([0]))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())

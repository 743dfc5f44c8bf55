"""Recursion: exact where the equations determine the input, and never exact where they do not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import errors
from gradinv_edu.engine.dense import known_gradients
from gradinv_edu.engine.explained import unexplained
from gradinv_edu.engine.graph import trace
from gradinv_edu.engine.recovery import Recovering
from gradinv_edu.errors import GradientInversionError
from gradinv_edu.kit.models import ACTIVATIONS
from gradinv_edu.sharing import Update
from gradinv_edu.systems import LayerSystem

CE = nn.CrossEntropyLoss()
Shape = tuple[int, ...]


def recover(
    model: nn.Module, x: Tensor, target: Tensor, loss: nn.Module = CE, **options: object
) -> gi.Recovery:
    update = gi.observe(model, loss, x, target)
    return gi.recover(model, update, tuple(x.shape[1:]), loss, **options)


def error(recovery: gi.Recovery, x: Tensor) -> float:
    return gi.metrics.relative_error(recovery.inputs, x.double())


def double_photo(name: str, size: int) -> Tensor:
    return gi.data.photo(name, size, dtype=torch.float64)


def chain(*layers: nn.Module, shape: Shape, classes: int = 5) -> nn.Module:
    """Layers, and a dense one on what they put out."""
    stack = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(*stack, nn.Linear(stack(torch.zeros(1, *shape)).numel(), classes)).double()


class Functional(nn.Module):
    """A forward pass written with functions, as most models in the wild are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding=1)
        self.head = nn.Linear(20 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.conv(x), 0.2)
        return self.head(torch.flatten(h, 1))


# --- what is recovered, from float64 ----------------------------------------------------------

Case = tuple[Shape, Callable[[], nn.Module]]
PICTURE, SMALL = (3, 16, 16), (3, 8, 8)


def wide(activation: str, **options: float) -> Case:
    return PICTURE, lambda: gi.models.wide_cnn(PICTURE, activation=activation, **options)


def conv(shape: Shape, *arguments: int, **options: object) -> Case:
    kind = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    return shape, lambda: chain(kind(*arguments, **options), nn.LeakyReLU(0.1), shape=shape)


CASES: dict[str, Case] = {
    **{
        f"mlp, {activation}, bias {bias}": (
            (192,),
            lambda a=activation, b=bias: gi.models.mlp([192, 64, 32, 10], activation=a, bias=b),
        )
        for activation in ("relu", "leaky_relu", "sigmoid", "tanh")
        for bias in (True, False)
    },
    **{f"wide, {a}": wide(a) for a in ACTIVATIONS if a not in ("relu", "identity")},
    "wide, ReLU's dead units masked": wide("relu", width=3),
    "wide, dropped units masked": wide("relu", width=3, dropout=0.5),
    "average pooling and batch norm": (
        SMALL,
        lambda: chain(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24).eval(),
            nn.AvgPool2d(2),
            nn.Tanh(),
            shape=SMALL,
        ),
    ),
    "stride 3": conv((3, 13, 13), 3, 40, 4, stride=3),
    "dilation": conv((3, 10, 10), 3, 40, 3, dilation=2, padding=2),
    "reflected": conv(SMALL, 3, 40, 3, padding=1, padding_mode="reflect"),
    "circular": conv(SMALL, 3, 40, 3, padding=1, padding_mode="circular"),
    "not square": conv((3, 7, 12), 3, 40, (2, 5), padding=(0, 2)),
    "padded on one side": conv(SMALL, 3, 40, 4, padding="same"),
    "groups": conv((4, 8, 8), 4, 32, 3, groups=2),
    "signal": conv((2, 40), 2, 12, 5, padding=2),
    "volume": conv((1, 4, 4, 4), 1, 8, 3, padding=1),
    "forward pass of functions": (SMALL, Functional),
    "residual blocks": (SMALL, lambda: gi.models.resnet(SMALL)),
    "LeNet": (PICTURE, lambda: gi.models.lenet(PICTURE)),
}


@pytest.mark.parametrize("case", CASES)
def test_picture_and_label_are_recovered(case: str) -> None:
    shape, make = CASES[case]
    model = make().double()
    source = torch.Generator().manual_seed(1)
    x = torch.rand(1, *shape, generator=source, dtype=torch.float64)
    found = recover(model, x, torch.tensor([3]))
    assert found.exact and error(found, x) < 1e-8
    assert found.targets is not None and found.targets.tolist() == [3]
    assert found.candidates[0].determined and all(r.full_rank for r in found.layers)


# model on pictures of this size; from float64 it must reach 200 dB, from float32, with these
# options, 110
PRECISIONS: dict[str, tuple[Callable[..., nn.Module], int, dict[str, object]]] = {
    "CNN6": (lambda dtype: gi.models.cnn6(outputs=10, dtype=dtype), 32, {}),
    "LeNet, polished": (lambda dtype: gi.models.lenet(PICTURE, dtype=dtype), 16, {"polish": True}),
    "eight bias-free layers": (
        lambda dtype: gi.models.mlp([3 * 64 * 64] + [96] * 7 + [10], bias=False, dtype=dtype),
        64,
        {},
    ),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_both_precisions(name: str) -> None:
    make, size, options = PRECISIONS[name]
    for dtype, bound, more in ((torch.float64, 200.0, {}), (torch.float32, 110.0, options)):
        x = gi.data.photo("coffee", size, dtype=dtype)
        found = recover(make(dtype=dtype), x, torch.tensor([3]), **more)
        assert gi.metrics.psnr(found.inputs, x.double()) > bound and found.exact
        assert found.targets is not None and found.targets.tolist() == [3]


def test_a_batch_comes_back_in_the_order_of_its_labels() -> None:
    model = gi.models.mlp([48, 32, 10], "tanh").double()
    x = torch.cat([double_photo(name, 4) for name in ("cat", "coffee")])
    found = recover(model, x, torch.tensor([7, 2]), batch_size=2)
    assert found.exact and error(found, x.flip(0)) < 1e-8
    assert found.targets is not None and found.targets.tolist() == [2, 7]


def test_fifty_local_steps_leave_a_first_dense_layer_open_and_adam_does_not() -> None:
    model = gi.models.mlp([48, 32, 10]).double()
    x = double_photo("astronaut", 4).flatten(1)
    kwargs = {"local_steps": 50, "learning_rate": 0.01}
    for optimizer, exact in (("sgd", True), ("adam", False)):
        update = gi.observe(model, CE, x, torch.tensor([1]), optimizer=optimizer, **kwargs)
        found = gi.recover(model, update, (48,), CE)
        assert found.exact == exact == (error(found, x) < 1e-12)


# --- losses: what fixes scale and label -------------------------------------------------------


def test_one_bias_anywhere_starts_the_recursion_for_squared_error() -> None:
    x, y = torch.rand(1, 30).double(), torch.randn(1, 4).double()
    layers = [nn.Linear(30, 24, bias=False), nn.Tanh(), nn.Linear(24, 20), nn.Tanh()]
    below = nn.Sequential(*layers, nn.Linear(20, 4, bias=False)).double()
    assert error(recover(below, x, y, nn.MSELoss()), x) < 1e-10
    last = recover(gi.models.mlp([30, 8, 4]).double(), x, y, nn.MSELoss())
    assert last.exact and last.targets is not None and torch.allclose(last.targets, y)


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), CE])
def test_twins(loss: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One logit, or two classes, without a bias: a right prediction has a twin, of other scale.

    No constant stands below: the twin costs no second descent, a mirrored one a layer.
    """
    outputs = 1 if loss is not CE else 2
    model = gi.models.cnn6((3, 16, 16), outputs=outputs, dtype=torch.float64)
    x = double_photo("astronaut", 16)
    with torch.no_grad():
        z = model(x)
    right, wrong = (z > 0).double(), (z <= 0).double()
    if outputs == 2:
        right, wrong = z.argmax(1), z.argmin(1)
    solve, solved = LayerSystem.solve, list[tuple[int, ...]]()
    monkeypatch.setattr(
        LayerSystem, "solve", lambda s, *a, **o: solved.append(s) or solve(s, *a, **o)
    )
    alone, once = recover(model, x, wrong, loss), len(solved)
    twins = recover(model, x, right, loss)
    assert len(solved) - once <= once
    if outputs == 1:
        assert len(alone.candidates) == 1 and alone.exact and error(alone, x) < 1e-9
    assert len(twins.candidates) > 1 and not twins.exact
    assert min(gi.metrics.relative_error(c.inputs, x) for c in twins.candidates) < 1e-9
    assert all(c.mismatch is not None and c.mismatch < 1e-8 for c in twins.candidates)


def test_a_bias_below_tells_twins_and_their_labels_apart() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten())
    model = nn.Sequential(conv, nn.Linear(144, 1, bias=False)).double()
    x = torch.rand(1, 1, 8, 8).double()
    with torch.no_grad():
        right = (model(x) > 0).double()
    found = recover(model, x, right, nn.BCEWithLogitsLoss())
    assert found.exact and error(found, x) < 1e-9
    dense = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2, bias=False)).double()
    x = torch.rand(1, 8).double()
    for label in (0, 1):  # the input is known from the first layer; the label by the mismatch
        found = recover(dense, x, torch.tensor([label]))
        assert found.exact and found.targets is not None and found.targets.tolist() == [label]


# --- honesty ----------------------------------------------------------------------------------


class Alone(Recovering):
    """Does not solve layers together."""

    def together(self, *_: object, **__: object) -> None:
        return None


def test_a_walk_of_ones_own() -> None:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 8, 2)]
    model = chain(*layers, nn.LeakyReLU(0.2), shape=(3, 7, 7))
    x = double_photo("cat", 7)
    together = recover(model, x, torch.tensor([1]))
    assert together.exact and [r.name for r in together.layers][1:] == ["0+2"]
    alone = recover(model, x, torch.tensor([1]), walk=Alone)
    assert not alone.exact and not alone.layers[1].full_rank and error(alone, x) > 1e-3
    assert "deficient" in str(alone) and "exact: no" in str(alone)


def test_foreign_truncated_and_quantized_gradients_are_never_trusted() -> None:
    make = gi.models.wide_cnn
    options = {"activation": "leaky_relu", "dtype": torch.float64}
    model = make(PICTURE, **options)
    other = make(PICTURE, **options, generator=torch.Generator().manual_seed(99))
    x, y = double_photo("cat", 16), torch.tensor([0])
    good = gi.observe(model, CE, x, y)
    batch = gi.observe(model, CE, torch.cat([x, x.flip(-1)]), torch.tensor([0, 1]))
    step = {n: g.abs().max() / 127 for n, g in good.gradients.items()}
    coarse = {n: (g / step[n]).round() * step[n] for n, g in good.gradients.items()}
    noisy = {n: g + 1e-3 * g.abs().max() * torch.randn_like(g) for n, g in good.gradients.items()}
    for update in (gi.observe(other, CE, x, y), batch, Update(coarse), Update(noisy)):
        with suppress(GradientInversionError):
            assert not gi.recover(model, update, PICTURE, CE).exact
    unsent = Update({n: g for n, g in good.gradients.items() if not n.startswith("0.")})
    partly = gi.recover(model, unsent, PICTURE, CE)
    assert partly.layers[-1].equations == 16 * 8 * 8  # weight rows alone
    narrow = make(PICTURE, activation="relu", width=0.5, dtype=torch.float64)
    with suppress(GradientInversionError):
        assert not recover(narrow, x, y).exact


def test_what_a_dense_layer_leaves_is_relative() -> None:
    k, x, rest = (torch.rand(shape).double() for shape in ((2, 7), (2, 5), (7, 5)))
    G = k.T @ x + 1e-3 * rest
    one, small = (known_gradients(s * G, s * k, None, 0.0) for s in (1.0, 2.0**-20))
    assert one is not None and small is not None and one[2] > 1e-4
    assert small[2] == pytest.approx(one[2], rel=1e-9)


def test_a_gradient_outside_the_span_of_the_patches_is_not_explained() -> None:
    """A ramp has patches of rank two, which rounding must not widen; groups are left out."""
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(64, 3)).double()
    ramp, steps = torch.arange(8).expand(1, 1, 8, 8).double(), trace(model, (1, 8, 8))
    span = torch.linalg.qr(torch.stack([torch.ones(25), torch.arange(5).repeat(5)], 1).double()).Q
    for x in (ramp, torch.rand(1, 1, 8, 8).double()):
        sent = gi.observe(model, nn.CrossEntropyLoss(), x, torch.tensor([1])).gradients["0.weight"]
        G = sent.flatten(1)
        rest = float((G - G @ span @ span.T).norm() / G.norm())
        for size in (1.0, 2.0**-20):
            found = unexplained(steps, {"0.weight": sent}, size * ramp, {})
            assert found == pytest.approx(rest, rel=1e-6, abs=1e-12)
    grouped = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 3)).double()
    sent = {"0.weight": torch.rand(2, 1, 3, 3).double()}
    assert unexplained(trace(grouped, (2, 3, 3)), sent, torch.rand(1, 2, 3, 3).double(), {}) is None


def test_nothing_of_the_callers_is_changed() -> None:
    model = gi.models.wide_cnn(PICTURE, activation="leaky_relu", dropout=0.5).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    recover(model, gi.data.photo("cat", 16), torch.tensor([0]))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def refused(layer: nn.Module) -> Callable[[], object]:
    model = chain(nn.Conv2d(3, 8, 3), layer, shape=SMALL).eval()
    return lambda: recover(model, torch.rand(1, *SMALL).double(), torch.tensor([0]))


def spoilt(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[], object]:
    model, x = gi.models.mlp([12, 8, 3], bias=False).double(), torch.rand(1, 12).double()
    sent = gi.observe(model, CE, x, torch.tensor([1])).gradients
    return lambda: gi.recover(model, Update(change(dict(sent))), (12,), CE)


def scaleless() -> object:
    model, x = gi.models.mlp([12, 8, 3], bias=False).double(), torch.rand(1, 12).double()
    return recover(model, x, torch.rand(1, 3).double(), nn.MSELoss())


REFUSALS = [
    (refused(nn.FractionalMaxPool2d(2, 2)), errors.UnsupportedLayerError, "FractionalMaxPool2d"),
    (scaleless, errors.UndeterminedScaleError, "squared error"),
    (
        spoilt(lambda g: {n: torch.zeros_like(v) for n, v in g.items()}),
        errors.VanishingGradientError,
        "zero",
    ),
    (spoilt(lambda g: {"1.weight": g["1.weight"]}), errors.InvalidTensorError, r"lacks 3\.weight"),
    (
        spoilt(lambda g: {n: torch.full_like(v, torch.nan) for n, v in g.items()}),
        errors.InvalidTensorError,
        "NaN",
    ),
    (
        spoilt(lambda g: {**g, "1.weight": g["1.weight"].T}),
        errors.InvalidTensorError,
        "1.weight",
    ),
]


@pytest.mark.parametrize("call, kind, message", REFUSALS, ids=[m for _, _, m in REFUSALS])
def test_refusals(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

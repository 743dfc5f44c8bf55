"""What a client sends, what known weight decay leaves of it, and the file that holds it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLossError,
    UpdateFileError,
)
from gradinv_edu.kit import models

LOSS = nn.CrossEntropyLoss()
LABEL = torch.tensor([3])
LOCAL: dict[str, Any] = {"local_steps": 4, "learning_rate": 0.1}
DECAY = {"momentum": 0.9, "weight_decay": 1e-3}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return models.mlp((64, 16, 10), activation="tanh", dtype=dtype)


def _digit(dtype: torch.dtype = torch.float64) -> Tensor:
    return gi.data.digit(3, dtype=dtype)


def _sent(net: nn.Module | None = None, **how: Any) -> gi.Update:
    return gi.observe(net or _net(), LOSS, _digit(), LABEL, **how)


def _ratio_error(update: gi.Update) -> float:
    weight, bias = update.gradients["1.weight"].double(), update.gradients["1.bias"].double()
    row = bias.abs().argmax()
    return gi.metrics.relative_error(weight[row] / bias[row], _digit().flatten())


# --- one gradient, and local steps -----------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_plain_gradient_is_autograd_s_in_whatever_mode(mode: Any) -> None:
    net, x = _net(), _digit()
    wanted = torch.autograd.grad(LOSS(net(x), LABEL), list(net.parameters()))
    with mode():
        update = _sent(net)
    assert list(update.gradients) == [name for name, _ in net.named_parameters()]
    pairs = zip(update.gradients.values(), wanted, strict=True)
    assert all(torch.equal(found, want) for found, want in pairs)
    assert (update.local_steps, update.learning_rate, update.samples) == (1, None, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_model_s_dtype_and_come_back_from_a_file(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    found, wanted = _sent(_net(dtype)).gradients["1.bias"], _sent().gradients["1.bias"]
    assert gi.metrics.relative_error(found, wanted) < 30 * torch.finfo(dtype).eps
    update = _sent(_net(dtype), **LOCAL, **DECAY)
    update.save(str(tmp_path / "u"))
    loaded = gi.Update.load(tmp_path / "u")
    assert repr(loaded) == repr(update)
    assert list(loaded.gradients) == list(update.gradients)
    for name, gradient in update.gradients.items():
        assert loaded.gradients[name].dtype == gradient.dtype == dtype
        assert torch.equal(loaded.gradients[name], gradient)


def test_frozen_parameters_are_not_sent_and_unused_ones_are_zero() -> None:
    net = _net()
    net[1].bias.requires_grad_(False)
    net.unused = nn.Linear(2, 2).double()
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))  # type: ignore[method-assign]
    update = _sent(net)
    assert "1.bias" not in update.gradients
    assert not update.gradients["unused.weight"].any()


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_local_steps_are_torch_optim_s(name: str, momentum: float, decay: float) -> None:
    net, (x, y) = _net(), gi.data.digits(range(6), dtype=torch.float64)
    client = copy.deepcopy(net)
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    extra = {"momentum": momentum} if name == "sgd" else {}
    optimizer = kind(client.parameters(), lr=0.05, weight_decay=decay, **extra)
    for step in range(7):
        places = [(step * 4 + i) % 6 for i in range(4)]
        optimizer.zero_grad()
        LOSS(client(x[places]), y[places]).backward()
        optimizer.step()
    update = gi.observe(
        net, LOSS, x, y, local_steps=7, learning_rate=0.05, batch_size=4,
        optimizer=name, momentum=momentum, weight_decay=decay,
    )  # fmt: skip
    for (key, start), end in zip(net.named_parameters(), client.parameters(), strict=True):
        wanted = (start - end).detach() / 0.05
        assert gi.metrics.relative_error(update.gradients[key], wanted) < 1e-12
    assert (update.batch_size, update.samples) == (4, 6)


@settings(max_examples=25)
@given(
    steps=st.integers(1, 30),
    rate=st.floats(1e-2, 0.1),
    momentum=st.floats(0, 0.9),
    decay=st.floats(1e-4, 0.05),
)
def test_known_weight_decay_comes_out(
    steps: int, rate: float, momentum: float, decay: float
) -> None:
    """Exactly where the loss pulls, and to nothing where all that is sent is decay."""
    how = {"local_steps": steps, "learning_rate": rate, "momentum": momentum}
    assert _ratio_error(_sent(**how)) < 1e-11
    net, update = _net(), _sent(weight_decay=decay, **how)
    cleared = gi.sharing.without_weight_decay(net, update)
    assert _ratio_error(cleared) < 1e-11 < 1e-6 < _ratio_error(update)
    assert (cleared.weight_decay, cleared.local_steps) == (0, steps)
    still = gi.observe(net, lambda z, _: 0 * z.sum(), _digit(), LABEL, weight_decay=decay, **how)
    left = gi.sharing.without_weight_decay(net, still).gradients["1.weight"]
    assert float(left.norm()) < 1e-11 * float(net[1].weight.detach().norm()) / rate


def test_decay_of_a_plain_gradient_comes_out_and_adam_s_does_not() -> None:
    plain, decayed = _sent(), _sent(weight_decay=0.1)
    cleared = gi.sharing.without_weight_decay(_net(), decayed)
    for name, wanted in plain.gradients.items():
        assert gi.metrics.relative_error(cleared.gradients[name], wanted) < 1e-13
        assert gi.metrics.relative_error(decayed.gradients[name], wanted) > 1e-3
    adam = _sent(local_steps=50, learning_rate=0.01, optimizer="adam", weight_decay=0.1)
    assert _ratio_error(adam) > 0.1
    with pytest.raises(InvalidArgumentError, match="cannot be taken out of an Adam update"):
        gi.sharing.without_weight_decay(_net(), adam)


# --- what is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, LOCAL])
def test_the_caller_s_model_and_generator_are_left_alone(how: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    net = net.append(nn.Linear(8, 10)).double().train()
    net[3].eval()
    net[1].weight.grad = torch.ones_like(net[1].weight)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state, (x, y) = torch.get_rng_state(), gi.data.digits(range(4), dtype=torch.float64)
    kept = x.clone()
    update = gi.observe(net, LOSS, x, y, buffers=True, **how)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert net[1].bias.grad is None
    assert torch.equal(x, kept)
    assert int(update.buffers["2.num_batches_tracked"]) == how.get("local_steps", 1)


def test_running_statistics_are_sent_if_they_are_to_be(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).double().train()
    x, y = gi.data.digits(range(4), dtype=torch.float64)
    assert not gi.observe(net, LOSS, x, y).buffers
    update = gi.observe(net, LOSS, x, y, buffers=True)
    mean = update.buffers["1.running_mean"]
    torch.testing.assert_close(mean, 0.1 * x.flatten(1).mean(dim=0))
    update.save(tmp_path / "u")
    loaded = gi.Update.load(tmp_path / "u")
    assert "3 buffers" in repr(loaded)
    assert torch.equal(loaded.buffers["1.running_mean"], mean)
    with pytest.raises(InvalidTensorError, match=r"no buffer '1\.running_mean'"):
        gi.Update(_sent().gradients, buffers=loaded.buffers).check(_net())


def test_dropout_draws_from_the_generator_in_the_model_s_own_mode() -> None:
    net = models.wide_cnn((1, 8, 8), dropout=0.5).train()

    def sent(seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return _sent(net, generator=generator).gradients["8.weight"]

    assert torch.equal(sent(), sent())
    assert torch.equal(sent(5), sent(5))
    assert not torch.equal(sent(5), sent(6))
    source = torch.Generator().manual_seed(5)
    twice = [_sent(net, generator=source).gradients["8.weight"] for _ in range(2)]
    assert not torch.equal(*twice)
    dropped = int((sent()[0] == 0).sum())
    net.eval()
    assert dropped > 50 > int((sent()[0] == 0).sum())


# --- refusals --------------------------------------------------------------------------------


def _spoiled(value: float) -> Tensor:
    x = _digit()
    x[0, 0, 1, 2] = value
    return x


BROKEN = _net()
BROKEN[3].weight.data[0, 0] = torch.nan
NONE = nn.CrossEntropyLoss(reduction="none")
TWO = torch.tensor([1, 2])
ARGUMENT, TENSOR = InvalidArgumentError, InvalidTensorError
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ARGUMENT, "local_steps must be a whole number, 1 or more; got 0", {"local_steps": 0}),
    (ARGUMENT, "local_steps must be a whole number", {"local_steps": 1.5}),
    (ARGUMENT, "need a learning_rate", {"local_steps": 2}),
    (ARGUMENT, "need a learning_rate", {"optimizer": "adam"}),
    (ARGUMENT, r"learning_rate must be positive, got -0\.1", {"learning_rate": -0.1}),
    (ARGUMENT, "learning_rate must be positive, got nan", {"learning_rate": torch.nan}),
    (ARGUMENT, r"momentum must be in \[0, 1\)", {"momentum": 1.0}),
    (ARGUMENT, "weight_decay must be zero or more", {"weight_decay": -1.0}),
    (ARGUMENT, "batch_size must be a whole number", {"batch_size": 0}),
    (ARGUMENT, "batch_size 2 is more than the 1 samples", {"batch_size": 2}),
    (ARGUMENT, "Adam takes no momentum", {**LOCAL, "optimizer": "adam", "momentum": 0.9}),
    (UnknownNameError, "No optimizer 'lion'; there are sgd, adam", {"optimizer": "lion"}),
    (TENSOR, "inputs has 1 NaN or infinite entries of 64", {"inputs": _spoiled(torch.nan)}),
    (TENSOR, "inputs has 1 NaN or infinite entries", {"inputs": _spoiled(torch.inf)}),
    (TENSOR, r"inputs has dtype torch\.uint8", {"inputs": _digit().to(torch.uint8)}),
    (TENSOR, r"inputs has shape \(1, 1, 8, 8\) and targets", {"targets": TWO}),
    (TENSOR, "number of samples", {"targets": torch.tensor(1)}),
    (TENSOR, r"targets must be a torch\.Tensor, got int", {"targets": 3}),
    (TENSOR, r"inputs \(1, 1, 8, 7\) with targets \(1,\)", {"inputs": torch.rand(1, 1, 8, 7)}),
    (TENSOR, "Target 10 is out of bounds", {"targets": torch.tensor([10])}),
    (TENSOR, "no parameter that takes a gradient", {"model": nn.Flatten()}),
    (TENSOR, r"3\.weight has", {"model": BROKEN}),
    (UnsupportedLossError, r"one number .* got \(2,\)",
     {"loss": NONE, "targets": TWO, "inputs": torch.rand(2, 64)}),
    (UnsupportedLossError, "one number .* got float", {"loss": lambda z, y: 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "wrong"), REFUSED)
def test_what_cannot_be_is_refused(
    error: type[Exception], message: str, wrong: dict[str, Any]
) -> None:
    given_ = {"model": _net(), "loss": LOSS, "inputs": _digit(), "targets": LABEL, **wrong}
    with pytest.raises(error, match=message):
        gi.observe(**given_)


@pytest.mark.parametrize(
    ("message", "gradients", "net"),
    [
        (r"1\.weight has shape \(16, 64\), expected", None, models.mlp((64, 15, 10))),
        (r"gradient for '1\.weight', the model no such", None, nn.Linear(64, 10)),
        ("no gradient at all", {}, _net()),
        (r"1\.bias has 16 NaN or infinite", {"1.bias": torch.full((16,), torch.nan)}, _net()),
        (r"1\.bias has 16 NaN or infinite", {"1.bias": torch.full((16,), torch.inf)}, _net()),
        (r"has dtype torch\.int64", {"1.bias": torch.zeros(16, dtype=torch.int64)}, _net()),
    ],
)
def test_check_names_what_does_not_belong(message: str, gradients: Any, net: nn.Module) -> None:
    update = _sent() if gradients is None else gi.Update(gradients)
    with pytest.raises(InvalidTensorError, match=message):
        update.check(net)


# --- files -----------------------------------------------------------------------------------


def test_gradients_that_share_memory_or_lie_askew_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    gi.Update({"a": whole.T, "b": whole[0]}).save(tmp_path / "u")
    loaded = gi.Update.load(tmp_path / "u").gradients
    assert torch.equal(loaded["a"], whole.T)
    assert torch.equal(loaded["b"], whole[0])
    with pytest.raises(UpdateFileError, match="does not exist"):
        gi.Update.load(tmp_path / "none")
    with pytest.raises(UpdateFileError, match="is a folder"):
        gi.Update.load(tmp_path)
    with pytest.raises(UpdateFileError, match="Cannot write"):
        gi.Update({"a": whole}).save(tmp_path / "no" / "folder")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(part: float, tmp_path: Path) -> None:
    _sent(_net(torch.float32)).save(tmp_path / "u")
    content = (tmp_path / "u").read_bytes()
    (tmp_path / "u").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UpdateFileError, match="is truncated or is not a safetensors file"):
        gi.Update.load(tmp_path / "u")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("but not an update: its format is None", {"format": None}),
        ("describes itself wrongly", {"names": ["gone"]}),
        ("describes itself wrongly", {"names": 5}),
        ("describes itself wrongly", {"buffers": [["weight"]]}),
        ("describes itself wrongly", {"settings": {"gradients": {}}}),
        ("describes itself wrongly", {"settings": [1]}),
        ("samples must be a whole number", {"settings": {"samples": 0}}),
        ("No optimizer 'lion'", {"settings": {"optimizer": "lion"}}),
    ],
)
def test_a_file_of_something_else_is_refused(
    message: str, said: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "u"
    texts = {"names": ["weight"], "settings": {}, **said}
    metadata = {k: json.dumps(v) for k, v in texts.items()} | {"format": gi.update.FORMAT}
    save_file({"weight": torch.ones(2)}, path, None if "format" in said else metadata)
    with pytest.raises(UpdateFileError, match=message):
        gi.Update.load(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"not an update" * 50)
    with pytest.raises(UpdateFileError, match="not a safetensors file"):
        gi.Update.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", [{}, LOCAL, {**LOCAL, "optimizer": "adam"}])
def test_cuda_gradients_stay_there_and_its_generator_is_left_alone(how: dict[str, Any]) -> None:
    net = models.wide_cnn((1, 8, 8), dropout=0.5, dtype=torch.float64, device="cuda").train()
    state = torch.cuda.get_rng_state()
    update, again = (gi.observe(net, LOSS, _digit().cuda(), LABEL.cuda(), **how) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert update.gradients["8.weight"].is_cuda
    assert gi.metrics.relative_error(again.gradients["8.weight"], update.gradients["8.weight"]) == 0


class Several(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x)}


def test_a_model_with_several_outputs_is_told_what_to_do() -> None:
    with pytest.raises(UnsupportedLossError, match=r"Several gives a dict.* aux_logits=False"):
        gi.observe(Several(4, 10), LOSS, torch.ones(1, 4), LABEL)

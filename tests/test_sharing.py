"""What a client sends, and what known weight decay leaves of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import models
from gradinv_edu.errors import (
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLossError,
    UpdateFileError,
)

CROSS_ENTROPY = nn.CrossEntropyLoss()
LABEL = torch.tensor([3])


def _net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return models.mlp((64, 16, 10), activation="tanh", dtype=dtype)


def _digit(dtype: torch.dtype = torch.float64) -> Tensor:
    return gi.data.digit(3, dtype=dtype)


def _ratio_error(update: gi.Update, x: Tensor) -> float:
    weight, bias = update.gradients["1.weight"].double(), update.gradients["1.bias"].double()
    row = bias.abs().argmax()
    return gi.metrics.relative_error(weight[row] / bias[row], x.double().flatten())


def _reference(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, size: int) -> None:
    x, y = gi.data.digits(range(6), dtype=torch.float64)
    for step in range(steps):
        places = [(step * size + i) % len(x) for i in range(size)]
        optimizer.zero_grad()
        CROSS_ENTROPY(net(x[places]), y[places]).backward()
        optimizer.step()


# --- one gradient ----------------------------------------------------------------------------


def test_a_plain_gradient_is_autograd_s() -> None:
    net, x = _net(), _digit()
    update = gi.observe(net, CROSS_ENTROPY, x, LABEL)
    wanted = torch.autograd.grad(CROSS_ENTROPY(net(x), LABEL), list(net.parameters()))
    assert list(update.gradients) == [name for name, _ in net.named_parameters()]
    for found, want in zip(update.gradients.values(), wanted, strict=True):
        assert torch.equal(found, want)
    assert (update.local_steps, update.learning_rate, update.samples) == (1, None, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_model_s_dtype(dtype: torch.dtype) -> None:
    update = gi.observe(_net(dtype), CROSS_ENTROPY, _digit(torch.float64), LABEL)
    assert {g.dtype for g in update.gradients.values()} == {dtype}
    wanted = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL).gradients["1.bias"]
    error = gi.metrics.relative_error(update.gradients["1.bias"], wanted)
    assert error < 30 * torch.finfo(dtype).eps


def test_frozen_parameters_are_not_sent_and_unused_ones_are_zero() -> None:
    net = _net()
    net[1].bias.requires_grad_(False)
    net.unused = nn.Linear(2, 2).double().requires_grad_(True)
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))  # type: ignore[method-assign]
    update = gi.observe(net, CROSS_ENTROPY, _digit(), LABEL)
    assert "1.bias" not in update.gradients
    assert not update.gradients["unused.weight"].any()
    torch.manual_seed(0)


def test_modes_in_which_the_caller_may_be_do_not_matter() -> None:
    wanted = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL)
    with torch.no_grad():
        first = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL)
    net = _net()
    with torch.inference_mode():
        second = gi.observe(net, CROSS_ENTROPY, _digit(), LABEL)
    for update in (first, second):
        assert torch.equal(update.gradients["1.weight"], wanted.gradients["1.weight"])


# --- local steps -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "momentum", "decay"),
    [
        ("sgd", 0.0, 0.0),
        ("sgd", 0.9, 0.0),
        ("sgd", 0.5, 0.01),
        ("adam", 0.0, 0.0),
        ("adam", 0, 0.1),
    ],
)
def test_local_steps_are_torch_optim_s(name: str, momentum: float, decay: float) -> None:
    net, (x, y) = _net(), gi.data.digits(range(6), dtype=torch.float64)
    client = copy.deepcopy(net)
    kind = torch.optim.SGD if name == "sgd" else torch.optim.Adam
    extra = {"momentum": momentum} if name == "sgd" else {}
    optimizer = kind(client.parameters(), lr=0.05, weight_decay=decay, **extra)
    _reference(client, optimizer, steps=7, size=4)
    update = gi.observe(
        net, CROSS_ENTROPY, x, y, local_steps=7, learning_rate=0.05, batch_size=4,
        optimizer=name, momentum=momentum, weight_decay=decay,
    )  # fmt: skip
    for (key, start), end in zip(net.named_parameters(), client.parameters(), strict=True):
        wanted = (start - end).detach() / 0.05
        assert gi.metrics.relative_error(update.gradients[key], wanted) < 1e-12
    assert (update.batch_size, update.samples) == (4, 6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fifty_steps_on_one_sample_leave_the_ratio_exact(momentum: float) -> None:
    settings = {"local_steps": 50, "learning_rate": 0.05, "momentum": momentum}
    update = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL, **settings)
    assert _ratio_error(update, _digit()) < 1e-12


def test_adam_breaks_the_ratio() -> None:
    settings = {"local_steps": 50, "learning_rate": 0.01, "optimizer": "adam"}
    update = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL, **settings)
    assert _ratio_error(update, _digit()) > 0.1


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decay", [5e-4, 0.05])
def test_known_weight_decay_comes_out_exactly(steps: int, momentum: float, decay: float) -> None:
    net, x = _net(), _digit()
    update = gi.observe(
        net, CROSS_ENTROPY, x, LABEL, local_steps=steps, learning_rate=0.05, momentum=momentum,
        weight_decay=decay,
    )  # fmt: skip
    cleared = gi.sharing.without_weight_decay(net, update)
    assert _ratio_error(update, x) > 1e-6
    assert _ratio_error(cleared, x) < 1e-12
    assert cleared.weight_decay == 0
    assert (cleared.local_steps, cleared.momentum) == (steps, momentum)


@given(
    steps=st.integers(1, 30),
    rate=st.floats(1e-3, 0.5),
    momentum=st.floats(0, 0.95),
    decay=st.floats(1e-5, 0.1),
)
def test_decay_alone_is_taken_out_to_nothing(
    steps: int, rate: float, momentum: float, decay: float
) -> None:
    """Where the loss does not pull at a layer, all that is sent of it is decay."""
    net = _net()
    update = gi.observe(
        net, lambda z, _: 0 * z.sum(), _digit(), LABEL, local_steps=steps, learning_rate=rate,
        momentum=momentum, weight_decay=decay,
    )  # fmt: skip
    cleared = gi.sharing.without_weight_decay(net, update).gradients["1.weight"]
    assert float(cleared.norm()) < 1e-11 * float(net[1].weight.detach().norm()) / rate


def test_decay_of_a_plain_gradient_comes_out() -> None:
    net, plain = _net(), gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL)
    decayed = gi.observe(net, CROSS_ENTROPY, _digit(), LABEL, weight_decay=0.1)
    cleared = gi.sharing.without_weight_decay(net, decayed)
    for name, wanted in plain.gradients.items():
        assert gi.metrics.relative_error(cleared.gradients[name], wanted) < 1e-13
        assert gi.metrics.relative_error(decayed.gradients[name], wanted) > 1e-3


def test_decay_in_an_adam_update_is_refused() -> None:
    settings = {"learning_rate": 0.1, "optimizer": "adam", "weight_decay": 0.1}
    update = gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL, **settings)
    with pytest.raises(ValueError, match="cannot be taken out of an Adam update"):
        gi.sharing.without_weight_decay(_net(), update)


# --- what is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"local_steps": 3, "learning_rate": 0.1}])
def test_the_caller_s_model_is_left_alone(settings: dict[str, float]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    net = net.append(nn.Linear(8, 10)).double().train()
    net[2].eval()
    net[1].weight.grad = torch.ones_like(net[1].weight)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), [m.training for m in net.modules()]
    x, y = gi.data.digits(range(4), dtype=torch.float64)
    kept = x.clone()
    gi.observe(net, CROSS_ENTROPY, x, y, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == threads
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert net[1].bias.grad is None
    assert torch.equal(x, kept)
    torch.manual_seed(0)


def test_dropout_draws_from_the_generator() -> None:
    net = models.wide_cnn((1, 8, 8), dropout=0.5).train()

    def sent(generator: torch.Generator | None) -> Tensor:
        update = gi.observe(net, CROSS_ENTROPY, _digit(), LABEL, generator=generator)
        return update.gradients["8.weight"]

    assert torch.equal(sent(None), sent(None))
    seeded = sent(torch.Generator().manual_seed(5))
    assert torch.equal(seeded, sent(torch.Generator().manual_seed(5)))
    assert not torch.equal(seeded, sent(torch.Generator().manual_seed(6)))
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(sent(generator), sent(generator))


def test_the_model_s_own_mode_counts() -> None:
    net = models.wide_cnn((1, 8, 8), dropout=0.5)
    training = gi.observe(net.train(), CROSS_ENTROPY, _digit(), LABEL)
    evaluation = gi.observe(net.eval(), CROSS_ENTROPY, _digit(), LABEL)
    dropped = [int((u.gradients["8.weight"][0] == 0).sum()) for u in (training, evaluation)]
    assert dropped[0] > 50 > dropped[1]


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_steps": 0}, "local_steps must be a whole number, one or more, got 0"),
        ({"local_steps": 1.5}, "local_steps must be a whole number"),
        ({"local_steps": 2}, "need a learning_rate"),
        ({"optimizer": "adam"}, "need a learning_rate"),
        ({"learning_rate": -0.1}, "learning_rate must be positive, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be zero or more"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": 2}, "batch_size 2 is more than the 1 samples"),
        ({"optimizer": "adam", "learning_rate": 0.1, "momentum": 0.9}, "Adam takes no momentum"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL, **settings)


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match="No optimizer 'lion'; there are sgd, adam"):
        gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL, optimizer="lion")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    x = _digit()
    x[0, 0, 1, 2] = value
    with pytest.raises(InvalidTensorError, match="inputs has 1 NaN or infinite entries of 64"):
        gi.observe(_net(), CROSS_ENTROPY, x, LABEL)


def test_a_gradient_that_is_not_finite_is_refused_by_name() -> None:
    net = _net()
    with torch.no_grad():
        net[3].weight[0, 0] = torch.nan
    with pytest.raises(InvalidTensorError, match=r"The gradient of 1\.weight has"):
        gi.observe(net, CROSS_ENTROPY, _digit(), LABEL)


def test_samples_and_targets_must_pair_up() -> None:
    with pytest.raises(InvalidTensorError, match=r"inputs has shape \(1, 1, 8, 8\) and targets"):
        gi.observe(_net(), CROSS_ENTROPY, _digit(), torch.tensor([1, 2]))
    with pytest.raises(InvalidTensorError, match="number of samples"):
        gi.observe(_net(), CROSS_ENTROPY, _digit(), torch.tensor(1))
    with pytest.raises(InvalidTensorError, match=r"floating-point tensor, got torch\.uint8"):
        gi.observe(_net(), CROSS_ENTROPY, _digit().to(torch.uint8), LABEL)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match="no parameter that takes a gradient"):
        gi.observe(nn.Flatten(), CROSS_ENTROPY, _digit(), LABEL)


def test_a_loss_of_many_numbers_is_refused() -> None:
    loss = nn.CrossEntropyLoss(reduction="none")
    x, y = gi.data.digits(range(4), dtype=torch.float64)
    with pytest.raises(UnsupportedLossError, match=r"one number .* got \(4,\)"):
        gi.observe(_net(), loss, x, y)


def test_check_names_what_does_not_belong() -> None:
    net, update = _net(), gi.observe(_net(), CROSS_ENTROPY, _digit(), LABEL)
    update.check(net)
    with pytest.raises(InvalidTensorError, match=r"1\.weight has shape \(16, 64\), expected"):
        update.check(models.mlp((64, 15, 10)))
    with pytest.raises(InvalidTensorError, match=r"gradient for '1\.weight', the model no such"):
        update.check(nn.Linear(64, 10))
    with pytest.raises(InvalidTensorError, match="no gradient at all"):
        gi.Update({}).check(net)
    for bad in (torch.full((16,), torch.nan), torch.full((16,), torch.inf)):
        with pytest.raises(InvalidTensorError, match=r"1\.bias has 16 NaN or infinite"):
            gi.Update({"1.bias": bad}).check(net)
    with pytest.raises(InvalidTensorError, match=r"has dtype torch\.int64"):
        gi.Update({"1.bias": torch.zeros(16, dtype=torch.int64)}).check(net)


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    settings = {"local_steps": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    update = gi.observe(_net(torch.float32), CROSS_ENTROPY, _digit(), LABEL, **settings)
    update.save(tmp_path / "update.safetensors")
    return tmp_path / "update.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_update_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {"local_steps": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    update = gi.observe(_net(dtype), CROSS_ENTROPY, _digit(), LABEL, **settings)
    update.save(str(tmp_path / "u.safetensors"))
    loaded = gi.Update.load(tmp_path / "u.safetensors")
    assert repr(loaded) == repr(update)
    assert list(loaded.gradients) == list(update.gradients)
    for name, gradient in update.gradients.items():
        assert loaded.gradients[name].dtype == dtype
        assert torch.equal(loaded.gradients[name], gradient)


def test_gradients_that_share_memory_or_lie_askew_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    gi.Update({"a": whole.T, "b": whole[0]}).save(tmp_path / "u")
    loaded = gi.Update.load(tmp_path / "u").gradients
    assert torch.equal(loaded["a"], whole.T)
    assert torch.equal(loaded["b"], whole[0])


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpdateFileError, match="does not exist"):
        gi.Update.load(tmp_path / "none.safetensors")
    with pytest.raises(UpdateFileError, match="is a folder"):
        gi.Update.load(tmp_path)
    with pytest.raises(UpdateFileError, match="Cannot write"):
        gi.Update({"a": torch.ones(1)}).save(tmp_path / "no" / "folder")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UpdateFileError, match="is truncated or is not a safetensors file"):
        gi.Update.load(saved)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "u.safetensors"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"not an update" * 50)
    with pytest.raises(UpdateFileError, match="not a safetensors file"):
        gi.Update.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(UpdateFileError, match="but not an update: its format is None"):
        gi.Update.load(path)
    metadata = {"format": gi.sharing.FORMAT, "names": '["gone"]', "settings": "{}"}
    save_file({"weight": torch.ones(2)}, path, metadata)
    with pytest.raises(UpdateFileError, match="describes itself wrongly"):
        gi.Update.load(path)
    metadata = {"format": gi.sharing.FORMAT, "names": '["weight"]', "settings": '{"samples": 0}'}
    save_file({"weight": torch.ones(2)}, path, metadata)
    with pytest.raises(UpdateFileError, match="samples must be a whole number"):
        gi.Update.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gradients_stay_there_and_its_generator_is_left_alone() -> None:
    net = models.wide_cnn((1, 8, 8), dropout=0.5, dtype=torch.float64, device="cuda").train()
    state = torch.cuda.get_rng_state()
    update = gi.observe(net, CROSS_ENTROPY, _digit().cuda(), LABEL.cuda())
    again = gi.observe(net, CROSS_ENTROPY, _digit().cuda(), LABEL.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert update.gradients["8.weight"].is_cuda
    assert gi.metrics.relative_error(again.gradients["8.weight"], update.gradients["8.weight"]) == 0


def test_samples_that_do_not_fit_the_model_or_the_loss_are_refused_by_shape() -> None:
    model, loss = models.mlp((64, 10)), nn.CrossEntropyLoss()
    with pytest.raises(InvalidTensorError, match=r"inputs \(1, 1, 8, 7\) with targets \(1,\)"):
        gi.observe(model, loss, torch.rand(1, 1, 8, 7), torch.tensor([3]))
    with pytest.raises(InvalidTensorError, match=r"Target 10 is out of bounds"):
        gi.observe(model, loss, torch.rand(1, 1, 8, 8), torch.tensor([10]))

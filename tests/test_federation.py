"""Unmodified Flower: what an honest but curious server reads, and a client that looks first."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu import federation
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    MissingExtraError,
    UnknownNameError,
)
from gradinv_edu.federation import CuriousServer, LeakAudit, Limits, Schedule

federation.flower()
from flwr.app import Array, ArrayRecord, MetricRecord  # noqa: E402
from flwr.client.mod import secaggplus_mod  # noqa: E402
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod  # noqa: E402
from flwr.serverapp.strategy import (  # noqa: E402
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
)

SIZE, SHAPE = 16, (3, 16, 16)
NAMES = ("astronaut", "cat", "coffee", "rocket")
PHOTOS = torch.cat([gi.data.photo(name, size=SIZE) for name in NAMES])
LABELS = torch.tensor([3, 5, 8, 1])
LOSS = nn.CrossEntropyLoss()
ONE = Schedule(learning_rate=0.1)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flwr")


def one_each(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
    i = int(context.node_config["partition-id"])
    return PHOTOS[i : i + 1], LABELS[i : i + 1]


def dense() -> nn.Sequential:
    return gi.models.mlp([math.prod(SHAPE), 64, 10])


def convolutional() -> nn.Sequential:
    return gi.models.wide_cnn(SHAPE, bias=True)


def fedavg(**settings: Any) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, **settings)


def federate(
    model: nn.Module,
    schedule: Schedule = ONE,
    strategy: Any = None,
    mods: Any = (),
    data: Any = one_each,
    **settings: Any,
) -> CuriousServer:
    server = CuriousServer(strategy or fedavg(), model)
    app = federation.client_app(model, LOSS, data, mods)
    federation.simulate(server, app, model, schedule, **{"clients": 4, **settings})
    return server


def only(partition: int, mod: Any) -> Any:
    def chosen(message: Any, context: Any, call_next: Any) -> Any:
        mine = context.node_config["partition-id"] == partition
        return mod(message, context, call_next) if mine else call_next(message, context)

    return chosen


def psnr(recovered: torch.Tensor, partition: int) -> float:
    return gi.metrics.psnr(recovered.reshape(SHAPE).double().clamp(0, 1), PHOTOS[partition])


def ratio(seen: federation.Received) -> torch.Tensor:
    return federation.first_layer_ratio(seen.model, seen.update, SHAPE)


# --- the server -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, convolutional])
def test_one_round_gives_every_clients_picture_away(make: Any) -> None:
    server = federate(make())
    assert [seen.update.samples for seen in server.received] == [1] * 4
    for partition, seen in enumerate(server.received):
        found = gi.recover(seen.model, seen.update, SHAPE, LOSS)
        assert found.exact
        assert int(found.targets) == int(LABELS[partition])
        assert psnr(found.inputs, partition) > 80


def test_the_second_round_is_read_with_the_second_rounds_weights() -> None:
    model = convolutional()
    server = federate(model, rounds=2)
    assert [seen.round for seen in server.received] == [1] * 4 + [2] * 4
    late = server.received[4]
    assert not torch.equal(late.model.state_dict()["0.weight"], model.state_dict()["0.weight"])
    assert psnr(gi.recover(late.model, late.update, SHAPE, LOSS).inputs, 0) > 80


def test_the_curious_server_follows_the_protocol_to_the_bit() -> None:
    model = dense()
    honest = FedAvgM(fraction_evaluate=0.0, server_momentum=0.5)
    app = federation.client_app(model, LOSS, one_each)
    plain = federation.simulate(honest, app, model, ONE, clients=4, rounds=2)
    curious = CuriousServer(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5), model)
    same = federation.simulate(curious, app, model, ONE, clients=4, rounds=2)
    for name, array in plain.arrays.items():
        assert np.allclose(array.numpy(), same.arrays[name].numpy(), atol=1e-7), name


def test_the_update_is_the_one_that_observe_makes() -> None:
    model, schedule = dense(), Schedule(0.05, local_epochs=3, momentum=0.9, weight_decay=0.01)
    seen = federate(model, schedule).received[1]
    expected = gi.observe(
        model, LOSS, PHOTOS[1:2], LABELS[1:2],
        local_steps=3, learning_rate=0.05, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    assert seen.update.local_steps == 3
    for name, gradient in expected.gradients.items():
        assert gi.metrics.relative_error(seen.update.gradients[name], gradient) < 1e-4


@pytest.mark.parametrize("epochs", [1, 5])
def test_local_epochs_leave_a_first_dense_layer_exact(epochs: int) -> None:
    server = federate(dense(), Schedule(0.1, local_epochs=epochs))
    assert all(psnr(ratio(seen), i) > 100 for i, seen in enumerate(server.received))


def test_mini_batches_are_counted_as_steps() -> None:
    def five(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return PHOTOS[[0, 1, 2, 3, 0]], LABELS[[0, 1, 2, 3, 0]]

    server = federate(dense(), Schedule(0.1, local_epochs=2, batch_size=2), data=five)
    update = server.received[0].update
    assert (update.local_steps, update.batch_size, update.samples) == (6, 2, 5)


def test_flowers_clipping_hides_nothing() -> None:
    central = DifferentialPrivacyServerSideFixedClipping(fedavg(), 1.0, 0.1, 4)
    server = federate(convolutional(), strategy=central)
    first = server.received[0]
    assert psnr(gi.recover(first.model, first.update, SHAPE, LOSS).inputs, 0) > 80
    client = DifferentialPrivacyClientSideFixedClipping(fedavg(), 1.0, 0.1, 4)
    server = federate(dense(), strategy=client, mods=[fixedclipping_mod])
    norm = sum(float(g.square().sum()) for g in server.received[0].update.gradients.values())
    assert math.sqrt(norm) * 0.1 < 0.1001
    assert all(psnr(ratio(seen), i) > 80 for i, seen in enumerate(server.received))


def test_flowers_local_noise_hides() -> None:
    np.random.seed(0)
    server = federate(dense(), mods=[LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
    assert all(psnr(ratio(seen), i) < 15 for i, seen in enumerate(server.received))


# --- secure aggregation -----------------------------------------------------------------------


def secure(model: nn.Module, schedule: Schedule = ONE, **settings: Any) -> federation.SecureRound:
    np.random.seed(0)
    app = federation.client_app(model, LOSS, one_each, [secaggplus_mod], secure=True)
    return federation.secure_round(app, model, schedule, **{"clients": 4, **settings})


def test_masked_updates_are_noise_and_their_sum_is_a_batch() -> None:
    model = gi.models.mlp([math.prod(SHAPE), 256, 10])
    found = secure(model, schedule=Schedule(1.0), max_weight=1.0, clipping_range=1.0)
    assert len(found.masked) == 4 and not found.failures
    share = found.masked[0]["1.weight"].double() / 2**32
    assert abs(float(share.mean()) - 0.5) < 0.01 and abs(float(share.var()) - 1 / 12) < 0.01
    batch = gi.observe(model, LOSS, PHOTOS, LABELS)
    error = gi.metrics.relative_error(
        found.update.gradients["1.weight"], batch.gradients["1.weight"]
    )
    assert error < 1e-2 and found.update.samples == 4
    apart = gi.recover(model, found.update, SHAPE, LOSS, batch_size=4)
    assert apart.exact and sorted(apart.targets.tolist()) == sorted(LABELS.tolist())
    for partition in range(4):
        assert max(psnr(x, partition) for x in apart.inputs) > 80


def test_secure_aggregation_begins_again_without_a_client_out_of_reach() -> None:
    found = secure(dense(), max_weight=1.0, clipping_range=1.0, unreachable=[3])
    assert [failure.node for failure in found.failures] == [103]
    assert len(found.masked) == 3 and found.update.samples == 3


def test_secure_aggregation_goes_on_without_a_client_that_fails_in_training() -> None:
    def broken(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if context.node_config["partition-id"] == 1:
            raise OSError("disk full")
        return one_each(context)

    model = dense()
    app = federation.client_app(model, LOSS, broken, [secaggplus_mod], secure=True)
    found = federation.secure_round(app, model, ONE, clients=4, max_weight=1.0, clipping_range=1.0)
    three = gi.observe(model, LOSS, PHOTOS[[0, 2, 3]], LABELS[[0, 2, 3]])
    assert [failure.node for failure in found.failures] == [101]
    error = gi.metrics.relative_error(
        found.update.gradients["1.weight"], three.gradients["1.weight"]
    )
    assert error < 1e-2


def test_secure_aggregation_says_why_not() -> None:
    with pytest.raises(InvalidArgumentError, match="three clients or more, not 2"):
        secure(dense(), clients=2)
    with pytest.raises(InvalidTensorError, match=r"no answer from \[101, 102, 103\], and 1 "):
        secure(dense(), unreachable=[1, 2, 3])


# --- the other side ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_leaking_update_never_reaches_the_server(make: Any) -> None:
    model = make()
    audit = LeakAudit(model, LOSS, one_each, seconds=60)
    server = federate(model, mods=[only(2, audit)])
    assert [seen.node for seen in server.received] == [100, 101, 103]
    assert [(f.node, f.reason) for f in server.failures] == [
        (102, "update withheld by the client's own audit")
    ]
    (report,) = audit.reports
    assert (report.client, report.round, report.action) == (2, 1, "withheld")
    assert report.worst.psnr > 80 and report.worst.ssim > 0.99 and report.worst.relative > 1
    assert "gives its input away exactly" in report.architecture
    assert str(report).startswith("client 2, round 1: withheld (")


def test_all_withheld_leaves_the_weights_and_the_federation_alone() -> None:
    model = dense()
    server = CuriousServer(fedavg(), model)
    app = federation.client_app(model, LOSS, one_each, [LeakAudit(model, LOSS, one_each)])
    result = federation.simulate(server, app, model, ONE, clients=4, rounds=2)
    assert not server.received and len(server.failures) == 8
    assert not result.arrays


def test_warn_sends_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = dense()
    with caplog.at_level(logging.WARNING, "gradinv_edu.federation"):
        server = federate(model, mods=[LeakAudit(model, LOSS, one_each, policy="warn")])
    assert len(server.received) == 4 and psnr(ratio(server.received[0]), 0) > 80
    assert "client 0, round 1: sent with a warning (ratio recovers the data)" in caplog.text


def test_noise_is_raised_until_the_limits_hold() -> None:
    model, limits = dense(), Limits(psnr=15, ssim=0.3)
    audit = LeakAudit(
        model, LOSS, one_each, policy="noise", limits=limits, seconds=60,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    server = federate(model, mods=[only(0, audit)])
    assert audit.reports[0].action == "sent with noise" and audit.reports[0].sigma > 0
    assert psnr(ratio(server.received[0]), 0) < 15 < 80 < psnr(ratio(server.received[1]), 1)
    exact = gi.observe(model, LOSS, PHOTOS[:1], LABELS[:1]).gradients["1.weight"]
    noise = server.received[0].update.gradients["1.weight"] - exact
    assert float(noise.std()) == pytest.approx(audit.reports[0].sigma, rel=0.02)


def test_noise_comes_from_a_seed_that_nobody_knows() -> None:
    model = dense()
    audit = LeakAudit(model, LOSS, one_each, policy="noise", seconds=60)
    states = [federate(model, mods=[only(0, audit)]).received[0].update for _ in range(2)]
    assert not torch.equal(states[0].gradients["1.bias"], states[1].gradients["1.bias"])


def test_what_leaves_is_what_is_audited() -> None:
    np.random.seed(0)
    model = dense()
    audit = LeakAudit(model, LOSS, one_each)
    server = federate(model, mods=[audit, LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
    assert len(server.received) == 4
    assert {report.action for report in audit.reports} == {"sent"}


def test_a_batch_is_judged_by_its_worst_sample() -> None:
    def all_of_them(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return PHOTOS, LABELS

    model = gi.models.mlp([math.prod(SHAPE), 256, 10])
    audit = LeakAudit(model, LOSS, all_of_them, seconds=60)
    server = federate(model, mods=[only(0, audit)], data=all_of_them)
    assert audit.reports[0].action == "withheld" and audit.reports[0].worst.psnr > 30
    assert len(server.received) == 3


def test_the_budget_is_kept_and_the_audit_fails_closed() -> None:
    model = dense()
    for policy, action in (("withhold", "withheld"), ("warn", "sent with a warning")):
        audit = LeakAudit(model, LOSS, one_each, policy=policy, seconds=1e-6)
        federate(model, mods=[only(0, audit)])
        assert audit.reports[0].action == action
        assert "out of time" in audit.reports[0].reason


@pytest.mark.parametrize(("matching", "action"), [(False, "sent"), (True, "withheld")])
def test_gradient_matching_finds_what_the_exact_attacks_do_not(matching: bool, action: str) -> None:
    def tiny(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return gi.data.digit(3), torch.tensor([1])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(64, 48, bias=False), nn.GELU(), nn.Linear(48, 10))
        model = nn.Sequential(*layers)
    audit = LeakAudit(model, LOSS, tiny, matching=matching, seconds=60)
    federate(model, mods=[only(0, audit)], data=tiny)
    (report,) = audit.reports
    assert report.action == action
    assert [a.attack for a in report.attempts] == ["ratio", "recursion", "matching"][: 2 + matching]


def test_the_deadline_stops_a_computation_in_the_middle() -> None:
    with pytest.raises(federation._OutOfTime), federation._Deadline(0.05):
        while True:
            torch.func.vjp(torch.sin, torch.ones(3))


def test_an_audit_of_another_architecture_withholds_and_says_why() -> None:
    model = dense()
    audit = LeakAudit(convolutional(), LOSS, one_each)
    server = federate(model, mods=[only(1, audit)])
    assert len(server.received) == 3
    assert "of another architecture" in audit.reports[0].reason


def test_reports_are_written_for_the_client_only(tmp_path: Path) -> None:
    model = dense()
    audit = LeakAudit(model, LOSS, one_each, folder=tmp_path)
    federate(model, mods=[only(3, audit)], rounds=2)
    lines = (tmp_path / "client-3.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["attempts"][0]["attack"] == "ratio"


def test_messages_that_are_not_training_pass() -> None:
    message = SimpleNamespace(metadata=SimpleNamespace(message_type="evaluate"))
    audit = LeakAudit(dense(), LOSS, one_each)
    passed: Any = audit(message, None, lambda *_: "passed")  # type: ignore[arg-type]
    assert passed == "passed" and not audit.reports


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="No policy 'hope'; there are warn, noise, with"):
        LeakAudit(dense(), LOSS, one_each, policy="hope")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="seconds must be positive"):
        LeakAudit(dense(), LOSS, one_each, seconds=0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        Schedule(learning_rate=0)


def test_relative_leakage_compares_with_a_prior() -> None:
    x, grey = PHOTOS[0], torch.full(SHAPE, 0.5)
    s = gi.metrics.ssim(x, grey)
    assert federation.relative_leakage(x, grey, grey) == 0
    assert federation.relative_leakage(x, x, grey) == pytest.approx((1 - s) / s)
    assert federation.relative_leakage(x, PHOTOS[1], x) < 0


# --- what goes wrong --------------------------------------------------------------------------


def test_a_client_out_of_reach_is_named_and_the_round_goes_on() -> None:
    server = federate(dense(), unreachable=[1], rounds=2)
    assert len(server.received) == 6
    assert server.failures[0] == federation.Failure(1, 101, "Client 101 is out of reach.")


def test_a_client_that_raises_is_named_and_the_round_goes_on() -> None:
    def broken(context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if context.node_config["partition-id"] == 2:
            raise OSError("disk full")
        return one_each(context)

    server = federate(dense(), data=broken)
    assert len(server.received) == 3
    assert server.failures[0].reason == "OSError: disk full"


def tampered(change: Any) -> Any:
    def mod(message: Any, context: Any, call_next: Any) -> Any:
        reply = call_next(message, context)
        change(reply.content)
        return reply

    return only(1, mod)


def other_shape(content: Any) -> None:
    content["arrays"]["1.weight"] = Array(np.zeros((2, 2), np.float32))


def other_names(content: Any) -> None:
    content["arrays"] = ArrayRecord({"w": Array(np.zeros(2, np.float32))})


def not_finite(content: Any) -> None:
    content["arrays"]["1.bias"] = Array(np.full(64, np.nan, np.float32))


def no_count(content: Any) -> None:
    content["metrics"] = MetricRecord({"loss": 1.0})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_shape, r"another architecture: 1.weight has shape \(2, 2\), \(64, 768\) was sent"),
        (other_names, "another architecture: .*1.weight.* not in both"),
        (not_finite, "gradient of 1.bias has 64 NaN"),
        (no_count, "'num-examples', are needed"),
    ],
)
def test_an_update_that_does_not_belong_is_refused_by_name(change: Any, reason: str) -> None:
    server = federate(dense(), mods=[tampered(change)])
    assert [seen.node for seen in server.received] == [100, 102, 103]
    assert server.failures[0].node == 101 and re.search(reason, server.failures[0].reason)


def test_a_strategy_that_would_wait_for_ever_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="waits for 9 clients and there are 4"):
        federate(dense(), strategy=fedavg(min_available_nodes=9))


def test_a_message_without_a_learning_rate_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no 'learning-rate'.*'server-round'"):
        Schedule.read({"server-round": 1})
    assert Schedule.read({**Schedule(0.3, 2, 4).config(), "x": 1}) == Schedule(0.3, 2, 4)
    assert Schedule.read(Schedule(0.3).config()).batch_size is None


def test_a_round_without_any_client_is_no_end() -> None:
    server = federate(dense(), unreachable=[0, 1, 2, 3])
    assert not server.received and len(server.failures) == 4


# --- manners ----------------------------------------------------------------------------------


def test_nothing_of_the_callers_is_changed() -> None:
    model, before = dense(), dict(os.environ)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    levels = [logging.getLogger(name).level for name in ("flwr", "ray")]
    federate(model)
    assert dict(os.environ) == before
    assert levels == [logging.getLogger(name).level for name in ("flwr", "ray")]
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_telemetry_is_off_while_a_federation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore import telemetry

    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    with federation.quiet():
        assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
        assert {name: os.environ[name] for name in federation.SILENCE} == federation.SILENCE
    assert telemetry.FLWR_TELEMETRY_ENABLED == "1"


def test_without_flower_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradinv_edu\[federation\]'"):
        federation.client_app(dense(), LOSS, one_each)


def test_importing_the_package_does_not_import_flower() -> None:
    code = "import sys, gradinv_edu.federation; assert not {'flwr', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the real thing ---------------------------------------------------------------------------


def test_flowers_simulation_on_ray(tmp_path: Path) -> None:
    """Two clients in a process of their own; one of them looks first."""
    model, before = convolutional(), set(Path("/tmp").glob("gi-*"))
    audit = LeakAudit(model, LOSS, one_each, folder=tmp_path, seconds=120)
    environment = dict(os.environ)
    try:
        server = federate(model, mods=[only(1, audit)], clients=2, processes=1)
    except federation.RayStartError as error:
        pytest.skip(str(error))
    (seen,) = server.received
    assert psnr(gi.recover(seen.model, seen.update, SHAPE, LOSS).inputs, 0) > 80
    assert [f.reason for f in server.failures] == ["update withheld by the client's own audit"]
    (report,) = [json.loads(line) for line in (tmp_path / "client-1.jsonl").open()]
    assert report["action"] == "withheld" and report["attempts"][-1]["psnr"] > 80
    assert dict(os.environ) == environment
    assert set(Path("/tmp").glob("gi-*")) <= before


def test_a_machine_too_busy_for_ray_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(federation.RayStartError, match=r"in 3 attempts .*processes=0"):
        federate(dense(), processes=1)


def test_ray_reaches_every_client() -> None:
    with pytest.raises(InvalidArgumentError, match="unreachable needs processes=0"):
        federate(dense(), processes=1, unreachable=[0])

"""Unmodified Flower: what an honest but curious server reads, and a client that looks first."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
)
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import federation
from gradinv_edu.engine.attackers import OWN, Attacker
from gradinv_edu.engine.client import attack
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    MissingExtraError,
    RayStartError,
    UnknownNameError,
)
from gradinv_edu.federation import CuriousServer, LeakAudit, Limits, Schedule

SIZE, SHAPE = 16, (3, 16, 16)
NAMES = ("astronaut", "cat", "coffee", "rocket")
PHOTOS = torch.cat([gi.data.photo(name, size=SIZE) for name in NAMES])
LABELS = torch.tensor([3, 5, 8, 1])
LOSS = nn.CrossEntropyLoss()
ONE = Schedule(learning_rate=0.1)
WITHHELD = "update withheld by the client's own audit"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flwr")
    np.random.seed(0)  # Flower draws its noise from numpy


def one_each(context: Any) -> tuple[Tensor, Tensor]:
    i = int(context.node_config["partition-id"])
    return PHOTOS[i : i + 1], LABELS[i : i + 1]


def all_four(context: Any) -> tuple[Tensor, Tensor]:
    return PHOTOS, LABELS


def dense(width: int = 64) -> nn.Sequential:
    return gi.models.mlp([math.prod(SHAPE), width, 10])


def convolutional() -> nn.Sequential:
    return gi.models.wide_cnn(SHAPE, bias=True)


def fedavg(**settings: Any) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, **settings)


def federate(
    model: nn.Module, schedule: Schedule = ONE, strategy: Any = None, mods: Any = (),
    data: Any = one_each, **settings: Any,
) -> CuriousServer:  # fmt: skip
    server = CuriousServer(strategy or fedavg(), model)
    app = federation.client_app(model, LOSS, data, mods)
    federation.simulate(server, app, model, schedule, **{"clients": 4, **settings})
    return server


def only(partition: int, mod: Any) -> Any:
    def chosen(message: Any, context: Any, call_next: Any) -> Any:
        mine = context.node_config["partition-id"] == partition
        return mod(message, context, call_next) if mine else call_next(message, context)

    return chosen


def psnr(recovered: Tensor, partition: int) -> float:
    return gi.metrics.psnr(recovered.reshape(SHAPE).double().clamp(0, 1), PHOTOS[partition])


def by_recursion(seen: federation.Received) -> Tensor:
    return gi.recover(seen.model, seen.update, SHAPE, LOSS).inputs


def by_ratio(seen: federation.Received) -> Tensor:
    return federation.first_layer_ratio(seen.model, seen.update, SHAPE)


# --- the server -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_federation_of_two_clients_leaks_at_the_server(make: Any) -> None:
    server = federate(make(), clients=2)
    assert [seen.update.samples for seen in server.received] == [1, 1]
    for partition, seen in enumerate(server.received):
        found = gi.recover(seen.model, seen.update, SHAPE, LOSS)
        assert found.exact and psnr(found.inputs, partition) > 80
        assert int(found.targets) == int(LABELS[partition])


def test_the_second_round_is_read_with_the_second_rounds_weights() -> None:
    model = convolutional()
    server = federate(model, rounds=2)
    assert [seen.round for seen in server.received] == [1] * 4 + [2] * 4
    late = server.received[4]
    assert not torch.equal(late.model.state_dict()["0.weight"], model.state_dict()["0.weight"])
    assert psnr(by_recursion(late), 0) > 80


def test_the_curious_server_follows_the_protocol_and_the_guard_lets_evaluation_pass() -> None:
    model, results = dense(), []
    audit = LeakAudit(model, LOSS, one_each, policy="warn")
    for wrap, mods in ((lambda inside, _: inside, []), (CuriousServer, [audit])):
        strategy = FedAvgM(fraction_evaluate=1.0, server_momentum=0.5)  # no client can evaluate
        app = federation.client_app(model, LOSS, one_each, mods)
        server = wrap(strategy, model)
        results.append(federation.simulate(server, app, model, ONE, clients=4, rounds=2))
    for name, array in results[0].arrays.items():
        assert np.allclose(array.numpy(), results[1].arrays[name].numpy(), atol=1e-7), name
    assert len(audit.reports) == 8


def test_the_update_is_the_one_that_observe_makes() -> None:
    model, schedule = dense(), Schedule(0.05, 3, 3, momentum=0.9, weight_decay=0.01)
    update = federate(model, schedule, data=all_four, clients=2).received[1].update
    assert (update.local_steps, update.batch_size, update.samples) == (6, 3, 4)
    update = federate(model, Schedule(0.05, 3, momentum=0.9, weight_decay=0.01)).received[1].update
    expected = gi.observe(
        model, LOSS, PHOTOS[1:2], LABELS[1:2],
        local_steps=3, learning_rate=0.05, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    assert update.local_steps == 3
    for name, gradient in expected.gradients.items():
        assert gi.metrics.relative_error(update.gradients[name], gradient) < 1e-4


CENTRAL = DifferentialPrivacyServerSideFixedClipping
BY_CLIENTS = DifferentialPrivacyClientSideFixedClipping
LOCAL = LocalDpMod(1.0, 1.0, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "read", "low", "high"),
    [
        (dense, {"schedule": Schedule(0.1, local_epochs=5)}, by_ratio, 100, math.inf),
        (convolutional, {"strategy": (CENTRAL, 0.1)}, by_recursion, 80, math.inf),
        (dense, {"strategy": (BY_CLIENTS, 0.1), "mods": [fixedclipping_mod]}, by_ratio, 80, 1e9),
        (dense, {"mods": [LOCAL]}, by_ratio, -math.inf, 15),
    ],
    ids=["local epochs", "central noise", "clipping by clients", "local noise"],
)
def test_what_the_framework_hides(
    make: Any, settings: dict[str, Any], read: Any, low: float, high: float
) -> None:
    if "strategy" in settings:
        wrapper, norm = settings["strategy"]
        settings = {**settings, "strategy": wrapper(fedavg(), 1.0, norm, 4)}
    for partition, seen in enumerate(federate(make(), **settings).received):
        assert low < psnr(read(seen), partition) < high


# --- secure aggregation -----------------------------------------------------------------------


def secure(
    model: nn.Module, schedule: Schedule = ONE, data: Any = one_each, **settings: Any
) -> Any:
    app = federation.client_app(model, LOSS, data, [secaggplus_mod])
    fine = {"clients": 4, "max_weight": 1.0, "clipping_range": 1.0}
    return federation.secure_round(app, model, schedule, **{**fine, **settings})


def test_masked_updates_are_noise_and_their_sum_is_a_batch() -> None:
    model = dense(256)
    found = secure(model, Schedule(1.0))
    assert len(found.masked) == 4 and not found.failures and found.update.samples == 4
    share = found.masked[0]["1.weight"].double() / 2**32
    assert abs(float(share.mean()) - 0.5) < 0.01 and abs(float(share.var()) - 1 / 12) < 0.01
    batch = gi.observe(model, LOSS, PHOTOS, LABELS).gradients["1.weight"]
    assert gi.metrics.relative_error(found.update.gradients["1.weight"], batch) < 1e-2
    apart = gi.recover(model, found.update, SHAPE, LOSS, batch_size=4)
    assert apart.exact and sorted(apart.targets.tolist()) == sorted(LABELS.tolist())
    assert all(max(psnr(x, i) for x in apart.inputs) > 80 for i in range(4))


def test_secure_aggregation_goes_on_without_a_client_that_is_lost() -> None:
    def broken(context: Any) -> tuple[Tensor, Tensor]:
        if context.node_config["partition-id"] == 1:
            raise OSError("disk full")
        return one_each(context)

    model = dense()
    for settings, lost in (({"unreachable": [3]}, 3), ({"data": broken}, 1)):
        found, left = secure(model, **settings), [i for i in range(4) if i != lost]
        assert [failure.node for failure in found.failures] == [100 + lost]
        assert len(found.masked) == 3 and found.update.samples == 3
        three = gi.observe(model, LOSS, PHOTOS[left], LABELS[left]).gradients["1.weight"]
        assert gi.metrics.relative_error(found.update.gradients["1.weight"], three) < 1e-2


# --- the other side ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_leaking_update_never_reaches_the_server(make: Any, tmp_path: Path) -> None:
    model = make()
    audit = LeakAudit(model, LOSS, one_each, seconds=600, folder=tmp_path)
    server = federate(model, mods=[only(2, audit)])
    assert [seen.node for seen in server.received] == [100, 101, 103]
    assert server.failures == [federation.Failure(1, 102, WITHHELD)]
    (report,) = audit.reports
    assert (report.client, report.round, report.action) == (2, 1, "withheld")
    assert report.worst.psnr > 80 and report.worst.ssim > 0.99 and report.worst.relative > 1
    assert "gives its input away exactly" in report.architecture
    assert str(report).startswith("client 2, round 1: withheld (")
    (line,) = (tmp_path / "client-2.jsonl").read_text().splitlines()
    assert json.loads(line)["attempts"][0]["attack"] == "ratio"


def test_all_withheld_leaves_the_weights_and_the_federation_alone() -> None:
    model = dense()
    server = CuriousServer(fedavg(), model)
    app = federation.client_app(model, LOSS, one_each, [LeakAudit(model, LOSS, one_each)])
    result = federation.simulate(server, app, model, ONE, clients=4, rounds=2)
    assert not server.received and len(server.failures) == 8 and not result.arrays


def test_warn_sends_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = dense()
    with caplog.at_level(logging.WARNING, "gradinv_edu.federation"):
        server = federate(model, mods=[LeakAudit(model, LOSS, one_each, policy="warn")])
    assert len(server.received) == 4 and psnr(by_ratio(server.received[0]), 0) > 80
    assert "client 0, round 1: sent with a warning (ratio recovers the data)" in caplog.text


def test_noise_is_raised_until_the_limits_hold_from_a_seed_that_nobody_knows() -> None:
    model, seen = dense(), []
    for _ in range(2):
        audit = LeakAudit(
            model, LOSS, one_each, policy="noise", limits=Limits(15, 0.3), seconds=600
        )
        server = federate(model, mods=[only(0, audit)])
        assert audit.reports[0].action == "sent with noise"
        seen.append(server.received[0].update.gradients["1.weight"])
    assert psnr(by_ratio(server.received[0]), 0) < 15 < 80 < psnr(by_ratio(server.received[1]), 1)
    exact = gi.observe(model, LOSS, PHOTOS[:1], LABELS[:1]).gradients["1.weight"]
    assert float((seen[1] - exact).std()) == pytest.approx(audit.reports[0].sigma, rel=0.02)
    assert not torch.equal(seen[0], seen[1])


def test_what_leaves_is_what_is_audited() -> None:
    model = dense()
    audit = LeakAudit(model, LOSS, one_each, seconds=600)
    assert len(federate(model, mods=[audit, LOCAL]).received) == 4
    assert {report.action for report in audit.reports} == {"sent"}


def test_a_batch_is_judged_by_the_sample_that_leaks_most() -> None:
    model, settings = dense(24), {"attackers": ["ratio"], "policy": "warn"}
    audit = LeakAudit(model, LOSS, all_four, seconds=600, **settings)  # type: ignore[arg-type]
    server = federate(model, mods=[only(0, audit)], data=all_four, clients=2)
    rows = by_ratio(server.received[0])
    best = [max(psnr(row, i) for row in rows) for i in range(4)]
    assert max(best) > min(best) + 3
    assert audit.reports[0].worst.psnr == pytest.approx(max(best), abs=0.01)


def test_the_recursion_is_asked_for_as_many_samples_as_one_step_saw() -> None:
    model = dense()
    for many, settings in ((2, {}), (1, {"local_steps": 2, "learning_rate": 0.01})):
        sent = gi.observe(model, LOSS, PHOTOS[:many], LABELS[:many], **settings)
        found = attack("recursion", model, sent, SHAPE, LOSS, math.inf)
        assert isinstance(found, Tensor) and len(found) == many


def test_gradient_matching_finds_what_the_exact_attacks_do_not() -> None:
    def tiny(context: Any) -> tuple[Tensor, Tensor]:
        return gi.data.digit(3), torch.tensor([1])

    layers = (nn.Flatten(), nn.Linear(64, 48, bias=False), nn.Tanhshrink(), nn.Linear(48, 10))
    model = nn.Sequential(*layers)
    for attackers, action in ((("ratio", "recursion"), "sent"), (("matching",), "withheld")):
        audit = LeakAudit(model, LOSS, tiny, attackers=attackers, seconds=600)
        federate(model, mods=[only(0, audit)], data=tiny, clients=2)
        assert audit.reports[0].action == action
        assert tuple(a.attack for a in audit.reports[0].attempts) == attackers


@pytest.mark.parametrize(
    ("policy", "seconds", "make", "action", "reason"),
    [
        ("withhold", 1e-6, dense, "withheld", "out of time"),
        ("noise", 1e-6, dense, "withheld", "out of time"),
        ("warn", 1e-6, dense, "sent with a warning", "out of time"),
        ("withhold", 60, convolutional, "withheld", "of another architecture"),
    ],
)
def test_the_audit_fails_closed(
    policy: str, seconds: float, make: Any, action: str, reason: str
) -> None:
    audit = LeakAudit(make(), LOSS, one_each, policy=policy, seconds=seconds)
    server = federate(dense(), mods=[only(0, audit)], clients=2)
    assert audit.reports[0].action == action and reason in audit.reports[0].reason
    assert len(server.received) == 2 - (action == "withheld")


@pytest.mark.parametrize("leaky", [True, False])
def test_an_attack_that_the_budget_ends_keeps_the_update_back(
    monkeypatch: pytest.MonkeyPatch, leaky: bool
) -> None:
    def endless(*_: Any) -> Any:
        while True:
            torch.func.vjp(torch.sin, torch.ones(3))

    hiding = nn.Sequential(nn.Conv2d(3, 1, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 10))
    model, attackers = (dense(), ["endless"]) if leaky else (hiding, ["ratio", "endless"])
    monkeypatch.setitem(OWN, "endless", Attacker("endless", endless, False, False))
    monkeypatch.setattr(LeakAudit, "_architecture", lambda *_: "known")  # takes none of the budget
    audit = LeakAudit(model, LOSS, one_each, attackers=attackers, seconds=2)
    server = federate(model, mods=[only(0, audit)], clients=2)
    assert audit.reports[0].action == "withheld" and "endless" in audit.reports[0].reason
    assert len(server.received) == 1


def test_on_crafted_weights_a_client_does_not_train() -> None:
    model = dense()
    assert federation.similar_rows(model.state_dict()) == 0
    with torch.no_grad():
        first = next(p for p in model.parameters() if p.dim() > 1)
        first[:] = first[0] * torch.linspace(1, 2, len(first))[:, None]
    assert federation.similar_rows(model.state_dict()) == 1
    trained = []

    def counted(message: Any, context: Any, call_next: Any) -> Any:
        trained.append(context.node_config["partition-id"])
        return call_next(message, context)

    audit = LeakAudit(model, LOSS, one_each)
    server = federate(model, mods=[only(0, audit), counted], clients=2)
    assert audit.reports[0].action == "withheld" and "crafted" in audit.reports[0].reason
    assert trained == [1] and len(server.received) == 1


def test_relative_leakage_compares_with_a_prior() -> None:
    x, grey = PHOTOS[0], torch.full(SHAPE, 0.5)
    s = gi.metrics.ssim(x, grey)
    assert federation.relative_leakage(x, grey, grey) == 0
    assert federation.relative_leakage(x, x, grey) == pytest.approx((1 - s) / s)
    assert federation.relative_leakage(x, PHOTOS[1], x) < 0


# --- what goes wrong --------------------------------------------------------------------------


def other_shape(content: Any) -> None:
    content["arrays"]["1.weight"] = Array(np.zeros((2, 2), np.float32))


def other_names(content: Any) -> None:
    content["arrays"] = ArrayRecord({"w": Array(np.zeros(2, np.float32))})


def not_finite(content: Any) -> None:
    content["arrays"]["1.bias"] = Array(np.full(64, np.nan, np.float32))


def no_count(content: Any) -> None:
    content["metrics"] = MetricRecord({"loss": 1.0})


def disk_full(content: Any) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_shape, r"another architecture: 1.weight has shape \(2, 2\), \(64, 768\) was sent"),
        (other_names, "another architecture: .*1.weight.* not in both"),
        (not_finite, "gradient of 1.bias has 64 NaN"),
        (no_count, "'num-examples', are needed"),
        (disk_full, "^OSError: disk full$"),
        (None, r"^Client 101 is out of reach\.$"),
    ],
)
def test_a_client_without_a_usable_update_is_named_and_the_round_goes_on(
    change: Callable[[Any], None] | None, reason: str
) -> None:
    def tampered(message: Any, context: Any, call_next: Any) -> Any:
        reply = call_next(message, context)
        if change is not None:
            change(reply.content)
        return reply

    lost = [1] if change is None else []
    server = federate(dense(), mods=[only(1, tampered)], unreachable=lost)
    assert [seen.node for seen in server.received] == [100, 102, 103]
    (failure,) = server.failures
    assert (failure.round, failure.node) == (1, 101) and re.search(reason, failure.reason)


def test_a_round_without_any_client_is_no_end() -> None:
    server = federate(dense(), unreachable=range(4))
    assert not server.received and len(server.failures) == 4


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: LeakAudit(dense(), LOSS, one_each, policy="hope"), UnknownNameError,
     "No policy 'hope'; there are warn, noise, withhold"),
    (lambda: LeakAudit(dense(), LOSS, one_each, attackers=["luck"]), UnknownNameError,
     "No attacker 'luck'; there are ratio, "),
    (lambda: LeakAudit(dense(), LOSS, one_each, seconds=0), InvalidArgumentError,
     "seconds must be positive"),
    (lambda: Schedule(learning_rate=0), ValueError, "learning_rate must be positive"),
    (lambda: Schedule(local_epochs=0), ValueError, "local_steps must be a whole number"),
    (lambda: Schedule.read({"server-round": 1}), InvalidArgumentError,
     "no 'learning-rate'.*'server-round'"),
    (lambda: federate(dense(), strategy=fedavg(min_available_nodes=9)), InvalidArgumentError,
     "waits for 9 clients and there are 4"),
    (lambda: federate(dense(), processes=1, unreachable=[0]), InvalidArgumentError,
     "unreachable needs processes=0"),
    (lambda: secure(dense(), clients=2), InvalidArgumentError, "three clients or more, not 2"),
    (lambda: secure(dense(), unreachable=[1, 2, 3]), InvalidTensorError,
     r"no answer from \[101, 102, 103\], and 1 "),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_schedule_survives_its_message() -> None:
    for schedule in (Schedule(0.3, 2, 4), Schedule(0.3)):
        assert Schedule.read({**schedule.config(), "x": 1}) == schedule


# --- manners ----------------------------------------------------------------------------------


def test_nothing_of_the_callers_is_changed() -> None:
    model, environment = dense(), dict(os.environ)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    levels = [logging.getLogger(name).level for name in ("flwr", "ray")]
    federate(model)
    assert dict(os.environ) == environment
    assert levels == [logging.getLogger(name).level for name in ("flwr", "ray")]
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    guard = logging.getLogger("gradinv_edu.federation")
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    with federation.quiet():
        assert not guard.isEnabledFor(logging.WARNING)
        assert os.environ["FLWR_TELEMETRY_ENABLED"] == os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert guard.isEnabledFor(logging.WARNING)


def test_without_flower_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradinv_edu.federation")
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradinv_edu\[federation\]'"):
        importlib.import_module("gradinv_edu.federation")


# --- Ray --------------------------------------------------------------------------------------

ON_RAY = """
import os, sys
sys.path.insert(0, sys.argv[2])
import test_federation as t
from gradinv_edu.errors import RayStartError

model, environment = t.convolutional(), dict(os.environ)
audit = t.LeakAudit(model, t.LOSS, t.one_each, folder=sys.argv[1], seconds=120)
try:
    server = t.federate(model, mods=[t.only(1, audit)], clients=2, processes=1)
except RayStartError as error:
    sys.exit(f"SKIP {error}")
(seen,) = server.received
assert t.psnr(t.by_recursion(seen), 0) > 80
assert [failure.reason for failure in server.failures] == [t.WITHHELD]
assert dict(os.environ) == environment
"""


def test_flowers_simulation_on_ray(tmp_path: Path) -> None:
    """Two clients in a process of their own, one of which looks first."""
    before = set(Path("/tmp").glob("gi-*"))
    command = [sys.executable, "-c", ON_RAY, str(tmp_path), str(Path(__file__).parent)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("Ray did not come to an end in 240 seconds: the machine is too busy.")
    if "SKIP" in ran.stderr:
        pytest.skip(ran.stderr[ran.stderr.index("SKIP") + 5 :])
    assert ran.returncode == 0, ran.stderr
    (report,) = [json.loads(line) for line in (tmp_path / "client-1.jsonl").open()]
    assert report["action"] == "withheld" and report["attempts"][-1]["psnr"] > 80
    assert set(Path("/tmp").glob("gi-*")) <= before


def test_a_machine_too_busy_for_ray_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RayStartError, match=r"The current node timed out.*processes=0"):
        federate(dense(), processes=1)

"""Norms of their own statistics: two more unknowns a group, a factor that no gradient tells."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import gradinv_edu as gi
from benchmarks.random_nets import LOSS, Shape, Verdicts, drawn, normed_net, verdicts
from gradinv_edu import errors
from gradinv_edu.engine import blind, edge_norms
from gradinv_edu.engine.gauss_newton import Linearised
from gradinv_edu.engine.graph import trace
from gradinv_edu.engine.hidden import Hidden, _searched, constants, shifts
from gradinv_edu.engine.hidden import fitted as factors
from gradinv_edu.engine.layers import Undone, rule_of
from gradinv_edu.engine.layers.norms import Norm
from gradinv_edu.engine.layers.reshaping import Permute
from gradinv_edu.engine.norm_system import NormSystem
from gradinv_edu.engine.normalised import solve

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(4, c),
    "layer": lambda c: nn.GroupNorm(1, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
}
SIDE = 10
SHAPE = (3, SIDE, SIDE)
BENDS = {"leaky": lambda: nn.LeakyReLU(0.2), "relu": nn.ReLU}


def chain(norm: str, bend: str, bias: bool = False, seed: int = 0) -> nn.Module:
    """Two convolutions on 3×10×10 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for low, high in ((3, 16), (16, 24)):
            conv = nn.Conv2d(low, high, 5, stride=2, padding=2, bias=bias)
            layers += [conv, NORMS[norm](high), BENDS[bend]()]
        return drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 10)), seed)


def photo(size: int = SIDE) -> Tensor:
    return gi.data.photo("cat", size, dtype=torch.float64)


def fitted(found: Tensor, x: Tensor) -> float:
    """Relative error after the best factor for each sample."""
    a, b = found.flatten(1), x.flatten(1)
    best = a * ((a * b).sum(1) / (a * a).sum(1))[:, None]
    return gi.metrics.relative_error(best, b)


# --- the rule -----------------------------------------------------------------------------------

RULES: list[tuple[nn.Module, Shape]] = [
    (nn.BatchNorm2d(4), (4, 3, 2)),
    (nn.BatchNorm1d(4, track_running_stats=False).eval(), (4,)),
    (nn.GroupNorm(2, 4), (4, 3, 2)),
    (nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
    (nn.LayerNorm((4, 3, 2)), (4, 3, 2)),
    (nn.LayerNorm(2), (4, 3, 2)),
    *([(nn.RMSNorm(4), (4,))] if hasattr(nn, "RMSNorm") else []),
]


@pytest.mark.parametrize(("module", "shape"), RULES, ids=[repr(m) for m, _ in RULES])
def test_groups_and_coefficients_are_those_of_the_layer(module: nn.Module, shape: Shape) -> None:
    rule = rule_of(drawn(module) if module.training else module.double())
    assert isinstance(rule, Norm) and rule.normalises and rule.refusal is None
    x = torch.rand(3, *shape, dtype=torch.float64) + 0.5
    groups, (gain, shift) = rule.groups(x.shape), rule.coefficients(x)
    count = groups.sum(torch.ones_like(x))
    mean = groups.sum(x) / count if rule.centred else torch.zeros_like(count)
    centre = x - groups.spread(mean)
    sigma = (groups.sum(centre.square()) / count + rule.eps).sqrt()
    y = module(x)
    torch.testing.assert_close(gain * centre / groups.spread(sigma) + shift, y)
    bias = getattr(module, "bias", None)
    if bias is not None:
        k = torch.rand_like(y)
        (g,) = torch.autograd.grad(y, bias, k)
        torch.testing.assert_close(rule.parameter_sum(k), g.reshape(-1))


# --- the rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_truth_fulfils_every_row_and_only_patterns_stay_open(norm: str, masked: bool) -> None:
    """Rank by singular values: full, but for the constants that a stride hides."""
    conv, x = nn.Conv2d(2, 8, 3, stride=2, padding=1).double(), torch.rand(1, 2, 8, 8).double()
    rule = rule_of(drawn(NORMS[norm](8)))
    assert isinstance(rule, Norm)
    z = conv(x)
    y = rule.forward(z)
    mask = (y > 0).double() if masked else torch.ones_like(y)
    k, gw = mask * torch.rand_like(y), None
    (gw,) = torch.autograd.grad(y, conv.weight, k)
    y = (y * mask).detach()
    system = NormSystem(conv, rule, y, k, (2, 8, 8), gw, mask)
    hides = constants(conv, system.groups, system.like)
    assert (hides is None) == (norm not in ("batch", "instance"))
    if hides is not None:  # the stride's even pixels meet the kernel's middle alone
        assert int((hides >= 0).sum()) == 32 and bool((hides[0, :, ::2, ::2] >= 0).all())
        means = [x[hides == i].mean() for i in range(2)]
        x = x - torch.where(hides >= 0, torch.stack(means)[hides.clamp_min(0)], 0.0)
    v = system.at(x)
    system.balance(v, None)
    u = system.scaled(system.normed(v))
    assert float(system.rest(u).flat().norm()) < 1e-12 * system.size(v)
    at = Linearised(system.rows, u)
    A = torch.stack([at.forward(e).flat() for e in torch.eye(len(u)).double()], 1)
    values = torch.linalg.svdvals(A)
    assert float(values[-1]) > 1e-9 * float(values[0])
    size = A.norm(dim=1)
    own = 0 if hides is None else 2
    assert system.equations + own == int((size > 1e-9 * size.max()).sum())
    if hides is not None:  # without their own rows the constants are open
        fewer = torch.linalg.svdvals(torch.cat([A[: -gw.numel() - 2], A[-gw.numel() :]]))
        assert int((fewer < 1e-10 * fewer[0]).sum()) == 2


@pytest.mark.parametrize("seed", [0, 47])
def test_an_answer_in_doubt_blames_no_gradient(seed: int) -> None:
    """Cases of the campaign "norms": a layer lacks equations, or float32 leaves its answer open.

    What lay outside an activation's range was told to be explained by no input.
    """
    model, shape = normed_net(seed)
    model = model.float() if seed % 2 else model
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(next(model.parameters()))
    update = gi.observe(model, LOSS, x, torch.tensor([1]), buffers=bool(seed % 2))
    try:
        assert not gi.recover(model, update, shape, LOSS).exact
    except errors.UndeterminedScaleError as error:
        assert "4 leaves what is below it up to a factor" in str(error)


@pytest.mark.parametrize("norm", NORMS)
def test_the_truth_fulfils_the_rows_over_a_transposed_convolution(norm: str) -> None:
    """Whose weight begins with its inputs: case 18 of the campaign "norms"."""
    conv = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, groups=2).double()
    x, rule = torch.rand(1, 4, 4, 4).double(), rule_of(drawn(NORMS[norm](8)))
    assert isinstance(rule, Norm)
    y = rule.forward(conv(x))
    k = torch.rand_like(y)
    (gw,) = torch.autograd.grad(y, conv.weight, k)
    system = NormSystem(conv, rule, y.detach(), k, (4, 4, 4), gw)
    v = system.at(x)
    system.balance(v, None)
    rest = system.rest(system.scaled(system.normed(v))).flat()
    assert float(rest.norm()) < 1e-12 * system.size(v)


def test_the_truth_fulfils_the_rows_where_the_filters_axis_was_moved() -> None:
    layer = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), Permute(0, 2, 3, 1)).double()
    rule, x = rule_of(drawn(nn.LayerNorm(8))), torch.rand(1, 2, 5, 5).double()
    assert isinstance(rule, Norm)
    y = rule.forward(layer(x))
    k = torch.rand_like(y)
    (gw,) = torch.autograd.grad(y, layer[0].weight, k)
    system = NormSystem(layer, rule, y.detach(), k, (2, 5, 5), gw)
    v = system.at(x)
    system.balance(v, None)
    u = system.scaled(system.normed(v))
    assert float(system.rest(u).flat().norm()) < 1e-12 * system.size(v)


# --- recovery -----------------------------------------------------------------------------------


PAIRS = [*((norm, "leaky") for norm in NORMS), ("batch", "relu"), ("group", "relu")]


@pytest.mark.parametrize(("norm", "bend"), PAIRS)
def test_a_photograph_up_to_its_brightness(norm: str, bend: str) -> None:
    model, x = chain(norm, bend), photo()
    update = gi.observe(model, LOSS, x, torch.tensor([3]))
    found = gi.recover(model, update, SHAPE, LOSS)
    assert fitted(found.inputs, x) < 1e-11
    assert found.candidates[0].determined and not found.exact
    assert "brightness" in found.hidden[0] and "hidden: brightness" in str(found)
    assert float(found.scaled().max()) == 1.0
    assert gi.metrics.relative_error(found.inputs, x) < 1e-7  # ε tells the factor, in float64
    audit = gi.audit(model, SHAPE, inputs=x)
    assert not audit.exact and not audit.stops and audit.layers[0].hidden == found.hidden[0]
    assert "up to brightness" in audit.reason


def test_doubling_the_picture_changes_the_gradient_by_eps_alone() -> None:
    model, x = chain("group", "leaky"), photo()
    one, two = (gi.observe(model, LOSS, t * x, torch.tensor([3])).gradients for t in (1, 2))
    change = max(gi.metrics.relative_error(two[n], one[n]) for n in one)
    assert 1e-6 < change < 1e-1


def test_polish_reads_the_factor_from_eps() -> None:
    model, x = chain("group", "leaky"), photo()
    update = gi.observe(model, LOSS, x, torch.tensor([3]))
    found = gi.recover(model, update, SHAPE, LOSS, polish=True)
    assert found.exact and not found.hidden
    assert gi.metrics.relative_error(found.inputs, x) < 1e-8


def test_a_bias_with_several_channels_a_group_fixes_the_factor() -> None:
    x = photo()
    for norm, fixed in (("group", True), ("batch", False)):
        model = chain(norm, "leaky", bias=True)
        update = gi.observe(model, LOSS, x, torch.tensor([3]))
        found = gi.recover(model, update, SHAPE, LOSS)
        assert found.exact == (not found.hidden) == fixed
        assert gi.audit(model, SHAPE, inputs=x).exact == fixed
        assert gi.metrics.relative_error(found.inputs, x) < (1e-11 if fixed else 1e-6)


def test_statistics_weigh_by_how_much_rounding_magnifies_them() -> None:
    """``σ² = (sent − 0.9)/0.1``: its rounding counts ten times, and more for a large one."""
    rule = rule_of(nn.BatchNorm2d(2, eps=0.0).double())
    sent = torch.zeros(2).double(), torch.tensor([1.0, 1.8]).double()
    mean, deviation, weight = rule.statistics(sent, 10)  # type: ignore[attr-defined]
    assert mean.tolist() == [0, 0] and (deviation**2).tolist() == pytest.approx([0.9, 8.1])
    assert weight.tolist() == pytest.approx([0.09, 0.45])


def test_running_statistics_make_it_exact() -> None:
    model, x = chain("batch", "relu"), photo()
    update = gi.observe(model, LOSS, x, torch.tensor([3]), buffers=True)
    found = gi.recover(model, update, SHAPE, LOSS)
    assert found.exact and not found.hidden
    assert gi.metrics.relative_error(found.inputs, x) < 1e-11


def test_float32_gives_the_direction() -> None:
    model, x = chain("batch", "leaky").float(), photo().float()
    update = gi.observe(model, LOSS, x, torch.tensor([3]))
    found = gi.recover(model, update, SHAPE, LOSS)
    assert found.hidden and fitted(found.inputs, x.double()) < 1e-5


def test_constants_that_a_stride_hides_are_found_inside_and_named_at_the_input() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for low, high in ((2, 16), (16, 24)):
            conv = nn.Conv2d(low, high, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(high), nn.LeakyReLU(0.2)]
        model = drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 5)))
    x = photo(12)[:, :2]
    found = gi.recover(model, gi.observe(model, LOSS, x, torch.tensor([3])), (2, 12, 12), LOSS)
    assert len(found.hidden) == 2 and "contrast: 2 constants" in found.hidden[1]
    assert found.candidates[0].determined and not found.exact
    even = torch.zeros(12, 12).bool()
    even[::2, ::2] = True
    pictures = [found.inputs[0], *(even * torch.eye(2)[c].reshape(2, 1, 1) for c in range(2))]
    A = torch.stack([p.reshape(-1).double() for p in pictures], 1)
    best = A @ torch.linalg.lstsq(A, x.reshape(-1, 1)).solution
    assert gi.metrics.relative_error(best, x.reshape(-1, 1)) < 1e-10


def test_what_a_norm_hides_is_told_at_its_own_layer() -> None:
    """A factor, or constants that nothing below tells: of the layer above, and of no other."""
    bend, conv = nn.LeakyReLU(0.2), lambda *size, **o: nn.Conv2d(*size, 3, padding=1, **o)
    chain_ = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), bend]
    for low, high in ((8, 12), (12, 14)):
        chain_ += [conv(low, high, bias=False), nn.BatchNorm2d(high), bend]
    open_ = [conv(2, 8), bend, conv(8, 16, stride=2), nn.BatchNorm2d(16), bend]
    for layers, size, names in (
        (chain_, 14 * 36, ["10", "6+7", "3+4", "0+1"]),
        (open_, 16 * 9, ["6", "2+3", "0"]),
    ):
        model = drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 5)))
        update = gi.observe(model, LOSS, torch.rand(1, 2, 6, 6).double(), torch.tensor([1]))
        found = gi.recover(model, update, (2, 6, 6), LOSS)
        assert [report.name for report in found.layers] == names
        assert all(("+" in report.name) == bool(report.hidden) for report in found.layers)
    assert [report.full_rank for report in found.layers] == [True, False, True]


def test_constants_are_told_by_a_norm_below_that_gives_each_a_group() -> None:
    value, number = torch.rand(1, 4, 3, 3).double(), torch.arange(4).reshape(1, 4, 1, 1)
    number = number.expand(1, 4, 3, 3)
    dark = nn.BatchNorm2d(4)
    nn.init.zeros_(dark.weight[:1].data)
    for norm, told in ((nn.BatchNorm2d(4), True), (nn.GroupNorm(2, 4), False), (dark, False)):
        steps = trace(nn.Sequential(nn.Conv2d(2, 4, 1), norm), (2, 3, 3))
        assert (shifts(steps, 1, value, number) is not None) == told


def test_factor_and_constants_are_read_off_the_entries_that_are_known() -> None:
    x, number = torch.rand(1, 2, 3, 3).double(), torch.arange(2).reshape(1, 2, 1, 1)
    number = number.expand(1, 2, 3, 3)
    value = 2 * x + torch.tensor([0.3, -0.7])[number]
    known = torch.arange(18).reshape(1, 2, 3, 3) % 4 > 0
    found = edge_norms.by_entries(x, (value, known), number)
    assert found is not None
    torch.testing.assert_close(found, value)
    assert edge_norms.by_entries(x, (-value, known), number) is None  # a factor is positive


def test_a_factor_is_found_over_many_decades() -> None:
    assert abs(_searched(lambda log: abs(log - 3.21)) - 3.21) < 2e-3


def test_batch_norm_of_two_samples() -> None:
    model = chain("batch", "leaky")
    x = torch.cat([photo(), gi.data.photo("astronaut", SIDE, dtype=torch.float64)])
    update = gi.observe(model, LOSS, x, torch.tensor([1, 4]))
    found = gi.recover(model, update, SHAPE, LOSS, batch_size=2)
    assert found.targets is not None and found.targets.tolist() == [1, 4]
    assert fitted(found.inputs.flatten().unsqueeze(0), x.flatten().unsqueeze(0)) < 1e-8


@pytest.mark.parametrize("bend", BENDS)
def test_a_way_of_a_residual_block_from_its_gradients_alone(bend: str) -> None:
    """Under a sum only ``k`` is known: ``x + N2(W2 act(N1(W1 x)))``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        low, high = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        x = torch.randn(1, 16, 6, 6).double().relu()
        k = torch.randn(1, 16, 6, 6).double()
    one, bent, two = nn.GroupNorm(4, 16), BENDS[bend](), nn.GroupNorm(4, 16)
    way = drawn(nn.Sequential(low, one, bent, high, two))
    way(x).backward(k)
    G = {name: p.grad for name, p in way.named_parameters()}
    shape, rules = (16, 6, 6), [rule_of(layer) for layer in way]
    upper, lower = rules[4], rules[1]
    assert isinstance(upper, Norm) and isinstance(lower, Norm)
    sent = G["3.weight"], G["4.weight"], G["4.bias"]
    found = edge_norms.solve(high, upper, k, None, shape, sent, 0.0)
    assert found is not None and found.solution.full_rank and not found.scaled
    assert gi.metrics.relative_error(found.output, way(x)) < 1e-11
    hidden = Hidden("4", found.factor)

    def undone(s: Tensor) -> tuple[Undone, Tensor]:
        below = rules[2].undo(hidden.times(found.inputs, s), "2", 1e-13)
        return below, hidden.times(found.k, 1 / s) * below.slope

    s, spread = factors(
        lambda s: lower.parameter_sum(undone(s)[1])[None], G["1.bias"], hidden, curved=False
    )
    assert spread < 1e-11
    below, k = undone(s)
    system = NormSystem(low, lower, below.inputs, k, shape, G["0.weight"], below.known.double())
    assert fitted(solve(system).inputs, x) < 1e-10


# --- where it ends ------------------------------------------------------------------------------


def test_a_norm_without_an_affine_layer_below_is_refused() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)]
    model = nn.Sequential(*layers).double().train()
    x = photo(8)
    update = gi.observe(model, LOSS, x, torch.tensor([1]))
    with pytest.raises(errors.UnsupportedLayerError, match=r"2 \(BatchNorm2d\).*right below it"):
        gi.recover(model, update, (3, 8, 8), LOSS)
    assert [stop.name for stop in gi.audit(model, (3, 8, 8)).stops] == ["2"]


def outcome(seen: Verdicts, x: Tensor) -> tuple[bool, bool, bool]:
    """Whether the audit, and whether the recovery, says it leaks but for what is hidden; honest."""
    needed = [layer for layer in seen.audit.layers if layer.needed]
    told = all(a.recoverable or a.settled or a.together for a in needed) and not seen.audit.stops
    found = seen.found
    if found is None:
        return told, False, True
    claimed = found.candidates[0].determined
    open_ = any("contrast" in what for what in found.hidden)
    right = open_ or not claimed or fitted(found.inputs, x) < 1e-6
    return told, claimed, right and (not found.exact or seen.error < 1e-6)


# --- whole networks -----------------------------------------------------------------------------


def residual(norm: str, seed: int = 0) -> nn.Module:
    """One block a stage, with torchvision's stem."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10, norm_layer=NORMS[norm]
        )
    return net.double().train()


def test_a_resnet_with_group_norms_gives_its_picture_away_up_to_brightness() -> None:
    model, x = residual("group"), photo(24)
    update = gi.observe(model, LOSS, x, torch.tensor([3]))
    found = gi.recover(model, update, (3, 24, 24), LOSS)
    assert fitted(found.inputs, x) < 1e-11
    assert found.candidates[0].determined and not found.exact and "brightness" in found.hidden[0]
    assert "up to one factor, told by the bias of layer1.0.add" in str(found)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_by_channel_answers_as_all_rows_do(norm: str) -> None:
    """Gradient rows alone, where no output of the norm is known."""
    conv, rule = (
        nn.Conv2d(6, 24, 3, padding=1, bias=False).double(),
        rule_of(drawn(NORMS[norm](24))),
    )
    assert isinstance(rule, Norm)
    x, k = torch.rand(1, 6, 4, 4).double(), torch.randn(1, 24, 4, 4).double()
    module = rule.module
    module(conv(x)).backward(k)
    grads = tuple(p.grad for p in (conv.weight, module.weight, module.bias))
    one = edge_norms.solve(conv, rule, k, None, (6, 4, 4), grads, 0.0, iterate=False)
    assert one is not None and one.solution.full_rank and one.solution.residual < 1e-12
    assert fitted(one.inputs, x) < 1e-12
    assert gi.metrics.relative_error(one.output, rule.forward(conv(x))) < 1e-12


@pytest.mark.parametrize("positions", [1, 2, 3])
def test_a_convolution_under_a_batch_norm_is_read_blind_up_to_one_factor(positions: int) -> None:
    conv = nn.Conv2d(32, 40, 3, padding=1, bias=False).double()
    x, k = (torch.randn(1, c, positions, positions).double() for c in (32, 40))
    centred = positions > 1
    k = k - k.mean((2, 3), keepdim=True) if centred else k
    conv(x).backward(k)
    found = blind.solve(conv, conv.weight.grad, None, tuple(x.shape[1:]), centred=centred)
    assert found is not None and fitted(found.solution.x, x) < 1e-11
    grown = float((found.solution.x * x).sum() / found.solution.x.square().sum())
    assert gi.metrics.relative_error(found.k / grown, k) < 1e-11


SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_audit_and_recovery_agree_and_are_honest(seed: int) -> None:
    model, shape = normed_net(seed)
    seen = verdicts(model, shape, seed)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    told, claimed, honest = outcome(seen, x)
    assert honest and seen.agree and told == claimed, seen

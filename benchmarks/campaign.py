"""How far to trust it: whatever claims certainty, over thousands of random cases.

A case is a seed. It ends in an outcome, in a claim of certainty or none, and where there is a claim
it is right or wrong; ground truth is used to say which, never by what is tried.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from .measure import Job, Options, fill, rounded
from .page import cells, table

SECTION, SECONDS = "trust", 30.0  # of the clock, for one recovery
DENIAL = "InconsistentGradientError"  # "no input explains this": of an honest update no true word


class Case(NamedTuple):
    """What became of one case: an outcome in words, and of the claim, if there is one, whether."""

    outcome: str
    claimed: bool
    right: bool = True


# what is claimed, in the page's words, how many cells, and how many cases a cell
CAMPAIGNS: dict[str, tuple[str, int, int]] = {
    "networks": (
        "`recover` and `audit`: `exact`, random networks of every kind of layer",
        100,
        100,
    ),
    "singles": ("`recover`: `exact`, the same kinds from float32 gradients", 40, 100),
    "norms": ("`recover`: `exact`, norms of their own statistics, buffers sent or not", 20, 100),
    "pooled": ("`recover`: `exact`, max pooling", 20, 100),
    "minibatches": ("`recover(batch_size=2 to 5)`: `exact`", 40, 100),
    "updates": ("`recover`: `exact`, of updates that were changed on the way", 40, 100),
    "masks": ("`recover`: `exact`, the input and each mask of dropout read on the way", 40, 100),
    "guard": (
        "`LeakAudit`: what it sends keeps below its limits, what it withholds does not",
        40,
        100,
    ),
    "jacobian": ("`audit`: `exact`, against the rank of the whole gradient's Jacobian", 40, 100),
    "hidden": ("`recover`: what is said to be hidden changes no gradient", 40, 100),
    "isolated": ("`isolated_samples`: each sample it names was in the batch", 14, 1000),
    "batches": ("`recover_batch` with the layer's weights: every sample", 20, 100),
    "unweighted": ("`recover_batch` without them, the outputs counted: every sample", 40, 100),
    "labels": ("`possible_labels`: no label of the batch is missing", 10, 1000),
    "counts": ("`count_labels`: how often each label occurs", 5, 1000),
    "sentences": ("`recover_tokens`: `exact`, every word in its place", 8, 1000),
}


def campaign(options: Options) -> int:
    """All campaigns by turns, a cell of each."""
    jobs = {
        f"{name}/{cell}": Job(
            "campaign", "cases", {"name": name, "first": many * cell, "many": many}, limit=3600.0
        )
        for cell in range(max(n for _, n, _ in CAMPAIGNS.values()))
        for name, (_, n, many) in CAMPAIGNS.items()
        if cell < n
    }
    fill(SECTION, jobs, options)
    return 0


# --- in the child -------------------------------------------------------------------------------


def cases(name: str, first: int, many: int) -> dict[str, Any]:
    """Cases of one campaign from a first seed on."""
    import torch

    from gradinv_edu.errors import GradientInversionError

    torch.set_num_threads(1)
    start, counts, claims = time.process_time(), Counter[str](), 0
    wrong, denied = list[int](), list[int]()
    for seed in range(first, first + many):
        try:
            case = globals()[name](seed)
        except GradientInversionError as error:  # it says that it does not know
            case = Case(type(error).__name__, False)
        if case.outcome == DENIAL:
            denied.append(seed)
        counts[case.outcome] += 1
        claims += case.claimed
        if case.claimed and not case.right:
            wrong.append(seed)
    spent = rounded(time.process_time() - start)
    outcomes = dict(counts.most_common())
    told = {"runs": many, "claims": claims, "wrong": wrong, "denied": denied}
    return {**told, "outcomes": outcomes, "cpu": spent}


def _pick(source: Any, *options: Any) -> Any:
    """One of them, each as likely as the others."""
    import torch

    return options[int(torch.randint(len(options), (1,), generator=source))]


def networks(seed: int) -> Case:
    """A random network, a random input, a plain gradient in float64."""
    from .random_nets import random_net, verdicts

    seen = verdicts(*random_net(seed), seed, SECONDS)
    claimed = seen.found is not None and seen.found.exact
    return Case(seen.outcome.removeprefix("OTHER: "), claimed, seen.error < 1e-6)


def singles(seed: int) -> Case:
    """The same networks, in float32."""
    from .random_nets import random_net

    return _recovered(seed, *random_net(seed), single=True)


def norms(seed: int) -> Case:
    """Norms of their own statistics, in either precision; the client may send its buffers."""
    from .random_nets import normed_net

    return _recovered(seed, *normed_net(seed), single=seed % 4 == 3, buffers=seed % 2 == 1)


def pooled(seed: int) -> Case:
    """Max pooling, in either precision."""
    from .random_nets import pooled_net

    return _recovered(seed, *pooled_net(seed), single=seed % 4 == 3)


def _recovered(
    seed: int, model: Any, shape: Any, single: bool = False, buffers: bool = False
) -> Case:
    """One random input, and what ``recover`` says of it."""
    import torch

    import gradinv_edu as gi

    from .random_nets import LOSS

    source = torch.Generator().manual_seed(seed)
    model = model.float() if single else model
    x = torch.rand(1, *shape, generator=source, dtype=torch.float64)
    x = x.to(next(model.parameters()))
    with torch.no_grad(), torch.random.fork_rng():
        classes = model(torch.zeros_like(x)).shape[1]
    target = torch.randint(classes, (1,), generator=source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        update = gi.observe(model, LOSS, x, target, buffers=buffers)
    found = gi.recover(model, update, shape, LOSS, seconds=SECONDS)
    if found.ran_out:
        return Case("out of time", False)
    near = gi.metrics.relative_error(found.inputs, x)
    outcome = "exact" if found.exact else " and ".join(found.hidden) or "not exact"
    return Case(outcome, found.exact, near < (1e-3 if single else 1e-6))


def masks(seed: int) -> Case:
    """Dropout in training mode: its masks are read off the zeros of what is recovered."""
    import torch
    from torch import nn

    import gradinv_edu as gi
    from gradinv_edu.engine.recovery import Recovering

    from .random_nets import LOSS, dropped_net

    walks, true = list[Recovering](), dict[str, Any]()

    class Read(Recovering):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            walks.append(self)

    model, shape = dropped_net(seed)
    source, single = torch.Generator().manual_seed(seed), seed % 4 == 3
    x = torch.rand(1, *shape, generator=source, dtype=torch.float64)
    model, x = (model.float(), x.float()) if single else (model, x)
    drops = {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout)}

    def watch(name: str, z: Any, a: Any) -> None:
        true[name] = a != 0, z != 0
        a.register_hook(lambda g: true.update({name: (a != 0, (z != 0) & (g != 0))}))

    hooks = [
        module.register_forward_hook(lambda _, z, a, n=name: watch(n, z[0], a))
        for name, module in drops.items()
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        update = gi.observe(model, LOSS, x, torch.tensor([1]))
    for hook in hooks:
        hook.remove()
    found = gi.recover(model, update, shape, LOSS, seconds=SECONDS, walk=Read)
    if not found.exact:
        return Case("out of time" if found.ran_out else "not exact", False)
    near = gi.metrics.relative_error(found.inputs, x) < (1e-3 if single else 1e-6)
    alike = all(  # of a unit that is zero, or cut off above, nothing can be read
        bool(((mask != 0) == true[name][0])[true[name][1]].all())
        for name, mask in walks[-1].kept.items()
    )
    return Case(f"exact, {len(walks[-1].kept)} of {len(drops)} masks read", True, near and alike)


def guard(seed: int) -> Case:
    """A client's audit of its own update against what its server makes of what arrives."""
    import copy
    import logging

    import torch
    from flwr.serverapp.strategy import FedAvg
    from torch import nn

    import gradinv_edu as gi
    from gradinv_edu import federation
    from gradinv_edu.engine.client import attack

    from .random_nets import LOSS, random_net

    source = torch.Generator().manual_seed(seed)
    pick = partial(_pick, source)
    model, shape = random_net(seed)
    model, many = model.float(), pick(1, 1, 2, 3)
    dense = nn.Linear(shape[0], pick(8, 32)) if len(shape) == 1 and pick(0, 1) else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if dense is not None:
            model = nn.Sequential(dense, nn.ReLU(), nn.Linear(dense.out_features, 3))
        classes = model(torch.zeros(1, *shape)).shape[1]
    x = torch.rand(many, *shape, generator=source)
    y = torch.randint(classes, (many,), generator=source)
    schedule = federation.Schedule(0.1, pick(1, 1, 2), pick(None, 1))
    policy, limit = pick("warn", "withhold", "noise"), pick(15.0, 25.0)
    audit = federation.LeakAudit(
        model, LOSS, lambda _: (x, y), policy=policy, seconds=4 * SECONDS,
        limits=federation.Limits(psnr=limit, ssim=2.0), generator=source,
    )  # fmt: skip
    app = federation.client_app(model, LOSS, lambda _: (x, y), [audit])
    plain = federation.client_app(model, LOSS, lambda _: (x, y))
    seen = []
    with torch.random.fork_rng(), federation.quiet(logging.CRITICAL):
        for client in (app, plain):
            torch.manual_seed(seed)
            one = {"min_available_nodes": 1, "min_train_nodes": 1, "fraction_evaluate": 0.0}
            server = federation.CuriousServer(FedAvg(**one), copy.deepcopy(model))
            federation.simulate(server, client, model, schedule, clients=1)
            seen.append(server.received)

    def best(received: Any) -> float:
        psnr = -float("inf")
        for name in audit.attackers:
            found = attack(name, received.model, received.update, shape, LOSS, float("inf"))
            for z in () if isinstance(found, str) else found.double().nan_to_num().clamp(0, 1):
                psnr = max([psnr, *(gi.metrics.psnr(one, z) for one in x)])
        return psnr

    report, sent = audit.reports[0], seen[0]
    outcome = f"{policy}: {report.action}"
    if report.action in ("sent", "sent with noise"):
        return Case(outcome, True, best(sent[0]) < limit)
    if not any(attempt.leaks for attempt in report.attempts):
        return Case(f"{outcome}, without an answer", False)
    right = best(seen[1][0]) >= limit and bool(sent) == (policy == "warn")
    return Case(outcome, True, right)


def minibatches(seed: int) -> Case:
    """Two to five samples in one step, by ``recover`` as a user would call it."""
    import torch
    from torch import nn

    import gradinv_edu as gi

    x, y, model, _, outputs = _wide(seed)
    loss: nn.Module = nn.BCEWithLogitsLoss() if outputs == 1 else nn.CrossEntropyLoss()
    update = gi.observe(model, loss, x, y)
    found = gi.recover(model, update, tuple(x.shape[1:]), loss, batch_size=len(x),
                       generator=torch.Generator().manual_seed(seed))  # fmt: skip
    right = _contains(x, found.inputs) and _contains(found.inputs.double(), x)
    return Case("exact" if found.exact else "not exact", found.exact, right)


def updates(seed: int) -> Case:
    """The same networks, but what arrives is not the gradient that the attacker takes it for."""
    import torch
    from torch import nn

    import gradinv_edu as gi
    from gradinv_edu.errors import GradientInversionError

    from .random_nets import random_net

    model, shape = random_net(seed)
    source = torch.Generator().manual_seed(seed)
    single, loss = _pick(source, True, False, False), nn.CrossEntropyLoss()
    with torch.no_grad():
        classes = model(torch.zeros(1, *shape).double()).shape[1]
    model = model.float() if single else model
    like = next(model.parameters())
    xs = torch.rand(2, *shape, generator=source, dtype=torch.float64).to(like)
    ys = torch.randint(classes, (2,), generator=source)
    changes = {**CHANGES, "none": lambda u, *_: u}
    name = _pick(source, *changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        update = gi.observe(model, loss, xs[:1], ys[:1])
        another = gi.observe(model, loss, xs[1:], ys[1:])
        steps = gi.observe(model, loss, xs[:1], ys[:1], local_steps=3, learning_rate=0.1)
    try:
        sent = changes[name](update, another, steps, source)
        found = gi.recover(model, sent, shape, loss)
    except GradientInversionError as error:
        return Case(f"{name}: {type(error).__name__}", False)
    theirs = all(torch.equal(sent.gradients[n], g) for n, g in another.gradients.items())
    true = xs[1:] if theirs else xs[:1]  # of a single layer, the last is the whole update
    near = gi.metrics.relative_error(found.inputs, true.double())
    return Case(f"{name}: {'exact' if found.exact else 'not exact'}", found.exact,
                near < (1e-3 if single else 1e-6))  # fmt: skip


def _each(update: Any, change: Callable[[Any], Any]) -> Any:
    return replace(update, gradients={n: change(g) for n, g in update.gradients.items()})


def _planted(update: Any, another: Any, steps: Any, source: Any) -> Any:
    """One entry of one gradient moved by a thousandth of the largest."""
    import torch

    name = _pick(source, *update.gradients)
    moved = update.gradients[name].clone()
    place = int(torch.randint(moved.numel(), (1,), generator=source))
    moved.view(-1)[place] += 1e-3 * moved.abs().max()
    return replace(update, gradients={**update.gradients, name: moved})


def _digits(step: float) -> Callable[..., Any]:
    return lambda u, *_: _each(u, lambda g: (g / (step * g.abs().max().clamp_min(1e-30))).round()
                               * (step * g.abs().max()))  # fmt: skip


def _scaled(by: float) -> Callable[..., Any]:
    return lambda u, *_: _each(u, lambda g: by * g)


# what a client, a channel or a defense does to it without saying so
CHANGES: dict[str, Callable[..., Any]] = {
    "one entry moved": _planted,
    "rounded to 1e-9": _digits(1e-9),
    "rounded to 8 bits": _digits(1 / 127),
    "rounded to 1e-6": _digits(1e-6),
    "three times as large": _scaled(3.0),
    "turned round": _scaled(-1.0),
    "signs": lambda u, *_: _each(u, lambda g: g.sign()),
    "three local steps": lambda u, _, steps, __: replace(u, gradients=steps.gradients),
    "two clients' mean": lambda u, another, *_: replace(
        u, gradients={n: (g + another.gradients[n]) / 2 for n, g in u.gradients.items()}
    ),
    "another's last layer": lambda u, another, *_: replace(
        u, gradients={**u.gradients, [*u.gradients][-1]: another.gradients[[*u.gradients][-1]]}
    ),
}


def jacobian(seed: int) -> Case:
    """An exact audit needs a Jacobian of full rank, whatever the attack."""
    import torch

    import gradinv_edu as gi

    from .random_nets import random_net

    model, shape = random_net(seed)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    audit = gi.audit(model, shape, inputs=x, jacobian=True,
                     generator=torch.Generator().manual_seed(seed))  # fmt: skip
    rank = audit.network
    full = rank is not None and rank.rank == rank.unknowns
    outcome = f"{'exact' if audit.exact else 'not exact'}, {'full' if full else 'deficient'} rank"
    return Case(outcome, audit.exact, full)


def hidden(seed: int) -> Case:
    """A network that divides by a spread of its input: brighter inputs give the same gradient."""
    import torch
    from torch import nn

    import gradinv_edu as gi

    source = torch.Generator().manual_seed(seed)
    pick = partial(_pick, source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        filters, size = pick(8, 12, 16), pick(6, 8)
        conv = nn.Conv2d(pick(1, 3), filters, 3, padding=1, bias=False)
        norm = pick(
            nn.BatchNorm2d(filters, eps=1e-12), nn.GroupNorm(pick(2, 4), filters, eps=1e-12)
        )
        head = nn.Linear(filters * size**2, 5)
        model = nn.Sequential(conv, norm, nn.LeakyReLU(0.2), nn.Flatten(), head).double().train()
    shape = (conv.in_channels, size, size)
    x = torch.rand(1, *shape, generator=source, dtype=torch.float64)
    loss, target = nn.CrossEntropyLoss(), torch.tensor([1])
    update = gi.observe(model, loss, x, target)
    found = gi.recover(model, update, shape, loss)
    if not found.hidden:
        return Case(
            "nothing hidden", found.exact, gi.metrics.relative_error(found.inputs, x) < 1e-6
        )
    own = gi.observe(model, loss, 2 * found.inputs, target)
    apart = sum(float((own.gradients[n] - g).norm()) for n, g in update.gradients.items())
    size_ = sum(float(g.norm()) for g in update.gradients.values())
    return Case(" and ".join(found.hidden), True, apart < 1e-6 * size_)


def _wide(seed: int) -> Iterator[Any]:
    """Inputs, targets, model and gradients of a batch through a wide layer with ReLU."""
    import torch
    from torch import nn

    import gradinv_edu as gi

    source = torch.Generator().manual_seed(seed)
    pick = partial(_pick, source)
    N, n, outputs = pick(2, 2, 3, 3, 4, 5), pick(8, 16, 30), pick(1, 2, 3, 5, 10)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bias = pick(0.0, 0.0, 1.0, 3.0)  # of the first layer: fewer units off
        width = pick(30, 60, 120)
        model = nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, outputs)).double()
        model[0].bias.data += bias
    x = torch.randn(N, n, generator=source, dtype=torch.float64)
    if outputs == 1:
        loss: nn.Module = nn.BCEWithLogitsLoss()
        y = torch.randint(2, (N, 1), generator=source).double()
    else:
        loss, y = nn.CrossEntropyLoss(), torch.randint(outputs, (N,), generator=source)
    update = gi.observe(model, loss, x, y)
    yield from (x, y, model, update.gradients, outputs)


def _contains(x: Any, rows: Any) -> bool:
    """Whether every row is one of ``x``."""
    import torch

    apart = torch.cdist(rows.double(), x).amin(dim=1)
    return bool((apart < 1e-6 * x.norm(dim=1).mean()).all())


def isolated(seed: int) -> Case:
    """Rows of the gradient that only one sample excited."""
    import torch

    from gradinv_edu import batches

    x, _, _, g, outputs = _wide(seed)
    found = batches.isolated_samples(g["0.weight"], g["0.bias"], outputs)
    if not found:
        return Case("none found", False)
    return Case("some found", True, _contains(x, torch.stack([one.x for one in found])))


def _batch(seed: int, weighted: bool) -> Case:
    from gradinv_edu import batches

    x, _, model, g, outputs = _wide(seed)
    known = {"weight": model[0].weight.detach(), "bias": model[0].bias.detach()}
    how = known if weighted else {"outputs": outputs}
    found = batches.recover_batch(g["0.weight"], g["0.bias"], len(x), **how)
    return Case("recovered", True, _contains(x, found) and _contains(found.double(), x))


def batches(seed: int) -> Case:
    """All samples, the layer's own outputs as witness."""
    return _batch(seed, True)


def unweighted(seed: int) -> Case:
    """All samples from the gradient alone."""
    return _batch(seed, False)


def labels(seed: int) -> Case:
    """Labels by the sign of the last layer's gradient."""
    from gradinv_edu import batches

    _, y, _, g, outputs = _wide(seed)
    if outputs == 1:
        return Case("one output", False)
    found = batches.possible_labels(g["2.weight"], len(y))
    return Case(f"{len(found)} of {outputs}", True, set(y.tolist()) <= set(found))


def counts(seed: int) -> Case:
    """How often each label occurs, with the probabilities known."""
    import torch

    from gradinv_edu import batches

    x, y, model, g, outputs = _wide(seed)
    if outputs == 1:
        return Case("one output", False)
    with torch.no_grad():
        probabilities = model(x).softmax(1)
    found = batches.count_labels(g["2.bias"], len(y), probabilities)
    return Case("counted", True, found.tolist() == y.bincount(minlength=outputs).tolist())


def sentences(seed: int) -> Case:
    """Random words through a tiny GPT, up to beyond what its width can tell apart."""
    import torch
    from torch import nn

    import gradinv_edu as gi
    from gradinv_edu import language, tokens

    source = torch.Generator().manual_seed(seed)
    pick = partial(_pick, source)
    words, width, length, many = pick(*range(50, 400)), 32, pick(*range(3, 44)), pick(1, 2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = language.gpt(words, width)
    ids = torch.randint(words, (many, length + 1), generator=source)
    update = gi.observe(model, nn.CrossEntropyLoss(), ids[:, :-1], ids[:, 1:])
    if pick(False, True):
        kept = {n: g for n, g in update.gradients.items() if n not in ("wte.weight", "wpe.weight")}
        update = replace(update, gradients=kept)
    found = tokens.recover_tokens(model, update)
    true = sorted(ids[:, :-1].tolist())
    right = sorted(s.tolist() for s in found.sequences) == true
    return Case("exact" if found.exact else "unsure", found.exact, right)


# --- how it is told -----------------------------------------------------------------------------


def trusted(data: dict[str, Any]) -> Any:
    """Campaigns: cases, claims, wrong claims, and the rates that these leave possible."""
    from gradinv_edu.kit.metrics import wilson_interval

    rows = []
    for name, (claim, _, _) in CAMPAIGNS.items():
        parts = [cell for key, cell in cells(data, SECTION).items() if key.startswith(f"{name}/")]
        runs, claims = (sum(part[what] for part in parts) for what in ("runs", "claims"))
        wrong = sum(len(part["wrong"]) for part in parts)
        high = [wilson_interval(wrong, of)[1] if of else 1.0 for of in (claims, runs)]
        rates = [f"{100 * rate:.2g} %" for rate in high]
        rows.append([claim, f"{runs:,}", f"{claims:,}", str(wrong), *rates])
    return table(["claim", "cases", "claims", "wrong", "of claims, below", "of cases, below"], rows)


def ended(data: dict[str, Any], name: str) -> Any:
    """How the cases of one campaign ended."""
    total: Counter[str] = Counter()
    for key, cell in cells(data, SECTION).items():
        if key.startswith(f"{name}/"):
            total.update(cell["outcomes"])
    return table(["outcome", "cases"], [[what, f"{n:,}"] for what, n in total.most_common()])

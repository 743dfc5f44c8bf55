"""What a first layer must hide, what likely fills it in, and what training costs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import design, noise
from gradinv_edu.errors import InvalidArgumentError, InvalidTensorError

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import design as benchmark

LOSS, THREE = nn.CrossEntropyLoss(), torch.tensor([3])
GEOMETRIES = [(1, 8, 3, 2, 1), (1, 8, 3, 1, 1), (3, 8, 4, 4, 0), (3, 8, 5, 3, 2), (1, 8, 8, 1, 0)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_below_the_filter_bound_the_matrix_lacks_rank(geometry: tuple[int, ...]) -> None:
    channels, size, kernel, stride, padding = geometry
    side, shape = (size + 2 * padding - kernel) // stride + 1, (channels, size, size)
    for filters in range(1, design.filter_bound(*geometry) + 1):
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=False).double()
        k = torch.randn(1, filters, side, side, dtype=torch.float64)
        matrix = gi.systems.LayerSystem(conv, k, shape).to_dense()
        assert int(torch.linalg.matrix_rank(matrix)) < channels * size**2


def test_the_filter_bound_counts_dependent_equations_once_and_dropout_leaves_fewer() -> None:
    # 24 equations for 16 pixels, of rank 15: the small layer that the book counts by hand
    assert design.filter_bound(1, 4, 2, stride=2) == 3
    rates = (0.0, 0.5, 0.7, 0.9)
    assert [design.filter_bound(3, 8, 3, 1, 1, rate=p) for p in rates] == [2, 3, 4, 5]


def test_what_rank_hides_changes_no_gradient_and_the_most_likely_input_is_nearer() -> None:
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(32, 10)).double()
    x = gi.data.digit(3, dtype=torch.float64)
    sent = gi.observe(model, LOSS, x, THREE)
    found = gi.recover(model, sent, (1, 8, 8), LOSS)
    assert not found.exact and gi.metrics.psnr(found.inputs, x) < 40
    examples = gi.data.digits(range(100, 600), dtype=torch.float64)[0]
    likely = design.most_likely_input(model, found, LOSS, examples)
    for answer in (found.inputs, likely):
        other = gi.observe(model, LOSS, answer, THREE)
        for name, g in sent.gradients.items():
            assert torch.allclose(other.gradients[name], g, rtol=1e-6, atol=1e-10)
    assert gi.metrics.psnr(likely, x) > gi.metrics.psnr(found.inputs, x)
    with pytest.raises(InvalidTensorError, match="examples have shape"):
        design.most_likely_input(model, found, LOSS, torch.rand(5, 1, 4, 4))


X, Y = gi.data.digits(range(600))
NET = gi.models.mlp([64, 32, 10])


def test_training_learns_leaves_the_model_alone_and_goes_through_the_defense() -> None:
    before = {n: p.clone() for n, p in NET.state_dict().items()}
    trained = design.train(NET, LOSS, X, Y, steps=150, learning_rate=0.5)
    assert design.accuracy(trained, X, Y) > 0.8 > 0.3 > design.accuracy(NET, X, Y)
    assert all(torch.equal(before[n], p) for n, p in NET.state_dict().items())
    frozen = design.train(NET, LOSS, X, Y, steps=3, defense=lambda u: noise.clip(u, 1e-12))
    assert all(torch.allclose(p, before[n], atol=1e-9) for n, p in frozen.state_dict().items())


def train(x: Tensor = X, y: Tensor = Y, **settings: object) -> object:
    return design.train(NET, LOSS, x, y, **{"steps": 1, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: design.filter_bound(1, 4, 9), InvalidArgumentError, "does not fit"),
        (lambda: design.filter_bound(1, 4, 3, 0), InvalidArgumentError, "stride must be a whole"),
        (lambda: design.filter_bound(3, 8, 3, rate=1.0), InvalidArgumentError, "rate"),
        (lambda: train(learning_rate=0.0), InvalidArgumentError, "learning_rate"),
        (lambda: train(batch_size=1.5), InvalidArgumentError, "batch_size"),
        (lambda: train(X[:4], Y[:2]), InvalidTensorError, "4 inputs and 2 targets"),
        (lambda: design.accuracy(NET, X[:4], Y[:2]), InvalidTensorError, "4 inputs and 2 targets"),
        (lambda: design.accuracy(NET, X[:0], Y[:0]), InvalidTensorError, "0 inputs and 0"),
        (lambda: design.accuracy(NET, X[:4] * math.nan, Y[:4]), InvalidTensorError, "has 40 NaN"),
    ],
)
def test_what_cannot_be_is_refused(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ["conv 2", "dense 4", "face conv 2"])
def test_a_slice_of_the_design_data_comes_out_again(name: str) -> None:
    stored = json.loads(benchmark.FILE.read_text())
    assert {key.split("/")[0] for key in stored["cells"]} == set(benchmark.DESIGNS)
    assert (stored["seeds"], stored["victims"], stored["steps"]) == (3, 3, 800)
    again, before = benchmark.cell(name, 1), stored["cells"][f"{name}/1"]
    assert again["parameters"] == before["parameters"]
    assert abs(again["accuracy"] - before["accuracy"]) < 0.03
    for one, other in zip(again["first"], before["first"], strict=True):
        assert one["exact"] == other["exact"]
        assert one["exact"] or abs(one["prior"] - other["prior"]) < 0.5
    assert [t["exact"] for t in again["last"]] == [t["exact"] for t in before["last"]]

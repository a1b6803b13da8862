"""A vocabulary that is split over ranks: against one process, between the ranks, and on the wire.

The ranks are processes of parallel_ranks.py, started once for all the tests.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from parallel_ranks import KINDS, SPREADS, UNEVEN, Case, cases, differentiate, dtensor_cases, head, rows, same_bits
from parallel_ranks import upstream_of as upstream_gradient
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

import prsl_kernels.ranks
from prsl_kernels import eager, ops, parallel, prsl_cross_entropy
from prsl_kernels.parallel import vocab_parallel_prsl_cross_entropy
from prsl_kernels.row_stats import merge, row_gradient, row_stats

pytestmark = pytest.mark.usefixtures("_single_thread")

GROUPS = (*KINDS, "options", "half", "shapes", "vocab_start")
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Gloo sends what is there."""
    with torch.device("cpu"):
        yield


@lru_cache
def all_results() -> dict[int, list[dict[str, Any]]] | str:
    """What each rank has written, by the number of ranks; or their output, where one has failed."""
    with TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, Path(__file__).with_name("parallel_ranks.py"), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        if run.returncode != 0:
            return run.stdout
        return {n: [torch.load(Path(folder) / f"{n}-{rank}.pt") for rank in range(n)] for n in UNEVEN}


def results(ranks: int) -> list[dict[str, Any]]:
    found = all_results()
    assert not isinstance(found, str), found
    return found[ranks]


@pytest.fixture(params=UNEVEN, scope="module")
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def expected(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """The terms and the gradient of one process in float64, and how much rounding by 1 may move the latter."""
    z = case.logits.double().requires_grad_()
    weight = None if case.weight is None else case.weight.double()
    options = {"k": 20, "b": 1e-4, "space": "prob", "label_smoothing": 0.0, **case.options}
    terms = prsl_cross_entropy(z, case.target, weight, return_terms=True, backend="eager", **options)
    upstream = upstream_gradient(terms.loss).abs()
    (gradient,) = differentiate(terms.loss, z)
    # The sum of p, of 1 at the target and of the slopes, which "prob" multiplies by p.
    largest = upstream.max() if upstream.numel() else torch.zeros(())
    p = z.detach().softmax(case.class_dim).nan_to_num()
    y = case.target.long().clamp(min=0).unsqueeze(case.class_dim)
    condition = (len(p) + options["k"] * (b := abs(options["b"]))) * p
    condition.scatter_add_(case.class_dim, y, torch.ones_like(p))
    condition += options["label_smoothing"] + (b if options["space"] == "log_prob" else 0)
    return [x.detach() for x in terms], gradient, largest * condition + gradient.abs().nan_to_num()


def assert_near(got: Tensor, want: Tensor, tolerance: Tensor) -> None:
    """The same NaN and infinities, and finite numbers that differ by the tolerance at most."""
    assert got.shape == want.shape
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got[~finite].double(), want[~finite], equal_nan=True)
    error = (got.double() - want).abs()[finite]
    assert (error <= tolerance.expand_as(want)[finite]).all(), error.max()


# ---- the ranks against one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_against_one_process(ranks: int, group: str) -> None:
    """Loss, both terms and gradient, element by element, to the last digits of their dtype."""
    found = results(ranks)
    count = 0
    for of_group, name, case in cases(ranks):
        if of_group != group:
            continue
        count += 1
        got = [result["cases"][group, name] for result in found]
        dtype = torch.promote_types(case.logits.dtype, torch.float32)
        eps = torch.finfo(dtype).eps
        terms, gradient, condition = expected(case)
        loss, cross_entropy, penalty = got[0]["terms"]
        assert loss.dtype == dtype
        # An error of 1 ulp in log p is one of |log p| in p.
        assert_near(cross_entropy, terms[1], 16 * eps * (1 + terms[1].abs()))
        assert_near(penalty, terms[2], 256 * eps * terms[2].abs())
        assert_near(loss, terms[0], 32 * eps * (1 + terms[0].abs() + terms[2].abs()))
        places = case.places or list(range(ranks))
        parts = [part["gradient"] for _, part in sorted(zip(places, got, strict=True), key=lambda pair: pair[0])]
        whole = torch.cat(parts, case.class_dim)
        assert whole.dtype == case.logits.dtype
        tolerance = 64 * eps * condition
        if dtype != case.logits.dtype:
            rounding = torch.finfo(case.logits.dtype)
            tolerance += rounding.eps * gradient.abs() + rounding.smallest_normal * rounding.eps
        try:
            assert_near(whole, gradient, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        if case.target.dim() == 1 and not case.target.dtype.is_floating_point:
            ignored = case.target == case.options.get("ignore_index", -100)
            assert (whole[ignored] == 0).all()
    assert count > 0


def test_equal_bits(ranks: int) -> None:
    """All ranks hold the same bits of loss and terms; a second run gives the same bits of them and the gradient."""
    found = results(ranks)
    for key, first in found[0]["cases"].items():
        for result in found:
            got = result["cases"][key]
            assert got["stable"], key
            assert all(same_bits(x, y) for x, y in zip(got["terms"], first["terms"], strict=True)), key


ERRORS = {
    "target too large": ("IndexError", "class indices must be in"),
    "target negative": ("IndexError", "Target -1 is out of bounds"),
    "k too large": ("ValueError", "k must be between 1 and V - 1, but k={V} and V={V}"),
    "k": ("ValueError", "k must be at least 1"),
    "hole": ("ValueError", "hold every class once, but hold [0, 3)"),
    "overlap": ("ValueError", "hold every class once, but hold [0, 3)"),
    "start beyond 0": ("ValueError", "hold every class once, but hold [1, 4)"),
    "vocab_start on one rank": ("ValueError", "all ranks must have the same arguments"),
    "vocab_start negative on one rank": ("ValueError", "vocab_start must be the first class of this rank, but is -3"),
    "vocab_start no integer": ("TypeError", "vocab_start must be an integer"),
    "probabilities": ("TypeError", "gather the logits of all ranks and use prsl_cross_entropy"),
    "all probabilities": ("TypeError", "gather the logits of all ranks and use prsl_cross_entropy"),
    "probabilities on one rank": ("TypeError", "gather the logits of all ranks and use prsl_cross_entropy"),
    "target dtype": ("TypeError", "torch.int64 or torch.uint8"),
    "target shape": ("ValueError", "to go with the logits of all ranks (4, {V})"),
    "weight shape": ("ValueError", "weight must have the shape ({V},)"),
    "weight of the shard": ("ValueError", "weight must have the shape ({V},)"),
    "weight dimension": ("ValueError", "weight must have the shape ({V},)"),
    "weight with gradient": ("ValueError", "weight.detach()"),
    "weight on one rank": ("ValueError", "all ranks must have the same arguments"),
    "weight type": ("TypeError", "weight must be a tensor"),
    "logits dtype": ("TypeError", "one of the dtypes"),
    "logits dtype on one rank": ("ValueError", "the same dtype of local_logits"),
    "rows": ("ValueError", "the same number of tokens, but have [4, "),
    "targets differ": ("ValueError", "the same target"),
    "targets in another order": ("ValueError", "the same target"),
    "k differs": ("ValueError", "all ranks must have the same arguments"),
    "b differs": ("ValueError", "all ranks must have the same arguments"),
    "weights differ": ("ValueError", "the same weight"),
    "vocab_start too large on one rank": (
        "ValueError",
        "vocab_start must be the first class of this rank, but is 1180",
    ),
    "k on one rank": ("ValueError", "k must be at least 1"),
    "k no integer on one rank": ("TypeError", "k must be an integer"),
    "reduction on one rank": ("ValueError", "reduction must be one of"),
    "logits no tensor on one rank": ("TypeError", "local_logits must be a tensor"),
    "logits without numbers on one rank": ("ValueError", "target is on cpu, but local_logits on meta"),
    "target sparse on one rank": ("TypeError", "target must be a dense tensor"),
    "weight elsewhere on one rank": ("ValueError", "weight is on meta, but local_logits on cpu"),
    "group": ("TypeError", "group must be a process group"),
    "second derivative": ("RuntimeError", "gather the logits of all ranks and use prsl_cross_entropy"),
}
# What only some ranks have done wrong: there is this error, and elsewhere the word that there is one.
ALONE = {
    "vocab_start negative on one rank": [0],
    "vocab_start too large on one rank": [-1],
    "probabilities on one rank": [-1],
    "k on one rank": [-1],
    "k no integer on one rank": [-1],
    "reduction on one rank": [-1],
    "logits no tensor on one rank": [-1],
    "logits without numbers on one rank": [-1],
    "target sparse on one rank": [-1],
    "weight elsewhere on one rank": [-1],
}
DTENSOR_ERRORS = {
    "replicated": (
        "ValueError",
        "over its classes, Shard(1), but has Replicate(): redistribute it, or pass to_local()",
    ),
    "partial": ("ValueError", "but has Partial(sum): redistribute it, or pass to_local()"),
    "sharded by rows": ("ValueError", "over its classes, Shard(1), but has Shard(dim=0): redistribute it"),
    "plane": ("ValueError", "on a mesh of one dimension, but (Replicate(), Shard(dim=1)) are on one of shape (1, {W})"),
    "group besides": ("ValueError", "group and vocab_start come with the DTensor"),
    "vocab_start besides": ("ValueError", "group and vocab_start come with the DTensor"),
    "target sharded": ("ValueError", "redistribute it to Replicate()"),
    "target too large": ("IndexError", "Target 12 is out of bounds"),
    "k too large": ("ValueError", "k=12 and V=12"),
}


@pytest.mark.parametrize(("kind", "errors"), [("errors", ERRORS), ("dtensor errors", DTENSOR_ERRORS)])
def test_errors_are_raised_on_every_rank(ranks: int, kind: str, errors: dict[str, tuple[str, str]]) -> None:
    found = [result[kind] for result in results(ranks)]
    assert set(found[0]) == set(errors)
    for name, (of_type, words) in errors.items():
        alone = [rank % ranks for rank in ALONE.get(name, range(ranks))]
        for rank, caught in enumerate(found):
            message = words.replace("{V}", str(3 * ranks)).replace("{W}", str(ranks))
            wanted = (
                (of_type, message) if rank in alone else ("RuntimeError", f"since ranks {alone} of the group raise")
            )
            assert caught[name][0] == wanted[0], (name, rank, caught[name])
            assert wanted[1] in caught[name][1], (name, rank, caught[name])


def test_numbers_on_the_wire(ranks: int) -> None:
    """A header of 8, and k + 4 numbers for each of 7 rows; backward sends nothing. With b=0 there are no candidates."""
    for result in results(ranks):
        assert result["sent"] == {"penalty": [8, 7 * 24], "smoothing": [8, 7 * 25], "b=0": [8, 7 * 3]}


def test_a_group_without_rank_0(ranks: int) -> None:
    first, *members = (result["subgroup"] for result in results(ranks))
    assert first["error"][0] == "TypeError"
    assert "with this process in it" in first["error"][1]
    z = members[0]["logits"].requires_grad_()
    loss = prsl_cross_entropy(z, members[0]["target"], k=3, b=0.5)
    for member in members:
        torch.testing.assert_close(member["loss"], loss.detach(), rtol=1e-14, atol=0)
    gradient = torch.cat([member["gradient"] for member in members], 1)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, z)[0], rtol=1e-13, atol=1e-16)


# ---- DTensors --------------------------------------------------------------------------------------------------------


def test_dtensors(ranks: int) -> None:
    """A replicated loss, and a gradient that is split as the logits are, unevenly or with empty shards, too."""
    for name, (z, target, weight, options) in dtensor_cases().items():
        z.requires_grad_()
        options.pop("replicated")
        terms = prsl_cross_entropy(z, target, weight, return_terms=True, **options)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), z)
        for result in results(ranks):
            got = result["dtensor"][name]
            assert got["placements"] == ["(Replicate(),)"] * 3 + [f"(Shard(dim={min(1, z.dim() - 1)}),)"]
            assert got["local"]
            for x, y in zip(got["terms"], terms, strict=True):
                torch.testing.assert_close(x, y.detach(), rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(got["gradient"], gradient, rtol=1e-12, atol=1e-15)


def test_against_loss_parallel(ranks: int) -> None:
    """With b=0, F.cross_entropy under loss_parallel: values, types and placements."""
    for result in results(ranks):
        for name, differences in result["loss_parallel"].items():
            assert max(differences) <= 32 * EPS, name


@pytest.mark.parametrize("as_dtensor", [False, True])
def test_a_training_step_of_a_column_parallel_head(ranks: int, as_dtensor: bool) -> None:
    linear, hidden, target = head()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
    prsl_cross_entropy(linear(hidden), target, k=4, b=0.7).backward()
    optimizer.step()
    for result in results(ranks):
        got = result["step"][as_dtensor]
        for x, y in zip(got, (linear.weight, linear.bias, hidden.grad), strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-14)


# ---- the three steps, in one process ---------------------------------------------------------------------------------


def steps(
    z: Tensor,
    y: Tensor,
    sizes: list[int],
    weight: Tensor | None,
    grads: Tensor,
    k: int,
    smoothing: float,
    **spread: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms and the gradient from stats of shards, for upstream gradients (2, N) of the terms."""
    shards = []
    start = 0
    w = torch.ones_like(z[0]) if weight is None else weight
    for local, w_local in zip(z.split(sizes, 1), w.split(sizes), strict=True):
        place = y - start
        place = place.masked_fill((place < 0) | (place >= local.shape[1]), -1)
        shards.append((local, place, w_local, *row_stats(local, place, k=k, weight=w_local if smoothing else None)))
        start += local.shape[1]
    sums = torch.stack([shard[2].sum() for shard in shards]) if smoothing else None
    stats = merge(torch.stack([shard[3] for shard in shards]), k=k, weight_sums=sums, **spread)
    w_y = w[y]
    cross_entropy = -(1 - smoothing) * w_y * stats.log_p(stats.target) - smoothing * stats.uniform / len(w)
    grad_c, grad_d = grads
    q_y, each = (1 - smoothing) * grad_c * w_y, smoothing * grad_c[:, None] / len(w)
    parts = [
        row_gradient(
            local, place, slots, stats, grad_d * w_y, q_y, each * w_local, q_y + each[:, 0] * w.sum(), **spread
        )
        for local, place, w_local, _, slots in shards
    ]
    return cross_entropy, stats.distance(spread["space"]) * w_y, torch.cat(parts, 1)


@pytest.mark.parametrize("seed", range(8))
def test_any_split_of_hostile_rows(seed: int) -> None:
    """Hundreds of rows that are tied, masked, large or lopsided, split anyhow, against autograd of the definition."""
    torch.manual_seed(seed)
    choose = random.Random(seed).choice
    for _ in range(60):
        sizes = [choose((0, 1, 2, 5, 9)) for _ in range(choose((1, 2, 3, 4)))] + [choose((2, 3))]
        classes = sum(sizes)
        kind = choose(("plain", "tied", "flat", "masked", "large", "close", "far ahead"))
        z, y = 4 * torch.randn(4, classes, dtype=torch.float64), torch.randint(classes, (4,))
        if kind == "tied":
            z = (z / 3).round()
        if kind == "flat":
            z = z.sign()
        if kind == "masked":
            z[torch.rand(z.shape) < 0.7] = -torch.inf
        if kind == "close":
            z = 1 + 1e-6 * z
        if kind == "large":
            z += 1e4
        if kind in ("far ahead", "masked"):
            z.scatter_(1, y[:, None], 60.0 if kind == "far ahead" else 1.0)
        k, space, distance = choose(range(1, classes)), *choose(SPREADS)
        smoothing = choose((0.0, 0.1)) if kind != "masked" else 0.0
        weight = choose((None, torch.rand(classes, dtype=torch.float64)))
        grads = torch.randn(2, 4, dtype=torch.float64)
        z.requires_grad_()
        terms = eager.token_terms(
            z, y, weight, k=k, space=space, distance=distance, ignore_index=-100, label_smoothing=smoothing
        )
        (gradient,) = torch.autograd.grad(terms, z, list(grads))
        z = z.detach()
        got = steps(z, y, sizes, weight, grads, k, smoothing, space=space, distance=distance)
        assert_near(got[0], terms[0].detach(), 16 * EPS * (1 + terms[0].detach().abs()))
        assert_near(got[1], terms[1].detach(), 256 * EPS * terms[1].detach().abs())
        slopes = k if space == "log_prob" else k * z.softmax(1)
        condition = grads.abs().amax() * (z.softmax(1) + smoothing + slopes)
        condition.scatter_add_(1, y[:, None], grads.abs().amax().expand(4, 1))
        assert_near(got[2], gradient, 64 * EPS * condition)


# ---- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_group")
class TestOneRank:
    """What needs no second rank."""

    @pytest.mark.parametrize("shape", [(7, 12), (3, 12, 5)])
    @pytest.mark.parametrize("piece", [1, 30, 130])
    def test_in_pieces(self, shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Large logits are computed a few rows at a time, whatever the shape."""
        z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        target = torch.randint(12, shape[:1] + shape[2:])
        target[0] = -100
        options: dict[str, Any] = {"k": 4, "b": 0.7, "label_smoothing": 0.1, "reduction": "none"}

        def run() -> tuple[Tensor, Tensor]:
            loss = vocab_parallel_prsl_cross_entropy(z, target, **options)
            return loss.detach(), differentiate(loss, z)[0]

        want = run()
        monkeypatch.setattr(ops, "PIECE", piece)
        sizes = []

        def measured(function: Callable[..., Any]) -> Callable[..., Any]:
            def measuring(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                sizes.append(x.numel())
                return function(x, *args, **kwargs)

            return measuring

        for name in ("row_stats", "merge", "row_gradient"):
            monkeypatch.setattr(parallel, name, measured(getattr(parallel, name)))
        torch.testing.assert_close(run(), want, rtol=1e-13, atol=1e-15)
        assert max(sizes) <= max(piece, 12)
        assert len(sizes) >= 3 * target.numel() * 12 / max(piece, 12)

    def test_saved_for_backward(self) -> None:
        """Besides the logits O(k) numbers a row, not one of the size of the logits."""
        z = torch.randn(8, 500, requires_grad=True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            vocab_parallel_prsl_cross_entropy(z, torch.arange(8), k=5, b=0.5)
        assert sum(x.numel() for x in saved if x.numel() != z.numel()) <= 8 * (5 + 1 + 14)
        assert sum(x.numel() == z.numel() for x in saved) == 1

    def test_where_the_host_may_not_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU: nothing is read back, and what cannot be checked without that gives NaN."""
        case = Case(*rows("tied", [12], torch.float64), [12], {"k": 4, "b": 0.7, "label_smoothing": 0.1})
        case.target[3] = -100
        weight = torch.rand(12, dtype=torch.float64)
        want, gradient, _ = expected(
            Case(case.logits, case.target, [12], {**case.options, "reduction": "none"}, weight)
        )
        mean = prsl_cross_entropy(case.logits, case.target, weight, **case.options)
        monkeypatch.setattr(eager, "known", lambda condition: None)

        def run(target: Tensor = case.target, weight: Tensor | None = weight, **options: Any) -> list[Tensor]:
            z = case.logits.clone().requires_grad_()
            with NothingIsRead():
                loss = vocab_parallel_prsl_cross_entropy(z, target, weight, **case.options | options)
                (of_z,) = torch.autograd.grad(loss, z, upstream)
            return [loss.detach(), of_z]

        upstream = upstream_gradient(want[0])
        for start in (None, 0):
            loss, got = run(reduction="none", vocab_start=start)
            torch.testing.assert_close(loss, want[0], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-14)
        outside = case.target.clone()
        outside[1], outside[2] = 12, -1
        loss, got = run(outside, reduction="none")
        assert loss.isnan().tolist() == [False, True, True] + [False] * 5
        assert torch.equal(got.isnan().all(1), loss.isnan())
        assert torch.equal(got.isnan().any(1), loss.isnan())
        upstream = torch.ones((), dtype=torch.float64)
        torch.testing.assert_close(run()[0], mean, rtol=1e-14, atol=0)
        for wrong in ({"k": 12, "weight": None}, {"vocab_start": 1}, {"weight": weight[:11]}, {"target": outside}):
            assert run(**wrong)[0].isnan(), wrong
        assert run(k=12, b=0, weight=None)[0].isfinite()
        monkeypatch.setattr(prsl_kernels.ranks, "CHECK_TARGETS", True)
        with pytest.raises(ValueError, match="k=12 and V=12"):
            vocab_parallel_prsl_cross_entropy(case.logits, case.target, k=12, b=0.7)

    def test_compiled_code_steps_out_once(self) -> None:
        """The values are those of the function, and so are its errors."""

        def step(x: Tensor, target: Tensor, k: int) -> Tensor:
            return vocab_parallel_prsl_cross_entropy(x.sin(), target, k=k, b=0.7).square()

        z, target = torch.randn(6, 12, requires_grad=True), torch.arange(6)
        compiled = torch.compile(step, backend="aot_eager")
        results = [(loss := run(z, target, 3), *torch.autograd.grad(loss, z)) for run in (step, compiled)]
        torch.testing.assert_close(results[1], results[0])
        for arguments, error in (((z, target, 12), ValueError), ((z, target + 7, 3), IndexError)):
            with pytest.raises(error):
                compiled(*arguments)
        assert torch._dynamo.explain(step)(z, target, 3).graph_break_count == 1
        torch._dynamo.reset()

    def test_an_infinite_weight(self) -> None:
        """Of a class that is no target, with label smoothing: infinity, as in one process."""
        z, target, weight = torch.randn(6, 12), torch.arange(6), torch.ones(12)
        weight[11] = torch.inf
        options: dict[str, Any] = {"b": 0, "label_smoothing": 0.1, "reduction": "none"}
        z[0, 11] = 9.0  # the largest
        loss = vocab_parallel_prsl_cross_entropy(z, target, weight, **options)
        assert torch.equal(loss, prsl_cross_entropy(z, target, weight, backend="eager", **options))
        assert loss.isposinf().all()

    def test_transforms_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"torch\.func cannot go through a process group: gather the logits"):
            torch.func.grad(lambda z: vocab_parallel_prsl_cross_entropy(z, torch.arange(6)))(torch.randn(6, 40))

    def test_autocast(self) -> None:
        """Autocast changes nothing, as for prsl_cross_entropy."""
        z, target = torch.randn(6, 12).bfloat16().requires_grad_(), torch.arange(6)
        runs = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = vocab_parallel_prsl_cross_entropy(z, target, k=4, b=0.7, label_smoothing=0.1)
            runs.append((loss.detach(), torch.autograd.grad(loss, z)[0].float()))
        assert all(same_bits(x, y) for x, y in zip(*runs, strict=True))

    def test_a_part_of_a_graph(self) -> None:
        """Hidden states and matrix, with a half of the terms, and logits that share their storage."""
        hidden, matrix = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((6, 4), (4, 12)))
        target = torch.arange(6)

        def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            logits = hidden @ matrix
            loss = function(logits, target, k=4, b=0.7) * function(logits[:1].expand(6, 12), target, k=4, b=0.7)
            return torch.autograd.grad(loss, (hidden, matrix))

        got, want = gradients(vocab_parallel_prsl_cross_entropy), gradients(prsl_cross_entropy)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    def test_without_gradient(self) -> None:
        z = torch.randn(6, 12)
        loss = vocab_parallel_prsl_cross_entropy(z, torch.arange(6), torch.rand(12), k=4, b=0.7)
        assert not loss.requires_grad
        with torch.no_grad():  # nobody will ask for the weight's gradient
            vocab_parallel_prsl_cross_entropy(z, torch.arange(6), torch.rand(12, requires_grad=True), k=4, b=0.7)


class NothingIsRead(TorchDispatchMode):
    """Raises where the host would wait for a number of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


# ---- no ranks --------------------------------------------------------------------------------------------------------


def test_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    z, target = torch.randn(2, 5), torch.tensor([0, 1])
    if not distributed.is_initialized():
        with pytest.raises(
            RuntimeError, match=r"torch\.distributed\.init_process_group first, or use prsl_cross_entropy"
        ):
            vocab_parallel_prsl_cross_entropy(z, target, k=2)
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group first, or use prsl_cross_entropy"):
        vocab_parallel_prsl_cross_entropy(z, target, k=2)


def test_importing_does_not_import_dtensors() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import prsl_kernels.parallel; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prsl_kernels.parallel" in run.stdout
    assert not [name for name in run.stdout.split() if name.startswith("torch.distributed")]

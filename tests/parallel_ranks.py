"""The ranks of the tests in test_parallel.py: ``python parallel_ranks.py FOLDER``.

Every rank goes through the same cases in the same order, and writes what it got to ``FOLDER/RANKS-RANK.pt``. A case
that waits for another rank forever ends with the timeout of the group.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from prsl_kernels.parallel import vocab_parallel_prsl_cross_entropy

CLASSES = 12
SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))

# Uneven, with shards of 0 and 1 classes, and smaller than k.
UNEVEN = {2: [9, 3], 3: [6, 1, 5], 4: [5, 0, 1, 6]}


@dataclass
class Case:
    """The logits of all classes, how they are split, and the arguments of the loss."""

    logits: Tensor
    target: Tensor
    sizes: list[int]
    options: dict[str, Any]
    weight: Tensor | None = None
    places: list[int] | None = None  # the place of each rank's shard in the vocabulary, to be given as vocab_start
    class_dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.class_dim = min(1, self.logits.dim() - 1)

    def start(self, rank: int) -> int:
        places = self.places or list(range(len(self.sizes)))
        return sum(n for n, place in zip(self.sizes, places, strict=True) if place < places[rank])

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        return whole.narrow(self.class_dim, self.start(rank), self.sizes[rank])


def rows(kind: str, sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (8, CLASSES) and targets (8,) that are on every rank, and in half of the rows the favourite."""
    z = 3 * torch.randn(8, CLASSES, dtype=torch.float64)
    target = torch.tensor([0, 11, 8, 5, 9, 6, 3, 10])
    z[::2].scatter_(1, target[::2, None], 12.0)
    if kind == "tied":
        z = (z / 3).round()
    if kind == "close":
        z = (5 + 1e-6 * z).to(dtype)
    if kind == "all tied":
        z.zero_()
    if kind == "masked":
        z[torch.rand(z.shape) < 0.7] = -torch.inf
        z.scatter_(1, target[:, None], 1.0)
    if kind == "shard masked":
        start = sum(sizes[:-1])
        z[:, start:] = -torch.inf
        target = target % start
    if kind == "all masked":
        z[2], z[5, :6], z[6, 6:] = -torch.inf, -torch.inf, -torch.inf
    if kind == "not a number":
        z[1, 3], z[2, 11], z[4, 2], z[5, 8] = torch.nan, torch.nan, torch.inf, -torch.inf
        z[6, 3] = torch.inf  # the target
    if kind == "ignored":
        target[[1, 4]] = -100
        z[1], z[4, 7] = torch.nan, torch.inf
    if kind == "large":
        z += 1e4
    if kind == "far ahead":
        z.scatter_(1, target[:, None], 60.0)
    return z.to(dtype), target


KINDS = ("plain", "tied", "all tied", "masked", "shard masked", "all masked", "not a number", "ignored", "large")
KINDS += ("far ahead", "close")


def cases(ranks: int) -> Iterator[tuple[str, str, Case]]:
    """Group, name and case; the same on every rank and in the process that compares."""
    torch.manual_seed(0)
    uneven = UNEVEN[ranks]
    even = [CLASSES // ranks] * ranks
    splits = [(4, uneven), (CLASSES - 1, uneven), (4, even), (1, even)]
    if ranks > 2:
        del splits[2:]  # many small messages take their time on few cores
    for kind, (space, distance), dtype in product(KINDS, SPREADS, (torch.float64, torch.float32)):
        for k, sizes in splits if dtype == torch.float64 else splits[:1]:
            z, target = rows(kind, sizes, dtype)
            options = {"k": k, "b": 0.7, "space": space, "distance": distance, "reduction": "none"}
            yield kind, f"{space} {distance} {dtype} k={k} {sizes}", Case(z, target, sizes, options)

    z, target = rows("tied", uneven, torch.float64)
    target[3] = -100
    weight = torch.rand(CLASSES, dtype=torch.float64)
    weight[target[0]] = 0
    for w, smoothing, reduction in product((None, weight), (0.0, 0.3, 1.0), ("none", "mean", "sum")):
        for b, (space, distance) in ((0, SPREADS[0]), *product((0.7,), SPREADS[:: ranks - 1]), (-0.7, SPREADS[3])):
            options = {"k": 4, "b": b, "space": space, "distance": distance, "reduction": reduction}
            options["label_smoothing"] = smoothing
            name = f"{space} {distance} b={b} {reduction} smoothing={smoothing} weighted={w is not None}"
            yield "options", name, Case(z, target, uneven, options, w)
    for kind in ("masked", "shard masked", "not a number"):
        masked, y = rows(kind, uneven, torch.float64)
        options = {"k": 4, "b": 0.7, "label_smoothing": 0.3, "reduction": "none"}
        yield "options", f"{kind} smoothing", Case(masked, y, uneven, options, weight)
    no_penalty = {"k": 10**6, "b": 0}
    yield "options", "b=0 with a large k", Case(z, target, uneven, no_penalty)
    y = target.clamp(min=0)
    yield "options", "ignore_index is a class", Case(z, y, uneven, {"k": 4, "b": 0.7, "ignore_index": 11})
    for reduction in ("none", "mean", "sum"):
        everything = {"k": 4, "b": 0.7, "reduction": reduction}
        yield "options", f"all ignored {reduction}", Case(z, torch.full_like(target, -100), uneven, everything)
    yield "options", "uint8", Case(z, y.to(torch.uint8), uneven, {"k": 4, "b": 0.7})

    for dtype, (space, distance), k in product((torch.bfloat16, torch.float16), SPREADS, (2, 11)):
        z, target = rows("plain", uneven, dtype)
        target[3] = -100
        options = {"k": k, "b": 0.7, "space": space, "distance": distance, "label_smoothing": 0.1}
        yield "half", f"{space} {distance} {dtype} k={k}", Case(z, target, uneven, options, torch.rand(CLASSES))

    for shape, reduction in product(
        [(12,), (1, 12), (0, 12), (5, 12), (3, 12, 2), (2, 12, 2, 3), (2, 12, 0)], ("none", "mean", "sum")
    ):
        z = torch.randn(shape, dtype=torch.float64)
        target = torch.randint(CLASSES, shape[:1] + shape[2:] if len(shape) > 1 else ())
        options = {"k": 4, "b": 0.7, "reduction": reduction, "label_smoothing": 0.1}
        yield "shapes", f"{shape} {reduction}", Case(z, target, uneven, options, torch.rand(12, dtype=torch.float64))

    z, target = rows("tied", uneven, torch.float64)
    for places in (list(range(ranks)), list(range(ranks))[::-1]):
        options = {"k": 4, "b": 0.7, "label_smoothing": 0.1, "reduction": "none"}
        yield "vocab_start", f"places {places}", Case(z, target, uneven, options, weight, places)


def upstream_of(loss: Tensor) -> Tensor:
    """An upstream gradient that is not 1, and the same everywhere."""
    return (3 * torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))).to(loss.dtype)


def differentiate(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The gradients, for the upstream gradient, of two backward passes that must agree."""
    upstream = upstream_of(loss)
    first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, upstream)
    assert all(same_bits(x, y) for x, y in zip(first, second, strict=True)), "a second backward differs"
    return list(first)


def same_bits(x: Tensor, y: Tensor) -> bool:
    x_bytes, y_bytes = (v.reshape(-1).view(torch.uint8) for v in (x, y))
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x_bytes, y_bytes)


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """The terms and the gradient of this rank, and whether a second run gives the same bits."""
    runs = []
    for _ in range(2):
        z = case.shard(case.logits, rank).clone().requires_grad_()
        before = z.detach().clone()
        start = None if case.places is None else case.start(rank)
        terms = vocab_parallel_prsl_cross_entropy(
            z, case.target, case.weight, vocab_start=start, return_terms=True, **case.options
        )
        assert terms.loss.requires_grad
        assert not terms.cross_entropy.requires_grad
        (gradient,) = differentiate(terms.loss, z)
        assert gradient.dtype == z.dtype
        assert torch.equal(z.detach().nan_to_num(), before.nan_to_num())
        runs.append([*(x.detach() for x in terms), gradient])
    stable = all(same_bits(x, y) for x, y in zip(*runs, strict=True))
    return {"terms": runs[0][:3], "gradient": runs[0][3], "stable": stable}


# ---- errors ----------------------------------------------------------------------------------------------------------


def errors(rank: int, ranks: int) -> dict[str, Callable[[], Any]]:
    """Calls that must raise on every rank."""
    z, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    first, last = rank == 0, rank == ranks - 1
    classes = 3 * ranks

    def call(logits: Tensor = z, target: Tensor = target, weight: Any = None, **options: Any) -> Callable[[], Any]:
        return lambda: vocab_parallel_prsl_cross_entropy(logits, target, weight, **{"k": 2, "b": 0.5, **options})

    def second_derivative() -> None:
        x = z.clone().requires_grad_()
        loss = vocab_parallel_prsl_cross_entropy(x, target, k=2, b=0.5)
        torch.autograd.grad(loss, x, create_graph=True)

    other = target.index_fill(0, torch.tensor(1), 2) if last else target
    return {
        "target too large": call(target=target + classes - 3),
        "target negative": call(target=target - 1),
        "k too large": call(k=classes),
        "k": call(k=0),
        "hole": call(vocab_start=3 * rank + last),
        "overlap": call(vocab_start=3 * rank - last),
        "start beyond 0": call(vocab_start=3 * rank + 1),
        "vocab_start on one rank": call(vocab_start=0 if first else None),
        "vocab_start negative on one rank": call(vocab_start=3 * rank - 3),
        "vocab_start no integer": call(vocab_start=3.0 * rank),
        "probabilities": call(target=torch.rand(4, 3)),
        "all probabilities": call(target=torch.rand(4, classes)),
        "probabilities on one rank": call(target=torch.rand(4, 3) if last else target),
        "target dtype": call(target=target.int()),
        "target shape": call(target=target[:3]),
        "weight shape": call(weight=torch.ones(classes - 1)),
        "weight of the shard": call(weight=torch.ones(3)),
        "weight dimension": call(weight=torch.tensor(1.0)),
        "weight with gradient": call(weight=torch.rand(classes, requires_grad=True)),
        "weight on one rank": call(weight=torch.rand(classes) if last else None),
        "weight type": call(weight=[1.0] * classes),
        "logits dtype": call(logits=z.int()),
        "logits dtype on one rank": call(logits=z.double() if last else z),
        "rows": call(logits=z[:3] if last else z, target=target[:3] if last else target),
        "targets differ": call(target=other),
        "targets in another order": call(target=target.flip(0) if last else target),
        "k differs": call(k=3 if last else 2),
        "b differs": call(b=0.25 if last else 0.5),
        "weights differ": call(weight=torch.arange(1.0 + last, classes + 1 + last)),
        "vocab_start too large on one rank": call(vocab_start=2**70 if last else 3 * rank),
        "k on one rank": call(k=0 if last else 2),
        "k no integer on one rank": call(k="2" if last else 2),
        "reduction on one rank": call(reduction="all" if last else "mean"),
        "logits no tensor on one rank": call(logits=z.tolist() if last else z),
        "logits without numbers on one rank": call(logits=z.to("meta") if last else z),
        "target sparse on one rank": call(target=target.to_sparse() if last else target),
        "weight elsewhere on one rank": call(weight=torch.ones(classes, device="meta" if last else "cpu")),
        "group": call(group="tensor"),
        "second derivative": second_derivative,
    }


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# ---- what goes over the wire -----------------------------------------------------------------------------------------


def sent_numbers() -> dict[str, list[int]]:
    """How many numbers this rank sends in each collective, by options."""
    sent: list[int] = []
    names = [name for name in dir(distributed) if name.startswith("all_") and callable(getattr(distributed, name))]
    originals = {name: getattr(distributed, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def counted(output: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append(input.numel())
            return originals[name](output, input, *args, **kwargs)

        return counted

    out = {}
    try:
        for name in names:
            setattr(distributed, name, counting(name))
        z = torch.randn(7, 50, requires_grad=True)
        target = torch.arange(7)
        for name, options in {
            "penalty": {"k": 20, "b": 0.5},
            "smoothing": {"k": 20, "b": 0.5, "label_smoothing": 0.1},
            "b=0": {"b": 0},
        }.items():
            sent.clear()
            vocab_parallel_prsl_cross_entropy(z, target, **options).backward()
            out[name] = list(sent)
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)
    return out


# ---- DTensors --------------------------------------------------------------------------------------------------------


def dtensor_results(ranks: int) -> dict[str, Any]:
    """Loss and gradient, gathered, and their placements, for DTensors of several shapes."""

    mesh = init_device_mesh("cpu", (ranks,))
    out = {}
    for name, (z, target, weight, options) in dtensor_cases().items():
        shard = Shard(-1) if z.dim() == 2 else Shard(min(1, z.dim() - 1))
        logits = distribute_tensor(z, mesh, [shard]).requires_grad_()
        if options.pop("replicated"):
            target, weight = (distribute_tensor(x, mesh, [Replicate()]) for x in (target, weight))
        terms = vocab_parallel_prsl_cross_entropy(logits, target, weight, return_terms=True, **options)
        terms.loss.sum().backward()
        out[name] = {
            "terms": [x.full_tensor().detach() for x in terms],
            "placements": [str(x.placements) for x in (*terms, logits.grad)],
            "local": logits.to_local().shape == logits.grad.to_local().shape,
            "gradient": logits.grad.full_tensor(),
        }
    return out


def dtensor_cases() -> dict[str, tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """Logits, targets, weights and options; 13 and 3 classes are split unevenly, the latter with empty shards."""
    torch.manual_seed(1)
    out = {}
    for shape, replicated in product([(6, 12), (6, 13), (6, 3), (13,), (2, 13, 3)], (False, True)):
        classes = shape[min(1, len(shape) - 1)]
        z = torch.randn(shape, dtype=torch.float64).mul(2).round()
        target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
        weight = torch.rand(classes, dtype=torch.float64)
        options = {"k": 2, "b": 0.7, "label_smoothing": 0.1, "replicated": replicated}
        options["reduction"] = "mean" if replicated else "none"
        out[f"{shape} {replicated}"] = (z, target, weight, options)
    return out


def against_loss_parallel(ranks: int) -> dict[str, Any]:
    """The differences to F.cross_entropy under loss_parallel, for b=0."""

    mesh = init_device_mesh("cpu", (ranks,))
    out = {}
    for classes, reduction, weighted in product((12, 13), ("none", "mean", "sum"), (False, True)):
        torch.manual_seed(2)
        z, target = torch.randn(6, classes, dtype=torch.float64), torch.randint(classes, (6,))
        weight = torch.rand(classes, dtype=torch.float64) if weighted else None
        if not weighted:  # with weights, ignored tokens read out of bounds there
            target[2] = -100
        ours, theirs = (distribute_tensor(z, mesh, [Shard(1)]).requires_grad_() for _ in range(2))
        with loss_parallel():
            loss = vocab_parallel_prsl_cross_entropy(ours, target, weight, b=0, reduction=reduction)
            loss.sum().backward()
            expected = F.cross_entropy(theirs, target, weight, reduction=reduction)
            expected.sum().backward()
        assert type(loss) is type(expected)
        assert (loss.placements, ours.grad.placements) == (expected.placements, theirs.grad.placements)
        pairs = (loss.to_local(), expected.to_local()), (ours.grad.to_local(), theirs.grad.to_local())
        out[f"{classes} {reduction} {weighted}"] = [
            float((x - y).detach().abs().max()) if x.numel() else 0.0 for x, y in pairs
        ]
    return out


def head(classes: int = 13) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """A linear head in float64, hidden states (6, 8) that need a gradient, and targets."""
    torch.manual_seed(3)
    linear = torch.nn.Linear(8, classes, dtype=torch.float64)
    return linear, torch.randn(6, 8, dtype=torch.float64, requires_grad=True), torch.randint(classes, (6,))


def training_step(ranks: int, as_dtensor: bool) -> list[Tensor]:
    """The weights of a column-parallel head after a step, and the gradient of its input."""

    linear, hidden, target = head()
    mesh = init_device_mesh("cpu", (ranks,))
    linear = parallelize_module(linear, mesh, ColwiseParallel(use_local_output=not as_dtensor))
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
    logits = linear(hidden)
    vocab_parallel_prsl_cross_entropy(logits, target, k=4, b=0.7).backward()
    optimizer.step()
    return [linear.weight.full_tensor().detach(), linear.bias.full_tensor().detach(), hidden.grad]


def dtensor_errors(ranks: int) -> dict[str, Callable[[], Any]]:

    mesh, plane = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (1, ranks))
    z, target = torch.randn(8, 12), torch.arange(8)

    def call(logits: Tensor, target: Tensor = target, **options: Any) -> Callable[[], Any]:
        return lambda: vocab_parallel_prsl_cross_entropy(logits, target, **{"k": 2, "b": 0.5, **options})

    sharded = distribute_tensor(z, mesh, [Shard(1)])
    return {
        "replicated": call(distribute_tensor(z, mesh, [Replicate()])),
        "partial": call(DTensor.from_local(z, mesh, [Partial()])),
        "sharded by rows": call(distribute_tensor(z, mesh, [Shard(0)])),
        "plane": call(distribute_tensor(z, plane, [Replicate(), Shard(1)])),
        "group besides": call(sharded, group=distributed.group.WORLD),
        "vocab_start besides": call(sharded, vocab_start=0),
        "target sharded": call(sharded, target=distribute_tensor(target, mesh, [Shard(0)])),
        "target too large": call(sharded, target=target + 12),
        "k too large": call(sharded, k=12),
    }


def subgroup(rank: int, ranks: int) -> dict[str, Any]:
    """The loss in a group without rank 0: the others' result, and the error of rank 0."""
    members = list(range(1, ranks))
    group = distributed.new_group(members)
    torch.manual_seed(4)
    z, target = torch.randn(5, 4 * len(members), dtype=torch.float64), torch.randint(4 * len(members), (5,))
    place = max(rank - 1, 0)
    local = z[:, 4 * place : 4 * place + 4].clone().requires_grad_()
    options = {"k": 3, "b": 0.5}
    if rank == 0:
        return {"error": caught(lambda: vocab_parallel_prsl_cross_entropy(local, target, group=group, **options))}
    loss = vocab_parallel_prsl_cross_entropy(local, target, group=group, **options)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, local)[0], "logits": z, "target": target}


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """Everything that one of a number of ranks does."""
    timeout = timedelta(seconds=60)
    init = f"file://{folder}/init-{ranks}"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks, timeout=timeout)
    results: dict[str, Any] = {"cases": {(group, name): run_case(case, rank) for group, name, case in cases(ranks)}}
    results["errors"] = {name: caught(call) for name, call in errors(rank, ranks).items()}
    results["sent"] = sent_numbers()
    results["dtensor"] = dtensor_results(ranks)
    results["dtensor errors"] = {name: caught(call) for name, call in dtensor_errors(ranks).items()}
    results["loss_parallel"] = against_loss_parallel(ranks)
    results["step"] = {as_dtensor: training_step(ranks, as_dtensor) for as_dtensor in (False, True)}
    results["subgroup"] = subgroup(rank, ranks)
    torch.save(results, folder / f"{ranks}-{rank}.pt")
    distributed.destroy_process_group()


def main(folder: Path) -> None:
    """All numbers of ranks, one after the other; exits with 1 where a rank has failed."""
    torch.set_num_threads(1)
    # A fork of a process that has imported everything, and has no threads yet, is the quickest start.
    context = multiprocessing.get_context("fork")
    for ranks in UNEVEN:
        processes = [context.Process(target=run_rank, args=(rank, ranks, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

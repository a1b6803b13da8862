"""A small model for test_pytorch.py, and the ranks that train it there: ``python pytorch_ranks.py FOLDER``.

Every rank goes through the same cases in the same order, and writes what it got to ``FOLDER/RANK.pt``. A case that
waits for the other rank forever ends with the timeout of the group.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prsl_kernels import PRSLoss, apply_prsl, linear_prsl_cross_entropy

RANKS = 2
STEPS = 2
CLASSES, HIDDEN, LENGTH = 61, 8, 5
OPTIONS: dict[str, Any] = {"k": 5, "b": 1.0}


class Head(nn.Linear):
    """An output layer whose forward is the loss, from logits or fused; whoever shards it gathers it around that."""

    def __init__(self, fused: bool, bias: bool = True, **options: Any) -> None:
        super().__init__(HIDDEN, CLASSES, bias=bias)
        self.fused = fused
        self.options = OPTIONS | options
        self.loss = PRSLoss(**self.options)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        hidden, target = hidden.flatten(0, -2), target.flatten()
        if self.fused:
            return linear_prsl_cross_entropy(hidden, self.weight, target, linear_bias=self.bias, **self.options)
        return self.loss(super().forward(hidden), target)


class Model(nn.Module):
    """Embedding, one layer, and the head with the loss."""

    def __init__(self, fused: bool, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = Head(fused, bias=not tied, **options)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh(), target).mean()


def tokens_and_target(size: int, ignored: int = 0) -> dict[str, Tensor]:
    """A batch for Model; the first few targets are ignored."""
    tokens, target = torch.randint(CLASSES, (2, size, LENGTH)).unbind()
    target.view(-1)[:ignored] = -100
    return {"tokens": tokens, "target": target}


# ---- what the ranks train --------------------------------------------------------------------------------------------


def _gpt2(fused: bool, tied: bool) -> nn.Module:
    import tiny_models  # transformers takes seconds, which only those who want it should wait for

    model = tiny_models.causal(
        "GPT2LMHeadModel", **tiny_models.GPT2, **tiny_models.NO_DROPOUT, tie_word_embeddings=tied
    )()
    apply_prsl(model, **OPTIONS, fused_linear=fused)
    return model.train()


# Every token counts, so the mean over all of them is the mean of the ranks' means; but GPT-2's batch is ragged.
MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "PRSLoss": lambda _: Model(False),
    "linear": Model,
    "linear, a loss for each token": partial(Model, reduction="none"),  # backward needs the matrix again
    "linear, tied": partial(Model, tied=True),
    "GPT-2": partial(_gpt2, tied=False),
    "GPT-2, tied": partial(_gpt2, tied=True),
}


def _layers(model: Any) -> tuple[list[nn.Module], nn.Module]:
    """The blocks and the head."""
    return ([model.body], model.head) if isinstance(model, Model) else (list(model.transformer.h), model.lm_head)


def _sharded(model: nn.Module, head: bool = False, **options: Any) -> nn.Module:
    blocks, last = _layers(model)
    for module in [*blocks, *([last] if head else []), model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)), **options)
    return model


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "FSDP2": _sharded,
    "FSDP2 with a group for the head": partial(_sharded, head=True),
    "FSDP2 in bfloat16": partial(_sharded, mp_policy=BFLOAT16),
    "FSDP2 in bfloat16 with a group for the head": partial(_sharded, head=True, mp_policy=BFLOAT16),
}


def cases() -> Iterator[tuple[str, str]]:
    """The names of a wrapper and a model; a tied matrix cannot be in two groups."""
    for wrapper in WRAPPERS:
        yield from ((wrapper, model) for model in MODELS if not ("group" in wrapper and "tied" in model))


def new_model(name: str, fused: bool = True) -> nn.Module:
    """The same weights each time; with ``fused=False`` the loss is that of logits."""
    torch.manual_seed(0)
    return MODELS[name](fused)


def batches(name: str) -> list[dict[str, Any]]:
    """The whole batch of each step."""
    if "GPT-2" not in name:
        torch.manual_seed(1)
        return [tokens_and_target(2 * RANKS) for _ in range(STEPS)]
    import tiny_models

    inputs = [tiny_models.batch(None, size=2 * RANKS, seed=seed) for seed in range(STEPS)]
    return [{**x, "num_items_in_batch": (x["labels"][:, 1:] != -100).sum()} for x in inputs]


def train(model: nn.Module, inputs: list[dict[str, Any]], ranks: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of some steps, and the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for batch in inputs:
        output = model(**batch)
        # The sum over a rank's tokens is divided by the number of all tokens; and then comes the mean over ranks.
        loss = output if isinstance(output, Tensor) else ranks * output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model = model.module if isinstance(model, DistributedDataParallel) else model
    # The handle of apply_prsl has no part in a state dict, and a sharded parameter is gathered by all ranks.
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
    return losses, {name: p.detach().clone() for name, p in whole.items()}


def part_of(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """A rank's rows."""
    return {name: x if x.dim() == 0 else x.chunk(RANKS)[rank] for name, x in batch.items()}


def sharded_matrix() -> dict[str, Any]:
    """What becomes of a sharded matrix outside of the forward that gathers it."""
    model: Any = _sharded(new_model("linear"), head=True)
    torch.manual_seed(2)
    hidden, target = torch.randn(6, HIDDEN), torch.randint(CLASSES, (6,))
    try:
        linear_prsl_cross_entropy(hidden, model.head.weight, target, **OPTIONS)
        message = ""
    except TypeError as error:
        message = str(error)
    linear_prsl_cross_entropy(hidden, model.head.weight.full_tensor(), target, **OPTIONS).backward()
    return {"message": message, "gradient": model.head.weight.grad.full_tensor(), "hidden": hidden, "target": target}


# ---- the ranks -------------------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path) -> None:
    """Everything that one rank does."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    results: dict[Any, Any] = {"a sharded matrix": sharded_matrix()}
    for wrapper, name in cases():
        model = WRAPPERS[wrapper](new_model(name))
        results[wrapper, name] = train(model, [part_of(batch, rank) for batch in batches(name)], RANKS)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@lru_cache
def results_of_ranks() -> list[dict[Any, Any]]:
    """What each rank has written; they are started once for all the tests."""
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, __file__, folder], capture_output=True, text=True, env=environment, timeout=300
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def main(folder: Path) -> None:
    """Exits with 1 where a rank has failed."""
    import tiny_models  # noqa: F401  (before the fork, so that it is loaded once)

    torch.set_num_threads(1)
    # A fork of a process that has imported everything, and has no threads yet, is the quickest start.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

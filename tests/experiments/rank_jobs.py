"""What each rank of the tests in test_ranks.py does: ``python rank_jobs.py JOB.json``, also under torchrun.

The job is a list of fine-tunings, attacks and transfers with their arguments, done one after the other; `die` says
where and when a rank kills itself, `disagree` which one fails and how, `sharded` that models are split (FSDP). Errors
end it as they end a command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState

from prsl_kernels.experiments import cli, ranks
from prsl_kernels.experiments.attacks.run import attack
from prsl_kernels.experiments.attacks.store import Store
from prsl_kernels.experiments.attacks.transfer import transfer
from prsl_kernels.experiments.config import ArmConfig, AttackConfig, FinetuneConfig
from prsl_kernels.experiments.data import Dataset, Example
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.training.finetune import finetune
from prsl_kernels.experiments.training.trainer import ArmTrainer


def dataset(raw: dict[str, Any]) -> Dataset:
    examples = tuple(
        Example(**{**e, "image": Path(e["image"]), "references": tuple(e["references"])}) for e in raw["examples"]
    )
    return Dataset(**{**raw, "examples": examples})


def do(one: dict[str, Any]) -> None:
    out = Path(one["out"])
    if ranks.is_main():
        out.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    if one["kind"] == "finetune":
        arm, config = ArmConfig(**one["arm"]), FinetuneConfig(**one["config"])
        finetune(one["base"], dataset(one["train"]), dataset(one["select"]), arm, config, out, seed=3, device="cpu")
        return
    config = AttackConfig(**one["config"])
    common: dict[str, Any] = {"task": one["task"], "arm": one["arm"], "seed": 3}
    if one["kind"] == "attack":
        attack(one["model"], dataset(one["test"]), config, out, base_path=one["base"], **common)
    else:
        sources = {name: Path(path) for name, path in one["sources"].items()}
        transfer(one["model"], sources, dataset(one["test"]), config, out, **common)


def arrange_death(rank: int, place: str, count: int) -> None:
    """This rank kills itself in earnest before the `count`-th call of a step or the writing of a part."""
    if ranks.rank() != rank:
        return
    owner, name = (ArmTrainer, "training_step") if place == "step" else (Store, "write_part")
    original, calls = getattr(owner, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def pretend_accelerators() -> None:
    """Has accelerate take the CPUs for accelerators, on which alone it shards a model."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)


def disagree(rank: int, what: str) -> None:
    """One rank fails while the others wait for it."""
    ranks.barrier()
    if ranks.rank() == rank:
        time.sleep(1)
        raise UserError("the 17th image is upside down") if what == "user" else ValueError(what)
    ranks.gather(1)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, cli._terminate)
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("sharded"):
        pretend_accelerators()
    if "die" in job:
        arrange_death(*job["die"])
    try:
        with ranks.together():
            if "disagree" in job:
                disagree(*job["disagree"])
            for one in job["work"]:
                do(one)
        ranks.leave()
    except UserError as error:
        cli._fail(str(error), 1)
    except KeyboardInterrupt:
        cli._fail(ranks.trouble() or "interrupted", 130)


if __name__ == "__main__":
    main()

"""The program that shows the real architectures at work, with few and narrow layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-gpt2", "blip2"])
def test_every_stage_runs(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.real_size", model, "--scale", "tiny", "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    stages = json.loads((tmp_path / "out").read_text())["stages"]
    assert list(stages) == ["build", "finetune", "attack", "generate"]
    assert all(stage["peak_gib"] > 0.1 and stage["seconds"] > 0 for stage in stages.values())
    trained, parameters = stages["finetune"]["trained_parameters"], stages["build"]["parameters"]
    pooler = 64 * 64 + 64  # which no output of ViT-GPT2 depends on
    assert (parameters - trained == pooler) == (model == "vit-gpt2")
    assert trained > 0
    assert stages["attack"]["gradient_norm"] > 0
    assert stages["attack"]["moved"] == pytest.approx(2, abs=0.01), "levels of 8 bits: the step of the attack"

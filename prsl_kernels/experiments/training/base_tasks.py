"""The two tasks of the shipped bases: the data in memory, the loss of a step, and the scores of a model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from prsl_kernels.experiments.data import Dataset, Example, load_dataset, load_pixels
from prsl_kernels.experiments.data.base import Split, Task
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_blip2, tiny_vit_gpt2
from prsl_kernels.experiments.models.prompted import Blip2
from prsl_kernels.experiments.models.tiny import IMAGE_SIZE

_PREPROCESSING = Preprocessing(IMAGE_SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_EVALUATION_BATCH = 256
BLANK = 0.5  # a grey image: what a model says of it, it says without looking


class BaseTask(nn.Module):
    """A model in training. Everything random in a step follows from `seed` and the step's number, so it can resume."""

    task: ClassVar[Task]
    dataset: ClassVar[str]
    default_steps: ClassVar[int]
    recipe: ClassVar[dict[str, Any]]
    wrapper: VisionLanguageModel

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        self.seed = seed
        self.steps = steps
        self.train_set = load_dataset(self.dataset, "train")

    def loss(self, step: int) -> Tensor:
        """The loss of step `step`, a scalar."""
        raise NotImplementedError

    def phases(self) -> list[int]:
        """Lengths in steps of the parts of the training; each has its own warm-up and its own decay."""
        return [self.steps]

    def score(self, split: Split, limit: int | None = None) -> dict[str, Any]:
        """Scores on a split, and those of the same model with the images replaced by a grey one ("blank")."""
        data = load_dataset(self.dataset, split, limit=limit)
        pixels = load_images(data.examples)
        return {
            "split": split,
            "examples": len(data.examples),
            "image": self.metrics(data.examples, self.answer(data.examples, pixels)),
            "blank": self.metrics(data.examples, self.answer(data.examples, None)),
        }

    def answer(self, examples: Sequence[Example], pixels: dict[str, Tensor] | None) -> list[str]:
        """What the model says of each example, in float32; with `pixels` None, of grey images."""
        texts: list[str] = []
        for start in range(0, len(examples), _EVALUATION_BATCH):
            batch = examples[start : start + _EVALUATION_BATCH]
            if pixels is None:
                images = torch.full((len(batch), 3, IMAGE_SIZE, IMAGE_SIZE), BLANK)
            else:
                images = torch.stack([pixels[str(example.image)] for example in batch]).float() / 255
            texts += self.wrapper.generate(images, questions(batch))
        return texts

    def metrics(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        """Scores by name."""
        raise NotImplementedError


class Captions(BaseTask):
    """ViT-GPT2 on OpenMoji."""

    task = "captions"
    dataset = "openmoji"
    default_steps = 7500
    recipe: ClassVar[dict[str, Any]] = {
        "batch": 64,
        "peak learning rate": 1e-3,
        "weight decay": 0.1,
        "warm-up steps": 100,
        "sampling": "a drawing with a skin tone twice as often as one without",
        "augmentation": "scale 0.9 to 1.1, shift up to 3 pixels",
    }

    def __init__(self, seed: int, steps: int, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(seed, steps)
        self.wrapper = VisionLanguageModel(tiny_vit_gpt2(tokenizer), tokenizer, _PREPROCESSING)
        self.model = self.wrapper.model
        self.images = load_images(self.train_set.examples)
        # What is to be learnt beyond names is combinations, and two thirds of the drawings are single things
        self.pool = [e for e in self.train_set.examples for _ in range(1 if e.group == "plain" else 2)]
        self._epoch: tuple[int, list[int]] = (-1, [])

    def loss(self, step: int) -> Tensor:
        batch = self._batch(step)
        pixels = torch.stack([self.images[str(example.image)] for example in batch]).float() / 255
        # The first reference is the shortest name; the others name the same drawing
        text = self.wrapper.encode([example.references[0] for example in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = self.wrapper.logits(jitter(pixels), text)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def metrics(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        overlap = []
        for example, text in zip(examples, texts, strict=True):
            exact = float(text in example.references)
            for group in ("all", example.group):
                groups.setdefault(group, []).append(exact)
            overlap.append(max(word_f1(text, reference) for reference in example.references))
        scores = {f"exact match, {group}": sum(values) / len(values) for group, values in sorted(groups.items())}
        return scores | {"word F1": sum(overlap) / len(overlap)}

    def _batch(self, step: int) -> list[Example]:
        size = self.recipe["batch"]
        epoch, position = divmod(step, len(self.pool) // size)
        if self._epoch[0] != epoch:
            order = list(range(len(self.pool)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return [self.pool[index] for index in self._epoch[1][position * size : (position + 1) * size]]


class VisualQuestions(BaseTask):
    """BLIP2-OPT on easy-VQA: first eyes, then answers, as BLIP-2 itself starts from a trained vision encoder."""

    task = "vqa"
    dataset = "easy-vqa"
    default_steps = 4000
    recipe: ClassVar[dict[str, Any]] = {
        "images per step": 64,
        "questions per image": 4,
        "peak learning rate": 1e-3,
        "weight decay": 0.05,
        "warm-up steps": 100,
        "augmentation": "shift up to 3 pixels",
        "first phase (a quarter of the steps)": "linear probes of the vision encoder and of the Q-Former learn colour "
        "and shape; the language model rests",
        "second phase": "answers; the share of yes/no questions grows from 30 to 70 %; the probes go on at weight 0.3",
        "sampling": "of a question that is asked of several images each answer equally often",
    }

    def __init__(self, seed: int, steps: int, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(seed, steps)
        self.wrapper = VisionLanguageModel(tiny_blip2(tokenizer), tokenizer, _PREPROCESSING)
        self.model = self.wrapper.model
        self.images = load_images(self.train_set.examples)
        self.by_image: dict[str, list[Example]] = {}
        for example in self.train_set.examples:
            self.by_image.setdefault(str(example.image), []).append(example)
        self.names = list(self.by_image)
        self.weights = _balance(self.train_set.examples)
        self.classes = {
            group: sorted({e.references[0] for e in self.train_set.examples if e.group == group})
            for group in ("color", "shape")
        }
        vision, queries = self.model.config.vision_config.hidden_size, self.model.config.qformer_config.hidden_size
        self.probes = nn.ModuleDict(
            {
                f"{group}_{place}": nn.Linear(width, len(names))
                for group, names in self.classes.items()
                for place, width in (("vision", vision), ("queries", queries))
            }
        )

    def phases(self) -> list[int]:
        return [self.steps // 4, self.steps - self.steps // 4]

    def loss(self, step: int) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        names = rng.sample(self.names, self.recipe["images per step"])
        pixels = torch.stack([self.images[name] for name in names]).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            pixel_values = self.wrapper.normalize(jitter(pixels, scale=0.0))
            features = self.model.get_image_features(pixel_values, return_dict=True)
            probes = self._probe_loss(names, features)
            first = self.phases()[0]
            if step < first:
                return probes
            share = 0.3 + 0.4 * min(1.0, 2 * (step - first) / max(1, self.steps - first))
            return self._answer_loss(names, features, share, rng) + 0.3 * probes

    def metrics(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for example, text in zip(examples, texts, strict=True):
            for group in ("all", example.group):
                groups.setdefault(group, []).append(float(text in example.references))
        return {f"accuracy, {group}": sum(values) / len(values) for group, values in sorted(groups.items())}

    def _probe_loss(self, names: Sequence[str], features: Any) -> Tensor:
        """Cross entropy of colour and shape from the mean patch and from the mean query, over the known labels."""
        states = {
            "vision": features.vision_outputs.last_hidden_state[:, 1:].mean(1),
            "queries": features.qformer_outputs.last_hidden_state.mean(1),
        }
        total = torch.zeros(())
        for group, classes in self.classes.items():
            known = [
                (index, classes.index(example.references[0]))
                for index, name in enumerate(names)
                for example in self.by_image[name]
                if example.group == group
            ]
            if not known:
                continue
            index, target = torch.tensor(known).unbind(1)
            for place, state in states.items():
                total = total + F.cross_entropy(self.probes[f"{group}_{place}"](state[index]).float(), target)
        return total / 4

    def _answer_loss(self, names: Sequence[str], features: Any, share: float, rng: random.Random) -> Tensor:
        """Cross entropy of the answers to several questions on each image, which is encoded only once."""
        chosen: list[Example] = []
        repeats = self.recipe["questions per image"]
        for name in names:
            available = self.by_image[name]
            yes_no = [example for example in available if example.group == "yes/no"]
            others = [example for example in available if example.group != "yes/no"]
            for _ in range(repeats):
                pool = (yes_no if rng.random() < share else others) or available
                chosen += rng.choices(pool, [self.weights[example.id] for example in pool])
        text = self.wrapper.encode([e.references[0] for e in chosen], questions(chosen))
        # The same rows for all questions of an image: the gradient adds up over them
        features.pooler_output = features.pooler_output.repeat_interleave(repeats, 0)
        family = cast(Blip2, self.wrapper.family)
        logits, targets = family.logits_of(text, pixel_values=None, mm_encoder_outputs={"image": features})
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _balance(examples: Sequence[Example]) -> dict[str, float]:
    """Weights by id under which a question, drawn over all images, does not betray its answer.

    "is there a red shape?" is answered "no" seven times in eight: a model stays for long with what the text alone
    gives, and colours are never compared.
    """
    asked = Counter(example.question for example in examples)
    answered = Counter((example.question, example.references) for example in examples)
    answers = Counter(question for question, _ in answered)
    return {e.id: asked[e.question] / (answers[e.question] * answered[e.question, e.references]) for e in examples}


TASKS: dict[str, type[Captions] | type[VisualQuestions]] = {"captions": Captions, "vqa": VisualQuestions}


def questions(examples: Sequence[Example]) -> list[str] | None:
    """The questions of a batch, or None for captions."""
    texts = [example.question for example in examples if example.question is not None]
    return texts if len(texts) == len(examples) else None


def load_images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Each image once, by its path, as uint8 (3, 64, 64): all of a task's fit in some 60 MB."""
    paths = sorted({example.image for example in examples})
    pixels = (load_pixels(paths, IMAGE_SIZE) * 255).round().to(torch.uint8)
    return {str(path): image for path, image in zip(paths, pixels, strict=True)}


def jitter(pixels: Tensor, *, scale: float = 0.1, shift: float = 3.0) -> Tensor:
    """Random scale and shift (in pixels) of each image; what comes in from outside is the colour of its corner.

    No mirroring: names tell left from right. Colours stay: names tell them.
    """
    count, _, height, width = pixels.shape
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.empty(count).uniform_(1 - scale, 1 + scale)
    matrix[:, :, 2] = torch.empty(count, 2).uniform_(-1, 1) * (2 * shift / torch.tensor([width, height]))
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    corner = pixels[:, :, :1, :1]
    return F.grid_sample(pixels - corner, grid, align_corners=False) + corner


def word_f1(candidate: str, reference: str) -> float:
    """F1 of the two bags of words."""
    left, right = Counter(candidate.split()), Counter(reference.split())
    common = sum((left & right).values())
    return 2 * common / (sum(left.values()) + sum(right.values())) if common else 0.0


def describe(data: Dataset) -> str:
    """Licence and attribution for a model card."""
    return f"{data.name}: {data.license}. {data.attribution}"

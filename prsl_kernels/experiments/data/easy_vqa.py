"""Questions about one coloured shape in a picture: easy-VQA (MIT), 5,000 images, 48,248 questions, 13 answers."""

from __future__ import annotations

from pathlib import Path

from prsl_kernels.experiments.data.base import Example, Split, rank
from prsl_kernels.experiments.data.packages import package_files
from prsl_kernels.experiments.files import read_json

SELECTION_IMAGES = 400
DESCRIPTION = (
    "easy-VQA: questions about the colour, the shape and the presence of one shape in a 64-pixel image. test is the "
    f"package's own test split; select holds all questions of {SELECTION_IMAGES} of the package's training images, "
    "train those of the others, so no image is in two splits."
)


def question_type(question: str) -> str:
    """Says "color", "shape" or "yes/no"."""
    if not question.startswith("what"):
        return "yes/no"
    return "color" if "color" in question else "shape"


def load(split: Split) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """The examples of a split in the order of the package, and the SHA-256 of each one's image."""
    root, checksums = package_files("easy-vqa")
    train, test = (_questions(root, source) for source in ("train", "test"))
    images = sorted({image for _, _, image in train}, key=lambda image: rank("easy-vqa/select", str(image)))
    selected = set(images[:SELECTION_IMAGES])
    examples, hashes = [], []
    for number, (question, answer, image) in enumerate(train + test):
        source = "train" if number < len(train) else "test"
        if split != ("test" if source == "test" else "select" if image in selected else "train"):
            continue
        file = f"easy_vqa/data/{source}/images/{image}.png"
        hashes.append(checksums[file])
        examples.append(Example(f"q{number:05d}", root / file, (answer,), question, question_type(question)))
    return tuple(examples), tuple(hashes)


def _questions(root: Path, source: str) -> list[tuple[str, str, int]]:
    return [
        (question, answer, int(image))
        for question, answer, image in read_json(root / "easy_vqa" / "data" / source / "questions.json")
    ]

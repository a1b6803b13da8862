"""Folders of the exact published layouts, generated, with the defects that the published sets are known for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from prsl_kernels.experiments.files import cache_root


def own_cache(root: Path) -> Path:
    """A cache for one test, which shares the packages and the rendered drawings with the machine's."""
    here = root / "cache"
    here.mkdir()
    for name in ("packages", "openmoji-17.0.0-64px"):
        if (cache_root() / name).exists():
            (here / name).symlink_to(cache_root() / name)
    return here


def jpeg(path: Path, colour: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 32), (colour * 37 % 256, colour * 11 % 256, 99)).convert(mode)
    image.save(path, format="PNG" if path.suffix.casefold() == ".png" else "JPEG")
    return path


def truncate(path: Path) -> None:
    """What an interrupted download leaves."""
    image = Image.effect_noise((200, 200), 80).convert("RGB")
    image.save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-4000])


def litter(root: Path) -> None:
    """What Windows and macOS leave in every folder."""
    for folder in [root, *(each for each in root.rglob("*") if each.is_dir())]:
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "._000.jpg").write_bytes(b"\0\x05\x16\x07")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._x.jpg").write_bytes(b"\0")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def coco(root: Path, train: int = 60, val: int = 12, captions: int = 5) -> Path:
    """COCO 2017: annotations in no order, image ids from 1 (train) and from 1001 (val)."""
    for part, numbers in (("train2017", range(1, train + 1)), ("val2017", range(1001, 1001 + val))):
        images = [
            {"license": 4, "file_name": f"{n:012d}.jpg", "coco_url": "http://x", "height": 32, "width": 40, "id": n}
            for n in numbers
        ]
        annotations = [
            {"image_id": n, "id": turn * 10_000 + n, "caption": f"caption {turn} of image {n}."}
            for turn in range(captions)
            for n in reversed(numbers)
        ]
        for n in numbers:
            jpeg(root / part / f"{n:012d}.jpg", n)
        content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
        write(root / "annotations" / f"captions_{part}.json", content)
    return root


def edit(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def visual_genome(root: Path, images: int = 60) -> Path:
    """Visual Genome: three questions an image, odd ids in VG_100K, even ones in VG_100K_2; every second is COCO's."""
    entries, facts = [], []
    for n in range(1, images + 1):
        jpeg(root / ("VG_100K" if n % 2 else "VG_100K_2") / f"{n}.jpg", n)
        qas = [
            {"a_objects": [], "question": question, "image_id": n, "qa_id": n * 10 + turn, "answer": answer}
            for turn, (question, answer) in enumerate(
                (("What is it?", f"Thing {n}."), ("Where is it?", "On the table."), ("Is it red?", "Yes"))
            )
        ]
        entries.append({"id": n, "qas": list(reversed(qas))})
        url = f"https://cs.stanford.edu/people/rak248/VG_100K/{n}.jpg"
        coco_id = 1000 + n // 2 if n % 2 == 0 else None
        facts.append({"image_id": n, "url": url, "width": 40, "height": 32, "coco_id": coco_id, "flickr_id": None})
    write(root / "question_answers.json", entries)
    write(root / "image_data.json", facts)
    return root


def natural_images(root: Path, each: int = 3) -> Path:
    for place, name in enumerate(("airplane", "car", "cat", "dog", "flower", "fruit", "motorbike", "person")):
        for n in range(each):
            jpeg(root / name / f"{name}_{n:04d}.jpg", place * each + n)
    return root

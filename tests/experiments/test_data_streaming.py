"""Large sets: what stays in memory, and a sequence that behaves as a tuple of examples does."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folders import jpeg, own_cache, write

from prsl_kernels.experiments.config import DataConfig
from prsl_kernels.experiments.data import Example, cache, index, load_dataset, scratch, table
from prsl_kernels.experiments.data.base import rank, subset
from prsl_kernels.experiments.data.table import BATCH, Row, Table, TableExamples, write_table


def by_sorting(examples: list[Example], limit: int, seed: int) -> tuple[Example, ...]:
    """The rule of a stratified subset, written with sorted objects."""
    shuffled = sorted(examples, key=lambda example: rank(seed, example.id))
    seen: Counter[Path] = Counter()
    turns: Counter[tuple[int, str]] = Counter()
    order = []
    for position, example in enumerate(shuffled):
        visit = seen[example.image]
        order.append((visit, turns[visit, example.group], position))
        seen[example.image] += 1
        turns[visit, example.group] += 1
    return tuple(shuffled[position] for _, _, position in sorted(order)[:limit])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from("abc")), max_size=40), st.integers(1, 50), st.integers(0, 9)
)
def test_subsets_follow_the_rule(pairs: list[tuple[int, str]], limit: int, seed: int) -> None:
    examples = [
        Example(f"e{place}", Path(f"{image}.png"), ("x",), "?", group) for place, (image, group) in enumerate(pairs)
    ]
    assert subset(examples, limit, seed, stratify=True) == by_sorting(examples, limit, seed)
    shuffled = sorted(examples, key=lambda example: rank(seed, example.id))
    assert subset(examples, limit, seed, stratify=False) == tuple(shuffled[:limit])


def test_a_table_behaves_as_a_tuple_of_examples(tmp_path: Path) -> None:
    count = BATCH + 50
    rows = [Row(f"r{n}", f"{n // 3}.jpg", n, (f"a {n}",), "train", None, "g") for n in range(count)]
    counts = write_table(tmp_path / "rows.arrow", rows)
    assert counts["train"] == {"examples": count, "references": count, "questions": 0, "images": 1382, "absent": 0}
    expected = [Example(row.id, Path("/i") / row.image, row.references, None, "g") for row in rows]
    order = np.arange(count)[::-1]
    for examples, wanted in (
        (TableExamples(Table(tmp_path / "rows.arrow"), Path("/i"), np.arange(count)), expected),
        (TableExamples(Table(tmp_path / "rows.arrow"), Path("/i"), order), expected[::-1]),
    ):
        assert len(examples) == count
        assert list(examples) == wanted
        assert [examples[0], examples[-1], examples[BATCH]] == [wanted[0], wanted[-1], wanted[BATCH]]
        assert list(examples[BATCH - 2 : BATCH + 2]) == wanted[BATCH - 2 : BATCH + 2]
        assert list(examples[5:1:-2]) == wanted[5:1:-2]
        assert list(examples[:0]) == []
        assert wanted[7] in examples
        assert list(pickle.loads(pickle.dumps(examples[:4]))) == wanted[:4]
        with pytest.raises(IndexError):
            examples[count]
    with pytest.raises(AttributeError):
        expected[0].id = "x"  # type: ignore[misc]


def large_coco(root: Path, images: int) -> Path:
    """`images` links to one picture, with five captions each."""
    picture = jpeg(root / "val2017" / "picture.jpg")
    names = [f"{n:012d}.jpg" for n in range(images)]
    for name in names:
        os.link(picture, root / "val2017" / name)
    captions = [
        {"image_id": n, "id": 5 * n + turn, "caption": f"image {n} as annotator {turn} sees it, in some words"}
        for turn in range(5)
        for n in range(images)
    ]
    content = {"images": [{"id": n, "file_name": name} for n, name in enumerate(names)], "annotations": captions}
    write(root / "annotations" / "captions_val2017.json", content)
    return root


def peak(root: Path) -> int:
    """Bytes that Python and Arrow hold at most, while the set is indexed, drawn from and read to its end."""
    gc.collect()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    data = load_dataset(DataConfig("coco", path=str(root)), "test")
    limited = load_dataset(DataConfig("coco", path=str(root)), "test", limit=20)
    assert len(limited.examples) == 20
    assert sum(len(example.references) for example in data.examples) == 5 * len(data.examples)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest + max(pa.total_allocated_bytes() - before, 0)


def in_small_blocks(path: Path) -> str:
    """SHA-256 of a file; the package's own reads it by the megabyte, which would hide everything else here."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(4096):
            digest.update(block)
    return digest.hexdigest()


def test_memory_does_not_grow_with_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,200 images more, each with five captions, a few numbers stay; as objects each would take 1,500 bytes.

    Blocks are made small, so that these are many of them, as a large set is of those of their real size.
    """
    monkeypatch.setenv("PRSL_CACHE", str(own_cache(tmp_path)))
    for module, name in ((table, "BATCH"), (index, "_BLOCK"), (scratch, "_CHUNK")):
        monkeypatch.setattr(module, name, 32)
    monkeypatch.setattr(cache, "sha256", in_small_blocks)
    peaks = {count: peak(large_coco(tmp_path / str(count), count)) for count in (50, 300, 1_500)}
    assert (peaks[1_500] - peaks[300]) / 1_200 < 200, peaks

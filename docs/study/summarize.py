"""Copies of a finished run what is worth publishing: its rows without images or weights, its numbers, some figures.

    python docs/study/summarize.py runs/study docs/study \\
      captions-tradeoff vqa-tradeoff captions-grid vqa-grid captions-seeds vqa-seeds

`<to>/run` is a run directory again, as `prsl compare` reads it and as `build_report` computes the report from it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.files import atomic_directory

PLAIN = (
    "recipe.yaml", "run.json", "headline.txt", "*/choice.json", "*/evaluate/versions.json", "grid/recipe.yaml",
    "*/finetune/*/*/arm.json", "*/finetune/*/*/train.jsonl", "*/finetune/*/*/preprocessor_config.json",
    "grid/*/finetune/*/*/arm.json",
)  # fmt: skip
TABLES = ("*/attack/*/*/*.parquet", "*/transfer/*/*/*.parquet", "*/evaluate/*.parquet", "grid/*/evaluate/*.parquet")


def summarize(run: Path, to: Path, figures: Sequence[str]) -> None:
    """Replaces `to/run`, `to/evidence`, `to/tables` and `to/figures` by what `run` has of them."""
    with atomic_directory(to / "run") as folder:
        _copy(run, folder, PLAIN, shutil.copyfile)
        _copy(run, folder, TABLES, _without_images)
    for name, patterns in (("evidence", ["*.json"]), ("tables", ["*.csv"]), ("figures", [f"{n}.svg" for n in figures])):
        with atomic_directory(to / name) as folder:
            _copy(run / name, folder, patterns, shutil.copyfile)


def _copy(source: Path, target: Path, patterns: Sequence[str], copy: Callable[[Path, Path], object]) -> None:
    for pattern in patterns:
        files = sorted(source.glob(pattern))
        if not files:
            raise SystemExit(f"{source}: has no {pattern}; finish the run with `prsl run`, or name another figure")
        for file in files:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy(file, place)


def _without_images(source: Path, target: Path) -> None:
    table = pq.read_table(source)
    for name in ("png", "image"):
        if name in table.column_names:
            field = table.schema.field(name)
            table = table.set_column(table.column_names.index(name), field, pa.nulls(table.num_rows, field.type))
    pq.write_table(table, target, compression="zstd", compression_level=19)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("figures", nargs="*", help="names of figures, without .svg")
    asked = parser.parse_args()
    summarize(asked.run, asked.to, asked.figures)

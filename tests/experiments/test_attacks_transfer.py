"""Images of one arm shown to another, and the slice through the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from stand_in import (  # noqa: F401
    CONFIG,
    SIZE,
    StandIn,
    attack_fixture,
    dataset_fixture,
    make_dataset,
    models_fixture,
)

from prsl_kernels.experiments.attacks import TextObjective, run
from prsl_kernels.experiments.attacks.store import SCHEMA
from prsl_kernels.experiments.attacks.transfer import transfer
from prsl_kernels.experiments.config import AttackConfig, ExtraAttack, SurfaceConfig, TransferConfig
from prsl_kernels.experiments.data import Dataset, decode_png, load_pixels
from prsl_kernels.experiments.errors import UserError

pytestmark = pytest.mark.usefixtures("_single_thread")

STRONG = replace(
    CONFIG,
    extra=(ExtraAttack("strong", "pgd", objective="margin", reference="secondary", rounds=(2, 6)),),
    transfer=TransferConfig("strong", images=6),
)


def shown(dataset: Dataset, out: Path, sources: dict[str, Path], config: AttackConfig = STRONG) -> list[dict[str, Any]]:
    path = transfer("other", sources, dataset, config, out, task="captions", arm="other", seed=7)
    assert path == out / "outputs.parquet"
    table = pq.read_table(path)
    assert table.schema.remove_metadata() == SCHEMA
    return table.to_pylist()


def test_the_images_of_the_last_round_are_shown_to_the_other_arms(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset, tmp_path: Path
) -> None:
    made = {path: attack(path, config=STRONG, out=tmp_path / path, arm=path) for path in ("arm", "base")}
    kept = {path: {row["id"]: row for row in rows if row["png"] is not None} for path, rows in made.items()}
    for path, rows in kept.items():
        assert list(rows) == [f"e-{index}" for index in range(6)]
        assert {(row["attack"], row["round"]) for row in rows.values()} == {("strong", 6)}
        for name, row in rows.items():  # the image that the recorded text is about
            pixels = decode_png(row["png"])[None]
            assert models[path].eval().generate(pixels) == [row["text"]]
            clean = load_pixels([next(e.image for e in dataset.examples if e.id == name)], SIZE)
            assert (pixels - clean).abs().max().item() == pytest.approx(row["linf"], abs=1e-7)
    rows = shown(dataset, tmp_path / "shown", {path: tmp_path / path / "outputs.parquet" for path in made})
    ids = [f"e-{index}" for index in range(6)]
    assert [(row["attack"], row["source"], row["id"]) for row in rows] == [
        (f"transfer-from-{path}", path, name) for path in made for name in ids
    ]
    for row in rows:
        source = kept[row["source"]][row["id"]]
        pixels = decode_png(source["png"])[None]
        assert (row["arm"], row["seed"], row["role"], row["method"], row["round"]) == ("other", 7, "transfer", "pgd", 6)
        assert (row["objective"], row["reference"], row["target"], row["png"]) == ("ce", "primary", None, None)
        assert [row[key] for key in ("references", "linf", "l2", "eps", "step", "norm", "group")] == [
            source[key] for key in ("references", "linf", "l2", "eps", "step", "norm", "group")
        ]
        assert row["text"] == models["other"].eval().generate(pixels)[0]
        objective = TextObjective(models["other"], models["other"].encode([row["references"][0]]))  # type: ignore[arg-type]
        assert row["objective_value"] == pytest.approx(objective(pixels).item(), rel=1e-4)
        assert row["gradient_norm"] is row["zero_gradient_share"] is None


def test_the_base_words_of_images_without_references_go_along(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    bare = make_dataset(tmp_path / "bare", references=False)
    config = replace(CONFIG, transfer=TransferConfig("bim", images=64))
    attack("arm", bare, config, out=tmp_path / "arm")
    rows = shown(bare, tmp_path / "shown", {"arm": tmp_path / "arm" / "outputs.parquet"}, config)
    said = models["base"].eval().generate(load_pixels([example.image for example in bare.examples], SIZE))
    assert [row["references"] for row in rows] == [[text] for text in said]


def test_tables_without_the_images_are_named(attack: Callable[..., Any], dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nosuch.parquet: cannot be read .* run `prsl attack` again"):
        shown(dataset, tmp_path / "shown", {"arm": tmp_path / "nosuch.parquet"})
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"broken.parquet: cannot be read"):
        shown(dataset, tmp_path / "shown", {"arm": broken})
    attack(config=replace(STRONG, transfer=None), out=tmp_path / "without")
    with pytest.raises(UserError, match=r"outputs.parquet: has no transferable image of 'e-0'"):
        shown(dataset, tmp_path / "shown", {"arm": tmp_path / "without" / "outputs.parquet"})
    attack(config=STRONG, out=tmp_path / "fewer")
    more = replace(STRONG, transfer=TransferConfig("strong", images=7))
    with pytest.raises(UserError, match=r"no transferable image of 'e-6'"):
        shown(dataset, tmp_path / "shown", {"arm": tmp_path / "fewer" / "outputs.parquet"}, more)
    table = pq.read_table(tmp_path / "fewer" / "outputs.parquet")
    torn = [None if png is None else png[:-30] for png in table.column("png").to_pylist()]
    pq.write_table(
        table.set_column(table.schema.get_field_index("png"), SCHEMA.field("png"), [torn]), tmp_path / "torn.parquet"
    )
    with pytest.raises(UserError, match="stored image cannot be read"):
        shown(dataset, tmp_path / "shown", {"arm": tmp_path / "torn.parquet"})
    assert not (tmp_path / "shown" / "outputs.parquet").exists()


@pytest.mark.parametrize("points", [3, 4, 11])
def test_the_slice_is_what_one_by_one_evaluation_gives(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset, tmp_path: Path, points: int
) -> None:
    rows = attack(config=replace(CONFIG, surface=SurfaceConfig(images=6, points=points)))
    found = pq.read_table(tmp_path / "out" / "surface.parquet").to_pandas()
    assert set(found["id"]) == {f"e-{index}" for index in range(6)}
    assert len(found) == 6 * points**2
    assert set(zip(found["arm"], found["seed"], strict=True)) == {("ce", 7)}
    places = sorted(found["a"].unique())
    assert places == sorted(found["b"].unique()) == [-place for place in places[::-1]]
    assert places == pytest.approx([2 * index / (points - 1) - 1 for index in range(points)])
    assert (0.0 in places) == (points % 2 == 1)
    signs = set()
    for example in dataset.examples[:6]:
        objective = TextObjective(models["arm"], models["arm"].encode([example.references[0]]))  # type: ignore[arg-type]
        clean = load_pixels([example.image], SIZE)
        leaf = clean.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        generator = torch.Generator().manual_seed(run._seed(7, "surface", example.id))
        aside = 2.0 * torch.randint(0, 2, (3, SIZE, SIZE), generator=generator) - 1
        signs.add(aside.sum().item())
        assert set(aside.unique().tolist()) == {-1, 1}
        for _, (a, b, value) in found[found["id"] == example.id][["a", "b", "value"]].iterrows():
            image = (clean + 8 / 255 * (a * gradient.sign() + b * aside)).clamp(0, 1)
            assert value == pytest.approx(objective(image).item(), rel=1e-3, abs=1e-5)
    assert len(signs) > 1
    if points % 2:
        middle = found[(found["a"] == 0) & (found["b"] == 0)].set_index("id")["value"].to_dict()
        clean_rows = {row["id"]: row["objective_value"] for row in rows if (row["attack"], row["round"]) == ("bim", 0)}
        assert middle == pytest.approx({name: clean_rows[name] for name in middle}, rel=1e-5)

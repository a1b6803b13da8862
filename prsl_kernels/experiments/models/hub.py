"""Checkpoints by their name on the Hugging Face Hub, looked for on this machine's disk alone: nothing is downloaded."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from prsl_kernels.experiments.errors import UserError

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
# All that a checkpoint needs here; its pickles, which could run code, and copies for other frameworks stay where
# they are.
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
# Repositories whose main branch has only pickled weights, as their lists of files said in 2025, and what reads them
_PICKLED = {
    "nlpconnect/vit-gpt2-image-captioning": "VisionEncoderDecoderModel",
    "microsoft/deberta-xlarge-mnli": "AutoModel",
}
_FOLDER = "FOLDER"


def is_hub_name(path: str | Path) -> bool:
    """Whether this has the form "owner/name" or "owner/name@revision"; a folder of that path goes first."""
    return isinstance(path, str) and _NAME.fullmatch(path) is not None


def snapshot(name: str) -> Path:
    """The folder of a downloaded checkpoint in the Hub's cache.

    Raises:
        UserError: it was not downloaded, or without its configuration or its weights; the message has the command.
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    repository, revision = match["repository"], match["revision"]
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{name}: neither a local folder nor among the models downloaded to {constants.HF_HUB_CACHE}; "
            f"{how_to_get(repository, revision)}"
        ) from None
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        lacks = "safetensors" if (folder / "config.json").is_file() else "config.json"
        raise UserError(
            f"{name}: the download in {folder} is not complete, it has no {lacks}; {how_to_get(repository, revision)}"
        )
    return folder


def local_folder(name: str) -> Path:
    """A folder by its path, or that of a download by its name on the Hub.

    Raises:
        UserError: as `snapshot`.
    """
    folder = Path(name)
    return snapshot(name) if is_hub_name(name) and not folder.is_dir() else folder


def how_to_get(repository: str, revision: str | None = None) -> str:
    """What to type to have a checkpoint on this machine with its weights as safetensors."""
    if repository in _PICKLED and revision is None:
        files = [pattern for pattern in _FILES if pattern != "*.safetensors"] + ["*.bin"]
        return (
            "its main branch has only pickled weights: "
            f"`{_download(repository, None, files)} --local-dir {_FOLDER}` and then "
            f"`{conversion(_FOLDER, _PICKLED[repository])}` give {_FOLDER} safetensors, and its path is given in place "
            "of the name; or, where a pull request on its page adds "
            f"model.safetensors, give {repository}@refs/pr/NUMBER"
        )
    return (
        f"run `{_download(repository, revision, _FILES)}` (where that finds no *.safetensors, the revision has none: "
        f"give another one as {repository}@REVISION, or download its *.bin to a folder and convert them)"
    )


def conversion(folder: str | Path, architecture: str = "VisionEncoderDecoderModel") -> str:
    """The shell command that adds safetensors to a folder with pickled weights, of which it reads tensors alone."""
    place = json.dumps(str(folder))
    code = (
        f"from transformers import {architecture} as Model; "
        f"Model.from_pretrained({place}, weights_only=True).save_pretrained({place})"
    )
    return f"python -c {shlex.quote(code)}"


def _download(repository: str, revision: str | None, files: tuple[str, ...] | list[str]) -> str:
    parts = ["hf", "download", repository]
    if revision is not None:
        parts += ["--revision", revision]
    for pattern in files:
        parts += ["--include", pattern]
    return shlex.join(parts)

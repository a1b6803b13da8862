"""BERTScore F1 on a local encoder, by the bert-score package's own tokenization, embedding and matching.

Three things of the package are done differently, because bert-score 0.3.13 cannot do them under transformers 5 or
without a network: the encoder is loaded from a folder, from safetensors only, by its configuration's type (the package
looks for "t5" in the path); the tokenizer's `model_max_length` is bounded, where an unset one overflows; and a blank
text scores 0 without being tokenised, since the package calls a method for it that tokenizers no longer have.

Scores are raw, without rescaling to a baseline: unrelated sentences score well above 0, and how far depends on encoder
and layer. Compare with random pairs before reading anything into a value.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bert_score import utils as bert_score_utils
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel
from transformers.utils import logging as transformers_logging

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.metrics.text import one_line

PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
# The layer that bert-score's authors found best for every 6-layer BERT of their table.
PACKAGED_LAYERS = 5
_MAXIMUM_TOKENS = 512
# Pairs are scored in blocks: the package holds the embeddings of all sentences of one call together.
_BLOCK = 4096

Pair = tuple[str, str]


class _Sentence(str):
    """A text whose hash is the same in every process.

    The package batches a set of texts in the order that their hashes give, and a text's last bits depend on the batch.
    """

    def __hash__(self) -> int:
        return zlib.crc32(self.encode("utf-8", "surrogatepass"))


class BertScore:
    """Scores pairs of sentences; each distinct pair is computed once and kept. Not safe for use by several threads."""

    def __init__(self, folder: Path | None = None, num_layers: int | None = None, *, device: str = "cpu") -> None:
        """Loads the first `num_layers` layers of the encoder in `folder`; without a folder, the packaged MiniLM.

        Args:
            folder: a model folder with `config.json`, a tokenizer and safetensors weights.
            num_layers: the layer whose output is compared; may be left out for the packaged encoder, and where the
                folder is named like a model for which bert-score knows the best layer ("t5-base",
                "microsoft/deberta-xlarge-mnli").
            device: where the encoder runs.

        Raises:
            UserError: no such folder, not a safetensors model, a layer that it does not have, or none given.
        """
        if folder is None:
            from prsl_kernels.experiments.data.packages import encoder_directory

            folder, name = encoder_directory(), PACKAGED_NAME
            num_layers = PACKAGED_LAYERS if num_layers is None else num_layers
        else:
            name = str(folder)
        weights = _weights(folder)
        self.num_layers = _known_layers(folder) if num_layers is None else num_layers
        self.device = device
        self.name = name
        self._tokenizer, self._model = _load(folder, self.num_layers)
        self._model.to(device).eval()
        self._sha256 = _digest(weights)
        self._scores: dict[Pair, float] = {}

    @property
    def version(self) -> str:
        """What the scores depend on: package, encoder, its checksum and the layer."""
        from importlib import metadata

        return (
            f"bert-score {metadata.version('bert-score')}, raw F1 without idf, {self.name} "
            f"(sha256 {self._sha256}), layer {self.num_layers}, transformers {metadata.version('transformers')}"
        )

    def add(self, pairs: Sequence[Pair], *, together: bool = False) -> None:
        """Computes the scores of those (candidate, reference) pairs that are not known yet.

        Ranks that call it `together`, with the same pairs, share the blocks, which are those of one process.
        """
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._scores]
        blank = [pair for pair in new if not (pair[0].strip() and pair[1].strip())]
        self._scores.update(dict.fromkeys(blank, 0.0))
        # The sentences of the side that repeats itself more come together, and are embedded once in a block.
        side = 0 if len({candidate for candidate, _ in new}) < len({reference for _, reference in new}) else 1
        text = sorted(set(new).difference(blank), key=lambda pair: (pair[side], pair[1 - side]))
        starts = range(0, len(text), _BLOCK)
        mine = starts[ranks.rank() :: ranks.world()] if together else starts
        shown: Iterable[int] = track(mine, "BERTScore", total=len(mine)) if len(text) > _BLOCK else mine
        found = [(start, self._compute(text[start : start + _BLOCK])) for start in shown]
        for part in ranks.gather(found) if together else [found]:
            for start, values in part:
                self._scores.update(zip(text[start : start + _BLOCK], values, strict=True))

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """The best F1 over the references, as bert-score takes it; 0 for a blank candidate. At most 1, to rounding."""
        pairs = [(candidate, reference) for reference in references]
        if not all(pair in self._scores for pair in pairs):
            self.add(pairs)
        return max(self._scores[pair] for pair in pairs)

    def _compute(self, pairs: Sequence[Pair]) -> list[float]:
        idf: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
        idf[self._tokenizer.sep_token_id] = 0
        idf[self._tokenizer.cls_token_id] = 0
        scores = bert_score_utils.bert_cos_score_idf(
            self._model,
            [_Sentence(one_line(reference)) for _, reference in pairs],
            [_Sentence(one_line(candidate)) for candidate, _ in pairs],
            self._tokenizer,
            idf,
            device=self.device,
        )
        return [float(value) for value in scores[:, 2]]


def check_encoder(folder: Path, num_layers: int | None = None) -> None:
    """Refuses (`UserError`), without loading it, what is no model in safetensors or whose layer is not known."""
    _weights(folder)
    if num_layers is None:
        _known_layers(folder)


def _weights(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise UserError(f"encoder {folder}: no model folder (it has no config.json); give the folder of a local model")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise UserError(
            f"encoder {folder}: no weights in safetensors (model.safetensors); other formats can run code when they "
            "are loaded, so save the model again with `save_pretrained`"
        )
    return weights


def _known_layers(folder: Path) -> int:
    """The layer that bert-score knows to be best for a model of the folder's name, such as "t5-base"."""
    parts = folder.resolve().parts
    names = ["/".join(parts[-2:]), parts[-1]]
    # the hub's cache: models--microsoft--deberta-base/snapshots/<revision>
    names += [part.removeprefix("models--").replace("--", "/") for part in parts if part.startswith("models--")]
    known: dict[str, int] = bert_score_utils.model2layers
    for name in names:
        if name in known:
            return known[name]
    # The Hub has put owners before old names, as in google-t5/t5-base
    by_last_part = {name.rpartition("/")[2]: layers for name, layers in known.items()}
    for name in names:
        if name.rpartition("/")[2] in by_last_part:
            return by_last_part[name.rpartition("/")[2]]
    raise UserError(
        f"encoder {folder}: bert-score knows no best layer for a model of this name; say which layer to compare "
        "(num_layers, counted from 1)"
    )


def _load(folder: Path, num_layers: int) -> tuple[Any, Any]:
    """(tokenizer, encoder cut after layer `num_layers`), from local files alone."""
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            available = config.num_hidden_layers
            if not 1 <= num_layers <= available:
                raise UserError(f"encoder {folder}: has layers 1 to {available}, so num_layers cannot be {num_layers}")
            # Built with fewer layers, and so loaded with fewer: equal to dropping them afterwards, as bert-score does.
            config.num_hidden_layers = num_layers
            family: Any = T5EncoderModel if config.model_type in ("t5", "mt5", "umt5") else AutoModel
            model = family.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            )
            if config.is_encoder_decoder:
                model = model.get_encoder()
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"encoder {folder}: cannot be loaded ({reason[0] if reason else type(error).__name__}); give the "
                "folder of a text encoder with its tokenizer, as `save_pretrained` writes them"
            ) from None
    if tokenizer.pad_token_id is None:
        raise UserError(f"encoder {folder}: its tokenizer has no padding token, which batches need; choose another")
    positions = getattr(config, "max_position_embeddings", None) or _MAXIMUM_TOKENS
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, _MAXIMUM_TOKENS)
    return tokenizer, model


def _digest(weights: Sequence[Path]) -> str:
    """SHA-256 of the weights: the file's own, or over the checksums of several."""
    digests = [sha256(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's progress bar and its list of the layers that are left out on purpose."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()

"""What families of models share, and the encoder-decoder: how text goes in, and how logits and text come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, VisionEncoderDecoderModel

from prsl_kernels.experiments.config import DecodingConfig
from prsl_kernels.experiments.data.base import Task
from prsl_kernels.experiments.errors import UserError

IGNORED = -100
DEFAULT_NEW_TOKENS = 20


class Family:
    """A family of models with a common signature; `model`, `tokenizer` and `side` are those of one checkpoint.

    Attributes:
        task: what its models are for.
        architecture: the class of its models.
        image_processor: the class of transformers that prepares its images.
        qformer: prefixes of the parameters of a Q-Former, its query tokens and its projection, where it has one.
        language_model: the path of the language model inside of the model.
        parts: paths of what may be compiled by itself; the loss is outside of all of them.
    """

    task: ClassVar[Task]
    architecture: ClassVar[type[PreTrainedModel]]
    image_processor: ClassVar[str]
    qformer: ClassVar[tuple[str, ...]] = ()
    language_model: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        side: int,
        decoding: DecodingConfig | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.side = side
        self.decoding = decoding or DecodingConfig()
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = text_config.vocab_size
        self.maximum_length: int | None = getattr(text_config, "max_position_embeddings", None)

    @classmethod
    def image_side(cls, config: Any, processor: dict[str, Any]) -> Any:
        """The size of the images that a model takes, from its configuration and that of its image processor."""
        vision = getattr(config, "vision_config", None) or config.encoder
        return getattr(vision, "image_size", None)

    def processor_settings(self) -> dict[str, Any]:
        """What the image processor of transformers has to be told beside size and normaliser to do the same."""
        return {}

    def unused(self) -> tuple[str, ...]:
        """Prefixes of the parameters that no output depends on: a gradient never reaches them."""
        return ()

    def compilable(self) -> list[nn.Module]:
        """The parts of the model that may be compiled."""
        return [self.model.get_submodule(path) for path in self.parts]

    def arrange(self, pixel_values: Tensor) -> Tensor:
        """The model's `pixel_values` of normalised images (N, 3, H, W)."""
        return pixel_values

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        """Model inputs besides `pixel_values`; see `VisionLanguageModel.encode`."""
        raise NotImplementedError

    def logits(self, pixel_values: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Aligned logits and targets; see `VisionLanguageModel.logits`."""
        raise NotImplementedError

    def generate(self, pixel_values: Tensor, questions: Sequence[str] | None) -> Tensor:
        """Ids (N, T) of the new tokens alone."""
        raise NotImplementedError

    def _closed(self, ids: list[int], reference: str) -> list[int]:
        """The ids of a reference with exactly one EOS, which together decode to the reference again."""
        if self.tokenizer.decode(ids, skip_special_tokens=True).split() != reference.split():
            raise UserError(
                f"the tokenizer does not preserve the reference {reference!r} (it makes "
                f"{self.tokenizer.decode(ids)!r} of it); change the text or take another model"
            )
        return [*ids, self._eos]

    @property
    def _eos(self) -> int:
        eos = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        # Several ends of sequence may be declared; the tokenizer's is the one that training put there
        return int(self.tokenizer.eos_token_id if isinstance(eos, list) else eos)

    @staticmethod
    def _text_of(reference: str) -> str:
        if not reference.strip():
            raise UserError("an empty reference cannot be learnt or attacked; remove the example or give it a text")
        return reference.strip()

    def _check_length(self, length: int, what: str) -> None:
        if self.maximum_length is not None and length > self.maximum_length:
            raise UserError(
                f"{what} needs {length} tokens, but the model takes at most {self.maximum_length}; shorten the text"
            )

    def _decoding(self) -> dict[str, object]:
        """Nothing is sampled, whatever the checkpoint prefers; its own limit on new tokens holds without another."""
        config = self.model.generation_config
        limit = getattr(config, "max_new_tokens", None) or getattr(config, "max_length", None) or DEFAULT_NEW_TOKENS
        return {
            "do_sample": False,
            "num_beams": self.decoding.num_beams,
            "max_new_tokens": self.decoding.max_new_tokens or limit,
            "eos_token_id": self._eos,
            "pad_token_id": self.tokenizer.pad_token_id,
        }


class EncoderDecoder(Family):
    """`VisionEncoderDecoderModel`: an image encoder and a text decoder that attends to it, for captions.

    Raises:
        UserError: a prompt, which it cannot be given.
    """

    task = "captions"
    architecture = VisionEncoderDecoderModel
    image_processor = "ViTImageProcessor"
    language_model = "decoder"
    parts = ("encoder", "decoder")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        side: int,
        decoding: DecodingConfig | None = None,
    ) -> None:
        super().__init__(model, tokenizer, side, decoding)
        if self.decoding.prompt is not None:
            raise UserError(
                f"decoding.prompt is {self.decoding.prompt!r}, but an encoder-decoder takes no prompt; leave it out"
            )

    def unused(self) -> tuple[str, ...]:
        return ("encoder.pooler.",)

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        if questions is not None:
            raise ValueError("questions must be None: an encoder-decoder takes no prompt, it describes the image")
        texts = [self._text_of(reference) for reference in references]
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [self._closed(ids, reference) for ids, reference in zip(encoded, references, strict=True)]
        width = max(map(len, rows))
        self._check_length(width, f"the reference {references[[len(row) for row in rows].index(width)]!r}")
        labels = torch.full((len(rows), width), IGNORED)
        for row, ids in zip(labels, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return {"labels": labels}

    def logits(self, pixel_values: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = text["labels"]
        # Handing over `labels` would compute a loss that nobody wants; the decoder's input is the same without.
        # Padding stands to the right, where causal attention hides it, so that no mask is needed.
        inputs = self.model.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            pixel_values=pixel_values,
            decoder_input_ids=inputs,
            decoder_attention_mask=torch.ones_like(inputs),  # the same as none, which transformers warns about
            use_cache=False,
        )
        return output.logits, labels

    def generate(self, pixel_values: Tensor, questions: Sequence[str] | None) -> Tensor:
        if questions is not None:
            raise ValueError("questions must be None: an encoder-decoder takes no prompt, it describes the image")
        start = self.model.config.decoder_start_token_id
        ids: Tensor = self.model.generate(pixel_values, decoder_start_token_id=start, **self._decoding())
        return ids[:, 1:]

"""What differs between the two families of models: how text goes in, and how logits and text come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
)

from prsl_kernels.experiments.data.base import Task
from prsl_kernels.experiments.errors import UserError

IGNORED = -100
# The prompt with which BLIP-2 was evaluated on question answering (Li et al. 2023, arXiv:2301.12597, section 4.2).
PROMPT = "Question: {question} Answer:"
DEFAULT_NEW_TOKENS = 20


class Family:
    """A family of models with a common signature; `model` and `tokenizer` are those of one checkpoint."""

    task: ClassVar[Task]
    architecture: ClassVar[type[PreTrainedModel]]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model
        self.tokenizer = tokenizer
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = text_config.vocab_size
        self.maximum_length: int | None = getattr(text_config, "max_position_embeddings", None)

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        """Model inputs besides `pixel_values`; see `VisionLanguageModel.encode`."""
        raise NotImplementedError

    def logits(self, pixel_values: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Aligned logits and targets; see `VisionLanguageModel.logits`."""
        raise NotImplementedError

    def generate(self, pixel_values: Tensor, questions: Sequence[str] | None) -> Tensor:
        """Ids (N, T) of the new tokens alone."""
        raise NotImplementedError

    def _answer_ids(self, reference: str, prefix: str) -> list[int]:
        """The ids of a reference with exactly one EOS, which together decode to the reference again."""
        if not reference.strip():
            raise UserError("an empty reference cannot be learnt or attacked; remove the example or give it a text")
        ids: list[int] = self.tokenizer(prefix + reference.strip(), add_special_tokens=False)["input_ids"]
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

    def _check_length(self, length: int, what: str) -> None:
        if self.maximum_length is not None and length > self.maximum_length:
            raise UserError(
                f"{what} needs {length} tokens, but the model takes at most {self.maximum_length}; shorten the text"
            )

    def _decoding(self) -> dict[str, object]:
        """Greedy decoding, whatever the checkpoint prefers, with the checkpoint's own limit on new tokens."""
        config = self.model.generation_config
        limit = getattr(config, "max_new_tokens", None) or getattr(config, "max_length", None) or DEFAULT_NEW_TOKENS
        return {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": limit,
            "eos_token_id": self._eos,
            "pad_token_id": self.tokenizer.pad_token_id,
        }


class EncoderDecoder(Family):
    """`VisionEncoderDecoderModel`: an image encoder and a text decoder that attends to it, for captions."""

    task = "captions"
    architecture = VisionEncoderDecoderModel

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        if questions is not None:
            raise ValueError("questions must be None: an encoder-decoder takes no prompt, it describes the image")
        rows = [self._answer_ids(reference, "") for reference in references]
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


class Blip2(Family):
    """`Blip2ForConditionalGeneration` with a decoder-only language model, for question answering."""

    task = "vqa"
    architecture = Blip2ForConditionalGeneration

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        answers = [self._answer_ids(reference, " ") for reference in references]
        prompts = self._prompts(questions, len(references))
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids, attention_mask = self._left_padded(rows)
        labels = torch.full_like(input_ids, IGNORED)
        for row, answer in zip(labels, answers, strict=True):
            row[-len(answer) :] = torch.tensor(answer)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def logits(self, pixel_values: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.logits_of(text, pixel_values=pixel_values)

    def logits_of(self, text: dict[str, Tensor], **image: Any) -> tuple[Tensor, Tensor]:
        """`logits` with the image as keywords of the model's forward, such as features computed already."""
        labels = text["labels"]
        supervised = (labels != IGNORED).any(0).nonzero()
        first = int(supervised.min()) if len(supervised) else labels.shape[1] - 1
        targets = labels[:, first:]
        output = self.model(
            **image,
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            logits_to_keep=targets.shape[1] + 1,  # those of the prompt are never looked at
            use_cache=False,
        )
        # The last column predicts what follows the EOS
        return output.logits[:, -targets.shape[1] - 1 : -1], targets

    def generate(self, pixel_values: Tensor, questions: Sequence[str] | None) -> Tensor:
        input_ids, attention_mask = self._left_padded(self._prompts(questions, len(pixel_values)))
        input_ids, attention_mask = input_ids.to(pixel_values.device), attention_mask.to(pixel_values.device)
        ids: Tensor = self.model.generate(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, **self._decoding()
        )
        # Whether the prompt is returned has changed between releases of transformers
        length = input_ids.shape[1]
        return ids[:, length:] if torch.equal(ids[:, :length], input_ids) else ids

    def _prompts(self, questions: Sequence[str] | None, count: int) -> list[list[int]]:
        """Ids of the image's places, the tokenizer's own start of sequence, and the question."""
        if questions is None:
            raise UserError("a BLIP-2 model answers questions; give one for each image")
        if len(questions) != count:
            raise ValueError(f"questions has {len(questions)} entries for {count} images; give one for each")
        for question in questions:
            if not question.strip():
                raise UserError("an empty question cannot be asked; remove the example or give it a question")
        image = [self.model.config.image_token_index] * self.model.config.num_query_tokens
        texts = [PROMPT.format(question=question.strip()) for question in questions]
        encoded: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return [image + ids for ids in encoded]

    def _left_padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded to the left in training as in generation; OPT counts positions by the mask."""
        width = max(map(len, rows))
        self._check_length(width, "the longest prompt with its answer")
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, -len(row) :] = torch.tensor(row)
            attention_mask[index, -len(row) :] = 1
        return input_ids, attention_mask


FAMILIES: dict[str, type[Family]] = {"vision-encoder-decoder": EncoderDecoder, "blip-2": Blip2}

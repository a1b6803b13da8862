"""Families with a decoder-only language model that reads the image among the tokens of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models.families import IGNORED, EncoderDecoder, Family

_DEFAULT_SIDE = 448  # of images for a model that takes any size: 256 places of the image for patches of 14


class Prompted(Family):
    """A model that answers a question about the image; `prompt` is how its authors asked.

    Attributes:
        separator: what stands between the prompt and the answer.
        image_token: the field of the configuration that has the id of the token in the image's places.
    """

    task = "vqa"
    prompt: ClassVar[str]
    separator: ClassVar[str]
    image_token: ClassVar[str]

    def encode(self, references: Sequence[str], questions: Sequence[str] | None) -> dict[str, Tensor]:
        said = [self._text_of(reference) for reference in references]
        texts = self._texts(questions, len(references))
        prompts: list[list[int]] = self.tokenizer(texts)["input_ids"]
        answers = [
            self._closed(self._continuation(text, prompt, self.separator + answer), answer)
            for text, prompt, answer in zip(texts, prompts, said, strict=True)
        ]
        rows = [self._with_image(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = self._inputs(rows)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, answer in zip(labels, answers, strict=True):
            row[-len(answer) :] = torch.tensor(answer)
        return {**inputs, "labels": labels}

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
            **{name: value for name, value in text.items() if name != "labels"},
            logits_to_keep=targets.shape[1] + 1,  # those of the prompt are never looked at
            use_cache=False,
        )
        # The last column predicts what follows the EOS
        return output.logits[:, -targets.shape[1] - 1 : -1], targets

    def generate(self, pixel_values: Tensor, questions: Sequence[str] | None) -> Tensor:
        texts = self._texts(questions, self._count(pixel_values))
        prompts: list[list[int]] = self.tokenizer(texts)["input_ids"]
        inputs = self._inputs([self._with_image(prompt) for prompt in prompts])
        inputs = {name: value.to(pixel_values.device) for name, value in inputs.items()}
        ids: Tensor = self.model.generate(pixel_values=pixel_values, **inputs, **self._decoding())
        # Whether the prompt is returned has changed between releases of transformers
        length = inputs["input_ids"].shape[1]
        return ids[:, length:] if torch.equal(ids[:, :length], inputs["input_ids"]) else ids

    def _count(self, pixel_values: Tensor) -> int:
        """The number of images in `pixel_values`."""
        return len(pixel_values)

    @property
    def _image_id(self) -> int:
        return int(getattr(self.model.config, self.image_token))

    @property
    def _places(self) -> int:
        """How many tokens of the prompt an image takes."""
        raise NotImplementedError

    def _texts(self, questions: Sequence[str] | None, count: int) -> list[str]:
        """The prompts as text."""
        if questions is None:
            raise UserError(f"a {type(self.model).__name__} answers questions; give one for each image")
        if len(questions) != count:
            raise ValueError(f"questions has {len(questions)} entries for {count} images; give one for each")
        for question in questions:
            if not question.strip():
                raise UserError("an empty question cannot be asked; remove the example or give it a question")
        prompt = self.decoding.prompt or self.prompt
        return [prompt.replace("{question}", question.strip()) for question in questions]

    def _continuation(self, text: str, prompt: list[int], answer: str) -> list[int]:
        """The ids of an answer as they are where it follows the prompt; SentencePiece has others at a beginning."""
        whole: list[int] = self.tokenizer(text + answer)["input_ids"]
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return ids

    def _with_image(self, prompt: list[int]) -> list[int]:
        """The ids of a prompt with all of the image's places; the one place that it names becomes as many."""
        image = self._image_id
        if prompt.count(image) != 1:
            token = self.tokenizer.convert_ids_to_tokens(image)
            raise UserError(
                f"the prompt has the image's token {token} {prompt.count(image)} times; set decoding.prompt to a text "
                "that has it once, and take it out of questions"
            )
        place = prompt.index(image)
        return prompt[:place] + [image] * self._places + prompt[place + 1 :]

    def _inputs(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Ids and mask, padded to the left in training as in generation."""
        width = max(map(len, rows))
        self._check_length(width, "the longest prompt with its answer")
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, -len(row) :] = torch.tensor(row)
            attention_mask[index, -len(row) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class Blip2(Prompted):
    """`Blip2ForConditionalGeneration` with a decoder-only language model; OPT counts positions by the mask."""

    architecture = Blip2ForConditionalGeneration
    image_processor = "BlipImageProcessor"
    # The prompt of its evaluation on question answering (Li et al. 2023, arXiv:2301.12597, section 4.2)
    prompt = "Question: {question} Answer:"
    separator = " "
    image_token = "image_token_index"
    qformer = ("qformer.", "query_tokens", "language_projection.")
    language_model = "language_model"
    parts = ("vision_model", "qformer", "language_model")

    @property
    def _places(self) -> int:
        return int(self.model.config.num_query_tokens)

    def _with_image(self, prompt: list[int]) -> list[int]:
        image = self._image_id
        if image in prompt:
            raise UserError(
                f"the prompt has the image's token {self.tokenizer.convert_ids_to_tokens(image)}, which BLIP-2 puts "
                "before it; take it out of decoding.prompt and of questions"
            )
        return [image] * self._places + prompt  # before the tokenizer's own start of sequence, as in its training


class Llava(Prompted):
    """`LlavaForConditionalGeneration`: patches of a CLIP-like encoder, projected, in the prompt of a chat model."""

    architecture = LlavaForConditionalGeneration
    image_processor = "CLIPImageProcessor"
    # Of LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744), as llava-hf publishes it
    prompt = "USER: <image>\n{question} ASSISTANT:"
    separator = " "
    image_token = "image_token_index"
    language_model = "model.language_model"
    parts = ("model.vision_tower", "model.language_model")

    def processor_settings(self) -> dict[str, Any]:
        return {"do_center_crop": False}

    def unused(self) -> tuple[str, ...]:
        """What comes after the layer of the image encoder whose features are taken, which is not the last one."""
        config, tower = self.model.config, "model.vision_tower."
        layers = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        # Layer 0 is the embedding, and -1 the last one
        last = max(place % (layers + 1) for place in ([chosen] if isinstance(chosen, int) else chosen))
        names = [name for name, _ in self.model.named_parameters() if name.startswith(tower)]
        return tuple(
            name
            for name in names
            if ".post_layernorm." in name
            or ".head." in name
            or any(f".layers.{layer}." in name for layer in range(last, layers))
        )

    @property
    def _places(self) -> int:
        return int(self.model.config.image_seq_length)


class Qwen2VL(Prompted):
    """`Qwen2VLForConditionalGeneration`, with square images of one size.

    The size is that of its `preprocessor_config.json` where that allows one only, and 448 pixels else. Its image
    processor gives patches, flattened in the order in which four neighbours become one place of the prompt; here
    they are made from pixels, so that gradients reach them.
    """

    architecture = Qwen2VLForConditionalGeneration
    image_processor = "Qwen2VLImageProcessor"
    # Its chat template, with its system prompt (Wang et al. 2024, arXiv:2409.12191)
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    separator = ""
    image_token = "image_token_id"
    language_model = "model.language_model"
    parts = ("model.visual", "model.language_model")

    @classmethod
    def image_side(cls, config: Any, processor: dict[str, Any]) -> Any:
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        size = processor.get("size")
        bounds = {size.get("shortest_edge"), size.get("longest_edge")} if isinstance(size, dict) else set()
        area = bounds.pop() if len(bounds) == 1 else None  # both bounds are areas, in spite of their names
        if isinstance(area, int) and area > 0 and math.isqrt(area) ** 2 == area and math.isqrt(area) % unit == 0:
            return math.isqrt(area)
        return max(1, _DEFAULT_SIDE // unit) * unit

    def processor_settings(self) -> dict[str, Any]:
        vision = self.model.config.vision_config
        return {
            "size": {"shortest_edge": self.side**2, "longest_edge": self.side**2},
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }

    def arrange(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) to (N * patches, 3 * frames * patch * patch); the one image is all frames of a patch."""
        vision = self.model.config.vision_config
        count, channels, height, width = pixel_values.shape
        patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        blocks = pixel_values.reshape(
            count, channels, height // patch // merge, merge, patch, width // patch // merge, merge, patch
        )
        patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        # (N, rows, columns, merge, merge, channels, frames, patch, patch)
        patches = patches.expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
        return patches.reshape(-1, channels * frames * patch * patch)

    @property
    def _patches(self) -> int:
        """How many patches a side of the image has."""
        return int(self.side // self.model.config.vision_config.patch_size)

    def _count(self, pixel_values: Tensor) -> int:
        return len(pixel_values) // self._patches**2

    @property
    def _places(self) -> int:
        merge: int = self.model.config.vision_config.spatial_merge_size
        return (self._patches // merge) ** 2

    def _inputs(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        inputs = super()._inputs(rows)
        return {
            **inputs,
            "image_grid_thw": torch.tensor([[1, self._patches, self._patches]] * len(rows)),
            "mm_token_type_ids": (inputs["input_ids"] == self._image_id).int(),
        }


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`: the same from outside (Bai et al. 2025, arXiv:2502.13923)."""

    architecture = Qwen2_5_VLForConditionalGeneration


FAMILIES: dict[str, type[Family]] = {
    "vision-encoder-decoder": EncoderDecoder,
    "blip-2": Blip2,
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
}

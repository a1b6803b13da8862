"""A Hugging Face vision-language model as the experiment sees it: pixels in [0, 1] in, logits or text out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prsl_kernels.experiments.config import DecodingConfig
from prsl_kernels.experiments.data.base import Task
from prsl_kernels.experiments.data.pixels import load_pixels
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_directory
from prsl_kernels.experiments.models.families import Family
from prsl_kernels.experiments.models.loading import no_progress_bars, read_folder
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.models.prompted import FAMILIES


class VisionLanguageModel:
    """A vision-language model with its tokenizer and its preprocessing of images.

    `model` is a `VisionEncoderDecoderModel` (`task` "captions"), or of one of the classes in `models.prompted`: BLIP-2
    with a decoder-only language model, LLaVA, Qwen2-VL ("vqa"). Pixels are always float tensors
    (N, 3, image_size, image_size) in [0, 1]; the normaliser is inside, so that an attack on pixels sees the whole
    model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        preprocessing: Preprocessing,
        decoding: DecodingConfig | None = None,
    ) -> None:
        self.family: Family = FAMILIES[model.config.model_type](model, tokenizer, preprocessing.size, decoding)
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        decoding: DecodingConfig | None = None,
    ) -> VisionLanguageModel:
        """Loads a shipped base by its name, "captions" or "vqa", a local folder, or a checkpoint of the Hub.

        The last is "owner/name" or "owner/name@revision", and has to be in the Hub's cache already. Weights come from
        safetensors alone and are cast to `dtype`; the model is in evaluation mode. Nothing is downloaded and no code
        of the checkpoint runs. "./vqa" is the folder where "vqa" is the shipped base. `decoding` is how it is asked
        and how its text is made; by default its family's prompt, one beam, and its own limit on new tokens.

        Raises:
            UserError: the folder or one of its files is missing or damaged, it holds another architecture, or one that
                takes no prompt where one is given; the message names the file and the remedy.
        """
        model, tokenizer, preprocessing = read_folder(path, dtype)
        return cls(model.to(device).eval(), tokenizer, preprocessing, decoding)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes weights in `dtype`, configuration, tokenizer and preprocessing, all or nothing.

        None leaves each weight in the precision that it is held in.

        Raises:
            UserError: `path` is a folder of something else than a model, or a weight has no finite value in `dtype`.
        """
        path = Path(path)
        if path.exists() and not (path / "config.json").is_file() and any(path.iterdir()):
            raise UserError(f"{path}: this folder holds other files and would be replaced; choose another one")
        with atomic_directory(path) as folder:
            self.write_files(folder, dtype=dtype)

    def write_files(self, folder: Path, *, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes the files of `save_pretrained` into an existing folder, beside what is there."""
        with no_progress_bars():
            self.model.save_pretrained(folder, state_dict=_cast(self.model, dtype))
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them 0600
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _set_dtype(config, str(dtype or torch.float32).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        values = self.preprocessing.to_json(self.family.image_processor, **self.family.processor_settings())
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @property
    def task(self) -> Task:
        """ "captions" or "vqa"."""
        return self.family.task

    @property
    def vocab_size(self) -> int:
        """Number of classes V of a logit row."""
        return self.family.vocab_size

    @property
    def decoding(self) -> DecodingConfig:
        """How the model is asked, and how its text is made."""
        return self.family.decoding

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.preprocessing.size

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Mean of each channel in units of [0, 1] pixels."""
        return self.preprocessing.mean

    @property
    def image_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel in units of [0, 1] pixels."""
        return self.preprocessing.std

    @property
    def device(self) -> torch.device:
        """Where the model is; every method moves its inputs there."""
        device: torch.device = self.model.device
        return device

    def to(self, device: str | torch.device) -> VisionLanguageModel:
        """Moves the model and returns itself."""
        self.model.to(device)
        return self

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Training mode (dropout is active) or evaluation mode; returns itself."""
        self.model.train(mode)
        return self

    def eval(self) -> VisionLanguageModel:
        """Evaluation mode; returns itself."""
        return self.train(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model."""
        yield from self.model.parameters()

    def load_pixels(self, paths: Sequence[Path]) -> Tensor:
        """Image files as float32 pixels (N, 3, image_size, image_size) in [0, 1] on the CPU."""
        return load_pixels(paths, self.image_size)

    def normalize(self, pixels: Tensor) -> Tensor:
        """The model's `pixel_values` of pixels in [0, 1]: normalised, and in the family's layout; differentiable.

        Raises:
            ValueError: pixels are not floating point or have another shape than (N, 3, image_size, image_size).
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not pixels.is_floating_point():
            raise ValueError(
                f"pixels is {pixels.dtype} of shape {tuple(pixels.shape)}; give floating point pixels in [0, 1] of "
                f"shape {('N', *expected)}"
            )
        pixels = pixels.to(self.device)
        mean, std = (
            torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return self.family.arrange((pixels - mean) / std).to(self.model.dtype)

    def encode(self, references: Sequence[str], questions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Model inputs besides `pixel_values` for one reference per image, on the model's device.

        "labels" (N, L) holds the reference's tokens and one EOS, and -100 on padding, prompt and image places; models
        that take a prompt also have "input_ids" and "attention_mask" of the same shape, and what else they need with N
        rows. With `pixel_values` they can be given to `model(...)` as they are.

        Raises:
            UserError: an empty reference or question, one longer than the model takes, or one that the tokenizer
                cannot represent; a model that takes a prompt without questions.
        """
        if isinstance(references, str) or isinstance(questions, str):
            raise ValueError("references and questions must be sequences of texts, not one text")
        if not references:
            raise ValueError("references is empty; give at least one")
        return {name: value.to(self.device) for name, value in self.family.encode(references, questions).items()}

    def logits(self, pixels: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, T, V) and their targets (N, T) under teacher forcing; differentiable in pixels and parameters.

        `text` is what `encode` returned. Logits and targets are aligned: `logits[n, t]` predicts `targets[n, t]`;
        targets of -100 count for nothing. The model's own loss is never computed, so a loss that is put into the
        model does not change what an attack maximises.
        """
        text = {name: value.to(self.device) for name, value in text.items()}
        if len(pixels) != len(text["labels"]):
            raise ValueError(f"pixels has {len(pixels)} images for {len(text['labels'])} texts; give one for each")
        return self.family.logits(self.normalize(pixels), text)

    @torch.no_grad()
    def generate(self, pixels: Tensor, questions: Sequence[str] | None = None) -> list[str]:
        """What the model says of each image: by `decoding`, without dropout, only the new text, stripped."""
        if not len(pixels):
            return []
        training = self.model.training
        self.model.eval()
        try:
            ids = self.family.generate(self.normalize(pixels), questions)
        finally:
            self.model.train(training)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state in `dtype`, or as it is; tensors that share their memory still do: tied weights are written once."""
    casts: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            key = (value.data_ptr(), value.shape)
            if key not in casts:
                casts[key] = value.detach().to("cpu", dtype or value.dtype)
                if not bool(casts[key].isfinite().all()):
                    raise UserError(
                        f"the weight {name} has no finite value in {casts[key].dtype}; save with dtype=torch.float32"
                    )
            value = casts[key]
        state[name] = value
    return state


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    """Corrects the dtype that transformers noted of the model in memory, in nested configurations too."""
    for key, value in config.items():
        if isinstance(value, dict):
            _set_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            config[key] = dtype

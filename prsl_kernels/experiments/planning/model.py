"""A model's shape: what it takes to count its parameters and its floating-point operations without loading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from prsl_kernels.experiments.config import Task
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json
from prsl_kernels.experiments.models.preprocessing import processor_settings
from prsl_kernels.experiments.models.prompted import Qwen2VL

Trainable = Literal["full", "qformer", "lora"]
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class Stack:
    """Transformer layers of one width.

    Attributes:
        layers, width: of the stack.
        ffn: inner width of its feed-forward part.
        crossed: how many of the layers also attend to another sequence, whose width is `memory_width`.
        embedded: parameters outside of the layers: patches, positions, words.
    """

    layers: int
    width: int
    ffn: int
    crossed: int = 0
    memory_width: int = 0
    embedded: int = 0

    @property
    def per_token(self) -> int:
        """Parameters that each of its own tokens meets: attention, feed-forward, query and output of the crossed."""
        d = self.width
        return self.layers * (4 * d * d + 2 * d * self.ffn) + self.crossed * 2 * d * d

    @property
    def per_memory_token(self) -> int:
        """Parameters that each token of the other sequence meets: keys and values."""
        return self.crossed * 2 * self.width * self.memory_width

    @property
    def parameters(self) -> int:
        """All of them; biases and normalisation are 13 widths a layer, 8 more where it is crossed."""
        small = self.layers * (9 * self.width + self.ffn + 4 * self.width) + self.crossed * 8 * self.width
        return self.per_token + self.per_memory_token + self.embedded + small

    def flops(self, tokens: float, memory: float = 0.0) -> float:
        """Of one forward over one sequence of `tokens`: two for each parameter met, and the attention's products."""
        attention = 4 * self.width * tokens * (self.layers * tokens + self.crossed * memory)
        return 2 * (self.per_token * tokens + self.per_memory_token * memory) + attention


@dataclass(frozen=True)
class Shape:
    """A vision-language model.

    Attributes:
        task: which family.
        encoder, qformer, decoder: its stacks; BLIP-2 alone has a Q-Former.
        image_size, image_tokens: side in pixels; tokens that the encoder makes of one image.
        queries: places of the image in the decoder's input, 0 for an encoder-decoder.
        projection: parameters between encoder and decoder, query tokens included.
        vocabulary: V.
        new_tokens: the longest output.
        source: where the numbers are from.
    """

    task: Task
    encoder: Stack
    qformer: Stack | None
    decoder: Stack
    image_size: int
    image_tokens: int
    queries: int
    projection: int
    vocabulary: int
    new_tokens: int
    source: str

    @property
    def parameters(self) -> int:
        """All of them."""
        stacks = [stack for stack in (self.encoder, self.qformer, self.decoder) if stack is not None]
        return sum(stack.parameters for stack in stacks) + self.projection

    def trained(self, trainable: Trainable, rank: int = 16) -> int:
        """Parameters that an optimiser holds states of."""
        if trainable == "qformer" and self.qformer is not None:
            return self.qformer.parameters + self.projection
        if trainable == "lora":  # two matrices of `rank` beside each of the four of the decoder's attention
            return (self.decoder.layers + self.decoder.crossed) * rank * 4 * 2 * self.decoder.width
        return self.parameters

    def forward(self, text: float, *, logits: float | None = None) -> tuple[float, float, float]:
        """FLOPs of one forward on one image by encoder, Q-Former and decoder.

        Args:
            text: tokens of text that the decoder reads.
            logits: tokens for which logits are made; None is all of `text`.
        """
        seen = self.encoder.flops(self.image_tokens)
        head = 2 * self.decoder.width * self.vocabulary * (text if logits is None else logits)
        if self.qformer is None:
            return seen, 0.0, self.decoder.flops(self.queries + text, self.image_tokens) + head
        queried = self.qformer.flops(self.queries, self.image_tokens)
        return seen, queried, self.decoder.flops(self.queries + text) + head

    def widest_activations(self, text: float, bytes_each: int, *, encoder: bool = True, scores: bool = False) -> float:
        """Bytes that a forward with gradients keeps for one image; without `encoder` where no gradient goes that far.

        Per layer and token about 17 numbers of the width, and, where the attention is not fused, its `scores` and
        probabilities; Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022,
        arXiv:2205.05198, equation 1, whose 34 bytes are for 16-bit numbers.
        """
        lengths = [(self.decoder, self.queries + text)]
        if encoder:
            lengths.append((self.encoder, self.image_tokens))
        if self.qformer is not None:
            lengths.append((self.qformer, self.queries))
        return sum(
            bytes_each * stack.layers * tokens * (17 * stack.width + scores * 2.5 * (stack.width // 64 or 1) * tokens)
            for stack, tokens in lengths
        )

    def checkpointed_activations(self, text: float, bytes_each: int) -> float:
        """Bytes with gradient checkpointing: each layer's input, and one layer in full."""
        inputs: float = self.encoder.layers * self.image_tokens * self.encoder.width
        inputs += self.decoder.layers * (self.queries + text) * self.decoder.width
        layers = max(self.encoder.layers, self.decoder.layers)
        return bytes_each * inputs + self.widest_activations(text, bytes_each) / layers


def _vit(values: Mapping[str, Any], defaults: Mapping[str, int]) -> tuple[Stack, int, int]:
    """The stack, the image's side and its tokens."""
    get = {**defaults, **{key: value for key, value in values.items() if isinstance(value, int)}}
    size, patch, width = get["image_size"], get["patch_size"], get["hidden_size"]
    tokens = (size // patch) ** 2 + 1
    embedded = 3 * patch * patch * width + tokens * width
    return Stack(get["num_hidden_layers"], width, get["intermediate_size"], embedded=embedded), size, tokens


_VIT = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
_BLIP2_VIT = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1408,
    "num_hidden_layers": 39,
    "intermediate_size": 6144,
}


_CLIP = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32064}
_LLAMA |= {"num_attention_heads": 32}


def shape_of(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    source: str = "",
    processor: Mapping[str, Any] | None = None,
) -> Shape:
    """The shape that a checkpoint's `config.json` describes; what it leaves out is transformers' default.

    `generation` and `processor` are its `generation_config.json` and the settings of its image processor.

    Raises:
        UserError: another family, or no configuration of it.
    """
    limits = generation or {}
    found = limits.get("max_new_tokens") or limits.get("max_length")
    new_tokens = found if isinstance(found, int) else DEFAULT_NEW_TOKENS
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"{source}: the model type is {kind!r}; a plan knows {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](config, processor or {}, new_tokens, source)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{source}: is not the configuration of a {kind} ({type(error).__name__}: {error}); copy it again"
        ) from None


def _encoder_decoder(config: Mapping[str, Any], _: Mapping[str, Any], new_tokens: int, source: str) -> Shape:
    decoder = config["decoder"]
    encoder, size, tokens = _vit(config["encoder"], _VIT)
    width, layers = decoder.get("n_embd", 768), decoder.get("n_layer", 12)
    vocabulary = decoder.get("vocab_size", 50257)
    stack = Stack(
        layers,
        width,
        decoder.get("n_inner") or 4 * width,
        crossed=layers,
        memory_width=width,
        embedded=(vocabulary + decoder.get("n_positions", 1024)) * width,
    )
    projection = 0 if encoder.width == width else encoder.width * width
    return Shape("captions", encoder, None, stack, size, tokens, 0, projection, vocabulary, new_tokens, source)


def _blip_2(config: Mapping[str, Any], _: Mapping[str, Any], new_tokens: int, source: str) -> Shape:
    encoder, size, tokens = _vit(config.get("vision_config") or {}, _BLIP2_VIT)
    values = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    values |= {"cross_attention_frequency": 2} | dict(config.get("qformer_config") or {})
    every = values["cross_attention_frequency"]
    qformer = Stack(
        values["num_hidden_layers"],
        values["hidden_size"],
        values["intermediate_size"],
        crossed=-(-values["num_hidden_layers"] // every),
        memory_width=values.get("encoder_hidden_size", encoder.width),
    )
    text = {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "vocab_size": 50272}
    text |= {"max_position_embeddings": 2048} | dict(config.get("text_config") or {})
    ffn, vocabulary = text.get("intermediate_size", text["ffn_dim"]), text["vocab_size"]
    embedded = (vocabulary + text["max_position_embeddings"] + 2) * text["hidden_size"]
    stack = Stack(text["num_hidden_layers"], text["hidden_size"], ffn, embedded=embedded)
    queries = config.get("num_query_tokens", 32)
    projection = qformer.width * (stack.width + queries)
    return Shape("vqa", encoder, qformer, stack, size, tokens, queries, projection, vocabulary, new_tokens, source)


def _llava(config: Mapping[str, Any], _: Mapping[str, Any], new_tokens: int, source: str) -> Shape:
    encoder, size, tokens = _vit(config.get("vision_config") or {}, _CLIP)
    values = {**_LLAMA, **(config.get("text_config") or {})}
    stack, vocabulary = _gated(values), values["vocab_size"]
    projection = (encoder.width + stack.width) * stack.width
    return Shape("vqa", encoder, None, stack, size, tokens, tokens - 1, projection, vocabulary, new_tokens, source)


def _qwen_vl(config: Mapping[str, Any], processor: Mapping[str, Any], new_tokens: int, source: str) -> Shape:
    """Qwen2-VL and Qwen2.5-VL, whose published configurations have the language model's values at the top."""
    vision, text = config["vision_config"], {**config, **(config.get("text_config") or {})}
    newer = config["model_type"] == "qwen2_5_vl"
    width, patch = vision["hidden_size" if newer else "embed_dim"], vision["patch_size"]
    merged = vision["spatial_merge_size"] ** 2
    size = Qwen2VL.image_side(SimpleNamespace(vision_config=SimpleNamespace(**vision)), dict(processor))
    tokens = (size // patch) ** 2
    # Its newer feed-forward parts are gated, too
    ffn = vision["intermediate_size"] * 3 // 2 if newer else int(width * vision["mlp_ratio"])
    patches = 3 * vision["temporal_patch_size"] * patch * patch * width
    encoder = Stack(vision["depth"], width, ffn, embedded=patches)
    stack, vocabulary = _gated(text), text["vocab_size"]
    projection = (merged * width + stack.width) * merged * width
    queries = tokens // merged
    return Shape("vqa", encoder, None, stack, size, tokens, queries, projection, vocabulary, new_tokens, source)


def _gated(text: Mapping[str, Any]) -> Stack:
    """A stack of Llama's kind: its feed-forward parts have three matrices, and heads may share keys and values."""
    width, heads = text["hidden_size"], text["num_attention_heads"]
    shared = width - width * text.get("num_key_value_heads", heads) // heads
    matrices = 1 if text.get("tie_word_embeddings") else 2
    return Stack(
        text["num_hidden_layers"],
        width,
        text["intermediate_size"] * 3 // 2 - shared,
        embedded=matrices * text["vocab_size"] * width,
    )


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], int, str], Shape]] = {
    "vision-encoder-decoder": _encoder_decoder,
    "blip-2": _blip_2,
    "llava": _llava,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
}


def _blip2(width: int, ffn: int) -> dict[str, Any]:
    text = {"hidden_size": width, "ffn_dim": ffn, "num_hidden_layers": 32, "vocab_size": 50304}
    return {"model_type": "blip-2", "vision_config": {}, "qformer_config": {}, "text_config": text}


_QWEN25_VL_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
# Configurations as published on the Hub
PUBLISHED: dict[str, dict[str, Any]] = {
    "nlpconnect/vit-gpt2-image-captioning": {"model_type": "vision-encoder-decoder", "encoder": {}, "decoder": {}},
    "llava-hf/llava-1.5-7b-hf": {"model_type": "llava"},
    "Salesforce/blip2-opt-2.7b": _blip2(2560, 10240),
    "Salesforce/blip2-opt-6.7b": _blip2(4096, 16384),
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN25_VL_7B,
}
# What these divide their pixels by: a ViT's deviations, and CLIP's in all that answer questions
STD = {"captions": (0.5, 0.5, 0.5), "vqa": (0.26862954, 0.26130258, 0.27577711)}


def find_shape(base: str, task: Task) -> tuple[Shape, Path | None]:
    """The shape of a recipe's base, and its folder where it is on disk.

    Raises:
        UserError: neither on disk nor one of the published models that are known here.
    """
    from prsl_kernels.experiments.models.loading import resolve

    try:
        folder = resolve(base)
        generation = folder / "generation_config.json"
        limits = read_json(generation) if generation.is_file() else None
        config, processor = read_json(folder / "config.json"), processor_settings(folder)[1]
        return shape_of(config, limits, f"{folder.name}/config.json", processor), folder
    except UserError as error:
        published = PUBLISHED.get(base.partition("@")[0])
        if published is None:
            raise UserError(
                f"tasks.{task}.base: {error}; without it, a plan knows the sizes of {', '.join(PUBLISHED)} alone"
            ) from None
        return shape_of(published, None, f"published configuration of {base}"), None

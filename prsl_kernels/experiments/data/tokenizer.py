"""The vocabulary that both embedded tasks share: byte-level BPE, so that any Unicode text survives a round trip."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prsl_kernels.experiments.data import easy_vqa, openmoji

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
MAXIMUM_LENGTH = 128


def build_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains the vocabulary on the texts of both train splits: captions, questions and answers, each text once.

    The special tokens have the ids 0 to 3 in the order of `SPECIAL_TOKENS`; "<image>" marks the places of the image
    embeddings in a BLIP-2 prompt. The tokenizer adds no special token by itself and needs no unknown token.

    Raises:
        ValueError: the texts do not give `vocab_size` tokens.
    """
    texts = set()
    for module in (openmoji, easy_vqa):
        for example in module.load("train")[0]:
            texts.update(example.references + ((example.question,) if example.question else ()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens; set vocab_size to at most that")
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        model_max_length=MAXIMUM_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )

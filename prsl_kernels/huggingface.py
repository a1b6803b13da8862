"""PRSL inside a Hugging Face model: `apply_prsl` replaces the cross entropy that a model's forward computes.

Two ways in, because transformers has two kinds of language model:

- Nearly all call `self.loss_function(logits, labels, vocab_size, **kwargs)` with the labels of the input tokens, and
  the loss shifts them. There the instance gets a loss function of its own. It has to be a plain function: a module
  assigned to that property is registered as a submodule by `nn.Module.__setattr__` and never called.
- `VisionEncoderDecoderModel` and the decoders of the BART family hard-code `CrossEntropyLoss` on labels that are
  already aligned with the logits, and ignore `num_items_in_batch`; since their forward takes `**kwargs` the Trainer
  believes that the loss is scaled, so under gradient accumulation loss and gradient are too large by the number of
  steps. There the instance's class becomes a subclass whose forward keeps the labels back, and reduces as
  `transformers.loss.loss_utils.ForCausalLMLoss` does. An attribute `forward` on the instance would not do: it stays
  bound to the original in the replicas of `nn.DataParallel`.

Nothing global is touched: no `LOSS_MAPPING`, no attribute of a module or class of transformers.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .deferred import DeferredLogits, defer_logits
from .eager import Distance, Space
from .functional import LossTerms, prsl_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Hard-coded `CrossEntropyLoss()(logits.view(-1, V), labels.view(-1))`, as read in transformers 5.23.
_ALIGNED_LABELS = frozenset(
    {
        "VisionEncoderDecoderModel",
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "CpmAntForCausalLM",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
    }
)


class PRSLHandle:
    """What `apply_prsl` returns: reads the last loss's terms, and takes PRSL out again. A context manager.

    Attributes:
        k, b, space, distance, fused_linear: the parameters, as given to `apply_prsl`.
        last_terms: `(loss, cross_entropy, penalty)` of the last forward with labels, detached scalar tensors on the
            logits' device, or None before the first. The penalty is d, without b. They are reduced as that loss was:
            with `num_items_in_batch` a micro-batch's terms are its share of the accumulated batch, and their sum over
            the micro-batches is the batch's mean. Reading them moves nothing to the host; `.item()` does. Copies and
            replicas of the model write here as well.
    """

    def __init__(
        self, model: PreTrainedModel, *, k: int, b: float, space: Space, distance: Distance, fused_linear: bool
    ) -> None:
        self.k, self.b, self.space, self.distance = k, b, space, distance
        self.fused_linear = fused_linear
        self.last_terms: LossTerms | None = None
        # Computes the terms from logits; the experiment's baselines put a function of the same keywords in its place.
        self._terms: Callable[..., LossTerms] = prsl_cross_entropy
        self._active = True
        # A strong reference would close a cycle, and a model on a GPU would outlive its last user until the collector.
        self._model = weakref.ref(model)
        self._restore: Callable[[PreTrainedModel], None] = lambda model: None

    def remove(self) -> None:
        """Gives the model its own loss back, exactly as it was; a second call does nothing.

        Copies made while the model was patched (`copy.deepcopy`) compute their own loss again, too.
        """
        if self._active:
            self._active = False
            model = self._model()
            if model is not None:
                self._restore(model)

    def __enter__(self) -> PRSLHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        fused = ", fused_linear=True" if self.fused_linear else ""
        return f"PRSLHandle(k={self.k}, b={self.b}, space={self.space!r}, distance={self.distance!r}{fused}, {state})"

    def _loss(
        self,
        logits: torch.Tensor | DeferredLogits,
        target: torch.Tensor,
        vocab_size: int | None,
        num_items_in_batch: torch.Tensor | int | None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """PRSL of `(..., V)` logits and `(...)` targets, reduced as `transformers` reduces cross entropy."""
        target = target.to(logits.device)
        options: dict[str, Any] = {
            "k": self.k,
            "b": self.b,
            "space": self.space,
            "distance": self.distance,
            "ignore_index": ignore_index,
            "reduction": "mean" if num_items_in_batch is None else "sum",
        }
        if isinstance(logits, DeferredLogits):
            loss, cross_entropy, penalty = logits.loss(target, options)
        else:
            model = self._model()
            if self.fused_linear and logits.requires_grad and model is not None and model.training:
                warnings.warn(
                    "apply_prsl(fused_linear=True): the model has computed its logits in training, since its output "
                    "layer was replaced after that call (resize_token_embeddings may); remove() the handle and "
                    "apply again",
                    stacklevel=3,
                )
            # No `logits.float()` as in the stock loss: the arithmetic is in float32 without a copy of all logits.
            flat = logits.reshape(-1, logits.shape[-1] if vocab_size is None else vocab_size)
            loss, cross_entropy, penalty = self._terms(flat, target.reshape(-1), return_terms=True, **options)
        if num_items_in_batch is not None:
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            loss = loss / num_items_in_batch
            cross_entropy, penalty = cross_entropy / num_items_in_batch, penalty / num_items_in_batch
        # A clone, since the Trainer multiplies the loss in place by the number of processes.
        self.last_terms = LossTerms(loss.detach().clone(), cross_entropy, penalty)
        return loss


def apply_prsl(
    model: PreTrainedModel,
    *,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    fused_linear: bool = False,
) -> PRSLHandle:
    """Puts the PRSL into a Hugging Face model, in place of the cross entropy that its forward computes from `labels`.

    Served: `VisionEncoderDecoderModel`, `Blip2ForConditionalGeneration` with a decoder-only language model, and every
    causal language model of transformers 5 whose loss can be replaced: those that use `self.loss_function` with
    `ForCausalLMLoss`, and the decoders of the BART family.

    The reduction is that of cross entropy in transformers: the sum over tokens divided by `num_items_in_batch` where
    the Trainer gives it, else the mean over tokens that are not ignored. `VisionEncoderDecoderModel` ignores
    `num_items_in_batch` by itself, so under gradient accumulation its loss and gradient are too large by the number
    of steps; apply PRSL with `b=0` to train it with cross entropy, and right.

    The patch belongs to this instance, for training and evaluation alike; parameters, configuration, `generate`,
    `save_pretrained` and the signature of `forward` stay as they are. A saved model is an ordinary one: loading it
    gives the stock loss. `copy.deepcopy` gives a patched copy. Pickling a patched model raises; `remove()` first. The
    Trainer's `label_smoothing_factor` and `compute_loss_func` bypass the loss of any model, this one included.

    Args:
        model: the model itself, not a wrapper (`DistributedDataParallel`, PEFT, `torch.compile`) around it: apply
            first and wrap afterwards, or pass the model that is wrapped.
        k, b, space, distance: see `prsl_kernels.prsl_cross_entropy`; with `b=0` the loss is cross entropy.
        fused_linear: compute the loss from the hidden states in training, by `linear_prsl_cross_entropy`, so that the
            logits, the largest tensor of most training steps, never exist. What a forward in training returns as
            logits then raises `LogitsNotComputedError` when somebody uses it; in `eval()` and under `torch.no_grad()`
            everything is as without. Not for models that scale or cap their logits before the loss (the first step
            raises), nor for `nn.DataParallel`.

    Returns:
        A `PRSLHandle`: `remove()` it, or use it in a `with` statement; `last_terms` holds the terms for logs.

    Raises:
        TypeError: not a model whose loss can be replaced; the message says which, why, and what to do.
        ValueError: a model that is patched already or has a loss function of its own, a configuration that does not
            train causally, or `k`, `b`, `space` or `distance` out of range for the model's vocabulary. With
            `fused_linear` a TypeError, too, where the output layer is no plain `nn.Linear`.

    Example:
        >>> with apply_prsl(model, k=20, b=1e-2):
        ...     Trainer(model, arguments, train_dataset=dataset).train()
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            "apply_prsl needs the package transformers, version 5: pip install 'transformers>=5'"
        ) from error

    if not isinstance(model, PreTrainedModel):
        raise TypeError(_not_a_model(model))
    handle = _handle_of(model)
    if handle is not None:
        if handle._active:
            raise ValueError(
                f"apply_prsl: this {type(model).__name__} has PRSL already ({handle!r}): remove() that handle first"
            )
        handle._restore(model)  # a copy, made while the original was patched: it still carries the dead patch
    aligned = _has_aligned_labels(model)
    _check_serves(model, aligned)
    # The loss knows its own limits: one row of the model's vocabulary asks it, before any training starts.
    vocab_size = _vocab_size(model)
    if vocab_size is not None:
        row = torch.zeros(1, vocab_size, device="cpu")
        target = torch.zeros(1, dtype=torch.long, device="cpu")
        prsl_cross_entropy(row, target, k=k, b=b, space=space, distance=distance)

    if fused_linear:
        _check_output_layer(model)
    handle = PRSLHandle(model, k=k, b=b, space=space, distance=distance, fused_linear=fused_linear)
    if aligned:
        _replace_forward(model, handle)
    else:
        _replace_loss_function(model, handle)
    if fused_linear:
        _defer_logits(model, handle)
    return handle


def _handle_of(model: PreTrainedModel) -> PRSLHandle | None:
    """The handle, active or removed, of the patch that this model (or the one it was copied from) carries."""
    function = vars(model).get("_loss_function")
    return getattr(function, "_prsl_handle", None) or getattr(type(model), "_prsl_handle", None)


def _replace_loss_function(model: PreTrainedModel, handle: PRSLHandle) -> None:
    """For models that call `self.loss_function(...)` as `ForCausalLMLoss` is called."""
    stock = model.loss_function

    def prsl_causal_lm_loss(
        logits: torch.Tensor | DeferredLogits,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not handle._active:  # in a copy of the model that was made before the handle was removed
            return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None:  # tokens before n predict n; the last logits predict nothing that is known
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return handle._loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)

    def restore(model: PreTrainedModel) -> None:
        if vars(model).get("_loss_function") is prsl_causal_lm_loss:  # else it was replaced since, and is not ours
            del model._loss_function

    vars(prsl_causal_lm_loss)["_prsl_handle"] = handle
    handle._restore = restore
    model.loss_function = prsl_causal_lm_loss


def _replace_forward(model: PreTrainedModel, handle: PRSLHandle) -> None:
    """For models whose forward hard-codes `CrossEntropyLoss` on labels that are aligned with the logits."""
    base = type(model)
    names = list(inspect.signature(base.forward).parameters)[1:]
    # What the Trainer counts as tokens hangs on `loss_type`: without one it counts every label, as aligned ones need.
    loss_type = model.loss_type

    @functools.wraps(base.forward)  # the Trainer reads the signature, which `wraps` keeps
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not handle._active:  # in a copy of the model, or behind a wrapper that kept this function
            return base.forward(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.pop("labels", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is None:
            return base.forward(self, **kwargs)
        if (
            "decoder_input_ids" in names
            and kwargs.get("decoder_input_ids") is None
            and kwargs.get("decoder_inputs_embeds") is None
        ):
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        output = base.forward(self, **kwargs)
        loss = handle._loss(output[0], labels, None, num_items_in_batch)
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{"loss": loss, **output})  # made anew, so that the loss comes first in `to_tuple()`

    def restore(model: PreTrainedModel) -> None:
        model.loss_type = loss_type
        if type(model) is patched:  # else someone has derived from it since (FSDP does): the patch is inert in there
            model.__class__ = base

    # The name stays: save_pretrained writes it as the architecture, and the Trainer looks at it.
    patched = type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "_prsl_handle": handle,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        },
    )
    handle._restore = restore
    model.__class__ = patched
    model.loss_type = None


def _defer_logits(model: PreTrainedModel, handle: PRSLHandle) -> None:
    restore_model = handle._restore
    restore_head = defer_logits(model.get_output_embeddings(), lambda: handle._active)

    def restore(model: PreTrainedModel) -> None:
        restore_head(model.get_output_embeddings())
        restore_model(model)

    handle._restore = restore


# ---- which models ----------------------------------------------------------------------------------------------------


def _names(model: PreTrainedModel) -> set[str]:
    return {cls.__name__ for cls in type(model).__mro__}


def _has_aligned_labels(model: PreTrainedModel) -> bool:
    return not _names(model).isdisjoint(_ALIGNED_LABELS)


def _vocab_size(model: PreTrainedModel) -> int | None:
    """The number of classes of the loss, or None where the configuration does not say (then the first loss tells)."""
    if "VisionEncoderDecoderModel" in _names(model):
        return model.decoder.config.vocab_size
    return getattr(model.config.get_text_config(decoder=True), "vocab_size", None)


def _not_a_model(model: object) -> str:
    """Why an object that is no PreTrainedModel is refused, and how to reach the model that it may hold."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    for attribute, path in (
        ("_orig_mod", "._orig_mod"),
        ("get_base_model", ".get_base_model()"),
        ("module", ".module"),
    ):
        if hasattr(model, attribute):
            return (
                f"apply_prsl: {name} wraps a model; apply PRSL to the model first and wrap it afterwards, or pass "
                f"`model{path}`, which the wrapper goes on using"
            )
    return f"apply_prsl: expected a transformers.PreTrainedModel, got {name}"


def _check_serves(model: PreTrainedModel, aligned: bool) -> None:
    """Raises with the reason where the loss of `model` cannot be replaced, or is no causal cross entropy."""
    name, config = type(model).__name__, model.config
    if getattr(config, "use_decoder_only_language_model", True) is False:
        raise ValueError(
            f"apply_prsl: this {name} has an encoder-decoder language model ({config.text_config.model_type}), which "
            "computes its loss inside; use one with a decoder-only language model, such as OPT"
        )
    if getattr(config, "is_encoder_decoder", False) and not aligned:
        raise TypeError(
            f"apply_prsl: {name} is an encoder-decoder model, and of those only VisionEncoderDecoderModel is served; "
            "use prsl_kernels.prsl_cross_entropy on its logits, in the Trainer as compute_loss_func"
        )
    if aligned:
        if "forward" in vars(model):
            raise ValueError(
                f"apply_prsl: the forward of this {name} was replaced on the instance (accelerate and the Trainer do "
                "that in mixed precision), which would hide the patch; apply PRSL before that, or `del model.forward`"
            )
        return

    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if "_loss_function" in vars(model):
        raise ValueError(
            f"apply_prsl: this {name} has a loss function of its own, {model.loss_function!r}, which PRSL would "
            "silently drop; `del model._loss_function` if that is meant"
        )
    if not _calls_loss_function(type(model)):
        raise TypeError(
            f"apply_prsl: the forward of {name} does not use `self.loss_function`, so its loss (if it has one) cannot "
            "be replaced; use a model with a causal language-modelling head (AutoModelForCausalLM), or "
            "prsl_kernels.prsl_cross_entropy on the logits, in the Trainer as compute_loss_func"
        )
    # transformers trains a class without a loss type (GPT2LMHeadModel is one) as a causal language model.
    loss_type = model.loss_type or "ForCausalLM"
    if LOSS_MAPPING.get(loss_type) is not ForCausalLMLoss:
        raise TypeError(
            f"apply_prsl: {name} trains with the loss {loss_type!r}, not as a causal language model; use a model with "
            "a causal language-modelling head (AutoModelForCausalLM)"
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        raise ValueError(
            f"apply_prsl: this {name} is an encoder (config.is_decoder is False): every token sees the one that it "
            "has to predict; make the model from a configuration with is_decoder=True"
        )


def _check_output_layer(model: PreTrainedModel) -> None:
    """Raises where the layer that makes the logits is not one whose work the fused loss can do."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        kind = "none" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"
        raise TypeError(
            f"apply_prsl: fused_linear=True needs an output layer that is a plain nn.Linear, but the one of this "
            f"{type(model).__name__} is {kind}; use fused_linear=False (LoRA and quantisation replace the layer: apply "
            "PRSL before them only if they leave it alone)"
        )
    if "forward" in vars(head):
        raise ValueError(
            f"apply_prsl: the forward of the output layer of this {type(model).__name__} was replaced on the instance, "
            "which would hide the patch; apply PRSL before that, or use fused_linear=False"
        )


def _calls_loss_function(cls: type) -> bool:
    """Whether the forward of `cls`, or the one it hands on to with `super()`, names `self.loss_function`."""
    for parent in cls.__mro__:
        if "forward" in vars(parent):
            code = getattr(inspect.unwrap(vars(parent)["forward"]), "__code__", None)
            names = _code_names(code) if code is not None else set()
            if "loss_function" in names:
                return True
            if "super" not in names:
                return False
    return False


def _code_names(code: CodeType) -> set[str]:
    """The global and attribute names that a function, and the functions defined in it, use."""
    inner = (_code_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)

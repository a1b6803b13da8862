"""How the ranks of a process group agree on what they compute: who holds which classes, and who has found an error."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import eager
from .functional import CHECK_TARGETS, DTYPES, check_input, check_layout, check_target, check_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Layout(NamedTuple):
    """Which rank of a group holds which classes.

    Where the host may look, it has checked all this; elsewhere ``classes`` and ``start`` may be tensors () on the
    device, and ``sound`` says there whether the ranks fit together.
    """

    group: ProcessGroup
    starts: Tensor  # (ranks,) int64: the first class of each rank, and
    sizes: Tensor  # how many it has
    start: int | Tensor  # of this rank
    classes: int | Tensor  # of all ranks
    sound: Tensor | None


class Arguments(NamedTuple):
    """What every rank gives; all but the logits and ``vocab_start`` is to be the same on all of them."""

    logits: Tensor  # (V_local,) or (N, V_local, ...)
    target: Tensor
    weight: Tensor | None
    vocab_start: int | None
    options: tuple[Any, ...]


def gather(stats: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape and dtype, as (ranks, ...)."""
    from torch import distributed

    # The newer name of the same function; the older one warns where there are both.
    collective = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gathered = stats.new_empty(group.size() * stats.numel())
    if stats.numel() > 0:
        collective(gathered, stats.flatten(), group=group)
    return gathered.view(group.size(), *stats.shape)


def resolve_group(group: ProcessGroup | None) -> ProcessGroup:
    """The group, or the default one; raise where there is none, or this process is not in it."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group first, or use prsl_cross_entropy in "
            "a single process"
        )
    if group is None:
        group = distributed.group.WORLD
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group must be a process group with this process in it, but is {group!r}: pass what "
            "torch.distributed.new_group returns on its members, or mesh.get_group()"
        )
    return group


# ---- what each rank tells the others ---------------------------------------------------------------------------------

# In int64. All but the place of its shard must be the same.
HEADER = ("start", "size", "refused", "number of tokens", "dtype of local_logits", "options", "target", "weight")


@contextmanager
def telling_others(group: ProcessGroup, *tensors: Any) -> Iterator[None]:
    """Raise an error of this rank when the others have heard of it, since they would wait for its header forever."""
    try:
        yield
    except Exception:
        devices = [x.device for x in tensors if isinstance(x, Tensor) and x.device.type != "meta"]
        refusal = [int(name == "refused") for name in HEADER]
        gather(to_device(refusal, devices[0] if devices else torch.device("cpu")), group)
        raise


def header_of(given: Arguments) -> Tensor:
    """The header of a rank, on the device of its logits."""
    logits, target, weight, vocab_start, options = given
    shape = None if weight is None else weight.shape
    others = (vocab_start is None, target.shape, target.dtype, shape, options)
    class_dim = min(1, logits.dim() - 1)
    numbers = [
        -1 if vocab_start is None else int(vocab_start),
        logits.shape[class_dim],
        0,
        math.prod(logits.shape[:class_dim] + logits.shape[class_dim + 1 :]),
        DTYPES.index(logits.dtype),
        zlib.crc32(repr(others).encode()),
    ]
    bits = target.new_zeros(0) if weight is None else weight.detach().double().view(torch.int64)
    return torch.cat((to_device(numbers, logits.device), checksum(target.long()), checksum(bits)))


def checksum(numbers: Tensor) -> Tensor:
    """A sum (1,) of int64 that changes with their order: ranks that read different data are a common mistake."""
    odd = 2 * torch.arange(numbers.numel(), device=numbers.device) + 1
    return (numbers.flatten() * odd).sum()[None]


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers as an int64 tensor, without waiting for the device."""
    tensor = torch.tensor(numbers, device="cpu")
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def layout_of(headers: Tensor, group: ProcessGroup, vocab_start: int | None, weight: Tensor | None) -> Layout:
    """The layout from the headers (ranks, 8); on the CPU, ValueError where the ranks do not fit together."""
    given, sizes, refused, *_ = headers.T
    starts = sizes.cumsum(0) - sizes if vocab_start is None else given
    # In the order of the vocabulary, each shard starts where those before it end; an empty one may lie anywhere.
    order = starts.where(sizes > 0, torch.iinfo(torch.int64).max).argsort()
    sorted_sizes = sizes[order]
    fits = (starts[order] == sorted_sizes.cumsum(0) - sorted_sizes) | (sorted_sizes == 0)
    equal = (headers == headers[0])[:, 2:]
    sound = fits.all() & equal.all()
    known = sound.item() if CHECK_TARGETS else eager.known(sound)
    if known is None:
        classes = sizes.sum()
        start = starts[group.rank()] if vocab_start is None else vocab_start
        return Layout(
            group, starts, sizes, start, classes, sound if weight is None else sound & (classes == weight.numel())
        )

    if refused.any():
        alone = refused.nonzero().flatten().tolist()
        raise RuntimeError(
            f"the loss cannot be computed, since ranks {alone} of the group raise an error: see what they say"
        )
    for name, column in zip(HEADER[3:], headers.T[3:].tolist(), strict=True):
        if len(set(column)) > 1:
            what = "arguments besides local_logits and vocab_start, and shapes" if name == "options" else name
            values = f", but have {column}" if name == "number of tokens" else ""
            raise ValueError(f"all ranks must have the same {what}{values}")
    if not known:
        spans = ", ".join(f"[{s}, {s + n})" for s, n in zip(starts.tolist(), sizes.tolist(), strict=True))
        raise ValueError(
            f"the ranks must hold every class once, but hold {spans}: correct vocab_start, or leave it out where the "
            "shards lie in the order of the ranks"
        )
    return Layout(group, starts, sizes, int(starts[group.rank()]), int(sizes.sum()), None)


# ---- checks ----------------------------------------------------------------------------------------------------------


def agree(given: Arguments, headers: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor | None, Layout]:
    """Check the tensors against each other; the logits, int64 targets, weight in the loss's dtype, and the layout."""
    logits, target, weight, vocab_start, (k, b, *_, ignore_index, _, _) = given
    layout = layout_of(headers, group, vocab_start, weight)

    # The checks of prsl_cross_entropy, for one number that stands in for the logits of all classes.
    classes = layout.classes
    if isinstance(classes, Tensor):
        classes = max(k + 1, logits.shape[min(1, logits.dim() - 1)]) if weight is None else weight.numel()
        if layout.sound is not None and b != 0:
            layout = layout._replace(sound=layout.sound & (layout.classes > k))
    shape = (classes,) if logits.dim() == 1 else (logits.shape[0], classes, *logits.shape[2:])
    whole = logits.detach().new_empty(()).expand(shape)
    check_input(whole, k, b, "the logits of all ranks")
    target = check_target(whole, target, ignore_index, "the logits of all ranks")
    check_weight(weight, whole, "the logits of all ranks")
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return logits, target, weight, layout


def check_local(given: Arguments) -> None:
    """Raise for what is wrong whatever the other ranks have."""
    logits, target, weight, vocab_start, (_, b, *_) = given
    check_input(logits, None, b, "local_logits")  # k is compared with the classes of all ranks
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of class indices, but is {type(target).__name__}")
    check_layout("target", target)
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices, but has {target.dtype}: for class probabilities, gather the logits of "
            "all ranks and use prsl_cross_entropy"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, but local_logits on {logits.device}: move one of them")
    check_weight(weight, None)
    if weight is not None and weight.device != logits.device:
        raise ValueError(f"weight is on {weight.device}, but local_logits on {logits.device}: move one of them")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, and there is none for it here: pass weight.detach()")
    if vocab_start is None:
        return
    if not isinstance(vocab_start, Integral) or isinstance(vocab_start, bool):
        raise TypeError(f"vocab_start must be an integer, but is {vocab_start!r} ({type(vocab_start).__name__})")
    if not 0 <= vocab_start < 2**63:
        raise ValueError(f"vocab_start must be the first class of this rank, but is {vocab_start}")


# ---- DTensors --------------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mesh_of(logits: Any) -> DeviceMesh | None:
    """The mesh of a DTensor, which has one dimension with this process in it; None for anything else."""
    if not is_dtensor(logits):
        return None
    mesh: DeviceMesh = logits.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"a DTensor of logits must be on a mesh of one dimension, but {logits.placements} are on one of shape "
            f"{tuple(mesh.shape)}: pass to_local() and the group of the ranks among which its classes are split"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process is not in the mesh of the DTensor local_logits, {mesh}")
    return mesh


def shard_of(logits: DTensor, group: ProcessGroup | None, vocab_start: int | None) -> tuple[Tensor, int]:
    """This rank's logits of a DTensor, and its first class."""
    from torch.distributed.tensor import Shard

    if group is not None or vocab_start is not None:
        raise ValueError("group and vocab_start come with the DTensor local_logits: leave them out, or pass to_local()")
    mesh, (placement,) = logits.device_mesh, logits.placements
    class_dim = min(1, logits.dim() - 1)
    # Not isinstance: there are subclasses that shard in another order.
    if not (type(placement) is Shard and placement.dim % logits.dim() == class_dim):
        raise ValueError(
            f"a DTensor of logits must be sharded over its classes, Shard({class_dim}), but has {placement!r}: "
            "redistribute it, or pass to_local() and the group of the ranks among which its classes are split"
        )
    classes = logits.shape[class_dim]
    most = -(-classes // mesh.size())  # in a shard; the last ones may have fewer
    return logits.to_local(), min(classes, mesh.get_local_rank() * most)


def replicated(name: str, tensor: Any) -> Any:
    """A DTensor that is the same on all ranks as a plain tensor; anything else as it is."""
    if not is_dtensor(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name} must be the same on all ranks, but is a DTensor with the placements {tensor.placements}: "
            "redistribute it to Replicate()"
        )
    return tensor.to_local()


def as_replicated(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that is the same on all ranks as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

"""The losses as citizens of PyTorch: what works with a loss of its own works with these, for a whole model.

Derivatives and the transforms of torch.func are in test_functional_transforms.py and test_linear.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from native_checks import same_bits
from pytorch_ranks import (
    CLASSES,
    HIDDEN,
    OPTIONS,
    Model,
    batches,
    cases,
    new_model,
    results_of_ranks,
    tokens_and_target,
    train,
)
from running import DEVICE, KERNELS, RUNNING
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import prsl_kernels
from prsl_kernels import PRSLoss, prsl_cross_entropy
from prsl_kernels.backends import native

pytestmark = [
    pytest.mark.usefixtures("_single_thread"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # numpy's, of Triton's interpreter
]
each_backend = pytest.mark.parametrize("backend", RUNNING)
each_loss = pytest.mark.parametrize("fused", [False, True], ids=["PRSLoss", "linear"])
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the same on every device, and made for the CPU")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(backend: str, size: int = 4) -> dict[str, Tensor]:
    """Some targets are ignored. An interpreter takes its time for every row."""
    return tokens_and_target(1 if backend == "triton" else size, ignored=2)


def value_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    loss = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def reference(model: nn.Module) -> Model:
    """The same weights with the loss of the whole logits, in plain PyTorch."""
    options = {name: x for name, x in model.head.options.items() if name not in ("backend", "inplace_backward")}
    twin = Model(fused=False, backend="eager", **options)
    twin.load_state_dict(model.state_dict())
    return twin


def assert_near(got: Any, want: Any) -> None:
    """As near as float32 is, where the same is summed in another order."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# ---- operators -------------------------------------------------------------------------------------------------------

# "prsl_triton" is for every device, but runs where Triton does.
RUNNABLE = ("prsl_kernels::", *(f"prsl_{name}::" for name in KERNELS))


def registered() -> list[str]:
    """Every operator that any module of the package registers."""
    for file in Path(prsl_kernels.__file__).parent.glob("*.py"):
        import_module(f"prsl_kernels.{file.stem}".removesuffix(".__init__"))
    return sorted({name for name in torch._C._dispatch_get_all_op_names() if name.startswith("prsl_")})


def samples() -> Iterator[tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]]:
    """Logits, targets, class weights and options: rows with everything, and half precision in a strange layout."""
    target = torch.tensor([7, -100, CLASSES - 1])
    yield torch.randn(3, CLASSES), target, torch.rand(CLASSES), (4, "prob", "l2", -100, 0.1)
    z = torch.randn(CLASSES + 2, 2, 3).bfloat16().movedim(0, -1)[..., :CLASSES]
    yield z, torch.randint(CLASSES, (2, 3)), None, (0, "log_prob", "l1", -1, 0.0)


def terms_samples() -> Iterator[tuple[Any, ...]]:
    for (z, target, weight, options), requires_grad in product(samples(), (False, True)):
        yield z.detach().requires_grad_(requires_grad), target, weight, *options


def gradient_samples(terms: Any) -> Iterator[tuple[Any, ...]]:
    """For an operator that takes what ``terms`` has saved, besides the two terms themselves."""
    for z, target, weight, options in samples():
        cross_entropy, penalty, *saved = terms(z, target, weight, *options)
        yield z, target, weight, *saved, torch.rand_like(cross_entropy), torch.rand_like(penalty), *options


def linear_samples() -> Iterator[tuple[Any, ...]]:
    (z, target, weight, options), _ = samples()
    hidden, matrix, bias, upstream = torch.randn(3, 4), torch.randn(CLASSES, 4), torch.randn(CLASSES), torch.rand(3)
    for backend in RUNNING:
        how = (torch.float32, backend, 2 * z[0].nbytes, *options)
        for grads, wanted in (((None, None), [True, True, True]), ((upstream, upstream), [True, True, False])):
            yield hidden, matrix, bias, target, weight, *grads, wanted, *how


COMPILED = ("native", "triton")
SAMPLES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "prsl_kernels::linear_terms": linear_samples,
    "prsl_kernels::token_gradient_": lambda: gradient_samples(prsl_kernels.ops.EAGER.forward),
    **{f"prsl_{name}::token_terms": terms_samples for name in COMPILED},
    **{
        f"prsl_{name}::{operator}": lambda name=name: gradient_samples(getattr(torch.ops, f"prsl_{name}").token_terms)
        for name, operator in product(COMPILED, ("token_gradient", "token_gradient_"))
    },
}


def test_every_operator_has_samples_for_opcheck() -> None:
    there = {name for name in SAMPLES if native.available or "native" not in name}
    assert set(registered()) == there


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks compare devices by name")
@pytest.mark.parametrize("name", [name for name in registered() if name.startswith(RUNNABLE)])
def test_opcheck_of_every_operator(name: str) -> None:
    """Schema, fake version, autograd, and a compiler's tracing with dynamic shapes, by PyTorch's own checks."""
    namespace, operator = name.split("::")
    for arguments in SAMPLES[name]():
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_profiler_names_the_kernels(backend: str) -> None:
    """Forward and backward, of the losses and of the fused one."""
    for fused, expected in (
        (False, {f"prsl_{backend}::token_terms", f"prsl_{backend}::token_gradient"}),
        (True, {"prsl_kernels::linear_terms", f"prsl_{backend}::token_terms", f"prsl_{backend}::token_gradient_"}),
    ):
        model = Model(fused, backend=backend)
        with profile() as profiled:
            model(**batch(backend)).backward()
        names = {event.key for event in profiled.key_averages()}
        assert {name for name in names if name.startswith("prsl_")} == expected


# ---- compilers -------------------------------------------------------------------------------------------------------


def compiled_training(fused: bool, backend: str, compiler: str) -> None:
    """Steps with batches of three sizes, as one graph of forward and backward each, and as without a compiler."""
    model = Model(fused, backend=backend)
    twin = copy.deepcopy(model)

    def step(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
        loss = model(tokens, target)
        loss.backward()
        return loss.detach()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.5, momentum=0.9) for x in (model, twin)]
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # else dynamo leaves backward to the caller
        for size in (1,) if backend == "triton" else (4, 6, 3):
            inputs = tokens_and_target(size, ignored=2)
            assert_near(compiled(model, **inputs), step(twin, **inputs))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_near(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.usefixtures("_fresh_compiler")
@each_backend
@each_loss
def test_compiled_training_without_a_graph_break(fused: bool, backend: str) -> None:
    compiled_training(fused, backend, "aot_eager")


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training_by_inductor() -> None:
    """Of the fused loss; its compilation of the other is in test_functional_transforms.py."""
    compiled_training(True, "auto", "inductor")


@on_the_cpu
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_hugging_face_model_without_a_graph_break() -> None:
    """The fused loss and its gradients, and the terms on the handle, which the compiled code writes."""
    model = new_model("GPT-2, tied")
    (inputs, *_) = batches("GPT-2, tied")
    handle = model.loss_function._prsl_handle
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        handle.last_terms = None
        loss = forward(**inputs).loss
        results.append((tuple(handle.last_terms), torch.autograd.grad(loss, list(model.parameters()))))
    assert_near(*results)


@lru_cache
def exported(strict: bool, fused: bool, backend: str) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """A model, and what is left of it after a way through a file, for batches of any size."""
    model = Model(fused, backend=backend, weight=torch.rand(CLASSES), label_smoothing=0.1)
    size = torch.export.Dim("size", min=1, max=1000)
    sizes = {"tokens": {0: size}, "target": {0: size}}
    program = torch.export.export(model, (), tokens_and_target(4), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return model, torch.export.load(file)


each_export = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


@each_backend
@each_loss
@each_export
def test_an_exported_model_has_the_same_loss(strict: bool, fused: bool, backend: str) -> None:
    model, program = exported(strict, fused, backend)
    for size in (4, 7):
        inputs = batch(backend, size)
        assert_near(program.module()(**inputs), model(**inputs))


@each_backend
@each_loss
@each_export
def test_an_exported_model_can_be_trained(strict: bool, fused: bool, backend: str) -> None:
    model, program = exported(strict, fused, backend)
    inputs = batch(backend, 7)
    assert_near(value_and_gradients(program.module(), inputs), value_and_gradients(model, inputs))


# ---- precision -------------------------------------------------------------------------------------------------------


@each_backend
@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_training_under_autocast(dtype: torch.dtype, fused: bool, backend: str) -> None:
    """With a scaler. The loss and the parameters' gradients are float32, and as near as the logits' dtype allows."""
    model = Model(fused, backend=backend)
    inputs = batch(backend)
    loss, gradients = value_and_gradients(reference(model), inputs)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[torch.dtype] = []
    model.body.register_full_backward_hook(lambda *x: seen.append(x[2][0].dtype))
    with torch.autocast(DEVICE, dtype):
        half = model(**inputs)
    assert half.dtype == torch.float32
    scaler.scale(half).backward()
    scaler.unscale_(optimizer)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(half, loss, rtol=eps, atol=0)
    assert seen == [dtype]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradients[name]).norm() < 3 * eps * gradients[name].norm(), name


# ---- autograd --------------------------------------------------------------------------------------------------------


# What to give to a head, besides the backend. The fused loss has no logits to overwrite.
HEADS: dict[str, dict[str, Any]] = {
    "PRSLoss": {"fused": False},
    "PRSLoss, inplace_backward": {"fused": False, "inplace_backward": True},
    "linear": {"fused": True},
    "linear, a loss for each token": {"fused": True, "reduction": "none"},
}
each_head = pytest.mark.parametrize("head", HEADS)


@each_backend
@each_head
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_of_head_and_loss(reentrant: bool, head: str, backend: str) -> None:
    """Computed a second time, logits may be overwritten just as well."""
    model = Model(**HEADS[head], backend=backend)
    inputs = batch(backend)
    want = value_and_gradients(reference(model), inputs)
    calls: list[nn.Module] = []
    model.head.register_forward_pre_hook(lambda module, _: calls.append(module))
    hidden = model.body(model.embedding(inputs["tokens"])).tanh()
    loss = checkpoint(model.head, hidden, inputs["target"], use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    loss.mean().backward()
    assert len(calls) == 2
    assert_near((loss.mean().detach(), {name: p.grad for name, p in model.named_parameters()}), want)


@each_backend
@each_head
@pytest.mark.parametrize("where", ["copies", "save_on_cpu"])
def test_saved_tensors_may_be_kept_elsewhere(where: str, head: str, backend: str) -> None:
    """What hooks pack and unpack are other tensors than the losses have saved."""
    model = Model(**HEADS[head], backend=backend)
    inputs = batch(backend)
    want = value_and_gradients(reference(model), inputs)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x.detach().clone())
        return len(packed) - 1

    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda at: packed[at].clone())
    with kept if where == "copies" else torch.autograd.graph.save_on_cpu():
        got = value_and_gradients(model, inputs)
    assert_near(got, want)
    assert bool(packed) == (where == "copies")


@each_backend
@each_head
def test_functional_call(head: str, backend: str) -> None:
    model = Model(**HEADS[head], backend=backend)
    inputs = batch(backend)
    loss, gradients = value_and_gradients(reference(model), inputs)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    got = functional_call(model, others, (), inputs)
    assert_near(got, loss)
    assert_near(dict(zip(others, torch.autograd.grad(got, list(others.values())), strict=True)), gradients)


@each_backend
@each_head
def test_anomaly_mode(head: str, backend: str) -> None:
    """It changes nothing, and reports a NaN in a gradient, unless the token is ignored, which then has none."""
    model = Model(**HEADS[head], backend=backend)
    layer = model.head.requires_grad_(False)  # whose gradient would be NaN: a gradient of 0 times the NaN
    hidden, target = torch.randn(4, HIDDEN, requires_grad=True), torch.randint(CLASSES, (4,))
    target[1] = -100
    want = torch.autograd.grad(reference(model).head(hidden, target).mean(), hidden)
    with torch.autograd.set_detect_anomaly(True):
        assert_near(torch.autograd.grad(layer(hidden, target).mean(), hidden), want)
        hidden.data[1, 0] = torch.nan
        torch.autograd.grad(layer(hidden, target).nanmean(), hidden)
        hidden.data[2, 0] = torch.nan
        with pytest.warns(UserWarning, match="Traceback of forward call"), pytest.raises(RuntimeError, match="nan val"):
            torch.autograd.grad(layer(hidden, target).sum(), hidden)


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is full of NaN then, too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_deterministic")
@each_backend
@each_head
def test_deterministic_algorithms(head: str, backend: str) -> None:
    """Nothing raises, and the bits are the same each time."""
    model = Model(**HEADS[head], backend=backend, weight=torch.rand(CLASSES), label_smoothing=0.1)
    inputs = batch(backend, 40)
    loss, gradients = value_and_gradients(model, inputs)
    assert_near((loss, gradients), value_and_gradients(reference(model), inputs))
    for _ in range(3):
        again, gradients_again = value_and_gradients(model, inputs)
        assert same_bits(again, loss)
        assert all(same_bits(x, gradients[name]) for name, x in gradients_again.items())


# ---- the module ------------------------------------------------------------------------------------------------------


def through_a_file(loss: PRSLoss) -> PRSLoss:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), through_a_file]
)
def test_copies_of_the_module(duplicate: Callable[[PRSLoss], PRSLoss]) -> None:
    loss = PRSLoss(torch.rand(CLASSES), k=3, b=0.5, space="log_prob", distance="l1", label_smoothing=0.1)
    twin = duplicate(loss)
    z, target = torch.randn(5, CLASSES), torch.randint(CLASSES, (5,))
    assert same_bits(twin(z, target), loss(z, target))
    assert repr(twin) == repr(loss)
    assert twin.weight is not None
    assert (twin.weight is loss.weight) == (duplicate is copy.copy)


def test_state_dict_is_that_of_cross_entropy_loss() -> None:
    """Through a file, and in exchange with torch.nn.CrossEntropyLoss; options are not in it."""
    trained = PRSLoss(torch.rand(CLASSES), **OPTIONS)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, stock = PRSLoss(torch.ones(CLASSES), **OPTIONS), nn.CrossEntropyLoss(torch.ones(CLASSES))
    fresh.load_state_dict(state)
    z, target = torch.randn(5, CLASSES), torch.randint(CLASSES, (5,))
    assert same_bits(fresh(z, target), trained(z, target))
    stock.load_state_dict(state)
    plain = PRSLoss(torch.ones(CLASSES), b=0)
    plain.load_state_dict(stock.state_dict())
    assert_near(plain(z, target), stock(z, target))
    assert list(PRSLoss().state_dict()) == list(nn.CrossEntropyLoss().state_dict()) == []


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def _default_on_the_cpu() -> Iterator[None]:
    """Gloo sends what is there."""
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(before)


@lru_cache
def of_one_process(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and weights of the same steps with whole batches, from logits."""
    return train(new_model(name, fused=False), batches(name))


@pytest.mark.usefixtures("_default_on_the_cpu")
@pytest.mark.parametrize(("wrapper", "name"), list(cases()))
def test_training_in_two_processes_is_training_in_one(wrapper: str, name: str) -> None:
    """The weights after two steps, each rank with a half of the batch."""
    losses, weights = of_one_process(name)
    found = [result[wrapper, name] for result in results_of_ranks()]
    mean = [torch.stack(of_all).mean(0) for of_all in zip(*(rank_losses for rank_losses, _ in found), strict=True)]
    before = dict(new_model(name).named_parameters())
    for _, rank_weights in found:
        assert rank_weights.keys() == weights.keys()
        for key, got in rank_weights.items():
            assert same_bits(got, found[0][1][key]), key
            if "bfloat16" in wrapper:
                assert (got - weights[key]).norm() < 0.1 * (weights[key] - before[key].detach()).norm(), key
            else:
                torch.testing.assert_close(got, weights[key], rtol=1e-4, atol=1e-6, msg=key)
    torch.testing.assert_close(mean, losses, rtol=1e-2 if "bfloat16" in wrapper else 1e-5, atol=0)


@pytest.mark.usefixtures("_default_on_the_cpu")
def test_a_sharded_matrix_outside_of_its_forward_is_refused_with_a_remedy_that_works() -> None:
    for result in results_of_ranks():
        found = result["a sharded matrix"]
        assert (
            "linear_weight must be a plain tensor, but is a DTensor: gather it with full_tensor()" in found["message"]
        )
        weight = new_model("linear").head.weight
        loss = prsl_cross_entropy(found["hidden"] @ weight.t(), found["target"], **OPTIONS)
        assert_near(found["gradient"], torch.autograd.grad(loss, weight)[0])

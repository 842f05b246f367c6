"""BatchNormAct in the networks: torch's batch norm, addition and ReLU within rounding, with torch's keys, counters and errors."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks.config import replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.models import MODELS, BatchNormAct, build_model, norm_of, settle_counts, synchronized, use_norm
from fasttricks.models.norm import Norm, SyncBatchNormAct, second_use
from lib.networks import error_beside, with_random_norms
from lib.tables import covering

NETWORKS = {"resnet18b": 64, "resnet50d": 64, "mobilenet_v1": 64, "inception_v3": 96, "cifarnet": 33}
WIDTH = 0.125


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.models.norm.FEWEST_ON_CPU", 0)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


def calls(model: nn.Module, images: Tensor) -> int:
    """Calls of batch_norm_act in a forward pass."""
    with mock.patch("fasttricks.models.norm.batch_norm_act", side_effect=fk.batch_norm_act) as counted:
        model(images)
    return counted.call_count


def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits, the gradient of each parameter and the buffers after one step, by name."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.float().square().mean().backward()
    grads = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    settle_counts(model.modules())
    found = {"logits": logits.detach(), **grads, **dict(model.named_buffers())}
    return {name: value.double() for name, value in found.items() if value is not None}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of a tensor, relative to its largest value."""
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-30)) for n in wanted)


@pytest.mark.parametrize(("name", "training"), covering(list(NETWORKS), [True, False]))
def test_a_network_is_as_right_as_with_torchs(name: str, training: bool) -> None:
    """Both in float32, against torch's in float64."""
    torch.manual_seed(0)
    fused = with_random_norms(MODELS[name](num_classes=5, width=WIDTH)).train(training)
    fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = copy.deepcopy(fused)
    use_norm(theirs, "torch")
    exact = copy.deepcopy(theirs).double()
    images = channels_last(4, 3, NETWORKS[name], NETWORKS[name])
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert (calls(fused.eval(), images), calls(theirs.eval(), images)) == (norms, 0)
    results = []
    for model, batch in ((fused, images), (theirs, images), (exact, images.double())):
        torch.manual_seed(1)  # Inception's dropout
        results.append(step(model.train(training), batch))
    assert list(fused.state_dict()) == list(theirs.state_dict()) == list(MODELS[name](norm="torch").state_dict())
    ours, torchs, right = results
    assert error_beside(ours, torchs, right) <= 1.3 and max(worst(torchs, right), worst(ours, right)) < 0.02


@pytest.mark.parametrize(
    ("kind", "added", "act"),
    covering(
        ["fused", "torch", "float16", "bfloat16", "float64", "NCHW", "no compiler"],
        [False, True],
        ["none", "relu", "relu6"],
        together=2,
    ),
)
def test_a_layer_is_torchs_in_every_form(kind: str, added: bool, act: Any) -> None:
    dtype = getattr(torch, kind) if kind.startswith(("float", "bfloat")) else torch.float32
    torch.manual_seed(0)
    norm = BatchNormAct(8, act)
    norm.norm = "torch" if kind == "torch" else "fused"
    norm = norm.double() if dtype == torch.float64 else norm
    x, residual = channels_last(4, 8, 6, 6, dtype=dtype), channels_last(4, 8, 6, 6, dtype=dtype)
    x = x.contiguous() if kind == "NCHW" else x
    before = x.clone(), residual.clone()
    theirs = nn.BatchNorm2d(8).double()
    y = theirs(x.double()) + (residual.double() if added else 0.0)
    wanted = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[act](y)
    place = "fasttricks.models.norm."
    with (
        mock.patch(f"{place}batch_norm_act", side_effect=fk.batch_norm_act) as counted,
        mock.patch(f"{place}batch_norm_compiled", return_value=kind != "no compiler"),
    ):
        found = norm(x, residual if added else None)
    assert counted.call_count == (kind == "fused")
    assert found.dtype == dtype
    atol = {2: 0.05, 4: 2e-6, 8: 1e-14}[dtype.itemsize]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)
    torch.testing.assert_close(norm.running_var.double(), theirs.running_var, rtol=atol, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert norm.state_dict()["num_batches_tracked"] == 1


def test_counters_are_torchs_wherever_they_are_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct(8, "relu"), nn.Conv2d(8, 8, 3), BatchNormAct(8))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    theirs.load_state_dict(model.state_dict())
    images = channels_last(2, 3, 8, 8)
    key = "1.num_batches_tracked"

    def both(do: Any) -> None:
        for one in (model, theirs):
            do(one)
        ours, wanted = ({k: v.clone() for k, v in one.state_dict().items() if "num_" in k} for one in (model, theirs))
        assert ours == wanted

    both(lambda one: [one(images) for _ in range(3)])
    both(lambda one: one.eval()(images))
    both(lambda one: one[1].train() and one(images))  # the other is frozen
    both(lambda one: (one.train()(images), one.load_state_dict({key: torch.tensor(40)}, strict=False), one(images)))
    both(lambda one: (one(images), one.load_state_dict(one.state_dict()), one(images)))
    both(lambda one: (one(images), one[1].reset_running_stats(), one(images)))
    copied = copy.deepcopy(model)
    both(lambda one: one(images))
    assert copied.state_dict()[key] == model.state_dict()[key] - 1
    for one in (model, theirs):
        one[1].momentum = None
    both(lambda one: one(images))  # type: ignore[no-any-return]
    torch.testing.assert_close(model[1].running_mean, theirs[1].running_mean)


def test_small_tensors_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.models.norm.FEWEST_ON_CPU", 2 * 8 * 16)
    norm = BatchNormAct(8, "relu")
    assert [calls(norm, channels_last(2, 8, *sides)) for sides in ((3, 5), (4, 4))] == [0, 1]


def test_no_step_counts_on_the_device() -> None:
    norms = nn.Sequential(*(BatchNormAct(8) for _ in range(5))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = channels_last(2, 8, 4, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norms(images)
    names = [event.name for event in profile.events()]
    assert not any("add" in name for name in names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        settle_counts(norms.modules())
    assert sum(event.name == "aten::_foreach_add_" for event in profile.events()) == 1


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((1, 8, 1, 1), torch.float32, ValueError, "Expected more than 1 value per channel when training"),
        ((2, 7, 3, 3), torch.float32, RuntimeError, "should contain 7 elements not 8"),
        ((2, 8, 3), torch.float32, ValueError, "expected 4D input"),
    ],
)
def test_wrong_input_has_torchs_errors(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], message: str, fused: bool
) -> None:
    norm = BatchNormAct(8, "relu")
    norm.fused = fused
    for layer in (norm, nn.BatchNorm2d(8)):
        with pytest.raises(error, match=message):
            layer(torch.randn(shape, dtype=dtype))


def test_an_empty_batch_leaves_the_statistics() -> None:
    norm, theirs = BatchNormAct(8, "relu"), nn.BatchNorm2d(8)
    empty = torch.empty(0, 8, 4, 4).to(memory_format=torch.channels_last)
    assert norm(empty).shape == theirs(empty).shape
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in norm.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_compile_export_and_tracing_see_torchs_operators() -> None:
    torch.manual_seed(0)
    model = with_random_norms(MODELS["resnet10d"](num_classes=3, width=WIDTH)).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = channels_last(2, 3, 32, 32)
    wanted = model(images)
    exported = torch.export.export(model, (images,))
    traced = torch.jit.trace(model, (images,), check_trace=False)
    symbolic = torch.fx.symbolic_trace(model)
    graphs: list[Any] = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for network in (exported.module(), traced, symbolic, compiled):
        torch.testing.assert_close(network(images), wanted)
    operators = {str(node.target) for graph in (exported.graph, graphs[0].graph) for node in graph.nodes}
    assert not any("fasttricks" in name for name in operators) and any("batch_norm" in name for name in operators)
    assert "fasttricks_kernels" not in str(traced.inlined_graph)
    assert len(graphs) == 1


def test_autograd_adds_no_gradients_of_a_blocks_two_paths() -> None:
    """But those of the stem's output, which is the pooling's. Hooks and callers see one tensor a block."""
    model = MODELS["resnet18b"](num_classes=3, width=WIDTH).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: list[Any] = []
    for name, module in model.named_modules():
        if name.count(".") == 1 and name.startswith("layer"):
            module.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    sums = []
    for norm in ("fused", "torch"):
        use_norm(model, norm)  # type: ignore[arg-type]
        model.zero_grad()  # else each gradient is added to the one before
        logits = model(channels_last(4, 3, 32, 32))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits.square().mean().backward()
        sums.append(sum(event.name in ("aten::add", "aten::add_") for event in profile.events()))
    assert sums == [1, 8]
    assert len(seen) == 16 and all(type(one) is Tensor for call in seen for one in call)
    with torch.no_grad():
        assert not second_use_is_apart(model, channels_last(4, 3, 32, 32))
    assert second_use_is_apart(model, channels_last(4, 3, 32, 32))


def second_use_is_apart(model: nn.Module, images: Tensor) -> bool:
    use_norm(model, "fused")
    features: Any = model
    first, *_, last = features.features(images)
    assert second_use(last) is last  # it has one use
    return second_use(first) is not first


def test_synchronised_layers_keep_tensors_and_activations() -> None:
    """In evaluation, the only mode of torch's that a CPU runs."""
    model = with_random_norms(MODELS["resnet10d"](num_classes=3, width=WIDTH)).eval()
    images, before = channels_last(2, 3, 32, 32), dict(model.state_dict(keep_vars=True))
    wanted = model(images)
    others = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    both = synchronized(nn.ModuleDict({"ours": model, "others": others}))
    norms = [module for module in both.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert sum(isinstance(norm, SyncBatchNormAct) for norm in norms) == len(norms)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())
    torch.testing.assert_close(model(images), wanted)


def test_fake_tensors_take_the_operator_in_any_precision() -> None:
    """They stand for those of a GPU: footprint counts by them."""
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        norm = BatchNormAct(8, "relu")
        norm.norm = "fused"
        x = torch.empty(2, 8, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
        norm(x, x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    named = [name for name in seen if "batch_norm" in name]
    assert named == ["fasttricks_kernels.batch_norm_act.default", "fasttricks_kernels.batch_norm_act_backward.default"]


@pytest.mark.parametrize("norm", ["auto", "fused", "torch"])
@pytest.mark.parametrize("graphed", [False, True])
def test_auto_is_fused_on_a_cpu_and_where_a_gpus_steps_are_replayed(norm: Norm, graphed: bool) -> None:
    config = replace_fields(RECIPES["cifar10"](), {"model.norm": norm, "cuda_graph": graphed})
    network = build_model(config.model, 3)
    use_norm(network, norm_of(config))
    layers = [module for module in network.modules() if isinstance(module, BatchNormAct)]
    with FakeTensorMode():  # a GPU's
        there = torch.empty(64, 8, 32, 32).to(memory_format=torch.channels_last)
    here = torch.empty(64, 8, 32, 32).to(memory_format=torch.channels_last)
    for x, fused in ((there, norm == "fused" or (norm == "auto" and graphed)), (here, norm != "torch")):
        assert [layer._has_kernel(x) for layer in layers] == [fused] * len(layers)

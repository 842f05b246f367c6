"""batch_norm_act where torch's dispatcher is needed: opcheck, compile, export and fake tensors, with an eager call's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fasttricks_kernels as fk
from lib.interpreter import interpreted

OPTIONS: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5}


def channels_last(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options).to(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(
    ("dtype", "act", "training", "with_residual", "fork"),
    [
        (torch.float32, "relu", True, True, True),
        pytest.param(torch.float16, "relu", False, False, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, "none", True, True, True, marks=pytest.mark.slow),
        pytest.param(torch.float16, "none", True, True, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "relu6", True, False, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
@interpreted
def test_opcheck(dtype: torch.dtype, act: str, training: bool, with_residual: bool, fork: bool) -> None:
    ops = torch.ops.fasttricks_kernels
    x, residual, grad, second = (channels_last(2, 8, 3, 3).to(dtype) for _ in range(4))
    weight, bias, mean, var = (torch.rand(8) for _ in range(4))
    momentum = torch.tensor(0.5) if training else None
    options = act, training, 0.1, 1e-5
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    arguments = *leaves[:3], mean, var, leaves[3] if with_residual else None, momentum, fork, *options
    torch.library.opcheck(ops.batch_norm_act.default, arguments)
    arguments = *arguments[:5], residual if with_residual else None, momentum, fork, *options
    _, _, numbers, bits, *_ = (result.detach() for result in ops.batch_norm_act(*arguments))
    assert bits.nbytes == (x.nbytes // 16 if with_residual and act != "none" else 0)
    saved = x, bits if bits.numel() else None, numbers
    more = second if fork else None, *saved, with_residual
    torch.library.opcheck(ops.batch_norm_act_backward.default, (grad, *more, *options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_an_operator_called_where_no_kernel_is_computes_by_the_reference(dtype: torch.dtype, training: bool) -> None:
    """On the CPU, in a dtype that its kernel does not know; a stand-in for a GPU calls it so."""
    ops, wide = torch.ops.fasttricks_kernels, torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, grad = (channels_last(2, 8, 3, 3).to(dtype) for _ in range(3))
    weight, bias, mean, var = (torch.rand(8, dtype=wide) + 0.5 for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    options: dict[str, Any] = {**OPTIONS, "act": "relu", "training": training}
    running = mean.clone(), var.clone()
    y = fk.batch_norm_act(*leaves[:3], *running, residual=leaves[3], **options)
    found, _, numbers, bits, *moved = ops.batch_norm_act(
        x, weight, bias, mean, var, residual, None, False, "relu", training, 0.1, 1e-5
    )
    assert torch.equal(found, y) and all(map(torch.equal, moved, running))
    step = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    true = torch.autograd.grad(y, leaves, grad)
    for mask in (bits, found):
        grads = ops.batch_norm_act_backward(grad, None, x, mask, numbers, True, "relu", training, 0.1, 1e-5)
        for got, wanted in zip(grads, true, strict=True):
            torch.testing.assert_close(got, wanted, rtol=step, atol=4 * step)


class Program(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(8)
        self.act: Any = "relu6"

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A fork, and the network without one that follows it."""
        norm = self.norm
        numbers = norm.weight, norm.bias, norm.running_mean, norm.running_var
        y, second = fk.batch_norm_act(x, *numbers, residual=residual, act=self.act, fork=True, **OPTIONS)
        return 2 * y, fk.batch_norm_act(second, *numbers, act=self.act, **OPTIONS)


def step(program: Any, module: Program) -> list[Tensor]:
    torch.manual_seed(0)
    x, residual = (channels_last(2, 8, 5, 5).requires_grad_() for _ in range(2))
    ys = program(x, residual)
    grads = torch.autograd.grad(ys, [x, residual, *module.norm.parameters()], [torch.randn_like(y) for y in ys])
    return [*(y.detach() for y in ys), *grads, module.norm.running_mean.clone(), module.norm.running_var.clone()]


@interpreted
def test_a_compiled_step_has_the_bits_of_an_eager_one() -> None:
    """One graph, forward and backward, the running statistics moved too."""
    eager, module = Program(), Program()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda graph, example: make_boxed_func(backend(graph, example)))
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for got, true in zip(step(compiled, module), step(eager, eager), strict=True):
        assert torch.equal(got, true)
    targets = [name for graph in graphs for name in graph]
    assert [sum(op in name for name in targets) for op in ("batch_norm_act.default", "act_backward.default")] == [2, 2]


@interpreted
def test_export() -> None:
    """For any batch; the exported program moves the running statistics too."""
    module, again = Program(), Program()
    x, residual = channels_last(3, 8, 5, 5), channels_last(3, 8, 5, 5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (x, residual), dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (3, 5):
        x, residual = channels_last(size, 8, 5, 5), channels_last(size, 8, 5, 5)
        assert all(torch.equal(a, b) for a, b in zip(program(x, residual), again(x, residual), strict=True))
    assert torch.equal(program.norm.running_mean, again.norm.running_mean)


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        x, residual = (torch.empty(4, 6, 6, 8, device="cuda", dtype=torch.float16).movedim(-1, 1) for _ in range(2))
        weight, bias, mean, var = (torch.ones(8, device="cuda") for _ in range(4))
        momentum = torch.ones((), device="cuda")
        options = {"training": True, "momentum": momentum, "eps": 1e-5}
        y, second = fk.batch_norm_act(x, weight, bias, mean, var, residual=residual, act="relu", fork=True, **options)
        ops = torch.ops.fasttricks_kernels
        numbers = weight, bias, mean, var
        bits = ops.batch_norm_act(x, *numbers, residual, momentum, False, "relu", True, 0.1, 1e-5)[3]
        grads = ops.batch_norm_act_backward(y, second, x, bits, weight.expand(4, 8), True, "relu", True, 0.1, 1e-5)
    assert bits.device.type == "cuda" and bits.dtype == torch.uint8 and bits.nbytes == x.nbytes // 16
    for tensor in (y, second, grads[0], grads[3]):
        assert tensor.device.type == "cuda" and tensor.shape == x.shape and tensor.dtype == x.dtype
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.shape == (8,) and tensor.dtype == torch.float32 for tensor in grads[1:3])

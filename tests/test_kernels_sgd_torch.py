"""MasterSGD in the place of torch.optim.SGD: by the inputs and the properties that torch's and apex's own tests have.

The inputs are those of torch.testing._internal.common_optimizers, whose import takes seconds: typed here, and compared with
torch's list in a slow test. The properties are those of torch's test_optim.py and of apex's tests of FusedSGD.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

import fasttricks_kernels as fk
from lib.forked import forked

Options = dict[str, Any]
INPUTS: dict[str, Options] = {
    "default": {},
    "non-default lr": {"lr": 1e-2},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "non-zero weight_decay": {"weight_decay": 0.5},
    "momentum": {"momentum": 0.9},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "weight_decay w/ momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
every_input = pytest.mark.parametrize("name", INPUTS)


def draw(dtype: torch.dtype = torch.float32, *, dense: bool = True) -> list[Tensor]:
    """A matrix and a vector, as torch's tests have them; `dense=False`: every second element of a larger tensor."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype) for shape in ((10, 5), (10,))]
    return [(t[..., 0].clone() if dense else t[..., 0]).requires_grad_() for t in drawn]


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], count: int = 5, seed: int = 1, **step: Any) -> None:
    """Steps on gradients that depend on the seed alone, of other strides than the matrix."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            grad = torch.randn(p.shape[::-1], generator=generator, dtype=torch.float64)
            p.grad = grad.to(p.dtype).permute(*range(p.dim() - 1, -1, -1))
        optimizer.step(**step)


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance, check_stride=False)


# ---------------------------------------------------------------------------------------------------------- updates


def check_updates(options: Options) -> None:
    """As torch.optim.SGD, of dense parameters and of others, in one group and in two with a learning rate of their own."""
    for dense in (True, False):
        for dtype in (torch.float32, torch.float64):
            for two in (False, True):
                ours, theirs = draw(dtype, dense=dense), draw(dtype, dense=dense)
                pair = []
                for kind, params in ((fk.MasterSGD, ours), (torch.optim.SGD, theirs)):
                    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 1e-2}] if two else params
                    pair.append(kind(groups, **options))
                    steps(pair[-1], params)
                assert_equal(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-14)
                for a, b in zip(ours, theirs, strict=True):
                    assert pair[0].state.get(a, {}).keys() == pair[1].state.get(b, {}).keys()
                    for name, value in pair[0].state.get(a, {}).items():
                        assert_equal([value], [pair[1].state[b][name]])


@every_input
def test_updates_are_torchs(name: str) -> None:
    check_updates(INPUTS[name])


@every_input
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_follow_torchs_float32_weights(name: str, dtype: torch.dtype) -> None:
    ours = draw(dtype, dense=False)
    theirs = [p.detach().float().requires_grad_() for p in ours]
    optimizer, sgd = fk.MasterSGD(ours, **INPUTS[name]), torch.optim.SGD(theirs, **INPUTS[name])
    for seed in range(5):
        steps(optimizer, ours, 1, seed)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.float()
        sgd.step()
    assert_equal([optimizer.master_of(p) for p in ours], theirs)
    assert all(torch.equal(p.detach(), optimizer.master_of(p).to(dtype)) for p in ours)


@every_input
def test_a_parameter_that_comes_late_has_its_own_first_step(name: str) -> None:
    """Without a gradient nothing is done and nothing is kept; torch's first step is not dampened."""
    results = []
    for kind in (fk.MasterSGD, torch.optim.SGD):
        matrix, vector = draw()
        optimizer = kind([matrix, vector], **INPUTS[name])
        before = vector.detach().clone()
        steps(optimizer, [matrix], 2)
        assert torch.equal(vector.detach(), before) and vector not in optimizer.state
        steps(optimizer, [matrix, vector], 3)
        vector.grad = None
        steps(optimizer, [matrix], 1)
        results.append([matrix, vector])
    assert_equal(*results)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: StepLR(o, gamma=0.9, step_size=2),
    "LinearLR": lambda o: LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: ExponentialLR(o, gamma=0.9),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=o.defaults["momentum"] > 0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["default", "tensor lr", "nesterov"])
def test_schedulers_set_its_rate(name: str, scheduler: str) -> None:
    if (name, scheduler) == ("tensor lr", "CyclicLR"):
        name = "non-default lr"  # torch's own CyclicLR wants the two rates as tensors there
    results = []
    for kind in (fk.MasterSGD, torch.optim.SGD):
        params = draw()
        optimizer = kind(params, **copy.deepcopy(INPUTS[name]))
        schedule = SCHEDULERS[scheduler](optimizer)
        for seed in range(5):
            steps(optimizer, params, 1, seed)
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        results.append(params)
    assert_equal(*results)


def test_sparse_gradients_are_taken_as_dense() -> None:
    results = []
    for sparse in (True, False):
        table = nn.Embedding(7, 3, sparse=sparse, _weight=torch.ones(7, 3))
        optimizer = fk.MasterSGD(table.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for ids in ([1, 1, 6], [0]):
            optimizer.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            optimizer.step(loss_scale=torch.tensor(2.0))
        results.append([table.weight])
    assert_equal(*results)


def test_overflow_is_seen_in_a_gradient_of_any_layout() -> None:
    """The kernel takes a gradient as one run of memory: a slice, a transpose and a sparse tensor are not."""
    for bad, seen in ((torch.inf, 1.0), (1.0, 0.0)):
        table = torch.full((4, 6), torch.nan)
        table[:, ::2] = 1.0
        table[3, 4] = bad
        for grad in (table[:, ::2], table[:, ::2].t(), table[:, ::2].contiguous().to_sparse()):
            assert fk.overflow([torch.ones(3), grad]) == seen


@every_input
def test_what_torch_refuses_of_a_scaler_is_skipped(name: str) -> None:
    """GradScaler's protocol: `found_inf` set, nothing changes; `grad_scale` set, gradients are divided by it."""
    params, theirs = draw(), draw()
    optimizer, sgd = fk.MasterSGD(params, **INPUTS[name]), torch.optim.SGD(theirs, **INPUTS[name])
    if INPUTS[name].get("dampening"):
        optimizer.found_inf = torch.tensor(0.0)
        with pytest.raises(ValueError, match=r"dampening = 0.5 does not go with a loss scale"):
            steps(optimizer, params, 1)
        return
    before = copy.deepcopy(params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    steps(optimizer, params, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.found_inf = torch.tensor([0.0])
    for seed in range(3):
        steps(sgd, theirs, 1, seed)
        for a, b in zip(params, theirs, strict=True):
            a.grad = b.grad * 8
        optimizer.step()
    assert_equal(params, theirs)


# ------------------------------------------------------------------------------------------------------------ state


def check_state(options: Options, dtype: torch.dtype) -> None:
    """Saved and loaded by every way that there is, the next steps are bit for bit those of the optimizer that was saved."""
    params = draw(dtype)
    optimizer = fk.MasterSGD(params, **copy.deepcopy(options))
    assert "MasterSGD" in repr(optimizer)
    steps(optimizer, params, 3)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    ways = {
        "state_dict": saved,
        "deepcopy": copy.deepcopy(saved),
        "pickle": pickle.loads(pickle.dumps(saved)),
        "weights_only": torch.load(file, weights_only=True),
    }
    old = copy.deepcopy(saved)
    if not options.get("maximize") and not options.get("dampening"):
        for group in old["param_groups"]:
            for key in ("dampening", "maximize", "foreach", "differentiable", "fused"):
                del group[key]
        ways["of 0.1.0"] = old
    made: list[tuple[torch.optim.Optimizer, list[Tensor]]] = []
    for name, state in ways.items():
        if "0.1.0" not in name:
            torch.testing.assert_close(state, saved, rtol=0, atol=0)
        others = [p.detach().clone().requires_grad_() for p in params]
        made.append((fk.MasterSGD(others, lr=1.0), others))
        made[-1][0].load_state_dict(state)
    for twin, others in (copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))):
        assert {k for k in vars(twin) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
        made.append((twin, others))
    kept = copy.deepcopy(saved)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)  # not written to by a load
    steps(optimizer, params, 3, 2)
    for twin, others in made:
        steps(twin, others, 3, 2)
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        torch.testing.assert_close(twin.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@every_input
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_state_survives(name: str, dtype: torch.dtype) -> None:
    check_state(INPUTS[name], dtype)


def check_to_torch_and_back(options: Options, dtype: torch.dtype) -> None:
    """Ours for two steps, torch's for two, ours for two: six of torch's."""
    theirs = draw(dtype)
    sgd = torch.optim.SGD(theirs, **copy.deepcopy(options))
    steps(sgd, theirs, 2, 1)
    steps(sgd, theirs, 2, 2)
    steps(sgd, theirs, 2, 3)
    params = draw(dtype)
    state = None
    for seed, kind in enumerate((fk.MasterSGD, torch.optim.SGD, fk.MasterSGD), 1):
        optimizer = kind(params, lr=1.0)
        if state is None:
            optimizer = kind(params, **copy.deepcopy(options))
        else:
            optimizer.load_state_dict(state)
        steps(optimizer, params, 2, seed)
        state = optimizer.state_dict()
    # torch's steps in FP16 are rounded ones
    assert_equal(params, theirs, 1e-6 if dtype == torch.float32 else 8e-3)
    assert dtype == torch.float32 or all(v["master"].dtype == torch.float32 for v in state["state"].values())


@every_input
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_state_goes_to_torch_and_back(name: str, dtype: torch.dtype) -> None:
    check_to_torch_and_back(INPUTS[name], dtype)


@pytest.mark.parametrize("between", [torch.float16, torch.float32], ids=str)
def test_a_master_that_another_optimizer_left_behind_does_not_undo_its_steps(between: torch.dtype) -> None:
    """torch keeps the key `master` and trains the weights: after the load the weights count, not the old master."""
    half = draw(torch.float16)
    optimizer = fk.MasterSGD(half, lr=0.1, momentum=0.9)
    steps(optimizer, half, 2)
    others = [p.detach().to(between).requires_grad_() for p in half]
    sgd = torch.optim.SGD(others, lr=1.0)
    sgd.load_state_dict(optimizer.state_dict())
    steps(sgd, others, 2, 2)
    back = [p.detach().half().requires_grad_() for p in others]
    resumed = fk.MasterSGD(back, lr=1.0)
    resumed.load_state_dict(sgd.state_dict())
    steps(resumed, back, 1, 3)
    steps(sgd, others, 1, 3)
    assert_equal([p.float() for p in back], [p.float() for p in others], 8e-3)


def test_a_master_is_exact_where_it_rounds_to_its_weight() -> None:
    """Loaded before or after the weights, FP32 stays FP32."""
    half = draw(torch.float16)
    optimizer = fk.MasterSGD(half, lr=0.1, momentum=0.9)
    steps(optimizer, half, 3)
    for weights_first in (True, False):
        fresh = [torch.zeros_like(p).requires_grad_() for p in half]
        resumed = fk.MasterSGD(fresh, lr=1.0)
        for weights in (weights_first, not weights_first):
            if weights:
                for a, b in zip(fresh, half, strict=True):
                    a.data.copy_(b.data)
            else:
                resumed.load_state_dict(optimizer.state_dict())
        again = copy.deepcopy((optimizer, half))
        steps(resumed, fresh, 1, 2)
        steps(*again, 1, 2)
        for a, b in zip(fresh, again[1], strict=True):
            assert torch.equal(resumed.master_of(a), again[0].master_of(b))


@pytest.mark.parametrize("of, into", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_a_state_of_the_other_precision_is_taken(of: torch.dtype, into: torch.dtype) -> None:
    """A missing master is made from the weight; float32 weights are their own."""
    params = draw(of)
    optimizer = fk.MasterSGD(params, lr=0.1, momentum=0.9)
    steps(optimizer, params, 2)
    others = [p.detach().to(into).requires_grad_() for p in params]
    resumed = fk.MasterSGD(others, lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, others, 1, 2)
    steps(optimizer, params, 1, 2)
    assert_equal([p.float() for p in others], [p.float() for p in params], 8e-3)
    assert all(resumed.master_of(p).dtype == torch.float32 for p in others)
    assert (into == torch.float32) == all(resumed.master_of(p) is p for p in others)


def test_names_of_parameters_are_kept_and_loaded() -> None:
    named, plain = (fk.MasterSGD(p, momentum=0.9) for p in (list(zip("ab", draw(), strict=True)), draw()))
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    plain.load_state_dict(named.state_dict())
    assert plain.param_groups[0]["param_names"] == ["a", "b"]


def test_every_hook_is_called_in_torchs_order() -> None:
    """A step's, a save's and a load's; the result of a hook is saved, and loaded."""
    params = draw(torch.float16)
    optimizer = fk.MasterSGD(params, lr=0.1, momentum=0.9)
    steps(optimizer, params, 1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after the step"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before state_dict"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    steps(optimizer, params, 1, 2)
    saved = optimizer.state_dict()
    assert called == ["before the step", "after the step", "before state_dict"] and saved["extra"] == 1

    def tenfold(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append("before load")
        state = copy.deepcopy(state)
        for values in state["state"].values():
            values["momentum_buffer"] *= 10
        return state

    def loaded(other: torch.optim.Optimizer) -> None:
        buffers = [other.state[p]["momentum_buffer"] for p in params]
        called.append(f"after load: {buffers[0].dtype}")

    wanted = [10 * optimizer.state[p]["momentum_buffer"] for p in params]
    optimizer.register_load_state_dict_pre_hook(tenfold)
    optimizer.register_load_state_dict_post_hook(loaded)
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("first"), prepend=True)
    optimizer.load_state_dict(saved)
    assert called[3:] == ["before load", "first", "after load: torch.float32"]
    assert_equal([optimizer.state[p]["momentum_buffer"] for p in params], wanted, 0.0)
    assert not torch.equal(saved["state"][0]["momentum_buffer"], wanted[0]), "the caller's state is not written to"


# ----------------------------------------------------------------------------------------------------------- errors


def one() -> Tensor:
    return nn.Parameter(torch.ones(1, 1))


SHARED = one()
REFUSED: list[tuple[str, type[BaseException], str, Any, Options]] = [
    # torch's own
    ("invalid param type", TypeError, "iterable of Tensors", SHARED, {}),
    ("duplicates in a group", UserWarning, "duplicate parameters", [SHARED, SHARED], {}),
    ("duplicates across", ValueError, "more than one", [{"params": SHARED}, {"params": SHARED}], {}),
    ("lr of two elements", ValueError, r"one element.*\(2,\)", None, {"lr": torch.tensor([0.001, 0.001])}),
    ("names missing", ValueError, "with/without names", [("weight", SHARED), one()], {}),
    ("names in a group", ValueError, "with/without", [{"params": [SHARED]}, {"params": [("w", one())]}], {}),
    ("negative momentum", ValueError, "momentum must be .*-0.5", None, {"lr": 1e-2, "momentum": -0.5}),
    # and ours
    ("negative lr", ValueError, "lr must be .*-1", None, {"lr": -1.0}),
    ("negative decay", ValueError, "weight_decay must be", None, {"weight_decay": -1.0}),
    ("NaN", ValueError, "dampening must be", None, {"momentum": 0.9, "dampening": float("nan")}),
    ("nesterov alone", ValueError, "needs momentum above 0", None, {"nesterov": True}),
    ("nesterov, dampened", ValueError, "dampening 0", None, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("a group's own option", ValueError, "lr must be", [{"params": [one()], "lr": -1.0}], {}),
    ("foreach", ValueError, "foreach=True has no effect", None, {"foreach": True}),
    ("fused", ValueError, "fused=False has no effect", None, {"fused": False}),
    ("differentiable", ValueError, "outside autograd", None, {"differentiable": True}),
    ("text", TypeError, "lr must be a number, not str", None, {"lr": "0.1"}),
    ("tensor", TypeError, "momentum must be a number, not Tensor", None, {"momentum": torch.tensor(0.9)}),
    ("lr elsewhere", ValueError, "lr is on meta", None, {"lr": torch.tensor(0.1, device="meta")}),
    ("complex", TypeError, "complex64.*torch.optim.SGD", [torch.zeros(2, dtype=torch.complex64)], {}),
    ("sparse", TypeError, "sparse_coo.*torch.optim.SGD", [torch.zeros(2).to_sparse()], {}),
]


@pytest.mark.parametrize("error, words, params, options", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_arguments_are_refused(error: type[BaseException], words: str, params: Any, options: Options) -> None:
    with pytest.raises(error, match=words):
        fk.MasterSGD([one()] if params is None else params, **options)


@every_input
def test_a_parameter_that_is_listed_twice_is_updated_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update after the other: within a launch the programs run at once, and would write it in any order.

    torch's own has two momentum buffers in the first step, of which it keeps the last; so it is compared with two of its steps.
    """
    master = importlib.import_module("fasttricks_kernels.optim.master")
    launched: list[list[int]] = []

    def spy(weights: list[Tensor], *args: Any, **options: Any) -> None:
        launched.append([w.data_ptr() for w in weights])
        sgd_step(weights, *args, **options)

    sgd_step = master.sgd_step
    monkeypatch.setattr(master, "sgd_step", spy)
    ours, theirs = draw(), draw()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fk.MasterSGD([*ours, ours[0]], **INPUTS[name])
    sgd = torch.optim.SGD(theirs, **INPUTS[name])
    for seed in range(3):
        steps(optimizer, ours, 1, seed)
        steps(sgd, theirs, 1, seed)
        theirs[1].grad = None
        sgd.step()
    assert_equal(ours, theirs)
    assert sum(map(len, launched)) == 3 * 3 and all(len(set(one)) == len(one) for one in launched)


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = fk.MasterSGD([one()])
    with pytest.raises(TypeError, match="int64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int64)]})
    assert len(optimizer.param_groups) == 1


def group_of(state: dict[str, Any], **change: Any) -> None:
    state["param_groups"][0].update(change)


HARMED: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], Any]]] = {
    "shape": (ValueError, "another model", lambda s: s["state"][1].update(momentum_buffer=torch.ones(3))),
    "master": (ValueError, "master of parameter 0", lambda s: s["state"][0].update(master=torch.ones(3))),
    "kind": (TypeError, "must be a torch.Tensor, not str", lambda s: s["state"][0].update(master="x")),
    "groups": (ValueError, "different number of parameter groups", lambda s: s["param_groups"].append({"params": []})),
    "length": (ValueError, "match the size", lambda s: s["param_groups"][0]["params"].append(2)),
    "lr": (ValueError, "lr must be", lambda s: group_of(s, lr=-1.0)),
    "nesterov": (ValueError, "needs momentum", lambda s: group_of(s, nesterov=True, momentum=0.0)),
    "differentiable": (ValueError, "outside autograd", lambda s: group_of(s, differentiable=True)),
    "no groups": (KeyError, "param_groups", lambda s: s.pop("param_groups")),
}


@pytest.mark.parametrize("harm", HARMED)
def test_a_load_that_fails_changes_nothing(harm: str) -> None:
    error, words, change = HARMED[harm]
    params = draw(torch.float16)
    optimizer = fk.MasterSGD(params, lr=0.1, momentum=0.9)
    steps(optimizer, params, 2)
    before, state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    change(state)
    called: list[int] = []
    optimizer.register_load_state_dict_post_hook(lambda _: called.append(1))
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    optimizer.load_state_dict(before)
    assert called == [1], "after a load that fails, the next one is like any other"


# ------------------------------------------------------------------------------------------------------------- apex


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shapes",
    [[(278011,)], pytest.param([(4096, 1024), (4096,), (4096, 2048), (32320, 1024), (1,)], marks=pytest.mark.slow)],
    ids=["one", "many"],
)
def test_apexs_shapes_and_tolerances(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Seven steps of rate 0.25 and momentum 0.125 from uniform weights, by uniform gradients: largest difference 1e-3."""
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.rand(shape, generator=generator).to(dtype).float().requires_grad_() for shape in shapes]
    ours = [p.detach().to(dtype).requires_grad_() for p in theirs]
    options: Options = {"lr": 0.25, "momentum": 0.125}
    optimizer, sgd = fk.MasterSGD(ours, **options), torch.optim.SGD(theirs, **options)
    for _ in range(7):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.rand(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.float()
        optimizer.step()
        sgd.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (optimizer.master_of(a) - b).abs().max() < 1e-3
        assert torch.equal(a.detach(), optimizer.master_of(a).to(dtype))


@pytest.mark.parametrize("bad_step", [None, 0, 1])
@pytest.mark.parametrize("bad_group", [0, 1])
def test_apexs_loss_scales_and_injected_infinities(bad_step: int | None, bad_group: int) -> None:
    """FP16 and FP32 weights in two groups, a loss scale that halves where a step overflowed: torch's SGD on good steps."""
    half, single = draw(torch.float16), draw()
    wide = [p.detach().float().requires_grad_() for p in half + single]
    options: Options = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.1}
    groups = ({"params": half}, {"params": single, "momentum": 0.125})
    optimizer = fk.MasterSGD(list(groups), **options)
    sgd = torch.optim.SGD([{"params": wide[:2]}, {"params": wide[2:], "momentum": 0.125}], **options)
    scale, generator = torch.tensor(4.0), torch.Generator().manual_seed(3)
    for step in range(3):
        for a, b in zip(half + single, wide, strict=True):
            b.grad = torch.randn(b.shape, generator=generator).half().float()
            a.grad = (b.grad * scale).to(a.dtype)
        if step == bad_step:
            groups[bad_group]["params"][1].grad[3] = torch.inf
        else:
            sgd.step()
        optimizer.step(loss_scale=scale)
        scale = scale * torch.where(optimizer.overflow > 0, 0.5, 1.0)
    assert scale == (4.0 if bad_step is None else 2.0)
    assert_equal([optimizer.master_of(p) for p in half + single], wide)


def check_torchs_own_inputs() -> None:
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = (info for info in optim_db if info.optim_cls is torch.optim.SGD)
    inputs = info.optim_inputs_func(device="cpu")
    assert {i.desc for i in inputs} >= set(INPUTS)
    for given in inputs:
        check_updates(given.kwargs)
        for dtype in (torch.float16, torch.float32):
            check_state(given.kwargs, dtype)
            check_to_torch_and_back(given.kwargs, dtype)
    warnings.simplefilter("error", UserWarning)
    errors = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(errors) >= 7
    for error in errors:
        given = error.optimizer_error_input
        with pytest.raises(error.error_type):
            fk.MasterSGD([one()] if given.params is None else given.params, **given.kwargs)


@pytest.mark.slow
def test_torchs_own_inputs_are_those_above() -> None:
    """Every input and error input of this torch for SGD, in a process of its own: their import freezes torch's flags."""
    process = forked(check_torchs_own_inputs)
    process.join()
    assert process.exitcode == 0

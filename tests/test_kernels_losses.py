"""The losses as a caller meets them, on the CPU: against torch in float64, through every way torch runs an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fasttricks_kernels as fk
from fasttricks_kernels.losses import cross_entropy

K = 3  # three classes: a thousand would hide whether smoothing goes to K or to K - 1 of them


def draw(num_rows: int = 6, num_classes: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits, teacher, two labels, lam."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, num_rows, num_classes, generator=generator, dtype=torch.float64).to(dtype)
    target, target_b = torch.randint(num_classes, (2, num_rows), generator=generator)
    return logits, teacher, target, target_b, torch.rand(num_rows, generator=generator, dtype=torch.float64)


def dense(target: Tensor, smoothing: float, over: str, num_classes: int = K) -> Tensor:
    """The (N, K) targets that the loss never makes, typed from section 5.2 and from the authors' code."""
    share = smoothing / (num_classes if over == "all" else num_classes - 1)
    label = 1 - smoothing + (share if over == "all" else 0)
    return torch.full((len(target), num_classes), share, dtype=torch.float64).scatter_(1, target[:, None], label)


@pytest.mark.parametrize("over", ["all", "others"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.8, 1.0])
def test_cross_entropy_is_that_of_dense_targets(smoothing: float, over: Any) -> None:
    logits, _, target, target_b, lam = draw()
    options = {"smoothing": smoothing, "smoothing_over": over}
    q, q_b = dense(target, smoothing, over), dense(target_b, smoothing, over)
    for reduction in ("none", "sum", "mean"):
        torch.testing.assert_close(
            fk.cross_entropy(logits, target, reduction=reduction, **options),
            F.cross_entropy(logits, q, reduction=reduction),
        )
        for share in (lam, 0.3, torch.tensor(0.3, dtype=torch.float64)):
            weight = share[:, None] if isinstance(share, Tensor) and share.dim() else share
            torch.testing.assert_close(
                fk.cross_entropy(logits, target, target_b=target_b, lam=share, reduction=reduction, **options),
                F.cross_entropy(logits, weight * q + (1 - weight) * q_b, reduction=reduction),
            )


@pytest.fixture(params=[True, False], ids=["torch's", "own"])
def few_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One label on the CPU goes to torch's loss or to the operator, by the number of logits: here both for a few."""
    if not request.param:
        monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignored", [[1, 4], [], [0, 1, 2, 3, 4, 5]], ids=["some", "none", "all"])
def test_the_module_is_torchs_with_ignored_labels(reduction: Any, ignored: list[int]) -> None:
    logits, _, target, _, _ = draw()
    target[ignored] = -1
    for smoothing in (0.0, 0.1):
        results = []
        for module in (torch.nn.CrossEntropyLoss, fk.CrossEntropyLoss):
            leaf = logits.clone().requires_grad_()
            loss = module(ignore_index=-1, reduction=reduction, label_smoothing=smoothing)(leaf, target)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mean_over_ignored_pairs_weighs_what_is_kept(smoothing: float) -> None:
    logits, _, target, target_b, _ = draw()
    target[0] = target_b[0] = target_b[3] = -100
    a, b = (F.cross_entropy(logits, t, label_smoothing=smoothing, reduction="none") for t in (target, target_b))
    expected = (0.3 * a + 0.7 * b).sum() / (0.3 * (target != -100) + 0.7 * (target_b != -100)).sum()
    pair: dict[str, Any] = {"target_b": target_b, "lam": 0.3, "smoothing": smoothing}
    torch.testing.assert_close(fk.cross_entropy(logits, target, **pair), expected)
    loss, grad = fk.cross_entropy_loss_and_grad(logits, target, ignore_index=-100, **pair)
    leaf = logits.clone().requires_grad_()
    fk.cross_entropy(leaf, target, **pair).backward()
    theirs = logits.clone().requires_grad_()
    a, b = (F.cross_entropy(theirs, t, label_smoothing=smoothing, reduction="none") for t in (target, target_b))
    ((0.3 * a + 0.7 * b).sum() / (0.3 * (target != -100) + 0.7 * (target_b != -100)).sum()).backward()
    torch.testing.assert_close((loss, grad, leaf.grad), (expected, theirs.grad, theirs.grad))


def test_distillation_against_torch() -> None:
    """The labels' term, and T^2 kl_div's up to the teacher's entropy; each weight where it says."""
    logits, teacher, target, target_b, lam = draw()
    for temperature in (1.0, 20.0):
        soft = F.cross_entropy(logits / temperature, (teacher / temperature).softmax(1), reduction="none")
        kl = F.kl_div((logits / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="none").sum(
            1
        )
        entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy()
        torch.testing.assert_close(soft, kl + entropy)
        hard = fk.cross_entropy(logits, target, smoothing=0.1, target_b=target_b, lam=lam, reduction="none")
        got = fk.distillation_loss(
            logits,
            teacher,
            target,
            temperature=temperature,
            hard_weight=0.3,
            soft_weight=0.6,
            smoothing=0.1,
            target_b=target_b,
            lam=lam,
            reduction="none",
        )
        torch.testing.assert_close(got, 0.3 * hard + 0.6 * temperature**2 * soft)
    module = fk.DistillationLoss(20.0, 0.3, 0.6, label_smoothing=0.1)
    torch.testing.assert_close(module(logits, teacher, target, target_b, lam), got.mean())


def losses() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each loss as a function of its logits alone, and its other arguments."""
    _, teacher, target, target_b, lam = draw()
    target[2] = -100

    def pair(z: Tensor, target: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
        return fk.cross_entropy(z, target, smoothing=0.1, target_b=target_b, lam=lam)

    def weighted(z: Tensor, target: Tensor, target_b: Tensor, lam: Tensor, weight: Tensor) -> Tensor:
        return fk.cross_entropy(z, target, weight.to(z.dtype), smoothing=0.1, target_b=target_b, lam=lam)

    def dense_target(z: Tensor, target: Tensor) -> Tensor:
        return fk.cross_entropy(z, target.to(z.dtype), torch.ones(K, dtype=z.dtype), smoothing=0.1)

    def planes(z: Tensor, target: Tensor) -> Tensor:
        two = torch.tensor([1.0, -0.5], dtype=z.dtype)
        return fk.cross_entropy(z.unsqueeze(2) * two, target, torch.ones(K, dtype=z.dtype), smoothing=0.1)

    def distilled(z: Tensor, teacher: Tensor, target: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
        return fk.distillation_loss(z, teacher.to(z.dtype), target, smoothing=0.1, target_b=target_b, lam=lam)

    return {
        "one label": (lambda z, t: fk.cross_entropy(z, t, smoothing=0.1), (target,)),
        "pair": (pair, (target, target_b, lam)),
        "dense": (dense_target, (dense(target.clamp(min=0), 0.3, "all"),)),
        "planes": (planes, (torch.stack([target, target_b], 1),)),
        "class weights": (weighted, (target, target_b, lam, torch.rand(K, dtype=torch.float64))),
        "distillation": (distilled, (teacher, target, target_b, lam)),
    }


@pytest.mark.parametrize("offset", [0.0, 6e4])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_at_imagenets_size_errors_are_those_of_torch(dtype: torch.dtype, mixed: bool, offset: float) -> None:
    """256 x 1000, the operator's own path: loss and gradient against float64, beside torch's error in the same dtype."""
    logits, _, target, target_b, _ = draw(256, 1000)
    logits = (logits * 8 - offset).to(dtype)
    pair: dict[str, Any] = {"target_b": target_b, "lam": 0.3} if mixed else {}
    results = []
    for kind in ("exact", "torch", "ours"):
        leaf = (logits.double() if kind == "exact" else logits.clone()).requires_grad_()
        if kind == "ours":
            loss = fk.cross_entropy(leaf, target, smoothing=0.1, reduction="none", **pair)
        else:
            wide = leaf if kind == "exact" else leaf.float()
            a, b = (F.cross_entropy(wide, t, label_smoothing=0.1, reduction="none") for t in (target, target_b))
            loss = 0.3 * a + 0.7 * b if mixed else a
        loss.sum().backward()
        results.append((loss.detach().double(), leaf.grad.double()))
    exact, theirs, ours = results
    for i, slack in ((0, 1e-6 * exact[0].abs().max()), (1, 1e-7)):
        assert (ours[i] - exact[i]).abs().max() <= (theirs[i] - exact[i]).abs().max() + slack


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize("name", list(losses()))
def test_gradients_of_both_orders(name: str) -> None:
    loss, others = losses()[name]
    logits = draw()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, *others), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, *others), logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.slow
def test_opcheck() -> None:
    """Schema, fake, autograd registration and tracing of every operator, with every kind of option."""
    ops = torch.ops.fasttricks_kernels
    for dtype in (torch.float32, torch.float16):
        logits, teacher, target, target_b, lam = draw(dtype=dtype)
        lam = lam.float()
        leaf = logits.clone().requires_grad_()
        for z in (leaf, logits):
            for pair in ((None, None, None, 1.0), (target_b, None, None, 0.3), (target_b, lam, None, 1.0)):
                options = (*pair, 0.1, -100)
                soft = (2.0, 0.5, 0.5)
                torch.library.opcheck(ops.cross_entropy.default, (z, target, *options))
                weighted = (*pair[:2], torch.rand(K), *options[3:])
                torch.library.opcheck(ops.cross_entropy.default, (z, target, *weighted))
                torch.library.opcheck(ops.distillation.default, (z, teacher, target, *options, *soft))
            in_planes = (torch.stack([target, target_b], 1), None, None, torch.rand(K), *options[3:])
            planes = (z.detach()[..., None] * torch.ones(2, dtype=z.dtype)).requires_grad_(z.requires_grad)
            torch.library.opcheck(ops.cross_entropy.default, (planes, *in_planes))
            torch.library.opcheck(ops.cross_entropy.default, (z, teacher.softmax(1), *in_planes[1:]))
        grad = torch.ones(6)
        kept = torch.rand_like(logits.float())
        torch.library.opcheck(ops.cross_entropy_backward.default, (grad, kept, logits, target, *options))
        torch.library.opcheck(ops.cross_entropy_backward.default, (grad, kept, logits, target, *weighted))
        planes, kept_planes = planes.detach(), torch.rand(6, K, 2)
        torch.library.opcheck(ops.cross_entropy_backward.default, (torch.ones(6, 2), kept_planes, planes, *in_planes))
        torch.library.opcheck(ops.cross_entropy_loss_and_grad.default, (planes, *in_planes, None, 0.5))
        torch.library.opcheck(ops.distillation_backward.default, (grad, kept, logits, teacher, target, *options, *soft))
        for scale in (None, torch.tensor(8.0)):
            torch.library.opcheck(ops.cross_entropy_loss_and_grad.default, (logits, target, *options, scale, 0.5))
            torch.library.opcheck(
                ops.distillation_loss_and_grad.default, (logits, teacher, target, *options, *soft, scale, 0.5)
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", losses())
def test_compiles_whole_with_any_batch(name: str) -> None:
    torch._dynamo.reset()
    loss, others = losses()[name]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (6, 4):
        logits = draw(dtype=torch.float32)[0][:rows]
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        arguments = [x[:rows] for x in others]
        got, expected = compiled(ours, *arguments), loss(theirs, *arguments)
        got.backward()
        expected.backward()
        torch.testing.assert_close((got.detach(), ours.grad), (expected.detach(), theirs.grad))


@pytest.mark.parametrize("name", list(losses()))
def test_exports(name: str) -> None:
    loss, others = losses()[name]

    class Program(torch.nn.Module):
        def forward(self, z: Tensor, *others: Tensor) -> Tensor:
            return loss(z, *others)

    arguments = (draw()[0], *others)
    program = torch.export.export(Program(), arguments)
    torch.testing.assert_close(program.module()(*arguments), loss(*arguments))


def test_autocast_keeps_half_logits_and_gives_a_float32_loss() -> None:
    logits, teacher, target, target_b, lam = draw(dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pair = {"target_b": target_b, "lam": lam.float()}
        values = [
            fk.cross_entropy(leaf, target),
            fk.cross_entropy(leaf, target, **pair),
            fk.distillation_loss(leaf, teacher, target, **pair),
        ]
    assert {v.dtype for v in values} == {torch.float32}
    sum(values).backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_runs_on_a_fake_gpu() -> None:
    """Forward and loss_and_grad on fake CUDA tensors: .item(), bool() and nonzero() would raise there."""
    with FakeTensorMode():
        logits, teacher = torch.empty(2, 8, 10, device="cuda", dtype=torch.float16)
        target, target_b = torch.empty(2, 8, device="cuda", dtype=torch.int64)
        lam, scale = torch.empty(8, device="cuda"), torch.empty((), device="cuda")
        pair = {"target_b": target_b, "lam": lam, "smoothing": 0.1}
        assert fk.cross_entropy(logits, target, **pair).dtype == torch.float32
        assert fk.cross_entropy(logits, teacher, reduction="none").shape == (8,)
        planes, pixels = logits.new_empty(8, 10, 3, 5), target.new_empty(8, 3, 5)
        assert fk.cross_entropy(planes, pixels, logits.new_empty(10), smoothing=0.1, reduction="none").shape == (
            8,
            3,
            5,
        )
        assert fk.distillation_loss(logits, teacher, target, **pair).shape == ()
        for loss, grad in (
            fk.cross_entropy_loss_and_grad(logits, target, loss_scale=scale, **pair),
            fk.cross_entropy_loss_and_grad(logits, target, loss_scale=scale, ignore_index=-100),
            fk.distillation_loss_and_grad(logits, teacher, target, loss_scale=2.0, **pair),
        ):
            assert loss.shape == () and grad.dtype == torch.float16 and grad.device.type == "cuda"
        images = torch.empty(8, 3, 4, 4, device="cuda")
        assert fk.mixup(images, target, lam, pairs=True).shape == images.shape
        raw = torch.empty(8, 4, 5, 3, device="cuda", dtype=torch.uint8)
        matrix = torch.empty(8, 3, 4, device="cuda")
        assert fk.augment(raw, matrix, permutation=target, lam=lam).shape == (8, 3, 4, 5)


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for a device, on the real step on the CPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") is None, "a copy between devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(losses()))
def test_no_sync(name: str) -> None:
    loss, others = losses()[name]
    leaf = draw()[0].requires_grad_()
    with NoSync():
        loss(leaf, *others).backward()
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = fk.MasterSGD([weight], lr=0.1)
    with NoSync():
        weight.grad = torch.ones_like(weight)
        optimizer.step(loss_scale=torch.tensor(8.0))
        fk.mixup(torch.ones(2, 3, 4, 4), torch.tensor([1, 0]), torch.tensor(0.3))


def test_no_sync_sees_a_planted_sync() -> None:
    with pytest.raises(AssertionError, match="waits"), NoSync():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="copy"), NoSync():
        torch.ones(1).to("meta").cpu()


BAD_INPUT: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("class dimension last", ValueError, {"logits": torch.zeros(2, 3, 4)}),
    ("float16, bfloat16", TypeError, {"logits": torch.zeros(4, 3, dtype=torch.int64)}),
    ("at least one class", ValueError, {"logits": torch.zeros(4, 0)}),
    ("one label a row", ValueError, {"target": torch.zeros(3, dtype=torch.int64)}),
    ("soft targets", TypeError, {"target": torch.zeros(4, 3)}),
    ("int64 or int32", TypeError, {"target": torch.zeros(4, dtype=torch.int16)}),
    ("move one", ValueError, {"target": torch.zeros(4, dtype=torch.int64, device="meta")}),
    ("come together", ValueError, {"lam": 0.5}),
    ("come together", ValueError, {"target_b": torch.zeros(4, dtype=torch.int64)}),
    ("lam must lie", ValueError, {"target_b": torch.zeros(4, dtype=torch.int64), "lam": 1.5}),
    ("lam must lie", ValueError, {"target_b": torch.zeros(4, dtype=torch.int64), "lam": float("nan")}),
    ("lam must lie", ValueError, {"target_b": torch.zeros(4, dtype=torch.int64), "lam": torch.tensor(-0.5)}),
    ("lam must be a number", ValueError, {"target_b": torch.zeros(4, dtype=torch.int64), "lam": torch.zeros(3)}),
    ("floating", TypeError, {"target_b": torch.zeros(4, dtype=torch.int64), "lam": torch.ones(4, dtype=torch.int64)}),
    ("label_smoothing must lie", ValueError, {"label_smoothing": 1.1}),
    ("'all', 'others'", ValueError, {"smoothing_over": "both"}),
    ("'mean', 'sum', 'none'", ValueError, {"reduction": "avg"}),
    ("two classes", ValueError, {"logits": torch.zeros(4, 1), "smoothing": 0.1, "smoothing_over": "others"}),
    ("3", IndexError, {"target": torch.tensor([0, 1, 2, 3])}),
    (r"target_b\[1\] is 7", IndexError, {"target_b": torch.tensor([0, 7, 0, 0]), "lam": 0.5}),
]


@pytest.mark.parametrize("words, error, change", BAD_INPUT)
def test_bad_input_is_named(words: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"logits": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(error, match=words):
        fk.cross_entropy_loss_and_grad(**arguments)
    with pytest.raises(error, match=words):  # with a pair or without: what torch's function has not
        fk.cross_entropy(arguments.pop("logits"), **arguments, ignore_index=None)
    arguments["logits"] = change.get("logits", torch.zeros(4, 3))
    with pytest.raises(error, match=words):
        fk.distillation_loss(teacher_logits=arguments["logits"].clone(), **arguments)


@pytest.mark.parametrize("rows, classes", [(4, 3), (4, 4)])
@pytest.mark.parametrize(
    "words, error, scale",
    [
        (r"is \(4,\) torch.float32; factors of rows", ValueError, torch.ones(4)),
        (r"is \(4, 1\)", ValueError, torch.ones(4, 1)),
        ("complex64", ValueError, torch.ones((), dtype=torch.complex64)),
        ("must be a number, not str", TypeError, "8"),
        ("must be a number, not NoneType", TypeError, None),
    ],
)
def test_a_loss_scale_is_one_real_number(
    rows: int, classes: int, words: str, error: type[Exception], scale: Any
) -> None:
    logits, target = torch.zeros(rows, classes), torch.zeros(rows, dtype=torch.int64)
    for ignore_index in (-100, None):
        options = {"ignore_index": ignore_index, "loss_scale": scale}
        with pytest.raises(error, match=words):
            fk.cross_entropy_loss_and_grad(logits, target, **options)
        with pytest.raises(error, match=words):
            fk.distillation_loss_and_grad(logits, logits.clone(), target, **options)


@pytest.mark.parametrize(
    "words, error, change",
    [
        ("temperature must be a positive", ValueError, {"temperature": 0.0}),
        ("temperature must be a positive", ValueError, {"temperature": float("nan")}),
        ("hard_weight", ValueError, {"hard_weight": -1.0}),
        ("soft_weight", ValueError, {"soft_weight": float("inf")}),
        ("they must be equal", ValueError, {"teacher_logits": torch.zeros(4, 2)}),
        ("cast the teacher", TypeError, {"teacher_logits": torch.zeros(4, 3, dtype=torch.float16)}),
    ],
)
def test_bad_distillation_input_is_named(words: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"teacher_logits": torch.zeros(4, 3), **change}
    with pytest.raises(error, match=words):
        fk.distillation_loss(torch.zeros(4, 3), target=torch.zeros(4, dtype=torch.int64), **arguments)


def test_the_caller_keeps_its_logits() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        logits, teacher, target, target_b, lam = draw(dtype=dtype)
        before = logits.clone()
        lam = lam.float()
        fk.cross_entropy_loss_and_grad(logits, target, target_b=target_b, lam=lam)
        fk.distillation_loss_and_grad(logits, teacher, target)
        leaf = logits.requires_grad_()
        loss = fk.cross_entropy(leaf, target, target_b=target_b, lam=lam)
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and torch.equal(leaf.detach(), before)

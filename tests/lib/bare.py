"""`python -m lib.bare`: fasttricks on a machine that has torch, triton and numpy alone. Prints its findings as JSON.

Every other package of the extras is absent here, as if it were not installed. `python -m lib.bare COMMAND ...` is that command
on a machine that lacks those of HEAVY alone.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ABSENT = (
    *("nvidia.dali", "tyro", "simplejpeg", "rich", "PIL", "matplotlib", "tensorboard", "pynvml"),
    *("timm", "torchvision", "scipy", "onnx", "onnxruntime", "safetensors", "pyarrow", "yaml", "wandb", "mlflow"),
)
HEAVY = ("nvidia.dali", "simplejpeg", "matplotlib", "tensorboard")
RUN_BY_HAND = ("__main__", "train", "evaluate", "predict", "export", "ablate", "plan", "cost", "show", "data.prepare")
"""Modules of `python -m fasttricks.NAME`: each only names a command."""


class Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, absent: Sequence[str]) -> None:
        self._finder, self._absent = finder, absent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == absent or name.startswith(f"{absent}.") for absent in self._absent):
            return None
        spec: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return spec


def modules() -> Iterator[str]:
    """All modules of the two packages and of bench, by name."""
    packages = [importlib.import_module(name) for name in ("fasttricks", "fasttricks_kernels")]
    by_hand = {f"fasttricks.{name}" for name in RUN_BY_HAND}
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name not in by_hand:
                yield found.name
    for folder in ("bench", "bench/gpu"):
        for found in pkgutil.iter_modules([str(Path(__file__).parents[2] / folder)], f"{folder.replace('/', '.')}."):
            if found.name != "bench.gpu.__main__":
                yield found.name


def missing(name: str) -> str:
    """The absent module that an import of `name` fails for; empty where it succeeds."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return str(error.name)
    return ""


def losses() -> str:
    """A loss of each kind, forward and backward, against torch's own."""
    import torch
    from torch.nn import functional as F

    import fasttricks_kernels as fk

    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 6, 11, generator=generator).unbind()
    a, b = torch.randint(11, (2, 6), generator=generator).unbind()
    lam, z = torch.rand(6, generator=generator), logits.double().requires_grad_()
    hard, hard_b = (F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") for y in (a, b))
    mixed = lam.double() * hard + (1 - lam.double()) * hard_b
    soft = F.cross_entropy(z / 20, (teacher.double() / 20).softmax(1), reduction="none")
    smooth, pair = {"smoothing": 0.1}, {"smoothing": 0.1, "target_b": b, "lam": lam}
    kinds: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
        "smoothing": (lambda x: fk.cross_entropy(x, a, **smooth), hard),
        "mixup": (lambda x: fk.cross_entropy(x, a, **pair), mixed),
        "module": (lambda x: fk.CrossEntropyLoss(label_smoothing=0.1)(x, a), hard),
        "distillation": (lambda x: fk.distillation_loss(x, teacher, a, **pair), mixed + 400 * soft),
    }
    for name, (ours, truth) in kinds.items():
        leaf = logits.clone().requires_grad_()
        loss = ours(leaf)
        loss.backward()
        (grad,) = torch.autograd.grad(truth.mean(), z, retain_graph=True)
        same = {"rtol": 1e-5, "atol": 1e-5, "msg": lambda words, name=name: f"{name}: {words}"}
        torch.testing.assert_close(loss.double(), truth.mean(), **same)
        torch.testing.assert_close(leaf.grad.double(), grad, **same)
    return f"{', '.join(kinds)}; compiled C: {fk.losses_compiled()}"


def images_and_sgd() -> str:
    """Augmentation, mixup and the optimizer with FP32 masters."""
    import torch

    import fasttricks_kernels as fk

    raw = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    identity = torch.eye(3, 4).expand(2, 3, 4).contiguous()
    plain = fk.augment(raw, identity)
    assert torch.equal(plain, raw.permute(0, 3, 1, 2).float())
    half = torch.full((2,), 0.5)
    assert torch.equal(fk.mixup(plain, torch.tensor([1, 0]), half)[0], plain.mean(0))
    weight = torch.ones(5, dtype=torch.float16, requires_grad=True)
    weight.grad = torch.full_like(weight, 2.0)
    fk.MasterSGD([weight], lr=0.25, momentum=0.9, weight_decay=0.0, nesterov=True).step()
    assert torch.equal(weight, torch.full_like(weight, 1 - 0.25 * (2 + 0.9 * 2)))
    return "augment, mixup, MasterSGD"


def networks() -> str:
    """create_model() of each family."""
    import torch

    import fasttricks as ft

    names = {"resnet18d": 32, "inception_v3": 75, "mobilenet_v1": 32}
    for name, side in names.items():
        model = ft.create_model(name, num_classes=7, width=0.125).eval()
        assert model(torch.randn(2, 3, side, side)).shape == (2, 7), name
    assert set(names) <= set(ft.list_models())
    return ", ".join(names)


def steps() -> str:
    """Training steps on random images as bench.step makes them, by make_learner(), the Task and train_step()."""
    import torch

    from bench.step import CONTESTANTS, IMAGENET_CLASSES, StepCase
    from fasttricks.system.distributed import World

    case = StepCase(model="resnet8d", batch_size=4, image_size=32)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, IMAGENET_CLASSES, (4,))
    step = CONTESTANTS["fasttricks"](case, World.alone(torch.device("cpu")), images, labels)
    step()
    step()
    return "2"


def plans() -> str:
    """The memory and the FLOPs of a step, and a plan with the command that starts its run."""
    from fasttricks.commands.plan import extend, plan_text
    from fasttricks.config.recipes import cifar10
    from fasttricks.config.resolve import resolve
    from fasttricks.planning.planner import make_plan

    fields: dict[str, Any] = {"model.name": "resnet8d", "model.num_classes": 10, "images": 50_000, "gpus": 2}
    plan = make_plan(resolve(extend(cifar10()), {**fields, "data.image_size": 32, "data.val_resize": 36}))
    assert plan.footprint.num_parameters > 0 < plan.footprint.flops
    assert "torchrun" in plan_text(plan)
    return f"{plan.footprint.num_parameters} parameters"


def refusals() -> str:
    """Those parts of the API that read images say in a line what they need, and the way out."""
    import fasttricks as ft

    for name in ("train", "evaluate", "predict", "Loader"):
        try:
            getattr(ft, name)
        except ImportError as error:
            said = str(error)
            assert said.startswith(f"fasttricks.{name} needs nvidia.dali, tyro") and "\n" not in said, said
        else:
            raise AssertionError(f"fasttricks.{name} is there without DALI")
    return said


PARTS = (losses, images_and_sgd, networks, steps, plans, refusals)


def main() -> None:
    """The command that is asked for; else import every module and run each part."""
    absent = HEAVY if len(sys.argv) > 1 else ABSENT
    assert not set(absent) & set(sys.modules)
    sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
    if len(sys.argv) > 1:
        from fasttricks import commands

        commands.main()
        return
    needs = {name: package for name in modules() if (package := missing(name))}
    import torch
    import triton

    ran = {part.__name__: part() for part in PARTS}
    print(json.dumps({"versions": [torch.__version__, triton.__version__], "needs": needs, "ran": ran}))


if __name__ == "__main__":
    main()

"""Every example of kernels/README.md, run as it stands there."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttricks_kernels

README = Path(__file__).parents[1] / "kernels" / "README.md"


def example(name: str) -> dict[str, Any]:
    """The names that the example's code block defines."""
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"no example {name} in {README}"
    names: dict[str, Any] = {}
    exec(compile(found[1], f"{README.name}:{name}", "exec"), names)
    return names


def pairs() -> list[tuple[str, str]]:
    """The table of what a user has and what they write."""
    text = README.read_text().partition("<!-- example: pairs -->")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]*)`", line) for line in text.splitlines()[3:]]
    assert len(rows) == 8 and all(len(row) == 2 for row in rows), rows
    return [(have, write) for have, write in rows]


@pytest.mark.parametrize(("have", "write"), pairs())
def test_both_sides_of_a_pair_are_the_same(have: str, write: str) -> None:
    if "timm." in have:
        pytest.importorskip("timm", reason="timm is not installed")
    generator = torch.Generator().manual_seed(0)
    images, labels = separable()
    data = {
        "z": torch.randn(32, 10, generator=generator),
        "t": 3 * torch.randn(32, 10, generator=generator),
        "a": torch.randint(10, (32,), generator=generator),
        "b": torch.randint(10, (32,), generator=generator),
        "w": torch.rand(10, generator=generator),
        "x": images,
    }
    found = [followed(expression, dict(data), labels) for expression in (have, write)]
    for name, one in found[0].items():
        if not (name == "value" and "kl_div" in have):  # the teacher's entropy apart
            torch.testing.assert_close(found[1][name], one, rtol=2e-6, atol=2e-7)


def followed(expression: str, data: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """The value and the gradients of a loss, images, or the weights after three steps of an optimizer."""
    data["z"] = data["z"].clone().requires_grad_()
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "lam": 0.3,
        "T": 4.0,
        "K": 10,
        "model": network(),
    }
    names |= {name: getattr(fasttricks_kernels, name) for name in fasttricks_kernels.__all__}
    if "timm." in expression:
        names["timm"] = importlib.import_module("timm.loss") and importlib.import_module("timm")
    result = eval(expression, {**names, **data})
    if isinstance(result, torch.optim.Optimizer):
        for _ in range(3):
            result.zero_grad()
            nn.functional.cross_entropy(names["model"](data["x"]), labels).backward()
            result.step()
        return {name: weight.detach() for name, weight in names["model"].named_parameters()}
    if result.requires_grad:
        torch.autograd.backward(result)
        return {"value": result.detach(), "gradient": data["z"].grad}
    return {"value": result}


def separable(num_images: int = 32, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose class is their brightness."""
    labels = torch.arange(num_images) % 2
    noise = torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise + 2 * labels[:, None, None, None], labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def test_plain_loop() -> None:
    images, labels = separable()
    train = example("plain")["train"]
    model = network()
    first = train(model, [(images, labels)], "cpu")
    last = train(model, [(images, labels)], "cpu", epochs=60)
    assert torch.isfinite(last) and last < first


def test_timm() -> None:
    pytest.importorskip("timm.task", reason="timm, with its tasks, is not installed")
    names = example("timm")
    task = names["make_task"](torch.device("cpu"))
    images, labels = separable(8, 32)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    losses = [names["train_step"](task, optimizer, images, labels) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    warnings.simplefilter("ignore")  # the library's own

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.network(pixel_values)}

    images, labels = separable()
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    result = example("transformers")["make_trainer"](Model(), arguments, rows).train()
    assert 0 < result.training_loss < 2


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    warnings.simplefilter("ignore")  # the library's own
    images, labels = separable()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    model = example("lightning")["Classifier"](network())
    before = [p.clone() for p in model.parameters()]
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

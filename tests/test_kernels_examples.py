"""Every example of kernels/README.md, run as it stands there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

README = Path(__file__).parents[1] / "kernels" / "README.md"


def example(name: str) -> dict[str, Any]:
    """The names that the example's code block defines."""
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"no example {name} in {README}"
    names: dict[str, Any] = {}
    exec(compile(found[1], f"{README.name}:{name}", "exec"), names)
    return names


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

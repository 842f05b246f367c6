"""What every model of the registry must do, whatever it is. A new model is tested here by being registered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttricks.config import ModelConfig
from fasttricks.models import MODELS, build_model

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_full_size_is_built_from_a_config(name: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), num_classes=1000)
    assert model.training
    assert model.fc.weight.shape == (1000, model.num_features)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@every_model
@pytest.mark.parametrize(("bf16", "zero_gamma"), [(False, False), (True, True)], ids=["fp32", "bf16-zero_gamma"])
def test_finite_gradients_reach_every_parameter(name: str, bf16: bool, zero_gamma: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name](num_classes=5, width=0.125, stem_stride=2, zero_gamma=zero_gamma)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 5)
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32)
    nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # At gamma 0 only that gamma learns, and the rest of path A waits for it.
        zeroed_gamma = parameter_name.endswith("weight") and not parameter.any()
        if zeroed_gamma or not zero_gamma:
            assert parameter.grad.any(), f"no gradient reached {parameter_name}"

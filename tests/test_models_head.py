"""The classifier of a network by name, against the layers whose shape follows the number of classes."""

import pytest
import torch
from torch import nn

from fasttricks.config import ModelConfig
from fasttricks.models import build_model, head_names

OURS = ["resnet8d", "mobilenet_v1", "inception_v3", "inception_v3+aux"]
TIMM = ["resnet10t", "deit_tiny_distilled_patch16_224"]
TORCHVISION = ["vgg11", "mobilenet_v3_small", "inception_v3"]


def make(name, num_classes):
    library, _, bare = name.rpartition(":")
    with torch.device("meta"):
        if library == "timm":
            import timm

            return timm.create_model(bare, num_classes=num_classes)
        if library == "torchvision":
            import torchvision

            return torchvision.models.get_model(bare, num_classes=num_classes)
        config = ModelConfig(name=bare.removesuffix("+aux"), aux_head=bare.endswith("+aux"))
        return build_model(config, num_classes)


@pytest.mark.parametrize("name", [*OURS, *(f"timm:{n}" for n in TIMM), *(f"torchvision:{n}" for n in TORCHVISION)])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_the_head_is_what_the_number_of_classes_shapes(name):
    two, three = make(name, 2).state_dict(), make(name, 3).state_dict()
    assert two.keys() == three.keys()
    wanted = [key for key in two if two[key].shape != three[key].shape]
    assert wanted
    assert list(head_names(make(name, 2))) == wanted


def test_a_network_without_a_classifier_has_no_head_names():
    assert head_names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))) == ()


def test_a_network_may_say_which_layer_is_its_classifier():
    class Own(nn.Sequential):
        def get_classifier(self):
            return self[1]

    assert head_names(Own(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))) == ("1.weight", "1.bias")

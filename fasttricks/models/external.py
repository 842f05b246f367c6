"""Networks of timm by name, where timm is installed: `timm:NAME`; weights of torchvision. The only importer of either."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fasttricks.config import TIMM, TORCHVISION, ConfigError, DataConfig, Statistics, nearest, require

_TORCHVISION: dict[str, Statistics] = dict.fromkeys(("inception_v3", "googlenet"), ((127.5,) * 3, (127.5,) * 3))
"""Networks of torchvision whose weights want other images than ImageNet's: it turns their input (transform_input)."""


def _timm_that_knows(name: str) -> Any:
    """The module timm. Raises ConfigError where it is absent, saying how to install it, and for a name it does not know."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.name = {name!r}: needs timm; install it with: pip install timm") from error
    bare = name.removeprefix(TIMM)
    rule = f"is no model of timm {timm.__version__}; the nearest is {TIMM}{nearest(bare, timm.list_models())}"
    require(timm.is_model(bare), "model.name", name, rule)
    return timm


def timm_model(name: str, *, num_classes: int) -> nn.Module:
    """timm's network of that name, with the initial weights and defaults that timm gives it; its own state-dict keys.

    name: with the prefix. num_classes: outputs of its classifier. Raises ConfigError where timm is absent or has no such
    network, with the nearest name, and for one that has no classifier.
    """
    model: nn.Module = _timm_that_knows(name).create_model(name.removeprefix(TIMM), num_classes=num_classes)
    return model.train()


def timm_features(name: str, output_stride: int, maps: int) -> Any:
    """timm's network of that name, cut after its last feature map, in timm's FeatureGetterNet: the last `maps` of them.

    name, errors: as timm_model. output_stride: 32, or another where the network takes one. Raises ConfigError for a network that
    has no feature maps or takes no such stride.
    """
    timm = _timm_that_knows(name)
    strided = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        return timm.create_model(
            name.removeprefix(TIMM),
            features_only=True,
            feature_cls="getter",
            out_indices=tuple(range(-maps, 0)),
            **strided,
        )
    except (TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        rule = f"{name} does not take it ({reason}); give 32, or another --model.name"
        raise ConfigError(f"segment.output_stride = {output_stride}: {rule}") from error
    except (RuntimeError, AttributeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.name = {name!r}: timm has no feature maps of it ({reason}); give another") from error


def pretrained_timm_model(name: str, field: str) -> tuple[nn.Module, Statistics]:
    """timm's network of that name with its trained weights, and (mean, std) of its images' channels, in 0 to 255.

    field: the field of the config that names it, for an error. timm takes the weights from its cache, or downloads them.
    Raises ConfigError as timm_model, and where it has none or cannot get them.
    """
    timm = _timm_that_knows(name)
    try:
        model: nn.Module = timm.create_model(name.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # the hub, the network and the file system raise many kinds
        raise _no_weights("timm", name, field, error) from error
    trained: Any = model.pretrained_cfg
    return model, ([255 * x for x in trained["mean"]], [255 * x for x in trained["std"]])


def pretrained_torchvision_weights(name: str, field: str) -> tuple[dict[str, Tensor], Statistics]:
    """(state_dict, statistics of its images) of torchvision's newest trained weights of that name, from its cache or downloaded.

    field: as of pretrained_timm_model. Raises ConfigError where torchvision is absent, has no such network or cannot get the
    weights.
    """
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        rule = "needs torchvision; install it with: pip install torchvision"
        raise ConfigError(f"{field} = {name!r}: {rule}") from error
    bare, known = name.removeprefix(TORCHVISION), models.list_models(module=models)
    rule = f"torchvision has no such classifier; the nearest is {TORCHVISION}{nearest(bare, known)}"
    require(bare in known, field, name, rule)
    try:
        weights: dict[str, Tensor] = models.get_model_weights(bare).DEFAULT.get_state_dict(
            progress=False, check_hash=True
        )
    except Exception as error:  # as above
        raise _no_weights("torchvision", name, field, error) from error
    return weights, _TORCHVISION.get(bare, (DataConfig.mean, DataConfig.std))


def _no_weights(library: str, name: str, field: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    rule = f"{library} finds no trained weights of it ({reason}); see that they can be downloaded, or take a checkpoint"
    return ConfigError(f"{field} = {name!r}: {rule}")

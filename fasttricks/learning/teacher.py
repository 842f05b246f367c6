"""The teacher of a distillation (section 5.3): a trained network that says how alike the classes are to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttricks.config import (
    TIMM,
    ConfigError,
    DataConfig,
    DistillConfig,
    ModelConfig,
    Statistics,
    require,
    same_statistics,
    show_name,
)
from fasttricks.data.batch import Batch
from fasttricks.learning.precision import halve
from fasttricks.models.external import pretrained_timm_model
from fasttricks.runs.opened import open_saved
from fasttricks.runs.saved import Saved
from fasttricks.runs.stored import find_weights, named
from fasttricks.system.distributed import World
from fasttricks.system.failures import card_failed


class Teacher(nn.Module):
    """`model` in evaluation mode, its logits without gradient.

    name: the network's name. digest: the digest of its weights. statistics: (mean, std) that its images were normalised by,
    each three numbers in 0 to 255; where they are not those of `data`, which made the student's, each image is converted, which
    commutes with mixup. dtype:
    float16 or float32, the dtype of its activations. outputs: the number that each of our classes has there; None: the same.
    Costs a forward pass a step; no sync.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        digest: str,
        device: torch.device,
        dtype: torch.dtype,
        statistics: Statistics | None = None,
        data: DataConfig | None = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.digest, self.dtype = name, digest, dtype
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.dtype == torch.float16:
            self.model = _half(self.model)
        self.eval().requires_grad_(False)
        self.outputs = None if outputs is None else torch.tensor(outputs, device=device)
        """The logits of our classes in our order, by number; None where it has that order itself."""
        self.conversion: tuple[Tensor, Tensor] | None = None
        """Factor and shift, each (3, 1, 1), from our normalised images to its; None where they are the same."""
        ours = (data.mean, data.std) if data is not None else (DataConfig.mean, DataConfig.std)
        if statistics is not None and not same_statistics(statistics, ours):
            (mean, std), (our_mean, our_std) = (
                [torch.tensor(values, dtype=torch.float64) for values in pair] for pair in (statistics, ours)
            )
            factor, shift = our_std / std, (our_mean - mean) / std
            self.conversion = tuple(x.to(device, self.dtype).view(3, 1, 1) for x in (factor, shift))  # type: ignore[assignment]

    def judge(self, batch: Batch, images: Tensor) -> Tensor:
        """Logits (N, K) of `images`, (N, 3, S, S), as the student sees those of `batch`: mixed and all."""
        logits: Tensor = self(images)
        return logits

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K), in the teacher's dtype, of images that were normalised, and maybe mixed, for the student."""
        images = images_NCHW.to(self.dtype)
        if self.conversion is not None:
            factor, shift = self.conversion
            images = torch.addcmul(shift, images, factor)
        logits: Tensor = self.model(images)
        return logits if self.outputs is None else logits.index_select(1, self.outputs)


def _half(model: nn.Module) -> nn.Module:
    """FP16 as in a run where halve() knows every layer; else FP16 for all layers."""
    try:
        return halve(model)
    except ConfigError:
        return model.half()


def load_teacher(config: DistillConfig, classes: Sequence[str], data: DataConfig, world: World) -> Teacher:
    """The teacher that `config` names, on the rank's device.

    classes: those of the training images, in their order; a checkpoint's must have the same names, and its logits are put into
    this order; timm's must be as many. data: that of the student, whose image_size the teacher must accept.
    Raises ConfigError for these, for weights that are not those of config.digest, and where timm is absent or cannot get its
    weights; CheckpointError as open_saved.
    """
    statistics: Statistics | None = None
    outputs = None
    if config.teacher.startswith(TIMM):
        model, statistics = pretrained_timm_model(config.teacher, "distill.teacher")
        name = config.teacher
    else:
        saved = _read(config)
        rule = f"learnt the task {saved.task}, and a teacher gives one class to an image; give a classifier"
        require(saved.task == "classification", "distill.teacher", config.teacher, rule)
        model, name = saved.network(), saved.config.model.name
        statistics = saved.config.data.mean, saved.config.data.std
        outputs = _match_classes(config, saved.classes, classes)
    digest = weights_digest(model)
    rule = f"the teacher's weights ({config.teacher}) are {digest}: not the weights of the run so far; give the same teacher"
    require(config.digest in ("", digest), "distill.digest", config.digest, rule)
    dtype = teacher_dtype(world.device)
    teacher = Teacher(
        model,
        name=name,
        digest=digest,
        device=world.device,
        dtype=dtype,
        statistics=statistics,
        data=data,
        outputs=outputs,
    )
    _check_output(teacher, config, len(classes), data.image_size, world.device)
    return teacher


def teacher_dtype(device: torch.device) -> torch.dtype:
    """FP16 on CUDA; FP32 on the CPU, where FP16 is several times slower."""
    return torch.float16 if device.type == "cuda" else torch.float32


def teacher_network(config: DistillConfig) -> ModelConfig:
    """The teacher's network without its weights. Raises CheckpointError as open_saved."""
    if config.teacher.startswith(TIMM):
        return ModelConfig(name=config.teacher)
    return _read(config).config.model


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of names, shapes and values of all parameters and buffers. Reads them on the host: 0.2 s per 100 MB."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_teacher(config: DistillConfig) -> None:
    """Raise CheckpointError where the teacher is a path without a checkpoint. Reads none."""
    if config.teacher and not config.teacher.startswith(TIMM):
        with _told():
            find_weights(Path(config.teacher))


def _read(config: DistillConfig) -> Saved:
    with _told():
        saved = open_saved(Path(config.teacher))
    return saved.trusting(config.trust_code)


def _told() -> AbstractContextManager[None]:
    way_out = "train it first, by the recipe of that name where it is runs/RECIPE, or give another --distill.teacher"
    return named("distill.teacher", way_out)


def _match_classes(config: DistillConfig, theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """The number that each of our classes has there; None where they have the same order."""
    rule = f"knows {len(theirs)} classes, the training images have {len(ours)}; give a teacher of the same classes"
    require(len(theirs) == len(ours), "distill.teacher", config.teacher, rule)
    number = {name: label for label, name in enumerate(theirs)}
    unknown = [name for name in ours if name not in number]
    rule = f"must know the classes of the training images, and does not know {', '.join(map(show_name, unknown[:5]))}"
    require(not unknown, "distill.teacher", config.teacher, rule)
    return None if list(theirs) == list(ours) else [number[name] for name in ours]


def _check_output(
    teacher: Teacher, config: DistillConfig, num_classes: int, image_size: int, device: torch.device
) -> None:
    """Try one image of this size."""
    try:
        logits = teacher(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError) as error:
        if card_failed(error):  # no fault of the size
            raise
        rule = f"takes no images of data.image_size ({image_size}) pixels ({str(error).splitlines()[0]}); give another teacher"
        raise ConfigError(f"distill.teacher = {config.teacher!r}: {rule}") from error
    found = logits.shape[-1]
    rule = f"knows {found} classes, the training images have {num_classes}; give a teacher of the same classes"
    require(logits.shape == (1, num_classes), "distill.teacher", config.teacher, rule)

"""What a run is, as frozen dataclasses: every field with its unit and range, checked when it is made.

A config is plain data: no torch, no paths touched, no device asked. `TrainConfig` is the root. The docstring under each
field is its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from fasttricks.config.errors import require
from fasttricks.config.networks import OPTIONS, model_info

Color = Literal["paper", "published", "none"]
Interpolation = Literal["linear", "cubic", "lanczos3"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "torch", "fused", "apex"]
Operators = Literal["auto", "fused", "dali"]
Compile = Literal["off", "default", "reduce-overhead", "max-autotune"]


def _require_range(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    ok = len(pair) == 2 and all(map(math.isfinite, pair)) and low < pair[0] <= pair[1] <= high
    require(ok, name, pair, f"must be two numbers with {low:g} < first <= second <= {high:g}")


def _require_choices(config: object, section: str = "") -> None:
    """Hold every Literal field of `config` to its choices: the type checker sees them, a caller's JSON does not."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            value, choices = getattr(config, name), get_args(kind)
            require(value in choices, section + name, value, f"must be one of {', '.join(map(str, choices))}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Input pipeline: where the images are, and how they are cropped, coloured and scaled."""

    root: str = ""
    """Folder with train/ and val/, a folder of images a class in each; the word demo: images that the project draws."""
    image_size: int = 224
    """Side of the square network input, pixels, 8 or more."""
    val_resize: int = 256
    """Validation: short side after the resize and before the centre crop, pixels, at least image_size."""
    area: tuple[float, float] = (0.08, 1.0)
    """Random crop: share of the image's area, uniform in this range, within (0, 1]."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Random crop: width / height before the resize to a square, uniform in this range, above 0."""
    flip: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""
    color: Color = "paper"
    """paper: hue, saturation, brightness; published: brightness, contrast, saturation (the authors' script); none."""
    color_jitter: float = 0.4
    """Each colour coefficient is drawn from U[1 - x, 1 + x]; 0 to 1."""
    pca_noise: float = 0.1
    """Standard deviation of the PCA (AlexNet) noise coefficients, 0 or more. Noise is added on the 0 to 255 scale."""
    fixed_augmentation: bool = False
    """Draw crop, flip and colour of an image once, and not anew in each epoch: what distill.cache needs. Not in the paper."""
    interpolation: Interpolation = "linear"
    """Filter of every resize, training and validation."""
    antialias: bool = True
    """Widen the filter when shrinking, as PIL does."""
    operators: Operators = "auto"
    """CPU training: fused resizes, flips and colours in one compiled pass; dali: its operators; auto: fused where it builds."""
    threads: int = 0
    """Decoding threads of a rank; 0: the CPU cores divided among the ranks of this machine."""
    prefetch: int = 2
    """Batches prepared ahead, 1 or more."""
    max_bad: float = 0.05
    """Share of a split's files that may be bad, replaced (training) or left out (validation); 0 to 1. More is an error."""
    max_pixels: int = 100_000_000
    """Larger images, by the size in their header, pixels, count as bad: they are not decoded. 1 or more."""

    def __post_init__(self) -> None:
        _require_choices(self, "data.")
        require(self.image_size >= 8, "data.image_size", self.image_size, "must be 8 or more pixels")
        rule = f"must be at least data.image_size ({self.image_size}), which is cropped from it"
        require(self.val_resize >= self.image_size, "data.val_resize", self.val_resize, rule)
        _require_range("data.area", self.area, 0, 1)
        _require_range("data.aspect", self.aspect, 0, math.inf)
        require(0 <= self.flip <= 1, "data.flip", self.flip, "is a probability, 0 to 1")
        require(0 <= self.color_jitter <= 1, "data.color_jitter", self.color_jitter, "must be within 0 to 1")
        require(0 <= self.pca_noise < math.inf, "data.pca_noise", self.pca_noise, "must be 0 (off) or more")
        require(self.threads >= 0, "data.threads", self.threads, "must be 0 (choose) or more")
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "must be 1 or more")
        require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "is a share of the files, 0 to 1")
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "must be 1 or more pixels")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its initial weights."""

    name: str = "resnet50d"
    """resnet, layers (8, 10, 11, 18, 34, 50, 101, 152), variant (a to d), as resnet50d; inception_v3; mobilenet_v1; timm:NAME."""
    num_classes: int = 0
    """Outputs of the classifier; 0: as many as data.root has classes. Another number than the data's is an error."""
    stem_stride: Literal[4, 2, 1] = 4
    """How much the stem shrinks the image: 4 (the paper), strided convolution and pooling; 2, no pooling; 1, neither."""
    width: float = 1.0
    """Multiplies every channel count (rounded to a multiple of 8), above 0; the paper's networks have 1."""
    zero_gamma: bool = False
    """Start the last batch norm of every residual block at 0, so that each block starts as the identity."""
    aux_head: bool = False
    """Inception-V3: train a second classifier on the 17 x 17 stage besides (loss.aux_weight); the paper's runs have none."""

    def __post_init__(self) -> None:
        _require_choices(self, "model.")
        require(self.num_classes >= 0, "model.num_classes", self.num_classes, "must be 0 (from the data) or more")
        require(self.stem_stride in (4, 2, 1), "model.stem_stride", self.stem_stride, "must be 4, 2 or 1")
        require(0 < self.width <= 16, "model.width", self.width, "must be above 0 and at most 16")
        for option, rule in OPTIONS.items():
            value, default = getattr(self, option), getattr(type(self), option)
            ok = value == default or option in model_info(self.name).options
            require(
                ok, f"model.{option}", value, f"not for model.name = {self.name!r}: {rule}; leave it at {default!r}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Nesterov SGD."""

    base_lr: float = 0.1
    """Peak learning rate for a batch of 256 images, above 0."""
    linear_scaling: bool = True
    """Peak lr = base_lr x global_batch_size / 256; off: base_lr whatever the batch."""
    momentum: float = 0.9
    """Nesterov momentum, 0 to below 1."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient, 0 or more."""
    bias_decay: bool = False
    """Decay biases and batch-norm parameters too; off: convolution and FC weights only (the paper's no bias decay)."""
    backend: Backend = "auto"
    """torch: its fused SGD; fused: ours, with FP32 masters, in one launch; apex: NVIDIA's; auto: fused for fp16, else torch."""
    loss_scale: float = 0.0
    """fp16: factor on the loss; 0: dynamic, from 65536, halved by an overflow, doubled after loss_scale_steps without one."""
    loss_scale_steps: int = 2000
    """fp16: steps in a row without an overflow that double a dynamic loss scale, 1 or more."""

    def __post_init__(self) -> None:
        _require_choices(self, "optim.")
        require(0 < self.base_lr < math.inf, "optim.base_lr", self.base_lr, "must be above 0; 0.1 is the paper's")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be 0 or more and below 1; 0.9 is usual")
        require(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "must be 0 or more and below 1")
        require(0 <= self.loss_scale < math.inf, "optim.loss_scale", self.loss_scale, "must be above 0, or 0 (dynamic)")
        require(self.loss_scale_steps >= 1, "optim.loss_scale_steps", self.loss_scale_steps, "must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run."""

    decay: Literal["cosine", "step"] = "cosine"
    """cosine: half a cosine from the peak to 0 after warm-up; step: times step_factor at each of step_epochs."""
    warmup_epochs: float = 5.0
    """Linear warm-up from 0 to the peak, per batch, epochs, 0 or more; shorter than the run."""
    step_epochs: tuple[float, ...] = (30, 60, 90)
    """Epochs, counted from the start of the run and rising, at which a step decay multiplies the lr."""
    step_factor: float = 0.1
    """What a step multiplies the lr by, above 0 and below 1."""
    first_size: float = 1.0
    """Progressive resizing: side of the training images at first, as a share of data.image_size, above 0 to 1 (off)."""
    size_steps: int = 3
    """Steps, equal in length and in pixels, in which the side grows, 1 or more."""
    full_size_at: float = 0.75
    """Share of the epochs after which the side is data.image_size, above 0 to below 1."""

    def __post_init__(self) -> None:
        _require_choices(self, "schedule.")
        require(0 < self.first_size <= 1, "schedule.first_size", self.first_size, "must be above 0 and at most 1 (off)")
        require(self.size_steps >= 1, "schedule.size_steps", self.size_steps, "must be 1 or more")
        rule = "must be above 0 and below 1: some epochs are to have the full size"
        require(0 < self.full_size_at < 1, "schedule.full_size_at", self.full_size_at, rule)
        require(0 <= self.warmup_epochs < math.inf, "schedule.warmup_epochs", self.warmup_epochs, "must be 0 or more")
        rising = all(a < b for a, b in zip((0.0, *self.step_epochs), self.step_epochs, strict=False))
        require(rising, "schedule.step_epochs", self.step_epochs, "must be rising and above 0")
        require(0 < self.step_factor < 1, "schedule.step_factor", self.step_factor, "must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy and what refines its targets."""

    smoothing: float = 0.0
    """Label smoothing, 0 to below 1; the paper's value is 0.1."""
    smoothing_over: Literal["others", "all"] = "others"
    """others: smoothing / (K - 1) to each wrong class (the paper); all: smoothing / K to each class (its code, torch)."""
    mixup_alpha: float = 0.0
    """Mixup with lambda ~ Beta(alpha, alpha), one a batch; 0: no mixup; the paper's value is 0.2."""
    aux_weight: float = 0.4
    """What the loss of an auxiliary head (model.aux_head) counts beside the network's own; above 0."""

    def __post_init__(self) -> None:
        _require_choices(self, "loss.")
        require(0 <= self.smoothing < 1, "loss.smoothing", self.smoothing, "must be 0 or more and below 1")
        require(0 <= self.mixup_alpha < math.inf, "loss.mixup_alpha", self.mixup_alpha, "must be 0 (off) or more")
        require(0 < self.aux_weight < math.inf, "loss.aux_weight", self.aux_weight, "must be above 0; 0.4 is usual")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation (section 5.3): hard_weight x CE(labels) + soft_weight x T^2 x CE(teacher's softmax at T, student's at T)."""

    teacher: str = ""
    """Run folder or checkpoint file of fasttricks.train, or timm:NAME, timm's trained weights of it; empty: no distillation."""
    digest: str = ""
    """Of the teacher's weights, which the run's config.json records; another teacher is refused. Empty: any."""
    temperature: float = 20.0
    """T, above 0; the paper's is 20."""
    cache: str = ""
    """Folder for the teacher's logits, which it then gives once an image: K numbers each. Needs data.fixed_augmentation."""
    hard_weight: float = 1.0
    """Weight of the labels' loss, 0 or more; the paper's is 1, its authors' code has 0.5."""
    soft_weight: float = 1.0
    """Weight of T^2 x the teacher's loss, 0 or more; the paper's is 1, its authors' code has 0.5."""

    def __post_init__(self) -> None:
        require(
            not self.cache or bool(self.teacher), "distill.cache", self.cache, "needs a teacher: give --distill.teacher"
        )
        require(
            0 < self.temperature < math.inf, "distill.temperature", self.temperature, "must be above 0; 20 is usual"
        )
        for name in ("hard_weight", "soft_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"distill.{name}", value, "must be 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training. Every validation image counts exactly once."""

    every_epochs: int = 1
    """Validate after each so many epochs, and after the last; 1 or more."""
    batch_size: int = 0
    """Images a batch and rank; 0: as in training."""
    flip: bool = False
    """Test-time flip: average the logits of the image and its mirror image. Not in the paper."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, "eval.every_epochs", self.every_epochs, "must be 1 or more")
        require(self.batch_size >= 0, "eval.batch_size", self.batch_size, "must be 0 (as in training) or more")


@dataclass(frozen=True, kw_only=True)
class TricksConfig:
    """Ablation: switch tricks of the paper by name. The command line applies them to the recipe first; single fields win."""

    on: tuple[str, ...] = ()
    """Tricks to switch on, by name."""
    off: tuple[str, ...] = ()
    """Tricks to switch off, by name."""

    def __post_init__(self) -> None:
        both = sorted(set(self.on) & set(self.off))
        require(not both, "tricks.off", both, "cannot be switched on and off at once; leave it in one list")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, wholly: the same config, data and versions give the same weights."""

    recipe: str
    """Label of the run in its summary: the recipe that it came from."""
    epochs: int
    """Passes over the training images, 1 or more."""
    global_batch_size: int
    """Images a step, over all ranks and micro-batches, 1 or more."""
    accumulate: int = 1
    """Micro-batches a step: gradients are summed over this many passes before an update, to fit a small memory; 1 or more."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. fp16: FP16 weights with FP32 masters (the paper's); bf16: autocast, FP32 weights."""
    compile: Compile = "off"
    """Mode of torch.compile for the network in training; off: eager."""
    compile_fallback: bool = False
    """Where compilation fails, say so and go on eagerly; off: an error."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over all ranks (CUDA only); off: over each rank's own images, as in the paper."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    seed: int = 0
    """Of weights, order, augmentation and mixup; 0 or more."""
    ema_decay: float = 0.0
    """Average of the weights, kept as avg = decay x avg + (1 - decay) x weights a step and evaluated in their place; 0: none."""
    checkpoint_epochs: int = 1
    """Save after each so many epochs, and after the last; 1 or more. Kept are the newest two and the newest of an epoch's end."""
    checkpoint_steps: int = 0
    """Save also after each so many steps, within an epoch too; 0: at the ends of epochs only."""
    log_steps: int = 20
    """Steps between two log lines; the only time the host waits for the device."""
    profile: bool = False
    """Record steps 6 to 15 by torch.profiler: trace.json (Chrome format) in the run folder, and a table of where time goes."""
    run_dir: str = ""
    """Folder of this run; empty: runs/RECIPE. It must not exist, or --resume must be given."""
    resume: bool = False
    """Go on from the newest whole checkpoint of run_dir, bit for bit; where there is no run yet, begin it."""
    allow_other_ranks: bool = False
    """Let a resumed run have another number of ranks or micro-batches, from the end of an epoch on."""
    allow_other_versions: bool = False
    """Let a resumed run have other releases of torch, DALI, NumPy, Triton, or another kind of device: no longer bit for bit."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """A NaN, infinite or exploded loss: stop the run; or skip and count the step, which then changes no weight."""
    max_loss: float = 100.0
    """A micro-batch's mean loss above this has exploded, nats; 0: NaN and infinity only. Chance is ln(classes), 6.9 for 1000."""
    timeout_s: int = 600
    """How long ranks wait for one that hangs before the run ends, seconds, 1 or more; above the time that a save takes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tricks: TricksConfig = field(default_factory=TricksConfig)

    def __post_init__(self) -> None:
        _require_choices(self)
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.global_batch_size >= 1, "global_batch_size", self.global_batch_size, "must be 1 or more")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "must be 1 or more")
        require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be 0 (none) or more and below 1")
        require(self.checkpoint_epochs >= 1, "checkpoint_epochs", self.checkpoint_epochs, "must be 1 or more")
        require(self.checkpoint_steps >= 0, "checkpoint_steps", self.checkpoint_steps, "must be 0 (off) or more")
        require(0 <= self.max_loss < math.inf, "max_loss", self.max_loss, "must be above 0, or 0 (any finite loss)")
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be 1 or more")
        rule = "takes an optimizer that can leave a step out; take --optim.backend auto, torch or fused"
        require(self.on_bad_loss == "stop" or self.optim.backend != "apex", "on_bad_loss", self.on_bad_loss, rule)
        require(self.log_steps >= 1, "log_steps", self.log_steps, "must be 1 or more")
        rule = f"must be below epochs ({self.epochs}); warm-up is a part of the run"
        require(self.schedule.warmup_epochs < self.epochs, "schedule.warmup_epochs", self.schedule.warmup_epochs, rule)
        rule = f"makes images of fewer than 8 pixels of data.image_size ({self.data.image_size}); raise it"
        first = self.schedule.first_size
        require(first == 1 or first * self.data.image_size >= 8, "schedule.first_size", first, rule)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up; linear scaling as in section 3.1: 0.1 at 256 images, 0.4 at 1024."""
        scale = self.global_batch_size / 256 if self.optim.linear_scaling else 1.0
        return self.optim.base_lr * scale

    def micro_batch_size(self, world_size: int) -> int:
        """Images a rank takes at once. Raises ConfigError where ranks x micro-batches do not divide the global batch."""
        parts = world_size * self.accumulate
        nearest = max(parts, round(self.global_batch_size / parts) * parts)
        rule = f"must be a multiple of ranks x accumulate ({world_size} x {self.accumulate}); the nearest is {nearest}"
        require(self.global_batch_size % parts == 0, "global_batch_size", self.global_batch_size, rule)
        return self.global_batch_size // parts

"""A run as frozen dataclasses: every field with its unit and range, checked when it is made.

A config is plain data: no torch, no paths touched, no device asked. `TrainConfig` is the root. The docstring under each
field and its range are its help text; rules that relate two fields stand in __post_init__.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fasttricks.config.errors import DoesNotApplyError, require, unknown
from fasttricks.config.networks import OPTION_TRICKS, OPTIONS, model_info
from fasttricks.config.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fasttricks.config.ranges import Channels, Range, Rising, Span, check_fields
from fasttricks.config.transfer import DetectConfig, SegmentConfig, check_transfer

Color = Literal["paper", "published", "none"]
Interpolation = Literal["linear", "cubic", "lanczos3"]
Nested = Literal["error", "top", "leaf"]
TaskName = Literal["classification", "multilabel", "segmentation", "detection"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "torch", "fused", "apex"]
Operators = Literal["auto", "fused", "dali"]
LOGGERS = ("wandb", "mlflow")
Compile = Literal["off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Input pipeline: where the images are, and how they are cropped, coloured and scaled."""

    root: str = ""
    """Folder with train/ and val/, which hold a folder of images for each class, or class folders alone (val_share); a pack;
    train-* and val-* of webdataset's tars or Hugging Face's parquet; demo: images that the project draws."""
    labels: str = ""
    """Table of the images, FILE.csv or FILE.tsv in root: columns path (below root), label and, where it has one, split."""
    label_separator: str = ""
    """Several labels an image, for task multilabel: the text between the classes in a cell label of the table, as ; or |."""
    class_order: str = "codepoint"
    """Order that numbers the classes: codepoint (torchvision), natural (timm: 2 before 10), or a file of a class in each line."""
    nested: Nested = "error"
    """Folders in a class folder: error; top: their images are of that class (torchvision); leaf: each is a class, A/B (timm)."""
    val_share: Annotated[float, Range(0, 1, zero="off")] = 0.0
    """Share of the images that is held out for validation, by a hash of their names, where root has no val/. 0: off; 1: all
    of them, for evaluate alone."""
    limit_per_class: Annotated[int, Range(0, zero="all")] = 0
    """Training images of each class, at most: those of the least hash of their names, so a lower limit takes some of a higher."""
    image_size: Annotated[int, Range(8, 8192, unit="pixels")] = 224
    """Side of the square network input."""
    val_resize: int = 256
    """Validation: short side after the resize and before the centre crop, pixels, at least image_size."""
    area: Annotated[tuple[float, float], Span(0, 1)] = (0.08, 1.0)
    """Random crop: share of the image's area, uniform in this range."""
    aspect: Annotated[tuple[float, float], Span(0)] = (3 / 4, 4 / 3)
    """Random crop: width / height before the resize to a square, uniform in this range."""
    flip: Annotated[float, Range(0, 1, note="it is a probability")] = 0.5
    """Probability of a horizontal flip."""
    color: Color = "paper"
    """paper: hue, saturation, brightness; published: brightness, contrast, saturation (the authors' script); none."""
    color_jitter: Annotated[float, Range(0, 1)] = 0.4
    """Each colour coefficient is drawn from U[1 - x, 1 + x]."""
    pca_noise: Annotated[float, Range(0, zero="off")] = 0.1
    """Standard deviation of the PCA (AlexNet) noise coefficients. Noise is added on the 0 to 255 scale."""
    balance: Annotated[float, Range(0, 1, zero="off")] = 0.0
    """Draw images of rare classes more often; an epoch keeps its length. 1: every class alike; below: a class of n images has a
    share as n^(1 - balance)."""
    alternate_flip: bool = False
    """Mirror an image in every second epoch where its first epoch did not, and the other way round: in two epochs both are seen.
    Not the paper's."""
    fixed_augmentation: bool = False
    """Draw crop, flip and colour of an image once for all epochs, as distill.cache needs it. Not in the paper."""
    interpolation: Interpolation = "linear"
    """Filter of every resize, training and validation."""
    antialias: bool = True
    """Widen the filter when shrinking, as PIL does."""
    mean: Annotated[tuple[float, float, float], Channels(0, 255)] = IMAGENET_MEAN
    """Subtracted from R, G and B, on the scale of 0 to 255; ImageNet's (the paper). `fasttricks data stats` measures others."""
    std: Annotated[tuple[float, float, float], Channels(1, 255)] = IMAGENET_STD
    """R, G and B are divided by it after that, on the scale of 0 to 255; ImageNet's (the paper)."""
    operators: Operators = "auto"
    """CPU training: fused: one compiled pass resizes, flips and colours; dali: DALI's operators; auto: fused where it builds."""
    threads: Annotated[int, Range(0, 1024, zero="choose")] = 0
    """Decoding threads of a rank; 0: the CPU cores divided among the ranks of this machine."""
    readers: Annotated[int, Range(1, 1024)] = 24
    """Files that a rank reads at once, for images with one label or several: 24 read 3,500 a second from a disk that answers in
    5 ms. Raise it for a slower one."""
    prefetch: Annotated[int, Range(1, 1024)] = 2
    """Batches prepared ahead."""
    max_bad: Annotated[float, Range(0, 1, note="it is a share of the files")] = 0.05
    """Share of a split's files that may be bad, replaced (training) or left out (validation). More is an error."""
    max_pixels: Annotated[int, Range(1, unit="pixels")] = 100_000_000
    """Larger images, by the size in their header, count as bad: they are not decoded."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        rule = f"must be at least data.image_size ({self.image_size}), which is cropped from it"
        require(self.val_resize >= self.image_size, "data.val_resize", self.val_resize, rule)
        rule = "draws a flip once for all epochs, and data.alternate_flip changes it; leave one out"
        require(not (self.alternate_flip and self.fixed_augmentation), "data.fixed_augmentation", True, rule)
        for name in ("limit_per_class", "balance") if self.label_separator else ():
            rule = f"goes by the one class of an image, and data.label_separator gives it several; leave {name} at 0"
            require(getattr(self, name) == 0, f"data.{name}", getattr(self, name), rule)


AUGMENTATION = (
    "area",
    "aspect",
    "flip",
    "color",
    "color_jitter",
    "pca_noise",
    "balance",
    "alternate_flip",
    "fixed_augmentation",
    "operators",
)
"""Fields of DataConfig that validation does not read."""
PLACE = ("root", "labels", "label_separator", "class_order", "nested", "val_share", "limit_per_class")
"""Fields of DataConfig that say which images there are and how they are labelled. Each is text or a number."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its initial weights."""

    name: str = "resnet50d"
    """resnet, layers (8, 10, 11, 18, 34, 50, 101, 152), variant (a to d), as resnet50d; inception_v3; mobilenet_v1; cifarnet, for
    small images; timm:NAME; or PACKAGE.MODULE:FACTORY of your own: its FACTORY(num_classes=K) returns the network."""
    num_classes: Annotated[int, Range(2, zero="from the data")] = 0
    """Outputs of the classifier. Another number than data.root has classes is an error."""
    stem_stride: Literal[4, 2, 1] = 4
    """Factor by which the stem shrinks the image: 4 (the paper): strided convolution and pooling; 2: no pooling; 1: neither."""
    width: Annotated[float, Range(0, 16, above=True)] = 1.0
    """Multiplies every channel count (rounded to a multiple of 8); the paper's networks have 1."""
    zero_gamma: bool = False
    """Start the last batch norm of every residual block at 0, so that each block starts as the identity."""
    whitening: bool = False
    """cifarnet: fix the first convolution at filters that whiten the patches of the training images. Not the paper's."""
    identity_init: bool = False
    """cifarnet: start the 3x3 convolutions so that they pass their channels on. Not the paper's."""
    aux_head: bool = False
    """Inception-V3: also train a second classifier on the 17 x 17 stage (loss.aux_weight); the paper's runs have none."""
    norm: Literal["auto", "fused", "torch"] = "auto"
    """Batch norm of the project's networks: fused: with the addition and the activation behind it in one operator, which moves
    less memory; torch: torch's operators, which --compile fuses, and whose launches cost the host of a GPU less; auto: fused on
    a CPU and with cuda_graph, else torch. They agree within rounding."""
    freeze: tuple[str, ...] = ()
    """Parts that keep their weights and batch-norm statistics: stem (all before the first stage), batch_norm (all of it), or a
    module, as layer1."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        defaults = {option: getattr(type(self), option) for option in OPTIONS}
        useful = model_info(self.name).options
        stray = [o for o, default in defaults.items() if getattr(self, o) != default and o not in useful]
        if stray:
            option = stray[0]
            tricks = " ".join(name for name in stray if name in OPTION_TRICKS)
            more = f"; --tricks.off {tricks} switches off the tricks that do not apply" if tricks else ""
            rule = f"not for model.name = {self.name!r}: {OPTIONS[option]}; leave it at {defaults[option]!r}{more}"
            raise DoesNotApplyError(f"model.{option} = {getattr(self, option)!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Nesterov SGD."""

    base_lr: Annotated[float, Range(0, above=True, note="0.1 is the paper's")] = 0.1
    """Peak learning rate for a batch of 256 images."""
    linear_scaling: bool = True
    """Peak lr = base_lr x global_batch_size / 256; off: base_lr whatever the batch."""
    backbone_lr: Annotated[float, Range(0, above=True, note="1 is off, 0.1 is usual")] = 1.0
    """Factor of the lr for all weights but the classifier's, or but the heads' on a base network; 1: one lr for all."""
    bias_lr: Annotated[float, Range(0, above=True, note="1 is off")] = 1.0
    """Factor of the lr for biases, those of batch norm too; 1: the lr of all weights. Not the paper's."""
    momentum: Annotated[float, Range(0, 1, below=True, note="0.9 is usual")] = 0.9
    """Nesterov momentum."""
    weight_decay: Annotated[float, Range(0, 1, below=True)] = 1e-4
    """L2 penalty added to the gradient."""
    bias_decay: bool = False
    """Decay biases and batch-norm parameters too; off: convolution and FC weights only (the paper's no bias decay)."""
    backend: Backend = "auto"
    """torch: its fused SGD; fused: ours, with FP32 masters, in one launch; apex: NVIDIA's; auto: fused for fp16, else torch."""
    loss_scale: Annotated[float, Range(0, above=True, zero="dynamic")] = 0.0
    """fp16: factor on the loss; dynamic: from 65536, halved by an overflow, doubled after loss_scale_steps without one."""
    loss_scale_steps: Annotated[int, Range(1)] = 2000
    """fp16: steps in a row without an overflow that double a dynamic loss scale."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run."""

    decay: Literal["cosine", "step", "poly"] = "cosine"
    """After warm-up, cosine: half a cosine from the peak to 0; step: times step_factor at each of step_epochs; poly: a power
    of the share of the steps that is left."""
    warmup_epochs: Annotated[float, Range(0)] = 5.0
    """Linear warm-up from 0 to the peak, per batch, epochs; shorter than the run."""
    step_epochs: Annotated[tuple[float, ...], Rising()] = (30, 60, 90)
    """Epochs, counted from the start of the run, at which a step decay multiplies the lr."""
    step_factor: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    """Factor of the lr at each of step_epochs."""
    poly_power: Annotated[float, Range(0, above=True, note="0.9 is usual")] = 0.9
    """Power of a poly decay: the lr is the peak x (steps left / steps)^poly_power."""
    first_size: Annotated[float, Range(0, 1, above=True, note="1 is off")] = 1.0
    """Progressive resizing: side of the first epoch's training images, as a share of data.image_size; 1: off."""
    size_steps: Annotated[int, Range(1)] = 3
    """Progressive resizing: number of steps, equal in length and in pixels, in which the side grows."""
    full_size_at: Annotated[float, Range(0, 1, above=True, below=True, note="some epochs must have the full size")] = (
        0.75
    )
    """Progressive resizing: share of the epochs after which the side is data.image_size."""

    def __post_init__(self) -> None:
        check_fields(self, "schedule.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy and its targets."""

    smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Label smoothing; the paper's value is 0.1."""
    smoothing_over: Literal["others", "all"] = "others"
    """others: smoothing / (K - 1) to each wrong class (the paper); all: smoothing / K to each class (its code, torch).
    multilabel: K = 2, as each class is there or not."""
    mixup_alpha: Annotated[float, Range(0, zero="off")] = 0.0
    """Mixup with lambda ~ Beta(alpha, alpha), one a batch; the paper's value is 0.2."""
    class_weights: str = ""
    """Weight of an image's loss by its class. balanced: classes count alike; or a file with a class and its weight in each line,
    as ant,2.5. Scaled so that the mean over the training images is 1. Empty: images count alike. segmentation: of a pixel's;
    balanced: median frequency of a class / its own."""
    aux_weight: Annotated[float, Range(0, above=True, note="0.4 is usual")] = 0.4
    """Weight of the loss of an auxiliary head (model.aux_head); the network's own has 1."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation (section 5.3): hard_weight x CE(labels) + soft_weight x T^2 x CE(teacher's softmax at T, student's at T)."""

    teacher: str = ""
    """Run folder, checkpoint file or export of fasttricks, or timm:NAME for timm's trained weights; empty: no distillation."""
    trust_code: str = ""
    """PACKAGE.MODULE:FACTORY of a teacher whose checkpoint names it: its code is imported only where the name is given here."""
    digest: str = ""
    """Digest of the teacher's weights, as config.json records it. A teacher with another digest is refused. Empty: accept any."""
    temperature: Annotated[float, Range(0, above=True, note="20 is usual")] = 20.0
    """Temperature T of the softmax; the paper's value is 20."""
    cache: str = ""
    """Folder for the teacher's logits: it runs once an image and stores K numbers. Needs data.fixed_augmentation."""
    hard_weight: Annotated[float, Range(0, zero="off")] = 1.0
    """Weight of the labels' loss; the paper's value is 1, its authors' code has 0.5."""
    soft_weight: Annotated[float, Range(0, zero="off")] = 1.0
    """Weight of T^2 x the teacher's loss; the paper's value is 1, its authors' code has 0.5."""

    def __post_init__(self) -> None:
        check_fields(self, "distill.")
        rule = "needs a teacher: give --distill.teacher"
        require(not self.cache or bool(self.teacher), "distill.cache", self.cache, rule)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training. Every validation image counts exactly once."""

    every_epochs: Annotated[int, Range(1)] = 1
    """Epochs from one validation to the next; the last epoch is always validated."""
    batch_size: Annotated[int, Range(0, 65_536, zero="as in training")] = 0
    """Images of a validation batch on one rank."""
    flip: bool = False
    """Test-time flip: average the logits, in segmentation the probabilities, of the image and its mirror image."""
    patience: Annotated[int, Range(0, zero="off")] = 0
    """Early stopping: end the run after this many validations in a row without a new best top-1 (multilabel: mAP). The learning
    rate follows the schedule of all epochs. Not in the paper."""

    def __post_init__(self) -> None:
        check_fields(self, "eval.")


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
    """One training run: the same config, data and versions give the same weights."""

    recipe: str
    """Label of the run in its summary: the name of its recipe."""
    epochs: Annotated[int, Range(1, 1_000_000)]
    """Passes over the training images."""
    global_batch_size: Annotated[int, Range(1, 10_000_000)]
    """Images a step, over all ranks and micro-batches."""
    task: TaskName = "classification"
    """classification: each image has one class; multilabel: any number of them; segmentation: each pixel has one (the section
    segment); detection: each box has one (the section detect)."""
    init: str = ""
    """Weights to start from: a run folder (its averaged weights; RUN:raw the others), a checkpoint, an export, a .pt, .pth or
    .safetensors file, timm:NAME or torchvision:NAME; empty: random ones."""
    accumulate: Annotated[int, Range(1)] = 1
    """Micro-batches a step: gradients are summed over this many passes before an update, to save memory."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. fp16: FP16 weights with FP32 masters (the paper's); bf16: autocast, FP32 weights."""
    compile: Compile = "off"
    """Mode of torch.compile for the network in training; off: eager. reduce-overhead and max-autotune, which record CUDA graphs,
    need one rank and accumulate 1 on every device."""
    compile_fallback: bool = False
    """Run eagerly, with a note, where compilation fails; off: a failure is an error."""
    cuda_graph: bool = False
    """Record a step as one CUDA graph and replay it: for small batches, which the host holds back. One rank, one micro-batch."""
    cuda_graph_ranks: bool = False
    """Allow cuda_graph with several ranks, whose sums of gradients are then in the graph. Untested: no GPU has run it."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over all ranks; off: over each rank's own images, as in the paper. With compile CUDA only."""
    deterministic: Literal["on", "off"] = "on"
    """on: ranks sum gradients in their order, and on a GPU torch, cuDNN, cuBLAS and DALI are asked for one order: the same bits
    after a resume, measured on CPUs alone. off: the backend's sum, cuDNN's fastest algorithms, the GPU's JPEG engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is available, else cpu."""
    seed: Annotated[int, Range(0, 2**63, below=True)] = 0
    """Seed of weights, order, augmentation and mixup."""
    ema_decay: Annotated[float, Range(0, 1, below=True, zero="none")] = 0.0
    """Moving average of the weights, avg = decay x avg + (1 - decay) x weights at each step; validation uses it."""
    checkpoint_epochs: Annotated[int, Range(1)] = 1
    """Epochs from one checkpoint to the next; the last is always saved. The newest two and the newest of an epoch's end stay."""
    checkpoint_steps: Annotated[int, Range(0, zero="off")] = 0
    """Steps from one checkpoint to the next within an epoch; off: checkpoints at the ends of epochs only."""
    log_steps: Annotated[int, Range(1)] = 20
    """Steps between two records of loss, lr and imgs/sec; one also ends each epoch. A pipe or file gets a line for each."""
    loggers: tuple[str, ...] = ()
    """Log to wandb[:PROJECT] and mlflow[:EXPERIMENT] too; a project is fasttricks where it is not named. Never fatal."""
    profile: bool = False
    """Record steps 6 to 15 after the last compilation: trace.json (Chrome format) in run_dir, and a table of the time spent."""
    run_dir: str = ""
    """Folder of this run; empty: runs/RECIPE. It must not exist, or --resume must be given."""
    resume: bool = False
    """Resume from the newest intact checkpoint of run_dir, bit for bit; start a run where there is none."""
    allow_other_ranks: bool = False
    """Resume with another number of ranks or micro-batches, from the end of an epoch."""
    allow_other_versions: bool = False
    """Resume with other releases of torch, DALI, NumPy, Triton, or another kind of device: no longer bit for bit."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """At a NaN, infinite or exploded loss, stop: end the run; skip: leave the step out and count it."""
    max_loss: Annotated[float, Range(0, above=True, zero="any finite loss")] = 100.0
    """A micro-batch whose mean loss, in nats, is above this has exploded. Chance level is ln(classes), 6.9 for 1000."""
    timeout_s: Annotated[int, Range(1, 10_000_000, unit="seconds")] = 600
    """Time that ranks wait for one that hangs before the run ends; longer than a save."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    tricks: TricksConfig = field(default_factory=TricksConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_transfer(self)
        for logger in self.loggers:
            name, rest, project = logger.partition(":")
            rule = f"{unknown(name, LOGGERS)}; the loggers are {' and '.join(LOGGERS)}, each with :PROJECT or without"
            require(name in LOGGERS and (not rest or project.strip() != ""), "loggers", logger, rule)
        names = [logger.partition(":")[0] for logger in self.loggers]
        require(len(set(names)) == len(names), "loggers", " ".join(self.loggers), "must name each logger once")
        rule = "needs an optimizer that can skip a step; take --optim.backend auto, torch or fused"
        require(self.on_bad_loss == "stop" or self.optim.backend != "apex", "on_bad_loss", self.on_bad_loss, rule)
        self._check_labels()
        rule = f"must be below epochs ({self.epochs}); warm-up is a part of the run"
        require(self.schedule.warmup_epochs < self.epochs, "schedule.warmup_epochs", self.schedule.warmup_epochs, rule)
        rule = f"would correct the same twice, as data.balance = {self.data.balance:g} does it; leave one out"
        both = self.loss.class_weights == "balanced" and self.data.balance > 0
        require(not both, "loss.class_weights", self.loss.class_weights, rule)
        rule = f"makes images of fewer than 8 pixels of data.image_size ({self.data.image_size}); raise it"
        first = self.schedule.first_size
        require(first == 1 or first * self.data.image_size >= 8, "schedule.first_size", first, rule)

    def _check_labels(self) -> None:
        """Raise ConfigError for fields that do not suit the number of labels an image."""
        several, separator = self.task == "multilabel", self.data.label_separator
        rule = "needs a table with several labels an image; add --data.labels FILE.csv --data.label-separator ';'"
        require(bool(separator) or not several, "task", self.task, rule)
        rule = "is for several labels an image; add --task multilabel, or leave it out"
        require(several or not separator, "data.label_separator", separator, rule)
        for name, value in (("loss.class_weights", self.loss.class_weights), ("distill.teacher", self.distill.teacher)):
            rule = "is for one label an image, and task is multilabel; leave it out"
            require(not (several and value), name, value, rule)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, with linear scaling as in section 3.1: 0.1 at 256 images, 0.4 at 1024."""
        scale = self.global_batch_size / 256 if self.optim.linear_scaling else 1.0
        return self.optim.base_lr * scale

    def micro_batch_size(self, world_size: int) -> int:
        """Images of one pass on one rank. Raises ConfigError where ranks x micro-batches do not divide the global batch."""
        parts = world_size * self.accumulate
        nearest = max(parts, round(self.global_batch_size / parts) * parts)
        rule = f"must be a multiple of ranks x accumulate ({world_size} x {self.accumulate}); the nearest is {nearest}"
        require(self.global_batch_size % parts == 0, "global_batch_size", self.global_batch_size, rule)
        return self.global_batch_size // parts

"""The fields that commands on a checkpoint share: its weights, the device that asks them, the images they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from fasttricks.config import (
    DataConfig,
    DetectConfig,
    EvalConfig,
    ModelConfig,
    Precision,
    Range,
    SegmentConfig,
    TrainConfig,
    check_fields,
)
from fasttricks.runs.exported import NOT_SAID

T = TypeVar("T", bound="ValidationConfig")
DRAW_SCORE = 0.5


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Which weights of a checkpoint are used."""

    average: bool = True
    """Use the averaged weights where the run kept an average (ema_decay)."""
    trust_code: str = ""
    """PACKAGE.MODULE:FACTORY of a checkpoint whose network is code: it is imported only where this names it too."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(WeightsConfig):
    """How the network is asked; fields that are not given are those of the checkpoint's run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is available, else cpu."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU."""
    model: ModelConfig = NOT_SAID
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class DrawingConfig(NetworkConfig):
    """How it is asked for pictures."""

    draw_score: Annotated[float, Range(0, 1)] = DRAW_SCORE
    """Detection: least score of a box in a picture."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(NetworkConfig):
    """How it is asked for the images of a validation."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)

    @classmethod
    def as_run(cls: type[T], run: TrainConfig) -> T:
        """As `run` validates."""
        return cls(
            device=run.device,
            precision=run.precision,
            model=run.model,
            data=run.data,
            eval=run.eval,
            segment=run.segment,
            detect=run.detect,
        )

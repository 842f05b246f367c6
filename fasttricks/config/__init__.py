"""A run as plain data without torch: a recipe is a function that returns a config, a trick is an edit of one.

errors: errors that a user can correct. schema: the configs. transfer: those of section 6's tasks. ranges: the rules of the
fields' values. fields: the fields by path. networks: the networks by name. launch: this process among the ranks. options:
options as people type them.
Not re-exported: recipes, tricks, resolve (from both to the config that is trained), cli (command lines).
"""

from fasttricks.config.errors import (
    ConfigError,
    DoesNotApplyError,
    UserError,
    nearest,
    require,
    show_classes,
    show_name,
    unknown,
)
from fasttricks.config.fields import (
    field_docs,
    field_kinds,
    flatten,
    from_dict,
    from_plain,
    get_at,
    replace_at,
    replace_fields,
)
from fasttricks.config.launch import Launch, read_launch
from fasttricks.config.networks import NETWORKS, TIMM, TORCHVISION, ModelInfo, model_info, variant_of
from fasttricks.config.normalisation import Statistics, same_statistics, show_statistics
from fasttricks.config.ranges import Range, Rising, Span, check_fields, field_rules
from fasttricks.config.schema import (
    AUGMENTATION,
    PLACE,
    Backend,
    Color,
    Compile,
    DataConfig,
    DistillConfig,
    EvalConfig,
    Interpolation,
    LossConfig,
    ModelConfig,
    Nested,
    Operators,
    OptimConfig,
    Precision,
    ScheduleConfig,
    TaskName,
    TrainConfig,
    TricksConfig,
)
from fasttricks.config.transfer import DetectConfig, SegmentConfig

__all__ = [
    "AUGMENTATION",
    "NETWORKS",
    "PLACE",
    "TIMM",
    "TORCHVISION",
    "Backend",
    "Color",
    "Compile",
    "ConfigError",
    "DataConfig",
    "DetectConfig",
    "DistillConfig",
    "DoesNotApplyError",
    "EvalConfig",
    "Interpolation",
    "Launch",
    "LossConfig",
    "ModelConfig",
    "ModelInfo",
    "Nested",
    "Operators",
    "OptimConfig",
    "Precision",
    "Range",
    "Rising",
    "ScheduleConfig",
    "SegmentConfig",
    "Span",
    "Statistics",
    "TaskName",
    "TrainConfig",
    "TricksConfig",
    "UserError",
    "check_fields",
    "field_docs",
    "field_kinds",
    "field_rules",
    "flatten",
    "from_dict",
    "from_plain",
    "get_at",
    "model_info",
    "nearest",
    "read_launch",
    "replace_at",
    "replace_fields",
    "require",
    "same_statistics",
    "show_classes",
    "show_name",
    "show_statistics",
    "unknown",
    "variant_of",
]

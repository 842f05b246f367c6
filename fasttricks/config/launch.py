"""Where this process stands among those that a launcher started together, as it says in the environment. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from fasttricks.config.errors import require


class Launch(NamedTuple):
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them; without a launcher a process is alone."""

    rank: int = 0
    """0 to size - 1: among all processes of the launch."""
    size: int = 1
    local_rank: int = 0
    """0 to local_size - 1: among those of this machine."""
    local_size: int = 1


_ALONE = Launch()
_VARIABLES = dict(zip(Launch._fields, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), strict=True))
_WAY_OUT = "start the processes with torchrun, or unset it"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch that `environment` describes. A variable that is empty counts as unset, as in a shell.

    Raises ConfigError for a value that is no whole number, for a rank that its size does not have, and for several processes
    without all that they need to meet: RANK, MASTER_ADDR and MASTER_PORT.
    """
    launch = Launch(*(_whole(environment, name, getattr(_ALONE, field)) for field, name in _VARIABLES.items()))
    for rank, size in (("rank", "size"), ("local_rank", "local_size")):
        count = getattr(launch, size)
        require(count >= 1, _VARIABLES[size], count, f"must be 1 or more; {_WAY_OUT}")
        rule = f"must be below {_VARIABLES[size]} ({count}); {_WAY_OUT}"
        require(getattr(launch, rank) < count, _VARIABLES[rank], getattr(launch, rank), rule)
    if launch.size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        rule = f"several processes need {', '.join(missing)} too, to find each other; {_WAY_OUT}"
        require(not missing, "WORLD_SIZE", launch.size, rule)
        port = _whole(environment, "MASTER_PORT", 0)
        require(0 < port < 1 << 16, "MASTER_PORT", port, "must be 1 to 65535; give a free port of the first machine")
    return launch


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    if not value:
        return default
    # int() would take signs, spaces and the digits of other scripts
    ok = value.isascii() and value.isdigit() and len(value) < 10
    require(ok, name, value, f"must be a whole number; {_WAY_OUT}")
    return int(value)

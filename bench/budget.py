"""The time that a call of make bench may take, shared out to its tables."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

CPU_S = 540.0
SHARES = {"loader": 0.17, "step": 0.31, "end_to_end": 0.37, "kernels": 0.02, "transfer": 0.13}
"""Share of each part, in proportion to its time on two cores."""


@dataclass(frozen=True)
class Budget:
    """So many seconds (math.inf: no limit) for these parts of SHARES, in this order, from now on."""

    seconds: float
    parts: Sequence[str]
    started_s: float = field(default_factory=time.monotonic)

    def until_s(self, part: str, table: int = 0, tables: int = 1) -> float:
        """time.monotonic() at which table number `table`, from 0, of so many of a part must be over.

        The time that a table leaves is for the next one.
        """
        shares = [SHARES[name] for name in self.parts]
        at = list(self.parts).index(part)
        spent = (sum(shares[:at]) + shares[at] * (table + 1) / tables) / sum(shares)
        return self.started_s + spent * self.seconds

    def __str__(self) -> str:
        return f"time budget {self.seconds:,.0f} s (--budget-s)" if self.seconds < math.inf else "no time budget"

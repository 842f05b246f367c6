"""The errors of unusable data. No torch, no DALI."""

from __future__ import annotations

from fasttricks.config import UserError


class DataError(UserError):
    """Input data that breaks a rule. The message names the file or folder, the rule and the way out."""


def why_unreadable(error: OSError) -> str:
    """The reason in words of a file that cannot be read."""
    return f"unreadable: {error.strerror or error}"

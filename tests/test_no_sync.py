"""no_sync() sets torch's own mode, which needs no GPU, and puts the mode before back, though torch's warnings be errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from bench.no_sync import no_sync
from lib.tiny import REPOSITORY

DEFAULT, WARN, ERROR = 0, 1, 2
"""The modes as torch numbers them."""


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mode is a number within torch: to set it needs no device, but torch.cuda starts CUDA first."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first test of the process would see the warning
    yield
    torch.set_warn_always(always)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._C._cuda_set_sync_debug_mode(DEFAULT)


def test_the_warning_that_is_silenced_is_there() -> None:
    """As an error it comes after the mode was set: to set the mode outside of a try would leave it set."""
    with pytest.raises(UserWarning, match=r"^Synchronization debug mode is a prototype feature"):
        torch.cuda.set_sync_debug_mode("error")
    assert torch.cuda.get_sync_debug_mode() == ERROR


@pytest.mark.parametrize("before", [DEFAULT, WARN, ERROR])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_mode_is_set_within_and_restored_after(before: int, error: type[BaseException] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._C._cuda_set_sync_debug_mode(before)
    modes = []
    try:
        with no_sync():
            modes.append(torch.cuda.get_sync_debug_mode())
            if error:
                raise error
    except BaseException as raised:
        modes.append(type(raised))
    assert modes == [ERROR, *([error] if error else [])]
    assert torch.cuda.get_sync_debug_mode() == before


def test_other_warnings_remain_errors() -> None:
    with pytest.raises(UserWarning, match="another"), no_sync():
        warnings.warn("another", UserWarning, stacklevel=1)
    assert torch.cuda.get_sync_debug_mode() == DEFAULT


def test_nothing_else_sets_the_mode() -> None:
    """A second place would have the faults that this one was made for."""
    files = [path for room in ("bench", "fasttricks", "kernels", "tests") for path in (REPOSITORY / room).rglob("*.py")]
    setting = {path.name for path in files if "torch.cuda.set_sync_debug_mode(" in path.read_text("utf-8")}
    assert setting == {"no_sync.py", "test_no_sync.py"}

"""Is it right on the card? The kernels beside float64, as plain functions; and, where pytest is there, all tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import isnan
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.child import attempt
from bench.gpu.parts import Job, Row, is_installed
from bench.gpu.runner import REPOSITORY

WITHOUT_DALI = ("kernels_on_gpu", "on_gpu")
CLASSES = (10, 1000, 1001, 21843)


class CheckError(AssertionError):
    """A kernel's error is above its bound."""


def measure(job: Job) -> Iterator[Row]:
    """A row a kernel and dtype: its largest error as a share of its bound, 1 at most. In the walk, interpreted by Triton."""
    if job.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    from lib.kernel_checks import DTYPES, check_images, check_losses, check_sgd

    for dtype in DTYPES:
        checks: list[tuple[str, Callable[[], dict[str, float]]]] = [
            *(
                (f"losses, {k} classes", partial(check_losses, k, dtype, job.device, 3 if job.tiny else 65))
                for k in (CLASSES[:1] if job.tiny else CLASSES)
            ),
            ("augmentation and mixup", partial(check_images, dtype, job.device, 8 if job.tiny else 224)),
            ("SGD", partial(check_sgd, dtype, job.device, *([(1, 17, 1024, 2049)] if job.tiny else []))),
        ]
        for name, check in checks:
            yield from attempt({"check": name, "dtype": str(dtype)[6:]}, partial(_row, check))


def _row(check: Callable[[], dict[str, float]]) -> Iterator[Row]:
    started = time.perf_counter()
    shares = check()
    worst = next((name for name in shares if isnan(shares[name])), max(shares, key=lambda name: shares[name]))
    yield {"largest error / bound": shares[worst], "of": worst, "s": round(time.perf_counter() - started, 2)}
    if not shares[worst] <= 1:
        raise CheckError(f"{worst}: the error is {shares[worst]:g} times its bound; all: {shares}")


def run_tests(job: Job) -> Iterator[Row]:
    """A row for each test that is marked gpu, of all test files that have one; without DALI, of those that need none.

    Without a card each is skipped.
    """
    files = [file for file in sorted((REPOSITORY / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    if not is_installed("nvidia.dali"):
        files = [REPOSITORY / "tests" / f"test_{name}.py" for name in WITHOUT_DALI]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder}/tests"]
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        code = subprocess.run(command, cwd=REPOSITORY).returncode  # its output is this process's, kept where it failed
        if report.exists():
            yield from results(report)
    if code:
        raise SystemExit(f"pytest ended with exit code {code}")


def results(report: Path) -> Iterator[Row]:
    """The rows of pytest's report in JUnit's format."""
    for case in ElementTree.parse(report).iter("testcase"):
        row: Row = {"test": f"{case.get('classname')}::{case.get('name')}", "s": float(case.get("time") or 0)}
        found = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        row["result"] = found
        if found in ("failure", "error"):
            row["error"] = case.find(found).text or found  # type: ignore[union-attr]
        elif found == "skipped":
            row["reason"] = case.find(found).get("message")  # type: ignore[union-attr]
        yield row

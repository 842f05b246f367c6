"""`python -m fasttricks_kernels.proof.report`: row by row, with its progress on standard error; refusals in one line."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from unittest import mock

import pytest
import triton

from fasttricks_kernels.proof import aot, report
from fasttricks_kernels.proof.cases import every_case

SGD = [case for case in every_case() if case.family == "sgd step" and case.dtype == "fp32"]


def refused(*args: str) -> int:
    """The exit code of the report with these arguments, which compiles nothing."""
    compiling = mock.patch.object(aot, "compile_launch", side_effect=AssertionError("compiled"))
    with compiling, mock.patch.object(sys, "argv", ["report", *args]), pytest.raises(SystemExit) as end:
        report.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--arch", "80", "61"], "error: arch = 61: must be one of 70, 75, 80, 86, 89, 90, 100, 120\n"),
        (
            ["--only", "K=1O00"],
            "error: only = 'K=1O00': no case of fp16 has this in its name; the kernels are ",
        ),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_what_is_wrong_is_answered_in_a_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(*args) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("name", aot.TOOLS)
def test_a_program_of_cuda_that_is_absent_is_named_with_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on an install whose Triton brings none: asking for it raises RuntimeError."""
    assert aot.missing_tools() == {}
    monkeypatch.setattr(vars(type(triton.knobs.nvidia))[name], "default_path", "/nowhere")
    assert refused("--only", "sgd") == 2
    variable = f"TRITON_{name.upper()}_PATH"
    way_out = f"the triton wheel brings them; or name yours in {variable}"
    assert (
        capsys.readouterr().err
        == f"error: the report needs {name} of CUDA, which this Triton cannot start; {way_out}\n"
    )


def counted(launch: aot.Launch, arch: int) -> aot.MachineCode:
    """In place of the compiler."""
    some = Counter({32: 1})
    parts = {"shared_bytes": 0, "local_accesses": 0, "atomics": 0, "loads": some, "stores": some}
    return aot.MachineCode(kernel="k", arch=arch, registers=40, warps=4, **parts)  # type: ignore[arg-type]


def test_rows_come_in_order_and_each_case_is_told_as_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    late = threading.Event()

    def inspect(launch: aot.Launch, arch: int) -> aot.MachineCode:
        if arch == 89:  # the first is the last to be done
            late.wait(60)
        else:
            late.set()
        return counted(launch, arch)

    with mock.patch.object(aot, "inspect", inspect), mock.patch.object(report.os, "cpu_count", return_value=2):
        rows = list(report.machine_code_rows(SGD * 2, [89, 120]))
    row = "| sgd step | 3 tensors | fp32 | {} | 4 | 40 | 0 | {} | 1 x 32 | 1 x 32 | 0 | 0 |"
    assert rows[2:] == [row.format(89, "100%"), row.format(120, "100%")] * 2
    told = [line.strip().rsplit("  ", 1) for line in capsys.readouterr().err.splitlines()]
    assert [name for name, _ in told] == [f"{number}/2 compiled: sgd step-3 tensors-fp32" for number in (1, 2)]
    assert all(re.fullmatch(r"\d+ s", spent) for _, spent in told)


def test_after_a_case_that_fails_no_other_is_begun() -> None:
    begun: list[int] = []

    def inspect(launch: aot.Launch, arch: int) -> aot.MachineCode:
        begun.append(arch)
        raise RuntimeError("the assembler ended")

    one_thread = mock.patch.object(report.os, "cpu_count", return_value=1)
    ends = pytest.raises(RuntimeError, match="the assembler ended")
    with mock.patch.object(aot, "inspect", inspect), one_thread, ends:
        list(report.machine_code_rows(SGD * 400, [80]))
    assert 0 < len(begun) < 400


@pytest.mark.slow
def test_the_report_of_a_kernel(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["report", "--only", "sgd", "--dtype", "fp32", "--arch", "89"]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as end:
        report.main()
    shown = capfd.readouterr()
    assert end.value.code == 0, shown.err
    code, _, moved = shown.out.partition("## Bytes")
    for part in (code, moved):
        assert [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| sgd")] == [
            "| sgd step",
            "| sgd step without momentum",
            "| sgd overflow",
        ]
    assert shown.err.count("compiled: ") == shown.err.count("counted: ") == 3

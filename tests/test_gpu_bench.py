"""make gpu: its two files outlive every kind of end; the CUDA side of each part, with the device's functions stood in for."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

from bench.gpu import __main__ as command
from bench.gpu import card, checks, clock, losses, memory, norms, pack, profiled, report
from bench.gpu.parts import BUILDS, CARD, COPY_RATE, CUDA, GPUS, LAUNCHER, PARTS, Job, why_skipped
from bench.soak.processes import alive
from bench.step import StepCase
from fasttricks.config import ConfigError
from fasttricks_kernels.norm import _kernels
from lib.gpu_parts import fake, run_fakes
from lib.tiny import REPOSITORY, environment

GPU = torch.device("cuda", 0)


def both(folder: Path, name: str = "gpu") -> tuple[dict[str, Any], str]:
    """The parts of the JSON file, and the Markdown."""
    return json.loads((folder / f"{name}.json").read_text())["parts"], (folder / f"{name}.md").read_text()


# -------------------------------------------------------------------------------------------------------- files and ends
def test_an_error_a_death_and_a_hang_end_their_part_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = ["good", "raising", "dying", "hanging", "one_row_raises"]
    with pytest.raises(SystemExit) as end:
        run_fakes(str(tmp_path), works, "--device", "cpu", "--budget-s", "8", "--ranks", "1")
    assert end.value.code == 1
    found, page = both(tmp_path)
    assert {name: part["status"] for name, part in found.items()} == {
        CARD: "measured",
        "raising": "failed",
        "dying": "failed",
        "hanging": "cut short",
        "one_row_raises": "measured",
    }
    assert found["raising"]["rows"] == found["dying"]["rows"] == [{"n": 1}], "rows before an error are kept"
    for text in (found["raising"]["error"], page):
        assert "Traceback" in text and "in raising" in text and "ValueError: the reason in words" in text
    assert found["dying"]["reason"] == "exit code -6"
    (row,) = found["hanging"]["rows"]
    assert not alive(row["pid"]) and not alive(row["child"]) and "the last words" in found["hanging"]["error"]
    assert 1 <= found["hanging"]["seconds"] <= 8
    first, second, third = found["one_row_raises"]["rows"]
    assert (first, second["n"], third) == ({"n": 1, "m": 1}, 2, {"n": 3, "told": 1.5e12})
    assert "ZeroDivisionError" in second["error"] and found["one_row_raises"]["reason"] == "1 of 3 rows failed"
    assert page.startswith("# make gpu: NVIDIA Test 9000\n\n**A walk on the CPU")
    assert "| 1 | 1 |  |  |" in page and "ZeroDivisionError" in page.partition("## one_row")[2]


def test_on_a_gpu_nothing_is_called_a_walk_and_the_result_is_saved_by_the_cards_name(tmp_path: Path) -> None:
    run_fakes(str(tmp_path), ["good"], "--save", "--ranks", "1")
    for folder, name in ((tmp_path, "gpu"), (tmp_path / "results", "gpu-NVIDIA-Test-9000")):
        found, page = both(folder, name)
        assert found[CARD]["status"] == "measured" and "walk" not in page
    assert str(tmp_path) not in page


def test_a_kill_in_the_third_part_leaves_two_whole_in_both_files(tmp_path: Path) -> None:
    code = "import sys; from lib.gpu_parts import run_fakes; run_fakes(sys.argv[1], sys.argv[2:], '--ranks', '1')"
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "tests")])
    words = [sys.executable, "-c", code, str(tmp_path), "good", "one_row_raises", "waiting"]
    with subprocess.Popen(words, env={**environment(), "PYTHONPATH": path}, stdout=subprocess.DEVNULL) as process:
        found = killed_in(tmp_path, "waiting", process)
    assert [part["status"] for part in found.values()] == ["measured", "measured", "running"]
    assert [len(part["rows"]) for part in found.values()] == [2, 3, 1]
    assert both(tmp_path)[1].count("\n## ") == 3
    (row,) = found["waiting"]["rows"]
    deadline = time.monotonic() + 30
    while alive(row["pid"]):
        assert time.monotonic() < deadline, "a part outlived make gpu"
        time.sleep(0.01)


def killed_in(folder: Path, part: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The parts in the JSON file after a SIGKILL of `process` as soon as `part` has a row."""
    deadline, file = time.monotonic() + 300, folder / "gpu.json"
    try:
        while not (file.exists() and json.loads(file.read_text())["parts"].get(part, {}).get("rows")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    return both(folder)[0]


@pytest.mark.slow
def test_the_walk_on_the_cpu_is_killed_in_its_third_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL) as process:
        found = killed_in(tmp_path, PARTS[2].name, process)
    assert list(found) == [part.name for part in PARTS[:3]]
    *ended, killed = (part["status"] for part in found.values())
    assert set(ended) <= {"measured", "cut short"}, "on a busy machine a part may have reached its time"
    assert killed == "running"
    assert all(part["rows"] and not any("error" in row for row in part["rows"]) for part in found.values())
    page = both(tmp_path)[1]
    assert report.WALK in page and page.count("\n## ") == 3


@pytest.mark.parametrize(
    ("part", "facts", "reason"),
    [
        ({}, {}, ""),
        ({}, {CUDA: True, GPUS: 1}, ""),
        ({}, {CUDA: False, GPUS: 0}, "needs a CUDA device: torch finds none"),
        (
            {"modules": ("torch", "no_such.module", "no_such_one")},
            {},
            "needs no_such.module, no_such_one: not installed",
        ),
        ({"gpus": 2}, {CUDA: True, GPUS: 1}, "needs 4 GPUs: the machine has 1"),
        ({"gpus": 2}, {CUDA: True, GPUS: 4}, ""),
        ({"gpus": 5}, {CUDA: True, GPUS: 8}, "needs 5 ranks or more (--ranks)"),
    ],
)
def test_a_need_that_is_not_met_is_named(part: dict[str, Any], facts: dict[str, Any], reason: str) -> None:
    assert why_skipped(fake("good", **part), "cuda", 4, facts) == reason


def test_a_launcher_that_cannot_be_built_is_a_reason_for_the_kernels_alone() -> None:
    facts = {CUDA: True, GPUS: 1, LAUNCHER: "Triton cannot build: no gcc"}
    assert why_skipped(fake("good", triton=True), "cuda", 1, facts) == "Triton cannot build: no gcc"
    assert why_skipped(fake("good"), "cuda", 1, facts) == why_skipped(fake("good", triton=True), "cpu", 1, facts) == ""
    assert why_skipped(fake("good", triton=True), "cuda", 1, {**facts, LAUNCHER: BUILDS}) == ""


def test_the_launcher_is_asked_for_as_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.launcher(torch.device("cpu")) == "not needed"
    monkeypatch.setattr(card, "check_triton", lambda device: None)
    assert card.launcher(GPU) == BUILDS
    monkeypatch.setattr(card, "check_triton", mock.Mock(side_effect=ConfigError("no gcc")))
    assert card.launcher(GPU) == "no gcc"


def test_a_part_without_time_is_skipped_and_a_skipped_ones_time_is_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}
    monkeypatch.setattr(
        command, "run", lambda job, told: given.update({job.part: job.seconds}) or report.Outcome("measured")
    )
    names = ("a", "b", "c", "d")
    four = [
        fake("good", name=n, seconds=s, gpus=g) for n, s, g in zip(names, (10, 30, 60, 0.1), (1, 5, 1, 1), strict=True)
    ]
    monkeypatch.setattr(command, "PARTS", tuple(four))
    monkeypatch.setattr(command, "NAMES", list(names))
    command.main(["--output", str(tmp_path), "--budget-s", "70.1"])
    assert given == {"a": pytest.approx(10, abs=0.2), "c": pytest.approx(70, abs=0.3), "d": pytest.approx(70.1, abs=1)}
    found, page = both(tmp_path)
    assert found["b"]["status"] == "skipped" and found["b"]["reason"] in page and "needs 5 ranks" in page


@pytest.mark.parametrize(
    "words", [["--budget-s", "1"], ["--ranks", "0"], ["--save", "--device", "cpu"], ["--ranks", "5"]], ids=" ".join
)
def test_a_wrong_option_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="must"):
        command.read_options(words)


def test_each_part_has_its_function() -> None:
    for part in PARTS:
        module, _, name = part.work.partition(":")
        assert callable(getattr(import_module(module), name))
    assert len({part.name for part in PARTS}) == len(PARTS) and PARTS[0].name == CARD


# ------------------------------------------------------------------------------------- the CUDA side, without a device
@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of torch.cuda, in order; each has the signature of the real one."""
    calls: list[str] = []

    def note(name: str, value: Any = None) -> None:
        real = getattr(torch.cuda, name)
        double = mock.create_autospec(real, side_effect=lambda *_, **__: calls.append(name) or value)
        monkeypatch.setattr(torch.cuda, name, double)

    for name in ("synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats"):
        note(name)
    note("mem_get_info", (3 << 30, 8 << 30))
    note("max_memory_allocated", 2 << 30)
    note("max_memory_reserved", 4 << 30)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 50.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return calls


def test_device_time_is_between_two_events_behind_a_wait(cuda: list[str]) -> None:
    """50 ms of 10 passes are 5 ms each; the host is ahead when the first event comes."""
    assert clock.device_seconds(lambda: cuda.append("work"), GPU) == pytest.approx(5e-3)
    wanted = ["synchronize", *["work"] * 10, "synchronize", "_sleep", "record", *["work"] * 10, "record", "event"]
    assert cuda == wanted


def test_a_card_has_its_number_as_its_tensors_have() -> None:
    assert (clock.device_of("cuda"), clock.device_of("cpu")) == (GPU, torch.device("cpu"))


def test_host_time_is_of_one_launch_from_an_idle_device(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain.from_iterable((start, start + taken) for start, taken in ((0, 3), (10, 1), (20, 2)))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    assert clock.host_seconds(lambda: cuda.append("work"), GPU, passes=3) == 2
    assert cuda == ["synchronize", "work"] * 3 + ["synchronize"]


def test_peak_memory_is_of_a_settled_step_alone(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTESTANTS", {memory.OURS: lambda *_: lambda: cuda.append("step")})
    case = StepCase(precision="fp16", batch_size=2, image_size=8, device="cuda")
    for name in ("randn", "randint"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    found = memory.peak_of(case, GPU)
    assert found == {"peak": 2 << 30, "reserved": 4 << 30, "used on the card": 5 << 30}
    assert cuda[:8] == [*["step"] * 3, "synchronize", "empty_cache", "reset_peak_memory_stats", "step", "synchronize"]


def test_the_cards_properties_are_torchs(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("major", "minor", "multi_processor_count", "L2_cache_size")
    stubs = Path(torch.__file__).with_name("_C").joinpath("__init__.pyi").read_text()
    described = stubs.partition("class _CudaDeviceProperties")[2].partition("\nclass ")[0]
    assert all(f"    {name}: _int" in described for name in names)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**dict.fromkeys(names, 9)))
    found = card.properties(GPU)
    assert found["capability"] == "9.9" and found["memory, bytes"] == 8 << 30
    answer = mock.Mock(stdout="NVIDIA Test, 550.1, 96.0, 4, 16, 400.00 W, 1980 MHz, 2619 MHz, [N/A]\n")
    monkeypatch.setattr(card.subprocess, "run", lambda *_, **__: answer)
    assert card.smi(card.SMI)["nvidia-smi clocks.max.sm"] == "1980 MHz"


def event(key: str, microseconds: float, device: DeviceType = DeviceType.CUDA, *, user: bool = False) -> Any:
    times = {"self_device_time_total": microseconds, "self_cpu_time_total": microseconds}
    return SimpleNamespace(key=key, count=6, device_type=device, is_user_annotation=user, **times)


def test_the_kernels_of_a_step_are_named_by_kind() -> None:
    kernels = [event(f"sm90_xmma_gemm_{n}", 100.0 + n) for n in range(10)]
    of_norm = ["void cudnn::bn_fw_tr_1C11_kernel_NCHW", "at::native::batch_norm_backward_reduce_channels_last_kernel"]
    of_norm += [name for name, kernel in vars(_kernels).items() if name.endswith("_kernel") and kernel.fn]
    assert len(of_norm) == 8
    copies = ["Memcpy DtoD (Device -> Device)", "nchwToNhwcKernel", "direct_copy_kernel_cuda"]
    small = [event(key, 10.0) for key in of_norm + copies] + [event("elementwise_kernel", 1.0)]
    host = [event("aten::copy_", 1e6, DeviceType.CPU), event("forward", 1e6, user=True)]
    *rows, whole = profiled.table([*small, *kernels, *host], steps=3, on_gpu=True)
    assert [row["kernel"] for row in rows[:10]] == [f"sm90_xmma_gemm_{n}" for n in range(9, -1, -1)]
    assert {row["kernel"]: row["kind"] for row in rows[10:]} == {
        **dict.fromkeys(of_norm, "batch norm"),
        **dict.fromkeys(copies, "copy, cast or layout"),
    }
    assert whole["kernel"] == "all 22" and whole["ms a step"] == pytest.approx((1045 + 110 + 1) / 3e3)
    assert rows[0]["calls a step"] == 2 and rows[0]["ms a step"] == pytest.approx(109 / 3e3)


def test_bytes_a_second_are_the_least_that_a_loss_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 rows of 1000 classes in FP32: 64,000 bytes for labels, 96,000 with a teacher; a pass of 1 ms; half of the copy rate."""
    monkeypatch.setattr(losses, "compiled", lambda loss, *, tiny: loss)
    monkeypatch.setattr(losses, "device_seconds", lambda work, device: (work(), 1e-3)[1])
    monkeypatch.setattr(losses, "host_seconds", lambda work, device: 2e-6)
    rows = list(losses.measure(Job(part="losses", work="", device="cpu", facts={COPY_RATE: 128e6})))
    assert not any("error" in row for row in rows), rows
    rates = {(row["loss"], row["contestant"]): row["bytes/s"] for row in rows}
    assert rates["labels", "fasttricks"] == rates["mixup's labels", "torch"] == pytest.approx(64e6)
    assert rates["distillation", "torch, compiled"] == pytest.approx(96e6)
    assert rows[0]["of the copy rate"] == pytest.approx(0.5) and rows[0]["us of the host"] == pytest.approx(2)


@pytest.mark.parametrize("kind", ["labels", "mixup's labels", "distillation"])
def test_the_losses_that_are_timed_are_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "compiled", lambda loss, *, tiny: loss)
    works, _ = losses.of_loss(kind, 8, torch.float32, torch.device("cpu"), tiny=True)
    (ours,), *others = (work() for work in works.values())  # type: ignore[misc]
    assert len(others) == 2 and ours.abs().max() > 0
    for (theirs,) in others:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_batch_norms_that_are_timed_are_equal(with_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "compiled", lambda layer, *, tiny: layer)
    shape = 4, 8, 6, 6
    works, moved = norms.works(shape, torch.float32, torch.device("cpu"), with_residual=with_residual, tiny=True)
    ours, *others = (work() for work in works.values())
    assert (
        len(others) == 3 and len(ours) == 3 + with_residual and moved == (11 if with_residual else 8) * 4 * 8 * 36 * 4
    )  # type: ignore[arg-type]
    for theirs in others:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("worst", [1.01, float("nan")])
def test_a_kernel_beyond_its_bound_is_an_error(worst: float) -> None:
    rows: Iterator[dict[str, Any]] = checks._row(lambda: {"loss": 0.5, "gradient": worst})
    with pytest.raises(checks.CheckError, match="gradient"):
        list(rows)
    assert next(checks._row(lambda: {"loss": 1.0}))["of"] == "loss"


def test_pytests_results_are_rows(tmp_path: Path) -> None:
    cases = '<testcase classname="t.a" name="x" time="1.5"/>'
    cases += '<testcase classname="t.a" name="y"><failure message="m">all of it</failure></testcase>'
    cases += '<testcase classname="t.a" name="z"><skipped message="needs a card"/></testcase>'
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    passed, failed, skipped = checks.results(tmp_path / "r.xml")
    assert passed == {"test": "t.a::x", "s": 1.5, "result": "passed"}
    assert (failed["result"], failed["error"]) == ("failure", "all of it")
    assert (skipped["result"], skipped["reason"]) == ("skipped", "needs a card")


# ------------------------------------------------------------------------------------------------- a pack without network
def test_the_pieces_of_a_pack_are_joined_by_the_line_that_is_printed(tmp_path: Path) -> None:
    """Random bytes, which do not shrink, a link and an empty file; no piece is larger than asked for."""
    site = tmp_path / "site"
    names = (
        "a/one.py",
        "a/mod.cpython-312-x86_64-linux-gnu.so",
        "b/__pycache__/x.pyc",
        "a/mod.cpython-311-x86_64.so",
        "e",
    )
    for number, name in enumerate(names):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(random.Random(number).randbytes(1000 * (name != "e")))
    (site / "link").symlink_to("a/one.py")
    files = pack.needed(site, "3.12")
    assert [str(file.relative_to(site)) for file in files] == [names[1], names[0], "e", "link"]
    pieces = pack.pack(site, files, tmp_path / pack.NAME, 700, preset=0)
    assert len(pieces) > 3 and all(piece.stat().st_size <= 700 for piece in pieces)
    subprocess.run(["bash", "-c", pack.UNPACK.format(folder="out", name=pack.NAME)], cwd=tmp_path, check=True)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if not path.is_dir()}
    assert found == {str(file.relative_to(site)) for file in files}
    assert all((tmp_path / "out" / name).read_bytes() == (site / name).read_bytes() for name in found)


def test_a_pack_is_of_the_asked_python_and_the_pinned_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def pip(words: list[str]) -> Any:
        asked.extend(words)
        (Path(words[words.index("--target") + 1]) / "one.py").write_text("1")
        return mock.Mock(returncode=0)

    monkeypatch.setattr(pack.subprocess, "run", pip)
    (tmp_path / f"{pack.NAME}.07").touch()  # of an earlier call
    pack.main(["--python", "3.13", "--output", str(tmp_path)])
    assert asked[asked.index("--python-version") + 1] == "3.13" and "nvidia-dali-cuda120" in asked
    assert Path(asked[asked.index("--constraint") + 1]).is_file() and "--no-deps" in asked
    assert [path.name for path in tmp_path.iterdir()] == [f"{pack.NAME}.00"]
    assert pack.UNPACK.format(folder="site", name=pack.NAME) in capsys.readouterr().out
    monkeypatch.setattr(pack.subprocess, "run", lambda words: mock.Mock(returncode=1))
    for words in (["--python", "3.13"], ["--python", "2.7"], ["--piece-mib", "0"]):
        with pytest.raises(ConfigError):
            pack.main([*words, "--output", str(tmp_path)])


def test_a_pack_that_breaks_off_leaves_no_piece(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(FileNotFoundError):
        pack.pack(tmp_path, [tmp_path / "one", tmp_path / "gone"], tmp_path / pack.NAME, 100, preset=0)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_each_package_of_a_pack_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert sorted(set(pack.PACKAGES) - pinned) == [] and len(set(pack.PACKAGES)) == len(pack.PACKAGES)

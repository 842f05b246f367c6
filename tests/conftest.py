"""What the tests share: real data by name, runs made once, one thread, a GPU or a word on its absence.

torch is imported within, by those who run tests: the process that hands them out (pytest -n) reads this file too.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fasttricks.training.run import Run
    from lib.tiny import FinishedRun

DATA_VARIABLE = "FASTTRICKS_TEST_DATA"
LONG = (
    *("soak", "kernels_interpreted", "demo", "trainer", "resume", "ranks", "plan", "models", "every_model", "ablate"),
    *("detection", "kernels_compile", "kernels_bytes", "models_other", "data_augment", "tasks", "hostile_runs"),
    *("resolve", "data_bad", "api", "calibration", "distill", "plots", "transfer_tables", "bench", "data_loader"),
)
"""Files that take ten seconds or more, the longest first: no worker shall be left alone with one at the end."""


def find_data(name: str) -> Path:
    """The folder NAME/ or the archive NAME.tar of real images in $FASTTRICKS_TEST_DATA; the test is skipped, aloud, without."""
    place = os.environ.get(DATA_VARIABLE)
    if not place:
        pytest.skip(f"needs real images: set {DATA_VARIABLE} to a folder with {name}/ or {name}.tar")
    for found in (Path(place) / name, Path(place) / f"{name}.tar"):
        if found.exists():
            return found
    pytest.skip(f"needs real images: {DATA_VARIABLE}={place} has neither {name}/ nor {name}.tar")


@pytest.fixture(autouse=True)
def _same_algorithms() -> Iterator[None]:
    """A test that asks torch for other algorithms, as build() does on a GPU, asks for none after it."""
    import torch

    cudnn, more, cublas = torch.backends.cudnn, torch.utils.deterministic, "CUBLAS_WORKSPACE_CONFIG"
    before = cudnn.deterministic, cudnn.benchmark, torch.get_deterministic_debug_mode(), more.fill_uninitialized_memory
    workspace = os.environ.get(cublas)
    yield
    cudnn.deterministic, cudnn.benchmark, mode, more.fill_uninitialized_memory = before
    torch.set_deterministic_debug_mode(mode)
    os.environ.pop(cublas, None)
    os.environ |= {} if workspace is None else {cublas: workspace}


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """A test draws the same numbers alone, after any other, and on each day."""
    from lib.seeds import seed_all

    seed_all()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """So do the fixtures of several tests, whichever test is the first to ask for them."""
    if fixturedef.scope != "function":
        from lib.seeds import seed_all

        seed_all()


@pytest.fixture(autouse=True)
def _closing_of_the_terminal_is_heard() -> Iterator[None]:
    """Also where the tests are started by nohup, which commands respect: they are then deaf to SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The GPU tests run with pytest alone too, for which pyproject.toml's timeout would be an unknown option."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds of a test; nobody looks at it without pytest-timeout")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) is a folder that make(folder) filled: by the first of all workers to ask, for which the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def test_data(once: Callable[..., Path]) -> Callable[[str], Path]:
    """test_data("cifar10") is the folder of that real data set; an archive is unpacked once."""

    def find(name: str) -> Path:
        found = find_data(name)
        if found.is_dir():
            return found

        def unpack(folder: Path) -> None:
            with tarfile.open(found) as tar:
                tar.extractall(folder, filter="data")

        return once(f"data-{name}", unpack) / name

    return find


@pytest.fixture(scope="session")
def real_jpegs() -> Callable[[str, int], list[bytes]]:
    """real_jpegs("cifar10", 500) is so many JPEGs of its train/, evenly spread, read from an archive without unpacking it."""

    def is_one(path: PurePath) -> bool:
        return "train" in path.parts and path.suffix.lower() in (".jpeg", ".jpg")

    def read(name: str, count: int) -> list[bytes]:
        found = find_data(name)
        if found.is_dir():
            paths = sorted(path for path in found.rglob("*") if is_one(path.relative_to(found)))
            return [path.read_bytes() for path in paths[:: len(paths) // count][:count]]
        with tarfile.open(found) as tar:
            members = sorted((path, member) for member in tar if is_one(path := PurePath(member.name)))
            return [tar.extractfile(member).read() for _, member in members[:: len(members) // count][:count]]

    return read


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, one thread for all, and without a CUDA device the tests marked gpu are skipped."""
    import torch

    torch.set_num_threads(1)  # the tests' networks are too small for more, and the workers have a core each
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    if torch.cuda.is_available():
        # torch reads it once, at the first matrix product of the process: a run that asks for it later would be warned of
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collectstart() -> None:
    """What imports make stays: the collector of garbage would look through it for a fifth of the time and find none."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What the imports left behind is never garbage: the collector need not look through its half million objects again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured, by record_property("figures", ...)."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "figures":
                terminalreporter.write_line(f"{report.nodeid}: {value}")


@pytest.fixture(scope="session")
def tiny_data(once: Callable[..., Path]) -> Path:
    """45 training and 14 validation JPEGs of three classes. Not to be changed."""
    from lib.tiny import write_images

    return once("tiny", lambda folder: write_images(folder, train=45, val=14))


@pytest.fixture(scope="session")
def tiny_masks(once: Callable[..., Path]) -> Path:
    """19 training and 5 validation images of 40 to 60 pixels with masks of three classes. Not to be changed."""
    from lib.masks import write_masks

    return once("tiny-masks", lambda folder: write_masks(folder, train=19, val=5, sides=(40, 60)))


@pytest.fixture(scope="session")
def segmented_run(tiny_masks: Path, once: Callable[..., Path]) -> Path:
    """A run of task segmentation, two epochs on one rank, with an average of the weights. Not to be changed."""
    from fasttricks.trainer import fit
    from fasttricks.training.build import build
    from lib.segmented import config_for
    from lib.tiny import ALONE

    def make(folder: Path) -> None:
        fit(build(config_for(tiny_masks, folder / "run"), ALONE))

    return once("segmented", make) / "run"


@pytest.fixture(scope="session")
def tiny_boxes(once: Callable[..., Path]) -> Path:
    """A VOCdevkit of 11 training and 5 test images of 40 to 60 pixels with boxes of three classes. Not to be changed."""
    from lib.boxes import write_boxes

    lists = {"VOC2007/trainval": 11, "VOC2007/test": 5}
    return once("tiny-boxes", lambda folder: write_boxes(folder, lists, sides=(40, 60)))


@pytest.fixture(scope="session")
def detected_run(tiny_boxes: Path, once: Callable[..., Path]) -> Path:
    """A run of task detection, two epochs on one rank, with an average of the weights. Not to be changed."""
    from fasttricks.trainer import fit
    from fasttricks.training.build import build
    from lib.detected import config_for
    from lib.tiny import ALONE

    def make(folder: Path) -> None:
        fit(build(config_for(tiny_boxes, folder / "run"), ALONE))

    return once("detected", make) / "run"


@pytest.fixture(scope="session")
def finished_run(tiny_data: Path, once: Callable[..., Path]) -> FinishedRun:
    """A run of three epochs by `python -m fasttricks.train`, on a terminal. Not to be changed."""
    from lib.forked import on_terminal
    from lib.tiny import FinishedRun, arguments

    def given(folder: Path) -> list[str]:
        return arguments(tiny_data, folder / "run", "--epochs", "3")

    def make(folder: Path) -> None:
        code, shown = on_terminal("fasttricks.train", *given(folder))
        assert code == 0, shown
        (folder / "shown").write_bytes(shown.encode())

    folder = once("finished", make)
    return FinishedRun(folder / "run", tiny_data, given(folder), (folder / "shown").read_bytes().decode())


@pytest.fixture(scope="session")
def teacher_run(tiny_data: Path, once: Callable[..., Path]) -> Path:
    """The run folder of a wider network than `start` builds. Not to be changed."""
    from fasttricks.commands import train
    from lib.tiny import arguments, call

    def make(folder: Path) -> None:
        more = ["--model.width", "0.25", "--ema-decay", "0.9", "--optim.base-lr", "1"]
        assert call(train.main, *arguments(tiny_data, folder / "run", *more)) == 0

    return once("teacher", make) / "run"


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the test draw no picture, which takes each a quarter of a second and is tested elsewhere."""
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path, no_curves: None) -> Iterator[Callable[..., Run]]:
    """start(*arguments, **fields) is a Run on the tiny data, its log closed at the end of the test."""
    from fasttricks.training.build import build
    from lib.runs import let_go, own_convolutions
    from lib.tiny import ALONE, configure

    runs: list[Run] = []

    with ExitStack() as until_the_end:

        def make(*more: str, **changes: Any) -> Run:
            let_go(runs)
            run_dir = changes.pop("run_dir", tmp_path / f"run-{len(runs)}")
            config = configure(changes.pop("data_dir", tiny_data), Path(run_dir), *more, **changes)
            if config.precision == "fp16":
                until_the_end.enter_context(own_convolutions())
            runs.append(build(config, ALONE))
            return runs[-1]

        yield make
    for run in runs:
        run.log.close()

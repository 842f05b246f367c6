"""The console script: it starts what python -m starts, and answers without torch all that can be answered without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import fasttricks
import fasttricks_kernels
from fasttricks import commands
from fasttricks.commands import COMMANDS
from fasttricks.config import NETWORKS, DataConfig, field_rules
from fasttricks.config.recipes import RECIPES
from fasttricks.config.tricks import TRICKS
from lib.configs import plain, words_of
from lib.forked import said_by
from lib.tiny import REPOSITORY, FinishedRun, environment

# A process in which the module `absent` cannot be imported; of each line of its input it forks a command, which starts at once.
WITHOUT = """
import json, os, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        assert name != {absent!r}, f"{{name}} is imported"

sys.meta_path.insert(0, Without())
import tyro
import fasttricks.config.cli
from fasttricks.commands import main

for line in sys.stdin:
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
args, *files = json.loads(line)
for number, file in enumerate(files):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
sys.argv = ["fasttricks", *args]
main()
"""
Script = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def without(absent: str) -> Iterator[Script]:
    """script(*args) is `fasttricks args` where the module `absent` cannot be imported."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT.format(absent=absent)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(), cwd=REPOSITORY) as server,
    ):
        assert server.stdin and server.stdout

        def script(*args: str) -> subprocess.CompletedProcess[str]:
            said = [Path(folder) / name for name in ("stdout", "stderr")]
            for file in said:
                file.unlink(missing_ok=True)
            server.stdin.write(json.dumps([args, os.devnull, *map(str, said)]) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(args, code, *(file.read_text() for file in said))

        yield script
        server.stdin.close()


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    with without("torch") as run:
        yield run


def test_every_command_is_a_module_too() -> None:
    for name, command in COMMANDS.items():
        assert find_spec(command.module), name
        if name not in ("list", "report", "runs"):
            assert find_spec(commands.prog(name).removeprefix("python -m ")), name


@pytest.mark.parametrize(("args", "status"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_its_help_lists_every_command(args: list[str], status: int, script: Script) -> None:
    done = script(*args)
    assert (done.returncode, done.stderr) == (status, "")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


def test_its_version_is_the_packages(script: Script) -> None:
    assert script("--version").stdout == f"fasttricks {fasttricks.__version__}\n"
    assert fasttricks_kernels.__version__ == fasttricks.__version__, "one distribution has both packages"


@pytest.mark.parametrize(
    ("kind", "names"),
    [("models", NETWORKS), ("recipes", RECIPES), ("tricks", TRICKS)],
    ids=lambda value: str(value)[:9],
)
def test_what_there_is_is_listed(kind: str, names: dict[str, object]) -> None:
    listed = [line.split()[0] for line in said_by("fasttricks", "list", kind).splitlines()]
    assert listed[: len(names)] == list(names)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], "command = 'trian': unknown; did you mean 'train'?"),
        (["list", "model"], "kind = 'model': unknown; did you mean 'models'?"),
        (["train", "dmo"], "recipe = 'dmo': unknown; did you mean 'demo'?"),
        (["train", "demo", "--lr", "1"], "did you mean --optim.base-lr?"),
        (["train", "demo", "--data.root", "/nowhere"], "/nowhere: no such folder"),
        (["train", "demo", "--data.root", "TRAIN"], "train: holds no val/ (there is "),
        (["train", "demo", "--run-dir", "RUN"], "already exists and is never overwritten"),
        (["evaluate", "/nowhere"], "checkpoint = '/nowhere': must be a file, or a run folder"),
        (["evaluate", "RUN", "--data.color", "none"], "option = '--data.color': has no effect here, only in training"),
        (["evaluate", "RUN", "--data.root", "/nowhere"], "/nowhere: no such folder"),
        (["evaluate", "RUN", "another"], "argument = 'another': fasttricks evaluate takes one checkpoint"),
        (["predict", "/nowhere", "a.jpg"], "checkpoint = '/nowhere': must be"),
        (["predict", "RUN"], "images: none given; fasttricks predict"),
        (["predict", "RUN", "--topk", "1", "a.jpg"], "option = '--topk': unknown; did you mean --top?"),
        (["export", "RUN", "--onx"], "did you mean --onnx?"),
        (["ablate", "tabel4"], "did you mean 'table4'?"),
        (["plan", "--gpus", "8"], "recipe = '': give one: fasttricks plan RECIPE"),
        (["cost", "--network", "resnet50d"], "did you mean --networks?"),
        (["data", "scna"], "'scna' is no command of fasttricks data"),
        (["data", "pack", "a"], "pack needs DIR and OUT: fasttricks data pack DIR OUT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_answered_without_torch(
    args: list[str], words: str, finished_run: FinishedRun, script: Script
) -> None:
    places = {"RUN": str(finished_run.folder), "TRAIN": str(finished_run.data / "train")}
    done = script(*(places.get(arg, arg) for arg in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", ["RUN", "/nowhere"])
@pytest.mark.parametrize("name", ["evaluate", "predict", "export"])
def test_the_help_of_a_command_needs_no_checkpoint_and_no_torch(
    name: str, path: str, finished_run: FinishedRun, script: Script
) -> None:
    done = script(name, str(finished_run.folder) if path == "RUN" else path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = plain(done.stdout)
    if name != "export":
        size = 32 if path == "RUN" else 224
        rule = words_of(field_rules(DataConfig)["image_size"])
        assert f"--data.image-size INT Side of the square network input. {rule} (default: {size})" in shown
        assert "--data.color" not in shown and "every-epochs" not in shown


def test_predict_spares_itself_the_import_of_torch_compile(finished_run: FinishedRun) -> None:
    """torch._dynamo takes two seconds to import, more than all that predict does besides torch's own import."""
    image = next((finished_run.data / "val").rglob("*.jpg"))
    with without("torch._dynamo") as script:
        done = script("predict", str(finished_run.folder), str(image))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{image}\n")

"""docs/distributed.md says nothing that is not so: commands, options, messages, numbers, and the Slurm script, which is run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.config.cli import parse_recipe
from fasttricks.config.recipes import find_recipe
from fasttricks.learning.precision import FIRST_SCALE
from fasttricks.system.monitor import _ENERGY_COUNTER, _readers
from lib.tiny import REPOSITORY, arguments, environment, write_images

PAGE = (REPOSITORY / "docs" / "distributed.md").read_text()
SCRIPT = PAGE.partition("```bash\n")[2].partition("```")[0]
COMMANDS = [
    line.partition(" -m fasttricks.train ")[2]
    for line in re.sub(r" \\\n +", " ", PAGE).splitlines()
    if " -m fasttricks.train " in line
]
OTHER_PROGRAMS = {
    *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"),  # sbatch
    *("--gpus-per-task", "--kill-on-bad-exit", "--index-url", "--no-build-isolation", "--trace"),  # srun, pip, nsys
}


def test_commands_are_understood() -> None:
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        assert isinstance(parse_recipe(shlex.split(command), prog="docs"), TrainConfig)


def test_options_are_fields_or_the_launchers() -> None:
    code = "\n".join([SCRIPT, *re.findall(r"`([^`\n]+)`", PAGE), *re.findall(r"^    .*", PAGE, re.MULTILINE)])
    launcher = {option for action in get_args_parser()._actions for option in action.option_strings}
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9._-]*", code)) - launcher - OTHER_PROGRAMS:
        config: object = find_recipe("demo")()
        for name in option.removeprefix("--").replace("-", "_").split("."):
            assert hasattr(config, name), option
            config = getattr(config, name)


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert [link for link in links if not (REPOSITORY / "docs" / link).exists()] == []


def test_the_error_is_the_one_that_is_raised() -> None:
    with pytest.raises(ConfigError) as raised:
        find_recipe("resnet50d-tricks")().micro_batch_size(48)
    assert f"    error: {raised.value}\n" in PAGE


def test_the_table_of_batches_is_what_the_config_says() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) images", PAGE, re.MULTILINE)
    assert len(rows) == 3
    for ranks, accumulate, images in (map(int, row) for row in rows):
        config = dataclasses.replace(find_recipe("resnet50d-tricks")(), accumulate=accumulate)
        assert config.micro_batch_size(ranks) == images


def test_numbers_are_those_of_the_code() -> None:
    optim = find_recipe("resnet50d-tricks")().optim
    assert optim.loss_scale == 0, "dynamic by default"
    assert f"starts at {FIRST_SCALE:,.0f}, " in PAGE
    assert f"{optim.loss_scale_steps:,} good steps" in PAGE
    metrics = set(re.findall(r"`(gpu_\w+)`", PAGE))
    assert metrics == set(_readers(None, None)) - {_ENERGY_COUNTER}


def test_the_pinned_build_has_code_for_the_cards_named() -> None:
    pinned = re.search(r"^torch==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and f"torch {pinned[1]}, a CUDA 13.0 build" in PAGE
    if torch.__version__.partition("+")[0] != pinned[1] or torch.version.cuda != "13.0":
        pytest.skip(f"torch {torch.__version__} is not the pinned build")
    named = re.search(r"machine code for sm_([\d, ]+) and (\d+)\n", PAGE)
    assert named
    assert [f"sm_{number}" for number in (*named[1].split(", "), named[2])] == torch.cuda.get_arch_list()


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)


# In place of Slurm: two tasks on this machine, each a torchrun of one rank, on data and a network small enough for a test.
SCONTROL = "#!/bin/bash\nprintf 'localhost\\nanother\\n'\n"
SRUN = """#!/bin/bash
[[ $1 == --cpus-per-task=3 && $2 == --kill-on-bad-exit=1 && $3 == torchrun ]] || exit 90
launch=()
shift 3
while [[ $1 != -m ]]; do launch+=("${1/#gpu/1}"); shift; done
[[ $2 == fasttricks.train && " $* " == *" --run-dir runs/resnet50d --resume "* ]] || exit 91
for task in 1 2; do $PYTHON -m torch.distributed.run "${launch[@]}" -m fasttricks.train $TINY & done
wait -n && wait -n
"""


def free_port() -> int:
    """One that the script can make from a job's number."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as server:
            if server.connect_ex(("localhost", port)) != 0:
                return port
    raise AssertionError("no free port")


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes(tmp_path: Path) -> None:
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "train.slurm": SCRIPT}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NAME": "resnet50d", "SLURM_JOB_ID": str(free_port()), "SLURM_NNODES": "2"}
    tiny = arguments(write_images(tmp_path / "data", train=32, val=4), tmp_path / "run", "--epochs", "1")
    env = environment(**job, SLURM_JOB_NODELIST="node[1-2]", SLURM_CPUS_PER_TASK="3", TINY=shlex.join(tiny))
    env |= {"PATH": f"{tmp_path}{os.pathsep}{env['PATH']}", "PYTHON": sys.executable}
    done = subprocess.run(
        [tmp_path / "train.slurm"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"]) == (2, 2)

"""A run's folder is never overwritten, resumes with its own config only, and says what made it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from markdown import markdown

import fasttricks
from fasttricks.config import ConfigError, ModelConfig, TrainConfig, get_at, replace_at, replace_fields
from fasttricks.config.recipes import detect_voc, resnet50d_tricks, segment_ade20k
from fasttricks.runs import folder as runfolder
from fasttricks.runs.begin import check_run_dir, is_empty_run
from fasttricks.runs.folder import differences, open_run, read_config, versions, write_json
from lib.configs import leaves


def config_in(folder: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(resnet50d_tricks(), run_dir=str(folder), **changes)


def begun(config: TrainConfig) -> Path:
    """A run that has logged a step."""
    folder = open_run(config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_a_new_folder_and_an_empty_one_are_fine(tmp_path: Path) -> None:
    check_run_dir(config_in(tmp_path / "new"))
    check_run_dir(config_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_open_run_writes_the_config_that_is_read_back(tmp_path: Path) -> None:
    config = config_in(tmp_path / "a" / "b")
    folder = open_run(config)
    assert folder == tmp_path / "a" / "b"
    assert read_config(folder) == config
    assert sorted(os.listdir(folder)) == ["checkpoints", "config.json"]
    assert json.loads((folder / "config.json").read_text())["versions"] == versions()


def test_each_start_of_a_run_is_kept_the_first_and_so_many_of_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [{"command": f"train {number}", "date": "2026-01-01", "host": "here"} for number in range(5)]
    monkeypatch.setattr(runfolder, "_NEWEST_STARTS", 2)
    for number, start in enumerate(made):
        monkeypatch.setattr(runfolder, "this_start", lambda start=start: start)
        open_run(config_in(tmp_path / "run", resume=number > 0))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["starts"] == [made[0], made[2], made[3], made[4]]
    open_run(config_in(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["starts"] == [made[4]], "taken over: another run"


@pytest.mark.parametrize("starts", ["yesterday", [1], [{"command": 7}], [{"command": "x" * 10_001}]])
def test_starts_that_no_run_wrote_are_refused_by_the_files_name(starts: object, tmp_path: Path) -> None:
    folder = open_run(config_in(tmp_path / "run"))
    saved = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", saved | {"starts": starts})
    with pytest.raises(
        ConfigError, match=r"config\.json: must be as fasttricks\.train wrote it \(starts.*another --run-dir"
    ):
        open_run(config_in(folder, resume=True))


def test_tensorboard_is_given_every_field_and_a_text_as_it_is(tmp_path: Path) -> None:
    config = replace_at(config_in(tmp_path / "a|b"), "distill.teacher", "*_`")
    rows = runfolder.config_table(config).splitlines()[2:]
    page = ElementTree.fromstring(markdown("\n".join(["|a|b|", "|---|---|", *rows]), extensions=["tables"]))
    cells = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")][1:]
    fields = {name: get_at(config, name) for name, *_ in leaves(TrainConfig)}
    assert {name: json.loads(value) for name, value in cells} == json.loads(json.dumps(fields))


def test_a_run_that_is_there_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    begun(config)
    before = (tmp_path / "run" / "config.json").read_bytes()
    rule = rf"^run_dir = '{tmp_path}/run': already exists and is never overwritten; add --resume .* another --run-dir$"
    with pytest.raises(ConfigError, match=rule):
        check_run_dir(config)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    check_run_dir(dataclasses.replace(config, resume=True))


def test_a_folder_of_something_else_is_neither_overwritten_nor_resumed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="never overwritten"):
        check_run_dir(config_in(tmp_path))
    with pytest.raises(ConfigError, match=r"must hold a run \(config.json\) to resume"):
        check_run_dir(config_in(tmp_path, resume=True))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="must be a folder, but a file is there"):
        check_run_dir(config_in(tmp_path / "run"))


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"must be a place to write to; .*Not a directory"):
        open_run(config_in(tmp_path / "file" / "run"))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"config": {"epoch": 3}}', '{"config": 3}'])
def test_a_config_json_that_no_run_wrote_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert not is_empty_run(tmp_path)
    with pytest.raises(ConfigError):
        check_run_dir(config_in(tmp_path, resume=True))


# ---------------------------------------------------------------------------------------------------------- resume

OTHER: dict[str, Any] = {  # a valid value other than resnet50d-tricks' for every field
    "recipe": "x",
    "epochs": 90,
    "global_batch_size": 512,
    "accumulate": 2,
    "task": "multilabel",
    "precision": "fp32",
    "device": "cpu",
    "seed": 1,
    "ema_decay": 0.9,
    "checkpoint_epochs": 5,
    "checkpoint_steps": 5,
    "log_steps": 100,
    "loggers": ("wandb", "mlflow:mine"),
    "profile": True,
    "allow_other_ranks": True,
    "allow_other_versions": True,
    "on_bad_loss": "skip",
    "max_loss": 5.0,
    "timeout_s": 60,
    "resume": True,
    "data.root": "/x",
    "data.image_size": 160,
    "data.val_resize": 232,
    "data.area": (0.2, 1.0),
    "data.aspect": (1.0, 1.0),
    "data.flip": 0.0,
    "data.color": "none",
    "data.color_jitter": 0.1,
    "data.pca_noise": 0.0,
    "data.alternate_flip": True,
    "data.fixed_augmentation": True,
    "data.balance": 0.5,
    "data.interpolation": "cubic",
    "data.antialias": False,
    "data.mean": (127.5, 127.5, 127.5),
    "data.std": (127.5, 127.5, 127.5),
    "data.labels": "images.csv",
    "data.label_separator": "|",
    "data.class_order": "natural",
    "data.nested": "leaf",
    "data.val_share": 0.1,
    "data.limit_per_class": 50,
    "data.threads": 3,
    "data.readers": 4,
    "data.prefetch": 4,
    "data.operators": "dali",
    "data.max_bad": 0.5,
    "data.max_pixels": 10**6,
    "model.name": "resnet50a",
    "model.num_classes": 10,
    "model.stem_stride": 2,
    "model.width": 0.5,
    "model.zero_gamma": False,
    "model.aux_head": True,
    "model.whitening": True,
    "model.identity_init": True,
    "model.norm": "torch",
    "init": "/trained.pt",
    "optim.base_lr": 0.2,
    "optim.backbone_lr": 0.1,
    "optim.bias_lr": 64.0,
    "model.freeze": ("layer1",),
    "optim.linear_scaling": False,
    "optim.momentum": 0.8,
    "optim.weight_decay": 0.0,
    "optim.bias_decay": True,
    "optim.backend": "torch",
    "optim.loss_scale": 128.0,
    "optim.loss_scale_steps": 100,
    "compile": "default",
    "compile_fallback": True,
    "cuda_graph": True,
    "cuda_graph_ranks": True,
    "sync_batch_norm": True,
    "deterministic": "off",
    "schedule.decay": "step",
    "schedule.warmup_epochs": 1.0,
    "schedule.step_epochs": (10,),
    "schedule.step_factor": 0.5,
    "schedule.first_size": 0.5,
    "schedule.size_steps": 2,
    "schedule.full_size_at": 0.5,
    "schedule.poly_power": 1.0,
    "segment.base_size": 180,
    "segment.base_side": "short",
    "segment.scale": (0.75, 1.5),
    "segment.blur": 0.0,
    "segment.output_stride": 16,
    "segment.aux_weight": 0.0,
    "segment.test_scales": (0.5, 1.0),
    "detect.base_size": 180,
    "detect.max_size": 800,
    "detect.channels": 128,
    "detect.head_features": 256,
    "detect.anchor_scales": (4.0, 8.0),
    "detect.anchor_ratios": (1.0,),
    "detect.train_proposals": 500,
    "detect.test_proposals": 300,
    "detect.train_samples": 128,
    "detect.score_threshold": 0.05,
    "detect.nms_threshold": 0.5,
    "detect.most_detections": 300,
    "detect.average": "area",
    "loss.smoothing": 0.0,
    "loss.smoothing_over": "all",
    "loss.mixup_alpha": 0.0,
    "loss.aux_weight": 0.3,
    "loss.class_weights": "balanced",
    "distill.teacher": "/elsewhere",
    "distill.cache": "/cache",
    "distill.trust_code": "nets:make",
    "distill.digest": "0123456789abcdef",
    "distill.temperature": 4.0,
    "distill.hard_weight": 0.5,
    "distill.soft_weight": 0.5,
    "eval.every_epochs": 2,
    "eval.batch_size": 8,
    "eval.flip": True,
    "eval.patience": 3,
    "tricks.on": ("mixup",),
    "tricks.off": ("cosine",),
}
HARMLESS = {
    *(
        "recipe",
        "device",
        "checkpoint_epochs",
        "checkpoint_steps",
        "log_steps",
        "loggers",
        "profile",
        "resume",
        "tricks.on",
        "tricks.off",
    ),
    *("allow_other_ranks", "allow_other_versions", "on_bad_loss", "max_loss", "timeout_s"),
    *("data.root", "data.labels", "data.threads", "data.readers", "data.prefetch", "data.max_bad", "model.norm"),
    *("eval.batch_size", "eval.patience"),
    "distill.teacher",
    "distill.cache",
    "distill.trust_code",
}


@pytest.mark.parametrize("path", [path for path, _, _ in leaves(TrainConfig) if path not in ("run_dir", "task")])
def test_a_run_resumes_with_its_own_config_only(tmp_path: Path, path: str) -> None:
    config = config_in(tmp_path / "run", resume=True)
    if path == "model.aux_head":
        config = dataclasses.replace(config, model=ModelConfig(name="inception_v3"))
    if path in ("model.whitening", "model.identity_init"):
        config = dataclasses.replace(config, model=ModelConfig(name="cifarnet"))
    if path == "data.label_separator":  # no task has both values: test_multilabel.py resumes a run as another task
        config = replace_fields(config, {"task": "multilabel", path: ";", "distill.teacher": ""})
    if path == "distill.cache":
        config = replace_at(config, "distill.teacher", "/teacher")
    if path.startswith("segment."):
        config = dataclasses.replace(segment_ade20k(), run_dir=config.run_dir, resume=True)
    if path.startswith("detect."):
        config = dataclasses.replace(detect_voc(), run_dir=config.run_dir, resume=True)
    begun(dataclasses.replace(config, resume=False))
    old, new = get_at(config, path), OTHER[path]
    changed = replace_at(config, path, new)
    if path in HARMLESS:
        check_run_dir(changed)
        return
    assert differences(config, changed) == [f"{path}: {old!r} -> {new!r}"]
    with pytest.raises(ConfigError, match=rf"its own config; changed: {re.escape(f'{path}: {old!r} -> {new!r}')}$"):
        check_run_dir(changed)


def test_a_run_resumes_from_a_folder_that_moved(tmp_path: Path) -> None:
    begun(config_in(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    check_run_dir(config_in(tmp_path / "moved", resume=True))


def test_a_run_that_was_killed_while_its_folder_was_made_begins(tmp_path: Path) -> None:
    """With --resume and without: there is nothing to lose. What the kill left goes."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".config.json.4711.tmp").write_text("{")
    for resume in (True, False):
        check_run_dir(config_in(folder, resume=resume))
    open_run(config_in(folder))
    assert sorted(os.listdir(folder)) == ["checkpoints", "config.json"]
    (tmp_path / "other" / "checkpoints" / "x").mkdir(parents=True)
    with pytest.raises(ConfigError, match="never overwritten"):
        check_run_dir(config_in(tmp_path / "other"))


EMPTY = {  # what a run may have left that ended before it had anything to lose, besides its config.json
    "its folder": {},
    "torn record": {"metrics.jsonl": '{"step": 1, "ep'},
    "no record": {
        "metrics.jsonl": "",
        "metrics.csv": "epoch\n",
        "console.log": "x",
        "events.out.tfevents.1.host.2.0": "x",
    },
    "unfinished files": {"checkpoints/.step-0000000002.pt.17.tmp": "x", ".metrics.jsonl.17.tmp": "x", ".lock": "{}"},
}
FULL = {
    "a record": {"metrics.jsonl": '{"step": 1}\n'},
    "a checkpoint": {"checkpoints/step-0000000002.pt": "x"},
    "a damaged checkpoint": {"checkpoints/step-0000000002.pt.damaged": "x"},
    "a checkpoint of the user's": {"checkpoints/mine.pt": "x"},
    "a file of the user's": {"thesis.tex": "x"},
    "a summary": {"summary.json": "{}"},
    "a trace": {"trace.json": "{}"},
}


@pytest.mark.parametrize("name", [*EMPTY, *FULL])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_with_nothing_to_lose_may_be_taken_over_by_another_config(
    name: str, resume: bool, tmp_path: Path
) -> None:
    folder = open_run(config_in(tmp_path / "run"))
    for file, content in (EMPTY | FULL)[name].items():
        (folder / file).write_text(content)
    mended = config_in(folder, resume=resume, seed=1)
    if name in EMPTY:
        check_run_dir(mended)
    else:
        with pytest.raises(
            ConfigError, match=r"its own config; changed: seed: 0 -> 1$" if resume else "never overwritten"
        ):
            check_run_dir(mended)
    assert all((folder / file).read_text() == content for file, content in (EMPTY | FULL)[name].items())


def test_a_link_or_a_pipe_in_an_empty_run_is_the_users(tmp_path: Path) -> None:
    for make in (lambda path: path.symlink_to("/dev/null"), os.mkfifo):
        folder = open_run(config_in(tmp_path / str(make)))
        make(folder / "metrics.jsonl")
        assert not is_empty_run(folder)


def test_micro_batches_may_differ_where_ranks_may(tmp_path: Path) -> None:
    begun(config_in(tmp_path / "run"))
    changed = config_in(tmp_path / "run", resume=True, accumulate=2)
    with pytest.raises(ConfigError, match="accumulate: 1 -> 2"):
        check_run_dir(changed)
    check_run_dir(dataclasses.replace(changed, allow_other_ranks=True))


def test_all_changes_are_named(tmp_path: Path) -> None:
    begun(config_in(tmp_path / "run"))
    changed = replace_at(config_in(tmp_path / "run", resume=True, seed=1), "optim.momentum", 0.8)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1; optim\.momentum: 0\.9 -> 0\.8$"):
        check_run_dir(changed)


# -------------------------------------------------------------------------------------------------- versions, JSON


def test_versions_are_those_in_use() -> None:
    found = versions()
    assert found["fasttricks"] == fasttricks.__version__
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"triton", "numpy", "nvidia-dali-cuda120", "commit"} <= found.keys()


def make_package(checkout: Path) -> str:
    """A package file in `checkout`, as the module's own __file__."""
    file = checkout / "fasttricks" / "runs" / "folder.py"
    file.parent.mkdir(parents=True)
    file.touch()
    return str(file)


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfolder, "__file__", make_package(tmp_path))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert versions()["commit"] == commit[:12]
    (tmp_path / "fasttricks" / "runs" / "folder.py").write_text("changed")
    assert versions()["commit"] == f"{commit[:12]}-dirty"


def test_an_installed_package_does_not_take_the_commit_of_what_lies_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(runfolder, "__file__", make_package(tmp_path / ".venv" / "site-packages"))
    assert versions()["commit"] == "unknown"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == "unknown"


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"top1": 1.5})
    with pytest.raises(TypeError):
        write_json(path, {"top1": object()})
    assert json.loads(path.read_text()) == {"top1": 1.5}
    assert os.listdir(tmp_path) == ["summary.json"]

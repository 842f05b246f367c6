"""Fuzz what lies in folders beside images: python tests/fuzz_folders.py SECONDS. Not collected by pytest; make fuzz runs it.

Any bytes and any JSON in a packed folder, a run folder or a quarantine list give what was asked for, within its rules, or the
UserError of that room; never another exception, a crash, a hang or an allocation of more than a small multiple of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fasttricks.config import ConfigError
from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.packed import INDEX, MANIFEST, open_packed
from fasttricks.data.sources.quarantine import QUARANTINE, QuarantineError
from fasttricks.runs.model_card import summary_kind
from fasttricks.runs.records import read_metrics
from fasttricks.system.reading import Reader
from fasttricks.tasks.classification import CLASSIFICATION
from lib.fuzzing import settings_for, take_turns
from lib.images import PNG

SETTINGS = settings_for(50)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([2**63, 10**400, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
MOST = 3 << 30
"""Bytes of address space besides: what asks for more than this has believed a number that it read."""


def whole_pack() -> tuple[dict[str, Any], bytes]:
    """(pack.json, index.npz) of twelve images in two classes, packed into FOLDER/packed."""
    for number in range(12):
        path = FOLDER / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    pack_split(scan_folder(FOLDER / "images"), FOLDER / "packed", PackConfig(shard_images=5))
    return json.loads((FOLDER / "packed" / MANIFEST).read_text()), (FOLDER / "packed" / INDEX).read_bytes()


MANIFEST_OF, INDEX_OF = whole_pack()


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a JSON value stands."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for name, one in inside for path in paths(one, (*above, name)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with another value at `path`, where that is still there."""
    if not path:
        return new
    with contextlib.suppress(KeyError, IndexError, TypeError):
        value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def open_and_read(manifest: bytes, index: bytes) -> bool:
    """Whether the pack opens; then every image is its bytes, or an OSError."""
    (FOLDER / "packed" / MANIFEST).write_bytes(manifest)
    (FOLDER / "packed" / INDEX).write_bytes(index)
    try:
        images = open_packed(FOLDER / "packed")
    except DataError:
        return False
    assert all(0 <= label < len(images.classes) for label in images.labels)
    for number in range(len(images)):
        with contextlib.suppress(OSError):
            assert images.read(number) in (PNG, b"")
    return True


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(paths(MANIFEST_OF)), JSON), min_size=1, max_size=3))
def any_manifest(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """A good pack.json with other values in a few places."""
    manifest = json.loads(json.dumps(MANIFEST_OF))
    for path, value in changes:
        manifest = put(manifest, path, value)
    open_and_read(json.dumps(manifest).encode(), INDEX_OF)


@SETTINGS
@given(TEXTS)
def any_bytes(content: bytes) -> None:
    """Noise in the place of pack.json and of the index, which pack.json then has the digest of."""
    assert not open_and_read(content, INDEX_OF)
    assert not open_and_read(*sealed(content))


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(INDEX_OF) - 1), st.integers(0, 20), st.binary(max_size=20)), max_size=3))
def any_index(changes: list[tuple[int, int, bytes]]) -> None:
    """Bytes of the index changed, cut, put in: in the zip's structure, headers and columns."""
    index = bytearray(INDEX_OF)
    for at, length, new in changes:
        index[at : at + length] = new
    assert open_and_read(*sealed(bytes(index))) or bytes(index) != INDEX_OF


def sealed(index: bytes) -> tuple[bytes, bytes]:
    """(pack.json with the digest of `index`, `index`)."""
    digest = hashlib.blake2b(index, digest_size=16).hexdigest()
    return json.dumps(MANIFEST_OF | {"index_digest": digest}).encode(), index


RECORD = {"step": 3, "epoch": 1.5, "train_loss": 2.0, "lr": 0.1}
SUMMARY = {
    "steps": 9,
    "val_images": 3,
    "ranks": 1,
    "precision": "fp32",
    "device": "x",
    "val_loss": 1.0,
    "train_seconds": 3.0,
}
SUMMARIES = Reader(ConfigError, "must be a summary", "move it away")


@SETTINGS
@given(TEXTS, JSON, st.sampled_from(["step", "epoch", "lr", "x"]), st.integers(0, 3))
def any_record(noise: bytes, value: Any, name: str, at: int) -> None:
    """metrics.jsonl: what is read is the records before the first line that is none."""
    lines = [json.dumps(RECORD).encode()] * 3
    lines[at:at] = [noise.replace(b"\n", b"")]
    (FOLDER / "metrics.jsonl").write_bytes(b"\n".join(lines))
    found = read_metrics(FOLDER)
    assert found[:at] == [RECORD] * at and all(isinstance(record["epoch"], (int, float)) for record in found)
    (FOLDER / "metrics.jsonl").write_text(json.dumps(RECORD | {name: value}))
    assert all(type(record[name]) in (int, float) for record in read_metrics(FOLDER))


@SETTINGS
@given(JSON, st.sampled_from([*SUMMARY, "top1"]))
def any_summary(value: Any, name: str) -> None:
    """summary.json with another value: of its kind, or refused."""
    good = SUMMARY | {metric.name: 50.0 for metric in CLASSIFICATION.metrics_of(1000)}
    (FOLDER / "summary.json").write_text(json.dumps(good | {name: value}))
    with contextlib.suppress(ConfigError):
        found = SUMMARIES.json(FOLDER / "summary.json", summary_kind(CLASSIFICATION.metrics_of(1000)))
        assert type(found[name]) in ((int, float) if isinstance(good[name], float) else (type(good[name]),))


@SETTINGS
@given(TEXTS, JSON, st.sampled_from(["", "a"]))
def any_list(noise: bytes, value: Any, inside: str) -> None:
    """quarantine.jsonl of the split and of a class folder: honoured or refused, and never another set of images."""
    file = FOLDER / "images" / inside / QUARANTINE
    for content in (noise, json.dumps(value).encode(), json.dumps({"file": value, "reason": "x"}).encode()):
        file.write_bytes(content)
        with contextlib.suppress(QuarantineError, DataError):  # all images of a class may be listed
            assert len(scan_folder(FOLDER / "images")) == 12
    file.unlink()


def main(seconds: float) -> int:
    """As fuzzing.take_turns."""
    warnings.simplefilter("error")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST,) * 2)
    try:
        return take_turns((any_manifest, any_bytes, any_index, any_record, any_summary, any_list), seconds)
    finally:
        shutil.rmtree(FOLDER)


if __name__ == "__main__":
    print(f"folders' files: {main(float(sys.argv[1]))} turns of 6 x {SETTINGS.max_examples} inputs, nothing found")

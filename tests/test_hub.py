"""The front door: `rsae harvest` with the hub's names, against a server that speaks its API and fails in every way."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard

from residual_saes.shared.cache import Cache
from residual_saes.shared.presets import PRESETS
from tests.conftest import documents, invoke
from tests.hub import ROOT, Hub

FAULTS = ("429", "503", "cut", "die")
SHAPE = ("--context", 32, "--block-sequences", 4, "--tokens", 10_000, "--holdout-tokens", 128, "--layers", 0, "--device", "cpu")
TEXTS = [text[i : i + 60] for text in documents(60) for i in range(0, 600, 60)]
SHARDS = {"train/00.jsonl.zst": TEXTS[:300], "train/01.jsonl.zst": TEXTS[300:]}  # what is tokenised first is in one of them
COMMIT = "c" * 40


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "meta": {"n": i}}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture
def hub(lm: Path) -> Iterator[Hub]:
    """A small model and a small text, by the published preset's names and commits, and by others."""
    preset = PRESETS["pythia-410m"]
    model = {path.name: path.read_bytes() for path in lm.iterdir()}
    texts = {name: zstandard.compress(lines(shard)) for name, shard in SHARDS.items()}
    texts["val.jsonl.zst"] = zstandard.compress(lines(["of another split"] * 9))
    with Hub() as hub:
        hub.publish(preset.model, model, str(preset.revision))
        hub.publish(f"datasets/{preset.dataset}", texts, str(preset.dataset_revision))
        hub.publish("org/lm", model, COMMIT)
        hub.publish("datasets/org/text", texts, COMMIT)
        yield hub


@pytest.fixture(scope="module")
def expected(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of the same text in a local file."""
    path = tmp_path_factory.mktemp("local")
    (path / "text.jsonl").write_bytes(lines(TEXTS))
    args = ("--preset", "demo", "--model", lm, "--dataset", path / "text.jsonl", "--cache", path / "c", *SHAPE)
    assert invoke("harvest", *args) == 0
    return Cache.open(path / "c")


def run(hub: Hub, tmp_path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A program under every fault at every request; it says in one line that it waits, and the hub's client says nothing."""
    hub.faults = FAULTS
    environment, words = hub.environment(tmp_path / "home"), [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if "waiting, and asking again" in line]) == 1, done.stderr
    assert not re.search("HTTP Error|Retrying|thrown while|Got disconnected|Traceback", done.stderr)
    assert hub.failed and min(hub.failed.values()) > 1
    return done


@pytest.mark.slow
def test_the_published_preset_killed_and_continued(hub: Hub, expected: Cache, tmp_path: Path) -> None:
    """The tokens are those of the same text in a local file; what was written before the kill is not written again."""
    command = ("-m", "harvest", "--preset", "pythia-410m", "--cache", tmp_path / "c", *SHAPE)
    path = tmp_path / "c" / "ledger" / "tokens"
    hub.hang_at = "train/01.jsonl.zst"
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(words, cwd=ROOT, env=hub.environment(tmp_path / "home"), stderr=subprocess.DEVNULL) as process:
        assert hub.hanging.wait(120)
        process.kill()
    written = {entry: entry.stat().st_mtime_ns for entry in path.iterdir()}
    assert 0 < len(written) < expected.spec.token_chunks
    hub.hang_at = None
    hub.failed.clear()
    run(hub, tmp_path, *command)
    cache = Cache.open(tmp_path / "c")
    assert cache.spec.model_revision == expected.spec.model_revision
    np.testing.assert_array_equal(cache.read_tokens(0, cache.spec.sequences), expected.read_tokens(0, cache.spec.sequences))
    assert written == {entry: entry.stat().st_mtime_ns for entry in written}


LOOK_UPS = """
from residual_saes.shared.identity import dataset_commit, open_model
from residual_saes.shared.lm import load_config, load_tokenizer

load_config("org/lm", None)  # the configuration alone is in the hub's cache from now on
model = open_model("org/lm", None)
load_tokenizer("org/lm", "main")
print(model.commit, model.sha256, dataset_commit("org/text", "main"))
"""


def test_branches_become_commits(hub: Hub, expected: Cache, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "-c", LOOK_UPS).stdout.split() == [COMMIT, expected.spec.model_revision, COMMIT]

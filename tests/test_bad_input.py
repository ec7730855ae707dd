"""Every way of asking for what cannot be had: one line on stderr, exit code 2, nothing half-written."""

import gzip
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from residual_saes.eval.pages.files import publish_pages
from residual_saes.shared import presets
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import PRESETS
from residual_saes.shared.seal import from_bytes, to_bytes
from tests.conftest import TRAIN_ARGS, Cli, Result


def refused(result: Result, message: str) -> None:
    assert result.code == 2, result
    assert message in result.err
    # What is met only in the work itself finds the line that says where it is done, and on a slow machine how far it is.
    lines = [
        line
        for line in result.err.splitlines()
        if line and not line.startswith(("device: ", "evaluating: ", "tokenising: ", "note: every document ends"))
    ]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.err


TRAIN = [
    (("--l1", "abc"), "'abc' is not a setting"),
    (("--l1", "-1"), "'-1' is not a setting"),
    (("--l1", "adaptive:x"), "'adaptive:x' is not a setting"),
    (("--tokens", "1B"), "1,000,000,000 tokens are asked for, the cache has 20,480"),
    (("--tokens", "many"), "'many' is not a count"),
    (("--tokens", "600"), "fewer than 6 batches"),
    (("--expansion", "0"), "--expansion"),
    (("--layers", "7"), "layers 7 are not in"),
    (("--layers", "x"), "'x' does not name layers"),
    (("--device", "cuda"), "no CUDA device is available"),
    (("--device", "abacus"), "'abacus' is not a device"),
    (("--preset", "gpt-5"), "unknown preset 'gpt-5': choose one of pythia-410m, demo"),
    (("--lr", "0"), "--lr"),
    (("--lr", "nan"), "--lr"),
    (("--lr", "inf"), "--lr"),
    (("--save-minutes", "nan"), "--save-minutes"),
    (("--sparse-below", "nan"), "--sparse-below"),
    (("--seed", "9" * 30), "--seed"),
    (("--batch", "9" * 30), "--batch"),
    (("--expansion", "9" * 30), "--expansion"),
    (("--threads", "9" * 30), "--threads"),
    (("--tokens", "9" * 400), "is not a count"),
    (("--layers", "0-999999999999"), "names 999999999999"),
    (("--l1", "nan"), "'nan' is not a setting"),
    (("--l1", "1e999"), "'1e999' is not a setting"),
    (("--l1", "adaptive:5e-4@129"), "an L0 of 129 is more than the 128 features there are"),
    (("--device", ""), "--device is empty: give it a value, or leave it out"),
    (("--device=",), "--device is empty: give it a value, or leave it out"),
    (("--layers", ""), "--layers is empty: give it a value, or leave it out"),
    (("",), "is empty: give it a value, or leave it out"),
    (("--device", "mps"), "'mps' is not a device for this"),
    (("--device", "meta"), "'meta' is not a device for this"),
    (("--device", "cpu:3"), "'cpu:3' is not a device for this"),
    (("--shard", "9/8"), "'9/8' is not a shard: they are counted from 0"),
    (("--skip-positions", "32"), "contexts have 32 positions: lower --skip-positions"),
    (("--skip-positions", "-1"), "--skip-positions"),
    (("--max-norm", "0.5"), "--max-norm"),
    (("--max-norm", "nan"), "--max-norm"),
    (("--nonsense",), "No such option"),
    (("--scratch", "/nvme"), "write --scratch DIR:SIZE"),
    (("--scratch", "/nvme:much"), "'much' is not an amount of bytes"),
    (("--scratch", "/dev/null/x:1GB"), "cannot write to /dev/null/x"),
]


@pytest.mark.parametrize(("options", "message"), TRAIN)
def test_train(cli: Cli, cache_path: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    refused(cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "runs", *options), message)
    assert not (tmp_path / "runs").exists()


def test_no_cache(cli: Cli, tmp_path: Path) -> None:
    refused(cli("train", *TRAIN_ARGS, "--cache", tmp_path / "none"), "no activation cache at")
    refused(cli("eval", "--cache", tmp_path / "none"), "no activation cache at")
    refused(cli("harvest", "verify", "--cache", tmp_path / "none"), "no activation cache at")


def test_cache_of_another_version(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    (tmp_path / "c" / "cache.json").write_bytes(to_bytes({"format": 3}))
    refused(cli("train", *TRAIN_ARGS, "--cache", tmp_path / "c"), "is a cache of format 3")


SPECS: list[tuple[dict[str, object], str]] = [
    ({"n_blocks": "x"}, "n_blocks is 'x', and must be a whole number"),
    ({"n_blocks": 10**12}, "n_blocks is 1000000000000, and must be a whole number from 1 to 10,000,000"),
    ({"n_blocks": True}, "n_blocks is True, and must be a whole number"),
    ({"n_blocks": 44.0}, "n_blocks is 44.0, and must be a whole number"),
    ({"context": 0}, "context is 0, and must be a whole number from 1"),
    ({"d_model": 10**9}, "d_model is 1000000000, and must be a whole number from 1 to 16,777,216"),
    ({"d_model": 1 << 24, "context": 1 << 24}, "bytes, and must be of 68,719,476,736 at most"),
    ({"holdout_blocks": 99}, "holdout_blocks is 99, and must be at most n_blocks, 44"),
    ({"seed": -1}, "seed is -1, and must be a whole number"),
    ({"precision": "fp8"}, "precision is 'fp8', and must be bf16 or fp32"),
    ({"bos": [[]]}, "bos is a list, and must be true or false"),
]


@pytest.mark.parametrize(("changes", "message"), SPECS)
def test_a_cache_of_values_that_cannot_be(
    cli: Cli, cache_path: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """They are under right checksums: somebody else's program, or a hand, wrote them."""
    (tmp_path / "c" / "activations.zarr").mkdir(parents=True)
    spec = from_bytes((cache_path / "cache.json").read_bytes())["spec"] | changes
    digest = CacheSpec(**spec).digest
    (tmp_path / "c" / "cache.json").write_bytes(to_bytes({"format": 2, "digest": digest, "spec": spec}))
    refused(cli("train", *TRAIN_ARGS, "--cache", tmp_path / "c"), message)
    with pytest.raises(UserError, match=f"no cache can be made at .*{re.escape(message)}"):
        Cache.create(tmp_path / "new", CacheSpec(**spec), ())
    assert not (tmp_path / "new").exists()


def test_json_that_is_nested_too_deep(cli: Cli, tmp_path: Path) -> None:
    """Whether the parser gives up or the checksum does, which calls itself deeper."""
    args = ("--preset", "demo", "--device", "cpu", "--runs", tmp_path / "r")
    for depth in (300, 600, 800, 850, 900, 950, 200_000):
        nested = b'{"format": 2, "a": ' + b"[" * depth + b"]" * depth + b"}"
        for name in ("c/cache.json", "c/activations.zarr/zarr.json"):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_bytes(nested)
            refused(cli("eval", *args, "--cache", tmp_path / "c"), "")


def test_a_cache_that_is_not_finished(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    cache.ledger.entry_path(cache.sites, 3).unlink()
    refused(cli("train", *TRAIN_ARGS, "--cache", tmp_path / "c", "--runs", tmp_path / "r"), "lacks 1 blocks")


def test_no_room(
    cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residual_saes.shared.files.free_bytes", lambda _: 1000)
    monkeypatch.setattr("residual_saes.train.trainer.free_bytes", lambda _: 1000)
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "c"), "and 1 KB are free: harvest fewer --layers")
    assert not (tmp_path / "c").exists()
    refused(cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "r"), "1 KB are free: train fewer --layers")
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so no folder is unwritable")
def test_folders_without_permission(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(cli("harvest", *harvest_args, "--cache", locked / "c"), "cannot write to")
    refused(cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", locked / "r"), "cannot write to")


def test_folders_that_cannot_be(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    """A file stands where the folder should: unwritable for root as well."""
    (tmp_path / "file").touch()
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "file" / "c"), "cannot write to")
    refused(cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "file" / "r"), "cannot write to")


def test_text_that_cannot_be_harvested(cli: Cli, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "c")
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.jsonl"
    empty.touch()
    short.write_text(json.dumps({"text": "too short"}) + "\n")
    refused(cli("harvest", *harvest_args, *cache, "--text-column", "body"), "has no column 'body'; it has n, text")
    refused(cli("harvest", *harvest_args, *cache, "--dataset", empty), "is empty")
    refused(cli("harvest", *harvest_args, *cache, "--dataset", short), "shorter than one context of 32")
    refused(cli("harvest", *harvest_args, *cache, "--dataset", tmp_path / "none.jsonl"), "cannot load the dataset")
    refused(cli("harvest", *harvest_args, *cache, "--tokens", "1M"), "ends after")
    assert not list(tmp_path.glob("c/*"))


def test_bad_rows_are_named_before_anything_is_written(cli: Cli, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    cache, bad = ("--cache", tmp_path / "c"), tmp_path / "bad.jsonl.gz"
    bad.write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": 3}\n'))
    refused(cli("harvest", *harvest_args, *cache, "--dataset", bad), "line 2: column 'text' holds int, not text")
    bad.write_bytes(bad.read_bytes()[:-12])
    refused(cli("harvest", *harvest_args, *cache, "--dataset", bad), "is the file whole? copy it again")  # not "interrupted"
    refused(cli("harvest", *harvest_args, *cache, "--split", "test"), "names a split of a hub dataset, and")
    refused(cli("harvest", *harvest_args, *cache, "--bos"), "has no token for the beginning of a text: leave out --bos")
    assert not (tmp_path / "c").exists()


def test_models_are_opened_before_their_text_is_tokenised(
    cli: Cli, harvest_args: tuple[object, ...], lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residual_saes.harvest.origin.write_tokens", lambda *_: pytest.fail("tokenised first"))
    shutil.copytree(lm, tmp_path / "lm")
    args = (*harvest_args, "--cache", tmp_path / "c", "--model", tmp_path / "lm")
    refused(cli("harvest", *args, "--context", 128), "contexts of 128 tokens do not fit the 64 positions of")
    (tmp_path / "lm" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(cli("harvest", *args), "cannot load the model")
    assert not (tmp_path / "c").exists()


def test_models_that_are_not_there(cli: Cli, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "c", "--model", tmp_path / "lm"), "cannot load the model")
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "c", "--layers", "0-9"), "layer 9 does not exist")
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "c", "--tokens", "0"), "'0' is not a count")
    assert not (tmp_path / "c").exists()


def test_the_demo_of_an_installed_package(cli: Cli, lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither model nor text; with both named nothing of it is missing."""
    absent = replace(PRESETS["demo"], model=str(tmp_path / "neox-2m"), dataset=str(tmp_path / "text.jsonl.gz"))
    monkeypatch.setattr(presets, "_DEMO", tmp_path)
    monkeypatch.setitem(PRESETS, "demo", absent)
    args = ("harvest", "plan", "--preset", "demo", "--cache", tmp_path / "c")
    refused(cli(*args), f"{absent.model} is not there: the demo's model and text come with the repository")
    refused(cli(*args, "--model", lm), f"{absent.dataset} is not there")
    assert cli(*args, "--model", lm, "--dataset", "a/b").code == 0


def test_a_shard_too_many(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    refused(cli("harvest", *harvest_args, "--cache", tmp_path / "c", "--shard", "8/8"), "'8/8' is not a shard")
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "r", "--shard", "7/8")  # of three layers
    assert (result.code, result.err) == (0, "shard 7/8 has no layer to train: there are fewer of them than shards\n")
    assert not any(tmp_path.iterdir())


def test_a_job_that_cannot_be(cli: Cli, tmp_path: Path) -> None:
    args = ("--preset", "demo", "--cache", tmp_path / "c", "--runs", tmp_path / "r")
    refused(cli("fleet", "job", *args, "--disk", "much"), "'much' is not an amount of bytes")
    refused(cli("fleet", "job", *args, "--disk", "4TB", "--preset", "gpt-5"), "unknown preset 'gpt-5'")
    refused(cli("fleet", "plan", *args, "--disk", "4TB", "--train", "--lr '1"), "no options: No closing quotation")
    refused(cli("fleet", "job", *args), "Missing option '--disk'")
    for place in ("--cache", "--runs"):
        for command in ("job", "plan"):
            refused(
                cli("fleet", command, *args, "--disk", "4TB", place, "s3://lab/x"), "a job makes room on a disk, and a bucket"
            )
    assert not any(tmp_path.iterdir())


def test_other_settings_on_the_same_cache(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...]) -> None:
    refused(cli("harvest", *harvest_args, "--cache", cache_path, "--context", 16), "context is 32 there, 16 here")
    refused(
        cli("harvest", *harvest_args, "--cache", cache_path, "--precision", "fp32"), "precision is 'bf16' there, 'fp32' here"
    )


def test_eval(cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path) -> None:
    args = ("--preset", "demo", "--cache", cache_path, "--device", "cpu")
    refused(cli("eval", *args, "--runs", tmp_path), "no runs in")
    shutil.copytree(runs_path, tmp_path / "r")
    refused(cli("eval", *args, "--runs", tmp_path / "r", "--model", tmp_path / "nowhere"), "there is no model at")
    for option in ("--eval-tokens", "--ce-tokens"):
        for text in ("0", "nan", "inf", "-1", "9" * 400):
            refused(cli("eval", *args, "--runs", tmp_path / "r", option, text), "is not a count")
    for folder in (tmp_path / "r").iterdir():
        (folder / "config.json").write_text("{")
    result = cli("eval", *args, "--runs", tmp_path / "r")
    assert result.code == 2
    assert result.err.count("is not readable JSON") == 3 and "Traceback" not in result.err
    assert not list((tmp_path / "r").rglob("results"))


def test_what_cannot_be_read_is_not_taken_for_nothing_there(
    cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path
) -> None:
    """A folder stands for a file without permission, which binds no root."""
    shutil.copytree(runs_path, tmp_path / "r")
    one, *others = sorted(path for path in (tmp_path / "r").iterdir() if path.is_dir())
    (one / "config.json").rename(one / "away")
    (one / "config.json").mkdir()
    args = ("--cache", cache_path, "--device", "cpu", "--ce-tokens", 32, "--numbers-only")
    result = cli("eval", *args, "--runs", tmp_path / "r")
    assert result.code == 2 and result.err.count(f"cannot read {one / 'config.json'}: Is a directory") == 1
    assert all((each / "results").exists() for each in others)
    result = cli("eval", "export", "--to", "saelens", "--runs", one, "--out", tmp_path / "out")
    refused(result, f"cannot read {one / 'config.json'}: Is a directory")
    (tmp_path / "c" / "cache.json").mkdir(parents=True)
    refused(cli("harvest", "verify", "--cache", tmp_path / "c"), f"cannot read {tmp_path / 'c' / 'cache.json'}: Is a directory")

    (tmp_path / "loop").symlink_to("loop")
    refused(cli("eval", *args, "--runs", tmp_path / "loop"), "Too many levels of symbolic links")


@pytest.mark.parametrize("name", ["metrics", "results", "results/features", "plots"])
def test_a_linked_folder_of_a_run_is_not_written_to(
    cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "r" / min(p.parent.name for p in runs_path.glob("*/config.json"))
    shutil.copytree(runs_path / run.name, run)
    (ours := tmp_path / "ours").mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(ours)
    args = ("--cache", cache_path, "--runs", tmp_path / "r", "--device", "cpu")
    for command in (
        ("run", *args),
        ("pages", *args),
        ("match", run),
        ("export", "--to", "saelens", "--runs", run, "--out", run),
    ):
        result = cli("eval", *command)
        assert result.code == 2 and f"{run / name} is a link to {ours}, which is left alone" in result.err
    assert not any(ours.iterdir())


def test_linked_pages_are_not_written_to(cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_path, tmp_path / "r", ignore=shutil.ignore_patterns("sae_layer0[12]*"))
    (ours := tmp_path / "ours").mkdir()
    (tmp_path / "r" / "pages").symlink_to(ours)
    args = ("--cache", cache_path, "--runs", tmp_path / "r", "--device", "cpu")
    refused(cli("eval", "pages", *args), f"pages is a link to {ours}, which is left alone")
    refused(cli("eval", "ask", *args[2:], "--text", "a"), f"pages is a link to {ours}, which is left alone")
    (tmp_path / "out").mkdir()
    for run in runs_path.glob("*/config.json"):
        (tmp_path / "out" / run.parent.name).symlink_to(ours)
    result = cli("eval", "pages", *args, "--out", tmp_path / "out")
    assert result.code == 2 and result.err.count("which is left alone") == 3
    with pytest.raises(UserError, match="which is left alone"):
        publish_pages(tmp_path / "out" / next(runs_path.glob("*/config.json")).parent.name, {}, [("000.js", b"")])
    assert not any(ours.iterdir())


def test_repair_of_blocks_that_do_not_exist(cli: Cli, cache_path: Path) -> None:
    refused(cli("harvest", "repair", "--cache", cache_path, "--blocks", "99"), "has blocks 0-43")

"""Activations of other tools: the same contracts as a language model's, and honest about what is not known of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from residual_saes.harvest.arrays import open_folder
from residual_saes.harvest.imported import Rows
from residual_saes.harvest.run import HarvestConfig, harvest
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.units import Shard
from tests.conftest import ROOT, Cli
from tests.harvest.conftest import content, flip

CPU = torch.device("cpu")
SEQUENCES, CONTEXT, WIDTH = 150, 8, 16
N = SEQUENCES * CONTEXT
SMALL = ("--block-sequences", 16, "--holdout-tokens", 200)  # 9 blocks of 128 rows, 2 of them held out, and 48 rows too many
Put = Callable[[Path], tuple[object, ...]]


def rows_of(seed: int, kind: str = "float32") -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((N, WIDTH), dtype=np.float32).astype(kind)


def sequences_of(seed: int) -> NDArray[np.float32]:
    return rows_of(seed).reshape(SEQUENCES, CONTEXT, WIDTH)


TOKEN_IDS = np.random.default_rng(9).integers(0, 50_000, (SEQUENCES, CONTEXT), dtype=np.int32)


def npy(folder: Path) -> tuple[object, ...]:
    folder.mkdir()
    np.save(folder / "3.npy", rows_of(3, "float16"))
    np.save(folder / "layer_12.mlp_out.npy", rows_of(12))
    np.save(folder / "tokens.npy", TOKEN_IDS)
    (folder / "README.md").write_text("by us")
    return ("--context", CONTEXT)


def pieces(folder: Path) -> tuple[object, ...]:
    """Each site a folder of files of several lengths."""
    for site, seed in (("3", 3), ("blocks.12.hook_mlp_out", 12)):
        (folder / site).mkdir(parents=True)
        for i, part in enumerate(np.split(rows_of(seed), [64, 400, 1000])):
            np.save(folder / site / f"{i}.npy", part)
    return ("--context", CONTEXT)


def safetensors(folder: Path) -> tuple[object, ...]:
    folder.mkdir()
    for name, seed in (("3", 3), ("12.mlp_out", 12)):
        save_file({"acts": sequences_of(seed), "other": np.zeros((2, 2), np.float32)}, folder / f"{name}.safetensors")
    return ("--tensor", "acts")


def zarr_group(folder: Path, version: int) -> tuple[object, ...]:
    group = zarr.open_group(folder, mode="w", zarr_format=version)
    for name, seed in (("3", 3), ("12.mlp_out", 12)):
        group.create_array(name, data=rows_of(seed), chunks=(100, 5))
    return ("--context", CONTEXT)


def saelens(folder: Path) -> tuple[object, ...]:
    """As CacheActivationsRunner._create_shard makes it, in two shards that are put together as it does."""
    features = datasets.Features(
        {
            "blocks.3.hook_resid_post": datasets.Array2D(shape=(CONTEXT, WIDTH), dtype="float32"),
            "blocks.12.hook_mlp_out": datasets.Array2D(shape=(CONTEXT, WIDTH), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=CONTEXT),
        }
    )
    columns = {
        "blocks.3.hook_resid_post": torch.from_numpy(sequences_of(3)),
        "blocks.12.hook_mlp_out": torch.from_numpy(sequences_of(12)),
        "token_ids": torch.from_numpy(TOKEN_IDS),
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder), num_shards=2)
    return ()


def saev(folder: Path, ours: bool = True) -> tuple[object, ...]:
    """By its protocol: 64 examples a shard, the last one as long as the others; of version 2.1, or 2.0 with other names."""
    names = ("content_tokens_per_example", "n_examples") if ours else ("patches_per_ex", "n_ex")
    folder.mkdir()
    about = {
        "family": "clip",
        "layers": [12, 3],
        names[0]: CONTEXT - 1,
        "cls_token": True,
        "d_model": WIDTH,
        "dtype": "float32",
    }
    (folder / "metadata.json").write_text(json.dumps(about))
    both, shards = np.stack([sequences_of(12), sequences_of(3)], axis=1), []
    for i in range(3):
        part = both[64 * i : 64 * (i + 1)]
        np.concatenate([part, np.zeros((64 - len(part), *part.shape[1:]), np.float32)]).tofile(folder / f"acts{i:06}.bin")
        shards.append({"name": f"acts{i:06}.bin", names[1]: len(part)})
    (folder / "shards.json").write_text(json.dumps(shards))
    return ()


@pytest.mark.parametrize("put", [npy, safetensors, saev])
def test_a_file_that_is_cut_while_it_is_read_is_one_line(put: Put, tmp_path: Path) -> None:
    put(tmp_path / "theirs")
    name = "acts" if put is safetensors else None
    opened = [piece for pieces in open_folder(tmp_path / "theirs", name).values() for piece in pieces]
    for piece in opened:
        os.truncate(piece.files[0], 4096)
        with pytest.raises(UserError, match=f"{piece.files[0]} ends before row .*: copy it again"):
            piece.read(0, piece.rows)


# {form: (what puts it there, the site of the second stream, whether it has tokens)}
FORMS: dict[str, tuple[Put, str, bool]] = {
    "npy": (npy, "12.mlp_out", True),
    "pieces": (pieces, "12.mlp_out", False),
    "safetensors": (safetensors, "12.mlp_out", False),
    "zarr v2": (lambda folder: zarr_group(folder, 2), "12.mlp_out", False),
    "zarr v3": (lambda folder: zarr_group(folder, 3), "12.mlp_out", False),
    "saelens": (saelens, "12.mlp_out", True),
    "saev": (saev, "12", False),
    "saev 2.0": (lambda folder: saev(folder, ours=False), "12", False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_rows_and_tokens(form: str, cli: Cli, tmp_path: Path) -> None:
    put, second, has_tokens = FORMS[form]
    options = put(tmp_path / "theirs")
    made = cli("harvest", "import", "--from", tmp_path / "theirs", *options, *SMALL, "--cache", tmp_path / "c")
    assert made.code == 0, made.err
    assert "the last 48 of 1,200 rows do not fill a block" in made.err and "positions mean nothing" not in made.err
    cache = Cache.open(tmp_path / "c")
    spec, of = cache.spec, cache.spec.imported
    assert of is not None and (of.rows, of.positions, of.tokens) == (N, True, has_tokens)
    assert (spec.context, spec.d_model, spec.n_layers, spec.n_blocks, spec.holdout_blocks) == (CONTEXT, WIDTH, 13, 9, 2)
    assert cache.sites == of.sites == parse_sites(f"3,{second}") and cache.missing(cache.sites) == {}
    for site, seed in zip(cache.sites, (3, 12), strict=True):
        np.testing.assert_array_equal(cache.layer(site)[:], rows_of(seed)[:1152].astype(np.float16))
    wanted = TOKEN_IDS[: spec.sequences] if has_tokens else np.zeros((spec.sequences, CONTEXT))
    np.testing.assert_array_equal(cache.tokens.read(0, spec.sequences), wanted)
    assert CacheSpec.from_dict(json.loads((tmp_path / "c" / "cache.json").read_bytes())["spec"]) == spec


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    npy(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def made(theirs: Path, cli: Cli, tmp_path: Path) -> Cache:
    assert cli("harvest", "import", "--from", theirs, *SMALL, "--context", CONTEXT, "--cache", tmp_path / "c").code == 0
    return Cache.open(tmp_path / "c")


def test_what_is_not_known_is_said(cli: Cli, tmp_path: Path) -> None:
    """One file of rows: no sequences, no tokens, no name of a site."""
    np.save(tmp_path / "vit.npy", rows_of(0))
    args = ("harvest", "import", "--from", tmp_path / "vit.npy", "--as", "5.attn_out", "--cache", tmp_path / "c")
    made = cli(*args, "--block-sequences", 2)
    assert made.code == 0 and "positions mean nothing; --context says it" in made.err
    spec = Cache.open(tmp_path / "c").spec
    assert spec.imported is not None and (spec.imported.positions, spec.imported.tokens) == (False, False)
    assert spec.imported.sites == (Site(5, "attn_out"),)
    train = ("--cache", tmp_path / "c", "--runs", tmp_path / "r", "--l1", "batchtopk:4", "--batch", 32, "--device", "cpu")
    refused = cli("train", *train, "--skip-positions", 1)
    assert refused.code == 2 and "does not know its rows' positions: leave --skip-positions out" in refused.err


def test_layers_come_later_and_other_files_are_refused(theirs: Path, cli: Cli, tmp_path: Path) -> None:
    args = ("harvest", "import", "--from", theirs, *SMALL, "--context", CONTEXT, "--cache", tmp_path / "c")
    assert cli(*args, "--layers", 3).code == 0
    assert Cache.open(tmp_path / "c").sites == (Site(3),)
    assert cli(*args, "--layers", "12.mlp_out").code == 0
    before = content(Cache.open(tmp_path / "c"))
    shutil.copytree(theirs, tmp_path / "moved")
    assert cli(*args[:2], "--from", tmp_path / "moved", *args[4:]).code == 0
    np.save(theirs / "3.npy", rows_of(4))
    refused = cli(*args)
    assert refused.code == 2 and "was harvested with other settings (imported is " in refused.err
    assert refused.err.count("\n") == 2 and content(Cache.open(tmp_path / "c")) == before


def test_verify_finds_damage_and_repair_mends_it_from_the_files(made: Cache, theirs: Path, cli: Cli, tmp_path: Path) -> None:
    whole = content(made)
    flip(made.block_path(Site(3), 4))
    flip(made.tokens.path(0), 11)
    assert cli("harvest", "verify", "--cache", made.path).code == 1
    theirs.rename(tmp_path / "moved")
    repair = ("harvest", "repair", "--cache", made.path, "--device", "cpu")
    gone = cli(*repair)
    assert gone.code == 2 and f"there is nothing at {theirs}" in gone.err
    shutil.copytree(tmp_path / "moved", tmp_path / "others")
    np.save(tmp_path / "others" / "3.npy", rows_of(5))
    refused = cli(*repair, "--dataset", tmp_path / "others")
    assert refused.code == 2 and "does not hold the activations that" in refused.err and content(made) != whole
    mended = cli(*repair, "--dataset", tmp_path / "moved")
    assert mended.code == 0 and "repaired 1 layer blocks and the tokens" in mended.out
    assert content(made) == whole


def test_an_import_that_is_killed_goes_on(made: Cache, theirs: Path, tmp_path: Path) -> None:
    """By a shard of another process, which dies in the middle of a block's ledger entries."""
    program = (
        "import os, signal\n"
        "from residual_saes.harvest import writer\n"
        "commit, n = writer.Cache.commit, []\n"
        "def dying(*args, **options):\n"
        "    n.append(1)\n"
        "    if len(n) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return commit(*args, **options)\n"
        "writer.Cache.commit = dying\n"
        "from residual_saes.__main__ import rsae\n"
        "rsae()\n"
    )
    args = ["harvest", "import", "--from", theirs, *SMALL, "--context", CONTEXT, "--cache", tmp_path / "again"]
    argv = list(map(str, args))
    died = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    half = Cache.open(tmp_path / "again")
    assert 0 < sum(map(len, half.missing(half.sites).values())) < 9
    rows = Rows.open(theirs, None, None, CONTEXT)
    for index in (1, 0):
        harvest(half, half.sites, rows, HarvestConfig(device=CPU, shard=Shard(index=index, count=2)))
    half.remove_leftovers()
    for site in made.sites:
        for block in range(9):
            np.testing.assert_array_equal(half.whole_block(site, block), made.whole_block(site, block))


def test_values_that_float16_cannot_hold_are_counted(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    x = rows_of(0)
    x[5, 3], x[6, 0] = 1e6, -np.inf
    np.save(tmp_path / "theirs" / "0.npy", x)
    made = cli("harvest", "import", "--from", tmp_path / "theirs", "--block-sequences", 2, "--cache", tmp_path / "c")
    assert made.code == 0 and "WARNING: 2 values did not fit float16" in made.err
    stored = Cache.open(tmp_path / "c").layer(Site(0))[:7]
    assert (stored[5, 3], stored[6, 0]) == (65504, -65504)


def refuse_nan(folder: Path) -> str:
    x = rows_of(3)
    x[700, 2] = np.nan
    np.save(folder / "3.npy", x)
    return "row 700 of .*3.npy has a NaN"


def refuse_lengths(folder: Path) -> str:
    np.save(folder / "3.npy", rows_of(3)[:-8])
    return r"layer 12.mlp_out has 1,200 rows and layer 3 1,192: a cache has the same rows at every site"


def refuse_widths(folder: Path) -> str:
    np.save(folder / "3.npy", rows_of(3)[:, :8])
    return "layer_12.mlp_out.npy has rows of 16 and .*3.npy of 8"


def refuse_dtype(folder: Path) -> str:
    np.save(folder / "3.npy", rows_of(3).astype(np.float64))
    return r"3.npy is float64 \[1200, 16\]: activations are float16 or float32"


def refuse_shape(folder: Path) -> str:
    np.save(folder / "3.npy", rows_of(3).ravel())
    return r"3.npy is float32 \[19200\]"


def refuse_cut(folder: Path) -> str:
    whole = (folder / "3.npy").read_bytes()
    (folder / "3.npy").write_bytes(whole[:-100])
    return "cannot read .*3.npy: "


def refuse_pickle(folder: Path) -> str:
    np.save(folder / "3.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return "cannot read .*3.npy: "


def refuse_tokens(folder: Path) -> str:
    np.save(folder / "tokens.npy", TOKEN_IDS[1:])
    return "tokens.npy has 1,192 token numbers for 1,200 rows"


def refuse_names(folder: Path) -> str:
    np.save(folder / "acts.npy", rows_of(3))
    return "layers 3,12.mlp_out by their names, and .*acts.npy has no site in its name"


def refuse_hook(folder: Path) -> str:
    np.save(folder / "4.mlp_inn.npy", rows_of(3))
    return "4.mlp_inn names no site: a hook is one of resid_post, "


def refuse_several(folder: Path) -> str:
    save_torch({"a": torch.zeros(N, 16), "b": torch.zeros(N, 16)}, folder / "4.safetensors")
    return r"has 2 tensors \(a, b\): name one with --tensor"


def refuse_chunks(folder: Path) -> str:
    array = zarr.create_array(folder / "4", data=rows_of(3), chunks=(100, 16))
    assert array.nchunks == 12
    (folder / "4" / "c" / "7" / "0").unlink()
    return "4 has 11 of its 12 chunks"


def refuse_shard(folder: Path) -> str:
    shutil.rmtree(folder)
    saev(folder)
    (folder / "acts000001.bin").unlink()
    return "acts000001.bin is missing: shards.json says 64 examples of it"


def refuse_cut_shard(folder: Path) -> str:
    shutil.rmtree(folder)
    saev(folder)
    os.truncate(folder / "acts000002.bin", 1000)
    return "acts000002.bin is too short"


def refuse_list(folder: Path) -> str:
    shutil.rmtree(folder)
    saev(folder)
    (folder / "shards.json").unlink()
    return "cannot read metadata.json and shards.json of "


def refuse_nothing(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "theirs has no activations: they are .npy"


@pytest.mark.parametrize("spoil", [f for name, f in sorted(globals().items()) if name.startswith("refuse_")])
def test_what_does_not_fit_is_refused_in_a_line(spoil: Callable[[Path], str], theirs: Path, cli: Cli, tmp_path: Path) -> None:
    said = spoil(theirs)
    refused = cli("harvest", "import", "--from", theirs, *SMALL, "--context", CONTEXT, "--cache", tmp_path / "c")
    lines = [line for line in refused.err.splitlines() if not line.startswith("note:")]
    assert refused.code == 2 and len(lines) == 1 and re.search(said, lines[0]), refused.err


def test_what_was_imported_is_trained_and_evaluated_without_a_model(made: Cache, cli: Cli, tmp_path: Path) -> None:
    runs = ("--cache", made.path, "--runs", tmp_path / "runs", "--device", "cpu")
    train = ("--tokens", 896, "--batch", 32, "--l1", "batchtopk:4", "--expansion", 2, "--window-blocks", 2)
    assert cli("train", *train, *runs, "--layers", "12.mlp_out").code == 0
    result = cli("eval", *runs, "--snapshots", "final")
    assert result.code == 0, result.err
    assert result.err.count("has no language model, so CE and KL are left out") == 1
    assert "FVU" in result.out and "CE" not in result.out and "is no number" not in result.err
    results = json.loads(next((tmp_path / "runs").glob("*/results/metrics.json")).read_text())
    assert {r["ce"] for r in results.values()} == {None} and all(0 < r["fvu"] < 1.5 for r in results.values())
    report = (tmp_path / "runs" / "report.html").read_text()
    assert "positions known, tokens known" in report and "CE recovered</th>" not in report
    [card] = [path.read_text() for path in (tmp_path / "runs").glob("*/README.md")]
    assert "that were imported from theirs" in card and "AutoModel" not in card and "worlds" not in card
    refused = cli("eval", "pages", *runs)
    assert refused.code == 2 and "is of activations that were imported from" in refused.err
    assert "Traceback" not in refused.err

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.runs.run import Run, made, run_config, snapshot_name, snapshot_tokens
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.seal import SEAL, load_sealed, seal
from residual_saes.shared.sites import Site
from residual_saes.shared.temporaries import _release, temporary
from tests.conftest import ROOT, curve_of

TRAIN: dict[str, Any] = {"tokens": 60, "lr": 1e-3, "batch": 1, "expansion": 2, "l1": {"init": 1e-3, "target": None}}
SPEC = CacheSpec(
    model="here/lm", model_revision="", dataset="t", dataset_revision="", split="", text_column="", tokenizer_sha256="",
    separator=0, context=4, d_model=6, n_layers=3, vocab_size=9, block_sequences=1, n_blocks=20, holdout_blocks=2, seed=0,
    precision="fp32",
)  # fmt: skip
CACHE: dict[str, Any] = {"digest": "abc", "spec": dataclasses.asdict(SPEC)}


def new_run(path: Path, train: dict[str, Any] = TRAIN) -> Run:
    run = Run(path)
    path.mkdir(exist_ok=True)
    run.create(run_config(train, CACHE), {"threads": 1})
    return run


def test_snapshots_of_the_published_job() -> None:
    assert list(snapshot_tokens(300_000_000)) == ["50M", "100M", "150M", "200M", "250M", "final"]


def sae(d: int = 6, f: int = 10) -> Sae:
    return Sae(
        w_enc=torch.randn(f, d),
        w_dec=torch.randn(f, d),
        b_enc=torch.randn(f),
        b_pre=torch.randn(d),
        b_dec=torch.randn(d),
        config={"train": {"lr": 1e-3}, "layer": 3},
        stats={"tokens": 5},
    )


def test_a_checkpoint_opens_anywhere(tmp_path: Path) -> None:
    """With nothing but torch and weights_only, in the published layout, and no larger than its numbers."""
    mine = sae()
    mine.save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)
    assert {k: tuple(v.shape) for k, v in content["model_state"].items()} == {
        "b_pre": (6,),
        "encoder.weight": (10, 6),
        "encoder.bias": (10,),
        "decoder.weight": (6, 10),
        "decoder.bias": (6,),
    }
    assert content["config"]["layer"] == 3
    assert content["stats"]["tokens"] == 5
    again, x = Sae.load(tmp_path / "a.pt", 6), torch.randn(4, 6)
    torch.testing.assert_close(again.decode(again.encode(x)), mine.decode(mine.encode(x)))
    state = content["model_state"]
    z = torch.relu((x - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"])
    torch.testing.assert_close(z @ state["decoder.weight"].T + state["decoder.bias"] + state["b_pre"], again.decode(z))


def test_thresholds_are_in_the_file_and_its_checksum(tmp_path: Path) -> None:
    mine, path, x = sae(), tmp_path / "a.pt", torch.randn(9, 6)
    everything = mine.encode(x)
    mine.threshold = torch.rand(10)
    mine.save(path)
    again = Sae.load(path).encode(x)
    torch.testing.assert_close(again, everything * (everything > mine.threshold))
    assert not torch.equal(again, everything)
    content = torch.load(path, weights_only=True)
    content["model_state"]["threshold"] += 0.1
    torch.save(content, path)
    with pytest.raises(Damaged, match="its checksum does not match"):
        Sae.load(path)
    del content["model_state"]["threshold"]
    torch.save(content, path)
    with pytest.raises(Damaged, match="its checksum does not match"):
        Sae.load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="no checkpoint at"):
        Sae.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    sae().save(path)
    with pytest.raises(UserError, match="over 6 dimensions, the cache has 8"):
        Sae.load(path, 8)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    content = {"model_state": {}, "config": {}, "stats": {}}
    torch.save(content, path)
    with pytest.raises(UserError, match="not a readable"):
        Sae.load(path)


def test_a_file_on_a_bad_block_is_an_error_in_words() -> None:
    """As /proc/self/mem is at its beginning. Of a mapping the system would end the process."""
    path = Path("/proc/self/mem")
    for read in (Sae.load, Sae.checksum):
        with pytest.raises(UserError, match="cannot read /proc/self/mem: Input/output error"):
            read(path)
    with pytest.raises(ValueError, match="Input/output error"):
        load_sealed(path)


def test_a_sparse_tensor_is_damage(tmp_path: Path) -> None:
    sae().save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["model_state"]["b_pre"] = content["model_state"]["b_pre"].to_sparse()
    torch.save(content, tmp_path / "a.pt")
    for read in (Sae.load, Sae.checksum):
        with pytest.raises(Damaged, match="not a readable SAE checkpoint"):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"config": {"train": 3}}, "train is 3, and must be an object"),
        ({"config": {"train": {"max_norm": "x"}}}, "train.max_norm is 'x'"),
        ({"config": {"sparsity": {"k": 0}}}, "sparsity.k is 0"),
        ({"config": {"layer": "x"}}, "'x' is not a site"),
        ({"config": {"inputs": 3}}, "inputs is 3"),
        ({"stats": {"scales": ["x"]}}, "scales.0 is 'x'"),
        ({"stats": {"lambda": "x"}}, "lambda is 'x'"),
        ({"w_enc": torch.zeros(0, 6), "b_enc": torch.zeros(0), "w_dec": torch.zeros(0, 6)}, "holds no weights"),
    ],
)
def test_what_is_under_a_right_checksum_and_cannot_be_is_one_line(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    dataclasses.replace(sae(), **more).save(tmp_path / "a.pt")
    with pytest.raises(UserError, match=said):
        Sae.load(tmp_path / "a.pt")


def test_the_checksum_is_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    sae(64, 4096).save(path)
    checksum, content = Sae.checksum(path), path.read_bytes()
    assert checksum == torch.load(path, weights_only=True)["stats"][SEAL]
    path.write_bytes(content[:400_000] + b"x" * 100_000 + content[500_000:])
    assert Sae.checksum(path) == checksum
    with pytest.raises(Damaged):
        Sae.load(path)


def test_no_pickled_code_is_ever_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model_state": Evil(), "config": {}, "stats": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a readable"):
        Sae.load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def flips(content: bytes, step: int) -> Iterator[bytes]:
    for at in range(0, len(content), step):
        yield content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def test_a_checkpoint_cut_short_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    """So that training makes it again. torch says of some lengths that the disk cannot be read."""
    path = tmp_path / "a.pt"
    sae().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match="not a readable SAE checkpoint"):
            Sae.load(path)


def test_no_flipped_byte_of_a_checkpoint_changes_what_is_read(tmp_path: Path) -> None:
    """Wherever it is: it is refused, or it lies in the archive's padding and what is read is what was written."""
    mine, path = sae(), tmp_path / "a.pt"
    mine.save(path)
    refused, tried = 0, 0
    for content in flips(path.read_bytes(), 7):
        path.write_bytes(content)
        tried += 1
        try:
            again = Sae.load(path)
        except Damaged as error:
            refused += str(path) in str(error)
            continue
        assert all(torch.equal(again.tensors()[k], v) for k, v in mine.tensors().items())
        assert again.config == mine.config
        assert {k: v for k, v in again.stats.items() if k != SEAL} == mine.stats
    assert refused > tried / 3


def test_a_checkpoint_in_the_place_of_another_is_refused_by_name(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    mine = sae()
    mine.config = run.config.stored | {"layer": 3, "snapshot": "10"}
    mine.save(run.snapshot_path(Site(3), "10"))
    Sae.load(run.snapshot_path(Site(3), "10"), belongs=run.belongs(Site(3), "10"))
    with pytest.raises(UserError, match=r"sae_layer03_10.pt does not belong here: it says layer 3, not layer 4; put it back"):
        Sae.load(run.snapshot_path(Site(3), "10"), belongs=run.belongs(Site(4), "10"))
    run.snapshot_path(Site(3), "20").write_bytes(run.snapshot_path(Site(3), "10").read_bytes())
    with pytest.raises(UserError, match="it says snapshot 10, not snapshot 20"):
        run.due(Site(3))
    assert run.snapshot_path(Site(3), "20").exists()
    other = new_run(tmp_path / "other", TRAIN | {"lr": 1e-2})
    with pytest.raises(UserError, match="it says digest"):
        Sae.check(run.snapshot_path(Site(3), "10"), belongs=other.belongs(Site(3), "10"))


def test_what_is_due_is_what_is_not_there_whole(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    labels = list(snapshot_tokens(60))
    assert run.due(Site(1)) == labels
    for label in labels:
        mine = sae()
        mine.config = run.config.stored | {"layer": 1, "snapshot": label}
        mine.save(run.snapshot_path(Site(1), label))
    assert run.due(Site(1)) == []
    run.snapshot_path(Site(1), "20").unlink()
    run.snapshot_path(Site(1), "40").write_bytes(run.snapshot_path(Site(1), "40").read_bytes()[:700])
    run.snapshot_path(Site(1), "final").write_bytes(b"")
    assert run.due(Site(1)) == ["20", "40", "final"]


def test_a_folder_holds_one_configuration(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    run.require_same(run_config(TRAIN, CACHE))
    moved = {"digest": "abc", "spec": CACHE["spec"] | {"model": "there/lm"}}
    run.require_same(run_config(TRAIN, moved))
    with pytest.raises(UserError, match=r"\(lr is 0.001 there, 0.01 here; the cache's seed is 0 there, 3 here\)"):
        run.require_same(run_config(TRAIN | {"lr": 1e-2}, {"digest": "x", "spec": moved["spec"] | {"seed": 3}}))
    assert run.config.stored["machine"] == {"threads": 1}


def test_of_two_that_create_a_run_at_once_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second found nothing there when it looked, and must not put its own configuration in the place of the first."""
    run = Run(tmp_path)
    run.create(run_config(TRAIN | {"lr": 1}, CACHE), {})
    _release(temporary(tmp_path / "config.json"))  # as a kill leaves it
    monkeypatch.setattr(Path, "exists", lambda _: monkeypatch.undo())  # is none when it is asked first
    with pytest.raises(UserError, match="lr is 1 there, 2 here"):
        run.create(run_config(TRAIN | {"lr": 2}, CACHE), {})
    assert run.config.stored["train"]["lr"] == 1
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_run_from_before_there_was_a_field_is_the_run_that_says_nothing_by_it() -> None:
    old = run_config(TRAIN | {"step": {"clip_norm": 1.0}}, CACHE)
    step = {"clip_norm": 1.0, "decoder_norm": "unit"}
    assert run_config(TRAIN | {"lr_decay": 0.0, "refit": 0.0, "step": step}, CACHE) == old
    for more in ({"lr_decay": 0.2, "step": step}, {"step": step | {"decoder_norm": "free"}}):
        assert run_config(TRAIN | more, CACHE)["digest"] != old["digest"]
        assert run_config(TRAIN | more, CACHE)["train"].items() >= {k: v for k, v in more.items() if k != "step"}.items()


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"l1_warmup": 7}, "--l1-warmup"),
        ({"refit": 0.1}, "--refit-kind decoder"),
        ({"refit_kind": "topk"}, "--refit-kind topk"),
    ],
)
def test_a_run_by_an_option_that_is_gone_is_read_but_not_trained_further(
    tmp_path: Path, more: dict[str, Any], option: str
) -> None:
    run = new_run(tmp_path / "r", TRAIN | more)
    with pytest.raises(UserError, match=rf"was trained with {option}, which this version cannot do: it can be evaluated"):
        run.require_same(run_config(TRAIN, CACHE))
    assert run.config.stored["train"] == TRAIN | more and run.snapshots() == []


def test_a_config_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    good = run.config_path.read_bytes()
    for content in flips(good, 1):
        run.config_path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert Run(run.path).config == run.config, content  # white space
    for content, message in (
        (b"[]", "is not of a run"),
        (b'{"model_type": "x"}', "is not of a run"),
        (b"\xff", "readable JSON"),
    ):
        run.config_path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Run.open(run.path)
    run.config_path.write_text(json.dumps({"format": 1}))
    with pytest.raises(UserError, match="format 1, this program reads 2"):
        Run(run.path).require_same(run_config(TRAIN, CACHE))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train", {"tokens": "60"}, "tokens"),
        ("train", {"batch": 0}, "batch"),
        ("train", {"tokens": None}, "train has no tokens"),
        ("train", "none", "train"),
        ("cache", {"digest": "abc", "spec": CACHE["spec"] | {"d_model": 10**9}}, "d_model"),
        ("cache", {"digest": 3, "spec": CACHE["spec"]}, "digest"),
        ("machine", "[" * 200_000, None),
    ],
)
def test_values_that_cannot_be_are_one_line(tmp_path: Path, field: str, value: Any, said: str | None) -> None:
    """Behind a right checksum, as written by hand; and brackets without end."""
    run = new_run(tmp_path / "r")
    stored = dict(run.config.stored)
    stored[field] = TRAIN | value if field == "train" and isinstance(value, dict) else value
    content = json.dumps(seal(stored))
    run.config_path.write_text(content if said else content.replace('"' + "[" * 200_000 + '"', "[" * 200_000))
    with pytest.raises(UserError, match=rf"{said}" if said else "config.json"):
        Run.open(run.path)


def test_a_config_is_read_once(tmp_path: Path) -> None:
    run = Run.open(new_run(tmp_path / "r").path)
    run.config_path.unlink()
    assert run.snapshots() == [] and run.belongs(Site(1), "final")["digest"] == run.config.digest


def test_a_layer_has_one_owner(tmp_path: Path) -> None:
    """Another process is told who it is; after a kill nobody is; nothing is left of an owner that ends."""
    run = new_run(tmp_path / "r")
    said = rf"layer 2 of .* is being trained by process {os.getpid()} on"
    with run.claim([Site(1), Site(2)]), pytest.raises(UserError, match=said), run.claim([Site(3), Site(2)]):
        pass
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json"]
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from residual_saes.shared.runs.run import Run; from residual_saes.shared.sites import Site\n"
        "with Run(Path(sys.argv[1])).claim([Site(1)]):\n    print('mine', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, run.path], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match=f"process {other.pid} on"), run.claim([Site(1)]):
            pass
        run.state_path(Site(1)).with_suffix(".tmp").write_bytes(b"half")
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run.claim([Site(1)]):
        assert [p.name for p in (run.path / "state" / "layer01").iterdir()] == ["owner"]
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json"]


@pytest.mark.parametrize("name", ["state", "state/layer01", "state/layer01/owner", "metrics"])
def test_a_link_in_a_run_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    run, ours = new_run(tmp_path / "r"), tmp_path / "ours"
    ours.mkdir()
    (ours / "state.tmp").write_text("secret")
    link = run.path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(ours / "state.tmp" if name.endswith("owner") else ours)
    with pytest.raises(UserError, match=f"{name} is a link to .*, which is left alone"), run.claim([Site(1)]):
        pass
    assert [path.name for path in ours.iterdir()] == ["state.tmp"] and (ours / "state.tmp").read_text() == "secret"
    assert link.is_symlink()


def test_metrics_after_the_cursor_are_dropped(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    for step in (10, 20, 30):
        run.append_metrics(Site(2), Point(step=step, tokens=step))
    with run.metrics_path(Site(2)).open("a") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    assert curve_of(run, Site(2)) == [{"step": step, "tokens": step} for step in (10, 20, 30)]
    run.rewind_metrics(Site(2), 20)
    assert curve_of(run, Site(2)) == [{"step": step, "tokens": step} for step in (10, 20)]
    assert not list(run.path.rglob("*.tmp"))


def test_a_rewind_that_is_interrupted_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path / "r")
    for step in (10, 20, 30):
        run.append_metrics(Site(2), Point(step=step, tokens=step))
    before = run.metrics_path(Site(2)).read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.rewind_metrics(Site(2), 20)
    assert run.metrics_path(Site(2)).read_bytes() == before


def test_a_damaged_line_of_the_curve_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "r")
    for step in (10, 20, 30):
        run.append_metrics(Site(2), Point(step=step, tokens=step, l0=1.5))
    run.metrics_path(Site(2)).write_bytes(run.metrics_path(Site(2)).read_bytes().replace(b'20, "l0": 1', b'20, "l0": 7'))
    with pytest.raises(UserError, match=r"line 2 of .*layer02.jsonl is damaged"):
        curve_of(run, Site(2))
    run.rewind_metrics(Site(2), 30)
    assert [r["step"] for r in curve_of(run, Site(2))] == [10, 30]
    assert "line 2 of" in capsys.readouterr().err


def test_state_survives_and_says_when_it_is_damaged(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    assert run.load_state(Site(1)) is None
    tensors = {"a": torch.randn(3), "b": torch.arange(4, dtype=torch.int32)}
    run.save_state(Site(1), tensors, {"step": 7, "l1": 0.1 + 0.2})
    loaded = run.load_state(Site(1))
    assert loaded is not None
    assert loaded[1] == {"step": 7, "l1": 0.1 + 0.2}
    assert all(torch.equal(loaded[0][k], tensors[k]) for k in tensors)
    good = run.state_path(Site(1)).read_bytes()
    for content in (*flips(good, 3), b"\x00" * 50, good[:-1], b""):
        run.state_path(Site(1)).write_bytes(content)
        try:
            again = run.load_state(Site(1))
        except Damaged:
            continue
        assert again is not None and again[1] == loaded[1]  # padding
        assert all(torch.equal(again[0][k], tensors[k]) for k in tensors)
    run.drop_state(Site(1))
    assert run.load_state(Site(1)) is None


def test_the_state_of_another_layer_or_run_is_refused_by_name(tmp_path: Path) -> None:
    run, other = new_run(tmp_path / "r"), new_run(tmp_path / "other", TRAIN | {"lr": 1e-2})
    run.save_state(Site(1), {"a": torch.zeros(3)}, {"step": 7})
    for target, message in ((run, "state of layer 1 of this run, not of layer 2"), (other, "of another run, not of layer 2")):
        path = target.state_path(Site(2))
        path.parent.mkdir(parents=True)
        path.write_bytes(run.state_path(Site(1)).read_bytes())
        with pytest.raises(UserError, match=message) as caught:
            target.load_state(Site(2))
        assert not isinstance(caught.value, Damaged)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a page, which fails as a full disk does. Not a fixture: within it, pytest could not write what
    it prints to a file either."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_says_why_and_leaves_what_was_there(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    sae().save(run.snapshot_path(Site(1), "final"))
    run.save_state(Site(1), {"a": torch.zeros(3)}, {"step": 7})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*sae_layer01_final.pt: File too large"):
        sae(64, 64).save(run.snapshot_path(Site(1), "final"))
    with full_disk(), pytest.raises(UserError, match=r"cannot write [^:]*/state.safetensors: .*File too large"):
        run.save_state(Site(1), {"a": torch.randn(5000)}, {"step": 8})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_is_durable_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = new_run(tmp_path / "r"), []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        calls.append(re.sub(r"^\.(.*?\.(?:pt|safetensors))\..*\.tmp$", r"\1.tmp", name))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (b.suffix != ".tmp" and calls.append("replace")) or replace(a, b))
    sae().save(run.snapshot_path(Site(1), "final"))
    assert calls == ["sae_layer01_final.pt.tmp", "replace", "r"]
    run.append_metrics(Site(1), Point(step=7, tokens=7))
    calls.clear()
    run.save_state(Site(1), {"a": torch.zeros(3)}, {"step": 7})
    assert calls == ["layer01.jsonl", "metrics", "r", "state.safetensors", "replace", "layer01", "state", "r"]


def test_half_a_state_left_by_a_kill_is_dropped_with_the_rest(tmp_path: Path) -> None:
    run = new_run(tmp_path / "r")
    run.save_state(Site(1), {"a": torch.zeros(3)}, {"step": 7})
    run.state_path(Site(1)).with_suffix(".tmp").write_bytes(b"half")
    (run.state_path(Site(1)).parent / ".state.safetensors.1.tmp").mkdir()
    run.drop_state(Site(1))
    assert list((run.path / "state" / "layer01").iterdir()) == []
    run.drop_state(Site(1))


def test_a_run_from_before_an_option_was_there_is_one_without_it(tmp_path: Path) -> None:
    cache, before = CACHE, TRAIN | {"order": "slices"}
    now = before | {"skip_positions": 0, "max_norm": None}
    assert run_config(now, cache) == run_config(before, cache)
    assert run_config(now | {"skip_positions": 1}, cache)["digest"] != run_config(before, cache)["digest"]
    run = Run(tmp_path / "r")
    run.path.mkdir()
    run.create(run_config(before, cache), {})
    run.require_same(run_config(now, cache))
    with pytest.raises(UserError, match=r"\(max_norm is None there, 10 here\)"):
        run.require_same(run_config(now | {"max_norm": 10}, cache))


def test_a_checkpoint_of_a_hook_that_is_not_known_is_passed_over(tmp_path: Path) -> None:
    """Its name is another program's, or a later version's."""
    run = new_run(tmp_path / "run")
    assert snapshot_name("sae_layer03.mlp_out_final.pt") == (Site(3, "mlp_out"), "final")
    (run.path / "sae_layer03.no_such_hook_final.pt").write_bytes(b"")
    assert run.snapshots() == [] and made(run.path, [Site(3)]) == 0

"""Publishing, to a server of the tests' own that speaks the hub's API; and the model card, by running what it says."""

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, processors
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.peers import ENVIRONMENTS
from residual_saes.eval.floors.measured import measured_floors
from residual_saes.eval.measure.features import measured_features
from residual_saes.eval.measure.result import Result
from residual_saes.eval.measure.store import stored_results
from residual_saes.eval.publish.card import MARKER, Publication, card, registry_entry, repository_name, sister_runs, write_card
from residual_saes.eval.publish.contents import published_files
from residual_saes.shared.lm import first, hook_of, known_model, module_name
from residual_saes.shared.runs.run import Run, run_config
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from residual_saes.shared.temporaries import _release, leftovers, temporary
from tests.conftest import ROOT, Cli, curve_of, invoke
from tests.eval.synthetic import make_distilled, make_runs
from tests.hub import TOKEN, Hub


@pytest.fixture(scope="module")
def evaluated_once(runs_path: Path, cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three layers, evaluated."""
    runs = tmp_path_factory.mktemp("to-publish") / "runs"
    for folder in sorted(runs_path.iterdir())[:2]:
        shutil.copytree(folder, runs / folder.name)
    sizes = ("--eval-tokens", 512, "--ce-tokens", 64)
    assert invoke("eval", "--preset", "demo", "--cache", cache_path, "--device", "cpu", "--runs", runs, *sizes) == 0
    return runs


@pytest.fixture
def run(evaluated_once: Path, tmp_path: Path) -> Run:
    """A copy of the first of them, its sister beside it, and things in its folder that are nobody's business."""
    shutil.copytree(evaluated_once, tmp_path / "runs")
    run = Run(sorted(p for p in (tmp_path / "runs").iterdir() if p.is_dir())[0])
    (run.path / "state" / "layer00").mkdir(parents=True)
    for name in ("state/layer00/state.safetensors", "notes.txt", ".secret.pt", "plots/.x.png.tmp", "plots/.hidden.png"):
        (run.path / name).write_bytes(b"not to be published")
    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process that takes our server for the hub, and has the token of a user there."""
    return os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def publish(hub: Hub, home: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eval", "publish", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True, timeout=240)


def blocks(readme: str) -> list[str]:
    """The Python in a model card."""
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.slow
def test_killed_in_the_middle_and_continued(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.hang_after = 40  # large files: in the second commit
    command = [sys.executable, "-m", "eval", "publish", "--runs", str(run.path), "--to", "org"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL) as process:
        assert hub.hanging.wait(120)
        os.kill(process.pid, signal.SIGKILL)
    name = f"org/{run.name}"
    assert (len(hub.received), len(hub.repositories[name]["commits"])) == (40, 1)
    assert "README.md" not in hub.repositories[name]["files"]

    assert list(run.path.rglob(".*.tmp/*"))  # what was to be sent next
    _release(temporary(run.path / "layer_2" / "cfg.json"))  # and as a kill leaves it a moment earlier
    hub.hang_after = None
    again = publish(hub, tmp_path, "--runs", run.path, "--to", "org")
    assert again.returncode == 0, again.stderr
    there = hub.repositories[name]
    assert list(there["files"]) == list(published_files(run))
    assert len(hub.received) == len(set(hub.received))  # nothing was sent twice
    assert not leftovers(run.path) and not leftovers(run.path / "layer_2")
    assert there["private"] is True
    assert {"config.json", "README.md", "pretrained_saes.yaml", "layer_2/cfg.json", "layer_2/sparsity.safetensors"} <= set(
        there["files"]
    )
    assert not [n for n in there["files"] if "state" in n or "secret" in n or "notes" in n or "hidden" in n or "tmp" in n]
    assert TOKEN not in again.stdout + again.stderr

    commits, received = len(there["commits"]), len(hub.received)
    third = publish(hub, tmp_path, "--runs", run.path, "--to", "org")
    assert f"0 of {len(there['files'])} files sent, the others were there" in third.stdout
    assert (len(there["commits"]), len(hub.received)) == (commits, received)


SILENT = """
import sys, time
import residual_saes.shared.hub as hub
from residual_saes.eval.__main__ import main
from residual_saes.shared.cli import run

hub._NO_ANSWER = 0.5
wait = time.sleep
time.sleep = lambda seconds: wait(seconds / 100)
run(main)
"""


@pytest.mark.slow
def test_a_silent_server_is_not_waited_for_for_ever(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.hang_after = 0
    command = [sys.executable, "-c", SILENT, "publish", "--runs", str(run.path), "--to", "org"]
    done = subprocess.run(command, cwd=ROOT, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    waits, failed = done.stderr.splitlines()[-2:]
    assert waits.startswith(f"note: the repository org/{run.name}: ") and "waiting, and asking again" in waits
    assert failed.startswith(f"error: cannot publish org/{run.name}: ") and failed.endswith(
        "run the same command again to continue"
    )


@pytest.mark.slow
def test_others_get_no_path_of_this_machine_and_open_the_run_as_here(hub: Hub, run: Run, tmp_path: Path) -> None:
    assert publish(hub, tmp_path, "--runs", run.path, "--to", "org").returncode == 0
    got, files = Run(tmp_path / "got" / run.name), hub.repositories[f"org/{run.name}"]["files"]
    for name, content in files.items():
        (got.path / name).parent.mkdir(parents=True, exist_ok=True)
        (got.path / name).write_bytes(content)
    spec = run.config.stored["cache"]["spec"]
    for key in ("model", "dataset"):
        assert os.path.isabs(spec[key]) and spec[key].encode() in run.config_path.read_bytes()
        assert not [name for name, content in files.items() if os.path.dirname(spec[key]).encode() in content]
        assert got.config.stored["cache"]["spec"][key] == os.path.basename(spec[key])
    assert got.config.stored["digest"] == run.config.stored["digest"]
    assert len(got.snapshots()) == len(run.snapshots()) == 18
    for theirs, ours in zip(got.snapshots(), run.snapshots(), strict=True):
        sae = Sae.load(theirs.path, belongs=got.belongs(theirs.site, theirs.label))
        assert all(torch.equal(tensor, Sae.load(ours.path).tensors()[name]) for name, tensor in sae.tensors().items())
        assert measured_features(got, theirs.site, theirs.label, Sae.checksum(theirs.path)) is not None
    published, own = ([dataclasses.replace(r, file="") for r in stored_results(each)] for each in (got, run))
    assert published == own
    source = json.loads(files["layer_1/cfg.json"])["metadata"]["source"]
    assert source["sha256"] == hashlib.sha256(files["sae_layer01_final.pt"]).hexdigest()


@pytest.mark.parametrize(
    "name", ["plots/x.png", "sae_layer00_final.pt", "config.json", "results", "layer_1/cfg.json", "README.md"]
)
def test_nothing_is_read_or_sent_through_a_link(cli: Cli, run: Run, tmp_path: Path, name: str) -> None:
    args = ("eval", "publish", "--runs", run.path, "--to", "org", "--dry-run")
    assert cli(*args).code == 0
    elsewhere, link = tmp_path / "elsewhere", run.path / name
    if link.exists():
        link.rename(elsewhere)
    else:
        elsewhere.write_bytes(b"a private key")
    link.symlink_to(elsewhere)
    result = cli(*args)
    assert result.code == 2 and result.err.splitlines()[-1].startswith(f"error: {link} is a link")
    assert not result.out


def test_what_is_damaged_is_not_sent(cli: Cli, run: Run) -> None:
    assert cli("eval", "match", run.path, "--device", "cpu").code == 0
    args = ("eval", "publish", "--runs", run.path, "--to", "org", "--dry-run")
    assert cli(*args).code == 0
    for name, at in (
        ("sae_layer00_10240.pt", -9000), ("metrics/layer01.jsonl", 30), ("plots/4_snapshots.png", 5000),
        ("plots/7_capacity.svg", -900), ("config.json", -15),
        ("results/metrics.json", 60), ("results/match_final.json", 60), ("results/features/layer02_final.safetensors", -1),
    ):  # fmt: skip
        path = run.path / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        result = cli(*args)
        assert result.code == 2 and path.name in result.err.splitlines()[-1] and not result.out, name
        path.write_bytes(whole)
    curve = run.path / "metrics" / "layer01.jsonl"
    whole = curve.read_bytes()
    curve.write_bytes(whole[:-9])
    assert f"{curve} ends in half a line" in cli(*args).err
    curve.write_bytes(whole.rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n")
    assert "note: the training curve of layer 1 of" in (err := cli(*args).err) and "ends at 20,224 of 20,480 tokens" in err
    curve.unlink()
    assert "is gone; nothing but training" in cli(*args).err
    curve.write_bytes(whole)
    table = run.path / "results" / "metrics.csv"
    right = table.read_text()
    table.write_text(right.replace("1", "2"))
    assert cli(*args).code == 0 and table.read_text() == right
    path = run.path / "layer_1" / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    result = cli(*args)
    assert result.code == 0 and f"{path} is missing or damaged: it is made again" in result.err
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_licences_are_looked_at_before_anything_is_sent(cli: Cli, hub: Hub, run: Run, tmp_path: Path) -> None:
    offline = cli("eval", "publish", "--runs", run.path, "--to", "org", "--license", "MIT", "--dry-run")
    assert offline.code == 2 and "'MIT' is no licence that is known here, and the hub cannot be asked: write mit" in offline.err
    hub.licenses = {"mit", "brand-new-2.0"}
    for name, more in (("Apache 2.0", ("--dry-run",)), ("Apache 2.0", ())):
        refused = publish(hub, tmp_path, "--runs", run.path, "--to", "org", "--license", name, *more)
        assert refused.returncode == 2 and "no licence that the hub knows: write apache-2.0" in refused.stderr
    late = publish(hub, tmp_path, "--runs", run.path, "--to", "org", "--license", "gpl-3.0")  # which this hub does not know
    assert late.returncode == 2 and '"license" must be one of' in late.stderr
    assert not hub.repositories and not hub.received
    assert publish(hub, tmp_path, "--runs", run.path, "--to", "org", "--license", "brand-new-2.0", "--dry-run").returncode == 0


@pytest.mark.slow
def test_what_the_card_says_about_loading_is_so(hub: Hub, run: Run, lm: Path, tmp_path: Path) -> None:
    sent = publish(hub, tmp_path, "--runs", run.path, "--to", "org", "--public")
    assert sent.returncode == 0, sent.stderr
    assert hub.repositories[f"org/{run.name}"]["private"] is False
    saelens, plain = blocks((run.path / "README.md").read_text(encoding="utf-8"))
    (tmp_path / lm.name).symlink_to(lm)  # a model that was in a folder is named by the folder's name
    program = plain + "\ntorch.save({'x': x, 'z': z, 'xhat': decode(z)}, 'out.pt')\n"
    where = {"cwd": tmp_path, "env": environment(hub, tmp_path), "capture_output": True, "text": True, "timeout": 240}
    ran: Any = subprocess.run([sys.executable, "-c", program], **where)  # type: ignore[call-overload]
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("active features of each token: [[")
    out = torch.load(tmp_path / "out.pt")
    sae = Sae.load(run.snapshot_path(Site(1), "final"))
    torch.testing.assert_close(out["z"], sae.encode(out["x"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["xhat"], sae.decode(out["z"]), rtol=1e-5, atol=1e-5)
    assert 0 < float((out["z"] > 0).float().mean()) < 1

    python = ENVIRONMENTS / "sae_lens" / "bin" / "python"
    if not (python.parent.parent / "stamp.json").exists():
        pytest.skip("sae_lens is not installed in build/peers; the plain loading code was run")
    program = saelens + "\nimport torch\ntorch.save(sae.encode(torch.load('out.pt')['x']), 'z.pt')\n"
    ran = subprocess.run([str(python), "-c", program], **where)  # type: ignore[call-overload]
    assert ran.returncode == 0, ran.stderr
    torch.testing.assert_close(torch.load(tmp_path / "z.pt"), out["z"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_refusals_are_one_line_without_the_token(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.refuse = 403
    result = publish(hub, tmp_path, "--runs", run.path, "--to", "org")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot publish org/{run.name}: ") and "run the same command again" in last
    assert TOKEN not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.eval.publish.upload.HfApi", None)
    result = cli("eval", "publish", "--runs", run.path, "--to", "org/other-name", "--dry-run", "--license", "mit")
    assert result.code == 0, result.err
    head, *listed = result.out.splitlines()
    files = published_files(run)
    assert head.startswith(f"org/other-name: {len(files)} files, ")
    assert [line.split()[-1] for line in listed] == list(files)
    assert listed[0].split()[-1] == "sae_layer00_10240.pt" and listed[-1].split()[-1] == "README.md"
    readme = (run.path / "README.md").read_text(encoding="utf-8")
    assert 'REPO, LAYER = "org/other-name", 1' in readme
    assert front_matter(readme)["license"] == "mit"
    other = shutil.copytree(run.path, run.path.parent.parent / "more" / run.path.name)
    both = cli("eval", "publish", "--runs", run.path, "--runs", other, "--to", "org", "--dry-run")
    assert both.code == 0, both.err
    assert re.fullmatch(r"2 repositories, [0-9.]+ \wB in all; nothing was sent", both.out.splitlines()[-1])


def test_what_can_not_be_published(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("residual_saes.eval.publish.upload.get_token", lambda: None)
    both, one = ("--runs", run.path.parent), ("--runs", run.path)
    for args, message in (
        ((*both, "--to", "org/name"), "2 runs cannot share the repository org/name"),
        ((*one, "--to", "org"), "log in with `hf auth login`, or set HF_TOKEN"),
        ((*one, "--to", "a/b/c"), "'a/b/c' is no name on the hub"),
        ((*one, "--to", "a b"), "'a b' is no name on the hub"),
        ((*one, "--to", "org/"), "'org/' is no name on the hub"),
        (("--runs", run.path / "plots", "--to", "org"), "no runs in"),
    ):
        result = cli("eval", "publish", *args)
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert message in result.err
    shutil.rmtree(run.path / "results")
    assert "has not been evaluated" in cli("eval", "publish", *one, "--to", "org", "--dry-run").err
    for path in run.path.glob("*final.pt"):
        path.unlink()
    assert "no finished layer to publish" in cli("eval", "publish", *one, "--to", "org", "--dry-run").err


def test_what_a_kill_left_half_made_is_removed(cli: Cli, run: Run) -> None:
    half = temporary(run.path / "layer_1", folder=True)
    _release(half)
    (half / "sae_weights.safetensors").write_bytes(b"half")
    assert cli("eval", "publish", "--runs", run.path, "--to", "org", "--dry-run").code == 0
    assert not half.exists()
    assert (run.path / "layer_1" / "sae_weights.safetensors").exists()


def test_layer_folders_follow_the_checkpoints(cli: Cli, run: Run) -> None:
    """What we made of an earlier measurement gives way; what somebody else put there does not."""
    args = ("eval", "publish", "--runs", run.path, "--to", "org", "--dry-run")
    assert cli(*args).code == 0
    path = run.path / "layer_1" / "cfg.json"
    whole = path.read_bytes()
    made = json.loads(whole)
    assert made["metadata"]["source"]["density_tokens"] == 512
    made["metadata"]["source"]["density_tokens"] = 3
    path.write_text(json.dumps(made))
    assert cli(*args).code == 0
    assert path.read_bytes() == whole
    assert not [p for p in run.path.iterdir() if p.name.startswith(".layer")]
    path.write_text('{"mine": 1}')
    result = cli(*args)
    assert result.code == 2 and "holds something else already" in result.err
    assert path.read_text() == '{"mine": 1}'


# --- the card ---


def family(name: str, folder: Path) -> Path:
    """A tiny language model of a family; Llama's tokeniser puts a BOS in front unless told not to."""
    shape = {"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 1, "vocab_size": 400, "intermediate_size": 8}
    shape |= {"bos_token_id": 1, "eos_token_id": 0, "rotary_pct": 1.0, "rms_norm_eps": 1e-6, "pad_token_id": 0}
    shape |= {"head_dim": 4, "num_key_value_heads": 1, "rotary_dim": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**shape)).save_pretrained(folder)
    letters = {letter: 2 + i for i, letter in enumerate("Tacehmnost.")}
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "<s>": 1, **letters}, merges=[]))
    if name == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


SITES = [Site(1), Site(1, "mlp_in"), Site(1, "attn_out")]
FAMILIES = [(name, bos, site) for name in ("gpt_neox", "gpt2", "llama") for bos in (False, True) for site in SITES]
FAMILIES += [(name, False, Site(1)) for name in ("bloom", "gemma2", "gptj", "mamba", "mistral", "olmo2", "phi", "qwen3")]


@pytest.mark.parametrize(("name", "bos", "site"), FAMILIES)
def test_the_cards_code_runs_for_every_family(
    name: str, bos: bool, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And gives the SAE what it was trained on: the activations of its site, with a BOS in front or without."""
    results = make_runs(tmp_path / "runs", layers=3)
    made_up = Run(tmp_path / "runs" / "pythia-410m-saes-x32-l1-3e-4-fixed")
    config, run = copy.deepcopy(made_up.config.stored), Run(tmp_path / "runs" / "another")
    config["cache"]["spec"] |= {"model": str(family(name, tmp_path / name)), "model_commit": "", "bos": bos}
    run.path.mkdir()
    run.create(run_config(config["train"], config["cache"]), config["machine"])
    monkeypatch.chdir(tmp_path)
    made_up.snapshot_path(Site(1), "final").rename(made_up.snapshot_path(site, "final"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _repo, file: made_up.path / file)
    measured = [replace(r, site=replace(r.site, hook=site.hook)) for r in results[made_up.name]]
    saelens, plain = blocks(card(run, measured, None, [], Publication(owner="org")))
    assert f'"layer_{site}"' in saelens
    names: dict[str, Any] = {}
    exec(plain, names)
    text = [1] * bos + AutoTokenizer.from_pretrained(name)("The cat sat on the mat.", add_special_tokens=False)["input_ids"]
    taken: list[Any] = []
    base = AutoModel.from_pretrained(name)
    hook_of(base, site).take(taken.append)
    base(input_ids=torch.tensor([text]))
    torch.testing.assert_close(names["x"], first(taken[0]))
    lm = AutoModelForCausalLM.from_pretrained(name)
    module, _, side = str(module_name(known_model(str(tmp_path / name), None), site)).rpartition(".")
    assert (lm.get_submodule(module), side) == hook_of(lm.base_model, site)
    assert capsys.readouterr().out.count(",") == len(text) - 1


def test_the_card_of_an_unfinished_run(tmp_path: Path) -> None:
    results = make_runs(tmp_path, layers=3)
    run = Run(tmp_path / "pythia-410m-saes-x32-l1-adaptive")
    text = card(run, results[run.name], None, sister_runs(run), Publication(owner="org"))
    about = front_matter(text)
    assert (about["base_model"], about["datasets"]) == ("EleutherAI/pythia-410m", ["monology/pile-uncopyrighted"])
    assert about["library_name"] == "saelens"
    glance = text.partition("## Loading")[0]
    first = next(r for r in results[run.name] if r.final)
    assert f"| {first.l0:.1f} | {first.fvu:.4f} | {first.ce_recovered:.4f} |" in glance
    assert "| blocks.1.hook\\_resid\\_post |" in glance and "| 1,024 | 32,768 | 0-2 |" in glance
    finished, unfinished = text.split("Layers that are **not finished**")
    assert [
        line.split(" | ")[0] for line in finished.split("## Metrics")[1].splitlines() if line[:3] in ("| 0", "| 1", "| 2")
    ] == [
        "| 0",
        "| 1",
    ]
    assert "| 150M of 300M, unfinished |" in unfinished
    assert "Measured floors: not measured." in text
    assert "; `_50M`, `_100M`, `_150M`, `_200M`, `_250M` are snapshots of its training |" in text
    assert f"it and KL on {results[run.name][0].ce_tokens:,} tokens" in text
    assert "[pythia-410m-saes-x32-l1-8e-5-fixed](https://huggingface.co/org/pythia-410m-saes-x32-l1-8e-5-fixed)" in text
    make_distilled(tmp_path, results)
    measured = card(run, results[run.name], measured_floors(tmp_path, run.config.stored["cache"]["digest"]), [], Publication())
    assert "not measured" not in measured and measured.index("Measured, by distilling") < measured.index("R² left out")
    fits = [line.split(" | ")[0] for line in measured.partition("R² left out")[2].partition("## Training")[0].splitlines()[2:]]
    assert [fit for fit in fits if fit] == ["| 0", "| 1", "| 2"]  # of this run alone
    assert "huggingface.co" not in card(run, results[run.name], None, sister_runs(run), Publication(owner="a", name="b"))

    entry = yaml.safe_load(registry_entry(run, results[run.name], Publication(owner="org")))[run.name]
    assert (entry["repo_id"], entry["model"], entry["conversion_func"]) == (f"org/{run.name}", "EleutherAI/pythia-410m", None)
    assert [(s["id"], s["path"]) for s in entry["saes"]] == [
        ("blocks.0.hook_resid_post", "layer_0"),
        ("blocks.1.hook_resid_post", "layer_1"),
    ]
    final = [r for r in results[run.name] if r.final]
    assert [s["l0"] for s in entry["saes"]] == pytest.approx([r.l0 for r in final], rel=1e-4)


HELD = {"refit": 0.2, "refit_kind": "topk"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"l1": {"k": 12}}, "BatchTopK, the 12 largest activations a token"),
        (HELD, r"λ = 0.0003, then L0 held by keeping the largest activations of each batch (last 20% of training)."),
        (HELD | {"refit": 0.0}, "λ = 0.0003."),
    ],
    ids=["batchtopk", "refit that holds L0", "no refit"],
)
def test_the_card_applies_the_thresholds_that_saes_have(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    """Of a run whose refit holds L0, earlier snapshots have none."""
    results = make_runs(tmp_path, layers=1)
    made_up = Run(tmp_path / "pythia-410m-saes-x32-l1-3e-4-fixed")
    config, run = made_up.config.stored, Run(tmp_path / "another")
    run.path.mkdir()
    run.create(run_config(config["train"] | changed, config["cache"]), config["machine"])
    text = card(run, results[made_up.name], None, [], Publication(owner="org"))
    assert f"setting: {words}" in text
    has = changed.get("refit") != 0.0
    assert ("0 where it is not above θ" in text) is has
    (encode,) = re.findall(r"def encode.*?\n\n", blocks(text)[1], re.DOTALL)
    d, features = 6, 10
    shapes = ((features, d), (features, d), (features,), (d,), (d,), (features,))
    w_enc, w_dec, b_enc, b_pre, b_dec, threshold = (torch.randn(*shape).abs() for shape in shapes)
    x = torch.randn(50, d)
    for each in [threshold, None] if has else [None]:
        sae = Sae(w_enc=w_enc, w_dec=w_dec, b_enc=b_enc, b_pre=b_pre, b_dec=b_dec, config={}, stats={}, threshold=each)
        sae.save(tmp_path / "a.pt")
        names: dict[str, Any] = {"torch": torch, "w": torch.load(tmp_path / "a.pt", weights_only=True)["model_state"]}
        exec(encode, names)
        z = names["encode"](x)
        torch.testing.assert_close(z, Sae.load(tmp_path / "a.pt").encode(x))
        cut = int(((x - b_pre) @ w_enc.T + b_enc > 0).sum()) - int((z > 0).sum())
        assert cut > 0 if each is not None else cut == 0


HOSTILE = [
    "a|b `c` *d* [e](f) <script>g</script>",
    "x: y # z\n- list\n---\n",
    '"quoted" \\ back',
    "```\nend of code\n```",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028\x85\x7f ünïcode 🙂",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_whatever_they_are(tmp_path: Path, name: str) -> None:
    results = make_runs(tmp_path, layers=1, model=name)
    run = Run(tmp_path / "pythia-410m-saes-x32-l1-3e-4-fixed")
    records = results[run.name]
    plain = card(run, records, None, [], Publication(owner="org"))
    about = front_matter(plain)
    assert about["base_model"] == name
    assert set(about) == {"library_name", "license", "base_model", "datasets", "tags"}
    _, code = blocks(plain)
    assert eval(code.split("MODEL, REVISION = ")[1].split("\n")[0])[0] == name
    row = next(line for line in plain.splitlines() if line.startswith("| language model |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script>" not in plain.split("```")[-1]
    assert "49" not in row
    entry = yaml.safe_load(registry_entry(run, records, Publication(owner="org")))
    assert entry[run.name]["model"] == name


def test_repository_names() -> None:
    assert repository_name("pythia-410m-saes-x32-l1-3e-4-fixed") == "pythia-410m-saes-x32-l1-3e-4-fixed"
    assert repository_name("a b/c..d--é.") == "a-b-c.d"
    assert repository_name("🙂") == "saes"
    assert len(repository_name("x" * 200)) == 96


def test_a_card_that_is_somebodys_own_stays(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    records, path = stored_results(run), run.path / "README.md"
    assert MARKER in path.read_text(encoding="utf-8")
    path.write_text("# mine")
    write_card(run, records, None, [])
    assert path.read_text() == "# mine"
    assert "is your own and stays as it is" in capsys.readouterr().err


def test_made_up_runs_have_the_form_of_real_ones(run: Run, tmp_path: Path) -> None:
    """What tests of pictures and reports rest on."""
    results = make_runs(tmp_path / "made-up", layers=1)
    made_up = Run(next((tmp_path / "made-up").iterdir()))

    def names(result: Result) -> set[str]:
        return {name for name in result.to_dict() if not name.startswith("floor_")}

    assert names(results[made_up.name][0]) == names(stored_results(run)[0])
    assert made_up.config.stored.keys() == run.config.stored.keys()
    assert made_up.config.stored["train"].keys() == run.config.stored["train"].keys()
    assert curve_of(made_up, Site(0))[0].keys() <= curve_of(run, Site(0))[0].keys()

"""The net under every refactoring: the digests, names, bytes and command lines that existing caches, runs and scripts rely on.

Everything is made through the command lines, so that nothing behind them is pinned. tests/net.json holds the longer literals.
Bytes depend on the processor, the compiler and torch: they are compared where the machine is of a class whose hashes are
recorded. Losses and weights are compared everywhere, to tolerances. `RECORD=1 pytest tests/test_net.py` records a new class;
do that at a commit that is known to be right.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from tests.conftest import COMMANDS, invoke

DATA = Path(__file__).with_name("net.json")
NET: dict[str, Any] = json.loads(DATA.read_text())
DEMO = ("--preset", "demo", "--device", "cpu")
SHAPE = ("--layers", "1,4", "--context", 64, "--block-sequences", 4, "--tokens", 5_120, "--holdout-tokens", 512)
TRAIN = ("--batch", 256, "--lr", 3e-3, "--expansion", 2, "--window-blocks", 4, "--layers", 1, "--lr-warmup", 0)
KINDS = "3e-2,adaptive:2e-2@32,batchtopk:16"
VARIANTS: dict[str, tuple[object, ...]] = {
    "published": ("--l1", KINDS),
    "best": ("--l1", "3e-2,adaptive:2e-2@32", "--recipe", "best"),
    "held": ("--l1", "batchtopk:16", "--decoder-norm", "free", "--hold-l0", 0.2),
    "random": ("--l1", "3e-2", "--decoder", "random"),
    "rows": ("--l1", "3e-2", "--skip-positions", 2, "--max-norm", 1.5),
}
PRECISIONS = ("bf16", "fp32")  # in bfloat16 the compiled kernels where there are any, in float32 torch's
CURVE = {"loss": 1e-4, "mse": 1e-4, "l0": 1e-3, "lambda": 1e-4}  # relative tolerances; L0 counts what is just above 0

# --- file names: {a,b} is each of them, {0..2} each number, and the checksum in the name of a page's folder is # ---

CACHE_FILES = """
cache.json
activations.zarr/{zarr.json,resid_post/zarr.json,tokens/zarr.json,tokens/c.{0..1}.0}
activations.zarr/resid_post/{01,04}/{zarr.json,c.{0..21}.0}
ledger/1,4/{00000000..00000021}.json
ledger/tokens/{00000000..00000001}.json
"""
RUN = "neox-2m-saes-x2-l1-3e-2-fixed"
TRAINED_FILES = f"""
{RUN}/{{config.json,metrics/layer01.jsonl,sae_layer01_{{853,1706,2560,3413,4266,final}}.pt}}
"""
PLOTS = (
    "1_training_curves,2_metrics_heatmap,3_sparsity_fidelity,4_snapshots,5_feature_density,6_feature_importance,"
    "7_capacity,8_loss_floor_predictions"
)
EVALUATED_FILES = f"""
{{report.html,floors.html,distilled.json}}
{RUN}/{{README.md,pretrained_saes.yaml,results/metrics.json,results/metrics.csv}}
{RUN}/results/features/layer01_{{853,1706,2560,3413,4266,final}}.safetensors
{RUN}/plots/{{{PLOTS}}}.{{png,svg}}
{RUN}/layer_1/{{cfg.json,sae_weights.safetensors,sparsity.safetensors}}
pages/{{index.html,notes.js,text.#/000.js,text.#/facts.json,text.#/vocabulary.js}}
pages/{RUN}/layer01_final.#/{{{{000..003}}.js,columns.safetensors,facts.json,index.js}}
"""
EXPORTED_FILES = f"""
saelens/{RUN}/layer_1/{{cfg.json,sae_weights.safetensors,sparsity.safetensors}}
sparsify/{RUN}/layer_1/{{cfg.json,sae.safetensors}}
dictionary_learning/{RUN}/layer_1/{{config.json,ae.pt}}
"""

# --- command lines: a flag has no "="; else "=default", [choices], ! must be given, * may be given more than once ---

COMMAND_LINES = """
harvest run: --preset= --cache= --threads=4 --model= --revision= --dataset= --dataset-revision= --split=
  --text-column= --tokens= --holdout-tokens= --context= --block-sequences= --forward-sequences= --bos --separator= --layers=
  --sites= --precision=bf16[bf16|fp32] --store=float16[float16|int8] --seed=0 --device= --shard=0/1
harvest plan: --preset= --cache= --threads=4 --model= --revision= --dataset= --dataset-revision= --split=
  --text-column= --tokens= --holdout-tokens= --context= --block-sequences= --forward-sequences= --bos --separator= --layers=
  --sites= --precision=bf16[bf16|fp32] --store=float16[float16|int8] --seed=0 --json
harvest synthetic: --preset= --cache= --d-model= --tokens= --holdout-tokens= --context= --block-sequences= --worlds=1 --layers=
  --features= --zipf= --most-frequent= --least-frequent= --roots= --branching= --depth= --exclusive= --rank= --correlation=
  --magnitude= --last-magnitude= --spread= --spread-spread= --bias= --seed=0
  --store=float16[float16|int8] --threads=4 --shard=0/1
harvest import: --from=! --cache= --layers= --as= --tensor= --context= --holdout-tokens= --block-sequences=
  --store=float16[float16|int8] --seed=0 --threads=4 --shard=0/1
harvest convert: --preset= --cache= --out=! --store=int8[float16|int8] --layers= --move --threads=4
harvest verify: --preset= --cache= --threads=4
harvest repair: --preset= --cache= --threads=4 --device= --blocks= --model= --revision= --dataset=
harvest free: --preset= --cache= --threads=4 --layers=! --yes
train: --preset= --cache= --scratch= --runs=runs --l1= --layers= --expansion= --tokens= --epochs=1
  --l1-reduction=sum[sum|mean] --batch= --lr= --lr-warmup= --recipe=published[published|decay|best] --decoder-norm=[unit|free]
  --lr-decay= --hold-l0= --revive --target= --skip --window-blocks= --skip-positions=0 --max-norm=
  --precision=bf16[bf16|fp32] --sparse-below= --decoder=trained[trained|random] --seed=0 --device= --threads=16
  --save-minutes=5.0 --shard=0/1 --follow --list --tensorboard --verbose
eval run: --preset= --cache= --runs=runs --eval-tokens= --ce-tokens= --model= --dead-at=1e-05 --alive-above=1e-05
  --ablation=zero[zero|mean] --snapshots=all[all|final] --saes= --from=[saelens|sparsify|dictionary_learning] --layers=
  --numbers-only --device=
eval truth: --preset= --cache= --runs=runs --eval-tokens= --snapshots=all[all|final] --device=
eval export: --to=[saelens|sparsify|dictionary_learning|circuit-tracer]! --runs=runs* --layers= --snapshot=final --out=!
  --model=
eval pages: --preset= --cache= --runs=runs --layers= --snapshot=final --tokens= --out= --model= --device=
eval ask: --runs=runs --text=! --layers= --out= --model= --device=
eval probes: --preset= --cache= --runs=runs --data=! --sets= --k=1,2,5,16,all --layers= --model= --device=
eval publish: --runs=runs* --to=! --public --license=apache-2.0 --dry-run
eval floor: --statistics=! --widths=128,256,384,512,768,1024
eval distill: --preset= --cache= --runs=runs --widths= --seeds=3 --tokens= --batch=32 --lr=0.002 --eval-tokens=
  --model= --alive-above=1e-05 --device= --save-minutes=5.0
eval match: RUN_FOLDER OTHER? --alive-above=1e-05 --device=
fleet job: --disk=! --preset= --cache= --runs=runs --l1= --layers= --expansion= --device= --harvest= --train=
  --eval= --ray= --workers=1 --cpus=1 --gpus=1.0
fleet harvest: --preset= --cache= --runs=runs --l1= --layers= --expansion= --device= --harvest= --train= --eval=
  --ray=auto --workers=1 --cpus=1 --gpus=1.0
fleet train: --preset= --cache= --runs=runs --l1= --layers= --expansion= --device= --harvest= --train= --eval=
  --ray=auto --workers=1 --cpus=1 --gpus=1.0
fleet plan: --disk=! --preset= --cache= --runs=runs --l1= --layers= --expansion= --device= --harvest= --train=
  --eval=
"""


def expanded(pattern: str) -> Iterator[str]:
    """Every name that a pattern stands for, the innermost braces first."""
    if (brace := re.search(r"\{([^{}]*)\}", pattern)) is None:
        yield pattern
        return
    choices = brace[1].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        choices = [f"{i:0{len(ends[1])}d}" for i in range(int(ends[1]), int(ends[2]) + 1)]
    for choice in choices:
        yield from expanded(pattern[: brace.start()] + choice + pattern[brace.end() :])


def names(patterns: str) -> list[str]:
    return sorted({name for line in patterns.split() for name in expanded(line)})


def files(folder: Path) -> list[str]:
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"\.[0-9a-f]{8}/", ".#/", path) for path in paths)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """cache/, and <precision>/<variant>/<run>/ for every kind of SAE after 20 steps."""
    root, threads = tmp_path_factory.mktemp("net"), torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on their number
    # a forward pass in float32: rounded to float16, activations differ between processors in next to nothing
    assert invoke("harvest", *DEMO, *SHAPE, "--precision", "fp32", "--cache", root / "cache") == 0
    for precision, (variant, options) in itertools.product(PRECISIONS, VARIANTS.items()):
        where = ("--cache", root / "cache", "--runs", root / precision / variant, "--precision", precision)
        assert invoke("train", *DEMO, *TRAIN, *where, *options) == 0
    yield root
    torch.set_num_threads(threads)


def runs(house: Path, precision: str) -> dict[str, Path]:
    return {f"{path.parent.name}/{path.name}": path for path in sorted((house / precision).glob("*/*"))}


def final(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "sae_layer01_final.pt", map_location="cpu", weights_only=True)
    return content


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_digest_of_a_cache(house: Path) -> None:
    """The digest is of the specification without the places of model and text."""
    content = json.loads((house / "cache" / "cache.json").read_bytes())
    advice = ("model", "model_branch", "model_commit", "dataset")
    assert {k: v for k, v in content["spec"].items() if k not in advice} == NET["cache"]["spec"]
    assert content["digest"] == digest({"format": 2, **NET["cache"]["spec"]}) == NET["cache"]["digest"]
    tokens = b"".join(path.read_bytes() for path in sorted((house / "cache/activations.zarr/tokens").glob("c.*")))
    assert hashlib.sha256(tokens).hexdigest() == NET["cache"]["tokens"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_digests_of_runs(house: Path, precision: str) -> None:
    """The digest is of config.json's `train` and the cache's digest; a checkpoint repeats all of config.json."""
    assert list(runs(house, precision)) == list(NET["runs"])
    for name, run in runs(house, precision).items():
        config, train = json.loads((run / "config.json").read_bytes()), NET["train"] | NET["runs"][name]["train"]
        train["step"] = NET["train"]["step"] | {"precision": precision} | NET["runs"][name]["train"].get("step", {})
        assert config["train"] == train, name
        assert config["digest"] == digest({"train": train, "cache": NET["cache"]["digest"]})
        assert config["digest"] == NET["runs"][name]["digest"][precision]
        assert set(config) == {"format", "digest", "train", "cache", "machine", "checksum"}
        checkpoint = final(run)
        place, own = config["cache"].pop("place"), {"layer": 1, "snapshot": "final"}
        assert (run / place).resolve() == house / "cache"  # which a checkpoint, that may go anywhere, does not repeat
        assert checkpoint["config"] == {k: v for k, v in config.items() if k != "checksum"} | own
        assert sorted(checkpoint["stats"]) == NET["stats"]


def test_file_names_of_a_cache_and_a_run(house: Path) -> None:
    assert files(house / "cache") == names(CACHE_FILES)
    assert files(house / "fp32" / "rows") == names(TRAINED_FILES)


def test_file_names_of_what_is_made_of_runs(house: Path, tmp_path: Path) -> None:
    where = ("--runs", tmp_path / "runs")
    cached = (*DEMO, "--cache", house / "cache", *where)
    shutil.copytree(house / "fp32" / "rows", tmp_path / "runs")
    assert invoke("eval", *cached, "--ce-tokens", 128) == 0
    assert invoke("eval", "pages", *cached) == 0
    assert invoke("eval", "distill", *cached, "--widths", 32, "--seeds", 1, "--tokens", 2_048) == 0
    assert invoke("eval", "publish", *where, "--to", "somebody", "--dry-run") == 0
    for form in ("saelens", "sparsify", "dictionary_learning"):
        assert invoke("eval", "export", *where, "--to", form, "--out", tmp_path / "out" / form) == 0
    assert files(tmp_path / "runs") == names(TRAINED_FILES + EVALUATED_FILES)
    assert files(tmp_path / "out") == names(EXPORTED_FILES)


# --- bytes ---


def hashes(house: Path) -> dict[str, str]:
    """Hashes of the activations, and of each run's weights as they lie in the checkpoint."""
    chunks = sorted((house / "cache/activations.zarr/resid_post").glob("*/c.*"))
    found = {"cache": hashlib.sha256(b"".join(path.read_bytes() for path in chunks)).hexdigest()}
    for precision in PRECISIONS:
        for name, run in runs(house, precision).items():
            state = final(run)["model_state"]
            content = b"".join(f"{k} {tuple(v.shape)} {v.dtype}\n".encode() + v.numpy().tobytes() for k, v in state.items())
            found[f"{precision}/{name}"] = hashlib.sha256(content).hexdigest()
    return {name: value[:16] for name, value in found.items()}


def machine() -> str:
    """The class of machine: all that bytes depend on."""
    info = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"(?m)^(\w[\w ]*?)\s*: (.*)$", info.read_text(errors="replace"))) if info.exists() else {}
    cpu = ", ".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping"))
    compiler = shutil.which("cc")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else "none"
    flags = digest([facts.get("flags"), torch.__config__.show()])[:8]
    return f"{platform.machine()} {cpu}; torch {torch.__version__}; {version.splitlines()[0]}; {flags}"


def test_bytes_after_20_steps(house: Path) -> None:
    """Activations and SAEs of every kind are what they were on this class of machine, to the last bit."""
    known, found = NET["bytes"].get(machine()), hashes(house)
    if known is None and os.environ.get("RECORD"):
        NET["bytes"][machine()] = found
        DATA.write_text(json.dumps(NET, indent=1) + "\n")
    elif known is None:
        pytest.skip(f"no bytes are recorded of a machine such as this one: {machine()}")
    else:
        assert found == known


def curve(run: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (run / "metrics/layer01.jsonl").read_bytes().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21))
    return {key: [record[key] for record in records] for key in CURVE}


def projections(run: Path) -> dict[str, list[float]]:
    """Each tensor's norm, and its product with the cosine of its indices, which a permutation or a sign changes."""
    flat = {name: tensor.double().flatten() for name, tensor in final(run)["model_state"].items()}
    return {name: [float(x.norm()), float(x @ torch.arange(len(x)).double().cos())] for name, x in flat.items()}


def numbers(text: str) -> list[float]:
    return list(map(float, text.split()))


@pytest.mark.parametrize("name", NET["runs"])
def test_losses_and_weights_on_any_machine(house: Path, name: str) -> None:
    """In float32, whose last bits 20 steps do not carry far, but where they decide which of two activations a batch keeps;
    bfloat16 is held to the same losses, less closely."""
    run, pinned = house / "fp32" / name, NET["runs"][name]
    loose = 20 if "batchtopk" in name else 1
    for key, values in curve(run).items():
        rel = CURVE[key] * (loose if key in ("loss", "mse") else 1)  # how many are kept does not change
        assert values == pytest.approx(numbers(pinned["curve"][key]), rel=rel), key
    found = projections(run)
    assert list(found) == list(pinned["weights"])
    for key, (norm, projection) in zip(found, map(numbers, pinned["weights"].values()), strict=True):
        near = [pytest.approx(norm, rel=loose * 1e-4, abs=1e-7), pytest.approx(projection, abs=loose * 1e-3 * norm + 1e-7)]
        assert found[key] == near, key
    assert curve(house / "bf16" / name)["loss"] == pytest.approx(numbers(pinned["curve"]["loss"]), rel=0.02)


# --- command lines ---


def described(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return f"{parameter.human_readable_name}{'' if parameter.required else '?'}"
    assert isinstance(parameter, click.Option)
    if parameter.is_flag:
        return parameter.opts[0]
    default = parameter.to_info_dict()["default"]
    default = "" if default is None else ",".join(map(str, default)) if parameter.multiple else str(default)
    choices = f"[{'|'.join(map(str, parameter.type.choices))}]" if isinstance(parameter.type, click.Choice) else ""
    return f"{parameter.opts[0]}={default}{choices}{'!' * parameter.required}{'*' * parameter.multiple}"


def command_lines(name: str, command: click.Command) -> dict[str, list[str]]:
    if isinstance(command, click.Group):
        return {k: v for sub, each in command.commands.items() for k, v in command_lines(f"{name} {sub}", each).items()}
    assert all(len(parameter.opts) == 1 and not parameter.secondary_opts for parameter in command.params)
    return {name: sorted(map(described, command.params))}


def test_command_lines() -> None:
    """Every option of every command, its default, and whether it must be given."""
    found = {k: v for name, command in COMMANDS.items() for k, v in command_lines(name, command).items()}
    pinned = dict(re.findall(r"(?m)^(\w[\w ]*):((?:.*\n  )*.*)$", COMMAND_LINES))
    assert found == {name: sorted(parameters.split()) for name, parameters in pinned.items()}

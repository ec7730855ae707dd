"""A language model small enough for tests, and a cache harvested from it through the command line."""

import gzip
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import residual_saes.eval.__main__
import residual_saes.fleet.__main__
import residual_saes.harvest.__main__
import residual_saes.train.__main__
from residual_saes.eval.measure.heldout import Activations, Block
from residual_saes.eval.measure.metrics import Measurement, measure
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import run
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.bucket import Server, serving

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "harvest": residual_saes.harvest.__main__.main,
    "train": residual_saes.train.__main__.main,
    "eval": residual_saes.eval.__main__.main,
    "fleet": residual_saes.fleet.__main__.main,
}

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without, and commands heed that
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no failure
hypothesis.settings.load_profile("any machine")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network shall fail at once
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # in processes started from here: tests beside each other share the cores


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Sums depend on how many threads share them, so no test may leave another number behind."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(kw_only=True, frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process as its own would be run: cli("train", "--l1", "3e-4")."""

    def call(command: str, *args: object) -> Result:
        capfd.readouterr()
        code = invoke(command, *args)
        out, err = capfd.readouterr()
        return Result(code=code, out=out, err=err)

    return call


def invoke(command: str, *args: object) -> int:
    clone: click.Command = COMMANDS[command]
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [command, *map(str, args)])
        run(clone)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def documents(n: int) -> list[str]:
    with gzip.open(ROOT / "demo" / "text.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, n)]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def make_text(path: Path) -> Path:
    """Real text, as jsonl with a column 'text'."""
    path.write_text("".join(json.dumps({"text": d, "n": len(d)}) + "\n" for d in documents(60)))
    return path


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("lm"))


def make_lm(path: Path) -> Path:
    """A GPT-NeoX of 3 layers x 32 with random weights and a byte-pair tokeniser of 400 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(60), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=400,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


SHAPE = ("--context", 32, "--block-sequences", 16, "--tokens", 20_480, "--holdout-tokens", 2_048, "--device", "cpu")


@pytest.fixture(scope="session")
def harvest_args(lm: Path, text: Path) -> tuple[object, ...]:
    """Everything that `rsae harvest` needs but the cache folder: 40 blocks to train on, 4 held out, 3 layers."""
    return ("--preset", "demo", "--model", lm, "--dataset", text, *SHAPE)


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory: pytest.TempPathFactory, harvest_args: tuple[object, ...]) -> Path:
    """A complete cache. Tests that change one copy it first."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    assert invoke("harvest", *harvest_args, "--cache", path) == 0
    return path


@pytest.fixture(scope="session")
def cache(cache_path: Path) -> Cache:
    return Cache.open(cache_path)


TRAIN_ARGS = ("--preset", "demo", "--batch", 256, "--expansion", 4, "--window-blocks", 4, "--device", "cpu", "--lr", 3e-3)


@pytest.fixture(scope="session")
def runs_path(tmp_path_factory: pytest.TempPathFactory, cache_path: Path) -> Path:
    """All three settings trained on every layer of the cache."""
    path = tmp_path_factory.mktemp("runs") / "runs"
    assert invoke("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", path, "--l1", "3e-3,8e-4,adaptive:5e-3@12") == 0
    return path


def curve_of(run: Run, site: Site) -> list[dict[str, object]]:
    """A training curve as its file has it."""
    return [point.values() for point in run.metrics(site)]


def measure_site(
    blocks: Iterable[Block | tuple[torch.Tensor, torch.Tensor]], saes: Sequence[Sae], context: int
) -> tuple[Activations, list[Measurement]]:
    """What is measured of SAEs that write one site: its activations, and of each SAE its sums."""
    (activations,), tallies = measure(blocks, saes, context)
    return activations, [tally for (tally,) in tallies]

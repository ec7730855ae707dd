"""What is lost when something goes wrong at the n-th file operation of a command, for every n: nothing must be.

A trial starts from a scenario's folder, runs its command with one fault, then runs the same command again with none. That must
end with exit code 0 and the bytes of a run that was never disturbed (`contents` says what of them counts). A disturbed run
that says 0 must have them at once.

Power cuts are the only faults that are not done to a running process (fault.c): the state that a cut leaves
follows from the log of the operations before it (disk.py), so one undisturbed run's log gives all of them. Equal states are
tried once.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open

from residual_saes.shared.seal import SEAL
from tests.conftest import ROOT, documents, make_lm
from tests.crash.disk import NEEDS_ROOM, WRITES, Disk, Operation, read_log, read_tree, write_tree

FAULTS = ("kill", "tear", "enospc", "eio", "brief", "short", "power-kept", "power-lost")
SCENARIOS = (
    "harvest",
    "layers",
    "repair",
    "free",
    "convert",
    "import",
    "train",
    "resume",
    "eval",
    "pictures",
    "pages",
    "distill",
    "distill-on",
    "export",
    "adopt",
)
_BLOCK = 256  # rows
_ENV = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1", "CRASH_ROOT": "", "PYTHONPATH": str(ROOT),
}  # fmt: skip

# --- what counts ---

# Differs from run to run and says nothing about what was made: how fast it was, where its cache lay, what tells one file from
# its like, and the checksum of a record that holds such things (that they are right is looked at by whoever reads them).
UNEQUAL = {"tokens_per_second", "wait_share", "file", "place", SEAL}


def contents(folder: Path) -> dict[str, Any]:
    """{what: its value} of everything finished in a folder: equal for two runs if nothing was lost in either.

    Blocks, tokens and Zarr's own files by their bytes; the ledger by block and layer, however its entries are put together;
    .pt files by their tensors, configuration and statistics; JSON and CSV without `UNEQUAL`; all else by its bytes. Resume
    states are left out: they are gone when the work is done.
    """
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if "/state/" not in name:
            try:
                found |= _values(name, path)
            except Exception as error:  # whatever a reader of damaged files raises: the file is not what it should be
                found[name] = f"unreadable: {type(error).__name__}"
    return found


def _values(name: str, path: Path) -> dict[str, Any]:
    if path.name.startswith(".") or path.suffix == ".tmp":
        return {name: "left over"}
    if path.suffix == ".pt":
        return {name: _plain(torch.load(path, weights_only=True))}
    if path.suffix == ".safetensors":  # its header lists facts in any order
        with safe_open(path, framework="pt") as opened:
            return {
                name: [_plain(dict(opened.metadata() or {})), *(_plain(opened.get_tensor(k)) for k in sorted(opened.keys()))]
            }
    if path.suffix == ".jsonl":
        return {name: [_plain(json.loads(line)) for line in path.read_text().splitlines()]}
    if path.suffix == ".csv":
        with path.open() as file:
            return {name: [_plain(row) for row in csv.DictReader(file)]}
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        if "/ledger/" in name and isinstance(value.get("layers"), dict):
            return {f"ledger of layer {n} block {value['block']}": _plain(stats) for n, stats in value["layers"].items()}
        return {name: _plain(value)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in UNEQUAL}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is lost, in a few words; "" if nothing is."""
    missing = [name for name in wanted if name not in there]
    other = [name for name in wanted if name in there and there[name] != wanted[name]]
    parts = [f"{len(names)} {how} ({names[0]}, …)" for names, how in ((missing, "missing"), (other, "other")) if names]
    return ", ".join(parts)


# --- running commands ---


@dataclass(kw_only=True, frozen=True, slots=True)
class Ended:
    code: int
    said: str  # on stdout and stderr

    @property
    def why(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip() and not line.startswith("crash: ")]
        return ("it hangs" if self.code == -signal.SIGALRM else f"exit code {self.code}") + (
            f": {lines[-1][:200]}" if lines else ""
        )


class Worker:
    """A server of commands (server.py) and a folder to run them in. Close it."""

    def __init__(self, library: Path, model: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder / "root"
        self._said = folder / "said"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server", str(model)],
            cwd=ROOT, env=os.environ | _ENV | {"LD_PRELOAD": str(library)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._ready = False

    def _read(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the server of commands ended")
        return line

    def run(self, argv: tuple[str, ...], **fault: object) -> Ended:
        """Run `python -m argv…` in the folder; `fault` as fault.c reads it: FAULT="kill", AT=17, LOG=path."""
        return self.together([(argv, fault)])[0]

    def together(self, commands: list[tuple[tuple[str, ...], dict[str, object]]]) -> list[Ended]:
        """Run several commands at once in the folder, each with its own fault or {}."""
        requests = []
        for i, (argv, fault) in enumerate(commands):
            env = {f"CRASH_{k}": str(v) for k, v in fault.items()} | ({"CRASH_ROOT": str(self.folder)} if fault else {})
            requests.append({"argv": argv, "cwd": str(self.folder), "env": env, "said": f"{self._said}{i}"})
        files = [Path(f"{self._said}{i}") for i in range(len(commands))]
        assert self._server.stdin is not None
        if not self._ready:
            self._ready = self._read() == "ready\n"
        self._server.stdin.write(json.dumps(requests) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._read())
        return [Ended(code=code, said=file.read_text(errors="replace")) for code, file in zip(codes, files, strict=True)]

    def restore(self, start: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(start, self.folder)

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


# --- scenarios ---


@dataclass(kw_only=True, frozen=True, slots=True)
class Scenario:
    """A folder, a command that is run in it, and what comes of that undisturbed."""

    name: str
    start: Path
    argv: tuple[str, ...]
    wanted: dict[str, Any]
    log: list[Operation]

    def points(self, fault: str) -> list[int]:
        """The operations at which a fault can be tried."""
        if fault == "short":
            return [1]  # of all of them
        kinds = {"tear": WRITES, "brief": WRITES, "enospc": NEEDS_ROOM}.get(fault)
        after = [len(self.log) + 1] if fault.startswith("power") else []  # it may go out just after the end, too
        return [n for n, o in enumerate(self.log, 1) if kinds is None or o.kind in kinds] + after

    def operation(self, at: int) -> str:
        return str(self.log[at - 1]) if at <= len(self.log) else "after the end"


@dataclass(kw_only=True, frozen=True, slots=True)
class Trial:
    scenario: str
    fault: str
    at: int

    def __str__(self) -> str:
        return f"--scenario {self.scenario} --fault {self.fault} --at {self.at}"


@dataclass(kw_only=True, frozen=True, slots=True)
class Outcome:
    trial: Trial
    operation: str
    lost: str = ""  # what and how, "" if nothing
    left: tuple[str, ...] = ()  # files that an undisturbed run does not leave
    traceback: str = ""  # the last line of one, where one line of advice should be


@dataclass(kw_only=True, slots=True)
class Sweep:
    """Scenarios on a model and a text of its own, and workers to try faults on them. Use as a context manager."""

    folder: Path
    jobs: int = 1
    _workers: list[Worker] = field(default_factory=list)
    _scenarios: dict[str, Scenario] = field(default_factory=dict)
    _known: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    _free: threading.Semaphore = field(default_factory=threading.Semaphore)

    def __enter__(self) -> Self:
        self.folder = self.folder.resolve()
        library = build_library(self.folder)
        (self.folder / "lm").mkdir()
        make_lm(self.folder / "lm")
        # short documents, so that they are tokenised in more than one batch
        pieces = [document[i : i + 60] for document in documents(20) for i in range(0, 1200, 60)]
        (self.folder / "text.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if piece))
        self._workers = [Worker(library, self.folder / "lm", self.folder / f"worker{i}") for i in range(self.jobs)]
        self._free = threading.Semaphore(self.jobs)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.close()

    def harvest_args(self, layers: str, blocks: int) -> tuple[str, ...]:
        model, text = str(self.folder / "lm"), str(self.folder / "text.jsonl")
        return (
            "harvest", "--preset", "demo", "--model", model, "--dataset", text, "--context", "32", "--block-sequences", "8",
            "--tokens", str(blocks * _BLOCK), "--holdout-tokens", str(_BLOCK), "--device", "cpu", "--threads", "2",
            "--forward-sequences", "8", "--layers", layers, "--cache", "cache",
        )  # fmt: skip

    TRAIN = (
        "train", "--preset", "demo", "--batch", "160", "--expansion", "4", "--window-blocks", "4", "--device", "cpu",
        "--threads", "2", "--layers", "0-1", "--save-minutes", "0", "--l1", "adaptive:5e-3@12", "--cache", "cache",
        "--runs", "runs",
    )  # fmt: skip

    def scenario(self, name: str) -> Scenario:
        """Made when it is first asked for; those that it starts from too."""
        if name not in self._scenarios:
            make: dict[str, Callable[[Worker], tuple[str, ...]]] = {
                "harvest": self._harvest, "layers": self._layers, "repair": self._repair, "free": self._freeing,
                "convert": self._convert, "import": self._import, "train": self._train, "resume": self._resume,
                "eval": self._eval, "pictures": self._pictures, "pages": self._pages, "distill": self._distill,
                "distill-on": self._distill_on, "export": self._export, "adopt": self._adopt,
            }  # fmt: skip
            worker, start = self._workers[0], self.folder / name
            shutil.rmtree(worker.folder, ignore_errors=True)
            worker.folder.mkdir()
            argv = make[name](worker)
            shutil.copytree(worker.folder, start)
            log = self.folder / f"{name}.log"
            self._do(worker, argv, LOG=log)
            operations = read_log(log, worker.folder)
            disk = Disk(start)
            disk.apply(operations)
            seen = {k: v for k, v in read_tree(worker.folder).items() if disk.after("all").get(k, 0) != v}
            assert not seen, f"the log of {name} does not lead to {sorted(seen)}: an operation escapes fault.c"
            wanted = contents(worker.folder)
            self._scenarios[name] = Scenario(name=name, start=start, argv=argv, wanted=wanted, log=operations)
        return self._scenarios[name]

    def _do(self, worker: Worker, argv: tuple[str, ...], **env: object) -> None:
        ended = worker.run(argv, **env)
        assert ended.code == 0, f"{' '.join(argv)}\n{ended.said}"

    def _harvest(self, worker: Worker) -> tuple[str, ...]:
        """A new cache, with two chunks of tokens."""
        return self.harvest_args("0-1", 17)

    def _layers(self, worker: Worker) -> tuple[str, ...]:
        self._do(worker, self.harvest_args("0", 5))
        return self.harvest_args("0-2", 5)

    def _repair(self, worker: Worker) -> tuple[str, ...]:
        """A flipped block, a block that is gone, a flipped token."""
        self._do(worker, self.harvest_args("0-1", 5))
        arrays = worker.folder / "cache" / "activations.zarr"
        flip(arrays / "resid_post" / "01" / "c.2.0", 100)
        flip(arrays / "tokens" / "c.0.0", 100)
        (arrays / "resid_post" / "00" / "c.3.0").unlink()
        return ("harvest", "repair", "--preset", "demo", "--cache", "cache", "--device", "cpu", "--threads", "2")

    def _freeing(self, worker: Worker) -> tuple[str, ...]:
        self._do(worker, self.harvest_args("0-2", 5))
        return ("harvest", "free", "--preset", "demo", "--cache", "cache", "--layers", "0,2", "--yes")

    def _convert(self, worker: Worker) -> tuple[str, ...]:
        self._do(worker, self.harvest_args("0-1", 5))
        return ("harvest", "convert", "--cache", "cache", "--out", "narrow", "--move", "--threads", "2")

    def _import(self, worker: Worker) -> tuple[str, ...]:
        """Two sites of another tool's files, with two chunks of tokens."""
        (folder := worker.folder / "theirs").mkdir()
        rng = np.random.default_rng(0)
        for name in ("3", "12.mlp_out"):
            np.save(folder / f"{name}.npy", rng.standard_normal((17 * _BLOCK, 8), dtype=np.float32))
        np.save(folder / "tokens.npy", rng.integers(0, 400, 17 * _BLOCK, dtype=np.int32))
        sizes = ("--context", "32", "--block-sequences", "8", "--holdout-tokens", str(_BLOCK), "--threads", "2")
        return ("harvest", "import", "--from", "theirs", "--cache", "cache", *sizes)

    def _train(self, worker: Worker) -> tuple[str, ...]:
        self._do(worker, self.harvest_args("0-1", 5))
        return self.TRAIN

    def _resume(self, worker: Worker) -> tuple[str, ...]:
        """A run that was killed when it had a resume state."""
        return self._killed_with(worker, "train", "runs/*/state/*/*.safetensors")

    def _killed_with(self, worker: Worker, name: str, states: str) -> tuple[str, ...]:
        """Leave the folder of a scenario as a kill does that comes when there is a state."""
        scenario = self.scenario(name)
        for at in range(len(scenario.log) // 4, len(scenario.log)):
            worker.restore(scenario.start)
            worker.run(scenario.argv, FAULT="kill", AT=at)
            if any(p.stat().st_size for p in worker.folder.glob(states)):
                return scenario.argv
        raise AssertionError(f"{name} keeps no state")

    def _eval(self, worker: Worker) -> tuple[str, ...]:
        worker.restore(self.scenario("train").start)
        self._do(worker, self.TRAIN)
        sizes = ("--eval-tokens", str(_BLOCK), "--ce-tokens", str(_BLOCK))
        return ("eval", "--preset", "demo", "--cache", "cache", "--runs", "runs", "--device", "cpu", *sizes, "--numbers-only")

    def _evaluated(self, worker: Worker) -> tuple[str, ...]:
        """What the scenario eval ends with, and its command."""
        evaluation = self.scenario("eval")
        worker.restore(evaluation.start)
        self._do(worker, evaluation.argv)
        return evaluation.argv

    def _pictures(self, worker: Worker) -> tuple[str, ...]:
        """Pictures, cards and a report of what is measured already; drawing takes seconds each time."""
        return self._evaluated(worker)[:-1]

    def _pages(self, worker: Worker) -> tuple[str, ...]:
        """What features look like: a folder an SAE, one of the text, and the page."""
        worker.restore(self.scenario("eval").start)
        return ("eval", "pages", *self._PLACES, "--device", "cpu", "--layers", "0", "--tokens", str(_BLOCK))

    def _distill(self, worker: Worker) -> tuple[str, ...]:
        """Two students, in two steps each."""
        self._evaluated(worker)
        sizes = ("--widths", "8,16", "--seeds", "1", "--tokens", "512", "--batch", "8", "--eval-tokens", str(_BLOCK))
        return ("eval", "distill", *self._PLACES, "--device", "cpu", "--save-minutes", "0", *sizes)

    def _distill_on(self, worker: Worker) -> tuple[str, ...]:
        """Students that were killed when they had a state."""
        return self._killed_with(worker, "distill", "runs/distilling/*/width*.safetensors")

    def _export(self, worker: Worker) -> tuple[str, ...]:
        self._evaluated(worker)
        return ("eval", "export", "--to", "saelens", "--runs", "runs", "--out", "exports", "--model", "a-model")

    def _adopt(self, worker: Worker) -> tuple[str, ...]:
        """Runs of what another tool would read."""
        self._do(worker, self._export(worker))
        shutil.move(worker.folder / "exports", worker.folder / "theirs")
        evaluation = self.scenario("eval").argv
        shutil.rmtree(worker.folder / "runs")
        return (*evaluation, "--saes", "theirs", "--from", "saelens")

    _PLACES = ("--preset", "demo", "--cache", "cache", "--runs", "runs")

    # --- trials ---

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """One that nobody else uses meanwhile."""
        with self._free:
            worker = self._workers.pop()
            try:
                yield worker
            finally:
                self._workers.append(worker)

    def attempt(self, trial: Trial) -> Outcome:
        scenario = self.scenario(trial.scenario)
        with self.worker() as worker:
            return self._attempt(scenario, trial, worker)

    def _attempt(self, scenario: Scenario, trial: Trial, worker: Worker) -> Outcome:
        operation, traceback = scenario.operation(trial.at), ""
        worker.restore(scenario.start)
        if trial.fault.startswith("power"):
            disk = Disk(scenario.start)
            disk.apply(scenario.log[: trial.at - 1])
            write_tree(disk.after(trial.fault.removeprefix("power-")), worker.folder)
        else:
            disturbed = worker.run(scenario.argv, FAULT=trial.fault, AT=trial.at)
            if trial.fault != "short":
                operation = next((n for n in disturbed.said.splitlines() if n.startswith("crash: ")), f"not met: {operation}")
            operation = operation.removeprefix("crash: ").replace(f"{worker.folder}/", "")
            traceback = disturbed.why if "Traceback" in disturbed.said else ""
            if disturbed.code == 0 and (lost := difference(contents(worker.folder), scenario.wanted)):
                return Outcome(trial=trial, operation=operation, traceback=traceback, lost=f"exit code 0, but {lost}")
        lost, left = self._run_again(scenario, worker)
        return Outcome(trial=trial, operation=operation, traceback=traceback, lost=lost, left=left)

    def _run_again(self, scenario: Scenario, worker: Worker) -> tuple[str, tuple[str, ...]]:
        """(what is lost, what is left over) after a plain run of the command."""
        key = hashlib.sha256(repr((scenario.name, read_tree(worker.folder))).encode()).hexdigest()
        if key not in self._known:
            again = worker.run(scenario.argv)
            there = contents(worker.folder)
            lost = f"run again: {again.why}" if again.code else difference(there, scenario.wanted)
            self._known[key] = lost, tuple(sorted(there.keys() - scenario.wanted.keys()))
        return self._known[key]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def build_library(folder: Path) -> Path:
    """fault.c, compiled. Raises CalledProcessError."""
    library = folder / "fault.so"
    source = str(Path(__file__).with_name("fault.c"))
    subprocess.run(["cc", "-O2", "-Wall", "-shared", "-fPIC", source, "-o", str(library), "-ldl", "-lpthread"], check=True)
    return library

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from transformers import AutoModel

from residual_saes.eval.measure.probed import ALL, RANDOM, RESIDUAL, Probed, Probes, compared, mean_auc
from residual_saes.eval.measure.store import stored_results
from residual_saes.eval.probes.texts import TextSet, read_sets, split
from residual_saes.eval.publish.contents import PublishedForm, published_files
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import encode_text, load_tokenizer
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.conftest import Cli, documents

pytest.importorskip("sklearn")
from residual_saes.eval.probes.classify import auc, by_difference, fitting_quietly
from residual_saes.eval.probes.probe import TextReader

NAME = "1_questions"


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    """A set as the wheel of sae-probes has it."""
    quoted = (text.replace('"', '""') for text, _ in rows)
    lines = [f'"{text}",{len(text)},{target}' for text, (_, target) in zip(quoted, rows, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    content = "\n".join(["prompt,prompt_len,target", *lines, ""]).encode()
    (folder / f"{name}.csv.zst").write_bytes(zstandard.compress(content))
    return folder


@pytest.fixture
def rows() -> list[tuple[str, str]]:
    """Two kinds of text that differ in how they end, with quotes and new lines in them."""
    texts = [f'"{text[:40]}"\n{text[40:70]}' for text in documents(60)]
    return [(f"{texts[i % 60]} {i}{'?' if i % 2 else '.'}", "asks" if i % 2 else "tells") for i in range(254)]


@pytest.fixture
def data(tmp_path: Path, rows: list[tuple[str, str]]) -> Path:
    return write(tmp_path / "wheel" / "sae_probes" / "data" / "cleaned_data", NAME, rows).parents[2]


@pytest.fixture
def probes(cli: Cli, data: Path, cache_path: Path, runs_path: Path, tmp_path: Path) -> Callable[..., str]:
    """Run the command on a copy of two runs, and give what it prints."""
    for folder in sorted(runs_path.iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "runs" / folder.name, ignore=shutil.ignore_patterns("sae_layer0[02]*"))

    def call(*more: object) -> str:
        args = ("--data", data, "--cache", cache_path, "--runs", tmp_path / "runs", "--layers", 1, "--device", "cpu")
        result = cli("eval", "probes", *args, *more)
        assert result.code == 0, result.err
        return result.out

    return call


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_saes_and_baselines_are_probed_and_shown(probes: Callable[..., str], tmp_path: Path, cli: Cli, lm: Path) -> None:
    table = probes("--k", "1,5,all")
    runs = tmp_path / "runs"
    first, second = (Run(path.parent) for path in sorted(runs.glob("*/config.json")))
    (record,) = lines(first.path / "results" / "probes.jsonl")
    assert record["dataset"] == NAME and record["layer"] == 1 and record["snapshot"] == FINAL
    assert record["run"] == first.config.digest and record["train"] == 154 and record["test"] == 99
    assert record["file"] == Sae.checksum(first.snapshot_path(Site(1), FINAL))
    scores: dict[str, float] = record["auc"]  # type: ignore[assignment]
    assert list(scores) == ["1", "5", ALL] and all(0 <= score <= 1 for score in scores.values())
    baselines = {r["run"]: r["auc"] for r in lines(runs / "probes.jsonl")}
    assert set(baselines) == {RESIDUAL, RANDOM} and baselines[RESIDUAL][ALL] > 0.95  # type: ignore[index]
    assert all(words in table for words in (first.name, second.name, "random directions", f"{scores['5']:.3f}"))

    assert cli("eval", "run", "--runs", runs, "--snapshots", "final", "--eval-tokens", 512, "--ce-tokens", 32).code == 0
    (result,) = [r for r in stored_results(first) if r.site == Site(1)]
    assert (result.probe_sets, result.probe_1, result.probe_5, result.probe_16) == (1, scores["1"], scores["5"], None)
    assert "probe" not in (first.path / "results" / "metrics.json").read_text()
    report, card = (runs / "report.html").read_text(), (first.path / "README.md").read_text()
    assert "random directions" in report and "probe AUC, k=1" in report
    assert "over 1 sets of texts" in card and f"{scores['5']:.3f}" in card

    form = PublishedForm(first, tmp_path)  # where the model lay is left out, and so checksums differ
    sent = {name: form.file(name, path) for name, path in published_files(first).items()}
    (published,) = lines(sent["results/probes.jsonl"])
    assert published["file"] == Sae.checksum(sent["sae_layer01_final.pt"]) != record["file"]


def test_what_is_measured_is_kept(probes: Callable[..., str], data: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    table = probes("--k", "1")
    files = sorted((tmp_path / "runs").rglob("probes.jsonl"))
    before = [path.read_bytes() for path in files]
    assert probes("--k", "1", "--model", "nowhere") == table  # there is nothing to run it for
    assert [path.read_bytes() for path in files] == before
    probes("--k", "1,2")
    assert all(path.read_bytes().startswith(content) for path, content in zip(files, before, strict=True))
    assert [list(r["auc"]) for r in lines(files[0])] == [["1"], ["2"]]  # type: ignore[call-overload]
    write(data / "sae_probes" / "data" / "cleaned_data", NAME, rows[:-2])
    probes("--k", "1")
    assert len({r["texts"] for r in lines(files[0])}) == 2, "other texts under the same name are another set"


def test_activations_are_of_the_last_token(cache: Cache, lm: Path) -> None:
    site, spec, folder = Site(2), cache.spec, str(lm)
    texts = ["a b", "It was the best of times.", "and so on " * 60]
    few = TextSet(name="few", texts=texts, labels=(none := np.zeros(0, np.int64)), train=none, test=none)
    x = TextReader(folder, spec, [site, Site(0)], torch.device("cpu")).read([few])["few", site]
    model = AutoModel.from_pretrained(lm, dtype=x.dtype)
    for text, row in zip(texts, x, strict=True):
        first, *tokens = encode_text(load_tokenizer(folder, None), spec, text)
        kept = torch.tensor([[first, *tokens[-63:]]])
        wanted: list[torch.Tensor] = []
        model.layers[2].register_forward_hook(lambda _m, _i, out, to=wanted: to.append(out))
        model(kept)
        out = wanted[-1][0] if isinstance(wanted[-1], tuple) else wanted[-1]
        torch.testing.assert_close(row, out[0, -1].detach(), rtol=0.02, atol=0.02)


# what functions of sae-probes 0.4.2 gave for the same: get_train_test_indices, get_sorted_indices, find_best_reg
TRAIN, TEST = [76, 246, 184, 91, 215, 94, 22, 49], [100, 101, 159, 116, 173, 201, 72, 177]
ORDERS = {
    153: [10, 5, 8, 2, 11, 7, 1, 6, 3, 9, 4, 0],
    61: [11, 10, 2, 5, 8, 4, 6, 1, 3, 7, 9, 0],
}
AUCS = {
    (153, 1): 0.633265, (153, 5): 0.702449, (153, 12): 0.713061,
    (61, 1): 0.62, (61, 5): 0.698367, (61, 12): 0.704490,
}  # fmt: skip


def made(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    labels = np.arange(n) % 2
    noise = np.random.RandomState(seed).randn(n, 12)
    z = np.maximum(0, noise + labels[:, None] * np.linspace(0, 0.5, 12) - 0.3).round(3)
    return torch.tensor(z, dtype=torch.float32), labels


@pytest.mark.parametrize("n", [153, 61])  # texts to validate on, and folds
def test_probes_are_those_of_sae_probes(n: int) -> None:
    (z, labels), (of_test, test_labels) = made(n, 0), made(99, 1)
    order = by_difference(z, torch.from_numpy(labels))
    assert order.tolist() == ORDERS[n]
    with fitting_quietly():
        for k in (1, 5, 12):
            found = auc(z[:, order[:k]], labels, of_test[:, order[:k]], test_labels, sparse=k < 12)
            assert found == pytest.approx(AUCS[n, k], abs=1e-3)


def test_texts_are_drawn_as_sae_probes_draws_them() -> None:
    labels = np.arange(254) % 2
    train, test = split(labels, 154, "a set")
    assert (train[:8].tolist(), test[:8].tolist()) == (TRAIN, TEST)
    assert len({*train, *test}) == 253 and labels[train].sum() == 77 and labels[test].sum() == 50


def test_a_wheel_is_read_as_its_folder(data: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = data / "sae_probes" / "data" / "cleaned_data"
    write(folder, "2_three", [(text, str(i % 3)) for i, (text, _) in enumerate(rows)])  # no set of two labels
    with zipfile.ZipFile(wheel := tmp_path / "some.whl", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.relative_to(data))
    (of_wheel,), (of_folder,), (of_inner,) = (read_sets(place, None) for place in (wheel, data, folder))
    assert of_wheel.digest == of_folder.digest == of_inner.digest
    assert of_wheel.texts == [text for text, _ in rows] and of_wheel.labels.tolist() == [1 - i % 2 for i in range(254)]


def test_what_cannot_be_probed_is_said_in_a_line(data: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = data / "sae_probes" / "data" / "cleaned_data"
    for name, wrong in (("3_few", rows[:50]), ("4_uneven", [*rows, *[rows[0]] * 40])):
        write(folder, name, wrong)
    (folder / "5_cut.csv.zst").write_bytes((folder / f"{NAME}.csv.zst").read_bytes()[:-40])
    for place, names, words in (
        (data, ("6_none",), "has no set 6_none"),
        (data, ("3_few",), "has 50 texts"),
        (data, ("4_uneven",), "not as many"),
        (data, ("5_cut",), "damaged"),
        (tmp_path / "missing", None, "cannot read"),
        (tmp_path, None, "no such sets"),
    ):
        with pytest.raises(UserError, match=words):
            read_sets(place, names)


def test_without_scikit_learn_it_says_what_to_install(probes: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "sklearn" or n.startswith("residual_saes.eval.probes.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(AssertionError, match="pip install scikit-learn"):
        probes()


def test_means_are_of_what_all_sets_have() -> None:
    assert mean_auc([{"16": 0.5, "2": 0.5, ALL: 1.0}, {"2": 1.0, "16": 0.7, "1": 0.1}]) == {"2": 0.75, "16": 0.6}
    assert mean_auc([]) == {}


def test_a_baseline_of_no_known_name_is_passed_over(tmp_path: Path) -> None:
    """A later version may have more of them."""
    for run, score in ((RESIDUAL, 0.75), ("later", 0.5)):
        about = {"site": Site(1), "snapshot": FINAL, "file": "cache", "dataset": NAME, "texts": "t"}
        Probes(tmp_path).add(Probed(run=run, features=8, train=9, test=9, auc={"1": score}, **about))
    (row,) = compared(tmp_path, [], "cache")
    assert (row.site, row.auc) == (Site(1), {"1": 0.75})

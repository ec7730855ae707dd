"""Documentation: links resolve, commands parse, code runs. A README is a page long."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from residual_saes.__main__ import rsae
from residual_saes.shared.cli import DefaultRun
from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TYPED = [page for page in PAGES if page.parent.name in ("guides", "reference")] + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PICTURES = {ROOT / "docs/images/feature_page.png", ROOT / "docs/images/fvu_l0.svg"}  # drawn from the demo's report and pages
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name: GitHub's names of its headings, and those that it gives itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"<a [^>]*></a>", "", text), re.MULTILINE)
    return set(re.findall(r'<a id="([^"]+)"', text)) | {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def text_of(page: Path) -> str:
    if page.suffix != ".ipynb":
        return re.sub(r"`[^`\n]*`", "", page.read_text())
    return "".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (page.parent / place).resolve() if place else page
        assert there.exists() or there in PICTURES, f"{name(page)}: {target}"
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{name(page)}: {target}"


def test_the_readme_is_a_page_long() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_each_page_is_of_one_kind() -> None:
    """A guide, a reference or a finding, and its title says which."""
    for folder, kind in (("guides", "Guide: "), ("reference", "Reference: "), ("findings", "Findings")):
        for page in (ROOT / "docs" / folder).glob("*.md"):
            assert page.read_text().startswith(f"# {kind}"), name(page)


# --- commands ---


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of this project on a page, in blocks of code and in the text, as words."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)
    for line in [*blocks, *re.findall(r"`([^`\n]+)`", text)]:
        for found in re.findall(r"(?:\brsae|python -m|^make|^ruff)\b[^;&|'#)]*", line.partition("  #")[0]):
            plain = re.sub(r"\$\w*SIZE", "8", re.sub(r"\[.*?\]", "", found.partition("  ")[0]))
            yield [word for word in shlex.split(re.sub(r"\$\w+", "0", plain)) if word != "…"]


def parse(words: list[str]) -> None:
    """Parse `rsae …` as its command line would, but run nothing. Raises click's errors."""
    command: click.Command = rsae
    called, rest = "rsae", words
    while isinstance(command, click.Group):
        if isinstance(command, DefaultRun) and (not rest or rest[0].startswith("-")):
            rest = ["run", *rest]
        if not rest or "--help" in rest[:1]:
            return
        found, inner, rest = command.resolve_command(click.Context(command), rest)
        assert found and inner
        called, command = found, inner
    if "--help" not in rest:
        command.make_context(called, rest)


TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", TYPED, ids=name)
def test_every_command_on_a_page_parses(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            assert all(word in TARGETS or "=" in word for word in words[1:]), words
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/") if len(words) > 2 else ROOT
            assert module.exists() or module.with_suffix(".py").exists() or words[2] in ("pytest", "mypy"), words
        elif words[0] == "rsae":
            try:
                parse(words[1:])
            except click.MissingParameter:
                assert len(words) <= 4, words  # the command alone is named, in the midst of a sentence
            except (click.UsageError, AssertionError) as error:
                pytest.fail(f"{name(page)}: {shlex.join(words)}: {error}")


def test_what_make_is_given_may_hold_anything() -> None:
    given = {"PRESET": "a b", "CACHE": "/my data/it's", "RUNS": 'x " (y)', "DISK": "4 TB", "L1": "3e-4, 8e-5"}
    for target in ("harvest", "train", "eval", "job"):
        words = ["make", "-n", target, *(f"{name}={value}" for name, value in given.items())]
        # a make in which this one runs (`make test slow`) would have it say which folder it enters and leaves
        words.insert(1, "--no-print-directory")
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        got = shlex.split(said)
        options = {name: got[got.index(f"--{name.lower()}") + 1] for name in given if f"--{name.lower()}" in got}
        assert {"PRESET", "CACHE"} <= set(options) and options.items() <= given.items()
    assert options == given


@pytest.mark.parametrize("wrong", [["train", "--bach", "3"], ["evaluate"], ["eval", "pges"], ["harvest", "--tokens"]])
def test_a_wrong_command_is_noticed(wrong: list[str]) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        parse(wrong)


# --- code ---


@pytest.mark.parametrize("page", TYPED, ids=name)
def test_code_on_a_page_compiles(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        ast.parse(code)


def test_the_code_in_the_readme_runs(
    cache_path: Path, runs_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, in a folder with runs and one cache."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for link, place in (("data/demo", cache_path), ("runs", runs_path)):
        Path(link).symlink_to(place, target_is_directory=True)
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line]) <= 12
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    assert names["z"].shape == (100, 128) and names["logits"].shape[-1] == 400


def test_the_tutorial_runs(cache_path: Path, runs_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for cell in cells:
            exec(cell.replace("../data/demo", str(cache_path)).replace("../runs", str(runs_path)), names)
    assert names["x"].shape == (2000, 32) and 0 < names["fvu"] < 1
    assert names["clean"] != names["spliced"] and names["clean"] != names["ablated"]
    assert f"without feature {names['best'].feature}" in said.getvalue()

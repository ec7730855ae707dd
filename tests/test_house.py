"""The house: which package may import which, no circle of imports, and no file too long to be read in one go."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PRODUCT = ("shared", "harvest", "train", "eval", "fleet")  # each imports itself and shared
LONGEST = 400  # lines
# Exceptions of today, each to be mended and taken out.
ALLOWED = {("fleet.job", "eval")}  # (module, package that it imports)


def files(*packages: str) -> Iterator[Path]:
    """The sources of packages: Python, C and templates."""
    for path in (path for package in packages for path in (ROOT / package).rglob("*")):
        if path.suffix in {".py", ".c", ".h", ".html", ".css", ".js", ".j2"} and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT)


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _plain(name: str) -> str:
    """A module by its place in the repository; it is imported as a part of residual_saes."""
    return name.removeprefix("residual_saes.")


def imports() -> dict[str, set[str]]:
    """{module: modules of this project that its code imports}, at the top, in functions and for type checking alike."""
    sources = {module(path): path for path in files(*PRODUCT, "bench") if path.suffix == ".py"}
    graph: dict[str, set[str]] = {}
    for name, path in sources.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                names.update(_plain(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path} imports by a relative name"
                assert node.module.split(".")[0] not in PRODUCT, f"{path} imports {node.module} outside residual_saes"
                source = _plain(node.module)
                whole = (f"{source}.{alias.name}" for alias in node.names)
                names.update(each if each in sources else source for each in whole)
        graph[name] = names & sources.keys()
    return graph


def test_imports_point_one_way() -> None:
    """Each package of the product imports itself and shared, and none imports bench."""
    arrows = {(name, target.partition(".")[0]) for name, targets in imports().items() for target in targets}
    wrong = {(a, b) for a, b in arrows if (room := a.partition(".")[0]) in PRODUCT and b not in (room, "shared")}
    assert wrong <= ALLOWED


def test_there_is_no_circle() -> None:
    """Neither modules nor packages import each other in a circle; imports within functions count."""
    modules, packages = imports(), dict[str, set[str]]()
    for name, targets in modules.items():
        package = _package(name)
        packages.setdefault(package, set()).update(set(map(_package, targets)) - {package})
    for graph in (modules, packages):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' ← '.join(error.args[1])}")


def _package(name: str) -> str:
    """shared.stores, of which shared.stores.s3 is a part; a module that lies in shared itself stands for itself."""
    return ".".join(name.split(".")[:2])


def test_no_file_is_too_long() -> None:
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in files(*PRODUCT)}
    assert {path for path, length in lengths.items() if length > LONGEST} == set()


def test_text_has_an_encoding() -> None:
    """Else it is that of the locale, which has no λ in it for some."""
    for path in files(*PRODUCT, "residual_saes"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.Call) and "encoding" not in {keyword.arg for keyword in node.keywords}:
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in ("read_text", "write_text"), f"{path}:{node.lineno}"
                assert called != "open" or not isinstance(node.func, ast.Name), f"{path}:{node.lineno}"


def test_a_cache_is_opened_without_command_line_and_language_models() -> None:
    code = "import residual_saes.shared.cache, sys; assert not {'click', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

from pathlib import Path

import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import short_name
from residual_saes.shared.stores import Bucket, folder_name, parse_folder, parse_location, parse_name
from residual_saes.shared.stores.scratch import ScratchConfig
from tests.conftest import Cli


@pytest.mark.parametrize(("text", "name", "prefix"), [("s3://abc", "abc", ""), ("s3://a.b-c/d/e_f.g/", "a.b-c", "d/e_f.g")])
def test_places_are_read_and_written_alike(text: str, name: str, prefix: str) -> None:
    assert Bucket.parse(text) == Bucket(name, prefix)
    assert str(Bucket.parse(text)) == text.rstrip("/")
    assert str(Bucket.parse(text) / "x/y") == f"{text.rstrip('/')}/x/y"


@pytest.mark.parametrize("text", ["s3://", "s3:/abc/d", "s3://A/b", "s3://abc//d", "s3://abc/../d", "s3://abc/d e", "s3:abc"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a place in S3: write s3://bucket/prefix"):
        Bucket.parse(text)


def test_a_home_is_found_wherever_a_place_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_location("~/x") == parse_folder("~/x") == Path(parse_name("~/x")) == tmp_path / "x"
    assert ScratchConfig.parse("~/x:1GB").folder == tmp_path / "x"
    assert parse_name("org/name") == "org/name" and parse_folder("org/name") == Path("org/name")
    for parse in (parse_location, parse_folder, parse_name):
        with pytest.raises(UserError, match="'~nobody-here/x' is in a home that is not known here: write"):
            parse("~nobody-here/x")


def test_what_is_in_a_folder_is_called_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (commit := tmp_path / "models--org--lm" / "snapshots" / "0a1b").mkdir(parents=True)
    assert [short_name(name) for name in (str(commit), "org/lm", "org/lm/")] == ["lm"] * 3
    for folder, name in ((tmp_path, tmp_path.name), (commit, "lm")):
        monkeypatch.chdir(folder)
        assert short_name(".") == short_name("./") == folder_name(folder) == name


PLACES = ["gs://lab/x", "hf://lab/x", "S3://lab/x", "s3a://lab/x", "s3://lab/x", "file:/x", "gs:lab/x", "me@a_host:/x"]


@pytest.mark.parametrize("place", PLACES)
def test_another_kind_of_place_becomes_no_folder(
    place: str, cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = next(runs_path.iterdir())
    takes_buckets = (
        ("harvest", "convert", "--cache", cache_path, "--out", place),
        ("harvest", "--preset", "demo", "--cache", place),
        ("eval", "--cache", cache_path, "--runs", place),
    )
    for command in (
        *(() if place.startswith("s3:") else takes_buckets),
        ("harvest", "import", "--from", place),
        ("eval", "run", "--cache", cache_path, "--saes", place),
        ("eval", "probes", "--cache", cache_path, "--data", place),
        ("eval", "export", "--to", "saelens", "--runs", run, "--out", place),
        ("eval", "pages", "--cache", cache_path, "--runs", runs_path, "--out", place),
        ("eval", "ask", "--runs", runs_path, "--text", "a", "--out", place),
        ("eval", "floor", "--statistics", place),
        ("eval", "match", place),
        ("train", "--cache", cache_path, "--scratch", f"{place}:1GB"),
        ("harvest", "--model", place, "--dataset", "x.jsonl", "--tokens", "10K"),
        ("harvest", "plan", "--preset", "demo", "--dataset", place),
        ("harvest", "repair", "--cache", cache_path, "--model", place),
    ):
        done = cli(*command)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and repr(place) in done.err, command
    assert not any(tmp_path.iterdir())

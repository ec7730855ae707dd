from pathlib import Path

import pytest

from residual_saes.harvest.plan import planned_bytes, probe_write
from residual_saes.shared.cache import Cache
from tests.conftest import Cli


def written_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_a_plan_says_what_a_harvest_writes(cli: Cli, cache: Cache, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    assert planned_bytes(cache.spec, cache.sites) == pytest.approx(written_bytes(cache.path), rel=0.01)
    result = cli("harvest", "plan", *harvest_args[:-2], "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert f"({planned_bytes(cache.spec, cache.sites):,} bytes)" in result.out
    for word in ("free disk", "write probe", "room for"):
        assert word in result.out
    assert not (tmp_path / "none").exists()


def test_the_published_job_is_planned_without_model_or_hub(cli: Cli, tmp_path: Path) -> None:
    result = cli("harvest", "plan", "--preset", "pythia-410m", "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert "14.8 TB" in result.out  # 300M + 2M tokens x 24 layers x 2 KiB
    assert "9,218 blocks" in result.out or "blocks      9,218" in result.out


def test_a_probe_of_the_disk_leaves_nothing_and_makes_no_folder(tmp_path: Path) -> None:
    assert probe_write(tmp_path / "not" / "yet", 2, 0.01) > 0
    assert list(tmp_path.iterdir()) == []

"""Shards under torchrun, by the line that the docs give."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.crash.sweep import contents, difference


@pytest.mark.soak
def test_two_ranks_are_two_shards(cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    """Which are the bytes of one process, as long as all have as many threads: torchrun gives one to each unless told."""
    docs = (ROOT / "docs" / "guides" / "cluster.md").read_text()
    [line] = re.findall(r"^ +(torchrun .+ \\\n.+'|torchrun .+')$", docs, re.MULTILINE)
    here = shlex.join(map(str, (*harvest_args, "--cache", tmp_path / "c")))
    for there, instead in (
        ("-node 8", "-node 2"),
        ("--preset pythia-410m --cache /shared/pythia --device cuda:$LOCAL_RANK", here),
    ):
        assert there in line
        line = line.replace(there, instead)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": path}
    ended = subprocess.run(line, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("layers 0-2 complete") == 2
    assert difference(contents(tmp_path / "c"), contents(cache_path)) == ""

"""Wheels for a GPU machine that has torch, transformers and the like but no way to a package index.

    python -m bench.pack_wheels FOLDER            # what our own code lacks there, 10 MB
    python -m bench.pack_wheels FOLDER --peers    # and the peers that `python -m bench gpu` times beside it, 14 MB

There: `python3 -m pip install -q --no-index --no-deps --target SITE FOLDER/*.whl`, and PYTHONPATH=SITE.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click

from bench.peers import ROOT
from shared.errors import UserError

OURS = (
    "zarr",
    "numcodecs",
    "google-crc32c",
    "donfig==0.8.1.post1",
)  # in the versions of requirements.txt, where they are there
# Not all that they ask for: what their step imports, and no machine with torch and transformers has already.
PEERS = (
    "sae-lens==6.54.12", "transformer-lens==3.9.0", "better-abc==0.0.3", "simple-parsing==0.1.9", "docstring-parser==0.18.0",
    "datasets", "dill==0.4.1", "multiprocess==0.70.19", "eai-sparsify==1.3.3", "natsort==8.4.0", "schedulefree==1.4.1",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def wanted(*, peers: bool) -> list[str]:
    pins = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    return [f"{name}=={pins[name]}" if name in pins else name for name in OURS + (PEERS if peers else ())]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--peers", is_flag=True, help="also SAELens and sparsify")
@click.option("--python", default="3.12", show_default=True, help="the Python they are for, on x86-64 Linux")
def main(folder: Path, peers: bool, python: str) -> None:
    """Download the wheels that a GPU machine without a package index lacks into FOLDER."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    if subprocess.run([*command, *wanted(peers=peers)]).returncode:
        raise UserError("a wheel could not be downloaded: see pip's message above")
    wheels = sorted(folder.glob("*.whl"))
    click.echo(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    main()

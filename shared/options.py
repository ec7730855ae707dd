"""Options that several commands have, in the same words."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from shared.store import parse_location

Command = Callable[..., Any]


def options(*each: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the order given."""
    return lambda command: reduce(lambda c, option: option(c), reversed(each), command)


PRESET = click.option("--preset", default="pythia-410m", show_default=True, help="Where all defaults come from.")
CACHE = click.option(
    "--cache", type=parse_location, metavar="PLACE", help="Cache folder, or s3://bucket/prefix [default: data/<preset>]."
)
RUNS = click.option(
    "--runs",
    type=parse_location,
    metavar="PLACE",
    default=Path("runs"),
    show_default=True,
    help="Where run folders lie; s3://bucket/prefix, too.",
)
SEVERAL_RUNS = click.option(
    "--runs",
    type=parse_location,
    metavar="PLACE",
    multiple=True,
    default=[Path("runs")],
    help="Runs, or folders of them; may be given more than once [default: runs].",
)
MODEL = click.option("--model", help="Folder of the language model, if it is not where it was at the harvest.")
DEVICE = click.option("--device", help="cpu, cuda or cuda:1 [default: cuda where there is one].")

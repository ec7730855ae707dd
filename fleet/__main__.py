"""`rsae fleet job`: the whole job on a disk that does not take all layers at once; `plan`: what that will be."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from residual_saes.fleet.cluster import Fleet, RayCommands
from residual_saes.fleet.commands import Commands, JobConfig, Stage
from residual_saes.fleet.job import Job, wanted
from residual_saes.shared.cli import CACHE, DEVICE, PRESET, RUNS, filled, options, options_of, run
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import PRESETS, cache_place, get_preset
from residual_saes.shared.progress import say


@click.group()
def main() -> None:
    """Harvest, train, evaluate and free windows of layers."""


_job = options(PRESET, CACHE, RUNS, options_of(JobConfig, *(f.name for f in fields(JobConfig) if f.name != "disk")), DEVICE)
_disk = options_of(JobConfig, "disk")


def _ray(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that say where the work is done."""
    address = click.option("--ray", default=default, help="Address of a Ray cluster, auto, or local for this machine.")
    return options(address, options_of(Fleet))


def _config(options: dict[str, Any]) -> JobConfig:
    if options["preset"] is None:
        raise UserError(f"name a job with --preset {' or '.join(PRESETS)}; --harvest and --train change what is different")
    preset = get_preset(options["preset"])
    given = {"cache": cache_place(None, preset.name), "l1": preset.l1, "expansion": preset.expansion}
    return filled(JobConfig, options, **given)


def _commands(options: dict[str, Any]) -> Commands:
    config, address = _config(options), options["ray"]
    return Commands(config) if address is None else RayCommands(config, filled(Fleet, options, address=address))


def _stage(stage: Stage, options: dict[str, Any]) -> int:
    """One stage alone, of all layers of the job."""
    commands = _commands(options | {"disk": 0})
    return commands.run(stage, wanted(commands)[0])


@main.command("job")
@_disk
@_job
@_ray(None)
def job_command(**options: Any) -> int:
    """Everything, window after window; run it again to continue."""
    return Job(_commands(options)).run()


@main.command("harvest")
@_job
@_ray("auto")
def harvest_command(**options: Any) -> int:
    """A harvest in shards on a Ray cluster."""
    return _stage("harvest", options)


@main.command("train")
@_job
@_ray("auto")
def train_command(**options: Any) -> int:
    """Training on a Ray cluster, a task for each layer."""
    return _stage("train", options)


@main.command("plan")
@_disk
@_job
def plan_command(**options: Any) -> None:
    """Windows, bytes, forward passes and time, before anything is begun."""
    say(str(Job(Commands(_config(options))).plan()), asked=True)


if __name__ == "__main__":
    run(main)

"""`rsae fleet job`: the whole job on a disk that does not take all layers at once; `plan`: what that will be."""

import shlex
from collections.abc import Callable
from typing import Any

import click

from residual_saes.fleet.cluster import Fleet, RayCommands
from residual_saes.fleet.commands import Commands, JobConfig, Stage
from residual_saes.fleet.job import Job, wanted
from residual_saes.shared.cli import CACHE, DEVICE, PRESET, RUNS, Number, options, run
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import DATA, PRESETS, get_preset
from residual_saes.shared.progress import say
from residual_saes.shared.units import parse_bytes


@click.group()
def main() -> None:
    """Harvest, train, evaluate and free windows of layers."""


_job = options(
    PRESET,
    CACHE,
    RUNS,
    click.option("--l1", help="Settings, as `rsae train` takes them."),
    click.option("--layers", help="Layers, such as 0-23 or 3,7 [default: all]."),
    click.option("--expansion", type=click.IntRange(1, 1 << 16), help="Features per dimension."),
    DEVICE,
    click.option("--harvest", "harvest_options", default="", help='More options of a command, as "--tokens 100M".'),
    click.option("--train", "train_options", default="", help="More options of `rsae train`."),
    click.option("--eval", "eval_options", default="", help="More options of `rsae eval`."),
)


def _config(options: dict[str, Any]) -> JobConfig:
    if options["preset"] is None:
        raise UserError(
            f"name the job with --preset {' or '.join(PRESETS)}; change what is different with --harvest and --train"
        )
    preset = get_preset(options["preset"])
    more = {f"{name}_options": _split(name, options.pop(f"{name}_options")) for name in ("harvest", "train", "eval")}
    chosen = {
        "cache": options["cache"] or DATA / preset.name,
        "l1": options["l1"] or preset.l1,
        "expansion": options["expansion"] or preset.expansion,
    }
    return JobConfig(**options | chosen | more)


def _split(name: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--{name}: {error}") from None


_disk = click.option("--disk", type=parse_bytes, required=True, help="What cache and runs may take together, such as 4TB.")


def _ray(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that say where the work is done."""
    return options(
        click.option("--ray", default=default, help="Address of a Ray cluster, auto, or local for this machine."),
        click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Shards of a harvest."),
        click.option("--cpus", type=click.IntRange(1), default=1, show_default=True, help="Of a task: its threads."),
        click.option("--gpus", type=Number(0), default=1.0, show_default=True, help="Of a task."),
    )


def _commands(options: dict[str, Any]) -> Commands:
    address, workers, cpus, gpus = (options.pop(name) for name in ("ray", "workers", "cpus", "gpus"))
    config = _config(options)
    if address is None:
        return Commands(config)
    return RayCommands(config, Fleet(address=address, workers=workers, cpus=cpus, gpus=gpus))


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
    say(str(Job(Commands(_config(options))).plan()))


if __name__ == "__main__":
    run(main)

"""The command line `rsae`: each stage's commands under one name. `rsae train …` is `python -m train …` in a checkout."""

from importlib import import_module

import click

import residual_saes
from residual_saes.shared.cli import run
from residual_saes.shared.progress import say

STAGES = {
    "harvest": "Write a model's activations into a cache.",
    "train": "Train SAEs of every setting from one cache.",
    "eval": "Measure SAEs; report, pages, export, publish.",
    "fleet": "All stages in windows of layers, or on Ray.",
}


class _Stages(click.Group):
    """Imports the stage that is asked for alone: torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, stage, rest = super().resolve_command(ctx, args)
        return name, import_module(f"residual_saes.{name}.__main__").main if name in STAGES else stage, rest


@click.command("presets")
def presets() -> None:
    """Print the defaults of each preset, and those that follow a model and its cache."""
    from residual_saes.shared.presets import table

    say(table(), asked=True)


@click.group(cls=_Stages, commands=[click.Command(name, help=text) for name, text in STAGES.items()])
@click.version_option(residual_saes.__version__, message="%(version)s")
def rsae() -> None:
    """Sparse autoencoders on every layer of a language model, from one pass over the text."""


rsae.add_command(presets)


def main() -> None:
    run(rsae)


if __name__ == "__main__":
    main()

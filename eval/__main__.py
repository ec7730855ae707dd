"""`python -m eval`: numbers, pictures and a report for every run; `python -m eval export`: the SAEs for other tools."""

from pathlib import Path
from typing import Any

import click
import torch

from eval.evaluate import EvalConfig, Skipped, evaluate, find_runs
from eval.export import FORMS, ExportConfig, export
from eval.plots import plot_run
from eval.report import text_table, write_report
from shared.cache import Cache
from shared.cli import DefaultRun, UserError, parse_count, parse_layers, run, say
from shared.device import pick_device
from shared.presets import get_preset


@click.group(cls=DefaultRun)
def main() -> None:
    """Evaluate SAEs, or hand them on."""


@main.command("run")
@click.option("--preset", default="pythia-410m", show_default=True, help="Where all defaults come from.")
@click.option("--cache", type=click.Path(path_type=Path), help="The cache the runs were trained on [default: data/<preset>].")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Run folder, or where they lie."
)
@click.option("--eval-tokens", help="Held-out activations to measure reconstruction on.")
@click.option("--ce-tokens", help="Held-out tokens to measure the language model's loss on.")
@click.option("--model", help="Folder of the language model, if it is not where it was at the harvest.")
@click.option("--device", help="cpu, cuda or cuda:1 [default: cuda where there is one].")
def run_command(
    preset: str,
    cache: Path | None,
    runs: Path,
    eval_tokens: str | None,
    ce_tokens: str | None,
    model: str | None,
    device: str | None,
) -> None:
    """Evaluate every snapshot of every run on held-out tokens; what is done already is kept."""
    p = get_preset(preset)
    config = EvalConfig(
        device=pick_device(device),
        eval_tokens=parse_count(eval_tokens or str(p.eval_tokens)),
        ce_tokens=parse_count(ce_tokens or str(p.ce_tokens)),
        model=model,
    )
    opened = Cache.open(cache or Path("data") / p.name)
    skipped = Skipped()
    found = find_runs(runs, opened, skipped)
    results = evaluate(opened, found, config, skipped)
    found = [each for each in found if each.name in results]
    for each in found:
        plot_run(each, results[each.name], skipped)
    report = write_report(runs, found, results)
    say(text_table(found, results))
    say(f"\nreport: {report}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is evaluated")


@main.command("export")
@click.option("--to", "form", type=click.Choice(list(FORMS)), required=True, help="The tool that is to load them.")
@click.option(
    "--runs", type=click.Path(path_type=Path), multiple=True, default=[Path("runs")], help="Runs, folders of them, .pt files."
)
@click.option("--layers", help="Such as 0-5,12 [default: all there are].")
@click.option("--snapshot", default="final", show_default=True, help="Which of each layer's snapshots.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets <run>/layer_<N> for each SAE.")
@click.option("--model", help="Name of the language model [default: the run's, if it is a name and not a folder].")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Measure on its held-out tokens how often features fire (saelens)."
)
@click.option("--device", help="For that: cpu, cuda or cuda:1 [default: cuda where there is one].")
def export_command(
    form: str, runs: tuple[Path, ...], layers: str | None, out: Path, cache: Path | None, **options: Any
) -> None:
    """Write SAEs in the form that another tool loads."""
    config = ExportConfig(
        form=form,
        out=out,
        layers=parse_layers(layers) if layers else None,
        snapshot=options["snapshot"],
        model=options["model"],
        cache=Cache.open(cache) if cache else None,
        device=pick_device(options["device"]) if cache else torch.device("cpu"),
    )
    say(f"exported {len(export(runs, config))} SAEs to {out}")


if __name__ == "__main__":
    run(main)

"""`python -m eval`: numbers, pictures and a report for every run."""

from pathlib import Path

import click

from eval.evaluate import EvalConfig, Skipped, evaluate, find_runs
from eval.plots import plot_run
from eval.report import text_table, write_report
from shared.cache import Cache
from shared.cli import UserError, parse_count, run, say
from shared.device import pick_device
from shared.presets import get_preset


@click.command()
@click.option("--preset", default="pythia-410m", show_default=True, help="Where all defaults come from.")
@click.option("--cache", type=click.Path(path_type=Path), help="The cache the runs were trained on [default: data/<preset>].")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Run folder, or where they lie."
)
@click.option("--eval-tokens", help="Held-out activations to measure reconstruction on.")
@click.option("--ce-tokens", help="Held-out tokens to measure the language model's loss on.")
@click.option("--model", help="Folder of the language model, if it is not where it was at the harvest.")
@click.option("--device", help="cpu, cuda or cuda:1 [default: cuda where there is one].")
def main(
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


if __name__ == "__main__":
    run(main)

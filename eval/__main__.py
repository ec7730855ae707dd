"""`rsae eval`: numbers, pictures and a report; `pages`: a look at every feature; `export`: SAEs for other tools; …"""

from pathlib import Path
from typing import Any

import click

from residual_saes.eval.floors.distill import DistillOptions, distill, distill_table
from residual_saes.eval.floors.measured import measured_floors
from residual_saes.eval.floors.students import DistillConfig
from residual_saes.eval.measure.evaluate import EvalConfig, evaluate
from residual_saes.eval.measure.match import match_runs, match_table, match_to_final
from residual_saes.eval.measure.predicted import ALIVE_ABOVE, PUBLISHED_WIDTHS, Statistics, describe, floors, student_widths
from residual_saes.eval.measure.result import DEAD_AT, Result
from residual_saes.eval.measure.runs import Skipped, find_runs, runs_in
from residual_saes.eval.pages.write import PagesConfig, write_pages
from residual_saes.eval.publish.card import Publication, sister_runs, write_card
from residual_saes.eval.publish.export import ExportConfig, export
from residual_saes.eval.publish.formats import FORMS
from residual_saes.eval.publish.upload import PublishConfig, publish
from residual_saes.eval.report.page import text_table, write_report
from residual_saes.eval.report.pictures import plot_runs
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.cli import CACHE, DEVICE, MODEL, PRESET, RUNS, SEVERAL_RUNS, DefaultRun, Number, run
from residual_saes.shared.device import pick_device
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import Training, cache_place, get_preset
from residual_saes.shared.progress import say
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import parse_sites
from residual_saes.shared.stores import Location
from residual_saes.shared.stores.mirror import fetched, local
from residual_saes.shared.units import parse_count


@click.group(cls=DefaultRun)
def main() -> None:
    """What SAEs are worth, on held-out tokens, and the way to other tools. Without a command: `run`."""


@main.command("run")
@PRESET
@CACHE
@RUNS
@click.option("--eval-tokens", help="Held-out activations to measure reconstruction on [default: all].")
@click.option("--ce-tokens", help="Held-out tokens to measure the language model's loss on.")
@MODEL
@click.option("--dead-at", type=Number(0, 1), default=DEAD_AT, show_default=True, help="Dead: density up to this.")
@click.option(
    "--alive-above",
    type=Number(0, 1),
    default=ALIVE_ABOVE,
    show_default=True,
    help="Alive, for floors: density above.",
)
@click.option(
    "--ablation", type=click.Choice(["zero", "mean"]), default="zero", show_default=True, help="CE recovered is against this."
)
@click.option("--numbers-only", is_flag=True, help="Measure and say it, but leave pictures, cards and report as they are.")
@DEVICE
def run_command(
    preset: str | None,
    cache: Location | None,
    runs: Location,
    eval_tokens: str | None,
    ce_tokens: str | None,
    model: str | None,
    dead_at: float,
    alive_above: float,
    ablation: str,
    numbers_only: bool,
    device: str | None,
) -> None:
    """Evaluate every snapshot of every run on held-out tokens; what is done already is kept."""
    picked, opened = pick_device(device), Cache.open(cache_place(cache, preset))
    config = EvalConfig(
        device=picked,
        eval_tokens=parse_count(eval_tokens) if eval_tokens else opened.spec.holdout_tokens,
        ce_tokens=parse_count(ce_tokens) if ce_tokens else _ce_tokens(preset, opened.spec),
        model=model,
        dead_at=dead_at,
        alive_above=alive_above,
        ablation=ablation,
    )
    skipped = Skipped()
    runs = fetched(runs)
    found = find_runs(runs, opened, skipped)
    results = evaluate(opened, found, config, skipped)
    found = [each for each in found if each.name in results]
    report = None if numbers_only else _write_pages(runs, found, results, opened.digest, skipped)
    say(text_table(found, results))
    if report is not None:
        say(f"\nreport: {report}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is evaluated")


def _ce_tokens(preset: str | None, spec: CacheSpec) -> int:
    training = get_preset(preset) if preset else Training.of(spec.d_model, spec.train_tokens, spec.holdout_tokens)
    return training.ce_tokens


def _write_pages(runs: Path, found: list[Run], results: dict[str, list[Result]], cache: str, skipped: Skipped) -> Path:
    """Pictures, model cards, and the report, whose path is returned."""
    measured = None
    with skipped.leaving_out():
        measured = measured_floors(runs, cache)
    plot_runs(found, results, measured, skipped)
    for each in found:
        with skipped.leaving_out():
            write_card(each, results[each.name], measured, sister_runs(each))
    return write_report(runs, found, results, measured, skipped)


@main.command("export")
@click.option("--to", "form", type=click.Choice(list(FORMS)), required=True, help="The tool that is to load them.")
@SEVERAL_RUNS
@click.option("--layers", help="Such as 0-5,12 [default: all there are].")
@click.option("--snapshot", default="final", show_default=True, help="Which of each layer's snapshots.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets <run>/layer_<N> for each SAE.")
@click.option("--model", help="Name of the language model [default: the run's, if it is a name and not a folder].")
def export_command(
    form: str, runs: tuple[Location, ...], layers: str | None, snapshot: str, out: Path, model: str | None
) -> None:
    """Write SAEs in the form that another tool loads; --runs may name .pt files and folders of them, too."""
    config = ExportConfig(
        form=form,
        out=out,
        layers=parse_sites(layers) if layers else None,
        snapshot=snapshot,
        model=model,
    )
    say(f"exported {len(export(tuple(map(fetched, runs)), config))} SAEs to {out}")


@main.command("pages")
@PRESET
@CACHE
@RUNS
@click.option("--layers", help="Such as 0-5,12 [default: all there are].")
@click.option("--snapshot", default="final", show_default=True, help="Which of each layer's snapshots.")
@click.option("--tokens", help="Held-out tokens to look at [default: all].")
@click.option("--out", type=click.Path(path_type=Path), help="Gets index.html and its data [default: pages/ in --runs].")
@MODEL
@DEVICE
def pages_command(
    preset: str | None,
    cache: Location | None,
    runs: Location,
    layers: str | None,
    tokens: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """A page to look at every feature of every SAE; what is there already is kept."""
    opened = Cache.open(cache_place(cache, preset))
    config = PagesConfig(
        device=pick_device(options["device"]),
        out=out or local(runs) / "pages",
        tokens=parse_count(tokens) if tokens else opened.spec.holdout_tokens,
        snapshot=options["snapshot"],
        layers=parse_sites(layers) if layers else None,
        model=options["model"],
    )
    skipped = Skipped()
    page = write_pages(opened, find_runs(fetched(runs), opened, skipped), config, skipped)
    say(f"pages: {page}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is on the pages")


@main.command("publish")
@SEVERAL_RUNS
@click.option("--to", required=True, help="On the hub: who owns it (repositories are named as the runs), or owner/name.")
@click.option("--public", is_flag=True, help="For everybody to see, if it is new [default: private].")
@click.option("--license", default=Publication().license, show_default=True, help="Of the SAEs, as the hub names it.")
@click.option("--dry-run", is_flag=True, help="Prepare everything and list files and sizes, but send nothing.")
def publish_command(runs: tuple[Location, ...], to: str, public: bool, license: str, dry_run: bool) -> None:
    """Upload evaluated runs to the hub; what is there already is not sent again."""
    config = PublishConfig(to=to, license=license, public=public, dry_run=dry_run)
    publish([run for place in runs for run in runs_in(fetched(place))], config)


@main.command("floor")
@click.option("--statistics", type=click.Path(path_type=Path), required=True, help="JSON: alpha, F, sorted_importance.")
@click.option("--widths", default=",".join(map(str, PUBLISHED_WIDTHS)), show_default=True, help="Student widths d_S.")
def floor_command(statistics: Path, widths: str) -> None:
    """Predicted loss floors L*(d_S) of distilling into narrower students: `WIDTH FLOOR`, one line a width."""
    wanted = tuple(map(parse_count, widths.split(",")))
    measured = Statistics.read(statistics)
    say(describe(measured), err=True)
    for width, floor in floors(measured, wanted).items():
        say(f"{width} {floor:#.8g}")


@main.command("distill")
@PRESET
@CACHE
@RUNS
@click.option(
    "--widths", help="Of the students [default: an eighth to three quarters of the model's, as for predicted floors]."
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Students of each width.")
@click.option("--tokens", help="Tokens that each student is trained on [default: all but the held-out ones, once].")
@click.option("--batch", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="Sequences in a step.")
@click.option("--lr", type=Number(0, 1, min_open=True), default=2e-3, show_default=True, help="AdamW's peak learning rate.")
@click.option("--eval-tokens", help="Held-out tokens to measure floors on [default: all].")
@MODEL
@click.option("--alive-above", type=Number(0, 1), default=ALIVE_ABOVE, show_default=True, help="Density.")
@DEVICE
@click.option("--save-minutes", type=Number(0), default=5.0, show_default=True, help="Between resume states.")
def distill_command(preset: str | None, cache: Location | None, runs: Location, **options: Any) -> None:
    """Train narrower students from the model and hold their loss floors beside the predicted ones; run it again to continue."""
    picked, opened = pick_device(options["device"]), Cache.open(cache_place(cache, preset))
    spec, skipped = opened.spec, Skipped()
    widths = tuple(map(parse_count, options["widths"].split(","))) if options["widths"] else student_widths(spec.d_model)[:-1]
    config = DistillConfig(
        tokens=parse_count(options["tokens"]) if options["tokens"] else spec.train_tokens,
        batch=options["batch"],
        lr=options["lr"],
    )
    wanted = DistillOptions(
        runs=fetched(runs),
        widths=tuple(sorted(set(widths))),
        seeds=options["seeds"],
        eval_tokens=parse_count(options["eval_tokens"]) if options["eval_tokens"] else spec.holdout_tokens,
        device=picked,
        model=options["model"],
        alive_above=options["alive_above"],
        save_minutes=options["save_minutes"],
    )
    say(distill_table(distill(opened, config, wanted, skipped)))
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is done")


@main.command("match")
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--alive-above", type=Number(0, 1), default=ALIVE_ABOVE, show_default=True, help="Density.")
@DEVICE
def match_command(run_folder: Path, other: Path | None, alive_above: float, device: str | None) -> None:
    """How many of a run's features another run has, such as one of another seed; alone, how many the final SAEs have."""
    mine, picked = Run.open(run_folder), pick_device(device)
    found = match_runs(mine, Run.open(other), alive_above, picked) if other else match_to_final(mine, alive_above, picked)
    say(match_table(found))


if __name__ == "__main__":
    run(main)

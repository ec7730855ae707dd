"""`rsae eval`: numbers, pictures and a report; `pages`: a look at every feature; `export`: SAEs for other tools; …"""

from pathlib import Path
from typing import Any

import click

from residual_saes.eval.floors.distill import DistillOptions, distill, distill_table
from residual_saes.eval.floors.measured import measured_floors
from residual_saes.eval.floors.students import DistillConfig
from residual_saes.eval.foreign.adopt import AdoptConfig, adopt
from residual_saes.eval.measure.evaluate import EvalConfig, evaluate
from residual_saes.eval.measure.match import match_runs, match_table, match_to_final
from residual_saes.eval.measure.predicted import ALIVE_ABOVE, PUBLISHED_WIDTHS, Statistics, describe, floors, student_widths
from residual_saes.eval.measure.probed import compared
from residual_saes.eval.measure.result import Basis, Result
from residual_saes.eval.measure.runs import Skipped, cache_places, find_runs, runs_in
from residual_saes.eval.pages.ask import Asked, ask
from residual_saes.eval.pages.write import PagesConfig, write_pages
from residual_saes.eval.probes.config import ProbeConfig
from residual_saes.eval.publish.card import sister_runs, write_card
from residual_saes.eval.publish.export import ExportConfig, export
from residual_saes.eval.publish.upload import PublishConfig, publish
from residual_saes.eval.report.page import probes_table, text_table, write_report
from residual_saes.eval.report.pictures import plot_runs
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import (
    CACHE,
    DEVICE,
    MODEL,
    PRESET,
    RUNS,
    SEVERAL_RUNS,
    DefaultRun,
    Number,
    filled,
    options,
    options_of,
    run,
)
from residual_saes.shared.device import pick_device
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import refuse_links
from residual_saes.shared.presets import cache_place, training_defaults
from residual_saes.shared.progress import say
from residual_saes.shared.runs.run import Run
from residual_saes.shared.stores import Location, parse_folder
from residual_saes.shared.stores.mirror import fetched, local
from residual_saes.shared.units import parse_count


@click.group(cls=DefaultRun)
def main() -> None:
    """What SAEs are worth, on held-out tokens, and the way to other tools. Without a command: `run`."""


_place = options(PRESET, CACHE, RUNS)


@main.command("run")
@_place
@options_of(Basis)
@options_of(EvalConfig, "snapshots")
@options_of(AdoptConfig)
@MODEL
@click.option("--numbers-only", is_flag=True, help="Measure and say it, but leave pictures, cards and report as they are.")
@DEVICE
def run_command(preset: str | None, cache: Location | None, runs: Location, numbers_only: bool, **options: Any) -> None:
    """Evaluate every snapshot of every run on held-out tokens; what is done already is kept."""
    taken = filled(AdoptConfig, options)
    options["device"], opened = pick_device(options["device"]), _open(cache, preset, runs, new=taken.saes is not None)
    spec = opened.spec
    defaults = training_defaults(preset, spec.d_model, spec.train_tokens, spec.holdout_tokens)
    config = filled(EvalConfig, options, eval_tokens=spec.holdout_tokens, ce_tokens=defaults.ce_tokens)
    skipped, folder = Skipped(), fetched(runs)
    adopt(opened, folder, taken, skipped)
    runs_of_cache = find_runs(folder, opened, skipped)
    results = evaluate(opened, runs_of_cache, config, skipped)
    runs_of_cache = [each for each in runs_of_cache if each.name in results]
    report = None if numbers_only else _write_pages(folder, runs_of_cache, results, opened.digest, skipped)
    say(text_table(runs_of_cache, results))
    if report is not None:
        say(f"\nreport: {report}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is evaluated")


@main.command("truth")
@_place
@options_of(Basis, "eval_tokens")
@options_of(EvalConfig, "snapshots")
@DEVICE
def truth_command(preset: str | None, cache: Location | None, runs: Location, **options: Any) -> None:
    """Hold SAEs of synthetic worlds against the features that these have; what is measured already is kept."""
    options["device"], opened = pick_device(options["device"]), _open(cache, preset, runs)
    if opened.spec.world is None:
        raise UserError(f"{opened.path} is of a language model, whose true features nobody knows: `rsae harvest synthetic`")
    config = filled(EvalConfig, options, eval_tokens=opened.spec.holdout_tokens, ce_tokens=0)
    skipped = Skipped()
    runs_of_cache = find_runs(fetched(runs), opened, skipped)
    results = evaluate(opened, runs_of_cache, config, skipped)
    say(text_table([each for each in runs_of_cache if each.name in results], results, "truth"))
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is measured")


def _open(cache: Location | None, preset: str | None, runs: Location, *, new: bool = False) -> Cache:
    """The cache that is named, or else the one that the runs were trained on, where it lies now; there may be no runs if they
    are `new`. Raises UserError."""
    empty = new and isinstance(runs, Path) and not any(runs.glob("*/config.json"))
    if cache is None and preset is None and isinstance(runs, Path) and not empty and (places := cache_places(runs)):
        if len(places) > 1:
            raise UserError(f"{runs} has runs of several caches, {', '.join(map(str, places))}: choose one with --cache")
        return Cache.open(places[0])
    return Cache.open(cache_place(cache, preset))


def _write_pages(runs: Path, opened: list[Run], results: dict[str, list[Result]], cache: str, skipped: Skipped) -> Path:
    """Pictures, model cards, and the report, whose path is returned."""
    measured = None
    with skipped.leaving_out():
        measured = measured_floors(runs, cache)
    plot_runs(opened, results, measured, skipped)
    for each in opened:
        with skipped.leaving_out():
            write_card(each, results[each.name], measured, sister_runs(each))
    return write_report(runs, opened, results, measured, skipped)


@main.command("export")
@SEVERAL_RUNS
@options_of(ExportConfig)
def export_command(runs: tuple[Location, ...], **options: Any) -> None:
    """Write SAEs in the form that another tool loads; --runs may name .pt files and folders of them, too."""
    config = filled(ExportConfig, options)
    say(f"exported {len(export(tuple(map(fetched, runs)), config))} SAEs to {config.out}")


@main.command("pages")
@_place
@options_of(PagesConfig)
@click.option("--out", type=parse_folder, metavar="PATH", help="Gets index.html and its data [default: pages/ in --runs].")
@MODEL
@DEVICE
def pages_command(preset: str | None, cache: Location | None, runs: Location, **options: Any) -> None:
    """A page to look at every feature of every SAE; what is there already is kept."""
    opened = _open(cache, preset, runs)
    options["device"] = pick_device(options["device"])
    options["out"] = options["out"] or _pages_of(runs)
    config = filled(PagesConfig, options, tokens=opened.spec.holdout_tokens)
    skipped = Skipped()
    page = write_pages(opened, find_runs(fetched(runs), opened, skipped), config, skipped)
    say(f"pages: {page}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is on the pages")


def _pages_of(runs: Location) -> Path:
    refuse_links(place := local(runs) / "pages")
    return place


@main.command("ask")
@RUNS
@options_of(Asked)
@click.option("--out", type=parse_folder, metavar="PATH", help="Gets ask.html [default: pages/ in --runs].")
@MODEL
@DEVICE
def ask_command(runs: Location, **options: Any) -> None:
    """A page of a text's tokens and their features, with links to the pages of these."""
    options["device"] = pick_device(options["device"])
    options["out"] = options["out"] or _pages_of(runs)
    asked = filled(Asked, options)
    skipped = Skipped()
    say(f"page: {ask(runs_in(fetched(runs)), asked, skipped)}")
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is on the page")


@main.command("probes")
@_place
@options_of(ProbeConfig)
@MODEL
@DEVICE
def probes_command(preset: str | None, cache: Location | None, runs: Location, **options: Any) -> None:
    """Tell labelled texts apart by a few features of each final SAE; what is measured already is kept."""
    from residual_saes.eval.probes.probe import probe  # and with it scikit-learn

    opened = _open(cache, preset, runs)
    options["device"] = pick_device(options["device"])
    skipped, folder = Skipped(), fetched(runs)
    runs_of_cache = find_runs(folder, opened, skipped)
    probe(opened, runs_of_cache, filled(ProbeConfig, options), folder, skipped)
    say(probes_table(compared(folder, runs_of_cache, opened.digest)))
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is probed")


@main.command("publish")
@SEVERAL_RUNS
@options_of(PublishConfig)
def publish_command(runs: tuple[Location, ...], **options: Any) -> None:
    """Upload evaluated runs to the hub; what is there already is not sent again."""
    publish([run for place in runs for run in runs_in(fetched(place))], filled(PublishConfig, options))


@main.command("floor")
@click.option("--statistics", type=parse_folder, metavar="PATH", required=True, help="JSON: alpha, F, sorted_importance.")
@click.option("--widths", default=",".join(map(str, PUBLISHED_WIDTHS)), show_default=True, help="Student widths d_S.")
def floor_command(statistics: Path, widths: str) -> None:
    """Predicted loss floors L*(d_S) of distilling into narrower students: `WIDTH FLOOR`, one line a width."""
    wanted = tuple(map(parse_count, widths.split(",")))
    measured = Statistics.read(statistics)
    say(describe(measured), err=True)
    for width, floor in floors(measured, wanted).items():
        say(f"{width} {floor:#.8g}", asked=True)


@main.command("distill")
@_place
@click.option(
    "--widths", help="Of the students [default: an eighth to three quarters of the model's, as for predicted floors]."
)
@options_of(DistillConfig)
@options_of(DistillOptions)
@MODEL
@DEVICE
def distill_command(
    preset: str | None, cache: Location | None, runs: Location, widths: str | None, device: str | None, **options: Any
) -> None:
    """Train narrower students from the model and hold their loss floors beside the predicted ones; run it again to continue."""
    picked, opened = pick_device(device), _open(cache, preset, runs)
    spec, skipped = opened.spec, Skipped()
    chosen = tuple(map(parse_count, widths.split(","))) if widths is not None else student_widths(spec.d_model)[:-1]
    config = filled(DistillConfig, options, tokens=spec.train_tokens)
    wanted = filled(
        DistillOptions,
        options,
        runs=fetched(runs),
        widths=tuple(sorted(set(chosen))),
        eval_tokens=spec.holdout_tokens,
        device=picked,
    )
    say(distill_table(distill(opened, config, wanted, skipped)))
    if skipped.count:
        raise UserError(f"{skipped.count} left out, as said above; all else is done")


@main.command("match")
@click.argument("run_folder", type=parse_folder)
@click.argument("other", type=parse_folder, required=False)
@click.option("--alive-above", type=Number(0, 1), default=ALIVE_ABOVE, show_default=True, help="Density.")
@DEVICE
def match_command(run_folder: Path, other: Path | None, alive_above: float, device: str | None) -> None:
    """How many of a run's features another run has, such as one of another seed; alone, how many the final SAEs have."""
    run, picked = Run.open(run_folder), pick_device(device)
    matches = match_runs(run, Run.open(other), alive_above, picked) if other else match_to_final(run, alive_above, picked)
    say(match_table(matches))


if __name__ == "__main__":
    run(main)

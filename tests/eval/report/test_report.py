"""Pictures and report of runs as large as the published job's: 24 layers, three settings, one layer unfinished."""

import copy
import dataclasses
import json
import shutil
import struct
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from residual_saes.eval.floors.measured import measured_floors
from residual_saes.eval.measure.features import features_path, load_features
from residual_saes.eval.measure.result import Result
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.report import density, figures, floors, heatmap, pictures, training
from residual_saes.eval.report.columns import columns
from residual_saes.eval.report.fidelity import sparsity_fidelity
from residual_saes.eval.report.figures import Figure, RunData
from residual_saes.eval.report.overview import verdict
from residual_saes.eval.report.page import CAPTIONS, text_table, write_report
from residual_saes.eval.report.pictures import picture_is_whole, plot_runs
from residual_saes.eval.report.settings import command, differences, kind, rate, setting
from residual_saes.eval.report.warnings import warnings
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.runs.run import Run, run_config
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site
from tests.eval.browser import PHONE, Browser
from tests.eval.synthetic import make_distilled, make_runs


def test_a_name_is_no_formula() -> None:
    figure, axes = figures.grid(1, 1, (3.0, 3.0))
    axes[0].plot([1, 2], [1e-3, 1e3], label="of_$x$")
    axes[0].legend()
    axes[0].set_yticks([1e-3, 1], ["Ba$$in-lm", "$$"])
    drawn = pictures.rendered(figures.finished(figure, "Ba$$in-lm, Ba$si$n"), "key")[".svg"].decode()
    assert all(f">{name}<" in drawn for name in ("Ba$$in-lm, Ba$si$n", "of_$x$", "Ba$$in-lm", "$$"))


Results = dict[str, list[Result]]
Published = tuple[Path, list[Run], Results, Path]


def runs_in(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(folder.glob("*/config.json"))]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """(folder, runs, records, report.html), with measured floors and pictures."""
    folder = tmp_path_factory.mktemp("published")
    results = make_runs(folder)
    make_distilled(folder, results)
    runs, skipped = runs_in(folder), Skipped()
    measured = measured_floors(folder, runs[0].config.stored["cache"]["digest"])
    plot_runs(runs, results, measured, skipped)
    (folder / "pages" / runs[0].name / "layer03_final.0123abcd").mkdir(parents=True)
    (folder / "pages" / "index.html").write_text("<title>feature pages</title>")
    report = write_report(folder, runs, results, measured, skipped)
    assert skipped.reasons == []
    return folder, runs, results, report


# --- pictures ---


def png_size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def test_every_picture_is_there_as_png_and_svg(published: Published) -> None:
    for run in published[1]:
        names = sorted(p.name for p in (run.path / "plots").iterdir())
        assert names == sorted(f"{name}{suffix}" for name in CAPTIONS for suffix in (".png", ".svg"))
        for name in CAPTIONS:
            width, height = png_size(run.path / "plots" / f"{name}.png")
            assert 1000 < width < 2000 and 250 < height < 1400
            assert ET.parse(run.path / "plots" / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_pictures_of_all_runs_are_the_same_in_each_of_them(published: Published) -> None:
    for name in ("3_sparsity_fidelity", "7_capacity", "8_loss_floor_predictions"):
        assert len({(run.path / "plots" / f"{name}.svg").read_bytes() for run in published[1]}) == 1
    assert len({(run.path / "plots" / "2_metrics_heatmap.svg").read_bytes() for run in published[1]}) == 3


def test_the_same_numbers_give_the_same_bytes(published: Published) -> None:
    run = published[1][2]
    features = {r.site: load_features(features_path(run, r.site, "final"))[0] for r in published[2][run.name][-9:-3:6]}
    drawn = pictures.rendered(density.importance(data_of(run, published[2]), features), "key")
    assert drawn == pictures.rendered(density.importance(data_of(run, published[2]), features), "key")


@pytest.mark.slow
def test_a_picture_is_drawn_again_only_of_other_numbers(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, runs, results, _ = published
    measured, drawn = measured_floors(folder, runs[0].config.stored["cache"]["digest"]), []
    rendered = pictures.rendered

    def counted(figure: Figure, key: str) -> dict[str, bytes]:
        drawn.append(figure.get_suptitle())
        return rendered(figure, key)

    monkeypatch.setattr(pictures, "rendered", counted)
    plot_runs(runs, results, measured, Skipped())
    assert drawn == []
    other = published[1][1].path / "plots" / "5_feature_density.svg"
    before = other.read_bytes()
    for path, damaged in ((other, b"cut"), (other, before[:-9] + b"0" + before[-8:]), (other.with_suffix(".png"), None)):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(damaged or content)
        assert not picture_is_whole(path)
        plot_runs(runs, results, measured, Skipped())
        assert drawn == [f"{runs[1].name}: how often features fire"]
        assert picture_is_whole(path) and other.read_bytes() == before
        drawn.clear()
    records = [dataclasses.replace(r, fvu=(r.fvu or 0) * 1.1) for r in results[runs[0].name]]
    pictures.write([data_of(runs[0], {runs[0].name: records})], pictures.of_all_runs([data_of(runs[0], results)], None))
    assert len(drawn) == 3
    pictures.write([data_of(runs[0], results)], pictures.of_all_runs([data_of(runs[0], {runs[0].name: records})], None))
    assert len(drawn) == 6


def data_of(run: Run, results: Results) -> RunData:
    return pictures.run_data(run, run.name[-8:], results[run.name])


@pytest.mark.parametrize("layers", [24, 1])
@pytest.mark.slow
def test_nothing_is_cut_off(published: Published, tmp_path: Path, layers: int) -> None:
    """Every label fits, those of large and of small numbers."""
    folder, runs, results, _ = published
    if layers != 24:
        folder, results = tmp_path, make_runs(tmp_path, layers=layers)
        runs = runs_in(folder)
    datas = [data_of(run, results) for run in runs]
    measured = measured_floors(folder, runs[0].config.stored["cache"]["digest"])
    drawn = pictures.of_one_run(datas[2], Skipped()) | pictures.of_all_runs(datas, measured)
    assert drawn.keys() == CAPTIONS.keys()
    for name, picture in drawn.items():
        figure = picture.draw()
        FigureCanvasAgg(figure)
        box, edge = figure.get_tightbbox(), figure.bbox_inches
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, (name, box, edge)


@pytest.mark.parametrize("value", [None, 0.0])
def test_pictures_of_what_is_missing_or_no_number(published: Published, tmp_path: Path, value: float | None) -> None:
    """One layer, one snapshot, no curve, no feature statistics, every metric null or zero: pictures, and no warning."""
    run = Run(tmp_path / published[1][0].name)
    run.path.mkdir()
    shutil.copy(published[1][0].config_path, run.path)
    numbers = {field.name: value for field in dataclasses.fields(Result) if field.default is None and field.name != "l1_weight"}
    record = published[2][run.name][0].to_dict() | numbers | {"alive": None if value is None else 0}
    record |= {"layer": 3, "snapshot": "50M", "trained_tokens": 50_000_000}
    plot_runs([run], {run.name: [Result.from_dict(record)]}, None, Skipped())
    assert {p.stem[0] for p in (run.path / "plots").iterdir()} == set("23478")


def test_a_heat_map_is_coloured_by_merit(published: Published) -> None:
    """Whatever the other layers': a column of good numbers is no pattern, and what is neither good nor poor has no colour."""
    data = [dataclasses.replace(r, dead_share=1e-9 * r.site.layer) for r in published[2][published[1][0].name]]
    of = data_of(published[1][0], {published[1][0].name: data})
    shades = np.asarray(heatmap.heatmap(of).axes[0].images[0].get_array(), float)
    keys = [column.key for column in columns("map")]
    assert shades[:, keys.index("dead_share")].min() > 0.99
    assert np.isnan(shades[:, keys.index("l0")]).all()
    fvu, cosine = (next(c for c in columns("page") if c.key == key).merit for key in ("fvu", "cosine"))
    assert cosine(0.87) == fvu(1 - 0.87) == pytest.approx(0.443, abs=1e-3)
    assert cosine(0.985) == fvu(1 - 0.985) == pytest.approx(0.912, abs=1e-3)
    assert (fvu(0.0), fvu(1.0), fvu(3.0), cosine(1.2), fvu(None)) == (1, 0, 0, 1, None)


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_layer_stands_out_from_a_white_and_a_dark_page(published: Published) -> None:
    colours = figures.LayerColours(map(Site, range(24)))
    for shade in [*(luminance(colours[Site(layer)]) for layer in range(24)), *map(luminance, figures.COLOURS.values())]:
        assert 1.05 / (shade + 0.05) >= 3
        assert (shade + 0.05) / (luminance("#181818") + 0.05) >= 3
    assert colours[Site(0)] == figures.LayerColours([Site(0)])[Site(0)]


def test_a_run_looks_alike_whichever_stand_beside_it(published: Published) -> None:
    """Colour and marker are of its setting."""
    datas = [data_of(run, published[2]) for run in published[1]]

    def looks(of: list[RunData]) -> dict[str, tuple[Any, Any]]:
        axis = sparsity_fidelity(of).axes[2]
        names = [text.get_text() for text in axis.texts]
        lines = [line for line in axis.lines if line.get_linestyle() != "None"]
        return {
            d.setting: (line.get_color(), line.get_marker()) for d, line in zip(of, lines, strict=True) if d.setting in names
        }

    whole = looks(datas)
    assert len(whole) == 3 and len({marker for _, marker in whole.values()}) == 3
    assert looks(datas[::-1]) == whole
    assert looks(datas[1:]).items() <= whole.items()


def test_a_line_joins_runs_that_differ_in_their_setting_alone(published: Published) -> None:
    """Through means over the layers that all of them have. One through a random decoder and a trained one would be no curve of
    anything."""
    datas = [data_of(run, published[2]) for run in published[1]]
    assert len({data.kind for data in datas}) == 1
    train = published[1][0].config.stored["train"]
    others = (train | {"l1": {"k": 64}}, train | {"step": train["step"] | {"decoder": "random"}}, train | {"refit": 0.2})
    assert len({datas[0].kind, *map(kind, others)}) == 4

    def lines(of: list[RunData]) -> list[list[list[float]]]:
        return [
            np.asarray(line.get_xydata()).tolist()
            for line in sparsity_fidelity(of).axes[0].lines
            if line.get_label() == "_kind"
        ]

    (line,) = lines(datas)
    common = [r.l0 or 0 for r in datas[0].latest if r.site.layer < 23]  # one run's last layer is not finished
    assert line[0][0] == pytest.approx(sum(common) / 23) and len(line) == 3
    assert sorted(map(len, lines([*datas[:2], dataclasses.replace(datas[2], kind="another")]))) == [1, 2]


def test_a_lambda_that_stays_has_no_panel_and_counts_begin_at_nothing(published: Published) -> None:
    data, curve = data_of(published[1][0], published[2]), published[1][0].metrics(Site(0))
    flat = [dataclasses.replace(point, l1_weight=0.0, alive=1024) for point in curve]
    axes = training.training_curves(data, {Site(0): flat}).axes
    assert [axis.get_title(loc="left") for axis in axes][2:] == ["alive features"]
    assert axes[2].get_ylim() == pytest.approx((0, 1.05 * 1024))
    moving = [dataclasses.replace(point, l1_weight=1e-4 * n) for n, point in enumerate(curve)]
    assert training.training_curves(data, {Site(0): moving}).axes[3].get_title(loc="left") == "λ"


@pytest.mark.parametrize(
    ("least", "most", "ticks"),
    [
        (31.0, 220.0, [0, 50, 100, 200]),
        (0.02, 150.0, [0, 0.1, 1, 10, 100]),
        (1e-17, 20.0, [0, 1e-17, 1e-14, 1e-11, 1e-8, 1e-5, 1e-2, 10]),
        (3.0, 3.0, [0]),
    ],
)
def test_floors_have_round_numbers_on_their_axis(least: float, most: float, ticks: list[float]) -> None:
    """None between 0 and the least of them, where the axis is linear and there is no room."""
    assert floors.ticks(least, most) == pytest.approx(ticks, rel=1e-12)


# --- the report ---


def column(browser: Browser, table: int, head: str, part: str = "finished") -> list[str]:
    script = """const table = document.querySelectorAll("table.sortable")[arguments[0]];
    const at = [...table.tHead.rows[0].cells].findIndex(head => head.querySelector("button").textContent === arguments[1]);
    return [...table.querySelectorAll("tbody." + arguments[2] + " tr")].map(row => row.cells[at].textContent)"""
    cells: list[str] = browser.run(script, table, head, part)
    return cells


def click_head(browser: Browser, table: int, head: str) -> None:
    script = """const heads = document.querySelectorAll("table.sortable")[arguments[0]].tHead.rows[0].cells;
    return [...heads].map(each => each.querySelector("button")).find(each => each.textContent === arguments[1])"""
    browser.run("arguments[0].click()", browser.run(script, table, head))


def last_table(browser: Browser) -> int:
    """Of the last run's SAEs."""
    return len(browser.all("table.sortable")) - 1


def test_the_page_needs_nothing_but_itself(published: Published, browser: Browser) -> None:
    browser.open(published[3])
    assert browser.driver.title == "SAE runs"
    assert len(browser.all("figure svg")) == 3 * 4 + 1
    names = browser.run("return [...document.querySelectorAll('svg [id]')].map(e => e.id)")
    assert len(names) == len(set(names)) > 100
    assert [url for url in browser.loaded() if not url.startswith("data:")] == [published[3].as_uri()]
    assert browser.errors() == []
    links = {e.get_attribute("href") for e in browser.all("a[href*='/']")}
    assert f"{published[0].as_uri()}/pages/index.html#{published[1][0].name}/final/3" in links
    assert all(Path(str(link).removeprefix("file://").partition("#")[0]).exists() for link in links)


def test_tables_sort_by_number_and_an_unfinished_layer_stays_apart(published: Published, browser: Browser) -> None:
    browser.open(published[3])
    table = last_table(browser)
    layers = [str(n) for n in range(23)]
    assert column(browser, table, "layer") == layers
    assert column(browser, table, "trained on", "unfinished") == ["150M of 300M, unfinished"]
    click_head(browser, table, "L0")
    l0 = list(map(float, column(browser, table, "L0")))
    assert l0 == sorted(l0)
    click_head(browser, table, "L0")
    assert list(map(float, column(browser, table, "L0"))) == sorted(l0, reverse=True)
    assert browser.run("return document.querySelectorAll('[aria-sort=descending]').length") == 1
    assert column(browser, table, "layer", "unfinished") == ["23"]
    click_head(browser, table, "layer")
    assert column(browser, table, "layer") == layers


def test_means_are_of_finished_layers_and_warnings_name_the_others(published: Published, browser: Browser) -> None:
    _, runs, results, report = published
    browser.open(report)
    assert column(browser, 0, "finished layers") == ["24 of 24", "24 of 24", "23 of 24"]
    for number, run in enumerate(runs):
        common = [r.l0 or 0 for r in results[run.name] if r.final and r.site.layer < 23]
        assert column(browser, 0, "L0")[number] == f"{sum(common) / 23:.1f}"
    said = browser.text("ul.warnings")
    assert f"{runs[2].name}: layer 23 is 150M of 300M, unfinished" in said
    assert "FVU is flattered by a few directions" in said
    browser.open(report.with_name("floors.html"))
    assert "distillation" in browser.text("body")
    assert "not measured" not in browser.text("body")
    assert len(browser.all("figure svg")) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone(published: Published, browser: Browser, dark: bool) -> None:
    browser.look(PHONE, dark=dark)
    browser.open(published[3])
    assert browser.overflow() == 0
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(24, 24, 24)") is dark
    table = last_table(browser)
    click_head(browser, table, "FVU")
    fvu = list(map(float, column(browser, table, "FVU")))
    assert fvu == sorted(fvu)


def test_hostile_names_are_text(published: Published, tmp_path: Path, browser: Browser) -> None:
    """A run's folder may be called anything."""
    run = Run(tmp_path / "a'\"><img src=x onerror=document.title='bad'> ünïcode #1?")
    shutil.copytree(published[1][0].path, run.path)
    (tmp_path / "pages" / run.name / "layer05_final.0123abcd").mkdir(parents=True)
    shutil.copy(published[0] / "pages" / "index.html", tmp_path / "pages")
    skipped = Skipped()
    skipped.reasons.append("<script>document.title='bad'</script>")
    results = {run.name: published[2][published[1][0].name]}
    report = write_report(tmp_path, [run], results, None, skipped)
    browser.open(report)
    assert browser.driver.title == "SAE runs"
    assert run.name in [e.text for e in browser.all("h2")]
    assert "<script>document.title" in browser.text("ul.warnings")
    browser.run("arguments[0].click()", browser.run("return document.querySelector('td a')"))
    assert browser.driver.title == "feature pages"
    assert browser.run("return decodeURIComponent(location.hash)") == f"#{run.name}/final/5"
    browser.open(report.with_name("floors.html"))
    assert "Measured floors: not measured" in browser.text("body")


def test_a_script_in_a_picture_does_not_run(published: Published, tmp_path: Path, browser: Browser) -> None:
    """A folder that somebody else made may hold one."""
    run = Run(tmp_path / "theirs")
    shutil.copytree(published[1][0].path, run.path)
    path = run.path / "plots" / "5_feature_density.svg"
    path.write_text(path.read_text().replace("<defs>", "<script>document.title='bad'</script><defs>", 1))
    browser.open(write_report(tmp_path, [run], {run.name: published[2][published[1][0].name]}, None, Skipped()))
    assert len(browser.all("figure svg")) == 5
    assert browser.driver.title == "SAE runs"


def test_means_follow_the_layers_and_runs_that_are_chosen(published: Published, browser: Browser) -> None:
    _, runs, results, report = published
    browser.open(report)
    boxes = browser.all("#overview input")
    boxes[2].click()  # without it all have layer 23
    l0 = [r.l0 or 0 for r in results[runs[0].name] if r.final]
    assert column(browser, 0, "L0") == [f"{sum(l0) / 24:.1f}", column(browser, 0, "L0")[1], "–"]
    boxes[2].click()
    choose = "const e = document.getElementById('over'); e.value = '23'; e.dispatchEvent(new Event('change'))"
    browser.run(choose)
    assert column(browser, 0, "L0") == [f"{l0[23]:.1f}", column(browser, 0, "L0")[1], "–"]
    assert column(browser, 0, "setting") == ["λ 3e-4", "λ 8e-5", "λ → L0 150"]
    click_head(browser, 0, "FVU")
    assert column(browser, 0, "setting") == ["λ 8e-5", "λ 3e-4", "λ → L0 150"]


def test_columns_unfold(published: Published, browser: Browser) -> None:
    browser.open(published[3])
    shown = "return [...document.querySelectorAll('#run-0-table th')].filter(e => e.offsetParent).length"
    before = browser.run(shown)
    browser.one("#all-run-0-table").click()
    assert before < 9 and browser.run(shown) == len(columns("page", next(iter(published[2].values()))))


def test_a_run_that_another_beats_is_said_to_be() -> None:
    def means(l0: float, fvu: float, recovered: float | None) -> dict[str | int, float | None]:
        return {"l0": l0, "fvu": fvu, "ce_recovered": recovered}

    worse = "is as sparse and loses less"
    lines = verdict(["a", "b", "c", "d"], [means(32, 0.2, 0.9), means(32, 0.1, 0.95), means(64, 0.09, 0.97), means(1, 1, None)])
    assert [line.split(":")[0] for line in lines] == ["b", "c", "a"]
    said = [line.rpartition("; ")[2].removesuffix(f" {worse}") for line in lines]
    assert said == ["no other", "no other", "b"]
    assert verdict(["a"], [means(32, 0.2, 0.9)]) == []


@pytest.mark.parametrize(
    ("l1", "words", "flag"),
    [
        ({"init": 3e-2, "target": None}, "λ 3e-2", "--l1 3e-2"),
        ({"init": 2e-2, "target": 32.0}, "λ → L0 32", "--l1 adaptive:2e-2@32"),
        ({"k": 64}, "BatchTopK 64", "--l1 batchtopk:64"),
        ({"kind": "topk", "k": 8}, "TopK 8", "--l1 topk:8"),
        ({"kind": "matryoshka", "k": 8, "prefixes": [64, 256]}, "Matryoshka 8@64+256", "--l1 matryoshka:8@64+256"),
    ],
)
def test_a_setting_is_told_in_words_and_as_it_was_typed(
    published: Published, l1: dict[str, Any], words: str, flag: str
) -> None:
    config = copy.deepcopy(published[1][0].config.stored)
    config["train"] |= {"l1": l1}
    assert setting(config["train"]) == words
    typed = command(config["train"], map(Site, range(24)))
    assert flag in typed and "--layers 0-23 --expansion 32 --tokens 300000000" in typed
    assert "--revive" not in typed and command(config["train"] | {"revive": True}, [Site(0)]).endswith(" --revive")
    other = config["train"] | {"batch": 7, "step": config["train"]["step"] | {"decoder": "random"}}
    unlike = differences([RunConfig.of(each, Path("config.json")) for each in (config, config | {"train": other})])
    assert unlike[1] == {"batch": "7", "step decoder": "random"}


def test_time_and_rate_are_those_of_the_curve() -> None:
    curve = [Point(step=1, tokens=1000, tokens_per_second=0.0), Point(step=2, tokens=600_000, tokens_per_second=2000.0)]
    assert rate({Site(0): curve}) == ("5 min", "2k tokens/s")
    assert rate({Site(0): [Point(step=1, tokens=5)], Site(1): []}) == ("–", "–")


def test_what_is_other_than_the_rest_is_a_warning(published: Published) -> None:
    _, runs, results, _ = published
    name = runs[0].name
    changed = [r for r in results[name] if r.site != Site(5)]
    changed[5] = dataclasses.replace(changed[5], eval_tokens=64, fvu=None, dead_share=0.6, alpha=0.5)
    lines = " / ".join(warnings([runs[0], runs[1]], results | {name: changed}, Skipped()))
    for part in (
        "layers 0 are measured on other text",
        "fvu of some layers is no number",
        "features of layers 0 are dead",
        "features of layers 0 are too dense",
        "no SAE of layers 5, which other runs have, has been evaluated",
    ):
        assert f"{name}: {part}" in lines or f"{name}: more than half of the {part}" in lines, lines


def test_a_random_decoder_is_said_to_be_one(published: Published, tmp_path: Path) -> None:
    config, run = published[1][0].config.stored, Run(tmp_path / "baseline")
    run.path.mkdir()
    train = config["train"] | {"step": config["train"]["step"] | {"decoder": "random"}}
    run.create(run_config(train, config["cache"]), config["machine"])
    lines = warnings([run, published[1][0]], {run.name: [], published[1][0].name: []}, None)
    assert [line.partition(": ")[0] for line in lines if "a baseline for other runs" in line] == ["baseline"]


def test_the_table_of_a_terminal_marks_what_is_unfinished(published: Published) -> None:
    rows = text_table(published[1], published[2]).splitlines()
    assert sum("unfinished" in row for row in rows) == 1
    assert len({len(row) for row in rows[-25:]}) == 1


# --- measured floors ---


def test_measured_floors_are_of_this_cache_and_as_they_were_written(published: Published, tmp_path: Path) -> None:
    folder, runs, _, _ = published
    digest = runs[0].config.stored["cache"]["digest"]
    assert measured_floors(tmp_path, digest) is None
    found = measured_floors(folder, digest)
    assert found is not None and [f.width for f in found.floors] == [128, 256, 384, 512, 768]
    assert measured_floors(folder, "of another cache") is None
    text = (folder / "distilled.json").read_text()
    prediction = (experiment := json.loads(text)[0])["predictions"][0]
    for damaged in (
        text.replace("0.01", "0.02", 1), text[:-5], "{}", json.dumps([None]),
        *(json.dumps([seal(experiment | {"predictions": [prediction | odd]})]) for odd in ({"layer": "x"}, {"fits": [1]})),
        json.dumps([seal(experiment | {"students": [experiment["students"][0] | {"width": 0}]})]),
    ):  # fmt: skip
        (tmp_path / "distilled.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            measured_floors(tmp_path, digest)

"""Tables, turns, projection and the reports of failures. Nothing here asserts a time."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import harness, project, report, table
from bench.__main__ import main
from bench.goals import Goal, goals
from bench.harness import Comparison, Contender, Entry
from bench.report import Machine, Results
from bench.setup import Setup, small
from bench.steps import WAYS
from bench.workers.worker import Job
from residual_saes.fleet import hours
from residual_saes.shared.errors import UserError

MACHINE = Machine(
    slug="box-2c", cpu="Box", cores=2, memory_gib=8.0, flags=("amx_bf16",), gpu=None, system="Linux", python="3", torch="2",
    threads=2,
)  # fmt: skip
GPU_RATES = hours.Rates(
    machine="H1", cores=None, date="2026-02-01", d_model=1024, features=32768, forward=1e6, write=1e9, read=1e9, dense=3e6,
    sparse=5e6, overlap=True,
)  # fmt: skip
SMALL = small(Setup())
JOB = Job(d=16, features=32, tokens=64, threads=1, device="cpu", directory="")
TRAINING = Comparison(
    key="training",
    name="step",
    unit="tokens",
    entries=(
        Entry(name="ours, dense", key="dense", role="ours", work=80, seconds=(1.0, 2.0, 1.0)),
        Entry(name="ours, sparse", key="sparse", role="ours", work=200, seconds=(1.0, 2.0, 1.0), note="L0 150"),
        Entry(name="products", role="limit", work=100, seconds=(1.0, 2.0, 1.0), figures={"flop": 2e12}),
        Entry(name="slower limit", role="limit", work=10, seconds=(1.0, 1.0, 1.0), against=("dense",)),
        Entry(name="peer", role="peer", work=40, seconds=(1.0, 4.0, 1.0)),
        Entry(name="SAELens", key="sae_lens", role="peer", work=10, seconds=(1.0, 2.0, 1.0)),
        Entry(name="gone", role="peer", failure="did not | install"),
    ),
)
SETTINGS = Comparison(
    key="settings",
    name="three",
    unit="tokens",
    # The slow round slows both: its own ratio is what the others' is.
    entries=tuple(
        Entry(name=f"{role} {way}", key=way, role=role, work=240, seconds=seconds, against=() if role == "ours" else (way,))
        for way, ours_seconds in (("dense", (3.03, 9.0, 3.06)), ("sparse", (1.2, 1.2, 1.2)))
        for role, seconds in (("ours", ours_seconds), ("base", (3.0, 9.0, 3.0) if way == "dense" else (1.0, 1.0, 1.0)))
    ),
)
STREAM = Comparison(
    key="stream",
    name="stream",
    unit="tokens",
    entries=(
        Entry(name="one dense", key="dense", role="ours", work=1, seconds=(1.0,), figures={"idle": 0.004}),
        Entry(name="one sparse", key="sparse", role="ours", work=1, seconds=(1.0,), figures={"idle": 0.02}),
    ),
)


def path(key: str, work: float, *others: Entry) -> Comparison:
    mine = Entry(name="ours", role="ours", work=work, seconds=(1.0,))
    return Comparison(key=key, name=key, unit="bytes", entries=(mine, *others))


def results(*comparisons: Comparison, d: int = 1024) -> Results:
    return Results(machine=MACHINE, settings={"d": d, "features": 32768}, comparisons=comparisons, date="2026-01-01")


LENS_WRITER = Entry(name="SAELens writer", key="sae_lens_cache", role="peer", work=1e9, seconds=(4.0,))
RAW = (
    Entry(name="buffered", role="limit", work=1e9, seconds=(1.0,)),
    Entry(name="direct", role="limit", work=2e9, seconds=(1.0,)),
)
WHOLE = results(
    TRAINING,
    SETTINGS,
    STREAM,
    path("writing", 2e9, *RAW, LENS_WRITER),
    path("reading", 1e9, *RAW),
    path("forward", 1000, Entry(name="plain", role="peer", work=1000, seconds=(1.0,))),
)


# ------------------------------------------------------------------------------------------------------------- report


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row for row in cells}


def test_limits_and_peers_show_each_of_ours_by_its_label() -> None:
    found = rows(table.details(WHOLE))
    assert found["ours, dense"][1:3] == ["80 tokens/s", ""]
    assert found["_products_ (limit)"][1:3] == ["100 tokens/s, 2.00 TFLOP/s", "dense 80%, sparse 200%"]
    assert found["_slower limit_ (limit)"][2] == "dense 800%"
    assert found["peer"][2] == "dense 2.00 ×, sparse 5.00 ×"
    assert found["base dense"][2] == "dense costs 1.010 ×"
    assert found["one dense"][2] == "0.40% outside steps"
    assert "did not \\| install" in "".join(found["gone"])
    assert found["plain"][2] == "1.00 ×", "one of ours needs no label"


def test_goals_are_met_or_not_by_their_own_bounds() -> None:
    found = {goal.name: goal for goal in goals(WHOLE)}
    assert {name: goal.met for name, goal in found.items()} == {
        "dense step, of five products": True,
        "dense step, of the best peer": True,
        "dense step, of SAELens": True,
        "sparse step, of five products": True,
        "three dense settings, cost over three times one": True,
        "three sparse settings, cost over three times one": False,
        **{f"{kind} step, {way}, cost over BatchTopK's": None for kind in ("matryoshka", "jumprelu") for way in WAYS},
        **{f"crosscoder's {way} step, cost over SAEs' of its layers": None for way in WAYS},
        "loader, of raw read": False,
        "dense training, time outside steps (waiting for data)": True,
        "sparse training, time outside steps (waiting for data)": False,
        "writer, of raw write": True,
        "writer, of SAELens' cache writer": True,
        **{f"int8 {part}, tokens of float16's": None for part in ("loader", "writer")},
        "forward, of plain transformers": False,
    }
    assert found["loader, of raw read"].value == 0.5, "the faster limit counts"
    assert found["dense step, of the best peer"].note == "peer; without gone"
    shown = rows(table.details(WHOLE))
    three = shown["three dense settings, cost over three times one ≤ 1.02 ×"]
    assert three[1:] == ["1.010 × (half of the rounds 1.005–1.015)", "met"]
    assert shown["loader, of raw read ≥ 90%"][1:] == ["50.0% (direct)", "**not met**"]
    assert shown["dense step, of SAELens ≥ 5 ×"][1:] == ["8.000 ×", "met"]


def test_a_goal_without_a_figure_is_not_measured() -> None:
    found = goals(results(TRAINING))
    assert [goal.verdict for goal in found][:5] == ["met", "met", "met", "met", "not measured"]
    without_lens = replace(TRAINING, entries=TRAINING.entries[:5])
    lens = next(goal for goal in goals(results(without_lens)) if goal.name == "dense step, of SAELens")
    assert (lens.verdict, lens.measured) == ("not measured", "none")


@pytest.mark.parametrize(("sign", "met"), [("≥", True), ("≤", True), (">", False), ("<", False)])
def test_a_goal_reached_exactly(sign: Any, met: bool) -> None:
    assert Goal(name="", sign=sign, bound=1, unit="×", value=1.0).met is met


def test_results_survive_the_file(tmp_path: Path) -> None:
    report.write(WHOLE, tmp_path)
    assert report.read(tmp_path) == [WHOLE]


def test_publish_puts_what_decides_on_one_page_and_all_into_the_details(tmp_path: Path) -> None:
    page, compared, details, folder = (tmp_path / name for name in ("speed.md", "quality.md", "details.md", "results"))
    report.write(WHOLE, folder)
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"rates": [asdict(GPU_RATES), asdict(replace(GPU_RATES, machine="Box", cores=2))]}))
    begin, end = (marker.format("bench") for marker in table.MARKERS)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    table.publish(folder, page, compared, details, rates)
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert rows(text)["step: ours, dense"] == ["step: ours, dense", "80 tokens/s", ""]
    assert "step: peer" not in rows(text)
    assert {"peer", "gone", "loader, of raw read ≥ 90%"} <= set(rows(details.read_text()))
    written = hours.stored(rates)
    assert [(one.machine, one.dense) for one in written] == [("Box", 78), ("H1", 3e6)], "measured again, and kept"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs one"):
        table.publish(folder, page, compared, details, rates)


def test_what_is_published_is_what_the_results_say(tmp_path: Path) -> None:
    written = (*(f"docs/findings/{name}.md" for name in ("speed", "quality", "speed-details")), "fleet/rates.json")
    pages = {name: tmp_path / Path(name).name for name in written}
    for name, page in pages.items():
        page.write_text((table.ROOT / name).read_text())
    table.publish(report.RESULTS, *pages.values())
    assert all(page.read_text() == (table.ROOT / name).read_text() for name, page in pages.items())


# ------------------------------------------------------------------------------------------------------------- rounds


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def run(name: str, seconds: Iterator[float]) -> harness.Run:
        def once() -> float:
            calls.append(name)
            return next(seconds)

        return once

    runs = {"a": run("a", iter((9.0, 1.0, 3.0))), "b": run("b", iter((9.0, 2.0, 2.0)))}
    assert harness.take_turns(runs, 2) == ({"a": (1.0, 3.0), "b": (2.0, 2.0)}, {})
    assert calls == ["a", "b"] * 3


def test_one_that_raises_is_out_with_its_reason_and_the_others_go_on() -> None:
    turns = iter((1.0, 1.0))
    contenders = [
        Contender(name="breaks", role="peer", work=1, run=lambda: next(turns, None) or 1 / 0, note=lambda: "never asked"),
        Contender(name="works", role="ours", work=6, run=lambda: 2.0, note=lambda: "asked afterwards"),
    ]
    found = {e.name: e for e in harness.compare(name="x", unit="tokens", contenders=contenders, rounds=3).entries}
    assert found["breaks"].seconds == () and found["breaks"].failure == "ZeroDivisionError: division by zero"
    assert found["breaks"].note == ""
    assert found["works"].rate == 3.0 and found["works"].note == "asked afterwards"


# --------------------------------------------------------------------------------------------------------- projection


def test_projection_is_work_over_rate() -> None:
    job = project.Job(tokens=1_000_000, layers=2, settings=3)
    times = project.from_results(WHOLE).times(job.work)
    assert times.forward == pytest.approx(1e6 / 1000)
    assert times.write == pytest.approx(1e6 * 2 * 1024 * 2 / 2e9)
    assert times.read == pytest.approx(2 * times.write)
    assert times.dense == pytest.approx(1e6 * 6 / (240 / 3.06)), "the row of three settings"
    assert times.sparse == pytest.approx(1e6 * 6 / 200)
    assert not times.overlap and project.binding(times, "dense") == project.TRAINING["dense"]
    assert project.binding(replace(times, read=1e9), "sparse") == "read"


def test_the_order_of_rows_does_not_matter_to_the_projection() -> None:
    turned = [replace(one, entries=one.entries[::-1]) for one in reversed(WHOLE.comparisons)]
    assert project.from_results(results(*turned)) == project.from_results(WHOLE)


def test_the_published_practice_is_scaled_with_the_tokens() -> None:
    text = project.shown(project.from_results(WHOLE), project.Job(tokens=150_000_000, layers=2))
    assert "35 min x 6" in text and "1.8 h" in text  # 3.5 h for all of its tokens


def test_projection_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="lack forward"):
        project.from_results(results(TRAINING))
    failed = replace(SETTINGS, entries=SETTINGS.entries[:2])
    with pytest.raises(UserError, match="lack settings sparse"):
        project.from_results(results(*(failed if one is SETTINGS else one for one in WHOLE.comparisons)))
    with pytest.raises(UserError, match="another shape"):
        project.from_results(results(*WHOLE.comparisons, d=512))


def test_project_shows_this_machine_and_the_latest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "this_machine", lambda: ("Box", 2))
    report.write(WHOLE, tmp_path)
    done = CliRunner().invoke(main, ["project", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Box (2026-01-01): 300M tokens x 24 layers x 3 settings" in done.output
    assert "NVIDIA H200 (2026-11-26" in done.output and "Xeon" not in done.output
    assert "published practice, H100, 35 min x 72" in done.output and "42.0 h" in done.output
    assert "training, every step sparse (lower bound)" in done.output
    for month, name in ((2, "old"), (3, "new")):
        report.write(replace(WHOLE, machine=replace(MACHINE, slug=name, gpu=name), date=f"2026-0{month}-01"), tmp_path)
    gpus = [one.machine for one in project.all_rates(tmp_path) if one.cores is None]
    assert gpus == ["new"], "no GPU that was known before"


def test_project_says_that_this_machine_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "this_machine", lambda: ("Another", 2))
    done = CliRunner().invoke(main, ["project", "--results", str(tmp_path)])
    assert "this machine is not measured" in done.output and "NVIDIA H200" in done.output

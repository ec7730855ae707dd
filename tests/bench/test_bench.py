"""Tables, turns, projection and the reports of failures. Nothing here asserts a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import growth, ours, project, report
from bench.__main__ import main
from bench.peers import STEPS, Load, Peer, PeerFailed, Worker, check
from bench.report import Comparison, Contender, Entry, Machine, Results, Rounds
from shared.cli import UserError

MACHINE = Machine(
    slug="box-2c", cpu="Box", cores=2, memory_gib=8.0, flags=("amx_bf16",), gpu=None, system="Linux", python="3", torch="2",
    threads=2,
)  # fmt: skip
TRAINING = Comparison(
    key="training",
    name="step",
    unit="tokens",
    entries=(
        Entry(name="ours, dense", role="ours", work=80, seconds=(1.0, 2.0, 1.0)),
        Entry(name="ours, sparse", role="ours", work=200, seconds=(1.0,), note="L0 150"),
        Entry(name="ours, three", role="ours", work=240, seconds=(3.0,)),
        Entry(name="products", role="limit", work=100, seconds=(1.0,)),
        Entry(name="slower limit", role="limit", work=10, seconds=(1.0,)),
        Entry(name="peer", role="peer", work=40, seconds=(1.0,)),
        Entry(name="gone", role="peer", failure="did not | install"),
    ),
)


def path(key: str, work: float) -> Comparison:
    return Comparison(key=key, name=key, unit="bytes", entries=(Entry(name="ours", role="ours", work=work, seconds=(1.0,)),))


def results(*comparisons: Comparison) -> Results:
    return Results(machine=MACHINE, settings={"d": 1024, "features": 32768}, comparisons=comparisons, date="2026-01-01")


WHOLE = results(TRAINING, path("writing", 2e9), path("reading", 1e9), path("forward", 1000))


# ------------------------------------------------------------------------------------------------------------- report


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {row[1]: row for row in cells}


def test_ours_show_their_share_of_the_fastest_limit_and_peers_both_ratios() -> None:
    table = rows(report.table(WHOLE))
    assert table["**ours, dense**"][2:4] == ["80 tokens/s", "80% of products"]
    assert table["**ours, sparse**"][3] == "200% of products"
    assert table["**ours, three**"][3] == "80% of products"
    assert table["_products_ (limit)"][3] == ""
    assert table["peer"][3] == "2.00 × and 5.00 ×"
    assert "did not \\| install" in "".join(table["gone"])


def test_no_limit_no_share() -> None:
    assert rows(report.table(results(path("forward", 1e9))))["**ours**"][2:4] == ["1.00 GB/s", ""]


def test_results_survive_the_file(tmp_path: Path) -> None:
    assert report.read(report.write(WHOLE, tmp_path)) == WHOLE


def test_publish_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.publish(WHOLE, readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and "**ours, dense**" in text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="needs one"):
        report.publish(WHOLE, readme)


# ------------------------------------------------------------------------------------------------------------- rounds


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def run(name: str, seconds: Iterator[float]) -> report.Run:
        def once() -> float:
            calls.append(name)
            return next(seconds)

        return once

    found = Rounds({"a": run("a", iter((9.0, 1.0, 3.0))), "b": run("b", iter((9.0, 2.0, 2.0)))}).measure(2)
    assert calls == ["a", "b"] * 3
    assert found["a"].seconds == (1.0, 3.0) and found["b"].median == 2.0


def test_one_that_raises_is_out_with_its_reason_and_the_others_go_on() -> None:
    turns = iter((1.0, 1.0))
    contenders = [
        Contender(name="breaks", role="peer", work=1, run=lambda: next(turns, None) or 1 / 0, note=lambda: "never asked"),
        Contender(name="works", role="ours", work=6, run=lambda: 2.0, note=lambda: "asked afterwards"),
    ]
    found = {e.name: e for e in report.compare(name="x", unit="tokens", contenders=contenders, rounds=3).entries}
    assert found["breaks"].seconds == () and found["breaks"].failure == "ZeroDivisionError: division by zero"
    assert found["breaks"].note == ""
    assert found["works"].rate == 3.0 and found["works"].note == "asked afterwards"


# -------------------------------------------------------------------------------------------------------------- peers


def test_a_peer_that_cannot_start_says_why_in_one_line() -> None:
    with pytest.raises(PeerFailed, match="^nobody: ended with exit status 1 and no answer$"):
        Worker(Peer(name="nobody", label="nobody", module="bench.workers.nobody"), Load(d=8, features=16, tokens=8))


def test_a_peer_that_fails_inside_says_why(tmp_path: Path) -> None:
    # Our own environment has no SAELens: the worker starts and then fails on its import.
    peer = Peer(name="sae_lens", label="SAELens", module="bench.workers.sae_lens")
    with pytest.raises(PeerFailed, match="sae_lens: ModuleNotFoundError: No module named"):
        Worker(peer, Load(d=8, features=16, tokens=8))


def test_the_plain_step_trains() -> None:
    import sys

    assert check(STEPS[0], Load(threads=1), Path(sys.executable))["check"] == "passed"


# --------------------------------------------------------------------------------------------------------- projection


def test_projection_is_work_over_rate() -> None:
    job = project.Job(tokens=1_000_000, layers=2, settings=3)
    found = project.hours(project.from_results(WHOLE), job)
    assert found.forward == pytest.approx(1e6 / 1000 / 3600)
    assert found.write == pytest.approx(1e6 * 2 * 1024 * 2 / 2e9 / 3600)
    assert found.read == pytest.approx(2 * found.write)
    assert found.dense == pytest.approx(1e6 * 6 / 80 / 3600)
    assert found.sparse == pytest.approx(1e6 * 6 / 200 / 3600)
    assert found.total(found.dense) == pytest.approx(found.forward + found.write + found.read + found.dense)
    assert found.binds("training, all steps dense") == "training, all steps dense"


def test_parts_that_hide_behind_one_another_count_once() -> None:
    found = project.Hours(forward=1, write=5, read=2, dense=7, sparse=1, overlap=True)
    assert found.total(found.dense) == 12 and found.total(found.sparse) == 7
    assert found.binds("training, all steps sparse") == "harvest write"


def test_projection_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="lack a part"):
        project.from_results(results(TRAINING))
    with pytest.raises(UserError, match="read bytes/s, dense SAE tokens/s"):
        project.from_figures({"forward tokens/s": 1, "write bytes/s": 1, "sparse SAE tokens/s": 1}, machine="x", date="y")


def test_project_shows_this_machine_and_the_latest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "machine", lambda: MACHINE)
    report.write(WHOLE, tmp_path)
    for name, date, dry in (("old", "2026-01-01", False), ("new", "2026-02-01", False), ("dry", "2026-03-01", True)):
        raw = {"kind": "gpu", "dry": dry, "date": date, "machine": {"gpu": name}, "scaled": 1.0}
        figures = dict.fromkeys(project.FIGURES, 1e6)
        (tmp_path / f"{name}.json").write_text(json.dumps(raw | {"figures": figures}))
    done = CliRunner().invoke(main, ["project", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Box (2026-01-01): 300M tokens x 24 layers x 3 settings" in done.output
    assert "new (2026-02-01)" in done.output and "old" not in done.output and "dry" not in done.output
    assert "published practice, 35 min x 72" in done.output and "42.0 h" in done.output


def test_project_without_results_says_what_to_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["project", "--results", str(tmp_path)])
    assert isinstance(done.exception, UserError)


# --------------------------------------------------------------------------------------------------------------- ours


def test_our_paths_do_all_the_work_they_claim(tmp_path: Path) -> None:
    load = Load(d=64, features=256, tokens=96, threads=2, directory=tmp_path)
    for contenders in (ours.step(load), ours.write(load), ours.read(load)):
        for contender in contenders:
            assert (contender.run() or 0) > 0
            assert contender.role != "ours" or (callable(contender.note) and contender.note())
    assert [c.work for c in ours.step(load)] == [96, 96, 288]
    assert ours.write(load)[0].work == 96 * 64 * 2
    assert {c.role for c in ours.read(load)} == {c.role for c in ours.write(load)} == {"ours", "limit"}
    # The raw writes, which went last, left the same files behind as ours does: one for each of 24 layers.
    assert len(list((tmp_path / "ours").rglob("c.*.0"))) == 24


def test_l0_is_as_asked() -> None:
    load = Load(d=64, features=1024, tokens=256)
    dense, sparse, _ = ours.step(load)
    dense.run(), sparse.run()
    assert callable(dense.note) and callable(sparse.note)
    assert dense.note().startswith("dense backward at L0 51")
    assert 40 < float(sparse.note().removeprefix("sparse backward at L0 ").partition(",")[0]) < 64


def test_growth_draws_what_it_measured(tmp_path: Path) -> None:
    tiny = "--features 64,128 --widths 32,64 --settings 1,2 --layers 1,2 --d 32 --at 64 --tokens 16 --rows 32 --rounds 1"
    args = ["growth", *tiny.split(), "--threads", "1", "--picture", str(tmp_path / "g.png"), "--results", str(tmp_path)]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "g.png").stat().st_size > 10_000
    found = json.loads(next(tmp_path.glob("growth-*.json")).read_text())
    assert [one["x"] for one in found["series"]] == [[64, 128], [32, 64], [1, 2], [1, 2]]
    assert set(found["series"][0]["seconds"]) == {growth.DENSE, growth.SPARSE, growth.LIMIT}

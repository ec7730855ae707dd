import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residual_saes.shared.cli import Number, run
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.presets import Training
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.stop import Terminated, finishing
from residual_saes.shared.units import (
    format_bytes,
    format_count,
    format_layers,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_layers,
    parse_shard,
)
from tests.conftest import COMMANDS, ROOT, Cli


def every_command() -> Iterator[tuple[str, click.Command]]:
    for stage, command in COMMANDS.items():
        for name, each in command.commands.items() if isinstance(command, click.Group) else [("", command)]:
            yield f"{stage} {name}".strip(), each


def is_number(option: click.Parameter) -> bool:
    values = []
    for text in ("0.5", "1", "2"):
        with contextlib.suppress(click.ClickException, UserError):
            values.append(option.type.convert(text, option, None))
    return any(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


@given(st.integers(1, 10**13))
def test_counts_survive_a_round_trip(n: int) -> None:
    assert parse_count(format_count(n)) == n


@pytest.mark.parametrize(("text", "n"), [("300M", 300_000_000), ("1.5k", 1500), ("2_000", 2000), ("1B", 10**9)])
def test_counts_as_people_write_them(text: str, n: int) -> None:
    assert parse_count(text) == n


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "abc", "3T", "1e6", "0.0000001M", "9" * 5000, "9" * 30, "1000001B", "1" * 400 + "B"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a count"):
        parse_count(text)


def met_in_loading() -> UserError:
    """As libraries' errors become ours: the words are of something else."""
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise UserError("cannot load the model m: ; give a local path") from None
    except UserError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object: Cannot allocate memory"),
        met_in_loading(),
    ],
)
def test_memory_that_is_not_there_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["command"])
        run(command)
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.startswith("error: there is not enough memory: lower --expansion")
        and "\n" not in said[:-1]
    )


def test_other_errors_of_torch_are_no_lack_of_memory() -> None:
    @click.command()
    def command() -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr("sys.argv", ["command"])
        run(command)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_layers_survive_a_round_trip(layers: set[int]) -> None:
    assert parse_layers(format_layers(layers)) == tuple(sorted(layers))


@pytest.mark.parametrize("text", ["", "a", "3-1", "-2", "1,,2", "1.5"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="does not name layers"):
        parse_layers(text)


def test_layers_the_model_has_not() -> None:
    with pytest.raises(UserError, match="layer 24 does not exist: the model has layers 0-23"):
        parse_layers("3,24", 24)


@pytest.mark.parametrize("text", ["0-999999999999", "9" * 5000, "99999999"])
def test_layers_that_nobody_has_are_not_listed(text: str) -> None:
    with pytest.raises(UserError):
        parse_layers(text)
    with pytest.raises(UserError):
        parse_layers(text, 24)


def test_shards_are_counted_from_0() -> None:
    assert [str(parse_shard(text)) for text in ("0/1", "7/8", "00/08")] == ["0/1", "7/8", "0/8"]
    for text in ("8/8", "9/8", "0/0", "1", "1/", "/8", "-1/8", "1.0/8", "1/8 ", "", "a/b", "1/" + "9" * 99):
        with pytest.raises(UserError, match="is not a shard: they are counted from 0"):
            parse_shard(text)


def test_amounts_of_bytes_are_in_the_units_of_disks() -> None:
    texts = ("4TB", "1.5 tb", "500GB", "20M", "7kb", "4096", "12B")
    assert [parse_bytes(text) for text in texts] == [4 * 10**12, 15 * 10**11, 5 * 10**11, 20_000_000, 7000, 4096, 12]
    for text in ("", "TB", "0", "0.1B", "-1TB", "4TiB", "4 T B", "nan", "1e3", "9" * 16, "9999999TB"):
        with pytest.raises(UserError, match="is not an amount of bytes: write it as 4TB"):
            parse_bytes(text)


def test_a_count_is_exact_where_a_float_is_not() -> None:
    assert parse_count("123456789012345") == 123456789012345
    assert parse_count("0.000000001B") == 1


def program(work: Callable[[], object], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run `work` as a command; its exit code, and what it said on stderr."""
    monkeypatch.setattr("sys.argv", ["work"])
    with pytest.raises(SystemExit) as stop:
        run(click.command()(work))
    assert isinstance(stop.value.code, int)
    return stop.value.code, capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_step_where_work_says_so(
    number: int, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def patient() -> None:
        with finishing() as asked:
            assert not asked()
            signal.raise_signal(number)  # to this thread: another may take one to the process a little later
            assert asked()
            done.append("saved")
        done.append("never")

    def at_once() -> None:
        signal.raise_signal(number)
        done.append("never")

    def twice() -> None:
        with finishing():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("never")

    def through_a_library() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does, whatever it was

    monkeypatch.setattr("residual_saes.shared.stop._ONE_REQUEST", 0.0)
    asis = signal.getsignal(number)
    if asis == signal.SIG_IGN:  # as under nohup, where what is ignored stays so
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    for work in (patient, at_once, twice, through_a_library):
        assert program(work, capfd, monkeypatch)[0] == code
        assert signal.getsignal(number) == before
    signal.signal(number, asis)
    assert done == ["saved"]


def test_sigterms_within_seconds_are_one(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm sends them; to what is on its way out as well."""
    done: list[str] = []

    def patient() -> None:
        with finishing() as asked:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
            done.append("saved")

    def at_once() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("left")

    def impatient() -> None:
        with finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("never")

    for work, code in ((patient, 143), (at_once, 143), (impatient, 130)):
        assert program(work, capfd, monkeypatch)[0] == code
    assert done == ["saved", "left"]
    assert issubclass(Terminated, KeyboardInterrupt)  # whoever handles Ctrl-C handles it


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/disk/file"), 2, "/disk/file"),
        (EOFError("Compressed file ended before the end-of-stream marker"), 2, "ended before"),
        (UserError("two\nlines"), 2, "error: two lines"),
        (Busy("a process is at work there"), 3, "error: a process is at work there"),
    ],
)
def test_what_can_be_put_right_is_one_line(
    error: Exception, exit_code: int, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise error

    code, err = program(work, capfd, monkeypatch)
    assert code == exit_code
    assert len(err.splitlines()) == 1 and message in err


def test_nobody_listening_changes_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)

        def work() -> int:
            for _ in range(3):
                say("a line")
            return 1

        assert program(work, capfd, monkeypatch) == (1, "")


def test_a_full_disk_behind_what_is_printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is done is done; a table that was asked for and did not arrive is not."""
    for asked, code in ((False, 0), (True, 2)):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr("sys.stdout", full)
            got, err = program(lambda asked=asked: say("a line", asked=asked), capfd, monkeypatch)  # type: ignore[misc]
            assert got == code and ("No space left" in err) == asked


@pytest.mark.parametrize("args", [("harvest", "plan", "--preset", "demo"), ("residual_saes", "presets"), ("harvest", "--help")])
@pytest.mark.slow
def test_a_table_on_a_full_disk_is_no_success(args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", *args], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_letters_that_an_alphabet_has_not(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with open(write, "w", encoding="latin-1") as old, open(read, encoding="latin-1") as end:
        monkeypatch.setattr("sys.stdout", old)
        assert program(lambda: say("λ = 3"), capfd, monkeypatch) == (0, "")
        assert end.readline() == "? = 3\n"


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "1e999", "2", "x"])
def test_what_is_no_number_within_bounds_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Number(0, 1).convert(text, None, None)
    assert Number(0, 1).convert("0.5", None, None) == 0.5


def test_units() -> None:
    assert [format_bytes(n) for n in (12, 614e9, 14.7e12)] == ["12 B", "614 GB", "14.7 TB"]
    assert [format_seconds(s) for s in (59, 75, 7320)] == ["59s", "1m15s", "2h02m"]


def test_an_error_is_one_line_without_escape_sequences(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise UserError("there is no model at a\n \x1b[31mλ")

    assert program(work, capfd, monkeypatch) == (2, "error: there is no model at a \\x1b[31mλ\n")


def test_names_go_to_no_terminal_as_commands(capfd: pytest.CaptureFixture[str]) -> None:
    say("left out: a\x1b]0;title\x07\rb λ\nnext")
    with Progress("layer \x1b[2J", 3, "tokens") as progress:
        progress.update(3)
    out, err = capfd.readouterr()
    assert out == "left out: a\\x1b]0;title\\x07\\rb λ\nnext\n"
    assert err.startswith("layer \\x1b[2J: 3/3")


NUMBERS = [(name, option) for name, command in every_command() for option in command.params if is_number(option)]


@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=[f"{name} {option.name}" for name, option in NUMBERS])
def test_every_number_has_bounds(name: str, option: click.Parameter) -> None:
    for text in ("nan", "inf", "-inf", "-5", "1e400", "9" * 30, "-" + "9" * 30, "", "x"):
        with pytest.raises((click.BadParameter, UserError)):
            option.type.convert(text, option, None)


def test_all_commands_are_looked_at() -> None:
    names = {name for name, _ in NUMBERS}
    assert names >= {"harvest run", "train", "eval run", "eval pages", "eval distill", "eval match", "fleet job"}
    assert {"harvest run", "harvest plan", "fleet plan", "eval ask"} <= {name for name, _ in every_command()}


def test_a_command_that_there_is_not_is_named_beside_those_like_it(cli: Cli) -> None:
    for command, wrong, meant in (("eval", "pges", "pages"), ("harvest", "verfy", "verify"), ("fleet", "jbo", "job")):
        done = cli(command, wrong)
        assert done.code == 2 and done.err.startswith(f"error: No such command '{wrong}'") and repr(meant) in done.err


def test_the_default_rate_falls_with_the_square_root_of_features_and_of_steps() -> None:
    shapes = {(128, 256_000): 1e-2, (512, 256_000): 5e-3, (128, 1_000_000): 7.2e-3, (1024, 300_000_000): 5.8e-4}
    assert {shape: Training.of(*shape, 1000).lr for shape in shapes} == shapes
    assert Training.of(64, 1000, 1000).lr == 1e-2, "no more for fewer of them"

"""What the command lines share: exit codes, one-line errors, and the options that several commands have.

Exit codes: 0 done, 1 a check failed (verify found damage), 2 bad input, a refused request or something left out, 3 another
process is at work there (a layer's lock, a job's), 130 and 143 stopped by Ctrl-C and SIGTERM. A traceback is a bug.
"""

import dataclasses
import errno
import io
import math
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from functools import reduce
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn, TypeVar, cast

import click

from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import mute, say
from residual_saes.shared.stop import SIGNALS, Terminated
from residual_saes.shared.stores import parse_location, parse_name


class DefaultRun(click.Group):
    """A group whose command `run` may be left out: `rsae harvest --tokens 1M` is `rsae harvest run --tokens 1M`.

    `run` takes options alone, so that a word in front is the name of a command, and one that there is not is refused as that.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (not args[0].startswith("-") or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["run", *args])


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: every expected failure is one line on stderr and exit code 2 (3: see `Busy`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an alphabet without λ is no reason to stop
    with SIGNALS.handled():
        try:
            code = _invoke(command)
        except UserError as error:
            _fail(_NO_MEMORY if _is_no_memory(error) else str(error), error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except KeyboardInterrupt as error:
            asked = SIGNALS.asked or type(error)  # a library in between may have made a plain one of it
            how, code = ("terminated", 143) if issubclass(asked, Terminated) else ("interrupted", 130)
            _fail(f"{how}; run the same command again to continue", code)
        except BrokenPipeError:
            mute(sys.stdout)
            code = 128 + signal.SIGPIPE
        except (MemoryError, RuntimeError, ImportError, OSError, EOFError) as error:
            if _is_no_memory(error):
                _fail(_NO_MEMORY, 2)
            if isinstance(error, RuntimeError | ImportError):
                raise
            _fail(f"{error or type(error).__name__}: put that right and run the same command again to continue", 2)
    sys.exit(code)


def _is_no_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed: of Python, the system, a library, or torch on a CPU or a GPU; or this error was made of one
    that did, as where a model cannot be loaded."""
    if error is None:
        return False
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in text for words in _OUT_OF_MEMORY)
        or _is_no_memory(error.__cause__ or error.__context__)
    )


def _invoke(command: click.Command) -> int:
    """Not through `command.main`, which takes a file that ends too early (EOFError) for Ctrl-C."""
    _refuse_empty(sys.argv[1:])
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
    try:
        with command.make_context(name, sys.argv[1:], help_option_names=["-h", "--help"]) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as done:  # --help
        return done.exit_code
    return result if isinstance(result, int) else 0


def _refuse_empty(arguments: list[str]) -> None:
    """An empty value is a shell's variable that was never set, and would be taken for a default here and there."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = before if argument == "" else argument[:-1] if re.fullmatch("--[a-z0-9-]+=", argument) else None
        if name is not None and name not in _MAY_BE_EMPTY:
            raise UserError(f"{name or 'an argument'} is empty: give it a value, or leave it out")


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "alloc_failed",
    "can't start new thread",
)  # fmt: skip
_NO_MEMORY = (
    "there is not enough memory: lower --expansion, --batch or --window-blocks of a training, --forward-sequences or "
    "--block-sequences of a harvest, --threads or the number of layers at a time, or take a larger machine; nothing that was "
    "written is lost"
)

# --- options ---

_MAY_BE_EMPTY = ("--harvest", "--train", "--eval")  # more options, if any

SEED = click.IntRange(0, (1 << 31) - 1)  # what every generator takes
THREADS = click.IntRange(1, 1024)
COUNT = click.IntRange(1, 10**9)  # nothing that is counted here has more; tokens have `parse_count`
COUNT_OR_NONE = click.IntRange(0, 10**9)


class Number(click.FloatRange):
    """A float within bounds. NaN, which lies outside of none, and infinity are refused."""

    def __init__(self, least: float, most: float, **how: Any) -> None:
        super().__init__(least, most, **how)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


MINUTES = Number(0, 1e6)
Command = Callable[..., Any]
Config = TypeVar("Config")
_OPTION = "option"  # in a field's metadata: what click.option takes


def option(help: str, default: Any = MISSING, *, preset: bool = False, **how: Any) -> Any:
    """A field of a config that is an option as well: `--its-name`. `how` is as for `click.option`.

    Without a default the field must be given, and the option may be: what it leaves open is filled in by the command. With
    `preset` the option leaves it open, too, though the field has a default.
    """
    if isinstance(how.get("type"), FunctionType):
        how.setdefault("metavar", "TEXT")  # else click shows the function's name
    own = None if preset or default is MISSING or default in ((), "") else default
    flag = how.get("is_flag", False)
    shown: bool | str = "by preset, or by model and cache" if preset and not flag else own is not None and not flag
    how |= {"help": help, "show_default": shown}
    if own is not None or flag:  # None would be a default, too: that of a flag that is left open
        how["default"] = own
    return field(default=default, metadata={_OPTION: how}) if default is not MISSING else field(metadata={_OPTION: how})


def options_of(config: type, *names: str) -> Callable[[Command], Command]:
    """The options that a config's fields are, in the order of the fields; only these, where `names` are given. `from_` is
    `--from`."""
    fields = [f for f in dataclasses.fields(config) if _OPTION in f.metadata and (not names or f.name in names)]
    return options(*(click.option(f"--{f.name.rstrip('_').replace('_', '-')}", f.name, **f.metadata[_OPTION]) for f in fields))


def filled(config: type[Config], options: Mapping[str, Any], **given: Any) -> Config:
    """The config with what the command line says; where that says nothing, as given; and else as its fields have it."""
    names = {f.name for f in dataclasses.fields(cast(Any, config))}
    return config(**given | {name: value for name, value in options.items() if name in names and value is not None})


def options(*each: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the order given."""
    return lambda command: reduce(lambda c, option: option(c), reversed(each), command)


PRESET = click.option(
    "--preset", help="A job that is known by name, whose values are the defaults [default: they follow model and cache]."
)
CACHE = click.option(
    "--cache",
    type=parse_location,
    metavar="PLACE",
    help="Cache folder, or s3://bucket/prefix [default: data/<preset or model>].",
)
RUNS = click.option(
    "--runs",
    type=parse_location,
    metavar="PLACE",
    default=Path("runs"),
    show_default=True,
    help="Where run folders lie; s3://bucket/prefix, too.",
)
SEVERAL_RUNS = click.option(
    "--runs",
    type=parse_location,
    metavar="PLACE",
    multiple=True,
    default=[Path("runs")],
    help="Runs, or folders of them; may be given more than once [default: runs].",
)
MODEL = click.option(
    "--model", type=parse_name, metavar="TEXT", help="Folder of the language model, if it is not where it was at the harvest."
)
DEVICE = click.option("--device", help="cpu, cuda or cuda:1 [default: cuda where there is one].")

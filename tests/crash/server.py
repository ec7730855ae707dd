"""A process that has imported everything, and forks for each command: what is left of `rsae harvest` is its work.

    python -m tests.crash.server MODEL

A line is a JSON list of commands that run at once, {"argv": ["harvest", …], "cwd": …, "env": {…}, "said": file} each; the
answer is the list of their exit codes, negative for a signal.
Runs with fault.so preloaded; the environment that it reads is set in the fork, which is all that is ever disturbed.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any, NoReturn

LIMIT = 120  # seconds after which a command is taken to hang: SIGALRM ends it
_COMMANDS = ("harvest", "train", "eval")
_LATE = (
    "datasets",
    "matplotlib.backends.backend_svg",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)  # what they import at work


def _run(request: dict[str, Any]) -> NoReturn:
    """In the fork: become the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LIMIT)
    null, said = os.open(os.devnull, os.O_RDWR), os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for fd, to in ((null, 0), (said, 1), (said, 2)):
        os.dup2(fd, to)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    ctypes.CDLL(None).crash_arm()
    sys.argv = request["argv"]
    code = 1
    try:
        runpy.run_module(request["argv"][0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the libraries down costs seconds, for they are shared with the server


def main() -> None:
    for name in (*(f"{command}.__main__" for command in _COMMANDS), *_LATE):
        importlib.import_module(name)
    for command in _COMMANDS:
        del sys.modules[f"{command}.__main__"]
    from transformers import AutoModel

    AutoModel.from_pretrained(sys.argv[1])  # compiles a thousand regular expressions, once
    gc.freeze()  # collecting would copy every page of it in each fork
    print("ready", flush=True)
    while line := sys.stdin.readline():
        children = [os.fork() or _run(request) for request in json.loads(line)]
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], flush=True)


if __name__ == "__main__":
    main()

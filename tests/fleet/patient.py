"""A command that ends in its own time after SIGTERM: python -m tests.fleet.patient FILE."""

import signal
import sys
import time
from pathlib import Path


def end(*_: object) -> None:
    time.sleep(0.3)
    Path(sys.argv[1]).write_text("ended")
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    Path(sys.argv[1]).write_text("at work")
    print("asked", flush=True)
    time.sleep(60 if len(sys.argv) < 3 else 0)
    sys.exit(int(sys.argv[2]))

"""One model, one text and one server of commands for everything here."""

from collections.abc import Iterator

import pytest

from tests.crash.sweep import Sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with Sweep(folder=tmp_path_factory.mktemp("crash")) as sweep:
        yield sweep

"""One browser for all tests of pages: starting it takes a second."""

from collections.abc import Iterator

import pytest

from tests.eval.browser import Browser, missing


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def browser(_browser: Browser) -> Browser:
    """A headless Chromium, showing light pages at a desktop's width. Skips where there is none."""
    _browser.look()
    return _browser

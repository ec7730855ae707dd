"""A headless Chromium that sees local files and nothing else, for tests of the pages that eval writes."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

T = TypeVar("T")

DESKTOP, PHONE = (1280, 900), (390, 844)  # CSS pixels
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that wants the network shall not get it
)
_WAIT = 20.0  # seconds: on a busy machine a page takes long


def missing() -> str | None:
    """Why there is no browser here, or None. Debian and Ubuntu have the packages chromium and chromium-driver."""
    lacking = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"needs {' and '.join(lacking)} (packages chromium and chromium-driver)" if lacking else None


class Browser:
    """What the tests do with a page: open, look, click, type, and see that nothing went wrong."""

    def __init__(self, profile: Path) -> None:
        """`profile` is a new empty folder."""
        options = ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=ChromeService(str(shutil.which("chromedriver"))))
        self.driver.set_page_load_timeout(20)

    def close(self) -> None:
        self.driver.quit()

    def look(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """The width and height of what is seen, and whether the reader prefers dark pages."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, page: Path, fragment: str = "") -> None:
        """As a double click opens it. What earlier pages said and loaded is forgotten."""
        self.driver.get("about:blank")  # another fragment of the same page would not load it again
        self.errors(), self.loaded()
        self.driver.get(page.resolve().as_uri() + (f"#{fragment}" if fragment else ""))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The only element of this kind that is seen, as soon as it is."""
        return self.until(lambda: (seen := [e for e in self.all(selector) if e.is_displayed()]) and len(seen) == 1 and seen[0])

    def text(self, selector: str) -> str:
        return self.until(lambda: [str(self.one(selector).text)])[0]

    def run(self, script: str, *args: Any) -> Any:
        """JavaScript: the value of its `return`."""
        return self.driver.execute_script(script, *args)  # type: ignore[no-untyped-call]

    def press(self, *keys: str) -> None:
        """Keys for the page as a whole, or whatever has the focus: "j", Keys.ESCAPE, …"""
        self.driver.switch_to.active_element.send_keys(*keys)

    def until(self, condition: Callable[[], T | bool]) -> T:
        """Wait until it holds, and return what it gave. What a page replaces meanwhile is looked for again."""
        wait = WebDriverWait(self.driver, _WAIT, 0.02, ignored_exceptions=(StaleElementReferenceException,))
        found: T = wait.until(lambda _: condition())
        return found

    def overflow(self) -> int:
        """Pixels that the page is wider than what is seen: on a phone it must not be."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def errors(self) -> list[str]:
        """What the console has been told since the last time: scripts that failed, files that are not there."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def loaded(self) -> list[str]:
        """Addresses asked for since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """What is seen, or the whole page, as PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


__all__ = ["DESKTOP", "PHONE", "Browser", "Keys", "missing"]

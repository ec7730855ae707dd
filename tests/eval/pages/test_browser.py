"""That the browser notices what the tests of pages rest on."""

from pathlib import Path

from tests.eval.browser import PHONE, Browser

PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width"><style>
body{background:white}@media(prefers-color-scheme:dark){body{background:black}}</style>
<p>A page</p><div style="width:500px">wide</div><script src="there.js"></script>"""


def test_it_opens_files_at_any_width_and_sees_what_was_loaded_and_what_failed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE + '<script src="missing.js"></script><img src="https://example.org/x.png">')
    (tmp_path / "there.js").write_text("document.title = 'ran'; throw Error('on purpose')")
    browser.open(page)
    assert browser.driver.title == "ran"
    assert browser.text("p") == "A page"
    assert browser.overflow() == 0
    assert [url.rpartition("/")[2] for url in browser.loaded()] == ["page.html", "there.js", "missing.js", "x.png"]
    said = " ".join(browser.errors())
    assert "on purpose" in said and "missing.js" in said and "x.png" in said
    assert browser.errors() == []
    browser.look(PHONE, dark=True)
    assert 110 < browser.overflow() < 130  # 500 and a margin of 8, less 390
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(0, 0, 0)"
    assert browser.screenshot(tmp_path / "shot.png").read_bytes()[:4] == b"\x89PNG"

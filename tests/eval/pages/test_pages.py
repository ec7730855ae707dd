import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import residual_saes
from residual_saes.eval.pages import features
from residual_saes.eval.pages.elsewhere import nearest
from residual_saes.eval.pages.example import example
from residual_saes.eval.pages.features import SAMPLES, TOP
from residual_saes.eval.pages.files import Pages, script, write_index
from residual_saes.eval.pages.spell import spell
from residual_saes.shared.cache import Cache
from residual_saes.shared.lm import load_tokenizer
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site
from tests.conftest import ROOT, Cli, invoke
from tests.eval.browser import PHONE, Browser, Keys

Made = tuple[Path, tuple[object, ...]]

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">", "' \" ` ${1} {{ 7*7 }}",
    "a\u2028b\u2029c", "\u202egnihton", "\x00\x1b[31m\x7f", "\n", "\t", "  ", "", "\ud800", "𝕏é漢", "&lt;b&gt;", "\ufeff\u200b",
]  # fmt: skip


@pytest.fixture(scope="module")
def made_once(runs_path: Path, cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    runs = tmp_path_factory.mktemp("pages") / "runs"
    for folder in sorted(runs_path.iterdir())[:2]:
        shutil.copytree(folder, runs / folder.name)
    args = ("pages", "--preset", "demo", "--cache", cache_path, "--device", "cpu")
    assert invoke("eval", *args, "--runs", runs) == 0
    return runs, args


@pytest.fixture
def made(made_once: Made, tmp_path: Path) -> Made:
    """A copy of two runs with pages of all three layers, and the arguments that made them."""
    runs, args = made_once
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs", (*args, "--runs", tmp_path / "runs")


def folders(runs: Path) -> list[Path]:
    return sorted((runs / "pages").glob("*/layer*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_columns_lead_back_to_the_cache(made: Made, cache: Cache) -> None:
    """Every row that is kept of a feature is one on which it fires with what is said."""
    runs, _ = made
    assert len(folders(runs)) == 6
    for folder in folders(runs)[1::3]:
        opened = Pages.open(folder)
        sae = Sae.load(runs / folder.parent.name / "sae_layer01_final.pt")
        layer, rows = cache.layer(1), opened.columns["row"]
        assert opened.facts["layer"] == 1 and opened.facts["tokens"] == 2048
        feature = 17
        here = rows[feature][rows[feature] >= 0]
        assert here.min() >= cache.spec.train_tokens
        z = sae.encode(torch.from_numpy(layer[here.numpy()]).float())[:, feature]
        values = [dict(zip(*map(torch.Tensor.tolist, opened.around(feature, n)), strict=True))[0] for n in range(len(here))]
        np.testing.assert_allclose(values, z, rtol=1e-4)
        assert values[:TOP] == sorted(values[:TOP], reverse=True)


def test_what_is_there_is_not_made_again(cli: Cli, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, args = made
    before = contents(runs)
    monkeypatch.setattr(features, "look", None)
    result = cli("eval", *args)
    assert result.code == 0, result.err
    assert result.out == f"pages: {runs / 'pages' / 'index.html'}\n"
    assert contents(runs) == before


def test_what_is_damaged_missing_or_half_written_is_made_again_to_the_byte(cli: Cli, made: Made) -> None:
    runs, args = made
    before = contents(runs)
    damaged, missing, unfinished = folders(runs)[:3]
    (damaged / "001.js").write_bytes(before[str((damaged / "001.js").relative_to(runs))].replace(b"A", b"B", 1))
    (missing / "columns.safetensors").unlink()
    (unfinished / "facts.json").unlink()
    (unfinished / "001.js").write_bytes(b"")
    by_hand = folders(runs)[3] / "facts.json"  # whose checksum is right
    by_hand.write_text(json.dumps(seal({k: v for k, v in json.loads(by_hand.read_bytes()).items() if k != "tokens"})))
    text = next((runs / "pages").glob("text.*"))
    (text / "000.js").unlink()
    near, cut = sorted(folders(runs)[4].glob("near-*.js"))[:2]
    near.write_bytes(near.read_bytes().replace(b"A", b"B", 1))
    cut.write_bytes(cut.read_bytes()[:-9])
    result = cli("eval", *args)
    assert result.code == 0, result.err
    assert contents(runs) == before


def test_more_text_takes_the_place_of_less_and_less_does_not_of_more(cli: Cli, made: Made) -> None:
    runs, args = made
    before = contents(runs)
    for folder in folders(runs)[::3]:
        shutil.rmtree(folder)
    assert cli("eval", *args, "--tokens", 500).code == 0
    assert sorted(Pages.open(f).facts["tokens"] for f in folders(runs)) == [480] * 2 + [2048] * 4  # whole contexts of 32
    assert cli("eval", *args).code == 0
    assert contents(runs) == before
    assert cli("eval", *args, "--tokens", 500).code == 0
    assert contents(runs) == before


def test_pages_of_another_checkpoint_give_way(cli: Cli, made: Made) -> None:
    """The SAE was trained again: its file is another, and so is its folder."""
    runs, args = made
    path = runs / folders(runs)[0].parent.name / "sae_layer00_final.pt"
    sae = Sae.load(path)
    Sae(**sae.tensors() | {"b_enc": sae.b_enc - 0.1}, config=sae.config, stats=sae.stats).save(path)
    old = folders(runs)
    assert cli("eval", *args).code == 0
    assert len(folders(runs)) == 6
    assert [a == b for a, b in zip(old, folders(runs), strict=True)].count(False) == 1


def test_less_text_than_a_context_is_refused(cli: Cli, made: Made, cache: Cache) -> None:
    result = cli("eval", *made[1], "--tokens", 3)
    assert result.code == 2 and f"--tokens 3 is less than one context of {cache.spec.context}: raise it" in result.err


def test_what_can_not_be_looked_at_is_left_out(cli: Cli, made: Made) -> None:
    runs, args = made
    shutil.rmtree(runs / "pages")
    bad = [runs / name / f"sae_layer0{layer}_final.pt" for layer, name in enumerate(sorted(p.name for p in runs.iterdir()))]
    bad[0].write_bytes(bad[0].read_bytes()[:1000])
    sae = Sae.load(bad[1])
    Sae(**sae.tensors() | {"b_enc": sae.b_enc / 0}, config=sae.config, stats=sae.stats).save(bad[1])
    result = cli("eval", *args, "--layers", "0,1")
    assert result.code == 2
    assert [line.split(" ")[2] for line in result.err.splitlines() if line.startswith("left out: ")] == list(map(str, bad))
    assert result.err.splitlines()[-1] == "error: 2 left out, as said above; all else is on the pages"
    assert len(folders(runs)) == 2
    assert folders(runs)[0].parent.name in (runs / "pages" / "index.html").read_text()


def test_what_is_wrong_with_all_of_it_is_one_line(cli: Cli, made: Made, tmp_path: Path) -> None:
    runs, args = made
    before = contents(runs)
    for more, words in (
        (("--snapshot", "7M"), "no '7M' snapshot"),
        (("--layers", "9"), "no 'final' snapshot of these layers"),
        (("--tokens", 3), "less than one context of 32"),
        (("--model", tmp_path), "is not the model"),
    ):
        result = cli("eval", *args, *more)
        assert result.code == 2
        assert words in result.err
        assert result.err.splitlines()[-1].startswith("error: ")
        assert contents(runs) == before


def test_another_tokenizer_is_refused(cli: Cli, made: Made, cache: Cache, tmp_path: Path) -> None:
    _, args = made
    lm = tmp_path / "lm"
    shutil.copytree(cache.spec.model, lm)
    tokenizer = json.loads((lm / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (lm / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = cli("eval", *args, "--model", lm)
    assert result.code == 2
    assert "the tokenizer beside the model is not the one" in result.err


def test_tokens_are_spelt_as_in_a_text(lm: Path, tmp_path: Path) -> None:
    demo, text = load_tokenizer(str(ROOT / "demo" / "neox-2m"), None), "The naïve café's “quote” — 漢字\n\tx"
    spelt = spell(demo, len(demo))
    parts = [spelt[i] for i in demo.encode(text)]
    raw = [
        part.encode("latin-1").decode("unicode_escape").encode("latin-1") if "\\x" in part else part.encode() for part in parts
    ]
    assert b"".join(raw) == text.encode()
    assert len([part for part in parts if "\\x" in part]) > 3
    assert spelt[demo.convert_tokens_to_ids("Ġthe")] == " the"
    without = load_tokenizer(str(lm), None)  # which has no decoder
    assert spell(without, 400)[without.convert_tokens_to_ids("Ġthe")] == " the"


def test_a_data_file_is_ascii_and_holds_what_was_put_in() -> None:
    text = script("run </script>\u2028/000", HOSTILE).decode("ascii")
    assert text.startswith("pages.take(") and text.endswith(");\n")
    assert json.loads(f"[{text[11:-3]}]") == ["run </script>\u2028/000", HOSTILE]


def test_a_card_shows_a_feature_where_there_are_pages(made: Made, cache: Cache) -> None:
    runs, _ = made
    folder = folders(runs)[1]
    run, opened = Run.open(runs / folder.parent.name), Pages.open(folder)
    (snapshot,) = (s for s in run.snapshots() if s.site == Site(1) and s.label == FINAL)
    found = example(run, snapshot, runs / "pages")
    assert found is not None
    assert found.density == int(opened.columns["count"][found.feature]) / opened.facts["tokens"]
    spelt, tokens = spell(load_tokenizer(cache.spec.model, None), 400), cache.layer(1).tokens
    for row, (before, peak, after) in zip(opened.columns["row"][found.feature, :3].tolist(), found.contexts, strict=True):
        first, place = row - row % cache.spec.context, row % cache.spec.context
        assert peak == spelt[tokens[row]]
        assert before == "".join(spelt[t] for t in tokens[max(first, row - 12) : row])
        assert after == "".join(spelt[t] for t in tokens[row + 1 : row + min(5, cache.spec.context - place)])
    assert found.promoted[0] == spelt[int(opened.columns["promoted"][found.feature, 0])]
    shutil.rmtree(runs / "pages" / opened.facts["text"])
    assert example(run, snapshot, runs / "pages") is None


# --- in a browser ---


def page(runs: Path) -> Path:
    return runs / "pages" / "index.html"


def opened(browser: Browser, runs: Path, fragment: str = "") -> None:
    browser.open(page(runs), fragment)
    browser.until(lambda: browser.all(".row") or browser.all(".context"))


def listed(browser: Browser) -> list[int]:
    return [int(n) for n in browser.run("return [...document.querySelectorAll('.row .number')].map((e) => e.textContent)")]


def contexts(browser: Browser, where: str) -> list[tuple[str, str]]:
    """(value, text) of each context."""
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => [...e.children].map((c) => c.textContent))"
    return [(value, text) for value, text in browser.run(script, f"{where} .context")]


def test_it_opens_by_a_double_click_and_loads_what_it_shows(browser: Browser, made_once: Made, cache: Cache) -> None:
    runs, _ = made_once
    opened(browser, runs)
    first = folders(runs)[0]
    relative = [url.removeprefix((runs / "pages").resolve().as_uri()) for url in browser.loaded()]
    text = next((runs / "pages").glob("text.*")).name
    assert relative == ["/index.html", "/notes.js", f"/{first.parent.name}/{first.name}/index.js", f"/{text}/vocabulary.js"]
    assert browser.text("#found") == "128 of 128 features"
    browser.press("j")
    browser.until(lambda: browser.text("h2") == "Feature 0")
    browser.press("j")
    browser.until(lambda: browser.text("h2") == "Feature 1")
    loaded = [url.rpartition("/")[2] for url in browser.loaded()]
    assert loaded[:2] == ["000.js", "000.js"]  # of the SAE, of the text
    assert len(loaded) == 4 and all(name.startswith("near-") for name in loaded[2:])  # the other run, the next layer
    columns = Pages.open(first).columns
    tokenizer = load_tokenizer(cache.spec.model, None)
    spelt = spell(tokenizer, 400)
    shown = [*contexts(browser, "#top"), *contexts(browser, ".fifth")]
    rows = [row for row in columns["row"][1].tolist() if row >= 0]
    assert len(shown) == len(rows) == TOP + SAMPLES
    for (value, tokens), row in zip(shown, rows, strict=True):
        place = row % cache.spec.context
        ids = cache.layer(0).tokens[row - place : row - place + cache.spec.context]
        cut = max(0, place - 47)
        words = (n for n in range(cut, min(place, cut + 8)) if spelt[ids[n]][:1].isspace())
        cut = next(words, cut) if cut else 0  # at the beginning of a word, where one is near
        assert tokens == "".join(spelt[i] for i in ids[cut : place + 17]).replace("\n", "↵")
        z = dict(zip(*map(torch.Tensor.tolist, Pages.open(first).around(1, rows.index(row))), strict=True))[0]
        assert float(value) == pytest.approx(z, rel=0.01)
    assert float(browser.run("return document.querySelector('#top .peak').style.getPropertyValue('--a')")) == 1
    browser.one("#top .context:first-child .peak").click()
    assert f"row {rows[0]:,}" in browser.text("#token")
    others = [int(e.text.split()[0]) for e in browser.all(".similar li")]
    assert others == columns["similar"][1].tolist()
    browser.all(".similar a")[0].click()
    browser.until(lambda: browser.text("h2") == f"Feature {others[0]}")
    assert browser.errors() == []


def test_nearest_features_elsewhere_lead_there(browser: Browser, made_once: Made) -> None:
    """Of the same layer in the other run and of the next layer in this one, among features that fire."""
    runs, _ = made_once
    here, above, _, other = folders(runs)[:4]
    fires = [Pages.open(folder).columns["count"] > 0 for folder in (here, above, other)]
    saes = [Sae.load(runs / f.parent.name / f"sae_{f.name.split('.')[0]}.pt") for f in (here, above, other)]
    rows = [torch.nn.functional.normalize(sae.w_dec.double(), dim=1) for sae in saes]
    feature = int(fires[0].nonzero()[0])
    opened(browser, runs, f"{here.parent.name}/final/0/{feature}")
    browser.until(lambda: browser.all(".elsewhere li"))
    shown = [(int(e.text.split()[0]), float(e.text.split()[-1])) for e in browser.all(".elsewhere li")]
    for (number, cosine), others, alive in zip(shown, rows[1:], fires[1:], strict=True):
        cosines = (others @ rows[0][feature]).where(alive, -2)
        assert cosine == pytest.approx(float(cosines.max()), abs=0.006) == pytest.approx(float(cosines[number]), abs=0.006)
    browser.all(".elsewhere a")[1].click()
    browser.until(lambda: browser.text("h2") == f"Feature {shown[1][0]}")
    assert other.parent.name in browser.text("#feature .facts")
    assert browser.errors() == []


def test_what_does_not_fire_is_nearest_to_nothing() -> None:
    one = torch.eye(3), torch.tensor([True, False, True])
    other = torch.eye(3).flip(0), torch.tensor([True, True, False])
    assert nearest(one, other)["feature"].tolist() == [0, -1, 0]  # only the last of the other is like the first
    assert nearest(one, other)["cosine"].tolist() == [0, 0, 1]
    nothing = torch.eye(3), torch.zeros(3, dtype=torch.bool)
    assert nearest(one, nothing)["feature"].tolist() == [-1, -1, -1]


def test_the_list_is_searched_sorted_and_filtered(browser: Browser, made_once: Made, cache: Cache) -> None:
    runs, _ = made_once
    columns = Pages.open(folders(runs)[0]).columns
    spelt = spell(load_tokenizer(cache.spec.model, None), 400)
    opened(browser, runs)
    browser.press("/")
    browser.press(" THE")
    top = columns["row"][:, :TOP]
    tokens = cache.layer(0).tokens[top.clamp(min=0).numpy()]
    peaks = [{int(t) for t, r in zip(tokens[i], top[i], strict=True) if r >= 0} for i in range(128)]
    hits = [i for i in range(128) if any(spelt[t].strip().lower() == "the" for t in peaks[i])]
    assert 0 < len(hits) < 128
    browser.until(lambda: browser.text("#found") == f"{len(hits)} of 128 features")
    assert listed(browser) == hits[: len(listed(browser))]
    browser.press(Keys.ESCAPE)
    assert browser.run("return document.getElementById('search').value") == " THE"  # as the list is
    choose = "const [id, value] = arguments, e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('%s'))"
    browser.run(choose % "input", "search", "#5")
    assert browser.text("#found") == f"{sum(5 in tokens for tokens in peaks)} of 128 features"
    browser.run(choose % "input", "search", f'"{spelt[int(columns["promoted"][9, 0])]}"')
    browser.run(choose % "change", "where", "promoted")
    assert 9 in listed(browser)
    near = [i for i in range(128) if any(spelt[t].strip().lower().startswith("th") for t in peaks[i])]
    browser.run(choose % "change", "where", "peaks")
    browser.run(choose % "input", "search", "th*")
    assert browser.text("#found") == f"{len(near)} of 128 features" and set(hits) < set(near)
    both = [i for i in near if 5 in peaks[i]]
    browser.run(choose % "input", "search", "th* #5")
    assert browser.text("#found") == f"{len(both)} of 128 features"
    inside = [i for i in range(128) if any("h" in spelt[t].lower() for t in peaks[i])]
    browser.run(choose % "input", "search", "*h*")
    assert browser.text("#found") == f"{len(inside)} of 128 features"
    browser.one("#everywhere").click()
    browser.until(lambda: len(browser.all("#hits li")) == 6)
    assert f": {len(inside)} " in browser.all("#hits li")[0].text + " "
    browser.run(choose % "input", "search", "")
    density = columns["count"].double() / 2048
    middle = float(density.median()) + 0.5 / 2048  # between two counts, whatever rounding makes of the percentage
    browser.run(choose % "input", "most", f"{100 * middle:.6f}%")
    browser.run(choose % "change", "sort", "densest")
    expected = sorted((i for i in range(128) if density[i] <= middle), key=lambda i: (-density[i], i))
    assert browser.text("#found") == f"{len(expected)} of 128 features"
    assert listed(browser) == expected[: len(listed(browser))]
    browser.press("j")
    browser.until(lambda: browser.text("h2") == f"Feature {expected[0]}")
    browser.press("g")
    browser.press("77", Keys.ENTER)
    browser.until(lambda: browser.text("h2") == "Feature 77")
    assert browser.errors() == []


def test_the_first_screen_shows_the_sae(browser: Browser, made_once: Made) -> None:
    """Every feature is a point, and a click on one leads to it."""
    runs, _ = made_once
    opened(browser, runs)
    columns = Pages.open(folders(runs)[0]).columns
    alive = int((columns["count"] > 0).sum())
    assert f"{alive} of 128 features fire on these 2,048 tokens" in browser.text("#feature .facts")
    assert len(browser.all("#feature .remarkable li")) == 10
    place = """const canvas = document.getElementById("scatter"), box = canvas.getBoundingClientRect(), step = 6;
    for (let x = 0; x < box.width; x += step) for (let y = 0; y < box.height; y += step) {
      const event = new MouseEvent("mousemove", {clientX: box.left + x, clientY: box.top + y});
      canvas.dispatchEvent(event);
      const about = document.getElementById("token").textContent;
      if (about) { canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + x, clientY: box.top + y})); return about; }
    }"""
    about = browser.run(place)
    feature = int(about.split()[1])
    browser.until(lambda: browser.text("h2") == f"Feature {feature}")
    assert columns["count"][feature] / 2048 == pytest.approx(float(about.split()[4]), rel=0.01)
    browser.press(Keys.ESCAPE)
    browser.until(lambda: browser.all("#scatter"))
    assert browser.errors() == []


def test_names_stay_and_can_be_saved_beside_the_page(browser: Browser, made: Made) -> None:
    runs, args = made
    notes, run = runs / "pages" / "notes.js", folders(runs)[0].parent.name
    assert notes.read_bytes() == script("notes", [{}])
    opened(browser, runs, f"{run}/final/0/5")
    browser.until(lambda: browser.text("h2") == "Feature 5")
    browser.one("#name").send_keys("commas")
    assert browser.text("#star") == "★"
    opened(browser, runs)
    browser.until(lambda: any("★ commas" in e.text for e in browser.all(".row")))
    browser.run("localStorage.clear()")
    notes.write_bytes(script("notes", [{f"#{run}/final/0/7": {"name": "</script>"}}]))
    assert invoke("eval", *args) == 0
    opened(browser, runs)
    browser.run("const e = document.getElementById('sort'); e.value = 'starred'; e.dispatchEvent(new Event('change'))")
    assert listed(browser) == [7] and "★ </script>" in browser.all(".row")[0].text
    assert browser.errors() == []


def test_a_text_is_shown_with_the_features_of_its_tokens(cli: Cli, browser: Browser, made: Made, cache: Cache) -> None:
    runs, _ = made
    run, text = folders(runs)[0].parent.name, "The <b>cat</b> sat"
    result = cli("eval", "ask", "--runs", runs, "--text", text, "--layers", 1, "--device", "cpu")
    assert (result.code, result.out) == (0, f"page: {runs / 'pages' / 'ask.html'}\n")
    (sae,) = [each for each in residual_saes.saes(runs) if each.run == run and each.layer == "1"]
    expected = sae.load().features(text)
    browser.open(runs / "pages" / "ask.html")
    assert browser.text("blockquote") == text and len(browser.all("h2")) == 2
    shown = browser.run("return [...document.querySelectorAll('.token')].map((e) => e.textContent)")
    assert shown == expected.tokens * 2
    numbers = "(e) => [...e.querySelectorAll('a')].map((a) => Number(a.textContent))"
    chips = browser.run(f"return [...document.querySelectorAll('.chips')].map({numbers})")
    for strongest, z in zip(chips, expected.z, strict=False):  # near ties may be told apart otherwise: precision is bfloat16
        assert len(strongest) == 5 and float(z[strongest].min()) >= 0.9 * float(z.topk(5).values.min())
    feature = chips[0][0]
    browser.all(".chips a")[0].click()
    browser.until(lambda: browser.text("h2") == f"Feature {feature}")
    for wrong, words in (("", "--text is empty"), ("a " * 99, "from 1 to 31")):
        result = cli("eval", "ask", "--runs", runs, "--text", wrong)
        assert result.code == 2 and words in result.err


def test_keys_and_menus_lead_to_other_layers_and_runs(browser: Browser, made_once: Made) -> None:
    runs, _ = made_once
    names = [folder.parent.name for folder in folders(runs)[::3]]
    opened(browser, runs)

    def at() -> tuple[str, str]:
        return tuple(browser.run("return ['run', 'layer'].map((id) => document.getElementById(id).value)"))

    browser.press("]")
    browser.until(lambda: at() == (f"{names[0]}\nfinal", "1"))
    browser.press("}")
    browser.until(lambda: at() == (f"{names[1]}\nfinal", "1"))
    browser.press("[")
    browser.press("[")
    browser.until(lambda: at() == (f"{names[1]}\nfinal", "0"))
    browser.one("#layer").send_keys("2")
    browser.until(lambda: at() == (f"{names[1]}\nfinal", "2"))
    browser.driver.back()
    browser.until(lambda: at() == (f"{names[1]}\nfinal", "0"))
    browser.one("#keys-button").click()
    assert "search by token" in browser.text("#keys")
    browser.press(Keys.ESCAPE)
    assert not browser.all("#keys")[0].is_displayed()


def test_another_hook_of_a_layer_is_a_layer_of_its_own(browser: Browser, made: Made) -> None:
    runs, _ = made
    folder = folders(runs)[1]
    facts = json.loads((folder / "facts.json").read_bytes()) | {"layer": "0.mlp_out"}
    hooked = folder.rename(folder.with_name(folder.name.replace("layer01", "layer00.mlp_out")))
    (hooked / "facts.json").write_text(json.dumps(seal(facts)))
    for script_file in hooked.glob("*.js"):  # whose keys are addresses
        script_file.write_text(script_file.read_text().replace(folder.name, hooked.name))
    write_index(runs / "pages", {hooked})
    opened(browser, runs)
    layer = "return document.getElementById('layer').value"
    options = "return [...document.getElementById('layer').options].map((e) => e.value)"
    assert browser.run(options) == ["0.mlp_out", "0", "2"] and browser.run(layer) == "0.mlp_out"
    browser.press("}")  # to the other run, which has no such hook
    browser.until(lambda: browser.run(options) == ["0", "1", "2"] and browser.run(layer) == "0")
    browser.press("{", "[")
    browser.until(lambda: browser.run(layer) == "0.mlp_out")
    browser.until(lambda: browser.all(".row"))
    assert browser.errors() == []


def test_on_a_phone_list_and_feature_take_turns_and_nothing_is_cut_off(browser: Browser, made_once: Made) -> None:
    runs, _ = made_once
    browser.look(PHONE, dark=True)
    opened(browser, runs)
    assert browser.overflow() == 0
    browser.all(".row")[2].click()
    browser.until(lambda: browser.text("h2") == "Feature 2")
    assert not browser.all("#list")[0].is_displayed()
    assert browser.overflow() == 0
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
    browser.press("j", "j", "k", "j")  # faster than any file is read
    browser.until(lambda: browser.text("h2") == "Feature 4")
    browser.one(".back").click()
    browser.until(lambda: browser.all("#list")[0].is_displayed())
    assert not browser.all("#feature")[0].is_displayed()


def test_hostile_names_and_tokens_are_text(browser: Browser, made: Made) -> None:
    """Of a run: its folder. Of tokens: what the tokeniser says. Neither is ever read as HTML, a script or an address."""
    runs, args = made
    name = "x<b>&'\"%41#? </script>".replace("/", "∕") + "\u2028"
    folders(runs)[0].parent.parent.parent.joinpath(folders(runs)[0].parent.name).rename(runs / name)
    shutil.rmtree(runs / "pages")
    assert invoke("eval", *args, "--layers", 0) == 0
    text = next((runs / "pages").glob("text.*"))
    hostile = [HOSTILE[i % len(HOSTILE)] for i in range(400)]
    (text / "vocabulary.js").write_bytes(script(f"{text.name}/vocabulary", hostile))
    browser.open(page(runs))
    browser.until(lambda: browser.all(".row"))
    browser.press("j")
    browser.until(lambda: browser.all(".context"))
    assert name in browser.run("return [...document.querySelectorAll('#run option')].map((e) => e.textContent)")
    seen = "".join(text for _, text in contexts(browser, "#top"))
    assert HOSTILE[0] in seen and HOSTILE[1] in seen and "a⟨2028⟩b⟨2029⟩c" in seen and "⟨202E⟩gnihton" in seen
    assert "⟨0000⟩⟨001B⟩[31m⟨007F⟩" in seen and "⟨D800⟩" in seen and "𝕏é漢" in seen and "&lt;b&gt;" in seen
    assert browser.driver.title.startswith("feature 0")
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.run("return document.querySelectorAll('img, b').length") == 0
    assert browser.errors() == []


def test_a_file_that_is_gone_is_named(browser: Browser, made: Made) -> None:
    runs, _ = made
    (folders(runs)[0] / "001.js").unlink()
    name = folders(runs)[0].parent.name
    browser.open(page(runs), f"{name}/final/0/64")
    browser.until(lambda: "cannot load" in browser.text("#feature"))
    assert "/001.js" in browser.text(".error")
    browser.press("k")
    browser.until(lambda: browser.text("h2") == "Feature 63")

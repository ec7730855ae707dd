import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from residual_saes.harvest.documents import LocalText
from residual_saes.harvest.pieces import FilePoint, Piece
from residual_saes.harvest.tokens import _encode, _take, _token_batches, require_one_context, separator_id, write_tokens
from residual_saes.shared.cache import Cache
from residual_saes.shared.cache.tokens import TokenArray
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import load_tokenizer
from residual_saes.shared.sites import Site, parse_sites
from tests.conftest import Cli, documents


def source(path: Path) -> LocalText:
    return LocalText(dataset=str(path), column="text")


def expected(lm: Path, cache: Cache) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Every document's tokens and a separator, end to end, without this project's code."""
    tokenizer = load_tokenizer(str(lm), None).backend_tokenizer
    stream = itertools.chain.from_iterable([*tokenizer.encode(d).ids, 0] for d in documents(60))
    n = cache.spec.sequences * cache.spec.context
    return np.array(list(itertools.islice(stream, n))).reshape(cache.spec.sequences, cache.spec.context)


def test_tokens_are_the_documents_end_to_end(lm: Path, cache: Cache) -> None:
    np.testing.assert_array_equal(cache.read_tokens(0, cache.spec.sequences), expected(lm, cache))


def test_continues_after_every_chunk(
    lm: Path, text: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop after each chunk, open everything anew, go on: the same array, and nothing written twice."""
    monkeypatch.setattr("residual_saes.harvest.tokens._DOCUMENTS", 7)
    monkeypatch.setattr(
        "residual_saes.harvest.pieces._PIECE", 3000
    )  # some documents are longer: pieces fall into several batches
    monkeypatch.setattr("residual_saes.harvest.tokens._CHARACTERS", 2000)
    again = Cache.create(tmp_path / "c", cache.spec, parse_sites("0"))
    tokenizer, written = load_tokenizer(str(lm), None), []

    class Stop(Exception):
        pass

    commit = TokenArray.commit

    def commit_and_stop(self: TokenArray, chunk: int, *rest: Any) -> None:
        commit(self, chunk, *rest)
        written.append(chunk)
        raise Stop

    monkeypatch.setattr(TokenArray, "commit", commit_and_stop)
    while again.tokens.missing():
        with pytest.raises(Stop):
            write_tokens(again, source(text), tokenizer)
    assert written == list(range(cache.spec.token_chunks)) and len(written) > 2
    np.testing.assert_array_equal(again.read_tokens(0, cache.spec.sequences), expected(lm, cache))


def test_text_that_runs_out_leaves_nothing_behind(lm: Path, text: Path, cache: Cache, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    spec = dataclasses.replace(cache.spec, n_blocks=200, holdout_blocks=1)
    big = Cache.create(tmp_path / "c", spec, parse_sites("0"))
    with pytest.raises(UserError, match=r"ends after \d+ tokens, 102400 are wanted; ask for at most --tokens \d+"):
        write_tokens(big, source(short), load_tokenizer(str(lm), None))
    assert not list((tmp_path / "c").iterdir())
    shutil.rmtree(tmp_path / "c")


def test_a_changed_file_is_another_revision(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = source(path).pinned_revision()
    path.write_text("two")
    assert source(path).pinned_revision() != first
    assert first.startswith("sha256:")


def test_quoted_special_tokens_are_text(lm: Path, cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "what <|endoftext|> means " * 200}) + "\n")
    tokenizer = load_tokenizer(str(lm), None)
    ((_, tokens),) = _token_batches(source(path), tokenizer, cache.spec, None)
    assert np.flatnonzero(tokens == tokenizer.eos_token_id).tolist() == [len(tokens) - 1]
    assert "".join(tokenizer.convert_ids_to_tokens(tokens[:-1].tolist())) == "whatĠ<|endoftext|>ĠmeansĠ" * 200


def test_a_tokeniser_that_would_cut_and_pad(lm: Path, tmp_path: Path) -> None:
    shutil.copytree(lm, tmp_path / "lm")
    path = tmp_path / "lm" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    pieces = [Piece(point=FilePoint(), text=documents(1)[0], ends=True, where="")]
    assert _encode(load_tokenizer(str(tmp_path / "lm"), None), pieces) == _encode(load_tokenizer(str(lm), None), pieces)


def test_long_documents_have_the_tokens_of_the_whole(
    lm: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("".join(documents(20)))
    tokenizer = load_tokenizer(str(lm), None)
    whole = np.concatenate([tokens for _, tokens in _token_batches(source(path), tokenizer, cache.spec, None)])
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 1000)
    pieces = [tokens for _, tokens in _token_batches(source(path), tokenizer, cache.spec, None)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len(whole) > 1000


def test_what_is_tokenised_at_once_is_bounded_by_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.harvest.tokens._CHARACTERS", 100)
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 60)
    for length in (1, 50, 200):
        path = tmp_path / "t.jsonl"
        path.write_text((json.dumps({"text": "x" * length}) + "\n") * 300)
        pieces = source(path).pieces()
        batches = list(iter(lambda pieces=pieces: _take(pieces), []))
        sizes = [sum(len(piece.text) for piece in batch) for batch in batches]
        assert sum(sizes) == 300 * length
        assert max(sizes) < 160
        assert max(map(len, batches)) <= 256


def test_text_that_changed_before_a_resume_point_is_refused(lm: Path, text: Path, cache: Cache, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(lm), None)
    start, _ = next(_token_batches(source(text), tokenizer, cache.spec, None))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "another"}) + "\n" + text.read_text())
    with pytest.raises(UserError, match=r"does not go on where tokenising stopped \(.*line 1\)"):
        next(_token_batches(source(other), tokenizer, cache.spec, start))


def test_tokens_that_the_model_does_not_have_are_refused(lm: Path, text: Path, cache: Cache) -> None:
    """Of the separator before anything is read, of the text where it is met; none is ever stored as another."""
    tokenizer = load_tokenizer(str(lm), None)
    small = dataclasses.replace(cache.spec, vocab_size=100)
    with pytest.raises(UserError, match=r"gives token \d+ \('.*'\), the model has 100 tokens, counted from 0"):
        require_one_context(source(text), tokenizer, small)
    small = dataclasses.replace(cache.spec, vocab_size=350, separator=350)
    with pytest.raises(UserError, match="gives token 350"):
        require_one_context(source(text.with_name("unread.jsonl")), tokenizer, small)


def test_documents_end_with_the_token_that_is_named(
    cli: Cli, lm: Path, text: Path, harvest_args: tuple[object, ...], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(lm), None)
    word = tokenizer.convert_ids_to_tokens(350)
    assert [separator_id(tokenizer, name) for name in (None, word, "0399")] == [tokenizer.eos_token_id, 350, 399]
    with pytest.raises(UserError, match=r"no token '<none>' to end documents with: name one, such as <\|endoftext\|>"):
        separator_id(tokenizer, "<none>")
    args = ("harvest", *harvest_args, "--layers", "0", "--tokens", 4096, "--holdout-tokens", 512, "--cache", tmp_path / "c")
    result = cli(*args, "--separator", word)
    assert result.code == 0 and f"note: every document ends with token 350 ({word}); --separator names another" in result.err
    cache = Cache.open(tmp_path / "c")
    written = cache.read_tokens(0, cache.spec.sequences)
    assert cache.spec.separator == 350 and 350 in written and tokenizer.eos_token_id not in written
    refused = cli(*args)
    assert refused.code == 2 and "separator" in refused.err
    assert cli("harvest", "repair", "--cache", tmp_path / "c", "--blocks", "0", "--device", "cpu").code == 0


@pytest.fixture
def bos_lm(lm: Path, tmp_path: Path) -> Path:
    """The tests' model with a tokeniser that begins every text with <s>, as Llama's does."""
    path = tmp_path / "bos-lm"
    shutil.copytree(lm, path)
    tokenizer = load_tokenizer(str(lm), None)
    backend = tokenizer.backend_tokenizer
    word = tokenizer.convert_ids_to_tokens(399)
    backend.post_processor = processors.TemplateProcessing(single=f"{word} $A", special_tokens=[(word, 399)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token=word).save_pretrained(path)
    return path


def test_bos_begins_every_context_if_it_is_asked_for(
    bos_lm: Path, lm: Path, text: Path, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(bos_lm), None)
    require_one_context(source(text), tokenizer, cache.spec)
    assert "puts" in (said := capsys.readouterr().err) and "are harvested with --bos" in said
    spec = dataclasses.replace(cache.spec, bos=True, n_blocks=20, holdout_blocks=1)
    require_one_context(source(text), tokenizer, spec)
    require_one_context(source(text), load_tokenizer(str(lm), None), cache.spec)
    assert capsys.readouterr().err == ""
    made = Cache.create(tmp_path / "c", spec, parse_sites("0"))
    write_tokens(made, source(text), tokenizer)
    got = made.read_tokens(0, spec.sequences)
    assert set(got[:, 0]) == {399}
    n = spec.sequences * (spec.context - 1)
    np.testing.assert_array_equal(got[:, 1:].reshape(-1), expected(lm, cache).reshape(-1)[:n])
    with pytest.raises(UserError, match="has no token for the beginning of a text: leave out --bos"):
        require_one_context(source(text), load_tokenizer(str(lm), None), spec)


def test_a_cache_with_blocks_is_never_taken_away(lm: Path, text: Path, cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    for chunk in range(cache.spec.token_chunks):
        cache.tokens.entry_path(chunk).unlink()
    short = tmp_path / "short.jsonl"
    short.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="has committed blocks and is kept"):
        write_tokens(cache, source(short), load_tokenizer(str(lm), None))
    assert cache.committed(Site(0)) == Cache.open(cache_path).committed(Site(0))
    assert cache.block_path(Site(0), 0).exists()

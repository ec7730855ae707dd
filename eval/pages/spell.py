"""What each token of a tokeniser stands for in a text."""

from transformers import PreTrainedTokenizerBase


def spell(tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    """The text of the first n tokens; of a token that is part of a character, its bytes as \\xe2."""
    backend = tokenizer.backend_tokenizer
    names = tokenizer.convert_ids_to_tokens(list(range(n)))
    if backend.decoder is None:  # the tokeniser's own text would not be the one that tokens were made from
        return [_bytes(name) for name in names]
    # a token alone may lose the space it begins with, the second of two does not
    once, twice = (backend.decode_batch([[i] * times for i in range(n)], skip_special_tokens=False) for times in (1, 2))
    spelt = [b[len(a) :] if b.startswith(a) else a for a, b in zip(once, twice, strict=True)]
    return [_bytes(name) if "\ufffd" in text else text for name, text in zip(names, spelt, strict=True)]


def _bytes(name: str | None) -> str:
    """A token of a byte-level tokeniser, from its name; any other's name."""
    try:
        raw = bytes(_BYTES[letter] for letter in name or "")
    except KeyError:
        return name or ""
    return raw.decode(errors="backslashreplace")


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenisers spell bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()

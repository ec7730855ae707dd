"""Places that a command line may name for a cache or for runs: a folder, or a prefix of an S3 bucket."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from residual_saes.shared.errors import UserError

_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=+@-]+)*)/?")

_SCHEME = re.compile(r"(?i:s3[an]?|gs|az|hf):|[^/]*:/")  # a bucket's, a URL's or another machine's, as of user@host:/path


@dataclass(frozen=True, slots=True)
class Bucket:
    """A prefix of an S3 bucket, written s3://bucket/prefix; a Path would make one slash of two."""

    name: str
    prefix: str = ""  # without slashes at its ends

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read s3://bucket/prefix. Raises UserError for any other text."""
        match = _BUCKET.fullmatch(text)
        if match is None or {".", ".."} & set(match[2].split("/")):
            raise UserError(f"{text!r} is not a place in S3: write s3://bucket/prefix, in letters, digits and _.-")
        return cls(match[1], match[2].strip("/"))

    def __truediv__(self, key: str) -> "Bucket":
        return Bucket(self.name, f"{self.prefix}/{key}".strip("/"))

    def __str__(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")


Location: TypeAlias = Path | Bucket


def parse_location(text: str | Location) -> Location:
    """Read the value of an option: a folder, or s3://bucket/prefix. Raises UserError."""
    if not isinstance(text, str):  # an option's default
        return text
    if _SCHEME.match(text) is None:
        return Path(_at_home(text))
    if text.startswith("s3:"):
        return Bucket.parse(text)
    raise UserError(f"{text!r} is not a place for this: name a folder, or s3://bucket/prefix")


def parse_folder(text: str | Path) -> Path:
    """Read the value of an option: a folder or file of this machine. Raises UserError."""
    place = parse_location(text)
    if isinstance(place, Bucket):
        raise UserError(f"{text!r} is a bucket, and this must be a folder of this machine: name one")
    return place


def parse_name(text: str) -> str:
    """Read the value of an option: a name on the hub, or a path. Raises UserError."""
    if _SCHEME.match(text):
        raise UserError(f"{text!r} is not known here: write a name on the hub, as owner/name, or a path of this machine")
    return _at_home(text)


def _at_home(path: str) -> str:
    """The path with the ~ that a shell leaves in --cache=~/x made a home. Raises UserError where nobody has that one."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path!r} is in a home that is not known here: write it from / on, or as ./{path} if it is that name")
    return expanded


def folder_name(folder: Path) -> str:
    """What is in a folder is called by it; in the hub's own cache, where a folder is a commit's, by the repository."""
    folder = Path(os.path.abspath(folder))  # links stay: the hub's cache keeps its files under their hashes elsewhere
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.rpartition("--")[2] if in_cache else folder.name

from pathlib import Path

import pytest

from shared.errors import UserError
from shared.stores import Bucket, parse_location


def test_a_location_is_a_folder_or_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_location("~/x") == Path("/home/someone/x")
    assert parse_location("data/a:b") == Path("data/a:b")
    assert parse_location("s3://bucket/prefix") == Bucket("bucket", "prefix")


@pytest.mark.parametrize("text", ["gs://b/x", "az://b", "hf://datasets/x", "S3://bucket/x", "s3a://bucket/x", "file:///tmp/x"])
def test_other_schemes_are_refused_and_make_no_folder(text: str) -> None:
    with pytest.raises(UserError, match="is not a place for this: name a folder, or s3://bucket/prefix"):
        parse_location(text)

import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.stores import Bucket


@pytest.mark.parametrize(("text", "name", "prefix"), [("s3://abc", "abc", ""), ("s3://a.b-c/d/e_f.g/", "a.b-c", "d/e_f.g")])
def test_places_are_read_and_written_alike(text: str, name: str, prefix: str) -> None:
    assert Bucket.parse(text) == Bucket(name, prefix)
    assert str(Bucket.parse(text)) == text.rstrip("/")
    assert str(Bucket.parse(text) / "x/y") == f"{text.rstrip('/')}/x/y"


@pytest.mark.parametrize("text", ["s3://", "s3:/abc/d", "s3://A/b", "s3://abc//d", "s3://abc/../d", "s3://abc/d e", "s3:abc"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a place in S3: write s3://bucket/prefix"):
        Bucket.parse(text)

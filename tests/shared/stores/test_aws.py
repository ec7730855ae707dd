"""Who we are is who was named, or nobody."""

import os
from pathlib import Path

import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.stores.aws import Access, find_access

CONFIG = """
[default]
region = eu-central-1
[profile lab]
region = us-west-2
endpoint_url = https://lab.example:9000
[profile "in quotes"]
aws_access_key_id = QUOTED
aws_secret_access_key = s
[profile served]
services = store
endpoint_url = https://everything.example
aws_access_key_id = SERVED
aws_secret_access_key = s
[services store]
s3 =
  endpoint_url = https://store.example
[profile noservices]
services = none
[profile sso]
sso_session = lab
[profile command]
credential_process = echo
[profile role]
role_arn = arn:aws:iam::1:role/r
source_profile = lab
[profile web]
role_arn = arn:aws:iam::1:role/r
web_identity_token_file = {token}
[profile empty]
region = us-east-1
[profile half]
aws_access_key_id = HALF
[profile commanded]
credential_process = echo
[profile fips]
use_fips_endpoint = true
aws_access_key_id = FIPS
aws_secret_access_key = s
[profile ignoring]
endpoint_url = https://lab.example:9000
ignore_configured_endpoint_urls = true
[DEFAULT]
aws_access_key_id = NOBODYS
aws_secret_access_key = s
"""
KEYS = """
[lab]
aws_access_key_id = LAB
aws_secret_access_key = s
[commanded]
aws_access_key_id = BEFORE
aws_secret_access_key = s
aws_session_token = t
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("t")
    (tmp_path / "config").write_text(CONFIG.format(token=tmp_path / "token"))
    (tmp_path / "credentials").write_text(KEYS)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return monkeypatch


def access(environment: pytest.MonkeyPatch, **variables: str) -> Access:
    with environment.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"AWS_{name}", value)
        return find_access()


def key(access: Access) -> str:
    return access.credential["access_key_id"] if access.credential else ""


def test_keys_are_found_in_the_order_of_aws(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = {"ACCESS_KEY_ID": "OURS", "SECRET_ACCESS_KEY": "s"}
    web = {"WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"), "ROLE_ARN": "arn"}
    assert access(environment).credential is None
    assert key(access(environment, PROFILE="lab")) == "LAB"
    assert key(access(environment, DEFAULT_PROFILE="lab")) == "LAB"
    assert key(access(environment, PROFILE="in quotes")) == "QUOTED"
    assert key(access(environment, PROFILE="lab", **ours, **web)) == "OURS"
    assert access(environment, PROFILE="lab", **web).config["role_arn"] == "arn"
    assert access(environment, PROFILE="web").config["web_identity_token_file"] == str(tmp_path / "token")
    assert access(environment, PROFILE="commanded", SESSION_TOKEN="another's").credential == {
        "access_key_id": "BEFORE", "secret_access_key": "s", "token": "t", "expires_at": None,
    }  # fmt: skip
    assert access(environment, CONTAINER_CREDENTIALS_RELATIVE_URI="/x", EC2_METADATA_DISABLED="true").credential is None
    assert access(environment, EC2_METADATA_SERVICE_ENDPOINT="http://m:1/").config["metadata_endpoint"] == "http://m:1"


def test_a_file_that_is_named_and_not_there_is_said(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """AWS' own tools pass it over, and so the machine's own identity is the one that is left."""
    assert access(environment, SHARED_CREDENTIALS_FILE="/not/there").credential is None
    said = "note: AWS_SHARED_CREDENTIALS_FILE names /not/there, which is not there: what this machine is given counts\n"
    assert capsys.readouterr().err == said
    assert key(access(environment, SHARED_CREDENTIALS_FILE="/not/there", ACCESS_KEY_ID="a", SECRET_ACCESS_KEY="s")) == "a"
    assert capsys.readouterr().err == ""


def test_endpoint_and_region_are_found_in_the_order_of_aws(environment: pytest.MonkeyPatch) -> None:
    assert access(environment).endpoint == "https://s3.eu-central-1.amazonaws.com"
    lab = access(environment, PROFILE="lab")
    assert (lab.endpoint, lab.config["region"]) == ("https://lab.example:9000", "us-west-2")
    assert access(environment, PROFILE="lab", REGION="x").config["region"] == "x"
    assert access(environment, PROFILE="served").config["endpoint"] == "https://store.example"
    assert access(environment, PROFILE="served", ENDPOINT_URL="https://a.example").endpoint == "https://a.example"
    both = access(environment, ENDPOINT_URL="https://a.example", ENDPOINT_URL_S3="https://me:secret@b.example")
    assert both.endpoint == "https://b.example" and both.config["aws_endpoint_url_s3"] == "https://me:secret@b.example"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PROFILE": "not-there"}, "there is no AWS profile not-there in ~/.aws"),
        ({"PROFILE": "not-there", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "s"}, "there is no AWS profile not-there"),
        ({"PROFILE": "sso"}, "AWS profile sso gets its credentials by SSO (sso_session), which is not known here"),
        ({"PROFILE": "command"}, "by a command (credential_process), which is not known here: set AWS_ACCESS_KEY_ID"),
        ({"PROFILE": "role"}, "takes a role (role_arn), which is not known here"),
        ({"PROFILE": "role", "WEB_IDENTITY_TOKEN_FILE": "/dev/null", "ROLE_ARN": "arn"}, "takes a role"),
        ({"PROFILE": "empty"}, "AWS profile empty has no credentials"),
        ({"PROFILE": "half"}, "the secret key of AWS profile half for S3 is empty"),
        ({"PROFILE": "noservices"}, "names services none, which ~/.aws/config does not have"),
        ({"ACCESS_KEY_ID": "a"}, "the secret key of the environment for S3 is empty"),
        ({"ACCESS_KEY_ID": "é\n", "SECRET_ACCESS_KEY": "s"}, "the access key of the environment for S3 is empty, or has"),
        ({"REGION": "us east\n1"}, "the region for S3 is empty, or has characters"),
        ({"WEB_IDENTITY_TOKEN_FILE": "/not/there", "ROLE_ARN": "arn"}, "names a file that cannot be read"),
        ({"WEB_IDENTITY_TOKEN_FILE": "/dev/null"}, "or AWS_ROLE_ARN is not set beside it"),
        ({"CONTAINER_CREDENTIALS_FULL_URI": "http://x"}, "with AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE alone"),
        ({"CONTAINER_CREDENTIALS_FULL_URI": "x", "CONTAINER_AUTHORIZATION_TOKEN_FILE": "/dev/null"}, "is not a URL such as"),
        ({"METADATA_ENDPOINT": "not a url"}, "AWS_METADATA_ENDPOINT is not a URL such as http://169.254.169.254: correct it"),
        ({"EC2_METADATA_DISABLED": "true"}, "no credentials: set AWS_ACCESS_KEY_ID"),
        ({"EC2_METADATA_SERVICE_ENDPOINT": "m:1"}, "AWS_EC2_METADATA_SERVICE_ENDPOINT is not a URL such as"),
        ({"ROLE_ARN": "arn"}, "AWS_ROLE_ARN is set and AWS_WEB_IDENTITY_TOKEN_FILE is not: set both, or neither"),
        ({"SECRET_ACCESS_KEY": "s"}, "AWS_SECRET_ACCESS_KEY is set and AWS_ACCESS_KEY_ID is not: set both, or neither"),
        ({"SESSION_TOKEN": "t"}, "AWS_SESSION_TOKEN is set and AWS_ACCESS_KEY_ID is not"),
        ({"PROFILE": "lab", "DEFAULT_PROFILE": "empty"}, "name two profiles, and AWS' tools do not agree on one"),
        ({"PROFILE": "fips"}, "AWS_USE_FIPS_ENDPOINT is not known here: name that endpoint by AWS_ENDPOINT_URL_S3"),
        ({"USE_DUALSTACK_ENDPOINT": "true"}, "AWS_USE_DUALSTACK_ENDPOINT is not known here"),
        ({"PROFILE": "lab", "SKIP_SIGNATURE": "true"}, "AWS_SKIP_SIGNATURE is set, and so is an identity that would not"),
        ({"PROFILE": "ignoring"}, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is set and so is an endpoint"),
        ({"ENDPOINT_URL": "https://x", "IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "and so is an endpoint: unset one"),
        *(({"ENDPOINT_URL": url}, "is not a URL such as") for url in ("not a url", "ftp://x", "http://", "x:9", "http://[::1")),
        ({"CONFIG_FILE": "/"}, "cannot read /: Is a directory"),
        ({"CONFIG_FILE": __file__}, "test_aws.py is not as AWS' tools write it"),
    ],
)
def test_what_is_named_and_cannot_be_used_is_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        access(environment, **variables)
    assert message in str(error.value) and "\n" not in str(error.value)

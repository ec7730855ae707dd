"""Who we are to S3, and where it is: credentials, region and endpoint from where AWS' own tools take them, in that order.

What is named there and cannot be used here is refused: the machine's own role, which comes last, may be somebody else. Values
are put into no message.
"""

import configparser
import functools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import say

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential

_SENDABLE = re.compile("[!-~]+")  # in a header
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")  # in files; in capitals, variables
_ELSEWHERE = {  # ways to credentials that AWS' tools go and we do not
    "sso_session": "SSO",
    "sso_start_url": "SSO",
    "login_session": "a login",
    "credential_process": "a command",
}


@dataclass(kw_only=True, frozen=True, slots=True)
class Access:
    """What obstore is told. Everything else it reads from the environment."""

    config: "S3Config"
    credential: "S3Credential | None"  # None: by the web identity in `config`, or what the machine was given
    endpoint: str  # for messages: without a password


@dataclass(kw_only=True, frozen=True, slots=True)
class _Profile:
    """The sections of a profile in both files, and the endpoint that its services section gives S3."""

    name: str
    named: bool  # rather than the default one
    config: dict[str, str]
    shared: dict[str, str]
    s3_endpoint: str

    def get(self, key: str) -> str:
        return self.shared.get(key) or self.config.get(key) or ""

    def says(self, key: str) -> bool:
        """Whether it is so, by a variable or by the profile."""
        return (os.environ.get(f"AWS_{key.upper()}") or self.get(key)).lower() == "true"

    def refuse(self, why: str) -> UserError:
        return UserError(
            f"AWS profile {self.name} {why}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) as "
            f"`aws configure export-credentials --profile {self.name} --format env` gives them"
        )


def find_access() -> Access:
    """Raises UserError for what is named and cannot be used."""
    profile = _profile()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or profile.get("region")
    endpoint = _endpoint(profile)
    config, credential = _identity(profile)
    if (config or credential) and os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "y", "on"):
        raise UserError("AWS_SKIP_SIGNATURE is set, and so is an identity that would not be used: unset one of them")
    if region:
        config["region"] = _sendable("the region", region)
    if endpoint:
        config["endpoint"] = config["aws_endpoint_url_s3"] = endpoint
    shown = urlsplit(endpoint or f"https://s3.{region or 'us-east-1'}.amazonaws.com")
    return Access(config=config, credential=credential, endpoint=f"{shown.scheme}://{shown.netloc.rpartition('@')[2]}")


def _profile() -> _Profile:
    names = {name for key in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE") if (name := os.environ.get(key))}
    if len(names) > 1:
        raise UserError("AWS_PROFILE and AWS_DEFAULT_PROFILE name two profiles, and AWS' tools do not agree on one: unset one")
    name = next(iter(names), "")
    sections, keys = _read("AWS_CONFIG_FILE", "~/.aws/config"), _read("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    config, shared = sections.get(f"profile {name or 'default'}"), keys.get(name or "default")
    if name in ("", "default") and config is None:
        config = sections.get("default")
    if name and config is None and shared is None:
        raise UserError(f"there is no AWS profile {name} in ~/.aws: correct AWS_PROFILE, or unset it")
    s3_endpoint = ""
    if services := (config or {}).get("services"):
        if f"services {services}" not in sections:
            raise UserError(f"AWS profile {name or 'default'} names services {services}, which ~/.aws/config does not have")
        lines = (line.partition("=") for line in sections[f"services {services}"].get("s3", "").splitlines())
        s3_endpoint = next((value.strip() for key, _, value in lines if key.strip().lower() == "endpoint_url"), "")
    return _Profile(
        name=name or "default", named=bool(name), config=config or {}, shared=shared or {}, s3_endpoint=s3_endpoint
    )  # fmt: skip


def _read(variable: str, usual: str) -> dict[str, dict[str, str]]:
    """The sections of a file, none where there is no file."""
    path, parser = os.environ.get(variable) or usual, configparser.RawConfigParser(default_section="")  # no [DEFAULT] for all
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            parser.read_file(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put that right, or name another file by {variable}") from None
    except (configparser.Error, ValueError):  # their texts quote lines
        raise UserError(f"{path} is not as AWS' tools write it: put that right, or name another file by {variable}") from None
    return {" ".join(name.replace('"', " ").split()): dict(parser[name]) for name in parser.sections()}


def _endpoint(profile: _Profile) -> str:
    """The URL of another server than Amazon's; "" for that."""
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    named = (*(os.environ.get(name) for name in variables), profile.s3_endpoint, profile.get("endpoint_url"))
    if (endpoint := next(filter(None, named), "")) == "":
        for kind in ("fips", "dualstack"):
            if profile.says(f"use_{kind}_endpoint"):
                raise UserError(f"AWS_USE_{kind.upper()}_ENDPOINT is not known here: name that endpoint by AWS_ENDPOINT_URL_S3")
        return ""
    if profile.says("ignore_configured_endpoint_urls"):
        raise UserError("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is set and so is an endpoint: unset one of them")
    if not _is_url(endpoint):
        raise UserError("the endpoint for S3 (AWS_ENDPOINT_URL, or ~/.aws/config) is not a URL such as https://host:9000")
    return endpoint


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return bool(url.scheme in ("http", "https") and url.hostname and url.port != 0 and _SENDABLE.fullmatch(text))
    except ValueError:
        return False


def _identity(profile: _Profile) -> "tuple[S3Config, S3Credential | None]":
    """A web identity, or the keys of the environment or a file; neither where nothing is named and the machine's own counts."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}, _keys({key: os.environ.get(key.upper(), "") for key in _KEYS}, "the environment")
    if profile.get("role_arn") and not profile.get("web_identity_token_file"):
        raise profile.refuse("takes a role (role_arn), which is not known here")
    if web_identity := _web_identity(profile):
        return web_identity, None
    for key, what in _ELSEWHERE.items():
        if profile.get(key) and not (key == "credential_process" and profile.shared.get(_KEYS[0])):
            raise profile.refuse(f"gets its credentials by {what} ({key}), which is not known here")
    for section in (profile.shared, profile.config):
        if section.get(_KEYS[0]):
            return {}, _keys(section, f"AWS profile {profile.name}")
    if profile.named:
        raise profile.refuse("has no credentials")
    return _machine(profile), None


def _web_identity(profile: _Profile) -> "S3Config":
    names = ("web_identity_token_file", "role_arn", "role_session_name")
    token, role, session = (os.environ.get(f"AWS_{name.upper()}") or profile.get(name) for name in names)
    if not token:
        return {}
    if not role or not os.access(token, os.R_OK):
        raise UserError("AWS_WEB_IDENTITY_TOKEN_FILE names a file that cannot be read, or AWS_ROLE_ARN is not set beside it")
    config: S3Config = {"web_identity_token_file": token, "role_arn": role}
    if session:
        config["role_session_name"] = session
    return config


def _machine(profile: _Profile) -> "S3Config":
    """What obstore is told of the machine's identity. Raises UserError where that was named in a way that obstore passes over,
    ruled out, or not meant."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN"):
        if os.environ.get(name):
            beside = "AWS_WEB_IDENTITY_TOKEN_FILE" if name == "AWS_ROLE_ARN" else "AWS_ACCESS_KEY_ID"
            raise UserError(f"{name} is set and {beside} is not: set both, or neither for what this machine is given")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        if (path := os.environ.get(name)) and not os.path.exists(os.path.expanduser(path)):
            _say_once(f"note: {name} names {path}, which is not there: what this machine is given counts")
    # by AWS' own name, which obstore does not know
    metadata = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or profile.get("ec2_metadata_service_endpoint")
    urls = {name: os.environ.get(name) for name in ("AWS_METADATA_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI")}
    for name, value in (urls | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata}).items():  # obstore panics at what is none
        if value and not _is_url(value):
            raise UserError(f"{name} is not a URL such as http://169.254.169.254: correct it, or unset it")
    if os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        return {}
    if urls["AWS_CONTAINER_CREDENTIALS_FULL_URI"]:
        if not os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            raise UserError(
                "AWS_CONTAINER_CREDENTIALS_FULL_URI is known here with AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE alone"
            )
    elif os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise UserError("no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one of ~/.aws")
    return {"metadata_endpoint": metadata.rstrip("/")} if metadata else {}


@functools.cache
def _say_once(note: str) -> None:
    say(note, err=True)


def _keys(values: dict[str, str], where: str) -> "S3Credential":
    access, secret, token = (values.get(key, "") for key in _KEYS)
    return {
        "access_key_id": _sendable(f"the access key of {where}", access),
        "secret_access_key": _sendable(f"the secret key of {where}", secret),
        "token": _sendable(f"the session token of {where}", token) if token else None,
        "expires_at": None,
    }


def _sendable(what: str, value: str) -> str:
    if not _SENDABLE.fullmatch(value):
        raise UserError(f"{what} for S3 is empty, or has characters in it that it cannot have")
    return value

"""Runs on the hub: what `rsae eval publish` prepares in a run's folder, and how it gets there.

Prepared: the model card (README.md), the entry for SAELens' registry, and beside the checkpoints one folder a layer in SAELens'
form, layer_12, by which `SAE.from_pretrained("org/repo", "layer_12")` finds it. Uploaded is what contents.py names and nothing
else, so resume states, half-written files and whatever else lies there stay here.

An upload is a series of commits. What the hub has already, by name and content, is not sent again; so the same command
continues after a kill, with nothing remembered here, and of the commit that was lost the hub keeps what had arrived.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from residual_saes.eval.floors.measured import measured_floors
from residual_saes.eval.measure.store import Results
from residual_saes.eval.publish.card import Publication, exported, sister_runs, write_card
from residual_saes.eval.publish.contents import PublishedForm, check, published_files
from residual_saes.eval.publish.export import Checkpoint, ExportConfig, open_checkpoint, publish_folder
from residual_saes.eval.publish.formats import saelens
from residual_saes.eval.publish.license import require_license, require_valid
from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import writing
from residual_saes.shared.hub import waiting_for
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.seal import parse_json
from residual_saes.shared.stores import folder_name
from residual_saes.shared.temporaries import discard, temporary
from residual_saes.shared.units import format_bytes

_COMMIT_FILES, _COMMIT_BYTES = 50, 5 << 30  # in one commit: what a kill costs at the most
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@dataclass(kw_only=True, frozen=True, slots=True)
class PublishConfig:
    """Where to, and how it is seen there."""

    to: str = option("On the hub: who owns it (repositories are named as the runs), or owner/name.", required=True)
    public: bool = option("For everybody to see, if it is new [default: private].", False, is_flag=True)
    license: str = option("Of the SAEs, as the hub names it.", Publication().license)
    dry_run: bool = option("Prepare everything and list files and sizes, but send nothing.", False, is_flag=True)

    def publication(self) -> Publication:
        """Raises UserError for what is no name on the hub."""
        owner, _, name = self.to.partition("/")
        if not all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in self.to.split("/", 1)):
            raise UserError(f"{self.to!r} is no name on the hub: write --to my-name, or --to my-name/my-repository")
        return Publication(owner=owner, name=name or None, license=self.license)


def publish(runs: list[Run], config: PublishConfig) -> None:
    """Prepare and upload each run; a dry run prepares, and lists. Raises UserError for what cannot be done."""
    publication = config.publication()
    if publication.name is not None and len(runs) > 1:
        raise UserError(f"{len(runs)} runs cannot share the repository {config.to}; give --to {publication.owner}, or one run")
    if not config.dry_run and get_token() is None:
        raise UserError("the hub asks who you are: log in with `hf auth login`, or set HF_TOKEN")
    require_license(config.license)
    total = 0
    for run in runs:
        prepare(run, publication)
        files = published_files(run)
        check(run, files)
        repository = publication.repository(run)
        if config.dry_run:
            total += _list(repository, files)
        else:
            _upload(run, repository, files, config)
    if config.dry_run and len(runs) > 1:
        say(f"{len(runs)} repositories, {format_bytes(total)} in all; nothing was sent")


# --- what is published ---


def prepare(run: Run, publication: Publication) -> None:
    """Write everything that is made for others: card, registry entry, a folder a layer. Raises UserError."""
    published_files(run)  # before anything is read: none of them may be a link
    finals = [s for s in run.snapshots() if s.label == FINAL]
    if not finals:
        raise UserError(f"{run.path} has no finished layer to publish: train it to its end first")
    stored = Results(run)
    records = stored.present()
    if not records:
        raise UserError(f"{run.path} has not been evaluated: run `rsae eval` first, for nobody can use SAEs of unknown worth")
    stored.tabulate()  # the .csv has no checksum
    run.remove_leftovers()
    measured = measured_floors(run.path.parent, run.config.cache.digest)
    config = ExportConfig(to="saelens", out=run.path)
    with Progress("preparing", len(finals), "layers") as progress:
        for snapshot in finals if exported(run.config) else ():
            checkpoint = Checkpoint(path=snapshot.path, site=snapshot.site, label=snapshot.label, run=run)
            folder = run.path / checkpoint.folder.name
            publish_folder(folder, saelens(*open_checkpoint(checkpoint, config)), ours=_is_ours(run, folder / "cfg.json"))
            progress.advance(1, f"layer {snapshot.site}")
    write_card(run, records, measured, sister_runs(run), publication)


def _is_ours(run: Run, path: Path) -> bool:
    """Whether a cfg.json was made of this run, if of an earlier state of it."""
    try:
        return bool(parse_json(path.read_bytes())["metadata"]["source"]["run"] == folder_name(run.path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _list(repository: str, files: dict[str, Path]) -> int:
    """Returns the bytes of all files."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    say(f"{repository}: {len(files)} files, {format_bytes(sum(sizes.values()))}")
    for name, size in sizes.items():
        say(f"  {format_bytes(size):>9}  {name}")
    return sum(sizes.values())


# --- how it gets there ---


def _upload(run: Run, repository: str, files: dict[str, Path], config: PublishConfig) -> None:
    disable_progress_bars()
    waiting_for(f"the repository {repository}")
    api = HfApi()
    try:
        require_valid(files["README.md"].read_text(encoding="utf-8"))
        url = api.create_repo(repository, private=not config.public, exist_ok=True)
        uploaded = {f.path: f for f in api.list_repo_tree(repository, recursive=True) if isinstance(f, RepoFile)}
        total, sent = sum(path.stat().st_size for path in files.values()), 0
        with Progress(f"uploading to {repository}", total, "bytes") as progress:
            for part in _parts(run, files, uploaded, progress):
                operations = [CommitOperationAdd(name, str(path)) for name, path in part.items()]
                api.create_commit(repository, operations, commit_message=_message(list(part)))
                sent += len(part)
                progress.advance(sum(files[name].stat().st_size for name in part), f"{len(part)} files")
    except Exception as error:  # a machine far away fails in too many ways to name them
        raise UserError(f"cannot publish {repository}: {_reason(error)}; run the same command again to continue") from None
    others = ", the others were there" if sent < len(files) else ""
    say(f"{url}: {sent} of {len(files)} files sent{others}")


def _parts(run: Run, files: dict[str, Path], uploaded: dict[str, RepoFile], progress: Progress) -> Iterator[dict[str, Path]]:
    """{name: file to send} for each commit, of what the hub has not."""
    with writing(run.path):
        folder = temporary(run.path / "published", folder=True)
    try:
        form, part = PublishedForm(run, folder), dict[str, Path]()
        for name, path in files.items():
            file = form.file(name, path)
            if _same(uploaded.get(name), file):
                progress.advance(path.stat().st_size)
                continue
            if part and (len(part) == _COMMIT_FILES or sum(f.stat().st_size for f in [*part.values(), file]) > _COMMIT_BYTES):
                yield part
                for done in set(part.values()) - set(files.values()):
                    done.unlink()
                part = {}
            part[name] = file
        if part:
            yield part
    finally:
        discard(folder)


def _same(remote: RepoFile | None, path: Path) -> bool:
    """Whether the hub has this content under this name: a large file by its SHA-256, a small one by git's hash."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        content = file.read()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest() == remote.blob_id


def _message(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} files"


def _reason(error: Exception) -> str:
    """One line of what went wrong, down to its cause, without the token whatever it says."""
    lines: list[Any] = [error, error.__cause__] if error.__cause__ is not None else [error]
    text = ": ".join(" ".join(str(e).split()) or type(e).__name__ for e in lines)
    token = get_token()
    return (text.replace(token, "…") if token else text)[:400].rstrip(".")

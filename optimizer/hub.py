"""Models from the Hugging Face hub: only the files that are used, and from the cache when offline.

HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT are read by huggingface_hub when it is imported,
which happens in here on first use.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.configs import read_json
from optimizer.hub_files import HubFile, HubFolder, byte_text, require_free
from optimizer.known_models import licence_of, remember_licence
from optimizer.layout import PIPELINE, chosen_by, described_by, require_described
from profiles.errors import DiskFullError, KilnError, MissingError, PartialError, SpecError
from runners.console import Console

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

__all__ = ["HubModel", "fetch", "fetch_configs"]


@dataclass(frozen=True)
class HubModel:
    """A hub model whose used files are all in the hub library's cache."""

    name: str
    folder: Path
    """Named by the commit."""
    licence: str | None
    """What the model's card calls it; None where it says nothing or couldn't be asked."""
    downloaded_bytes: int
    """That weren't here before."""

    @property
    def revision(self) -> str:
        """The commit."""
        return self.folder.name


def fetch(
    model: str,
    *,
    revision: str | None,
    accepted: Sequence[str] = (PIPELINE,),
    console: Console | None = None,
) -> HubModel:
    """Download what is missing of a hub model, with a progress bar on `console`.

    `accepted` are the files that may describe it: a pipeline's, an autoencoder's. Where the hub
    can't be reached, what the cache has of it is used, and `console` says so. Raises `SpecError`
    for an unknown or gated model or revision, `MissingError` where neither hub nor cache has it,
    `PartialError` where the connection was lost, `DiskFullError`.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached(model, accepted, revision=revision, why="HF_HUB_OFFLINE is set")
    console = console or Console()
    with _explained(model, revision):
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True)
        except Exception as error:
            if not _is_about_network(error):
                raise
            why = f"the hub cannot be reached ({type(error).__name__})"
            found = _cached(model, accepted, revision=revision, why=why)
            console.info(f"{model}: {why}; what its cache has is used")
            return found
        return _download(model, info, accepted, revision=revision, console=console)


def fetch_configs(model: str) -> Path:
    """Where the configs of a hub model lie: they alone are downloaded, or taken from the cache.

    Raises as `fetch`.
    """
    from huggingface_hub import constants, snapshot_download

    wanted = [PIPELINE, "*/config.json", "*/scheduler_config.json"]
    with _explained(model, None):
        try:
            found = snapshot_download(model, allow_patterns=wanted)
        except Exception as error:
            if not constants.HF_HUB_OFFLINE and not _is_about_network(error):
                raise
            raise MissingError(
                f"{model} isn't in the hub's cache, and the hub can't be reached: run `kiln pull "
                f"{model}` with a connection, or name its family."
            ) from error
    if not (Path(found) / PIPELINE).is_file():
        raise SpecError(f"the hub model {model} is no diffusers pipeline: it has no {PIPELINE}")
    return Path(found)


def _download(
    model: str,
    info: ModelInfo,
    accepted: Sequence[str],
    *,
    revision: str | None,
    console: Console,
) -> HubModel:
    from huggingface_hub import constants, snapshot_download

    folder = HubFolder(model, str(info.sha))
    files = [_as_hub_file(sibling) for sibling in info.siblings or []]
    used = _choose(folder, [file.name for file in files], accepted)
    missing = folder.missing(file for file in files if file.name in used)
    wanted = sum(file.size for file in missing)
    new = wanted - sum(folder.arrived_bytes(file) for file in missing)
    require_free(folder, new, constants.HF_HUB_CACHE)
    licence = _licence(info)
    remember_licence(model, folder.commit, licence)
    if missing:
        with console.stage(f"Download {model}", wanted, in_bytes=True) as stage:
            _receive(folder, missing, stage.progress)
            stage.note(byte_text(new))
    # links the weights, and fetches the small files, which git itself holds
    snapshot = snapshot_download(model, revision=revision, allow_patterns=used)
    return HubModel(model, Path(snapshot), licence, new)


def _choose(folder: HubFolder, names: list[str], accepted: Sequence[str]) -> list[str]:
    """The used ones of a model's files, by the one that describes it."""
    from huggingface_hub import hf_hub_download

    where = f"the hub model {folder.model}"
    marker = described_by(names, accepted=accepted, where=where)
    # by its commit: what the cache knows a branch as stays until all of the new one is here
    path = hf_hub_download(folder.model, marker, revision=folder.commit)
    document = read_json(Path(path))
    require_described(marker, document, accepted=accepted, where=where)
    return chosen_by(marker, names, document=document, where=where)


def _receive(
    folder: HubFolder, missing: Sequence[HubFile], progress: Callable[[float, float], None]
) -> None:
    """Fetch the weights, one file after the other; PartialError where the connection is lost."""
    total = sum(file.size for file in missing)
    here = {file.name: folder.arrived_bytes(file) for file in missing}
    try:
        for file in missing:
            if file.sha256 is None:
                continue

            def received(size: int, name: str = file.name) -> None:
                here[name] = size
                progress(sum(here.values()), total)

            folder.download(file, received)
    except Exception as error:
        if not _is_about_network(error):
            raise
        raise PartialError(
            f"the connection to the hub was lost ({type(error).__name__}) with "
            f"{byte_text(sum(here.values()))} of {byte_text(total)} here: run "
            f"`kiln pull {folder.model}` again, which goes on where this stopped"
        ) from error


def _as_hub_file(sibling: RepoSibling) -> HubFile:
    lfs = sibling.lfs
    return HubFile(sibling.rfilename, sibling.size or 0, lfs.sha256 if lfs else None)


def _licence(info: ModelInfo) -> str | None:
    """What the model's card names: "other" says less than the name that goes with it."""
    card = info.card_data
    if card is None:
        return None
    stated = [card.license] if isinstance(card.license, str) else card.license or []
    named = [str(card.license_name or name) if name == "other" else str(name) for name in stated]
    return ", ".join(named) or None


def _cached(model: str, accepted: Sequence[str], *, revision: str | None, why: str) -> HubModel:
    """What the cache has of a model; MissingError where that isn't all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    run = f"run `kiln pull {model}` where there is a connection"
    try:
        # with all files asked for, a folder that holds only the used ones counts as incomplete
        snapshot = snapshot_download(
            model, revision=revision, local_files_only=True, allow_patterns=[PIPELINE]
        )
    except LocalEntryNotFoundError as error:
        raise MissingError(
            f"{model}{at} is no folder here and not in the hub's cache, and {why}: {run}, or give "
            "a folder"
        ) from error
    folder = Path(snapshot)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    where = f"the hub's cache of {model}"
    marker = described_by(names, accepted=accepted, where=where)
    document = read_json(folder / marker)
    require_described(marker, document, accepted=accepted, where=where)
    try:
        chosen_by(marker, names, document=document, where=where)
    except SpecError as error:
        lacks = str(error).partition(":")[0]
        raise MissingError(f"{lacks}, and {why}: {run}") from error
    return HubModel(model, folder, licence_of(model, folder.name), 0)


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what the hub library raises."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise SpecError(
            f"the hub model {model} is gated: accept its terms on its page and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SpecError(
            f"the hub model {model} has no revision {revision!r}: give a branch, tag or commit "
            "that its page lists"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SpecError(
            f"{model} is no folder here and the hub has no model of that name: check the spelling, "
            "and set HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise SpecError(f"{model} is no folder here and no hub id: give owner/name") from error
    except Exception as error:
        if _is_about_network(error):
            raise MissingError(
                f"{model} cannot be downloaded now ({type(error).__name__}): run `kiln pull "
                f"{model}` again"
            ) from error
        if isinstance(error, OSError):
            raise _about_disk(error) from error
        raise


def _about_disk(error: OSError) -> KilnError:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if error.errno in _DISK_FULL:
        return DiskFullError(
            f"the disk of {cache} is full: make room, or set HF_HOME to a folder on another disk"
        )
    return SpecError(
        f"the hub's cache {cache} cannot be used ({error.strerror or error}): set HF_HOME to a "
        "folder that you can write"
    )


_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def _is_about_network(error: Exception) -> bool:
    """Whether a request failed, and not because of what was asked for.

    huggingface_hub uses httpx or httpx2, by its version; its own errors have no errno.
    """
    from huggingface_hub import errors

    refused = (
        errors.EntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    )
    if isinstance(error, refused) and not isinstance(error, errors.LocalEntryNotFoundError):
        return False
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.errno is None
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")

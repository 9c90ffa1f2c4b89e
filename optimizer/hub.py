"""Models from the Hugging Face hub: only the files that are used, and from the cache when offline.

HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT are read by huggingface_hub when it is imported,
which happens in here on first use.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

from optimizer.layout import choose_files
from profiles.errors import DiskFullError, MissingError, SpecError

__all__ = ["fetch"]


def fetch(model: str, *, revision: str | None) -> Path:
    """Return the cache folder of a hub model, named by its commit; downloads what is missing.

    Without a connection, what the cache has of it is used. Raises `SpecError` for an unknown or
    gated model or revision, `MissingError` where neither hub nor cache has it, `DiskFullError`.
    """
    from huggingface_hub import constants, errors

    try:
        if not constants.HF_HUB_OFFLINE:
            return _download(model, revision=revision)
        return _cached(model, revision=revision, why="HF_HUB_OFFLINE is set")
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
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"the disk of {constants.HF_HUB_CACHE} is full: make room, or set HF_HOME to a "
                "folder on another disk"
            ) from error
        if not _is_about_network(error):
            raise
        why = f"the hub cannot be reached ({type(error).__name__})"
        return _cached(model, revision=revision, why=why)


def _is_about_network(error: Exception) -> bool:
    """Whether a request failed; huggingface_hub uses httpx or httpx2, by its version."""
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")


def _download(model: str, *, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    listing = HfApi().model_info(model, revision=revision).siblings or []
    try:
        index_file = hf_hub_download(model, "model_index.json", revision=revision)
    except EntryNotFoundError as error:
        raise SpecError(
            f"the hub model {model} is not a diffusers pipeline: it has no model_index.json; "
            "download its .safetensors checkpoint and give that file"
        ) from error
    index = json.loads(Path(index_file).read_bytes())
    used = choose_files(
        [file.rfilename for file in listing], index=index, where=f"the hub model {model}"
    )
    return Path(snapshot_download(model, revision=revision, allow_patterns=used))


def _cached(model: str, *, revision: str | None, why: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # with all files asked for, a folder that holds only the used ones counts as incomplete
        return Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=["model_index.json"],
            )
        )
    except LocalEntryNotFoundError as error:
        at = f" at revision {revision}" if revision else ""
        raise MissingError(
            f"{model}{at} is no folder here and not in the hub's cache, and {why}: run "
            f"`hf download {model}` where there is a connection, or give a folder"
        ) from error

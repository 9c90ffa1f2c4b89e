"""Which family a diffusers folder is of and which of its files are used, from names alone.

The names come from a folder or from the hub's listing, so that nothing else is ever downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from optimizer import families
from optimizer.families.controls import CONTROLNETS, require_control_known
from optimizer.vae_config import AUTOENCODERS, completed, require_known
from profiles.errors import SpecError, UnsupportedError

__all__ = [
    "AUTOENCODER",
    "COMPONENT",
    "PICKLES",
    "PIPELINE",
    "choose_files",
    "chosen_by",
    "described_by",
    "family_of",
    "known_families",
    "require_described",
    "variant_of",
]

PIPELINE = "model_index.json"
"""The file that describes a whole pipeline."""
COMPONENT = AUTOENCODER = "config.json"
"""The file that describes one component: an autoencoder, a ControlNet."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of files that run code when they are loaded carelessly."""

_EXTRAS = ("kiln.json", "model_index.json", "prompts/calibration.txt")
"""Used where they are: what kiln reads beside the components."""

_UNUSED = frozenset({"feature_extractor", "safety_checker"})
"""Components that no engine runs; Stable Diffusion's safety checker alone is 1.2 GB."""

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<variant>[A-Za-z_]\w*))?"
    r"(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?"
    r"(?:\.(?P<late_variant>[A-Za-z_]\w*))?\.safetensors"
)
_PREFERRED = (None, "fp16", "bf16")
_PLAIN = (".json", ".model", ".txt")


def known_families() -> str:
    """Return the families that kiln knows, for a sentence."""
    known = [families.family(name) for name in families.FAMILIES]
    return "; ".join(f"{family.title} ({', '.join(family.pipeline_classes)})" for family in known)


def family_of(index: Mapping[str, Any], *, where: str) -> str:
    """Return the family that a model_index.json is of.

    Raises `UnsupportedError` with the known families for any other.
    """
    pipeline_class = str(index.get("_class_name"))
    family = families.detect_pipeline(pipeline_class)
    if family is None:
        raise UnsupportedError(
            f"{where} is a {pipeline_class}, which kiln does not know; give one of "
            f"{known_families()}"
        )
    return family


def variant_of(file: str) -> str | None:
    """Return the variant that a weight file's name states, such as "fp16", or None."""
    match = _WEIGHTS.fullmatch(file)
    return (match["variant"] or match["late_variant"]) if match else None


def described_by(names: Collection[str], *, accepted: Sequence[str], where: str) -> str:
    """Return the first of the `accepted` describing files that is among a folder's names.

    Raises `SpecError` where none is there; `where` says what the folder is called.
    """
    for marker in accepted:
        if marker in names:
            return marker
    if PIPELINE in accepted:
        also = ", and an autoencoder is given with --vae" if AUTOENCODER in names else ""
        raise SpecError(f"{_no_pipeline(where)}{also}")
    seen, what = f"no autoencoder: it has no {AUTOENCODER}", "a folder that has it"
    if PIPELINE in names:
        seen, what = "a whole pipeline", "its folder vae"
    raise SpecError(f"{where} is {seen}; give {what}, or the hub id of an autoencoder alone")


def require_described(
    marker: str, document: Mapping[str, Any], *, accepted: Sequence[str], where: str
) -> None:
    """Raise `SpecError` where the `document` in a `marker` file is of no autoencoder and of no
    ControlNet that is known.

    That of a pipeline is looked into when its files are chosen.
    """
    if marker == PIPELINE:
        return
    if document.get("_class_name") in CONTROLNETS:
        require_control_known(document, where=where)
        return
    if PIPELINE in accepted and document.get("_class_name") not in AUTOENCODERS:
        raise SpecError(_no_pipeline(where))
    require_known(completed(document, where=where), where=where)


def _no_pipeline(where: str) -> str:
    return (
        f"{where} is not a diffusers pipeline: it has no {PIPELINE}; download its .safetensors "
        "checkpoint and give that file"
    )


def chosen_by(
    marker: str, names: Iterable[str], *, document: Mapping[str, Any], where: str
) -> list[str]:
    """Return the used ones of a folder's names; `document` is what its `marker` file holds.

    Raises what `choose_files` raises.
    """
    if marker == PIPELINE:
        return choose_files(names, index=document, where=where)
    inside = [name for name in names if "/" not in name]
    what = "the ControlNet" if document.get("_class_name") in CONTROLNETS else "the autoencoder"
    return sorted([COMPONENT, *_choose_weights(inside, what, where)])


def choose_files(names: Iterable[str], *, index: Mapping[str, Any], where: str) -> list[str]:
    """Return the used ones of a folder's relative posix paths, sorted.

    `index` is its model_index.json. Of several variants of weights the plain one is used, then
    fp16, then bf16. Raises `SpecError` when a part or its weights are missing, or are there as
    pickle only; `where` says what the folder is called.
    """
    names = list(names)
    components = _component_names(index)
    family = families.family(family_of(index, where=where))
    weighted = {component.folder for component in family.components}
    needed = {component.folder for component in family.components if not component.optional}
    if absent := sorted(needed - components):
        raise SpecError(f"model_index.json of {where} names no {absent[0]}: give a whole pipeline")
    used = [name for name in names if name in _EXTRAS]
    for component in sorted(components):
        inside = [name for name in names if name.rpartition("/")[0] == component]
        if not inside:
            raise SpecError(
                f"{where} has no folder {component}, which its model_index.json names: download "
                "the model again"
            )
        used += [name for name in inside if name.endswith(_PLAIN) and ".index." not in name]
        if component in weighted:
            used += _choose_weights(inside, component, where)
    return sorted(used)


def _component_names(index: Mapping[str, Any]) -> set[str]:
    """Return the used components of a model_index.json: those of a [library, class], not null."""
    return {
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(value) and name not in _UNUSED
    }


def _choose_weights(inside: list[str], component: str, where: str) -> list[str]:
    by_variant: dict[str | None, list[str]] = {}
    for name in inside:
        file = name.rpartition("/")[2]
        if _WEIGHTS.fullmatch(file):
            by_variant.setdefault(variant_of(file), []).append(name)
    if not by_variant:
        raise SpecError(_explain_no_weights(inside, component, where))
    order = [*_PREFERRED, *sorted(variant for variant in by_variant if variant)]
    variant = next(variant for variant in order if variant in by_variant)
    chosen = by_variant[variant]
    whole = [name for name in chosen if "-of-" not in name]
    if whole:
        return whole[:1]
    shards = int(_match(chosen[0])["shards"])
    if len(chosen) != shards:
        raise SpecError(
            f"{where} has {len(chosen)} of the {shards} weight files of {component}: download the "
            "model again"
        )
    ending = f".index.{variant}.json" if variant else ".index.json"
    return [*chosen, *(name for name in inside if name.endswith(ending))]


def _match(name: str) -> re.Match[str]:
    match = _WEIGHTS.fullmatch(name.rpartition("/")[2])
    assert match is not None
    return match


def _explain_no_weights(inside: list[str], component: str, where: str) -> str:
    pickles = [name for name in inside if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{where} has the weights of {component} only as pickle ({pickles[0]}), which can run "
            f"code when it is loaded: convert it with `python -m optimizer.unpickle {where}`, or "
            "use a version with .safetensors files"
        )
    return f"{where} has no weights for {component}: download the model again"

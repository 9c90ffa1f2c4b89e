"""An AOTInductor package: scanned as bytes, loaded from a private folder, given its weights.

A package is a zip that holds native code, which runs as soon as it is loaded. So nothing of it is
loaded before its names, sizes and platform are those of a package that kiln built; and one without
weights is never called before it has them all, because that would end the process (torch 2.13).
"""

from __future__ import annotations

import io
import json
import platform
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from profiles.errors import BundleError, DeviceMismatch
from profiles.hardware import read_cpu, read_machine
from runners.engines.base import Buffer, Properties
from runners.private import private_folder, write_flushed

__all__ = ["Package", "require_platform", "scan_package", "tensor_facts"]

_NAMES = re.compile(
    r"[A-Za-z0-9_.-]+/(?:archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id"
    r"|data/aotinductor/model/[A-Za-z0-9_-]+(?:\.wrapper)?(?:\.so|_metadata\.json|\.cubin))"
)
"""All that torch 2.13 writes into a package whose sources were left out."""
_FILES = 4096
"""A package has one library, and on a card a file for each kernel."""
# What torch._inductor.aoti_load_package calls: importing inductor takes longer than all packages
# of a bundle, and what runs them needs nothing of it. An engine's torch is its builder's own.
_INACTIVE, _CHECK_ALL, _WHERE_THEY_LIE = False, True, True


def scan_package(raw: Buffer) -> dict[str, str]:
    """torch's own metadata of a package; BundleError unless it holds what a package holds."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:  # a mmap can't be sought before 3.13
            entries = archive.infolist()
            _require_plain(entries, len(raw))
            found = [name for name in archive.namelist() if name.endswith(".wrapper_metadata.json")]
            if len(found) != 1:
                raise BundleError("The package has no metadata of its library: nothing is loaded.")
            metadata = json.loads(archive.read(found[0]))
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise BundleError(
            f"The package can't be read ({error}): nothing is loaded; copy or compile the bundle "
            "again."
        ) from error
    return {str(name): str(value) for name, value in metadata.items()}


def _require_plain(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    roots = {entry.filename.partition("/")[0] for entry in entries}
    names = [entry.filename for entry in entries]
    strange = [name for name in names if not _NAMES.fullmatch(name) or ".." in name.split("/")]
    if strange or len(roots) != 1 or len(set(names)) != len(names):
        raise BundleError(
            f"The package holds {(strange or sorted(names))[0]!r}, which no package of kiln's "
            "does: nothing is loaded; compile the bundle again."
        )
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    encrypted = any(entry.flag_bits & 1 for entry in entries)
    if not stored or encrypted or sum(entry.file_size for entry in entries) > size:
        raise BundleError("The package is packed otherwise than kiln packs: nothing is loaded.")
    if len(entries) > _FILES or sum(name.endswith(".wrapper.so") for name in names) != 1:
        raise BundleError("The package doesn't hold exactly one library: nothing is loaded.")


def require_platform(properties: Properties, metadata: Mapping[str, str]) -> None:
    """Raise DeviceMismatch, with both values, where the package is for another torch or machine."""
    wanted = str(properties["torch"])
    if torch.__version__.partition("+")[0] != wanted:
        raise DeviceMismatch(
            f"The engine was built by torch {wanted}, and {torch.__version__} is installed: run "
            f'pip install "torch=={wanted}", or compile the bundle again.'
        )
    here = (platform.system().lower(), read_machine())
    there = (metadata.get("AOTI_PLATFORM", "?"), metadata.get("AOTI_MACHINE", "?"))
    if here != there:
        raise DeviceMismatch(
            f"The engine was built for {' '.join(there)}, and this machine is {' '.join(here)}: "
            "compile the bundle again here."
        )
    cpu = read_cpu()
    lacking = sorted({name for name in str(properties["isa"]).split(",") if name} - set(cpu.isa))
    if lacking:
        raise DeviceMismatch(
            f"The engine was built for {properties['isa']}, and {cpu.name} lacks "
            f"{', '.join(lacking)}: compile the bundle again here."
        )


def tensor_facts(tensor: Tensor) -> list[Any]:
    """What a weight must agree with: its type's name and its shape."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


class Package:
    """A loaded package, callable once it has all its weights."""

    def __init__(self, raw: Buffer, *, single_threaded: bool = False) -> None:
        """Load scanned bytes; BundleError with torch's own words where that fails."""
        with private_folder(Path(tempfile.gettempdir()), "package") as folder:
            path = folder / "model.pt2"
            write_flushed(path, bytes(raw))
            try:
                self._loader = AOTIModelPackageLoader(str(path), "model", single_threaded, 1, -1)
            except RuntimeError as error:
                raise BundleError(
                    f"torch can't load the package: {str(error).strip().splitlines()[0]}; compile "
                    "the bundle again."
                ) from error
        self._wanted = set(self._loader.get_constant_fqns())
        self._ready = False
        self._kept: dict[str, Tensor] = {}

    def hold_own(self) -> None:
        """Say that the weights are inside."""
        self._ready = True

    def give(self, constants: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Let the package read `constants` where they lie; `facts` says their types and shapes.

        Raises BundleError unless every constant is there, as it must be.
        """
        if missing := sorted(self._wanted - set(constants)):
            raise BundleError(f"The engine's weights lack {missing[0]}: compile the bundle again.")
        used = {name: constants[name] for name in self._wanted}
        for name, tensor in used.items():
            if tensor_facts(tensor) != list(facts[name]):
                raise BundleError(
                    f"The engine's weight {name} is {tensor_facts(tensor)}, and the package needs "
                    f"{list(facts[name])}: compile the bundle again."
                )
        self._load(used)

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The weights that it reads."""
        return self._kept

    def change(self, some: Mapping[str, Tensor]) -> None:
        """Let it read these in the place of its weights of those names, types and shapes."""
        for name, tensor in some.items():
            if tensor_facts(tensor) != tensor_facts(self._kept[name]):
                raise RuntimeError(f"{name} is of another type or shape: the package would misread")
        self._load({**self._kept, **{name: tensor.contiguous() for name, tensor in some.items()}})

    def _load(self, constants: dict[str, Tensor]) -> None:
        if constants:
            self._loader.load_constants(constants, _INACTIVE, _CHECK_ALL, _WHERE_THEY_LIE)
        self._kept, self._ready = constants, True

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run on the inputs that it was exported with, in order."""
        if not self._ready:
            raise RuntimeError("the package has no weights yet: calling it would end the process")
        found: list[Tensor] = self._loader.boxed_run(list(inputs))
        return found

"""Turn pickle weights into .safetensors: `python -m optimizer.unpickle FILE_OR_FOLDER`.

The only place that opens a pickle, only when asked by its name, and with torch's restricted
unpickler, which builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.layout import PICKLES
from profiles.errors import KilnError, SpecError, UntrustedError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main", "unpickle"]

_STEMS = {"pytorch_model": "model"}
"""What transformers calls the same weights in a .safetensors file."""


def unpickle(pickle: Path) -> Path:
    """Write the tensors of a pickle file to a .safetensors file beside it and return its path.

    Raises `UntrustedError` when the file would run code, `SpecError` when it holds no weights or
    the .safetensors file exists.
    """
    import torch
    from safetensors.torch import save_file

    target = pickle.with_name(f"{_STEMS.get(pickle.stem, pickle.stem)}.safetensors")
    if target.exists():
        raise SpecError(f"{target} exists: use it, or move it away first")
    try:
        content: Any = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UntrustedError(
            f"{pickle} holds more than weights, or is damaged, and was not loaded: use the "
            ".safetensors version of the model"
        ) from error
    weights = _tensors(content)
    if not weights:
        raise SpecError(f"{pickle} holds no weights: give a checkpoint")
    # cloned, because tensors of a pickle may share memory and safetensors' may not
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in weights.items()},
        target,
        metadata={"format": "pt"},
    )
    return target


def _tensors(content: Any) -> dict[str, Tensor]:
    import torch

    if not isinstance(content, Mapping):
        return {}
    inner = content.get("state_dict", content)
    return {name: value for name, value in inner.items() if isinstance(value, torch.Tensor)}


def main(arguments: list[str]) -> int:
    """Convert a file, or every pickle file of a diffusers folder; return the exit code."""
    try:
        if len(arguments) != 1:
            raise SpecError("usage: python -m optimizer.unpickle FILE_OR_FOLDER")
        path = Path(arguments[0])
        pickles = [path] if path.is_file() else sorted(_pickles_of_components(path))
        if not pickles:
            raise SpecError(f"{path} has no pickle weights ({', '.join(PICKLES)})")
        for pickle in pickles:
            print(unpickle(pickle))
    except KilnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _pickles_of_components(folder: Path) -> list[Path]:
    """Those of a pipeline's components, or of the one component that the folder is."""
    pattern = "*" if (folder / "config.json").is_file() else "*/*"
    return [path for path in folder.glob(pattern) if path.suffix in PICKLES]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

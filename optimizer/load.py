"""One component's torch module from a model's safetensors, in fp32; nothing else is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimizer.source import ModelSource
from profiles.errors import SpecError
from runners.modules import component_class

__all__ = ["load_module"]


def load_module(source: ModelSource, folder: str) -> nn.Module:
    """The module in one folder of the model: fp32, eval mode, no gradients.

    Loaded by the library's own from_pretrained, so that older parameter names are understood.
    Raises SpecError where tensors are missing, of other shapes than the config says, or hold a NaN
    or infinity. Where the model is there
    as ONNX only, what comes back runs the graph.
    """
    if source.kind == "onnx":
        from optimizer.onnx_modules import load_onnx_module

        return load_onnx_module(source, folder)
    place = source.component_folder(folder)
    cls: Any = component_class(source.component_config(folder))
    dtype = "torch_dtype" if hasattr(cls, "load_config") else "dtype"
    try:
        module, report = cls.from_pretrained(
            place,
            local_files_only=True,
            use_safetensors=True,
            variant=source.variant(folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_loaded says which
            **{dtype: torch.float32},
        )
    except ValueError as error:  # diffusers' own word for configs that don't fit
        reason = str(error).partition(". ")[0].rstrip(".")
        raise SpecError(
            f"{place} has weights and a config.json that don't fit: {reason}; download both again."
        ) from error
    _check_loaded(report, str(place))
    for name, tensor in module.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise SpecError(
                f"The weight {name} of {folder} holds NaN or infinite values: the checkpoint is "
                "damaged; download it again."
            )
    loaded: nn.Module = module.eval()
    return loaded.requires_grad_(requires_grad=False)


def _check_loaded(report: Mapping[str, Any], where: str) -> None:
    """Raise SpecError where the config asks for other tensors than there are."""
    if missing := sorted(report["missing_keys"]):
        raise SpecError(
            f"{where} lacks {len(missing)} tensors, the first {missing[0]}: download the model "
            "again."
        )
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, found, wanted = mismatched[0]
        raise SpecError(
            f"{where} has tensors of another shape than its config.json says ({len(mismatched)}, "
            f"the first is {name}: {list(found)} instead of {list(wanted)}): download the model "
            "again."
        )

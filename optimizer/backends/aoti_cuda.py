"""The component -> torch.export -> an AOTInductor package for the card that is here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optimizer.backends import Built, How
from optimizer.backends.aoti import (
    FILES,
    Typed,
    code_properties,
    compile_package,
    exported,
    form_files,
    typed_module,
    write_constants,
)
from optimizer.compilers import require_compiler
from optimizer.progress import Progress
from runners.engines.aoti_cuda import card_capability
from runners.lowered import card_product
from runners.signature import Signature

__all__ = ["CARD_SETTINGS", "build", "build_form", "low_bit_layers"]

_KERNELS = re.compile(r"aoti_torch_\w*_(?:int_mm|scaled_mm)\w*\(")
"""int8 and fp8 products in the generated code: a call a layer."""

CARD_SETTINGS = {
    "cpp.march": "",
    "max_autotune": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "coordinate_descent_tuning": True,
    "epilogue_fusion": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.embed_kernel_binary": True,
}
"""What `torch.compile(mode="max-autotune")` sets, but for CUDA graphs, which the engine records."""


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:
    """Write the package and its weights; the card that is here chooses the kernels.

    Raises MissingError without a C++ compiler, BuildError with torch's own words.
    """
    require_compiler(how.backend)
    return _built(source, out, how, "", FILES, progress)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write the form's own package, over the plain one's file of weights; ranks as in aoti's."""
    return _built(source, out, how, name, form_files(name), lambda _done, _total: None)


def _built(
    source: Path, out: Path, how: How, form: str, files: Mapping[str, str], progress: Progress
) -> Built:
    module, _, signature = typed_module(source, how, card_product, form)
    program = on_card(module, signature)
    progress(2, 10)
    code = compile_package(program, out / files["package"], CARD_SETTINGS)
    progress(9, 10)
    write_constants(program, source / FILES["weights"], out, files)
    properties = {
        **code_properties([out / files["package"]]),
        "cuda": str(torch.version.cuda),
        "capabilities": card_capability(),
        "low_bit_kernels": len(_KERNELS.findall(code)),
    }
    return Built(files=dict(files), properties=properties)


def on_card(module: Typed, signature: Signature) -> Any:
    """The program with everything of it on the card."""
    if module.low_rank is not None:
        module.low_rank.to("cuda")
    return exported(module.to("cuda"), signature, "cuda")


def low_bit_layers(engine: Any) -> int:
    """The int8 and fp8 products that the compiled code calls."""
    return int(engine.properties["low_bit_kernels"])

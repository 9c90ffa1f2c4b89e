"""The component -> torch.export -> an AOTInductor package for the card that is here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimizer.backends import Built, How
from optimizer.backends.aoti import (
    FILES,
    code_properties,
    compile_package,
    exported,
    typed_module,
    write_constants,
)
from optimizer.compilers import require_compiler
from optimizer.progress import Progress
from runners.engines.aoti_cuda import card_capability
from runners.lowered import card_product

__all__ = ["CARD_SETTINGS", "build", "low_bit_layers"]

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
    module, _, _ = typed_module(source, how, card_product)
    program = on_card(module, how)
    progress(2, 10)
    code = compile_package(program, out / FILES["package"], CARD_SETTINGS)
    progress(9, 10)
    write_constants(program, source / FILES["weights"], out)
    properties = {
        **code_properties([out / FILES["package"]]),
        "cuda": str(torch.version.cuda),
        "capabilities": card_capability(),
        "low_bit_kernels": len(_KERNELS.findall(code)),
    }
    return Built(files=dict(FILES), properties=properties)


def on_card(module: nn.Module, how: How) -> Any:
    """The program with everything of it on the card."""
    return exported(module.to("cuda"), how.signature, "cuda")


def low_bit_layers(engine: Any) -> int:
    """The int8 and fp8 products that the compiled code calls."""
    return int(engine.properties["low_bit_kernels"])

"""The component -> torch.export -> an AOTInductor package, native code for this kind of machine.

With int8 products the weights are inside: inductor finds them by freezing, which repacks weights
for oneDNN. Without, the package has none; they lie beside it in the eager engine's own file.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from optimizer.backends import Built, How
from optimizer.calls import traced_sizes
from optimizer.compilers import require_compiler
from optimizer.forms import form_wrapper, prepared_forms
from optimizer.progress import Progress
from profiles.errors import BuildError
from runners.engines.aoti_package import scan_package, tensor_facts
from runners.engines.eager import eager_module
from runners.low_rank import LowRank
from runners.lowered import Product, lower_layers, processor_product, store_in
from runners.modules import WRAPPERS
from runners.needs import release
from runners.signature import Signature
from runners.stored_tensors import read_tensors

__all__ = [
    "FILES",
    "INT8_KERNELS",
    "SETTINGS",
    "Typed",
    "build",
    "build_form",
    "code_properties",
    "compile_package",
    "exported",
    "form_files",
    "low_bit_layers",
    "needed_glibc",
    "sized_inputs",
    "typed_module",
    "write_constants",
]

FILES = {
    "package": "model.pt2",
    "weights": "weights.safetensors",
    "constants": "constants.safetensors",
    "table": "constants.json",
}
"""What a file is to the engine -> its name."""

LORA = "lora.safetensors"
"""What quantizing multiplied layers' ends with, as it is prepared."""

SETTINGS = {
    "cpp.march": "",  # what the ISA's own flags say, and no more: they are recorded
    "cpp.dynamic_threads": True,  # else the number of threads is that of the build
}
"""Of inductor, for every package that runs on a processor."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INT8_KERNELS = re.compile(r"aoti_torch_cpu__q(?:linear|conv)_pointwise\w*\(")
"""oneDNN's, in the generated code: a call a layer."""
_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)")
_FLAGS = {
    "-mavx2": "avx2",
    "-mavx512f": "avx512f",
    "-mavx512bw": "avx512bw",
    "-mavx512vnni": "avx512_vnni",
    "-mavx512bf16": "avx512_bf16",
    "-mamx-bf16": "amx_bf16",
    "-mamx-int8": "amx_int8",
}
"""A compiler's flag -> the instruction set in profiles.hardware's words."""


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:
    """Write the package, and its weights where they aren't inside.

    Raises MissingError without a C++ compiler, BuildError with torch's own words.
    """
    require_compiler(how.backend)
    return _built(source, out, how, "", FILES, progress)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write the form's own package, over the plain one's file of weights where that is beside it.

    Ranks of low-rank inputs are dynamic, 0 included. Where all weights are of floats, those inputs
    are added to them, and the package is that of the form without. Raises as `build`.
    """
    parts = name.split("+")
    if "lora" not in parts or json.loads((source / "layers.json").read_text("utf-8")):
        return _built(source, out, how, name, form_files(name), lambda _done, _total: None)
    rest = "+".join(part for part in parts if part != "lora")
    files = form_files(rest)
    if not (out / files["package"]).is_file():
        build_form(source, out, how, rest)
    shutil.copyfile(source / LORA, out / LORA)
    properties = code_properties([out / files["package"]])
    properties |= {"frozen": False, "low_bit_kernels": 0}
    return Built({**files, "lora": LORA}, properties)


def form_files(name: str) -> dict[str, str]:
    """What a form's files are called: all its own but the weights; "" is the plain engine."""
    if not name:
        return FILES
    own = {role: f"{name}.{FILES[role]}" for role in ("package", "constants", "table")}
    return {**FILES, **own}


def _built(
    source: Path, out: Path, how: How, form: str, files: Mapping[str, str], progress: Progress
) -> Built:
    module, lowered, signature = typed_module(source, how, processor_product, form)
    frozen = any(layer.rounds for layer in lowered.values())
    progress(1, 10)
    program = exported(module, signature)
    progress(3, 10)
    more = {"freezing": frozen, "aot_inductor.package_constants_in_so": frozen}
    code = compile_package(program, out / files["package"], {**SETTINGS, **more})
    progress(9, 10)
    if frozen:
        files = {"package": files["package"]}
    else:
        write_constants(program, source / FILES["weights"], out, files)
    properties = code_properties([out / files["package"]])
    kernels = len(INT8_KERNELS.findall(code))
    return Built(dict(files), {**properties, "frozen": frozen, "low_bit_kernels": kernels})


def low_bit_layers(engine: Any) -> int:
    """The int8 kernels that the compiled code calls."""
    return int(engine.properties["low_bit_kernels"])


def typed_module(
    source: Path, how: How, product: Product, form: str = "", *, merging: bool = False
) -> tuple[Typed, Mapping[str, nn.Module], Signature]:
    """The component with lowered layers as it is called in a form, those layers, and the form's
    signature; "" is the plain one. `merging`: low-rank inputs are added to weights of floats.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    layers = json.loads((source / "layers.json").read_text("utf-8"))
    weights = (source / FILES["weights"]).read_bytes()
    component = eager_module(config, layers, weights)
    lowered = lower_layers(component, product)
    dtype = _DTYPES[how.dtype]
    store_in(component, dtype)
    wrapper = WRAPPERS[form_wrapper(how.wrapper, form)](component)
    signature = prepared_forms(source)[form] if form else how.signature
    typed = Typed(wrapper, dtype)
    if "lora" in form.split("+"):
        stored = read_tensors(bytearray(weights)) if merging else None
        typed.low_rank = LowRank(component, signature, (source / LORA).read_bytes(), stored)
        typed.names = [spec.name for spec in signature.inputs]
    return typed.eval().requires_grad_(False), lowered, signature


class Typed(nn.Module):
    """float32 in and out, another dtype inside."""

    def __init__(self, wrapper: nn.Module, dtype: torch.dtype) -> None:
        """Take a wrapper of runners.modules whose weights are in `dtype`."""
        super().__init__()
        self.wrapper, self.dtype = wrapper, dtype
        self.low_rank: LowRank | None = None
        """What takes the low-rank ones of the inputs, which `names` names in order."""
        self.names: list[str] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the wrapper gives."""
        cast = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        if self.low_rank is not None:
            named = dict(zip(self.names, cast, strict=True))
            cast = [named[name] for name in self.low_rank.take(named, self.names)]
        return tuple(y.to(torch.float32) for y in self.wrapper(*cast))


def sized_inputs(
    signature: Signature, sizes: Mapping[str, int], device: str = "cpu"
) -> list[Tensor]:
    """Unit noise and small token ids of these sizes, in the signature's order."""
    generator, found = torch.Generator().manual_seed(0), []
    for spec in signature.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator, dtype=dtype)
        else:
            tensor = torch.randint(0, 8, shape, generator=generator, dtype=dtype)
        found.append(tensor.to(device))
    return found


def exported(module: nn.Module, signature: Signature, device: str = "cpu") -> Any:
    """torch.export's program with the signature's ranges, widened to what it was traced with.

    It begins all ranges at 2, whatever it is told (torch 2.13); processors' code is right for sizes
    of 0 (a rank) and 1 all the same, which the checks of every build run.
    """
    sizes, hint = traced_sizes(signature), torch.export.Dim.DYNAMIC
    dims = {
        dim.name: hint(
            min=min(dim.min, sizes[dim.name]),
            max=max(dim.max, sizes[dim.name]),
        )
        for dim in signature.dims
        if not dim.fixed
    }
    shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(spec.axes) if axis in dims}
        for spec in signature.inputs
    )
    try:
        with torch.no_grad():
            return torch.export.export(
                module,
                tuple(sized_inputs(signature, sizes, device)),
                dynamic_shapes=(shapes,),
                strict=False,
            )
    except Exception as error:  # torch.export raises a dozen types of its own
        raise BuildError(f"torch.export failed: {_first(error)}.", log=str(error)) from error


def compile_package(program: Any, path: Path, settings: Mapping[str, Any]) -> str:
    """Write a package of the compiled code without its sources, which are returned."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    options = {**settings, "aot_inductor.package": True}
    arguments, keywords = program.example_inputs
    with _own_cache(path.parent), torch.no_grad():
        try:
            found: Any = aot_compile(
                program.module(check_guards=False), arguments, keywords, options=options
            )
        except Exception as error:  # inductor and its compiler raise what they like
            raise BuildError(f"inductor failed: {_first(error)}.", log=str(error)) from error
        files = [str(name) for name in found]
        code = "".join(Path(name).read_text("utf-8") for name in files if name.endswith(".cpp"))
        kept = [name for name in files if name.endswith((".so", "_metadata.json", ".cubin"))]
        kept = [name for name in kept if not name.endswith(".kernel_metadata.json")]
        package_aoti(str(path), {"model": kept})  # type: ignore[dict-item]
    scan_package(path.read_bytes())
    return code


@contextmanager
def _own_cache(parent: Path) -> Iterator[None]:
    """A cache of inductor's that ends with the build, and low-bit weights that stay folded up."""
    from torch._inductor.constant_folding import add_dont_constant_fold
    from torch._inductor.utils import fresh_cache

    aten = torch.ops.aten
    for operator in (
        aten.bitwise_and.Scalar,
        aten.bitwise_and.Tensor,
        aten.__rshift__.Scalar,
        aten.bitwise_right_shift.Tensor_Scalar,
    ):
        add_dont_constant_fold(operator)
    with tempfile.TemporaryDirectory(dir=parent) as private, fresh_cache(dir=private):
        yield


def write_constants(
    program: Any, weights: Path, out: Path, files: Mapping[str, str] = FILES
) -> None:
    """The eager engine's weight file as it is, what it lacks beside it, and who is who."""
    shutil.copyfile(weights, out / files["weights"])
    stored = safetensors.torch.load_file(weights)
    table: dict[str, list[Any]] = {}
    more: dict[str, Tensor] = {}
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in {**program.state_dict, **program.constants}.items()
        if isinstance(tensor, Tensor) and not tensor.is_meta  # else a part that nothing calls
    }
    keys = {name: key for name in tensors if (key := _stored_name(name, stored))}
    shared = {(tensors[name].data_ptr(), tensors[name].shape): key for name, key in keys.items()}
    for name, tensor in tensors.items():
        key = keys.get(name) or shared.get((tensor.data_ptr(), tensor.shape))
        role = "weights"
        if key is None or not _same(stored[key], tensor):
            role, key = "constants", name
            more[name] = tensor.contiguous().clone()
        table[name] = [role, key, *tensor_facts(tensor)]
    safetensors.torch.save_file(more, out / files["constants"])
    (out / files["table"]).write_text(json.dumps(table), "utf-8")


def _stored_name(name: str, stored: Mapping[str, Tensor]) -> str | None:
    """The weight file's name: the program's without the names of what wraps the component."""
    parts = name.split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if tail in stored), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def code_properties(packages: Sequence[Path]) -> dict[str, str | int | float | bool]:
    """What packages need where they run: torch's version, instruction sets, glibc."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "isa": ",".join(built_isa()),
        "glibc": max((needed_glibc(path.read_bytes()) for path in packages), key=release),
    }


def built_isa() -> list[str]:
    """The instruction sets that inductor lets the compiler use here."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    flags = pick_vec_isa().build_arch_flags().split()
    return sorted({_FLAGS[flag] for flag in flags if flag in _FLAGS})


def needed_glibc(package: bytes) -> str:
    """The newest version of glibc whose symbols the code names; "" where it names none."""
    found = [(int(one), int(two)) for one, two in _GLIBC.findall(package)]
    return ".".join(map(str, max(found))) if found else ""


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The component's repeated blocks -> one AOTInductor package for each kind of them.

A denoiser is a few kinds of blocks, many times: compiling one of each takes a fraction of compiling
them all. Which blocks repeat is the component's own class's knowledge (`_repeated_blocks`); a
component that has none is compiled whole, as a single block.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from optimizer.backends import Built, How
from optimizer.backends.aoti import (
    LORA,
    SETTINGS,
    Typed,
    code_properties,
    compile_package,
    sized_inputs,
    typed_module,
)
from optimizer.calls import traced_sizes
from optimizer.compilers import require_compiler
from optimizer.forms import form_wrapper
from optimizer.progress import Progress
from profiles.errors import BuildError
from runners.engines.aoti_blocks import flat_call
from runners.engines.aoti_package import tensor_facts
from runners.low_rank import LowRank
from runners.lowered import processor_product
from runners.signature import Signature

__all__ = [
    "Kind",
    "build",
    "build_form",
    "export_block",
    "find_kinds",
    "low_bit_layers",
    "watch_calls",
]


_STORED = {"config": "config.json", "layers": "layers.json", "weights": "weights.safetensors"}
"""The eager engine's files."""


@dataclass
class Kind:
    """Blocks that differ in their weights' values alone."""

    blocks: list[str]
    weights: dict[str, list[Any]]
    """Name in the block -> type and shape."""
    calls: list[list[Tensor]] = field(default_factory=list)
    """The tensors of a call at each size that was run."""
    spec: str = ""
    rest: list[str] = field(default_factory=list)
    out: str = ""
    adapted: list[str] = field(default_factory=list)
    """The layers in the block that take low-rank inputs, A and B each after the weights."""

    def document(self, package: str) -> dict[str, Any]:
        """As the engine reads it."""
        return {
            "package": package,
            "blocks": self.blocks,
            "spec": self.spec,
            "rest": self.rest,
            "out": self.out,
            "weights": self.weights,
            "adapted": self.adapted,
        }


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:
    """Write the packages, the eager engine's files, and how the blocks are called.

    Raises MissingError without a C++ compiler, BuildError with torch's own words.
    """
    require_compiler(how.backend)
    for name in _STORED.values():
        shutil.copyfile(source / name, out / name)
    return _built(source, out, how, "", progress)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write how the form's blocks are called, and packages of those that no other form has.

    Residuals of control networks meet the component between its blocks; low-rank inputs of low-bit
    layers are inputs of the blocks' packages too. Raises as `build`.
    """
    own = {}
    if "lora" in name.split("+"):
        own["lora"] = LORA
        shutil.copyfile(source / LORA, out / LORA)
    built = _built(source, out, how, name, lambda _done, _total: None)
    return Built({**built.files, **own}, built.properties)


def _built(source: Path, out: Path, how: How, form: str, progress: Progress) -> Built:
    typed, _, signature = typed_module(source, how, processor_product, form, merging=True)
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, signature)
    ahead = _ahead("+".join(part for part in form.split("+") if _seen(part, kinds)))
    files = {**_STORED, "blocks": f"{_ahead(form)}blocks.json"}
    documents, packages = [], []
    for number, kind in enumerate(kinds):
        role = f"package{number or ''}"
        files[role] = f"{ahead}block{number or ''}.pt2"
        packages.append(out / files[role])
        if not packages[-1].is_file():
            compile_package(export_block(typed, kind), packages[-1], SETTINGS)
        documents.append(kind.document(role))
        progress(number + 1, len(kinds))
    (out / files["blocks"]).write_text(json.dumps(documents), "utf-8")
    properties = {
        **code_properties(packages),
        "wrapper": form_wrapper(how.wrapper, form),
        "dtype": how.dtype,
        "low_bit_kernels": 0,
    }
    return Built(files=files, properties=properties)


def _seen(part: str, kinds: list[Kind]) -> bool:
    """Whether a part of a form's name changes the packages: low-rank inputs those of low-bit
    weights alone, everything else a component that is one block.
    """
    if part == "lora":
        return any(kind.adapted for kind in kinds)
    return bool(part) and not all(any(kind.blocks) for kind in kinds)


def _ahead(form: str) -> str:
    """What names of a form's files begin with."""
    return f"{form}." if form else ""


def low_bit_layers(engine: Any) -> int:  # noqa: ARG001
    """None: weights come as inputs, which inductor has no int8 products for; it dequantizes."""
    return 0


def find_kinds(typed: Typed) -> list[Kind]:
    """The kinds of blocks below the component's wrapper, outermost only, or all of it as one."""
    module, low_rank = typed.wrapper, typed.low_rank
    named = {name for part in module.modules() for name in getattr(part, "_repeated_blocks", ())}
    found: dict[str, Kind] = {}
    for name, block in module.named_modules():
        if type(block).__name__ in named:
            weights, adapted = _facts(block), list(low_rank.layers_in(block)) if low_rank else []
            key = f"{type(block).__name__} {json.dumps([weights, adapted])}"
            found.setdefault(key, Kind([], weights, adapted=adapted)).blocks.append(name)
    whole = list(low_rank.layers_in(module)) if low_rank else []
    return list(found.values()) or [Kind([""], _facts(module), adapted=whole)]


def _facts(block: nn.Module) -> dict[str, list[Any]]:
    named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: tensor_facts(tensor) for name, tensor in named.items() if not tensor.is_meta}


@torch.no_grad()
def watch_calls(typed: Typed, kinds: list[Kind], signature: Signature, device: str = "cpu") -> None:
    """Run the component at two sizes, and keep how the first block of each kind is called.

    The second is twice the first, so that a level which halves sides sees other ones too: what
    doesn't change is compiled as it was. Raises BuildError where blocks of one kind are called in
    different ways.
    """
    wrapper = typed.wrapper
    sizes = traced_sizes(signature)
    doubled = {dim.name: sizes[dim.name] * (1 if dim.fixed else 2) for dim in signature.dims}
    other = {dim.name: dim.following(doubled) for dim in signature.dims}
    handles = [
        wrapper.get_submodule(name).register_forward_hook(_keeper(kind, name), with_kwargs=True)
        for kind in kinds
        for name in kind.blocks
    ]
    for one in (sizes, other):
        typed(*sized_inputs(signature, one, device))
    for handle in handles:
        handle.remove()


def _keeper(kind: Kind, name: str) -> Callable[..., None]:
    """A hook that keeps how a block is called, and of the first one what with."""

    def keep(_block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors, nested, rest = flat_call(args, kwargs)
        spec = pytree.treespec_dumps(nested)
        out = pytree.treespec_dumps(pytree.tree_flatten(output)[1])
        if kind.spec and (kind.spec, kind.rest, kind.out) != (spec, rest, out):
            raise BuildError(f"{name} is called otherwise than {kind.blocks[0]}.")
        kind.spec, kind.rest, kind.out = spec, rest, out
        if name == kind.blocks[0]:
            kind.calls.append([x.detach().contiguous().clone() for x in tensors])

    return keep


def export_block(typed: Typed, kind: Kind) -> Any:
    """The program of a kind's first block, its weights and low-rank matrices as inputs; sizes that
    changed, and ranks, are dynamic.
    """
    block = typed.wrapper.get_submodule(kind.blocks[0])
    named: Mapping[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    weights = [named[name].detach() for name in kind.weights]
    first, second = kind.calls
    hint = torch.export.Dim.DYNAMIC
    shapes = [
        {i: hint for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b}
        for x, y in zip(first, second, strict=True)
    ]
    matrices: list[Tensor] = []
    ranks: list[dict[int, Any]] = []
    if kind.adapted:
        assert typed.low_rank is not None
        matrices = typed.low_rank.matrices(typed.low_rank.layers_in(block).values())
        ranks = [{1: hint}, {0: hint}] * len(kind.adapted)
    dynamic = ((*shapes, *({} for _ in weights), *ranks),)
    try:
        with torch.no_grad():
            return torch.export.export(
                _Functional(block, kind, typed.low_rank),
                (*first, *weights, *matrices),
                dynamic_shapes=dynamic,
                strict=False,
            )
    except Exception as error:  # torch.export raises a dozen types of its own
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"torch.export failed: {words}.", log=str(error)) from error


class _Functional(nn.Module):
    """A block as a function of its tensors, its weights and its low-rank matrices."""

    def __init__(self, block: nn.Module, kind: Kind, low_rank: LowRank | None = None) -> None:
        super().__init__()
        self._block = (block,)  # no submodule: its weights are inputs
        self._names, self._rest = list(kind.weights), kind.rest
        self._spec = pytree.treespec_loads(kind.spec)
        self._low_rank = low_rank
        self._adapted = list(low_rank.layers_in(block).values()) if low_rank else []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._low_rank is not None:
            end = len(inputs) - 2 * len(self._adapted)
            self._low_rank.give(self._adapted, inputs[end:])
            inputs = inputs[:end]
        count = len(inputs) - len(self._names)
        given = iter(inputs[:count])
        leaves = [next(given) if leaf == "tensor" else _value(leaf) for leaf in self._rest]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        weights = dict(zip(self._names, inputs[count:], strict=True))
        found = functional_call(self._block[0], weights, args, kwargs)
        return tuple(pytree.tree_leaves(found))


def _value(leaf: str) -> Any:
    """What isn't a tensor in a call, from its repr; BuildError for more than plain data."""
    try:
        return ast.literal_eval(leaf)
    except (ValueError, SyntaxError) as error:
        raise BuildError(f"A block is called with {leaf}, which can't be compiled.") from error

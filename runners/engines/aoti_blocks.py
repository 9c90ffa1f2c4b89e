"""A component whose repeated blocks are one compiled package, called with each block's weights.

What is between the blocks is the component's own code. A block's weights are inputs of its package,
so that one package serves all of its kind, and nothing is swapped while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from profiles.errors import BundleError, SpecError
from runners.engines.aoti import opened_package
from runners.engines.aoti_package import Package, tensor_facts
from runners.engines.base import Array, Engine
from runners.engines.eager import eager_module
from runners.low_rank import LowRank
from runners.lowered import lower_layers, processor_product, store_in
from runners.modules import WRAPPERS
from runners.stored_tensors import read_tensors

__all__ = ["AotiBlocksEngine", "Block", "flat_call", "insert_blocks"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@final
class AotiBlocksEngine(Engine):
    """files: `config`, `layers`, `weights`, `lora` (as the eager engine's), `blocks` (JSON) and
    `package`, `package1`, ...: one for each kind of block. Properties: `torch`, `isa`, `dtype`,
    `wrapper`, `low_bit_kernels`.

    `blocks`: for each package its `blocks`' names and how one is called (`spec`, `rest`), its
    `weights` in the order in which they are given, with types and shapes, and the names of its
    layers whose low-rank matrices come after them (`adapted`): those of low bits. Weights of floats
    have the matrices added to them.
    """

    def _open(self) -> None:
        torch.set_num_threads(self.threads)
        try:
            config = json.loads(bytes(self.files["config"]))
            layers = json.loads(bytes(self.files["layers"]))
            kinds = json.loads(bytes(self.files["blocks"]))
            dtype = _DTYPES[str(self.properties["dtype"])]
            component = eager_module(config, layers, self.files["weights"])
            lower_layers(component, processor_product)
            store_in(component, dtype)
            module = WRAPPERS[str(self.properties["wrapper"])](component)
            factors = self.files.get("lora")
            weights = None if factors is None else read_tensors(self.files["weights"])
            low_rank = LowRank(component, self.signature, factors, weights)
        except (ValueError, KeyError, SafetensorError, SpecError) as error:
            raise BundleError(f"torch can't open the engine: {error}.") from error
        packages = [opened_package(self.files[kind["package"]], self.properties) for kind in kinds]
        self._module, self._dtype = insert_blocks(module, kinds, packages, low_rank), dtype
        self._low_rank = low_rank

    def _hold(self, feeds: Mapping[str, Array]) -> None:
        self._low_rank.hold(feeds, self._dtype)

    @torch.inference_mode()
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if not self._low_rank.held_in(self.held):
            self._hold(feeds)
        outputs = self._module(*self._low_rank.others(feeds, self._dtype))
        specs = self.signature.outputs
        return {s.name: t.float().numpy() for s, t in zip(specs, outputs, strict=True)}

    def _close(self) -> None:
        del self._module, self._low_rank


class Block(nn.Module):
    """Stands for one block: the package of its kind, with this block's weights."""

    def __init__(
        self,
        package: Package,
        weights: Sequence[Tensor],
        kind: Mapping[str, Any],
        matrices: Callable[[], list[Tensor]],
    ) -> None:
        """Take what calls have to look like from `kind`: see `AotiBlocksEngine`.

        `matrices` gives its layers' low-rank matrices in this call.
        """
        super().__init__()
        self._package, self._weights, self._matrices = package, list(weights), matrices
        self._spec, self._rest = pytree.treespec_loads(kind["spec"]), kind["rest"]
        self._out = pytree.treespec_loads(kind["out"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives; BundleError where it is called otherwise than when exported."""
        tensors, spec, rest = flat_call(args, kwargs)
        if spec != self._spec or rest != self._rest:
            raise BundleError(
                "The component calls its blocks otherwise than when it was compiled: install the "
                "versions that `kiln inspect` lists, or compile the bundle again."
            )
        inputs = (x.contiguous() for x in tensors)
        found = self._package(*inputs, *self._weights, *self._matrices())
        return pytree.tree_unflatten(found, self._out)


def flat_call(args: Any, kwargs: Any) -> tuple[list[Tensor], pytree.TreeSpec, list[str]]:
    """A call's tensors, how they are nested, and what isn't one, as its repr."""
    leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    rest = ["tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return tensors, spec, rest


def insert_blocks(
    module: nn.Module,
    kinds: Sequence[Mapping[str, Any]],
    packages: Sequence[Package],
    low_rank: LowRank | None = None,
) -> nn.Module:
    """`module` with its blocks replaced; BundleError where a weight isn't what a package needs, or
    where `low_rank` watches other layers of a block.
    """
    for kind, package in zip(kinds, packages, strict=True):
        package.hold_own()
        for name in kind["blocks"]:
            block = module.get_submodule(name)
            adapted = low_rank.layers_in(block) if low_rank else {}
            if list(adapted) != kind.get("adapted", []):
                raise BundleError(
                    f"The engine's {name} has other layers with low-rank inputs than its package: "
                    "compile the bundle again."
                )
            own = list(adapted.values())
            matrices = partial(low_rank.matrices, own) if low_rank and own else list
            replacing = Block(package, _weights(block, kind["weights"]), kind, matrices)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, replacing)
    return module


def _weights(block: nn.Module, wanted: Mapping[str, Any]) -> list[Tensor]:
    have = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for name, facts in wanted.items():
        if name not in have or tensor_facts(have[name]) != list(facts):
            raise BundleError(
                f"The engine's weight {name} isn't what its package needs ({facts}): compile the "
                "bundle again."
            )
    return [have[name].detach() for name in wanted]

"""What stands for a torch component where a model is there as ONNX only: the graph in ONNX Runtime.

In fp32 on the CPU, behind the calls that the role wrappers and diffusers' pipelines make, so that
recording, checking and preparing are the same code for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from optimizer import families
from optimizer.onnx_source import as_exported, wide_signatures
from optimizer.source import ModelSource
from profiles.errors import BundleError, SpecError
from runners.adapters import Adapter
from runners.denoisers import TimestepUNetAdapter
from runners.engines.base import Array, Engine
from runners.signature import Signature, TensorSpec

__all__ = ["load_onnx_module"]


def load_onnx_module(source: ModelSource, folder: str) -> nn.Module:
    """The stand-in for the module in one diffusers folder of the model."""
    known = as_exported(families.family(source.family))
    specs = [spec for spec in known.components if spec.folder == folder]
    configs = {spec.folder: source.component_config(spec.folder) for spec in known.components}
    signatures = wide_signatures(known, configs)
    graphs = {spec.role: _Graph(source.folder / spec.name, signatures[spec.name]) for spec in specs}
    config = configs[folder]
    stand_ins: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: _TextEncoder(config, graphs["text_encoder"]),
        "denoiser": lambda: TimestepUNetAdapter(config, lambda: graphs["denoiser"].engine),
        "vae_decoder": lambda: _Vae(config, graphs["vae_encoder"], graphs["vae_decoder"]),
    }
    return stand_ins[specs[0].role]().eval()


class _Graph:
    """One component's graph, opened when it is first run, and open as long as the process is."""

    def __init__(self, folder: Path, signature: Signature) -> None:
        self._folder, self.signature = folder, signature

    @cached_property
    def engine(self) -> Engine:
        """The open engine; SpecError where ONNX Runtime can't run the graph."""
        from runners.engines.onnxruntime import ACCURACY, OnnxRuntimeEngine

        weights = self._folder / "model.onnx.data"
        engine = OnnxRuntimeEngine(
            {"graph": (self._folder / "model.onnx").read_bytes(), "weights": weights.read_bytes()},
            signature=self.signature,
            properties={"weights_location": weights.name, ACCURACY: "1"},
            threads=psutil.cpu_count(logical=False) or 1,
        )
        try:
            return engine.__enter__()
        except BundleError as error:
            first = str(error).splitlines()[0]
            raise SpecError(
                f"the model's {self._folder.name}/model.onnx can't be run ({first}): export it "
                "again"
            ) from error

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for inputs in the signature's order."""
        arrays: dict[str, Array] = {
            spec.name: tensor.detach().numpy().astype(np.dtype(spec.dtype), copy=False)
            for spec, tensor in zip(self.signature.inputs, inputs, strict=True)
        }
        outputs = self.engine(arrays)
        return tuple(self._checked(outputs[spec.name], spec) for spec in self.signature.outputs)

    def _checked(self, array: Array, spec: TensorSpec) -> Tensor:
        sizes = [axis if isinstance(axis, int) else None for axis in spec.axes]
        if len(sizes) != array.ndim or any(
            size not in (None, seen) for size, seen in zip(sizes, array.shape, strict=True)
        ):
            raise SpecError(
                f"the model's {self._folder.name}/model.onnx gives {spec.name} as "
                f"{'x'.join(map(str, array.shape))}, where its config says "
                f"{'x'.join(map(str, spec.axes))}: export the whole pipeline again"
            )
        return torch.from_numpy(array)


class _TextEncoder(Adapter):
    """Stands for a CLIPTextModel; its graph has its own positions."""

    def __init__(self, config: dict[str, Any], graph: _Graph) -> None:
        super().__init__(CLIPTextConfig.from_dict(config))
        self._graph = graph

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002 (transformers' signature)
    ) -> BaseModelOutputWithPooling:
        """Encode [batch, tokens] ids."""
        hidden, pooled = self._graph.run(input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class _Vae(nn.Module):
    """Stands for an AutoencoderKL; its convolutions around the latents are in the graphs."""

    def __init__(self, config: dict[str, Any], encoder: _Graph, decoder: _Graph) -> None:
        super().__init__()
        self.config = FrozenDict(config)
        self.encoder: nn.Module | None = _Half(encoder)
        self.decoder: nn.Module | None = _Half(decoder)
        self.quant_conv = self.post_quant_conv = None


class _Half(nn.Module):
    """One input, one output."""

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self._graph = graph

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        (output,) = self._graph.run(x)
        return output

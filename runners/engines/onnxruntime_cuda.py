"""ONNX Runtime on an NVIDIA card: torch's tensors bound where they lie, nothing copied to the host.

The session runs on torch's current stream, with buffers of its own for each shape, so that ONNX
Runtime can record a CUDA graph for it (`gpu_graph_id`): a replay reads fixed addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from profiles.errors import DeviceMismatch, MissingError
from runners.engines.base import DeviceEngine, Properties
from runners.engines.onnxruntime import open_session
from runners.lora_inputs import compiled_rank_tensors
from runners.signature import Signature

__all__ = ["PROVIDER", "Bound", "OnnxRuntimeCudaEngine"]

PROVIDER = "CUDAExecutionProvider"
_KEPT = 4
"""Shapes whose buffers and recordings are kept."""


class Bound:
    """One shape's fixed buffers, bound to a session's inputs and outputs."""

    def __init__(
        self, session: Any, signature: Signature, feeds: Mapping[str, Tensor], device: str
    ) -> None:
        """Allocate on `device` ("cuda" or "cpu"): inputs as `feeds`, outputs by the signature."""
        sizes = signature.check(feeds)
        self.inputs = {name: torch.empty_like(x, device=device) for name, x in feeds.items()}
        self.outputs = {
            spec.name: torch.empty(
                [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes],
                dtype=getattr(torch, spec.dtype),
                device=device,
            )
            for spec in signature.outputs
        }
        self._session, self.binding = session, session.io_binding()
        for bind, tensors in (
            (self.binding.bind_input, self.inputs),
            (self.binding.bind_output, self.outputs),
        ):
            for name, tensor in tensors.items():
                kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
                bind(name, device, 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def run(self, feeds: Mapping[str, Tensor], options: Any = None) -> dict[str, Tensor]:
        """The outputs, the caller's to keep."""
        for name, tensor in feeds.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self._session.run_with_iobinding(self.binding, options)
        return {name: tensor.clone() for name, tensor in self.outputs.items()}


@final
class OnnxRuntimeCudaEngine(DeviceEngine):
    """files: `graph` and `weights`; properties: as OnnxRuntimeEngine's."""

    @classmethod
    def usable_here(cls, properties: Properties) -> bool:  # noqa: ARG003
        """Whether there are a card and a build of ONNX Runtime that runs on it."""
        return torch.cuda.is_available() and PROVIDER in ort.get_available_providers()

    @classmethod
    def require_here(cls, properties: Properties) -> None:
        """Raise MissingError for a build without CUDA, DeviceMismatch without a card."""
        if PROVIDER not in ort.get_available_providers():
            raise MissingError(
                "The engine needs ONNX Runtime with CUDA, and the one here has none: run "
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu."
            )
        if not cls.usable_here(properties):
            raise DeviceMismatch(
                "The engine was built for any NVIDIA card, and none is usable here: check the "
                "driver with nvidia-smi, or compile for the processor (--backend onnxruntime)."
            )

    def machine(self) -> str:
        """The card and ONNX Runtime's version."""
        return f"{torch.cuda.get_device_name()} (onnxruntime {ort.__version__})"

    def _open(self) -> None:
        self.require_here(self.properties)
        stream = str(torch.cuda.current_stream().cuda_stream)
        settings = {
            "device_id": str(torch.cuda.current_device()),
            "enable_cuda_graph": "1",
            "use_tf32": "0",
            "user_compute_stream": stream,
        }
        self._session = open_session(
            self.files, self.properties, threads=self.threads, provider=(PROVIDER, settings)
        )
        self._bound: OrderedDict[Any, tuple[Bound, Any]] = OrderedDict()
        self._recordings = 0

    def _run_tensors(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = compiled_rank_tensors(feeds, self.signature)
        key = tuple((name, tuple(tensor.shape)) for name, tensor in feeds.items())
        if key not in self._bound:
            while len(self._bound) >= _KEPT:
                self._bound.popitem(last=False)
            self._recordings += 1
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(self._recordings))
            self._bound[key] = Bound(self._session, self.signature, feeds, "cuda"), options
        self._bound.move_to_end(key)
        bound, options = self._bound[key]
        return bound.run(feeds, options)

    def _close(self) -> None:
        self._bound.clear()
        del self._session

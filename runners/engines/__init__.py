"""The engines, one file a backend; `ENGINES` is the only list of them."""

from __future__ import annotations

from importlib import import_module

from profiles.errors import MissingError, SpecError
from profiles.libraries import LIBRARIES
from runners.engines.base import Engine

__all__ = ["ENGINES", "EXTRAS", "engine_class"]

ENGINES: dict[str, str] = {
    "openvino": "runners.engines.openvino:OpenVinoEngine",
    "onnxruntime": "runners.engines.onnxruntime:OnnxRuntimeEngine",
    "tensorrt-rtx": "runners.engines.tensorrt:TensorRtEngine",
    "tensorrt": "runners.engines.tensorrt:TensorRtEngine",
    "onnxruntime-cuda": "runners.engines.onnxruntime_cuda:OnnxRuntimeCudaEngine",
    "aoti-cuda": "runners.engines.aoti_cuda:AotiCudaEngine",
    "aoti": "runners.engines.aoti:AotiEngine",
    "aoti-blocks": "runners.engines.aoti_blocks:AotiBlocksEngine",
    "eager": "runners.engines.eager:EagerEngine",
}

EXTRAS: dict[str, str] = {
    name: library.extra for name, library in LIBRARIES.items() if library.extra is not None
}
"""Backend -> the extra of the package that installs its library."""


def engine_class(backend: str) -> type[Engine]:
    """The engine class of `backend`.

    Raises SpecError for an unknown name and MissingError, with the command that installs it, where
    the backend's library isn't there.
    """
    if backend not in ENGINES:
        raise SpecError(f"The backend {backend} is not known: use one of {', '.join(ENGINES)}.")
    module, attribute = ENGINES[backend].split(":")
    try:
        found: type[Engine] = getattr(import_module(module), attribute)
    except ImportError as error:
        raise MissingError(
            f"The backend {backend} needs {error.name or backend}, which isn't installed: run "
            f'pip install "kiln-diffusion[{EXTRAS.get(backend, "cpu")}]".'
        ) from error
    return found

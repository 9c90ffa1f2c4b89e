"""ONNX Runtime on CPU: a session from verified bytes, weights handed over in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import onnxruntime as ort

from profiles.errors import BundleError
from runners.engines.base import Array, Buffer, Engine, Properties

__all__ = ["ACCURACY", "OnnxRuntimeEngine", "open_session"]

ACCURACY = "session.qdq_matmulnbits_accuracy_level"
"""What products of a weight-only layer are computed in: "1" is fp32, "4" (its default) int8."""


@final
class OnnxRuntimeEngine(Engine):
    """files: `graph` (ONNX) and `weights` (its external data).

    Properties: `weights_location`; `ACCURACY`, without which ONNX Runtime rounds the inputs of
    weight-only layers to 8 bits.
    """

    exhausted = ("failed to allocate memory", "bad allocation", "bad_alloc")

    def _open(self) -> None:
        self._session = open_session(self.files, self.properties, threads=self.threads)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def _close(self) -> None:
        del self._session


def open_session(
    files: Mapping[str, Buffer],
    properties: Properties,
    *,
    threads: int,
    provider: Any = "CPUExecutionProvider",
) -> Any:
    """A session of verified bytes; BundleError with ONNX Runtime's words where it can't be opened.

    `provider` is a name, or a name and its settings.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # a session's threads would wait in a loop after a run, and take the cores from what runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    accuracy = str(properties[ACCURACY])
    options.add_session_config_entry(ACCURACY, accuracy)
    Engine._same(ACCURACY, accuracy, options.get_session_config_entry(ACCURACY))
    weights = memoryview(files["weights"])
    if len(weights):
        options.add_external_initializers_from_files_in_memory(
            [str(properties["weights_location"])], [weights], [len(weights)]
        )
    try:
        return ort.InferenceSession(bytes(files["graph"]), options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types of its own
        raise BundleError(f"ONNX Runtime can't open the engine: {error}") from error

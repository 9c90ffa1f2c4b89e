"""A backend for children of tests: y = 2 x, unless its weights say to be wrong, to fail or to die.

Run as a program, it is the self-test's child with this engine in OpenVINO's place.
"""

from __future__ import annotations

import os
import signal
import sys

from runners.engines.base import Array, Engine

__all__ = ["ToyEngine"]


class ToyEngine(Engine):
    def _open(self) -> None:
        self._weights = bytes(self.files["weights"])
        if self._weights == b"cannot open":
            raise RuntimeError("no kernel for this\nprocessor")

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if self._weights == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        factor = 2.2 if self._weights == b"wrong" else 2
        return {"y": (feeds["x"] * factor).astype("float32")}

    def _close(self) -> None:
        self._weights = b""


if __name__ == "__main__":
    from runners import engines
    from runners.selftest_child import main

    engines.ENGINES["openvino"] = "tests.toy_engine:ToyEngine"
    sys.exit(main(sys.argv[1]))

"""Engines that really get no memory, in a child whose address space is limited."""

from __future__ import annotations

import gzip
import subprocess
import sys
from typing import Any

import pytest

from tests.tracked import ROOT

CHILD = """
import resource, sys
import numpy as np
from profiles.errors import OutOfMemory
from runners.engines import engine_class
from runners.signature import Dim, Signature, TensorSpec
from tests.runners.test_out_of_memory import files_of

backend = sys.argv[1]
files, properties = files_of(backend)
n = Dim(name="n", min=1, opt=8, max=1 << 17)
signature = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("n", 1)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("n", "n")),),
    dims=(n,),
)
files = {name: bytearray(raw) for name, raw in files.items()}
engine = engine_class(backend)(files, signature=signature, properties=properties, threads=1)
with engine:
    assert engine({"x": np.ones((8, 1), np.float32)})["y"].shape == (8, 8)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
    try:
        engine({"x": np.ones((50_000, 1), np.float32)})
    except OutOfMemory as error:
        print("caught:", error)
    assert engine({"x": np.ones((9, 1), np.float32)})["y"].shape == (9, 9)
"""


def files_of(backend: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """An engine of y = x times x transposed: 10 GB for 50,000 numbers."""
    from onnx import TensorProto, helper

    from runners.engines.onnxruntime import ACCURACY

    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph(nodes, "outer", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    raw = made.SerializeToString()
    if backend == "onnxruntime":
        return {"graph": raw, "weights": b""}, {"weights_location": "w", ACCURACY: "1"}
    import tempfile
    from pathlib import Path

    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(ov.Core().read_model(raw), Path(folder) / "m.xml", compress_to_fp16=False)
        xml, weights = ((Path(folder) / name).read_bytes() for name in ("m.xml", "m.bin"))
    return {"graph": gzip.compress(xml), "weights": weights or b"\0"}, {}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_library_that_gets_no_memory_says_so_and_goes_on(backend: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (
        "caught: An engine got no memory: close other programs, or take a smaller size or batch.\n"
    )

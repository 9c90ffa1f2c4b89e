"""One torch component -> one ONNX file (torch.onnx.export, dynamo), cleaned up.

Every name of a parameter survives (NAME.transposed where a linear's weight is stored so), so later
stages can still say which layer is which. The custom operators of runners/quantized.py become
QuantizeLinear and DequantizeLinear, codes of 4-bit layers real 4-bit initializers.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import onnx_ir as ir
import torch
from onnxscript import opset23
from torch import Tensor, nn

from optimizer.decomposing import only_needed_decompositions
from optimizer.graph import clean, name_transposed
from optimizer.promoting import only_needed_evaluations
from optimizer.simplifying import simplify
from optimizer.upsampling import upsampling_without_questions
from profiles.errors import BuildError
from runners import quantized as _operators  # noqa: F401 (registers the operators)
from runners.signature import Signature

__all__ = ["OPSET", "export_onnx"]

OPSET = 23
"""Has fused Attention, GroupNormalization and RMSNormalization: 30-40 % fewer nodes (FACTS.md)."""

_INT8 = ir.DataType.INT8.value
_FP8 = ir.DataType.FLOAT8E4M3FN.value


def _channel(codes, scale):  # type: ignore[no-untyped-def]
    return opset23.DequantizeLinear(codes, scale, axis=0)


def _group(codes, scale, group: int):  # type: ignore[no-untyped-def]
    return opset23.DequantizeLinear(codes, scale, axis=1, block_size=group)


def _group_affine(codes, scale, zero, group: int):  # type: ignore[no-untyped-def]
    return opset23.DequantizeLinear(codes, scale, zero, axis=1, block_size=group)


def _fp4(codes, scale, whole, group: int):  # type: ignore[no-untyped-def]
    scales = opset23.DequantizeLinear(scale, whole)
    return opset23.DequantizeLinear(codes, scales, axis=1, block_size=group)


def _activation(x, scale):  # type: ignore[no-untyped-def]
    codes = opset23.QuantizeLinear(x, scale, output_dtype=_INT8)
    return opset23.DequantizeLinear(codes, scale)


def _fp8(x, scale):  # type: ignore[no-untyped-def]
    codes = opset23.QuantizeLinear(x, scale, output_dtype=_FP8)
    return opset23.DequantizeLinear(codes, scale)


def _affine(x, scale, zero_point):  # type: ignore[no-untyped-def]
    codes = opset23.QuantizeLinear(x, scale, zero_point)
    return opset23.DequantizeLinear(codes, scale, zero_point)


def _to(x, dtype: int = -1, *_where, **_how):  # type: ignore[no-untyped-def]
    return opset23.Identity(x) if dtype == -1 else opset23.Cast(x, to=dtype)


def _to_device(x, _device, dtype: int = -1, *_how):  # type: ignore[no-untyped-def]
    return _to(x, dtype)


def _translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Of our own operators, and of torch's casts, which the exporter would decompose."""
    ops, to = torch.ops.kiln, torch.ops.aten.to
    return {
        ops.dequantize_channel.default: _channel,
        ops.dequantize_group.default: _group,
        ops.dequantize_group_affine.default: _group_affine,
        ops.dequantize_fp4.default: _fp4,
        ops.quantize_dequantize.default: _activation,
        ops.quantize_dequantize_affine.default: _affine,
        ops.quantize_dequantize_fp8.default: _fp8,
        to.dtype: _to,
        to.dtype_layout: _to,
        to.device: _to_device,
    }


def export_onnx(
    module: nn.Module, inputs: Sequence[Tensor], signature: Signature, path: Path
) -> None:
    """Write `module` (a role wrapper) to `path`, weights beside it in one file, `path`.data.

    `inputs` are the tensors that it is traced with, in the signature's order: their sizes must
    not be multiples of the model's downsampling, so that one graph serves all sizes.
    Raises BuildError with the exporter's own words.
    """
    names = [spec.name for spec in signature.inputs]
    log = io.StringIO()
    try:
        with (
            redirect_stdout(log),
            redirect_stderr(log),
            torch.no_grad(),
            upsampling_without_questions(module),
            only_needed_decompositions(),
            only_needed_evaluations(),
        ):
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=_dynamic_shapes(signature),
                external_data=True,
                optimize=False,
                custom_translation_table=_translations(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).rpartition("## Exception summary")[2].strip().splitlines()[0]
        raise BuildError(
            f"torch.onnx.export failed: {reason} (run again with -v for the log).",
            log=f"{log.getvalue()}{error}",
        ) from error
    assert program is not None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    name_transposed(program.model.graph)
    simplify(program.model)
    clean(program.model)
    ir.save(program.model, path, external_data=f"{path.name}.data")


def _dynamic_shapes(signature: Signature) -> tuple[dict[int, object] | None, ...]:
    """torch.export's dims for each input, in order; the same name is the same dim."""
    dims: dict[str, object] = {
        dim.name: torch.export.Dim.DYNAMIC for dim in signature.dims if not dim.fixed
    }
    return tuple(
        {
            i: dims[axis]
            for i, axis in enumerate(spec.axes)
            if isinstance(axis, str) and axis in dims
        }
        for spec in signature.inputs
    )

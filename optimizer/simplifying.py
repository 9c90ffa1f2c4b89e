"""onnxscript's optimizer, with the rewrites that exports of denoisers, VAEs and encoders call for.

Its own list has a rule of two outputs (two slices become a split), for which it looks at all nodes
from each node: most of the optimizer's time on the reference model's UNet, more with the square of
the graph; and it needs sides that are known. Rules for what no export has (batch norms, chains of
clips) are left out too.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

__all__ = ["simplify"]

_FOLDED = 1024
"""Elements: shape arithmetic is folded, no parameter is."""

_ROUNDS = 2
"""Rewrites leave constants to fold."""

_RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,  # before the next one
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def simplify(model: ir.Model) -> None:
    """Inline functions, fold constants, rewrite, merge what is equal; in place."""
    optimizer.inline(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLDED,
            output_size_limit=_FOLDED,
        )
        RewritePass(_RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
    for each in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        each(model)

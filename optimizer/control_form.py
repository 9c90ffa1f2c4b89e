"""The "control" form of a prepared denoiser: residuals of control networks as further inputs.

With LoRA's inputs too, it is the form "control+lora".
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from optimizer.backends import Built
from optimizer.calls import load_calls
from optimizer.check import engine_db, limit_db, opened, opened_proof
from optimizer.configs import Config
from optimizer.control_graph import add_residuals
from optimizer.controlling import CONTROLLED_CALLS
from optimizer.families.controls import controlled_signature
from optimizer.forms import save_form
from optimizer.job import Job
from optimizer.lora_graph import add_low_rank, factors, targets
from optimizer.numerics import EXACT_DB
from optimizer.onnx_files import read_graph
from profiles.errors import ParityError
from runners.control_tasks import CONTROL
from runners.lora_inputs import with_lora
from runners.signature import Signature

__all__ = ["check_control", "prepare_control"]

_BOTH = f"{CONTROL}+lora"
_UNCALIBRATED_DB = 6.0
"""How much more than without residuals a quantized denoiser may lose with them, which its ranges
were not taken from."""


def prepare_control(
    module: nn.Module, job: Job, config: Config, out: Path, *, with_graph: bool
) -> None:
    """Add the forms with residuals to what is prepared in `out`; `config` is the UNet's."""
    signature, wanted = controlled_signature(job.signature, config), targets(module)
    if not with_graph:
        save_form(CONTROL, signature, out)
        if _BOTH in job.forms:
            save_form(_BOTH, with_lora(signature, wanted), out)
        return
    model = read_graph(out / "model.onnx")
    add_residuals(model, signature)
    save_form(CONTROL, signature, out, model)
    if _BOTH in job.forms:
        model = read_graph(out / "model.onnx")
        there = add_low_rank(model, wanted, factors(module))
        add_residuals(model, signature)
        save_form(_BOTH, _in_order(signature, with_lora(job.signature, there)), out, model)


def _in_order(controlled: Signature, adapted: Signature) -> Signature:
    """Both's further inputs and dims; those of residuals come first."""
    names = {spec.name for spec in controlled.inputs}
    more = [spec for spec in adapted.inputs if spec.name not in names]
    own = {dim.name for dim in controlled.dims}
    dims = [dim for dim in adapted.dims if dim.name not in own]
    return controlled.model_copy(
        update={"inputs": (*controlled.inputs, *more), "dims": (*controlled.dims, *dims)}
    )


def check_control(job: Job, prepared: Path, engine: Path, controlled: Path, out: Path) -> None:
    """Run the form on recorded residuals; writes control.json with what was measured.

    Raises ParityError where it is worse than it may be.
    """
    built = json.loads((engine / "built.json").read_text("utf-8"))
    form = built["forms"][CONTROL]
    signature = Signature.model_validate(form["signature"])
    if built["ran"]:
        judged = opened(job, Built(form["files"], form["properties"]), engine, signature)
    else:
        judged = opened_proof(job, prepared, out, CONTROL, signature)
    with judged as live:
        found = engine_db(live, load_calls(controlled / CONTROLLED_CALLS).values())
    oracle = built["oracle_sqnr_db"]
    limit = limit_db(oracle if oracle == EXACT_DB else oracle - _UNCALIBRATED_DB, job.dtype)
    if not found >= limit:
        raise ParityError(
            f"The {job.backend} engine of {job.spec.name} reaches {found:.1f} dB SQNR with the "
            f"residuals of control networks, and {limit:.1f} dB are needed: compile with "
            "--dtype fp32 or another --backend, and report the model."
        )
    (out / "control.json").write_text(json.dumps({"sqnr_db": found}), "utf-8")

"""What each layer loses under each scheme: the data, without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimizer.quantize.schemes import Scheme
from profiles.errors import SpecError

__all__ = ["SENSITIVITY_NAME", "LayerLosses", "Loss", "Sensitivity", "load_sensitivity", "sqnr_of"]

SENSITIVITY_NAME = "sensitivity.json"

_SCHEMA = 1
_STRICT = ConfigDict(frozen=True, extra="forbid")


class Loss(BaseModel):
    """One scheme of one layer."""

    model_config = _STRICT

    scheme: Scheme
    noise: float = Field(ge=0)
    """Squared error of the denoiser's output over its squared size, with this layer alone
    quantized, teacher-forced and pooled over the calls; 10*log10(1/noise) is the SQNR in dB."""


class LayerLosses(BaseModel):
    """One layer: its weight's shape and what was measured."""

    model_config = _STRICT

    shape: tuple[int, ...]
    losses: tuple[Loss, ...]


class Sensitivity(BaseModel):
    """All layers of one component."""

    model_config = _STRICT

    schema_version: int = _SCHEMA
    model_digest: str
    component: str
    solver: str
    calls: int
    """Denoiser calls that every figure is pooled over."""
    layers: dict[str, LayerLosses]

    def most_sensitive(self, count: int) -> list[tuple[str, Loss]]:
        """The layers that lose most, each with its worst scheme."""
        worst = [
            (name, max(layer.losses, key=lambda loss: loss.noise))
            for name, layer in self.layers.items()
        ]
        return sorted(worst, key=lambda pair: -pair[1].noise)[:count]


def sqnr_of(noise: float) -> float:
    """A relative noise power in dB."""
    return 200.0 if noise <= 0 else min(200.0, -10 * math.log10(noise))


def load_sensitivity(path: Path) -> Sensitivity:
    """What `kiln analyze` wrote; SpecError where the file isn't that."""
    hint = "write one with `kiln analyze MODEL -o sensitivity.json`"
    try:
        document = json.loads(path.read_text("utf-8"))
        found = Sensitivity.model_validate(document)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise SpecError(f"{path} is no sensitivity file (wrong at {where}): {hint}.") from error
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} is no sensitivity file ({error}): {hint}.") from error
    if found.schema_version != _SCHEMA:
        raise SpecError(f"{path} was written by another version of kiln: {hint} again.")
    return found

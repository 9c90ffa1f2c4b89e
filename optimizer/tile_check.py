"""A VAE half's two parts, built and run: that they give together what the whole half does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from optimizer.backends import Built, builder
from optimizer.calls import Call
from optimizer.footprint import measured
from optimizer.forms import prepared_forms
from optimizer.job import Job
from optimizer.numerics import worst_sqnr_db
from runners.engines import engine_class
from runners.engines.base import Array, Engine
from runners.part_names import AFTER, BEFORE, PARTS
from runners.signature import Signature
from runners.streamed_attention import attended

__all__ = ["Parts", "built_parts"]


@dataclass(frozen=True)
class Parts:
    """Both parts of a half, in the folder of its engine."""

    job: Job
    built: Mapping[str, Built]
    signatures: Mapping[str, Signature]
    folder: Path

    def sqnr_db(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """What each call loses in two parts, with the tile's own statistics and with given ones:
        the worse of the two.
        """
        with ExitStack() as stack:
            engines = {name: stack.enter_context(self._engine(name)) for name in PARTS}
            return {
                where: worst_sqnr_db(
                    (call.outputs, [_joined(self.job, engines, call.inputs[0], given=given)])
                    for given in (False, True)
                )
                for where, call in calls.items()
            }

    def document(self, call: Call, *, measures: bool) -> dict[str, dict[str, Any]]:
        """For built.json: files, signature, properties, and where it `measures` the memory."""
        return {
            name: {
                "files": self.built[name].files,
                "signature": signature.model_dump(mode="json"),
                "properties": self.built[name].properties,
                "memory": self._memory(name, call).model_dump(mode="json") if measures else None,
            }
            for name, signature in self.signatures.items()
        }

    def _engine(self, name: str) -> Engine:
        built = self.built[name]
        return engine_class(self.job.backend)(
            {role: bytearray((self.folder / f).read_bytes()) for role, f in built.files.items()},
            signature=self.signatures[name],
            properties=built.properties,
            threads=psutil.cpu_count(logical=False) or 1,
        )

    def _memory(self, name: str, call: Call) -> Any:
        """Of a part, at a tile's size."""
        signature = self.signatures[name]
        sizes = {dim.name: dim.nearest(dim.opt) for dim in signature.dims if dim.of is None}
        sizes = {dim.name: dim.following(sizes) for dim in signature.dims}
        known = {
            spec.name: x for spec, x in zip(self.job.signature.inputs, call.inputs, strict=True)
        }
        feeds = [
            known[spec.name][:1] if spec.name in known else _filled(spec.axes, sizes)
            for spec in signature.inputs
        ]
        return measured(self.job.backend, self.built[name], signature, self.folder, feeds, [sizes])


def built_parts(job: Job, prepared: Path, out: Path) -> Parts:
    """Build both parts that were prepared over the plain engine in `out`."""
    forms = prepared_forms(prepared)
    built = {name: builder(job.backend).build_form(prepared, out, job.how, name) for name in PARTS}
    return Parts(job, built, {name: forms[name] for name in PARTS}, out)


def _filled(axes: tuple[int | str, ...], sizes: Mapping[str, int]) -> Array:
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
    return np.full(shape, 0.5, np.float32)


def _joined(job: Job, engines: Mapping[str, Engine], x: Array, *, given: bool) -> Array:
    """The half's output, of both parts in turn; each picture is one tile."""
    found = []
    for one in x:
        features, *mixed = _tile(engines[BEFORE], {job.signature.inputs[0].name: one}, given=given)
        query, key, value = (torch.from_numpy(each[0]).flatten(1).T for each in mixed)
        there = attended(query, [(key, value)]).T.reshape(features.shape[1:]).numpy()
        second = {"features": features[0], "attended": there}
        found.append(_tile(engines[AFTER], second, given=given)[0])
    return np.concatenate(found)


def _tile(engine: Engine, given_maps: Mapping[str, Array], *, given: bool) -> list[Array]:
    """What a part makes of one picture as one tile; `given`: once more, with the statistics that
    it saw.
    """
    signature = engine.signature
    specs = {spec.name: spec for spec in signature.inputs}
    sizes: dict[str, int] = {}
    for name, x in given_maps.items():
        pairs = zip(specs[name].axes[2:], x.shape[1:], strict=True)
        sizes |= {str(axis): n for axis, n in pairs}
    sizes = {dim.name: dim.following(sizes) for dim in signature.dims}
    sides = {
        name: np.ones(sizes[str(specs[name].axes[0])], np.float32) for name in ("rows", "columns")
    }
    neutral = np.zeros([int(axis) for axis in specs["given"].axes], np.float32)
    neutral[:, 1] = 1
    feeds = {
        **{name: x[None] for name, x in given_maps.items()},
        **sides,
        "own": np.ones(1, np.float32),
        "given": neutral,
    }
    found = engine(feeds)
    if given:
        found = engine({**feeds, "own": np.zeros(1, np.float32), "given": found["seen"]})
    return [found[spec.name] for spec in signature.outputs if spec.name != "seen"]

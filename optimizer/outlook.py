"""What a model would take of memory, from its configs and its family's closed formulas alone.

Nothing is downloaded but configs, no weight is read and torch isn't imported: an answer takes
milliseconds. What is compiled is measured, and `kiln plan BUNDLE` then says that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optimizer.backends import BACKENDS, Backend
from optimizer.configs import Config, read_json
from optimizer.families import FAMILIES
from optimizer.families import family as family_named
from optimizer.families.base import Family
from optimizer.families.outlines import Outline
from optimizer.job import Job, default_solver
from optimizer.layout import PIPELINE, family_of
from optimizer.plan import Plan
from optimizer.sizes import compile_bytes
from optimizer.source import HUB_ID, resolve
from optimizer.vae_config import completed, require_known, splits
from profiles import profile as profiles
from profiles.errors import SpecError
from profiles.facts import Facts
from profiles.tiers import Device
from runners.memory import Feature, PartMemory, Parts, PipelineMemory
from runners.outlook import Outlook
from runners.signature import Dim

__all__ = ["model_outlook", "parts_of_model", "predicted_base", "predicted_part"]

_LEVELS: dict[str, tuple[str, float]] = {
    "none": ("keep", 0.0),
    "int8": ("w8a8", 1.0),
    "int4": ("w4a16", 0.5 + 2 / 64),
}
"""Level -> what its layers are, and bytes of a weight: 4 bits and a 16-bit scale for 64 of them."""

_BASE: dict[Device, int] = {"processor": 600 << 20, "card": 500 << 20}
"""Of a process: interpreter, torch, diffusers and OpenVINO (585 MB measured of `kiln generate`); of
a card: CUDA's context and the libraries' kernels (not measured here)."""

_PIXEL_BYTES: dict[Device, float] = {"processor": 60.0, "card": 12.0}
"""optimizer.memory_entries of a processor; on a card the decoder's output alone."""

_SIDE_MAX = 4096
_ASSETS = Path(__file__).parent / "families" / "assets"


def model_outlook(model: str, facts: Facts, backend: str | None = None) -> Outlook:
    """What a diffusers folder, a hub id, a checkpoint or a family's own architecture would take.

    `backend` None: the profile's first one for the machine of `facts`, TensorRT-RTX where it has a
    card. Raises SpecError for what isn't a model, UnsupportedError for an unknown family.
    """
    folder = _folder(model)
    index = read_json(folder / PIPELINE)
    known = family_named(family_of(index, where=model))
    configs = _configs(folder)
    missing = [s.folder for s in known.components if s.folder not in configs and not s.optional]
    if missing:
        raise SpecError(f"{model} has no {missing[0]}/config.json: download the model again.")
    require_known(configs["vae"], where=f"the VAE of {model}")
    known, chosen = known.of(configs), _backend(facts, backend)
    dtype: str = profiles.match(facts).dtype if chosen.device == "cpu" else "fp16"
    dtype = dtype if dtype in chosen.dtypes else chosen.dtypes[0]
    try:
        outlines = known.outlines({name: one.document for name, one in configs.items()})
        native, step = known.native_size(configs), known.size_step(configs)
        few = known.few_step(configs, None)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(
            f"The configs of {model} can't be understood ({error}): download the model again."
        ) from error
    return Outlook(
        name=model,
        family=known.name,
        device="card" if chosen.device == "gpu" else "processor",
        parts=parts_of_model(
            known,
            outlines,
            chosen,
            dtype=dtype,
            native=native,
            seamless=chosen.tiles and splits(configs["vae"]),
        ),
        side=Dim(name="side", min=step, opt=native, max=_SIDE_MAX // step * step, multiple_of=step),
        native=native,
        batch_max=None,
        guided=_guided(known, configs, few is not None),
        tokens=known.text_tokens,
        build_bytes=_build(outlines, known, chosen),
    )


def parts_of_model(
    known: Family,
    outlines: Mapping[str, Outline],
    backend: Backend,
    *,
    dtype: str,
    native: int,
    seamless: bool,
) -> Parts:
    """The parts of a model that is compiled for `backend`, its denoiser at each level that the
    backend has.
    """

    def part(name: str, level: str = "none") -> PartMemory:
        return _part(outlines[name], level, backend, dtype)

    def cut(name: str) -> tuple[PartMemory, ...]:
        halves = outlines[name].parts if seamless else ()
        return tuple(_part(half, "none", backend, dtype) for half in halves)

    names: dict[str, list[str]] = {}
    for spec in known.components:
        names.setdefault(spec.role, []).append(spec.name)
    levels = [level for level, (form, _) in _LEVELS.items() if form in {"keep", *backend.formats}]
    return Parts(
        text_encoders=tuple(part(name) for name in names["text_encoder"]),
        denoisers={level: part(names["denoiser"][0], level) for level in levels},
        decoder=part(names["vae_decoder"][0]),
        encoder=part(names["vae_encoder"][0]),
        pipeline=_pipeline("card" if backend.device == "gpu" else "processor"),
        tile=native,
        seamless=seamless,
        decoder_parts=cut(names["vae_decoder"][0]),
        encoder_parts=cut(names["vae_encoder"][0]),
    )


def _part(outline: Outline, level: str, backend: Backend, dtype: str) -> PartMemory:
    counted, (form, bytes_each) = outline.counted, _LEVELS[level]
    float_bytes = 4 if dtype == "fp32" else 2
    floats = counted.parameters - (counted.in_layers if level != "none" else 0)
    resident = floats * backend.weight_bytes.get(dtype, float_bytes)
    if level != "none":
        expanded = _FLOAT if form in backend.expands else 0
        resident += counted.in_layers * (bytes_each * backend.low_bit_copies + expanded)
    live: dict[Feature, float] = {name: value * float_bytes for name, value in outline.live.items()}
    return PartMemory(
        held_bytes=0,
        resident_bytes=round(resident) + counted.layers * backend.layer_bytes,
        stays=live,
        peak=live,
        source="formula",
    )


def predicted_part(plan: Plan, job: Job, engine_bytes: int) -> PartMemory:
    """Of an engine that couldn't run where it was built: its files' bytes, and the formulas'
    activations; a control network, half of a denoiser, has the denoiser's.
    """
    configs = {
        spec.folder: plan.source.component_config(spec.folder) for spec in plan.family.components
    }
    counted = plan.denoiser if job.spec.role == "controlnet" else job
    live = plan.family.outlines(configs)[counted.spec.name].live
    scaled: dict[Feature, float] = {n: value * job.float_bytes for n, value in live.items()}
    return PartMemory(
        held_bytes=0, resident_bytes=engine_bytes, stays=scaled, peak=scaled, source="formula"
    )


def predicted_base(job: Job) -> PipelineMemory:
    """Beside the engines of a bundle that couldn't run where it was built."""
    return _pipeline("card" if BACKENDS[job.backend].device == "gpu" else "processor")


def _pipeline(device: Device) -> PipelineMemory:
    return PipelineMemory(
        base_bytes=_BASE[device], pixel_bytes=_PIXEL_BYTES[device], source="formula"
    )


_FLOAT = 4
"""Bytes of a weight that a backend expands when it opens."""


def _build(outlines: Mapping[str, Outline], known: Family, backend: Backend) -> dict[str, int]:
    """The peak of compiling at each level: that of the component that takes most."""
    denoiser = next(spec.name for spec in known.components if spec.role == "denoiser")
    counted = outlines[denoiser].counted
    rest = [one.counted.parameters for name, one in outlines.items() if name != denoiser]
    others = max(compile_bytes(parameters, None, 0) for parameters in rest)
    found = {}
    for level, (_, bytes_each) in _LEVELS.items():
        engine = counted.in_layers * (bytes_each or 2)
        engine += 2 * (counted.parameters - counted.in_layers)
        solver = None if level == "none" else default_solver(level)
        own = compile_bytes(counted.parameters, solver, backend.build_memory * engine)
        found[level] = max(others, own)
    return found


def _guided(known: Family, configs: Mapping[str, Config], few_step: bool) -> bool:  # noqa: FBT001
    """Whether the denoiser's signature has room for two prompts and a step uses it."""
    from optimizer.families.base import Ranges

    side = known.native_size(configs)
    signatures = known.signatures(configs, Ranges(side, side, side, 1))
    denoiser = next(spec.name for spec in known.components if spec.role == "denoiser")
    return signatures[denoiser].dim("batch").max > 1 and not few_step


def _backend(facts: Facts, name: str | None) -> Backend:
    if name is not None:
        if name not in BACKENDS:
            raise SpecError(f"--backend {name} isn't known: use one of {', '.join(BACKENDS)}.")
        return BACKENDS[name]
    if facts.cards:
        return BACKENDS[profiles.load("nvidia-rtx").backends[0]]
    return BACKENDS[profiles.match(facts).backends[0]]


def _folder(model: str) -> Path:
    """Where the model's configs lie: of a hub model they alone are downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / PIPELINE).is_file():
            raise SpecError(
                f"{model} is neither a bundle nor a diffusers pipeline: it has no {PIPELINE}."
            )
        return path
    if model in FAMILIES:
        return _ASSETS / model
    if path.is_file():
        return resolve(model).folder
    if HUB_ID.fullmatch(model):
        from optimizer.hub import fetch_configs

        return fetch_configs(model)
    raise SpecError(
        f"{model} is no bundle, folder, file or hub id: give one, or a family's name "
        f"({', '.join(FAMILIES)})."
    )


def _configs(folder: Path) -> dict[str, Config]:
    found = {}
    for path in sorted(folder.glob("*/*config.json")):
        if path.name not in ("config.json", f"{path.parent.name}_config.json"):
            continue
        document = read_json(path)
        if path.parent.name == "vae":
            document = completed(document, where=str(path.parent))
        found[path.parent.name] = Config(document, path)
    if "vae" not in found:
        raise SpecError(f"{folder} has no vae/config.json: download the model again.")
    return found

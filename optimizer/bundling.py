"""Engines and shared assets -> a bundle on disk, visible only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from optimizer.backends import backend
from optimizer.component_source import ComponentSource
from optimizer.digests import file_digests, sha256_file
from optimizer.job import Job
from optimizer.memory_entries import PEAK_NAME, calibrated, form_memory, part_memory
from optimizer.outlook import predicted_base, predicted_part
from optimizer.plan import Plan
from optimizer.requiring import native_of, requires_of
from optimizer.source import ModelSource
from optimizer.tools import EXPORT, kiln_version, versions
from profiles.errors import BundleError, KilnError, SpecError
from profiles.hardware import Hardware, read_glibc
from runners.manifest import (
    SCHEMA,
    AutoencoderEntry,
    ComponentEntry,
    ControlEntry,
    FileEntry,
    FormEntry,
    Manifest,
    ModelEntry,
    Picture,
    Speed,
)
from runners.manifest_file import (
    DIGEST_NAME,
    MANIFEST_NAME,
    digest_line,
    parse_manifest,
    read_raw,
)
from runners.mark import is_marked, local_key, mark_bundle
from runners.memory import Residency
from runners.outputs import require_writable
from runners.requires import Host, Observed
from runners.signature import Signature

__all__ = ["Made", "assemble", "check_target", "same_bundle"]

_PICTURE = "selftest.png"
_LEAST_PSNR_DB = 25.0
"""Between the same bundle's pictures on two machines. int8 and bf16 differ from fp32 by 47 to 54 dB
after 20 steps on the reference model and 4 bits by 39 (README, Figures), FLUX compiled by about 20
(FACTS.md); after the two steps drawn here it is more. Pictures of two prompts are 10 to 15 dB
apart."""

_ASSETS = ("tokenizer", "scheduler")
"""Beginnings of the folders that are taken as they are."""
_ASSET_ENDINGS = (".json", ".txt", ".model")


@dataclass(frozen=True)
class Made:
    """What the stages gave: store entries by component, and facts for the manifest."""

    key: str
    engines: Mapping[str, Path]
    speed: Path | None
    hardware: Hardware
    seconds: float
    """What the stages took."""


def same_bundle(out: Path, key: str, *, force: bool) -> Manifest | None:
    """The manifest of the bundle at `out` if it was made here with this key, all its files right.

    Raises BundleError for a damaged file, unless `force` says that it may be replaced.
    """
    try:
        found = read_raw(out)
        manifest = parse_manifest(found.raw, out)
        made_here = is_marked(found)
    except KilnError:
        return None
    if manifest.key != key or not made_here:
        return None
    for name, entry in manifest.files.items():
        path = out / name
        if not path.is_file() or sha256_file(path) != entry.sha256:
            if force:
                return None
            raise BundleError(
                f"{name} in {out} is damaged: compile again with --force to replace the bundle."
            )
    return manifest


def check_target(out: Path, *, force: bool) -> None:
    """Raise SpecError where `out` can't be written or holds something else."""
    if out.is_symlink() or out.is_file():
        raise SpecError(f"-o {out} is a file: give the folder that should become the bundle.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST_NAME).is_file():
            raise SpecError(f"-o {out} holds other files: give a new or empty folder.")
        if not force:
            raise SpecError(
                f"-o {out} holds another bundle: add --force to replace it, or give another folder."
            )
    require_writable(out)
    local_key()  # which the bundle will be marked with: better no key now than in an hour


Draw = Callable[[Path, Manifest, Picture, Residency], Path]
"""The file of the picture that the bundle in a folder draws, holding its engines so."""


def assemble(plan: Plan, made: Made, out: Path, draw: Draw) -> Manifest:
    """Copy everything into a private folder beside `out`, write the manifest, and swap it in.

    Where the engines run here, the bundle draws its own picture first, for its self-test.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 (resolve would follow links; "." has no name)
    with _private(out) as folder:
        entries = [_component(plan, job, made, folder) for job in plan.jobs]
        _copy_assets(plan, folder)
        manifest = _manifest(plan, made, entries, folder)
        _write(manifest, folder)
        if all(entry.ran for entry in manifest.engines):
            manifest = _with_picture(plan, manifest, folder, draw)
            _write(manifest, folder)
        mark_bundle(folder)
        _swap(folder, out)
    return manifest


def _write(manifest: Manifest, folder: Path) -> None:
    raw = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / DIGEST_NAME).write_bytes(digest_line(raw))


def _with_picture(plan: Plan, manifest: Manifest, folder: Path, draw: Draw) -> Manifest:
    """The manifest with the picture of the bundle in `folder`, at the smallest legal size."""
    step, least = manifest.size_step, int(manifest.recipe["size_min"])
    picture = Picture(
        file=_PICTURE,
        prompt=plan.calibration.prompts[0],
        seed=0,
        steps=2,
        side=-(-least // step) * step,
        least_psnr_db=_LEAST_PSNR_DB,
    )
    path, drawn = folder / _PICTURE, draw(folder, manifest, picture, "keep")
    shutil.copyfile(drawn, path)
    entry = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
    files = {**manifest.files, _PICTURE: entry}
    memory = manifest.memory or calibrated(
        manifest,
        side=picture.side,
        kept_bytes=_peak(drawn),
        in_turn_bytes=_peak(draw(folder, manifest, picture, "sequential")),
    )
    return manifest.model_copy(update={"files": files, "picture": picture, "memory": memory})


def _peak(drawn: Path) -> int:
    peak: int = json.loads(drawn.with_name(PEAK_NAME).read_text("utf-8"))["peak_rss_bytes"]
    return peak


@contextmanager
def _private(out: Path) -> Iterator[Path]:
    parent = out.absolute().parent
    for left in parent.glob(f".{out.name}.*.kiln-*"):  # of a compile that was killed
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f".{out.name}.{os.getpid()}.kiln-new"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, out: Path) -> None:
    """Put `folder` where `out` is; the old one is removed only when the new one is in place."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
    old = folder.with_suffix(".kiln-old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _component(plan: Plan, job: Job, made: Made, folder: Path) -> ComponentEntry:
    engine = made.engines[job.name]
    built: dict[str, Any] = json.loads((engine / "built.json").read_text("utf-8"))
    base = folder / job.spec.name if job.is_variant else None
    (folder / job.name).mkdir()
    forms: dict[str, dict[str, Any]] = built["forms"]
    formed = {name for form in forms.values() for name in form["files"].values()}
    placed = {
        name: _placed(engine / name, folder / job.name, base)
        for name in sorted({*built["files"].values(), *formed, built["selftest"] or ""} - {""})
    }
    config = f"{job.spec.name}/component.json"
    document = plan.source.component_config(job.spec.folder)
    document.pop("_name_or_path", None)  # the machine's own path of whoever saved the model
    (folder / config).write_text(json.dumps(document), "utf-8")
    engine_bytes = sum((engine / name).stat().st_size for name in built["files"].values())
    cards = str(built["properties"].get("capabilities", ""))
    least = int(plan.recipe.size_min or 1)
    return ComponentEntry(
        name=job.name,
        role=job.spec.role,
        wrapper=job.spec.wrapper,
        backend=job.backend,
        quant=job.quant,
        dtype=job.dtype,
        signature=job.signature,
        files={role: placed[name] for role, name in built["files"].items()},
        config=config,
        properties=built["properties"],
        parameters=job.parameters,
        fp32_bytes=4 * job.parameters,
        engine_bytes=engine_bytes,
        layers_quantized=built["layers_quantized"],
        layers_total=built["layers_total"],
        layers_low_bit=built["layers_low_bit"],
        sqnr_db=built["sqnr_db"],
        oracle_sqnr_db=built["oracle_sqnr_db"],
        unseen_sqnr_db=built["unseen_sqnr_db"],
        load_seconds=built["load_seconds"],
        requires=requires_of(
            job,
            built_on=(made.hardware.os, made.hardware.machine),
            version=versions([backend(job.backend).library])[backend(job.backend).library],
            memory_bytes=engine_bytes,
            capabilities=tuple(cards.split(",")) if cards else None,
            native=native_of(built["properties"]),
        ),
        ran=built["ran"],
        selftest=built["selftest"] and placed[built["selftest"]],
        selftest_db=built["selftest_db"],
        memory=part_memory(built["memory"], folder / job.name, job.signature, side_min=least)
        or predicted_part(plan, job, engine_bytes),
        forms={
            name: FormEntry(
                files={role: placed[file] for role, file in form["files"].items()},
                signature=form["signature"],
                properties=form["properties"],
                memory=form_memory(
                    form["memory"], Signature.model_validate(form["signature"]), side_min=least
                ),
            )
            for name, form in forms.items()
        },
    )


def _placed(path: Path, target: Path, base: Path | None) -> str:
    """Where a file lies in the bundle: in `target`, or in `base` where the very same lies there."""
    same = base and base / path.name
    if same and same.is_file() and sha256_file(same) == sha256_file(path):
        return f"{same.parent.name}/{path.name}"
    shutil.copyfile(path, target / path.name)
    return f"{target.name}/{path.name}"


def _copy_assets(plan: Plan, folder: Path) -> None:
    for name in plan.source.files:
        if name.startswith(_ASSETS) and name.endswith(_ASSET_ENDINGS):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.source.folder / name, target)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(plan.drawn.scheduler, indent=2), "utf-8")


def _manifest(plan: Plan, made: Made, entries: list[ComponentEntry], folder: Path) -> Manifest:
    source, made_of = plan.source, list(zip(plan.jobs, entries, strict=True))
    libraries = sorted({*EXPORT, *(backend(job.backend).library for job in plan.jobs)})
    return Manifest(
        schema_version=SCHEMA,
        kiln=kiln_version(),
        key=made.key,
        model=ModelEntry(
            name=_name(source),
            revision=source.revision,
            digest=source.digest,
            family=source.family,
            pipeline_class=source.pipeline_class,
            settings=source.settings,
            vae=source.vae and _autoencoder(source.vae),
            controls=_controls(source),
        ),
        native_size=plan.native_size,
        size_step=plan.size_step,
        defaults=plan.drawn.defaults,
        recipe=_portable(plan),
        policies={job.name: job.policy.model_dump(mode="json") for job in plan.jobs},
        components=tuple(entry for job, entry in made_of if not job.is_variant),
        variants=tuple(entry for job, entry in made_of if job.is_variant),
        files={
            name: FileEntry(size=found.size, sha256=found.sha256)
            for name, found in file_digests(folder).items()
        },
        tools=versions(libraries),
        memory=None
        if all(map(_measured, made.engines.values()))
        else predicted_base(plan.denoiser),
        observed=Observed(host=_host(made.hardware), build_seconds=round(made.seconds, 1)),
        speed=made.speed and Speed(**json.loads((made.speed / "speed.json").read_text("utf-8"))),
    )


def _measured(engine: Path) -> bool:
    """Whether what the engine takes was measured, by which the base can be calibrated."""
    return json.loads((engine / "built.json").read_text("utf-8"))["memory"] is not None


def _controls(source: ModelSource) -> tuple[ControlEntry, ...]:
    return tuple(
        ControlEntry(
            component=component,
            name=_name(control),
            revision=control.revision,
            digest=control.digest,
            class_name=control.class_name,
        )
        for component, control in zip(source.control_folders, source.controls, strict=True)
    )


def _name(source: ModelSource | ComponentSource) -> str:
    return source.name if source.kind == "hub" else Path(source.name).resolve().name


def _autoencoder(source: ComponentSource) -> AutoencoderEntry:
    return AutoencoderEntry(
        name=_name(source),
        revision=source.revision,
        digest=source.digest,
        class_name=source.class_name,
    )


def _host(hardware: Hardware) -> Host:
    return Host(
        os=hardware.os,
        machine=hardware.machine,
        cpu=hardware.cpu,
        ram_bytes=hardware.ram_bytes,
        glibc=read_glibc(),
    )


def _portable(plan: Plan) -> dict[str, Any]:
    """The recipe as data; what is on disk is named by its last part, never by a machine's path."""
    recipe = plan.recipe.model_dump(mode="json")
    for field, source in (("model", plan.source), ("vae", plan.source.vae)):
        if source is not None and source.kind != "hub" and Path(source.name).is_absolute():
            recipe[field] = Path(source.name).name
    recipe["controlnets"] = [
        Path(name).name if Path(name).is_absolute() else name for name in recipe["controlnets"]
    ]
    return recipe

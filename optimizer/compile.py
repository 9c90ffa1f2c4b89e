"""Model and recipe -> bundle: the whole pipeline, each stage wrapped by the store.

A stage's key is a digest of everything that goes into it, kiln's own code included, so the same
compile again finds all its stages, and a killed one goes on at the stage it was in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer import bundling
from optimizer.autoencoder import with_autoencoder
from optimizer.backends import backend
from optimizer.controlnet import with_controlnets
from optimizer.deciding import decided, matching_sensitivity
from optimizer.digests import digest
from optimizer.job import Job
from optimizer.known_models import remember, remember_bundle
from optimizer.plan import Plan, make_plan
from optimizer.quantize.sensitivity import SENSITIVITY_NAME, load_sensitivity
from optimizer.quantize.solvers import SOLVERS
from optimizer.recipe import Recipe
from optimizer.room import require_disk, require_memory
from optimizer.source import resolve
from optimizer.store import Store
from optimizer.tools import EXPORT, TORCH, require_libraries, versions
from optimizer.worker import run_stage, warm_stages
from profiles import hardware as facts
from profiles import profile as profiles
from profiles.errors import BuildError, DiskFullError
from profiles.hardware import Hardware
from runners.console import Console
from runners.control_tasks import CONTROL
from runners.manifest import Manifest, Picture
from runners.memory import Residency

__all__ = ["CompileResult", "analyze_model", "compile_bundle", "plan_recipe"]


@dataclass(frozen=True)
class CompileResult:
    """A bundle that is there now."""

    bundle: Path
    manifest: Manifest
    seconds: float
    reused: bool
    """The bundle was there already, made from the very same things."""


def plan_recipe(
    recipe: Recipe,
    sensitivity: Path | None = None,
    *,
    console: Console | None = None,
    always_hash: bool = False,
) -> tuple[Plan, Hardware]:
    """Everything decided and checked, from configs alone; nothing is built.

    With a file of `kiln analyze`, the policy of `--quant auto` is decided too. A hub model that
    isn't here is downloaded, which `console` shows. With `always_hash`, receipts of the model's
    files are ignored.
    """
    hardware = facts.detect()
    profile = profiles.load(recipe.profile or _profile_name(recipe, hardware))
    source = resolve(
        recipe.model,
        revision=recipe.revision,
        prediction_type=recipe.prediction_type,
        console=console,
        always_hash=always_hash,
    )
    if recipe.vae is not None:
        source = with_autoencoder(
            source,
            recipe.vae,
            revision=recipe.vae_revision,
            console=console,
            always_hash=always_hash,
        )
    source = with_controlnets(source, recipe.controlnets, console=console, always_hash=always_hash)
    plan = make_plan(recipe, source, profile=profile, hardware=hardware)
    if sensitivity is not None:
        plan = decided(plan, matching_sensitivity(sensitivity, plan)).plan
    return plan, hardware


def _profile_name(recipe: Recipe, hardware: Hardware) -> str:
    """That of the cards where it is built for cards, else what fits this machine."""
    if recipe.target or (recipe.backend and backend(recipe.backend).device == "gpu"):
        return _CARDS
    return profiles.match(hardware).name


_CARDS = "nvidia-rtx"
_TOOK = "seconds.txt"
"""Beside what a stage made: how long it took."""


def compile_bundle(
    recipe: Recipe,
    out: Path,
    *,
    console: Console,
    force: bool = False,
    sensitivity: Path | None = None,
    always_hash: bool = False,
) -> CompileResult:
    """Make the bundle that `recipe` asks for at `out`.

    A bundle made of the very same things that is there already is left alone; anything else at
    `out` is refused unless `force`. Raises what the stages raise: see profiles.errors.
    """
    start, where = time.monotonic(), out.absolute()  # "-o ." is replaced, and with it where we are
    plan, hardware = plan_recipe(recipe, sensitivity, console=console, always_hash=always_hash)
    formats = {scheme.format for job in plan.jobs for scheme in job.layers.values()}
    runs_graphs = {"onnxruntime"} if plan.source.kind == "onnx" else set()
    require_libraries({job.backend for job in plan.jobs} | runs_graphs, formats)
    remember(plan.source)
    stages = _Stages(plan, hardware, console, Store())
    key = stages.bundle_key
    if (there := bundling.same_bundle(out, key, force=force)) is not None:
        remember_bundle(where)
        return CompileResult(out, there, time.monotonic() - start, reused=True)
    bundling.check_target(out, force=force)
    require_disk(plan, out, stages.store.root)
    require_memory(plan, hardware)
    with stages.store.session(), warm_stages():
        manifest = _build(stages, plan, out)
    remember_bundle(where)
    return CompileResult(out, manifest, time.monotonic() - start, reused=False)


def _build(stages: _Stages, plan: Plan, out: Path) -> Manifest:
    """All stages in their order, each found in the store or made; what they use stays meanwhile."""
    key = stages.bundle_key
    stages.use_source()
    recorded = stages.record()
    observed = stages.observe(recorded)
    if plan.undecided:
        measured = stages.sensitivity(recorded, observed) / SENSITIVITY_NAME
        choice = decided(plan, load_sensitivity(measured))
        stages.console.info(f"Policy: {choice.solved.describe()}")
        plan = choice.plan
        stages = stages.of(plan)
    engines = {}
    controlled = stages.record_controls(recorded) if plan.source.controls else recorded
    for job in plan.jobs:
        runs = controlled if job.spec.role == "controlnet" else recorded
        prepared = stages.prepare(job, runs, observed)
        engines[job.name] = stages.engine(job, prepared, runs)
        if CONTROL in job.forms:
            stages.check_control(job, prepared, engines[job.name], controlled)
    speed = stages.speed(recorded, engines)

    made = bundling.Made(key, engines, speed, stages.hardware, stages.seconds)
    return bundling.assemble(plan, made, out, stages.draw)


def analyze_model(recipe: Recipe, *, console: Console) -> tuple[Plan, Path]:
    """Measure the sensitivities that `recipe` (quant auto) needs: the plan, and where they lie."""
    plan, hardware = plan_recipe(recipe, console=console)
    require_libraries(())
    remember(plan.source)
    stages = _Stages(plan, hardware, console, Store())
    with stages.store.session(), warm_stages():
        stages.use_source()
        recorded = stages.record()
        measured = stages.sensitivity(recorded, stages.observe(recorded))
    return plan, measured / SENSITIVITY_NAME


@dataclass(frozen=True)
class Observed:
    """Entries about the calibration runs; None where nothing needs them."""

    statistics: Path | None
    covariances: Path | None


_NAMES = {"model", "digest", "vae", "vae_digest", "controlnets", "controlnet_digests"}
"""Of a recipe: what the stages' keys say by files' digests."""


class _Stages:
    """The stages of one plan: a key, a title and a worker function each.

    Where another autoencoder takes the VAE's place, all that it can't change is found again.
    """

    def __init__(self, plan: Plan, hardware: Hardware, console: Console, store: Store) -> None:
        self._plan, self.hardware, self.console, self.store = plan, hardware, console, store
        self._took: dict[Path, float] = {}
        self._machine = hardware.cpu.model_dump(mode="json")
        self._vae = {"vae": plan.source.vae.digest} if plan.source.vae else {}
        self._controls = {
            name: control.digest
            for name, control in zip(plan.source.control_folders, plan.source.controls, strict=True)
        }
        self._runs = {
            "model": plan.source.digest,
            "calibration": asdict(plan.calibration),
            "size": plan.drawn_size,
            "scheduler": plan.drawn.scheduler,
            "tools": versions((*TORCH, "onnxruntime") if plan.source.kind == "onnx" else TORCH),
            **({} if plan.draws_from_text else self._vae),
        }

    @property
    def bundle_key(self) -> str:
        """The digest of everything that the bundle is made from."""
        jobs = {job.name: self._prepare_key(job) for job in self._plan.jobs}
        recipe = self._plan.recipe.model_dump(mode="json", exclude=_NAMES)
        backends = versions(sorted({backend(job.backend).library for job in self._plan.jobs}))
        return digest({"jobs": jobs, "recipe": recipe, "on": self._machine, "with": backends})

    @property
    def seconds(self) -> float:
        """What the stages so far took when they ran, which may have been before this compile."""
        return sum(self._took.values())

    def record(self) -> Path:
        """Held-out denoising runs in fp32."""
        key = {**self._runs, **self._vae, "what": "held-out"}
        return self._run("record", "Record fp32 runs", key, "optimizer.record:record", ())

    def record_controls(self, recorded: Path) -> Path:
        """Calls of the control networks, and of the denoiser with what they give."""
        key = {**self._runs, **self._vae, "what": "controls", "controls": self._controls}
        target = "optimizer.controlling:record_controls"
        return self._run("record", "Record control networks", key, target, (recorded,))

    def of(self, plan: Plan) -> _Stages:
        """The stages of another plan of the same model on the same machine."""
        stages = _Stages(plan, self.hardware, self.console, self.store)
        stages._took = self._took
        return stages

    def use_source(self) -> None:
        """Keep a converted model in the store for the session; raises where it just went."""
        if not self.store.use(self._plan.source.folder):
            raise BuildError(
                "The converted model left the cache while it was planned: compile again."
            )

    def observe(self, recorded: Path) -> Observed:
        """What policies and solvers need to know of the calibration runs."""
        jobs = [job for job in self._plan.jobs if job.layers]
        needs = {SOLVERS[job.policy.solver].needs for job in jobs}
        if not any(job.policy.calibrates for job in jobs) and needs <= {"nothing"}:
            return Observed(None, None)
        return Observed(
            self._observation("statistics", "Calibrate", recorded),
            self._observation("covariances", "Collect covariances", recorded)
            if "covariance" in needs
            else None,
        )

    def _observation(self, kind: str, title: str, recorded: Path) -> Path:
        key = {**self._runs, "what": kind}
        with self.store.partial(key) as partial:
            target = f"optimizer.record:record_{kind}"
            return self._run(kind, title, key, target, (recorded, partial))

    def sensitivity(self, recorded: Path, observed: Observed) -> Path:
        """What each layer loses under each scheme."""
        job = self._plan.denoiser
        key = {
            **self._runs,
            "what": "sensitivity",
            "solver": job.policy.solver,
            "candidates": [scheme.model_dump(mode="json") for scheme in job.candidates],
        }
        with self.store.partial(key) as partial:
            return self._run(
                "sensitivity",
                "Measure sensitivities",
                key,
                "optimizer.quantize.measuring:measure",
                (job, recorded, observed.statistics, observed.covariances, partial),
            )

    def prepare(self, job: Job, recorded: Path, observed: Observed) -> Path:
        """One component quantized and exported."""
        work = "Read" if self._plan.source.kind == "onnx" else "Export"
        title = f"{'Quantize and export' if job.layers else work} {job.name}"
        given = (observed.statistics, observed.covariances) if job.layers else (None, None)
        arguments = (job, recorded, *given)
        key = self._prepare_key(job)
        return self._run("prepared", title, key, "optimizer.prepare:prepare", arguments)

    def engine(self, job: Job, prepared: Path, recorded: Path) -> Path:
        """One component built and checked."""
        library = backend(job.backend).library
        key = {
            **self._prepare_key(job),
            "backend": job.backend,
            "dtype": job.dtype,
            "for": [*job.capabilities, job.weight_streaming],
            "on": self._machine,
            "with": versions([library]),
        }
        title = f"Build and check {job.name}"
        function = "optimizer.check:build_and_check"
        return self._run("engine", title, key, function, (job, prepared, recorded), planned=False)

    def check_control(self, job: Job, prepared: Path, engine: Path, controlled: Path) -> Path:
        """The denoiser's engine, seen to take control networks' residuals as it should."""
        key = {"what": "control", "engine": engine.name, "runs": controlled.name}
        title, target = "Check control networks", "optimizer.control_form:check_control"
        arguments = (job, prepared, engine, controlled)
        return self._run("control", title, key, target, arguments, planned=False)

    def speed(self, recorded: Path, engines: Mapping[str, Path]) -> Path | None:
        """One denoising step, timed against eager fp32; None where one of both can't run here."""
        if self._plan.source.kind == "onnx":
            return None
        job = self._plan.denoiser
        engine = engines[job.spec.name]
        if not json.loads((engine / "built.json").read_text("utf-8"))["ran"]:
            return None
        key = {**self._runs, "engine": engine.name, "on": self._machine}
        arguments = (job, recorded, engine)
        target = "optimizer.measure:measure_step"
        return self._run("speed", "Measure a step", key, target, arguments, timed=True)

    def draw(self, folder: Path, manifest: Manifest, wanted: Picture, residency: Residency) -> Path:
        """The file of the picture that the bundle in `folder` draws."""
        libraries = sorted({backend(job.backend).library for job in self._plan.jobs})
        key = {
            "what": "picture",
            "files": {name: entry.sha256 for name, entry in manifest.files.items()},
            "wanted": wanted.model_dump(mode="json"),
            "residency": residency,
            "on": self._machine,
            "with": versions((*TORCH, *libraries)),
        }
        title = f"Draw the self-test's picture, {residency}"
        arguments = (folder, wanted, residency)
        target = "optimizer.picture:draw_picture"
        made = self._run("picture", title, key, target, arguments, planned=False)
        return made / wanted.file

    def _prepare_key(self, job: Job) -> dict[str, Any]:
        form = backend(job.backend).form
        return {
            **self._runs,
            **(self._vae if job.spec.role.startswith("vae") else {}),
            **({"controls": self._controls} if job.spec.role == "controlnet" else {}),
            "component": job.spec.name,
            "policy": job.policy.model_dump(mode="json"),
            "signature": job.signature.model_dump(mode="json"),
            "form": form,
            "forms": job.forms,
            "stored": job.dtype if form == "torch" else "fp32",
            "tools": versions(EXPORT if form == "onnx" else TORCH),
        }

    def _run(
        self,
        kind: str,
        title: str,
        key: Mapping[str, Any],
        target: str,
        arguments: tuple[Any, ...],
        *,
        planned: bool = True,
        timed: bool = False,
    ) -> Path:
        """The entry of `key`, made by `target` in a process of its own where it isn't there yet.

        What is `planned` runs the model in torch; what is `timed`, as users' own processes run it.
        """
        if (found := self.store.find(kind, key, verify=True)) is not None:
            self.console.detail(f"{title}: found in the cache")
            self._took[found] = float((found / _TOOK).read_text("utf-8"))
            return found
        with self.console.stage(title) as stage, self.store.create(kind, key) as folder:
            first, start = (self._plan,) if planned else (), time.monotonic()
            given = (*first, *arguments, folder)
            warm = planned and not timed
            printed = run_stage(target, given, progress=stage.progress, warm=warm)
            (folder / _TOOK).write_text(f"{time.monotonic() - start:.1f}", "utf-8")
        self.console.detail(printed.rstrip())
        made = self.store.find(kind, key)
        if made is None:
            raise DiskFullError(
                f"The cache lost what {title!r} made: is another program clearing it?"
            )
        self._took[made] = float((made / _TOOK).read_text("utf-8"))
        return made

"""A bundle -> the diffusers pipeline of a task, whose heavy modules are engines."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers

from profiles.errors import BundleError, SpecError, UnsupportedError
from runners.adapters import TextEncoderAdapter, VaeAdapter
from runners.bundle import Bundle
from runners.control_adapters import ControlNetAdapter
from runners.control_tasks import CONTROL, CONTROL_TASKS
from runners.denoisers import DENOISERS
from runners.engines import engine_class
from runners.engines.base import Engine
from runners.lora_adapters import offer_lora
from runners.manifest import ComponentEntry, Manifest
from runners.memory import Residency
from runners.prompting import PromptCache
from runners.residency import OpenEngines
from runners.selftest import require_selftest

__all__ = [
    "TASKS",
    "LoadedBundle",
    "adapter_of",
    "load",
    "open_engine",
    "pipeline_of",
    "tokenizer_in",
]

TASKS: dict[str, dict[str, str]] = {
    "FluxFillPipeline": {"inpaint": "FluxFillPipeline"},
    "FluxPipeline": {
        "text-to-image": "FluxPipeline",
        "img2img": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
    },
    "LatentConsistencyModelPipeline": {
        "text-to-image": "LatentConsistencyModelPipeline",
        "img2img": "LatentConsistencyModelImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "StableDiffusion3Pipeline": {
        "text-to-image": "StableDiffusion3Pipeline",
        "img2img": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
    },
    "StableDiffusionInpaintPipeline": {"inpaint": "StableDiffusionInpaintPipeline"},
    "StableDiffusionPipeline": {
        "text-to-image": "StableDiffusionPipeline",
        "img2img": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "StableDiffusionXLImg2ImgPipeline": {
        "img2img": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    "StableDiffusionXLInpaintPipeline": {"inpaint": "StableDiffusionXLInpaintPipeline"},
    "StableDiffusionXLPipeline": {
        "text-to-image": "StableDiffusionXLPipeline",
        "img2img": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
}
"""The manifest's pipeline class -> task -> diffusers' class of that task."""


class LoadedBundle:
    """What `pipe.kiln` is: the bundle, its engines, and their release."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        *,
        variant: str | None = None,
        residency: Residency = "keep",
    ) -> None:
        """Open nothing yet; engines open when first called.

        `variant` is the denoiser's (default: the best). Raises SpecError for one that isn't there.
        """
        self.bundle, self.threads = bundle, threads
        self.prompts = PromptCache()
        self._denoiser = bundle.manifest.denoiser(variant)
        self._open = OpenEngines(
            self._made, residency=residency, checked=self._checked, released=self._let_go
        )
        self.loras: Any = None
        """The pipeline's LoRAs (runners.lora_adapters)."""

    @property
    def manifest(self) -> Any:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def encoders(self) -> tuple[str, ...]:
        """The digests of the text encoders' files."""
        manifest = self.bundle.manifest
        used = [entry.files for entry in manifest.components if entry.role == "text_encoder"]
        return tuple(manifest.files[name].sha256 for files in used for name in files.values())

    @property
    def variant(self) -> str:
        """The denoiser's level."""
        return self._denoiser.quant

    @property
    def residency(self) -> Residency:
        """Whether engines stay open, or those of one stage at a time."""
        return self._open.residency

    def use(self, *, variant: str | None = None, residency: Residency | None = None) -> None:
        """Run another variant of the denoiser, or hold engines otherwise; what is open is closed.

        Raises SpecError for a variant that isn't there.
        """
        denoiser = self._denoiser if variant is None else self.manifest.denoiser(variant)
        self.close()
        self._denoiser = denoiser
        self._open.residency = residency or self._open.residency

    def engine(self, name: str, form: str = "") -> Engine:
        """The open engine of the component called `name`, opened at the first call.

        `form` is one of its entry's forms, "" the plain engine; the one before is released, so that
        a component's weights are in memory once. UnsupportedError where it has no such form.
        """
        entry: ComponentEntry = self.manifest.named(name)
        entry = self._denoiser if entry.role == "denoiser" else entry
        if form and form not in entry.forms:
            raise UnsupportedError(_no_form(entry, form))
        return self._open.open(entry, form)

    def close(self) -> None:
        """Release all engines, and their memory."""
        self._open.close()

    def _made(self, entry: ComponentEntry, form: str) -> Engine:
        return open_engine(self.bundle, entry, form=form, threads=self.threads)

    def _checked(self, entry: ComponentEntry, engine: Engine) -> None:
        if not entry.ran:
            require_selftest(self.bundle, entry, engine, engine.machine())

    def _let_go(self) -> None:
        """Verified bytes too: they are read and hashed again when an engine opens again."""
        if self.residency == "sequential":
            self.bundle.release()


def open_engine(bundle: Bundle, entry: ComponentEntry, *, form: str = "", threads: int) -> Engine:
    """The engine of a component, or a form of it, from verified bytes; not yet open."""
    made = entry.forms[form] if form else entry
    files = {role: bundle.file(name) for role, name in made.files.items()}
    return engine_class(entry.backend)(
        files, signature=made.signature, properties=made.properties, threads=threads
    )


def _no_form(entry: ComponentEntry, form: str) -> str:
    return (
        f"The {entry.backend} engine of {entry.name} was compiled without inputs for "
        f"{form.replace('+', ' and ')}: compile the model again with them (README, LoRA)."
    )


def load(
    opened: Bundle,
    *,
    task: str = "text-to-image",
    threads: int | None = None,
    variant: str | None = None,
    residency: Residency = "keep",
    controlnets: Sequence[str] | None = None,
) -> Any:
    """The diffusers pipeline of `task`, running on the engines of a verified bundle.

    `runners.load` opens it, and asks whether it fits this machine. `controlnets` are the control
    networks that a task with control images has (default: all). Raises BundleError for a
    pipeline that isn't known here, SpecError for an unknown task, variant or network.
    """
    tasks = _tasks_of(opened.manifest)
    if tasks is None:
        raise BundleError(
            f"{opened.path} names the pipeline {opened.manifest.model.pipeline_class}; this kiln "
            f"runs {', '.join(TASKS)}."
        )
    if task not in tasks:
        needs = "" if "text-to-image" in tasks else "; the model changes pictures: give it --image"
        raise SpecError(f"The task {task} is not known here: use one of {', '.join(tasks)}{needs}.")
    count = threads or psutil.cpu_count(logical=False) or 1
    loaded = LoadedBundle(opened, count, variant=variant, residency=residency)
    controls = _controls_of(opened.manifest, controlnets) if task.startswith(CONTROL) else ()
    pipeline = _assembled(getattr(diffusers, tasks[task]), loaded, controls)
    pipeline.kiln = loaded
    offer_lora(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if opened.manifest.on_card:
        _choose_card(opened)
        pipeline.to("cuda")
    return pipeline


def _tasks_of(manifest: Manifest) -> dict[str, str] | None:
    """Task -> diffusers' class; None for a pipeline that isn't known here."""
    name = manifest.model.pipeline_class
    controlled = CONTROL_TASKS.get(name, {}) if _networks(manifest) else {}
    return None if name not in TASKS else {**TASKS[name], **controlled}


def _networks(manifest: Manifest) -> tuple[str, ...]:
    return tuple(entry.name for entry in manifest.components if entry.role == "controlnet")


def _controls_of(manifest: Manifest, asked: Sequence[str] | None) -> tuple[str, ...]:
    there = _networks(manifest)
    if absent := [name for name in asked or () if name not in there]:
        raise SpecError(
            f"The bundle has no control network {absent[0]}: use one of {', '.join(there)}."
        )
    return tuple(asked or there)


def _choose_card(bundle: Bundle) -> None:
    """Make the largest card that the engines run on the current one."""
    wanted = [entry.requires.capabilities for entry in bundle.manifest.components]
    fitting = {
        index: torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
        if all(
            not names or ".".join(map(str, torch.cuda.get_device_capability(index))) in names
            for names in wanted
        )
    }
    if fitting:
        torch.cuda.set_device(max(fitting, key=lambda index: fitting[index]))


def _assembled(cls: Any, loaded: LoadedBundle, controls: tuple[str, ...]) -> Any:
    bundle = loaded.bundle
    parts: dict[str, Any] = {"scheduler": _scheduler(bundle)}
    for name in sorted({path.split("/")[0] for path in bundle.manifest.files}):
        if name.startswith("tokenizer"):
            with bundle.folder(name) as folder:
                parts[name] = tokenizer_in(folder)
    for entry in bundle.manifest.components:
        if not entry.role.startswith(("vae", "controlnet")):
            config, engine = bundle.json(entry.config), partial(loaded.engine, entry.name)
            parts[entry.name] = adapter_of(entry.role, entry.wrapper)(config, engine)
    if controls:
        nets = [
            ControlNetAdapter(
                bundle.json(bundle.manifest.named(name).config), partial(loaded.engine, name)
            )
            for name in controls
        ]
        parts["controlnet"] = nets[0] if len(nets) == 1 else nets
    parts["vae"] = VaeAdapter(
        bundle.json(bundle.manifest.component("vae_decoder").config),
        encoder=partial(loaded.engine, "vae_encoder"),
        decoder=partial(loaded.engine, "vae_decoder"),
        tile_side=bundle.manifest.native_size,
        seamless=bundle.manifest.seamless,
    )
    return pipeline_of(cls, parts, bundle.manifest.model.settings)


def adapter_of(role: str, wrapper: str) -> Any:
    """What stands for a text encoder or denoiser of this wrapper."""
    return DENOISERS[wrapper] if role == "denoiser" else TextEncoderAdapter


def pipeline_of(cls: Any, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """diffusers' pipeline of these parts; None for those that it takes and aren't there.

    Never with a safety checker: no engine runs one.
    """
    given = {**settings, **parts, "requires_safety_checker": False}
    taken = {
        name: given.get(name)
        for name, parameter in inspect.signature(cls).parameters.items()
        if name in given or parameter.default is inspect.Parameter.empty
    }
    with torch.no_grad():
        return cls(**taken)


_TOKENIZERS = ("CLIPTokenizer", "T5Tokenizer")
"""The classes that a tokenizer's config may name, with "Fast" or without."""


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder; BundleError where its class isn't known."""
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    name = str(document.get("tokenizer_class", "CLIPTokenizer")).removesuffix("Fast")
    if name not in _TOKENIZERS:
        raise BundleError(f"{folder.name} names the tokenizer {name}, which isn't known here.")
    return getattr(transformers, name).from_pretrained(folder)


def _scheduler(bundle: Bundle) -> Any:
    config = bundle.json("scheduler/scheduler_config.json")
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise BundleError(f"The bundle names the scheduler {name}, which diffusers doesn't have.")
    return cls.from_config(config)  # type: ignore[attr-defined]

"""A bundle -> the diffusers pipeline of a task, whose heavy modules are engines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers

from profiles.errors import BundleError, SpecError
from runners.adapters import DenoiserAdapter, TextEncoderAdapter, VaeAdapter
from runners.bundle import Bundle, open_bundle
from runners.engines import engine_class
from runners.engines.base import Engine
from runners.manifest import ComponentEntry
from runners.selftest import require_selftest

__all__ = ["TASKS", "LoadedBundle", "load", "open_engine"]

TASKS: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": {
        "text-to-image": "StableDiffusionPipeline",
        "img2img": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
}
"""The manifest's pipeline class -> task -> diffusers' class of that task."""


class LoadedBundle:
    """What `pipe.kiln` is: the bundle, its engines, and their release."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Open nothing yet; engines open when first called."""
        self.bundle, self.threads = bundle, threads
        self._stack = ExitStack()
        self._engines: dict[str, Engine] = {}

    @property
    def manifest(self) -> Any:
        """The bundle's manifest."""
        return self.bundle.manifest

    def engine(self, role: str) -> Engine:
        """The open engine of the component in `role`, opened at the first call."""
        if role not in self._engines:
            entry = self.bundle.manifest.component(role)
            engine = self._stack.enter_context(
                open_engine(self.bundle, entry, threads=self.threads)
            )
            if not entry.ran:
                require_selftest(self.bundle, entry, engine, engine.machine())
            self._engines[role] = engine
        return self._engines[role]

    def close(self) -> None:
        """Release all engines."""
        self._engines.clear()
        self._stack.close()


def open_engine(bundle: Bundle, entry: ComponentEntry, *, threads: int) -> Engine:
    """The engine of a component, from verified bytes; not yet open."""
    files = {role: bundle.file(name) for role, name in entry.files.items()}
    return engine_class(entry.backend)(
        files, signature=entry.signature, properties=entry.properties, threads=threads
    )


def load(bundle: str | Path, *, task: str = "text-to-image", threads: int | None = None) -> Any:
    """The diffusers pipeline of `task`, running on the engines of `bundle`.

    `threads` is the number of CPU threads (default: the physical cores). The pipeline is the
    plain diffusers class; `pipe.kiln` is the loaded bundle. Raises BundleError when a byte is
    wrong, SpecError for a path that is no bundle or an unknown task.
    """
    opened = open_bundle(bundle)
    tasks = TASKS.get(opened.manifest.model.pipeline_class)
    if tasks is None:
        raise BundleError(
            f"{bundle} names the pipeline {opened.manifest.model.pipeline_class}; this kiln runs "
            f"{', '.join(TASKS)}."
        )
    if task not in tasks:
        raise SpecError(f"The task {task} is not known here: use one of {', '.join(tasks)}.")
    count = threads or psutil.cpu_count(logical=False) or 1
    loaded = LoadedBundle(opened, count)
    pipeline = _assembled(getattr(diffusers, tasks[task]), loaded)
    pipeline.kiln = loaded
    pipeline.set_progress_bar_config(disable=True)
    if any(entry.capabilities is not None for entry in opened.manifest.components):
        _require_card(opened)
        pipeline.to("cuda")
    return pipeline


def _require_card(bundle: Bundle) -> None:
    """Raise DeviceMismatch before anything is loaded where an engine's card isn't here."""
    for entry in bundle.manifest.components:
        engine_class(entry.backend).require_here(entry.properties)


def _assembled(cls: Any, loaded: LoadedBundle) -> Any:
    bundle = loaded.bundle

    def config(role: str) -> dict[str, Any]:
        return bundle.json(bundle.manifest.component(role).config)

    def engine(role: str) -> Callable[[], Engine]:
        return lambda: loaded.engine(role)

    with bundle.folder("tokenizer") as folder:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    parts = {
        "tokenizer": tokenizer,
        "scheduler": _scheduler(bundle),
        "text_encoder": TextEncoderAdapter(config("text_encoder"), engine("text_encoder")),
        "unet": DenoiserAdapter(config("denoiser"), engine("denoiser")),
        "vae": VaeAdapter(
            config("vae_decoder"), encoder=engine("vae_encoder"), decoder=engine("vae_decoder")
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    accepted = inspect.signature(cls.__init__).parameters
    with torch.no_grad():
        return cls(**{name: part for name, part in parts.items() if name in accepted})


def _scheduler(bundle: Bundle) -> Any:
    config = bundle.json("scheduler/scheduler_config.json")
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise BundleError(f"The bundle names the scheduler {name}, which diffusers doesn't have.")
    return cls.from_config(config)  # type: ignore[attr-defined]

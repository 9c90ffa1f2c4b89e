"""One tiny model, one store and its bundles for the whole session; the command line in-process."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # who spins takes the other one's core

from optimizer.backends import BACKENDS
from tests.tiny_pipelines import tiny_sd, tiny_taesd

SETTINGS: dict[str, object] = {
    "steps": 4,
    "size_min": 32,
    "size_max": 128,
    "batch": 2,
    "tiles": False,
}
"""What all bundles of the tests are compiled for; the tiny model's native size is 64."""


HERE = tuple(name for name, one in BACKENDS.items() if one.device == "cpu" and not one.compiler)
"""Backends whose engines every machine runs. Those that compile C++ take minutes a bundle: they
have tests of their own, in test_aoti.py, and long ones in test_aoti_bundles.py."""


LONG = (
    "test_readme.py",
    "test_families.py",
    "test_tensorrt.py",
    "test_control.py",
    "test_lora.py",
    "test_engines.py",
    "test_compile.py",
    "test_few_step.py",
    "test_variants.py",
    "test_workflows.py",
    "test_compare.py",
    "test_onnx_source.py",
)
"""Files of minutes each. Two processes share the tests by files (pyproject.toml): with the longest
first, neither is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the rest in its order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line of stderr, which is the error where there is one."""
        return (self.err.strip().splitlines() or [""])[-1]


Kiln = Callable[..., Ended]
MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's store, never the user's; KILN_TEST_CACHE keeps one between runs.

    Processes that share the tests (pytest-xdist) share it: what one has made the other finds.
    """
    kept = os.environ.get("KILN_TEST_CACHE")
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent / "store" if shared else None
    root = Path(kept) if kept else base or tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_CACHE", str(root))
        yield root


@pytest.fixture(scope="session", autouse=True)
def config_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's config folder, never the user's, shared as the store is."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent / "config" if shared else None
    root = base or tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_CONFIG", str(root))
        yield root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion folder; not to be changed."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny that fits it; not to be changed."""
    return tiny_taesd(tmp_path_factory.mktemp("autoencoders") / "taesd")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> MakeBundle:
    """`bundle(backend, quant="none", dtype="fp32", target=None)`: the tiny model, once a session.

    `model` is another one than `tiny_model`, `vae` an autoencoder in its VAE's place, `controlnets`
    are beside it; `lora` says whether its engines take LoRAs, `tiles` whether its VAE has seamless
    tiles. Not to be changed: copy it first.
    """
    folder = tmp_path_factory.mktemp("bundles")

    def make(
        backend: str,
        quant: str = "none",
        dtype: str = "fp32",
        target: str | None = None,
        model: Path | None = None,
        vae: Path | None = None,
        controlnets: tuple[Path, ...] = (),
        *,
        lora: bool = False,
        tiles: bool = False,
    ) -> Path:
        from optimizer.compile import compile_bundle
        from optimizer.recipe import Recipe
        from runners.console import Console

        name = f"{(model or tiny_model).name}-{vae.name if vae else ''}"
        name = "-".join([name, *(path.name for path in controlnets)])
        out = (
            folder / f"{name}-{backend}-{quant}-{dtype}-{target}{'-lora' * lora}{'-tiles' * tiles}"
        )
        if not out.exists():
            recipe = Recipe.model_validate(
                {
                    "model": str(model or tiny_model),
                    "vae": None if vae is None else str(vae),
                    "controlnets": tuple(map(str, controlnets)),
                    "backend": backend,
                    "quant": quant.split(",")[0],
                    "variants": quant.split(",")[1:],
                    "dtype": dtype,
                    "target": target,
                    "lora": lora,
                    **SETTINGS,
                    "tiles": tiles,
                }
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("optimizer.compile.run_stage", _run_here)
                patch.setattr("optimizer.measure._ROUNDS", (1, 1))  # no test looks at times
                compile_bundle(recipe, out, console=Console())
        return out

    return make


@cache
def _forget_libraries() -> None:
    """Let collections, which measuring memory asks for, pass over what the libraries hold: they are
    half a second each with it. A worker's process holds none of it when it measures.
    """
    import diffusers  # noqa: F401
    import torch.onnx  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()


def _run_here(target: str, arguments: tuple[Any, ...], *, progress: Any, **_how: Any) -> str:
    """A stage in this process, which has imported the libraries already: six seconds less each.

    Stages in processes of their own are tested in test_worker.py and test_compile.py.
    """
    from inspect import signature

    module, name = target.split(":")
    stage = getattr(import_module(module), name)
    _forget_libraries()
    more = (progress,) if "progress" in signature(stage).parameters else ()
    logging.disable()  # as in a worker, what exporters say isn't kept; torch traces every step
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stage(*arguments, *more)
    finally:
        logging.disable(logging.NOTSET)
    if target == "optimizer.picture:draw_picture" and "sequential" in arguments:
        from optimizer.memory_entries import PEAK_NAME

        # this process drew the other one too, and its peak tells nothing of the second
        (arguments[-1] / PEAK_NAME).write_text('{"peak_rss_bytes": 0}', "utf-8")
    return ""


@pytest.fixture
def kiln(capsys: pytest.CaptureFixture[str]) -> Kiln:
    """Run a command line in this process; no command may ever show a traceback."""

    def run(*arguments: object) -> Ended:
        from runners.cli import main

        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        ended = Ended(code, *capsys.readouterr())
        assert "Traceback" not in ended.err
        return ended

    return run


@pytest.fixture
def has_bf16() -> bool:
    """Whether this processor computes bf16 products."""
    from profiles.hardware import detect

    return detect().cpu.has_bf16

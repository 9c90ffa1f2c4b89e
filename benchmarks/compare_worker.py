"""One contestant of `kiln compare` in a process of its own: `python -m benchmarks.compare_worker`.

Reads a JSON request a line from stdin and answers each with a JSON line on stdout, so that every
contestant has its own peak memory and runs when it is asked and at no other time. Pictures and
denoiser calls pass through files. Whatever a library prints goes to stderr.

    {"op": "load", "kind": a contestant's, "path", "threads"}
    {"op": "image", "prompt", "seed", "steps", "guidance", "path"}    -> seconds
    {"op": "record", "prompt", "seed", "steps", "guidance", "folder"} -> calls
    {"op": "replay", "folder"}                                        -> signal, noise, per call
    {"op": "trajectory", "prompt", "seed", "steps", "guidance", "path"} -> steps
    {"op": "peak"}                                                    -> peak_rss_bytes
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from benchmarks.baselines import speed_up
from profiles.errors import KilnError

__all__ = ["Session", "main", "peak_rss_bytes"]

Request = dict[str, Any]
Reply = dict[str, Any]

_CALL = "{:05d}.safetensors"


class Session:
    """The pipeline of one contestant and the requests that it answers."""

    def __init__(self) -> None:
        """Nothing is loaded before the first request."""
        self._pipe: Any = None

    def answer(self, request: Request) -> Reply:
        """Do what `request["op"]` names; KeyError for an op that isn't one."""
        operations = {
            "load": self._load,
            "image": self._image,
            "record": self._record,
            "replay": self._replay,
            "trajectory": self._trajectory,
            "peak": self._peak,
        }
        return operations[request["op"]](request)

    def _load(self, request: Request) -> Reply:
        import torch

        torch.set_num_threads(request["threads"])
        start = time.perf_counter()
        self._pipe = _load(request["kind"], request["path"], request["threads"])
        seconds = time.perf_counter() - start
        self._pipe.set_progress_bar_config(disable=True)
        call = inspect.signature(type(self._pipe).__call__).parameters
        return {
            "load_seconds": seconds,
            "steps": call["num_inference_steps"].default,
            "guidance": call["guidance_scale"].default,
        }

    def _image(self, request: Request) -> Reply:
        """Make and save one picture; the time is the pipeline's own, without the PNG."""
        start = time.perf_counter()
        picture = self._run(request)
        seconds = time.perf_counter() - start
        path = Path(request["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        picture.save(temporary, format="PNG")
        temporary.replace(path)
        return {"seconds": seconds}

    def _record(self, request: Request) -> Reply:
        """Save every denoiser call of one picture: the inputs, and the output before guidance."""
        folder = Path(request["folder"])
        folder.mkdir(parents=True)
        calls = 0

        def keep(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal calls
            _save_call(folder / _CALL.format(calls), {"args": list(args), "kwargs": kwargs}, output)
            calls += 1

        handle = self._denoiser.register_forward_hook(keep, with_kwargs=True)
        try:
            self._run(request)
        finally:
            handle.remove()
        return {"calls": calls}

    def _replay(self, request: Request) -> Reply:
        """Give the denoiser the recorded inputs; sums of squares of reference and error a call."""
        import torch

        sums: dict[str, list[float]] = {"signal": [], "noise": []}
        for path in sorted(Path(request["folder"]).glob("*.safetensors")):
            inputs, expected = _load_call(path)
            with torch.no_grad():
                output = _first(self._denoiser(*inputs["args"], **inputs["kwargs"]))
            error = output.double() - expected.double()
            sums["signal"].append(float(expected.double().square().sum()))
            sums["noise"].append(float(error.square().sum()))
        return {**sums}

    def _trajectory(self, request: Request) -> Reply:
        """Save the latents after every step of one freely running picture: [steps, values]."""
        import torch
        from safetensors.torch import save_file

        found: list[Any] = []

        def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            found.append(values["latents"].detach().float().flatten().clone())
            return values

        self._run(request, callback_on_step_end=keep)
        save_file({"latents": torch.stack(found)}, request["path"])
        return {"steps": len(found)}

    def _peak(self, _request: Request) -> Reply:
        return {"peak_rss_bytes": peak_rss_bytes()}

    def _run(self, request: Request, **options: Any) -> Any:
        import torch

        result = self._pipe(
            request["prompt"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            generator=torch.Generator("cpu").manual_seed(request["seed"]),
            **options,
        )
        return result.images[0]

    @property
    def _denoiser(self) -> Any:
        return _denoiser_of(self._pipe)


def peak_rss_bytes() -> int | None:
    """The most memory that this process ever held, mapped files included; None where unknown.

    On Linux from VmHWM: `ru_maxrss` there starts at the parent's value, carried over by vfork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if peak is not None:
        return int(peak)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def _load(kind: str, path: str, threads: int) -> Any:
    """The pipeline of a contestant of this kind."""
    if kind == "bundle":
        import runners

        return runners.load(path, threads=threads)
    pipe = _load_diffusers(path)
    if kind != "diffusers":
        speed_up(_denoiser_of(pipe), kind)  # type: ignore[arg-type]
    return pipe


def _load_diffusers(path: str) -> Any:
    """The plain pipeline: float32, eager, on the CPU; no safety checker, as bundles have none."""
    import torch
    from diffusers import DiffusionPipeline

    index = json.loads(Path(path, "model_index.json").read_text(encoding="utf-8"))
    without = {"safety_checker": None} if index.get("safety_checker", [None])[0] else {}
    return DiffusionPipeline.from_pretrained(
        path,
        dtype=torch.float32,
        variant=_variant(Path(path)),
        local_files_only=True,
        **without,
    )


def _denoiser_of(pipe: Any) -> Any:
    unet = getattr(pipe, "unet", None)
    return pipe.transformer if unet is None else unet


def _variant(folder: Path) -> str | None:
    """Return "fp16" where some component of the folder has weights of that variant alone."""
    for component in folder.iterdir():
        names = [path.name for path in component.glob("*.safetensors")]
        if names and all(".fp16." in name for name in names):
            return "fp16"
    return None


def _save_call(path: Path, inputs: dict[str, Any], output: Any) -> None:
    from safetensors.torch import save_file

    tensors = {"output": _first(output).detach().clone().contiguous()}
    structure = json.dumps(_flatten(inputs, tensors))
    save_file(tensors, path, metadata={"inputs": structure})


def _load_call(path: Path) -> tuple[dict[str, Any], Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["inputs"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _unflatten(structure, tensors), tensors["output"]


def _flatten(value: Any, tensors: dict[str, Any]) -> Any:
    """Move the tensors of nested lists and dicts into `tensors`; what remains is JSON."""
    import torch

    if isinstance(value, torch.Tensor):
        name = f"input{len(tensors):03d}"
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, tensors) for item in value]}
    return {"value": value}


def _unflatten(structure: Any, tensors: dict[str, Any]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content.items()}
    if kind == "list":
        return [_unflatten(item, tensors) for item in content]
    return content


def _first(output: Any) -> Any:
    """The sample, whether the denoiser returned a tuple or diffusers' output object."""
    return output[0]


def _failure(error: Exception) -> Reply:
    """What the parent raises: our own errors by name and sentence, others with their traceback."""
    if isinstance(error, KilnError):
        return {"error": str(error), "kind": type(error).__name__}
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return {"error": str(error), "kind": "DiskFullError"}
    if isinstance(error, MemoryError):
        return {"error": "there isn't enough memory for it", "kind": "OutOfMemory"}
    return {
        "error": f"{type(error).__name__}: {error}",
        "kind": "BuildError",
        "log": traceback.format_exc(),
    }


def _private_stdout() -> TextIO:
    """The pipe to the parent under a descriptor of its own; descriptor 1 becomes stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return replies


def main() -> int:
    """Answer requests until stdin ends; the parent alone decides what Ctrl-C means."""
    from runners.console import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = _private_stdout()
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    quiet_libraries()
    session = Session()
    for line in sys.stdin:
        try:
            reply = session.answer(json.loads(line))
        except Exception as error:
            reply = _failure(error)
        print(json.dumps(reply), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

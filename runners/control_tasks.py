"""Tasks of pipelines that take control images, and the names of what carries them; no torch."""

from __future__ import annotations

__all__ = ["CONTROL", "CONTROL_TASKS", "control_task", "controlnet_names", "plain_task"]

CONTROL = "control"
"""The form of a denoiser that takes residuals, and the first word of the tasks that need it."""

_SD1 = {
    "control": "StableDiffusionControlNetPipeline",
    "control-img2img": "StableDiffusionControlNetImg2ImgPipeline",
    "control-inpaint": "StableDiffusionControlNetInpaintPipeline",
}
_SDXL = {
    "control": "StableDiffusionXLControlNetPipeline",
    "control-img2img": "StableDiffusionXLControlNetImg2ImgPipeline",
    "control-inpaint": "StableDiffusionXLControlNetInpaintPipeline",
}

CONTROL_TASKS: dict[str, dict[str, str]] = {
    "StableDiffusionInpaintPipeline": {"control-inpaint": _SD1["control-inpaint"]},
    "StableDiffusionPipeline": _SD1,
    "StableDiffusionXLPipeline": _SDXL,
}
"""The manifest's pipeline class -> task -> diffusers' class of that task, where the bundle has
control networks."""


def control_task(task: str) -> str:
    """The task with control images that `task` becomes: text-to-image is the plain one."""
    return CONTROL if task == "text-to-image" else f"{CONTROL}-{task}"


def plain_task(task: str) -> str:
    """What `task` is without control images."""
    return "text-to-image" if task == CONTROL else task.removeprefix(f"{CONTROL}-")


def controlnet_names(count: int) -> tuple[str, ...]:
    """What a bundle calls so many control networks: controlnet, controlnet_2, and so on."""
    return tuple("controlnet" if i == 1 else f"controlnet_{i}" for i in range(1, count + 1))

"""What a picture says of itself in PNG text: A1111's `parameters`, and our own JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["parameters_text", "read_metadata", "save_picture"]


def parameters_text(facts: dict[str, Any]) -> str:
    """The lines that A1111 writes and other tools read: prompt, negative prompt, then settings."""
    settings = {
        "Steps": facts["steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": facts["guidance"],
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Denoising strength": facts.get("strength"),
        "Clip skip": facts.get("clip_skip"),
        **_controls(facts.get("controls", ())),
        "Lora hashes": ", ".join(f"{x['name']}: {x['sha256'][:12]}" for x in facts.get("loras", []))
        or None,
        "Model hash": facts["model_digest"][:10],
        "Model": facts["model"],
        "Version": f"kiln {facts['kiln']}",
    }
    loras = facts.get("loras", [])
    tags = [f"<lora:{lora['name']}:{lora['weight']:g}>" for lora in loras]
    lines = [" ".join([facts["prompt"], *tags])]
    if facts["negative_prompt"]:
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    given = {name: value for name, value in settings.items() if value is not None}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in given.items()))
    return "\n".join(lines)


def _controls(controls: Sequence[dict[str, Any]]) -> dict[str, str]:
    """An entry for each control image, as A1111's ControlNet extension writes it."""
    return {
        f"ControlNet {number}": f"Module: {control['preprocessor'] or 'none'}, "
        f"Model: {control['network']}, Weight: {control['weight']}, "
        f"Guidance Start: {control['start']}, Guidance End: {control['end']}"
        for number, control in enumerate(controls)
    }


def _quoted(value: object) -> str:
    """As A1111 writes a value that holds one of its own separators: a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def save_picture(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with both chunks; the file appears only when it is whole."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(facts))
    info.add_itxt("kiln", json.dumps(facts, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.part")
    try:
        image.save(temporary, "PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON that `save_picture` wrote; empty for other pictures."""
    with Image.open(path) as image:
        text = image.info.get("kiln", "{}")
    document: dict[str, Any] = json.loads(text)
    return document

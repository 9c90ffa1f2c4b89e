"""Control images of a request: read, made of pictures, and fitted to what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from profiles.errors import SpecError
from runners.control_options import Control
from runners.control_tasks import controlnet_names
from runners.images import Source, open_image
from runners.preprocessing import map_of

if TYPE_CHECKING:
    from runners.drawing import Drawing
    from runners.manifest import Manifest

__all__ = ["Controls", "controls_of"]


@dataclass(frozen=True)
class _Read:
    """A control whose picture was read, and the network that reads it."""

    control: Control
    network: str
    source: Source


class Controls:
    """The control images of a request, in the order of the networks that read them."""

    def __init__(self, read: Sequence[_Read], drawing: Drawing) -> None:
        """Fit the pictures to what is drawn, and make maps of those that aren't any."""
        self._read = read
        self.networks = tuple(item.network for item in read)
        """Components of the bundle."""
        self.notes: list[str] = []
        """Sentences for the user: what was fitted."""
        self._images = [self._fitted(item, drawing) for item in read]
        self.facts: dict[str, Any] = {"controls": [_facts(item) for item in read]} if read else {}
        """For the metadata."""

    def arguments(self, task: str) -> dict[str, Any]:
        """What a pipeline of this task is called with beside the rest."""
        if not self._read:
            return {}
        controls = [item.control for item in self._read]
        single = len(controls) == 1  # pipelines take no lists for a single network
        values: Mapping[str, list[Any]] = {
            "image" if task == "control" else "control_image": self._images,
            "controlnet_conditioning_scale": [control.weight for control in controls],
            "control_guidance_start": [control.start for control in controls],
            "control_guidance_end": [control.end for control in controls],
        }
        return {name: value[0] if single else value for name, value in values.items()}

    def _fitted(self, item: _Read, drawing: Drawing) -> Image.Image:
        picture, wanted = item.source.picture, drawing.control_size
        if picture.size != wanted:
            self.notes.append(_fitting(item.source, wanted))
            picture = ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)
        return drawing.control_canvas(map_of(item.control, picture))


def controls_of(controls: Sequence[Control], manifest: Manifest, drawing: Drawing) -> Controls:
    """Read a request's control images and give each to a network of the bundle.

    Raises SpecError for a file that is no picture, for a network that the bundle hasn't, and for
    more controls than it has networks.
    """
    present = [entry.name for entry in manifest.components if entry.role == "controlnet"]
    if controls and not present:
        raise SpecError(
            "--control needs a control network, and the bundle has none: compile the model again "
            "with --controlnet."
        )
    if len(controls) > len(present):
        raise SpecError(
            f"--control is given {len(controls)} times, and the bundle has {len(present)} control "
            f"networks ({', '.join(present)}): give fewer, or compile with more --controlnet."
        )
    read = [
        _Read(control, _network(control, place, present), open_image(control.file, "--control"))
        for place, control in enumerate(controls)
    ]
    names = [item.network for item in read]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SpecError(
            f"--control is given twice for {twice[0]}: name a network each, such as "
            f"{controlnet_names(2)[1]}=FILE."
        )
    return Controls(sorted(read, key=lambda item: present.index(item.network)), drawing)


def _network(control: Control, place: int, present: Sequence[str]) -> str:
    name = control.network or present[place]
    if name not in present:
        raise SpecError(
            f"--control names the control network {name}, and the bundle has "
            f"{', '.join(present)}: use one of these."
        )
    return name


def _fitting(source: Source, wanted: tuple[int, int]) -> str:
    (width, height), (to_width, to_height) = source.picture.size, wanted
    same = abs(width * to_height / to_width - height) <= 1
    how = "scaled" if same else "scaled and cut at its edges"
    return f"--control {source.name} ({width}x{height}) is {how} to {to_width}x{to_height}."


def _facts(item: _Read) -> dict[str, Any]:
    control = item.control
    return {
        "network": item.network,
        "file": item.source.name,
        "sha256": item.source.sha256,
        "preprocessor": control.preprocessor,
        **({"preprocessor_model": control.model.name} if control.model else {}),
        "weight": control.weight,
        "start": control.start,
        "end": control.end,
    }

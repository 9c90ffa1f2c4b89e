"""The manifest of a bundle: what is inside, for what, made how, and how good. Parsed strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from profiles.errors import SpecError
from runners.memory import PartMemory, PipelineMemory
from runners.part_names import PARTS
from runners.paths import plain_path, require_distinct
from runners.requires import Observed, Requires
from runners.signature import Signature

__all__ = [
    "SCHEMA",
    "AutoencoderEntry",
    "ComponentEntry",
    "ControlEntry",
    "FileEntry",
    "FormEntry",
    "Manifest",
    "ModelEntry",
    "Picture",
    "Speed",
]

SCHEMA = 4
"""Raised when a reader of the old one would misread the new one."""

_STRICT = ConfigDict(frozen=True, extra="forbid")
_OWN = ("local.mark", "manifest.json", "manifest.sha256", "signature.json")
"""Names that no path may be taken for; runners.manifest_file refuses them as files."""

RelativePath = Annotated[str, AfterValidator(plain_path)]


class FileEntry(BaseModel):
    """Size in bytes and sha256 (hex) of one file."""

    model_config = _STRICT

    size: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AutoencoderEntry(BaseModel):
    """Where the weights of another autoencoder than the model's own came from."""

    model_config = _STRICT

    name: str
    """A hub id, or the name of a folder."""
    revision: str | None
    digest: str
    """sha256 over the digests of the files that were read."""
    class_name: str
    """diffusers' class."""


class ControlEntry(BaseModel):
    """Where the weights of a control network came from."""

    model_config = _STRICT

    component: str
    """What the bundle calls it."""
    name: str
    """A hub id, or the name of a folder."""
    revision: str | None
    digest: str
    """sha256 over the digests of the files that were read."""
    class_name: str
    """diffusers' class."""


class ModelEntry(BaseModel):
    """Where the weights came from."""

    model_config = _STRICT

    name: str
    """The last part of what the user gave: a hub id, or the name of a folder or file."""
    revision: str | None
    digest: str
    """sha256 over the digests of the files that were read."""
    family: str
    pipeline_class: str
    settings: dict[str, bool | int | float | str | None] = {}
    """What model_index.json says of the pipeline beside its parts."""
    vae: AutoencoderEntry | None = None
    """In the place of the model's own VAE."""
    controls: tuple[ControlEntry, ...] = ()
    """Control networks beside the model, in the order in which they were given."""


class FormEntry(BaseModel):
    """A component's engine once more, with further inputs, or a part of it alone, over the same
    weights' file.
    """

    model_config = _STRICT

    files: dict[str, RelativePath]
    """What the file is to the backend -> where it lies; some of them are the plain engine's."""
    signature: Signature
    """That of the plain engine and the further inputs, or a part's own."""
    properties: dict[str, str | int | float | bool]
    memory: PartMemory | None = None
    """What it takes of memory; None where that is what the plain engine takes."""


class ComponentEntry(BaseModel):
    """One engine: its files, its signature, its settings, and what was measured of it."""

    model_config = _STRICT

    name: str
    role: Literal["text_encoder", "denoiser", "vae_encoder", "vae_decoder", "controlnet"]
    wrapper: str
    """How it is called: a name of runners.modules.WRAPPERS."""
    backend: str
    quant: str
    dtype: Literal["fp32", "bf16", "fp16"]
    signature: Signature
    files: dict[str, RelativePath]
    """What the file is to the backend -> where it lies."""
    config: RelativePath
    properties: dict[str, str | int | float | bool]
    """Every runtime setting that affects numerics: set at open, read back."""
    parameters: int
    fp32_bytes: int
    """4 x parameters; every ratio refers to it."""
    engine_bytes: int
    """Graph and weights on disk."""
    layers_quantized: int
    layers_total: int
    layers_low_bit: int | None
    """Linears and convolutions that the opened engine really runs in 8 bits or fewer."""
    sqnr_db: float | None
    """Of the engine against fp32 eager, on recorded real inputs; exact equality is 200."""
    oracle_sqnr_db: float | None
    """The same of the quantized torch module."""
    unseen_sqnr_db: dict[str, float]
    """Shape -> the same at sizes that were not traced, on random inputs."""
    load_seconds: float | None
    """Reading and kernel selection at the native size, when it was checked."""
    requires: Requires
    ran: bool = True
    """Whether the engine itself ran where it was built; if not, the SQNR are those of the graph
    that it was built from, run on a processor."""
    selftest: RelativePath | None = None
    """Recorded calls that it is judged on by `kiln selftest`, and where it first runs."""
    selftest_db: float | None = None
    """The least SQNR that is accepted then."""
    memory: PartMemory | None = None
    """What it takes of memory; None in bundles older than schema 4."""
    forms: dict[str, FormEntry] = {}
    """Its other graphs by what they take beside the plain one's inputs ("lora", "control"), or by
    which part of it they are (runners.part_names)."""


class Picture(BaseModel):
    """One picture that the bundle drew where it was built, to be drawn again elsewhere."""

    model_config = _STRICT

    file: RelativePath
    """A PNG of at most 256 pixels a side."""
    prompt: str
    seed: int
    steps: int = Field(ge=1, le=100)
    side: int = Field(ge=1)
    """Pixels that were drawn, before they were made smaller."""
    least_psnr_db: float
    """To the PNG."""


_ALONE = 0.1


class Speed(BaseModel):
    """One denoising step at the native size, guidance included, interleaved in one process."""

    model_config = _STRICT

    eager_fp32_ms: float
    engine_ms: float
    speedup: float
    threads: int
    load_average: float | None
    """Of the machine over the last minute, when the measurement began."""
    others_share: float = Field(0.0, ge=0, le=1)
    """What other programs took of the machine's cores while it was made."""

    @property
    def alone(self) -> bool:
        """Whether the figure is good for anything: threads that wait for cores which others have
        slow a step many times over, and not both kinds of it alike.
        """
        return self.others_share <= _ALONE


class Manifest(BaseModel):
    """Everything that a reader of the bundle may rely on."""

    model_config = _STRICT

    schema_version: int
    kiln: str
    key: str
    """Digest of everything that the bundle was made from."""
    model: ModelEntry
    native_size: int = Field(ge=1)
    size_step: int = Field(ge=1)
    defaults: dict[str, int | float]
    """steps and guidance that the model's own files name; absent ones are the pipeline's."""
    recipe: dict[str, Any]
    policies: dict[str, dict[str, Any]]
    components: tuple[ComponentEntry, ...]
    files: dict[RelativePath, FileEntry]
    tools: dict[str, str]
    observed: Observed
    speed: Speed | None
    picture: Picture | None = None
    """None where the engines didn't run where they were built."""
    memory: PipelineMemory | None = None
    """What drawing takes beside the engines; None in bundles older than schema 4."""
    variants: tuple[ComponentEntry, ...] = ()
    """Other denoisers than the one among the components, which is the best; best first."""

    @model_validator(mode="after")
    def _every_file_is_digested(self) -> Self:
        used = (name for entry in self.engines for name in _files(entry))
        drawn = (self.picture.file,) if self.picture is not None else ()
        if absent := sorted({*used, *drawn} - set(self.files)):
            raise ValueError(f"{absent[0]} is used and has no digest")
        return self

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Self:
        require_distinct((*_OWN, *self.files))
        return self

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        roles = [str(entry.role) for entry in self.components]
        names = [entry.name for entry in self.engines]
        if roles.count("denoiser") != 1 or len(set(names)) != len(names):
            raise ValueError("one component a name, and one denoiser, are needed")
        levels = [entry.quant for entry in (self.component("denoiser"), *self.variants)]
        if len(set(levels)) != len(levels) or {e.role for e in self.variants} - {"denoiser"}:
            raise ValueError("variants are denoisers of one level each")
        for name in ("size_min", "size_max", "batch"):
            if type(self.recipe.get(name)) is not int or self.recipe[name] < 1:
                raise ValueError(f"the recipe's {name} must be a whole number above 0")
        return self

    @property
    def on_card(self) -> bool:
        """Whether any engine runs on a card."""
        return any(entry.requires.capabilities is not None for entry in self.engines)

    @property
    def seamless(self) -> bool:
        """Whether the VAE runs in seamless tiles: all its halves have both parts."""
        halves = [entry for entry in self.components if entry.role.startswith("vae")]
        return all(name in half.forms for half in halves for name in PARTS)

    @property
    def engines(self) -> tuple[ComponentEntry, ...]:
        """The components and the other variants of the denoiser."""
        return (*self.components, *self.variants)

    @property
    def denoisers(self) -> dict[str, ComponentEntry]:
        """Level -> the variant of the denoiser, the best first."""
        return {entry.quant: entry for entry in (self.component("denoiser"), *self.variants)}

    def denoiser(self, variant: str | None) -> ComponentEntry:
        """The variant of the denoiser, the best where None; SpecError where there is no such."""
        found = self.denoisers
        if variant is not None and variant not in found:
            raise SpecError(
                f"--variant {variant} is not in the bundle: use {' or '.join(found)}, or compile "
                f"with --quant {','.join((*found, variant))}."
            )
        return self.component("denoiser") if variant is None else found[variant]

    def run_by(self, variant: str | None) -> tuple[ComponentEntry, ...]:
        """The engines that draw with a variant of the denoiser, in the components' order."""
        chosen = self.denoiser(variant)
        return tuple(chosen if entry.role == "denoiser" else entry for entry in self.components)

    def unused_by(self, variant: str | None) -> frozenset[str]:
        """Paths of files that only other variants of the denoiser use."""
        used = {name for entry in self.run_by(variant) for name in _files(entry)}
        return frozenset(name for entry in self.engines for name in _files(entry)) - used

    def component(self, role: str) -> ComponentEntry:
        """The first component in this role; KeyError where there is none."""
        return {str(entry.role): entry for entry in reversed(self.components)}[role]

    def named(self, name: str) -> ComponentEntry:
        """The engine of this name; KeyError where there is none."""
        return {entry.name: entry for entry in self.engines}[name]


def _files(entry: ComponentEntry) -> tuple[str, ...]:
    """The paths that an entry names."""
    last = (entry.selftest,) if entry.selftest is not None else ()
    formed = (path for form in entry.forms.values() for path in form.files.values())
    return (*entry.files.values(), *formed, entry.config, *last)

"""Small single-file checkpoints of every family, and what they were made from.

Weights are random, none is 0 or 1.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.families import base_checkpoint
from tests.optimizer import ldm_layout, transformer_layout
from tests.optimizer.ldm_layout import DENOISER
from tests.optimizer.small_models import SMALL, Change

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = [
    "ASSETS",
    "Small",
    "assert_same_pictures",
    "assert_same_weights",
    "build",
    "checkpoint_keys",
    "read_configs",
]

ASSETS = Path(base_checkpoint.__file__).parent / "assets"

Configs = Mapping[str, dict[str, Any]]


def _small_configs(name: str, folder: Path, changes: Mapping[str, Change]) -> None:
    """A copy of the shipped configs `name`, changed."""
    shutil.copytree(ASSETS / name, folder)
    for component, change in changes.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every component's config.json by the component's name."""
    files = sorted(folder.glob("*/config.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def build(config: Mapping[str, Any], *, device: str = "cpu") -> Any:
    """The module that a config describes, every weight moved by a random number, in fp16."""
    import torch

    from runners.modules import component_class

    cls = component_class(config)
    is_diffusers = hasattr(cls, "load_config")
    with torch.device(device):
        module = cls.from_config(config) if is_diffusers else cls(cls.config_class(**config))
    if device != "meta":
        for tensor in module.state_dict().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return module.half().eval()


def _unet(weights: Weights, configs: Configs) -> Weights:
    unet = configs["unet"]
    return ldm_layout.unet_keys(
        weights, layers=unet["layers_per_block"], up_types=unet["up_block_types"]
    )


def _vae(prefix: str) -> Layout:
    return lambda weights, configs: ldm_layout.vae_keys(
        weights, levels=len(configs["vae"]["block_out_channels"]), prefix=prefix
    )


def _clip(prefix: str) -> Layout:
    return lambda weights, _: ldm_layout.clip_keys(weights, prefix)


def _open_clip(prefix: str) -> Layout:
    return lambda weights, _: ldm_layout.open_clip_keys(weights, prefix)


def _clip_without_projection(weights: Weights, _: Configs) -> Weights:
    keys = ldm_layout.clip_keys(weights, "text_encoders.clip_l.transformer.")
    del keys["text_encoders.clip_l.transformer.text_projection.weight"]
    return keys


def _t5(weights: Weights, _: Configs) -> Weights:
    prefix = "text_encoders.t5xxl."
    keys = {f"{prefix}transformer.{name}": tensor for name, tensor in weights.items()}
    return {**keys, f"{prefix}logit_scale": weights["shared.weight"][0, 0]}


def _sd3(weights: Weights, configs: Configs) -> Weights:
    layers = configs["transformer"]["num_layers"]
    return transformer_layout.sd3_keys(weights, layers=layers, prefix=DENOISER)


def _flux(weights: Weights, _: Configs) -> Weights:
    return transformer_layout.flux_keys(weights, prefix=DENOISER)


Layout = Callable[["Weights", Configs], "Weights"]
_LDM = {"unet": _unet, "vae": _vae("first_stage_model.")}
_LAYOUTS: dict[str, dict[str, Layout]] = {
    "sd1": {"text_encoder": _clip("cond_stage_model.transformer."), **_LDM},
    "sd2": {"text_encoder": _open_clip("cond_stage_model.model."), **_LDM},
    "sdxl": {
        "text_encoder": _clip("conditioner.embedders.0.transformer."),
        "text_encoder_2": _open_clip("conditioner.embedders.1.model."),
        **_LDM,
    },
    "sdxl_refiner": {"text_encoder_2": _open_clip("conditioner.embedders.0.model."), **_LDM},
    "sd3": {
        "text_encoder": _clip_without_projection,
        "text_encoder_2": _clip("text_encoders.clip_g.transformer."),
        "text_encoder_3": _t5,
        "transformer": _sd3,
        "vae": _vae("first_stage_model."),
    },
    "flux": {
        "text_encoder": _clip("text_encoders.clip_l.transformer."),
        "text_encoder_2": _t5,
        "transformer": _flux,
        "vae": _vae("vae."),
    },
}
"""Family -> component -> its weights under the names of a single file."""


def checkpoint_keys(name: str, modules: Mapping[str, Any], configs: Configs) -> Weights:
    """All tensors of a single file, with what such files carry along."""
    import torch

    keys: Weights = {}
    for component, layout in _LAYOUTS[name].items():
        keys |= layout(dict(modules[component].state_dict()), configs)
    return {**keys, "alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())}


class Small:
    """A checkpoint file, and the modules that it was made from."""

    def __init__(self, name: str, folder: Path, **more: Change) -> None:
        """`more` is what components' configs change beyond the small ones."""
        import torch

        changes = {c: {**change, **more.get(c, {})} for c, change in SMALL[name].items()}
        _small_configs(name, folder / "small", changes)
        self.configs = read_configs(folder / "small")
        shutil.rmtree(folder / "small")
        # what converters read: only what no shape tells
        _small_configs(name, folder / "assets" / name, SMALL[name])
        for vocabulary in ("clip", "t5"):
            shutil.copytree(ASSETS / vocabulary, folder / "assets" / vocabulary)
        torch.manual_seed(0)
        self.modules = {component: build(config) for component, config in self.configs.items()}
        if (
            name == "sd3"
        ):  # its files have no such projection, because its pooled output is used raw
            torch.nn.init.eye_(self.modules["text_encoder"].text_projection.weight)
        self.tensors = checkpoint_keys(name, self.modules, self.configs)
        self.folder = folder / "converted"
        self.file = folder / "checkpoint.safetensors"

    def save(self) -> Path:
        from safetensors.torch import save_file

        save_file({k: v.clone().contiguous() for k, v in self.tensors.items()}, self.file)
        return self.file

    def drop(self, *prefixes: str) -> None:
        self.tensors = {k: v for k, v in self.tensors.items() if not k.startswith(prefixes)}

    def pipeline(self, converted: Any) -> Any:
        """A pipeline as `converted`, of the modules that the file was made from."""
        modules = {component: module.float() for component, module in self.modules.items()}
        pipeline = type(converted)(**{**converted.components, **modules})
        flags = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        told = {flag: converted.config[flag] for flag in flags if flag in converted.config}
        pipeline.register_to_config(**told)
        return pipeline


def assert_same_weights(small: Small, folder: Path) -> None:
    """Every component of a converted folder loads without remark and has the very weights."""
    import torch

    for component, module in small.modules.items():
        dtype = "torch_dtype" if hasattr(module, "load_config") else "dtype"
        loaded, report = type(module).from_pretrained(
            folder / component, output_loading_info=True, **{dtype: torch.float16}
        )
        assert not any(report.values()), report
        found, expected = loaded.state_dict(), module.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_same_pictures(small: Small, converted: Any, **call: Any) -> None:
    """A converted pipeline draws what the modules draw that the file was made from."""
    import numpy as np
    import torch

    def draw(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
        return pipeline("a cat", generator=generator, **{**settings, **call}).images

    found, expected = draw(converted), draw(small.pipeline(converted))
    assert float(np.std(expected)) > 0.01
    assert np.array_equal(found, expected)

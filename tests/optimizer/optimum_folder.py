"""A folder as optimum exports it: TorchScript graphs under its names, configs beside them.

optimum itself can't be installed beside diffusers 0.42.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_optimum"]

_OPSET = 17
_IMAGE = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}


def write_optimum(
    model: Path,
    folder: Path,
    *,
    half: bool = False,
    older: bool = False,
    fixed: bool = False,
    external: bool = False,
) -> Path:
    """The diffusers folder `model` (Stable Diffusion) exported to `folder`.

    half: in fp16. older: as before optimum 1.20, latents sampled in the graph, timesteps as a list
    of integers. fixed: for the traced sizes only. external: weights in model.onnx_data.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(model / name, folder / name)
    index = json.loads((model / "model_index.json").read_text("utf-8"))
    index["_class_name"] = f"ORT{index['_class_name']}"
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    configs = {"text_encoder": "text_encoder", "unet": "unet"}
    configs |= {"vae_decoder": "vae", "vae_encoder": "vae"}
    for name, (module, inputs, outputs, axes) in _parts(pipe, older=older).items():
        (folder / name).mkdir()
        shutil.copyfile(model / configs[name] / "config.json", folder / name / "config.json")
        path = folder / name / "model.onnx"
        _export(module, inputs, outputs, {} if fixed else axes, path)
        _rewrite(path, half=half, external=external)
    return folder


def _parts(pipe: Any, *, older: bool) -> dict[str, Any]:
    """Component -> module, inputs by name, names of outputs, dynamic axes."""
    return {
        "text_encoder": _text_encoder(pipe, older=older),
        "unet": _unet(pipe, older=older),
        **_vae(pipe, older=older),
    }


def _module(run: Callable[..., Any], owner: Any) -> Any:
    """A module whose forward is `run(owner, *inputs)`."""
    from torch import nn

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = owner

        def forward(self, *inputs: Any) -> Any:
            return run(self.module, *inputs)

    return Exported()


def _text_encoder(pipe: Any, *, older: bool) -> Any:
    import torch

    def encode(module: Any, ids: Any) -> Any:
        found = module(input_ids=ids, output_hidden_states=True)
        return (found.last_hidden_state, found.pooler_output, *found.hidden_states)

    ids = torch.ones(2, pipe.tokenizer.model_max_length, dtype=torch.int64)
    hidden = [f"hidden_states.{i}" for i in range(pipe.text_encoder.config.num_hidden_layers + 1)]
    return (
        _module(encode, pipe.text_encoder),
        {"input_ids": ids.int() if older else ids},
        ["last_hidden_state", "pooler_output", *hidden],
        {"input_ids": {0: "batch_size", 1: "sequence_length"}},
    )


def _latents(pipe: Any) -> Any:
    import torch

    side = pipe.unet.config.sample_size
    return torch.randn(2, pipe.unet.config.in_channels, side, side)


def _unet(pipe: Any, *, older: bool) -> Any:
    import torch

    def denoise(module: Any, sample: Any, timestep: Any, hidden: Any) -> Any:
        return module(sample, timestep, hidden, return_dict=False)[0]

    tokens, width = pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim
    inputs = {
        "sample": _latents(pipe),
        "timestep": torch.tensor([7]) if older else torch.tensor(7.0),
        "encoder_hidden_states": torch.randn(2, tokens, width),
    }
    axes: dict[str, Any] = {
        "sample": _IMAGE,
        "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
        **({"timestep": {0: "steps"}} if older else {}),
    }
    return _module(denoise, pipe.unet), inputs, ["out_sample"], axes


def _vae(pipe: Any, *, older: bool) -> dict[str, Any]:
    import torch

    def encode(vae: Any, image: Any) -> Any:
        distribution = vae.encode(image).latent_dist
        return distribution.sample() if older else distribution.parameters

    decoder = _module(lambda vae, latents: vae.decode(latents).sample, pipe.vae)
    side = 4 * pipe.unet.config.sample_size
    image = torch.rand(2, 3, side, side)
    out = ["latent_sample" if older else "latent_parameters"]
    return {
        "vae_decoder": (
            decoder,
            {"latent_sample": _latents(pipe)},
            ["sample"],
            {"latent_sample": _IMAGE},
        ),
        "vae_encoder": (_module(encode, pipe.vae), {"sample": image}, out, {"sample": _IMAGE}),
    }


def _export(module: Any, inputs: Any, outputs: list[str], axes: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
        )


def _rewrite(path: Path, *, half: bool, external: bool) -> None:
    import onnx

    model = onnx.load(path)
    if half:
        _halve(model)
    path.unlink()
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location="model.onnx_data",
        size_threshold=100,
    )


def _halve(model: Any) -> None:
    """As a module in fp16 is exported: its floats, and the graph's inputs and outputs."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    def halved(tensor: Any) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    for tensor in model.graph.initializer:
        halved(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and node.op_type != "Resize":
                halved(attribute.t)
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16

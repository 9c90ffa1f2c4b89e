"""Which engines are open when, that their bytes go with them, and that prompts come once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profiles.errors import BundleError, SelfTestError
from runners import engines
from runners.bundle import open_bundle
from runners.pipeline import LoadedBundle
from runners.prompting import PromptCache, Prompts
from runners.residency import OpenEngines
from tests.toy_bundle import toy_bundle


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(engines.ENGINES, "openvino", "tests.toy_engine:ToyEngine")
    return open_bundle(toy_bundle(tmp_path / "bundle"))


def test_kept_engines_stay_until_all_are_closed(opened: Any) -> None:
    loaded = LoadedBundle(opened, 1)
    found = [loaded.engine(name) for name in ("text_encoder", "unet", "vae_decoder")]
    assert all(engine._opened for engine in found)
    assert loaded.engine("unet") is found[1]
    loaded.close()
    assert not any(engine._opened for engine in found)
    assert loaded.engine("unet") is not found[1]


def test_one_at_a_time_the_last_one_goes_before_the_next_one_opens(opened: Any) -> None:
    loaded = LoadedBundle(opened, 1, residency="sequential")
    text = loaded.engine("text_encoder")
    assert loaded.engine("text_encoder") is text
    unet = loaded.engine("unet")
    assert not text._opened
    assert unet._opened
    loaded.engine("vae_decoder")
    assert not unet._opened


def test_verified_bytes_go_with_the_engine_and_are_verified_again(opened: Any) -> None:
    loaded = LoadedBundle(opened, 1, residency="sequential")
    loaded.engine("unet")
    loaded.close()
    assert not opened._buffers
    (opened.path / "unet" / "weights.bin").write_bytes(b"other bytes")
    with pytest.raises(BundleError, match=r"unet/weights\.bin"):
        loaded.engine("unet")


def test_loading_holds_no_bytes_where_they_are_not_to_stay(opened: Any) -> None:
    assert not open_bundle(opened.path, hold=False)._buffers
    assert opened._buffers


def test_residency_can_change_between_pictures(opened: Any) -> None:
    loaded = LoadedBundle(opened, 1)
    first = loaded.engine("text_encoder")
    loaded.use(residency="sequential")
    assert not first._opened
    second = loaded.engine("text_encoder")
    loaded.engine("unet")
    assert not second._opened
    assert (loaded.variant, loaded.residency) == ("none", "sequential")


def test_a_controlnet_and_the_denoiser_stay_together(opened: Any) -> None:
    made: list[str] = []

    def make(entry: Any, _form: str) -> Any:
        made.append(entry.name)
        return engines.engine_class("openvino")(
            {"weights": b""}, signature=entry.signature, properties={}, threads=1
        )

    held = OpenEngines(make, residency="sequential", checked=lambda *_: None, released=lambda: None)
    unet = opened.manifest.named("unet")
    control = unet.model_copy(update={"name": "controlnet", "role": "controlnet"})
    for entry in (control, unet, control, unet):
        held.open(entry)
    assert made == ["controlnet", "unet"]


def test_an_engine_that_fails_its_check_does_not_stay(opened: Any) -> None:
    def refuse(*_: Any) -> None:
        raise SelfTestError("wrong numbers")

    loaded = LoadedBundle(opened, 1)
    held = OpenEngines(loaded._made, residency="keep", checked=refuse, released=lambda: None)
    with pytest.raises(SelfTestError):
        held.open(opened.manifest.named("unet"))
    assert not held._engines


def test_prompts_are_encoded_once_and_the_oldest_are_forgotten() -> None:
    cache, asked = PromptCache(), []

    def encode(key: str) -> Prompts:
        def run() -> Prompts:
            asked.append(key)
            return Prompts({"prompt": key})

        return cache.of((key,), run)

    assert encode("a") is encode("a")
    for number in range(70):
        encode(str(number))
    encode("a")
    assert asked.count("a") == 2
    assert len(cache._found) == 64

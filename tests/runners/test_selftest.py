"""An engine that was built elsewhere has to pass once where it first runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.calls import Call, save_calls
from profiles.errors import SelfTestError
from runners.bundle import Bundle, open_bundle
from runners.engines.base import Array, Engine
from runners.manifest import ComponentEntry, FileEntry
from runners.pipeline import open_engine
from runners.selftest import require_selftest, result_paths

MakeBundle = Callable[..., Path]


@pytest.fixture
def built(bundle: MakeBundle, tmp_path: Path) -> tuple[Bundle, ComponentEntry, Engine]:
    """A bundle, its text encoder with recorded calls of its own, and the open engine."""
    found = open_bundle(shutil.copytree(bundle("eager"), tmp_path / "bundle"))
    entry = found.manifest.component("text_encoder")
    engine = open_engine(found, entry, threads=1).__enter__()
    ids = np.arange(64, dtype=np.int64).reshape(2, 32) % 70
    outputs = tuple(engine({"input_ids": ids}).values())
    path = found.path / "calls.safetensors"
    save_calls({"first": Call((ids,), outputs)}, path)
    files = dict(found.manifest.files)
    from optimizer.digests import sha256_file

    files["calls.safetensors"] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
    entry = entry.model_copy(update={"selftest": "calls.safetensors", "selftest_db": 60.0})
    manifest = found.manifest.model_copy(update={"files": files})
    return Bundle(found.path, manifest), entry, engine


def spoiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine._run

    def wrong(feeds: dict[str, Array]) -> dict[str, Array]:
        return {name: array * 1.1 for name, array in right(feeds).items()}

    monkeypatch.setattr(engine, "_run", wrong)


def test_a_right_engine_passes_and_is_remembered(
    built: tuple[Bundle, ComponentEntry, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, entry, engine = built
    require_selftest(bundle, entry, engine, "card A")
    beside = result_paths(bundle)[0]
    assert beside == bundle.path.parent / "bundle.selftest.json"
    passed = json.loads(beside.read_text())["passed"]
    assert passed["text_encoder on card A"]["sqnr_db"] == {"first": 200.0}
    spoiled(engine, monkeypatch)
    require_selftest(bundle, entry, engine, "card A")  # not run again


def test_a_wrong_engine_is_refused_and_not_remembered(
    built: tuple[Bundle, ComponentEntry, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, entry, engine = built
    spoiled(engine, monkeypatch)
    with pytest.raises(SelfTestError) as caught:
        require_selftest(bundle, entry, engine, "card A")
    assert "gives 20.0 dB SQNR to fp32 on card A where 60.0 dB are needed" in str(caught.value)
    assert caught.value.exit_code == 18
    assert not any(path.exists() for path in result_paths(bundle))


def test_another_card_and_another_bundle_of_the_name_have_to_pass_again(
    built: tuple[Bundle, ComponentEntry, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, entry, engine = built
    require_selftest(bundle, entry, engine, "card A")
    spoiled(engine, monkeypatch)
    with pytest.raises(SelfTestError):
        require_selftest(bundle, entry, engine, "card B")
    files = {**bundle.manifest.files, "other": FileEntry(size=0, sha256="0" * 64)}
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(SelfTestError):
        require_selftest(other, entry, engine, "card A")


def test_where_nothing_can_be_written_beside_the_bundle_the_cache_has_the_result(
    built: tuple[Bundle, ComponentEntry, Engine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle, entry, engine = built
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    beside, cached = result_paths(bundle)
    beside.mkdir()  # no file can take its place
    require_selftest(bundle, entry, engine, "card A")
    assert cached.is_file()
    spoiled(engine, monkeypatch)
    require_selftest(bundle, entry, engine, "card A")

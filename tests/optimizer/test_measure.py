"""What a step's speed is worth where other programs work beside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from optimizer.compile import CompileResult
from optimizer.describe import result_text
from optimizer.measure import others_time
from runners.bundle import read_manifest
from runners.manifest import Manifest, Speed
from tests.conftest import MakeBundle


def test_a_program_that_works_beside_is_seen_and_this_one_is_not() -> None:
    with others_time() as alone:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
    assert 0 <= alone.share <= 1
    spin = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            begin = psutil.Process(child.pid).cpu_times().user
            with others_time() as others:
                while psutil.Process(child.pid).cpu_times().user < begin + 0.5:
                    time.sleep(0.05)
        finally:
            child.kill()
    assert others.share > 0


@pytest.mark.parametrize(("share", "said"), [(0.02, "as fast as diffusers"), (0.4, "unsure")])
def test_a_speed_that_was_not_measured_alone_is_not_shown_as_one(
    bundle: MakeBundle, share: float, said: str
) -> None:
    manifest = _measured(read_manifest(bundle("openvino")), share)
    text = result_text(CompileResult(Path("out"), manifest, reused=True, seconds=0.0))
    assert said in text
    assert ("52.66x" in text) == (share < 0.1)


def _measured(manifest: Manifest, share: float) -> Manifest:
    speed = Speed(
        eager_fp32_ms=1735.0,
        engine_ms=33.0,
        speedup=52.66,
        threads=2,
        load_average=2.14,
        others_share=share,
    )
    return manifest.model_copy(update={"speed": speed})

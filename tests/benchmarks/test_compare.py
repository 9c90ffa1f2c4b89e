"""The command: what it refuses and how, and a whole run with diffusers folders as levels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparing, levels, prompts
from benchmarks.compare import Wish
from benchmarks.contestants import Contestant
from benchmarks.measure import Measured
from optimizer import compile as compiling
from optimizer.compile import CompileResult
from optimizer.prompts import read_prompts
from profiles.errors import MissingError, SpecError
from runners.bundle import read_manifest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--steps", "-3"), "--steps is -3; it must be at least 1"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--threads", "0"), "--threads is 0; it must be at least 1"),
        (("--count", "0"), "--count is 0; it must be at least 1"),
        (("--guidance", "-1"), "--guidance is -1; it must be 0 or more, such as 7.5"),
        (("--guidance", "nan"), "--guidance is nan; it must be 0 or more, such as 7.5"),
        (
            ("--levels", " , "),
            "--levels names no level: give some, such as --levels none,int8,int4",
        ),
        (("--levels", "int8,int8"), "--levels names int8 twice: name each level once"),
        (("--levels", "int3"), "--levels names 'int3'; the levels are none, int8, int8w, "),
        (("--levels", "auto:manydb"), "write it as auto:0.2x or auto:30db"),
        (("--levels", "auto"), "--quant auto needs a goal"),
        (("--levels", "int4:magic"), "--solver magic is not known"),
        (("--fail-under", "flip=1"), "--fail-under names 'flip'; use psnr"),
        (("--backend", "cuda"), "--backend cuda is not known: use one of"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    kiln: Any, arguments: tuple[str, ...], sentence: str
) -> None:
    ended = kiln("compare", "model", "-o", "out", *arguments)
    assert ended.code == 2
    assert sentence in ended.sentence


def test_a_model_that_is_not_there_is_refused(kiln: Any, tmp_path: Path) -> None:
    ended = kiln("compare", tmp_path / "no", "-o", tmp_path / "out")
    assert ended.code == 2
    assert str(tmp_path / "no") in ended.sentence
    assert not (tmp_path / "out").exists()


def test_of_the_users_own_prompt_file_all_prompts_are_used(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\ufeff" + "un caf\u00e9\r\n\r\n  a dog \n" * 20, encoding="utf-8")
    chosen, source = prompts.choose_prompts(tmp_path, file=file, count=None)
    assert chosen == ("un caf\u00e9", "a dog") * 20
    assert source == "from mine.txt"


def test_a_model_without_prompts_gets_the_neutral_ones(tmp_path: Path) -> None:
    chosen, source = prompts.choose_prompts(tmp_path, file=None, count=4)
    assert len(set(chosen)) == 4
    assert source == "kiln's neutral prompts, 4 of 16, evenly spread"


def test_the_models_own_prompts_come_first_and_are_spread_evenly(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    lines = [f"prompt {index}" for index in range(160)]
    (tmp_path / "prompts" / "evaluation.txt").write_text("\n".join(lines))
    chosen, source = prompts.choose_prompts(tmp_path, file=None, count=None)
    assert chosen == tuple(lines[::10])
    assert source == "the model's own evaluation prompts, 16 of 160, evenly spread"
    everything, _ = prompts.choose_prompts(tmp_path, file=None, count=1000)
    assert everything == tuple(lines)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\n \n", "holds no prompt: write a prompt a line into it"),
        (b"caf\xe9\n", "is not UTF-8 text (byte 3): save it as UTF-8, a prompt a line"),
        (None, "can't be read (No such file or directory): give a text file"),
    ],
)
def test_prompt_files_that_cannot_be_used(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)
    assert sentence in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with steps and guidance of its own."""
    folder = tmp_path_factory.mktemp("compare") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "kiln.json").write_text(json.dumps({"steps": 2, "guidance": 3.0}))
    return folder


@pytest.fixture
def compiled(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Compilations are answered with the session's bundle; what was asked for."""
    asked: list[dict[str, Any]] = []
    made = bundle("openvino")

    def compile_bundle(recipe: Any, out: Path, **options: Any) -> CompileResult:
        asked.append({"recipe": recipe, "out": out, **options})
        return CompileResult(made, read_manifest(made), 1.0, reused=True)

    monkeypatch.setattr(compiling, "compile_bundle", compile_bundle)
    return asked


def test_a_whole_run_writes_report_and_pictures_and_one_json_line(
    kiln: Any, model: Path, compiled: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    options = ("--levels", "none", "--backend", "openvino", "--count", 2, "--threads", 1, "--json")
    ended = kiln("compare", model, "-o", out, *options)
    assert ended.code == 0, ended.err
    (asked,) = compiled
    assert (asked["out"], asked["force"]) == (out / "bundles" / "none", True)
    assert (asked["recipe"].quant, asked["recipe"].backend) == ("none", "openvino")
    (line,) = ended.out.splitlines()
    document = json.loads(line)
    reference, level = document["levels"]
    assert (reference["name"], level["name"]) == ("diffusers fp32", "none")
    assert reference["bytes_vs_fp32"] == pytest.approx(1.0, abs=0.01)  # stored as fp32
    # fp32 in another order of sums: about 1e-6 of the signal, and at most 1 in 255 a pixel
    assert level["sqnr_db"] > 90
    assert level["psnr_db"] > 48
    assert len(level["sqnr_db_per_step"]) == 2
    assert level["speedup"] > 0
    assert level["peak_rss_bytes"] > 100e6
    assert (document["settings"]["steps"], document["settings"]["guidance"]) == (2, 3.0)
    assert document["complete"] is True
    assert len(list(out.glob("images/*/*.png"))) == 4
    assert json.loads((out / "report.json").read_text("utf-8"))["levels"] == document["levels"]
    assert (out / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_ctrl_c_reports_what_was_finished_and_exits_with_130(
    kiln: Any,
    model: Path,
    measurement: Callable[..., Measured],
    entrants: tuple[Contestant, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted = measurement("a", "b")
    interrupted.complete = False
    monkeypatch.setattr(levels, "contestants", lambda *_: list(entrants))
    monkeypatch.setattr(comparing, "measure", lambda *_, **__: interrupted)
    ended = kiln("compare", model, "-o", tmp_path, "--json")
    assert ended.code == 130
    assert ended.sentence == "Error: Interrupted; what was finished is kept."
    assert json.loads(ended.out)["complete"] is False
    assert "Interrupted: 2 of 2" in (tmp_path / "report.html").read_text("utf-8")


def test_an_output_that_is_a_file_is_refused(kiln: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    out.touch()
    ended = kiln("compare", model, "-o", out)
    assert ended.code == 2
    assert f"can't write to {out}" in ended.sentence
    assert ended.sentence.endswith("name another folder with -o")


def test_a_baseline_is_the_plain_pipeline_in_another_way(model: Path, tmp_path: Path) -> None:
    from benchmarks.levels import baseline_contestants, plain_contestant
    from optimizer.source import resolve

    wish = Wish(str(model), tmp_path, ("none",), baselines=("torch.compile",))
    source = resolve(str(model))
    (found,) = baseline_contestants(wish, source)
    plain = plain_contestant(source)
    assert (found.name, found.kind, found.path) == ("torch.compile", "torch.compile", plain.path)
    assert found.denoiser_bytes == plain.denoiser_bytes


def test_a_baseline_that_is_not_known_or_not_installed_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import baselines
    from benchmarks.levels import baseline_contestants
    from optimizer.source import resolve

    with pytest.raises(SpecError, match=r"names 'tvm': use torch\.compile, torchao-int8, "):
        Wish("m", tmp_path, ("none",), baselines=("tvm",))  # type: ignore[arg-type]
    monkeypatch.setattr(baselines, "find_spec", lambda _name: None)
    for name, extra in (("torchao-int8-dyn", "torchao"), ("bitsandbytes-nf4", "bitsandbytes")):
        wish = Wish(str(model), tmp_path, ("none",), baselines=(name,))  # type: ignore[arg-type]
        with pytest.raises(MissingError, match=rf'pip install "kiln-diffusion\[{extra}\]"'):
            baseline_contestants(wish, resolve(str(model)))

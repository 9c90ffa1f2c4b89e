"""The command: what it refuses and how, and a whole run with diffusers folders as levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import compare as command
from benchmarks import levels, prompts
from benchmarks.contestants import Contestant
from profiles.errors import KilnError, SpecError
from tests.tiny_pipelines import tiny_sd

Make = Callable[..., Contestant]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command.compare, list(arguments))


def refusal(*arguments: str) -> str:
    """The sentence of the KilnError that the command raises, which must be a SpecError."""
    error = invoke("model", "-o", "out", *arguments).exception
    assert isinstance(error, SpecError), error
    return str(error)


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
        (("--levels", "int3"), "--levels names 'int3'; the levels are none, int8, int4"),
        (("--backend", "cuda"), "--backend cuda is not known: use one of"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(*arguments)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    error = invoke(str(tmp_path / "no"), "-o", str(tmp_path / "out")).exception
    assert isinstance(error, KilnError)
    assert str(tmp_path / "no") in str(error)
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
        prompts.read_prompts(file)
    assert str(file) in str(caught.value)
    assert sentence in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_sd(tmp_path_factory.mktemp("compare") / "model")
    (folder / "kiln.json").write_text(json.dumps({"steps": 2, "guidance": 3.0}))
    return folder


@pytest.fixture
def emulated(model: Path, entrant: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are the model itself: no bundle is compiled."""

    def both(_wish: Any, source: Any, _console: Any) -> list[Contestant]:
        return [levels.plain_contestant(source), entrant("none", "diffusers", model)]

    monkeypatch.setattr(levels, "contestants", both)


@pytest.mark.usefixtures("emulated")
def test_a_whole_run_writes_report_and_pictures_and_one_json_line(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    arguments = ("--levels", "none", "--count", "2", "--threads", "1", "--json")
    result = invoke(str(model), "-o", str(out), *arguments)
    assert result.exception is None, result.output
    (line,) = result.stdout.splitlines()
    document = json.loads(line)
    reference, level = document["levels"]
    assert (reference["name"], level["name"]) == ("diffusers fp32", "none")
    assert reference["bytes_vs_fp32"] == pytest.approx(1.0, abs=0.01)  # stored as fp32
    assert (level["psnr_db"], level["ssim"], level["sqnr_db"]) == (100.0, 1.0, 200.0)
    assert level["speedup"] > 0
    assert level["peak_rss_bytes"] > 100e6
    assert (document["settings"]["steps"], document["settings"]["guidance"]) == (2, 3.0)
    assert document["complete"] is True
    assert len(list(out.glob("images/*/*.png"))) == 4
    assert json.loads((out / "report.json").read_text("utf-8"))["levels"] == document["levels"]
    assert (out / "report.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.usefixtures("emulated")
def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    out.touch()
    error = invoke(str(model), "-o", str(out), "--levels", "none").exception
    assert isinstance(error, SpecError)
    assert f"can't write to {out}" in str(error)
    assert "name another folder with -o" in str(error)

"""`kiln bench`: speed, size and start-up, each against its alternative measured in the same run."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

from runners.console import Console, quiet_libraries

__all__ = ["bench"]


class _Section(NamedTuple):
    """Functions of a module of benchmarks: what measures, and what says the result in lines."""

    module: str
    measure: str = "measure"
    """Console, folder for what stays -> the section's document."""
    lines: str = "lines"

    def function(self, name: str) -> Any:
        return getattr(import_module(f"benchmarks.{self.module}"), name)


_SECTIONS = {
    "startup": _Section("reference_runs", "start", "lines_of_startup"),
    "compile": _Section("reference_runs", "compile_reference", "lines_of_compile"),
    "reference": _Section("reference_runs", "compare_reference", "lines_of_reference"),
    "full-size": _Section("full_runs", "compare", "lines_of_compare"),
    "quantize": _Section("full_runs", "quantize", "lines_of_quantize"),
    "analyze": _Section("full_runs", "analyze", "lines_of_analyze"),
    "tensorrt": _Section("full_runs", "build_for_cards", "lines_of_cards"),
    "install": _Section("shipping"),
    "sdxl": _Section("full_compile"),
    "memory": _Section("memory", "measure_reference"),
    "memory-full": _Section("memory", "measure_full_size"),
    "tiles": _Section("tiles"),
    "tiles-full-size": _Section("tiles", "measure_full_size", "lines_of_full_size"),
    "attention": _Section("attention"),
    "lora": _Section("lora"),
    "lora-backends": _Section("lora", "measure_backends", "lines_of_backends"),
    "lora-full-size": _Section("lora", "measure_full_size", "lines_of_full_size"),
    "aoti": _Section("regional"),
    "text-encoder": _Section("text_encoder"),
}


@click.command()
@click.option(
    "--section",
    type=click.Choice(list(_SECTIONS)),
    multiple=True,
    help="Only this section; may be given several times.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out/bench"),
    show_default=True,
    help="Folder for bench.json and the comparison's report.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def bench(section: tuple[str, ...], out: Path, as_json: bool) -> None:  # noqa: FBT001
    """Measure kiln against its alternatives on this machine; takes the better part of an hour."""
    quiet_libraries()
    console = Console(json_output=as_json)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bench.json"
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name, one in _SECTIONS.items():
        if not section or name in section:
            conditions = _conditions()
            document[name] = {"conditions": conditions, **one.function(one.measure)(console, out)}
            path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    found = ((one, document[name]) for name, one in _SECTIONS.items() if name in document)
    text = "\n".join(line for one, part in found for line in one.function(one.lines)(part))
    console.result(text, document)


def _conditions() -> dict[str, Any]:
    """The machine, its load and the versions, as they are when a section begins."""
    from benchmarks.conditions import load_average, tool_versions
    from profiles import hardware

    facts = hardware.detect()
    return {
        "cpu": facts.cpu.name,
        "isa": list(facts.cpu.isa),
        "cores": facts.cpu.cores,
        "load_average": load_average(),
        "versions": tool_versions(),
    }

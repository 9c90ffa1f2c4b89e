"""The `kiln` command: a table of command -> module, each imported when it is called.

Commands of optimizer and benchmarks resolve where those are installed, and say in one sentence
what to install where they aren't.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import click

from profiles.errors import DiskFullError, KilnError, MissingError, OutOfMemory

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: dict[str, str] = {
    "analyze": "optimizer.cli:analyze_command",
    "bench": "benchmarks.bench:bench",
    "bundles": "runners.shipping:bundles_command",
    "cache": "optimizer.cache:cache_command",
    "check": "runners.check:check_command",
    "compare": "benchmarks.compare:compare",
    "compile": "optimizer.cli:compile_command",
    "doctor": "runners.doctor:doctor_command",
    "fleet": "optimizer.fleet:fleet_command",
    "generate": "runners.generate:generate",
    "inspect": "runners.inspect:inspect_command",
    "install": "runners.shipping:install_command",
    "keygen": "runners.keygen:keygen_command",
    "models": "optimizer.models:models_command",
    "pack": "runners.shipping:pack_command",
    "plan": "runners.plan:plan_command",
    "profiles": "runners.profiles:profiles_command",
    "pull": "optimizer.pull:pull_command",
    "rollback": "runners.shipping:rollback_command",
    "selftest": "runners.selftest_command:selftest_command",
    "trust": "runners.trusting:trust_command",
    "verify": "runners.verify:verify_command",
}
"""Command -> module:attribute."""

_LINES = {
    "analyze": "Measure which layers lose most from few bits.",
    "bench": "Measure speed, size and start-up against the peers.",
    "bundles": "List the installed bundles and which version runs.",
    "cache": "Show what kiln keeps on this disk, check it, make room.",
    "check": "Say whether a bundle runs on this machine or another.",
    "compare": "Compare levels with plain diffusers: speed, size, pictures.",
    "compile": "Make a bundle from a model.",
    "doctor": "Show what this machine is, has and lacks.",
    "fleet": "Plan which bundles a room of machines needs.",
    "generate": "Make pictures with a bundle.",
    "inspect": "Show what is inside a bundle.",
    "install": "Install a signed bundle from a folder, a share or a server.",
    "keygen": "Make a pair of keys to sign bundles with.",
    "models": "List the models on this machine and their bundles.",
    "pack": "Pack a bundle for other machines, signed.",
    "plan": "Predict what fits into how much memory, and how.",
    "profiles": "List the machines and cards that kiln knows.",
    "pull": "Download what kiln uses of a hub model.",
    "rollback": "Go back to the version of a bundle that ran before.",
    "selftest": "Run a bundle's recorded calls and draw its picture.",
    "trust": "Say whose signed bundles may run here.",
    "verify": "Check a bundle against its signature.",
}
"""Their lines in `kiln --help`, which imports none of them."""


class _LazyGroup(click.Group):
    """Knows the commands by name; imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise MissingError(
                f"kiln {cmd_name} needs {error.name}, which isn't installed: run "
                f'pip install "kiln-diffusion[{_extra(module)}]".'
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_LINES.items()))


def _extra(module: str) -> str:
    return "bench,compile,cpu" if module.startswith("benchmarks.") else "compile,cpu"


def _version() -> str:
    try:
        return version("kiln-diffusion")
    except PackageNotFoundError:
        return "0"


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="kiln")
def cli() -> None:
    """Compile diffusion pipelines ahead of time, and make pictures with what comes out.

    Exit codes: 0 ok, 2 wrong input, 10 incompatible, 11 untrusted, 12 corrupt, 13 out of memory,
    14 disk full, 15 build failed, 16 quality gate failed, 17 something isn't installed,
    18 self-test failed, 20 partly done, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code; the error is the last line."""
    try:
        cli.main(arguments, prog_name="kiln", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted; what was finished is kept.", 130)
    except KilnError as error:
        log = getattr(error, "log", "")
        if log and {"-v", "--verbose"} & set(arguments or sys.argv):
            print(log, file=sys.stderr)
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("Out of memory: close other programs, or take a smaller size.", OutOfMemory.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        name = error.filename or "the disk"
        _fail(f"No space left for {name}: free some and run again.", DiskFullError.exit_code)


def _fail(sentence: str, code: int) -> None:
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

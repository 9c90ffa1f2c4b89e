"""The child of `kiln selftest`: runs a bundle's recorded calls and draws its picture.

It says each thing on its own line of stdout, as JSON, before and after: when an engine takes the
process down, the parent knows which one it was.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from profiles.errors import KilnError, SelfTestError
from runners.bundle import Bundle, open_bundle
from runners.trust import load_trust

__all__ = ["main"]


def main(path: str, trust: str | None = None) -> int:
    """Test the bundle at `path`; the exit code says whether the test itself could be run.

    `trust` is a NAME.pub or a trust file (default: the user's own).
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    from runners.console import quiet_libraries

    quiet_libraries()
    try:
        _test(open_bundle(Path(path), trust=load_trust(trust)), say)
    except KilnError as error:
        say(error=type(error).__name__, message=str(error))
        return error.exit_code
    except Exception as error:  # an engine's library may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(error=SelfTestError.__name__, message=f"it ended with {type(error).__name__}: {first}")
        return SelfTestError.exit_code
    say(finished=True)
    return 0


def _test(bundle: Bundle, say: Any) -> None:
    import psutil

    from runners.engines import engine_class
    from runners.selftest import check_calls

    for entry in bundle.manifest.engines:
        if entry.selftest is None or entry.selftest_db is None:
            continue
        say(start=f"The engine of {entry.name}")
        engine = engine_class(entry.backend)(
            {role: bundle.file(name) for role, name in entry.files.items()},
            signature=entry.signature,
            properties=entry.properties,
            threads=psutil.cpu_count(logical=False) or 1,
        )
        with engine:
            found = check_calls(bundle, entry, engine)
            machine = engine.machine()
        say(name=entry.name, machine=machine, db=found, needed_db=entry.selftest_db)
    picture = bundle.manifest.picture
    if picture is not None:
        from runners.reference_picture import picture_psnr_db

        say(start="The picture")
        psnr = picture_psnr_db(bundle, picture)
        say(name="picture", machine="", db={"psnr": psnr}, needed_db=picture.least_psnr_db)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

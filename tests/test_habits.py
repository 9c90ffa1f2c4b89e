from __future__ import annotations

import ast
import re

import pytest

from tests.tracked import PACKAGES, ROOT, modules, tracked_files

HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("registry", "npmjs", "org"),
        ("pypi", "nvidia", "com"),
        ("pypi", "ngc", "nvidia", "com"),
        ("deb", "debian", "org"),
    )
]
MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:/(?:work|root|home|Users)/\w|[A-Z]:\\Users\\)")
PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
RESERVED = {"con", "prn", "aux", "nul", *PORTS}


def text_of(name: str) -> str:
    content = (ROOT / name).read_bytes()
    return "" if b"\0" in content else content.decode("utf-8")


def test_the_path_pattern_sees_machine_paths_only() -> None:
    assert MACHINE_PATH.search('open("/' + 'work/main/x")')
    assert MACHINE_PATH.search("C:" + r"\Users\me")
    for fine in ("https://example.net/work/x", "out/work/x", "/proc/cpuinfo", "a/home/b"):
        assert not MACHINE_PATH.search(fine)


def test_no_file_names_a_registry_host_or_a_machines_path() -> None:
    texts = {name: text_of(name) for name in tracked_files()}
    assert [n for n, text in texts.items() if any(host in text for host in HOSTS)] == []
    assert [n for n, text in texts.items() if MACHINE_PATH.search(text)] == []


def is_legal_on_windows(name: str) -> bool:
    """By Microsoft's page "Naming Files, Paths, and Namespaces"; 200 leaves room for a folder."""
    return len(name) < 200 and all(
        not re.search(r'[<>:"\\|?*\x00-\x1f]', part)
        and not part.endswith((".", " "))
        and part.partition(".")[0].lower() not in RESERVED
        for part in name.split("/")
    )


def test_file_names_are_legal_on_windows() -> None:
    assert not any(map(is_legal_on_windows, ("a:b", "aux.py", "dir./x", "what?", "x" * 200)))
    names = tracked_files()
    assert [name for name in names if not is_legal_on_windows(name)] == []
    assert len({name.lower() for name in names}) == len(names)


POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
POSIX_CALLS = {
    "os.fork",
    "os.geteuid",
    "os.getpgid",
    "os.getuid",
    "os.killpg",
    "os.mkfifo",
    "os.sched_getaffinity",
    "os.setsid",
    "os.sysconf",
    "os.uname",
    "signal.SIGKILL",
    "signal.alarm",
}


LINUX_ONLY = {"optimizer/nursery.py"}
"""Asked with `supported()` before it is used."""


def posix_only(source: str) -> set[str]:
    """POSIX-only calls anywhere, and POSIX-only modules imported at a module's top level."""
    tree = ast.parse(source)
    calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    top = [node for node in tree.body if isinstance(node, ast.Import)]
    imported = {alias.name for node in top for alias in node.names}
    return (calls & POSIX_CALLS) | (imported & POSIX_MODULES)


@pytest.mark.parametrize("module", sorted(set(modules()) - LINUX_ONLY))
def test_a_module_makes_no_posix_only_call(module: str) -> None:
    assert posix_only("import fcntl\nos.fork()") == {"fcntl", "os.fork"}
    assert posix_only(text_of(module)) == set()


def exported(source: str) -> list[str] | None:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


def kind_of(name: str) -> int:
    """Constants, classes, functions: the order that ruff's RUF022 keeps."""
    return 0 if name.isupper() else 1 if name.lstrip("_")[0].isupper() else 2


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value: W8A8 before W8A16."""
    return [(int(n or -1), word) for n, word in re.findall(r"(\d*)(\D*)", name)]


@pytest.mark.parametrize("module", modules())
def test_what_a_module_exports_is_listed_sorted_and_there(module: str) -> None:
    source = text_of(module)
    names = exported(source)
    if names is None:
        return
    assert names == sorted(names, key=lambda name: (kind_of(name), natural(name)))
    assert len(set(names)) == len(names)
    body = ast.parse(source).body
    defined = {node.name for node in body if hasattr(node, "name")}
    assigned = {
        target.id
        for node in body
        for target in (getattr(node, "targets", None) or [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }
    aliases = {
        alias.asname or alias.name
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    lazy = "__getattr__" in defined
    assert lazy or set(names) <= defined | assigned | aliases


def test_every_package_says_what_it_is() -> None:
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse(text_of(f"{package}/__init__.py")))


def test_make_help_lists_every_target() -> None:
    makefile = text_of("Makefile")
    [phony] = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    described = re.findall(r"^([a-z-]+):.* ## \S", makefile, re.MULTILINE)
    assert phony.split() == described

"""The trust file and `kiln trust`."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import SpecError, UnsupportedError
from runners.keys import make_keys
from runners.trust import Trust, default_trust_path, load_trust, save_trust

Kiln = Callable[..., Any]


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own config folder for each test: they write the user's trust file."""
    folder = tmp_path / "config"
    monkeypatch.setenv("KILN_CONFIG", str(folder))
    return folder


@pytest.fixture
def public(tmp_path: Path) -> Path:
    make_keys(tmp_path / "builder")
    return tmp_path / "builder.pub"


def test_nobody_is_trusted_at_first(kiln: Kiln, config: Path) -> None:
    assert load_trust(None) == Trust()
    ended = kiln("trust", "ls")
    assert "No key is trusted: add one with `kiln trust add NAME.pub`." in ended.out
    assert not config.exists()


def test_a_public_key_is_trust_in_that_key_alone(public: Path) -> None:
    [key] = load_trust(public).keys
    assert (key.public_key, key.names) == (public.read_text(), ("*",))
    assert load_trust(None).keys == ()


def test_what_is_added_is_listed_and_limited(kiln: Kiln, public: Path, config: Path) -> None:
    ended = kiln(
        *("trust", "add", public, "--name", "acme/*", "--name", "toy"),
        *("--from", "2026-01-02", "--until", "2030-12-31"),
    )
    assert ended.code == 0
    [key] = load_trust(None).keys
    assert (key.names, str(key.valid_from), str(key.valid_until), key.comment) == (
        ("acme/*", "toy"),
        "2026-01-02",
        "2030-12-31",
        "builder.pub",
    )
    assert f"{key.id}  acme/*, toy from 2026-01-02 until 2030-12-31" in kiln("trust", "ls").out
    assert json.loads(kiln("trust", "ls", "--json").out)["keys"][0]["id"] == key.id
    if sys.platform != "win32":
        assert stat.S_IMODE(default_trust_path().stat().st_mode) == 0o600
        assert stat.S_IMODE(config.stat().st_mode) == 0o700
    assert kiln("trust", "add", public).code == 0
    [key] = load_trust(None).keys
    assert key.names == ("*",)
    assert [path.name for path in config.iterdir()] == ["trust.json"]


def test_a_trust_file_round_trips(kiln: Kiln, public: Path) -> None:
    kiln("trust", "add", public, "--until", "2030-12-31")
    trust = load_trust(None)
    save_trust(trust)
    assert load_trust(default_trust_path()) == load_trust(None) == trust


@pytest.mark.parametrize("shown", [64, 8])
def test_what_is_revoked_stays_so_whatever_trust_is_given(
    kiln: Kiln, public: Path, shown: int
) -> None:
    kiln("trust", "add", public)
    identity = load_trust(None).keys[0].id
    assert kiln("trust", "revoke", identity[:shown]).out == f"{identity}  revoked\n"
    assert kiln("trust", "revoke", identity).code == 0
    assert load_trust(None).revoked == load_trust(public).revoked == (identity,)
    assert f"{identity}  revoked" in kiln("trust", "ls").out
    ended = kiln("trust", "add", public)
    assert ended.code == 2
    assert '"revoked"' in ended.sentence


def test_a_key_that_was_never_here_can_be_revoked(kiln: Kiln) -> None:
    assert kiln("trust", "revoke", "AB" * 32).code == 0
    assert kiln("trust", "ls").out == f"{'ab' * 32}  revoked\n"


@pytest.mark.parametrize("identity", ["", "abc", "x" * 64, "0" * 63])
def test_what_is_no_id_revokes_nothing(kiln: Kiln, identity: str) -> None:
    ended = kiln("trust", "revoke", identity)
    assert ended.code == 2
    assert "give the 64 characters that `kiln trust ls` shows" in ended.sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--from", "2026-02-01", "--until", "2026-01-01"), "give an earlier first day"),
        (("--until", "tomorrow"), "does not match the format"),
    ],
)
def test_days_that_make_no_sense_are_refused(
    kiln: Kiln, public: Path, options: tuple[str, ...], words: str
) -> None:
    ended = kiln("trust", "add", public, *options)
    assert ended.code == 2
    assert words in ended.err


def test_a_private_key_is_not_taken_for_a_public_one(kiln: Kiln, public: Path) -> None:
    ended = kiln("trust", "add", public.with_suffix(""))
    assert ended.code == 2
    assert "is no public key in PEM: give the NAME.pub" in ended.sentence
    assert kiln("trust", "add", public.with_name("absent.pub")).code == 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "neither a public key nor a trust file"),
        (b"[]", "neither a public key nor a trust file"),
        (b"{}", 'an object with "schema_version"'),
        (b'{"schema_version": true}', 'an object with "schema_version"'),
        (b'{"schema_version": 1, "schema_version": 1}', "a key stands twice"),
        (b'{"schema_version": 1, "revokd": []}', "wrong at revokd"),
        (b'{"schema_version": 1, "revoked": ["AB"]}', "wrong at revoked.0"),
        (b'{"schema_version": 1, "keys": [{"id": "x", "public_key": "x"}]}', "wrong at keys.0.id"),
        (b"-----BEGIN PUBLIC KEY-----", "is no public key in PEM"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_trust_file_is_named(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "trust").write_bytes(raw)
    with pytest.raises(SpecError, match=words):
        load_trust(tmp_path / "trust")


def test_an_id_that_isnt_the_keys_is_refused(public: Path, tmp_path: Path) -> None:
    document = load_trust(public).model_dump(mode="json")
    document["keys"][0]["id"] = "0" * 64
    (tmp_path / "trust.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match="the id of this public key is"):
        load_trust(tmp_path / "trust.json")


def test_the_same_key_twice_is_refused(public: Path, tmp_path: Path) -> None:
    document = load_trust(public).model_dump(mode="json")
    document["keys"] *= 2
    (tmp_path / "trust.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match="a key stands twice"):
        load_trust(tmp_path / "trust.json")


def test_a_newer_trust_file_is_incompatible(tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_text('{"schema_version": 2, "x": 1}')
    with pytest.raises(UnsupportedError, match="pip install -U kiln-diffusion"):
        load_trust(tmp_path / "trust.json")

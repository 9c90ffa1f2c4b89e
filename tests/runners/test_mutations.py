"""Mutated signatures and manifests: typed errors only, and no other payload is ever accepted.

The thousands run with `-m faults`; a sample of each kind runs always.
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from profiles.errors import BundleError, UnsupportedError, UntrustedError
from runners import dsse
from runners.bundle import open_bundle
from runners.keys import hint_of, load_private_key, make_keys
from runners.manifest_file import (
    bundle_digests,
    digest_line,
    parse_manifest,
    read_manifest,
    read_raw,
)
from runners.signing import sign_bundle, sign_files, verify_signature
from runners.trust import Trust, load_trust
from tests.toy_bundle import toy_bundle

SIGNATURES, MANIFESTS = 2000, 10_000
SAMPLE = 150

Mutator = Callable[[random.Random, bytes], bytes]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1e308, 10**30, "", "x", "\0", "../x", "é\u202e", "0" * 64),
    *([], {}, [[]], {"a": {}}, ["x"] * 1000),
)
"""What stands where something else should."""


def flipped(chance: random.Random, raw: bytes) -> bytes:
    position = chance.randrange(len(raw))
    return raw[:position] + bytes([raw[position] ^ 1 << chance.randrange(8)]) + raw[position + 1 :]


def cut(chance: random.Random, raw: bytes) -> bytes:
    start, end = sorted(chance.choices(range(len(raw) + 1), k=2))
    return raw[:start] + raw[end:]


def inserted(chance: random.Random, raw: bytes) -> bytes:
    position = chance.randrange(len(raw) + 1)
    return raw[:position] + chance.randbytes(chance.randrange(1, 9)) + raw[position:]


def repeated(chance: random.Random, raw: bytes) -> bytes:
    start, end = sorted(chance.choices(range(len(raw) + 1), k=2))
    return raw[:end] + raw[start:]


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every container in a document, with each of its keys."""
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    found: list[tuple[Any, Any]] = []
    for key, value in list(items):
        found += [(document, key), *places(value)]
    return found


def replaced(chance: random.Random, raw: bytes) -> bytes:
    document = json.loads(raw)
    container, key = chance.choice(places(document))
    container[key] = chance.choice(VALUES)
    return json.dumps(document).encode()


def dropped(chance: random.Random, raw: bytes) -> bytes:
    document = json.loads(raw)
    container, key = chance.choice(places(document))
    del container[key]
    return json.dumps(document).encode()


def added(chance: random.Random, raw: bytes) -> bytes:
    document = json.loads(raw)
    container, key = chance.choice(places(document))
    if isinstance(container, dict):
        container[f"{key}2"] = chance.choice(VALUES)
    else:
        container.append(chance.choice(VALUES))
    return json.dumps(document).encode()


def doubled(chance: random.Random, raw: bytes) -> bytes:
    """One key twice, with another value the first or the second time."""
    text = json.dumps(json.loads(raw))
    starts = [i for i, c in enumerate(text) if c == "{" and text[i + 1] == '"']
    start = chance.choice(starts) + 1
    name = text[start : text.index('"', start + 1) + 1]
    return f"{text[:start]}{name}: {json.dumps(chance.choice(VALUES))}, {text[start:]}".encode()


def nested(chance: random.Random, raw: bytes) -> bytes:
    depth = chance.choice((10, 2000, 50_000))
    return b"[" * depth + raw + b"]" * depth


def encoded(chance: random.Random, raw: bytes) -> bytes:
    return raw.decode().encode(chance.choice(("utf-16", "utf-32", "utf-8-sig")))


COMMON: tuple[Mutator, ...] = (
    *(flipped, cut, inserted, repeated, replaced, dropped, added, doubled, nested, encoded),
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "builder"
    make_keys(path)
    return path


@pytest.fixture(scope="module")
def trust(key: Path) -> Trust:
    return load_trust(f"{key}.pub")


@pytest.fixture
def signed(key: Path, tmp_path: Path) -> Path:
    folder = toy_bundle(tmp_path / "bundle")
    sign_bundle(folder, key)
    (folder / "local.mark").unlink()
    return folder


def payload_changed(chance: random.Random, raw: bytes) -> bytes:
    """Another statement under the old signature."""
    document = json.loads(raw)
    payload = base64.b64decode(document["dsseEnvelope"]["payload"])
    changed = chance.choice(COMMON)(chance, payload)
    document["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
    return json.dumps(document).encode()


def foreign(chance: random.Random, raw: bytes) -> bytes:
    """A changed statement, signed by somebody else under the trusted key's name or their own."""
    envelope = dsse.decode(raw)
    other = ec.derive_private_key(chance.randrange(1, 1 << 250), ec.SECP256R1())
    resources = dsse.resources_of(envelope.payload)
    resources[chance.choice(sorted(resources))] = "0" * 64
    theirs = dsse.decode(sign_files(resources, other))
    hint = chance.choice((envelope.hint, hint_of(other.public_key())))
    return dsse.encode(dsse.Envelope(theirs.payload, theirs.signature, hint))


def signature_flipped(chance: random.Random, raw: bytes) -> bytes:
    envelope = dsse.decode(raw)
    changed = chance.choice(COMMON[:4])(chance, envelope.signature)
    return dsse.encode(dsse.Envelope(envelope.payload, changed, envelope.hint))


def mutated_signatures(folder: Path, trust: Trust, times: int) -> Counter[str]:
    """How `times` mutated signatures of a bundle ended."""
    chance = random.Random(times)
    path = folder / "signature.json"
    right = path.read_bytes()
    payload = dsse.decode(right).payload
    found = read_raw(folder)
    digests = bundle_digests(found, read_manifest(folder))
    kinds = (*COMMON, payload_changed, foreign, signature_flipped)
    ended: Counter[str] = Counter()
    for turn in range(times):
        raw = kinds[turn % len(kinds)](chance, right)
        path.write_bytes(raw)
        outcomes = []
        for use in (
            lambda: verify_signature(raw, digests, trust, name="toy"),  # noqa: B023
            lambda: open_bundle(folder, trust=trust),
        ):
            try:
                use()
            except (BundleError, UntrustedError) as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("accepted")
                assert dsse.decode(raw).payload == payload, raw
        assert outcomes[0] == outcomes[1]
        ended[outcomes[0]] += 1
    path.write_bytes(right)
    open_bundle(folder, trust=trust)
    return ended


def rewritten(folder: Path, raw: bytes) -> None:
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sha256").write_bytes(digest_line(raw))


def mutated_manifests(folder: Path, key: Path, times: int) -> Counter[str]:
    """How `times` mutated manifests, each with its right manifest.sha256, were parsed.

    Under the old signature none is accepted; signed anew by the trusted key, which must not sign
    such a thing, the bundle is opened or refused with a typed error.
    """
    trust, private = load_trust(f"{key}.pub"), load_private_key(key)
    chance = random.Random(times)
    right, signature = (folder / "manifest.json").read_bytes(), folder / "signature.json"
    was = signature.read_bytes()
    ended: Counter[str] = Counter()
    for turn in range(times):
        raw = COMMON[turn % len(COMMON)](chance, right)
        if raw == right:
            ended["unchanged"] += 1
            continue
        rewritten(folder, raw)
        with pytest.raises(BundleError):
            open_bundle(folder, trust=trust)
        try:
            manifest = parse_manifest(raw, folder)
            digests = bundle_digests(read_raw(folder), manifest)
            signature.write_bytes(sign_files(digests, private))
            open_bundle(folder, trust=trust)
        except (BundleError, UnsupportedError) as error:
            ended[type(error).__name__] += 1
        else:
            ended["opened"] += 1
        signature.write_bytes(was)
    rewritten(folder, right)
    open_bundle(folder, trust=trust)
    return ended


def test_mutated_signatures_end_in_typed_errors(signed: Path, trust: Trust) -> None:
    ended = mutated_signatures(signed, trust, SAMPLE)
    assert ended.total() == SAMPLE
    assert ended["BundleError"] > SAMPLE / 2


@pytest.mark.faults
def test_two_thousand_mutated_signatures_end_in_typed_errors(signed: Path, trust: Trust) -> None:
    ended = mutated_signatures(signed, trust, SIGNATURES)
    print(dict(ended))
    assert ended.total() == SIGNATURES
    assert ended["UntrustedError"] > 0


def test_mutated_manifests_end_in_typed_errors(signed: Path, key: Path) -> None:
    ended = mutated_manifests(signed, key, SAMPLE)
    assert ended.total() == SAMPLE
    assert ended["BundleError"] > SAMPLE / 2


@pytest.mark.faults
def test_ten_thousand_mutated_manifests_end_in_typed_errors(signed: Path, key: Path) -> None:
    ended = mutated_manifests(signed, key, MANIFESTS)
    print(dict(ended))
    assert ended.total() == MANIFESTS

"""Signatures: made, verified, exchanged with OpenSSF's model-signing, and refused."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import model_signing.hashing
import model_signing.signing
import model_signing.verifying
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from profiles.errors import BundleError, SpecError, UntrustedError
from runners.keys import key_id, load_private_key, make_keys, parse_public_key
from runners.signing import sign_bundle, sign_files, verify_signature
from runners.trust import Trust, load_trust
from tests.toy_bundle import toy_bundle

DIGESTS = {"a": "1" * 64, "a.b": "2" * 64, "a/b": "3" * 64}


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
    """A bundle that came from elsewhere."""
    folder = toy_bundle(tmp_path / "bundle")
    sign_bundle(folder, key)
    (folder / "local.mark").unlink()
    return folder


def limited(trust: Trust, **fields: Any) -> Trust:
    return trust.model_copy(update={"keys": (trust.keys[0].model_copy(update=fields),)})


def theirs(folder: Path, public: Path) -> None:
    """Verify as `model_signing verify key` does; ValueError unless all is right."""
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public).verify(
        folder, folder / "signature.json"
    )


def test_a_pair_of_keys_is_made_once_and_the_private_one_is_the_owners(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "builder"
    identity = make_keys(out)
    if sys.platform != "win32":
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
    public = parse_public_key(Path(f"{out}.pub").read_bytes(), "x")
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert identity == hashlib.sha256(der).hexdigest() == key_id(public)
    assert load_private_key(out).public_key() == public
    before = out.read_bytes()
    with pytest.raises(SpecError, match="exists and is kept: give another name with -o"):
        make_keys(out)
    out.unlink()
    with pytest.raises(SpecError, match=r"builder\.pub exists and is kept"):
        make_keys(out)
    assert not out.exists()
    assert before.startswith(b"-----BEGIN PRIVATE KEY-----")


def pem(key: Any, encryption: Any = None) -> bytes:
    raw: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )
    return raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (lambda: b"", "is no private key in PEM"),
        (lambda: b"x" * (1 << 21), "more than any key"),
        (lambda: pem(ec.generate_private_key(ec.SECP384R1())), "is no P-256 key"),
        (
            lambda: pem(
                ec.generate_private_key(ec.SECP256R1()),
                serialization.BestAvailableEncryption(b"x"),
            ),
            "is encrypted: give a key without passphrase",
        ),
    ],
    ids=["empty", "large", "p384", "encrypted"],
)
def test_what_is_no_key_to_sign_with_is_named(
    tmp_path: Path, raw: Callable[[], bytes], words: str
) -> None:
    (tmp_path / "key").write_bytes(raw())
    with pytest.raises(SpecError, match=words):
        load_private_key(tmp_path / "key")


def test_a_signature_is_of_exactly_its_files(key: Path, trust: Trust) -> None:
    raw = sign_files(DIGESTS, load_private_key(key))
    assert verify_signature(raw, DIGESTS, trust, name="toy") == trust.keys[0].id
    for other in (
        {**DIGESTS, "c": "4" * 64},
        {**DIGESTS, "a": "5" * 64},
        {name: digest for name, digest in DIGESTS.items() if name != "a"},
    ):
        with pytest.raises(BundleError, match="copy it again"):
            verify_signature(raw, other, trust, name="toy")


def test_kilns_signature_is_verified_by_model_signing(signed: Path, key: Path) -> None:
    theirs(signed, Path(f"{key}.pub"))
    (signed / "local.mark").write_text("and other machines' marks are ignored")
    theirs(signed, Path(f"{key}.pub"))
    moved = signed.rename(signed.with_name("renamed"))
    theirs(moved, Path(f"{key}.pub"))
    (moved / "unet" / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'unet/weights\.bin'"):
        theirs(moved, Path(f"{key}.pub"))


def test_the_model_signing_command_verifies_a_bundle(signed: Path, key: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    options = ["--signature", str(signed / "signature.json"), "--public_key", f"{key}.pub"]
    child = subprocess.run([*command, *options], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "Verification succeeded\n"), child.stderr


def test_model_signings_signature_is_verified_by_kiln(
    key: Path, trust: Trust, tmp_path: Path
) -> None:
    from runners.bundle import open_bundle

    folder = toy_bundle(tmp_path / "bundle")
    (folder / "local.mark").unlink()
    out = folder / "signature.json"
    model_signing.signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, out)
    assert open_bundle(folder, trust=trust).manifest.model.name == "toy"
    (folder / "unet" / "component.json").write_text("[]")
    with pytest.raises(BundleError, match=r"unet/component\.json"):
        open_bundle(folder, trust=trust)


def test_an_unknown_key_is_untrusted_and_its_fingerprint_shown(signed: Path, key: Path) -> None:
    fingerprint = hashlib.sha256(Path(f"{key}.pub").read_bytes()).hexdigest()
    with pytest.raises(UntrustedError) as caught:
        verify_signature((signed / "signature.json").read_bytes(), {}, Trust(), name="toy")
    assert fingerprint in str(caught.value)
    assert "kiln trust add NAME.pub" in str(caught.value)


def test_another_keys_signature_under_a_trusted_keys_name_is_damage(
    key: Path, trust: Trust
) -> None:
    forged = json.loads(sign_files(DIGESTS, ec.generate_private_key(ec.SECP256R1())))
    right = json.loads(sign_files(DIGESTS, load_private_key(key)))
    forged["verificationMaterial"] = right["verificationMaterial"]
    with pytest.raises(BundleError, match="isn't the one that the key"):
        verify_signature(json.dumps(forged).encode(), DIGESTS, trust, name="toy")


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"valid_until": datetime.now(UTC).date() - DAY}, "was trusted until"),
        ({"valid_from": datetime.now(UTC).date() + 2 * DAY}, "is trusted from"),
        ({"names": ("acme/*", "TOY")}, "is trusted for acme/\\*, TOY and this bundle is 'toy'"),
    ],
)
def test_a_keys_limits_hold(key: Path, trust: Trust, fields: dict[str, Any], words: str) -> None:
    raw = sign_files(DIGESTS, load_private_key(key))
    with pytest.raises(UntrustedError, match=words) as caught:
        verify_signature(raw, DIGESTS, limited(trust, **fields), name="toy")
    assert "kiln trust add NAME.pub" in str(caught.value)


def test_within_a_keys_limits_all_is_well(key: Path, trust: Trust) -> None:
    raw = sign_files(DIGESTS, load_private_key(key))
    today = datetime.now(UTC).date()
    wide = limited(trust, names=("no", "t?y"), valid_from=today - DAY, valid_until=today + DAY)
    assert verify_signature(raw, DIGESTS, wide, name="toy") == trust.keys[0].id


def test_a_revoked_key_is_untrusted(key: Path, trust: Trust) -> None:
    raw = sign_files(DIGESTS, load_private_key(key))
    revoked = trust.model_copy(update={"revoked": (trust.keys[0].id,)})
    with pytest.raises(UntrustedError, match="is revoked"):
        verify_signature(raw, DIGESTS, revoked, name="toy")


def document_of(raw: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(raw)
    return document


def resigned(key: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A signature whose statement was changed before it was signed, with the right key."""
    from cryptography.hazmat.primitives import hashes

    from runners.dsse import pae

    private = load_private_key(key)
    outer = document_of(sign_files(DIGESTS, private))
    statement = document_of(base64.b64decode(outer["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    signature = private.sign(pae(payload), ec.ECDSA(hashes.SHA256()))
    outer["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    outer["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    return json.dumps(outer).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(_type="x"), "wrong at _type"),
        (lambda s: s.update(predicateType="x"), "wrong at predicateType"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "method"),
        (lambda s: s["predicate"]["resources"].pop(), "root digest"),
        (lambda s: s["predicate"]["resources"].append({**s["predicate"]["resources"][0]}), "twice"),
        (lambda s: s["subject"].append(s["subject"][0]), "wrong at subject"),
        (lambda s: s.update(more=1), "wrong at more"),
    ],
)
def test_a_signed_statement_of_another_kind_is_refused(
    key: Path, trust: Trust, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        verify_signature(resigned(key, change), DIGESTS, trust, name="toy")


def test_a_large_signature_is_not_parsed(trust: Trust) -> None:
    with pytest.raises(BundleError, match="bytes and may have"):
        verify_signature(b"[" * (5 << 20), DIGESTS, trust, name="toy")


def test_a_damaged_bundle_is_not_signed(key: Path, tmp_path: Path) -> None:
    folder = toy_bundle(tmp_path / "bundle")
    (folder / "unet" / "weights.bin").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"unet/weights\.bin"):
        sign_bundle(folder, key)
    assert not (folder / "signature.json").exists()


def test_signing_again_replaces_the_signature(signed: Path, tmp_path: Path) -> None:
    before = {path.name for path in signed.iterdir()}
    make_keys(tmp_path / "other")
    sign_bundle(signed, tmp_path / "other")
    theirs(signed, tmp_path / "other.pub")
    assert {path.name for path in signed.iterdir()} == before
    shutil.rmtree(signed)

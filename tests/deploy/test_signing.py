"""Keys and signatures, also with the command line of the package that signs, and with OpenSSL's own reader of keys."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cusprun.deploy.manifest import MANIFEST, SIGNATURE
from cusprun.deploy.ship import ship
from cusprun.deploy.signing import CURVES, Signer, check_form, check_signature, make_key
from cusprun.errors import Failed, InvalidRequest

HASHES = {"a.txt": "0" * 64, "b/c.bin": "f" * 64}


def test_a_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    private, public = make_key(tmp_path / "keys" / "maker")
    assert private.stat().st_mode & 0o777 == 0o600
    assert public.name == "maker.pub"
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")
    before = private.read_bytes()
    with pytest.raises(InvalidRequest, match="never overwritten"):
        make_key(private)
    private.unlink()
    with pytest.raises(InvalidRequest, match="never overwritten"):
        make_key(private)  # the .pub is there still
    assert not private.exists()
    assert make_key(tmp_path / "another")[0].read_bytes() != before


@pytest.mark.parametrize("taken", ["maker", "maker.pub"])
def test_of_two_keygens_at_once_the_later_removes_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    other, (private, public) = tmp_path / taken, (tmp_path / "maker", tmp_path / "maker.pub")
    generate = ec.generate_private_key

    def late(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
        other.write_text("another's")  # after it was looked for
        return generate(curve)

    monkeypatch.setattr(ec, "generate_private_key", late)
    with pytest.raises(InvalidRequest, match=rf"{taken} exists; a key is never overwritten"):
        make_key(private)
    assert other.read_text() == "another's"
    assert [path for path in (private, public) if path.exists()] == [other]


@pytest.mark.parametrize("last", ["maker", "maker.pub"])
def test_a_key_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    open_file, names = os.fdopen, iter(["maker", "maker.pub"])

    def full(handle: int, mode: str) -> IO[Any]:
        file = open_file(handle, mode)
        if next(names) == last:
            file.write(b"half")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        make_key(tmp_path / "maker")
    assert not list(tmp_path.iterdir())


def test_an_encrypted_key(tmp_path: Path) -> None:
    private, public = make_key(tmp_path / "maker", "correct horse")
    assert private.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    with pytest.raises(InvalidRequest, match="is encrypted: give its passphrase in CUSPRUN_PASSPHRASE"):
        Signer(private)
    with pytest.raises(InvalidRequest, match="the passphrase is wrong"):
        Signer(private, "battery staple")
    signer = Signer(private, "correct horse")
    signer.sign("name", HASHES, tmp_path / SIGNATURE)
    assert check_signature((tmp_path / SIGNATURE).read_bytes(), HASHES, public) == signer.fingerprint
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_signature_is_over_every_name_and_hash(tmp_path: Path) -> None:
    private, public = make_key(tmp_path / "maker")
    Signer(private).sign("name", HASHES, tmp_path / SIGNATURE)
    content = (tmp_path / SIGNATURE).read_bytes()
    check_signature(content, HASHES, public)
    others = (
        {**HASHES, "a.txt": "1" * 64}, {"a.txt": HASHES["a.txt"]}, {**HASHES, ".gitattributes": "0" * 64},
        {"b.txt": "0" * 64, "b/c.bin": "f" * 64}, {},
    )  # fmt: skip
    for hashes in others:
        with pytest.raises(Failed, match="does not hold"):
            check_signature(content, hashes, public)
    with pytest.raises(Failed, match="does not hold"):
        check_signature(content, HASHES, make_key(tmp_path / "another")[1])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 10**5, b'{"dsseEnvelope": {"signatures": []}}'])
def test_what_is_no_signature(content: bytes) -> None:
    with pytest.raises(Failed, match="damaged"):
        check_form(content)


def test_keys_that_are_none(tmp_path: Path) -> None:
    private, public = make_key(tmp_path / "maker")
    with pytest.raises(InvalidRequest, match="no such file; make a key with cusprun-edge keygen"):
        Signer(tmp_path / "absent")
    with pytest.raises(InvalidRequest, match="holds no private key"):
        Signer(public)
    Signer(private).sign("name", HASHES, tmp_path / SIGNATURE)
    content = (tmp_path / SIGNATURE).read_bytes()
    with pytest.raises(InvalidRequest, match=r"it is the private key; name the \.pub"):
        check_signature(content, HASHES, private)
    rsa = tmp_path / "rsa"
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    rsa.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))  # fmt: skip
    with pytest.raises(InvalidRequest, match="no key of an elliptic curve"):
        Signer(rsa)


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1(), ec.BrainpoolP256R1()]
)
def test_curves(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    """The curves that the package knows sign and verify; a key of another is refused before anything is done."""
    key = ec.generate_private_key(curve)
    private, public = tmp_path / "maker", tmp_path / "maker.pub"
    private.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))  # fmt: skip
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    if curve.name in CURVES:
        signer = Signer(private)
        signer.sign("name", HASHES, tmp_path / SIGNATURE)
        assert check_signature((tmp_path / SIGNATURE).read_bytes(), HASHES, public) == signer.fingerprint
        return
    for flag, take in (("sign", lambda: Signer(private)), ("key", lambda: check_signature(b"", HASHES, public))):
        with pytest.raises(InvalidRequest, match=f"--{flag} .* of the curve {curve.name}, and .* P-256, P-384, P-521"):
            take()


def test_the_packages_own_command_verifies_a_bundle(tmp_path: Path, pico_expert: Path) -> None:
    private, public = make_key(tmp_path / "maker")
    bundle = tmp_path / "bundle"
    ship(pico_expert, "laptop", bundle, archive="none", sign_key=private)

    def run() -> int:
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(bundle), "--signature",
                   str(bundle / SIGNATURE), "--public_key", str(public)]  # fmt: skip
        return subprocess.run(command, capture_output=True).returncode

    assert run() == 0
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b" ")
    assert run() != 0

"""Signatures over everything in a bundle, by the package model-signing with a key of one's own, and such keys.

The signature is a Sigstore bundle, which the package's own command line verifies as well. The files were hashed before,
so the package is given their hashes and reads no file twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cusprun.deploy.manifest import SIGNATURE
from cusprun.errors import Failed, InvalidRequest, MissingPackage
from cusprun.files import aside

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}  # that the package signs with
LONGEST_KEY = 65536  # bytes
LONGEST_SIGNATURE = 16 << 20


def make_key(out: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Writes a new private key (P-256, PEM, readable by its owner alone) to ``out``, the public one to ``out``.pub.

    With a passphrase the private key is encrypted. Raises InvalidRequest where either file exists.
    """
    serialization, ec = _cryptography()
    public = out.with_name(f"{out.name}.pub")
    for path in (out, public):
        if path.exists() or path.is_symlink():
            raise _exists(out, path)
    key = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    out.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for path, text, mode in ((out, content, 0o600), (public, _pem(key.public_key()), 0o666)):
            try:
                handle = os.open(path, NEW, mode)
            except FileExistsError:  # of another keygen, since the look above
                raise _exists(out, path) from None
            written.append(path)
            with os.fdopen(handle, "wb") as file:
                file.write(text)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return out, public


def _exists(out: Path, path: Path) -> InvalidRequest:
    return InvalidRequest(f"--out {out}: {path} exists; a key is never overwritten: choose another name")


class Signer:
    """A private key. Raises InvalidRequest where the file holds none, or the passphrase is missing or wrong."""

    def __init__(self, path: Path, passphrase: str | None = None) -> None:
        _package()
        serialization, ec = _cryptography()
        content = _read_key(path, "--sign")
        if passphrase is None and is_encrypted(content):
            raise InvalidRequest(f"--sign {path} is encrypted: give its passphrase in CUSPRUN_PASSPHRASE")
        self._password = passphrase.encode() if passphrase is not None and is_encrypted(content) else None
        try:
            key = serialization.load_pem_private_key(content, self._password)
        except (ValueError, TypeError) as error:
            wrong = "the passphrase is wrong, or it is no key" if self._password else "it holds no private key in PEM"
            raise InvalidRequest(f"--sign {path}: {wrong}; make one with cusprun-edge keygen") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidRequest(f"--sign {path} is no key of an elliptic curve: make one with cusprun-edge keygen")
        _check_curve("--sign", path, key)
        self._path = path
        self.fingerprint = hashlib.sha256(_pem(key.public_key())).hexdigest()

    def sign(self, name: str, hashes: Mapping[str, str], path: Path) -> None:
        """Writes the signature over files of these hex sha256 to ``path``."""
        signing, _ = _package()
        part = aside(path)
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=self._path, password=self._password)
            config.set_hashing_config(_known(hashes)).sign(Path(name), part)
            path.write_bytes(_canonical(json.loads(part.read_bytes())))
        finally:
            part.unlink(missing_ok=True)


def check_signature(content: bytes, hashes: Mapping[str, str], key: Path) -> str:
    """The fingerprint of the public ``key``, if ``content`` is its signature over files of these hex sha256.

    Raises Failed where it is not, InvalidRequest where the file holds no public key.
    """
    _, verifying = _package()
    serialization, ec = _cryptography()
    pem = _read_key(key, "--key")
    try:
        public = serialization.load_pem_public_key(pem)
    except ValueError as error:
        private = b"PRIVATE" in pem
        advice = "it is the private key; name the .pub beside it" if private else "it holds no public key in PEM"
        raise InvalidRequest(f"--key {key}: {advice}") from error
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise InvalidRequest(f"--key {key} is no key of an elliptic curve")
    _check_curve("--key", key, public)
    check_form(content)
    fingerprint = hashlib.sha256(_pem(public)).hexdigest()
    part = _scratch(content)
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
        verifier.set_hashing_config(_known(hashes)).verify(Path("bundle"), part)
    except Exception as error:  # the package and what it rests on raise many kinds; none of them is a signature
        reason = f"{error}".strip().rstrip(".") or "it is not this key's signature over these files"
        raise Failed(f"{SIGNATURE} does not hold for this bundle and {key}: {reason}") from error
    finally:
        part.unlink()
    return fingerprint


def check_form(content: bytes) -> None:
    """Raises Failed where a signature's file is not, byte for byte, what :class:`Signer` writes."""
    try:
        same = len(content) <= LONGEST_SIGNATURE and _canonical(json.loads(content)) == content
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        same = False
    if not same:
        raise Failed(f"{SIGNATURE} is damaged: it is not what `cusprun-edge ship --sign` writes")


def is_encrypted(content: bytes) -> bool:
    """Whether a private key in PEM asks for a passphrase."""
    return b"ENCRYPTED" in content


def _canonical(document: Any) -> bytes:
    """The one form of a signature's file, so that no byte of it can change unseen."""
    envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
    (signature,) = envelope["signatures"]
    parts = {
        "mediaType": str(document["mediaType"]),
        "verificationMaterial": {"publicKey": {"hint": str(material["publicKey"]["hint"])}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _base64(envelope["payload"]),
            "payloadType": str(envelope["payloadType"]),
            "signatures": [{"sig": _base64(signature["sig"]), "keyid": ""}],
        },
    }
    return (json.dumps(parts, indent=1) + "\n").encode()


def _base64(text: str) -> str:
    return base64.b64encode(base64.b64decode(text, validate=True)).decode()


def _known(hashes: Mapping[str, str]) -> Any:
    """The package's manifest of files whose hashes are known, instead of a folder that it reads."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    form = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    )
    items = [form.new_item(name, Digest("sha256", bytes.fromhex(digest))) for name, digest in hashes.items()]

    class Known(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return manifest.Manifest(Path(model_path).name, items, form)

    return Known()


def _scratch(content: bytes) -> Path:
    import tempfile

    handle, name = tempfile.mkstemp(prefix="cusprun-signature-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return Path(name)


def _read_key(path: Path, flag: str) -> bytes:
    if not path.is_file():
        raise InvalidRequest(f"{flag} {path}: there is no such file; make a key with cusprun-edge keygen")
    with path.open("rb") as file:
        return file.read(LONGEST_KEY)


def _check_curve(flag: str, path: Path, key: Any) -> None:
    if key.curve.name not in CURVES:
        known = ", ".join(CURVES.values())
        raise InvalidRequest(
            f"{flag} {path} is a key of the curve {key.curve.name}, and signatures are of {known}: make one with "
            "cusprun-edge keygen"
        )


def _pem(public: Any) -> bytes:
    serialization, _ = _cryptography()
    found: bytes = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return found


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError as error:
        raise MissingPackage("cryptography", "ship", "a key") from error
    return serialization, ec


def _package() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ModuleNotFoundError as error:  # also of what it needs without saying so: pyOpenSSL
        raise MissingPackage("model-signing", "ship", "a signature") from error
    return signing, verifying

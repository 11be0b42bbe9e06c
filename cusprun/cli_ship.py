"""`cusprun-edge ship`, `verify`, `unpack`, `keygen`: bundles for devices, made and held against what was made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cusprun import completion
from cusprun.errors import InvalidRequest
from cusprun.flags import Json, print_json

PASSPHRASE = "CUSPRUN_PASSPHRASE"

Key = Annotated[Path | None, typer.Option(help="The maker's public key, to check the signature by.")]


def ship(
    expert: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that a build left.", autocompletion=completion.experts)
    ],
    target: Annotated[str, typer.Option(help="laptop, phone, browser or server.", autocompletion=completion.targets)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The bundle's folder, with the archive beside it; a name that ends with .tar.zst or .zip: the archive "
            "alone. Default: bundles/NAME-TARGET."
        ),
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option(
            help="tar.zst, zip or none; default: zip, for a server tar.zst.", autocompletion=completion.archives
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gguf or onnx, for a phone both; default: the target's own choice.", autocompletion=completion.formats
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Type of the artifact; default: the first that was built.", autocompletion=completion.types),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="uniform: a GGUF with one width for all layers, for programs that open no other."),
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign with this private key, see cusprun-edge keygen.")
    ] = None,
    json_: Json = False,
) -> None:
    """Pack an expert for a kind of device: artifact, start scripts, README, model card, licences, manifest, signature.

    The same expert gives the same bytes, whenever and wherever it is shipped; a signature alone differs each time.
    The passphrase of an encrypted key is asked for, or taken from CUSPRUN_PASSPHRASE.

    Writes the bundle's folder and its archive, as --out and --archive say.

    See also: verify, keygen, doctor, serve.

    Example: cusprun-edge ship experts/smollm2-135m-instruct-en-legal-qa --target laptop --sign expert-key
    """
    formats = [] if format is None else format.split(",")
    if not set(formats) <= {"gguf", "onnx"} or (len(formats) > 1 and target != "phone"):
        raise InvalidRequest(f"--format {format}: write gguf or onnx; a phone takes both, gguf,onnx")
    from cusprun.deploy.ship import ship as run
    from cusprun.deploy.targets import Wish

    found = run(
        expert, target, out, archive=archive, wish=Wish(format, quant), layout=layout, sign_key=sign,
        passphrase=_passphrase(sign),
    )  # fmt: skip
    if json_:
        print_json(found.as_json())
    else:
        typer.echo("\n".join(found.as_lines()))


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle: its folder, its .tar.zst or its .zip.")],
    key: Key = None,
    json_: Json = False,
) -> None:
    """Hold every file of a bundle against its manifest, and with --key that against its signature.

    Without a key only accidents are found: whoever changes a bundle on purpose can write its manifest anew.

    See also: unpack, keygen, ship.

    Example: cusprun-edge verify bundles/expert-laptop.zip --key maker.pub
    """
    from cusprun.deploy.verify import verify as run

    found = run(bundle, key)
    if json_:
        print_json(found.as_json())
    else:
        typer.echo("\n".join(found.as_lines()))


def unpack(
    bundle: Annotated[Path, typer.Argument(help="A bundle's .tar.zst or .zip.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    key: Key = None,
    json_: Json = False,
) -> None:
    """Unpack a bundle while it is verified: the folder appears whole and right, or not at all.

    See also: verify.

    Example: cusprun-edge unpack expert-laptop.zip --out expert --key maker.pub
    """
    from cusprun.deploy.verify import unpack as run

    found = run(bundle, out, key)
    if json_:
        print_json({**found.as_json(), "folder": str(out)})
    else:
        typer.echo("\n".join([str(out), *found.as_lines()]))


def keygen(
    out: Annotated[Path, typer.Option(help="The private key to write; the public one goes beside it as .pub.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt it; the passphrase is asked for, or in CUSPRUN_PASSPHRASE.")
    ] = False,
    json_: Json = False,
) -> None:
    """Make a pair of keys (P-256) to sign bundles with. Keep the private one; give the .pub to who receives bundles.

    See also: ship --sign, verify --key.

    Example: cusprun-edge keygen --out expert-key
    """
    from cusprun.deploy.signing import make_key

    secret = None
    if passphrase:
        secret = os.environ.get(PASSPHRASE) or typer.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
    private, public = make_key(out, secret)
    if json_:
        print_json({"private": str(private), "public": str(public)})
    else:
        typer.echo(f"{private}  keep it\n{public}  give it to who receives bundles")


def _passphrase(key: Path | None) -> str | None:
    """The passphrase of an encrypted key: from the environment, else asked for."""
    if key is None or not key.is_file():
        return None
    from cusprun.deploy.signing import is_encrypted

    if not is_encrypted(key.read_bytes()):
        return None
    given = os.environ.get(PASSPHRASE)
    return given if given is not None else str(typer.prompt(f"Passphrase of {key}", hide_input=True, err=True))

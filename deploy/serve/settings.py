"""What `serve` was told: where it listens, whom it answers, how much it takes on; checked before a model is opened."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass

from cusprun.errors import InvalidRequest

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MOST_CHOICES = 8  # answers that one request may ask for


@dataclass(frozen=True)
class Settings:
    """Limits and names; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_hosts: tuple[str, ...] = ()  # further names in the Host header
    origins: tuple[str, ...] = ()  # web pages that may call (CORS)
    name: str | None = None  # of the model; else the artifact's
    max_body: int = 1_000_000
    context: int = 4096  # tokens
    max_tokens: int = 1024  # of one answer
    parallel: int = 1  # answers that are generated at once
    queue: int = 32  # requests that wait
    timeout: float = 300.0  # from a request's arrival to its last token
    grace: float = 30.0  # for running answers after the first signal
    threads: int | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names by which the server may be addressed, lower case, IPv6 in brackets; None: any.

        A page of another site can have its own name point at 127.0.0.1 (DNS rebinding) and then call a server there
        from the visitor's browser; the Host header tells it apart. On other addresses the key does.
        """
        if not self.loopback and not self.allow_hosts:
            return None
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, own, *self.allow_hosts))

    def check(self) -> None:
        """Raises InvalidRequest with everything that makes no sense."""
        problems = []
        if not self.loopback and self.api_key is None:
            problems.append(
                f"--host {self.host} lets other machines in: write --api-key KEY or set CUSPRUN_API_KEY, or listen on "
                "127.0.0.1"
            )
        if self.api_key is not None and not re.fullmatch(r"[!-~]{8,}", self.api_key):
            problems.append("--api-key: write at least 8 printable ASCII characters without spaces")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                problems.append(f"--cors {origin}: write an origin such as https://example.org, without a path")
        for name in self.allow_hosts:
            if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", name):
                problems.append(f"--allow-host {name}: write a name such as model.example.org, without port or scheme")
        for flag, seconds, least in (("--timeout", self.timeout, 0.1), ("--grace", self.grace, 0.0)):
            if not (math.isfinite(seconds) and seconds >= least):
                problems.append(f"{flag} {seconds}: write a number of seconds, {least:g} or more")
        if problems:
            raise InvalidRequest.together(problems)


def host_named(header: str) -> str:
    """The name in a Host header, lower case, without the port."""
    name = header.strip().lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]

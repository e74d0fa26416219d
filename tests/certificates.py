"""Certificates for tests, made by the `openssl` command, which Debian has."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """The files of a certificate that signs itself, and of its key."""

    certificate: Path
    key: Path

    def trust(self) -> ssl.SSLContext:
        """What a client needs that believes this certificate alone."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def replace_with(self, other: "Pair") -> None:
        """Put another's content into these files, as a renewal does: each anew, then renamed."""
        for mine, its in ((self.key, other.key), (self.certificate, other.certificate)):
            beside = mine.with_suffix(".new")
            beside.write_bytes(its.read_bytes())
            beside.rename(mine)


def make(folder: Path, name: str = "server", *, rsa: bool = False, passphrase: str = "") -> Pair:
    """A certificate for this machine, named `name`; ECDSA, unless it is to be `rsa`."""
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    kind = ["rsa:2048"] if rsa else ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    kept = ["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", *kind, *kept, "-days", "30", "-subj", f"/CN={name}", "-addext", names,
         "-keyout", str(pair.key), "-out", str(pair.certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return pair

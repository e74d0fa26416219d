"""The certificate that clients are shown: loaded and checked as a pair with its key, and followed on disk.

A pair that was renewed is in force for new connections within seconds; connections that are open go on with theirs. One
that cannot be used leaves the one before in force, and is reported. Handshakes are in `traffic/handshake.py`.
"""

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256

import structlog

from vllm_proxy.domain.config import Server
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import notify, spawn
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.threads import Offload

log = structlog.get_logger()

_POLL_SECONDS = 2.0
_DISK_SECONDS = 30.0  # longest that a reload waits for the disk
_MISMATCH = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")  # of values, or RSA and ECDSA
_REASONS = {
    **dict.fromkeys(_MISMATCH, "it is not the key of the certificate in server.tls_cert"),
    "EE_KEY_TOO_SMALL": "its key is too short for OpenSSL's security level; make one with RSA 2048 or ECDSA",
    "CA_MD_TOO_WEAK": "its signature is too weak for OpenSSL's security level; make one with SHA-256",
}

type Signature = tuple[object, ...]  # of the files, without reading them


class PairError(Exception):
    """A certificate and its key that cannot be used. `key`: of `[server]`; the message holds nothing of the files."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, ready for use. `digest`: of both files' content; `place`: the certificate's file."""

    context: ssl.SSLContext
    digest: bytes
    place: str


def load(server: Server, files: ReferencedFiles) -> Pair | None:
    """The pair that the configuration names; None where it names none, or one that the service alone can read.

    Raises:
        PairError: it cannot be used.

    """
    if server.tls_cert is None or server.tls_key is None:
        return None
    if files.is_elsewhere(server.tls_cert) or files.is_elsewhere(server.tls_key):
        return None
    certificate = _read("tls_cert", server.tls_cert, files, b"CERTIFICATE-----", "a certificate")
    key = _read("tls_key", server.tls_key, files, b"PRIVATE KEY-----", "a private key")
    places = {"tls_cert": files.place(server.tls_cert), "tls_key": files.place(server.tls_key)}
    context = _context(certificate, key, places)
    digest = sha256(b"%d:%b%b" % (len(certificate), certificate, key)).digest()
    return Pair(context, digest, places["tls_cert"])


def _read(key: str, reference: str, files: ReferencedFiles, mark: bytes, what: str) -> bytes:
    try:
        data = files.read(reference)
    except OSError as error:
        raise PairError(key, f"cannot read {files.place(reference)}: {error.strerror}") from None
    if mark not in data:
        other = "tls_cert and tls_key may be exchanged; " if b"-----BEGIN" in data else ""
        raise PairError(
            key, f"cannot use {files.place(reference)}: {other}expected {what} in PEM, -----BEGIN … {mark.decode()}"
        )
    return data


def _context(certificate: bytes, key: bytes, places: dict[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])

    def no_passphrase() -> str:
        raise PairError("tls_key", f"cannot use {places['tls_key']}: it has a passphrase, which nobody is here to type")

    try:
        with _in_memory(certificate) as first, _in_memory(key) as second:  # what was read, whatever is on disk by now
            context.load_cert_chain(first, second, no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "PEM_LIB"
        of_key = reason in _MISMATCH or (reason not in _REASONS and _is_certificate(certificate))
        which = "tls_key" if of_key else "tls_cert"
        why = _REASONS.get(reason, f"OpenSSL says {reason.replace('_', ' ').lower()}")
        raise PairError(which, f"cannot use {places[which]}: {why}") from None
    return context


def _is_certificate(data: bytes) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file that only this process has, since OpenSSL wants names."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class Certificate:
    """The pair in force, if any; `error`: what is wrong with the one on disk, as a sentence, None: nothing."""

    def __init__(
        self, pair: Pair | None, server: Callable[[], Server], files: ReferencedFiles, offload: Offload
    ) -> None:
        """`pair`: of the start, None: clients speak no TLS; `server`: the `[server]` table now.

        `offload`: runs what blocks in a thread.
        """
        self.error: str | None = None
        self._pair = pair
        self._server = server
        self._files = files
        self._offload = offload
        self._settled: Signature = ()  # of files that have been taken or refused
        self._doubted: Signature = ()  # of files that were wrong at the last look, maybe since half of them is written
        self._turn = asyncio.Lock()
        self._listeners: list[Callable[[], None]] = []

    def context(self) -> ssl.SSLContext:
        """For one more connection of a listener that speaks TLS."""
        assert self._pair is not None
        return self._pair.context

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when there is another problem, or none any more."""
        self._listeners.append(listener)

    async def follow(self) -> None:
        """Look every two seconds, until cancelled. What is wrong is reported where it is so twice."""
        while self._pair is not None:
            await self._look(patient=True)
            await asyncio.sleep(_POLL_SECONDS)

    async def look(self) -> None:
        """Take what is on disk, if it can be used; without an answer of the disk in time, whenever there is one."""
        if self._pair is not None:
            look = spawn(self._look(patient=False), "a look at the certificate")
            if await clock.wait({look}, _DISK_SECONDS):
                look.result()

    async def _look(self, *, patient: bool) -> None:
        async with self._turn:
            server = self._server()
            signature = await self._offload(_signature, server, self._files)
            if signature == self._settled:
                return
            try:
                pair = await self._offload(load, server, self._files)
            except PairError as error:
                if patient and signature != self._doubted:
                    self._doubted = signature
                    return
                self._report(f"server.{error.key}: {error}")
            else:
                self._take(pair)
            self._settled = signature

    def _take(self, pair: Pair | None) -> None:
        if pair is not None and self._pair is not None and pair.digest != self._pair.digest:
            self._pair = pair
            log.info("another certificate is in force for new connections", file=pair.place)
        self._report(None)

    def _report(self, error: str | None) -> None:
        if error == self.error:
            return
        self.error = error
        if error is not None:
            log.error("the certificate is rejected, the one before stays in force", problem=error)
        else:
            log.info("the certificate is accepted again")
        notify(self._listeners)


def _signature(server: Server, files: ReferencedFiles) -> Signature:
    """What changes when one of the files is written, replaced, or named by another path."""
    found: list[object] = []
    for reference in (server.tls_cert, server.tls_key):
        found.append(reference)
        if reference is not None:
            try:
                status = files.path(reference).stat()
            except OSError as error:
                found.append(error.errno)
            else:
                found += [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return tuple(found)

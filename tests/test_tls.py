"""The certificate and its key: what makes a usable pair, and how one that changes on disk is followed."""

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import certificates
from tests.certificates import Pair
from vllm_proxy import tls
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.errors import ConfigError
from vllm_proxy.runtime.referenced import ReferencedFiles

NAMED = Server(tls_cert="server.crt", tls_key="server.key")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Pairs that are made once."""
    folder = tmp_path_factory.mktemp("made")
    plain = {name: certificates.make(folder, name, rsa=name == "rsa") for name in ("one", "two", "rsa")}
    return {**plain, "locked": certificates.make(folder, "locked", passphrase="sesame")}


@pytest.fixture
def on_disk(made: dict[str, Pair], tmp_path: Path) -> Pair:
    """The files that a configuration names, `one` in them."""
    pair = Pair(tmp_path / "server.crt", tmp_path / "server.key")
    pair.replace_with(made["one"])
    return pair


def files(folder: Path, credentials: Path | None = None) -> ReferencedFiles:
    """What reads the files of a configuration in this folder."""
    return ReferencedFiles(folder, str(credentials) if credentials else None)


def subject(context: ssl.SSLContext, trust: ssl.SSLContext) -> str:
    """The name in the certificate that a client is shown; the two speak in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.selected_alpn_protocol() in {None, "http/1.1"}
    found = client.getpeercert()
    assert found is not None
    return str(dict(part[0] for part in found["subject"])["commonName"])  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["one", "rsa"])
def test_a_pair_is_loaded_from_the_folder_of_the_file(made: dict[str, Pair], tmp_path: Path, kind: str) -> None:
    """ECDSA or RSA; a client is shown it."""
    Pair(tmp_path / "server.crt", tmp_path / "server.key").replace_with(made[kind])
    pair = tls.load(NAMED, files(tmp_path))
    assert pair is not None
    assert subject(pair.context, made[kind].trust()) == kind
    assert pair.context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_pair_may_come_as_credentials_of_the_service(made: dict[str, Pair], tmp_path: Path) -> None:
    """As systemd's LoadCredential= gives them."""
    Pair(tmp_path / "cert", tmp_path / "key").replace_with(made["one"])
    server = Server(tls_cert="credential:cert", tls_key="credential:key")
    assert tls.load(server, files(Path("/nowhere"), tmp_path)) is not None
    with pytest.raises(tls.PairError, match="LoadCredential="):
        tls.load(server, files(tmp_path))


def test_a_command_in_a_shell_does_without_the_services_credentials(tmp_path: Path) -> None:
    """`vllm-proxy check` cannot read them, and that is no problem of the file."""
    server = Server(tls_cert="credential:cert", tls_key="credential:key")
    assert tls.load(server, files(tmp_path).outside_service()) is None


def test_both_may_be_in_one_file(made: dict[str, Pair], tmp_path: Path) -> None:
    """As some programs want it."""
    (tmp_path / "both.pem").write_bytes(made["one"].key.read_bytes() + made["one"].certificate.read_bytes())
    assert tls.load(Server(tls_cert="both.pem", tls_key="both.pem"), files(tmp_path)) is not None


def test_without_the_keys_there_is_no_tls(tmp_path: Path) -> None:
    """Nothing is read."""
    assert tls.load(Server(), files(tmp_path)) is None


def _missing(pair: Pair, _: dict[str, Pair]) -> None:
    pair.certificate.unlink()


def _no_key(pair: Pair, _: dict[str, Pair]) -> None:
    pair.key.unlink()


def _foreign(pair: Pair, made: dict[str, Pair]) -> None:
    pair.key.write_bytes(made["two"].key.read_bytes())


def _of_another_kind(pair: Pair, made: dict[str, Pair]) -> None:
    pair.key.write_bytes(made["rsa"].key.read_bytes())


def _locked(pair: Pair, made: dict[str, Pair]) -> None:
    pair.replace_with(made["locked"])


def _exchanged(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_bytes(made["one"].key.read_bytes())


def _der(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_bytes(ssl.PEM_cert_to_DER_cert(made["one"].certificate.read_text()))


def _half(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_bytes(made["one"].certificate.read_bytes()[:200])


def _torn(pair: Pair, _: dict[str, Pair]) -> None:
    lines = pair.certificate.read_text().splitlines()
    pair.certificate.write_text("\n".join([*lines[:3], *lines[4:]]))


def _torn_key(pair: Pair, _: dict[str, Pair]) -> None:
    lines = pair.key.read_text().splitlines()
    pair.key.write_text("\n".join([lines[0], lines[-1]]))


def _pipe(pair: Pair, _: dict[str, Pair]) -> None:
    pair.key.unlink()
    os.mkfifo(pair.key)


WRONG: dict[str, tuple[Callable[[Pair, dict[str, Pair]], None], str, str]] = {
    "no certificate": (_missing, "tls_cert", "cannot read {cert}: No such file or directory"),
    "no key": (_no_key, "tls_key", "cannot read {key}: No such file or directory"),
    "key of another": (
        _foreign,
        "tls_key",
        "cannot use {key}: it is not the key of the certificate in server",
    ),
    "key of another kind": (_of_another_kind, "tls_key", "cannot use {key}: it is not the key of the certificate"),
    "passphrase": (_locked, "tls_key", "cannot use {key}: it has a passphrase, which nobody is here to type"),
    "exchanged": (
        _exchanged,
        "tls_cert",
        "cannot use {cert}: tls_cert and tls_key may be exchanged; ",
    ),
    "DER": (_der, "tls_cert", "cannot use {cert}: expected a certificate in PEM"),
    "half a certificate": (_half, "tls_cert", "cannot use {cert}: "),
    "torn certificate": (_torn, "tls_cert", "cannot use {cert}: OpenSSL says"),
    "torn key": (_torn_key, "tls_key", "cannot use {key}: OpenSSL says"),
    "pipe": (_pipe, "tls_key", "cannot read {key}: it is a pipe or FIFO"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_pair_that_cannot_be_used_is_refused_with_its_place(
    made: dict[str, Pair], on_disk: Pair, tmp_path: Path, case: str
) -> None:
    """The key of the file that names what is wrong, the path, and the reason: nothing of what stands in the files."""
    spoil, key, message = WRONG[case]
    spoil(on_disk, made)
    with pytest.raises(tls.PairError) as raised:
        tls.load(NAMED, files(tmp_path))
    assert raised.value.key == key
    assert str(raised.value).startswith(message.format(cert=on_disk.certificate, key=on_disk.key))
    secret = made["one"].key.read_text().splitlines()[1]
    assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('tls_cert = "a"', "f:2: server.tls_cert: expected tls_key beside it"),
        ('tls_key = "a"', "f:2: server.tls_key: expected tls_cert beside it"),
    ],
)
def test_a_certificate_and_its_key_are_given_both_or_neither(text: str, message: str) -> None:
    """One alone is a slip."""
    with pytest.raises(ConfigError) as raised:
        parse_config(f"[server]\n{text}\n".encode(), "f")
    (line,) = raised.value.lines()
    assert line.startswith(message)


async def _at_once[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    return function(*args, **kwargs)


class Followed:
    """A certificate that is followed, and how often it told of something."""

    def __init__(self, folder: Path) -> None:
        self.server = NAMED
        pair = tls.load(self.server, files(folder))
        self.certificate = tls.Certificate(pair, lambda: self.server, files(folder), _at_once)
        self.told = 0
        self.certificate.listen(self._tell)

    def _tell(self) -> None:
        self.told += 1

    async def poll(self, times: int = 1) -> None:
        """The looks that are made every two seconds."""
        for _ in range(times):
            await self.certificate._look(patient=True)


@pytest.fixture
def followed(on_disk: Pair, tmp_path: Path) -> Followed:
    """The pair on disk, in force."""
    assert on_disk.key.exists()
    return Followed(tmp_path)


async def test_a_renewed_pair_is_in_force_for_new_connections(
    followed: Followed, on_disk: Pair, made: dict[str, Pair]
) -> None:
    """At the next look; nobody is told, since nothing is wrong."""
    before = followed.certificate.context()
    await followed.poll()
    assert followed.certificate.context() is before
    on_disk.replace_with(made["two"])
    await followed.poll()
    assert subject(followed.certificate.context(), made["two"].trust()) == "two"
    assert (followed.certificate.error, followed.told) == (None, 0)


async def test_the_same_content_written_anew_is_no_other_pair(followed: Followed, on_disk: Pair) -> None:
    """A backup that is put back, a touch: nothing changes."""
    await followed.poll()
    before = followed.certificate.context()
    on_disk.replace_with(on_disk)
    await followed.poll()
    assert followed.certificate.context() is before


async def test_half_a_renewal_is_waited_for(followed: Followed, on_disk: Pair, made: dict[str, Pair]) -> None:
    """The certificate is there, its key comes a moment later: that is no error, and not told as one."""
    await followed.poll()
    on_disk.certificate.write_bytes(made["two"].certificate.read_bytes())
    await followed.poll()
    on_disk.key.write_bytes(made["two"].key.read_bytes())
    await followed.poll()
    assert subject(followed.certificate.context(), made["two"].trust()) == "two"
    assert (followed.certificate.error, followed.told) == (None, 0)


async def test_a_bad_pair_keeps_the_one_before_and_is_told_once(
    followed: Followed, on_disk: Pair, made: dict[str, Pair]
) -> None:
    """Until it is good again, which is told too."""
    await followed.poll()
    on_disk.key.write_bytes(made["two"].key.read_bytes())
    await followed.poll(5)
    error = followed.certificate.error
    assert error is not None
    assert error.startswith("server.tls_key: cannot use ")
    assert followed.told == 1
    assert subject(followed.certificate.context(), made["one"].trust()) == "one"
    on_disk.replace_with(made["one"])
    await followed.poll()
    assert (followed.certificate.error, followed.told) == (None, 2)


async def test_a_reload_says_at_once_what_is_wrong(followed: Followed, on_disk: Pair) -> None:
    """Whoever asked waits for the verdict."""
    on_disk.key.unlink()
    await followed.certificate.look()
    assert followed.certificate.error == f"server.tls_key: cannot read {on_disk.key}: No such file or directory"


async def test_other_paths_in_the_file_are_live(followed: Followed, made: dict[str, Pair]) -> None:
    """Where TLS is on already; without them what is in force stays until the restart."""
    followed.server = Server(tls_cert=str(made["two"].certificate), tls_key=str(made["two"].key))
    await followed.certificate.look()
    assert subject(followed.certificate.context(), made["two"].trust()) == "two"
    followed.server = Server()
    await followed.certificate.look()
    assert subject(followed.certificate.context(), made["two"].trust()) == "two"
    assert followed.certificate.error is None


async def test_where_there_is_no_tls_nothing_is_followed(tmp_path: Path) -> None:
    """Neither by itself nor with a reload, and `follow` comes back."""
    certificate = tls.Certificate(None, lambda: NAMED, files(tmp_path), _at_once)
    await certificate.follow()
    await certificate.look()
    assert certificate.error is None

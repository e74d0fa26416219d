"""Validates names of hosts and origins of web pages, as `[server]` takes them; tells loopback from other addresses.

What could never work (listen, or equal what a client sends) is refused, and the error shows the right spelling. The
checks of requests that use these values are in `traffic/access.py` and `traffic/cors.py`.
"""

import ipaddress
import re

from vllm_proxy.domain.units import show

_LONGEST = 253  # characters of a name: RFC 1035
_LABEL = re.compile(r"(?!-)[\w-]{1,63}(?<!-)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WITH_PORT = re.compile(r"\[(.+)\](?::\d+)?|(.+):\d+")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::([1-9]\d{0,4}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}  # which browsers leave out
_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES or host.lower().endswith(".localhost")


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def host(text: str) -> str:
    """An address or a name, as it is listened on or stands in a `Host` header, without port and brackets.

    Raises:
        ValueError: it is none, with what was expected.

    """
    if is_address(text):
        return text
    shown = show(text)
    if _URL.match(text):
        raise ValueError(f"expected an address or a name of a machine, got the URL {shown}")
    if "*" in text:
        raise ValueError(f"expected the address or the name of one machine, without *, got {shown}")
    found = _WITH_PORT.fullmatch(text)
    if found and (alone := found[1] or found[2]) and (is_address(alone) or _is_name(alone)):
        raise ValueError(f"expected {show(alone)}, without port and brackets, got {shown}")
    if not _is_name(text):
        raise ValueError(f'expected an address or a name such as "127.0.0.1", "::" or "gpu.example.org", got {shown}')
    return text


def _is_name(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    if len(text) > _LONGEST or not all(_LABEL.fullmatch(label) for label in labels):
        return False
    return not labels[-1].isdecimal()  # an address with a slip of the pen, or a port


def origin(text: str) -> str:
    """An origin as browsers send it, such as "https://ui.example.org:8443"; "null"; or "*" for all.

    Raises:
        ValueError: no browser would send it, with what it would.

    """
    if text in {"*", "null"}:
        return text
    shown = show(text)
    if not (found := _ORIGIN.fullmatch(text)):
        if meant := _ORIGIN.match(text.strip().lower()):
            raise ValueError(f"expected an origin as browsers send it, {show(_canonical(meant))}, got {shown}")
        raise ValueError(f'expected "*" or an origin such as "https://ui.example.org", got {shown}')
    if found[3] and int(found[3]) > 65535:
        raise ValueError(f"expected a port of at most 65535, got {shown}")
    if found[3] and _DEFAULT_PORTS.get(found[1]) == found[3]:
        raise ValueError(f"expected {show(_canonical(found))}, since browsers leave out port {found[3]}, got {shown}")
    return text


def _canonical(found: re.Match[str]) -> str:
    port = "" if found[3] is None or _DEFAULT_PORTS.get(found[1]) == found[3] else f":{found[3]}"
    return f"{found[1]}://{found[2]}{port}"

"""Callers for tests of what comes behind access: anybody may do everything."""

from vllm_proxy.domain.keys import Scope
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.access import CONTROL, Head
from vllm_proxy.traffic.client import Admitted, ClientConnection
from vllm_proxy.traffic.keyring import Caller
from vllm_proxy.traffic.routes import InferenceRoute


def admit(_head: Head, _client: ClientConnection, _scope: Scope) -> Caller:
    """Let anybody in."""
    return CONTROL


def goes_on(_admission: Admitted, _client: ClientConnection) -> RequestError | None:
    """Nothing is revoked."""
    return None


def get(path: str) -> InferenceRoute:
    """A route that is asked with GET."""
    return InferenceRoute("GET", path, "nowhere", "A route")

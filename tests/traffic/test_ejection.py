"""Passive ejection, in virtual time."""

from structlog.testing import capture_logs

from tests.engine.virtual import Stage, model, passes, settle, virtual
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.traffic.endpoint import Endpoint


def two(stage: Stage) -> tuple[Endpoint, Endpoint]:
    """A model with two ready instances that nobody supervises."""
    stage.registry.declare(model(), lambda: None)
    address = TcpAddress("127.0.0.1", 1)
    endpoints = Endpoint("chat/0", address, "secret", None), Endpoint("chat/1", address, "secret", None)
    for endpoint in endpoints:
        stage.registry.add_endpoint("chat", endpoint)
    return endpoints


async def sick(stage: Stage) -> tuple[Supervisor, Endpoint]:
    """An instance that serves, and whose health is bad from now on."""
    stage.probe.health = False
    supervisor = stage.supervisor(model())
    supervisor.start()
    await stage.serving(supervisor)
    assert supervisor.endpoint is not None
    return supervisor, supervisor.endpoint


@virtual
async def test_three_failures_and_bad_health_eject_until_health_is_good_again() -> None:
    """Two failures mean nothing; the third asks for /health, and only a bad answer ejects."""
    stage = Stage()
    supervisor, endpoint = await sick(stage)
    endpoint.failed()
    endpoint.failed()
    await settle()
    assert not endpoint.ejected
    endpoint.failed()
    await settle()
    assert endpoint.ejected
    await passes(5)
    assert endpoint.ejected
    stage.probe.health = True
    await passes(1.5)
    assert not endpoint.ejected
    assert endpoint.failures == 0
    await supervisor.stop()


@virtual
async def test_an_instance_with_good_health_is_never_ejected() -> None:
    """Failures of connections alone do not take an instance away."""
    stage = Stage()
    supervisor = stage.supervisor(model())
    supervisor.start()
    await stage.serving(supervisor)
    assert supervisor.endpoint is not None
    for _ in range(9):
        supervisor.endpoint.failed()
        await settle()
        assert not supervisor.endpoint.ejected
    await supervisor.stop()


@virtual
async def test_an_ejected_instance_gets_nothing_while_there_is_another() -> None:
    """Every request goes to the other one, busy as it may be."""
    stage = Stage()
    sick, well = two(stage)
    stage.registry.report("chat", State.READY, None)
    sick.ejected = True
    leases = [await stage.registry.acquire("chat") for _ in range(5)]
    assert {lease.endpoint for lease in leases} == {well}


@virtual
async def test_the_last_instance_is_never_ejected() -> None:
    """Where all are sick, requests are tried all the same."""
    stage = Stage()
    endpoints = two(stage)
    stage.registry.report("chat", State.READY, None)
    for endpoint in endpoints:
        endpoint.ejected = True
    leases = [await stage.registry.acquire("chat") for _ in range(2)]
    assert {lease.endpoint for lease in leases} == set(endpoints)


@virtual
async def test_a_bug_while_its_health_is_asked_for_does_not_leave_an_instance_ejected_for_good() -> None:
    """It is logged, and asked again: with good health the instance gets requests again."""
    stage = Stage()
    supervisor, endpoint = await sick(stage)
    with capture_logs() as logs:
        for _ in range(3):
            endpoint.failed()
        await settle()
        assert endpoint.ejected
        stage.probe.bugs.append(RuntimeError("a bug"))
        await passes(1.5)
        stage.probe.health = True
        await passes(5)
    assert not endpoint.ejected
    assert [entry["task"] for entry in logs if "task" in entry] == ["ejection of chat/0"]
    await supervisor.stop()

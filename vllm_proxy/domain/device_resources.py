"""The JSON of devices, a part of `resources`: what each has, who has what of it, and who is next.

Descriptions are written here and nowhere else.
"""

from typing import Annotated, TypedDict

from pydantic import Field

from vllm_proxy.domain.ledger import Kind, Standing


class Foreign(TypedDict):
    """Another program that has memory of a device."""

    pid: int
    name: Annotated[str, Field(description="Of the program, without its arguments.", examples=["python"])]
    bytes: int


class Holder(TypedDict):
    """An instance that has memory of a device."""

    instance: Annotated[str, Field(examples=["chat/0"])]
    bytes: Annotated[int, Field(description="What it counts for, its context included.")]
    standing: Annotated[
        Standing,
        Field(
            description="It loads or wakes; serves; takes no new requests, as another one waits for its room; falls "
            "asleep or is being ended; sleeps."
        ),
    ]


class Device(TypedDict):
    """A GPU, a MIG device, or the memory of the machine. Event `device` has one that changed."""

    id: Annotated[str, Field(description="Its UUID; where it has none, what the file calls it.")]
    index: Annotated[int | None, Field(description="As CUDA counts GPUs in the order of the PCI bus, else null.")]
    name: Annotated[str, Field(description="What it is.", examples=["NVIDIA H100 80GB HBM3"])]
    kind: Kind
    unified: Annotated[bool, Field(description="Whether its memory is the machine's own.")]
    total: Annotated[int, Field(description="Bytes, as vLLM counts them.")]
    free: Annotated[int | None, Field(description="Bytes, as measured; null where they cannot be.")]
    reserve: Annotated[
        int, Field(description="Bytes that engines are never given: `reserve` and `limit` of `[devices]`.")
    ]
    foreign: list[Foreign]
    holds: list[Holder]
    promised_to: Annotated[
        str | None, Field(description="The instance that gets what becomes free of it.", examples=["code/0"])
    ]


class Devices(TypedDict):
    """The devices that engines are placed on."""

    devices: list[Device]
    unmanaged: Annotated[
        str | None, Field(description="Why there are none, so that engines only take turns to start; else null.")
    ]
    problem: Annotated[
        str | None, Field(description="What is not known of them and ought to be, with the reason; else null.")
    ]

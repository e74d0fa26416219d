"""The descriptions of the routes with which operators follow what happens, for `openapi_routes`."""

from collections.abc import Mapping
from http import HTTPStatus

from vllm_proxy.api.openapi_operation import HERE, Answer, Operation, as_json, as_text
from vllm_proxy.domain import feed_resources

OBSERVATION: Mapping[str, Operation] = {
    "GET /events": Operation(
        "Observation",
        "Follow what happens",
        (Answer(200, "Until one side leaves.", as_text("text/event-stream")),),
        HERE,
        None,
        ("fleet", "since", "last_event_id"),
        "Server-sent events: `model` (its state changed, a `ModelEvent`), `config` (the file was accepted, "
        "a `ConfigAccepted`, or rejected with its problems, a `ConfigRejected`), `plan` (what an accepted file "
        "changes, a `PlanEvent`), `write` (somebody changed the file or did something by hand, a `WriteEvent`), "
        "`device` (who has memory of it, who gets what becomes free, or noticeably how much is free, a `Device`). With "
        "`fleet=1`: `fleet` (all models, then those that changed, a `FleetEvent`), `happened` (a `Happening`), "
        "`config` (a `ConfigState`), which also ends what is told at the beginning. What is kept has an `id`; where "
        "what follows the one asked for is not kept, `reset` (a `ResetEvent`) comes first.",
    ),
    "GET /requests": Operation(
        "Observation",
        "List requests in flight and the last ones",
        (Answer(200, "Without bodies and keys.", as_json(feed_resources.Requests)),),
        (*HERE, "model_not_found", "bad_request"),
        None,
        ("of_model", "limit"),
        "A key sees those of the models that it may use.",
    ),
    "GET /requests/{request_id}": Operation(
        "Observation",
        "Show a request",
        (Answer(200, "In flight, or one of the last 1,000.", as_json(feed_resources.Request)),),
        (*HERE, "not_found"),
    ),
    "DELETE /requests/{request_id}": Operation(
        "Observation",
        "Cancel a request",
        (Answer(HTTPStatus.ACCEPTED, "Its engine stops working on it.", as_json(feed_resources.Request)),),
        (*HERE, "not_found"),
        description="Its client gets `request_cancelled` where no byte of an answer was sent; a stream of events ends "
        "with that as its last event and without `[DONE]`, and any other answer is cut. Where several in flight have "
        "this id, all of them.",
    ),
    "GET /stats": Operation(
        "Observation",
        "How many requests and tokens a second?",
        (Answer(200, "For each model that had any.", as_json(feed_resources.Stats)),),
        (*HERE, "model_not_found", "bad_request"),
        None,
        ("minutes", "of_model"),
    ),
}

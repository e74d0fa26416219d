"""`python -m tests.fuzz openapi`: the API is as its document says. `... atheris TARGET`: bytes, led by coverage."""

import argparse
import asyncio

CALLERS = ("admin", "read", "inference", "nobody")


def main() -> int:
    """Run it; not 0 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    kinds = parser.add_subparsers(dest="kind", required=True)
    api = kinds.add_parser("openapi", help="what is not said here is passed on to `schemathesis run`")
    api.add_argument("--as", dest="callers", action="append", choices=CALLERS)
    led = kinds.add_parser("atheris", help="what is not said here is passed on to libFuzzer: -max_total_time=300")
    led.add_argument("target", help="configuration, head, body or edit")
    options, rest = parser.parse_known_args()
    if options.kind == "atheris":
        from tests.fuzz import coverage_led  # here, since each has a dependency of its own

        coverage_led.run(options.target, rest)
    from tests.fuzz import openapi

    found = 0
    for caller in options.callers or CALLERS:
        print(f"as {caller}", flush=True)
        found |= asyncio.run(openapi.run(None if caller == "nobody" else caller, rest))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())

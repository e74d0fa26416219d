"""atheris over one target: bytes that reach new code are kept, and changed further."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris


def run(target: str, options: Sequence[str]) -> None:
    """Does not come back: libFuzzer ends the process. `options`: its own, such as -max_total_time=300."""
    with atheris.instrument_imports(include=["vllm_proxy", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS
    function, seeds = TARGETS[target]
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-"))
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    print(f"{target}: what is found is in {corpus}", flush=True)
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={corpus}/found-", *options], function)
    atheris.Fuzz()

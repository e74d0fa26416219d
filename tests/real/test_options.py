"""What is refused before a start, beside what vLLM's own parser refuses."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.args import problems_of
from vllm_proxy.domain.command import Place, argv
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.options import OptionTable, names, problems
from vllm_proxy.engine.options import OptionTables

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PLACE = Place("chat/0", "chat/0-own", TcpAddress("127.0.0.1", 8001), "secret", "/tmp/engine")
PYTHON = Path(sys.executable)
VALUES: tuple[Any, ...] = (
    True,
    False,
    0,
    1,
    1.5,
    "",
    "None",
    "word",
    "a,b",
    "7",
    "8k",
    "2.5K",
    "-1",
    "auto",
    "{}",
    '{"a": 1}',
    "[1]",
)
VALUES += ("true", "nan", "/a/b", {}, {"a": 1}, [1], ["a"], [1, 2], ["a", "b"], [{"a": 1}], [True])
type Verdicts = dict[str, str]

# Parses each command line of stdin as `vllm serve` does and prints whether it takes it.
PARSE = """
import contextlib, io, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
verdicts = []
for line in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parser.parse_args(line)
            verdicts.append("")
        except SystemExit:
            verdicts.append(said.getvalue().strip().splitlines()[-1])
        except Exception as error:  # what a type of vLLM's raises ends it as well
            verdicts.append(repr(error))
print("verdicts", json.dumps(verdicts))
"""

TAKEN: list[dict[str, Any]] = [
    {},
    {"lora": Lora(320, 4, 32)},
    {"dtype": "bfloat16", "quantization": "fp8", "trust_remote_code": False, "max_num_seqs": 4},
    {"max_model_len": "4k"},
    {"max_model_len": "4K"},
    {"max_model_len": "auto"},
    {"max_model_len": "25.6k"},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "gpu_memory_utilization": 0.5, "trust_remote_code": True},
    {"quantization": "None"},
    {"quantization": "of a plugin"},
    {"args": {"max-num-batched-tokens": "8k"}},
    {"args": {"max-num-batched-tokens": 2048, "seed": -1}},
    {"args": {"enable-prefix-caching": True, "enable-chunked-prefill": False}},
    {"args": {"no-enable-prefix-caching": True}},
    {"args": {"disable-log-stats": False}},
    {"args": {"disable-log-stats": True}},
    {"args": {"compilation-config": {"mode": 0}}},
    {"args": {"compilation-config.mode": 0, "compilation-config.pass_config.fuse_act_quant": True}},
    {"args": {"compilation-config": "{}"}},
    {"args": {"hf-overrides": {"architectures": ["X"]}}},
    {"args": {"hf-overrides": "some.function"}},
    {"args": {"hf-overrides.rope_theta": 1e6}},
    {"args": {"limit-mm-per-prompt": {"image": 2}}},
    {"args": {"limit-mm-per-prompt": '{"image": 2}'}},
    {"args": {"lora-modules": ["a=/x", "b=/y"]}},
    {"args": {"lora-modules": "a=/x"}},
    {"args": {"lora-modules": [{"name": "a", "path": "/x"}]}},
    {"args": {"cudagraph-capture-sizes": [1, 2, 4]}},
    {"args": {"cudagraph-capture-sizes": 8}},
    {"args": {"seed": [3]}},
    {"args": {"seed": " 7 "}},
    {"args": {"moe-backend": "Flashinfer-Trtllm"}},
    {"args": {"log-level": "WARNING"}},
    {"args": {"hf-token": True}},
    {"args": {"hf-token": "secret"}},
    {"args": {"allowed-methods": ["GET"]}},
    {"args": {"device-ids": "0,1"}},
    {"args": {"chat-template": "{{ x }}", "chat-template-content-format": "auto"}},
    {"args": {"chat-template": {"a": 1}}},
    {"args": {"cpu-offload-gb": 4}},
    {"args": {"cpu-offload-gb": "1e1"}},
    {"args": {"kv-cache-dtype": "fp8", "max-lora-rank": 16}},
    {"args": {"max-lora-rank": "016"}},
    {"args": {"speculative-config": {"method": "ngram", "num_speculative_tokens": 2}}},
    {"args": {"speculative-config": ""}},
    {"args": {"kv-cache-memory-bytes": "2G"}},
    {"args": {"kv-transfer-config": {"kv_connector": "X", "kv_role": "kv_both"}}},
    {"args": {"safetensors-load-strategy": "lazy"}},
    {"args": {"collect-detailed-traces": ["model", "worker"]}},
    {"args": {"api-server-count": 2, "tool-call-parser": "of a plugin", "enable-auto-tool-choice": True}},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"args": {"max-num-batched-token": [1, 2]}}, "args.max-num-batched-token"),
    ({"args": {"swap-space": 4}}, "args.swap-space"),
    ({"args": {"task": "embed"}}, "args.task"),
    ({"args": {"no-disable-log-stats": True}}, "args.no-disable-log-stats"),
    ({"args": {"no-seed": True}}, "args.no-seed"),
    ({"args": {"enable-prefix-caching": "true"}}, "args.enable-prefix-caching"),
    ({"args": {"enable-prefix-caching": 1}}, "args.enable-prefix-caching"),
    ({"args": {"enable-prefix-caching": {"a": 1}}}, "args.enable-prefix-caching"),
    ({"args": {"enable-prefix-caching.part": 1}}, "args.enable-prefix-caching.part"),
    ({"args": {"seed": True}}, "args.seed"),
    ({"args": {"seed": False}}, "args.seed"),
    ({"args": {"seed": "many"}}, "args.seed"),
    ({"args": {"seed": 1.5}}, "args.seed"),
    ({"args": {"seed": [1, 2]}}, "args.seed"),
    ({"args": {"seed": {"a": 1}}}, "args.seed"),
    ({"args": {"seed.part": 1}}, "args.seed.part"),
    ({"args": {"cpu-offload-gb": "much"}}, "args.cpu-offload-gb"),
    ({"args": {"max-num-batched-tokens": "many"}}, "args.max-num-batched-tokens"),
    ({"args": {"max-num-batched-tokens": 1.5}}, "args.max-num-batched-tokens"),
    ({"max_model_len": "1.5"}, "max_model_len"),
    ({"args": {"kv-cache-dtype": "fp9"}}, "args.kv-cache-dtype"),
    ({"args": {"scheduling-policy": "Priority"}}, "args.scheduling-policy"),
    ({"args": {"log-level": "warning"}}, "args.log-level"),
    ({"args": {"moe-backend": "tritton"}}, "args.moe-backend"),
    ({"args": {"max-lora-rank": 7}}, "args.max-lora-rank"),
    ({"args": {"compilation-config": "fast"}}, "args.compilation-config"),
    ({"args": {"compilation-config": True}}, "args.compilation-config"),
    ({"args": {"limit-mm-per-prompt": ["image", "video"]}}, "args.limit-mm-per-prompt"),
    ({"args": {"no-such.part": 1}}, "args.no-such.part"),
    ({"args": {"cudagraph-capture-sizes": [1, "two"]}}, "args.cudagraph-capture-sizes"),
    ({"args": {"lora-modules": True}}, "args.lora-modules"),
]
# What vLLM takes for something else than was meant, or forgives.
STRICTER: list[dict[str, Any]] = [{"args": {"max-num-batched-token": 1}}, {"args": {"no-enable-prefix-cach": True}}]


@pytest.fixture(scope="module")
async def table(tmp_path_factory: pytest.TempPathFactory) -> OptionTable:
    """The options of the vLLM of this environment."""
    folder = tmp_path_factory.mktemp("state") / "options"
    table = await OptionTables(folder).load(PYTHON, os.environ)
    assert table is not None
    assert len(list(folder.iterdir())) == 1
    return table


@pytest.fixture(scope="module")
async def verdicts(table: OptionTable) -> Verdicts:
    """vLLM's complaint about each spec, "" where it has none, by the spec."""
    specs: list[dict[str, Any]] = [*TAKEN, *(spec for spec, _ in REFUSED), *STRICTER, *every_option(table)]
    lines = [argv("chat", engine(spec), ["vllm", "serve"], PLACE)[2:] for spec in specs]
    child = await asyncio.create_subprocess_exec(
        "nice", sys.executable, "-c", PARSE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd="/"
    )  # fmt: skip
    output, _ = await child.communicate(json.dumps(lines).encode())
    (line,) = [line for line in output.decode().splitlines() if line.startswith("verdicts ")]
    return {repr(spec): str(verdict) for spec, verdict in zip(specs, json.loads(line[9:]), strict=True)}


def every_option(table: OptionTable) -> Iterator[dict[str, Any]]:
    """Every option that the file may set, with every kind of value."""
    for name in sorted(names(table)):
        option = table.by_name()[f"--{name}"]
        for value in (*VALUES, *(option.choices or ())[:3], *(choice.upper() for choice in (option.choices or ())[:1])):
            for key in (name, f"{name}.part"):
                begun = f"no-{name}" if value is False else name  # of another: an abbreviation, in vLLM's eyes
                whole = begun in names(table) or not any(other.startswith(begun) for other in names(table))
                if whole and not list(problems_of({key: value})):
                    yield {"args": {key: value}}


def engine(keys: dict[str, Any]) -> EngineSpec:
    """An engine's keys."""
    return EngineSpec.model_validate({"model": "org/m", **keys})


def test_the_table_is_that_of_the_version_the_facts_were_read_in(table: OptionTable) -> None:
    """Options that come and go with versions aside, the ones that the daemon itself passes are there."""
    own = {"host", "port", "served-model-name", "shutdown-timeout", "disable-access-log-for-endpoints"}
    own |= {"enable-lora", "max-lora-rank", "max-loras", "max-cpu-loras"}
    assert own <= names(table)
    assert {"no-enable-prefix-caching", "max-model-len", "device-memory-utilization"} <= names(table)
    assert len(table.options) > 300
    assert table.version.startswith("0.")


async def test_nothing_that_vllm_takes_is_refused(table: OptionTable, verdicts: Verdicts) -> None:
    """A false refusal would keep a model away that works."""
    for spec in TAKEN:
        assert not verdicts[repr(spec)], spec
        assert not problems(table, engine(spec)), spec


async def test_no_option_with_any_value_that_vllm_takes_is_refused(table: OptionTable, verdicts: Verdicts) -> None:
    """The whole parser, option by option; and most of what it refuses is seen before."""
    refused = seen = 0
    for spec in every_option(table):
        complaint, found = verdicts[repr(spec)], problems(table, engine(spec))
        assert complaint or not found, (spec, found)
        refused += bool(complaint)
        seen += bool(found)
    assert seen > 0.85 * refused, (seen, refused)


async def test_what_is_refused_vllm_refuses_too(table: OptionTable, verdicts: Verdicts) -> None:
    """Each by the key that is wrong, and no other."""
    for spec, path in REFUSED:
        assert verdicts[repr(spec)], spec
        assert [where for where, _ in problems(table, engine(spec))] == [path], spec


async def test_abbreviations_are_refused_though_vllm_takes_them(table: OptionTable, verdicts: Verdicts) -> None:
    """The next version may know two options that begin so."""
    for spec in STRICTER:
        assert not verdicts[repr(spec)], spec
        ((_, message),) = problems(table, engine(spec))
        assert message.startswith("an abbreviation; write "), message

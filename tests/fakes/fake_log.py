"""What the fake writes: lines as vLLM 0.32 writes them while it starts, serves and fails; a flood; garbage.

vLLM's own lines go to stdout and name a process, uvicorn's and the progress bars to stderr and name none. A bar is
drawn with a carriage return in front; the one over weights ends each time in a newline, the one over graphs does not.
"""

import os
import time

OUT, ERR = 1, 2
_BAR = "\rLoading safetensors checkpoint shards: {0:3d}% Completed | {1}/2 [{2}]\n"
_GRAPHS = "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): {0:3d}%|{3:10}| {1}/2 [{2}]"
_TIMES = ("00:00<?, ?it/s", "00:00<00:00,  1.23it/s", "00:01<00:00,  1.31it/s")

# Phase -> what is said when it begins, and behind it: (process, place in the source, text); no process: to stderr.
type Lines = tuple[tuple[str, str, str], ...]
_OPENING: dict[str, Lines] = {
    "bind": (
        ("APIServer", "api_utils.py:347", "  version 0.32.0\r"),
        ("APIServer", "api_utils.py:347", "  model   {model}\r"),
        ("APIServer", "api_utils.py:286", "non-default args: {{'model': '{model}', 'port': {port}}}"),
    ),
    "load": (
        ("APIServer", "model.py:733", "Resolved architecture: LlamaForCausalLM"),
        ("APIServer", "model.py:2152", "Using max model len {max_model_len}"),
        ("EngineCore", "core.py:133", "Initializing a V1 LLM engine (v0.32.0) with config: model='{model}'"),
    ),
    "weights": (
        ("EngineCore", "gpu_model_runner.py:5040", "Starting to load model {model}..."),
        ("", "", _BAR.format(0, 0, _TIMES[0])),
        ("", "", _BAR.format(50, 1, _TIMES[1])),
    ),
    "profile": (("EngineCore", "gpu_model_runner.py:5149", "Model loading took 0.25 GiB memory and 2.580000 seconds"),),
    "compile": (
        ("EngineCore", "backends.py:1166", "Dynamo bytecode transform time: 1.21 s"),
        ("EngineCore", "backends.py:398", "Compiling a graph for compile range (1, 2048) takes 1.19 s"),
    ),
    "capture": (("", "", _GRAPHS.format(0, 0, _TIMES[0], "")), ("", "", _GRAPHS.format(50, 1, _TIMES[1], "█" * 5))),
    "listen": (
        ("APIServer", "entry.py:136", "Supported tasks: ['generate']"),
        ("APIServer", "entry.py:140", "Starting vLLM server on {address}"),
        ("APIServer", "launcher.py:186", "Available routes are:"),
        ("APIServer", "launcher.py:195", "Route: /health, Methods: GET"),
        ("APIServer", "launcher.py:195", "Route: /v1/chat/completions, Methods: POST"),
        ("", "", "INFO:     Started server process [{pid}]\n"),
        ("", "", "INFO:     Waiting for application startup.\n"),
        ("", "", "INFO:     Application startup complete.\n"),
    ),
}
_CLOSING: dict[str, Lines] = {
    "weights": (
        ("", "", _BAR.format(100, 2, _TIMES[2]) + "\n"),
        ("EngineCore", "default_loader.py:501", "Loading weights took 2.31 seconds"),
    ),
    "compile": (
        ("EngineCore", "monitor.py:62", "torch.compile took 2.40 s in total"),
        ("EngineCore", "monitor.py:91", "Initial profiling/warmup run took 0.40 s"),
        ("EngineCore", "gpu_worker.py:759", "Available KV cache memory: {kv} GiB"),
        (
            "EngineCore",
            "kv_cache_utils.py:2327",
            "GPU KV cache size: 65,536 tokens, Maximum concurrency for {max_model_len} tokens per request: 16.00x",
        ),
    ),
    "capture": (
        ("", "", _GRAPHS.format(100, 2, _TIMES[2], "█" * 10) + "\n"),
        ("EngineCore", "gpu_model_runner.py:6581", "Graph capturing finished in 1 secs, took 0.11 GiB"),
        ("EngineCore", "core.py:402", "init engine (profile, create kv cache, warmup model) took 4.11 s"),
    ),
}
# How uvicorn and the server behind it end.
_ENDED: Lines = (
    ("", "", "INFO:     Shutting down\n"),
    ("", "", "INFO:     Waiting for application shutdown.\n"),
    ("", "", "INFO:     Application shutdown complete.\n"),
    ("", "", "INFO:     Finished server process [{pid}]\n"),
)
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def write(descriptor: int, data: bytes) -> None:
    """All of it, at once where the system takes it so; nothing where nobody reads any more."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        pass


class Log:
    """The log of one engine."""

    def __init__(self, options: object) -> None:
        """`options`: what the lines tell of the command line."""
        known = vars(options)
        address = f"unix:{known['uds']}" if known["uds"] else f"http://{known['host'] or '0.0.0.0'}:{known['port']}"
        self.values = {**known, "address": address, "pid": os.getpid(), "kv": "8.21"}
        self.core = 0  # the pid of the engine core, once there is one

    def line(self, process: str, place: str, text: str, level: str = "INFO") -> None:
        """One line of vLLM's own logger. `process`: "APIServer" or "EngineCore"."""
        pid = self.core if process == "EngineCore" else os.getpid()
        now = time.strftime("%m-%d %H:%M:%S")
        write(OUT, f"({process} pid={pid}) {level} {now} [{place}] {text}\n".encode())

    def lines(self, lines: Lines) -> None:
        """Several lines, to where each of them goes."""
        for process, place, text in lines:
            filled = text.format(**self.values)
            if process:
                self.line(process, place, filled)
            else:
                write(ERR, filled.encode())

    def opening(self, phase: str) -> None:
        """What is said when a phase begins."""
        self.lines(_OPENING.get(phase, ()))

    def closing(self, phase: str) -> None:
        """What is said behind it."""
        self.lines(_CLOSING.get(phase, ()))

    def core_failed(self, code: int | None) -> None:
        """The core is dead before the engine was ready."""
        cause = "Engine core initialization failed. See root cause above. Failed core proc(s): "
        write(ERR, f"Traceback (most recent call last):\nRuntimeError: {cause}{{'EngineCore': {code}}}\n".encode())

    def cannot_sleep(self) -> None:
        """The configuration is refused: there is nothing that sleep mode could free."""
        cause = "Value error, Sleep mode is not supported on current platform."
        lines = (
            "Traceback (most recent call last):",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            f"  {cause} [type=value_error, input_value=ArgsKwargs(()), input_type=ArgsKwargs]",
            "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
        )
        write(ERR, "".join(f"{line}\n" for line in lines).encode())

    def core_refused(self, cause: str) -> None:
        """The core has ended itself before the engine was ready. `cause`: the last line of its traceback."""
        for text in ("EngineCore failed to start.", "Traceback (most recent call last):", cause):
            self.line("EngineCore", "core.py:1510", text, "ERROR")
        cause = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
        write(ERR, f"Traceback (most recent call last):\nRuntimeError: {cause}\n".encode())

    def core_died(self) -> None:
        """The core is dead, and so is the engine. This is an exit with code 0."""
        self.line("EngineCore", "core.py:1512", "EngineCore encountered a fatal error.", "ERROR")
        self.line(
            "APIServer",
            "core_client.py:815",
            "[shutdown] MPClient: engine core exited unexpectedly; starting cleanup",
            "WARNING",
        )
        self.line("APIServer", "async_llm.py:709", "AsyncLLM output_handler failed.", "ERROR")
        error = f"vllm.v1.engine.exceptions.EngineDeadError: {DEAD}"
        self.line("APIServer", "async_llm.py:709", f"Traceback (most recent call last):\n{error}", "ERROR")
        self.lines(_ENDED)

    def stopping(self, timeout: int) -> None:
        """SIGTERM has come."""
        mode = "drain" if timeout else "abort"
        self.line("APIServer", "launcher.py:254", "[shutdown] API server: shutdown triggered")
        text = f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout}s"
        self.line("APIServer", "launcher.py:268", text)

    def waiting(self) -> None:
        """Connections are still open."""
        write(ERR, b"INFO:     Waiting for connections to close. (CTRL+C to force quit)\n")

    def ended(self) -> None:
        """The server is over, in order."""
        self.lines(_ENDED)


def flood(size: int) -> None:
    """So many bytes of whole lines, written in large pieces; behind them one that says "flood ended"."""
    text = "(EngineCore pid=1) INFO 11-24 03:10:00 [loggers.py:257] Engine 000: one of very many lines, all the same\n"
    line = text.encode()
    block = line * (2**20 // len(line))
    for _ in range(size // len(block)):
        write(OUT, block)
    if rest := size % len(block):
        write(OUT, block[: rest - 1] + b"\n")
    write(OUT, text[: text.index("Engine 000")].encode() + b"flood ended\n")


def garbage() -> None:
    """What no log should hold: half lines, bytes that are no text, colours, a line of 1 MB that does not end."""
    write(OUT, b"half a line, ")
    write(ERR, b"and half of another\n")
    write(OUT, b"bytes \xff\xfe\xc3( that are no UTF-8, cut \xe2\x96\n")
    write(OUT, b"NUL \0 and \0\0 in a line\n\0\n")
    write(OUT, b"\x1b[1;31mERROR\x1b[0m \x1b]0;a title\x07\x1b[2J\x1b[H colours\n")
    write(OUT, b"first\rsecond\r\rthird\r\n\r")
    write(OUT, b"\n\n   \n\t\n" + "\u2028\x85\x0b\x0c".encode() + b"\n")
    write(ERR, b"x" * 2**20)

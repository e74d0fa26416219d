"""A program that behaves as `vllm serve` 0.32 does towards a supervisor and a proxy, without a model.

Kept from the real one: it binds at once and listens late; its engine core is a process of its own that survives a
SIGKILL of the server; `/health` says little; `/v1` wants the key of VLLM_API_KEY; SIGTERM freezes streams and then
waits without limit for open connections; exit codes (0 when its engine dies, 1 on a failed start, 2 on bad options); a
request whose client has left is given up at once; the lines that it logs while it starts; its sleep (fake_sleep); its
adapters (fake_lora).
Fakes of one `--fake-ledger=FILE` share the memory of devices, and end where it is too little (fake_ledger).
Faults: by `--fake-...` options at start (fake_options), by a `"fake"` object in a request's body (a form: a field with
JSON; fake_work's `pause`, `stream` and `raw` explain its keys), and by requests to `/fake/...` while it runs
(`control`). What it saw of each request is told at `/fake/seen`.
This file is compiled at every start, the modules beside it once: so it holds nothing.
"""

import fake_start  # type: ignore[import-not-found] # beside this script

if __name__ == "__main__":
    fake_start.main()

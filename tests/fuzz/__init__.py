"""Random input, for longer than a suite may take: `python -m tests.fuzz`. Needs the dependency group `fuzz`."""

HIDDEN = "FUZZ_HIDDEN"  # the variable that names a file of what no answer may hold, a line each

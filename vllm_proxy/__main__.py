"""`python -m vllm_proxy` and the console script `vllm-proxy`."""

import sys

from vllm_proxy.cli import run


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""`help`: prints a page of the manual, a section of one, or what a code means.

The pages are found by the module `help` of the package, and laid out by `terminal`.
"""

import argparse
import json
import os

from vllm_proxy import help as pages
from vllm_proxy import terminal
from vllm_proxy.commands.outcome import OK, WRONG_USAGE
from vllm_proxy.commands.output import complain, write


def run(options: argparse.Namespace) -> int:
    """Needs no daemon and no file."""
    wanted = " ".join(options.topic)
    try:
        text = pages.about(wanted) if wanted else pages.contents()
    except pages.UnknownTopicError as error:
        complain(str(error))
        return WRONG_USAGE
    if options.json:
        listed = {"topics": [{"name": name, "about": about} for name, about in pages.topics()]}
        write(json.dumps({"topic": wanted, "text": text} if wanted else listed))
    else:
        terminal.show(text, os.environ, write)
    return OK

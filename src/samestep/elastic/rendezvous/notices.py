"""What a torchrun agent says while it waits, and how it refuses to start."""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from samestep.elastic.nodes import REFUSED
from samestep.system.log import logger, shown_on_stderr


FIRST_SECONDS, AGAIN_SECONDS = 3.0, 30.0
"""Seconds until the first and between further notes on what this machine awaits."""


def say(text: str) -> None:
    """Log a notice of the torchrun agent, on stderr unless logging is configured."""
    with shown_on_stderr():
        logger.info(text)


def refuse(text: str) -> NoReturn:
    """End torchrun with one sentence, which `samestep train --nodes` shows."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": text, "errorCode": REFUSED}
        Path(file).write_text(json.dumps({"message": message}))
    else:
        with shown_on_stderr():
            logger.error("Error: %s", text)
    sys.exit(2)

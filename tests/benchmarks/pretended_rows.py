"""What processes of a test do in place of making rows. Not a test module; without heavy imports."""

import os
import time
from multiprocessing.connection import Connection


def pretend(name: str, pipe: Connection) -> None:
    """Crash, hang or send a row, as the name says."""
    pipe.send("fp32")
    if name == "crashes":
        os._exit(7)
    if name == "hangs":
        time.sleep(600)
    pipe.send({"type": name, "verdict": "packed"})

"""One of several processes, which does what it is told: a JSON line it reads is a job, one it writes the end."""

import faulthandler
import json
import signal
import sys
from pathlib import Path

import torch

from lowmem_rlhf.errors import LowmemError
from lowmem_rlhf.processes.start import rank_of_process
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.session.train import train


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # says where it stands
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        if "code" in job:
            exec(job["code"], {"__name__": "job"})  # what a test does to this process before a run
            print(json.dumps({}), file=answers, flush=True)
            continue
        values = job["recipe"]
        values = values[rank_of_process()] if isinstance(values, list) else values
        try:
            train(validate_recipe(values), Path(job["output"]), job["resume"])
            said = {}
        except LowmemError as error:
            said = {"error": str(error), "kind": type(error).__name__, "said_elsewhere": error.said_elsewhere}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()

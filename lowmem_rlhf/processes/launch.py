"""`train --processes N`: accelerate starts the processes on this machine, and watches over them."""

import logging
import signal
from collections.abc import Sequence

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.processes.start import number_of_processes

MOST = 1024


def check_number(processes: int) -> None:
    """Check the number of processes that is asked for.

    Raises:
        UserError: it cannot be started.
    """
    if not 1 <= processes <= MOST:
        raise UserError(f"--processes: got {processes}; give 1 to {MOST}, one for each card")
    if number_of_processes() > 1:
        raise UserError(
            "--processes: this is one of several processes already (WORLD_SIZE is set); leave --processes out where "
            "accelerate or torchrun start the processes"
        )


def launch(processes: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``python -m lowmem_rlhf`` with these arguments in so many processes.

    Where one of them fails, accelerate ends the others with SIGTERM.

    Returns:
        The exit code, of the first that failed, and what there is to say that no process has said.
    """
    import torch.distributed.run  # noqa: F401  (its loggers are made with it)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in [one for one in logging.root.manager.loggerDict if one.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the process that fails says what there is to say
    how = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--main_process_port", "0"]  # a free one
    started = launch_command_parser().parse_args(
        ["--num_processes", str(processes), *how, *port, "-m", "lowmem_rlhf", *arguments]
    )
    try:
        launch_command(started)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code: int = failure.exitcode
        if code >= 0:
            return code, ""
        return 128 - code, (
            f"process {rank} of {processes} was ended by {signal.Signals(-code).name}, and the others with it; what is "
            "on the disk is whole: go on with --resume"
        )
    except SignalException as stop:
        return 128 + int(stop.sigval), ""
    return 0, ""


def without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without an option that has a value, as ``--name N`` or ``--name=N``."""
    kept, after = [], False
    for one in arguments:
        if not after and one != name and not one.startswith(f"{name}="):
            kept.append(one)
        after = one == name
    return kept

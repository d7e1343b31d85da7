"""The beginning and the end of a process that is one of several, as accelerate or torchrun have started it."""

import atexit
import os
from datetime import timedelta
from typing import Any

from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.processes.shares import even
from lowmem_rlhf.processes.world import World, begin, begun


def number_of_processes() -> int:
    """Return how many processes there are, this one included, as the launcher's environment says."""
    return _from_environment("WORLD_SIZE", 1)


def rank_of_process() -> int:
    """Return this process's number among all, from 0, as the launcher's environment says."""
    return _from_environment("RANK", 0) if number_of_processes() > 1 else 0


def local_rank() -> int | None:
    """Return this process's number on its machine, which is the number of its card; None: it is the only one."""
    return _from_environment("LOCAL_RANK", 0) if number_of_processes() > 1 else None


def processes_here() -> int:
    """Return how many of the processes are on this machine."""
    return _from_environment("LOCAL_WORLD_SIZE", number_of_processes()) if number_of_processes() > 1 else 1


def times_restarted() -> int:
    """Return how often torchrun (``--max-restarts``) has started the processes anew."""
    return _from_environment("TORCHELASTIC_RESTART_COUNT", 0)


def _from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


def begin_processes(on_cpu: bool, timeout: float) -> World:
    """Meet the other processes, if there are any, and return them; later calls return the same.

    Args:
        on_cpu: the run computes on the CPU.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        UserError: they cannot be reached.
    """
    if begun().several or number_of_processes() < 2:
        return begun()
    import torch.distributed as dist
    from accelerate import PartialState

    wait = timedelta(seconds=timeout)
    try:
        state = PartialState(cpu=on_cpu, timeout=wait, **_fresh_store(wait))
        over_host = None if state.backend == "gloo" else dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {number_of_processes()} processes of this run cannot reach each other ({one_line(error)}); see that "
            "MASTER_ADDR and MASTER_PORT lead to the first machine, or start them with --processes"
        ) from error
    size = state.num_processes
    begin(World(state.process_index, size, even(size), timeout=timeout, _group=over_host))
    atexit.register(begun().leave)
    return begun()


def _fresh_store(wait: timedelta) -> dict[str, Any]:
    """Return where processes that torchrun has started again meet, as keywords of ``init_process_group``.

    torch (2.13) gives them the store of the first start, where they would find the addresses of processes that ended.
    """
    if not times_restarted():
        return {}
    from torch.distributed import PrefixStore, rendezvous

    store, rank, size = next(rendezvous("env://", timeout=wait))
    return {"store": PrefixStore(f"start-{times_restarted()}", store), "rank": rank, "world_size": size}

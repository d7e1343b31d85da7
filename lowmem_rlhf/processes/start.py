"""The beginning and the end of a process that is one of several, as accelerate or torchrun have started it."""

import atexit
import os
import time
import uuid
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
    import torch.distributed.nn.functional  # noqa: F401  (imported later, its defaults would hold the group: `leave`)
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
    begin(World(state.process_index, size, even(size), _group=over_host))
    atexit.register(begun().leave)
    return begun()


def _fresh_store(wait: timedelta) -> dict[str, Any]:
    """Return where processes that torchrun has started meet, as keywords of ``init_process_group``.

    torch (2.13) gives those that it starts again the store of the first start, where they would find the addresses of
    processes that have ended; and nodes do not agree on how often that was.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    from torch.distributed import PrefixStore, rendezvous

    store, rank, size = next(rendezvous("env://", timeout=wait))
    return {"store": PrefixStore(agreed_name(store, rank, size, wait), store), "rank": rank, "world_size": size}


def agreed_name(store: Any, rank: int, size: int, wait: timedelta) -> str:
    """Return a name that these processes agree on in a store, and that none before them had there.

    The first process writes a new name; each other one answers with that name and a mark of its own, and takes the name
    once the first one has written the mark behind it. What earlier processes have left fits neither.

    Raises:
        RuntimeError: a process does not answer in time.
    """
    mark, ends = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        store.set("name", mark)
        for other in range(1, size):
            while not (answer := read(f"answer/{other}")).startswith(mark):
                _pause(ends, f"process {other} does not answer")
            store.set(f"{mark}/{other}", answer.removeprefix(mark))
        return mark
    while True:
        name = read("name")
        if name:
            store.set(f"answer/{rank}", name + mark)
            if read(f"{name}/{rank}") == mark:
                return name
        _pause(ends, "process 0 does not answer")


def _pause(ends: float, late: str) -> None:
    if time.monotonic() > ends:
        raise RuntimeError(late)
    time.sleep(0.02)

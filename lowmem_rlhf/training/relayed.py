"""What the other processes of a run have to say, which the first one shows."""

from typing import Any

from lowmem_rlhf.processes.world import World
from lowmem_rlhf.progress import Progress


class RelayedMessages:
    """A display of one of several processes that keeps its messages until the first process has heard of them.

    Args:
        progress: the display; it shows nothing in all processes but the first.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._said = progress, list[str]()

    def message(self, text: str) -> None:
        """Show a line that stays."""
        self._said.append(text)
        self._progress.message(text)

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the part of the work that runs now."""
        self._progress.phase(name, done, total)

    def __getattr__(self, name: str) -> Any:
        """Return what else the display can."""
        return getattr(self._progress, name)

    def tell(self, world: World) -> None:
        """Let the first process show what others have said and it has not; all processes have to call it."""
        every, self._said = world.gather(self._said), []
        for rank, lines in enumerate(every if world.rank == 0 else ()):
            for line in dict.fromkeys(lines):
                if rank and line not in every[0]:
                    self._progress.message(f"process {rank}: {line}")

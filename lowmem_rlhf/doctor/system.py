"""The checks of disk, Hub, shared memory and Windows' Linux."""

from lowmem_rlhf.doctor.finding import Finding, Status
from lowmem_rlhf.doctor.machine import Disk, Machine
from lowmem_rlhf.paths import without_home

GIB = 1024**3
# Free space: below the first an error, below the second a warning. A 7B model in 16 bits has 15 GB and is downloaded
# whole before it is read; a run of it keeps checkpoints of about 0.5 GB each and exports as much as the model again.
ROOM = {"the cache of models": (2 * GIB, 20 * GIB), "runs": (1 * GIB, 5 * GIB)}
SHARED = 1 * GIB  # Docker gives 64 MiB
NEEDED_RAM = 12 * GIB  # a 3B model is read through host memory in 16 bits (6 GiB), beside the libraries and the system
WSL_PAGE = "https://docs.nvidia.com/cuda/wsl-user-guide/"


def check_disk(machine: Machine) -> list[Finding]:
    """Room where models are kept and where runs are written."""
    return [_disk(disk) for disk in machine.disks]


def _disk(disk: Disk) -> Finding:
    least, wanted = ROOM[disk.what]
    found = f"{disk.free_bytes / GIB:.1f} GiB free for {disk.what} ({without_home(str(disk.path))})"
    is_cache = disk.what != "runs"
    if disk.obstacle:
        means = f"{without_home(disk.obstacle)}; set HF_HUB_CACHE to another folder" if is_cache else ""
        means = means or f"{without_home(disk.obstacle)}; give `train` another folder with --output"
        return Finding("disk", "error", found, means)
    if disk.free_bytes >= wanted:
        return Finding("disk", "ok", found)
    status: Status = "error" if disk.free_bytes < least else "warning"
    if is_cache:
        means = "a model of 7B has 15 GB in 16 bits; `hf cache ls` lists what is kept, HF_HUB_CACHE names another disk"
        return Finding("disk", status, found, means, "hf cache prune")
    means = "checkpoints and exports need it, and a run that cannot save stops; --output takes another disk"
    return Finding("disk", status, found, means, "du -sh runs/*" if disk.path.is_dir() else None)


def check_hub(machine: Machine) -> list[Finding]:
    """Whether the Hub answers, or may be asked at all, and what is in the cache without it."""
    hub = machine.hub
    kept = f"{machine.cached_models} models in the cache" if machine.cached_models else "no model in the cache"
    token = "a token is there" if machine.has_token else "no token: gated models cannot be downloaded"
    if hub.offline:
        means = "models and data sets come from the cache, a folder or a package; nothing is downloaded"
        return [Finding("hub", "ok", f"not asked: {hub.offline} is set; {kept}", means)]
    if hub.code is not None and hub.code < 400:
        return [Finding("hub", "ok", f"{hub.host} answers; {kept}; {token}")]
    offline = "$Env:HF_HUB_OFFLINE = '1'" if machine.system == "Windows" else "export HF_HUB_OFFLINE=1"
    if hub.code == 429:
        means = "too many requests came from this address; with a token more are allowed"
        return [Finding("hub", "warning", f"{hub.host} answers 429; {kept}; {token}", means, "hf auth login")]
    if hub.code in (401, 403):
        means = "the address, or the token that is set, is refused"
        return [Finding("hub", "warning", f"{hub.host} answers {hub.code}; {kept}", means, "hf auth login")]
    why = f"it answers {hub.code}" if hub.code is not None else hub.error
    means = "models and data that are not on this disk cannot be had; recipes on local folders and packages run"
    if "CERTIFICATE" in why.upper():
        means += "; a proxy that opens connections needs its certificate in SSL_CERT_FILE"
    if machine.cached_models:
        means += "; offline, runs do not wait for it"
    return [Finding("hub", "warning", f"{hub.host} is not reached ({why}); {kept}", means, offline)]


def check_shared_memory(machine: Machine) -> list[Finding]:
    """/dev/shm, which a container has little of and which workers of data loaders pass tensors through."""
    size = machine.shared_memory
    if size is None:
        return []
    found = f"/dev/shm has {size / GIB:.2f} GiB{', in a container' if machine.in_container else ''}"
    if size >= SHARED or not machine.in_container:
        return [Finding("shared_memory", "ok", found)]
    means = (
        "runs of this package load data in one process and do not need it; trainers of TRL with "
        "dataloader_num_workers fail with a bus error. Start the container with more"
    )
    return [Finding("shared_memory", "warning", found, means, "docker run --gpus all --shm-size=8g IMAGE")]


def check_wsl(machine: Machine) -> list[Finding]:
    """Linux inside Windows: its share of the memory, and what CUDA cannot do there (read in `WSL_PAGE`, not tried)."""
    if not machine.is_wsl:
        return []
    found = f"Linux inside Windows (WSL), with {machine.ram_bytes / GIB:.1f} GiB of memory"
    limits = (
        "page-locked memory, which offloading uses, is limited there; managed memory, which paged optimizers use, "
        f"is not fully supported; and the driver is that of Windows: install none in Linux ({WSL_PAGE})"
    )
    if machine.ram_bytes >= NEEDED_RAM:
        return [Finding("wsl", "ok", found, limits)]
    means = f"WSL takes half of the machine's memory; write [wsl2] and memory=24GB, then `wsl --shutdown`; {limits}"
    command = "powershell.exe -NoProfile -Command 'notepad \"$env:USERPROFILE\\.wslconfig\"'"
    return [Finding("wsl", "warning", found, means, command)]

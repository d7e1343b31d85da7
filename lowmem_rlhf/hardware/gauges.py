"""How busy and how warm NVIDIA cards are, asked again and again: NVML stays open. No torch is imported here."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.hardware.nvml import ask

if TYPE_CHECKING:
    import torch


class Gauge:
    """One card. What it does not tell is None; a MIG instance tells neither use nor temperature."""

    def __init__(self, handle: Any) -> None:
        """Take NVML's handle of a card, while NVML is open."""
        import pynvml

        self._handle, self._nvml = handle, pynvml
        self._seen = 0  # time stamp of the newest sample that was averaged
        self.name = str(ask(pynvml.nvmlDeviceGetName, handle) or "NVIDIA card of unknown name")

    def utilization(self) -> float | None:
        """Return in percent the share of time in which a kernel ran: since the last call, or lately.

        The driver keeps some samples a second for some seconds; the mean is of those that are new. A card that keeps
        none tells the last one.
        """
        kept = ask(self._nvml.nvmlDeviceGetSamples, self._handle, self._nvml.NVML_GPU_UTILIZATION_SAMPLES, self._seen)
        samples = {one.timeStamp: one.sampleValue.uiVal for one in (kept[1] if kept else ())}
        new = [percent for time, percent in samples.items() if time > self._seen and percent <= 100]
        self._seen = max(self._seen, *samples) if samples else self._seen
        if new:
            return sum(new) / len(new)
        rates = ask(self._nvml.nvmlDeviceGetUtilizationRates, self._handle)
        return None if rates is None else float(rates.gpu)

    def temperature(self) -> float | None:
        """Return degrees Celsius."""
        told = ask(self._nvml.nvmlDeviceGetTemperature, self._handle, self._nvml.NVML_TEMPERATURE_GPU)
        return None if told is None else float(told)

    def memory(self) -> tuple[int | None, int | None]:
        """Return used bytes, of all programs, and bytes in all."""
        told = ask(self._nvml.nvmlDeviceGetMemoryInfo, self._handle)
        return (None, None) if told is None else (int(told.used), int(told.total))

    def to_dict(self) -> dict[str, Any]:
        """Return ``name``, ``utilization``, ``temperature``, ``used_bytes`` and ``total_bytes``."""
        used, total = self.memory()
        return {
            "name": self.name,
            "utilization": self.utilization(),
            "temperature": self.temperature(),
            "used_bytes": used,
            "total_bytes": total,
        }


def gauges() -> list[Gauge]:
    """Return those of all cards, in the order of the bus; none where NVML cannot be asked."""
    handles = [ask(_nvml().nvmlDeviceGetHandleByIndex, index) for index in range(_count())]
    return [Gauge(handle) for handle in handles if handle is not None]


def step_gauge(device: "torch.device") -> Callable[[], dict[str, float]]:
    """Return what tells ``gpu/utilization`` and ``gpu/temperature`` of a torch device, as far as NVML does.

    A CPU and other makers' cards tell nothing, and are asked nothing.
    """
    gauge = _gauge_of(device)

    def read() -> dict[str, float]:
        told = {} if gauge is None else {"utilization": gauge.utilization(), "temperature": gauge.temperature()}
        return {f"gpu/{name}": value for name, value in told.items() if value is not None}

    return read


def _gauge_of(device: "torch.device") -> Gauge | None:
    if device.type != "cuda":
        return None
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))  # as nvidia-smi has it, but for GPU-
    if not uuid or not _count():
        return None
    handle = ask(_nvml().nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    return None if handle is None else Gauge(handle)


def _nvml() -> Any:
    import pynvml

    return pynvml


def _count() -> int:
    """Open NVML and return how many cards it has; 0 where it cannot be opened."""
    nvml = _nvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return 0
    return int(ask(nvml.nvmlDeviceGetCount) or 0)

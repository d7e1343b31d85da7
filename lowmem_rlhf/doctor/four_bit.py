"""The check of bitsandbytes: a product with 4-bit weights on the device, against that of the dequantized ones."""

from lowmem_rlhf.doctor.finding import Finding
from lowmem_rlhf.doctor.machine import Machine

ROUNDING = 0.02  # bfloat16 rounds a number by up to 1/256 of it, and the sum once more
QUANTIZATION = 0.2  # NF4 is 0.09 of normally distributed numbers


def check_bitsandbytes(machine: Machine) -> list[Finding]:
    """Whether it loads, with the library for this device, and computes what it should."""
    told, device = machine.four_bit, machine.device
    if machine.torch["error"] is not None:
        return [Finding("bitsandbytes", "error", "not tried: torch does not load")]
    if machine.torch["unreachable"] is not None:
        return [Finding("bitsandbytes", "warning", f"not tried: torch does not reach {device.name}")]
    version = told.get("version")
    name = f"bitsandbytes {version}" if version else "bitsandbytes"
    if told["error"] is not None and version is None:
        wanted = machine.version("bitsandbytes")
        means = "no 4-bit or 8-bit weights and optimizers; hardware.quantization=none is left"
        command = f'python -m pip install --force-reinstall --no-deps "bitsandbytes{f"=={wanted}" if wanted else ""}"'
        return [Finding("bitsandbytes", "error", f"{name} cannot be loaded: {told['error']}", means, command)]
    command = f'python -m pip install --force-reinstall --no-deps "bitsandbytes=={version}"'
    library = told.get("library_error")
    if library and not told["error"]:
        means = "4-bit products are right here, by slow kernels in Python"
        return [Finding("bitsandbytes", "warning", f"{name} has no library for this device: {library}", means, command)]
    if told["error"] is not None:
        why = library or told["error"]
        means = f"its 4-bit weights cannot be used on {device.torch_device}; hardware.quantization=none is left"
        if library and machine.torch.get("cuda"):
            means += f"; its wheel has no library that fits CUDA {machine.torch['cuda']}, or lacks it"
        return [Finding("bitsandbytes", "error", f"{name}: {why}", means, command if library else None)]
    far = max(told["rounding"].values())
    if not (far < ROUNDING and told["quantization"] < QUANTIZATION):
        rows = ", ".join(told["rounding"])
        found = f"{name} computes wrongly on {device.name}: up to {far:.2g} off the exact product ({rows} rows)"
        means = (
            "runs with 4-bit weights would learn nothing; take hardware.quantization=none, and report it with --json"
        )
        return [Finding("bitsandbytes", "error", found, means)]
    found = f"{name}: a 4-bit product in {device.half_dtype} on {device.name} is right (within {far:.1e})"
    return [Finding("bitsandbytes", "ok", found)]

"""What a card can do, tried on it: `python card_capabilities_process.py KIND|VCARD_FOLDER FILE.json`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from cards import card_of

from lowmem_rlhf.engine.recompute import _from_host, _to_host
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.detect import detect, torch_reaches
from lowmem_rlhf.hardware.memory import clock, peak_bytes, reset_peak

FILE = Path(sys.argv[2])
CARD, DEVICE = card_of(sys.argv[1])
SIZE = 1 << 20  # of a tensor, in bytes

device = torch.device(DEVICE)
found = detect(DEVICE)
reset_peak(device)
clock(device)
x = torch.arange(SIZE // 4, dtype=torch.float32, device="cpu").to(device)
_, host = waiting = _to_host(x)
back = _from_host(waiting)
clock(device)
rows = torch.randn(64, 64, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
half = rows.to(getattr(torch, found.half_dtype))
exact = half.double() @ half.double()
apart = float(((half.to(device) @ half.to(device)).cpu().double() - exact).abs().max() / exact.abs().max())
facts = {
    "kind": found.kind,
    "half_dtype": found.half_dtype,
    "bf16": found.bf16,
    "product": apart,
    "of_the_device": asdict(found.capabilities),
    "of_torchs_device": asdict(capabilities(x.device)),
    "reached": torch_reaches(DEVICE),
    "has_counter": hasattr(torch.get_device_module(device), "max_memory_allocated"),
    "counted": found.capabilities.counts_memory
    and peak_bytes(device) == CARD.peak()
    and SIZE <= CARD.live() <= peak_bytes(device) < 16 * SIZE,
    "pinned": host.is_pinned(),
    "equal": torch.equal(back.cpu(), x.cpu()) and torch.equal(host, x.cpu()),
    "captures": hasattr(torch.get_device_module(device), "CUDAGraph"),
}
FILE.write_text(json.dumps(facts))

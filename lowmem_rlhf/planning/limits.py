"""Bounds of our own kernels and loops that decide memory: the engine works by them, the memory model counts by them."""

VOCABULARY_CHUNK = 4096  # entries of a logits tile: a head's rows that stay in a processor's cache
ENOUGH_POSITIONS = 512  # of a logits tile; more of them are not faster
ATTENDED_PER_TOKEN = 4  # key positions that a micro-batch may hold in attention for each token of its budget
EXPLICIT_KEYS = 256  # up to so many keys a CPU is faster with explicit scores, backward above all
CAPPED_SCORES = 1 << 22  # scores at once where they have a soft cap: about 80 MB with their gradients
COMPLETION_BLOCK = 32  # tokens by which the room for completions grows: shapes change once in a block
KERNEL_ROWS = 64  # of bitsandbytes' 4-bit product on a CPU; with more, dequantizing once and a plain product is faster
FOUR_BIT_ROWS = 128  # of our own 4-bit product on a CPU; with more, torch on the weights made dense is faster

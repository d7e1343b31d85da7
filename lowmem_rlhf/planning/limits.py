"""Bounds of our own kernels and loops that decide memory: the engine works by them, the memory model counts by them."""

VOCABULARY_CHUNK = 4096  # entries of a logits tile: a head's rows that stay in a processor's cache
ALIGNED_ENTRIES = 256  # of a card's logits tile: a multiple of these
ENOUGH_POSITIONS = 512  # of a logits tile; more of them are not faster
ATTENDED_PER_TOKEN = 4  # key positions that a micro-batch may hold in attention for each token of its budget
EXPLICIT_KEYS = 256  # up to so many keys a CPU is faster with explicit scores, backward above all
CAPPED_SCORES = 1 << 22  # scores at once where they have a soft cap: about 80 MB with their gradients
COMPLETION_BLOCK = 32  # tokens by which the room for completions grows: shapes change once in a block
KERNEL_ROWS = 64  # of bitsandbytes' 4-bit product on a CPU; with more, dequantizing once and a plain product is faster
FOUR_BIT_ROWS = 128  # of our own 4-bit product on a CPU; with more, torch on the weights made dense is faster
LOOK = 8  # tokens that a card decodes before the host looks at what was written
SLOT_BLOCK = 64  # tokens by which the room of a slot, and what of it a pass reads, is rounded up
MIXED_TOKENS = 512  # tokens of which a recurrence makes copies in fp32 at once; a multiple of its chunks of 64


def scan_chunk(length: int) -> int:
    """Return how many tokens of rows of this length Mamba 2's scan takes at once, a power of two from 16 to 64.

    Rows are filled up to it, and a chunk takes scores of its length squared: a model's own 256 would be mostly padding.
    """
    return min(64, max(16, 1 << (length - 1).bit_length()))


def slot_room(prompt: int, completion: int) -> int:
    """Return the tokens of a slot: a prompt, a completion, and what a slot that has ended writes until it is seen."""
    return -(-(prompt + completion + LOOK) // SLOT_BLOCK) * SLOT_BLOCK


def seen_room(tokens: int, room: int) -> int:
    """Return how much of a slot's room a pass reads that has to see so many tokens; one graph serves for each."""
    seen = SLOT_BLOCK
    while seen < tokens:
        seen += max(SLOT_BLOCK, seen // 2 // SLOT_BLOCK * SLOT_BLOCK)
    return min(seen, room)


def tile_shape(positions: int, tile: int, vocabulary: int, on_cpu: bool) -> tuple[int, int]:
    """Return positions K and entries of the vocabulary C of a logits tile, K * C at most ``tile * vocabulary``.

    A CPU takes few entries of many positions, which stay in its caches. A card takes as many entries as the room is
    for, as each tile starts some twenty kernels.
    """
    chunk = min(vocabulary, VOCABULARY_CHUNK)
    rows = min(positions, max(1, min(ENOUGH_POSITIONS, tile * vocabulary // chunk)))
    if not on_cpu and positions:
        rows = -(-positions // -(-positions // rows))  # as even as tiles are
        chunk = min(vocabulary, max(chunk, tile * vocabulary // rows // ALIGNED_ENTRIES * ALIGNED_ENTRIES))
    return rows, chunk

"""How many tokens the fused heads work on at a time on a GPU.

A chunk of n tokens reads the whole weight once for each product, for 2 n FLOP a number: from a few hundred tokens on, a
product is bound by the tensor cores and not by reading the weight. So a chunk has what fits 256 MiB, but not fewer than
1024 tokens unless these take more than 1.3 GiB. At V = 128256 that is 1024 tokens and 1.25 GiB for the live teacher,
whatever N is. `chunk_tokens` asks for something else.

The number depends on sizes alone, not on how much memory happens to be free, so that the same call gives the same bits.
"""

BUDGET = 256 * 2**20  # bytes
CEILING = 1331 * 2**20  # bytes that 1024 tokens may take
LEAST = 1024  # tokens
_ALIGNED = 128  # tokens, a tile of a matrix product


def chunk_size(tokens: int, requested: int | None, bytes_each: int) -> int:
    """Tokens that are worked on at a time: as requested, or what memory allows, in chunks of nearly equal size."""
    if requested is not None:
        return max(1, min(tokens, requested))
    most = max(1, BUDGET // bytes_each, min(LEAST, CEILING // bytes_each))
    most -= most % _ALIGNED if most > _ALIGNED else 0
    chunks = max(1, -(-tokens // most))
    even = -(-tokens // chunks)
    return max(1, min(tokens, most, -(-even // _ALIGNED) * _ALIGNED))


def aligned(columns: int) -> int:
    """A row's stride at which every row begins at a multiple of 64 bytes in fp32, and of 32 in 16 bits."""
    return -(-columns // 16) * 16

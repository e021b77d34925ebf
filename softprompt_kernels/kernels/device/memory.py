"""How many tokens a loss of a head works on at a time on a GPU.

A GEMM of a chunk of n tokens reads the whole weight once, and does 2 n FLOP per number of it. From a few hundred tokens
on, the tensor cores limit it, and not reading the weight. So a chunk has as many tokens as fit 256 MiB, but at least
1024 where these fit 1.3 GiB. At V = 128256 that is 1024 tokens and 1.25 GiB with a live teacher, for any N. The caller
can ask for another size with `chunk_tokens`.

The size depends on shapes and dtypes only, not on the free memory, so that the same call gives the same bits.
"""

GPU_WORKSPACE_BYTES = 256 * 2**20
GPU_MIN_CHUNK = 1024  # tokens
GPU_MIN_CHUNK_BYTES = 1331 * 2**20  # at most, for GPU_MIN_CHUNK tokens; a chunk has fewer tokens where they take more
_TILE = 128  # tokens of a GEMM's tile


def chunk_size(tokens: int, requested: int | None, bytes_each: int) -> int:
    """Tokens per chunk: as requested, or as many as memory allows, in chunks of nearly equal size."""
    if requested is not None:
        return max(1, min(tokens, requested))
    most = max(1, GPU_WORKSPACE_BYTES // bytes_each, min(GPU_MIN_CHUNK, GPU_MIN_CHUNK_BYTES // bytes_each))
    most -= most % _TILE if most > _TILE else 0
    chunks = max(1, -(-tokens // most))
    even = -(-tokens // chunks)
    return max(1, min(tokens, most, -(-even // _TILE) * _TILE))


def aligned(columns: int) -> int:
    """The row stride, at least `columns`, at which each row starts at a multiple of 64 bytes in fp32 (16 bits: 32)."""
    return -(-columns // 16) * 16

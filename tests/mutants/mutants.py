"""Mistakes that the tests of the CUDA kernels must catch: each a text of a source that is replaced by another."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands once in `source` (under csrc/cuda); `tests` are pytest's arguments, of which one must fail."""

    name: str
    source: str
    old: str
    new: str
    tests: tuple[str, ...]


_ATTENTION = "tests/kernels/cuda/test_attention.py"
TILES = ("tests/kernels/cuda/test_attention_backward.py", "-k", "four_tiles and 0-64")
KINDS = (_ATTENTION, "-k", "every_kind")
ENDS = (_ATTENTION, "-k", "ends_of_tiles")
LOSSES = ("tests/kernels/cuda/test_kl.py", "-k", "dtypes or lengths or anywhere")

MUTANTS = (
    Mutant(
        "tiles: a barrier is dropped, and copies overwrite what others still read",
        "attention/tile.cuh",
        "    __syncthreads();  // or the copies after the next would overwrite what others still read\n",
        "",
        TILES,
    ),
    Mutant(
        "tiles: waits for one group of copies too few",
        "attention/tile.cuh",
        "arch::wait_for_copies<1>();",
        "arch::wait_for_copies<2>();",
        TILES,
    ),
    Mutant(
        "forward: copies are never committed",
        "attention/forward.cu",
        "problem.prompt_value, problem.value);\n    arch::commit_copies();",
        "problem.prompt_value, problem.value);",
        TILES,
    ),
    Mutant(
        "forward: the sums of a row are not rescaled when its maximum moves",
        "attention/forward.cu",
        "      out[n][2] *= factors.y;\n      out[n][3] *= factors.y;\n",
        "",
        TILES,
    ),
    Mutant(
        "forward: a row's maximum is that of half its columns",
        "attention/forward.cu",
        "      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));\n",
        "",
        TILES,
    ),
    Mutant(
        "forward: lse in base 2", "attention/forward.cu", "log2f(total[half])) * kLn2", "log2f(total[half]))", TILES
    ),
    Mutant(
        "mask: a query does not see its own position",
        "attention/mask.cuh",
        "return (!problem.causal || key <= query)",
        "return (!problem.causal || key < query)",
        ENDS,
    ),
    Mutant(
        "mask: a window is one too wide",
        "attention/mask.cuh",
        "(problem.window == 0 || query - key < problem.window)",
        "(problem.window == 0 || query - key <= problem.window)",
        ENDS,
    ),
    Mutant(
        "mask: tiles that begin before the window are left out",
        "attention/mask.cuh",
        "first - problem.window + 1 - keys.first",
        "first + 64 - problem.window + 1 - keys.first",
        KINDS,
    ),
    Mutant(
        "tiles: rows beyond the end are not filled with zeros",
        "attention/tile.cuh",
        "arch::copy_16_async(at(row, chunk), from + chunk * 8, from != nullptr);",
        "if (from != nullptr) arch::copy_16_async(at(row, chunk), from + chunk * 8, true);",
        ENDS,
    ),
    Mutant(
        "tiles: rows beyond the end are read",
        "attention/row_tile.cuh",
        "return one.first + row < one.end ? first + row * stride : nullptr;",
        "return first + row * stride;",
        ENDS,
    ),
    Mutant(
        "tiles: chunks are looked for where they would be without a swizzle",
        "attention/tile.cuh",
        "arch::load_matrices(b, at(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));",
        "arch::load_matrices(b, numbers + (row + lane % 8 + lane / 16 * 8) * kD + (2 * k + lane / 8 % 2) * 8);",
        TILES,
    ),
    Mutant(
        "products: two registers of a fragment are exchanged",
        "attention/tile.cuh",
        "pack<T>(weights[2 * j][2], weights[2 * j][3]),\n        pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1])",
        "pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]),\n        pack<T>(weights[2 * j][2], weights[2 * j][3])",
        TILES,
    ),
    Mutant(
        "results: a warp's lanes do not wait for each other before they write where they have loaded",
        "attention/tile.cuh",
        "  __syncwarp();  // other lanes may have loaded matrices from here\n",
        "",
        KINDS,
    ),
    Mutant(
        "results: a warp's lanes do not wait for each other before they read what they have written",
        "attention/tile.cuh",
        "  }\n  __syncwarp();\n  for (int i = lane;",
        "  }\n  for (int i = lane;",
        TILES,
    ),
    Mutant(
        "dQ: delta is read before the threads that compute it have written it",
        "attention/backward_dq.cu",
        "  __syncthreads();  // before delta, which other threads of this block have written, is read\n",
        "",
        TILES,
    ),
    Mutant(
        "dQ: what is NaN in a row that sees no key spreads to its gradient",
        "attention/backward_dq.cu",
        "gradient[n][i] = lse[i / 2] == kNowhere ? 0.0f : gradient[n][i];",
        "gradient[n][i] *= 1.0f;",
        KINDS,
    ),
    Mutant(
        "dQ: the gradient of lse has the wrong sign",
        "attention/backward_dq.cu",
        "backward.delta[at] = sum - (",
        "backward.delta[at] = sum + (",
        TILES,
    ),
    Mutant(
        "dK, dV: keys beyond the end are written to",
        "attention/backward_dkdv.cu",
        "return block.first + r < block.tokens ? row_pointer<T>(to, batch, head, block.first + r) : nullptr;",
        "return row_pointer<T>(to, batch, head, block.first + r);",
        ENDS,
    ),
    Mutant(
        "dK, dV: blocks that share a prompt write to the same part",
        "attention/backward_dkdv.cu",
        "block.part * static_cast<int64_t>(problem.prompts) + block.prompt",
        "0 * static_cast<int64_t>(problem.prompts) + block.prompt",
        TILES,
    ),
    Mutant(
        "fold: the last part is left out",
        "attention/backward_dkdv.cu",
        "for (int part = 0; part < backward.splits; ++part)",
        "for (int part = 0; part + 1 < backward.splits; ++part)",
        TILES,
    ),
    Mutant(
        "sums of a block: results are read before all warps have left theirs",
        "block_reduce.cuh",
        "  }\n  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kCount; ++i) {\n    float all",
        "  }\n#pragma unroll\n  for (int i = 0; i < kCount; ++i) {\n    float all",
        LOSSES,
    ),
    Mutant(
        "divergence: threads' sums are added up as if they had one maximum",
        "losses/kl_rows.cu",
        "  sums.carry_over(largest[0], largest[1], scale);\n",
        "",
        LOSSES,
    ),
    Mutant(
        "divergence: a word beyond the vocabulary counts",
        "losses/kl_rows.cu",
        "if (at < 0 || at >= call.vocab) z[i] = -kInfinity;",
        "if (at < 0 || at > call.vocab) z[i] = -kInfinity;",
        LOSSES,
    ),
    Mutant(
        "numbers: 16 bytes are read wherever they lie",
        "vector_io.cuh",
        "vectors = column_stride == 1 && (reinterpret_cast<uintptr_t>(data) - shift * bytes_of(dtype)) % 16 == 0;",
        "vectors = column_stride == 1;",
        LOSSES,
    ),
)

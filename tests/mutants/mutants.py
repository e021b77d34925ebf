"""Bugs that the tests of the CUDA kernels must catch. Each one replaces a text of a source file by another text."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One bug. `old` must occur exactly once in `source`, a path under csrc/cuda.

    `tests` are arguments of pytest: at least one of the tests that they select must fail.
    """

    name: str
    source: str
    old: str
    new: str
    tests: tuple[str, ...]


ATTENTION = "tests/kernels/cuda/test_attention.py"
TILES = ("tests/kernels/cuda/test_attention_backward.py", "-k", "four_tiles and 0-64")
RANDOM = (ATTENTION, "-k", "random_problems")
ENDS = (ATTENTION, "-k", "ends_of_tiles")
LOSSES = ("tests/kernels/cuda/test_kl.py", "-k", "dtypes or lengths or any_address")

MUTANTS = (
    Mutant(
        "tiles: without the last barrier, copies overwrite a stage that other threads still read",
        "attention/tile.cuh",
        "    __syncthreads();  // all threads have read this stage before the next copy overwrites it\n",
        "",
        TILES,
    ),
    Mutant(
        "tiles: one group of copies too few is waited for",
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
        "forward: half the rows are not rescaled when their maximum grows",
        "attention/forward.cu",
        "      out_accumulator[n][2] *= factors.y;\n      out_accumulator[n][3] *= factors.y;\n",
        "",
        TILES,
    ),
    Mutant(
        "forward: a row's maximum is that of half its columns",
        "attention/forward.cu",
        "      new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 2));\n",
        "",
        TILES,
    ),
    Mutant(
        "forward: lse in base 2", "attention/forward.cu", "log2f(row_sum[half])) * kLn2", "log2f(row_sum[half]))", TILES
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
        "mask: tiles that begin before the window are skipped",
        "attention/mask.cuh",
        "first - problem.window + 1 - keys.first_position",
        "first + 64 - problem.window + 1 - keys.first_position",
        RANDOM,
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
        "return tile.first + row < tile.end ? first + row * stride : nullptr;",
        "return first + row * stride;",
        ENDS,
    ),
    Mutant(
        "tiles: chunks are loaded as if they were not swizzled",
        "attention/tile.cuh",
        "arch::load_matrices(b, at(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));",
        "arch::load_matrices(b, numbers + (row + lane % 8 + lane / 16 * 8) * kD + (2 * k + lane / 8 % 2) * 8);",
        TILES,
    ),
    Mutant(
        "GEMM: two registers of a fragment are exchanged",
        "attention/tile.cuh",
        "pack<T>(weights[2 * j][2], weights[2 * j][3]),\n        pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1])",
        "pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]),\n        pack<T>(weights[2 * j][2], weights[2 * j][3])",
        TILES,
    ),
    Mutant(
        "results: lanes overwrite rows that other lanes of the warp still load",
        "attention/tile.cuh",
        "  __syncwarp();  // other lanes may have loaded matrices from here\n",
        "",
        RANDOM,
    ),
    Mutant(
        "results: lanes read rows before other lanes of the warp have written them",
        "attention/tile.cuh",
        "  }\n  __syncwarp();\n  for (int i = lane;",
        "  }\n  for (int i = lane;",
        TILES,
    ),
    Mutant(
        "dQ: delta is read before other threads have written it",
        "attention/backward_dq.cu",
        "  __syncthreads();  // delta was written by other threads of this block\n",
        "",
        TILES,
    ),
    Mutant(
        "dQ: NaN in a row that sees no key spreads to its gradient",
        "attention/backward_dq.cu",
        "grad_query[n][i] = lse[i / 2] == kInfinity ? 0.0f : grad_query[n][i];",
        "grad_query[n][i] *= 1.0f;",
        RANDOM,
    ),
    Mutant(
        "dQ: the gradient of lse has the wrong sign",
        "attention/backward_dq.cu",
        "backward.delta[at] = sum - (",
        "backward.delta[at] = sum + (",
        TILES,
    ),
    Mutant(
        "dK, dV: keys beyond the end are written",
        "attention/backward_dkdv.cu",
        "return block.first + r < block.tokens ? row_pointer<T>(to, slot, head, block.first + r) : nullptr;",
        "return row_pointer<T>(to, slot, head, block.first + r);",
        ENDS,
    ),
    Mutant(
        "dK, dV: blocks that share a prompt write to the same partial sums",
        "attention/backward_dkdv.cu",
        "block.split * static_cast<int64_t>(problem.prompts) + block.prompt",
        "0 * static_cast<int64_t>(problem.prompts) + block.prompt",
        TILES,
    ),
    Mutant(
        "reduction of splits: the last split is left out",
        "attention/backward_dkdv.cu",
        "for (int split = 0; split < backward.splits; ++split)",
        "for (int split = 0; split + 1 < backward.splits; ++split)",
        TILES,
    ),
    Mutant(
        "block reduction: results are read before all warps have written theirs",
        "block_reduce.cuh",
        "  }\n  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kCount; ++i) {\n    float all",
        "  }\n#pragma unroll\n  for (int i = 0; i < kCount; ++i) {\n    float all",
        LOSSES,
    ),
    Mutant(
        "divergence: the threads' sums are added without rescaling to one maximum",
        "losses/kl_rows.cu",
        "  sums.rescale(maxima[0], maxima[1], scale);\n",
        "",
        LOSSES,
    ),
    Mutant(
        "divergence: an entry beyond the vocabulary counts",
        "losses/kl_rows.cu",
        "if (column < 0 || column >= call.vocab) z[i] = -kInfinity;",
        "if (column < 0 || column > call.vocab) z[i] = -kInfinity;",
        LOSSES,
    ),
    Mutant(
        "vectors: 16 bytes are read from unaligned addresses",
        "vector_io.cuh",
        "vectorized = column_stride == 1 && (reinterpret_cast<uintptr_t>(data) - shift * bytes_of(dtype)) % 16 == 0;",
        "vectorized = column_stride == 1;",
        LOSSES,
    ),
)

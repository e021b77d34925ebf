"""FLOP of the attention kernels, from the arguments of a launch, for profilers.

Only pairs of a query and a key that it sees count. Their number follows from the sizes: lengths of ragged prompts and
keys are on the device and are taken as full, packed sequences as of one length. A dot of D numbers for each pair is
2 D FLOP, with D also for Dv:

    forward          S, P V                          2 dots for each pair
    backward_dq      S, dO Vᵀ, dS K                  3, none where dQ is not needed
    backward_dkdv    S, dO Vᵀ, dSᵀ Q, Pᵀ dO          4; dV alone needs S and Pᵀ dO, dK alone not Pᵀ dO
"""

from typing import Any, NamedTuple

from softprompt_kernels.kernels.triton.attention.arguments import Layout, Scoring, Variant
from softprompt_kernels.kernels.triton.profiled import Arguments


class Pairs(NamedTuple):
    """Pairs of a query and a key that it sees, over all sequences and query heads."""

    own: float
    prompt: float


def visible_pairs(layout: Layout, scoring: Scoring, variant: Variant) -> Pairs:
    """The pairs of a launch."""
    sequences = max(1, layout.sequences)
    queries, keys = layout.queries, layout.keys
    if variant.packed:
        queries = keys = layout.queries / sequences
    rows = layout.sequences * layout.heads
    prompt = layout.prompt_keys
    if not variant.causal:
        return Pairs(rows * queries * keys, rows * queries * prompt)
    # Query i sees the keys up to its own position, at most `limit` of them, the own keys last.
    limit = scoring.window if variant.windowed else prompt + keys
    first = keys - queries + 1  # own keys that query 0 sees; below 0 it does not see all of the prompt
    both = _sum_clamped(prompt + first, queries, min(limit, prompt + keys))
    own = _sum_clamped(first, queries, min(limit, keys))
    return Pairs(rows * own, rows * (both - own))


def forward_flop(arguments: Arguments) -> tuple[float, int]:
    """FLOP of `forward_kernel`, and the bits of an operand."""
    variant: Variant = arguments["VARIANT"]
    pairs = sum(visible_pairs(arguments["layout"], arguments["scoring"], variant))
    return 2.0 * pairs * (variant.size + variant.value_size), _bits(arguments["query"])


def backward_dq_flop(arguments: Arguments) -> tuple[float, int]:
    """FLOP of `backward_dq_kernel`, and the bits of an operand."""
    variant: Variant = arguments["VARIANT"]
    pairs = sum(visible_pairs(arguments["layout"], arguments["scoring"], variant))
    per_pair = 2 * variant.size + variant.value_size if arguments["NEED_QUERY"] else 0
    return 2.0 * pairs * per_pair, _bits(arguments["query"])


def backward_dkdv_flop(arguments: Arguments) -> tuple[float, int]:
    """FLOP of `backward_dkdv_kernel`, and the bits of an operand."""
    variant, gradients = arguments["VARIANT"], arguments["gradients"]
    pairs = visible_pairs(arguments["layout"], arguments["scoring"], variant)
    flop = 0.0
    for count, key, value in (
        (pairs.own, gradients.key, gradients.value),
        (pairs.prompt, gradients.prompt_key, gradients.prompt_value),
    ):
        for_key = variant.size + variant.value_size if key is not None else 0  # dSᵀ Q, and dO Vᵀ
        for_value = variant.value_size if value is not None else 0
        scores = variant.size if for_key or for_value else 0
        flop += 2.0 * count * (scores + for_key + for_value)
    return flop, _bits(arguments["tensors"].query)


def _sum_clamped(first: float, count: float, most: float) -> float:
    """Σ min(most, max(0, first + i)) over i from 0 to count − 1."""
    zeros = max(0, min(count, -first))
    start = max(0, first)
    rising = max(0, min(count - zeros, most - start))
    return rising * start + rising * (rising - 1) / 2 + (count - zeros - rising) * most


def _bits(tensor: Any) -> int:
    return int(8 * tensor.base.element_size())

"""The error of a prompt in one layer, by query head, where the layer's window may hide a part of the prompt.

With the notation of `parts`, the prompt gives out' = a' o' + (1 − a') r instead of out, and

    error = mean_i ‖out'_i − out_i‖² / mean_i ‖out_i‖².

0 is the context itself. A prompt that no query looks at, a' = 0, has an error of about the context's own part.

Cost: attention of the measured rows over k keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt_kernels.compress.matching.parts import Parts, attend_prompts, visible_runs
from softprompt_kernels.compress.teacher.rows import LayerRows


@torch.no_grad()
def prompt_error(rows: LayerRows, parts: Parts, key: Tensor, value: Tensor, count: int) -> Tensor:
    """`[Hq]` fp32: the error on the first `count` rows, relative to the mean square of what all rows got.

    Args:
        rows, parts: of the layer.
        key, value: of the prompt, `[Hkv, k, D]` and `[Hkv, k, Dv]`, with keys at the positions of the context.
        count: from 1; of the rows of a team.
    """
    measured, dtype = rows.take(slice(rows.team.own(count))), rows.query.dtype
    own = measured.count
    out = torch.zeros_like(measured.out)
    lse = torch.full_like(measured.lse, -torch.inf)
    # A query stands as far behind the prompt as it stood behind the context, so the window hides the same distances.
    for index, keys in visible_runs(measured, key.shape[1]):
        seen = measured.query[None, :, index]
        run_out, run_lse = attend_prompts(
            seen, key[None, :, keys].to(dtype), value[None, :, keys].to(dtype), rows.scores
        )
        out[:, index], lse[:, index] = run_out[0], run_lse[0].to(dtype)
    share = torch.sigmoid(lse - parts.rest_lse[:, :own])[..., None]
    given = torch.lerp(parts.rest_out[:, :own], out, share)
    size = rows.mean_square().clamp(min=1e-20)
    squares = (given - measured.out).square().sum(-1)
    if rows.team.size == 1:
        return squares.mean(-1).div(size).float()
    found = squares.sum(-1)
    rows.team.sum_([found])
    return found.div(count * size).float()

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
        count: from 1.
    """
    measured, dtype = rows.take(slice(count)), rows.query.dtype
    out = torch.zeros_like(measured.out)
    lse = torch.full_like(measured.lse, -torch.inf)
    # A query stands as far behind the prompt as it stood behind the context, so the window hides the same distances.
    for index, keys in visible_runs(measured, key.shape[1]):
        seen = measured.query[None, :, index]
        run_out, run_lse = attend_prompts(
            seen, key[None, :, keys].to(dtype), value[None, :, keys].to(dtype), rows.scores
        )
        out[:, index], lse[:, index] = run_out[0], run_lse[0].to(dtype)
    share = torch.sigmoid(lse - parts.rest_lse[:, :count])[..., None]
    given = torch.lerp(parts.rest_out[:, :count], out, share)
    size = rows.out.square().sum(-1).mean(-1).clamp(min=1e-20)
    return (given - measured.out).square().sum(-1).mean(-1).div(size).float()

"""Expectations of a head's weights under its own distribution: the definition. Memory is O(N · V)."""

import torch

from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem
from softprompt_kernels.kernels.reference.linear_kl_div import kept_rows, logits


def unsupported(problem: ExpectationProblem) -> str | None:
    """The reference serves every problem."""
    return None


def forward(problem: ExpectationProblem) -> Expectation:
    """For each row: lse(z), z of the label, E_p[W] and E_p[bias], in the compute dtype."""
    dtype, head = problem.compute_dtype, problem.head
    hidden = kept_rows(problem.hidden, problem.weights).to(dtype)
    z, _ = logits(hidden, head, problem.temperature)
    log_partition = torch.logsumexp(z, -1)
    p = torch.exp(z - log_partition[:, None])
    label_logit = mean = bias_mean = None
    if problem.labels is not None:
        has_label = problem.labels >= 0
        label_logit = z.gather(1, torch.where(has_label, problem.labels, 0)[:, None]).squeeze(1)
        label_logit = torch.where(has_label, label_logit, 0)
    if problem.need_mean:
        mean = p @ head.weight.to(dtype)
    if head.bias is not None:
        # A bias of −inf has probability 0 and adds nothing to the expectation.
        bias_mean = p @ torch.where(head.bias == -torch.inf, 0, head.bias).to(dtype)
    return Expectation(log_partition, label_logit, mean, bias_mean)

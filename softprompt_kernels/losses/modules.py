"""The losses as modules, with the calls that users of `torch.nn.KLDivLoss` and of Liger's losses have in their code.

    KLDivLoss        torch.nn.KLDivLoss                    loss(log_probabilities, target)
    JSDLoss          LigerJSD                              loss(student, teacher, labels)
    LinearKLDivLoss  LigerFusedLinearJSD                   loss(student, weight, teacher, teacher_weight, labels)

β is the teacher's share of the mixture, m = β p_t + (1−β) p_s. β = 0 is KL(t‖s), β = 1 is KL(s‖t). So it is in Liger
and TRL. A temperature T divides the logits and multiplies the loss by T²; Liger and TRL leave that factor out.
The modules have no state, so they can be copied, pickled and shared among models.
"""

import operator

import torch
from torch import Tensor, nn

from softprompt_kernels.losses import functional
from softprompt_kernels.ops import TeacherMoments, checks, kl_div, linear_kl_div, linear_kl_div_from_moments
from softprompt_kernels.ops.kl_div import check_divergence
from softprompt_kernels.ops.reduction import check_reduction


class KLDivLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss`, with less memory and in less time on a CPU: arguments, meaning and errors are its own.

    Args:
        size_average, reduce, reduction, log_target: as in `functional.kl_div`, which says when the swap pays.

    Liger's `eps` is not needed: a target of 0 contributes 0. The divergence is that of Kullback and Leibler (1951), see
    docs/maths.md.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, as `functional.kl_div` gives it.

        Args:
            input: `[N, V]` or any other shape, log-probabilities. Differentiable.
            target: of input's shape, probabilities, or their logarithms with `log_target`. Differentiable.

        Returns:
            A scalar, or with reduction "none" a tensor of input's shape, in PyTorch's dtype.
        """
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, log_target={self.log_target}"


class JSDLoss(nn.Module):
    """Generalised Jensen-Shannon divergence, β KL(t‖m) + (1−β) KL(s‖m), m = β p_t + (1−β) p_s; mean over the tokens.

    Args:
        beta: the teacher's share of the mixture, in [1e-4, 1 − 1e-4], or 0 for KL(t‖s), or 1 for KL(s‖t).
        ignore_index: tokens with this label do not count.

    Value and gradient are derived in docs/maths.md.

    Raises:
        ValueError: beta is out of range.
        TypeError: ignore_index is no integer.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = float(beta), _integer(ignore_index)
        check_divergence(*_named("jsd", beta), 1.0)

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The divergence of a student from a teacher.

        Args:
            log_q: `[N, V]` or with more leading dimensions, the student's log-probabilities or logits. They are
                normalised here, so leave log_softmax out where you can. Differentiable; the gradient is that of
                logits. Behind a log_softmax, it is the same as Liger's.
            log_p: the teacher's, in log_q's shape; a constant.
            shift_labels: `[N]` integers, already shifted: only their place matters. None: all tokens count.

        Returns:
            A scalar in fp32 (float64 for float64 students); 0 where no token counts.

        Raises:
            ValueError, TypeError: naming the argument, what it got and what it accepts.
        """
        divergence, beta = _named("jsd", self.beta)
        weights = _counted(shift_labels, self.ignore_index, log_q)
        return kl_div(log_q, log_p, divergence=divergence, beta=beta, weights=weights)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}"


class LinearKLDivLoss(nn.Module):
    """Divergence of two language-model heads from their hidden states. The logits never exist all at once.

    Args:
        divergence: "forward" KL(t‖s), "reverse" KL(s‖t), or "jsd".
        beta: the teacher's share of the mixture of "jsd", as in `JSDLoss`.
        ignore_index: tokens with this label do not count.
        temperature: divides both logits and multiplies the loss by its square.
        reduction: "mean" (over the sum of weights; 0 if that is 0), "sum", or "none" (one value a token).
        softcap, logit_scale: logits are softcap · tanh(logit_scale · (W h + bias) / softcap).
        valid_vocab: only the first `valid_vocab` rows of the weights count.
        chunk_tokens: tokens whose logits exist at a time. None: as many as fit the workspace.
        backend: the name of a backend; None chooses one.

    How value and gradient come from hidden states, and what they cost in GEMMs: docs/maths.md.

    Raises:
        ValueError: an option is out of range.
        TypeError: ignore_index is no integer.
    """

    def __init__(
        self,
        divergence: str = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        reduction: str = "mean",
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        valid_vocab: int | None = None,
        chunk_tokens: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_divergence(*_named(divergence, beta), temperature)
        check_reduction(reduction)
        checks.positive("softcap", softcap)
        self.divergence, self.beta, self.ignore_index = divergence, beta, _integer(ignore_index)
        self.temperature, self.reduction = temperature, reduction
        self.softcap, self.logit_scale, self.valid_vocab = softcap, logit_scale, valid_vocab
        self.chunk_tokens, self.backend = chunk_tokens, backend

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | TeacherMoments,
        teacher_weight: Tensor | None = None,
        shift_labels: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The divergence of a student from a teacher.

        Args:
            student_input: `[N, d]` or with more leading dimensions, what the head reads. Differentiable.
            student_weight: `[V, d]`, the student's head. Differentiable, and costs nothing where it is frozen.
            teacher_input: `[N, d of the teacher]`; a constant. Or what `teacher_moments` made of it with this head:
                forward KL only, a frozen head, no softcap. A step then costs two thirds.
            teacher_weight: `[V, d of the teacher]`; None: the student's head, which is then read once for both.
            shift_labels: `[N]` integers, already shifted: only their place matters. None: all tokens count.
            bias: `[V]`, added to the logits of both heads.
            weights: `[N]`, at least 0. With labels, both count.

        Returns:
            A scalar in fp32 (float64 for float64 students), or `[N]` with reduction "none".

        Raises:
            ValueError, TypeError: naming the argument, what it got and what it accepts.
            RuntimeError: on a second derivative, or when a weight was changed in place before the backward.
        """
        weights = _both(_counted(shift_labels, self.ignore_index, student_input), weights)
        if isinstance(teacher_input, TeacherMoments):
            self._check_moments(teacher_weight)
            return linear_kl_div_from_moments(
                student_input,
                teacher_input,
                student_weight,
                bias=bias,
                logit_scale=self.logit_scale,
                temperature=self.temperature,
                weights=weights,
                reduction=self.reduction,
                valid_vocab=self.valid_vocab,
                chunk_tokens=self.chunk_tokens,
                backend=self.backend,
            )
        divergence, beta = _named(self.divergence, self.beta)
        return linear_kl_div(
            student_input,
            teacher_input,
            student_weight,
            teacher_weight=None if teacher_weight is student_weight else teacher_weight,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            divergence=divergence,
            beta=beta,
            temperature=self.temperature,
            weights=weights,
            reduction=self.reduction,
            valid_vocab=self.valid_vocab,
            chunk_tokens=self.chunk_tokens,
            backend=self.backend,
        )

    def _check_moments(self, teacher_weight: Tensor | None) -> None:
        if _named(self.divergence, self.beta)[0] != "forward" or self.softcap is not None:
            raise ValueError(
                "teacher_input must be hidden states unless divergence is 'forward' and softcap is None; got moments "
                f"with divergence {self.divergence!r} and softcap {self.softcap}"
            )
        if teacher_weight is not None:
            raise ValueError("teacher_weight must be None with moments, which hold what the teacher's head gave")

    def extra_repr(self) -> str:
        shown = ["divergence", "ignore_index", "temperature", "reduction"]
        shown[1:1] = ["beta"] if self.divergence == "jsd" else []
        defaults = {"softcap": None, "logit_scale": 1.0, "valid_vocab": None, "chunk_tokens": None, "backend": None}
        shown += [name for name, default in defaults.items() if getattr(self, name) != default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _named(divergence: str, beta: float) -> tuple[str, float]:
    """The ends of "jsd" by their own names. The ops read beta for "jsd" alone."""
    if divergence == "jsd" and beta in (0, 1):
        return ("forward", "reverse")[int(beta)], 0.5
    return divergence, float(beta)


def _integer(ignore_index: int) -> int:
    try:
        return operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an integer; got {type(ignore_index).__name__}") from None


def _counted(labels: Tensor | None, ignore_index: int, tokens: Tensor) -> Tensor | None:
    """1 for tokens that count, 0 for ignored ones. `tokens [..., d or V]` are those that the labels are of."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"shift_labels must be None or int32 or int64; got {got}")
    if isinstance(tokens, Tensor):  # else the op says what it is
        if labels.numel() != tokens.shape[:-1].numel():
            count = tokens.shape[:-1].numel()
            raise ValueError(f"shift_labels must have N = {count} elements; got shape {list(labels.shape)}")
        checks.device("shift_labels", labels, tokens.device)
    return labels.reshape(-1) != ignore_index


def _both(counted: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Weights of the tokens, 0 for ignored ones whatever their weight."""
    if counted is None or weights is None:
        return weights if counted is None else counted
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be None or a tensor; got {type(weights).__name__}")
    if weights.numel() != counted.numel():
        raise ValueError(f"weights must have the {counted.numel()} elements of shift_labels; got {weights.numel()}")
    return torch.where(counted, weights.reshape(-1), 0)

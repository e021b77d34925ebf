"""Divergence of rows of logits, one program per row (or per few short rows): the loss, and its gradient by the student.

For KL(p‖q), with e_p = exp(z_p − max z_p), e_q likewise, S = Σ e_p, and the centred difference
D = (z_q − max z_q) − (z_p − max z_p), so that e_q = e_p e^D:

    E = Σ (e_q − e_p) / S,   X = Σ (e_q − e_p − e_p D) / S,   L = log1p(E) = log(Σ e_q / S),   δ = D − L = log q/p
    KL = X + (L − E)         where |E| < ½: both terms have the size of D², so no digit is lost as q goes to p
    KL = L − Σ e_p D / S     elsewhere

    kind     p, q  loss                      ∂ loss / ∂ z_s
    forward  t, s  KL                        e_t expm1(δ) / S
    reverse  s, t  KL                        −e_s (D − E_s[D]) / S
    jsd      t, s  (1−β) E_s[r] − β E_t[l]   (1−β) p_s (r − E_s[r])       l = log m/p_t, r = log p_s/m = δ − l

The first pass computes maxima and sums together. When a maximum grows, the sums are carried over from the old maxima to
the new ones: with f_p = exp(old − new max z_p), f_q likewise, and a = new − old (max z_q − max z_p),

    Σ e_p D    becomes  f_p (Σ e_p D − a Σ e_p)
    Σ e_q − e_p         f_q Σ (e_q − e_p) + f_p expm1(−a) Σ e_p
    Σ e_p φ(D)          f_p Σ e_p φ(D) + f_p expm1(−a) Σ (e_q − e_p) + f_p φ(−a) Σ e_p,    φ(x) = e^x − 1 − x

which keeps the sizes of all terms. For |D| ≤ 1 the terms are e_p times a polynomial in D. Elsewhere they are written
with e_q, which is never above 1, so that a student far from its teacher needs no code of its own. Each lane keeps its
own partial sums of at most V / BLOCK_N numbers, so fp32 is accurate enough for a vocabulary of 262144.

Logits of −inf: a column where both are −inf counts as nothing (D is taken as 0). One where only z_q is −inf makes KL
infinite (jsd is bounded). One where only z_p is −inf adds e_q. A teacher with −inf in every column gives loss 0, a
student with −inf in every column gives loss +inf, and both give gradient 0. NaN and +inf make the loss and the gradient
of their row NaN. Rows of weight 0 are not read.

Cost per pair of logits: 2 exponentials per pass (3 in the passes of jsd that know L), and these passes:

    loss alone                  1 read of both                       jsd 2
    loss and gradient           2 reads of both, 1 write             jsd 3 reads
    gradient from statistics    1 read of both, 1 write

A column takes about 60 instructions in the first pass and 35 in the last; jsd 45, 115 and 90 (sm_90). An H100 issues 68
while its memory moves 8 bytes. The later passes run backwards: what the pass before read last is still in the L2 cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import INFINITY, LOG2E, excess_near, log1p_minus, log1p_near, tanh
from softprompt_kernels.kernels.triton.profiled import profiled

FORWARD = tl.constexpr("forward")
REVERSE = tl.constexpr("reverse")
JSD = tl.constexpr("jsd")

# Columns of the statistics [rows, STATISTICS], which are the fields of `Statistics` in fp32.
MAX_P = tl.constexpr(0)
MAX_Q = tl.constexpr(1)
CENTRE = tl.constexpr(2)
INVERSE_SUM = tl.constexpr(3)
STUDENT_KL = tl.constexpr(4)
STATISTICS = tl.constexpr(5)


class Statistics(NamedTuple):
    """What the gradient of a row is computed from, [BLOCK_M] each."""

    max_p: Any  # max z_p, 0 instead of −inf
    max_q: Any
    centre: Any  # E_s[D] for reverse, else L
    inverse_sum: Any  # 1 / S; 0: the row's gradient is 0
    student_kl: Any  # E_s[r] = KL(s‖m), jsd only


class Logits(NamedTuple):
    """The student's or the teacher's logits, as given."""

    row_pointers: Any  # [BLOCK_M, 1]
    bias: Any  # [vocab] or None
    column_stride: Any


class LogitsPair(NamedTuple):
    """Both logits, and what they have in common."""

    student: Any  # Logits
    teacher: Any
    vocab: Any
    kept: Any  # [BLOCK_M], false for rows that are skipped
    inner: Any


class RowMax(NamedTuple):
    """The largest logits so far, [BLOCK_M] each."""

    p: Any  # max z_p
    q: Any


class Sums(NamedTuple):
    """Sums over the columns so far, [BLOCK_M, BLOCK_N] each: every lane has its own partial sum."""

    p: Any  # Σ e_p
    q: Any  # Σ e_q
    q_minus_p: Any  # Σ (e_q − e_p)
    p_excess: Any  # Σ e_p φ(D) = Σ (e_q − e_p − e_p D); not for jsd
    p_d: Any  # Σ e_p D; not for jsd


@triton.jit
def _check_kind(KIND: tl.constexpr):
    """Fails to compile for a KIND that these kernels have no code for."""
    known: tl.constexpr = KIND == FORWARD or KIND == REVERSE or KIND == JSD  # Triton has no `in`
    tl.static_assert(known, "KIND must be 'forward', 'reverse' or 'jsd'")


@profiled(do_not_specialize=["rows"])  # which changes from call to call, and would compile it again
def divergence_kernel(
    student,  # [rows, vocab] any float dtype
    teacher,  # [rows, vocab]
    student_bias,  # [vocab] or None
    teacher_bias,
    weights,  # [rows] or None; rows of weight 0 are skipped
    row_scale,  # [rows] or None, multiplies the gradient
    statistics,  # [rows, STATISTICS] or None; read without MEASURE, written with it
    loss,  # [rows], with MEASURE
    gradient,  # [rows, columns], with WRITE; may be `student`
    rows,
    vocab,
    columns,  # of the gradient, which is 0 from column `vocab` on
    student_stride,
    student_column_stride,
    teacher_stride,
    teacher_column_stride,
    gradient_stride,
    scale,  # logits are scale · z, scale ≥ 0, with z = given + bias, or tanh(inner · (given + bias)) with CAPPED
    inner,
    beta,
    loss_scale,
    gradient_scale,
    KIND: tl.constexpr,
    MEASURE: tl.constexpr,
    WRITE: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATED: tl.constexpr,  # z is −(given + bias)
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # columns of the vocabulary
    STAGES: tl.constexpr,  # tiles in flight
):
    """MEASURE: the loss and the statistics of BLOCK_M rows. WRITE: their gradient. Grid: (⌈rows / BLOCK_M⌉,)."""
    _check_kind(KIND)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    kept = exists
    if weights is not None:
        kept = exists & (tl.load(weights + row, mask=exists, other=0.0) != 0)
    student += (row * student_stride)[:, None]
    teacher += (row * teacher_stride)[:, None]
    full = vocab // BLOCK_N * BLOCK_N  # columns in tiles that need no mask
    any_kept = tl.max(kept.to(tl.int32), 0)
    read, read_full = vocab * any_kept, full * any_kept
    logits = LogitsPair(
        Logits(student, student_bias, student_column_stride),
        Logits(teacher, teacher_bias, teacher_column_stride),
        vocab,
        kept,
        inner,
    )

    if MEASURE:
        row_max = RowMax(
            tl.full((BLOCK_M,), -INFINITY, tl.float32),
            tl.full((BLOCK_M,), -INFINITY, tl.float32),
        )
        sums = Sums(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        )
        for start in tl.range(0, read_full, BLOCK_N, num_stages=STAGES):
            z_p, z_q, _ = _load_logits(logits, start, KIND, CAPPED, NEGATED, False, BLOCK_N)
            row_max, sums = _add_tile(z_p, z_q, row_max, sums, scale, KIND)
        for start in range(read_full, read, BLOCK_N):
            z_p, z_q, _ = _load_logits(logits, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
            row_max, sums = _add_tile(z_p, z_q, row_max, sums, scale, KIND)
        sum_p, sum_q = tl.sum(sums.p, 1), tl.sum(sums.q, 1)
        has_p = (row_max.p > -INFINITY) | (sum_p != 0)
        has_q = (row_max.q > -INFINITY) | (sum_q != 0)
        max_p, max_q = _finite_max(row_max.p), _finite_max(row_max.q)
        inverse_sum = 1.0 / tl.where(sum_p == 0, 1.0, sum_p)
        mean_q_minus_p = tl.sum(sums.q_minus_p, 1) * inverse_sum  # E
        near = tl.abs(mean_q_minus_p) < 0.5
        log_ratio = tl.where(near, log1p_near(mean_q_minus_p), tl.log(sum_q * inverse_sum))  # L
        student_kl = tl.zeros((BLOCK_M,), tl.float32)
        if KIND == JSD:
            centre = log_ratio
            measured = Statistics(max_p, max_q, centre, inverse_sum, student_kl)
            losses = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            student_kls = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(read_full, read, BLOCK_N):
                z_p, z_q, _ = _load_logits(logits, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
                losses, student_kls = _add_jsd_tile(z_p, z_q, measured, losses, student_kls, scale, beta)
            for done in tl.range(0, read_full, BLOCK_N, num_stages=STAGES):
                z_p, z_q, _ = _load_logits(logits, read_full - BLOCK_N - done, KIND, CAPPED, NEGATED, False, BLOCK_N)
                losses, student_kls = _add_jsd_tile(z_p, z_q, measured, losses, student_kls, scale, beta)
            row_loss, student_kl = tl.sum(losses, 1), tl.sum(student_kls, 1)
        else:
            tl.static_assert(KIND == FORWARD or KIND == REVERSE)
            mean_d = tl.sum(sums.p_d, 1) * inverse_sum
            mean_excess = tl.sum(sums.p_excess, 1) * inverse_sum  # X
            row_loss = tl.where(near, mean_excess + log1p_minus(mean_q_minus_p), log_ratio - mean_d)
            row_loss = tl.where(mean_excess == INFINITY, INFINITY, row_loss)
            centre = mean_d if KIND == REVERSE else log_ratio
        no_teacher = ~has_q if KIND == REVERSE else ~has_p
        no_student = ~has_p if KIND == REVERSE else ~has_q
        row_loss = tl.where(row_loss < 0, 0.0, row_loss)  # rounding can make it negative
        row_loss = tl.where(no_teacher, 0.0, tl.where(no_student, INFINITY, row_loss))
        tl.store(loss + row, tl.where(kept, row_loss * loss_scale, 0.0), mask=exists)
        no_gradient = no_teacher | no_student
        if KIND == REVERSE:
            no_gradient = no_gradient | (row_loss == INFINITY)
        inverse_sum = tl.where(no_gradient, 0.0, inverse_sum)
        if statistics is not None:
            at = statistics + row * STATISTICS
            tl.store(at + MAX_P, max_p, mask=exists)
            tl.store(at + MAX_Q, max_q, mask=exists)
            tl.store(at + CENTRE, centre, mask=exists)
            tl.store(at + INVERSE_SUM, inverse_sum, mask=exists)
            tl.store(at + STUDENT_KL, student_kl, mask=exists)
    else:
        at = statistics + row * STATISTICS
        max_p = tl.load(at + MAX_P, mask=kept, other=0.0)
        max_q = tl.load(at + MAX_Q, mask=kept, other=0.0)
        centre = tl.load(at + CENTRE, mask=kept, other=0.0)
        inverse_sum = tl.load(at + INVERSE_SUM, mask=kept, other=0.0)
        student_kl = tl.load(at + STUDENT_KL, mask=kept, other=0.0)

    if WRITE:
        row_statistics = Statistics(max_p, max_q, centre, inverse_sum, student_kl)
        factor = tl.where(kept, gradient_scale, 0.0)
        if row_scale is not None:
            factor *= tl.load(row_scale + row, mask=kept, other=0.0)
        gradient += (row * gradient_stride)[:, None]
        # The operand of a fp16 GEMM stays finite. Only a reverse KL in the hundreds has values that are clamped.
        CLAMPED: tl.constexpr = gradient.dtype.element_ty == tl.float16 and row_scale is None
        for start in range(full, columns, BLOCK_N):
            z_p, z_q, slope = _load_logits(logits, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
            tile = _gradient(z_p, z_q, slope, row_statistics, factor, scale, beta, KIND)
            _store(gradient, tile, start, vocab, columns, exists, True, CLAMPED, BLOCK_N)
        for done in tl.range(0, full, BLOCK_N, num_stages=STAGES):
            z_p, z_q, slope = _load_logits(logits, full - BLOCK_N - done, KIND, CAPPED, NEGATED, False, BLOCK_N)
            tile = _gradient(z_p, z_q, slope, row_statistics, factor, scale, beta, KIND)
            _store(gradient, tile, full - BLOCK_N - done, vocab, columns, exists, False, CLAMPED, BLOCK_N)


# --- memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_logits(
    logits, start, KIND: tl.constexpr, CAPPED: tl.constexpr, NEGATED: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z_p and z_q [BLOCK_M, BLOCK_N] and, with CAPPED, the derivative of z_s by the argument of its tanh."""
    _check_kind(KIND)
    z_s = _load_z(logits.student, logits, start, CAPPED, NEGATED, TAIL, BLOCK_N)
    z_t = _load_z(logits.teacher, logits, start, CAPPED, NEGATED, TAIL, BLOCK_N)
    slope = 1.0
    if CAPPED:
        slope = tl.where(z_s == -INFINITY, 0.0, 1.0 - z_s * z_s)
    if KIND == REVERSE:
        return z_s, z_t, slope
    tl.static_assert(KIND == FORWARD or KIND == JSD)
    return z_t, z_s, slope


@triton.jit
def _load_z(
    given, logits, start, CAPPED: tl.constexpr, NEGATED: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile of z of student or teacher; −inf beyond the vocabulary and in rows that are skipped."""
    column = start + tl.arange(0, BLOCK_N)
    inside = logits.kept[:, None]
    if TAIL:
        inside = inside & (column < logits.vocab)[None, :]
    pointers = given.row_pointers + (column.to(tl.int64) * given.column_stride)[None, :]
    z = tl.load(pointers, mask=inside, other=-INFINITY).to(tl.float32)
    if given.bias is not None:
        if TAIL:
            z += tl.load(given.bias + column, mask=column < logits.vocab, other=0.0)[None, :]
        else:
            z += tl.load(given.bias + column)[None, :]
    if CAPPED:
        z = tl.where(inside, tanh(z * logits.inner), -INFINITY)
    elif NEGATED:
        z = tl.where(inside, -z, -INFINITY)
    return z


@triton.jit
def _store(
    gradient, tile, start, vocab, columns, exists, TAIL: tl.constexpr, CLAMPED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Stores a tile of the gradient, 0 in the columns from `vocab` on."""
    column = start + tl.arange(0, BLOCK_N)
    inside = exists[:, None]
    if TAIL:
        inside = inside & (column < columns)[None, :]
        tile = tl.where((column < vocab)[None, :], tile, 0.0)
    if CLAMPED:
        tile = tl.where(tile > 65504.0, 65504.0, tl.where(tile < -65504.0, -65504.0, tile))
    tl.store(gradient + column[None, :], tile.to(gradient.dtype.element_ty), mask=inside)


# --- the first pass: maxima and sums ----------------------------------------------------------------------------------


@triton.jit
def _finite_max(row_max):
    """The maximum, 0 where no logit is above −inf."""
    return tl.where(row_max == -INFINITY, 0.0, row_max)


@triton.jit
def _exponential(z, max_z, scale):
    """e^(scale (z − max_z)); [BLOCK_M, BLOCK_N]."""
    return tl.exp2((z - max_z[:, None]) * (scale * LOG2E))


@triton.jit
def _centred_difference(z_p, z_q, max_p, max_q, scale):
    """D; 0 where both logits are −inf."""
    d = ((z_q - z_p) - (max_q - max_p)[:, None]) * scale
    return tl.where((z_p == -INFINITY) & (z_q == -INFINITY), 0.0, d)


@triton.jit
def _add_tile(z_p, z_q, row_max, sums, scale, KIND: tl.constexpr):
    """The maxima and the sums with another tile added."""
    _check_kind(KIND)
    new_max = RowMax(tl.maximum(row_max.p, tl.max(z_p, 1)), tl.maximum(row_max.q, tl.max(z_q, 1)))
    max_p, max_q = _finite_max(new_max.p), _finite_max(new_max.q)
    grown = (new_max.p > row_max.p) | (new_max.q > row_max.q)
    if tl.max(grown.to(tl.int32), 0) > 0:  # rare after the first tiles
        sums = _carry_over(row_max, max_p, max_q, sums, scale, KIND)
    e_p, e_q = _exponential(z_p, max_p, scale), _exponential(z_q, max_q, scale)
    d = _centred_difference(z_p, z_q, max_p, max_q, scale)
    near = tl.abs(d) <= 1
    d_excess = excess_near(d)
    e_q_minus_p = tl.where(near, e_p * (d + d_excess), e_q - e_p)
    sum_p = sums.p + e_p
    sum_q = sums.q + e_q
    sum_q_minus_p = sums.q_minus_p + e_q_minus_p
    sum_p_excess = sums.p_excess
    sum_p_d = sums.p_d
    if KIND == FORWARD or KIND == REVERSE:
        e_p_d = tl.where(tl.abs(d) < INFINITY, e_p * d, 0.0)
        e_p_excess = tl.where(near, e_p * d_excess, e_q_minus_p - e_p_d)
        sum_p_excess += tl.where(d == -INFINITY, INFINITY, e_p_excess)
        sum_p_d += e_p_d
    else:
        tl.static_assert(KIND == JSD)
    return new_max, Sums(sum_p, sum_q, sum_q_minus_p, sum_p_excess, sum_p_d)


@triton.jit
def _carry_over(old_max, max_p, max_q, sums, scale, KIND: tl.constexpr):
    """The sums over the columns so far, with exponentials of the new maxima max_p and max_q."""
    _check_kind(KIND)
    f_p = tl.where(old_max.p == -INFINITY, 0.0, tl.exp2((old_max.p - max_p) * (scale * LOG2E)))
    f_q = tl.where(old_max.q == -INFINITY, 0.0, tl.exp2((old_max.q - max_q) * (scale * LOG2E)))
    a = ((max_q - max_p) - (_finite_max(old_max.q) - _finite_max(old_max.p))) * scale
    near = (tl.abs(a) <= 1) & (old_max.p > -INFINITY) & (old_max.q > -INFINITY)
    a_excess = excess_near(-a)
    f_p_expm1 = tl.where(near, f_p * (a_excess - a), f_q - f_p)  # f_p expm1(−a)
    sum_p_excess = sums.p_excess
    sum_p_d = sums.p_d
    if KIND == FORWARD or KIND == REVERSE:
        f_p_excess = tl.where(near, f_p * a_excess, f_p_expm1 + f_p * a)  # f_p φ(−a)
        carried = f_p[:, None] * sums.p_excess + f_p_expm1[:, None] * sums.q_minus_p + f_p_excess[:, None] * sums.p
        sum_p_excess = tl.where(sums.p_excess == INFINITY, INFINITY, carried)
        sum_p_d = f_p[:, None] * (sums.p_d - a[:, None] * sums.p)
    else:
        tl.static_assert(KIND == JSD)
    sum_q_minus_p = f_q[:, None] * sums.q_minus_p + f_p_expm1[:, None] * sums.p
    return Sums(sums.p * f_p[:, None], sums.q * f_q[:, None], sum_q_minus_p, sum_p_excess, sum_p_d)


# --- passes that know S and L -----------------------------------------------------------------------------------------


@triton.jit
def _mixture(delta, beta):
    """l = log m/p_t and r = log p_s/m from δ = log p_s/p_t."""
    near_l = log1p_near((1.0 - beta) * (delta + excess_near(delta)))
    # Elsewhere from m over the larger of p_t and p_s; the smaller of them is e^−|δ| times the larger.
    positive = delta > 0
    ratio = tl.exp2(-tl.abs(delta) * LOG2E)
    log_m_over_larger = tl.log(tl.where(positive, (1.0 - beta) + beta * ratio, beta + (1.0 - beta) * ratio))
    near = tl.abs(delta) <= 1
    log_m_over_t = tl.where(near, near_l, tl.where(positive, delta + log_m_over_larger, log_m_over_larger))
    log_s_over_m = tl.where(near, delta - near_l, tl.where(positive, -log_m_over_larger, delta - log_m_over_larger))
    return log_m_over_t, log_s_over_m


@triton.jit
def _weighted(p, x):
    """p x; 0 where x is infinite, because p is 0 there."""
    return tl.where(tl.abs(x) == INFINITY, 0.0, p * x)


@triton.jit
def _add_jsd_tile(z_p, z_q, row_statistics, losses, student_kls, scale, beta):
    """Adds a tile's terms of the JSD, β p_t φ(l) + (1−β) p_s φ(−r), each at least 0, and those of E_s[r]."""
    max_p, max_q, log_ratio = row_statistics.max_p, row_statistics.max_q, row_statistics.centre
    inverse_sum = row_statistics.inverse_sum
    p_t = _exponential(z_p, max_p, scale) * inverse_sum[:, None]
    p_s = _exponential(z_q, max_q, scale) * (inverse_sum * tl.exp2(-log_ratio * LOG2E))[:, None]
    delta = _centred_difference(z_p, z_q, max_p, max_q, scale) - log_ratio[:, None]
    log_m_over_t, log_s_over_m = _mixture(delta, beta)
    student_kl = _weighted(p_s, log_s_over_m)
    near = beta * p_t * excess_near(log_m_over_t) + (1.0 - beta) * p_s * excess_near(-log_s_over_m)
    elsewhere = (1.0 - beta) * student_kl - beta * _weighted(p_t, log_m_over_t)
    return losses + tl.where(tl.abs(delta) <= 1, near, elsewhere), student_kls + student_kl


@triton.jit
def _gradient(z_p, z_q, slope, row_statistics, factor, scale, beta, KIND: tl.constexpr):
    """A tile of the gradient by the student's z."""
    _check_kind(KIND)
    max_p, max_q, inverse_sum = row_statistics.max_p, row_statistics.max_q, row_statistics.inverse_sum
    centre = row_statistics.centre
    p = _exponential(z_p, max_p, scale) * inverse_sum[:, None]
    d = _centred_difference(z_p, z_q, max_p, max_q, scale)
    if KIND == REVERSE:
        value = -_weighted(p, d - centre[:, None])
    else:
        q = _exponential(z_q, max_q, scale) * (inverse_sum * tl.exp2(-centre * LOG2E))[:, None]
        delta = d - centre[:, None]
        if KIND == FORWARD:
            value = tl.where(tl.abs(delta) <= 1, p * (delta + excess_near(delta)), q - p)
        else:
            tl.static_assert(KIND == JSD)
            _, log_s_over_m = _mixture(delta, beta)
            value = (1.0 - beta) * _weighted(q, log_s_over_m - row_statistics.student_kl[:, None])
    value = tl.where((inverse_sum == 0)[:, None], 0.0, value * factor[:, None])
    return value * slope

"""Divergence of rows of logits, one program for each row (or for a few short ones): loss, and gradient by the student.

For KL(p‖q), with e_p = exp(z_p − max z_p), e_q likewise, S = Σ e_p, and the centred difference
D = (z_q − max z_q) − (z_p − max z_p), so that e_q = e_p e^D:

    E = Σ (e_q − e_p) / S,   X = Σ (e_q − e_p − e_p D) / S,   L = log1p(E) = log(Σ e_q / S),   δ = D − L = log q/p
    KL = X + (L − E)         where |E| < ½: both terms are of the size of D², and no digit is lost as q goes to p
    KL = L − Σ e_p D / S     elsewhere

    kind     p, q  loss                      ∂ loss / ∂ z_s
    forward  t, s  KL                        e_t expm1(δ) / S
    reverse  s, t  KL                        −e_s (D − E_s[D]) / S
    jsd      t, s  (1−β) E_s[r] − β E_t[l]   (1−β) p_s (r − E_s[r])       l = log m/p_t, r = log p_s/m = δ − l

One sweep finds maxima and sums together. When a maximum moves, what was summed with the old ones is carried over: with
f_p = exp(old − new max z_p), f_q likewise, and a = new − old (max z_q − max z_p),

    Σ e_p D    becomes  f_p (Σ e_p D − a Σ e_p)
    Σ e_q − e_p         f_q Σ (e_q − e_p) + f_p expm1(−a) Σ e_p
    Σ e_p φ(D)          f_p Σ e_p φ(D) + f_p expm1(−a) Σ (e_q − e_p) + f_p φ(−a) Σ e_p,    φ(x) = e^x − 1 − x

which keeps the sizes of all terms. For |D| ≤ 1 the terms are e_p times a polynomial in D; elsewhere they are written
with e_q, which is never above 1, so that sides that have nothing in common need no path of their own. Sums are kept
lane by lane, at most V / BLOCK_N numbers in each, so that fp32 is enough for a quarter of a million words.

Logits of −inf: a word that no side has counts as nothing (D is taken as 0); one that only p has makes KL infinite (jsd
is bounded), one that only q has adds e_q. No teacher word at all: loss 0, gradient 0; no student word: loss +inf,
gradient 0. NaN and +inf make NaN of their row. Rows of weight 0 are not read.

Cost for each pair of logits: exponentials 2 a sweep (3 in the sweeps of jsd that know L), and sweeps

    loss alone                  1 read of both                       jsd 2
    loss and gradient           2 reads of both, 1 write             jsd 3 reads
    gradient from statistics    1 read of both, 1 write

with about 60 instructions a word in the first sweep and 35 in the last, of jsd 45, 115 and 90 (sm_90); an H100 issues
68 while its memory moves 8 bytes. The later sweeps run backwards, to find in the L2 cache what the one before saw last.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import INFINITY, LOG2E, excess_near, log1p_minus, log1p_near, tanh

FORWARD = tl.constexpr("forward")
REVERSE = tl.constexpr("reverse")
JSD = tl.constexpr("jsd")

# What a row needs to know for its gradient; fp32.
STATISTICS = tl.constexpr(5)  # max z_p, max z_q, centre (L; E_s[D] for reverse), 1 / S (0: no gradient), E_s[r] (jsd)


@triton.jit(do_not_specialize=["rows"])  # which changes from call to call, and would compile it again
def divergence_kernel(
    student,  # [rows, vocab] any float
    teacher,  # [rows, vocab]
    student_bias,  # [vocab] or None
    teacher_bias,
    weights,  # [rows] or None; rows of weight 0 are skipped
    row_scale,  # [rows] or None, multiplies the gradient
    statistics,  # [rows, STATISTICS] or None; read where nothing is measured
    loss,  # [rows], with MEASURE
    gradient,  # [rows, columns], with WRITE; may be `student`
    rows,
    vocab,
    columns,  # of the gradient; 0 from `vocab` on
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
    BLOCK_N: tl.constexpr,  # words
    STAGES: tl.constexpr,  # tiles on their way at a time
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    kept = exists
    if weights is not None:
        kept = exists & (tl.load(weights + row, mask=exists, other=0.0) != 0)
    student += (row * student_stride)[:, None]
    teacher += (row * teacher_stride)[:, None]
    full = vocab // BLOCK_N * BLOCK_N  # words in tiles that need no mask
    any_kept = tl.max(kept.to(tl.int32), 0)
    seen, seen_full = vocab * any_kept, full * any_kept
    given = (
        (student, student_bias, student_column_stride),
        (teacher, teacher_bias, teacher_column_stride),
        (vocab, kept, inner),
    )

    if MEASURE:
        p_max = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        q_max = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # Σ e_p
        other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # Σ e_q
        change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # Σ e_q − e_p
        excess = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # Σ e_q − e_p − e_p D
        difference = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # Σ e_p D
        for start in tl.range(0, seen_full, BLOCK_N, num_stages=STAGES):
            p, q, _ = _sides(given, start, KIND, CAPPED, NEGATED, False, BLOCK_N)
            p_max, q_max, total, other, change, excess, difference = _add_tile(
                p, q, p_max, q_max, total, other, change, excess, difference, scale, KIND
            )
        for start in range(seen_full, seen, BLOCK_N):
            p, q, _ = _sides(given, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
            p_max, q_max, total, other, change, excess, difference = _add_tile(
                p, q, p_max, q_max, total, other, change, excess, difference, scale, KIND
            )
        row_total, row_other = tl.sum(total, 1), tl.sum(other, 1)
        has_p = (p_max > -INFINITY) | (row_total != 0)
        has_q = (q_max > -INFINITY) | (row_other != 0)
        p_base, q_base = _base(p_max), _base(q_max)
        normaliser = 1.0 / tl.where(row_total == 0, 1.0, row_total)
        mean_change = tl.sum(change, 1) * normaliser  # E
        centred = tl.abs(mean_change) < 0.5
        log_ratio = tl.where(centred, log1p_near(mean_change), tl.log(row_other * normaliser))  # L
        student_cost = tl.zeros((BLOCK_M,), tl.float32)
        if KIND == JSD:
            measured = (p_base, q_base, log_ratio, normaliser)
            losses = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            costs = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(seen_full, seen, BLOCK_N):
                p, q, _ = _sides(given, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
                losses, costs = _add_costs(p, q, measured, losses, costs, scale, beta)
            for done in tl.range(0, seen_full, BLOCK_N, num_stages=STAGES):
                p, q, _ = _sides(given, seen_full - BLOCK_N - done, KIND, CAPPED, NEGATED, False, BLOCK_N)
                losses, costs = _add_costs(p, q, measured, losses, costs, scale, beta)
            value, student_cost = tl.sum(losses, 1), tl.sum(costs, 1)
            centre = log_ratio
        else:
            mean_difference = tl.sum(difference, 1) * normaliser
            mean_excess = tl.sum(excess, 1) * normaliser
            value = tl.where(centred, mean_excess + log1p_minus(mean_change), log_ratio - mean_difference)
            value = tl.where(mean_excess == INFINITY, INFINITY, value)
            centre = mean_difference if KIND == REVERSE else log_ratio
        no_teacher = ~has_q if KIND == REVERSE else ~has_p
        no_student = ~has_p if KIND == REVERSE else ~has_q
        value = tl.where(value < 0, 0.0, value)  # rounding can say so
        value = tl.where(no_teacher, 0.0, tl.where(no_student, INFINITY, value))
        tl.store(loss + row, tl.where(kept, value * loss_scale, 0.0), mask=exists)
        void = no_teacher | no_student
        if KIND == REVERSE:
            void = void | (value == INFINITY)
        normaliser = tl.where(void, 0.0, normaliser)
        if statistics is not None:
            at = statistics + row * STATISTICS
            tl.store(at, p_base, mask=exists)
            tl.store(at + 1, q_base, mask=exists)
            tl.store(at + 2, centre, mask=exists)
            tl.store(at + 3, normaliser, mask=exists)
            tl.store(at + 4, student_cost, mask=exists)
    else:
        at = statistics + row * STATISTICS
        p_base = tl.load(at, mask=kept, other=0.0)
        q_base = tl.load(at + 1, mask=kept, other=0.0)
        centre = tl.load(at + 2, mask=kept, other=0.0)
        normaliser = tl.load(at + 3, mask=kept, other=0.0)
        student_cost = tl.load(at + 4, mask=kept, other=0.0)

    if WRITE:
        known = (p_base, q_base, centre, normaliser, student_cost)
        factor = tl.where(kept, gradient_scale, 0.0)
        if row_scale is not None:
            factor *= tl.load(row_scale + row, mask=kept, other=0.0)
        gradient += (row * gradient_stride)[:, None]
        # What goes into a product stays finite: none is so large but where the reverse KL is in the hundreds.
        CLAMPED: tl.constexpr = gradient.dtype.element_ty == tl.float16 and row_scale is None
        for start in range(full, columns, BLOCK_N):
            p, q, slope = _sides(given, start, KIND, CAPPED, NEGATED, True, BLOCK_N)
            tile = _gradient(p, q, slope, known, factor, scale, beta, KIND)
            _store(gradient, tile, start, vocab, columns, exists, True, CLAMPED, BLOCK_N)
        for done in tl.range(0, full, BLOCK_N, num_stages=STAGES):
            p, q, slope = _sides(given, full - BLOCK_N - done, KIND, CAPPED, NEGATED, False, BLOCK_N)
            tile = _gradient(p, q, slope, known, factor, scale, beta, KIND)
            _store(gradient, tile, full - BLOCK_N - done, vocab, columns, exists, False, CLAMPED, BLOCK_N)


# --- logits -----------------------------------------------------------------------------------------------------------


@triton.jit
def _sides(
    given, start, KIND: tl.constexpr, CAPPED: tl.constexpr, NEGATED: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z_p, z_q and, with CAPPED, the derivative of z_s by what is under its tanh; [BLOCK_M, BLOCK_N]."""
    student, teacher, shared = given
    z_s = _z(student, shared, start, CAPPED, NEGATED, TAIL, BLOCK_N)
    z_t = _z(teacher, shared, start, CAPPED, NEGATED, TAIL, BLOCK_N)
    slope = 1.0
    if CAPPED:
        slope = tl.where(z_s == -INFINITY, 0.0, 1.0 - z_s * z_s)
    if KIND == REVERSE:
        return z_s, z_t, slope
    return z_t, z_s, slope


@triton.jit
def _z(
    side, shared, start, CAPPED: tl.constexpr, NEGATED: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile of one side; −inf where there is none, and in rows that are skipped."""
    pointer, bias, column_stride = side
    vocab, kept, inner = shared
    column = start + tl.arange(0, BLOCK_N)
    inside = kept[:, None]
    if TAIL:
        inside = inside & (column < vocab)[None, :]
    z = tl.load(pointer + (column.to(tl.int64) * column_stride)[None, :], mask=inside, other=-INFINITY).to(tl.float32)
    if bias is not None:
        if TAIL:
            z += tl.load(bias + column, mask=column < vocab, other=0.0)[None, :]
        else:
            z += tl.load(bias + column)[None, :]
    if CAPPED:
        z = tl.where(inside, tanh(z * inner), -INFINITY)
    elif NEGATED:
        z = tl.where(inside, -z, -INFINITY)
    return z


@triton.jit
def _store(
    gradient, value, start, vocab, columns, exists, TAIL: tl.constexpr, CLAMPED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    column = start + tl.arange(0, BLOCK_N)
    inside = exists[:, None]
    if TAIL:
        inside = inside & (column < columns)[None, :]
        value = tl.where((column < vocab)[None, :], value, 0.0)
    if CLAMPED:
        value = tl.where(value > 65504.0, 65504.0, tl.where(value < -65504.0, -65504.0, value))
    tl.store(gradient + column[None, :], value.to(gradient.dtype.element_ty), mask=inside)


# --- the first sweep --------------------------------------------------------------------------------------------------


@triton.jit
def _base(largest):
    return tl.where(largest == -INFINITY, 0.0, largest)


@triton.jit
def _exponential(z, base, scale):
    """e^(scale (z − base)); [BLOCK_M, BLOCK_N]."""
    return tl.exp2((z - base[:, None]) * (scale * LOG2E))


@triton.jit
def _difference(p, q, p_base, q_base, scale):
    """D; of two words of −inf, 0."""
    d = ((q - p) - (q_base - p_base)[:, None]) * scale
    return tl.where((p == -INFINITY) & (q == -INFINITY), 0.0, d)


@triton.jit
def _add_tile(p, q, p_max, q_max, total, other, change, excess, difference, scale, KIND: tl.constexpr):
    """The maxima and sums with another tile."""
    p_largest, q_largest = tl.maximum(p_max, tl.max(p, 1)), tl.maximum(q_max, tl.max(q, 1))
    p_base, q_base = _base(p_largest), _base(q_largest)
    moved = (p_largest > p_max) | (q_largest > q_max)
    if tl.max(moved.to(tl.int32), 0) > 0:  # seldom after the first tiles
        total, other, change, excess, difference = _carry_over(
            p_max, q_max, p_base, q_base, total, other, change, excess, difference, scale, KIND
        )
    ep, eq = _exponential(p, p_base, scale), _exponential(q, q_base, scale)
    d = _difference(p, q, p_base, q_base, scale)
    close = tl.abs(d) <= 1
    d_excess = excess_near(d)
    added = tl.where(close, ep * (d + d_excess), eq - ep)
    total += ep
    other += eq
    change += added
    if KIND != JSD:
        cost = tl.where(tl.abs(d) < INFINITY, ep * d, 0.0)
        over = tl.where(close, ep * d_excess, added - cost)
        excess += tl.where(d == -INFINITY, INFINITY, over)
        difference += cost
    return p_largest, q_largest, total, other, change, excess, difference


@triton.jit
def _carry_over(
    p_max, q_max, p_base, q_base, total, other, change, excess, difference, scale, KIND: tl.constexpr
):  # fmt: skip
    """What was summed with the maxima before, with new ones."""
    fp = tl.where(p_max == -INFINITY, 0.0, tl.exp2((p_max - p_base) * (scale * LOG2E)))
    fq = tl.where(q_max == -INFINITY, 0.0, tl.exp2((q_max - q_base) * (scale * LOG2E)))
    a = ((q_base - p_base) - (_base(q_max) - _base(p_max))) * scale
    near = (tl.abs(a) <= 1) & (p_max > -INFINITY) & (q_max > -INFINITY)
    a_excess = excess_near(-a)
    first = tl.where(near, fp * (a_excess - a), fq - fp)  # f_p expm1(−a)
    if KIND != JSD:
        second = tl.where(near, fp * a_excess, first + fp * a)  # f_p φ(−a)
        carried = fp[:, None] * excess + first[:, None] * change + second[:, None] * total
        excess = tl.where(excess == INFINITY, INFINITY, carried)
        difference = fp[:, None] * (difference - a[:, None] * total)
    change = fq[:, None] * change + first[:, None] * total
    return total * fp[:, None], other * fq[:, None], change, excess, difference


# --- sweeps that know the normalisers ---------------------------------------------------------------------------------


@triton.jit
def _mixture(delta, beta):
    """l = log m/p_t and r = log p_s/m of δ = log p_s/p_t."""
    near = log1p_near((1.0 - beta) * (delta + excess_near(delta)))
    # Elsewhere by the smaller of the two, which is e^−|δ| times the larger.
    positive = delta > 0
    ratio = tl.exp2(-tl.abs(delta) * LOG2E)
    far = tl.log(tl.where(positive, (1.0 - beta) + beta * ratio, beta + (1.0 - beta) * ratio))
    close = tl.abs(delta) <= 1
    mixture_over_teacher = tl.where(close, near, tl.where(positive, delta + far, far))
    student_over_mixture = tl.where(close, delta - near, tl.where(positive, -far, delta - far))
    return mixture_over_teacher, student_over_mixture


@triton.jit
def _weighted(p, x):
    """p x, and 0 where x is infinite: there p is 0."""
    return tl.where(tl.abs(x) == INFINITY, 0.0, p * x)


@triton.jit
def _add_costs(p, q, measured, losses, costs, scale, beta):
    """Adds the terms of the JSD, and those of E_s[r]. The terms are β p_t φ(l) + (1−β) p_s φ(−r), each at least 0."""
    p_base, q_base, log_ratio, normaliser = measured
    teacher = _exponential(p, p_base, scale) * normaliser[:, None]
    student = _exponential(q, q_base, scale) * (normaliser * tl.exp2(-log_ratio * LOG2E))[:, None]
    delta = _difference(p, q, p_base, q_base, scale) - log_ratio[:, None]
    above, below = _mixture(delta, beta)
    cost = _weighted(student, below)
    near = beta * teacher * excess_near(above) + (1.0 - beta) * student * excess_near(-below)
    far = (1.0 - beta) * cost - beta * _weighted(teacher, above)
    return losses + tl.where(tl.abs(delta) <= 1, near, far), costs + cost


@triton.jit
def _gradient(p, q, slope, known, factor, scale, beta, KIND: tl.constexpr):
    p_base, q_base, centre, normaliser, student_cost = known
    ep = _exponential(p, p_base, scale) * normaliser[:, None]
    d = _difference(p, q, p_base, q_base, scale)
    if KIND == REVERSE:
        value = -_weighted(ep, d - centre[:, None])
    else:
        eq = _exponential(q, q_base, scale) * (normaliser * tl.exp2(-centre * LOG2E))[:, None]
        delta = d - centre[:, None]
        if KIND == FORWARD:
            value = tl.where(tl.abs(delta) <= 1, ep * (delta + excess_near(delta)), eq - ep)
        else:
            _, below = _mixture(delta, beta)
            value = (1.0 - beta) * _weighted(eq, below - student_cost[:, None])
    value = tl.where((normaliser == 0)[:, None], 0.0, value * factor[:, None])
    return value * slope

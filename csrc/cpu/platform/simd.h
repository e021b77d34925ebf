// Vectors of fp32, as wide as the instruction set that this file is compiled for.
//
// They are the vector types of the compiler (GCC and Clang). Arithmetic, comparison, selection and shuffles are
// ordinary expressions that the compiler turns into AVX-512, AVX2+FMA, SSE2 or NEON. So one source serves all of them,
// and the few operations that the kernels need stay readable. A SIMD library would bring its own choice of instruction
// sets and hundreds of inline functions with external linkage, which must not happen here:
//
// The same source is compiled once for each instruction set, and all copies are linked into one shared object. The
// linker keeps only one copy of an inline function with external linkage. That may be the AVX-512 copy, which then runs
// on a machine without AVX-512. So these translation units define everything in the namespace `softprompt::SPK_ISA`,
// and they use no header of the C++ library that defines functions. A test checks the symbols.
#pragma once

#include <cstdint>

#ifndef SPK_ISA
#error "SPK_ISA must name the instruction set: amx, avx512, avx2 or baseline"
#endif

#if defined(__AVX512F__)
#define SPK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPK_VECTOR_BYTES 32
#else
#define SPK_VECTOR_BYTES 16
#endif

#define SPK_UNROLL _Pragma("GCC unroll 16")
#ifndef SPK_INLINE
#define SPK_INLINE static inline __attribute__((always_inline))
#endif

namespace softprompt::SPK_ISA {

constexpr int kLanes = SPK_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(SPK_VECTOR_BYTES / 2)));

// Vectors in memory: at any alignment, in arrays of any type.
typedef float VecInMemory __attribute__((vector_size(SPK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t HalfInMemory __attribute__((vector_size(SPK_VECTOR_BYTES / 2), aligned(2), may_alias));

constexpr float kInfinity = __builtin_inff();

// 16-bit elements in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SPK_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, so this is a broadcast; 0 + x is not: 0 + -0 is +0
SPK_INLINE Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }
SPK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN

// Returns x and hides its value from the compiler. The compiler turns max(a, b) into one instruction, but a max with a
// constant into a comparison and a selection.
SPK_INLINE Vec opaque(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}
SPK_INLINE Vec abs(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

SPK_INLINE IntVec lane_index() {
  IntVec index;
  SPK_UNROLL for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

// --- memory ----------------------------------------------------------------------------------------------------------

SPK_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }

SPK_INLINE Vec load(const BFloat16* p) {
  const HalfBits bits = *reinterpret_cast<const HalfInMemory*>(p);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}

// Exponent and mantissa are shifted into place. Multiplying by 2^112 corrects the exponent's bias and normalises
// subnormal numbers. Infinities and NaN then get their exponent, which the multiplication cannot produce.
SPK_INLINE Vec load(const Float16* p) {
  const UintVec bits = __builtin_convertvector(*reinterpret_cast<const HalfInMemory*>(p), UintVec);
  const UintVec magnitude = bits & 0x7fffu;
  UintVec number = (UintVec)((Vec)(magnitude << 13) * 0x1p112f);
  number |= magnitude >= 0x7c00u ? UintVec{} + 0x7f800000u : UintVec{};
  return (Vec)(number | (bits & 0x8000u) << 16);
}

SPK_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecInMemory*>(p) = x; }

SPK_INLINE void store_half_bits(void* p, UintVec bits) {
  *reinterpret_cast<HalfInMemory*>(p) = __builtin_convertvector(bits, HalfBits);
}

SPK_INLINE void store(BFloat16* p, Vec x) {  // rounds to nearest, ties to even
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_half_bits(p, x != x ? UintVec{} + 0x7fc0u : rounded);
}

SPK_INLINE void store(Float16* p, Vec x) {  // rounds to nearest, ties to even
  const UintVec sign = (UintVec)x >> 16 & 0x8000u;
  const UintVec magnitude = (UintVec)abs(x);
  // Below 2^-14 the result is a multiple of 2^-24: adding 1/2 leaves that multiple in the last bits of the sum.
  const UintVec small = (UintVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const UintVec normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  UintVec bits = magnitude < 0x38800000u ? small : normal;
  bits = magnitude >= 0x477ff000u ? UintVec{} + 0x7c00u : bits;  // 65520 and above round to infinity
  bits = x != x ? UintVec{} + 0x7e00u : bits;
  store_half_bits(p, bits | sign);
}

// The first `count` lanes; 0 in the others.
template <class T>
SPK_INLINE Vec load_part(const T* p, int count) {
  T lanes[kLanes] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = p[lane];
  return load(lanes);
}

// Stores the first `count` lanes.
template <class T>
SPK_INLINE void store_part(T* p, Vec x, int count) {
  T lanes[kLanes];
  store(lanes, x);
  for (int lane = 0; lane < count; ++lane) p[lane] = lanes[lane];
}

// --- shuffles --------------------------------------------------------------------------------------------------------

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <int distance, int... I>
SPK_INLINE Vec rotate_lanes(Vec x, Indices<I...>) {
  return __builtin_shufflevector(x, x, (I + distance) % kLanes...);
}

// a0 b0 a1 b1 ... of the lower halves of a and b (half 0) or of their upper halves (half 1).
template <int half, int... I>
SPK_INLINE Vec interleave(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (half * kLanes / 2 + I / 2 + (I % 2) * kLanes)...);
}

using Lanes = MakeIndices<kLanes>::type;

template <int distance, class F>
SPK_INLINE Vec reduce_lanes(Vec x, F combine) {
  if constexpr (distance == 0) {
    return x;
  } else {
    return reduce_lanes<distance / 2>(combine(x, rotate_lanes<distance>(x, Lanes{})), combine);
  }
}

SPK_INLINE float sum_lanes(Vec x) {
  return reduce_lanes<kLanes / 2>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; })[0];
}
SPK_INLINE float max_lanes(Vec x) {
  return reduce_lanes<kLanes / 2>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); })[0];
}

// Transposes a square of kLanes vectors in place, by log2(kLanes) perfect shuffles of the rows.
SPK_INLINE void transpose(Vec (&rows)[kLanes]) {
  SPK_UNROLL for (int step = 1; step < kLanes; step *= 2) {
    Vec shuffled[kLanes];
    SPK_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      shuffled[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], Lanes{});
      shuffled[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2], Lanes{});
    }
    SPK_UNROLL for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
  }
}

// --- functions -------------------------------------------------------------------------------------------------------
//
// Polynomials are minimax fits on the reduced argument (Remez, in 40 digits). The errors given are those of the
// polynomials alone; rounding to fp32 costs 6e-8.

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kRounding = 0x1.8p23f;  // x + kRounding has round(x) in its low bits, for |x| < 2^22

struct Exponent {
  Vec whole;    // round(x)
  IntVec bits;  // round(x) shifted to the exponent field; added to the bits of 1.0f it makes 2^round(x)
};

SPK_INLINE Exponent round_to_exponent(Vec x) {
  const Vec shifted = x + kRounding;
  return {shifted - kRounding, (IntVec)shifted << 23};
}

// 2^x for x <= 127. It is 0 for x <= -127 (also -inf), and NaN for NaN. Error of the polynomial: 2e-9. The result is
// the polynomial times 2^n; adding n to its exponent bits instead would change NaN. The power for -127 is 0.
SPK_INLINE Vec exp2(Vec x) {
  x = max(opaque(splat(-127.0f)), x);
  const Exponent n = round_to_exponent(x);
  const Vec r = x - n.whole;
  Vec p = r * 0.0001535333728905792f + 0.001339887357359537f;
  p = p * r + 0.009618437441799686f;
  p = p * r + 0.055503324740958586f;
  p = p * r + 0.2402264791308266f;
  p = p * r + 0.6931472028531684f;
  p = p * r + 1.0f;
  return p * (Vec)((IntVec)splat(1.0f) + n.bits);
}

struct ReducedExp {
  Vec r, tail;  // x = n ln2 + r with |r| <= ln2 / 2; tail = expm1(r) - r, with an error of 1e-8
  Vec power;    // 2^n, 0 for x < -87
};

SPK_INLINE ReducedExp reduce_exp(Vec x) {
  x = x < -87.0f ? splat(-88.0f) : x;  // for -88 the bits of 2^n are those of 0
  const Exponent n = round_to_exponent(x * kLog2E);
  // ln2 is the sum of two constants, so that n times the first one is exact.
  const Vec r = (x - n.whole * 0.693359375f) - n.whole * -2.12194440e-4f;
  Vec p = r * 0.0013946456603440944f + 0.008366582327303869f;
  p = p * r + 0.04166628194462586f;
  p = p * r + 0.16666543004517578f;
  p = p * r + 0.5000000061939559f;
  return {r, p * (r * r), (Vec)((IntVec)splat(1.0f) + n.bits)};
}

// e^x for x <= 88. It is 0 for x < -87, and NaN for NaN.
SPK_INLINE Vec exp(Vec x) {
  const ReducedExp e = reduce_exp(x);
  return (e.tail + e.r) * e.power + e.power;
}

// e^x - 1 for x <= 88, with relative accuracy near 0.
SPK_INLINE Vec expm1(Vec x) {
  const ReducedExp e = reduce_exp(x);
  return (e.tail + e.r) * e.power + (e.power - 1.0f);
}

struct ExpTerms {
  Vec factor;  // e^x
  Vec change;  // e^x - 1
  Vec excess;  // e^x - 1 - x >= 0
};

// All three with relative accuracy, also near 0, for x <= 88. Near 0, n is 0 and the excess is the tail alone.
SPK_INLINE ExpTerms exp_terms(Vec x) {
  const ReducedExp e = reduce_exp(x);
  const Vec below = e.power - 1.0f, part = (e.tail + e.r) * e.power;
  return {part + e.power, part + below, e.tail * e.power + ((e.r * e.power - x) + below)};
}

// log(x) for normal x > 0. Error of the polynomial: 4e-8 relative to the distance from the nearest power of two.
SPK_INLINE Vec log(Vec x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), then extract the exponent n.
  const IntVec offset = (IntVec)x - 0x3f3504f3;
  const IntVec n = offset >> 23;
  const Vec f = (Vec)((IntVec)x - (n << 23)) - 1.0f;
  const Vec exponent = __builtin_convertvector(n, Vec);
  Vec p = f * 0.08917773455806954f - 0.14350147305606017f;
  p = p * f + 0.14876969826218214f;
  p = p * f - 0.16565642216995227f;
  p = p * f + 0.19965398232156828f;
  p = p * f - 0.25001746675178554f;
  p = p * f + 0.33333858053004994f;
  const Vec square = f * f;
  const Vec tail = exponent * -2.12194440e-4f + p * square * f;
  return exponent * 0.693359375f + (f + (tail - 0.5f * square));
}

// log(1 + u) with relative accuracy near 0, for u > -1 and 1 + u normal.
SPK_INLINE Vec log1p(Vec u) {
  const Vec sum = 1.0f + u;
  const Vec lost = u - (sum - 1.0f);  // the rounding error of the sum: log(sum + lost) = log(sum) + lost / sum
  return log(sum) + lost / sum;
}

// tanh(x): below 0.625 an odd polynomial with an error of 4e-9, else 1 - 2 / (e^2x + 1).
SPK_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec u = x * x;
  Vec p = u * -0.0057170472473729765f + 0.020650589400853344f;
  p = p * u - 0.053743498770095814f;
  p = p * u + 0.1333149129577072f;
  p = p * u - 0.3333328392562077f;
  const Vec near = p * u * magnitude + magnitude;
  const Vec capped = magnitude > 10.0f ? splat(10.0f) : magnitude;  // tanh(10) is 1 in fp32; NaN is kept
  const Vec far = 1.0f - 2.0f / (exp(2.0f * capped) + 1.0f);
  const Vec result = magnitude < 0.625f ? near : far;
  return (Vec)((IntVec)result | ((IntVec)x & (IntVec)(UintVec{} + 0x80000000u)));
}

}  // namespace softprompt::SPK_ISA

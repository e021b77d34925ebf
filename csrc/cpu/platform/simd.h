// Vectors of fp32, as wide as the instruction set that this file is compiled for.
//
// They are the compiler's own vector types (GCC and Clang): arithmetic, comparison, selection and shuffles are ordinary
// expressions that the compiler turns into AVX-512, AVX2+FMA, SSE2 or NEON, so one source serves all of them, and the
// few operations that the kernels need stay readable. A SIMD library would bring its own choice of instruction sets and
// hundreds of inline functions with external linkage, which is what must not happen here:
//
// The same source is compiled once for each instruction set, and all copies live in one shared object. An inline
// function with external linkage would exist once for all of them, and the linker might keep the AVX-512 copy for a
// machine without AVX-512. So everything that these translation units define lies in the namespace
// `softprompt::SPK_ISA`, and they use no header of the C++ library that defines functions (a test looks at the symbols).
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

// Memory operands: any alignment, any declared type.
typedef float VecInMemory __attribute__((vector_size(SPK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t HalfInMemory __attribute__((vector_size(SPK_VECTOR_BYTES / 2), aligned(2), may_alias));

constexpr float kInfinity = __builtin_inff();

// 16-bit elements as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SPK_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, and folds to a broadcast; 0 + x does not (-0)
SPK_INLINE Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }
SPK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

// The same number, of which the compiler knows nothing: it knows the instruction for max(a, b) but, given a constant, turns
// it into a comparison and a selection.
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

// Exponent and mantissa are shifted into place and rebiased by a product, which also makes normal numbers of subnormal
// ones; infinities and NaN get the exponent that a product cannot give them.
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

SPK_INLINE void store(BFloat16* p, Vec x) {  // to nearest, ties to even
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_half_bits(p, x != x ? UintVec{} + 0x7fc0u : rounded);
}

SPK_INLINE void store(Float16* p, Vec x) {  // to nearest, ties to even
  const UintVec sign = (UintVec)x >> 16 & 0x8000u;
  const UintVec magnitude = (UintVec)abs(x);
  // Below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits of the sum.
  const UintVec small = (UintVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const UintVec normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  UintVec bits = magnitude < 0x38800000u ? small : normal;
  bits = magnitude >= 0x477ff000u ? UintVec{} + 0x7c00u : bits;  // 65520 and above round to infinity
  bits = x != x ? UintVec{} + 0x7e00u : bits;
  store_half_bits(p, bits | sign);
}

template <class T>
SPK_INLINE Vec load_part(const T* p, int count) {  // the first `count` lanes, 0 in the others
  T lanes[kLanes] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = p[lane];
  return load(lanes);
}

template <class T>
SPK_INLINE void store_part(T* p, Vec x, int count) {  // the first `count` lanes
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

// Lanes 0, 0, 1, 1, ... (half 0) or those of the upper half (half 1), taken from a and b in turn.
template <int half, int... I>
SPK_INLINE Vec interleave(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (half * kLanes / 2 + I / 2 + (I % 2) * kLanes)...);
}

using Lanes = MakeIndices<kLanes>::type;

template <int distance, class F>
SPK_INLINE Vec fold_lanes(Vec x, F combine) {
  if constexpr (distance == 0) {
    return x;
  } else {
    return fold_lanes<distance / 2>(combine(x, rotate_lanes<distance>(x, Lanes{})), combine);
  }
}

SPK_INLINE float sum_lanes(Vec x) {
  return fold_lanes<kLanes / 2>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; })[0];
}
SPK_INLINE float max_lanes(Vec x) {
  return fold_lanes<kLanes / 2>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); })[0];
}

// Transposes kLanes vectors in place: log2(kLanes) perfect shuffles of the rows.
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
// Polynomials are minimax fits of the reduced argument (Remez, in 40 digits); the errors named are theirs alone, next to
// which the rounding of fp32 is 6e-8.

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kRounding = 0x1.8p23f;  // adding it leaves round(x) in the low bits: |x| < 2^22

struct Exponent {
  Vec whole;    // round(x)
  IntVec bits;  // its bits where a float keeps the exponent, to be added to those of 1
};

SPK_INLINE Exponent round_to_exponent(Vec x) {
  const Vec shifted = x + kRounding;
  return {shifted - kRounding, (IntVec)shifted << 23};
}

// 2^x, 0 from x = -127 on down (and at -inf), NaN at NaN; x <= 127. Polynomial: 2e-9.
// A product with the power, not a sum of bits: NaN stays NaN, and the power of -127 is 0.
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
  Vec r, tail;  // x = n ln2 + r with |r| <= ln2 / 2; expm1(r) - r, 1e-8
  Vec power;    // 2^n, 0 for x < -87
};

SPK_INLINE ReducedExp reduce_exp(Vec x) {
  x = x < -87.0f ? splat(-88.0f) : x;  // there 2^n has the bits of 0
  const Exponent n = round_to_exponent(x * kLog2E);
  const Vec r = (x - n.whole * 0.693359375f) - n.whole * -2.12194440e-4f;  // ln2 in two parts, the first one exact
  Vec p = r * 0.0013946456603440944f + 0.008366582327303869f;
  p = p * r + 0.04166628194462586f;
  p = p * r + 0.16666543004517578f;
  p = p * r + 0.5000000061939559f;
  return {r, p * (r * r), (Vec)((IntVec)splat(1.0f) + n.bits)};
}

// e^x, 0 below -87, NaN at NaN; x <= 88.
SPK_INLINE Vec exp(Vec x) {
  const ReducedExp e = reduce_exp(x);
  return (e.tail + e.r) * e.power + e.power;
}

// e^x - 1 with relative accuracy at 0; x <= 88.
SPK_INLINE Vec expm1(Vec x) {
  const ReducedExp e = reduce_exp(x);
  return (e.tail + e.r) * e.power + (e.power - 1.0f);
}

struct Growth {
  Vec factor;  // e^x
  Vec change;  // e^x - 1
  Vec excess;  // e^x - 1 - x >= 0
};

// All with relative accuracy, also at 0, where n is 0 and the excess is the tail alone; x <= 88.
SPK_INLINE Growth growth(Vec x) {
  const ReducedExp e = reduce_exp(x);
  const Vec below = e.power - 1.0f, part = (e.tail + e.r) * e.power;
  return {part + e.power, part + below, e.tail * e.power + ((e.r * e.power - x) + below)};
}

// log(x) for normal x > 0. Polynomial: 4e-8 relative to the distance from a power of two.
SPK_INLINE Vec log(Vec x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are taken off before the exponent is cut out.
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

// log(1 + u) with relative accuracy at 0; u > -1, 1 + u normal.
SPK_INLINE Vec log1p(Vec u) {
  const Vec sum = 1.0f + u;
  const Vec lost = u - (sum - 1.0f);  // what the sum rounded away, up to sign: log(sum + lost) = log(sum) + lost / sum
  return log(sum) + lost / sum;
}

// tanh(x). Near 0 an odd polynomial (4e-9), else 1 - 2 / (e^2x + 1).
SPK_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec u = x * x;
  Vec p = u * -0.0057170472473729765f + 0.020650589400853344f;
  p = p * u - 0.053743498770095814f;
  p = p * u + 0.1333149129577072f;
  p = p * u - 0.3333328392562077f;
  const Vec near = p * u * magnitude + magnitude;
  const Vec capped = magnitude > 10.0f ? splat(10.0f) : magnitude;  // tanh is 1 there; NaN stays
  const Vec far = 1.0f - 2.0f / (exp(2.0f * capped) + 1.0f);
  const Vec result = magnitude < 0.625f ? near : far;
  return (Vec)((IntVec)result | ((IntVec)x & (IntVec)(UintVec{} + 0x80000000u)));
}

}  // namespace softprompt::SPK_ISA

// One vector of floats or doubles, as wide as the level this file is compiled for allows.
//
// Arithmetic and bit operations are GCC's and Clang's vector extensions, which need no intrinsics and make NEON code on
// Arm; what they lack (comparison into a mask, compression, rounding, half precision) is written per level below.
// Everything lives in a namespace of the level's name: were it shared, the linker could pick the AVX-512 copy of an
// inline function for the baseline. For the same reason nothing here uses a template of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define PRSL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PRSL_VECTOR_BYTES 32
#else
#define PRSL_VECTOR_BYTES 16
#endif

namespace prsl {
namespace PRSL_LEVEL {

using F32 = float __attribute__((vector_size(PRSL_VECTOR_BYTES)));
using F64 = double __attribute__((vector_size(PRSL_VECTOR_BYTES)));
using U32 = uint32_t __attribute__((vector_size(PRSL_VECTOR_BYTES)));
using U64 = uint64_t __attribute__((vector_size(PRSL_VECTOR_BYTES)));
using U16 = uint16_t __attribute__((vector_size(PRSL_VECTOR_BYTES / 2)));  // as many as there are floats

// Storage only: all arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class P>
inline V load_bytes(const P* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// ---- comparisons: a mask has a bit for each lane, or is compared by what the level has ------------------------------

#if defined(__AVX512F__)

inline uint32_t lanes_ge(F32 a, F32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
inline uint32_t lanes_gt(F32 a, F32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
inline uint32_t lanes_ge(F64 a, F64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ); }
inline uint32_t lanes_gt(F64 a, F64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
// Where either is NaN, the second argument. (The unmasked intrinsics make GCC 12 warn of an uninitialised variable.)
inline F32 max(F32 a, F32 b) { return (F32)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline F64 max(F64 a, F64 b) { return (F64)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b); }

#elif defined(__AVX2__)

inline uint32_t lanes_ge(F32 a, F32 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
}
inline uint32_t lanes_gt(F32 a, F32 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
}
inline uint32_t lanes_ge(F64 a, F64 b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GE_OQ)));
}
inline uint32_t lanes_gt(F64 a, F64 b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
}
inline F32 max(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
inline F64 max(F64 a, F64 b) { return (F64)_mm256_max_pd((__m256d)a, (__m256d)b); }

#else

#if defined(__SSE2__)
inline uint32_t sign_bits(U32 v) { return uint32_t(_mm_movemask_ps((__m128)v)); }
inline uint32_t sign_bits(U64 v) { return uint32_t(_mm_movemask_pd((__m128d)v)); }
#else
// The lanes are all ones or all zeros: two words say whether there is anything to collect, which is rare.
inline uint32_t sign_bits(U32 v) {
  const U64 words = (U64)v;
  if ((words[0] | words[1]) == 0) return 0;
  return (v[0] & 1) | (v[1] & 2) | (v[2] & 4) | (v[3] & 8);
}
inline uint32_t sign_bits(U64 v) { return uint32_t((v[0] & 1) | (v[1] & 2)); }
#endif
inline uint32_t lanes_ge(F32 a, F32 b) { return sign_bits((U32)(a >= b)); }
inline uint32_t lanes_gt(F32 a, F32 b) { return sign_bits((U32)(a > b)); }
inline uint32_t lanes_ge(F64 a, F64 b) { return sign_bits((U64)(a >= b)); }
inline uint32_t lanes_gt(F64 a, F64 b) { return sign_bits((U64)(a > b)); }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F64 max(F64 a, F64 b) { return a > b ? a : b; }

#endif

// ---- compression: the chosen lanes, packed; a whole vector is written, so the buffer needs room behind ---------------

#if defined(__AVX512F__)
inline void compress(float* to, uint32_t lanes, F32 v) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(lanes), (__m512)v));
}
inline void compress(double* to, uint32_t lanes, F64 v) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(__mmask8(lanes), (__m512d)v));
}
#else
template <class T, class V>
inline void compress(T* to, uint32_t lanes, V v) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = v[__builtin_ctz(lanes)];
}
#endif

// ---- the exponential of x <= 0 --------------------------------------------------------------------------------------
//
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite: ln 2 in two parts), and e^r = 1 + r (1 + r R(r)), where R
// interpolates at Chebyshev nodes. The relative error of e^r is 1.1e-8 in float and 1.8e-17 in double, below half a
// unit in the last place. Results below the smallest normal number are zero; NaN stays NaN.

struct ExpF32 {
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.3365448f;  // ln of the smallest normal number
  static constexpr float round = 12582912.f;     // 1.5 * 2^23: adding it leaves an integer in the last bits
  static constexpr int bias = 127, mantissa = 23;
  static constexpr int degree = 4;
  static constexpr float R[] = {0.5f, 0.166665763f, 0.0416665538f, 0.00836329275f, 0.00139263256f};
};

struct ExpF64 {
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.39641853226408;
  static constexpr double round = 6755399441055744.;
  static constexpr int bias = 1023, mantissa = 52;
  static constexpr int degree = 9;
  static constexpr double R[] = {0.5,
                                 0.16666666666666667,
                                 0.041666666666623477,
                                 0.0083333333333300118,
                                 0.0013888888917538296,
                                 0.00019841269863303223,
                                 2.4801520792572693e-5,
                                 2.7557268072890098e-6,
                                 2.7620327428268238e-7,
                                 2.5100569275813683e-8};
};

// e^r - 1, and 2^n.
template <class C, class U, class V>
inline V reduced_expm1(V x, V* power) {
  const V shifted = x * C::log2e + C::round;
  const V n = shifted - C::round;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  V q = r * C::R[C::degree] + C::R[C::degree - 1];
#pragma GCC unroll 16
  for (int i = C::degree - 2; i >= 0; --i) q = q * r + C::R[i];
  *power = (V)(((U)shifted + C::bias) << C::mantissa);
  return r * (q * r + 1);
}

template <class C, class U, class V>
inline V exp_of(V x) {
  V power;
  const V q = reduced_expm1<C, U>(x, &power);
  const V e = q * power + power;
  return x < C::lowest ? V{} : e;
}

// e^x - 1 without cancellation: 2^n - 1 is exact.
template <class C, class U, class V>
inline V expm1_of(V x) {
  V power;
  const V q = reduced_expm1<C, U>(x, &power);
  const V e = q * power + (power - 1);
  return x < C::lowest ? V{} - 1 : e;
}

inline F32 exp(F32 x) { return exp_of<ExpF32, U32>(x); }
inline F64 exp(F64 x) { return exp_of<ExpF64, U64>(x); }
inline F32 expm1(F32 x) { return expm1_of<ExpF32, U32>(x); }
inline F64 expm1(F64 x) { return expm1_of<ExpF64, U64>(x); }

// ---- half precision -------------------------------------------------------------------------------------------------

// 16 bits to 32, and back for values below 2^16. (Of __builtin_convertvector, GCC 12 makes two halves.)
#if defined(__AVX512F__)
inline U32 extend(U16 v) { return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
inline U16 truncate(U32 v) { return (U16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif defined(__AVX2__)
inline U32 extend(U16 v) { return (U32)_mm256_cvtepu16_epi32((__m128i)v); }
inline U16 truncate(U32 v) {
  return (U16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#elif defined(__aarch64__)  // and here lane by lane
inline U32 extend(U16 v) { return (U32)vmovl_u16((uint16x4_t)v); }
inline U16 truncate(U32 v) { return (U16)vmovn_u32((uint32x4_t)v); }
#else
inline U32 extend(U16 v) { return __builtin_convertvector(v, U32); }
inline U16 truncate(U32 v) { return __builtin_convertvector(v, U16); }
#endif

inline F32 widen(const BFloat16* from) { return (F32)(extend(load_bytes<U16>(from)) << 16); }

#if defined(__AVX512BF16__)
// Makes zero of subnormal numbers, below 1.2e-38, as the other levels do not.
inline U16 narrow(F32 v, BFloat16) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
#else
// Round to nearest, ties to even, on the bits; a NaN stays one.
inline U16 narrow(F32 v, BFloat16) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return truncate(v != v ? (bits >> 16) | 0x40 : rounded);
}
#endif

#if defined(__AVX512F__)
inline F32 widen(const Half* from) { return (F32)_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from)); }
inline U16 narrow(F32 v, Half) { return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline F32 widen(const Half* from) { return (F32)_mm256_cvtph_ps(load_bytes<__m128i>(from)); }
inline U16 narrow(F32 v, Half) { return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline F32 widen(const Half* from) { return (F32)vcvt_f32_f16(load_bytes<float16x4_t>(from)); }
inline U16 narrow(F32 v, Half) { return (U16)vcvt_f16_f32((float32x4_t)v); }
#else
// The exponents differ by 112: the product with a power of two moves them, and makes subnormal halves normal floats.
inline F32 widen(const Half* from) {
  const U32 bits = extend(load_bytes<U16>(from));
  const U32 sign = (bits & 0x8000) << 16;
  const F32 magnitude = (F32)((bits & 0x7fff) << 13) * 0x1p112f;
  const U32 infinite = (U32)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (F32)((U32)magnitude | infinite | sign);
}
// Rounding by addition: a power of two so much larger than |v| that the sum's last bit is the half's last bit.
inline U16 narrow(F32 v, Half) {
  const U32 bits = (U32)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000;
  const U32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 special = (U32)(magnitude > 0x7f800000) & 0x7e00;  // NaN
  U32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x47800000 ? (U32{} + 0x7c00) | special : half;  // 65,536 and more
  return truncate(half | sign);
}
#endif

// ---- elements in memory ---------------------------------------------------------------------------------------------

template <class E>
struct Elements;

template <>
struct Elements<float> {
  using Scalar = float;
  using Vector = F32;
  static Vector load(const float* from) { return load_bytes<F32>(from); }
  static void store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }
};

template <>
struct Elements<double> {
  using Scalar = double;
  using Vector = F64;
  static Vector load(const double* from) { return load_bytes<F64>(from); }
  static void store(double* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }
};

template <class E>
struct HalfElements {
  using Scalar = float;
  using Vector = F32;
  static Vector load(const E* from) { return widen(from); }
  static void store(E* to, Vector v) {
    const U16 bits = narrow(v, E{});
    std::memcpy(to, &bits, sizeof(bits));
  }
};
template <>
struct Elements<BFloat16> : HalfElements<BFloat16> {};
template <>
struct Elements<Half> : HalfElements<Half> {};

template <class E>
constexpr int64_t kLanes = sizeof(typename Elements<E>::Vector) / sizeof(typename Elements<E>::Scalar);

template <class V, class T>
inline V broadcast(T x) {
  return V{} + x;
}

// The first count < kLanes<E> elements, and `fill`, a value that E can represent, in the other lanes.
template <class E>
inline typename Elements<E>::Vector load_partial(const E* from, int64_t count, typename Elements<E>::Scalar fill) {
  using V = typename Elements<E>::Vector;
  E padded[kLanes<E>];
  Elements<E>::store(padded, broadcast<V>(fill));
  std::memcpy(padded, from, size_t(count) * sizeof(E));
  return Elements<E>::load(padded);
}

template <class E>
inline void store_partial(E* to, int64_t count, typename Elements<E>::Vector v) {
  E padded[kLanes<E>];
  Elements<E>::store(padded, v);
  std::memcpy(to, padded, size_t(count) * sizeof(E));
}

template <class E>
inline typename Elements<E>::Scalar load_one(const E* from) {
  return load_partial<E>(from, 1, 0)[0];
}

template <class E>
inline void store_one(E* to, typename Elements<E>::Scalar x) {
  store_partial<E>(to, 1, broadcast<typename Elements<E>::Vector>(x));
}

}  // namespace PRSL_LEVEL
}  // namespace prsl

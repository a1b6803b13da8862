// The dtypes of logits, the type that each is computed in, and the parts that a row is read and written in.
#pragma once

#include <cmath>
#include <cstring>

#include "closed_form.h"
#include "cuda/device.h"

namespace prsl {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class E>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};
template <class E>
using ScalarOf = typename Computed<E>::Type;

struct Math {
  template <class T>
  PRSL_BOTH static T exp(T x) {
    return std::exp(x);
  }
  template <class T>
  PRSL_BOTH static T expm1(T x) {
    return std::expm1(x);
  }
};

// For sums over all classes, of which the logits themselves are given to few digits in half precision: two instructions
// and no more.
template <class E>
__device__ inline ScalarOf<E> fast_exp(ScalarOf<E> x) {
  constexpr float log2_e = 1.4426950408889634f;
  if constexpr (sizeof(E) == 2) return exp2_approx(x * log2_e);
  return std::exp(x);
}

// Unsigned integers in the order of the numbers.
__device__ inline uint32_t key_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t key_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}
__device__ inline float value_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ inline double value_of(uint64_t key) {
  const uint64_t bits = key >> 63 ? key & 0x7fffffffffffffffu : ~key;
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
template <class T>
using KeyOf = decltype(key_of(T{}));

// So many low bits of the key are the same for all numbers of one sign; a multiple of 8.
template <class E>
constexpr int kConstantBits = 0;
template <>
inline constexpr int kConstantBits<BFloat16> = 16;
template <>
inline constexpr int kConstantBits<Half> = 8;

// n logits that lie next to each other.
template <class E, int n>
struct alignas(n * sizeof(E)) Part {
  static constexpr int size = n;
  E at[n];
};

// In so many, a row is read and written.
template <class E>
constexpr int kLanes = 16 / int(sizeof(E));

template <class E, int n>
__device__ inline void unpack(const Part<E, n>& part, E (&x)[n]) {
  for (int j = 0; j < n; ++j) x[j] = part.at[j];
}
template <int n>
__device__ inline void unpack(const Part<BFloat16, n>& part, float (&x)[n]) {
  uint32_t words[(n + 1) / 2] = {};
  memcpy(words, &part, sizeof(part));
  for (int j = 0; j < n; ++j) {
    const uint32_t bits = j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16;
    memcpy(&x[j], &bits, sizeof(bits));
  }
}
template <int n>
__device__ inline void unpack(const Part<Half, n>& part, float (&x)[n]) {
  uint32_t words[(n + 1) / 2] = {};
  memcpy(words, &part, sizeof(part));
  for (int j = 0; j < n; ++j) {
    const float2 both = floats_of_halves(words[j / 2]);
    x[j] = j % 2 ? both.y : both.x;
  }
}

template <class E, int n>
__device__ inline void pack(const E (&x)[n], Part<E, n>& part) {
  for (int j = 0; j < n; ++j) part.at[j] = x[j];
}
template <int n>
__device__ inline void pack(const float (&x)[n], Part<BFloat16, n>& part) {
  uint32_t words[(n + 1) / 2];
  for (int j = 0; j < n; j += 2) words[j / 2] = bfloats_of(x[j], x[n > 1 ? j + 1 : j]);
  memcpy(&part, words, sizeof(part));
}
template <int n>
__device__ inline void pack(const float (&x)[n], Part<Half, n>& part) {
  uint32_t words[(n + 1) / 2];
  for (int j = 0; j < n; j += 2) words[j / 2] = halves_of(x[j], x[n > 1 ? j + 1 : j]);
  memcpy(&part, words, sizeof(part));
}

// The largest number, NaN apart. Of half precision two at a time, before they are made floats of.
template <class E, int n>
__device__ inline E maximum_of(const Part<E, n>& part) {
  E largest = part.at[0];
  for (int j = 1; j < n; ++j) largest = fmax(largest, part.at[j]);
  return largest;
}
template <class E, int n, class Larger>
__device__ inline float maximum_of_pairs(const Part<E, n>& part, Larger larger) {
  uint32_t words[(n + 1) / 2] = {};
  memcpy(words, &part, sizeof(part));
  for (int j = 1; j < n / 2; ++j) words[0] = larger(words[0], words[j]);
  Part<E, n == 1 ? 1 : 2> last;
  memcpy(&last, words, sizeof(last));
  float x[n == 1 ? 1 : 2];
  unpack(last, x);
  return n == 1 ? x[0] : fmax(x[0], x[n == 1 ? 0 : 1]);
}
template <int n>
__device__ inline float maximum_of(const Part<BFloat16, n>& part) {
  return maximum_of_pairs(part, [](uint32_t a, uint32_t b) { return larger_bfloats(a, b); });
}
template <int n>
__device__ inline float maximum_of(const Part<Half, n>& part) {
  return maximum_of_pairs(part, [](uint32_t a, uint32_t b) { return larger_halves(a, b); });
}

// A row: between `begin` and `end` it can be read 16 bytes at a time, and what is before and after, one by one.
template <class E, bool shared>
struct Row {
  const E* z;
  int64_t stride;
  int classes, begin, end;

  template <class P>
  __device__ const E* at(int i) const {
    return P::size > 1 ? z + i : z + i * stride;
  }
  template <class P>
  __device__ P part(int i) const {
    if constexpr (shared) return load_shared<P>(at<P>(i));
    return load_global<P>(at<P>(i));
  }
};

template <bool shared, class E>
__device__ inline Row<E, shared> row_at(const E* z, int64_t stride, int classes, bool wide = true) {
  constexpr int lanes = kLanes<E>;
  if (stride != 1 || !wide) return {z, stride, classes, classes, classes};
  const int before = int((0 - reinterpret_cast<uintptr_t>(z)) / sizeof(E)) & (lanes - 1);
  const int begin = before < classes ? before : classes;
  return {z, 1, classes, begin, begin + (classes - begin) / lanes * lanes};
}

// Calls use(part, i), with an empty part for the logits from i on, for all the parts of a row that are this thread's.
template <int unroll, class E, bool shared, class Use>
__device__ inline void for_parts(const Row<E, shared>& row, Use use) {
  constexpr int lanes = kLanes<E>;
#pragma unroll unroll
  for (int i = row.begin + int(threadIdx.x) * lanes; i < row.end; i += int(blockDim.x) * lanes) {
    use(Part<E, lanes>(), i);
  }
  const int inside = row.end - row.begin;
  for (int i = int(threadIdx.x); i < row.classes - inside; i += int(blockDim.x)) {
    use(Part<E, 1>(), i < row.begin ? i : i + inside);
  }
}

// The numbers of such a part, and a single one.
template <class P, class E, bool shared>
__device__ inline void load(const Row<E, shared>& row, int i, ScalarOf<E> (&x)[P::size]) {
  unpack(row.template part<P>(i), x);
}
template <class E, bool shared>
__device__ inline ScalarOf<E> load_one(const Row<E, shared>& row, int i) {
  ScalarOf<E> x[1];
  load<Part<E, 1>>(row, i, x);
  return x[0];
}

}  // namespace prsl

// The k largest logits of a row: a bound from the maxima of groups of classes, and the candidates above it.
#pragma once

#include <math.h>

#include "cpu/simd.h"

namespace prsl {
namespace PRSL_LEVEL {
namespace {

template <class E>
using ScalarOf = typename Elements<E>::Scalar;
template <class E>
using VectorOf = typename Elements<E>::Vector;

constexpr int kUnroll = 4;  // vectors in each step of a sweep

// Unsigned integers in the order of the numbers.
inline uint32_t key_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint64_t key_of(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}
inline float value_of(uint32_t key) { return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key); }
inline double value_of(uint64_t key) { return bit_cast<double>(key >> 63 ? key & 0x7fffffffffffffffu : ~key); }

// The k-th largest of n values, 1 <= k <= n, by bisection over the bits of its key: a plain loop of comparisons, which
// compilers vectorise, and no worse for one order of the values than for another.
template <class T>
T kth_largest(const T* values, int64_t n, int64_t k, char* scratch) {
  using Key = decltype(key_of(T{}));
  Key* keys = reinterpret_cast<Key*>(scratch);
  Key ones = ~Key(0), zeros = ~Key(0);  // bits that are the same in all keys need no question
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = key_of(values[i]);
    ones &= keys[i];
    zeros &= ~keys[i];
  }
  Key kth = 0;
  for (int bit = 8 * int(sizeof(Key)) - 1; bit >= 0; --bit) {
    if ((ones | zeros) >> bit & 1) {
      kth |= ones & Key(1) << bit;
      continue;
    }
    const Key probe = kth | Key(1) << bit;
    Key count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= probe;
    if (count >= Key(k)) kth = probe;
    if (count == Key(k)) {  // found, all but its last bits: the smallest of these
      Key smallest = ~Key(0);
      for (int64_t i = 0; i < n; ++i) {
        const Key key = keys[i] >= probe ? keys[i] : ~Key(0);
        smallest = key < smallest ? key : smallest;
      }
      return value_of(smallest);
    }
  }
  return value_of(kth);
}

template <class T>
struct Candidates {
  T bound;           // at most the (k + 1)-th largest logit so far
  T* values;         // the logits above it, and some that were above an earlier one
  int64_t count;     // of those
  int64_t limit;     // from which on they are sorted out
  int64_t at_bound;  // the logits equal to the bound that are not among them

  void raise_bound(T to) {
    if (to > bound) {
      bound = to;
      at_bound = 0;
    }
  }

  // Keeps what is above the bound, and counts what is equal to it.
  void sort_out() {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T value = values[i];
      at_bound += value == bound;
      values[kept] = value;
      kept += value > bound;
    }
    count = kept;
  }

  // Makes the kth-largest of the candidates the bound.
  __attribute__((noinline)) void tighten(int64_t kth, char* scratch) {
    raise_bound(kth_largest(values, count, kth, scratch));
    sort_out();
  }

  template <class V>
  void collect(V z, uint32_t lanes) {
    const uint32_t above = lanes_gt(z, broadcast<V>(bound)) & lanes;
    at_bound += __builtin_popcount(lanes & ~above);
    compress(values + count, above, z);
    count += __builtin_popcount(above);
  }
};

// The groups of a row of V classes: a power of two, so that whole blocks of vectors go round; 0 where the maxima of
// groups would bound nothing.
template <class E>
int64_t group_count(int64_t classes, int64_t k) {
  int64_t groups = kUnroll * kLanes<E>;
  while (groups < 2 * (k + 1)) groups *= 2;
  return groups <= classes / 2 ? groups : 0;
}

// The whole blocks of n logits, for as many groups as fit into R registers. Returns how many logits these are.
template <class E, int R>
int64_t raise_in_registers(const E* z, int64_t n, ScalarOf<E>* maxima) {
  using M = Elements<ScalarOf<E>>;
  constexpr int64_t W = kLanes<E>;
  VectorOf<E> m[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) m[r] = M::load(maxima + r * W);
  int64_t i = 0;
  for (; i + R * W <= n; i += R * W) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) m[r] = max(m[r], Elements<E>::load(z + i + r * W));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) M::store(maxima + r * W, m[r]);
  return i;
}

// maxima[i % groups] = max(maxima[i % groups], z[i])
template <class E>
void raise_maxima(const E* z, int64_t n, ScalarOf<E>* maxima, int64_t groups) {
  using M = Elements<ScalarOf<E>>;
  constexpr int64_t W = kLanes<E>;
  int64_t i = 0;
  if (groups == 4 * W) i = raise_in_registers<E, 4>(z, n, maxima);
  if (groups == 8 * W) i = raise_in_registers<E, 8>(z, n, maxima);
  if (groups == 16 * W) i = raise_in_registers<E, 16>(z, n, maxima);
  for (; i + groups <= n; i += groups) {
    for (int64_t g = 0; g < groups; g += W) {
      M::store(maxima + g, max(M::load(maxima + g), Elements<E>::load(z + i + g)));
    }
  }
  for (int64_t g = 0; i < n; i += W, g += W) {
    const auto v = n - i >= W ? Elements<E>::load(z + i) : load_partial(z + i, n - i, -ScalarOf<E>(INFINITY));
    M::store(maxima + g, max(M::load(maxima + g), v));
  }
}

}  // namespace
}  // namespace PRSL_LEVEL
}  // namespace prsl

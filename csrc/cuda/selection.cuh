// The k largest logits of a row besides its target's.
//
// Each thread has gone over a part of the row, and kept the largest logit of it. The maxima of the threads are logits
// of the row, so a number that more than k of them reach is a lower bound on the k-th largest besides the target. What
// reaches the bound is collected by the sweep that sums the exponentials: in a random row hardly more than k. Where at
// least k are found, and none is left out, all of K is among them. Where they are too many, or k is too large, digit
// after digit of the k-th largest is counted out in sweeps of their own, whatever the row.
#pragma once

#include "cuda/elements.cuh"

namespace prsl {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr int kCandidates = 256;
constexpr int kDigits = 256;
constexpr int kSums = 6;

// Shared memory of a block; from one barrier to the next, what is written is not read.
template <class T>
struct Scratch {
  double sums[kSums][kMaxWarps];
  T maxima[kMaxWarps];
  T candidates[kCandidates], sorted[kCandidates];
  int count;  // of the candidates, or of those that there would have been
  int counts[kDigits], digit, rank;
};

// ---- all threads of a block together --------------------------------------------------------------------------------

template <class T>
__device__ inline T block_max(T x, Scratch<T>& s) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, lane));
  if (threadIdx.x % kWarp == 0) s.maxima[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = s.maxima[0];
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) x = fmax(x, s.maxima[warp]);
  return x;
}

// Of `own`, in the first thread alone.
template <class T>
__device__ inline void block_sums(const T (&own)[kSums], double (&x)[kSums], Scratch<T>& s) {
  for (int i = 0; i < kSums; ++i) {
    x[i] = double(own[i]);
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x[i] += __shfl_xor_sync(~0u, x[i], lane);
    if (threadIdx.x % kWarp == 0) s.sums[i][threadIdx.x / kWarp] = x[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) {
    for (int i = 0; i < kSums; ++i) x[i] += s.sums[i][warp];
  }
}

// ---- few candidates -------------------------------------------------------------------------------------------------

// Whether the maxima of the threads can bound the selection: they are so many more than k that few of them hide another
// candidate.
__device__ inline bool bounded(int k) { return 4 * k < int(blockDim.x) && 2 * k < kCandidates; }

// A number that more than k threads' maxima reach, and not many more; the largest of them is `max`.
template <class T>
__device__ inline T bound_of(T maximum, T max, int k) {
  using Key = KeyOf<T>;
  const Key key = key_of(maximum);
  Key low = key_of(-T(INFINITY)), high = key_of(max);
  while (low < high) {
    const Key middle = high - (high - low) / 2;
    const int count = __syncthreads_count(key >= middle);
    if (count > k) {
      low = middle;
      if (count <= k + 2 + k / 4) break;
    } else {
      high = middle - 1;
    }
  }
  return value_of(low);
}

// The candidates among n classes from i on. In a loop, since few parts have any.
template <class E, bool shared>
__device__ inline void collect(const Row<E, shared>& row, int i, int n, int target, ScalarOf<E>& bound,
                               Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
#pragma unroll 1
  for (const int end = i + n; i < end; ++i) {
    const T x = load_one(row, i);
    if (!(x >= bound) || i == target) continue;
    const int at = atomicAdd(&s.count, 1);
    if (at < kCandidates) {
      s.candidates[at] = x + T(0);  // no -0, so that equal numbers have the same bits
    } else {
      bound = T(INFINITY);  // too many already
    }
  }
}

// They come in any order, and are the same every time only after this.
template <class T>
__device__ inline void sort_candidates(int count, Scratch<T>& s) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const T x = s.candidates[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      const T other = s.candidates[j];
      rank += other > x || (other == x && j < i);
    }
    s.sorted[rank] = x;
  }
  __syncthreads();
}

// ---- any row --------------------------------------------------------------------------------------------------------

template <class E, bool shared>
__device__ inline ScalarOf<E> largest_but(const Row<E, shared>& row, int target, Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  T largest = -T(INFINITY);
  for_parts<1>(row, [&](auto part, int i) {
    using P = decltype(part);
    T x[P::size];
    load<P>(row, i, x);
    for (int j = 0; j < P::size; ++j) {
      if (i + j != target) largest = fmax(largest, x[j]);
    }
  });
  return block_max(largest, s);
}

// By the digits of its key, from the highest on.
template <class E, bool shared>
__device__ inline ScalarOf<E> kth_largest_but(const Row<E, shared>& row, int target, int k, Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  using Key = KeyOf<T>;
  constexpr int digit_bits = 8, bits = 8 * int(sizeof(Key));
  Key kth = 0;  // of the digits that are known
  for (int shift = bits - digit_bits; shift >= kConstantBits<E>; shift -= digit_bits) {
    for (int digit = int(threadIdx.x); digit < kDigits; digit += int(blockDim.x)) s.counts[digit] = 0;
    __syncthreads();
    for_parts<1>(row, [&](auto part, int i) {
      using P = decltype(part);
      T x[P::size];
      load<P>(row, i, x);
      for (int j = 0; j < P::size; ++j) {
        const Key key = key_of(x[j]) >> shift;
        if (key >> digit_bits == kth && i + j != target) atomicAdd(&s.counts[key % kDigits], 1);
      }
    });
    __syncthreads();
    for (int digit = int(threadIdx.x); digit < kDigits; digit += int(blockDim.x)) {
      int above = 0;
      for (int other = kDigits - 1; other > digit; --other) above += s.counts[other];
      if (above < k && k <= above + s.counts[digit]) {  // one of them is it
        s.digit = digit;
        s.rank = k - above;
      }
    }
    __syncthreads();
    kth = kth << digit_bits | Key(s.digit);
    k = s.rank;
  }
  kth <<= kConstantBits<E>;
  if (kth >> (bits - 1) == 0) kth |= (Key(1) << kConstantBits<E>) - 1;  // a negative number, whose bits are inverted
  return value_of(kth) + T(0);
}

}  // namespace prsl

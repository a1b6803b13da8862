// The loss of a row and its gradient: a block of threads for each row. csrc/cpu/rows.cpp has the same for the CPU.
//
// Forward holds the row in shared memory where it fits, so that it is read from global memory once. It goes over it
// twice: first for the maximum, then for the sum of exponentials and the candidates for K, so that there is one
// exponential per class and no rescaling. Backward reads the logits once more and writes the gradient: an exponential,
// a product and a comparison with the threshold, in parts of 16 bytes, and what else there is to do for members of K
// and the target in a branch that few parts take.
//
// Rows start anywhere, since GPT-2 has 50,257 classes: what is before the first multiple of 16 bytes and after the last
// one is read one by one. Every sum is added up in an order that depends on the shapes alone.
#pragma once

#include "problem.h"
#include "cuda/selection.cuh"

namespace prsl {

// The most threads of a block, and the fewest blocks that a processor shall have registers for. Backward has no shared
// memory, so its threads are as many as there are registers for without spills.
template <class E>
constexpr int kForwardThreads = kWarp * kMaxWarps / (sizeof(E) == sizeof(double) ? 2 : 1);
template <class E>
constexpr int kBackwardThreads = kForwardThreads<E> / 2;
template <class E>
constexpr int kBackwardBlocks = sizeof(E) == sizeof(double) ? 2 : 3;

__device__ inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  int64_t offset = 0;
#pragma unroll 1
  for (int dim = layout.dims - 1; dim > 0; --dim) {
    offset += row % layout.sizes[dim] * layout.strides[dim];
    row /= layout.sizes[dim];
  }
  return layout.dims > 0 ? offset + row * layout.strides[0] : offset;
}

// On the CPU a target is checked beforehand: here, it would have to be waited for.
struct Target {
  int y;  // -1: not a class
  bool ignored;

  __device__ Target(const Problem& p, int64_t row) : y(-1), ignored(p.target[row] == p.ignore_index) {
    const int64_t target = p.target[row];
    if (target >= 0 && target < p.classes) y = int(target);
  }
};

__device__ inline double sum_of_weights(const Problem& p, const double* weight_sum) {
  return weight_sum != nullptr ? *weight_sum : double(p.classes);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
__device__ inline T largest();
template <>
__device__ inline float largest() {
  return 0x1.fffffep+127f;
}
template <>
__device__ inline double largest() {
  return 0x1.fffffffffffffp+1023;
}

// What is known of a row, in each thread; the sums are of what the thread itself has seen.
template <class T>
struct Terms {
  T max, top, threshold;
  enum { exponentials, logits, units, squares, above, at };
  T sums[kSums];
};

// The row in shared memory: as far from a multiple of 16 bytes as it is, or at one if its classes are apart.
template <class E>
__device__ inline Row<E, true> copy_of(const Row<E, false>& row) {
  const uintptr_t shift = row.stride == 1 ? reinterpret_cast<uintptr_t>(row.z) % 16 / sizeof(E) : 0;
  E* copy = static_cast<E*>(shared_bytes()) + shift;
  for_parts<4>(row, [&](auto part, int i) {
    using P = decltype(part);
    start_copy<P>(copy + i, row.template at<P>(i));
  });
  wait_for_copies();
  if (row.stride != 1) __syncthreads();  // else each thread goes on with what it has copied itself
  return row_at<true>(copy, 1, row.classes);
}

// Of shared memory, for that.
template <class E>
constexpr int64_t bytes_of_copy(int64_t classes) {
  return (classes + kLanes<E>) * int64_t(sizeof(E));
}

// Of what this thread sees of the row.
template <class E, bool shared>
__device__ inline ScalarOf<E> maximum_of(const Row<E, shared>& row) {
  using T = ScalarOf<E>;
  T maximum = -T(INFINITY);
  for_parts<4>(row, [&](auto part, int i) {
    maximum = fmax(maximum, maximum_of(row.template part<decltype(part)>(i)));
  });
  return maximum;
}

// Of exp(z - max); collects what reaches the bound.
template <class E, bool shared>
__device__ inline ScalarOf<E> sum_of_exponentials(const Row<E, shared>& row, ScalarOf<E> max, int target,
                                                  ScalarOf<E> bound, Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  T sum = 0;
  for_parts<2>(row, [&](auto part, int i) {
    using P = decltype(part);
    T x[P::size];
    load<P>(row, i, x);
    bool any = false;
    for (int j = 0; j < P::size; ++j) {
      any |= x[j] >= bound;
      x[j] = fast_exp<E>(x[j] - max);
    }
    if (any) collect(row, i, P::size, target, bound, s);
    // As a tree: the more numbers are added to one, the more of their digits are lost.
    for (int step = 1; step < P::size; step *= 2) {
      for (int j = 0; j < P::size; j += 2 * step) x[j] += x[j + step];
    }
    sum += x[0];
  });
  return sum;
}

// Of w (z - max), for label smoothing. A sweep of its own, so that nobody else pays for it.
template <class E, bool shared>
__device__ inline ScalarOf<E> sum_of_logits(const Row<E, shared>& row, ScalarOf<E> max, const ScalarOf<E>* weight) {
  using T = ScalarOf<E>;
  T sum = 0;
  for_parts<1>(row, [&](auto part, int i) {
    using P = decltype(part);
    T x[P::size];
    load<P>(row, i, x);
    for (int j = 0; j < P::size; ++j) sum += (weight != nullptr ? weight[i + j] : T(1)) * (x[j] - max);
  });
  return sum;
}

// What a number that is not the target's adds to the distance, relative to the largest deviation, since the squares of
// small ones underflow.
template <class T>
__device__ inline void add_unit(T z, T scale, bool log_prob, Terms<T>& terms) {
  if (z > terms.threshold) {
    const T unit = deviation<Math>(z, terms.top, terms.threshold, log_prob) / scale;
    terms.sums[terms.units] += unit;
    terms.sums[terms.squares] += unit * unit;
    terms.sums[terms.above] += 1;
  } else if (z == terms.threshold) {
    terms.sums[terms.at] += 1;
  }
}

// All of the selection after the bound; the scale of the distance.
template <class E, bool shared>
__device__ inline ScalarOf<E> select_row(const Row<E, shared>& row, const Problem& p, int target,
                                         Terms<ScalarOf<E>>& terms, Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  const int k = int(p.k), count = s.count;
  const bool few = bounded(k) && k <= count && count <= kCandidates;
  if (few) {
    sort_candidates(count, s);
    terms.top = s.sorted[0];
    terms.threshold = s.sorted[k - 1];
  } else {
    terms.top = largest_but(row, target, s);
    terms.threshold = kth_largest_but(row, target, k, s);
  }
  const T scale = deviation<Math>(terms.top, terms.top, terms.threshold, p.log_prob);
  if (few) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) add_unit(s.sorted[i], scale, p.log_prob, terms);
  } else {
    for_parts<1>(row, [&](auto part, int i) {
      using P = decltype(part);
      T x[P::size];
      load<P>(row, i, x);
      for (int j = 0; j < P::size; ++j) {
        if (i + j != target) add_unit(x[j], scale, p.log_prob, terms);
      }
    });
  }
  return scale;
}

// From the sums of all threads to the results, by one of them.
template <class T>
__device__ inline void finish_row(const Forward& p, const double* weight_sum, int64_t row, int target, T z_y, T scale,
                                  const Terms<T>& terms, const double (&sums)[kSums]) {
  const double exponentials = sums[terms.exponentials];  // NaN where the maximum is infinite
  const T sum = T(exponentials), w_y = p.weight ? static_cast<const T*>(p.weight)[target] : T(1);
  const T log_sum = std::log1p(T(exponentials - 1));  // keeps the digits of what little is besides the maximum
  T loss = w_y * (log_sum - (z_y - terms.max));
  if (p.label_smoothing != 0) {
    const double all = sum_of_weights(p, weight_sum) * double(log_sum) - sums[terms.logits];
    loss = T((1 - p.label_smoothing) * double(loss) + p.label_smoothing * all / double(p.classes));
  }
  RowStats<T> stats = {terms.max, sum, terms.max, T(INFINITY), 0, 0};
  T penalty = 0;
  if (p.k > 0 && sum != sum) {
    penalty = T(NAN);
  } else if (p.k > 0 && scale > 0 && !(p.log_prob && terms.threshold == -T(INFINITY))) {
    const T units = T(sums[terms.units]), norm = p.l1 ? units : std::sqrt(T(sums[terms.squares]));
    const T length = scale * norm;
    penalty = w_y * ((p.log_prob ? T(1) : std::exp(terms.top - terms.max) / sum) * length);
    stats.top = terms.top;
    stats.threshold = terms.threshold;
    stats.length = fmin(length, largest<T>());  // infinite, it would make the gradient zero
    stats.share = -(p.l1 ? T(sums[terms.above]) : units / norm) / T(sums[terms.at]);
  }
  static_cast<T*>(p.cross_entropy)[row] = loss;
  static_cast<T*>(p.penalty)[row] = penalty;
  static_cast<RowStats<T>*>(p.stats)[row] = stats;
}

// For rows of which the logits do not matter.
template <class T>
__device__ inline void fill_row(const Forward& p, int64_t row, T x) {
  static_cast<T*>(p.cross_entropy)[row] = x;
  static_cast<T*>(p.penalty)[row] = p.k > 0 ? x : T(0);
  static_cast<RowStats<T>*>(p.stats)[row] = {x, x, x, x != x ? T(INFINITY) : T(0), 0, 0};
}

template <class E, bool shared>
__device__ inline void forward_row(const Row<E, shared>& row, const Forward& p, const double* weight_sum, int64_t at,
                                   int target, Scratch<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  if (threadIdx.x == 0) s.count = 0;
  const T maximum = maximum_of(row);
  Terms<T> terms = {};
  terms.max = block_max(maximum, s);
  const bool few = p.k > 0 && bounded(int(p.k));
  const T bound = few ? bound_of(maximum, terms.max, int(p.k)) : T(INFINITY);
  terms.sums[terms.exponentials] = sum_of_exponentials(row, terms.max, target, bound, s);
  if (p.label_smoothing != 0) {
    terms.sums[terms.logits] = sum_of_logits(row, terms.max, static_cast<const T*>(p.weight));
  }
  __syncthreads();
  const T scale = p.k > 0 ? select_row(row, p, target, terms, s) : T(0);
  const T z_y = load_one(row, target);
  double sums[kSums];
  block_sums(terms.sums, sums, s);
  if (threadIdx.x == 0) finish_row(p, weight_sum, at, target, z_y, scale, terms, sums);
}

// The next row may begin while the first thread finishes one: what that still reads is not written before the barrier
// of the next row's maximum.
template <class E, bool resident>
__global__ void __launch_bounds__(kForwardThreads<E>, 1)
    forward_rows(const __grid_constant__ Forward p, const double* weight_sum) {
  using T = ScalarOf<E>;
  __shared__ Scratch<T> s;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Target target(p, row);
    if (target.ignored || target.y < 0) {
      if (threadIdx.x == 0) fill_row(p, row, target.ignored ? T(0) : T(NAN));
      continue;
    }
    const E* z = static_cast<const E*>(p.logits) + row_offset(p.layout, row);
    const Row<E, false> from = row_at<false>(z, p.layout.class_stride, int(p.classes));
    if constexpr (resident) {
      forward_row(copy_of(from), p, weight_sum, row, target.y, s);
    } else {
      forward_row(from, p, weight_sum, row, target.y, s);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Slopes {
  RowStats<T> stats;
  T scale;         // of exp(z - max)
  T member, tied;  // of a_i and of 1, times exp(z - max) in "prob"
  T smoothing;     // label smoothing's part, times the weight of the class
  T target;        // what is subtracted at the target, besides
};

template <class T>
__device__ inline Slopes<T> slopes_of(const Backward& p, const double* weight_sum, int64_t row, int target) {
  Slopes<T> s;
  s.stats = static_cast<const RowStats<T>*>(p.stats)[row];
  const T grad_c = static_cast<const T*>(p.grad_cross_entropy)[row], sum = s.stats.sum;
  const T w_y = target < 0 ? T(NAN) : p.weight ? static_cast<const T*>(p.weight)[target] : T(1);
  const T q_y = T(1 - p.label_smoothing) * w_y, smoothed = T(p.label_smoothing) / T(p.classes);
  s.smoothing = grad_c * smoothed;
  s.target = grad_c * q_y;
  s.member = 0;
  s.scale = s.target;
  if (p.label_smoothing != 0) s.scale += s.smoothing * T(sum_of_weights(p, weight_sum));
  if (s.stats.length != 0) {  // else there is no penalty, and 0 * inf would make NaN of it
    s.member = w_y * static_cast<const T*>(p.grad_penalty)[row];
    if (!p.log_prob) {
      s.member /= sum;  // together with exp(z - max): grad_penalty * p
      s.scale -= s.member * std::exp(s.stats.top - s.stats.max) * s.stats.length;
    }
  }
  s.scale /= sum;
  s.tied = s.member * s.stats.share;
  return s;
}

// The penalty's part of the gradient at a class that is not the target.
template <class T>
__device__ inline T penalty_gradient(T z, T exponential, const Slopes<T>& s, const Problem& p) {
  T g = 0;
  if (z > s.stats.threshold) {
    g = s.member;
    if (!p.l1) g *= deviation<Math>(z, s.stats.top, s.stats.threshold, p.log_prob) / s.stats.length;
  } else if (z == s.stats.threshold) {
    g = s.tied;
  }
  return p.log_prob ? g : g * exponential;
}

// In parts without a member of K or the target there is nothing to do but the cross entropy's part; in the others, the
// classes go one by one.
template <bool weighted, class E>
__device__ inline void gradient_row(const Row<E, false>& row, E* gradient, int64_t stride, const Backward& p,
                                    int target, const Slopes<ScalarOf<E>>& s) {
  using T = ScalarOf<E>;
  const T* weight = static_cast<const T*>(p.weight);
  for_parts<2>(row, [&](auto part, int i) {
    using P = decltype(part);
    if constexpr (P::size > 1) {
      T x[P::size];
      load<P>(row, i, x);
      bool any = unsigned(target - i) < unsigned(P::size);
      for (int j = 0; j < P::size; ++j) {
        any |= x[j] >= s.stats.threshold;
        x[j] = fast_exp<E>(x[j] - s.stats.max) * s.scale - (weighted ? s.smoothing * weight[i + j] : s.smoothing);
      }
      if (!any) {
        pack(x, part);
        store_global(gradient + i, part);
        return;
      }
    }
#pragma unroll 1
    for (const int end = i + P::size; i < end; ++i) {
      const T z = load_one(row, i), e = fast_exp<E>(z - s.stats.max);
      T g[1] = {e * s.scale - (weighted ? s.smoothing * weight[i] : s.smoothing)};
      g[0] += i == target ? -s.target : penalty_gradient(z, e, s, p);
      Part<E, 1> one;
      pack(g, one);
      store_global(gradient + i * stride, one);
    }
  });
}

// `weighted` where there is label smoothing, and weights.
template <class E, bool weighted>
__global__ void __launch_bounds__(kBackwardThreads<E>, kBackwardBlocks<E>)
    backward_rows(const __grid_constant__ Backward p, const double* weight_sum) {
  using T = ScalarOf<E>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Target target(p, row);
    const E* z = static_cast<const E*>(p.logits) + row_offset(p.layout, row);
    E* gradient = static_cast<E*>(p.gradient) + row_offset(p.gradient_layout, row);
    const int64_t stride = p.gradient_layout.class_stride;
    // Both at once, or none of them.
    const bool wide = stride == 1 && (reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(gradient)) % 16 == 0;
    const Row<E, false> from = row_at<false>(z, p.layout.class_stride, int(p.classes), wide);
    if (target.ignored) {
      for_parts<1>(from, [&](auto part, int i) { store_global(gradient + i * stride, decltype(part)()); });
    } else {
      gradient_row<weighted>(from, gradient, stride, p, target.y, slopes_of<T>(p, weight_sum, row, target.y));
    }
  }
}

}  // namespace prsl

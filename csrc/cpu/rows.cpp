// The loss of a row and its gradient. Compiled once for each level, into the namespace PRSL_LEVEL.
//
// Forward goes over a row in chunks that stay in L2, twice: first for the maximum, then for the sum of exponentials, so
// that there is one exponential per class and no rescaling. The k largest are selected on the way. The first sweep keeps
// the maxima of at least 2 (k + 1) groups of classes, and the (k + 1)-th largest of these is a lower bound on the
// (k + 1)-th largest logit; the second sweep compares each vector with the bound, and collects what is above it: in a
// random row, about a quarter more than k. Any row is exact and linear in V: where the bound is of little use, what was
// collected is sorted out as soon as there is much of it, by bisection over the bits. What is equal to the bound is
// counted and not collected, so that rows full of ties cost no more than others.
//
// Backward reads the logits once more and writes the gradient: an exponential, a product and a comparison with the
// threshold. It is recomputed and not kept from forward, since an upstream gradient that is not 1 (the Trainer divides
// by the number of tokens) would cost another sweep over a kept one.
#include "cpu/rows.h"

#include <math.h>
#include <string.h>

#include "closed_form.h"
#include "cpu/selection.h"
#include "cpu/simd.h"

namespace prsl {
namespace PRSL_LEVEL {
namespace {

struct Math {
  template <class V>
  static V exp(V x) {
    return PRSL_LEVEL::exp(x);
  }
  template <class V>
  static V expm1(V x) {
    return PRSL_LEVEL::expm1(x);
  }
};

// So many additions to one lane before it goes into a double: each rounds, and in rows of equal logits all the same way.
constexpr int64_t kAdditions = 256;

enum class Smoothing { none, uniform, weighted };

// Two of these fit into the L2 of servers, of 1 MB and more: the next chunk is fetched while one is computed.
constexpr int64_t kChunkBytes = 256 * 1024;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  int64_t offset = 0;
  for (int dim = layout.dims - 1; dim >= 0; --dim) {
    offset += row % layout.sizes[dim] * layout.strides[dim];
    row /= layout.sizes[dim];
  }
  return offset;
}

inline double largest(float) { return __FLT_MAX__; }
inline double largest(double) { return __DBL_MAX__; }

template <class V>
inline double sum_lanes(V v) {
  double sum = 0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += v[lane];
  return sum;
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct RowSums {
  T max = -T(INFINITY);
  double exponentials = 0;  // sum of exp(z - reference())
  double logits = 0;        // sum of w (z - reference()), for label smoothing: without the maximum, which may be large
  double weights = 0;       // of those

  void raise_max(T to) {
    if (max != to && exponentials != 0) {
      const double raised = double(to) - double(max);
      exponentials *= ::exp(-raised);
      logits -= weights * raised;
    }
    max = to;
  }
  // The maximum, but -inf - -inf is NaN, and there may be more to come.
  T reference() const { return max == -T(INFINITY) ? T(0) : max; }
};

// Adds a chunk to the sums, and collects the candidates in it.
template <class E, bool select, Smoothing smoothing>
void sum_chunk(const E* z, const ScalarOf<E>* weight, int64_t n, const Problem& p, RowSums<ScalarOf<E>>& sums,
               Candidates<ScalarOf<E>>& candidates, char* scratch) {
  using V = VectorOf<E>;
  using T = ScalarOf<E>;
  constexpr int64_t W = kLanes<E>, step = kUnroll * W;
  const T reference = sums.reference();
  const V max = broadcast<V>(reference);
  V bound = broadcast<V>(candidates.bound);
  V exponentials[kUnroll] = {}, shifted[kUnroll] = {}, weights = {};
  const auto flush = [&] {
    sums.exponentials += sum_lanes((exponentials[0] + exponentials[1]) + (exponentials[2] + exponentials[3]));
    if (smoothing != Smoothing::none) {
      sums.logits += sum_lanes((shifted[0] + shifted[1]) + (shifted[2] + shifted[3]));
      sums.weights += sum_lanes(weights);
    }
    for (int u = 0; u < kUnroll; ++u) exponentials[u] = shifted[u] = V{};
    weights = V{};
  };
  int64_t i = 0;
  while (i + step <= n) {
    const int64_t stop = least(n, i + kAdditions * step);
    for (; i + step <= stop && candidates.count < candidates.limit; i += step) {
      V x[kUnroll];
      uint32_t hits[kUnroll], any = 0;
      // The next chunk, from memory into L2, while this one is computed.
      for (int64_t line = 0; line < step * int64_t(sizeof(E)); line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(z + i + n) + line), 0, 2);
      }
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        x[u] = Elements<E>::load(z + i + u * W);
        exponentials[u] += exp(x[u] - max);
        if (smoothing == Smoothing::uniform) shifted[u] += x[u] - max;
        if (smoothing == Smoothing::weighted) {
          const V w = Elements<T>::load(weight + i + u * W);
          shifted[u] += w * (x[u] - max);
          weights += w;
        }
        if (select) any |= hits[u] = lanes_ge(x[u], bound);
      }
      if (select && any != 0) {
        for (int u = 0; u < kUnroll; ++u) candidates.collect(x[u], hits[u]);
      }
    }
    flush();
    // In rows whose large logits are all in few groups, the groups' bound is no good. Outside of the loop, whose
    // constants a call would drive from their registers.
    if (candidates.count >= candidates.limit) {
      candidates.tighten(p.k + 1, scratch);
      bound = broadcast<V>(candidates.bound);
    }
  }
  for (; i < n; i += W) {
    const int64_t count = least(n - i, W);
    const V x = load_partial(z + i, count, -T(INFINITY));
    exponentials[0] += exp(x - max);
    if (smoothing != Smoothing::none) {
      const V w = smoothing == Smoothing::weighted ? load_partial(weight + i, count, T(0)) : V{} + 1;
      shifted[0] += w * (load_partial(z + i, count, reference) - max);
      if (smoothing == Smoothing::weighted) weights += w;
    }
    if (select) candidates.collect(x, lanes_ge(x, bound) & ((1u << count) - 1));
  }
  flush();
  if (smoothing == Smoothing::uniform) sums.weights += double(n);
}

template <class E, bool select, Smoothing smoothing>
void scan_row(const E* z, const Problem& p, char* scratch, RowSums<ScalarOf<E>>& sums,
              Candidates<ScalarOf<E>>& candidates) {
  using T = ScalarOf<E>;
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t groups = select ? group_count<E>(p.classes, p.k) : 0;
  const int64_t kept = groups > 0 ? groups : kUnroll * kLanes<E>;  // for the row's maximum at least
  T* maxima = reinterpret_cast<T*>(scratch);
  scratch += 8 * kept;
  for (int64_t g = 0; g < kept; ++g) maxima[g] = -T(INFINITY);
  // Chunks of one size, in whole steps of the sweeps.
  const int64_t chunks = (p.classes * int64_t(sizeof(E)) + kChunkBytes - 1) / kChunkBytes;
  const int64_t step = kUnroll * kLanes<E>, chunk = (p.classes / chunks + step) / step * step;
  for (int64_t begin = 0; begin < p.classes; begin += chunk) {
    const int64_t n = least(chunk, p.classes - begin);
    raise_maxima(z + begin, n, maxima, kept);
    T max = maxima[0];
    for (int64_t g = 1; g < kept; ++g) max = maxima[g] > max ? maxima[g] : max;
    sums.raise_max(max);
    if (groups > 0) candidates.raise_bound(kth_largest(maxima, groups, p.k + 1, scratch));
    sum_chunk<E, select, smoothing>(z + begin, weight ? weight + begin : nullptr, n, p, sums, candidates, scratch);
  }
}

// From the candidates to the threshold and the distance, in units of p_top where that is between probabilities.
template <class T>
double finish_selection(const Problem& p, Candidates<T>& c, T z_y, char* scratch, RowStats<T>& stats) {
  using V = VectorOf<T>;
  c.sort_out();  // the bound has risen since the first were collected
  if (z_y > c.bound) {  // the target is no member of K; of equal values it does not matter which one goes
    int64_t i = 0;
    while (c.values[i] != z_y) ++i;
    c.values[i] = c.values[--c.count];
  } else if (z_y == c.bound) {
    --c.at_bound;
  }
  if (c.count >= p.k) c.tighten(p.k, scratch);
  const T* values = c.values;
  const int64_t n = c.count;
  const T threshold = c.bound;
  T top = threshold;
  for (int64_t i = 0; i < n; ++i) top = values[i] > top ? values[i] : top;

  // Relative to the largest deviation, since the squares of small ones underflow.
  const V scale = deviation<Math>(broadcast<V>(top), broadcast<V>(top), broadcast<V>(threshold), p.log_prob);
  if (!(scale[0] > 0) || (p.log_prob && threshold == -T(INFINITY))) return 0;  // no derivative
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n;) {
    V sums = {}, sums_of_squares = {};
    for (const int64_t stop = least(n, i + kAdditions * kLanes<T>); i < stop; i += kLanes<T>) {
      const V z = Elements<T>::load(values + i);
      V unit = deviation<Math>(z, broadcast<V>(top), broadcast<V>(threshold), p.log_prob) / scale;
      for (int64_t lane = n - i; lane < kLanes<T>; ++lane) unit[lane] = 0;
      sums += unit;
      sums_of_squares += unit * unit;
    }
    sum += sum_lanes(sums);
    squares += sum_lanes(sums_of_squares);
  }
  const double norm = p.l1 ? sum : ::sqrt(squares), length = double(scale[0]) * norm;
  stats.top = top;
  stats.threshold = threshold;
  stats.length = T(length < largest(T{}) ? length : largest(T{}));  // infinite, it would make the gradient zero
  stats.share = T(-(p.l1 ? double(n) : sum / norm) / double(c.at_bound));
  return length;
}

template <class E, bool select, Smoothing smoothing>
void forward_row(const E* z, const Forward& p, int64_t row, char* scratch) {
  using T = ScalarOf<E>;
  T& cross_entropy = static_cast<T*>(p.cross_entropy)[row];
  T& penalty = static_cast<T*>(p.penalty)[row];
  RowStats<T>& stats = static_cast<RowStats<T>*>(p.stats)[row];
  const T z_y = load_one(z + p.target[row]);
  RowSums<T> sums;
  const int64_t limit = p.k > 200 ? 5 * p.k : 1000;  // a quarter of it remains at most
  Candidates<T> candidates{-T(INFINITY), reinterpret_cast<T*>(scratch), 0, limit, 0};
  scratch += 8 * (p.classes + 512) * int64_t(select);
  scan_row<E, select, smoothing>(z, p, scratch, sums, candidates);

  const double sum = sums.max == -T(INFINITY) ? double(NAN) : sums.exponentials;
  const double w_y = p.weight ? double(static_cast<const T*>(p.weight)[p.target[row]]) : 1;
  const double log_sum = ::log(sum);
  double loss = w_y * (log_sum - (double(z_y) - double(sums.max)));
  if (smoothing != Smoothing::none) {
    const double uniform = (p.weight_sum * log_sum - sums.logits) / double(p.classes);
    loss = (1 - p.label_smoothing) * loss + p.label_smoothing * uniform;
  }
  cross_entropy = T(loss);
  stats = {sums.max, T(sum), sums.max, T(INFINITY), 0, 0};
  penalty = 0;
  if (select && sum != sum) {
    penalty = T(NAN);
  } else if (select) {
    const double length = finish_selection(p, candidates, z_y, scratch, stats);
    const double unit = p.log_prob ? 1 : ::exp(double(stats.top) - double(sums.max)) / sum;
    penalty = T(w_y * (unit * length));
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Slopes {
  RowStats<T> stats;
  T scale;          // of exp(z - max)
  T member, tied;   // of a_i and of 1, times exp(z - max) in "prob"
  T smoothing;      // label smoothing's part, times the weight of the class
  const T* weight;
};

// The penalty's part of the gradient above the threshold.
template <class V, class T>
__attribute__((noinline)) V member_gradient(V z, const Slopes<T>& s, bool log_prob, bool l1) {
  const V member = broadcast<V>(s.member);
  if (l1) return member;
  const V top = broadcast<V>(s.stats.top), threshold = broadcast<V>(s.stats.threshold);
  return member * (deviation<Math>(z, top, threshold, log_prob) / s.stats.length);
}

// What the penalty adds to the gradient of a vector. Rows may be full of ties, but have at most k members above.
template <class V, class T>
inline V penalty_gradient(V z, V exponential, const Slopes<T>& s, bool log_prob, bool l1) {
  const V threshold = broadcast<V>(s.stats.threshold);
  V g = z == threshold ? broadcast<V>(s.tied) : V{};
  if (lanes_gt(z, threshold) != 0) g = z > threshold ? member_gradient(z, s, log_prob, l1) : g;
  return log_prob ? g : g * exponential;
}

template <class E, Smoothing smoothing>
void gradient_row(const E* z, E* gradient, int64_t classes, const Slopes<ScalarOf<E>>& s, bool log_prob, bool l1) {
  using V = VectorOf<E>;
  using T = ScalarOf<E>;
  constexpr int64_t W = kLanes<E>, step = kUnroll * W;
  const V max = broadcast<V>(s.stats.max), threshold = broadcast<V>(s.stats.threshold);
  int64_t i = 0;
  for (; i + step <= classes; i += step) {
    V x[kUnroll], e[kUnroll], g[kUnroll];
    uint32_t any = 0;
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      x[u] = Elements<E>::load(z + i + u * W);
      e[u] = exp(x[u] - max);
      g[u] = e[u] * s.scale;
      if (smoothing == Smoothing::uniform) g[u] -= s.smoothing;
      if (smoothing == Smoothing::weighted) g[u] -= s.smoothing * Elements<T>::load(s.weight + i + u * W);
      any |= lanes_ge(x[u], threshold);
    }
    if (any != 0) {
      for (int u = 0; u < kUnroll; ++u) {
        g[u] += penalty_gradient(x[u], e[u], s, log_prob, l1);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) Elements<E>::store(gradient + i + u * W, g[u]);
  }
  for (; i < classes; i += W) {
    const int64_t count = least(classes - i, W);
    const V x = load_partial(z + i, count, -T(INFINITY)), e = exp(x - max);
    V g = e * s.scale + penalty_gradient(x, e, s, log_prob, l1);
    if (smoothing == Smoothing::uniform) g -= s.smoothing;
    if (smoothing == Smoothing::weighted) g -= s.smoothing * load_partial(s.weight + i, count, T(0));
    store_partial(gradient + i, count, g);
  }
}

template <class E, Smoothing smoothing>
void backward_row(const E* z, E* gradient, const Backward& p, int64_t row) {
  using T = ScalarOf<E>;
  const int64_t y = p.target[row];
  const double z_y = double(load_one(z + y));  // before the gradient takes its place
  Slopes<T> s;
  s.stats = static_cast<const RowStats<T>*>(p.stats)[row];
  s.weight = static_cast<const T*>(p.weight);
  const double w_y = s.weight ? double(s.weight[y]) : 1;
  const double grad_c = double(static_cast<const T*>(p.grad_cross_entropy)[row]);
  const double q_y = (1 - p.label_smoothing) * w_y;
  const double smoothed = p.label_smoothing / double(p.classes);
  const double sum = double(s.stats.sum);
  double scale = grad_c * q_y, grad_d = 0;
  if (smoothing != Smoothing::none) scale = grad_c * (q_y + smoothed * p.weight_sum);
  if (double(s.stats.length) != 0) {  // else there is no penalty, and 0 * inf would make NaN of it
    grad_d = w_y * double(static_cast<const T*>(p.grad_penalty)[row]);
    if (!p.log_prob) {
      grad_d /= sum;  // together with exp(z - max): grad_d * p
      scale -= grad_d * ::exp(double(s.stats.top) - double(s.stats.max)) * double(s.stats.length);
    }
  }
  s.scale = T(scale / sum);
  s.member = T(grad_d);
  s.tied = T(grad_d * double(s.stats.share));
  s.smoothing = T(grad_c * smoothed);
  gradient_row<E, smoothing>(z, gradient, p.classes, s, p.log_prob, p.l1);
  double g_y = ::exp(z_y - double(s.stats.max)) * (scale / sum) - grad_c * q_y;
  if (smoothing != Smoothing::none) g_y -= grad_c * smoothed * (s.weight ? w_y : 1);
  store_one(gradient + y, T(g_y));
}

// ---- all rows -------------------------------------------------------------------------------------------------------

template <class E>
void gather(const E* from, int64_t stride, E* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
}

template <class E>
void scatter(const E* from, E* to, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
}

template <class E, bool select, Smoothing smoothing>
void forward_rows(const Forward& p, int64_t begin, int64_t end, char* scratch) {
  using T = ScalarOf<E>;
  const int64_t stride = p.layout.class_stride;
  E* copy = reinterpret_cast<E*>(scratch);
  if (stride != 1) scratch += 8 * (p.classes + 512);
  for (int64_t row = begin; row < end; ++row) {
    if (p.target[row] == p.ignore_index) {
      static_cast<T*>(p.cross_entropy)[row] = static_cast<T*>(p.penalty)[row] = 0;
      static_cast<RowStats<T>*>(p.stats)[row] = {};
      continue;
    }
    const E* z = static_cast<const E*>(p.logits) + row_offset(p.layout, row);
    if (stride != 1) {
      gather(z, stride, copy, p.classes);
      z = copy;
    }
    forward_row<E, select, smoothing>(z, p, row, scratch);
  }
}

template <class E, Smoothing smoothing>
void backward_rows(const Backward& p, int64_t begin, int64_t end, char* scratch) {
  const int64_t from = p.layout.class_stride, to = p.gradient_layout.class_stride;
  E* z_copy = reinterpret_cast<E*>(scratch);
  E* gradient_copy = reinterpret_cast<E*>(scratch + 8 * (p.classes + 512));
  for (int64_t row = begin; row < end; ++row) {
    const E* z = static_cast<const E*>(p.logits) + row_offset(p.layout, row);
    E* out = static_cast<E*>(p.gradient) + row_offset(p.gradient_layout, row);
    E* gradient = to == 1 ? out : gradient_copy;
    if (p.target[row] == p.ignore_index) {
      memset(gradient, 0, size_t(p.classes) * sizeof(E));
    } else {
      if (from != 1) {
        gather(z, from, z_copy, p.classes);
        z = z_copy;
      }
      backward_row<E, smoothing>(z, gradient, p, row);
    }
    if (to != 1) scatter(gradient, out, to, p.classes);
  }
}

Smoothing smoothing_of(const Problem& p) {
  if (p.label_smoothing == 0) return Smoothing::none;
  return p.weight ? Smoothing::weighted : Smoothing::uniform;
}

template <class E, bool select>
void forward_with(const Forward& p, int64_t begin, int64_t end, char* scratch) {
  switch (smoothing_of(p)) {
    case Smoothing::none:
      return forward_rows<E, select, Smoothing::none>(p, begin, end, scratch);
    case Smoothing::uniform:
      return forward_rows<E, select, Smoothing::uniform>(p, begin, end, scratch);
    case Smoothing::weighted:
      return forward_rows<E, select, Smoothing::weighted>(p, begin, end, scratch);
  }
}

template <class E>
void forward(const Forward& p, int64_t begin, int64_t end, char* scratch) {
  return p.k > 0 ? forward_with<E, true>(p, begin, end, scratch) : forward_with<E, false>(p, begin, end, scratch);
}

template <class E>
void backward(const Backward& p, int64_t begin, int64_t end, char* scratch) {
  switch (smoothing_of(p)) {
    case Smoothing::none:
      return backward_rows<E, Smoothing::none>(p, begin, end, scratch);
    case Smoothing::uniform:
      return backward_rows<E, Smoothing::uniform>(p, begin, end, scratch);
    case Smoothing::weighted:
      return backward_rows<E, Smoothing::weighted>(p, begin, end, scratch);
  }
}

#define PRSL_QUOTED(x) #x
#define PRSL_NAME(x) PRSL_QUOTED(x)

}  // namespace

const Level level = {
    PRSL_NAME(PRSL_LEVEL),
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>},
};

}  // namespace PRSL_LEVEL
}  // namespace prsl

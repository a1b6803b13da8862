// The mathematics of a row, apart from how and where it is computed.
//
// For logits z, target y and p = softmax(z), the loss is c + b d with the cross entropy c = -log p_y and the distance
// d = || p_K - m ||, where K are the k largest classes without y and m is the smallest p over K (arXiv:2402.03627, Eq. 1
// and 2). The derivation of the gradient is in prsl_kernels/closed_form.py:
//
//   dl/dz_i = p_i (1 - b d) - [i = y] + b p_i g_i             "prob"
//   dl/dz_i = p_i           - [i = y] + b g_i                 "log_prob"
//   g_i     = a_i above the threshold, -A / n for each of the n classes at it, 0 below it and at y
//   a_i     = deviation_i / d for "l2", 1 for "l1";   A = sum of a_i
//
// Everything about K is kept relative to the largest non-target logit, `top`, since p_K itself underflows in float32
// where the target is far ahead; and p_j - m is written as a product, since the difference of two close probabilities
// cancels.
#pragma once

// What is here runs on the CPU and on the GPU.
#if defined(__CUDACC__)
#define PRSL_BOTH __host__ __device__
#else
#define PRSL_BOTH
#endif

namespace prsl {

// What backward needs of a row besides the logits: STATS numbers of the type that the row is computed in.
template <class T>
struct RowStats {
  T max;        // the largest logit, and
  T sum;        // the sum of exp(z - max): apart, since their sum loses its digits for logits around 1e4
  T top;        // the largest non-target logit
  T threshold;  // the k-th largest non-target logit; +inf where the penalty has no derivative
  T length;     // d in units of p_top, or d itself in "log_prob"; 0 where the penalty has no derivative
  T share;      // -A / n
};
constexpr int kStats = 6;

// What p_i - m is in units of p_top ("prob"), or log p_i - log m ("log_prob"), for z above the threshold.
// M names the exponentials to use; V is a scalar or a vector.
template <class M, class V>
PRSL_BOTH inline V deviation(V z, V top, V threshold, bool log_prob) {
  return log_prob ? z - threshold : M::exp(z - top) * -M::expm1(threshold - z);
}

}  // namespace prsl

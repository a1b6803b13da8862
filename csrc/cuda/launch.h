// The interface between the binding, which knows PyTorch, and the CUDA kernels, which g++ does not know.
//
// All pointers are the device's. A target may be anything: the results of a row whose target is neither a class nor
// ignore_index are NaN. `weight_sum` is null without weights, and stands for Problem::weight_sum, which nobody reads.
#pragma once

#include "problem.h"

namespace prsl {

// Starts the computation of all rows on a stream of the current device; null, or what went wrong.
const char* launch_forward(Dtype dtype, const Forward& p, const double* weight_sum, void* stream);
const char* launch_backward(Dtype dtype, const Backward& p, const double* weight_sum, void* stream);

// So that an index of a class is an int, as are the sums of two.
constexpr int64_t kMaxClasses = int64_t(1) << 30;

}  // namespace prsl

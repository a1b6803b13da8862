// What the operators ask of the kernels of a device.
#pragma once

#include <cstdint>

namespace prsl {

enum class Dtype { float32, float64, bfloat16, float16, count };

constexpr int kMaxDims = 64;

// Where the rows of a (..., V) tensor begin. In units of elements.
struct RowLayout {
  int dims;  // all but the last
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t class_stride;
};

struct Problem {
  const void* logits;
  RowLayout layout;
  int64_t rows, classes;
  const int64_t* target;  // (rows,); on a CPU, checked: in [0, classes) or ignore_index
  const void* weight;     // (classes,) in the type of computation, or null
  double weight_sum;      // of all classes; their number without weights. On a CPU alone
  int64_t k;              // 0: no penalty
  bool log_prob, l1;
  int64_t ignore_index;
  double label_smoothing;
};

struct Forward : Problem {
  void *cross_entropy, *penalty;  // (rows,)
  void* stats;                    // (rows, kStats)
};

struct Backward : Problem {
  const void* stats;
  const void *grad_cross_entropy, *grad_penalty;  // (rows,)
  void* gradient;                                 // may be the logits
  RowLayout gradient_layout;
};

}  // namespace prsl

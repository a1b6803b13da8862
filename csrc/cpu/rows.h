// The interface between the binding, which knows PyTorch, and the row kernels, which know the instruction set.
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
  const int64_t* target;  // (rows,), checked: in [0, classes) or ignore_index
  const void* weight;     // (classes,) in the type of computation, or null
  double weight_sum;      // of all classes; their number without weights
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

// The kernels of one level. `scratch` holds scratch_bytes(classes); rows [begin, end) are computed one by one, so that
// the result does not depend on how they are dealt out.
struct Level {
  const char* name;
  void (*forward[int(Dtype::count)])(const Forward&, int64_t begin, int64_t end, char* scratch);
  void (*backward[int(Dtype::count)])(const Backward&, int64_t begin, int64_t end, char* scratch);
};

// Four arrays of the row's length, and room for whole vectors behind each. Pages that are not touched cost nothing.
constexpr int64_t scratch_bytes(int64_t classes) { return 4 * 8 * (classes + 512); }

namespace baseline {
extern const Level level;
}
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx512_bf16 {
extern const Level level;
}

// The level in use: the best that the machine has, unless another one was asked for.
const Level& current_level();
// The names of those that the machine can run, best first, ended by null.
const char* const* supported_levels();
// False where the name is not among them.
bool use_level(const char* name);

}  // namespace prsl

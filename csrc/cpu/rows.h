// The interface between the binding, which knows PyTorch, and the row kernels, which know the instruction set.
#pragma once

#include "problem.h"

namespace prsl {

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

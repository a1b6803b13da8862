// Chooses the kernels for the machine at run time: a library built on one machine has to run on another.
#if defined(PRSL_X86_LEVELS)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>

#include "cpu/rows.h"

#if defined(__GLIBC__)
// std::shared_ptr, which PyTorch's headers use, asks this variable of glibc 2.32 whether it may count without atomics.
// Our own says no, so that a wheel runs with older ones.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

namespace prsl {
namespace {

#if defined(PRSL_X86_LEVELS)
// Clang 14 has no word for it in __builtin_cpu_supports. AVX2 implies that the system saves the registers.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct Supported {
  const Level* levels[5] = {};
  const char* names[5] = {};
  int count = 0;

  void add(const Level& level) {
    levels[count] = &level;
    names[count++] = level.name;
  }

  Supported() {
#if defined(PRSL_X86_LEVELS)
    // These ask the operating system, too, whether it saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(avx512_bf16::level);
    if (avx512) add(avx512::level);
    if (avx2) add(avx2::level);
#endif
    add(baseline::level);
  }
};

const Supported& supported() {
  static const Supported found;
  return found;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{supported().levels[0]};
  return level;
}

}  // namespace

const Level& current_level() { return *chosen().load(std::memory_order_relaxed); }

const char* const* supported_levels() { return supported().names; }

bool use_level(const char* name) {
  for (int i = 0; i < supported().count; ++i) {
    if (std::strcmp(name, supported().names[i]) == 0) {
      chosen().store(supported().levels[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace prsl

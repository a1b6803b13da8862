// The CPU kernels as PyTorch operators, through PyTorch's stable ABI: one library for several versions of PyTorch and
// Python. Autograd and the shapes for compilers are registered in prsl_kernels/ops.py.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "cpu/rows.h"
#include "operators.h"

namespace prsl {
namespace {

// About the time of starting another thread.
constexpr int64_t kClassesPerThread = 1 << 15;

// Rows over the threads of PyTorch's pool. Each row is computed by one of them, alone.
template <class P>
void for_all_rows(const P& p, void (*kernel)(const P&, int64_t, int64_t, char*)) {
  std::atomic<bool> out_of_memory{false};  // an exception must not cross the stable ABI
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kClassesPerThread / p.classes),
                              [&](int64_t begin, int64_t end) {
                                std::unique_ptr<char[]> scratch(new (std::nothrow) char[scratch_bytes(p.classes)]);
                                if (scratch == nullptr) {
                                  out_of_memory = true;
                                } else {
                                  kernel(p, begin, end, scratch.get());
                                }
                              });
  STD_TORCH_CHECK(!out_of_memory, "no memory for rows of ", p.classes, " classes");
}

// Asks for huge pages in a fresh buffer: most of the time of writing one goes into faulting its pages in, mostly 4 KB
// at a time. Where the system does not heed it, or the buffer is not fresh, nothing happens.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t worth_it = size_t(4) << 20;
  if (bytes < worth_it) return;
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
double sum(const T* numbers, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += double(numbers[i]);
  return total;
}

// What has to be read of the arguments besides the logits.
void look_at(const Tensor& logits, Problem& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t y = p.target[row];
    STD_TORCH_CHECK((y >= 0 && y < p.classes) || y == p.ignore_index, "Target ", y,
                    " is out of bounds: class indices must be in [0, ", p.classes, "), or ignore_index=",
                    p.ignore_index);
  }
  p.weight_sum = double(p.classes);
  if (p.weight != nullptr) {
    p.weight_sum = compute_type(logits) == ScalarType::Double ? sum(static_cast<const double*>(p.weight), p.classes)
                                                              : sum(static_cast<const float*>(p.weight), p.classes);
  }
}

struct Cpu {
  static void check(const Tensor& logits) { STD_TORCH_CHECK(logits.is_cpu(), "logits must be on the CPU"); }

  static Tensor new_gradient(const Tensor& logits) {
    const Tensor gradient = torch::stable::empty_like(logits);
    advise_huge_pages(gradient.mutable_data_ptr(), size_t(gradient.numel()) * gradient.element_size());
    return gradient;
  }

  static void forward(const Tensor& logits, Forward& p, const Inputs&) {
    look_at(logits, p);
    for_all_rows(p, current_level().forward[int(dtype_of(logits))]);
  }

  static void backward(const Tensor& logits, Backward& p, const Inputs&) {
    look_at(logits, p);
    for_all_rows(p, current_level().backward[int(dtype_of(logits))]);
  }
};

}  // namespace
}  // namespace prsl

// logits (..., V); target (...) int64; weight (V,), the terms (...) and stats (..., 6) in float32, or float64 for float64
// logits. k=0 leaves the penalty out.
STABLE_TORCH_LIBRARY(prsl_native, m) {
  m.def(
      "token_terms(Tensor logits, Tensor target, Tensor? weight, int k, str space, str distance, int ignore_index, "
      "float label_smoothing) -> (Tensor cross_entropy, Tensor penalty, Tensor stats)");
  m.def(
      "token_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor grad_cross_entropy, "
      "Tensor grad_penalty, int k, str space, str distance, int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "token_gradient_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor stats, Tensor grad_cross_entropy, "
      "Tensor grad_penalty, int k, str space, str distance, int ignore_index, float label_smoothing) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(prsl_native, CPU, m) {
  m.impl("token_terms", TORCH_BOX(&prsl::token_terms<prsl::Cpu>));
  m.impl("token_gradient", TORCH_BOX(&prsl::token_gradient<prsl::Cpu>));
  m.impl("token_gradient_", TORCH_BOX(&prsl::token_gradient_<prsl::Cpu>));
}

// For ctypes: which operators these are; the level in use, those that could be (separated by spaces, best first), and
// another choice: 0 where that cannot run.
extern "C" {
__attribute__((visibility("default"))) int prsl_interface() { return prsl::kInterface; }

__attribute__((visibility("default"))) const char* prsl_level() { return prsl::current_level().name; }

__attribute__((visibility("default"))) const char* prsl_levels() {
  static const std::string names = [] {
    std::string joined;
    for (const char* const* name = prsl::supported_levels(); *name != nullptr; ++name) {
      joined += (joined.empty() ? "" : " ") + std::string(*name);
    }
    return joined;
  }();
  return names.c_str();
}

__attribute__((visibility("default"))) int prsl_use_level(const char* name) { return prsl::use_level(name); }
}

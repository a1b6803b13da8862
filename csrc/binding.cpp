// The CPU kernels as PyTorch operators, through PyTorch's stable ABI: one library for several versions of PyTorch and
// Python. Autograd and the shapes for compilers are registered in prsl_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "closed_form.h"
#include "cpu/rows.h"

namespace prsl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// About the time of starting another thread.
constexpr int64_t kClassesPerThread = 1 << 15;

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

RowLayout layout_of(const Tensor& tensor) {
  RowLayout layout;
  layout.dims = int(tensor.dim()) - 1;
  STD_TORCH_CHECK(layout.dims <= kMaxDims, "logits have more than ", kMaxDims, " dimensions");
  for (int dim = 0; dim < layout.dims; ++dim) {
    layout.sizes[dim] = tensor.size(dim);
    layout.strides[dim] = tensor.stride(dim);
  }
  layout.class_stride = tensor.stride(layout.dims);
  return layout;
}

// A contiguous tensor of numbers of the right type: one for each row (or `size` of them), else an error.
Tensor numbers(const Tensor& tensor, const char* name, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == size, name, " must hold ", size, " numbers, but holds ", tensor.numel());
  return torch::stable::contiguous(tensor);
}

struct Options {
  int64_t k;
  std::string space, distance;
  int64_t ignore_index;
  double label_smoothing;
};

// The arguments of both directions, checked before anything is read through a pointer; keeps their copies alive.
struct Inputs {
  Tensor target;
  std::optional<Tensor> weight;

  Inputs(const Tensor& logits, const Tensor& target_, const std::optional<Tensor>& weight_, const Options& options,
         Problem& p)
      : target(target_) {
    STD_TORCH_CHECK(logits.is_cpu(), "logits must be on the CPU");
    STD_TORCH_CHECK(logits.dim() >= 1, "logits must have the shape (..., V), but have no dimension");
    p.classes = logits.size(logits.dim() - 1);
    STD_TORCH_CHECK(p.classes >= 1, "logits must have at least one class");
    p.rows = logits.numel() / p.classes;
    p.logits = logits.const_data_ptr();
    p.layout = layout_of(logits);
    target = numbers(target_, "target", ScalarType::Long, p.rows);
    p.target = target.const_data_ptr<int64_t>();
    p.k = options.k;
    STD_TORCH_CHECK(p.k >= 0 && p.k < p.classes, "k must be between 1 and V - 1, or 0, but k=", p.k,
                    " and V=", p.classes);
    STD_TORCH_CHECK(options.space == "prob" || options.space == "log_prob", "space must be 'prob' or 'log_prob'");
    STD_TORCH_CHECK(options.distance == "l2" || options.distance == "l1", "distance must be 'l2' or 'l1'");
    p.log_prob = options.space == "log_prob";
    p.l1 = options.distance == "l1";
    p.ignore_index = options.ignore_index;
    p.label_smoothing = options.label_smoothing;
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t y = p.target[row];
      STD_TORCH_CHECK((y >= 0 && y < p.classes) || y == p.ignore_index, "Target ", y,
                      " is out of bounds: class indices must be in [0, ", p.classes, "), or ignore_index=",
                      p.ignore_index);
    }
    p.weight = nullptr;
    p.weight_sum = double(p.classes);
    if (weight_.has_value()) {
      weight = numbers(*weight_, "weight", compute_type(logits), p.classes);
      p.weight = weight->const_data_ptr();
      p.weight_sum = compute_type(logits) == ScalarType::Double ? sum(weight->const_data_ptr<double>(), p.classes)
                                                                : sum(weight->const_data_ptr<float>(), p.classes);
    }
  }

  template <class T>
  static double sum(const T* numbers, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += double(numbers[i]);
    return total;
  }
};

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

Tensor new_rows(const Tensor& logits, std::optional<int64_t> last) {
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  if (last) sizes.push_back(*last);
  return torch::stable::new_empty(logits, sizes, compute_type(logits));
}

std::tuple<Tensor, Tensor, Tensor> token_terms(const Tensor& logits, const Tensor& target,
                                               const std::optional<Tensor>& weight, int64_t k, std::string space,
                                               std::string distance, int64_t ignore_index, double label_smoothing) {
  Forward p;
  const Inputs inputs(logits, target, weight, {k, space, distance, ignore_index, label_smoothing}, p);
  Tensor cross_entropy = new_rows(logits, {}), penalty = new_rows(logits, {}), stats = new_rows(logits, kStats);
  p.cross_entropy = cross_entropy.mutable_data_ptr();
  p.penalty = penalty.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  for_all_rows(p, current_level().forward[int(dtype_of(logits))]);
  return {cross_entropy, penalty, stats};
}

void write_gradient(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    const Tensor& stats_, const Tensor& grad_cross_entropy_, const Tensor& grad_penalty_,
                    const Options& options, const Tensor& gradient) {
  Backward p;
  const Inputs inputs(logits, target, weight, options, p);
  const ScalarType type = compute_type(logits);
  const Tensor stats = numbers(stats_, "stats", type, p.rows * kStats);
  const Tensor grad_cross_entropy = numbers(grad_cross_entropy_, "grad_cross_entropy", type, p.rows);
  const Tensor grad_penalty = numbers(grad_penalty_, "grad_penalty", type, p.rows);
  p.stats = stats.const_data_ptr();
  p.grad_cross_entropy = grad_cross_entropy.const_data_ptr();
  p.grad_penalty = grad_penalty.const_data_ptr();
  p.gradient = gradient.mutable_data_ptr();
  p.gradient_layout = layout_of(gradient);
  for_all_rows(p, current_level().backward[int(dtype_of(logits))]);
}

Tensor token_gradient(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                      const Tensor& stats, const Tensor& grad_cross_entropy, const Tensor& grad_penalty, int64_t k,
                      std::string space, std::string distance, int64_t ignore_index, double label_smoothing) {
  const Tensor gradient = torch::stable::empty_like(logits);
  advise_huge_pages(gradient.mutable_data_ptr(), size_t(gradient.numel()) * gradient.element_size());
  write_gradient(logits, target, weight, stats, grad_cross_entropy, grad_penalty,
                 {k, space, distance, ignore_index, label_smoothing}, gradient);
  return gradient;
}

void token_gradient_(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                     const Tensor& stats, const Tensor& grad_cross_entropy, const Tensor& grad_penalty, int64_t k,
                     std::string space, std::string distance, int64_t ignore_index, double label_smoothing) {
  write_gradient(logits, target, weight, stats, grad_cross_entropy, grad_penalty,
                 {k, space, distance, ignore_index, label_smoothing}, logits);
}

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
  m.impl("token_terms", TORCH_BOX(&prsl::token_terms));
  m.impl("token_gradient", TORCH_BOX(&prsl::token_gradient));
  m.impl("token_gradient_", TORCH_BOX(&prsl::token_gradient_));
}

// For ctypes. First, which operators these are: to be raised with every change of their schemas or statistics, together
// with INTERFACE in prsl_kernels/backends/native.py. Then the level in use, those that could be (separated by spaces,
// best first), and another choice: 0 where that cannot run.
extern "C" {
__attribute__((visibility("default"))) int prsl_interface() { return 1; }

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

// The operators for a device, through PyTorch's stable ABI: what can be checked of their arguments without a look at the
// numbers, and the tensors that they return. A device is a type with
//
//   static void check(const Tensor& logits);                              that they are on it
//   static Tensor new_gradient(const Tensor& logits);
//   static void forward(const Tensor& logits, Forward&, const Inputs&);   run the kernels
//   static void backward(const Tensor& logits, Backward&, const Inputs&);
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "closed_form.h"
#include "problem.h"

namespace prsl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& logits) {
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

inline ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// With dimensions that can be stepped through as one made one, since each costs a division.
inline RowLayout layout_of(const Tensor& tensor) {
  RowLayout layout;
  layout.dims = 0;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (layout.dims > 0 && layout.strides[layout.dims - 1] == size * stride) {
      layout.sizes[layout.dims - 1] *= size;
      layout.strides[layout.dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(layout.dims < kMaxDims, "logits have more than ", kMaxDims, " dimensions");
    layout.sizes[layout.dims] = size;
    layout.strides[layout.dims++] = stride;
  }
  layout.class_stride = tensor.stride(tensor.dim() - 1);
  return layout;
}

// A contiguous tensor of numbers of the right type on the device of the logits: one for each row (or `size` of them).
inline Tensor numbers(const Tensor& tensor, const char* name, const Tensor& logits, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu() == logits.is_cpu() && tensor.get_device_index() == logits.get_device_index(), name,
                  " must be on the device of the logits");
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
    STD_TORCH_CHECK(logits.dim() >= 1, "logits must have the shape (..., V), but have no dimension");
    p.classes = logits.size(logits.dim() - 1);
    STD_TORCH_CHECK(p.classes >= 1, "logits must have at least one class");
    p.rows = logits.numel() / p.classes;
    p.logits = logits.const_data_ptr();
    p.layout = layout_of(logits);
    target = numbers(target_, "target", logits, ScalarType::Long, p.rows);
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
    p.weight = nullptr;
    if (weight_.has_value()) {
      weight = numbers(*weight_, "weight", logits, compute_type(logits), p.classes);
      p.weight = weight->const_data_ptr();
    }
  }
};

inline Tensor new_rows(const Tensor& logits, std::optional<int64_t> last) {
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  if (last) sizes.push_back(*last);
  return torch::stable::new_empty(logits, sizes, compute_type(logits));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_terms(const Tensor& logits, const Tensor& target,
                                               const std::optional<Tensor>& weight, int64_t k, std::string space,
                                               std::string distance, int64_t ignore_index, double label_smoothing) {
  Device::check(logits);
  Forward p;
  const Inputs inputs(logits, target, weight, {k, space, distance, ignore_index, label_smoothing}, p);
  Tensor cross_entropy = new_rows(logits, {}), penalty = new_rows(logits, {}), stats = new_rows(logits, kStats);
  p.cross_entropy = cross_entropy.mutable_data_ptr();
  p.penalty = penalty.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  Device::forward(logits, p, inputs);
  return {cross_entropy, penalty, stats};
}

template <class Device>
void write_gradient(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    const Tensor& stats_, const Tensor& grad_cross_entropy_, const Tensor& grad_penalty_,
                    const Options& options, const Tensor& gradient) {
  Backward p;
  const Inputs inputs(logits, target, weight, options, p);
  const ScalarType type = compute_type(logits);
  const Tensor stats = numbers(stats_, "stats", logits, type, p.rows * kStats);
  const Tensor grad_cross_entropy = numbers(grad_cross_entropy_, "grad_cross_entropy", logits, type, p.rows);
  const Tensor grad_penalty = numbers(grad_penalty_, "grad_penalty", logits, type, p.rows);
  p.stats = stats.const_data_ptr();
  p.grad_cross_entropy = grad_cross_entropy.const_data_ptr();
  p.grad_penalty = grad_penalty.const_data_ptr();
  p.gradient = gradient.mutable_data_ptr();
  p.gradient_layout = layout_of(gradient);
  Device::backward(logits, p, inputs);
}

template <class Device>
Tensor token_gradient(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                      const Tensor& stats, const Tensor& grad_cross_entropy, const Tensor& grad_penalty, int64_t k,
                      std::string space, std::string distance, int64_t ignore_index, double label_smoothing) {
  Device::check(logits);
  const Tensor gradient = Device::new_gradient(logits);
  write_gradient<Device>(logits, target, weight, stats, grad_cross_entropy, grad_penalty,
                         {k, space, distance, ignore_index, label_smoothing}, gradient);
  return gradient;
}

template <class Device>
void token_gradient_(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                     const Tensor& stats, const Tensor& grad_cross_entropy, const Tensor& grad_penalty, int64_t k,
                     std::string space, std::string distance, int64_t ignore_index, double label_smoothing) {
  Device::check(logits);
  write_gradient<Device>(logits, target, weight, stats, grad_cross_entropy, grad_penalty,
                         {k, space, distance, ignore_index, label_smoothing}, logits);
}

// To be raised with every change of the schemas or the statistics, together with INTERFACE in
// prsl_kernels/backends/native.py.
constexpr int kInterface = 1;

}  // namespace prsl

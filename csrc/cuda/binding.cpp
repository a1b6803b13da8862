// The CUDA kernels as implementations of the operators that csrc/binding.cpp defines. A library of its own: where
// PyTorch comes without CUDA, it has no current stream, and this could not be loaded.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "operators.h"

namespace prsl {
namespace {

// Makes the device of the logits the current one, and finds what the kernels need besides.
struct Context {
  torch::stable::accelerator::DeviceGuard guard;
  std::optional<Tensor> sum;
  void* stream = nullptr;

  Context(const Tensor& logits, const Problem& p, const Inputs& inputs) : guard(logits.get_device_index()) {
    STD_TORCH_CHECK(p.classes <= kMaxClasses, "logits must have at most ", kMaxClasses, " classes");
    if (inputs.weight && p.label_smoothing != 0) {
      sum = torch::stable::sum(*inputs.weight, {}, false, ScalarType::Double);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  }

  const double* weight_sum() const { return sum ? sum->const_data_ptr<double>() : nullptr; }
};

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernels of prsl_kernels cannot run: ", error);
}

struct Cuda {
  static void check(const Tensor& logits) { STD_TORCH_CHECK(logits.is_cuda(), "logits must be on a CUDA device"); }

  static Tensor new_gradient(const Tensor& logits) { return torch::stable::empty_like(logits); }

  static void forward(const Tensor& logits, Forward& p, const Inputs& inputs) {
    const Context context(logits, p, inputs);
    check_launch(launch_forward(dtype_of(logits), p, context.weight_sum(), context.stream));
  }

  static void backward(const Tensor& logits, Backward& p, const Inputs& inputs) {
    const Context context(logits, p, inputs);
    check_launch(launch_backward(dtype_of(logits), p, context.weight_sum(), context.stream));
  }
};

}  // namespace
}  // namespace prsl

STABLE_TORCH_LIBRARY_IMPL(prsl_native, CUDA, m) {
  m.impl("token_terms", TORCH_BOX(&prsl::token_terms<prsl::Cuda>));
  m.impl("token_gradient", TORCH_BOX(&prsl::token_gradient<prsl::Cuda>));
  m.impl("token_gradient_", TORCH_BOX(&prsl::token_gradient_<prsl::Cuda>));
}

// As in csrc/binding.cpp: which operators these implement.
extern "C" __attribute__((visibility("default"))) int prsl_interface() { return prsl::kInterface; }

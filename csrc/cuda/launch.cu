#include "cuda/launch.h"

#include "cuda/rows.cuh"

namespace prsl {
namespace {

// Several warps for each of a processor's four schedulers, and some parts of the row for each thread.
int threads_for(int64_t bytes_of_row, int most) {
  if (bytes_of_row <= 8 << 10) return 128;
  if (bytes_of_row <= 32 << 10) return 256;
  return bytes_of_row <= 128 << 10 && most > 512 ? 512 : most;
}

unsigned blocks_for(int64_t rows) { return unsigned(rows < INT32_MAX ? rows : INT32_MAX); }

// Shared memory, in bytes: what a block may have, and what a processor has for all of its blocks.
struct Shared {
  int block = 0, processor = 0;

  cudaError_t query() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
};

template <class E>
cudaError_t forward(const Forward& p, const double* weight_sum, cudaStream_t stream) {
  constexpr int64_t reserved = 1024;  // of each block, for the system
  const int64_t copy = bytes_of_copy<E>(p.classes), all = copy + int64_t(sizeof(Scratch<ScalarOf<E>>));
  int threads = threads_for(p.classes * int64_t(sizeof(E)), kForwardThreads<E>);
  Shared shared;
  if (const cudaError_t error = shared.query()) return error;
  if (all > shared.block) {
    forward_rows<E, false><<<blocks_for(p.rows), threads, 0, stream>>>(p, weight_sum);
    return cudaGetLastError();
  }
  // Two blocks hide each other's barriers; one that is alone needs all threads.
  if (2 * (all + reserved) > shared.processor) threads = kForwardThreads<E>;
  const auto kernel = forward_rows<E, true>;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, int(copy))) return error;
  kernel<<<blocks_for(p.rows), threads, size_t(copy), stream>>>(p, weight_sum);
  return cudaGetLastError();
}

template <class E>
cudaError_t backward(const Backward& p, const double* weight_sum, cudaStream_t stream) {
  const int threads = threads_for(p.classes * int64_t(sizeof(E)), kBackwardThreads<E>);
  const auto kernel = p.weight != nullptr && p.label_smoothing != 0 ? backward_rows<E, true> : backward_rows<E, false>;
  kernel<<<blocks_for(p.rows), threads, 0, stream>>>(p, weight_sum);
  return cudaGetLastError();
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* launch_forward(Dtype dtype, const Forward& p, const double* weight_sum, void* stream) {
  using Launch = cudaError_t (*)(const Forward&, const double*, cudaStream_t);
  constexpr Launch launches[] = {forward<float>, forward<double>, forward<BFloat16>, forward<Half>};
  return p.rows == 0 ? nullptr : message(launches[int(dtype)](p, weight_sum, static_cast<cudaStream_t>(stream)));
}

const char* launch_backward(Dtype dtype, const Backward& p, const double* weight_sum, void* stream) {
  using Launch = cudaError_t (*)(const Backward&, const double*, cudaStream_t);
  constexpr Launch launches[] = {backward<float>, backward<double>, backward<BFloat16>, backward<Half>};
  return p.rows == 0 ? nullptr : message(launches[int(dtype)](p, weight_sum, static_cast<cudaStream_t>(stream)));
}

}  // namespace prsl

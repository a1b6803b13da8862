// Runs the CUDA kernels on the CPU, in blocks of threads of the system: stand_in/cuda/device.h says what that shows.
//
// Computes problem after problem, until the input ends. tests/test_native_cuda.py writes the problems and reads the
// results; all numbers are in the machine's own format.
#include <cstdio>
#include <cstring>
#include <memory>

#include "cuda/rows.cuh"

namespace {

// Where the rows (sizes[0], sizes[1], classes) lie in an array of `count` elements, in units of elements.
struct Place {
  int64_t count, offset, strides[2], class_stride;
};

struct Header {
  int64_t dtype, sizes[2], classes, k, log_prob, l1, ignore_index, weighted;
  int64_t resident, threads, blocks;
  Place logits, gradient;  // of count 0: in place
  double label_smoothing, weight_sum;
};

// Of exactly its size, so that a sanitizer sees the first byte beyond it.
class Bytes {
 public:
  explicit Bytes(int64_t size) : size_(size_t(size)), data_(new char[size_]) { std::memset(data(), 0xff, size_); }
  char* data() const { return data_.get(); }
  bool read() const { return std::fread(data(), 1, size_, stdin) == size_; }
  bool write() const { return std::fwrite(data(), 1, size_, stdout) == size_; }

 private:
  size_t size_;
  std::unique_ptr<char[]> data_;
};

prsl::RowLayout layout_of(const Header& h, const Place& place) {
  prsl::RowLayout layout = {};
  layout.dims = 2;
  for (int dim = 0; dim < 2; ++dim) {
    layout.sizes[dim] = h.sizes[dim];
    layout.strides[dim] = place.strides[dim];
  }
  layout.class_stride = place.class_stride;
  return layout;
}

template <class E>
bool compute(const Header& h) {
  using T = prsl::ScalarOf<E>;
  const int64_t rows = h.sizes[0] * h.sizes[1], computed = sizeof(T);
  const Bytes logits(h.logits.count * int64_t(sizeof(E))), gradient(h.gradient.count * int64_t(sizeof(E)));
  const Bytes target(rows * int64_t(sizeof(int64_t))), weight(h.weighted != 0 ? h.classes * computed : 0);
  const Bytes grad_cross_entropy(rows * computed), grad_penalty(rows * computed);
  for (const Bytes* bytes : {&logits, &gradient, &target, &weight, &grad_cross_entropy, &grad_penalty}) {
    if (!bytes->read()) return false;
  }
  const Bytes cross_entropy(rows * computed), penalty(rows * computed), stats(rows * prsl::kStats * computed);
  const bool in_place = h.gradient.count == 0;
  const Place& to = in_place ? h.logits : h.gradient;

  prsl::Problem problem = {};
  problem.logits = reinterpret_cast<const E*>(logits.data()) + h.logits.offset;
  problem.layout = layout_of(h, h.logits);
  problem.rows = rows;
  problem.classes = h.classes;
  problem.target = reinterpret_cast<const int64_t*>(target.data());
  problem.weight = h.weighted != 0 ? weight.data() : nullptr;
  problem.k = h.k;
  problem.log_prob = h.log_prob != 0;
  problem.l1 = h.l1 != 0;
  problem.ignore_index = h.ignore_index;
  problem.label_smoothing = h.label_smoothing;
  const double* weight_sum = h.weighted != 0 ? &h.weight_sum : nullptr;
  const unsigned blocks = unsigned(h.blocks), threads = unsigned(h.threads);

  prsl::Forward forward = {};
  static_cast<prsl::Problem&>(forward) = problem;
  forward.cross_entropy = cross_entropy.data();
  forward.penalty = penalty.data();
  forward.stats = stats.data();
  if (h.resident != 0) {
    const size_t copy = size_t(prsl::bytes_of_copy<E>(h.classes));
    stand_in::launch(prsl::forward_rows<E, true>, blocks, threads, copy, forward, weight_sum);
  } else {
    stand_in::launch(prsl::forward_rows<E, false>, blocks, threads, 0, forward, weight_sum);
  }

  prsl::Backward backward = {};
  static_cast<prsl::Problem&>(backward) = problem;
  backward.stats = stats.data();
  backward.grad_cross_entropy = grad_cross_entropy.data();
  backward.grad_penalty = grad_penalty.data();
  backward.gradient = reinterpret_cast<E*>((in_place ? logits : gradient).data()) + to.offset;
  backward.gradient_layout = layout_of(h, to);
  const bool weighted = h.weighted != 0 && h.label_smoothing != 0;
  const auto kernel = weighted ? prsl::backward_rows<E, true> : prsl::backward_rows<E, false>;
  stand_in::launch(kernel, blocks, threads, 0, backward, weight_sum);

  for (const Bytes* bytes : {&cross_entropy, &penalty, &stats, in_place ? &logits : &gradient}) {
    if (!bytes->write()) return false;
  }
  return true;
}

bool compute_dtype(const Header& h) {
  switch (prsl::Dtype(h.dtype)) {
    case prsl::Dtype::float32:
      return compute<float>(h);
    case prsl::Dtype::float64:
      return compute<double>(h);
    case prsl::Dtype::bfloat16:
      return compute<prsl::BFloat16>(h);
    default:
      return compute<prsl::Half>(h);
  }
}

}  // namespace

int main() {
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) {
    if (!compute_dtype(header)) {
      std::fprintf(stderr, "a problem is cut short, or its result could not be written\n");
      return 1;
    }
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}

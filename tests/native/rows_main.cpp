// Runs the row kernels without PyTorch, so that they can be tested for processors that PyTorch is not installed for.
//
//   rows_main                     prints the names of the levels that the machine can run, best first
//   rows_main LEVEL <in >out      computes problem after problem, until the input ends
//
// tests/test_native_arm.py writes the problems and reads the results; all numbers are in the machine's own format.
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "closed_form.h"
#include "cpu/rows.h"

namespace {

struct Header {
  int64_t dtype, rows, classes, k, log_prob, l1, ignore_index, weighted;
  double label_smoothing, weight_sum;
};

// An array of its own and of exactly its size, so that a sanitizer sees the first byte beyond it. Filled with NaN, which
// nothing may read before it is written.
class Bytes {
 public:
  explicit Bytes(int64_t size) : size_(size_t(size)), data_(new char[size_]) { std::memset(data_.get(), 0xff, size_); }
  char* data() const { return data_.get(); }
  bool read() const { return std::fread(data(), 1, size_, stdin) == size_; }
  bool write() const { return std::fwrite(data(), 1, size_, stdout) == size_; }

 private:
  size_t size_;
  std::unique_ptr<char[]> data_;
};

prsl::RowLayout contiguous(int64_t rows, int64_t classes) {
  prsl::RowLayout layout = {};
  layout.dims = 1;
  layout.sizes[0] = rows;
  layout.strides[0] = classes;
  layout.class_stride = 1;
  return layout;
}

bool compute(const Header& h, const prsl::Level& level) {
  const prsl::Dtype dtype = prsl::Dtype(h.dtype);
  const bool half = dtype == prsl::Dtype::bfloat16 || dtype == prsl::Dtype::float16;
  const int64_t computed = dtype == prsl::Dtype::float64 ? 8 : 4, stored = half ? 2 : computed;

  const Bytes logits(h.rows * h.classes * stored), target(h.rows * int64_t(sizeof(int64_t)));
  const Bytes weight(h.weighted != 0 ? h.classes * computed : 0);
  const Bytes grad_cross_entropy(h.rows * computed), grad_penalty(h.rows * computed);
  for (const Bytes* bytes : {&logits, &target, &weight, &grad_cross_entropy, &grad_penalty}) {
    if (!bytes->read()) return false;
  }
  const Bytes cross_entropy(h.rows * computed), penalty(h.rows * computed), stats(h.rows * prsl::kStats * computed);
  const Bytes gradient(h.rows * h.classes * stored);

  prsl::Problem problem = {};
  problem.logits = logits.data();
  problem.layout = contiguous(h.rows, h.classes);
  problem.rows = h.rows;
  problem.classes = h.classes;
  problem.target = reinterpret_cast<const int64_t*>(target.data());
  problem.weight = h.weighted != 0 ? weight.data() : nullptr;
  problem.weight_sum = h.weight_sum;
  problem.k = h.k;
  problem.log_prob = h.log_prob != 0;
  problem.l1 = h.l1 != 0;
  problem.ignore_index = h.ignore_index;
  problem.label_smoothing = h.label_smoothing;

  prsl::Forward forward = {};
  static_cast<prsl::Problem&>(forward) = problem;
  forward.cross_entropy = cross_entropy.data();
  forward.penalty = penalty.data();
  forward.stats = stats.data();
  level.forward[h.dtype](forward, 0, h.rows, Bytes(prsl::scratch_bytes(h.classes)).data());

  prsl::Backward backward = {};
  static_cast<prsl::Problem&>(backward) = problem;
  backward.stats = stats.data();
  backward.grad_cross_entropy = grad_cross_entropy.data();
  backward.grad_penalty = grad_penalty.data();
  backward.gradient = gradient.data();
  backward.gradient_layout = problem.layout;
  level.backward[h.dtype](backward, 0, h.rows, Bytes(prsl::scratch_bytes(h.classes)).data());

  for (const Bytes* bytes : {&cross_entropy, &penalty, &stats, &gradient}) {
    if (!bytes->write()) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    for (const char* const* name = prsl::supported_levels(); *name != nullptr; ++name) std::puts(*name);
    return 0;
  }
  if (!prsl::use_level(argv[1])) {
    std::fprintf(stderr, "this machine has no level %s\n", argv[1]);
    return 1;
  }
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) {
    if (!compute(header, prsl::current_level())) {
      std::fprintf(stderr, "a problem is cut short, or its result could not be written\n");
      return 1;
    }
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}

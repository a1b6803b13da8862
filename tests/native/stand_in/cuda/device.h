// A GPU for the kernels of csrc/cuda that is a CPU: one thread of the system for each thread of a block, and one block
// after another. Found in the place of csrc/cuda/device.h where this folder comes first on the include path.
//
// It shows what does not depend on the machine: the arithmetic, the addresses, that accesses of 16 bytes are aligned,
// that nothing is read before it was copied, and, with ThreadSanitizer, that there is a barrier wherever one thread
// needs what another one wrote. The threads of a warp run freely here, so that relying on their pace shows, too.
//
// It cannot show: how weakly a GPU orders memory apart from barriers, what becomes of a shuffle in a warp that has
// diverged, what blocks that run at the same time do to each other, bank conflicts, the rounding of the GPU's own
// exponentials, the intrinsics and the assembly of the real header, and limits of registers, shared memory or time.
#pragma once

#include <math.h>

#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

struct Index {
  unsigned x;
};
struct float2 {
  float x, y;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

namespace stand_in {

constexpr unsigned kWarp = 32;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s in thread %u of block %u\n", what, threadIdx.x, blockIdx.x);
  std::abort();
}

struct Warp {
  std::barrier<> barrier{kWarp};
  uint64_t slots[2][kWarp];
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::atomic<int> counts[3] = {};
  std::unique_ptr<char[]> shared;  // of exactly the size asked for, so that a sanitizer sees the first byte beyond it

  Block(unsigned threads, size_t bytes) : barrier(threads), shared(new char[bytes]) {
    for (unsigned warp = 0; warp < threads / kWarp; ++warp) warps.push_back(std::make_unique<Warp>());
    std::memset(shared.get(), 0xff, bytes);  // NaN
  }
};
inline Block* block;

struct Copy {
  void* to;
  const void* from;
};
inline thread_local std::vector<Copy> copies;
inline thread_local unsigned counted, shuffled;  // how often

inline void require_aligned(const void* address) {
  require(reinterpret_cast<uintptr_t>(address) % 16 == 0, "an access of 16 bytes that is not aligned");
}

template <class P>
P load(const void* from) {
  if (sizeof(P) == 16) require_aligned(from);
  P part;
  std::memcpy(&part, from, sizeof(part));
  return part;
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, const Arguments&... arguments) {
  require(threads % kWarp == 0, "no whole number of warps");
  Block memory(threads, shared);
  block = &memory;
  blockDim.x = threads;
  gridDim.x = blocks;
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        kernel(arguments...);
        require(copies.empty(), "a copy that nobody waits for");
        block->barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace stand_in

inline void __syncthreads() { stand_in::block->barrier.arrive_and_wait(); }

// Of three counters in turn, each is reset when all have read it, and long before it is used again.
inline int __syncthreads_count(bool condition) {
  auto& counts = stand_in::block->counts;
  const unsigned turn = stand_in::counted++;
  counts[turn % 3].fetch_add(condition, std::memory_order_relaxed);
  stand_in::block->barrier.arrive_and_wait();
  if (threadIdx.x == 0) counts[(turn + 2) % 3].store(0, std::memory_order_relaxed);
  return counts[turn % 3].load(std::memory_order_relaxed);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  stand_in::Warp& warp = *stand_in::block->warps[threadIdx.x / stand_in::kWarp];
  const unsigned lane = threadIdx.x % stand_in::kWarp;
  auto& slots = warp.slots[stand_in::shuffled++ % 2];
  std::memcpy(&slots[lane], &value, sizeof(value));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &slots[lane ^ unsigned(mask)], sizeof(value));
  return value;
}

inline int atomicAdd(int* to, int number) { return __atomic_fetch_add(to, number, __ATOMIC_RELAXED); }

namespace prsl {

inline void* shared_bytes() { return stand_in::block->shared.get(); }

template <class P>
P load_shared(const void* from) {
  return stand_in::load<P>(from);
}

template <class P>
P load_global(const void* from) {
  return stand_in::load<P>(from);
}

template <class P>
void store_global(void* to, const P& part) {
  if (sizeof(P) == 16) stand_in::require_aligned(to);
  std::memcpy(to, &part, sizeof(part));
}

template <class P>
void start_copy(void* to, const void* from) {
  if (sizeof(P) != 16) {
    std::memcpy(to, from, sizeof(P));
    return;
  }
  stand_in::require_aligned(from);
  stand_in::require_aligned(to);
  stand_in::copies.push_back({to, from});
}

inline void wait_for_copies() {
  for (const stand_in::Copy& copy : stand_in::copies) std::memcpy(copy.to, copy.from, 16);
  stand_in::copies.clear();
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float value = magnitude < 0x400u ? float(magnitude) * 0x1p-24f
                                         : std::bit_cast<float>((magnitude << 13) + ((127u - 15u) << 23));
  return sign != 0 ? -value : value;
}

inline uint16_t half_of(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (!(size < 65520.0f)) return uint16_t(sign | (size != size ? 0x7fffu : 0x7c00u));
  if (size < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)));
  const uint32_t bits = std::bit_cast<uint32_t>(size) - ((127u - 15u) << 23);
  return uint16_t(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13);
}

inline uint16_t bfloat_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float2 floats_of_halves(uint32_t word) {
  return {float_of_half(uint16_t(word)), float_of_half(uint16_t(word >> 16))};
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  const float2 x = floats_of_halves(a), y = floats_of_halves(b);
  return half_of(std::fmax(x.x, y.x)) | uint32_t(half_of(std::fmax(x.y, y.y))) << 16;
}
inline uint32_t larger_bfloats(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) {
    return std::bit_cast<uint32_t>(std::fmax(std::bit_cast<float>(x), std::bit_cast<float>(y)));
  };
  return larger(a << 16, b << 16) >> 16 | (larger(a & 0xffff0000u, b & 0xffff0000u) & 0xffff0000u);
}
inline uint32_t halves_of(float low, float high) { return half_of(low) | uint32_t(half_of(high)) << 16; }
inline uint32_t bfloats_of(float low, float high) { return bfloat_of(low) | uint32_t(bfloat_of(high)) << 16; }

}  // namespace prsl

// What the kernels need of a GPU beyond the language: tests/native/stand_in/cuda/device.h has the same for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace prsl {

// The dynamic shared memory of the block.
__device__ inline void* shared_bytes() {
  extern __shared__ uint4 bytes[];
  return bytes;
}

// A part of a row: in one access, so the address must be a multiple of its size, 16 bytes or that of a single number.
template <class P>
__device__ inline P load_shared(const void* from) {
  if constexpr (sizeof(P) < 16) return *static_cast<const P*>(from);
  const uint4 bits = *static_cast<const uint4*>(from);
  P part;
  memcpy(&part, &bits, sizeof(part));
  return part;
}

// The compiler does not see that it is global memory, and would allow for shared memory. Not volatile: no thread writes
// what another one reads, and none reads again what it has written.
template <class P>
__device__ inline P load_global(const void* from) {
  if constexpr (sizeof(P) < 16) return *static_cast<const P*>(from);
  uint4 bits;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
      : "l"(__cvta_generic_to_global(from)));
  P part;
  memcpy(&part, &bits, sizeof(part));
  return part;
}

template <class P>
__device__ inline void store_global(void* to, const P& part) {
  if constexpr (sizeof(P) < 16) {
    *static_cast<P*>(to) = part;
  } else {
    uint4 bits;
    memcpy(&bits, &part, sizeof(bits));
    *static_cast<uint4*>(to) = bits;
  }
}

// From global to shared memory, there after wait_for_copies() and, for other threads, a barrier. No register waits.
template <class P>
__device__ inline void start_copy(void* to, const void* from) {
  if constexpr (sizeof(P) < 16) {
    *static_cast<P*>(to) = *static_cast<const P*>(from);
  } else {
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
    const size_t global = __cvta_generic_to_global(from);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  }
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One instruction, and within 2^-22 of 2^x; zero where that is subnormal.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers of half precision in a word, the first in its low bits. Rounded to nearest, ties to even; of a number and
// NaN, the number is the larger one.
__device__ inline float2 floats_of_halves(uint32_t word) {
  __half2 halves;
  memcpy(&halves, &word, sizeof(word));
  return __half22float2(halves);
}
template <class Pair>
__device__ inline uint32_t word_of(const Pair& pair) {
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ inline uint32_t halves_of(float low, float high) { return word_of(__floats2half2_rn(low, high)); }
__device__ inline uint32_t bfloats_of(float low, float high) { return word_of(__floats2bfloat162_rn(low, high)); }
__device__ inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  __half2 x, y;
  memcpy(&x, &a, sizeof(a));
  memcpy(&y, &b, sizeof(b));
  return word_of(__hmax2(x, y));
}
__device__ inline uint32_t larger_bfloats(uint32_t a, uint32_t b) {
  __nv_bfloat162 x, y;
  memcpy(&x, &a, sizeof(a));
  memcpy(&y, &b, sizeof(b));
  return word_of(__hmax2(x, y));
}

}  // namespace prsl

// Vectors of float32 for kernels that are compiled once for each instruction set, into the namespace BEVT_INSTRUCTIONS.
//
// Vectors are the compiler's own (GCC, Clang), so that there is one source. Nothing here, nor in a file that includes
// this, may have external linkage but a table of functions, and no header with functions but intrinsics may be
// included: the linker would merge them across instruction sets, perhaps into their AVX-512 form.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr float kLog2E = 1.44269504088896341f;

#define BEVT_INLINED __attribute__((always_inline))
#define BEVT_INLINE BEVT_INLINED inline

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

BEVT_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

using Vector = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Mask = int32_t __attribute__((vector_size(4 * kLanes)));

BEVT_INLINE Vector load(const float* source) {
  Vector x;
  __builtin_memcpy(&x, source, sizeof(x));
  return x;
}

BEVT_INLINE void store(float* target, Vector x) { __builtin_memcpy(target, &x, sizeof(x)); }

BEVT_INLINE Vector broadcast(float x) { return x - Vector{}; }

// The larger; `b` where either is NaN. Compilers make two instructions of the comparison.
BEVT_INLINE Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // all lanes; GCC 12 warns of the plain form
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

BEVT_INLINE float sum(Vector x) {
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += x[lane];
  return result;
}

// 2^x for x < 128, within 0.7 units in the last place; 0 below -126.5; NaN for NaN.
BEVT_INLINE Vector exp2(Vector x) {
  // Adding 1.5 * 2^23 rounds to integers, which then are the low bits: here with 127, the bias of an exponent.
  const Vector shift = broadcast(12582912.0f + 127.0f);
  x = maximum(broadcast(-127.0f), x);
  const Vector whole = x + shift;
  const Vector f = x - (whole - shift);  // in [-1/2, 1/2]
  // Minimax for the relative error (2e-9) with p(0) = 1.
  Vector p = broadcast(1.5353361959569156e-4f);
  p = p * f + broadcast(1.3398875016719103e-3f);
  p = p * f + broadcast(9.61843691766262e-3f);
  p = p * f + broadcast(5.5503323674201965e-2f);
  p = p * f + broadcast(0.24022647738456726f);
  p = p * f + broadcast(0.6931471824645996f);
  p = p * f + broadcast(1.0f);
  // -127 gives the bits of 0. A product, so that NaN stays NaN.
  return p * reinterpret_cast<Vector>(reinterpret_cast<Bits>(whole) << 23);
}

}  // namespace
}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels

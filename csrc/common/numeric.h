// 16-bit floats as bit patterns, and their conversion to float32, in which all arithmetic is done.
// No torch, and no CUDA headers on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CUMA_INLINE __host__ __device__ __forceinline__
#else
#define CUMA_INLINE inline
#endif

namespace cuma {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

CUMA_INLINE float to_float(float x) { return x; }

CUMA_INLINE float to_float(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &wide, sizeof y);
  return y;
}

CUMA_INLINE float to_float(Float16 x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 h;
  memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
#endif
}

CUMA_INLINE void from_float(float x, float& out) { out = x; }

// Round to nearest, ties to even; NaN stays NaN.
CUMA_INLINE void from_float(float x, BFloat16& out) {
#if defined(__CUDACC__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  uint32_t wide;
  memcpy(&wide, &x, sizeof wide);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

CUMA_INLINE void from_float(float x, Float16& out) {
#if defined(__CUDACC__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const _Float16 h = static_cast<_Float16>(x);
  memcpy(&out.bits, &h, sizeof h);
#endif
}

CUMA_INLINE bool is_finite(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

// e^x for x <= 0 (softmax). On the host a polynomial that compilers vectorise, within 2 ulp of expf, and 0 below -87.
CUMA_INLINE float exp_nonpositive(float x) {
#if defined(__CUDACC__)
  return expf(x);
#else
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
#endif
}

}  // namespace cuma

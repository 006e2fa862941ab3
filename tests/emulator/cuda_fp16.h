// The conversions the kernels use, by the host's own 16-bit float.
#pragma once
#include "emulator.h"

inline _Float16 __ushort_as_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t __half_as_ushort(_Float16 x) { return static_cast<uint16_t>(emulator::to_bits(x)); }
inline float __half2float(_Float16 x) { return static_cast<float>(x); }
inline _Float16 __float2half_rn(float x) { return static_cast<_Float16>(x); }

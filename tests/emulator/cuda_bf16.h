// The conversions the kernels use: the nearer of the two bfloat16 around x, of equally near ones the even.
#pragma once
#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t wide = static_cast<uint32_t>(emulator::to_bits(x)), rest = wide & 0xffffu;
  const uint16_t below = static_cast<uint16_t>(wide >> 16);
  const bool up = rest > 0x8000u || (rest == 0x8000u && (below & 1u) != 0);
  return {static_cast<uint16_t>(below + (up ? 1 : 0))};
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

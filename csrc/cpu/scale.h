// The gate scale on the CPU, a range of tokens at a time. Shapes: T tokens, E experts, K active, r rank.
#pragma once

#include <algorithm>

#include "../common/numeric.h"

namespace cuma::cpu {

template <typename T>
struct ScaleArguments {
  const T* z;  // [T, E, r], or [T, r] when A is shared
  const float* weight_TK;
  const int32_t* expert_TK;  // -1: not routed
  int experts;
  int top_k;
  int64_t rank;
  bool shared;
  float scale;  // alpha / r

  const T* z_row(int64_t t, int expert) const { return shared ? z + t * rank : z + (t * experts + expert) * rank; }
};

// out[t, e, :] = scale * weight * z[t, e, :] for the chosen experts, zero elsewhere.
// Returns false at an expert outside [-1, E).
template <typename T>
bool scale_forward(const ScaleArguments<T>& a, int64_t begin, int64_t end, T* out_TER) {
  const int64_t width = a.experts * a.rank;
  bool good = true;
  for (int64_t t = begin; t < end; ++t) {
    T* out_ER = out_TER + t * width;
    std::memset(static_cast<void*>(out_ER), 0, width * sizeof(T));
    for (int k = 0; k < a.top_k; ++k) {
      const int expert = a.expert_TK[t * a.top_k + k];
      if (expert < 0 || expert >= a.experts) {
        good &= expert == -1;
        continue;
      }
      const float factor = a.scale * a.weight_TK[t * a.top_k + k];
      const T* __restrict z_R = a.z_row(t, expert);
      T* __restrict out_R = out_ER + expert * a.rank;
      for (int64_t j = 0; j < a.rank; ++j) from_float(factor * to_float(z_R[j]), out_R[j]);
    }
  }
  return good;
}

// Gradients of scale_forward, written to d_z and d_weight; scratch_R is overwritten.
// Returns false at an expert outside [-1, E).
template <typename T>
bool scale_backward(const ScaleArguments<T>& a, int64_t begin, int64_t end, const T* d_out_TER, T* d_z,
                    float* d_weight_TK, float* scratch_R) {
  const int64_t width = a.experts * a.rank;
  const int64_t z_width = a.shared ? a.rank : width;
  bool good = true;
  for (int64_t t = begin; t < end; ++t) {
    const T* d_out_ER = d_out_TER + t * width;
    T* d_z_row = d_z + t * z_width;
    if (a.shared) {
      std::fill_n(scratch_R, a.rank, 0.0f);
    } else {
      std::memset(static_cast<void*>(d_z_row), 0, width * sizeof(T));
    }
    for (int k = 0; k < a.top_k; ++k) {
      const int expert = a.expert_TK[t * a.top_k + k];
      if (expert < 0 || expert >= a.experts) {
        good &= expert == -1;
        d_weight_TK[t * a.top_k + k] = 0.0f;
        continue;
      }
      const float factor = a.scale * a.weight_TK[t * a.top_k + k];
      const T* __restrict z_R = a.z_row(t, expert);
      const T* __restrict d_out_R = d_out_ER + expert * a.rank;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < a.rank; ++j) dot += to_float(d_out_R[j]) * to_float(z_R[j]);
      d_weight_TK[t * a.top_k + k] = a.scale * dot;
      if (a.shared) {
        for (int64_t j = 0; j < a.rank; ++j) scratch_R[j] += factor * to_float(d_out_R[j]);
      } else {
        T* __restrict d_z_R = d_z_row + expert * a.rank;
        for (int64_t j = 0; j < a.rank; ++j) from_float(factor * to_float(d_out_R[j]), d_z_R[j]);
      }
    }
    if (a.shared) {
      for (int64_t j = 0; j < a.rank; ++j) from_float(scratch_R[j], d_z_row[j]);
    }
  }
  return good;
}

}  // namespace cuma::cpu

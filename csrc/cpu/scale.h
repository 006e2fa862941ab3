// The gate scale on the CPU, a range of tokens at a time. Shapes: T tokens, E experts, K active, r rank, N profiles.
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

// out[t, e, :] = scale * weight * z[t, e, :] for the chosen experts, zero elsewhere; false at an expert outside [-1, E).
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

// The share of its weight gradients that token t may send to an expert; 1 without a mask. `good` turns false at a bad index.
inline float allowed_share(const float* mask_NE, const int64_t* profile_index_T, int64_t profiles, int experts, int64_t t, int expert,
                           bool& good) {
  if (mask_NE == nullptr) return 1.0f;
  const int64_t row = profile_index_T[t];
  if (row >= 0 && row < profiles) return mask_NE[row * experts + expert];
  good &= row == -1;
  return 0.0f;
}

// Gradients of scale_forward. d_z and d_weight ignore the mask; masked_d_z and masked_out (null without a mask) are what the
// gradients of A and B may see of each token. False at an index out of range.
template <typename T>
bool scale_backward(const ScaleArguments<T>& a, int64_t begin, int64_t end, const T* d_out_TER, const float* mask_NE,
                    const int64_t* profile_index_T, int64_t profiles, T* d_z, float* d_weight_TK, T* masked_d_z, T* masked_out_TER,
                    float* scratch_2R) {
  const int64_t width = a.experts * a.rank;
  const int64_t z_width = a.shared ? a.rank : width;
  bool good = true;
  for (int64_t t = begin; t < end; ++t) {
    const T* d_out_ER = d_out_TER + t * width;
    T* d_z_row = d_z + t * z_width;
    T* masked_row = masked_d_z != nullptr ? masked_d_z + t * z_width : nullptr;
    if (masked_out_TER != nullptr) std::memset(static_cast<void*>(masked_out_TER + t * width), 0, width * sizeof(T));
    if (a.shared) {
      std::fill_n(scratch_2R, 2 * a.rank, 0.0f);
    } else {
      std::memset(static_cast<void*>(d_z_row), 0, width * sizeof(T));
      if (masked_row != nullptr) std::memset(static_cast<void*>(masked_row), 0, width * sizeof(T));
    }
    for (int k = 0; k < a.top_k; ++k) {
      const int expert = a.expert_TK[t * a.top_k + k];
      if (expert < 0 || expert >= a.experts) {
        good &= expert == -1;
        d_weight_TK[t * a.top_k + k] = 0.0f;
        continue;
      }
      const float factor = a.scale * a.weight_TK[t * a.top_k + k];
      const float share = allowed_share(mask_NE, profile_index_T, profiles, a.experts, t, expert, good);
      const T* __restrict z_R = a.z_row(t, expert);
      const T* __restrict d_out_R = d_out_ER + expert * a.rank;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < a.rank; ++j) dot += to_float(d_out_R[j]) * to_float(z_R[j]);
      d_weight_TK[t * a.top_k + k] = a.scale * dot;
      if (a.shared) {
        float* __restrict all_R = scratch_2R;
        float* __restrict allowed_R = scratch_2R + a.rank;
        for (int64_t j = 0; j < a.rank; ++j) {
          const float d = factor * to_float(d_out_R[j]);
          all_R[j] += d;
          allowed_R[j] += share * d;
        }
      } else {
        T* __restrict d_z_R = d_z_row + expert * a.rank;
        for (int64_t j = 0; j < a.rank; ++j) from_float(factor * to_float(d_out_R[j]), d_z_R[j]);
        if (masked_row != nullptr) {
          T* __restrict masked_R = masked_row + expert * a.rank;
          for (int64_t j = 0; j < a.rank; ++j) from_float(share * factor * to_float(d_out_R[j]), masked_R[j]);
        }
      }
      if (masked_out_TER != nullptr) {
        T* __restrict masked_out_R = masked_out_TER + t * width + expert * a.rank;
        for (int64_t j = 0; j < a.rank; ++j) from_float(share * factor * to_float(z_R[j]), masked_out_R[j]);
      }
    }
    if (a.shared) {
      for (int64_t j = 0; j < a.rank; ++j) from_float(scratch_2R[j], d_z_row[j]);
      if (masked_row != nullptr) {
        for (int64_t j = 0; j < a.rank; ++j) from_float(scratch_2R[a.rank + j], masked_row[j]);
      }
    }
  }
  return good;
}

}  // namespace cuma::cpu

// Sorting token-to-expert assignments on the CPU.
// Shapes: T tokens, K active, M = T * K assignments, E experts, W features.
#pragma once

#include <algorithm>

#include "../common/numeric.h"

namespace cuma::cpu {

// Adds the number of assignments [begin, end) per expert to count_E. Returns false at an expert outside [-1, E).
inline bool count_experts(const int32_t* expert_M, int64_t begin, int64_t end, int experts, int32_t* count_E) {
  bool good = true;
  for (int64_t m = begin; m < end; ++m) {
    const int32_t expert = expert_M[m];
    if (expert >= 0 && expert < experts) {
      ++count_E[expert];
    } else {
      good &= expert == -1;
    }
  }
  return good;
}

// Places the assignments [begin, end) stably. next_E holds the next free place of each expert.
inline void place_experts(const int32_t* expert_M, int64_t begin, int64_t end, int experts, int32_t* next_E,
                          int32_t* order_M, int32_t* position_M) {
  for (int64_t m = begin; m < end; ++m) {
    const int32_t expert = expert_M[m];
    if (expert < 0 || expert >= experts) {
      position_M[m] = -1;
      continue;
    }
    const int32_t place = next_E[expert]++;
    order_M[place] = static_cast<int32_t>(m);
    position_M[m] = place;
  }
}

// out[m, :] = x[order[m] / top_k, :], times weight[order[m]] if given; zero where order is -1.
// Returns false at an index out of range.
template <typename T>
bool gather_rows(const T* x_TW, const int32_t* order_M, const float* weight_M, int64_t begin, int64_t end,
                 int64_t assignments, int top_k, int64_t width, T* out_MW) {
  bool good = true;
  for (int64_t m = begin; m < end; ++m) {
    T* __restrict out_W = out_MW + m * width;
    const int32_t from = order_M[m];
    if (from < 0 || from >= assignments) {
      good &= from == -1;
      std::memset(static_cast<void*>(out_W), 0, width * sizeof(T));
      continue;
    }
    const T* __restrict x_W = x_TW + (from / top_k) * width;
    if (weight_M == nullptr) {
      std::memcpy(static_cast<void*>(out_W), x_W, width * sizeof(T));
    } else {
      const float weight = weight_M[from];
      for (int64_t j = 0; j < width; ++j) from_float(weight * to_float(x_W[j]), out_W[j]);
    }
  }
  return good;
}

// out[t, :] = sum_k weight[t, k] * y[position[t, k], :], in the order of k; weight 1 if null.
// Returns false at an index out of range.
template <typename T>
bool scatter_rows(const T* y_MW, const int32_t* position_TK, const float* weight_TK, int64_t begin, int64_t end,
                  int64_t rows, int top_k, int64_t width, T* out_TW) {
  constexpr int64_t kBlock = 512;
  float sum[kBlock];
  bool good = true;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t start = 0; start < width; start += kBlock) {
      const int64_t size = std::min(kBlock, width - start);
      std::fill_n(sum, size, 0.0f);
      for (int k = 0; k < top_k; ++k) {
        const int32_t position = position_TK[t * top_k + k];
        if (position < 0 || position >= rows) {
          good &= position == -1;
          continue;
        }
        const float weight = weight_TK != nullptr ? weight_TK[t * top_k + k] : 1.0f;
        const T* __restrict y_W = y_MW + position * width + start;
        for (int64_t j = 0; j < size; ++j) sum[j] += weight * to_float(y_W[j]);
      }
      T* __restrict out_W = out_TW + t * width + start;
      for (int64_t j = 0; j < size; ++j) from_float(sum[j], out_W[j]);
    }
  }
  return good;
}

// out[t, k] = <d[t, :], y[position[t, k], :]>, zero where position is -1.
// Returns false at an index out of range.
template <typename T>
bool row_products(const T* d_TW, const T* y_MW, const int32_t* position_TK, int64_t begin, int64_t end, int64_t rows,
                  int top_k, int64_t width, float* out_TK) {
  bool good = true;
  for (int64_t t = begin; t < end; ++t) {
    for (int k = 0; k < top_k; ++k) {
      const int32_t position = position_TK[t * top_k + k];
      float dot = 0;
      if (position >= 0 && position < rows) {
        const T* __restrict d_W = d_TW + t * width;
        const T* __restrict y_W = y_MW + position * width;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; ++j) dot += to_float(d_W[j]) * to_float(y_W[j]);
      } else {
        good &= position == -1;
      }
      out_TK[t * top_k + k] = dot;
    }
  }
  return good;
}

}  // namespace cuma::cpu

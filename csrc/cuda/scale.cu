// The gate scale on CUDA: memory-bound, 16 bytes a thread where rows allow it.

#include "device.h"

namespace cuma::cuda {
namespace {

struct ScaleShape {
  int64_t tokens;
  int experts, top_k, rank;
  bool shared;
  float scale;
};

// Which of its K choices sends token t to this expert; -1 if none does.
__device__ __forceinline__ int choice_of(const int32_t* expert_TK, int64_t t, int top_k, int expert) {
  const int32_t* expert_K = expert_TK + t * top_k;
  if (expert < top_k && expert_K[expert] == expert) return expert;  // all experts chosen: no search
  for (int k = 0; k < top_k; ++k) {
    if (expert_K[k] == expert) return k;
  }
  return -1;
}

// out[t, e, :] = factor * source[t, e, :] where t chose e, zero elsewhere.
template <typename T, int kSize>
__global__ void scale_spread(const T* source, bool source_shared, const float* weight_TK, const int32_t* expert_TK,
                             ScaleShape s, T* out_TER) {
  const int64_t t = grid_row();
  if (t >= s.tokens) return;
  const int steps_per_expert = s.rank / kSize, steps = s.experts * steps_per_expert;
  for (int i = static_cast<int>(threadIdx.x); i < steps; i += static_cast<int>(blockDim.x)) {
    const int expert = i / steps_per_expert;
    const int64_t place = t * s.experts * s.rank + static_cast<int64_t>(i) * kSize;
    const int k = choice_of(expert_TK, t, s.top_k, expert);
    Vector<T, kSize> value{};
    if (k >= 0) {
      const int64_t from = source_shared ? t * s.rank + static_cast<int64_t>(i % steps_per_expert) * kSize : place;
      value = scaled(load_vector<T, kSize>(source + from), s.scale * weight_TK[t * s.top_k + k]);
    }
    store_vector<T, kSize>(out_TER + place, value);
  }
}

// d_z[t, :] = sum_k factor_k * d_out[t, expert_k, :] for a shared A.
template <typename T>
__global__ void scale_collect(const T* d_out_TER, const float* weight_TK, const int32_t* expert_TK, ScaleShape s,
                              T* d_z_TR) {
  const int64_t t = grid_row();
  if (t >= s.tokens) return;
  for (int j = static_cast<int>(threadIdx.x); j < s.rank; j += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int k = 0; k < s.top_k; ++k) {
      const int expert = expert_TK[t * s.top_k + k];
      if (expert < 0 || expert >= s.experts) continue;
      const float factor = s.scale * weight_TK[t * s.top_k + k];
      sum += factor * to_float(d_out_TER[(t * s.experts + expert) * s.rank + j]);
    }
    from_float(sum, d_z_TR[t * s.rank + j]);
  }
}

// d_weight[t, k] = scale * <d_out[t, expert_k, :], z[t, expert_k, :]>, by kGroup lanes.
template <typename T, int kGroup>
__global__ void scale_products(const T* d_out_TER, const T* z, const int32_t* expert_TK, ScaleShape s,
                               float* d_weight_TK) {
  const int64_t m = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const bool inside = m < s.tokens * s.top_k;
  const int64_t t = m / s.top_k;
  const int expert = inside ? expert_TK[m] : -1;
  float dot = 0.0f;
  if (expert >= 0 && expert < s.experts) {
    const T* d_out_R = d_out_TER + (t * s.experts + expert) * s.rank;
    const T* z_R = s.shared ? z + t * s.rank : z + (t * s.experts + expert) * s.rank;
    for (int j = lane; j < s.rank; j += kGroup) dot += to_float(d_out_R[j]) * to_float(z_R[j]);
  }
  dot = group_sum<kGroup>(dot);
  if (inside && lane == 0) d_weight_TK[m] = s.scale * dot;
}

template <typename T>
void launch_spread(const T* source, bool source_shared, const float* weight_TK, const int32_t* expert_TK,
                   const ScaleShape& s, T* out_TER, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const bool wide = can_vectorise<T>(s.rank, source, out_TER);
  const RowGrid rows = row_grid(s.tokens, static_cast<int64_t>(s.experts) * s.rank / (wide ? kSize : 1));
  if (wide) {
    scale_spread<T, kSize><<<rows.grid, rows.block, 0, stream>>>(source, source_shared, weight_TK, expert_TK, s,
                                                                 out_TER);
  } else {
    scale_spread<T, 1><<<rows.grid, rows.block, 0, stream>>>(source, source_shared, weight_TK, expert_TK, s, out_TER);
  }
}

}  // namespace

template <typename T>
void scale_forward(const T* z, const float* weight_TK, const int32_t* expert_TK, int64_t tokens, int experts, int top_k,
                   int rank, bool shared, float scale, T* out_TER, cudaStream_t stream) {
  const ScaleShape s{tokens, experts, top_k, rank, shared, scale};
  launch_spread<T>(z, shared, weight_TK, expert_TK, s, out_TER, stream);
}

template <typename T>
void scale_backward(const T* d_out_TER, const T* z, const float* weight_TK, const int32_t* expert_TK, int64_t tokens,
                    int experts, int top_k, int rank, bool shared, float scale, T* d_z, float* d_weight_TK,
                    cudaStream_t stream) {
  const ScaleShape s{tokens, experts, top_k, rank, shared, scale};
  if (rank > 0 && shared) {
    const RowGrid rows = row_grid(tokens, rank);
    scale_collect<T><<<rows.grid, rows.block, 0, stream>>>(d_out_TER, weight_TK, expert_TK, s, d_z);
  } else if (rank > 0) {
    launch_spread<T>(d_out_TER, false, weight_TK, expert_TK, s, d_z, stream);
  }
  constexpr int kGroup = 8;
  scale_products<T, kGroup><<<blocks_for(tokens * top_k * kGroup), kThreads, 0, stream>>>(d_out_TER, z, expert_TK, s,
                                                                                          d_weight_TK);
}

#define CUMA_BUILD(T)                                                                                                \
  template void scale_forward<T>(const T*, const float*, const int32_t*, int64_t, int, int, int, bool, float, T*,    \
                                 cudaStream_t);                                                                      \
  template void scale_backward<T>(const T*, const T*, const float*, const int32_t*, int64_t, int, int, int, bool,    \
                                  float, T*, float*, cudaStream_t);
CUMA_FOR_EACH_TYPE(CUMA_BUILD)

}  // namespace cuma::cuda

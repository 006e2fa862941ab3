// The gate scale on CUDA: memory-bound, 16 bytes a thread where rows allow it.

#include "device.h"

namespace cuma::cuda {
namespace {

struct ScaleShape {
  int64_t tokens, profiles;
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

__device__ __forceinline__ float allowed_share(const float* mask_NE, const int64_t* profile_index_T, const ScaleShape& s, int64_t t,
                                               int expert) {
  if (mask_NE == nullptr) return 1.0f;
  const int64_t row = profile_index_T[t];
  return row >= 0 && row < s.profiles ? mask_NE[row * s.experts + expert] : 0.0f;
}

// out[t, e, :] = factor * source[t, e, :] where t chose e, zero elsewhere; with `masked_TER` also that times the mask.
template <typename T, int kSize>
__global__ void scale_spread(const T* source, bool source_shared, const float* weight_TK, const int32_t* expert_TK, const float* mask_NE,
                             const int64_t* profile_index_T, ScaleShape s, T* out_TER, T* masked_TER) {
  const int64_t t = grid_row();
  if (t >= s.tokens) return;
  const int steps_per_expert = s.rank / kSize, steps = s.experts * steps_per_expert;
  for (int i = static_cast<int>(threadIdx.x); i < steps; i += static_cast<int>(blockDim.x)) {
    const int expert = i / steps_per_expert;
    const int64_t place = t * s.experts * s.rank + static_cast<int64_t>(i) * kSize;
    const int k = choice_of(expert_TK, t, s.top_k, expert);
    Vector<T, kSize> value{};
    float factor = 0.0f, share = 0.0f;
    if (k >= 0) {
      factor = s.scale * weight_TK[t * s.top_k + k];
      share = allowed_share(mask_NE, profile_index_T, s, t, expert);
      const int64_t from = source_shared ? t * s.rank + static_cast<int64_t>(i % steps_per_expert) * kSize : place;
      value = load_vector<T, kSize>(source + from);
    }
    if (out_TER != nullptr) store_vector<T, kSize>(out_TER + place, k >= 0 ? scaled(value, factor) : value);
    if (masked_TER != nullptr) store_vector<T, kSize>(masked_TER + place, k >= 0 ? scaled(value, share * factor) : value);
  }
}

// d_z[t, :] = sum_k factor_k * d_out[t, expert_k, :] for a shared A; masked_d_z the same times the mask.
template <typename T>
__global__ void scale_collect(const T* d_out_TER, const float* weight_TK, const int32_t* expert_TK, const float* mask_NE,
                              const int64_t* profile_index_T, ScaleShape s, T* d_z_TR, T* masked_d_z_TR) {
  const int64_t t = grid_row();
  if (t >= s.tokens) return;
  for (int j = static_cast<int>(threadIdx.x); j < s.rank; j += static_cast<int>(blockDim.x)) {
    float all = 0.0f, allowed = 0.0f;
    for (int k = 0; k < s.top_k; ++k) {
      const int expert = expert_TK[t * s.top_k + k];
      if (expert < 0 || expert >= s.experts) continue;
      const float d = s.scale * weight_TK[t * s.top_k + k] * to_float(d_out_TER[(t * s.experts + expert) * s.rank + j]);
      all += d;
      allowed += allowed_share(mask_NE, profile_index_T, s, t, expert) * d;
    }
    from_float(all, d_z_TR[t * s.rank + j]);
    if (masked_d_z_TR != nullptr) from_float(allowed, masked_d_z_TR[t * s.rank + j]);
  }
}

// d_weight[t, k] = scale * <d_out[t, expert_k, :], z[t, expert_k, :]>, by kGroup lanes.
template <typename T, int kGroup>
__global__ void scale_products(const T* d_out_TER, const T* z, const int32_t* expert_TK, ScaleShape s, float* d_weight_TK) {
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
void launch_spread(const T* source, bool source_shared, const float* weight_TK, const int32_t* expert_TK, const float* mask_NE,
                   const int64_t* profile_index_T, const ScaleShape& s, T* out_TER, T* masked_TER, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const bool wide = can_vectorise<T>(s.rank, source, out_TER, masked_TER);
  const RowGrid rows = row_grid(s.tokens, static_cast<int64_t>(s.experts) * s.rank / (wide ? kSize : 1));
  if (wide) {
    scale_spread<T, kSize><<<rows.grid, rows.block, 0, stream>>>(source, source_shared, weight_TK, expert_TK, mask_NE, profile_index_T, s,
                                                                 out_TER, masked_TER);
  } else {
    scale_spread<T, 1><<<rows.grid, rows.block, 0, stream>>>(source, source_shared, weight_TK, expert_TK, mask_NE, profile_index_T, s,
                                                             out_TER, masked_TER);
  }
}

}  // namespace

template <typename T>
void scale_forward(const T* z, const float* weight_TK, const int32_t* expert_TK, int64_t tokens, int experts, int top_k, int rank,
                   bool shared, float scale, T* out_TER, cudaStream_t stream) {
  const ScaleShape s{tokens, 0, experts, top_k, rank, shared, scale};
  launch_spread<T>(z, shared, weight_TK, expert_TK, nullptr, nullptr, s, out_TER, nullptr, stream);
}

template <typename T>
void scale_backward(const T* d_out_TER, const T* z, const float* weight_TK, const int32_t* expert_TK, const float* mask_NE,
                    const int64_t* profile_index_T, int64_t tokens, int64_t profiles, int experts, int top_k, int rank, bool shared,
                    float scale, T* d_z, float* d_weight_TK, T* masked_d_z, T* masked_out_TER, cudaStream_t stream) {
  const ScaleShape s{tokens, profiles, experts, top_k, rank, shared, scale};
  if (rank > 0) {
    if (shared) {
      const RowGrid rows = row_grid(tokens, rank);
      scale_collect<T><<<rows.grid, rows.block, 0, stream>>>(d_out_TER, weight_TK, expert_TK, mask_NE, profile_index_T, s, d_z, masked_d_z);
    } else {
      launch_spread<T>(d_out_TER, false, weight_TK, expert_TK, mask_NE, profile_index_T, s, d_z, masked_d_z, stream);
    }
    if (masked_out_TER != nullptr) {
      launch_spread<T>(z, shared, weight_TK, expert_TK, mask_NE, profile_index_T, s, nullptr, masked_out_TER, stream);
    }
  }
  constexpr int kGroup = 8;
  scale_products<T, kGroup><<<blocks_for(tokens * top_k * kGroup), kThreads, 0, stream>>>(d_out_TER, z, expert_TK, s, d_weight_TK);
}

#define CUMA_BUILD(T)                                                                                                                   \
  template void scale_forward<T>(const T*, const float*, const int32_t*, int64_t, int, int, int, bool, float, T*, cudaStream_t);        \
  template void scale_backward<T>(const T*, const T*, const float*, const int32_t*, const float*, const int64_t*, int64_t, int64_t, int, \
                                  int, int, bool, float, T*, float*, T*, T*, cudaStream_t);
CUMA_FOR_EACH_TYPE(CUMA_BUILD)

}  // namespace cuma::cuda

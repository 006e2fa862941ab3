// The demographic gate on CUDA: kGroup lanes per token, kPer experts per lane; sums in a fixed order.

#include "device.h"

namespace cuma::cuda {
namespace {

constexpr float kMinusInfinity = -INFINITY;

struct GateShape {
  int64_t tokens, profiles;
  int experts, top_k;
  GateNorm norm;
};

// Loads the token's logits, kPer per lane (expert i * kGroup + lane): -inf past the last expert and where a logit is
// not finite. Returns whether all are finite.
template <typename T, int kGroup, int kPer>
__device__ bool load_logits(const T* hidden_TE, const float* profile_NE, int64_t t, int64_t row, int experts, int lane,
                            bool real, float (&logit)[kPer]) {
  float bad = 0.0f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int e = i * kGroup + lane;
    logit[i] = kMinusInfinity;
    if (real && e < experts) {
      const float profile = profile_NE != nullptr ? profile_NE[row * experts + e] : 0.0f;
      const float x = to_float(hidden_TE[t * experts + e]) + profile;
      if (is_finite(x)) {
        logit[i] = x;
      } else {
        bad = 1.0f;
      }
    }
  }
  return group_max<kGroup>(bad) == 0.0f;
}

template <int kGroup, int kPer>
__device__ float exponential_sum(const float (&logit)[kPer], float largest) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) total += exp_nonpositive(logit[i] - largest);
  return group_sum<kGroup>(total);
}

template <int kGroup, int kPer>
__device__ float largest_of(const float (&logit)[kPer]) {
  float largest = logit[0];
#pragma unroll
  for (int i = 1; i < kPer; ++i) largest = fmaxf(largest, logit[i]);
  return group_max<kGroup>(largest);
}

template <typename T, int kGroup, int kPer>
__global__ void gate_rows(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T, GateShape s,
                          float* weight_TK, int32_t* expert_TK) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kGroup;
  const bool inside = t < s.tokens;
  const int64_t row = inside ? profile_index_T[t] : -1;
  const bool real = row >= 0 && (profile_NE == nullptr || row < s.profiles);
  float logit[kPer];
  const bool routed = load_logits<T, kGroup, kPer>(hidden_TE, profile_NE, t, row, s.experts, lane, real, logit) && real;

  if (s.norm == kSoftmax) {
    const float largest = largest_of<kGroup, kPer>(logit);
    const float total = exponential_sum<kGroup, kPer>(logit, largest);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int e = i * kGroup + lane;
      if (inside && e < s.experts) {
        weight_TK[t * s.experts + e] = routed ? softmax_value(logit[i], largest, total) : 0.0f;
        expert_TK[t * s.experts + e] = routed ? e : -1;
      }
    }
    return;
  }

  // One round per choice; lane k keeps the k-th.
  unsigned taken = 0;
  float largest = 0.0f, mine = 0.0f;
  int my_expert = -1;
  for (int k = 0; k < s.top_k; ++k) {
    float best = kMinusInfinity;
    int best_expert = kMaxExperts;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int e = i * kGroup + lane;
      if ((taken >> i & 1u) == 0 && goes_first(logit[i], e, best, best_expert)) {
        best = logit[i];
        best_expert = e;
      }
    }
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, offset);
      const int other_expert = __shfl_xor_sync(kAllLanes, best_expert, offset);
      if (goes_first(other, other_expert, best, best_expert)) {
        best = other;
        best_expert = other_expert;
      }
    }
    if (best_expert % kGroup == lane) taken |= 1u << (best_expert / kGroup);
    if (k == 0) largest = best;
    if (k == lane) {
      mine = best;
      my_expert = best_expert;
    }
  }
  if (s.norm != kTopkSoftmax) mine = softmax_value(mine, largest, exponential_sum<kGroup, kPer>(logit, largest));
  if (s.norm != kSoftmaxTopk) {
    const float first = __shfl_sync(kAllLanes, mine, 0, kGroup);
    mine = lane < s.top_k ? exp_nonpositive(mine - first) : 0.0f;
    mine /= group_sum<kGroup>(mine);
  }
  if (inside && lane < s.top_k) {
    weight_TK[t * s.top_k + lane] = routed ? mine : 0.0f;
    expert_TK[t * s.top_k + lane] = routed ? my_expert : -1;
  }
}

// One warp per chunk of tokens: load, weight sums, entropy and invalid tokens into partial [2 E + 2, C].
__global__ void gate_totals(const int64_t* profile_index_T, const float* weight_TK, const int32_t* expert_TK,
                            GateShape s, int64_t step, float* partial) {
  extern __shared__ float sums_2E[];
  const int lane = static_cast<int>(threadIdx.x);
  const int chunk = static_cast<int>(blockIdx.x), chunks = static_cast<int>(gridDim.x);
  for (int i = lane; i < 2 * s.experts; i += kWarp) sums_2E[i] = 0.0f;
  float entropy = 0.0f, invalid = 0.0f;
  const int64_t begin = chunk * step, end = begin + step < s.tokens ? begin + step : s.tokens;
  // A warp reads as many tokens at a time as have their choices in it, and adds them one after the other.
  const int together = s.top_k < kWarp ? kWarp / s.top_k : 1;
  const int my_token = s.top_k < kWarp ? lane / s.top_k : 0, my_choice = s.top_k < kWarp ? lane % s.top_k : lane;
  __syncwarp();
  for (int64_t first = begin; first < end; first += together) {
    const int64_t t = first + my_token;
    const bool inside = my_token < together && t < end;
    if (inside && my_choice == 0) {
      const int64_t row = profile_index_T[t];
      if (row != -1 && expert_TK[t * s.top_k] < 0) invalid += 1.0f;
    }
    // more than one round with `softmax` over many experts only
    for (int k = my_choice; k - my_choice < s.top_k; k += kWarp) {
      int expert = -1;
      float weight = 0.0f;
      if (inside && k < s.top_k) {
        expert = expert_TK[t * s.top_k + k];
        weight = weight_TK[t * s.top_k + k];
      }
      entropy += entropy_term(weight);
      for (int turn = 0; turn < together; ++turn) {
        if (turn == my_token && expert >= 0) {
          sums_2E[expert] += 1.0f;
          sums_2E[s.experts + expert] += weight;
        }
        __syncwarp();
      }
    }
  }
  entropy = group_sum<kWarp>(entropy);
  invalid = group_sum<kWarp>(invalid);
  for (int i = lane; i < 2 * s.experts; i += kWarp) partial[static_cast<int64_t>(i) * chunks + chunk] = sums_2E[i];
  if (lane == 0) {
    partial[static_cast<int64_t>(2 * s.experts) * chunks + chunk] = entropy;
    partial[static_cast<int64_t>(2 * s.experts + 1) * chunks + chunk] = invalid;
  }
}

// The sum of one row of partial [rows, C], by one warp.
__device__ float row_total(const float* partial, int64_t row, int chunks, int lane) {
  float sum = 0.0f;
  for (int c = lane; c < chunks; c += kWarp) sum += partial[row * chunks + c];
  return group_sum<kWarp>(sum);
}

__global__ void gate_reduce(const float* partial, int chunks, int experts, float* load_E, float* weight_sum_E,
                            float* entropy, float* invalid) {
  const int row = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
  const float sum = row_total(partial, row, chunks, lane);
  if (lane != 0) return;
  if (row < experts) {
    load_E[row] = sum;
  } else if (row < 2 * experts) {
    weight_sum_E[row - experts] = sum;
  } else {
    *(row == 2 * experts ? entropy : invalid) = sum;
  }
}

template <typename T, int kGroup, int kPer>
__global__ void gate_backward_rows(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T,
                                   GateShape s, const float* weight_TK, const int32_t* expert_TK,
                                   const float* d_weight_TK, const float* d_weight_sum_E, T* d_hidden_TE,
                                   float* gradient_TE) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kGroup;
  const bool inside = t < s.tokens;
  const int64_t row = inside ? profile_index_T[t] : -1;
  const bool real = row >= 0 && (profile_NE == nullptr || row < s.profiles);
  const bool routed = real && expert_TK[t * s.top_k] >= 0;
  float gradient[kPer];

  if (s.norm == kSoftmax) {
    float p[kPer];
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int e = i * kGroup + lane;
      const bool mine = routed && e < s.experts;
      p[i] = mine ? weight_TK[t * s.experts + e] : 0.0f;
      gradient[i] = mine && d_weight_TK != nullptr ? d_weight_TK[t * s.experts + e] : 0.0f;
      if (mine && d_weight_sum_E != nullptr) gradient[i] += d_weight_sum_E[e];
      dot += p[i] * gradient[i];
    }
    dot = group_sum<kGroup>(dot);
#pragma unroll
    for (int i = 0; i < kPer; ++i) gradient[i] = softmax_gradient(p[i], gradient[i], dot);
  } else {
    // Lane k holds choice k.
    int expert = -1;
    float weight = 0.0f, incoming = 0.0f;
    if (routed && lane < s.top_k) {
      const int chosen = expert_TK[t * s.top_k + lane];
      if (chosen >= 0 && chosen < s.experts) {
        expert = chosen;
        weight = weight_TK[t * s.top_k + lane];
        if (d_weight_TK != nullptr) incoming = d_weight_TK[t * s.top_k + lane];
        if (d_weight_sum_E != nullptr) incoming += d_weight_sum_E[expert];
      }
    }
    if (s.norm != kSoftmaxTopk) {  // through the last softmax, over the chosen
      const float dot = group_sum<kGroup>(weight * incoming);
      incoming = softmax_gradient(weight, incoming, dot);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) gradient[i] = 0.0f;
    for (int k = 0; k < s.top_k; ++k) {
      const int chosen = __shfl_sync(kAllLanes, expert, k, kGroup);
      const float value = __shfl_sync(kAllLanes, incoming, k, kGroup);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (i * kGroup + lane == chosen) gradient[i] = value;
      }
    }
    if (s.norm != kTopkSoftmax) {  // through the softmax over all
      float p[kPer];
      load_logits<T, kGroup, kPer>(hidden_TE, profile_NE, t, row, s.experts, lane, routed, p);
      const float largest = largest_of<kGroup, kPer>(p);
      const float total = exponential_sum<kGroup, kPer>(p, largest);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        p[i] = routed ? softmax_value(p[i], largest, total) : 0.0f;
        dot += p[i] * gradient[i];
      }
      dot = group_sum<kGroup>(dot);
#pragma unroll
      for (int i = 0; i < kPer; ++i) gradient[i] = softmax_gradient(p[i], gradient[i], dot);
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int e = i * kGroup + lane;
    if (inside && e < s.experts) {
      from_float(gradient[i], d_hidden_TE[t * s.experts + e]);
      if (gradient_TE != nullptr) gradient_TE[t * s.experts + e] = gradient[i];
    }
  }
}

// One thread per chunk and expert reads its tokens in order and adds to partial [N, E, C] when the profile changes.
__global__ void profile_partials(const float* gradient_TE, const int64_t* profile_index_T, GateShape s, int64_t step,
                                 int chunks, float* partial) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= static_cast<int64_t>(chunks) * s.experts) return;
  const int64_t chunk = place / s.experts;
  const int expert = static_cast<int>(place % s.experts);
  const int64_t begin = chunk * step, end = begin + step < s.tokens ? begin + step : s.tokens;
  int64_t current = -1;
  float sum = 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = profile_index_T[t];
    if (row != current) {
      if (current >= 0 && current < s.profiles) partial[(current * s.experts + expert) * chunks + chunk] += sum;
      current = row;
      sum = 0.0f;
    }
    sum += gradient_TE[t * s.experts + expert];
  }
  if (current >= 0 && current < s.profiles) partial[(current * s.experts + expert) * chunks + chunk] += sum;
}

__global__ void profile_reduce(const float* partial, int64_t rows, int chunks, float* d_profile_NE) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows) return;
  const float sum = row_total(partial, row, chunks, lane);
  if (lane == 0) d_profile_NE[row] = sum;
}

// Calls `launch` with the lanes per token and the experts per lane that fit: as few lanes as possible, but one for each
// of `choices`.
template <typename Launch>
void by_experts(int experts, int choices, const Launch& launch) {
  using std::integral_constant;
#define CUMA_CASE(group, per) \
  if (experts <= group * per && choices <= group) \
  return launch(integral_constant<int, group>{}, integral_constant<int, per>{})
  CUMA_CASE(2, 4);
  CUMA_CASE(8, 1);
  CUMA_CASE(4, 4);
  CUMA_CASE(16, 1);
  CUMA_CASE(8, 4);
  CUMA_CASE(32, 1);
  CUMA_CASE(8, 8);
  CUMA_CASE(32, 2);
  CUMA_CASE(16, 8);
  CUMA_CASE(32, 4);
  CUMA_CASE(32, 8);
  CUMA_CASE(32, 16);
#undef CUMA_CASE
}

// The lanes that a token's choices need. With `softmax` every lane keeps its own experts.
int lanes_for(const GateShape& s) { return s.norm == kSoftmax ? 1 : s.top_k; }

}  // namespace

int gate_chunks(int64_t tokens, int64_t floats) {
  int64_t chunks = (tokens + 63) / 64;
  chunks = chunks < 1024 ? chunks : 1024;
  const int64_t most = (int64_t{1} << 22) / (floats > 0 ? floats : 1);
  chunks = chunks < most ? chunks : most;
  return static_cast<int>(chunks > 1 ? chunks : 1);
}

template <typename T>
void gate_forward(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T, int64_t tokens,
                  int64_t profiles, int experts, int top_k, GateNorm norm, float* weight_TK, int32_t* expert_TK,
                  float* load_E, float* weight_sum_E, float* entropy, float* invalid, float* partial, int chunks,
                  cudaStream_t stream) {
  const GateShape s{tokens, profiles, experts, top_k, norm};
  by_experts(experts, lanes_for(s), [&](auto group, auto per) {
    gate_rows<T, group.value, per.value><<<blocks_for(tokens * group.value), kThreads, 0, stream>>>(
        hidden_TE, profile_NE, profile_index_T, s, weight_TK, expert_TK);
  });
  const int64_t step = (tokens + chunks - 1) / chunks;
  gate_totals<<<chunks, kWarp, 2 * experts * sizeof(float), stream>>>(profile_index_T, weight_TK, expert_TK, s, step,
                                                                      partial);
  gate_reduce<<<2 * experts + 2, kWarp, 0, stream>>>(partial, chunks, experts, load_E, weight_sum_E, entropy, invalid);
}

template <typename T>
void gate_backward(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T, int64_t tokens,
                   int64_t profiles, int experts, int top_k, GateNorm norm, const float* weight_TK,
                   const int32_t* expert_TK, const float* d_weight_TK, const float* d_weight_sum_E, T* d_hidden_TE,
                   float* d_profile_NE, float* gradient_TE, float* partial_NEC, int chunks, cudaStream_t stream) {
  const GateShape s{tokens, profiles, experts, top_k, norm};
  by_experts(experts, lanes_for(s), [&](auto group, auto per) {
    gate_backward_rows<T, group.value, per.value><<<blocks_for(tokens * group.value), kThreads, 0, stream>>>(
        hidden_TE, profile_NE, profile_index_T, s, weight_TK, expert_TK, d_weight_TK, d_weight_sum_E, d_hidden_TE,
        gradient_TE);
  });
  if (d_profile_NE == nullptr || profiles == 0) return;
  const int64_t step = (tokens + chunks - 1) / chunks, rows = profiles * experts;
  cudaMemsetAsync(partial_NEC, 0, rows * chunks * sizeof(float), stream);
  profile_partials<<<blocks_for(static_cast<int64_t>(chunks) * experts), kThreads, 0, stream>>>(
      gradient_TE, profile_index_T, s, step, chunks, partial_NEC);
  profile_reduce<<<blocks_for(rows * kWarp), kThreads, 0, stream>>>(partial_NEC, rows, chunks, d_profile_NE);
}

#define CUMA_BUILD(T)                                                                                                \
  template void gate_forward<T>(const T*, const float*, const int64_t*, int64_t, int64_t, int, int, GateNorm,        \
                                float*, int32_t*, float*, float*, float*, float*, float*, int, cudaStream_t);        \
  template void gate_backward<T>(const T*, const float*, const int64_t*, int64_t, int64_t, int, int, GateNorm,       \
                                 const float*, const int32_t*, const float*, const float*, T*, float*, float*,       \
                                 float*, int, cudaStream_t);
CUMA_FOR_EACH_TYPE(CUMA_BUILD)

}  // namespace cuma::cuda

// The demographic gate on the CPU, a range of tokens at a time. Shapes: T tokens, E experts, K active, N profiles.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/gate_math.h"

namespace cuma::cpu {

// What one chunk of tokens adds to the totals, and the first token it could not route.
struct GateTotals {
  double entropy = 0;
  int64_t invalid = 0;
  int64_t bad_token = -1;  // NaN or inf logits
  int64_t bad_index = -1;  // profile_index outside [-1, N)
};

template <typename T>
struct GateArguments {
  const T* hidden_TE;
  const float* profile_NE;  // null: logits are the hidden part alone
  const int64_t* profile_index_T;
  int64_t profiles;  // N; without profile logits every index >= 0 is a real token
  int experts;
  int top_k;  // E for the `softmax` norm
  GateNorm norm;
};

// One token's logits in float32; false if one is NaN or inf.
template <typename T>
inline bool load_logits(const GateArguments<T>& a, int64_t t, int64_t row, float* logits_E) {
  const T* hidden_E = a.hidden_TE + t * a.experts;
  if (a.profile_NE != nullptr) {
    const float* profile_E = a.profile_NE + row * a.experts;
    for (int e = 0; e < a.experts; ++e) logits_E[e] = to_float(hidden_E[e]) + profile_E[e];
  } else {
    for (int e = 0; e < a.experts; ++e) logits_E[e] = to_float(hidden_E[e]);
  }
  uint32_t bad = 0;
  for (int e = 0; e < a.experts; ++e) {
    uint32_t bits;
    std::memcpy(&bits, logits_E + e, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  }
  return bad == 0;
}

// Largest logit and the sum of exponentials below it.
inline float exponential_sum(const float* logits_E, int experts, float largest) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int e = 0; e < experts; ++e) total += exp_nonpositive(logits_E[e] - largest);
  return total;
}

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kBlock = 8;

inline float largest_of(const float* values, int count) {
  float largest = kNone;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < count; ++i) largest = std::max(largest, values[i]);
  return largest;
}

inline int first_of(const float* values, int count, float wanted) {
  int first = count;
#pragma omp simd reduction(min : first)
  for (int i = 0; i < count; ++i) first = std::min(first, values[i] == wanted ? i : count);
  return first;
}

// The `top_K` largest logits (all finite) and their experts, in descending order, ties by index. The largest logit of
// every block of experts is kept, so that one choice reads those and one block. No branch depends on a logit, because
// mispredicted branches would cost more. `logits_E` (kMaxExperts long) is changed in between.
inline void choose(float* logits_E, int experts, int top_k, float* top_K, int* expert_K) {
  float largest_B[kMaxExperts / kBlock];
  const int blocks = (experts + kBlock - 1) / kBlock;
  std::fill(logits_E + experts, logits_E + blocks * kBlock, kNone);
  for (int b = 0; b < blocks; ++b) largest_B[b] = largest_of(logits_E + b * kBlock, kBlock);
  for (int k = 0; k < top_k; ++k) {
    const float largest = largest_of(largest_B, blocks);
    const int b = first_of(largest_B, blocks, largest);
    const int e = b * kBlock + first_of(logits_E + b * kBlock, kBlock, largest);
    top_K[k] = logits_E[e];
    expert_K[k] = e;
    logits_E[e] = kNone;
    largest_B[b] = largest_of(logits_E + b * kBlock, kBlock);
  }
  for (int k = 0; k < top_k; ++k) logits_E[expert_K[k]] = top_K[k];
}

// Gate of the tokens [begin, end); adds to weight_sum_E, load_E and totals.
template <typename T>
void gate_forward(const GateArguments<T>& a, int64_t begin, int64_t end, float* weight_TK, int32_t* expert_TK,
                  float* load_E, float* weight_sum_E, GateTotals& totals) {
  float logits_E[kMaxExperts];
  float top_K[kMaxTopK];
  int chosen_K[kMaxTopK];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = a.profile_index_T[t];
    float* weight_K = weight_TK + t * a.top_k;
    int32_t* expert_K = expert_TK + t * a.top_k;
    const bool outside = row < -1 || (a.profile_NE != nullptr && row >= a.profiles);
    bool routed = row >= 0 && !outside;
    if (outside && totals.bad_index < 0) totals.bad_index = t;
    if (routed && !load_logits(a, t, row, logits_E)) {
      routed = false;
      ++totals.invalid;
      if (totals.bad_token < 0) totals.bad_token = t;
    }
    if (!routed) {
      std::fill_n(weight_K, a.top_k, 0.0f);
      std::fill_n(expert_K, a.top_k, -1);
      continue;
    }
    if (a.norm == kSoftmax) {
      const float largest = largest_of(logits_E, a.experts);
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int e = 0; e < a.experts; ++e) {
        weight_K[e] = exp_nonpositive(logits_E[e] - largest);
        total += weight_K[e];
      }
      float below = 0;  // mean distance to the largest logit: the entropy is ln total + that
#pragma omp simd reduction(+ : below)
      for (int e = 0; e < a.experts; ++e) {
        weight_K[e] /= total;
        expert_K[e] = e;
        load_E[e] += 1.0f;
        weight_sum_E[e] += weight_K[e];
        below += weight_K[e] * (largest - logits_E[e]);
      }
      totals.entropy += static_cast<double>(logf(total) + below);
      continue;
    }
    choose(logits_E, a.experts, a.top_k, top_K, chosen_K);
    if (a.norm != kTopkSoftmax) {
      const float largest = top_K[0];
      const float total = exponential_sum(logits_E, a.experts, largest);
      for (int k = 0; k < a.top_k; ++k) top_K[k] = softmax_value(top_K[k], largest, total);
    }
    if (a.norm != kSoftmaxTopk) {
      const float largest = top_K[0];
      float total = 0;
      for (int k = 0; k < a.top_k; ++k) total += exp_nonpositive(top_K[k] - largest);
      for (int k = 0; k < a.top_k; ++k) top_K[k] = softmax_value(top_K[k], largest, total);
    }
    for (int k = 0; k < a.top_k; ++k) {
      weight_K[k] = top_K[k];
      expert_K[k] = chosen_K[k];
      load_E[chosen_K[k]] += 1.0f;
      weight_sum_E[chosen_K[k]] += top_K[k];
      totals.entropy += static_cast<double>(entropy_term(top_K[k]));
    }
  }
}

// Logit gradients of the tokens [begin, end); adds the profiles' share to d_profile_NE (may be null).
// d_weight_TK and d_weight_sum_E may be null (zero).
template <typename T>
void gate_backward(const GateArguments<T>& a, int64_t begin, int64_t end, const float* weight_TK,
                   const int32_t* expert_TK, const float* d_weight_TK, const float* d_weight_sum_E, T* d_hidden_TE,
                   float* d_profile_NE) {
  float logits_E[kMaxExperts];
  float gradient_E[kMaxExperts];
  float incoming_K[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* expert_K = expert_TK + t * a.top_k;
    const float* weight_K = weight_TK + t * a.top_k;
    T* d_hidden_E = d_hidden_TE + t * a.experts;
    const int64_t row = a.profile_index_T[t];
    bool routed = row >= 0 && (a.profile_NE == nullptr || row < a.profiles);
    for (int k = 0; routed && k < a.top_k; ++k) routed = expert_K[k] >= 0 && expert_K[k] < a.experts;
    std::fill_n(gradient_E, a.experts, 0.0f);
    if (routed) {
      for (int k = 0; k < a.top_k; ++k) {
        incoming_K[k] = (d_weight_TK != nullptr ? d_weight_TK[t * a.top_k + k] : 0.0f) +
                        (d_weight_sum_E != nullptr ? d_weight_sum_E[expert_K[k]] : 0.0f);
      }
      if (a.norm != kSoftmaxTopk) {  // through the last softmax, over the chosen
        float dot = 0;
        for (int k = 0; k < a.top_k; ++k) dot += weight_K[k] * incoming_K[k];
        for (int k = 0; k < a.top_k; ++k) incoming_K[k] = softmax_gradient(weight_K[k], incoming_K[k], dot);
      }
      for (int k = 0; k < a.top_k; ++k) gradient_E[expert_K[k]] = incoming_K[k];
      if (a.norm == kSoftmaxTopk || a.norm == kSoftmaxTopkSoftmax) {  // through the softmax over all
        load_logits(a, t, row, logits_E);
        const float largest = logits_E[expert_K[0]];
        const float total = exponential_sum(logits_E, a.experts, largest);
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int e = 0; e < a.experts; ++e) {
          logits_E[e] = softmax_value(logits_E[e], largest, total);
          dot += logits_E[e] * gradient_E[e];
        }
        for (int e = 0; e < a.experts; ++e) gradient_E[e] = softmax_gradient(logits_E[e], gradient_E[e], dot);
      }
      if (d_profile_NE != nullptr) {
        float* d_profile_E = d_profile_NE + row * a.experts;
        for (int e = 0; e < a.experts; ++e) d_profile_E[e] += gradient_E[e];
      }
    }
    for (int e = 0; e < a.experts; ++e) from_float(gradient_E[e], d_hidden_E[e]);
  }
}

}  // namespace cuma::cpu

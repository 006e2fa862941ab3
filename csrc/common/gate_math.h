// The arithmetic of one token's gate, shared by the CPU and CUDA kernels.
#pragma once

#include "numeric.h"

namespace cuma {

// Order of the `norm` argument of the operators.
enum GateNorm : int64_t { kTopkSoftmax = 0, kSoftmax = 1, kSoftmaxTopk = 2, kSoftmaxTopkSoftmax = 3 };

constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 32;

// Whether a token prefers expert `a` to expert `b`: larger logit first, ties to the lower index.
CUMA_INLINE bool goes_first(float logit_a, int a, float logit_b, int b) {
  return logit_a > logit_b || (logit_a == logit_b && a < b);
}

// Softmax value of one logit, given the maximum and the sum of exponentials around it.
CUMA_INLINE float softmax_value(float logit, float largest,
                                float total) { return exp_nonpositive(logit - largest) / total; }

// Gradient of a softmax with values p for an incoming gradient g, where `dot` = sum_i p_i g_i.
CUMA_INLINE float softmax_gradient(float p, float g, float dot) { return p * (g - dot); }

// -p ln p, zero at p = 0.
CUMA_INLINE float entropy_term(float p) { return p > 0.0f ? -p * logf(p) : 0.0f; }

}  // namespace cuma

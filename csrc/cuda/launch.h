// The launchers of the CUDA kernels: raw pointers, sizes and a stream. T is float, BFloat16 or Float16.
// All arrays are contiguous. Shapes: T tokens, E experts, K active, N profiles, r rank, C chunks of tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/gate_math.h"

namespace cuma::cuda {

// The number of chunks that partial sums are kept for, so that sums have one order on every device. `floats` is the
// size of one chunk's sums.
int gate_chunks(int64_t tokens, int64_t floats);

// partial [2 E + 2, C] is scratch. Indices out of range and logits that are not finite count as invalid.
template <typename T>
void gate_forward(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T, int64_t tokens,
                  int64_t profiles, int experts, int top_k, GateNorm norm, float* weight_TK, int32_t* expert_TK,
                  float* load_E, float* weight_sum_E, float* entropy, float* invalid, float* partial, int chunks,
                  cudaStream_t stream);

// d_weight_TK, d_weight_sum_E may be null; partial_NEC [N, E, C] and d_profile_NE are null without profile logits.
template <typename T>
void gate_backward(const T* hidden_TE, const float* profile_NE, const int64_t* profile_index_T, int64_t tokens,
                   int64_t profiles, int experts, int top_k, GateNorm norm, const float* weight_TK,
                   const int32_t* expert_TK, const float* d_weight_TK, const float* d_weight_sum_E, T* d_hidden_TE,
                   float* d_profile_NE, float* gradient_TE, float* partial_NEC, int chunks, cudaStream_t stream);

template <typename T>
void scale_forward(const T* z, const float* weight_TK, const int32_t* expert_TK, int64_t tokens, int experts, int top_k,
                   int rank, bool shared, float scale, T* out_TER, cudaStream_t stream);

template <typename T>
void scale_backward(const T* d_out_TER, const T* z, const float* weight_TK, const int32_t* expert_TK, int64_t tokens,
                    int experts, int top_k, int rank, bool shared, float scale, T* d_z, float* d_weight_TK,
                    cudaStream_t stream);

}  // namespace cuma::cuda

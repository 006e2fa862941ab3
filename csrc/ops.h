// The operators. cuma_ds/ops/reference.py has the same in PyTorch, and cuma_ds/ops/__init__.py says what they return.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace cuma {

using torch::stable::Tensor;
using GateTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

GateTensors gate(const Tensor& hidden_logits, const std::optional<Tensor>& profile_logits, const Tensor& profile_index,
                 int64_t top_k, int64_t norm);
std::tuple<Tensor, Tensor> gate_backward(const Tensor& hidden_logits, const std::optional<Tensor>& profile_logits,
                                         const Tensor& profile_index, const Tensor& weight, const Tensor& expert,
                                         const std::optional<Tensor>& d_weight,
                                         const std::optional<Tensor>& d_weight_sum, int64_t norm);

Tensor gate_scale(const Tensor& z, const Tensor& weight, const Tensor& expert, int64_t num_experts, double scale);
std::tuple<Tensor, Tensor> gate_scale_backward(const Tensor& d_out, const Tensor& z, const Tensor& weight,
                                               const Tensor& expert, double scale);

}  // namespace cuma

// The demographic gate: router logits to mixture weights.

#include "cpu/gate.h"

#include "ops.h"
#include "tensors.h"

namespace cuma {
namespace {

struct GateSizes {
  int64_t tokens, profiles;
  int experts, top_k;
  GateNorm norm;
};

GateSizes gate_sizes(const Tensor& hidden_TE, const std::optional<Tensor>& profile_NE, int64_t top_k, int64_t norm) {
  check(hidden_TE.dim() == 2, "hidden_logits has ", hidden_TE.dim(), " dimensions; expected 2, [T, E]");
  const int64_t experts = hidden_TE.size(1);
  check(experts >= 1 && experts <= kMaxExperts, "hidden_logits has ", experts, " experts; expected 1 to ", kMaxExperts);
  check(norm >= 0 && norm <= 3, "norm is ", norm, "; expected 0 to 3");
  check(top_k >= 1 && top_k <= experts, "top_k is ", top_k, "; expected 1 to ", experts);
  check(norm == kSoftmax ? top_k == experts : top_k <= kMaxTopK, "top_k is ", top_k, "; expected at most ", kMaxTopK,
        ", or all experts with softmax");
  if (profile_NE.has_value()) check(profile_NE->dim() == 2, "profile_logits has ", profile_NE->dim(),
                                    " dimensions; expected 2, [N, E]");
  return {hidden_TE.size(0), profile_NE.has_value() ? profile_NE->size(0) : 0, static_cast<int>(experts),
          static_cast<int>(top_k), static_cast<GateNorm>(norm)};
}

}  // namespace

GateTensors gate(const Tensor& hidden_logits, const std::optional<Tensor>& profile_logits, const Tensor& profile_index,
                 int64_t top_k,
                int64_t norm) {
  const GateSizes s = gate_sizes(hidden_logits, profile_logits, top_k, norm);
  const Tensor hidden = torch::stable::contiguous(hidden_logits);
  const auto profile = checked("profile_logits", profile_logits, ScalarType::Float, {s.profiles, s.experts}, hidden);
  const Tensor index = checked("profile_index", profile_index, ScalarType::Long, {s.tokens}, hidden);
  Tensor weight = empty(hidden, {s.tokens, s.top_k}, ScalarType::Float);
  Tensor expert = empty(hidden, {s.tokens, s.top_k}, ScalarType::Int);
  Tensor load = sums(hidden, {s.experts}, ScalarType::Float, s.tokens > 0);
  Tensor weight_sum = sums(hidden, {s.experts}, ScalarType::Float, s.tokens > 0);
  Tensor entropy = sums(hidden, {}, ScalarType::Float, s.tokens > 0);
  Tensor invalid = sums(hidden, {}, ScalarType::Float, s.tokens > 0);
  const GateTensors result{weight, expert, load, weight_sum, entropy, invalid};
  if (s.tokens == 0) return result;
  by_type("hidden_logits", hidden, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (hidden.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
      const int64_t floats = 2 * s.experts + 2;
      const int chunks = cuda::gate_chunks(s.tokens, floats);
      Tensor partial = empty(hidden, {chunks * floats}, ScalarType::Float);
      cuda::gate_forward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), s.tokens, s.profiles, s.experts,
                            s.top_k, s.norm, out<float>(weight), out<int32_t>(expert), out<float>(load),
                            out<float>(weight_sum), out<float>(entropy), out<float>(invalid), out<float>(partial),
                            chunks, current_stream(hidden));
      check_launch();
      return;
    }
#endif
    const cpu::GateArguments<T> a{in<T>(hidden), in<float>(profile), in<int64_t>(index), s.profiles, s.experts, s.top_k,
                                  s.norm};
    const int64_t step = chunk_tokens(s.tokens), chunks = ceiling(s.tokens, step);
    std::vector<float> partial(chunks * 2 * s.experts, 0.0f);
    std::vector<cpu::GateTotals> totals(chunks);
    float* weight_TK = out<float>(weight);
    int32_t* expert_TK = out<int32_t>(expert);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float* load_E = partial.data() + c * 2 * s.experts;
        cpu::gate_forward(a, c * step, std::min(s.tokens, (c + 1) * step), weight_TK, expert_TK, load_E,
                          load_E + s.experts, totals[c]);
      }
    });
    double entropy_sum = 0;
    int64_t invalid_sum = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      check(totals[c].bad_index < 0, "profile_index is ", in<int64_t>(index)[std::max<int64_t>(0, totals[c].bad_index)],
            " at token ", totals[c].bad_index, "; expected -1 (padding) or below ", s.profiles);
      entropy_sum += totals[c].entropy;
      invalid_sum += totals[c].invalid;
      for (int e = 0; e < s.experts; ++e) {
        out<float>(load)[e] += partial[c * 2 * s.experts + e];
        out<float>(weight_sum)[e] += partial[c * 2 * s.experts + s.experts + e];
      }
    }
    *out<float>(entropy) = static_cast<float>(entropy_sum);
    *out<float>(invalid) = static_cast<float>(invalid_sum);
  });
  return result;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& hidden_logits, const std::optional<Tensor>& profile_logits,
                                         const Tensor& profile_index, const Tensor& weight, const Tensor& expert,
                                         const std::optional<Tensor>& d_weight,
                                         const std::optional<Tensor>& d_weight_sum, int64_t norm) {
  check(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; expected 2, [T, K]");
  const GateSizes s = gate_sizes(hidden_logits, profile_logits, weight.size(1), norm);
  const Tensor hidden = torch::stable::contiguous(hidden_logits);
  const auto profile = checked("profile_logits", profile_logits, ScalarType::Float, {s.profiles, s.experts}, hidden);
  const Tensor index = checked("profile_index", profile_index, ScalarType::Long, {s.tokens}, hidden);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.tokens, s.top_k}, hidden);
  const Tensor expert_in = checked("expert", expert, ScalarType::Int, {s.tokens, s.top_k}, hidden);
  const auto d_weight_in = checked("d_weight", d_weight, ScalarType::Float, {s.tokens, s.top_k}, hidden);
  const auto d_sum_in = checked("d_weight_sum", d_weight_sum, ScalarType::Float, {s.experts}, hidden);
  Tensor d_hidden = empty(hidden, {s.tokens, s.experts}, hidden.scalar_type());
  Tensor d_profile = sums(hidden, {s.profiles, s.experts}, ScalarType::Float, s.tokens > 0);
  const std::tuple<Tensor, Tensor> result{d_hidden, d_profile};
  if (s.tokens == 0) return result;
  const int64_t floats = s.profiles * s.experts;
  by_type("hidden_logits", hidden, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (hidden.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
      const int chunks = cuda::gate_chunks(s.tokens, floats);
      const bool sums = profile.has_value();
      Tensor gradient = empty(hidden, {sums ? s.tokens * s.experts : 0}, ScalarType::Float);
      Tensor partial = empty(hidden, {sums ? chunks * floats : 0}, ScalarType::Float);
      cuda::gate_backward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), s.tokens, s.profiles, s.experts,
                             s.top_k, s.norm, in<float>(weight_in), in<int32_t>(expert_in), in<float>(d_weight_in),
                             in<float>(d_sum_in), out<T>(d_hidden), sums ? out<float>(d_profile) : nullptr,
                             sums ? out<float>(gradient) : nullptr, sums ? out<float>(partial) : nullptr, chunks,
                             current_stream(hidden));
      check_launch();
      return;
    }
#endif
    const cpu::GateArguments<T> a{in<T>(hidden), in<float>(profile), in<int64_t>(index), s.profiles, s.experts, s.top_k,
                                  s.norm};
    const int64_t step = chunk_tokens(s.tokens), chunks = ceiling(s.tokens, step);
    std::vector<float> partial(profile.has_value() ? chunks * floats : 0, 0.0f);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        cpu::gate_backward(a, c * step, std::min(s.tokens, (c + 1) * step), in<float>(weight_in),
                           in<int32_t>(expert_in), in<float>(d_weight_in), in<float>(d_sum_in), out<T>(d_hidden),
                           profile.has_value() ? partial.data() + c * floats : nullptr);
      }
    });
    if (!profile.has_value()) return;
    float* d_profile_NE = out<float>(d_profile);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = 0; i < floats; ++i) d_profile_NE[i] += partial[c * floats + i];
    }
  });
  return result;
}

}  // namespace cuma

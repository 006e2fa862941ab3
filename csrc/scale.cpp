// The gate scale: every expert's rows times its mixture weight.

#include "cpu/scale.h"

#include "ops.h"
#include "tensors.h"

namespace cuma {
namespace {

struct ScaleSizes {
  int64_t tokens, rank;
  int experts, top_k;
  bool shared;
};

ScaleSizes scale_sizes(const Tensor& z, const Tensor& weight, int64_t experts) {
  check(z.dim() == 3, "z has ", z.dim(), " dimensions; expected 3, [T, E, r] or [T, 1, r]");
  check(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; expected 2, [T, K]");
  check(experts >= 1 && experts <= kMaxExperts, "num_experts is ", experts, "; expected 1 to ", kMaxExperts);
  check(z.size(1) == experts || z.size(1) == 1, "z has ", z.size(1), " experts; expected ", experts,
        ", or 1 when shared");
  check(weight.size(1) <= experts, "weight has ", weight.size(1), " columns; expected at most num_experts, ", experts);
  return {z.size(0), z.size(2), static_cast<int>(experts), static_cast<int>(weight.size(1)), z.size(1) == 1};
}

}  // namespace

Tensor gate_scale(const Tensor& z, const Tensor& weight, const Tensor& expert, int64_t num_experts, double scale) {
  const ScaleSizes s = scale_sizes(z, weight, num_experts);
  const Tensor z_in = torch::stable::contiguous(z);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.tokens, s.top_k}, z_in);
  const Tensor expert_in = checked("expert", expert, ScalarType::Int, {s.tokens, s.top_k}, z_in);
  Tensor result = empty(z_in, {s.tokens, s.experts, s.rank}, z_in.scalar_type());
  if (result.numel() == 0) return result;
  by_type("z", z_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (z_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(z_in.get_device_index());
      cuda::scale_forward<T>(in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.tokens, s.experts, s.top_k,
                             static_cast<int>(s.rank), s.shared, static_cast<float>(scale), out<T>(result),
                             current_stream(z_in));
      check_launch();
      return;
    }
#endif
    const cpu::ScaleArguments<T> a{in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.experts, s.top_k,
                                   s.rank, s.shared, static_cast<float>(scale)};
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, s.tokens, grain(s.experts * s.rank), [&](int64_t begin, int64_t end) {
      if (!cpu::scale_forward(a, begin, end, out<T>(result))) good = false;
    });
    check(good, "expert has an index out of range; expected -1 (not routed) or below ", s.experts);
  });
  return result;
}

std::tuple<Tensor, Tensor> gate_scale_backward(const Tensor& d_out, const Tensor& z, const Tensor& weight,
                                               const Tensor& expert, double scale) {
  check(d_out.dim() == 3, "d_out has ", d_out.dim(), " dimensions; expected 3, [T, E, r]");
  const ScaleSizes s = scale_sizes(z, weight, d_out.size(1));
  const Tensor z_in = torch::stable::contiguous(z);
  const Tensor d_out_in = checked("d_out", d_out, z_in.scalar_type(), {s.tokens, s.experts, s.rank}, z_in);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.tokens, s.top_k}, z_in);
  const Tensor expert_in = checked("expert", expert, ScalarType::Int, {s.tokens, s.top_k}, z_in);
  Tensor d_z = empty(z_in, sizes_of(z_in), z_in.scalar_type());
  Tensor d_weight = empty(z_in, {s.tokens, s.top_k}, ScalarType::Float);
  const std::tuple<Tensor, Tensor> result{d_z, d_weight};
  if (s.tokens == 0) return result;
  by_type("z", z_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (z_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(z_in.get_device_index());
      cuda::scale_backward<T>(in<T>(d_out_in), in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.tokens,
                              s.experts, s.top_k, static_cast<int>(s.rank), s.shared, static_cast<float>(scale),
                              out<T>(d_z), out<float>(d_weight), current_stream(z_in));
      check_launch();
      return;
    }
#endif
    const cpu::ScaleArguments<T> a{in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.experts, s.top_k,
                                   s.rank, s.shared, static_cast<float>(scale)};
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, s.tokens, grain(2 * s.experts * s.rank), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(s.rank);
      if (!cpu::scale_backward(a, begin, end, in<T>(d_out_in), out<T>(d_z), out<float>(d_weight), scratch.data())) {
        good = false;
      }
    });
    check(good, "expert has an index out of range; expected -1 (not routed) or below ", s.experts);
  });
  return result;
}

}  // namespace cuma

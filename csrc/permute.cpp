// Sorting (token, expert) pairs by expert, gathering rows in that order, and summing them per token.

#include "cpu/permute.h"

#include "ops.h"
#include "tensors.h"

namespace cuma {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& expert, int64_t num_experts) {
  check(expert.dim() == 2, "expert has ", expert.dim(), " dimensions; expected 2, [T, K]");
  check_type("expert", expert, ScalarType::Int);
  check(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts is ", num_experts, "; expected 1 to ",
        kMaxExperts);
  const int experts = static_cast<int>(num_experts);
  const Tensor expert_in = torch::stable::contiguous(expert);
  const int64_t assignments = expert_in.numel();
  check(assignments < (int64_t{1} << 31), "expert has ", assignments, " entries; expected fewer than 2^31");
  Tensor order = empty(expert_in, {assignments}, ScalarType::Int);
  Tensor position = empty(expert_in, sizes_of(expert_in), ScalarType::Int);
  Tensor end = sums(expert_in, {experts}, ScalarType::Int, assignments > 0);
  const std::tuple<Tensor, Tensor, Tensor> result{order, position, end};
  if (assignments == 0) return result;
#ifdef CUMA_WITH_CUDA
  if (expert_in.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(expert_in.get_device_index());
    const int chunks = cuda::sort_chunks(assignments);
    Tensor counts = empty(expert_in, {experts, chunks}, ScalarType::Int);
    cuda::sort_assignments(in<int32_t>(expert_in), assignments, experts, out<int32_t>(order), out<int32_t>(position),
                           out<int32_t>(end), out<int32_t>(counts), chunks, current_stream(expert_in));
    check_launch();
    return result;
  }
#endif
  const int64_t step = std::max<int64_t>(4096, ceiling(assignments, kMostChunks)), chunks = ceiling(assignments, step);
  std::vector<int32_t> next_CE(chunks * experts, 0);
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t c = begin; c < stop; ++c) {
      const int64_t last = std::min(assignments, (c + 1) * step);
      int32_t* next_E = next_CE.data() + c * experts;
      if (!cpu::count_experts(in<int32_t>(expert_in), c * step, last, experts, next_E)) good = false;
    }
  });
  check(good, "expert has an index out of range; expected -1 (not routed) or below ", experts);
  int32_t start = 0;
  for (int e = 0; e < experts; ++e) {
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t count = next_CE[c * experts + e];
      next_CE[c * experts + e] = start;
      start += count;
    }
    out<int32_t>(end)[e] = start;
  }
  std::fill(out<int32_t>(order) + start, out<int32_t>(order) + assignments, -1);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t c = begin; c < stop; ++c) {
      cpu::place_experts(in<int32_t>(expert_in), c * step, std::min(assignments, (c + 1) * step), experts,
                         next_CE.data() + c * experts, out<int32_t>(order), out<int32_t>(position));
    }
  });
  return result;
}

Tensor permute_gather(const Tensor& x, const Tensor& order, const Tensor& position,
                      const std::optional<Tensor>& weight) {
  check(x.dim() == 2, "x has ", x.dim(), " dimensions; expected 2, [T, W]");
  check(position.dim() == 2, "position has ", position.dim(), " dimensions; expected 2, [T, K]");
  const Tensor x_in = torch::stable::contiguous(x);
  const int64_t tokens = x_in.size(0), width = x_in.size(1), top_k = position.size(1), rows = tokens * top_k;
  check_sizes("position", position, {tokens, top_k});
  const Tensor order_in = checked("order", order, ScalarType::Int, {rows}, x_in);
  const auto weight_in = checked("weight", weight, ScalarType::Float, {tokens, top_k}, x_in);
  Tensor result = empty(x_in, {rows, width}, x_in.scalar_type());
  if (result.numel() == 0) return result;
  by_type("x", x_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (x_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
      cuda::gather_rows<T>(in<T>(x_in), in<int32_t>(order_in), in<float>(weight_in), rows, static_cast<int>(top_k),
                           width, out<T>(result), current_stream(x_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      if (!cpu::gather_rows(in<T>(x_in), in<int32_t>(order_in), in<float>(weight_in), begin, end, rows,
                            static_cast<int>(top_k), width, out<T>(result))) {
        good = false;
      }
    });
    check(good, "order has an index out of range; expected -1 or below ", rows);
  });
  return result;
}

Tensor permute_scatter(const Tensor& y, const Tensor& order, const Tensor& position,
                       const std::optional<Tensor>& weight) {
  check(y.dim() == 2, "y has ", y.dim(), " dimensions; expected 2, [M, W]");
  check(position.dim() == 2, "position has ", position.dim(), " dimensions; expected 2, [T, K]");
  const Tensor y_in = torch::stable::contiguous(y);
  const int64_t rows = y_in.size(0), width = y_in.size(1), tokens = position.size(0), top_k = position.size(1);
  const Tensor position_in = checked("position", position, ScalarType::Int, {tokens, top_k}, y_in);
  check_sizes("order", order, {rows});  // read by the gradient
  const auto weight_in = checked("weight", weight, ScalarType::Float, {tokens, top_k}, y_in);
  Tensor result = empty(y_in, {tokens, width}, y_in.scalar_type());
  if (result.numel() == 0) return result;
  by_type("y", y_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (y_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(y_in.get_device_index());
      cuda::scatter_rows<T>(in<T>(y_in), in<int32_t>(position_in), in<float>(weight_in), tokens, rows,
                            static_cast<int>(top_k), width, out<T>(result), current_stream(y_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, tokens, grain(width * top_k), [&](int64_t begin, int64_t end) {
      if (!cpu::scatter_rows(in<T>(y_in), in<int32_t>(position_in), in<float>(weight_in), begin, end, rows,
                             static_cast<int>(top_k), width, out<T>(result))) {
        good = false;
      }
    });
    check(good, "position has an index out of range; expected -1 or below ", rows);
  });
  return result;
}

Tensor permute_products(const Tensor& d, const Tensor& y, const Tensor& position) {
  check(d.dim() == 2, "d has ", d.dim(), " dimensions; expected 2, [T, W]");
  check(y.dim() == 2, "y has ", y.dim(), " dimensions; expected 2, [M, W]");
  check(position.dim() == 2, "position has ", position.dim(), " dimensions; expected 2, [T, K]");
  const Tensor y_in = torch::stable::contiguous(y);
  const int64_t rows = y_in.size(0), width = y_in.size(1), tokens = position.size(0), top_k = position.size(1);
  const Tensor d_in = checked("d", d, y_in.scalar_type(), {tokens, width}, y_in);
  const Tensor position_in = checked("position", position, ScalarType::Int, {tokens, top_k}, y_in);
  Tensor result = sums(y_in, {tokens, top_k}, ScalarType::Float, width > 0);
  if (result.numel() == 0 || width == 0) return result;
  by_type("y", y_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (y_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(y_in.get_device_index());
      cuda::row_products<T>(in<T>(d_in), in<T>(y_in), in<int32_t>(position_in), tokens, rows, static_cast<int>(top_k),
                            width, out<float>(result), current_stream(y_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, tokens, grain(width * top_k), [&](int64_t begin, int64_t end) {
      if (!cpu::row_products(in<T>(d_in), in<T>(y_in), in<int32_t>(position_in), begin, end, rows,
                             static_cast<int>(top_k), width, out<float>(result))) {
        good = false;
      }
    });
    check(good, "position has an index out of range; expected -1 or below ", rows);
  });
  return result;
}

}  // namespace cuma

// The operators: schemas, checks, the CPU implementations over torch's thread pool, and the way to the CUDA launchers.
// torch's stable ABI only: one binary for every torch from 2.11 on and every Python from 3.10 on.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/gate.h"
#include "cpu/grouped.h"
#include "cpu/permute.h"
#include "cpu/scale.h"
#ifdef CUMA_WITH_CUDA
#include <dlfcn.h>

#include "cuda/launch.h"
#endif

namespace cuma {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <typename... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes(tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return sizes;
}

void check_type(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " is ", name_of(tensor.scalar_type()), "; expected ", name_of(expected));
}

void check_sizes(const char* name, const Tensor& tensor, const Sizes& expected) {
  check(sizes_of(tensor) == expected, name, " has shape ", text_of(sizes_of(tensor)), "; expected ", text_of(expected));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& beside) {
  check(tensor.is_cuda() == beside.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
        " is on another device than the first argument");
}

// Type, shape and device of an argument in one line.
Tensor checked(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& beside) {
  check_type(name, tensor, type);
  check_sizes(name, tensor, sizes);
  check_device(name, tensor, beside);
  return torch::stable::contiguous(tensor);
}

std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& tensor, ScalarType type, const Sizes& sizes,
                              const Tensor& beside) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(name, *tensor, type, sizes, beside);
}

template <typename T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* in(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? in<T>(*tensor) : nullptr;
}

template <typename T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) { return torch::stable::new_empty(like, sizes, type); }
Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType type) { return torch::stable::new_zeros(like, sizes, type); }

// To be added to on the CPU; kernels write all of it, so that a GPU is not asked to fill it first.
Tensor sums(const Tensor& like, const Sizes& sizes, ScalarType type, bool filled) {
  return filled && like.is_cuda() ? empty(like, sizes, type) : zeros(like, sizes, type);
}

// Calls `body` with a value of the element type of `tensor`.
template <typename Body>
void by_type(const char* name, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Float16{});
    default: check(false, name, " is ", name_of(tensor.scalar_type()), "; expected float32, bfloat16 or float16");
  }
}

#ifdef CUMA_WITH_CUDA
// The stream torch works on. Looked up in the library torch has loaded: linking against it would tie the binary to CUDA builds.
cudaStream_t current_stream(const Tensor& tensor) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  check(function != nullptr, "this torch does not tell its CUDA stream; set CUMA_DS_OPS=reference");
  void* stream = nullptr;
  check(function(tensor.get_device_index(), &stream) == 0, "torch refused to tell its CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}
#endif

constexpr int64_t kChunkTokens = 512;
constexpr int64_t kMostChunks = 64;

// Tokens per chunk: sums are kept per chunk and added in order, so that results do not depend on the number of threads.
int64_t chunk_tokens(int64_t tokens) { return std::max(kChunkTokens, (tokens + kMostChunks - 1) / kMostChunks); }

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens worth a thread's while when one takes `work` elementary steps.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)); }

// ---------------------------------------------------------------------------------------------------------------- gate

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
  if (profile_NE.has_value()) check(profile_NE->dim() == 2, "profile_logits has ", profile_NE->dim(), " dimensions; expected 2, [N, E]");
  return {hidden_TE.size(0), profile_NE.has_value() ? profile_NE->size(0) : 0, static_cast<int>(experts), static_cast<int>(top_k),
          static_cast<GateNorm>(norm)};
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors gate(const Tensor& hidden_logits, const std::optional<Tensor>& profile_logits, const Tensor& profile_index, int64_t top_k,
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
  const SixTensors result{weight, expert, load, weight_sum, entropy, invalid};
  if (s.tokens == 0) return result;
  by_type("hidden_logits", hidden, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (hidden.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
      const int64_t floats = 2 * s.experts + 2;
      const int chunks = cuda::gate_chunks(s.tokens, floats);
      Tensor partial = empty(hidden, {chunks * floats}, ScalarType::Float);
      cuda::gate_forward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), s.tokens, s.profiles, s.experts, s.top_k, s.norm,
                            out<float>(weight), out<int32_t>(expert), out<float>(load), out<float>(weight_sum), out<float>(entropy),
                            out<float>(invalid), out<float>(partial), chunks, current_stream(hidden));
      check_launch();
      return;
    }
#endif
    const cpu::GateArguments<T> a{in<T>(hidden), in<float>(profile), in<int64_t>(index), s.profiles, s.experts, s.top_k, s.norm};
    const int64_t step = chunk_tokens(s.tokens), chunks = ceiling(s.tokens, step);
    std::vector<float> partial(chunks * 2 * s.experts, 0.0f);
    std::vector<cpu::GateTotals> totals(chunks);
    float* weight_TK = out<float>(weight);
    int32_t* expert_TK = out<int32_t>(expert);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float* load_E = partial.data() + c * 2 * s.experts;
        cpu::gate_forward(a, c * step, std::min(s.tokens, (c + 1) * step), weight_TK, expert_TK, load_E, load_E + s.experts, totals[c]);
      }
    });
    double entropy_sum = 0;
    int64_t invalid_sum = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      check(totals[c].bad_index < 0, "profile_index is ", in<int64_t>(index)[std::max<int64_t>(0, totals[c].bad_index)], " at token ",
            totals[c].bad_index, "; expected -1 (padding) or below ", s.profiles);
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
                                         const std::optional<Tensor>& d_weight, const std::optional<Tensor>& d_weight_sum, int64_t norm) {
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
      cuda::gate_backward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), s.tokens, s.profiles, s.experts, s.top_k, s.norm,
                             in<float>(weight_in), in<int32_t>(expert_in), in<float>(d_weight_in), in<float>(d_sum_in), out<T>(d_hidden),
                             sums ? out<float>(d_profile) : nullptr, sums ? out<float>(gradient) : nullptr,
                             sums ? out<float>(partial) : nullptr, chunks, current_stream(hidden));
      check_launch();
      return;
    }
#endif
    const cpu::GateArguments<T> a{in<T>(hidden), in<float>(profile), in<int64_t>(index), s.profiles, s.experts, s.top_k, s.norm};
    const int64_t step = chunk_tokens(s.tokens), chunks = ceiling(s.tokens, step);
    std::vector<float> partial(profile.has_value() ? chunks * floats : 0, 0.0f);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        cpu::gate_backward(a, c * step, std::min(s.tokens, (c + 1) * step), in<float>(weight_in), in<int32_t>(expert_in),
                           in<float>(d_weight_in), in<float>(d_sum_in), out<T>(d_hidden),
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

// --------------------------------------------------------------------------------------------------------------- scale

struct ScaleSizes {
  int64_t tokens, rank;
  int experts, top_k;
  bool shared;
};

ScaleSizes scale_sizes(const Tensor& z, const Tensor& weight, int64_t experts) {
  check(z.dim() == 3, "z has ", z.dim(), " dimensions; expected 3, [T, E, r] or [T, 1, r]");
  check(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; expected 2, [T, K]");
  check(experts >= 1 && experts <= kMaxExperts, "num_experts is ", experts, "; expected 1 to ", kMaxExperts);
  check(z.size(1) == experts || z.size(1) == 1, "z has ", z.size(1), " experts; expected ", experts, ", or 1 when shared");
  check(weight.size(1) <= experts, "weight has ", weight.size(1), " columns; expected at most num_experts, ", experts);
  return {z.size(0), z.size(2), static_cast<int>(experts), static_cast<int>(weight.size(1)), z.size(1) == 1};
}

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
                             static_cast<int>(s.rank), s.shared, static_cast<float>(scale), out<T>(result), current_stream(z_in));
      check_launch();
      return;
    }
#endif
    const cpu::ScaleArguments<T> a{in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.experts, s.top_k, s.rank, s.shared,
                                   static_cast<float>(scale)};
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, s.tokens, grain(s.experts * s.rank), [&](int64_t begin, int64_t end) {
      if (!cpu::scale_forward(a, begin, end, out<T>(result))) good = false;
    });
    check(good, "expert has an index out of range; expected -1 (not routed) or below ", s.experts);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_scale_backward(const Tensor& d_out, const Tensor& z, const Tensor& weight,
                                                               const Tensor& expert, double scale, const std::optional<Tensor>& mask,
                                                               const std::optional<Tensor>& profile_index) {
  check(d_out.dim() == 3, "d_out has ", d_out.dim(), " dimensions; expected 3, [T, E, r]");
  const ScaleSizes s = scale_sizes(z, weight, d_out.size(1));
  const Tensor z_in = torch::stable::contiguous(z);
  const Tensor d_out_in = checked("d_out", d_out, z_in.scalar_type(), {s.tokens, s.experts, s.rank}, z_in);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.tokens, s.top_k}, z_in);
  const Tensor expert_in = checked("expert", expert, ScalarType::Int, {s.tokens, s.top_k}, z_in);
  check(mask.has_value() == profile_index.has_value(), "mask and profile_index must be given together");
  if (mask.has_value()) check(mask->dim() == 2, "mask has ", mask->dim(), " dimensions; expected 2, [N, E]");
  const int64_t profiles = mask.has_value() ? mask->size(0) : 0;
  const auto mask_in = checked("mask", mask, ScalarType::Float, {profiles, s.experts}, z_in);
  const auto index_in = checked("profile_index", profile_index, ScalarType::Long, {s.tokens}, z_in);
  const Sizes z_sizes = sizes_of(z_in);
  Tensor d_z = empty(z_in, z_sizes, z_in.scalar_type());
  Tensor d_weight = empty(z_in, {s.tokens, s.top_k}, ScalarType::Float);
  Tensor masked_d_z = empty(z_in, mask.has_value() ? z_sizes : Sizes{0}, z_in.scalar_type());
  Tensor masked_out = empty(z_in, mask.has_value() ? sizes_of(d_out_in) : Sizes{0}, z_in.scalar_type());
  const std::tuple<Tensor, Tensor, Tensor, Tensor> result{d_z, d_weight, masked_d_z, masked_out};
  if (s.tokens == 0) return result;
  by_type("z", z_in, [&](auto sample) {
    using T = decltype(sample);
    T* masked_d_z_out = mask.has_value() ? out<T>(masked_d_z) : nullptr;
    T* masked_out_out = mask.has_value() ? out<T>(masked_out) : nullptr;
#ifdef CUMA_WITH_CUDA
    if (z_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(z_in.get_device_index());
      cuda::scale_backward<T>(in<T>(d_out_in), in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), in<float>(mask_in),
                              in<int64_t>(index_in), s.tokens, profiles, s.experts, s.top_k, static_cast<int>(s.rank), s.shared,
                              static_cast<float>(scale), out<T>(d_z), out<float>(d_weight), masked_d_z_out, masked_out_out,
                              current_stream(z_in));
      check_launch();
      return;
    }
#endif
    const cpu::ScaleArguments<T> a{in<T>(z_in), in<float>(weight_in), in<int32_t>(expert_in), s.experts, s.top_k, s.rank, s.shared,
                                   static_cast<float>(scale)};
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, s.tokens, grain(2 * s.experts * s.rank), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * s.rank);
      if (!cpu::scale_backward(a, begin, end, in<T>(d_out_in), in<float>(mask_in), in<int64_t>(index_in), profiles, out<T>(d_z),
                               out<float>(d_weight), masked_d_z_out, masked_out_out, scratch.data())) {
        good = false;
      }
    });
    check(good, "expert or profile_index has an index out of range; expected -1 or below ", s.experts, " and ", profiles);
  });
  return result;
}

// ------------------------------------------------------------------------------------------------------------- permute

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& expert, int64_t num_experts) {
  check(expert.dim() == 2, "expert has ", expert.dim(), " dimensions; expected 2, [T, K]");
  check_type("expert", expert, ScalarType::Int);
  check(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts is ", num_experts, "; expected 1 to ", kMaxExperts);
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
    cuda::sort_assignments(in<int32_t>(expert_in), assignments, experts, out<int32_t>(order), out<int32_t>(position), out<int32_t>(end),
                           out<int32_t>(counts), chunks, current_stream(expert_in));
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
      if (!cpu::count_experts(in<int32_t>(expert_in), c * step, last, experts, next_CE.data() + c * experts)) good = false;
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
      cpu::place_experts(in<int32_t>(expert_in), c * step, std::min(assignments, (c + 1) * step), experts, next_CE.data() + c * experts,
                         out<int32_t>(order), out<int32_t>(position));
    }
  });
  return result;
}

Tensor permute_gather(const Tensor& x, const Tensor& order, const Tensor& position, const std::optional<Tensor>& weight) {
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
      cuda::gather_rows<T>(in<T>(x_in), in<int32_t>(order_in), in<float>(weight_in), rows, static_cast<int>(top_k), width,
                           out<T>(result), current_stream(x_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      if (!cpu::gather_rows(in<T>(x_in), in<int32_t>(order_in), in<float>(weight_in), begin, end, rows, static_cast<int>(top_k), width,
                            out<T>(result))) {
        good = false;
      }
    });
    check(good, "order has an index out of range; expected -1 or below ", rows);
  });
  return result;
}

Tensor permute_scatter(const Tensor& y, const Tensor& order, const Tensor& position, const std::optional<Tensor>& weight) {
  check(y.dim() == 2, "y has ", y.dim(), " dimensions; expected 2, [M, W]");
  check(position.dim() == 2, "position has ", position.dim(), " dimensions; expected 2, [T, K]");
  const Tensor y_in = torch::stable::contiguous(y);
  const int64_t rows = y_in.size(0), width = y_in.size(1), tokens = position.size(0), top_k = position.size(1);
  const Tensor position_in = checked("position", position, ScalarType::Int, {tokens, top_k}, y_in);
  check_sizes("order", order, {rows});  // for the gradient
  const auto weight_in = checked("weight", weight, ScalarType::Float, {tokens, top_k}, y_in);
  Tensor result = empty(y_in, {tokens, width}, y_in.scalar_type());
  if (result.numel() == 0) return result;
  by_type("y", y_in, [&](auto sample) {
    using T = decltype(sample);
#ifdef CUMA_WITH_CUDA
    if (y_in.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(y_in.get_device_index());
      cuda::scatter_rows<T>(in<T>(y_in), in<int32_t>(position_in), in<float>(weight_in), tokens, rows, static_cast<int>(top_k), width,
                            out<T>(result), current_stream(y_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, tokens, grain(width * top_k), [&](int64_t begin, int64_t end) {
      if (!cpu::scatter_rows(in<T>(y_in), in<int32_t>(position_in), in<float>(weight_in), begin, end, rows, static_cast<int>(top_k), width,
                             out<T>(result))) {
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
      cuda::row_products<T>(in<T>(d_in), in<T>(y_in), in<int32_t>(position_in), tokens, rows, static_cast<int>(top_k), width,
                            out<float>(result), current_stream(y_in));
      check_launch();
      return;
    }
#endif
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, tokens, grain(width * top_k), [&](int64_t begin, int64_t end) {
      if (!cpu::row_products(in<T>(d_in), in<T>(y_in), in<int32_t>(position_in), begin, end, rows, static_cast<int>(top_k), width,
                             out<float>(result))) {
        good = false;
      }
    });
    check(good, "position has an index out of range; expected -1 or below ", rows);
  });
  return result;
}

// ------------------------------------------------------------------------------------------------------------- grouped

struct GroupedSizes {
  int64_t tokens, pairs, narrow, wide;
  int experts, top_k;
};

GroupedSizes grouped_sizes(const Tensor& position, const Tensor& end, int64_t narrow, int64_t wide) {
  check(position.dim() == 2, "position has ", position.dim(), " dimensions; expected 2, [T, K]");
  check(end.dim() == 1 && end.size(0) >= 1, "end has shape ", text_of(sizes_of(end)), "; expected [E]");
  return {position.size(0), position.numel(), narrow, wide, static_cast<int>(end.size(0)), static_cast<int>(position.size(1))};
}

cpu::Pairs pairs_of(const GroupedSizes& s, const Tensor& order, const Tensor& end) {
  const cpu::Pairs pairs{in<int32_t>(order), in<int32_t>(end), s.experts, s.top_k, s.tokens};
  check(pairs.valid(), "order or end is out of range or not ascending; expected what sort_by_expert returns");
  return pairs;
}

Tensor grouped_shrink(const Tensor& x, const Tensor& weight, const Tensor& order, const Tensor& position, const Tensor& end) {
  check(weight.dim() == 3, "weight has ", weight.dim(), " dimensions; expected 3, [E, J, I]");
  const GroupedSizes s = grouped_sizes(position, end, weight.size(1), weight.size(2));
  const Tensor x_in = checked("x", x, ScalarType::Float, {s.tokens, s.wide}, x);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.experts, s.narrow, s.wide}, x_in);
  const Tensor order_in = checked("order", order, ScalarType::Int, {s.pairs}, x_in);
  const Tensor end_in = checked("end", end, ScalarType::Int, {s.experts}, x_in);
  const cpu::Pairs pairs = pairs_of(s, order_in, end_in);
  Tensor result = s.wide > 0 ? empty(x_in, {s.pairs, s.narrow}, ScalarType::Float) : zeros(x_in, {s.pairs, s.narrow}, ScalarType::Float);
  const std::vector<cpu::Span> spans = cpu::spans_of(pairs, cpu::kShrinkSpan);
  torch::stable::parallel_for(0, spans.size(), grain(cpu::kShrinkSpan * s.narrow * s.wide / 16), [&](int64_t begin, int64_t stop) {
    cpu::shrink(pairs, spans.data() + begin, spans.data() + stop, in<float>(x_in), in<float>(weight_in), s.narrow, s.wide,
                out<float>(result));
  });
  return result;
}

Tensor grouped_expand(const Tensor& z, const Tensor& weight, const Tensor& order, const Tensor& position, const Tensor& end,
                      const std::optional<Tensor>& onto) {
  check(weight.dim() == 3, "weight has ", weight.dim(), " dimensions; expected 3, [E, J, I]");
  const GroupedSizes s = grouped_sizes(position, end, weight.size(1), weight.size(2));
  const Tensor z_in = checked("z", z, ScalarType::Float, {s.pairs, s.narrow}, z);
  const Tensor weight_in = checked("weight", weight, ScalarType::Float, {s.experts, s.narrow, s.wide}, z_in);
  const Tensor order_in = checked("order", order, ScalarType::Int, {s.pairs}, z_in);
  const Tensor end_in = checked("end", end, ScalarType::Int, {s.experts}, z_in);
  const auto onto_in = checked("onto", onto, ScalarType::Float, {s.tokens, s.wide}, z_in);
  const cpu::Pairs pairs = pairs_of(s, order_in, end_in);
  Tensor result = empty(z_in, {s.tokens, s.wide}, ScalarType::Float);
  if (result.numel() == 0) return result;
  const int64_t columns = cpu::chunk_columns(s.wide, cpu::kExpandColumns), blocks = ceiling(s.tokens, cpu::kExpandTokens);
  const int64_t work = cpu::kExpandTokens * s.top_k * std::max<int64_t>(8, s.narrow) * columns / 16;
  torch::stable::parallel_for(0, ceiling(s.wide, columns) * blocks, grain(work), [&](int64_t begin, int64_t stop) {
    cpu::Expand expand(pairs, in<float>(z_in), in<float>(weight_in), in<float>(onto_in), s.narrow, s.wide);
    for (int64_t u = begin; u < stop; ++u) {
      const int64_t t = u % blocks * cpu::kExpandTokens, i = u / blocks * columns;
      expand(t, std::min(s.tokens, t + cpu::kExpandTokens), i, std::min(columns, s.wide - i), out<float>(result));
    }
  });
  return result;
}

Tensor grouped_outer(const Tensor& z, const Tensor& x, const Tensor& order, const Tensor& position, const Tensor& end) {
  check(z.dim() == 2, "z has ", z.dim(), " dimensions; expected 2, [M, J]");
  check(x.dim() == 2, "x has ", x.dim(), " dimensions; expected 2, [T, I]");
  const GroupedSizes s = grouped_sizes(position, end, z.size(1), x.size(1));
  const Tensor z_in = checked("z", z, ScalarType::Float, {s.pairs, s.narrow}, z);
  const Tensor x_in = checked("x", x, ScalarType::Float, {s.tokens, s.wide}, z_in);
  const Tensor order_in = checked("order", order, ScalarType::Int, {s.pairs}, z_in);
  const Tensor end_in = checked("end", end, ScalarType::Int, {s.experts}, z_in);
  const cpu::Pairs pairs = pairs_of(s, order_in, end_in);
  Tensor result = empty(z_in, {s.experts, s.narrow, s.wide}, ScalarType::Float);
  if (result.numel() == 0) return result;
  const int64_t columns = cpu::chunk_columns(s.wide, cpu::kOuterColumns), chunks = ceiling(s.wide, columns);
  const int64_t work = (s.pairs / s.experts + 1) * s.narrow * columns / 16;
  torch::stable::parallel_for(0, chunks * s.experts, grain(work), [&](int64_t begin, int64_t stop) {
    cpu::Outer outer(pairs, in<float>(z_in), in<float>(x_in), s.narrow, s.wide);
    for (int64_t u = begin; u < stop; ++u) {
      const int64_t i = u / s.experts * columns;
      outer(static_cast<int>(u % s.experts), i, std::min(columns, s.wide - i), out<float>(result));
    }
  });
  return result;
}

}  // namespace
}  // namespace cuma

STABLE_TORCH_LIBRARY(cuma_ds, m) {
  m.def(
      "gate(Tensor hidden_logits, Tensor? profile_logits, Tensor profile_index, int top_k, int norm) -> "
      "(Tensor weight, Tensor expert, Tensor load, Tensor weight_sum, Tensor entropy, Tensor invalid)");
  m.def(
      "gate_backward(Tensor hidden_logits, Tensor? profile_logits, Tensor profile_index, Tensor weight, Tensor expert, "
      "Tensor? d_weight, Tensor? d_weight_sum, int norm) -> (Tensor d_hidden_logits, Tensor d_profile_logits)");
  m.def("gate_scale(Tensor z, Tensor weight, Tensor expert, int num_experts, float scale) -> Tensor");
  m.def(
      "gate_scale_backward(Tensor d_out, Tensor z, Tensor weight, Tensor expert, float scale, Tensor? mask, Tensor? profile_index) -> "
      "(Tensor d_z, Tensor d_weight, Tensor masked_d_z, Tensor masked_out)");
  m.def("sort_by_expert(Tensor expert, int num_experts) -> (Tensor order, Tensor position, Tensor end)");
  m.def("permute_gather(Tensor x, Tensor order, Tensor position, Tensor? weight) -> Tensor");
  m.def("permute_scatter(Tensor y, Tensor order, Tensor position, Tensor? weight) -> Tensor");
  m.def("permute_products(Tensor d, Tensor y, Tensor position) -> Tensor");
  m.def("grouped_shrink(Tensor x, Tensor weight, Tensor order, Tensor position, Tensor end) -> Tensor");
  m.def("grouped_expand(Tensor z, Tensor weight, Tensor order, Tensor position, Tensor end, Tensor? onto) -> Tensor");
  m.def("grouped_outer(Tensor z, Tensor x, Tensor order, Tensor position, Tensor end) -> Tensor");
}

#define CUMA_IMPLEMENT(m)                                              \
  m.impl("gate", TORCH_BOX(&cuma::gate));                              \
  m.impl("gate_backward", TORCH_BOX(&cuma::gate_backward));            \
  m.impl("gate_scale", TORCH_BOX(&cuma::gate_scale));                  \
  m.impl("gate_scale_backward", TORCH_BOX(&cuma::gate_scale_backward)); \
  m.impl("sort_by_expert", TORCH_BOX(&cuma::sort_by_expert));          \
  m.impl("permute_gather", TORCH_BOX(&cuma::permute_gather));          \
  m.impl("permute_scatter", TORCH_BOX(&cuma::permute_scatter));        \
  m.impl("permute_products", TORCH_BOX(&cuma::permute_products))

STABLE_TORCH_LIBRARY_IMPL(cuma_ds, CPU, m) {
  CUMA_IMPLEMENT(m);
  m.impl("grouped_shrink", TORCH_BOX(&cuma::grouped_shrink));  // GPUs have torch's grouped products
  m.impl("grouped_expand", TORCH_BOX(&cuma::grouped_expand));
  m.impl("grouped_outer", TORCH_BOX(&cuma::grouped_outer));
}
#ifdef CUMA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(cuma_ds, CUDA, m) { CUMA_IMPLEMENT(m); }
#endif

// An empty module: importing it registers the operators above. BUILD tells what they were built for.
static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&module_definition);
  if (module != nullptr) PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", CUMA_CUDA_ARCHITECTURES);
  return module;
}

// What the operators share: checked arguments, new tensors, element types, the CUDA stream. torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/gate_math.h"
#ifdef CUMA_WITH_CUDA
#include <dlfcn.h>

#include "cuda/launch.h"
#endif

namespace cuma {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline std::string text_of(int64_t number) { return std::to_string(number); }
inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// Throws the parts as one line. They are strings, not a stream: the streams of a libstdc++ that is linked statically,
// as some compilers do by default, crash beside the one that torch has loaded.
template <typename... Parts>
void check(bool good, const Parts&... parts) {
  if (!good) throw std::runtime_error((text_of(parts) + ...));
}

inline const char* name_of(ScalarType type) {
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

inline Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes(tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return sizes;
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " is ", name_of(tensor.scalar_type()), "; expected ",
        name_of(expected));
}

inline void check_sizes(const char* name, const Tensor& tensor, const Sizes& expected) {
  check(sizes_of(tensor) == expected, name, " has shape ", sizes_of(tensor), "; expected ", expected);
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& beside) {
  check(tensor.is_cuda() == beside.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
        " is on another device than the first argument");
}

// Type, shape and device of an argument in one line.
inline Tensor checked(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes,
                      const Tensor& beside) {
  check_type(name, tensor, type);
  check_sizes(name, tensor, sizes);
  check_device(name, tensor, beside);
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& tensor, ScalarType type,
                                     const Sizes& sizes,
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

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}
inline Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

// A tensor that the CPU code adds to. CUDA kernels write all of it, so on CUDA it is not filled first.
inline Tensor sums(const Tensor& like, const Sizes& sizes, ScalarType type, bool filled) {
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
// The stream that torch uses, looked up in the library that torch has loaded. Linking against that library would tie
// the binary to CUDA builds of torch.
inline cudaStream_t current_stream(const Tensor& tensor) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    if (library == nullptr) return Function{nullptr};
    return reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  check(function != nullptr, "this torch does not tell its CUDA stream; set CUMA_DS_OPS=reference");
  void* stream = nullptr;
  check(function(tensor.get_device_index(), &stream) == 0, "torch refused to tell its CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}
#endif

constexpr int64_t kChunkTokens = 512;
constexpr int64_t kMostChunks = 64;

// Tokens per chunk. Sums are kept per chunk and added in order, so that results do not depend on the number of threads.
inline int64_t chunk_tokens(int64_t tokens) { return std::max(kChunkTokens, (tokens + kMostChunks - 1) / kMostChunks); }

inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The fewest tokens that a thread is started for, when one token takes `work` elementary steps.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)); }

}  // namespace cuma

// The launchers of csrc/cuda behind plain C functions, with the scratch memory that csrc/*.cpp give them.
// `type` is 0 float32, 1 bfloat16, 2 float16. Each returns a null pointer, or what went wrong.

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

template <typename Body>
const char* run(int64_t type, const Body& body) {
  static std::string message;
  try {
    if (type == 0) body(float{});
    if (type == 1) body(cuma::BFloat16{});
    if (type == 2) body(cuma::Float16{});
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <typename T>
const T* in(const void* place) {
  return static_cast<const T*>(place);
}

template <typename T>
T* out(void* place) {
  return static_cast<T*>(place);
}

}  // namespace

#define EMULATED extern "C" __attribute__((visibility("default"))) const char*
using namespace cuma;

EMULATED set_backwards(int64_t on) {
  emulator::backwards = on != 0;
  return nullptr;
}

EMULATED gate(int64_t type, const void* hidden, const void* profile, const void* index, int64_t tokens,
              int64_t profiles, int64_t experts, int64_t top_k, int64_t norm, void* weight, void* expert, void* load,
              void* weight_sum, void* entropy, void* invalid) {
  return run(type, [&](auto sample) {
    using T = decltype(sample);
    const int chunks = cuda::gate_chunks(tokens, 2 * experts + 2);
    std::vector<float> partial(chunks * (2 * experts + 2), NAN);
    cuda::gate_forward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), tokens, profiles,
                          static_cast<int>(experts), static_cast<int>(top_k), static_cast<GateNorm>(norm),
                          out<float>(weight), out<int32_t>(expert), out<float>(load), out<float>(weight_sum),
                          out<float>(entropy), out<float>(invalid), partial.data(), chunks, nullptr);
  });
}

EMULATED gate_backward(int64_t type, const void* hidden, const void* profile, const void* index, int64_t tokens,
                       int64_t profiles, int64_t experts, int64_t top_k, int64_t norm, const void* weight,
                       const void* expert, const void* d_weight, const void* d_weight_sum, void* d_hidden,
                       void* d_profile) {
  return run(type, [&](auto sample) {
    using T = decltype(sample);
    const bool sums = profile != nullptr;
    const int chunks = cuda::gate_chunks(tokens, profiles * experts);
    std::vector<float> gradient(sums ? tokens * experts : 0, NAN), partial(sums ? chunks * profiles * experts : 0, NAN);
    cuda::gate_backward<T>(in<T>(hidden), in<float>(profile), in<int64_t>(index), tokens, profiles,
                           static_cast<int>(experts), static_cast<int>(top_k), static_cast<GateNorm>(norm),
                           in<float>(weight), in<int32_t>(expert), in<float>(d_weight), in<float>(d_weight_sum),
                           out<T>(d_hidden), sums ? out<float>(d_profile) : nullptr, sums ? gradient.data() : nullptr,
                           sums ? partial.data() : nullptr, chunks, nullptr);
  });
}

EMULATED gate_scale(int64_t type, const void* z, const void* weight, const void* expert, int64_t tokens,
                    int64_t experts, int64_t top_k, int64_t rank, int64_t shared, double scale, void* result) {
  return run(type, [&](auto sample) {
    using T = decltype(sample);
    cuda::scale_forward<T>(in<T>(z), in<float>(weight), in<int32_t>(expert), tokens, static_cast<int>(experts),
                           static_cast<int>(top_k), static_cast<int>(rank), shared != 0, static_cast<float>(scale),
                           out<T>(result), nullptr);
  });
}

EMULATED gate_scale_backward(int64_t type, const void* d_out, const void* z, const void* weight, const void* expert,
                             int64_t tokens, int64_t experts, int64_t top_k, int64_t rank, int64_t shared, double scale,
                             void* d_z, void* d_weight) {
  return run(type, [&](auto sample) {
    using T = decltype(sample);
    cuda::scale_backward<T>(in<T>(d_out), in<T>(z), in<float>(weight), in<int32_t>(expert), tokens,
                            static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(rank), shared != 0,
                            static_cast<float>(scale), out<T>(d_z), out<float>(d_weight), nullptr);
  });
}

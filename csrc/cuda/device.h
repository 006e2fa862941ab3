// What the kernels share: sums over groups of lanes, vectors of elements, grids of rows.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "launch.h"

namespace cuma::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;

// The sum over the kGroup neighbouring lanes of a warp (a power of two), for every lane, in one fixed order.
template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <int kGroup>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T element[kSize];
};

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> load_vector(const T* place) {
  return *reinterpret_cast<const Vector<T, kSize>*>(place);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_vector(T* place, const Vector<T, kSize>& vector) {
  *reinterpret_cast<Vector<T, kSize>*>(place) = vector;
}

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> scaled(const Vector<T, kSize>& vector, float factor) {
  Vector<T, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) from_float(factor * to_float(vector.element[i]), result.element[i]);
  return result;
}

// Whether rows of `width` elements of T can be read 16 bytes at a time from all these places.
template <typename T, typename... Places>
bool can_vectorise(int64_t width, const Places*... places) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(places) | ... | uintptr_t{0});
  return width % static_cast<int64_t>(16 / sizeof(T)) == 0 && bits % 16 == 0;
}

// A block takes `block.y` rows. Its x threads step through the elements of each row.
struct RowGrid {
  dim3 block, grid;
};

inline RowGrid row_grid(int64_t rows, int64_t steps) {
  unsigned x = 1;
  while (x < steps && x < kThreads) x *= 2;
  const unsigned y = kThreads / x;
  return {dim3(x, y), dim3(static_cast<unsigned>((rows + y - 1) / y))};
}

__device__ __forceinline__ int64_t grid_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace cuma::cuda

// Every launcher is built for the three element types.
#define CUMA_FOR_EACH_TYPE(build) build(float) build(BFloat16) build(Float16)

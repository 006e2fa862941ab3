// Sorting token-to-expert assignments on CUDA by a stable counting sort, and moving the rows.

#include "device.h"

namespace cuma::cuda {
namespace {

// One warp per chunk counts its assignments per expert into counts_EC.
__global__ void sort_count(const int32_t* expert_M, int64_t assignments, int experts, int64_t step,
                           int32_t* counts_EC) {
  extern __shared__ int32_t count_E[];
  const int lane = static_cast<int>(threadIdx.x);
  const int chunk = static_cast<int>(blockIdx.x), chunks = static_cast<int>(gridDim.x);
  for (int e = lane; e < experts; e += kWarp) count_E[e] = 0;
  __syncwarp();
  const int64_t begin = chunk * step, end = begin + step < assignments ? begin + step : assignments;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t m = first + lane;
    int expert = m < end ? expert_M[m] : -1;
    if (expert < 0 || expert >= experts) expert = -1;
    const unsigned peers = __match_any_sync(kAllLanes, expert);
    if (expert >= 0 && lane == __ffs(static_cast<int>(peers)) - 1) count_E[expert] += __popc(peers);
    __syncwarp();
  }
  for (int e = lane; e < experts; e += kWarp) counts_EC[static_cast<int64_t>(e) * chunks + chunk] = count_E[e];
}

// Inclusive sum over the lanes of a warp.
__device__ int32_t lane_prefix(int32_t x, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

// One warp per expert turns counts into the start of each chunk within the expert. The total goes to end_E.
__global__ void sort_scan(int32_t* counts_EC, int chunks, int32_t* end_E) {
  const int lane = static_cast<int>(threadIdx.x);
  int32_t* count_C = counts_EC + static_cast<int64_t>(blockIdx.x) * chunks;
  int32_t before = 0;
  for (int first = 0; first < chunks; first += kWarp) {
    const int c = first + lane;
    const int32_t count = c < chunks ? count_C[c] : 0;
    const int32_t prefix = lane_prefix(count, lane);
    if (c < chunks) count_C[c] = before + prefix - count;
    before += __shfl_sync(kAllLanes, prefix, kWarp - 1);
  }
  if (lane == 0) end_E[blockIdx.x] = before;
}

// One warp turns the totals per expert into the ends of their places.
__global__ void sort_ends(int32_t* end_E, int experts) {
  const int lane = static_cast<int>(threadIdx.x);
  int32_t before = 0;
  for (int first = 0; first < experts; first += kWarp) {
    const int e = first + lane;
    const int32_t prefix = lane_prefix(e < experts ? end_E[e] : 0, lane);
    if (e < experts) end_E[e] = before + prefix;
    before += __shfl_sync(kAllLanes, prefix, kWarp - 1);
  }
}

// One warp per chunk places its assignments; equal experts of a warp keep their order.
__global__ void sort_place(const int32_t* expert_M, int64_t assignments, int experts, int64_t step,
                           const int32_t* counts_EC, const int32_t* end_E, int32_t* order_M, int32_t* position_M) {
  extern __shared__ int32_t next_E[];
  const int lane = static_cast<int>(threadIdx.x);
  const int chunk = static_cast<int>(blockIdx.x), chunks = static_cast<int>(gridDim.x);
  for (int e = lane; e < experts; e += kWarp) {
    next_E[e] = (e > 0 ? end_E[e - 1] : 0) + counts_EC[static_cast<int64_t>(e) * chunks + chunk];
  }
  __syncwarp();
  const int32_t routed = end_E[experts - 1];
  const int64_t begin = chunk * step, end = begin + step < assignments ? begin + step : assignments;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t m = first + lane;
    int expert = m < end ? expert_M[m] : -1;
    if (expert < 0 || expert >= experts) expert = -1;
    const unsigned peers = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(peers & ((1u << lane) - 1u));
    int32_t place = -1;
    if (expert >= 0) {
      place = next_E[expert] + rank;
      order_M[place] = static_cast<int32_t>(m);
    }
    __syncwarp();
    if (expert >= 0 && rank == 0) next_E[expert] += __popc(peers);
    __syncwarp();
    if (m < end) {
      position_M[m] = place;
      if (m >= routed) order_M[m] = -1;
    }
  }
}

template <typename T, int kSize>
__global__ void gather_kernel(const T* x_TW, const int32_t* order_M, const float* weight_M, int64_t assignments,
                              int top_k, int64_t width, T* out_MW) {
  const int64_t m = grid_row();
  if (m >= assignments) return;
  const int32_t from = order_M[m];
  const bool good = from >= 0 && from < assignments;
  const T* x_W = x_TW + (good ? from / top_k : 0) * width;
  const float weight = good && weight_M != nullptr ? weight_M[from] : 1.0f;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize, stride = static_cast<int64_t>(blockDim.x) * kSize;
  for (int64_t j = first; j < width; j += stride) {
    Vector<T, kSize> value{};
    if (good) value = load_vector<T, kSize>(x_W + j);
    store_vector<T, kSize>(out_MW + m * width + j, weight_M != nullptr && good ? scaled(value, weight) : value);
  }
}

template <typename T, int kSize>
__global__ void scatter_kernel(const T* y_MW, const int32_t* position_TK, const float* weight_TK, int64_t tokens,
                               int64_t rows, int top_k, int64_t width, T* out_TW) {
  const int64_t t = grid_row();
  if (t >= tokens) return;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize, stride = static_cast<int64_t>(blockDim.x) * kSize;
  for (int64_t j = first; j < width; j += stride) {
    float sum[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = 0.0f;
    for (int k = 0; k < top_k; ++k) {
      const int32_t position = position_TK[t * top_k + k];
      if (position < 0 || position >= rows) continue;
      const float weight = weight_TK != nullptr ? weight_TK[t * top_k + k] : 1.0f;
      const Vector<T, kSize> value = load_vector<T, kSize>(y_MW + position * width + j);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] += weight * to_float(value.element[i]);
    }
    Vector<T, kSize> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) from_float(sum[i], result.element[i]);
    store_vector<T, kSize>(out_TW + t * width + j, result);
  }
}

// One warp per assignment.
template <typename T>
__global__ void products_kernel(const T* d_TW, const T* y_MW, const int32_t* position_TK, int64_t assignments,
                                int64_t rows, int top_k, int64_t width, float* out_TK) {
  const int64_t m = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (m >= assignments) return;
  const int32_t position = position_TK[m];
  float dot = 0.0f;
  if (position >= 0 && position < rows) {
    const T* d_W = d_TW + m / top_k * width;
    const T* y_W = y_MW + position * width;
    for (int64_t j = lane; j < width; j += kWarp) dot += to_float(d_W[j]) * to_float(y_W[j]);
  }
  dot = group_sum<kWarp>(dot);
  if (lane == 0) out_TK[m] = dot;
}

}  // namespace

int sort_chunks(int64_t assignments) {
  const int64_t chunks = (assignments + 1023) / 1024;
  return static_cast<int>(chunks < 1024 ? (chunks > 1 ? chunks : 1) : 1024);
}

void sort_assignments(const int32_t* expert_M, int64_t assignments, int experts, int32_t* order_M, int32_t* position_M,
                      int32_t* end_E, int32_t* counts_EC, int chunks, cudaStream_t stream) {
  const int64_t step = (assignments + chunks - 1) / chunks;
  const size_t shared = experts * sizeof(int32_t);
  sort_count<<<chunks, kWarp, shared, stream>>>(expert_M, assignments, experts, step, counts_EC);
  sort_scan<<<experts, kWarp, 0, stream>>>(counts_EC, chunks, end_E);
  sort_ends<<<1, kWarp, 0, stream>>>(end_E, experts);
  sort_place<<<chunks, kWarp, shared, stream>>>(expert_M, assignments, experts, step, counts_EC, end_E, order_M,
                                                position_M);
}

template <typename T>
void gather_rows(const T* x_TW, const int32_t* order_M, const float* weight_M, int64_t assignments, int top_k,
                 int64_t width, T* out_MW, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const bool wide = can_vectorise<T>(width, x_TW, out_MW);
  const RowGrid rows = row_grid(assignments, width / (wide ? kSize : 1));
  if (wide) {
    gather_kernel<T, kSize><<<rows.grid, rows.block, 0, stream>>>(x_TW, order_M, weight_M, assignments, top_k, width,
                                                                  out_MW);
  } else {
    gather_kernel<T, 1><<<rows.grid, rows.block, 0, stream>>>(x_TW, order_M, weight_M, assignments, top_k, width,
                                                              out_MW);
  }
}

template <typename T>
void scatter_rows(const T* y_MW, const int32_t* position_TK, const float* weight_TK, int64_t tokens, int64_t rows,
                  int top_k, int64_t width, T* out_TW, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const bool wide = can_vectorise<T>(width, y_MW, out_TW);
  const RowGrid grid = row_grid(tokens, width / (wide ? kSize : 1));
  if (wide) {
    scatter_kernel<T, kSize><<<grid.grid, grid.block, 0, stream>>>(y_MW, position_TK, weight_TK, tokens, rows, top_k,
                                                                   width, out_TW);
  } else {
    scatter_kernel<T, 1><<<grid.grid, grid.block, 0, stream>>>(y_MW, position_TK, weight_TK, tokens, rows, top_k, width,
                                                               out_TW);
  }
}

template <typename T>
void row_products(const T* d_TW, const T* y_MW, const int32_t* position_TK, int64_t tokens, int64_t rows, int top_k,
                  int64_t width, float* out_TK, cudaStream_t stream) {
  const int64_t assignments = tokens * top_k;
  products_kernel<T><<<blocks_for(assignments * kWarp), kThreads, 0, stream>>>(d_TW, y_MW, position_TK, assignments,
                                                                               rows, top_k, width, out_TK);
}

#define CUMA_BUILD(T)                                                                                                \
  template void gather_rows<T>(const T*, const int32_t*, const float*, int64_t, int, int64_t, T*, cudaStream_t);     \
  template void scatter_rows<T>(const T*, const int32_t*, const float*, int64_t, int64_t, int, int64_t, T*,          \
                                cudaStream_t);                                                                       \
  template void row_products<T>(const T*, const T*, const int32_t*, int64_t, int64_t, int, int64_t, float*,          \
                                cudaStream_t);
CUMA_FOR_EACH_TYPE(CUMA_BUILD)

}  // namespace cuma::cuda

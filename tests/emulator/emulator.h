// CUDA on the host, as much of it as the kernels use. The lanes of a warp run one after the other until each waits at a
// warp instruction, then go on together; a lane that waits at another instruction than its neighbours, or reads a lane
// that left, is an error. Not here: __syncthreads (so no kernel may use it), atomics, the memory model, time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return 0;
}

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 1 << 16;
// A launch of more threads than this is taken for a mistake; a GPU's own limit on blocks is far beyond.
constexpr uint64_t kMostThreads = uint64_t{1} << 24;

// AddressSanitizer clears its notes on a stack that is left for good; these stacks are not.
#define EMULATOR_JUMPS __attribute__((noinline, no_sanitize("address", "undefined"))) inline

// Where to go on. A jump instead of swapcontext, which asks the operating system for the signal mask each time.
struct Place {
  void* words[5];
};

struct Lane {
  Place place;
  std::vector<char> stack;
  dim3 thread;
  bool done = true;
  const char* waits_at = "";
  uint64_t value = 0;
};

// Lanes and blocks in falling order: whatever leans on the order of lanes between two warp instructions then differs.
inline bool backwards = false;
inline Lane lanes[kLanes];
inline int current = 0;
inline Place scheduler;
inline bool was_there[kLanes];
inline uint64_t seen[kLanes];  // what each lane brought to the last meeting
inline std::function<void()> kernel;
inline std::string failure;
inline std::vector<char> shared_memory;

EMULATOR_JUMPS void go_to(Place& place) { __builtin_longjmp(place.words, 1); }

EMULATOR_JUMPS void back_to_scheduler() {
  if (__builtin_setjmp(lanes[current].place.words) == 0) go_to(scheduler);
}

// What a lane does for its whole life: one kernel after the other.
inline void lane_main() {
  for (;;) {
    back_to_scheduler();
    kernel();
    lanes[current].done = true;
  }
}

EMULATOR_JUMPS void run_lane(Lane& lane) {
  if (__builtin_setjmp(scheduler.words) != 0) return;
  if (!lane.stack.empty()) go_to(lane.place);
  lane.stack.resize(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = lane.stack.data();
  context.uc_stack.ss_size = lane.stack.size();
  makecontext(&context, lane_main, 0);
  setcontext(&context);
}

// This lane will not go on; the next launch makes new ones.
[[noreturn]] inline void give_up(const std::string& why) {
  if (failure.empty()) failure = why;
  back_to_scheduler();
  std::abort();
}

// All lanes of the warp that have not returned bring a value; afterwards each may read what the others brought.
inline void meet(const char* where, uint64_t value) {
  lanes[current].waits_at = where;
  lanes[current].value = value;
  back_to_scheduler();
}

inline uint64_t from_lane(int source) {
  if (!was_there[source]) give_up("a lane reads from a lane that has returned");
  return seen[source];
}

template <typename T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename T>
T shuffle(const char* name, unsigned mask, T x, int source) {
  if (mask != 0xffffffffu) give_up("only full masks are emulated");
  meet(name, to_bits(x));
  const uint64_t bits = from_lane(source);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline int first_of_segment(int width) { return current & ~(width - 1); }

inline void run_lanes(int count) {
  for (int turn = 0; turn < count && failure.empty(); ++turn) {
    const int i = backwards ? count - 1 - turn : turn;
    if (lanes[i].done) continue;
    current = i;
    threadIdx = lanes[i].thread;
    run_lane(lanes[i]);
  }
}

inline void run_warp(int first_thread, int count) {
  for (int i = 0; i < count; ++i) {
    Lane& lane = lanes[i];
    const unsigned thread = static_cast<unsigned>(first_thread + i);
    lane.thread = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
    if (lane.stack.empty()) {
      current = i;
      run_lane(lane);
    }
    lane.done = false;
  }
  for (int i = count; i < kLanes; ++i) lanes[i].done = true;
  for (;;) {
    run_lanes(count);
    if (!failure.empty()) return;
    const Lane* waiting = nullptr;
    for (int i = 0; i < kLanes; ++i) {
      was_there[i] = !lanes[i].done;
      seen[i] = lanes[i].value;
      if (lanes[i].done) continue;
      if (waiting != nullptr && std::strcmp(waiting->waits_at, lanes[i].waits_at) != 0) {
        failure =
            std::string("lanes of a warp part: some wait at ") + waiting->waits_at + ", some at " + lanes[i].waits_at;
        return;
      }
      waiting = &lanes[i];
    }
    if (waiting == nullptr) return;
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, std::function<void()> body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || blocks * threads > kMostThreads) {
    throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads");
  }
  blockDim = block;
  gridDim = grid;
  kernel = std::move(body);
  failure.clear();
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t b = backwards ? blocks - 1 - turn : turn;
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    shared_memory = std::vector<char>(shared_bytes, static_cast<char>(0x7f));
    for (uint64_t first = 0; first < threads; first += kLanes) {
      run_warp(static_cast<int>(first), static_cast<int>(std::min<uint64_t>(kLanes, threads - first)));
      if (failure.empty()) continue;
      for (Lane& lane : lanes) lane.stack.clear();
      throw std::runtime_error(failure);
    }
  }
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = emulator::kLanes) {
  return emulator::shuffle("__shfl_sync", mask, x, emulator::first_of_segment(width) + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = emulator::kLanes) {
  const int source = emulator::current ^ bits;
  const bool inside = source < emulator::first_of_segment(width) + width;
  return emulator::shuffle("__shfl_xor_sync", mask, x, inside ? source : emulator::current);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = emulator::kLanes) {
  const int source = emulator::current - static_cast<int>(delta);
  const bool inside = source >= emulator::first_of_segment(width);
  return emulator::shuffle("__shfl_up_sync", mask, x, inside ? source : emulator::current);
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T x) {
  emulator::shuffle("__match_any_sync", mask, x, emulator::current);
  unsigned equal = 0;
  for (int i = 0; i < emulator::kLanes; ++i) {
    if (emulator::was_there[i] && emulator::seen[i] == emulator::to_bits(x)) equal |= 1u << i;
  }
  return equal;
}

inline void __syncwarp() { emulator::meet("__syncwarp", 0); }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

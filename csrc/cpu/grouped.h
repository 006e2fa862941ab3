// Products of sorted rows with the matrix of their expert, on the CPU, without copies of the rows: with low ranks, finding and writing a
// row costs as much as multiplying it. In the terms of LoRA serving: shrink (wide to rank), expand (rank to wide), and both gradients.
// Shapes: T tokens, K active, M = T * K pairs of token and expert, P of them that have an expert, E experts, J narrow features (the rank),
// I wide ones. Every sum has one fixed order, whatever the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cuma::cpu {

constexpr int64_t kLanes = 8;
using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using HalfVector = float __attribute__((vector_size(2 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, const Vector& value) { *reinterpret_cast<Vector*>(to) = value; }

inline float sum_of_lanes(const Vector& vector) {
  float lanes[kLanes];
  store(lanes, vector);
  const HalfVector half = *reinterpret_cast<const HalfVector*>(lanes) + *reinterpret_cast<const HalfVector*>(lanes + 4);
  return (half[0] + half[2]) + (half[1] + half[3]);
}

// The pairs in the order of their experts, as sort_by_expert returns them: order_M = t * K + k, tokens ascending within an expert.
struct Pairs {
  const int32_t* order_M;
  const int32_t* end_E;
  int experts;
  int top_k;
  int64_t tokens;

  int64_t begin(int expert) const { return expert == 0 ? 0 : end_E[expert - 1]; }
  int64_t end(int expert) const { return end_E[expert]; }
  int64_t token(int64_t place) const { return order_M[place] / top_k; }

  // The first of an expert's places whose token is not below `token`.
  int64_t place_of(int expert, int64_t from_token) const {
    const int32_t* first = order_M + begin(expert);
    return std::lower_bound(first, order_M + end(expert), from_token * top_k) - order_M;
  }

  // Whether all of it is in range and in order.
  bool valid() const {
    const int64_t pairs = tokens * top_k;
    int64_t place = 0;
    for (int e = 0; e < experts; ++e) {
      if (end_E[e] < place || end_E[e] > pairs) return false;
      for (int64_t last = -1; place < end_E[e]; last = order_M[place++]) {
        if (order_M[place] <= last || order_M[place] >= pairs) return false;
      }
    }
    return true;
  }
};

// Some places of one expert.
struct Span {
  int expert;
  int64_t begin, end;
};

inline std::vector<Span> spans_of(const Pairs& pairs, int64_t most) {
  std::vector<Span> spans;
  for (int e = 0; e < pairs.experts; ++e) {
    for (int64_t m = pairs.begin(e); m < pairs.end(e); m += most) spans.push_back({e, m, std::min(m + most, pairs.end(e))});
  }
  return spans;
}

// Columns [begin, begin + size) of `rows` rows, side by side at `stride`.
inline void pack(const float* from, int64_t width, int64_t begin, int64_t size, int64_t rows, int64_t stride, float* to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * stride, from + r * width + begin, size * sizeof(float));
}

// -------------------------------------------------------------------------------------------------------------- shrink

// Places that a thread takes at once.
constexpr int64_t kShrinkSpan = 48;

// Columns at a time: so many that an expert's stay in the second-level cache.
inline int64_t shrink_columns(int64_t narrow, int64_t wide) {
  return std::min(wide, std::max<int64_t>(64, 32768 / std::max<int64_t>(1, narrow) / kLanes * kLanes));
}

// z[a, b] (+)= <x[a], w[b]> for `Rows` rows and `Columns` columns.
template <int Rows, int Columns>
void dot_products(const float* const* x, const float* w, int64_t stride, int64_t size, bool first, float* z, int64_t narrow) {
  Vector sum[Rows][Columns] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vector x_lanes[Rows];
    for (int a = 0; a < Rows; ++a) x_lanes[a] = load(x[a] + i);
    for (int b = 0; b < Columns; ++b) {
      const Vector w_lanes = load(w + b * stride + i);
      for (int a = 0; a < Rows; ++a) sum[a][b] += x_lanes[a] * w_lanes;
    }
  }
  for (int a = 0; a < Rows; ++a) {
    for (int b = 0; b < Columns; ++b) {
      float total = sum_of_lanes(sum[a][b]);
      for (int64_t rest = i; rest < size; ++rest) total += x[a][rest] * w[b * stride + rest];
      float& z_ab = z[a * narrow + b];
      z_ab = first ? total : z_ab + total;
    }
  }
}

template <int Rows>
void dot_products(const float* const* x, const float* w, int64_t stride, int64_t size, bool first, float* z, int64_t narrow) {
  int64_t j = 0;
  for (; j + 4 <= narrow; j += 4) dot_products<Rows, 4>(x, w + j * stride, stride, size, first, z + j, narrow);
  for (; j < narrow; ++j) dot_products<Rows, 1>(x, w + j * stride, stride, size, first, z + j, narrow);
}

// z[m, :] = w[e] x[token of m, :] for the places of the spans [begin, end).
inline void shrink(const Pairs& pairs, const Span* begin, const Span* end, const float* x_TI, const float* w_EJI, int64_t narrow,
                   int64_t wide, float* z_MJ) {
  const int64_t most = shrink_columns(narrow, wide);
  std::vector<float> packed(most < wide ? narrow * most : 0);
  for (int64_t i = 0; i < wide; i += most) {
    const int64_t size = std::min(most, wide - i);
    int packed_expert = -1;
    for (const Span* span = begin; span != end; ++span) {
      const float* w = w_EJI + span->expert * narrow * wide;
      if (most < wide && span->expert != packed_expert) {
        pack(w, wide, i, size, narrow, most, packed.data());
        packed_expert = span->expert;
      }
      if (most < wide) w = packed.data();
      const float* x[3];
      int64_t m = span->begin;
      for (; m + 3 <= span->end; m += 3) {
        for (int a = 0; a < 3; ++a) x[a] = x_TI + pairs.token(m + a) * wide + i;
        dot_products<3>(x, w, most, size, i == 0, z_MJ + m * narrow, narrow);
      }
      for (; m < span->end; ++m) {
        x[0] = x_TI + pairs.token(m) * wide + i;
        dot_products<1>(x, w, most, size, i == 0, z_MJ + m * narrow, narrow);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- expand and outer

constexpr int64_t kTile = 3 * kLanes;

// Columns at a time: about `most`, all chunks alike, in whole tiles.
inline int64_t chunk_columns(int64_t wide, int64_t most) {
  const int64_t chunks = (wide + most - 1) / most;
  return ((wide + chunks - 1) / chunks + kTile - 1) / kTile * kTile;
}

// sum[a][:] += sum_s factor[a * step_a + s * step_s] * row[s][:] over `size` columns (whole tiles) of packed rows.
template <int Rows>
void add_rows(float* const* sum, const float* rows, int64_t stride, int64_t count, const float* factor, int64_t step_a, int64_t step_s,
              int64_t size) {
  for (int64_t i = 0; i < size; i += kTile) {
    Vector lanes[Rows][3] = {};
    for (int64_t s = 0; s < count; ++s) {
      Vector row[3];
      for (int v = 0; v < 3; ++v) row[v] = load(rows + s * stride + i + v * kLanes);
      for (int a = 0; a < Rows; ++a) {
        const float f = factor[a * step_a + s * step_s];
        for (int v = 0; v < 3; ++v) lanes[a][v] += f * row[v];
      }
    }
    for (int a = 0; a < Rows; ++a) {
      for (int64_t v = 0; v < 3; ++v) store(sum[a] + i + v * kLanes, load(sum[a] + i + v * kLanes) + lanes[a][v]);
    }
  }
}

constexpr int64_t kExpandTokens = 128;
constexpr int64_t kExpandColumns = 528;

// y[t, :] = onto[t, :] (zero if null) + the sum over the token's places m of z[m, :] w[e], experts ascending, for tokens [begin, end) and
// columns [i, i + size).
class Expand {
 public:
  Expand(const Pairs& pairs, const float* z_MJ, const float* w_EJI, const float* onto_TI, int64_t narrow, int64_t wide)
      : pairs_(pairs), z_MJ_(z_MJ), w_EJI_(w_EJI), onto_TI_(onto_TI), narrow_(narrow), wide_(wide),
        columns_(chunk_columns(wide, kExpandColumns)), packed_(narrow * columns_, 0.0f), sum_(kExpandTokens * columns_, 0.0f) {}

  void operator()(int64_t begin, int64_t end, int64_t i, int64_t size, float* y_TI) {
    if (onto_TI_ == nullptr) {
      std::fill_n(sum_.data(), (end - begin) * columns_, 0.0f);
    } else {
      pack(onto_TI_ + begin * wide_, wide_, i, size, end - begin, columns_, sum_.data());
    }
    for (int e = 0; e < pairs_.experts; ++e) {
      int64_t m = pairs_.place_of(e, begin);
      const int64_t stop = pairs_.place_of(e, end);
      if (m == stop) continue;
      pack(w_EJI_ + e * narrow_ * wide_, wide_, i, size, narrow_, columns_, packed_.data());
      while (m < stop) {
        float* rows[4];  // of different tokens
        int count = 0;
        while (count < 4 && m + count < stop && (count == 0 || pairs_.token(m + count) != pairs_.token(m + count - 1))) {
          rows[count] = sum_.data() + (pairs_.token(m + count) - begin) * columns_;
          ++count;
        }
        if (count < 4) count = 1;
        const float* z = z_MJ_ + m * narrow_;
        (count == 4 ? add_rows<4> : add_rows<1>)(rows, packed_.data(), columns_, narrow_, z, narrow_, 1, columns_);
        m += count;
      }
    }
    for (int64_t t = begin; t < end; ++t) std::memcpy(y_TI + t * wide_ + i, sum_.data() + (t - begin) * columns_, size * sizeof(float));
  }

 private:
  const Pairs& pairs_;
  const float *z_MJ_, *w_EJI_, *onto_TI_;
  int64_t narrow_, wide_, columns_;
  std::vector<float> packed_, sum_;
};

constexpr int64_t kOuterRows = 32;
constexpr int64_t kOuterColumns = 264;

// g[e, j, :] = sum over the expert's places m, ascending, of z[m, j] x[token of m, :], for columns [i, i + size).
class Outer {
 public:
  Outer(const Pairs& pairs, const float* z_MJ, const float* x_TI, int64_t narrow, int64_t wide)
      : pairs_(pairs), z_MJ_(z_MJ), x_TI_(x_TI), narrow_(narrow), wide_(wide), columns_(chunk_columns(wide, kOuterColumns)),
        packed_(kOuterRows * columns_, 0.0f), sum_(narrow * columns_) {}

  void operator()(int expert, int64_t i, int64_t size, float* g_EJI) {
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    for (int64_t m = pairs_.begin(expert); m < pairs_.end(expert); m += kOuterRows) {
      const int64_t count = std::min(kOuterRows, pairs_.end(expert) - m);
      for (int64_t s = 0; s < count; ++s) {
        std::memcpy(packed_.data() + s * columns_, x_TI_ + pairs_.token(m + s) * wide_ + i, size * sizeof(float));
      }
      const float* z = z_MJ_ + m * narrow_;
      for (int64_t j = 0; j < narrow_;) {
        const int64_t at_once = narrow_ - j < 4 ? 1 : 4;
        float* rows[4];
        for (int64_t a = 0; a < at_once; ++a) rows[a] = sum_.data() + (j + a) * columns_;
        (at_once == 4 ? add_rows<4> : add_rows<1>)(rows, packed_.data(), columns_, count, z + j, 1, narrow_, columns_);
        j += at_once;
      }
    }
    float* g_JI = g_EJI + expert * narrow_ * wide_;
    for (int64_t j = 0; j < narrow_; ++j) std::memcpy(g_JI + j * wide_ + i, sum_.data() + j * columns_, size * sizeof(float));
  }

 private:
  const Pairs& pairs_;
  const float *z_MJ_, *x_TI_;
  int64_t narrow_, wide_, columns_;
  std::vector<float> packed_, sum_;
};

}  // namespace cuma::cpu

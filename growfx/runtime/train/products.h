// The inner loops of sparse products: a tile of destination values stays in registers while the entries of one row go
// by (`multiply`), or a tile of gradients while the entries that read with it do (`correlate`).

#pragma once

#include "../sparse_vectors.h"
#include "geometry.h"

namespace {

constexpr int TILE = 8;   // registers of one tile of `multiply`, at most
constexpr int HELD = LANES >= 16 ? 16 : 8;  // the same of `correlate`, which needs few others

// Entries of a sparse matrix of taps, in blocks of its columns: those of block b, row r and tap t are start[s] ..
// start[s + 1] with s = (b * rows + r) * taps + t. What a tile reads of the columns of a block stays in the first cache.
struct Entries {
  int64_t blocks, rows, taps;
  const int32_t* start;
  const int32_t* offset;  // from a run's base, in values
  const float* value;
};

// Not inlined: the loops need every register there is.
template <int RUNS, int REGISTERS>
[[gnu::noinline]] void multiply(const Entries& e, const std::vector<Range>& ranges, const Run* runs, int64_t at,
                                const float* source, float* out, int64_t plane, const float* bias) {
  // Few registers alone would wait for each other's additions.
  constexpr int SIZE = RUNS * REGISTERS, CHAINS = SIZE <= 2 ? 4 : SIZE <= 4 ? 2 : 1;
  const int32_t* const offsets = e.offset;
  const float* const values = e.value;
  const float* from[RUNS];
  for (int p = 0; p < RUNS; ++p) from[p] = source + runs[p].from + at;
  for (int64_t segment = 0; segment < e.blocks * e.rows; ++segment) {
    const int32_t* const start = e.start + segment * e.taps;
    const bool again = segment >= e.rows;
    const int64_t row = again ? segment % e.rows : segment;
    if (again && start[0] == start[e.taps]) continue;
    float* const to = out + row * plane + at;
    Vector sum[CHAINS][RUNS][REGISTERS] = {};
    if (again) {
#pragma GCC unroll 8
      for (int p = 0; p < RUNS; ++p)
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; ++r) sum[0][p][r] = load(to + runs[p].to + r * LANES);
    }
    const auto add = [&](int c, int64_t k) {
      const int64_t offset = offsets[k];
      const float value = values[k];
#pragma GCC unroll 8
      for (int p = 0; p < RUNS; ++p)
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; ++r) sum[c][p][r] += value * load(from[p] + offset + r * LANES);
    };
    for (const Range range : ranges) {
      int64_t k = start[range.first];
      const int64_t stop = start[range.end];
      for (; k + CHAINS <= stop; k += CHAINS) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) add(c, k + c);
      }
      if constexpr (CHAINS > 1)
        for (; k < stop; ++k) add(0, k);
    }
    const float added = bias && !again ? bias[row] : 0.0f;
#pragma GCC unroll 8
    for (int p = 0; p < RUNS; ++p)
#pragma GCC unroll 8
      for (int r = 0; r < REGISTERS; ++r) {
        Vector v = sum[0][p][r];
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; ++c) v += sum[c][p][r];
        store(to + runs[p].to + r * LANES, v + added);
      }
  }
}

// The same for runs that are shorter than a register.
inline void multiply_short(const Entries& e, const Group& group, const Run* runs, int count, const float* source,
                           float* out, int64_t plane, const float* bias) {
  for (int p = 0; p < count; ++p) {
    const float* const from = source + runs[p].from;
    for (int64_t segment = 0; segment < e.blocks * e.rows; ++segment) {
      const int32_t* const start = e.start + segment * e.taps;
      const int64_t row = segment % e.rows;
      float sum[LANES] = {};
      for (const Range range : group.ranges)
        for (int64_t k = start[range.first]; k < start[range.end]; ++k)
          for (int64_t i = 0; i < group.length; ++i) sum[i] += e.value[k] * from[e.offset[k] + i];
      float* const to = out + runs[p].to + row * plane;
      for (int64_t i = 0; i < group.length; ++i)
        to[i] = sum[i] + (segment >= e.rows ? to[i] : bias ? bias[row] : 0.0f);
    }
  }
}

// Sums of LANES vectors, each in its lane.
inline Vector totals(Vector (&v)[LANES]) {
#pragma GCC unroll 8
  for (int n = LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      v[i] = merged<0>(v[i], v[i + n], Lanes{}) + merged<LANES / 2>(v[i], v[i + n], Lanes{});
  }
  return v[0];
}

template <int STEP, int... I>
inline Vector rotated(Vector v, std::integer_sequence<int, I...>) {
  return picked(v, v, std::integer_sequence<int, ((I + STEP) % LANES)...>{});
}
template <int STEP = LANES / 2>
inline float total(Vector v) {
  v += rotated<STEP>(v, Lanes{});
  if constexpr (STEP > 1) return total<STEP / 2>(v);
  else return v[0];
}
// Sum of a plane; in parts, so that float32 does not lose what long sums need.
inline float plane_total(const float* p, int64_t count) {
  constexpr int64_t PART = 256 * LANES;
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += PART) {
    const int64_t end = std::min(begin + PART, count);
    Vector v[4] = {};
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES)
      for (int c = 0; c < 4; ++c) v[c] += load(p + i + c * LANES);
    sum += total(v[0] + v[1] + (v[2] + v[3]));
    for (; i < end; ++i) sum += p[i];
  }
  return static_cast<float>(sum);
}
template <int... I>
inline Words lane_numbers(std::integer_sequence<int, I...>) {
  return Words{I...};
}

// Sums of products that wait until there are LANES of them, to be added up together.
struct Pending {
  Vector sums[LANES];
  int64_t entry[LANES];
  int count = 0;
  void push(Vector sum, int64_t k, float* result) {
    sums[count] = sum, entry[count] = k;
    if (++count == LANES) flush(result);
  }
  void flush(float* result) {
    for (int i = count; i < LANES; ++i) sums[i] = Vector{};
    const Vector all = totals(sums);
    float* const first = result + entry[0];
    if (count == LANES && entry[LANES - 1] - entry[0] == LANES - 1) store(first, load(first) + all);
    else
      for (int i = 0; i < count; ++i) result[entry[i]] += all[i];
    count = 0;
  }
};

template <int RUNS, int REGISTERS>
[[gnu::noinline]] void correlate(const Entries& e, const std::vector<Range>& ranges, const Run* runs, int64_t at,
                                 uint32_t doubled, const float* source, const float* gradient, int64_t plane,
                                 int64_t first, int64_t end, float* result) {
  const int32_t* const offsets = e.offset;
  const float* from[RUNS];
  for (int p = 0; p < RUNS; ++p) from[p] = source + runs[p].from + at;
  const Words single = (Words)(lane_numbers(Lanes{}) >= doubled);
  Pending pending;
  for (int64_t block = 0; block < e.blocks; ++block) {
    for (int64_t row = first; row < end; ++row) {
      const int32_t* const start = e.start + (block * e.rows + row) * e.taps;
      if (start[0] == start[e.taps]) continue;
      const float* const to = gradient + row * plane + at;
      Vector held[RUNS][REGISTERS];
#pragma GCC unroll 16
      for (int p = 0; p < RUNS; ++p)
#pragma GCC unroll 16
        for (int r = 0; r < REGISTERS; ++r) held[p][r] = load(to + runs[p].to + r * LANES);
      if constexpr (REGISTERS == 1)  // what another tile counts
#pragma GCC unroll 16
        for (int p = 0; p < RUNS; ++p) held[p][0] = (Vector)((Words)held[p][0] & single);
      for (const Range range : ranges) {
        for (int64_t k = start[range.first]; k < start[range.end]; ++k) {
          const int64_t offset = offsets[k];
          Vector sum[2] = {};
#pragma GCC unroll 16
          for (int p = 0; p < RUNS; ++p)
#pragma GCC unroll 16
            for (int r = 0; r < REGISTERS; ++r)
              sum[(p + r) & 1] += held[p][r] * load(from[p] + offset + r * LANES);
          pending.push(RUNS * REGISTERS > 1 ? sum[0] + sum[1] : sum[0], k, result);
        }
      }
    }
  }
  if (pending.count > 0) pending.flush(result);
}

inline void correlate_short(const Entries& e, const Group& group, const Run* runs, int count, const float* source,
                            const float* gradient, int64_t plane, int64_t first, int64_t end, float* result) {
  for (int p = 0; p < count; ++p) {
    const float* const from = source + runs[p].from;
    for (int64_t i = 0; i < e.blocks * (end - first); ++i) {
      const int64_t row = first + i % (end - first);
      const int32_t* const start = e.start + (i / (end - first) * e.rows + row) * e.taps;
      const float* const to = gradient + runs[p].to + row * plane;
      for (const Range range : group.ranges) {
        for (int64_t k = start[range.first]; k < start[range.end]; ++k) {
          float sum = 0.0f;
          for (int64_t j = 0; j < group.length; ++j) sum += to[j] * from[e.offset[k] + j];
          result[k] += sum;
        }
      }
    }
  }
}

// Calls `use` with the compile-time numbers of a tile's runs and registers, whose product is at most MOST.
template <int MOST, int RUNS = MOST, int REGISTERS = 1, class F>
void dispatch(const Tile& tile, const F& use) {
  if (tile.runs == RUNS && tile.registers == REGISTERS)
    return use(std::integral_constant<int, RUNS>{}, std::integral_constant<int, REGISTERS>{});
  if constexpr (RUNS > 1) dispatch<MOST, RUNS / 2, REGISTERS>(tile, use);
  else if constexpr (REGISTERS < MOST) dispatch<MOST, MOST / (2 * REGISTERS), 2 * REGISTERS>(tile, use);
}

}  // namespace

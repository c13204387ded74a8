// Convolution and linear layers with an unstructured-sparse weight, for inference on a CPU.
//
// A weight is stored by output channel: `start[o] .. start[o + 1]` are its entries, each a value and an offset into
// the input. All output positions of a channel are laid out in one row, so an entry adds
//     value * input[offset + position]
// to every position: contiguous loads, no index arithmetic. Tiles of up to 8 vector registers stay in registers while
// the entries of one channel go by.
//
// For that the input is first copied into planes, one for each pair of input channel and kernel column that has an
// entry: shifted, strided and zero-padded along the width, so that a plane has exactly the columns of the output.
// Rows are kept by phase (row modulo stride); a kernel row is then an offset by whole rows. Three layouts:
//   direct  1x1, stride 1, float32: the input is its own planes, nothing is copied;
//   copied  planes of one image at a time;
//   folded  planes too small for a register: a block of images side by side forms one wide image;
//   rows    folded planes of a single value, as in a linear layer: the block is a matrix, and transposed as such.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>

#include "sparse_planes.h"
#include "sparse_vectors.h"

namespace {

constexpr int MAX_REGISTERS = 8;
// Planes of a 1x1 layer whose tile of 4 registers stays near the first cache and one of 8 does not.
constexpr int64_t NARROW_FROM = 113, NARROW_TO = 256;
// What a row costs besides its entries, in entries; and the work, in register updates, worth a thread of its own.
constexpr int64_t ROW_COST = 4;
constexpr int64_t THREAD_WORK = 6000;
constexpr int64_t KEPT_SCRATCH = int64_t{16} << 20;

struct Entries {
  const int32_t* start;
  const int32_t* offset;
  const float* value;
};

class Scratch {
 public:
  float* get(int64_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})));
      size_ = count;
    }
    return data_.get();
  }
  // Small buffers are kept for the thread's next layer, large ones are not.
  void trim() {
    if (size_ > KEPT_SCRATCH) {
      data_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};
thread_local Scratch input_scratch;
thread_local Scratch output_scratch;

// One image (or block of images): where its planes are and where its output channels go.
template <class T>
struct Job {
  Entries entries;
  int64_t channels, positions, out_stride, registers;  // in the widest tile
  const float* planes;
  T* out;
  const float* bias;
  const T* residual;
  bool relu;
};

// Output channels first..end at the positions `begin` and on. The last register lies where the positions end and may
// overlap the one before: both compute the same, and nothing outside is read or written.
template <class T, int REGISTERS>
void run_tile(const Job<T>& job, int64_t begin, int64_t last, int64_t first, int64_t end) {
  // Few registers alone would wait for each other's additions.
  constexpr int CHAINS = REGISTERS == 1 ? 4 : REGISTERS <= 3 ? 2 : 1;
  const float* const x = job.planes + begin;
  const auto at = [last](int r) -> int64_t { return r == REGISTERS - 1 ? last : r * LANES; };
  for (int64_t o = first; o < end; ++o) {
    Vector sum[CHAINS][REGISTERS] = {};
    int64_t k = job.entries.start[o];
    const int64_t stop = job.entries.start[o + 1];
    for (; k + CHAINS <= stop; k += CHAINS) {
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) {
        const float* const source = x + job.entries.offset[k + c];
        const float value = job.entries.value[k + c];
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; ++r) sum[c][r] += value * load(source + at(r));
      }
    }
    if constexpr (CHAINS > 1) {
      for (; k < stop; ++k) {
        const float* const source = x + job.entries.offset[k];
        const float value = job.entries.value[k];
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; ++r) sum[0][r] += value * load(source + at(r));
      }
#pragma GCC unroll 4
      for (int c = 1; c < CHAINS; ++c)
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; ++r) sum[0][r] += sum[c][r];
    }
    const int64_t where = o * job.out_stride + begin;
    const float bias = job.bias ? job.bias[o] : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < REGISTERS; ++r) {
      Vector v = sum[0][r] + bias;
      if (job.residual) v += load(job.residual + where + at(r));
      if (job.relu) v = rectified(v);
      sum[0][r] = v;
    }
#pragma GCC unroll 8
    for (int r = 0; r < REGISTERS; ++r) store(job.out + where + at(r), sum[0][r]);
  }
}

// The same for one position in all: a register would hold one value of use.
template <class T>
void run_dots(const Job<T>& job, int64_t first, int64_t end) {
  constexpr int CHAINS = 8;
  for (int64_t o = first; o < end; ++o) {
    float sum[CHAINS] = {};
    int64_t k = job.entries.start[o];
    const int64_t stop = job.entries.start[o + 1];
    for (; k + CHAINS <= stop; k += CHAINS)
#pragma GCC unroll 8
      for (int c = 0; c < CHAINS; ++c) sum[c] += job.entries.value[k + c] * job.planes[job.entries.offset[k + c]];
    for (; k < stop; ++k) sum[0] += job.entries.value[k] * job.planes[job.entries.offset[k]];
    for (int c = 1; c < CHAINS; ++c) sum[0] += sum[c];
    float v = sum[0] + (job.bias ? job.bias[o] : 0.0f);
    if (job.residual) v += static_cast<float>(job.residual[o]);
    job.out[o] = static_cast<T>(job.relu && v < 0.0f ? 0.0f : v);
  }
}

template <class T, int REGISTERS = MAX_REGISTERS>
void run_tile_of(int registers, const Job<T>& job, int64_t begin, int64_t last, int64_t first, int64_t end) {
  if (registers == REGISTERS) return run_tile<T, REGISTERS>(job, begin, last, first, end);
  if constexpr (REGISTERS > 1) run_tile_of<T, REGISTERS - 1>(registers, job, begin, last, first, end);
}

template <class T>
int64_t row_cost_before(const Job<T>& job, int64_t row) {
  return job.entries.start[row] + ROW_COST * row;
}

// First output channel whose cost begins at or after `cost`.
template <class T>
int64_t row_at_cost(const Job<T>& job, int64_t cost) {
  int64_t low = 0, high = job.channels;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row_cost_before(job, middle) < cost) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class T>
int64_t work_of(const Job<T>& job) {
  return registers_of(job.positions) * row_cost_before(job, job.channels);
}

// A part of a job: output channels first..end at the registers of one tile.
struct Part {
  int64_t first_register, end_register, first, end;
};

// Calls `use` with the parts of share number `share` of `shares`: equal by entries, tile after tile.
template <class T, class F>
void for_each_part(const Job<T>& job, int64_t share, int64_t shares, const F& use) {
  const int64_t registers = registers_of(job.positions);
  const int64_t tiles = (registers + job.registers - 1) / job.registers;
  const int64_t rows = row_cost_before(job, job.channels), total = registers * rows;
  const int64_t from = total * share / shares, to = total * (share + 1) / shares;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r0 = registers * t / tiles, r1 = registers * (t + 1) / tiles;
    if (r1 * rows <= from || r0 * rows >= to) continue;
    const auto row = [&](int64_t cost) {
      return row_at_cost(job, std::clamp<int64_t>((cost - r0 * rows) / (r1 - r0), 0, rows));
    };
    // A range ends with the tile when the share goes beyond it.
    use(Part{r0, r1, from <= r0 * rows ? 0 : row(from), to >= r1 * rows ? job.channels : row(to)});
  }
}

template <class T>
void run_share(const Job<T>& job, int64_t share, int64_t shares) {
  const int64_t registers = registers_of(job.positions);
  for_each_part(job, share, shares, [&](const Part& part) {
    if (job.positions == 1) return run_dots(job, part.first, part.end);
    const int64_t begin = part.first_register * LANES, count = part.end_register - part.first_register;
    const int64_t last = part.end_register == registers ? job.positions - LANES - begin : (count - 1) * LANES;
    run_tile_of(static_cast<int>(count), job, begin, last, part.first, part.end);
  });
}

// How many threads a job is worth.
template <class T>
int64_t shares_of(const Job<T>& job) {
  return std::clamp<int64_t>(work_of(job) / THREAD_WORK, 1, at::get_num_threads());
}

// `together`: the whole thread pool works on this job; else the calling thread alone.
template <class T>
void run(const Job<T>& job, bool together) {
  const int64_t shares = together ? shares_of(job) : 1;
  if (shares == 1) return run_share(job, 0, 1);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) run_share(job, s, shares);
  });
}

template <class T>
struct Call {
  Plan plan;
  Entries entries;
  const int32_t* planes;
  int64_t plane_count;
  const T* x;
  const float* bias;
  const T* residual;
  bool relu;
  T* out;

  // One image by the whole thread pool: each thread copies for itself the rows of the planes that its positions read.
  // Planes in common would be written by one core and read by another, which costs more than to copy some rows twice.
  void run_bands(int64_t image, const Job<T>& job, int64_t shares) const {
    at::parallel_for(0, shares, 1, [&](int64_t share, int64_t end) {
      float* const buffer = input_scratch.get(plane_count * plan.plane_size + LANES);
      Job<T> own = job;
      own.planes = buffer;
      for (; share < end; ++share) {
        int64_t from = plan.positions - LANES, to = 0;  // the last register lies where the positions end
        for_each_part(job, share, shares, [&](const Part& part) {
          from = std::min(from, part.first_register * LANES);
          to = std::min(part.end_register * LANES, plan.positions);
        });
        if (to == 0) continue;
        const int64_t halo = plan.rows - plan.out_height;
        const Band band{from / plan.out_width, (to - 1) / plan.out_width + 1 + halo};
        copy_planes(plan, band, x, planes, plane_count, image, false, buffer);
        run_share(own, share, shares);
      }
      input_scratch.trim();
    });
  }

  // Block number `unit`: one image, or several side by side.
  void run_unit(int64_t unit, bool together) const {
    const int64_t first = unit * plan.block, image = plan.channels * plan.height * plan.width;
    const int64_t inputs = plan.layout == COPIED ? 0 : plan.channels;
    const int64_t registers = inputs >= NARROW_FROM && inputs <= NARROW_TO ? MAX_REGISTERS / 2 : MAX_REGISTERS;
    const int64_t size = plan.positions, where = first * plan.out_channels * size;
    const T* const added = residual ? residual + where : nullptr;
    Job<T> job{entries, plan.out_channels, size, size, registers, nullptr, out + where, bias, added, relu};
    if (plan.layout == COPIED && together) {
      const int64_t shares = shares_of(job);
      if (shares > 1) return run_bands(first, job, shares);
    }
    const float* input = nullptr;
    if (plan.layout == DIRECT) {
      input = reinterpret_cast<const float*>(x) + first * image;
    } else {
      float* const buffer = input_scratch.get(plane_count * plan.plane_size + LANES);
      if (plan.layout == ROWS) copy_rows(plan, x, first, together, buffer);
      else copy_planes(plan, {0, plan.rows}, x, planes, plane_count, first, together, buffer);
      input = buffer;
    }
    // With a single position there is nothing to unfold.
    if (plan.layout >= FOLDED && plan.positions > 1) {
      const int64_t stride = whole_registers(plan.positions);
      float* const sums = output_scratch.get(plan.out_channels * stride);
      const Job<float> folded{entries, plan.out_channels, stride, stride, registers, input, sums, bias, nullptr, false};
      ::run(folded, together);
      const bool rows = plan.out_height * plan.out_width == 1 && plan.out_channels >= LANES;
      if (rows) unfold_rows(plan, sums, first, residual, relu, together, out);
      else unfold(plan, sums, first, residual, relu, together, out);
      output_scratch.trim();
    } else {
      job.planes = input;
      ::run(job, together);
    }
    input_scratch.trim();
  }

  // Whole blocks to each thread as long as that comes out even; the pool shares each of the others.
  void run() const {
    const int64_t units = (plan.images + plan.block - 1) / plan.block, threads = at::get_num_threads();
    const int64_t even = units / threads * threads;
    at::parallel_for(0, even, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run_unit(unit, false);
    });
    for (int64_t unit = even; unit < units; ++unit) run_unit(unit, true);
  }
};

at::Tensor sparse_conv2d(const at::Tensor& x, const at::Tensor& plan, const at::Tensor& start, const at::Tensor& offset,
                         const at::Tensor& value, const at::Tensor& planes, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& residual, bool relu,
                         at::IntArrayRef /* of the result, for those who only trace */) {
  Plan p;
  TORCH_CHECK(plan.nbytes() == sizeof(Plan), "a plan has ", sizeof(Plan), " bytes, got ", plan.nbytes());
  std::memcpy(&p, plan.const_data_ptr<int64_t>(), sizeof(Plan));
  const Entries entries{start.const_data_ptr<int32_t>(), offset.const_data_ptr<int32_t>(),
                        value.const_data_ptr<float>()};
  at::Tensor out = at::empty({p.images, p.out_channels, p.out_height, p.out_width}, x.options());
  const auto call = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> c{p,
                    entries,
                    planes.const_data_ptr<int32_t>(),
                    planes.size(0),
                    x.const_data_ptr<T>(),
                    bias ? bias->const_data_ptr<float>() : nullptr,
                    residual ? residual->const_data_ptr<T>() : nullptr,
                    relu,
                    out.mutable_data_ptr<T>()};
    c.run();
  };
  if (x.scalar_type() == at::kFloat) call(0.0f);
  else call(c10::BFloat16{});
  return out;
}

}  // namespace

TORCH_LIBRARY(growfx, library) {
  library.def(
      "sparse_conv2d(Tensor x, Tensor plan, Tensor start, Tensor offset, Tensor value, Tensor planes, Tensor? bias, "
      "Tensor? residual, bool relu, int[] shape) -> Tensor");
}
TORCH_LIBRARY_IMPL(growfx, CPU, library) { library.impl("sparse_conv2d", &sparse_conv2d); }

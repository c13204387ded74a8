// What the compute kernels are told, in plain structs: they are compiled once for each set of instructions, and nothing
// that they share with other files may be a template or an inline function.

#pragma once

#include <cstdint>

namespace growfx_native {

// Floats that may be read before the first of a value, and behind the last of any tensor.
constexpr int BEFORE = 16, BEHIND = 256;
// Images of a batch that may stand side by side.
constexpr int MOST_SIDE_BY_SIDE = 512;

// One operation on a run of numbers; `operand` (if any) is at the position of the first of them.
struct PostCall {
  uint8_t op;
  const float* operand;
  float a, b;
};

// Rows of a product: out[o][p] = bias[o] + sum over k of value[k] * x[offset[k] + p].
struct Rows {
  const uint32_t* start;    // sparse: where the entries of each row begin; NULL for dense rows
  const int32_t* offset;    // of each entry; dense: of each of `depth` columns
  const float* value;       // of each entry; dense: [row][column] by the strides below
  int64_t depth;            // dense: columns
  int64_t row_stride, column_stride;
  const float* bias;        // NULL for none
  // In blocks of columns, which are copied side by side before they are read, or already are: entries by block, then row,
  // and offsets into the block.
  int64_t blocks;              // 0 for none
  const int32_t* block_start;  // [blocks + 1] first column of each
  const int32_t* column;       // offset of each column
  int64_t first_row, row_count;
  int64_t packed;              // floats of the copy, 0 for none
  const int32_t* channel;      // of each column of a pointwise convolution
  const float* gate;           // factor of each channel, which the copy is multiplied by; NULL for none
};

// Convolution by planes: see `convolution.inc`. Each depth of the output is an image.
struct Convolution {
  int64_t images;                                         // outputs of all depths
  int64_t channels, depth, height, width;                 // of the input
  int64_t out_channels, out_depth, out_height, out_width;
  int64_t stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_w;
  int64_t phases, reach;                                  // rows by phase; rows of halo
  int64_t block;                                          // images side by side
  int64_t band;                                           // output rows at a time
  int64_t groups, shares;
  bool direct;                                            // the input is its own planes
  const int32_t* group_start;                             // [groups + 1] first plane of each group
  const int32_t* planes;                                  // (channel, kernel depth, kernel column) of each plane
  int64_t most_planes;                                    // in one group
  int64_t plane_size;                                     // floats from plane to plane
  const int32_t* share_start;                             // [shares + 1] first output channel of each share
  const Rows* rows;                                       // of each group: offsets into its planes of a band
  const float* gate;                                      // factor of each channel of each image; NULL for none
  const int32_t* entry_channel;                           // of each entry in its group: the channel it reads
  int64_t most_entries;                                   // of one group
  const float* x;
  float* out;
  const PostCall* post;
  int64_t post_count;
};

// How planes are read through windows: see `windows.inc`.
struct Frame {
  int64_t height, width, out_height, out_width;
  int64_t window_h, window_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t band;                  // output rows at a time
  int64_t columns;               // of a row that are read, of one phase
  int64_t phases, phase, pitch;  // columns by phase (column modulo stride); floats from phase to phase, row to row
  bool whole;                    // whether rows are read in whole registers, past their ends
  const int64_t* bounds;         // [phases][2] columns that come from the plane
};

// A convolution in which every output channel reads one input channel.
struct Depthwise {
  Frame frame;
  int64_t planes, per_task;       // outputs of all images
  int64_t channels, outputs;      // of one image
  Rows rows;                      // offsets into the frame
  const float* x;
  float* out;
  const PostCall* post;
  int64_t post_count;
};

// out[m][o] = bias[o] + sum over i of weight[o][i] * x[m][i].
struct Linear {
  int64_t count, inputs, outputs;
  int64_t block;  // rows of x at a time
  int64_t shares;
  const int32_t* share_start;
  Rows rows;  // offsets are input indices
  const float* x;
  float* out;
  const PostCall* post;
  int64_t post_count;
};

// out[b] = scale * a[b] @ c[b] for matrices (m, k) and (k, n); by stride the second may be transposed.
struct Product {
  int64_t batch, m, k, n;
  int64_t a_batch, a_row, a_column;
  int64_t c_batch;
  bool c_transposed;  // stored as (n, k)
  float scale;
  const float *a, *c;
  float* out;
};

// softmax(scale * q @ k^T + mask) @ v for each of `batch` heads; zeros for a query that may see no key.
struct Attention {
  int64_t batch, queries, keys, depth, value_depth;
  float scale;
  bool causal;
  const float *q, *k, *v;
  const float* mask;  // (queries, keys) of each head, NULL for none
  const int64_t* mask_offset;  // [batch]
  float* out;
};

// Pooling over the last two axes.
struct PlanePool {
  Frame frame;
  int64_t planes, per_task;
  bool maximum;
  const int32_t* taps;  // offsets of the numbers of a window into the frame
  int64_t taps_count;
  float divisor;        // of a sum; 0: the product of the two below
  const float *counts_h, *counts_w;  // places that are counted, of each output row and column
  const float* x;
  float* out;
};

// Windows over up to three axes, of any kind.
struct Pool {
  int64_t planes;
  int64_t in[3], out[3], window[3], stride[3], padding[3], dilation[3];
  bool maximum;
  bool count_padding;
  float divisor;  // 0: the numbers in the window
  bool adaptive;  // windows from the sizes alone
  const float* x;
  float* y;
};

// Normalise runs of numbers: `outer` of them, each of `inner` parts of `size` numbers with a weight and a bias for each
// part (`inner` > 1, group norm) or number (`inner` 1, layer norm).
struct Norm {
  int64_t outer, parts, size, cycle;  // runs; parts in a run; numbers in a part; runs until weights begin again
  float epsilon;
  bool centred;                        // subtract the mean
  bool by_part;                        // a weight for each part, not for each number
  const float *weight, *bias;          // NULL for none
  const float* x;
  float* y;
};

enum Reduction : int32_t { SUM, MEAN, MAXIMUM, MINIMUM, VARIANCE, L2_NORM };

// Over the middle of (outer, size, inner).
struct Reduce {
  int64_t outer, size, inner;
  int32_t kind;
  float correction;  // of a variance
  const float* x;
  float* y;
};

struct Softmax {
  int64_t outer, size, inner;
  bool logarithm;
  bool safe;  // zeros where all numbers are minus infinity
  const float* x;
  float* y;
};

// The kernels for one set of instructions. Tasks are numbered from 0; each writes its own part of the output.
struct Kernels {
  const char* name;
  int64_t lanes;
  int64_t tile;  // floats from column to column of a copy of some
  int64_t (*convolution_tasks)(const Convolution&);
  int64_t (*convolution_scratch)(const Convolution&);  // floats for one task
  void (*convolution)(const Convolution&, int64_t task, float* scratch);
  int64_t (*depthwise_scratch)(const Depthwise&);
  void (*depthwise)(const Depthwise&, int64_t task, float* scratch);
  int64_t (*plane_pool_scratch)(const PlanePool&);
  void (*plane_pool)(const PlanePool&, int64_t task, float* scratch);
  int64_t (*linear_tasks)(const Linear&);
  int64_t (*linear_scratch)(const Linear&);
  void (*linear)(const Linear&, int64_t task, float* scratch);
  int64_t (*product_scratch)(const Product&);
  void (*product)(const Product&, int64_t task, float* scratch);  // one of the batch each
  int64_t (*attention_scratch)(const Attention&);
  void (*attention)(const Attention&, int64_t task, float* scratch);  // one head each
  void (*pool)(const Pool&, int64_t plane);
  void (*norm)(const Norm&, int64_t run);
  void (*reduce)(const Reduce&, int64_t outer);
  void (*softmax)(const Softmax&, int64_t outer);
  // In place on `count` numbers, with operands from `index` on.
  void (*post)(const PostCall* calls, int64_t calls_count, float* x, int64_t count, int64_t index);
  // out[i] = a[i * a_step] op b[i * b_step], steps 0 or 1.
  void (*binary)(uint8_t op, const float* a, int64_t a_step, const float* b, int64_t b_step, float* out,
                 int64_t count);
};

// The best kernels of this processor; `baseline` where the compiler has no others.
const Kernels& kernels_here();
const Kernels& kernels_baseline();
#if defined(__x86_64__) && !defined(GROWFX_BASELINE_ONLY)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace growfx_native

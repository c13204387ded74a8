/* Run a network of growfx without Python or torch.
 *
 * A network is one file, `network.gfx`, written by `growfx.export_native`. All functions that can fail return
 * GROWFX_OK or one of the codes below, and put a message into `error` (at most `n` bytes with its zero; NULL and 0 for
 * no message). Numbers are float32, rows of the batch one after the other, last axis fastest.
 *
 * A network may be used by one thread at a time; several networks by several threads.
 */
#ifndef GROWFX_H
#define GROWFX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct growfx growfx;

enum {
  GROWFX_OK = 0,
  GROWFX_FILE = 1,   /* the file cannot be read */
  GROWFX_FORMAT = 2, /* it is another kind of file, damaged, or of a newer version */
  GROWFX_INPUT = 3,  /* an argument that the network cannot take */
  GROWFX_MEMORY = 4  /* not enough memory, or more than the caller allows */
};

#define GROWFX_MAX_RANK 8
/* Bytes of buffers that a network may take for each row of a batch, unless it is opened with another limit: 1 GiB. */
#define GROWFX_ROW_BYTES ((int64_t)1 << 30)

/* Read a network; `*net` is NULL after an error. */
int growfx_open(const char *path, growfx **net, char *error, size_t n);
/* The same from memory, which is not needed afterwards. */
int growfx_open_memory(const void *data, size_t size, growfx **net, char *error, size_t n);
/* The same for networks that need more memory, or a caller that has less: at most `row_bytes` bytes of buffers for each
 * row of a batch, and for any one weight as a dense tensor. What needs more is refused with GROWFX_MEMORY before it is
 * allocated, so that a hostile file cannot ask for more. */
int growfx_open_bounded(const void *data, size_t size, int64_t row_bytes, growfx **net, char *error, size_t n);
/* NULL is allowed. */
void growfx_close(growfx *net);

/* Number of inputs and of outputs. */
int growfx_input_count(const growfx *net);
int growfx_output_count(const growfx *net);
/* The shape of an input or output at a batch size: its rank, with the sizes in `sizes`; -1 for an index or a batch that
 * the network does not have. */
int growfx_input_shape(const growfx *net, int index, int64_t batch, int64_t sizes[GROWFX_MAX_RANK]);
int growfx_output_shape(const growfx *net, int index, int64_t batch, int64_t sizes[GROWFX_MAX_RANK]);

/* Threads to compute with from now on, 1 at first. */
int growfx_set_threads(growfx *net, int threads, char *error, size_t n);
/* Name of the instructions that the kernels use here: "avx512", "avx2" or "baseline". */
const char *growfx_instructions(const growfx *net);

/* Compute the outputs for a batch of 1 or more; `inputs` and `outputs` have one pointer for each, to memory that outputs
 * share with nothing. */
int growfx_run(growfx *net, int64_t batch, const float *const *inputs, float *const *outputs, char *error, size_t n);

#ifdef __cplusplus
}
#endif

#endif

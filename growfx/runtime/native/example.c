/* growfx_example NETWORK INPUTS.f32 [THREADS]: run a network on raw float32 numbers and print its outputs.
 *
 * The file holds the rows of the batch one after the other (of several inputs: all rows of the first, then of the
 * second). One output a line; exit status 0, or 1 with a message.
 */
#include <stdio.h>
#include <stdlib.h>

#include "growfx.h"

static int fail(const char *message) {
  fprintf(stderr, "growfx_example: %s\n", message);
  return 1;
}

/* Numbers of all inputs or outputs at a batch size; -1 where it has none. */
static int64_t count_of(const growfx *net, int64_t batch, int outputs, int index) {
  int64_t sizes[GROWFX_MAX_RANK], total = 0;
  const int count = outputs ? growfx_output_count(net) : growfx_input_count(net);
  int i, axis;
  for (i = 0; i < count; ++i) {
    const int rank = outputs ? growfx_output_shape(net, i, batch, sizes) : growfx_input_shape(net, i, batch, sizes);
    int64_t numbers = 1;
    if (rank < 0) return -1;
    for (axis = 0; axis < rank; ++axis) numbers *= sizes[axis];
    if (index < 0 || index == i) total += numbers;
  }
  return total;
}

/* All numbers of a file, or NULL. */
static float *read_numbers(const char *path, int64_t *count) {
  FILE *file = fopen(path, "rb");
  float *numbers = NULL;
  long size = -1;
  if (!file) return NULL;
  if (fseek(file, 0, SEEK_END) == 0) size = ftell(file);
  if (size > 0 && size % 4 == 0 && fseek(file, 0, SEEK_SET) == 0) numbers = (float *)malloc((size_t)size);
  if (numbers && fread(numbers, 4, (size_t)size / 4, file) != (size_t)size / 4) {
    free(numbers);
    numbers = NULL;
  }
  fclose(file);
  *count = size / 4;
  return numbers;
}

static int run(growfx *net, float *numbers, int64_t count) {
  const int64_t one = count_of(net, 1, 0, -1), batch = one > 0 ? count / one : 0;
  const int inputs = growfx_input_count(net), outputs = growfx_output_count(net);
  const float **in = (const float **)calloc((size_t)inputs, sizeof *in);
  float **out = (float **)calloc((size_t)outputs, sizeof *out);
  float *results = NULL;
  char error[512];
  int64_t total, i;
  int code, k;
  if (batch < 1 || count_of(net, batch, 0, -1) != count) {
    snprintf(error, sizeof error, "expected a multiple of %lld numbers, the file has %lld", (long long)one,
             (long long)count);
    free((void *)in);
    free(out);
    return fail(error);
  }
  total = count_of(net, batch, 1, -1);
  results = (float *)malloc((size_t)total * sizeof *results);
  if (!in || !out || !results) return fail("not enough memory");
  for (i = 0, k = 0; k < inputs; i += count_of(net, batch, 0, k), ++k) in[k] = numbers + i;
  for (i = 0, k = 0; k < outputs; i += count_of(net, batch, 1, k), ++k) out[k] = results + i;
  code = growfx_run(net, batch, in, out, error, sizeof error);
  for (i = 0; code == GROWFX_OK && i < total; ++i) printf("%.9g\n", (double)results[i]);
  free((void *)in);
  free(out);
  free(results);
  return code == GROWFX_OK ? 0 : fail(error);
}

int main(int argc, char **argv) {
  growfx *net = NULL;
  float *numbers;
  int64_t count = 0;
  char error[512];
  int status;
  if (argc < 3 || argc > 4) return fail("usage: growfx_example NETWORK INPUTS.f32 [THREADS]");
  if (growfx_open(argv[1], &net, error, sizeof error) != GROWFX_OK) return fail(error);
  if (argc == 4 && growfx_set_threads(net, atoi(argv[3]), error, sizeof error) != GROWFX_OK) {
    growfx_close(net);
    return fail(error);
  }
  numbers = read_numbers(argv[2], &count);
  status = numbers ? run(net, numbers, count) : fail("the file of inputs cannot be read, or does not hold float32 numbers");
  free(numbers);
  growfx_close(net);
  return status;
}

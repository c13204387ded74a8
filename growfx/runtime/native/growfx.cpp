// The C interface: errors become codes and messages, and no exception leaves the library.

#include "growfx.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "session.h"

using growfx_native::Session;
using growfx_native::Sizes;

struct growfx {
  Session session;
};

namespace {

constexpr int MOST_THREADS = 256;
constexpr long LARGEST_FILE = 1L << 30;

int failed(int code, const std::string& message, char* error, size_t n) {
  if (error && n) {
    const size_t length = message.size() < n ? message.size() : n - 1;
    std::memcpy(error, message.data(), length);
    error[length] = 0;
  }
  return code;
}

template <class F>
int guarded(char* error, size_t n, const F& function) {
  if (error && n) error[0] = 0;
#if defined(__cpp_exceptions)
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return failed(GROWFX_MEMORY, "not enough memory", error, n);
  } catch (const std::exception& other) {
    return failed(GROWFX_MEMORY, other.what(), error, n);
  }
#else
  return function();
#endif
}

int read_file(const char* path, std::vector<uint8_t>& bytes, char* error, size_t n) {
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
  if (!file) return failed(GROWFX_FILE, std::string("`") + path + "` cannot be opened", error, n);
  if (std::fseek(file.get(), 0, SEEK_END) != 0) return failed(GROWFX_FILE, "the file cannot be read", error, n);
  const long size = std::ftell(file.get());
  if (size < 0 || size > LARGEST_FILE) return failed(GROWFX_FILE, "the file cannot be read, or is too large", error, n);
  std::rewind(file.get());
  bytes.resize(static_cast<size_t>(size));
  if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
    return failed(GROWFX_FILE, "the file cannot be read", error, n);
  return GROWFX_OK;
}

int shape_of(const growfx* net, const std::vector<uint32_t>& ids, int index, int64_t batch, int64_t* sizes) {
  if (index < 0 || static_cast<size_t>(index) >= ids.size()) return -1;
  Sizes found;
  if (!growfx_native::resolve(net->session.network().values[ids[static_cast<size_t>(index)]].shape, batch, found)) return -1;
  for (size_t i = 0; i < found.size(); ++i) sizes[i] = found[i];
  return static_cast<int>(found.size());
}

}  // namespace

extern "C" {

int growfx_open_memory(const void* data, size_t size, growfx** net, char* error, size_t n) {
  return growfx_open_bounded(data, size, GROWFX_ROW_BYTES, net, error, n);
}

int growfx_open_bounded(const void* data, size_t size, int64_t row_bytes, growfx** net, char* error, size_t n) {
  if (net) *net = nullptr;
  return guarded(error, n, [&] {
    if (!net || (!data && size)) return failed(GROWFX_INPUT, "`net` and `data` must not be NULL", error, n);
    if (row_bytes < 1)
      return failed(GROWFX_INPUT, "expected a limit of 1 byte or more, got " + std::to_string(row_bytes), error, n);
    auto opened = std::make_unique<growfx>();
    const std::string problem = opened->session.open(static_cast<const uint8_t*>(data), size, row_bytes);
    if (!problem.empty())
      return failed(opened->session.is_over_limit() ? GROWFX_MEMORY : GROWFX_FORMAT, problem, error, n);
    *net = opened.release();
    return static_cast<int>(GROWFX_OK);
  });
}

int growfx_open(const char* path, growfx** net, char* error, size_t n) {
  if (net) *net = nullptr;
  return guarded(error, n, [&] {
    if (!path) return failed(GROWFX_INPUT, "`path` must not be NULL", error, n);
    std::vector<uint8_t> bytes;
    const int code = read_file(path, bytes, error, n);
    return code == GROWFX_OK ? growfx_open_memory(bytes.data(), bytes.size(), net, error, n) : code;
  });
}

void growfx_close(growfx* net) { delete net; }

int growfx_input_count(const growfx* net) { return net ? static_cast<int>(net->session.network().inputs.size()) : 0; }
int growfx_output_count(const growfx* net) { return net ? static_cast<int>(net->session.network().outputs.size()) : 0; }

int growfx_input_shape(const growfx* net, int index, int64_t batch, int64_t sizes[GROWFX_MAX_RANK]) {
  return net && sizes ? shape_of(net, net->session.network().inputs, index, batch, sizes) : -1;
}
int growfx_output_shape(const growfx* net, int index, int64_t batch, int64_t sizes[GROWFX_MAX_RANK]) {
  return net && sizes ? shape_of(net, net->session.network().outputs, index, batch, sizes) : -1;
}

int growfx_set_threads(growfx* net, int threads, char* error, size_t n) {
  return guarded(error, n, [&] {
    if (!net || threads < 1 || threads > MOST_THREADS)
      return failed(GROWFX_INPUT, "expected 1 to " + std::to_string(MOST_THREADS) + " threads, got " + std::to_string(threads),
                    error, n);
    net->session.set_threads(threads);
    return static_cast<int>(GROWFX_OK);
  });
}

const char* growfx_instructions(const growfx* net) { return net ? net->session.kernels().name : ""; }

int growfx_run(growfx* net, int64_t batch, const float* const* inputs, float* const* outputs, char* error, size_t n) {
  return guarded(error, n, [&] {
    if (!net || !inputs || !outputs) return failed(GROWFX_INPUT, "an argument is NULL", error, n);
    if (batch < 1)
      return failed(GROWFX_INPUT, "expected a batch of 1 or more, got " + std::to_string(batch), error, n);
    for (int i = 0; i < growfx_input_count(net); ++i)
      if (!inputs[i]) return failed(GROWFX_INPUT, "input " + std::to_string(i) + " is NULL", error, n);
    for (int i = 0; i < growfx_output_count(net); ++i)
      if (!outputs[i]) return failed(GROWFX_INPUT, "output " + std::to_string(i) + " is NULL", error, n);
    const std::string problem = net->session.prepare(batch);
    if (!problem.empty())
      return failed(net->session.is_over_limit() ? GROWFX_MEMORY : GROWFX_INPUT, "a batch of " + std::to_string(batch) + " does not run: " + problem, error, n);
    net->session.run(batch, inputs, outputs);
    return static_cast<int>(GROWFX_OK);
  });
}

}  // extern "C"

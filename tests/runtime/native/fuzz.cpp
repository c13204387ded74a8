// fuzz NETWORK COUNT: opens so many mutations of a network, half of them under a right checksum, and runs those that are
// accepted. What matters is what the sanitizers say. Prints how many were refused.

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "growfx.h"
#include "sha256.h"

namespace {

constexpr size_t HEADER = 40;

std::vector<uint8_t> read_all(const char* path) {
  std::vector<uint8_t> bytes;
  if (std::FILE* file = std::fopen(path, "rb")) {
    for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(static_cast<uint8_t>(c));
    std::fclose(file);
  }
  return bytes;
}

void mutate(std::vector<uint8_t>& bytes, size_t from, size_t end, std::mt19937& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  for (size_t k = 1 + below(3); k > 0; --k) {
    const size_t at = from + below(end - from);
    switch (below(4)) {
      case 0: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
      case 1: bytes[at] = static_cast<uint8_t>("\0\1\177\200\377"[below(5)]); break;
      case 2: bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at)); break;
      default: bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<uint8_t>(random())); break;
    }
    end = end < bytes.size() ? end : bytes.size();
  }
}

int64_t count_of(const int64_t* sizes, int rank) {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= sizes[i];
  return count;
}

// False where the numbers are too many to be worth it.
bool run(growfx* net, int64_t batch) {
  std::vector<std::vector<float>> memory;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  int64_t sizes[GROWFX_MAX_RANK];
  for (int out = 0; out < 2; ++out) {
    for (int i = 0; i < (out ? growfx_output_count(net) : growfx_input_count(net)); ++i) {
      const int rank = out ? growfx_output_shape(net, i, batch, sizes) : growfx_input_shape(net, i, batch, sizes);
      const int64_t count = rank < 0 ? -1 : count_of(sizes, rank);
      if (count < 0 || count > 1000000) return false;
      memory.emplace_back(static_cast<size_t>(count), 0.5f);
    }
  }
  size_t at = 0;
  for (int i = 0; i < growfx_input_count(net); ++i) inputs.push_back(memory[at++].data());
  for (int i = 0; i < growfx_output_count(net); ++i) outputs.push_back(memory[at++].data());
  char error[256];
  return growfx_run(net, batch, inputs.data(), outputs.data(), error, sizeof error) == GROWFX_OK;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::vector<uint8_t> whole = read_all(argv[1]);
  std::mt19937 random(0);
  int refused = 0, ran = 0;
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    std::vector<uint8_t> bytes = whole;
    const bool sealed = i % 2 != 0;
    const size_t end = i % 4 == 3 && bytes.size() > 1000 ? 1000 : bytes.size();
    mutate(bytes, sealed ? HEADER : 0, end, random);
    if (sealed) {
      uint8_t digest[32];
      growfx_native::sha256(bytes.data() + HEADER, bytes.size() - HEADER, digest);
      std::memcpy(bytes.data() + 8, digest, sizeof digest);
    }
    growfx* net = nullptr;
    char error[256];
    if (growfx_open_memory(bytes.data(), bytes.size(), &net, error, sizeof error) != GROWFX_OK) {
      if (!*error || net) return 3;
      ++refused;
      continue;
    }
    growfx_set_threads(net, 1 + i % 2, error, sizeof error);
    ran += run(net, 1) && run(net, 3);
    growfx_close(net);
  }
  std::printf("%d refused, %d ran\n", refused, ran);
  return 0;
}

// The byte codecs of artifacts: positions and values of the active weights of a tensor.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace growfx_native {

enum IndexCodec : uint8_t { BITMASK = 0, GAP8 = 1, GAP8_HUFFMAN = 2 };
enum ValueCodec : uint8_t { RAW = 0, PLANES = 1 };

// All return "" or what is wrong with the stream.

// Raw deflate (RFC 1951) of literals alone, to exactly `count` bytes.
const char* inflate_literals(const uint8_t* data, size_t size, uint8_t* out, size_t count);

// `count` ascending positions below `size`; `raw` is the number of bytes before deflate.
const char* decode_positions(IndexCodec codec, const uint8_t* data, size_t stored, size_t raw, uint64_t size,
                             size_t count, std::vector<uint32_t>& positions);

// `count` values; `planes` has the stored length of each of the four byte planes.
const char* decode_values(ValueCodec codec, const uint8_t* data, size_t stored, const size_t (&planes)[4], size_t count,
                          std::vector<float>& values);

}  // namespace growfx_native

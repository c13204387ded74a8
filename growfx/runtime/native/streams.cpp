#include "streams.h"

#include <cstring>

namespace growfx_native {

namespace {

constexpr int LONGEST = 15;
constexpr int LITERALS = 288;

// The lowest bit of a byte first.
class Bits {
 public:
  Bits(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  uint32_t get(int count) {
    while (have_ < count) {
      if (at_ == end_) {
        short_ = true;
        return 0;
      }
      held_ |= static_cast<uint64_t>(*at_++) << have_;
      have_ += 8;
    }
    const uint32_t value = static_cast<uint32_t>(held_ & ((uint64_t{1} << count) - 1));
    held_ >>= count;
    have_ -= count;
    return value;
  }
  // Up to 15 bits without taking them; zeros stand behind the end.
  uint32_t peek() {
    while (have_ < LONGEST && at_ != end_) {
      held_ |= static_cast<uint64_t>(*at_++) << have_;
      have_ += 8;
    }
    return static_cast<uint32_t>(held_ & ((1u << LONGEST) - 1));
  }
  void drop(int count) {
    if (count > have_) short_ = true;
    else {
      held_ >>= count;
      have_ -= count;
    }
  }
  // To the next whole byte; bytes that were read ahead go back.
  void align() {
    held_ >>= have_ % 8;
    have_ -= have_ % 8;
  }
  bool is_short() const { return short_; }
  bool is_at_end() const { return at_ == end_ && have_ < 8; }

 private:
  const uint8_t *at_, *end_;
  uint64_t held_ = 0;
  int have_ = 0;
  bool short_ = false;
};

// A canonical Huffman code as a table over the next 15 bits.
struct Code {
  std::vector<uint16_t> symbol = std::vector<uint16_t>(size_t{1} << LONGEST);
  std::vector<uint8_t> length = std::vector<uint8_t>(size_t{1} << LONGEST);

  bool build(const uint8_t* lengths, int count) {
    int counts[LONGEST + 1] = {}, next[LONGEST + 2] = {};
    for (int i = 0; i < count; ++i) ++counts[lengths[i]];
    counts[0] = 0;
    int code = 0;
    for (int bits = 1; bits <= LONGEST; ++bits) {
      code = (code + counts[bits - 1]) * 2;
      if (code + counts[bits] > 1 << bits) return false;
      next[bits] = code;
    }
    std::memset(length.data(), 0, length.size());
    for (int i = 0; i < count; ++i) {
      const int bits = lengths[i];
      if (!bits) continue;
      int reversed = 0;
      for (int b = 0; b < bits; ++b) reversed |= (next[bits] >> b & 1) << (bits - 1 - b);
      ++next[bits];
      for (int at = reversed; at < 1 << LONGEST; at += 1 << bits) {
        symbol[at] = static_cast<uint16_t>(i);
        length[at] = static_cast<uint8_t>(bits);
      }
    }
    return true;
  }
  // -1 where no code fits.
  int decode(Bits& bits) const {
    const uint32_t ahead = bits.peek();
    if (!length[ahead]) return -1;
    bits.drop(length[ahead]);
    return symbol[ahead];
  }
};

const char* read_lengths(Bits& bits, uint8_t (&lengths)[LITERALS]) {
  constexpr uint8_t ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  const int literals = static_cast<int>(bits.get(5)) + 257, distances = static_cast<int>(bits.get(5)) + 1;
  const int given = static_cast<int>(bits.get(4)) + 4;
  if (literals > LITERALS) return "a compressed stream with too many codes";
  uint8_t first[19] = {}, all[LITERALS + 32] = {};
  for (int i = 0; i < given; ++i) first[ORDER[i]] = static_cast<uint8_t>(bits.get(3));
  Code code;
  if (!code.build(first, 19)) return "a compressed stream with an impossible code";
  for (int i = 0; i < literals + distances;) {
    const int symbol = code.decode(bits);
    if (symbol < 0 || bits.is_short()) return "a compressed stream that is damaged";
    if (symbol < 16) {
      all[i++] = static_cast<uint8_t>(symbol);
      continue;
    }
    if (symbol == 16 && i == 0) return "a compressed stream that is damaged";
    const uint8_t value = symbol == 16 ? all[i - 1] : 0;
    int times = symbol == 16   ? 3 + static_cast<int>(bits.get(2))
                : symbol == 17 ? 3 + static_cast<int>(bits.get(3))
                               : 11 + static_cast<int>(bits.get(7));
    if (i + times > literals + distances) return "a compressed stream that is damaged";
    while (times-- > 0) all[i++] = value;
  }
  std::memset(lengths, 0, sizeof lengths);
  std::memcpy(lengths, all, static_cast<size_t>(literals));
  return "";
}

const char* inflate_coded(Bits& bits, const uint8_t (&lengths)[LITERALS], uint8_t* out, size_t count, size_t& done) {
  Code code;
  if (!code.build(lengths, LITERALS)) return "a compressed stream with an impossible code";
  for (;;) {
    const int symbol = code.decode(bits);
    if (symbol < 0 || bits.is_short()) return "a compressed stream that is damaged";
    if (symbol == 256) return "";
    if (symbol > 256) return "a compressed stream with repeats";
    if (done == count) return "a compressed stream that is too long";
    out[done++] = static_cast<uint8_t>(symbol);
  }
}

const char* inflate_stored(Bits& bits, uint8_t* out, size_t count, size_t& done) {
  bits.align();
  const uint32_t length = bits.get(16), inverse = bits.get(16);
  if (bits.is_short() || (length ^ inverse) != 0xffff) return "a compressed stream that is damaged";
  if (length > count - done) return "a compressed stream that is too long";
  for (uint32_t i = 0; i < length; ++i) out[done++] = static_cast<uint8_t>(bits.get(8));
  return bits.is_short() ? "a compressed stream that is damaged" : "";
}

const char* gaps_to_positions(const uint8_t* gaps, size_t raw, uint64_t size, size_t count, uint32_t* positions) {
  uint64_t at = 0;
  size_t found = 0;
  for (size_t i = 0; i < raw; ++i) {
    at += gaps[i];
    if (gaps[i] == 255) continue;
    if (found == count) return "more positions than weights";
    if (at >= size) return "a position outside the tensor";
    positions[found++] = static_cast<uint32_t>(at++);
  }
  return found == count ? "" : "fewer positions than weights";
}

const char* bits_to_positions(const uint8_t* mask, uint64_t size, size_t count, uint32_t* positions) {
  size_t found = 0;
  for (uint64_t i = 0; i < (size + 7) / 8 * 8; ++i) {
    if (!(mask[i / 8] >> (7 - i % 8) & 1)) continue;
    if (i >= size) return "a position outside the tensor";
    if (found == count) return "more positions than weights";
    positions[found++] = static_cast<uint32_t>(i);
  }
  return found == count ? "" : "fewer positions than weights";
}

}  // namespace

const char* inflate_literals(const uint8_t* data, size_t size, uint8_t* out, size_t count) {
  Bits bits(data, size);
  size_t done = 0;
  for (bool last = false; !last;) {
    last = bits.get(1) != 0;
    const uint32_t kind = bits.get(2);
    if (bits.is_short()) return "a compressed stream that is damaged";
    uint8_t lengths[LITERALS];
    const char* problem = "";
    if (kind == 0) problem = inflate_stored(bits, out, count, done);
    else if (kind == 1) {
      for (int i = 0; i < LITERALS; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
      problem = inflate_coded(bits, lengths, out, count, done);
    } else if (kind == 2) {
      problem = read_lengths(bits, lengths);
      if (!*problem) problem = inflate_coded(bits, lengths, out, count, done);
    } else {
      problem = "a compressed stream that is damaged";
    }
    if (*problem) return problem;
  }
  if (done != count) return "a compressed stream that is too short";
  return bits.is_at_end() ? "" : "a compressed stream followed by other bytes";
}

const char* decode_positions(IndexCodec codec, const uint8_t* data, size_t stored, size_t raw, uint64_t size,
                             size_t count, std::vector<uint32_t>& positions) {
  if (size > UINT32_MAX || count > size) return "a tensor of impossible size";
  if (codec == BITMASK) {
    if (stored != (size + 7) / 8) return "a bitmask of the wrong length";
    positions.resize(count);
    return bits_to_positions(data, size, count, positions.data());
  }
  // A byte for every weight, and at most one for every 255 other elements; every byte takes a bit.
  if (raw < count || raw > count + (size - count) / 255) return "an index of impossible length";
  if (codec == GAP8 ? stored != raw : raw / 8 > stored) return "an index of the wrong length";
  positions.resize(count);
  if (codec == GAP8) return gaps_to_positions(data, raw, size, count, positions.data());
  std::vector<uint8_t> gaps(raw);
  const char* problem = inflate_literals(data, stored, gaps.data(), raw);
  return *problem ? problem : gaps_to_positions(gaps.data(), raw, size, count, positions.data());
}

const char* decode_values(ValueCodec codec, const uint8_t* data, size_t stored, const size_t (&planes)[4], size_t count,
                          std::vector<float>& values) {
  if (codec == RAW ? stored / 4 != count || stored % 4 : false) return "values of the wrong length";
  std::vector<uint8_t> plane;
  if (codec == PLANES) {
    size_t total = 0;
    for (const size_t length : planes) {
      if (length > count || count / 8 > length || length > stored - total) return "a byte plane of the wrong length";
      total += length;
    }
    if (total != stored) return "byte planes of the wrong length";
    plane.resize(count);
  }
  std::vector<uint32_t> bits(count);
  for (int part = 0; part < 4; ++part) {
    const uint8_t* source = data + part;
    size_t step = 4;
    int shift = 8 * part;
    if (codec == PLANES) {
      source = data, step = 1, shift = 24 - 8 * part;
      if (planes[part] < count) {
        const char* problem = inflate_literals(data, planes[part], plane.data(), count);
        if (*problem) return problem;
        source = plane.data();
      }
      data += planes[part];
    }
    for (size_t i = 0; i < count; ++i) bits[i] |= static_cast<uint32_t>(source[i * step]) << shift;
  }
  // Planes hold patterns rotated left by one.
  if (codec == PLANES)
    for (uint32_t& b : bits) b = b >> 1 | b << 31;
  values.resize(count);
  if (count) std::memcpy(values.data(), bits.data(), count * 4);
  return "";
}

}  // namespace growfx_native

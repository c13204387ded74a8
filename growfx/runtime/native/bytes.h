// Reading numbers from bytes that nobody vouches for.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace growfx_native {

// A cursor that stops at the first complaint: everything read after it is 0.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  bool good() const { return complaint_ == nullptr; }
  const char* complaint() const { return complaint_ ? complaint_ : ""; }
  size_t left() const { return static_cast<size_t>(end_ - at_); }
  void fail(const char* complaint) {
    if (!complaint_) complaint_ = complaint;
    at_ = end_;
  }

  uint8_t byte() { return need(1) ? *at_++ : 0; }
  // Seven bits a byte, lowest first.
  uint64_t number() {
    uint64_t value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const uint8_t b = byte();
      value |= static_cast<uint64_t>(b & 127) << shift;
      if (!(b & 128)) return value;
    }
    fail("a number of more than 63 bits");
    return 0;
  }
  // A number below `limit`.
  uint64_t below(uint64_t limit, const char* complaint) {
    const uint64_t value = number();
    if (value < limit) return value;
    fail(complaint);
    return 0;
  }
  // How many items of at least so many bytes each follow.
  size_t count(size_t bytes = 1) {
    const uint64_t value = number();
    if (value <= left() / bytes) return static_cast<size_t>(value);
    fail("a count beyond the end of the file");
    return 0;
  }
  // Signs in the lowest bit.
  int64_t integer() {
    const uint64_t value = number();
    return static_cast<int64_t>(value >> 1) ^ -static_cast<int64_t>(value & 1);
  }
  float real() {
    const uint8_t* p = take(4);
    if (!p) return 0.0f;
    const uint32_t bits = static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 |
                          static_cast<uint32_t>(p[2]) << 16 | static_cast<uint32_t>(p[3]) << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // So many bytes, or NULL.
  const uint8_t* take(size_t size) {
    if (!need(size)) return nullptr;
    const uint8_t* p = at_;
    at_ += size;
    return p;
  }

 private:
  bool need(size_t size) {
    if (size <= left() && good()) return true;
    fail("it ends too early");
    return false;
  }

  const uint8_t *at_, *end_;
  const char* complaint_ = nullptr;
};

}  // namespace growfx_native

#include <new>

#include "bytes.h"
#include "network.h"
#include "sha256.h"
#include "streams.h"

namespace growfx_native {

namespace {

constexpr uint32_t VERSION = 1;
constexpr size_t HEADER = 4 + 4 + 32;
// Of the ids and counts of one step.
constexpr size_t MOST_OPERANDS = 1024;
constexpr size_t LONGEST_NAME = 64;
// Bytes of the shortest item of each kind: what is allocated for a file stays in proportion to its size.
constexpr size_t SHORTEST_VALUE = 2, SHORTEST_CONSTANT = 4, SHORTEST_STEP = 6;
constexpr int64_t LARGEST_SIZE = int64_t{1} << 40;

std::string check_header(const uint8_t* data, size_t size) {
  if (size < 4 || std::memcmp(data, "GFX1", 4) != 0)
    return "not a network of growfx: it does not begin with `GFX1`; `growfx.export_native` writes one";
  if (size < HEADER) return "the file is cut short";
  const uint32_t version = static_cast<uint32_t>(data[4]) | static_cast<uint32_t>(data[5]) << 8 |
                           static_cast<uint32_t>(data[6]) << 16 | static_cast<uint32_t>(data[7]) << 24;
  if (version != VERSION)
    return "the file has version " + std::to_string(version) + ", this library reads version " +
           std::to_string(VERSION) + "; build the library that was exported with it";
  uint8_t digest[32];
  sha256(data + HEADER, size - HEADER, digest);
  if (std::memcmp(digest, data + 8, 32) != 0) return "the file is damaged: its contents are not those of its checksum";
  return "";
}

void read_shape(Bytes& in, Shape& shape) {
  shape.resize(in.below(MAX_RANK + 1, "a tensor of too many axes"));
  for (Dim& dim : shape) {
    dim.per_batch = static_cast<int64_t>(in.below(LARGEST_SIZE, "a size that is too large"));
    dim.fixed = in.integer();
    if (dim.fixed > LARGEST_SIZE || dim.fixed < -LARGEST_SIZE) in.fail("a size that is too large");
  }
}

struct Streams {
  size_t index = 0, raw_index = 0, values = 0, planes[4] = {};
  uint8_t index_codec = 0, value_codec = 0;
  size_t count = 0;
};

Streams read_constant(Bytes& in, Constant& constant) {
  Streams s;
  constant.sizes.resize(in.below(MAX_RANK + 1, "a constant of too many axes"));
  for (int64_t& size : constant.sizes) size = static_cast<int64_t>(in.below(LARGEST_SIZE, "a size that is too large"));
  constant.elements = element_count(constant.sizes);
  if (constant.elements < 0) in.fail("a constant that is too large");
  constant.sparse = in.byte() != 0;
  s.count = static_cast<size_t>(constant.elements);
  if (constant.sparse) {
    s.count = in.below(static_cast<uint64_t>(constant.elements) + 1, "more weights than its tensor has");
    s.index_codec = static_cast<uint8_t>(in.below(3, "an unknown index codec"));
    s.raw_index = in.number();
    s.index = in.count();
  }
  s.value_codec = static_cast<uint8_t>(in.below(2, "an unknown value codec"));
  if (s.value_codec == PLANES)
    for (size_t& length : s.planes) length = in.count();
  s.values = in.count();
  return s;
}

void decode_constant(Bytes& in, const Streams& s, Constant& constant) {
  const uint8_t* index = constant.sparse ? in.take(s.index) : nullptr;
  const uint8_t* values = in.take(s.values);
  if (!in.good()) return;
  const char* problem = "";
  if (constant.sparse)
    problem = decode_positions(static_cast<IndexCodec>(s.index_codec), index, s.index, s.raw_index,
                               static_cast<uint64_t>(constant.elements), s.count, constant.positions);
  if (!*problem)
    problem = decode_values(static_cast<ValueCodec>(s.value_codec), values, s.values, s.planes, s.count,
                            constant.values);
  if (*problem) in.fail(problem);
}

void read_post(Bytes& in, uint64_t ids, std::vector<Post>& posts) {
  posts.resize(in.below(MOST_OPERANDS, "too many operations in a step"));
  for (Post& post : posts) {
    post.op = static_cast<Op>(in.below(static_cast<uint64_t>(Op::COUNT), "an unknown operation"));
    if (has_operand(post.op)) post.operand = static_cast<uint32_t>(in.below(ids, "an operand that is not there"));
    post.a = in.real();
    post.b = in.real();
  }
}

void read_step(Bytes& in, const Network& network, Step& step) {
  const uint64_t values = network.values.size(), ids = values + network.constants.size();
  step.kernel = static_cast<uint32_t>(in.below(network.kernels.size(), "a kernel that is not there"));
  step.inputs.resize(in.below(MOST_OPERANDS, "too many operands in a step"));
  for (uint32_t& id : step.inputs) id = static_cast<uint32_t>(in.below(ids, "an operand that is not there"));
  step.output = static_cast<uint32_t>(in.below(values, "a result that is not there"));
  step.ints.resize(in.count());
  for (int64_t& value : step.ints) value = in.integer();
  step.floats.resize(in.count(4));
  for (float& value : step.floats) value = in.real();
  read_post(in, ids, step.post);
}

void read_names(Bytes& in, std::vector<std::string>& names) {
  names.resize(in.count());
  for (std::string& name : names) {
    const size_t length = in.below(LONGEST_NAME, "a name that is too long");
    const uint8_t* text = in.take(length);
    if (text) name.assign(reinterpret_cast<const char*>(text), length);
  }
}

void read_ids(Bytes& in, uint64_t limit, std::vector<uint32_t>& ids) {
  ids.resize(in.count());
  for (uint32_t& id : ids) id = static_cast<uint32_t>(in.below(limit, "an input or output that is not there"));
  if (ids.empty()) in.fail("a network without inputs or outputs");
}

void read_body(Bytes& in, Network& network) {
  read_names(in, network.kernels);
  network.slots = static_cast<uint32_t>(in.count());
  network.values.resize(in.count(SHORTEST_VALUE));
  for (Value& value : network.values) {
    read_shape(in, value.shape);
    value.slot = static_cast<uint32_t>(in.below(network.slots, "a buffer that is not there"));
  }
  network.constants.resize(in.count(SHORTEST_CONSTANT));
  std::vector<Streams> streams;
  for (Constant& constant : network.constants) streams.push_back(read_constant(in, constant));
  read_ids(in, network.values.size(), network.inputs);
  read_ids(in, network.values.size(), network.outputs);
  network.steps.resize(in.count(SHORTEST_STEP));
  for (Step& step : network.steps) read_step(in, network, step);
  for (size_t i = 0; i < streams.size() && in.good(); ++i) decode_constant(in, streams[i], network.constants[i]);
  if (in.good() && in.left()) in.fail("bytes behind its end");
}

}  // namespace

std::string read_network(const uint8_t* data, size_t size, Network& network) {
  const std::string problem = check_header(data, size);
  if (!problem.empty()) return problem;
  Bytes in(data + HEADER, size - HEADER);
  read_body(in, network);
  return in.good() ? "" : std::string("the file is damaged: ") + in.complaint();
}

int64_t element_count(const Sizes& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (size < 0) return -1;
    if (size != 0 && count > MOST_ELEMENTS / size) return -1;
    count *= size;
  }
  return count;
}

bool resolve(const Shape& shape, int64_t batch, Sizes& sizes) {
  sizes.clear();
  for (const Dim& dim : shape) {
    // Both factors are bounded where they are read, so neither sum nor product overflows.
    if (batch < 1 || batch > INT32_MAX || dim.per_batch > MOST_ELEMENTS) return false;
    const int64_t size = dim.per_batch * batch + dim.fixed;
    if (size < 0 || size > MOST_ELEMENTS) return false;
    sizes.push_back(size);
  }
  return element_count(sizes) >= 0;
}

}  // namespace growfx_native

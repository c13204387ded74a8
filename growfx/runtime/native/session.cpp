#include "session.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "rows.h"

namespace growfx_native {

namespace {

constexpr int64_t POST_TASK = int64_t{16} << 10;
// Buffers that stay near: in the second cache, or not far behind it.
constexpr int64_t NEAR_FLOATS = int64_t{1} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Named {
  const char* name;
  Maker make;
};
constexpr Named MAKERS[] = {
    {"attention", make_attention},   {"binary", make_binary},         {"concat", make_concat},
    {"convolution", make_convolution}, {"deconvolution", make_deconvolution},
    {"gated_convolution", make_gated_convolution}, {"gather", make_gather},
    {"group_norm", make_group_norm}, {"layer_norm", make_layer_norm}, {"linear", make_linear},
    {"pad", make_pad},               {"pointwise", make_pointwise},   {"pool", make_pool},
    {"product", make_product},       {"reduce", make_reduce},         {"resize", make_resize},
    {"select", make_select},         {"softmax", make_softmax},       {"view", make_view},
};

// Kernels that take a sparse constant as their second operand.
bool takes_sparse(const std::string& kernel) {
  return kernel == "convolution" || kernel == "gated_convolution" || kernel == "deconvolution" || kernel == "linear";
}

// At least the floats that the tables of a step take, which a file can ask for again and again in a few bytes.
int64_t table_floats(const Arguments& a, const std::string& kernel) {
  int64_t places = 0;
  for (const int64_t size : a.output.sizes) places += size;
  if (kernel == "pad" || kernel == "gather") return 2 * places;
  if (kernel == "resize") return 12 * places;
  if (kernel == "pool") return 4 * places;
  if (kernel == "attention") return a.output.sizes.empty() ? 0 : 2 * a.output.elements / a.output.sizes.back();
  if (!takes_sparse(kernel) || a.inputs.size() < 2 || !a.inputs[1].constant) return 0;
  const Constant& weight = *a.inputs[1].constant;
  const int64_t stored = weight.sparse ? static_cast<int64_t>(weight.positions.size()) : weight.elements;
  if (kernel == "deconvolution") return 12 * stored;
  const int64_t rows = weight.sizes.empty() ? 1 : weight.sizes[0], columns = weight.elements / rows;
  const int64_t groups = kernel == "linear" || a.step->ints.empty() ? 1 : std::clamp<int64_t>(a.step->ints.back(), 1, rows);
  const int64_t of_entries = kernel == "gated_convolution" ? 4 : 3;
  return rows + 5 * groups * columns + (weight.sparse ? of_entries * stored : 0);
}

}  // namespace

Maker maker_of(const std::string& kernel) {
  for (const Named& named : MAKERS)
    if (kernel == named.name) return named.make;
  return nullptr;
}

void Buffer::Free::operator()(char* p) const { std::free(p); }

bool Buffer::reserve(int64_t floats) {
  if (floats <= size_ && data_) return true;
  constexpr uintptr_t LINE = 64;
  static_assert(BEFORE * sizeof(float) == LINE);
  // Where addresses have 32 bits, the number of bytes of what a file asks for may have more.
  constexpr int64_t MOST = PTRDIFF_MAX / static_cast<int64_t>(sizeof(float)) - BEHIND - 2 * static_cast<int64_t>(LINE);
  if (floats > MOST) return false;
  const size_t bytes = (static_cast<size_t>(floats) + BEHIND) * sizeof(float) + 2 * LINE;
  memory_.reset(static_cast<char*>(std::calloc(bytes, 1)));
  size_ = memory_ ? floats : 0;
  const uintptr_t at = (reinterpret_cast<uintptr_t>(memory_.get()) + 2 * LINE - 1) / LINE * LINE;
  data_ = memory_ ? reinterpret_cast<float*>(at) : nullptr;
  return data_ != nullptr;
}

std::string Session::open(const uint8_t* data, size_t size, int64_t row_bytes) {
  row_bytes_ = allowed_bytes_ = row_bytes;
  std::string problem = read_network(data, size, network_);
  if (!problem.empty()) return problem;
  for (const std::string& name : network_.kernels)
    if (!maker_of(name)) return "kernel `" + name + "` is not in this library; build the one that was exported with the file";
  problem = open_constants();
  if (!problem.empty()) return problem;
  find_once();
  by_rows_ = is_by_rows(network_, once_) && is_light(network_);
  problem = prepare(1);
  for (const Buffer& slot : slots_) row_floats_ += slot.size();
  return problem;
}

std::string Session::open_constants() {
  std::vector<char> needs_dense(network_.constants.size(), 0);
  const size_t values = network_.values.size();
  const auto reads = [&](uint32_t id) {
    if (id != NONE && id >= values) needs_dense[id - values] = 1;
  };
  for (const Step& step : network_.steps) {
    const bool sparse = takes_sparse(network_.kernels[step.kernel]);
    for (size_t i = 0; i < step.inputs.size(); ++i)
      if (!sparse || i != 1) reads(step.inputs[i]);
    for (const Post& post : step.post) reads(post.operand);
  }
  for (size_t i = 0; i < network_.constants.size(); ++i) {
    Constant& c = network_.constants[i];
    if (c.elements < 1) return "the file is damaged: a constant without elements";
    // What is worked out for a sparse weight may be as large as the dense one.
    if (c.elements > row_bytes_ / static_cast<int64_t>(sizeof(float))) return too_large();
    if (c.sparse && needs_dense[i]) {
      if (!affords(c.elements)) return too_large();
      kept_bytes_ = used_bytes_;
      std::vector<float> all(static_cast<size_t>(c.elements), 0.0f);
      for (size_t k = 0; k < c.positions.size(); ++k) all[c.positions[k]] = c.values[k];
      c.values.swap(all);
      c.positions.clear();
      c.sparse = false;
    }
    if (!c.sparse) c.values.resize(static_cast<size_t>(c.elements) + BEHIND, 0.0f);
    Tensor tensor;
    tensor.sizes = c.sizes, tensor.elements = c.elements, tensor.constant = &c;
    tensor.data = c.sparse ? nullptr : c.values.data();
    constants_.push_back(tensor);
  }
  return "";
}

bool Session::affords(int64_t floats) {
  if (floats > (allowed_bytes_ - used_bytes_) / static_cast<int64_t>(sizeof(float))) return false;
  used_bytes_ += floats * static_cast<int64_t>(sizeof(float));
  return true;
}

std::string Session::too_large() {
  over_limit_ = true;
  return "it needs more than the " + std::to_string(row_bytes_) +
         " bytes that are allowed for each row of a batch; `growfx_open_bounded` sets another limit";
}

std::string Session::place(int64_t batch) {
  values_.assign(network_.values.size(), Tensor{});
  std::vector<int64_t> sizes(network_.slots, 1);
  for (size_t i = 0; i < values_.size(); ++i) {
    const Value& value = network_.values[i];
    if (!resolve(value.shape, batch, values_[i].sizes)) return "its values are too large";
    values_[i].elements = element_count(values_[i].sizes);
    if (values_[i].elements < 1) return "a value without elements";
    sizes[value.slot] = std::max(sizes[value.slot], values_[i].elements);
  }
  for (const int64_t size : sizes)
    if (!affords(size)) return too_large();
  slots_.resize(network_.slots);
  for (size_t i = 0; i < slots_.size(); ++i)
    if (!slots_[i].reserve(sizes[i])) return "not enough memory";
  for (size_t i = 0; i < values_.size(); ++i) values_[i].data = slots_[network_.values[i].slot].data();
  return "";
}

Tensor Session::operand(uint32_t id) const {
  return id < values_.size() ? values_[id] : constants_[id - values_.size()];
}

std::string Session::make_step(size_t index, int64_t batch) {
  const Step& step = network_.steps[index];
  Arguments a;
  a.step = &step;
  for (const uint32_t id : step.inputs) a.inputs.push_back(operand(id));
  if (takes_sparse(network_.kernels[step.kernel]) && a.inputs.size() > 1 && !a.inputs[1].constant &&
      computed_[network_.values[step.inputs[1]].slot]) {
    Tensor& weight = a.inputs[1];
    if (!affords(weight.elements)) return too_large();
    auto constant = std::make_unique<Constant>();
    constant->sizes = weight.sizes, constant->elements = weight.elements;
    constant->values.assign(weight.data, weight.data + weight.elements + BEHIND);
    weight.constant = constant.get();
    weights_.push_back(std::move(constant));
  }
  a.output = operand(step.output);
  if (!affords(table_floats(a, network_.kernels[step.kernel]))) return too_large();
  a.kernels = kernels_;
  a.threads = workers_->threads();
  a.batch = batch;
  for (const Post& post : step.post) {
    PostCall call{static_cast<uint8_t>(post.op), nullptr, post.a, post.b};
    if (post.operand != NONE) {
      const Tensor other = operand(post.operand);
      if (!other.data || other.elements != a.output.elements) return "an operand of another size";
      call.operand = other.data;
    }
    a.post.push_back(call);
  }
  std::string complaint;
  Prepared& prepared = prepared_[index];
  prepared.ready = maker_of(network_.kernels[step.kernel])(a, complaint);
  if (!prepared.ready) return complaint;
  if (!prepared.ready->does_post) prepared.post = a.post;
  prepared.output = a.output.data, prepared.elements = a.output.elements;
  return "";
}

void Session::find_once() {
  once_.assign(network_.steps.size(), 0);
  computed_.assign(network_.slots, 0);
  // Slots that one step writes, and nobody else.
  std::vector<int> writers(network_.slots, 0);
  for (const uint32_t id : network_.inputs) writers[network_.values[id].slot] = 2;
  for (const Step& step : network_.steps) ++writers[network_.values[step.output].slot];
  const size_t values = network_.values.size();
  const auto is_there = [&](uint32_t id) { return id >= values || computed_[network_.values[id].slot]; };
  for (size_t i = 0; i < once_.size(); ++i) {
    const Step& step = network_.steps[i];
    const uint32_t slot = network_.values[step.output].slot;
    bool once = writers[slot] == 1;
    for (const uint32_t id : step.inputs) once = once && is_there(id);
    for (const Post& post : step.post) once = once && (post.operand == NONE || is_there(post.operand));
    once_[i] = computed_[slot] = once;
  }
}

std::string Session::reserve_scratch(int64_t floats) {
  const int64_t more = std::max<int64_t>(floats - scratch_floats_, 0);
  for (size_t i = 0; i < scratch_.size(); ++i)
    if (!affords(more)) return too_large();
  scratch_floats_ += more;
  for (Buffer& buffer : scratch_)
    if (!buffer.reserve(floats)) return "not enough memory";
  return "";
}

// Rows of a batch that are computed together: all of them, or so many that their values stay near.
int64_t Session::part_of(int64_t batch) const {
  if (!by_rows_) return batch;
  const int64_t most = std::max<int64_t>({1, NEAR_FLOATS / std::max<int64_t>(row_floats_, 1), workers_->threads()});
  return ceil_div(batch, ceil_div(batch, most));
}

std::string Session::prepare(int64_t rows) {
  const int64_t batch = part_of(rows);
  if (batch == batch_) return "";
  batch_ = 0;
  over_limit_ = false;
  used_bytes_ = kept_bytes_, scratch_floats_ = 0;
  allowed_bytes_ = row_bytes_ > INT64_MAX / batch ? INT64_MAX : row_bytes_ * batch;
  std::string problem = place(batch);
  if (problem.empty()) problem = prepare_steps(batch);
  if (problem.empty()) batch_ = batch;
  return problem;
}

std::string Session::prepare_steps(int64_t batch) {
  prepared_.clear();
  prepared_.resize(network_.steps.size());
  weights_.clear();
  scratch_.resize(static_cast<size_t>(workers_->threads()));
  for (size_t i = 0; i < prepared_.size(); ++i) {
    std::string problem = make_step(i, batch);
    if (problem.empty()) problem = reserve_scratch(prepared_[i].ready->scratch);
    if (!problem.empty())
      return "step " + std::to_string(i) + " (`" + network_.kernels[network_.steps[i].kernel] + "`): " + problem;
    if (once_[i]) run_step(i);
  }
  return "";
}

void Session::set_threads(int threads) {
  if (threads == workers_->threads()) return;
  workers_ = std::make_unique<Workers>(threads);
  batch_ = 0;
}

void Session::run_step(size_t index) {
  struct Context {
    const Session* session;
    const Prepared* step;
  };
  const Prepared& step = prepared_[index];
  Context context{this, &step};
  workers_->run(
      step.ready->tasks,
      [](void* p, int64_t task, int thread) {
        const Context& c = *static_cast<const Context*>(p);
        c.step->ready->run(task, c.session->scratch_[static_cast<size_t>(thread)].data());
      },
      &context);
  if (step.post.empty()) return;
  workers_->run(
      (step.elements + POST_TASK - 1) / POST_TASK,
      [](void* p, int64_t task, int) {
        const Context& c = *static_cast<const Context*>(p);
        const int64_t from = task * POST_TASK, count = std::min(POST_TASK, c.step->elements - from);
        const auto& post = c.step->post;
        c.session->kernels_->post(post.data(), static_cast<int64_t>(post.size()), c.step->output + from, count, from);
      },
      &context);
}

// Parts of equal size: the last may compute some rows of the one before once more.
void Session::run(int64_t rows, const float* const* inputs, float* const* outputs) {
  for (int64_t row = 0; row < rows; row += batch_) run_part(std::min(row, rows - batch_), inputs, outputs);
}

void Session::run_part(int64_t row, const float* const* inputs, float* const* outputs) {
  for (size_t i = 0; i < network_.inputs.size(); ++i) {
    const Tensor& value = values_[network_.inputs[i]];
    const float* const from = inputs[i] + value.elements / batch_ * row;
    std::memcpy(value.data, from, static_cast<size_t>(value.elements) * sizeof(float));
  }
  for (size_t i = 0; i < prepared_.size(); ++i)
    if (!once_[i]) run_step(i);
  for (size_t i = 0; i < network_.outputs.size(); ++i) {
    const Tensor& value = values_[network_.outputs[i]];
    float* const to = outputs[i] + value.elements / batch_ * row;
    std::memcpy(to, value.data, static_cast<size_t>(value.elements) * sizeof(float));
  }
}

}  // namespace growfx_native

// The optimizer's kernels past 2^31 elements, without such memory: launches are kept instead of run, their tables are
// looked at, and single threads of far blocks run on address space that is reserved but not filled.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../../csrc/optimizer/adamw.cu"
#include "../../../csrc/optimizer/adamw_quantize.cu"
#include "../../../csrc/optimizer/grad_norm.cu"

static std::vector<std::vector<char>> calls;
static std::vector<unsigned> grids;
static emulator::Identity self;

namespace emulator {
void launch(const LaunchShape& shape, ThreadBody, const void* call, size_t size) {
  const auto* bytes = static_cast<const char*>(call);
  calls.emplace_back(bytes, bytes + size);
  grids.push_back(shape.grid.x);
}
const Identity& identity() { return self; }
uint8_t* dynamic_smem() { std::abort(); }
uint32_t shuffle(Shuffle, uint32_t, uint32_t, uint32_t, uint32_t, Site) { std::abort(); }
uint32_t warp_reduce(hopper::Reduce, uint32_t, bool, uint32_t, Site) { std::abort(); }
void barrier_sync(uint32_t, uint32_t, Site) { std::abort(); }
void grid_dependency_wait(Site) {}
void grid_dependency_launch(Site) {}
}  // namespace emulator

using namespace optimizer;
using namespace optimizer_kernels;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

void refuses(const char* sentence, const std::function<void()>& call) {
  calls.clear();
  try {
    call();
    std::printf("not refused: %s\n", sentence);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    if (what.find(sentence) != std::string::npos && calls.empty()) return;
    std::printf("wanted: %s\ngot:    %s (%zu launches)\n", sentence, what.c_str(), calls.size());
  }
  ++failures;
}

// The first parameter of a kept launch, which follows the kernel's address.
template <class Params>
Params params_of(const std::vector<char>& call) {
  Params p;
  std::memcpy(&p, call.data() + sizeof(void*), sizeof(p));
  return p;
}

template <class T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::printf("no address space for %lld elements\n", static_cast<long long>(count));
    std::exit(77);
  }
  return static_cast<T*>(p);
}

alignas(16) float room[16];

AdamwTensor small(int64_t count) {
  return {room, room, room, room, nullptr, Type::fp32, Type::bf16, Type::bf16, count, 0.1};
}

void run(const std::vector<AdamwTensor>& tensors, int64_t first_index = 0) {
  AdamwArguments a;
  a.tensors = tensors.data();
  a.tensor_count = tensors.size();
  a.first_index = first_index;
  a.stochastic_rounding = true;
  a.seed = 9;
  a.lr = 0.5;
  calls.clear();
  grids.clear();
  adamw(a, nullptr);
}

void far_elements() {
  const int64_t count = (int64_t{5} << 30) + 7;   // 20 GB of fp32, past 2^32 elements
  auto* p = reserve<float>(count);
  auto* g = reserve<float>(count);
  auto* m = reserve<hopper::bf16>(count);
  auto* v = reserve<hopper::bf16>(count);
  auto* out = reserve<hopper::bf16>(count);
  run({small(5), {p, g, m, v, out, Type::fp32, Type::bf16, Type::bf16, count, 0.0}}, 100);
  check(calls.size() == 1 && grids[0] == 1 + (count + 2047) / 2048, "one launch, a block for each 2048 elements");
  const auto params = params_of<AdamwParams>(calls[0]);
  check(params.table.entries[1].first_index == 105, "the noise goes on behind the first tensor");

  for (const int64_t element : {int64_t{0}, (int64_t{1} << 31) + 1024, (int64_t{1} << 32) + 5, count - 1}) {
    p[element] = 1.0f, g[element] = 2.0f;
    self.block.x = static_cast<unsigned>(1 + element / 2048);
    self.thread.x = static_cast<unsigned>(element % 1024 / 4);
    adamw_kernel<float, hopper::bf16, hopper::bf16>(params);
    float want_p = 1.0f, want_m = 0.0f, want_v = 0.0f;
    adamw_element(want_p, 2.0f, want_m, want_v, params.step, 1.0f, params.table.entries[1]);
    const uint32_t noise = Noise(params.step.noise_key, 105 + element).bits(0);
    check(p[element] == want_p && want_p < 1.0f, "a far parameter");
    check(m[element].bits == stochastic_bf16(want_m, noise & 0xFFFF), "a far first moment and its noise");
    check(v[element].bits == stochastic_bf16(want_v, noise >> 16), "a far second moment and its noise");
    check(out[element].bits == hopper::to_bf16(want_p).bits, "a far copy");
  }

  NormEntry e{p, count, Type::fp32};
  p[count - 2] = 3.0f, p[count - 1] = 4.0f;
  const int64_t tail = count - 1, chunk = kNormChunkBytes / 4;
  self.thread.x = static_cast<unsigned>(tail % chunk % (kNormThreads * 4) / 4);
  check(add_squares<float>(0.0, e, static_cast<uint32_t>(tail / chunk)) == 25.0, "the squares of far gradients");
}

AdamwTensor weight(int64_t batch, int64_t rows, int64_t columns) {
  AdamwTensor t = small(batch * rows * columns);
  t.quantized = true;
  t.batch = batch, t.rows = rows, t.columns = columns;
  t.q = t.q_t = room;
  t.scale = t.scale_t = room;
  return t;
}

void run_quantized(const std::vector<AdamwTensor>& tensors) {
  AdamwArguments a;
  a.tensors = tensors.data();
  a.tensor_count = tensors.size();
  a.lr = 0.5;
  a.pow2 = true;
  calls.clear();
  grids.clear();
  adamw_quantize(a, nullptr);
}

// Weights past 2^32 elements, by the step of single threads of far tiles and by the addresses of their codes.
void far_weights() {
  const int64_t batch = 3, rows = 40000, columns = 40000, count = batch * rows * columns;
  auto t = weight(batch, rows, columns);
  t.param = reserve<float>(count);
  t.grad = reserve<float>(count);
  t.exp_avg = reserve<hopper::bf16>(count);
  t.exp_avg_sq = reserve<hopper::bf16>(count);
  t.weight_decay = 0.0;
  run_quantized({small(5), t, weight(1, 200, 16), small(5)});
  check(calls.size() == 2 && grids[0] == 2 && grids[1] == 3 * 313 * 313 + 2, "a launch of each kernel, a block for each tile");
  const auto p = params_of<QuantizedParams>(calls[1]);
  check(p.table.count == 2 && p.table.entries[0].step.first_index == 5 && p.table.entries[1].step.first_index == 5 + count,
        "the noise counts through every tensor of the list");
  check(params_of<AdamwParams>(calls[0]).table.entries[1].first_index == 5 + count + 3200, "of the other launch too");
  check(p.rule.pow2, "pow2");

  const QuantizedEntry& e = p.table.entries[0];
  static uint4 slots[kMasterBytes / 16];
  const quantize_kernels::OwnPatches<float> masters{slots};
  struct Far { int64_t batch, row, column; };
  for (const Far& far : {Far{0, 0, 0}, Far{1, 39999, 39999}, Far{2, 20000, 256}, Far{2, 39999, 39996}}) {
    const int64_t element = (far.batch * rows + far.row) * columns + far.column;
    t.param[element] = 1.0f;
    static_cast<float*>(const_cast<void*>(t.grad))[element] = 2.0f;
    const auto number = static_cast<uint32_t>((far.batch * 313 + far.row / 128) * 313 + far.column / 128);
    check(p.table.find(number).entry == 0, "a far tile finds its weight");
    const WeightTile tile(e, number);
    self.thread.x = static_cast<unsigned>(far.row % 128 / 4 * 8 + far.column % 32 / 4);
    self.block_dim.x = kThreads;
    const uint32_t largest =
        update_patch<true, float, hopper::bf16, hopper::bf16>(p, e, tile, quantize_kernels::Place(), masters);
    float want_p = 1.0f, want_m = 0.0f, want_v = 0.0f;
    adamw_element(want_p, 2.0f, want_m, want_v, p.step, 1.0f, e.step);
    check(t.param[element] == want_p && want_p < 1.0f, "a far master");
    check(largest == (hopper::float_bits(want_p) & 0x7FFFFFFF), "its magnitude");
    check(tile.corner(e) == element - far.row % 128 * columns - far.column % 128, "where its tile begins");
    check(tile.corner_t(e) == (far.batch * columns + far.column / 128 * 128) * rows + far.row / 128 * 128, "transposed");
    check(tile.window.rows == (far.row >= 39936 ? 64 : 128) && tile.window.columns == (far.column >= 39936 ? 64 : 128),
          "how much of it exists");
  }

  std::vector<AdamwTensor> many;
  for (int i = 0; i < 100; ++i) many.push_back(i % 4 ? weight(1 + i % 2, 100 + i, 16) : small(i));
  run_quantized(many);
  check(calls.size() == 4, "75 weights in three launches, 24 other tensors in one");
  uint32_t tiles = 0;
  for (size_t c = 1; c < calls.size(); ++c) tiles += grids[c];
  uint32_t want = 0;
  for (const auto& m : many) want += m.quantized ? static_cast<uint32_t>(m.batch * ((m.rows + 127) / 128)) : 0;
  check(tiles == want, "every tile once");
  run_quantized({weight(0, 4, 4), weight(4, 0, 4), weight(4, 4, 0)});
  check(calls.empty(), "empty weights");
}

void long_lists() {
  std::vector<AdamwTensor> many;
  for (int i = 0; i < 130; ++i) many.push_back(small(i % 3 ? 2048 * i + 1 : 0));
  run(many, 7);
  check(calls.size() == 2, "empty tensors take no place: 86 tensors in two launches");
  size_t at = 0;
  int64_t index = 7;
  for (size_t c = 0; c < calls.size(); ++c) {
    const auto params = params_of<AdamwParams>(calls[c]);
    check(params.table.chunks() == grids[c], "a block for each chunk");
    uint32_t chunk = 0;
    for (int i = 0; i < params.table.count; ++i, ++at) {
      while (many[at].count == 0) ++at;
      const AdamwEntry& e = params.table.entries[i];
      check(e.count == many[at].count && e.first_index == index, "the tensors in their order");
      index += e.count;
      for (uint32_t k = 0; k < (e.count + 2047) / 2048; ++k, ++chunk) {
        const auto place = params.table.find(chunk);
        check(place.entry == i && place.chunk == k, "every chunk finds its tensor");
      }
    }
    check(chunk == params.table.chunks(), "no chunk without a tensor");
  }
  // More blocks than a grid may have go to several launches.
  run({small(int64_t{1} << 41), small(int64_t{1} << 41), small(4)});
  check(grids.size() == 2 && grids[0] == 1u << 30 && grids[1] == (1u << 30) + 1, "grids stay below 2^31 blocks");
  run({});
  run({small(0)});
  check(calls.empty(), "nothing to do, nothing launched");
}

}  // namespace

int main() {
  far_elements();
  far_weights();
  long_lists();
  const auto with = [](auto change) {
    return [=] {
      AdamwTensor t = small(4);
      change(t);
      run({small(4), t});
    };
  };
  refuses("params: must have fewer than 2^31 chunks", with([](auto& t) { t.count = int64_t{1} << 43; }));
  refuses("params: must not have a negative number of elements", with([](auto& t) { t.count = -1; }));
  refuses("params: must not be null unless it is empty", with([](auto& t) { t.param = nullptr; }));
  refuses("grads: must be aligned to its elements", with([](auto& t) { t.grad = reinterpret_cast<char*>(room) + 2; }));
  refuses("exp_avg: must be fp32 or bf16; got fp64", with([](auto& t) { t.exp_avg_type = Type::fp64; }));
  refuses("exp_avg_sq: must be aligned", with([](auto& t) { t.exp_avg_sq = reinterpret_cast<char*>(room) + 1; }));
  const auto with_copies = [](auto change) {
    return [=] {
      AdamwTensor t = weight(1, 4, 4);
      change(t);
      run_quantized({small(4), t});
    };
  };
  refuses("params: must have fewer than 2^31 rows", with_copies([](auto& t) { t.rows = int64_t{1} << 31; }));
  refuses("params: must have fewer than 2^31 columns", with_copies([](auto& t) { t.columns = int64_t{1} << 31; }));
  refuses("params: must have fewer than 2^31 tiles", with_copies([](auto& t) { t.batch = int64_t{1} << 31; }));
  refuses("params: must have batch * rows * columns elements", with_copies([](auto& t) { t.rows = 5; }));
  refuses("params: must have batch * rows * columns elements", with_copies([](auto& t) { t.rows = 0; }));
  refuses("params: must not have a negative size", with_copies([](auto& t) { t.rows = -4; }));
  refuses("q: must not be null", with_copies([](auto& t) { t.q = nullptr; }));
  refuses("scale: must be aligned", with_copies([](auto& t) { t.scale = nullptr; }));
  refuses("scale_t: must be null exactly when q_t is", with_copies([](auto& t) { t.q_t = nullptr; }));
  if (failures == 0) std::printf("all limits hold\n");
  return failures != 0;
}

// The host side of the MoE kernels: each broken rule is refused with its sentence before anything is launched, and
// empty inputs are legal. Then element offsets past 2^32: launches are caught, and one thread of the last block runs on
// reserved memory of which nearly nothing exists; it has to write the last rows.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "../../../csrc/moe/moe.h"

namespace {

struct Launch {
  emulator::LaunchShape shape;
  emulator::ThreadBody body;
  std::vector<char> storage;   // the arguments, aligned to 128 inside
};
std::vector<Launch> launches;
emulator::Identity thread;
alignas(1024) uint8_t smem[48 << 10];

}  // namespace

namespace emulator {
void launch(const LaunchShape& shape, ThreadBody body, const void* arguments, size_t bytes) {
  Launch launch{shape, body, std::vector<char>(bytes + 128)};
  auto* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(launch.storage.data()) + 127) / 128 * 128);
  std::memcpy(at, arguments, bytes);
  launches.push_back(std::move(launch));
}
// A lone thread: collectives give back what it brings.
const Identity& identity() { return thread; }
uint8_t* dynamic_smem() { return smem; }
uint32_t shuffle(Shuffle, uint32_t value, uint32_t, uint32_t, uint32_t, Site) { return value; }
uint32_t vote(Vote, bool, uint32_t, Site) { std::abort(); }
uint32_t warp_reduce(Reduce, uint32_t value, bool, uint32_t, Site) { return value; }
void* map_shared(const void*, uint32_t, Site) { std::abort(); }
void cluster_arrive(bool, Site) { std::abort(); }
void cluster_wait(Site) { std::abort(); }
void barrier_sync(uint32_t, uint32_t, Site) {}
void syncwarp(uint32_t, Site) {}
void grid_dependency_wait(Site) {}
void grid_dependency_launch(Site) {}
void atomic(Reduce, Element, void* p, const void*, void*, Order, Scope, Site) { *static_cast<volatile uint32_t*>(p) = 1; }
}  // namespace emulator

using namespace moe;

namespace {

int failures = 0;
alignas(16) unsigned char memory[1 << 16];
template <class T> T* at(size_t offset) { return reinterpret_cast<T*>(memory + offset); }

void fail(const char* name, const std::string& what) {
  std::printf("%s: %s\n", name, what.c_str());
  ++failures;
}

void refuses(const char* sentence, const std::function<void()>& call) {
  launches.clear();
  try {
    call();
    fail(sentence, "not refused");
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(sentence) == std::string::npos || !launches.empty()) fail(sentence, error.what());
  }
}

void launches_grids(const char* name, const std::vector<std::vector<unsigned>>& want, const std::function<void()>& call) {
  launches.clear();
  try {
    call();
  } catch (const std::exception& error) {
    return fail(name, error.what());
  }
  std::vector<std::vector<unsigned>> got;
  for (const Launch& l : launches) got.push_back({l.shape.grid.x, l.shape.block.x, l.shape.cluster});
  if (got == want) return;
  std::string text = "other launches than expected:";
  for (const auto& l : got) text += " " + std::to_string(l[0]) + "x" + std::to_string(l[1]) + "/" + std::to_string(l[2]);
  fail(name, text);
}

template <class A, class Change>
A with(A arguments, Change change) {
  change(arguments);
  return arguments;
}

RouteArguments router() {
  RouteArguments a;
  a.logits = {at<float>(0), 64, 1};
  a.bias = at<float>(4096);
  a.tokens = 9, a.experts = 64, a.top_k = 4, a.num_groups = 8, a.top_groups = 2;
  a.topk_idx = at<int64_t>(8192), a.topk_weight = at<float>(16384), a.scores = at<float>(20480), a.counts = at<int64_t>(28672);
  return a;
}
BalanceArguments balance() {
  BalanceArguments a;
  a.scores = {at<float>(0), 64, 1};
  a.topk_idx = {at<int64_t>(8192), 4, 1};
  a.cu_seqlens = at<int32_t>(12288);
  a.tokens = 9, a.experts = 64, a.top_k = 4, a.sequences = 2;
  a.loss = at<float>(16384), a.dscores = at<float>(20480), a.counts = at<uint32_t>(28672), a.token_loss = at<float>(32768);
  return a;
}
PermuteArguments permutation() {
  PermuteArguments a;
  a.x = {at<char>(0), 8, 1};
  a.topk_idx = {at<int64_t>(4096), 4, 1};
  a.tokens = 9, a.columns = 8, a.top_k = 4, a.experts = 6;
  a.x_perm = at<char>(8192), a.offsets = at<int32_t>(16384), a.source = at<int64_t>(20480), a.row_of_slot = at<int32_t>(24576);
  return a;
}
UnpermuteArguments back() {
  UnpermuteArguments a;
  a.y = {at<char>(0), 8, 1};
  a.source = at<int64_t>(8192);
  a.tokens = 9, a.columns = 8, a.top_k = 4;
  a.out = at<char>(16384), a.row_of_slot = at<int32_t>(24576);
  return a;
}
UnpermuteBackwardArguments gradient() {
  UnpermuteBackwardArguments a;
  a.dout = {at<char>(0), 8, 1}, a.y = {at<char>(4096), 8, 1};
  a.source = at<int64_t>(8192);
  a.weights = {at<float>(12288), 4, 1};
  a.tokens = 9, a.columns = 8, a.top_k = 4;
  a.dy = at<char>(16384), a.dweights = at<float>(20480), a.row_of_slot = at<int32_t>(24576);
  return a;
}

constexpr int64_t kBillions = int64_t{1} << 40;

void limits() {
  const auto r = [](auto change) { return [=] { route(with(router(), change), nullptr); }; };
  refuses("logits: must be in 1..512", r([](auto& a) { a.experts = 513; }));
  refuses("top_k: must be in 1..32", r([](auto& a) { a.top_k = 33; }));
  refuses("top_k: must not exceed the experts of top_groups groups", r([](auto& a) { a.top_k = 17; }));
  refuses("num_groups: must divide", r([](auto& a) { a.num_groups = 7; }));
  refuses("top_groups: must be in 1..8", r([](auto& a) { a.top_groups = 9; }));
  refuses("num_groups: must be in 1..32", r([](auto& a) { a.num_groups = 64, a.top_groups = 40; }));
  refuses("logits: must not be null", r([](auto& a) { a.logits.data = nullptr; }));
  refuses("logits: must not have a negative row stride", r([](auto& a) { a.logits.row_stride = -1; }));
  refuses("logits: must not have a negative number of rows", r([](auto& a) { a.tokens = -1; }));
  refuses("logits: must have fewer rows than a grid has warps", r([](auto& a) { a.tokens = kBillions; }));
  refuses("bias: must be aligned", r([](auto& a) { a.bias = reinterpret_cast<float*>(memory + 1); }));
  refuses("counts: must not be null", r([](auto& a) { a.counts = nullptr; }));
  launches_grids("route", {{1, 128, 1}, {3, 128, 1}}, r([](auto&) {}));
  launches_grids("route of nothing", {{1, 128, 1}}, r([](auto& a) { a.tokens = 0, a.logits.data = nullptr; }));

  const auto b = [](auto change) { return [=] { balance_loss(with(balance(), change), nullptr); }; };
  refuses("scores: must be in 1..512", b([](auto& a) { a.experts = 1000; }));
  refuses("topk_idx: must be in 1..64", b([](auto& a) { a.top_k = 65; }));
  refuses("cu_seqlens: must have at least one", b([](auto& a) { a.sequences = -1; }));
  refuses("cu_seqlens: must have fewer sequences", b([](auto& a) { a.sequences = kBillions; }));
  refuses("loss: must not be null", b([](auto& a) { a.loss = nullptr; }));
  launches_grids("balance_loss", {{2, 128, 1}, {3, 128, 1}, {3, 128, 1}, {1, 256, 1}}, b([](auto&) {}));
  launches_grids("balance_loss of nothing", {{1, 256, 1}}, b([](auto& a) { a.tokens = 0; }));

  const auto p = [](auto change) { return [=] { permute(with(permutation(), change), nullptr); }; };
  refuses("topk_idx: must have fewer than 2^31 elements", p([](auto& a) { a.tokens = int64_t{1} << 29; }));
  refuses("topk_idx: must have fewer than 2^31 elements", p([](auto& a) { a.top_k = INT64_MAX / 4; }));
  refuses("num_experts: must be in 1..4096", p([](auto& a) { a.experts = 4097; }));
  refuses("x: must have elements of 1, 2, 4 or 8 bytes", p([](auto& a) { a.element_bytes = 3; }));
  refuses("source: must not be null", p([](auto& a) { a.source = nullptr; }));
  refuses("scale_perm: must not be null", p([](auto& a) { a.scale = at<float>(30000), a.scale_stride = 12; }));
  refuses("warps: must be in 1..11", p([](auto& a) { a.experts = 4096, a.warps = 12; }));
  launches_grids("permute", {{1, 32, 1}, {9, 128, 1}}, p([](auto&) {}));
  launches_grids("permute of nothing", {{1, 32, 1}}, p([](auto& a) { a.tokens = 0; }));
  launches_grids("permute of the most rows", {{8, 1024, 8}, {(1u << 31) - 1, 128, 1}}, p([](auto& a) {
                   a.tokens = (int64_t{1} << 31) - 1, a.top_k = 1, a.x.row_stride = 0;
                 }));
  launches_grids("permute among 4096 experts", {{8, 352, 8}, {16384, 128, 1}}, p([](auto& a) {
                   a.experts = 4096, a.tokens = 16384;
                 }));

  const auto u = [](auto change) { return [=] { unpermute(with(back(), change), nullptr); }; };
  refuses("top_k: must be at least 1", u([](auto& a) { a.top_k = 0; }));
  refuses("num_tokens: must not be negative", u([](auto& a) { a.tokens = -1; }));
  refuses("out: must be aligned", u([](auto& a) { a.out = memory + 1; }));
  launches_grids("unpermute", {{1, 256, 1}, {9, 128, 1}}, u([](auto&) {}));
  launches_grids("unpermute of nothing", {}, u([](auto& a) { a.tokens = 0; }));
  launches_grids("unpermute of no columns", {}, u([](auto& a) { a.columns = 0; }));

  const auto g = [](auto change) { return [=] { unpermute_backward(with(gradient(), change), nullptr); }; };
  refuses("top_k: must be in 1..1024", g([](auto& a) { a.top_k = 1025; }));
  refuses("y: must not be null", g([](auto& a) { a.y.data = nullptr; }));
  refuses("dweights: must not be null", g([](auto& a) { a.dweights = nullptr; }));
  launches_grids("unpermute_backward", {{1, 256, 1}, {9, 128, 1}}, g([](auto&) {}));
  launches_grids("... without weights", {{1, 256, 1}, {9, 128, 1}}, g([](auto& a) { a.weights = {}, a.y = {}; }));

  UpdateBiasArguments bias;
  bias.bias = at<float>(0), bias.experts = 256;
  refuses("counts: must not be null", [=] { update_bias(bias, nullptr); });
  launches_grids("no experts", {}, [] { update_bias({}, nullptr); });
}

// ---- offsets past 2^32 ----------------------------------------------------------------------------------------------

template <class T>
T* reserve(int64_t elements) {
  void* p = mmap(nullptr, static_cast<size_t>(elements) * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::printf("no address space for %lld bytes\n", static_cast<long long>(elements * sizeof(T)));
    std::exit(1);
  }
  return static_cast<T*>(p);
}

// The first thread of the last block of the last launch.
void run_last() {
  const Launch& l = launches.back();
  thread = {};
  thread.block = {l.shape.grid.x - 1, l.shape.grid.y - 1, 0};
  thread.block_dim = l.shape.block;
  thread.grid_dim = l.shape.grid;
  l.body(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(l.storage.data()) + 127) / 128 * 128));
}

void expect(const char* name, bool holds) {
  if (!holds) fail(name, "the last row is not where it belongs");
}

void offsets() {
  constexpr int64_t kTokens = (int64_t{1} << 20) + 1, kColumns = 16384, kTopK = 2, kRows = kTokens * kTopK;   // 2^32 vectors
  auto* rows = reserve<int32_t>(kRows);
  rows[kRows - 2] = 5, rows[kRows - 1] = static_cast<int32_t>(kRows - 1);
  auto* source = reserve<int64_t>(kRows);
  auto* large = reserve<uint16_t>(kRows * kColumns);
  auto* small = reserve<uint16_t>(kTokens * kColumns);
  auto* weights = reserve<float>(kRows);
  weights[kRows - 1] = 2.0f;
  const int64_t last = (kRows - 1) * kColumns;
  small[(kTokens - 1) * kColumns] = 0x3f80;   // 1

  PermuteArguments p = permutation();
  p.x = {small, kColumns, 1};
  p.tokens = kTokens, p.columns = kColumns, p.top_k = kTopK;
  p.topk_idx = {reserve<int64_t>(kRows), kTopK, 1};
  p.x_perm = large, p.source = source, p.row_of_slot = rows;
  permute(p, nullptr);
  run_last();
  expect("permute", large[last] == 0x3f80 && large[5 * kColumns] == 0x3f80);

  UnpermuteArguments u = back();
  u.y = {large, kColumns, 1}, u.source = source, u.weights = {weights, kTopK, 1};
  u.tokens = kTokens, u.columns = kColumns, u.top_k = kTopK, u.out = small, u.row_of_slot = rows;
  large[5 * kColumns] = 0;
  unpermute(u, nullptr);
  run_last();
  expect("unpermute", small[(kTokens - 1) * kColumns] == 0x4000);   // 2

  UnpermuteBackwardArguments g = gradient();
  auto* gradients = reserve<uint16_t>(kRows * kColumns);
  auto* dweights = reserve<float>(kRows);
  g.dout = {small, kColumns, 1}, g.y = u.y, g.source = source, g.weights = u.weights;
  g.tokens = kTokens, g.columns = kColumns, g.top_k = kTopK, g.dy = gradients, g.dweights = dweights, g.row_of_slot = rows;
  unpermute_backward(g, nullptr);
  run_last();
  expect("unpermute_backward", gradients[last] == 0x4080);   // 4; the rest needs its warps

  constexpr int64_t kMany = (int64_t{1} << 24) + 1, kExperts = 512;   // 2^33 scores
  auto* scores = reserve<float>(kMany * kExperts);
  auto* logits = reserve<float>(kMany * kExperts);
  auto* chosen = reserve<int64_t>(kMany);
  RouteArguments r = router();
  r.logits = {logits, kExperts, 1}, r.bias = logits;
  r.tokens = kMany, r.experts = kExperts, r.top_k = 1, r.num_groups = r.top_groups = 1, r.normalize = false;
  r.topk_idx = chosen, r.topk_weight = reserve<float>(kMany), r.scores = scores;
  r.counts = reserve<int64_t>(kExperts);
  logits[(kMany - 1) * kExperts + 1] = 100.0f;
  route(r, nullptr);
  run_last();
  expect("route", scores[(kMany - 1) * kExperts + 1] == 1.0f && chosen[kMany - 1] == 1);

  RouteBackwardArguments rb;
  auto* dlogits = logits;
  rb.dweight = {r.topk_weight, 1, 1}, rb.dscores = {reserve<float>(1 << 20), 0, 1}, rb.scores = {scores, kExperts, 1};
  rb.topk_idx = {chosen, 1, 1};
  rb.tokens = kMany, rb.experts = kExperts, rb.top_k = 1, rb.dlogits = dlogits;
  route_backward(rb, nullptr);
  run_last();
  expect("route_backward", dlogits[(kMany - 1) * kExperts + 1] == 0.0f);

  BalanceArguments b = balance();
  b.scores = {scores, kExperts, 1}, b.topk_idx = {chosen, 1, 1};
  b.tokens = kMany, b.experts = kExperts, b.top_k = 1, b.sequences = (int64_t{1} << 23) + 1;   // counts past 2^32 too
  auto* borders = reserve<int32_t>(b.sequences + 1);
  // Only what the search for the last token reads is filled in: the last sequence begins two tokens before the end.
  for (int64_t low = 0, high = b.sequences + 1; low < high;) {
    const int64_t middle = (low + high) / 2;
    borders[middle] = middle < b.sequences ? static_cast<int32_t>(kMany - 3) : static_cast<int32_t>(kMany);
    (borders[middle] <= kMany - 1 ? low : high) = middle + (borders[middle] <= kMany - 1);
  }
  b.cu_seqlens = borders;
  b.counts = reserve<uint32_t>(b.sequences * kExperts + 1);
  b.counts[b.sequences * kExperts] = 1;
  b.counts[(b.sequences - 1) * kExperts + 1] = 3;
  b.dscores = reserve<float>(kMany * kExperts), b.token_loss = reserve<float>(kMany);
  b.alpha = 1;
  balance_loss(b, nullptr);
  launches.pop_back();   // the sum over tokens would read them all
  run_last();
  expect("balance_loss", b.dscores[(kMany - 1) * kExperts] != 0.0f && b.token_loss[kMany - 1] != 0.0f);
}

}  // namespace

int main() {
  limits();
  offsets();
  if (failures == 0) std::printf("all limits hold\n");
  return failures != 0;
}

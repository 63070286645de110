// Elements past 2^32 of the kernels that only barriers hold together: single blocks run on address space that is reserved
// and not filled. Threads run one after the other, the whole block twice, so that shared memory is complete in the end.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../csrc/quantize/dequantize.cu"
#include "../../../csrc/quantize/unpack_e5m6.cu"

static emulator::Identity self;
alignas(1024) static uint8_t shared_memory[48 << 10];
static std::vector<char> last_call;

namespace emulator {
void launch(const LaunchShape&, ThreadBody, const void* call, size_t size) {
  last_call.assign(static_cast<const char*>(call), static_cast<const char*>(call) + size);
}
const Identity& identity() { return self; }
uint8_t* dynamic_smem() { return shared_memory; }
void syncwarp(uint32_t, Site) {}
void barrier_sync(uint32_t, uint32_t, Site) {}
void grid_dependency_wait(Site) {}
void grid_dependency_launch(Site) {}
}  // namespace emulator

using namespace quantize;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  ++failures;
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

template <class Params, class Kernel>
void run_block(Kernel kernel, int64_t block, unsigned threads) {
  Params p;
  std::memcpy(&p, last_call.data() + sizeof(void*), sizeof(p));
  self.block.x = static_cast<unsigned>(block);
  for (int pass = 0; pass < 2; ++pass)
    for (self.thread.x = 0; self.thread.x < threads; ++self.thread.x) kernel(p);
}

constexpr int64_t kRowsOfAll = (int64_t{1} << 25) + 3, kColumnsOfAll = 160;   // 5.4e9 elements

}  // namespace

int main() {
  auto* codes = reserve<uint8_t>((int64_t{1} << 24) * 480);   // of E5M6 below, more than of e4m3
  auto* values = reserve<float>(kRowsOfAll * kColumnsOfAll);
  auto* scale = reserve<float>(2 * (kRowsOfAll + 1));
  const int64_t rows[] = {0, (int64_t{1} << 24) + 1, kRowsOfAll - 1};
  const int64_t column = 140, tile = 1;

  DequantizeArguments a;
  a.q = codes, a.scale = scale, a.out = values;
  a.rows = kRowsOfAll, a.columns = kColumnsOfAll;
  a.scale_stride = kRowsOfAll + 1;
  dequantize_1x128(a, nullptr);
  for (const int64_t row : rows) {
    codes[row * kColumnsOfAll + column] = 0x38;   // 1
    scale[tile * a.scale_stride + row] = 3.0f;
    run_block<DequantizeParams>(dequantize_rows_kernel<float, true>, row / 32 * 2 + tile, 256);
    check(values[row * kColumnsOfAll + column] == 3.0f, "a far value of 1 x 128");
  }
  dequantize_128x128(a, nullptr);
  for (const int64_t row : rows) {
    scale[row / 128 * 2 + tile] = 5.0f;
    run_block<DequantizeParams>(dequantize_rows_kernel<float, true>, row / 32 * 2 + tile, 256);
    check(values[row * kColumnsOfAll + column] == 5.0f, "a far value of 128 x 128");
  }
  // The same bytes as [160 channels, tokens]: the far channel of the far token.
  const int64_t padded = kRowsOfAll / 128 * 128;
  a.rows = padded - 5;
  a.scale_stride = kColumnsOfAll;
  dequantize_128x1(a, padded, nullptr);
  const int64_t token = padded - 6;
  codes[column * padded + token] = 0xB8;          // -1
  scale[token / 128 * kColumnsOfAll + column] = 7.0f;
  run_block<DequantizeParams>(dequantize_columns_kernel<float, true>, token / 128 * 2 + tile, 256);
  check(values[token * kColumnsOfAll + column] == -7.0f, "a far value of 128 x 1");

  UnpackArguments u;
  u.packed = codes, u.scale = scale, u.out = values;
  u.rows = int64_t{1} << 24, u.columns = 320;
  u.scale_tile_stride = u.rows;
  u.out_type = Type::fp32;
  unpack_e5m6(u, nullptr);
  const int64_t last = u.rows - 1, at = 319;
  codes[last * packed_bytes(320) + 479 - 3] = 0xC0;   // the last word is 0x..3C0: code 0x3C0 of value 1
  codes[last * packed_bytes(320) + 479 - 2] = 0x03;
  scale[2 * u.scale_tile_stride + last] = 11.0f;
  run_block<UnpackParams>(unpack_e5m6_kernel<float, true>, last / 64 * 3 + 2, 256);
  check(values[last * 320 + at] == 11.0f, "a far value of E5M6");

  if (failures == 0) std::printf("all far elements are where they should be\n");
  return failures != 0;
}

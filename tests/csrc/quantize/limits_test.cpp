// Limits of the quantisers on the host: each broken rule is refused with its sentence before anything is launched, and
// empty inputs are legal. Launches are counted, not run: what the kernels ask of the emulator only has to link.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "../../../csrc/quantize/quantize.h"

static int launches = 0;
static std::vector<unsigned> grids;

namespace emulator {
void launch(const LaunchShape& shape, ThreadBody, const void*, size_t) {
  ++launches;
  grids.push_back(shape.grid.x);
}
const Identity& identity() { std::abort(); }
uint8_t* dynamic_smem() { std::abort(); }
uint32_t shuffle(Shuffle, uint32_t, uint32_t, uint32_t, uint32_t, Site) { std::abort(); }
uint32_t warp_reduce(Reduce, uint32_t, bool, uint32_t, Site) { std::abort(); }
void barrier_sync(uint32_t, uint32_t, Site) { std::abort(); }
void syncwarp(uint32_t, Site) { std::abort(); }
void grid_dependency_wait(Site) { std::abort(); }
void grid_dependency_launch(Site) { std::abort(); }
}  // namespace emulator

using namespace quantize;

namespace {

alignas(16) unsigned char memory[1 << 16];
void* at(size_t offset) { return memory + offset; }
float* floats(size_t offset) { return reinterpret_cast<float*>(at(offset)); }
int32_t* ints(size_t offset) { return reinterpret_cast<int32_t*>(at(offset)); }
Matrix matrix(Type type, int64_t rows, int64_t columns) { return {at(0), type, rows, columns, columns, 1}; }

int failures = 0;

void refuses(const char* sentence, const std::function<void()>& call) {
  launches = 0;
  try {
    call();
    std::printf("not refused: %s\n", sentence);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    if (what.find(sentence) != std::string::npos && launches == 0) return;
    std::printf("wanted: %s\ngot:    %s (%d launches)\n", sentence, what.c_str(), launches);
  }
  ++failures;
}

void launches_blocks(const char* name, std::vector<unsigned> want, const std::function<void()>& call) {
  grids.clear();
  try {
    call();
  } catch (const std::exception& error) {
    std::printf("%s: refused: %s\n", name, error.what());
    ++failures;
    return;
  }
  if (grids == want) return;
  std::printf("%s: other grids than expected:", name);
  for (unsigned blocks : grids) std::printf(" %u", blocks);
  std::printf("\n");
  ++failures;
}

RowsArguments rows() {
  RowsArguments a;
  a.x = matrix(Type::bf16, 130, 64);
  a.q = at(32768);
  a.scale = floats(49152);
  return a;
}
ColumnsArguments columns() {
  ColumnsArguments a;
  a.x = matrix(Type::bf16, 130, 64);
  a.padded_rows = 256;
  a.q_t = at(20480);
  a.scale_t = floats(40960);
  return a;
}
BlocksArguments blocks() {
  BlocksArguments a;
  a.w = matrix(Type::bf16, 130, 64);
  a.q = at(20480);
  a.scale = floats(40960);
  return a;
}
TransposeArguments transpose() {
  TransposeArguments a;
  a.q = matrix(Type::e4m3, 130, 64);
  a.scale = floats(40960);
  a.q_t = at(20480);
  a.scale_t = floats(45056);
  return a;
}

PackArguments pack() {
  PackArguments a;
  a.x = matrix(Type::bf16, 130, 64);
  a.packed = at(20480);
  a.scale = floats(40960);
  return a;
}
UnpackArguments unpack() {
  UnpackArguments a;
  a.packed = at(0);
  a.scale = floats(40960);
  a.rows = 130, a.columns = 64;
  a.out = at(20480);
  return a;
}
DequantizeArguments values() {
  DequantizeArguments a;
  a.q = at(0);
  a.scale = floats(60000);
  a.rows = 130, a.columns = 64;
  a.scale_stride = 132;
  a.out = at(20480);
  return a;
}

template <class A, class Change>
A with(A arguments, Change change) {
  change(arguments);
  return arguments;
}

}  // namespace

int main() {
  const auto row = [](auto change) { return [=] { quantize_1x128(with(rows(), change), nullptr); }; };
  refuses("x: must not have a negative number of rows", row([](auto& a) { a.x.rows = -1; }));
  refuses("x: must not have a negative number of columns", row([](auto& a) { a.x.columns = -1; }));
  refuses("x: must be bf16 or fp32", row([](auto& a) { a.x.type = Type::e4m3; }));
  refuses("x: must not be null unless it is empty", row([](auto& a) { a.x.data = nullptr; }));
  refuses("x: must be aligned to its elements", row([](auto& a) { a.x.data = at(1); }));
  refuses("x: must not have a negative row stride", row([](auto& a) { a.x.row_stride = -64; }));
  refuses("x: must not have a negative column stride", row([](auto& a) { a.x.column_stride = -1; }));
  refuses("q: must not be null unless it is empty", row([](auto& a) { a.q = nullptr; }));
  refuses("scale: must not be null unless it is empty", row([](auto& a) { a.scale = nullptr; }));
  refuses("scale: must be aligned to its elements", row([](auto& a) { a.scale = reinterpret_cast<float*>(at(49154)); }));
  refuses("q: must not overlap the input", row([](auto& a) { a.q = at(1024); }));
  refuses("x: must have fewer than 2^31 tiles", row([](auto& a) {
            a.x.rows = int64_t{1} << 40;
            a.x.row_stride = 0;
            a.q = at(32768);
          }));
  launches_blocks("no rows", {}, row([](auto& a) { a.x.rows = 0, a.x.data = nullptr; }));
  launches_blocks("no columns", {}, row([](auto& a) { a.x.columns = 0; }));
  launches_blocks("130 rows of 64", {3}, row([](auto&) {}));

  const auto column = [](auto change) { return [=] { quantize_128x1(with(columns(), change), nullptr); }; };
  refuses("padded_rows: must be a multiple of 128", column([](auto& a) { a.padded_rows = 130; }));
  refuses("padded_rows: must be the rows of x padded to 128", column([](auto& a) { a.padded_rows = 384; }));
  refuses("groups: must be in 0..2^31-256", column([](auto& a) { a.groups = -1; }));
  refuses("padded_offsets: must not be null when there are offsets", column([](auto& a) { a.offsets = ints(60000); }));
  refuses("scale: must be null exactly when q is", column([](auto& a) { a.q = at(50000); }));
  refuses("q_t: must start at a multiple of 16 bytes", column([](auto& a) { a.q_t = at(20488); }));
  refuses("q_t: must not overlap the input", column([](auto& a) { a.q_t = at(16); }));
  refuses("scale_t: must not be null", column([](auto& a) { a.scale_t = nullptr; }));
  refuses("x_scale: must be given exactly when x is e4m3", column([](auto& a) { a.x.type = Type::e4m3; }));
  refuses("q: must be null for e4m3 and e5m6 input", column([](auto& a) {
            a.x.type = Type::e4m3;
            a.q = at(50000);
            a.scale = floats(60000);
          }));
  refuses("x_scale_stride: must be at least the rows of x", column([](auto& a) {
            a.x = matrix(Type::e4m3, 130, 144);
            a.x_scale = floats(50000);
            a.x_scale_stride = 129;
          }));
  launches_blocks("columns", {2}, column([](auto&) {}));
  const auto grouped = [&](int64_t groups, int64_t padded, bool with_rows) {
    return column([=](auto& a) {
      a.offsets = ints(60000);
      a.padded_offsets = ints(61000);
      a.groups = groups;
      a.padded_rows = padded;
      if (with_rows) a.q = at(45056), a.scale = floats(58000);
    });
  };
  launches_blocks("groups", {1, 3}, grouped(3, 384, false));
  launches_blocks("groups with rows", {1, 3 + 2}, grouped(3, 384, true));
  launches_blocks("no groups", {1}, grouped(0, 0, false));
  launches_blocks("no groups with rows", {1, 1 + 2}, grouped(0, 0, true));

  const auto block = [](auto change) { return [=] { quantize_128x128(with(blocks(), change), nullptr); }; };
  refuses("w: must be bf16 or fp32", block([](auto& a) { a.w.type = Type::e4m3; }));
  refuses("w: must not have a negative number of matrices", block([](auto& a) { a.batch = -1; }));
  refuses("w: must not have a negative stride between matrices", block([](auto& a) { a.batch_stride = -1; }));
  refuses("scale_t: must be null exactly when q_t is", block([](auto& a) { a.q_t = at(50000); }));
  refuses("w: must have fewer than 2^31 tiles", block([](auto& a) { a.batch = int64_t{1} << 31; }));
  launches_blocks("blocks", {2}, block([](auto&) {}));
  launches_blocks("no blocks", {}, block([](auto& a) { a.batch = 0, a.w.data = nullptr; }));

  const auto turn = [](auto change) { return [=] { transpose_128x128(with(transpose(), change), nullptr); }; };
  refuses("q: must be e4m3", turn([](auto& a) { a.q.type = Type::bf16; }));
  refuses("scale: must not be null", turn([](auto& a) { a.scale = nullptr; }));
  refuses("q_t: must not overlap the input", turn([](auto& a) { a.q_t = at(100); }));
  launches_blocks("transpose", {2}, turn([](auto&) {}));

  const auto packing = [](auto change) { return [=] { pack_e5m6(with(pack(), change), nullptr); }; };
  refuses("x: must be bf16 or fp32", packing([](auto& a) { a.x.type = Type::e4m3; }));
  refuses("packed: must be aligned to its elements", packing([](auto& a) { a.packed = at(20482); }));
  refuses("packed: must not overlap the input", packing([](auto& a) { a.packed = at(4096); }));
  refuses("scale: must not be null", packing([](auto& a) { a.scale = nullptr; }));
  refuses("x: must have fewer than 2^31 rows", packing([](auto& a) { a.x.rows = int64_t{1} << 32, a.x.row_stride = 0, a.whole_rows = true; }));
  launches_blocks("packed tiles", {3}, packing([](auto&) {}));
  launches_blocks("packed rows", {130}, packing([](auto& a) { a.whole_rows = true; }));
  launches_blocks("rows without columns have scales", {130}, packing([](auto& a) { a.whole_rows = true, a.x.columns = 0; }));
  launches_blocks("tiles without columns", {}, packing([](auto& a) { a.x.columns = 0; }));

  const auto unpacking = [](auto change) { return [=] { unpack_e5m6(with(unpack(), change), nullptr); }; };
  refuses("packed: must start at a multiple of 4 bytes", unpacking([](auto& a) { a.packed = at(2); }));
  refuses("dtype: must be bf16 or fp32", unpacking([](auto& a) { a.out_type = Type::fp64; }));
  refuses("out: must be aligned to its elements", unpacking([](auto& a) { a.out = at(20481); }));
  refuses("packed: must have fewer than 2^31 tiles", unpacking([](auto& a) { a.rows = int64_t{1} << 40; }));
  launches_blocks("unpacked", {3}, unpacking([](auto&) {}));

  const auto rows_back = [](auto change) { return [=] { dequantize_1x128(with(values(), change), nullptr); }; };
  refuses("q: must not be null", rows_back([](auto& a) { a.q = nullptr; }));
  refuses("dtype: must be bf16, fp32 or fp64", rows_back([](auto& a) { a.out_type = Type::e4m3; }));
  refuses("q: must have fewer than 2^31 tiles", rows_back([](auto& a) { a.rows = int64_t{1} << 40; }));
  launches_blocks("values of rows", {5}, rows_back([](auto&) {}));
  const auto blocks_back = [](auto change) { return [=] { dequantize_128x128(with(values(), change), nullptr); }; };
  refuses("q: must have fewer than 2^31 tiles", blocks_back([](auto& a) { a.batch = int64_t{1} << 31; }));
  launches_blocks("values of blocks", {3 * 3}, blocks_back([](auto& a) { a.batch = 3, a.out_type = Type::bf16; }));
  const auto columns_back = [](int64_t padded) { return [=] { dequantize_128x1(values(), padded, nullptr); }; };
  refuses("q_t: must have a multiple of 128 columns that holds all tokens", columns_back(128));
  refuses("q_t: must have a multiple of 128 columns that holds all tokens", columns_back(260));
  launches_blocks("values of columns", {2}, columns_back(384));

  const auto turned = [&](auto change) {
    return column([=](auto& a) {
      a.x = {at(0), Type::e5m6, 130, 64, 96, 1};
      a.x_scale = floats(50000), a.x_scale_stride = 132;
      change(a);
    });
  };
  refuses("x: must have packed rows at multiples of 4 bytes", turned([](auto& a) { a.x.data = at(2); }));
  refuses("q_t: must not overlap the input", turned([](auto& a) { a.q_t = at(130 * 96 - 16); }));
  launches_blocks("the turn", {2}, turned([](auto& a) { a.q_t = at(130 * 96); }));

  if (failures == 0) std::printf("all limits hold\n");
  return failures != 0;
}

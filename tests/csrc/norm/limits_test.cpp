// Limits of RMSNorm and of SwiGLU on the host: each broken rule is refused with its sentence before anything is launched,
// and empty inputs are legal. Launches are counted, not run: what the kernels ask of the emulator only has to link.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "../../../csrc/activation/activation.h"
#include "../../../csrc/norm/norm.h"

static std::vector<unsigned> grids;

namespace emulator {
void launch(const LaunchShape& shape, ThreadBody, const void*, size_t) { grids.push_back(shape.grid.x); }
const Identity& identity() { std::abort(); }
uint8_t* dynamic_smem() { std::abort(); }
uint32_t shuffle(Shuffle, uint32_t, uint32_t, uint32_t, uint32_t, Site) { std::abort(); }
uint32_t warp_reduce(Reduce, uint32_t, bool, uint32_t, Site) { std::abort(); }
void barrier_sync(uint32_t, uint32_t, Site) { std::abort(); }
void grid_dependency_wait(Site) { std::abort(); }
void grid_dependency_launch(Site) { std::abort(); }
void cp_async(void*, const void*, uint32_t, uint32_t, Site) { std::abort(); }
void cp_async_commit(Site) { std::abort(); }
void cp_async_wait(uint32_t, Site) { std::abort(); }
}  // namespace emulator

namespace {

using quantize::Matrix;
using quantize::Type;

alignas(16) unsigned char memory[1 << 20];
template <class T = float>
T* at(size_t offset) { return reinterpret_cast<T*>(memory + offset); }
Matrix matrix(size_t offset, Type type, int64_t rows, int64_t columns) { return {at<void>(offset), type, rows, columns, columns, 1}; }

int failures = 0;

void refuses(const char* sentence, const std::function<void()>& call) {
  grids.clear();
  try {
    call();
    std::printf("not refused: %s\n", sentence);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    if (what.find(sentence) != std::string::npos && grids.empty()) return;
    std::printf("wanted: %s\ngot:    %s (%zu launches)\n", sentence, what.c_str(), grids.size());
  }
  ++failures;
}

void launches(const char* name, std::vector<unsigned> want, const std::function<void()>& call) {
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

template <class A>
auto changed(A arguments, void (*run)(const A&, hopper::Stream)) {
  return [=](auto change) {
    return [=] {
      A a = arguments;
      change(a);
      run(a, nullptr);
    };
  };
}

norms::RmsNormArguments norm() {
  norms::RmsNormArguments a;
  a.x = matrix(0, Type::bf16, 10, 1024);
  a.weight = {at<void>(1 << 16), Type::fp32, 1};
  a.y = at<void>(2 << 16);
  a.rstd = at(3 << 16);
  return a;
}
norms::RmsNormBackwardArguments norm_backward() {
  norms::RmsNormBackwardArguments a;
  a.x = a.dy = matrix(0, Type::bf16, 20, 1024);
  a.weight = {at<void>(1 << 16), Type::bf16, 1};
  a.rstd = at(2 << 16);
  a.dx = at<void>(3 << 16);
  a.dweight = at<void>(4 << 16);
  a.workspace = at<double>(5 << 16);
  a.parts = 2;
  return a;
}
activation::SwigluArguments swiglu() {
  activation::SwigluArguments a;
  a.gate_up = matrix(0, Type::bf16, 70, 512);
  a.y = at<void>(2 << 16);
  return a;
}
activation::SwigluBackwardArguments swiglu_backward() {
  activation::SwigluBackwardArguments a;
  a.gate_up = matrix(0, Type::bf16, 70, 512);
  a.dy = matrix(2 << 16, Type::bf16, 70, 256);
  a.dgate_up = at<void>(3 << 16);
  return a;
}
activation::SwigluBackwardQuantizeArguments casts() {
  activation::SwigluBackwardQuantizeArguments a;
  a.gate_up = matrix(0, Type::bf16, 130, 512);
  a.dy = matrix(3 << 16, Type::bf16, 130, 256);
  a.padded_rows = 256;
  a.q = at<void>(5 << 16), a.scale = at(7 << 16);
  a.q_t = at<void>(8 << 16), a.scale_t = at(10 << 16);
  a.act_t = at<void>(11 << 16), a.act_scale_t = at(13 << 16);
  return a;
}

}  // namespace

int main() {
  const auto n = changed(norm(), norms::rms_norm);
  refuses("x: must be bf16 or fp32", n([](auto& a) { a.x.type = Type::e4m3; }));
  refuses("x: must not be null unless it is empty", n([](auto& a) { a.x.data = nullptr; }));
  refuses("x: must have at least one column", n([](auto& a) { a.x.columns = 0; }));
  refuses("x: must have at most 2^24 columns", n([](auto& a) { a.x.columns = (1 << 24) + 1; }));
  refuses("x: must have fewer than 2^31 tiles", n([](auto& a) { a.x.rows = int64_t{1} << 40, a.x.row_stride = 0; }));
  refuses("residual: must have x's type and shape", n([](auto& a) { a.residual = matrix(9 << 16, Type::fp32, 10, 1024); }));
  refuses("new_residual: must not be null", n([](auto& a) { a.residual = matrix(9 << 16, Type::bf16, 10, 1024); }));
  refuses("weight: must be bf16 or fp32", n([](auto& a) { a.weight.type = Type::e4m3; }));
  refuses("weight: must be aligned to its elements", n([](auto& a) { a.weight.data = at<void>(65538); }));
  refuses("weight: must not have a negative stride", n([](auto& a) { a.weight.stride = -1; }));
  refuses("eps: must not be negative", n([](auto& a) { a.eps = -1e-6; }));
  refuses("y: must not overlap the input", n([](auto& a) { a.y = at<void>(1024); }));
  refuses("rstd: must not be null", n([](auto& a) { a.rstd = nullptr; }));
  refuses("scale: must be null exactly when q is", n([](auto& a) { a.q = at<void>(8 << 16); }));
  launches("10 rows of 1024, two teams of two warps", {2}, n([](auto&) {}));
  launches("10 rows of 256, four teams of one warp", {1}, n([](auto& a) { a.x.columns = 256; }));
  launches("no rows", {}, n([](auto& a) { a.x.rows = 0, a.x.data = nullptr; }));
  launches("524288 rows of 7168: offsets past 2^31", {131072}, n([](auto& a) {
             a.x = {reinterpret_cast<void*>(int64_t{1} << 40), Type::bf16, 524288, 7168, 7168, 1};
           }));

  const auto b = changed(norm_backward(), norms::rms_norm_backward);
  refuses("dy: must have x's type and shape", b([](auto& a) { a.dy.rows = 19; }));
  refuses("dresidual: must have x's type and shape", b([](auto& a) { a.dresidual = matrix(0, Type::bf16, 20, 512); }));
  refuses("dweight: must not be null", b([](auto& a) { a.dweight = nullptr; }));
  refuses("parts: must be positive", b([](auto& a) { a.parts = 0; }));
  refuses("workspace: must be aligned to its elements", b([](auto& a) { a.workspace = at<double>((5 << 16) + 4); }));
  refuses("rstd: must not be null", b([](auto& a) { a.rstd = nullptr; }));
  refuses("dx: must not overlap the input", b([](auto& a) { a.dx = at<void>(128); }));
  launches("two parts for 20 rows, then 1024 columns", {2, 32}, b([](auto&) {}));
  launches("more parts than groups of 8 rows", {3, 32}, b([](auto& a) { a.parts = 100; }));
  launches("no rows: zeros", {32}, b([](auto& a) { a.x.rows = a.dy.rows = 0, a.parts = 0; }));

  const auto s = changed(swiglu(), activation::swiglu);
  refuses("gate_up: must have an even number of columns", s([](auto& a) { a.gate_up.columns = 511; }));
  refuses("gate_up: must be bf16 or fp32", s([](auto& a) { a.gate_up.type = Type::e4m3; }));
  refuses("weight: must not have a negative stride", s([](auto& a) { a.weight.stride = -1; }));
  refuses("y: must not be null", s([](auto& a) { a.y = nullptr; }));
  refuses("y: must not overlap the input", s([](auto& a) { a.y = at<void>(64); }));
  launches("70 rows, I = 256", {4}, s([](auto&) {}));
  launches("no columns", {}, s([](auto& a) { a.gate_up.columns = 0; }));

  const auto sb = changed(swiglu_backward(), activation::swiglu_backward);
  refuses("dy: must have the shape of one half of gate_up", sb([](auto& a) { a.dy.columns = 512; }));
  refuses("dy: must have gate_up's type", sb([](auto& a) { a.dy.type = Type::fp32; }));
  refuses("dweight: must be null exactly when weight is", sb([](auto& a) { a.weight.data = at(9 << 16); }));
  refuses("dgate_up: must not overlap the input", sb([](auto& a) { a.dgate_up = a.gate_up.data ? at<void>(0) : nullptr; }));
  launches("70 rows, four teams a block", {5}, sb([](auto&) {}));

  const auto c = changed(casts(), activation::swiglu_backward_quantize);
  refuses("gate_up: must have 2 I columns, I a multiple of 128", c([](auto& a) { a.gate_up.columns = 384, a.dy.columns = 192; }));
  refuses("dy: must be bf16", c([](auto& a) { a.dy.type = Type::fp32; }));
  refuses("gate_up: must be bf16 or e4m3", c([](auto& a) { a.gate_up.type = Type::fp32; }));
  refuses("gate_up: must have rows at multiples of 16 bytes", c([](auto& a) { a.gate_up.row_stride = 513; }));
  refuses("dy: must start at a multiple of 16 bytes", c([](auto& a) { a.dy.data = at<void>((3 << 16) + 8); }));
  refuses("dy: must have stride 1 along its columns", c([](auto& a) { a.dy.column_stride = 2; }));
  refuses("gate_up_scale: must be given exactly when gate_up is e4m3", c([](auto& a) { a.gate_up_scale = at(14 << 16); }));
  refuses("gate_up_scale_stride: must be at least the rows", c([](auto& a) {
            a.gate_up.type = Type::e4m3, a.gate_up_scale = at(14 << 16), a.gate_up_scale_stride = 129;
          }));
  refuses("padded_rows: must be a multiple of 128", c([](auto& a) { a.padded_rows = 200; }));
  refuses("padded_rows: must be the rows of gate_up padded to 128", c([](auto& a) { a.padded_rows = 384; }));
  refuses("padded_offsets: must not be null", c([](auto& a) { a.offsets = at<int32_t>(14 << 16); }));
  refuses("workspace: must not be null", c([](auto& a) { a.weight.data = at(14 << 16), a.dweight = at(15 << 16); }));
  refuses("q_t: must start at a multiple of 16 bytes", c([](auto& a) { a.q_t = at<void>((8 << 16) + 4); }));
  refuses("q: must not overlap the input", c([](auto& a) { a.q = at<void>(3 << 16); }));
  launches("two tiles by two", {4}, c([](auto&) {}));
  launches("with weights", {4, 1}, c([](auto& a) {
             a.weight.data = at(14 << 16), a.dweight = at(15 << 16), a.workspace = at<double>(15 << 16);
           }));
  launches("groups, and two tiles for the rest", {1, (3 + 2) * 2}, c([](auto& a) {
             a.offsets = at<int32_t>(14 << 16), a.padded_offsets = at<int32_t>(15 << 16), a.groups = 3, a.padded_rows = 384;
           }));
  launches("no rows", {}, c([](auto& a) { a.gate_up.rows = a.dy.rows = a.padded_rows = 0; }));

  if (failures == 0) std::printf("all limits hold\n");
  return failures != 0;
}

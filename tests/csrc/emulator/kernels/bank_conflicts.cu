// Layouts in shared memory whose bank conflicts are known by hand: Options::banks has to find exactly those.
#include "cases.h"

using namespace planted;

namespace {

struct alignas(16) Words { uint32_t w[4]; };   // g++ reads them one by one

HOPPER_KERNEL(64) fill_and_read(int bytes, int stride, uint32_t lanes, float* out) {
  auto* s = reinterpret_cast<uint8_t*>(dynamic_smem());
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x; i < 8192; i += 64) reinterpret_cast<volatile float*>(s)[i] = 1.0f;
  block_sync();
  const uint8_t* at = s + lane * stride;
  for (int turn = 0; turn < 3; ++turn) {
    if (lane >= lanes) continue;
    if (bytes == 1) out[threadIdx.x] += *reinterpret_cast<const volatile uint8_t*>(at);
    if (bytes == 4) out[threadIdx.x] += *reinterpret_cast<const volatile float*>(at);
    if (bytes == 8) out[threadIdx.x] += *reinterpret_cast<const volatile uint64_t*>(at) != 0;
    if (bytes == -16) {
      const Words x = *reinterpret_cast<const Words*>(at);
      out[threadIdx.x] += x.w[0] + x.w[1] + x.w[2] + x.w[3];
    }
    if (bytes == 16) out[threadIdx.x] += *reinterpret_cast<const volatile __int128*>(at) != 0;
  }
}

}  // namespace

// Two warps, three requests each: "place|what|requests|wavefronts|least|worst;" for every place.
extern "C" const char* planted_banks(int bytes, int stride, uint32_t lanes, int count, uint64_t seed) {
  static std::string text;
  Buffer<float> out(64, "out", true);
  emulator::Options o;
  o.seed = seed;
  o.check = true;
  o.banks = count != 0;
  emulator::options() = o;
  launch(shape(1, 64, 40960), fill_and_read, bytes, stride, lanes, out.data());
  text.clear();
  for (const emulator::BankSite& s : emulator::last_bank_sites())
    text += s.site + "|" + s.what + "|" + std::to_string(s.requests) + "|" + std::to_string(s.wavefronts) + "|" +
            std::to_string(s.least) + "|" + std::to_string(s.worst) + ";";
  return text.c_str();
}

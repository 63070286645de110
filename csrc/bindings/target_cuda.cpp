// Calls on Hopper: the tensors' device for the time of the call, and torch's stream on it. There is no
// device code here: the host compiler builds it with the CUDA runtime's headers.
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "convert.h"
#include "target.h"

namespace bindings {
namespace {

constexpr int kMaxDevices = 64;

void check(cudaError_t status, const char* what) {
  if (status == cudaErrorInsufficientDriver) {
    int built = 0, driver = 0;
    cudaRuntimeGetVersion(&built);
    cudaDriverGetVersion(&driver);
    auto text = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    throw BackendError("the kernels were built with CUDA " + text(built) + ", the driver supports " + text(driver) +
                       ": update the driver, or reinstall with CUDACXX naming an nvcc of CUDA 12.9");
  }
  if (status != cudaSuccess) throw BackendError(std::string(what) + ": " + cudaGetErrorString(status));
}

// Kernels are sm_90a machine code and nothing else: they run on compute capability 9.0 only.
void check_architecture(int device) {
  static std::array<std::atomic<bool>, kMaxDevices> known{};
  if (device < kMaxDevices && known[device].load(std::memory_order_relaxed)) return;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability of the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability of the device");
  if (major != 9 || minor != 0)
    throw BackendError("kernels are for sm_90a (Hopper: H100, H200); cuda:" + std::to_string(device) + " is sm_" +
                       std::to_string(major) + std::to_string(minor) +
                       "; use deepseek_ops.backend(\"reference\"), or move the tensors to a Hopper device");
  if (device < kMaxDevices) known[device].store(true, std::memory_order_relaxed);
}

class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "current CUDA device");
    // Always: it also binds the device's primary context to a thread that has none yet (autograd's), and the driver's
    // cuTensorMapEncodeTiled needs one.
    check(cudaSetDevice(device), "selecting the tensors' device");
    if (previous_ == device) previous_ = -1;
  }
  ~DeviceScope() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace

void run_on_target(const KernelEntry& entry, const std::vector<Value>& values) {
  int device = kHost;
  each_tensor(entry.parameters, values, [&](const TensorView& t, const Parameter&) {
    require(t.device != kHost, t.name, "must be on a CUDA device", "cpu");
    device = t.device;
  });
  if (device == kHost) fail(entry.op.c_str(), "needs at least one tensor", "none");
  check_architecture(device);
  const DeviceScope scope(device);
  entry.run(current_stream(device), values.data());
}

const char* cuda_compiler() { return DEEPSEEK_OPS_NVCC_VERSION; }

void bind_target(pybind11::module_&, const std::string&) {}

}  // namespace bindings

// The part of DLPack 1.x that we read: a tensor's description, and the table of C functions that torch.Tensor carries
// as __dlpack_c_exchange_api__ (torch 2.11 and newer). Written after the published ABI, so that no header of torch is
// needed and one binary serves every torch.
#pragma once

#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device { int32_t type, id; };

struct DataType { uint8_t code, bits; uint16_t lanes; };

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t *shape, *strides;    // strides in elements
  uint64_t byte_offset;
};

struct Version { uint32_t major, minor; };

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_python;
  void* managed_to_python;
  int (*tensor_from_python)(void* object, Tensor* out);                       // a view; may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack

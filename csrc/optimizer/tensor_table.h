// A list of tensors as a kernel parameter: the work of all of them, cut into chunks that are numbered through.
//
// The table travels by value with the launch, so that nothing is copied, allocated or waited for. Kernel parameters are
// 4 KB (32 KB only with newer drivers): longer lists take several launches, as many tensors in each as a table holds.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TABLE_FUNCTION __host__ __device__ __forceinline__
#else
#define TABLE_FUNCTION inline
#endif

constexpr int kParameterBytes = 4096;

template <class Entry, int Capacity>
struct TensorTable {
  static constexpr int kCapacity = Capacity;

  Entry entries[Capacity];
  uint32_t past[Capacity];       // number of the first chunk that is not of entries 0 .. i
  int32_t count;                 // entries in use; none of them is empty

  TABLE_FUNCTION uint32_t chunks() const { return count == 0 ? 0 : past[count - 1]; }

  // The entry that a chunk belongs to, and the chunk's number within it.
  struct Place {
    int32_t entry;
    uint32_t chunk;
  };
  TABLE_FUNCTION Place find(uint32_t chunk) const {
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (past[middle] <= chunk) low = middle + 1;
      else high = middle;
    }
    return {low, chunk - (low == 0 ? 0 : past[low - 1])};
  }

  // False where the table is full: launch, clear, add again. Chunks of one launch must stay below 2^31.
  bool add(const Entry& entry, int64_t chunks_of_entry) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    if (count == Capacity || chunks_of_entry > kMost - chunks()) return false;
    const uint32_t before = chunks();
    entries[count] = entry;
    past[count] = before + static_cast<uint32_t>(chunks_of_entry);
    ++count;
    return true;
  }
};

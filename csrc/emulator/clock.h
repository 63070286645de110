// Vector clocks: who has seen what.
//
// An actor is a CUDA thread or an asynchronous operation's slot; actor times grow when the actor releases. A clock
// says, for each block, up to which time each of its actors has been observed. Every entry has two halves: `generic`
// (ordered before me) and `async` (ordered before me, and made visible to the async proxy by a proxy fence). Operations of the
// async proxy - TMA, bulk copies, wgmma - that meet a generic write need the second half (PTX ISA: "Async proxy",
// "fence.proxy.async").
//
// Clocks are immutable and shared: the threads behind a barrier hold the same one, so a barrier costs one join. A
// clock names only blocks that it has heard of, so the cost does not grow with the grid.
// A thread's own entry is kept aside, in the thread; it changes too often to live in a shared clock.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

inline constexpr uint32_t kAsyncSlots = 96;  // asynchronous operations of one block that can be told apart at a time

// Intrusive, single-threaded reference count.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* p) : p_(p) { if (p_) ++p_->references; }
  Ref(const Ref& o) : Ref(o.p_) {}
  Ref(Ref&& o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  Ref& operator=(Ref o) noexcept { std::swap(p_, o.p_); return *this; }
  ~Ref() { if (p_ && --p_->references == 0) delete p_; }
  T* get() const { return p_; }
  T* operator->() const { return p_; }
  T& operator*() const { return *p_; }
  explicit operator bool() const { return p_; }
  bool operator==(const Ref& o) const { return p_ == o.p_; }

 private:
  T* p_ = nullptr;
};

// The entries of one block: actors 0..threads-1 are its threads, the rest its asynchronous slots.
struct BlockClock {
  explicit BlockClock(uint32_t actors) : generic(actors), async(actors) {}
  std::vector<uint32_t> generic, async;
  uint32_t references = 0;
};

struct Clock {
  struct Part {
    uint32_t block;
    Ref<BlockClock> entries;
  };
  std::vector<Part> parts;            // sorted by block
  std::vector<uint32_t> finished;     // per rank: grids with a sequence number up to this are entirely before me
  uint32_t references = 0;

  const BlockClock* find(uint32_t block) const;
};

using ClockRef = Ref<Clock>;

// A moment of one actor: what shadow memory remembers of an access.
struct Epoch {
  uint32_t block = 0;   // unique block number of the world; 0 = nobody
  uint32_t actor = 0;
  uint32_t time = 0;
};

// What an actor takes with it when it releases: everything it has seen, and its own times.
struct Stamp {
  ClockRef seen;
  Epoch self;
  uint32_t async_time = 0;   // own writes up to this time are visible to the async proxy
};

// Collects the stamps of those who arrive at a barrier or release a flag, and makes the clock that others acquire.
class Release {
 public:
  void add(const Stamp&, uint32_t actors);
  // Only this moment (a TMA's bytes), nothing it has seen. `async`: and it is visible to the async proxy.
  void add_entry(const Epoch&, uint32_t actors, bool async = true);
  void add_clock(const ClockRef&);
  ClockRef take();                                 // and start anew
  bool empty() const { return !seen_ && own_.empty(); }

 private:
  struct Own { Epoch epoch; uint32_t async_time; uint32_t actors; };
  ClockRef seen_;
  std::vector<Own> own_;
};

ClockRef join(const ClockRef&, const ClockRef&);                               // memoised
ClockRef with_entry(const ClockRef&, const Epoch&, uint32_t actors, bool async);   // memoised
ClockRef with_async_visible(const ClockRef&);                                  // fence.proxy.async; memoised
ClockRef with_finished(const ClockRef&, uint32_t rank, uint32_t grid);
uint64_t take_clock_entries();   // how many entries these were given since the last call: their cost, before memos
void forget_clocks();                                                          // drop the memo at the end of a run

}  // namespace emulator

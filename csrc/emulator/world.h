// The state of one run: grids, blocks, warps, threads, their waits, and what asynchronous engines still have to do.
//
// One OS thread runs a whole world, so a run is reproducible from its seed. Every CUDA thread has its own fiber and is
// scheduled alone - stricter than hardware, where a warp often runs together - so that a missing __syncwarp shows.
// Threads switch only where they wait (and where they poll); values between those points are never torn: races are
// found by clocks, not by luck.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "options.h"
#include "twins.h"

namespace emulator {

inline constexpr size_t kWindowBytes = 512 << 10;       // address space of one block's shared memory
inline constexpr size_t kMaxWindows = 1024;
inline constexpr uint32_t kSmemStart = 1024;            // shared addresses below are the system's
inline constexpr uint32_t kMaxSmem = 232448 + kSmemStart;  // 227 KiB for a block of sm_90

struct Thread;
struct Warp;
struct Block;
struct Cluster;
struct Grid;
class World;

// ---- waits ------------------------------------------------------------------------------------------------------
enum class Wait : uint8_t {
  none, mbarrier, barrier, cluster, warp, wgmma, bulk, cp_async, registers, grid_dependency, polling
};

// ---- asynchronous engines ---------------------------------------------------------------------------------------
// Something that an engine does later: a TMA copy, the two halves of a store, a wgmma, the drain of a buffered store.
struct AsyncOperation {
  virtual ~AsyncOperation() = default;
  virtual void act() = 0;        // the next step
  bool finished = false;         // after the last step
  bool sources_read = false;     // stores: the shared-memory source may be reused
  bool queued = false;           // in World::pending
  // Accesses of an operation carry the epoch (slot, time) of its block; whoever has waited for it has seen it.
  Epoch epoch;
  Site site;
  const char* what = "";
};
using Operation = std::shared_ptr<AsyncOperation>;

// ---- wgmma ------------------------------------------------------------------------------------------------------
// The accumulators of a warpgroup while wgmmas own them. `values` is the 64 x n tile; the threads' registers hold NaN.
struct AccumulatorTile {
  uint32_t n = 0;
  std::vector<float> values;
  std::array<float*, 128> registers{};
  uint32_t pending = 0;                  // wgmmas of the tile that have been logged and not yet executed
  std::array<uint32_t, 128> uses{};      // per thread: wgmmas not yet waited for
};

struct WgmmaOperation;

struct Warpgroup {
  std::deque<std::shared_ptr<WgmmaOperation>> log;   // logged by at least one thread, not yet executed
  uint64_t first = 0;                                // sequence number of log.front()
  std::vector<std::shared_ptr<AccumulatorTile>> tiles;
};

// ---- threads ----------------------------------------------------------------------------------------------------
struct PlannedWgmma { uint64_t sequence; std::shared_ptr<AccumulatorTile> tile; Epoch epoch; };

struct Thread {
  Fiber fiber;
  Identity identity{};
  Warp* warp = nullptr;
  Block* block = nullptr;
  uint32_t actor = 0;                    // index in the block

  bool finished = false, ready = false;
  Wait wait = Wait::none;
  const void* wait_object = nullptr;
  uint64_t wait_detail = 0;
  Site wait_site;

  // What it has seen (clock.h); `time` grows at each release.
  ClockRef seen;
  uint32_t time = 1, async_time = 0;
  ClockRef fence_clock;                  // at the last fence: later relaxed stores release it
  Scope fence_scope = Scope::cta;
  std::vector<std::pair<ClockRef, Scope>> relaxed_loads;   // to be acquired by a fence of at least this scope

  uint32_t result = 0;                   // of the last warp collective
  uint32_t registers = 0;                // setmaxnreg
  Site registers_site;

  // wgmma: sequence numbers of the warpgroup's log that this thread has issued
  bool wgmma_fenced = false;
  std::vector<std::pair<uintptr_t, uint64_t>> wgmma_a;     // A in registers: four words from here, until that wgmma is waited for
  uint64_t wgmma_next = 0;
  std::vector<PlannedWgmma> wgmma_open;                    // issued, not committed
  std::deque<std::vector<PlannedWgmma>> wgmma_groups;      // committed, not waited for

  std::vector<Operation> bulk_open, cp_async_open;
  std::deque<std::vector<Operation>> bulk_groups, cp_async_groups;
  uint32_t bulk_groups_read = 0;         // of the oldest bulk_groups: those whose sources the thread knows to be read
  uint32_t stores_buffered = 0;

  uint64_t priority = 0;                 // pct
};

// Lanes that meet at a warp collective.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  Site site;
  std::array<uint32_t, 32> value{};
  std::array<uint32_t, 32> argument{};
  Release release;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0, lanes = 32, exited = 0;
  std::vector<Thread*> threads;
  std::vector<Rendezvous> meeting;
  Warpgroup* group = nullptr;
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  uint64_t generation = 0;
  Release release;
  ClockRef released;
  std::vector<Thread*> waiting;
  Site site;
  std::vector<uint32_t> members, first_members;   // warps of this generation; of the first one
  const char* first_file = "";
};

struct MbarrierState {
  uint32_t count = 0, pending = 0;
  int64_t tx = 0;
  uint64_t phase = 0;
  Release release;
  ClockRef released;
  std::vector<Thread*> waiting;
  Site init_site;
  Block* block = nullptr;
  bool initialised = false;
  Epoch init_epoch;
};

// What another block of the cluster last did to this one's shared memory; it must be before this block's end.
struct RemoteTouch {
  Epoch who;
  Site site;
  const char* what;
};

enum class Life : uint8_t { waiting, running, finished };

struct Block {
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  uint3 index{};
  uint32_t uid = 0, rank_in_cluster = 0, threads = 0, live = 0, actors = 0;
  Life life = Life::waiting;
  uint8_t* window = nullptr;             // shared address 0
  uint32_t window_slot = 0;
  uint32_t smem_end = 0;                 // first shared address past the block's memory
  std::vector<Thread*> thread;
  std::vector<std::unique_ptr<Warp>> warp;
  std::vector<std::unique_ptr<Warpgroup>> warpgroup;
  std::array<NamedBarrier, 16> barrier;
  std::unordered_map<uint32_t, MbarrierState> mbarriers;   // by shared address
  // asynchronous slots
  std::vector<uint32_t> slot_time;
  std::vector<uint8_t> slot_busy;
  std::vector<uint32_t> slot_issuer;
  uint32_t next_slot = 0;
  int64_t free_registers = 0;
  bool dependents_launched = false;
  std::unordered_map<uint64_t, RemoteTouch> remote_touches;   // by actor
  ClockRef seen_at_end;                                       // by its threads
  void touched(const Epoch& who, Site, const char* what);
};

struct Cluster {
  std::vector<Block*> block;
  uint32_t live = 0, arrived = 0, expected = 0;
  uint64_t generation = 0;
  Release release;
  ClockRef released;
  std::vector<Thread*> waiting;
  std::unordered_map<const Thread*, uint64_t> arrived_generation;
};

struct Grid {
  LaunchShape shape{};
  std::string name;
  ThreadBody body = nullptr;
  std::vector<uint8_t> arguments;
  uint8_t* aligned_arguments = nullptr;
  int rank = 0;
  uint32_t sequence = 0;                 // of its rank, from 1
  uint64_t next_block = 0, blocks = 0, finished_blocks = 0, launched_dependents = 0;
  bool finished() const { return finished_blocks == blocks; }
};

// ---- memory -----------------------------------------------------------------------------------------------------
struct Cell;

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool writable;
  int rank;
  Cell* shadow = nullptr;
  size_t shadow_bytes = 0;
};

// A global location used to synchronise: the release that its current value carries.
struct Flag {
  ClockRef clock;
  Scope scope = Scope::cta;
  int rank = 0;
  uint32_t block = 0, cluster = 0;
};

struct BlockInfo {                        // of every block there ever was, by uid
  int rank;
  uint32_t grid_sequence;
  uint3 index;
  uint32_t threads;
  std::string grid;
};

// A step that a mutation run may leave out.
struct DropPlace {
  uint64_t* count = nullptr;
  bool chosen = false;
};

class World {
 public:
  explicit World(int ranks);
  ~World();
  void queue(std::unique_ptr<Grid>);
  void run();

  Options options;
  Statistics statistics;
  int selected_rank = 0;
  bool collecting = false;
  bool checking = false;

  // scheduling
  Thread* current = nullptr;
  std::vector<Thread*> ready;
  std::vector<Operation> pending;
  uint64_t progress = 0, spins = 0;
  uint64_t random_state = 0;
  uint64_t random();
  uint32_t random(uint32_t below) { return static_cast<uint32_t>((random() >> 33) % below); }

  void make_ready(Thread*);
  void wait(Wait, const void* object, uint64_t detail, Site);   // the running thread stops until make_ready
  // It lets others run, and is asked again; what it looks at is for reports.
  void poll(Site, const void* looks_at = nullptr, uint32_t size = 0);
  void enqueue(Operation);                                      // an engine will act on it
  void finish_now(const Operation&);                            // act until finished
  [[noreturn]] void stop();                                     // from a thread: abandon the run

  // slots of asynchronous operations
  Epoch take_slot(Thread*);
  void release_slot(Block*, const Epoch&);
  void observe(Thread*, const Epoch&, bool async = true);       // the thread has waited for this moment
  Stamp stamp(Thread*);                                         // and its time moves on
  Stamp peek(const Thread*) const;
  void acquire(Thread*, const ClockRef&);

  // lookups
  Block* block_of(const void* smem) const;                      // null: not in a live window
  Block* ended_block_of(const void* smem) const;                // its window is still there
  uint32_t shared_offset(const void* smem) const;               // from its window
  Buffer* buffer_of(uintptr_t);
  Buffer* buffer_near(uintptr_t);                               // the nearest one within a few kilobytes
  bool rule(const char* name) const { return checking && !options.off.count(name); }

  // reports
  void hazard(const char* rule, const std::string& key, const std::string& text);
  bool fatal = false;
  std::vector<std::string> reports;
  std::set<std::string> seen_reports;

  std::vector<std::vector<std::unique_ptr<Grid>>> grids;        // by rank, in stream order
  std::vector<size_t> active;                                   // by rank: the first unfinished grid
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<BlockInfo> info;
  std::unordered_map<uintptr_t, Flag> flags;
  std::vector<size_t> free_stacks, free_windows;
  std::vector<Block*> window_owner = std::vector<Block*>(kMaxWindows);
  std::map<std::pair<std::string, std::string>, uint64_t> drops;
  std::unordered_map<uint64_t, DropPlace> drop_places;
  uint64_t steps = 0;
  uint64_t timer_reads = 0, leapt = 0;                          // nanoseconds that global_timer() is ahead of the steps
  uint32_t resident = 0;

 private:
  friend void thread_main();
  bool admit();
  bool may_start(int rank, size_t grid) const;
  void start_cluster(Grid&);
  void end_thread(Thread*);
  void end_block(Block*);
  Thread* pick();
  bool act_once();
  void run_all_pending();
  void run_all_pending_after_end();
  void mix(uint64_t);
  static constexpr uint32_t kWholeBlock = ~0u;
  uint32_t starved_block_ = 0, starved_warp_ = 0;
  uint64_t starve_until_ = 0, pct_change_ = 0;
};

World& world();                 // the running one
World* running();               // null outside of a run
inline Thread* me() { return world().current; }

// ---- shared helpers of the twins ----------------------------------------------------------------------------------
bool dropped_here(const char* kind, Site);
std::string where(const Thread*);                       // "block (1,0,0) warp 3 lane 7"
std::string where(const Epoch&);                        // an actor of the past, or an operation's slot
std::string place_of_block(const Block*);               // "(1,0,0)"
std::string at(Site);                                   // "fp8_gemm.cuh:67"
std::string place(const void*);                         // "shared memory +0x1c00", "buffer 'a' +0x40"
void report(const char* rule, Site, const std::string& text);   // text after "rank/block/warp at file:line"
std::string describe_waits();                           // who waits where

// mbarriers, used by the copy engines
MbarrierState* find_mbarrier(const void*, Site, const char* what);
void mbarrier_complete_tx(MbarrierState&, uint32_t bytes, const Epoch&, uint32_t actors);
void mbarrier_arrive_by_operation(MbarrierState&, const std::vector<Epoch>&, uint32_t actors);
uint64_t mbarrier_phase(const MbarrierState&);

// Reports lanes that still wait for this one.
void warp_lane_ends(Thread*);

// The cluster barrier waits for the threads that are left.
void cluster_thread_ends(Thread*);

// store buffers
void drain_before_release(Thread*);
void drain_for_read(Thread*, const void*, size_t);

// state of twins that must not outlive a run
void forget_buffered_stores();
void forget_moves();

uint8_t* window_region();

}  // namespace emulator

// How a world of emulated grids runs: what the scheduler does, what is checked, what a mutation run leaves out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// When asynchronous engines (TMA, bulk copies, wgmma, store buffers) act. Lazy finds most missing waits.
enum class Asynchrony : uint8_t { eager, random, lazy };

// Who runs next. `starve` holds back one warp or block at a time; `pct` gives warps random priorities with a few
// change points (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010).
enum class Schedule : uint8_t { fifo, random, starve, pct };

struct Options {
  uint64_t seed = 0;
  Asynchrony asynchrony = Asynchrony::random;
  Schedule schedule = Schedule::random;
  bool check = false;                // vector clocks, shadow memory, store buffers (target `checked`)
  uint32_t sm_count = 4;             // what sm_count() says to persistent kernels
  uint32_t resident_clusters = 4;    // clusters that run at the same time; the rest wait for a place
  bool banks = false;                // in checked runs: bank conflicts of plain accesses too (last_bank_sites)
  bool fast_tensor_core = false;     // plain fp32 instead of the bit-accurate model
  std::set<std::string> off;         // names of rules that are switched off (rules.h)
  std::string drop_kind;             // mutation: leave out this step ...
  std::string drop_site;             // ... at this "file:line" (empty: at every site) ...
  int64_t drop_nth = -1;             // ... only the n-th time (-1: always)
  uint32_t max_reports = 8;          // distinct hazards collected before the world stops
  uint64_t step_budget = 0;          // scheduler steps before the world is stopped as too slow; 0 = none
  double deadline_seconds = 300;     // wall clock of one run; a kernel that loops without a wrapper call is not stopped
};

// What one run did; for tests of determinism and of cost.
struct Statistics {
  uint64_t switches = 0, async_operations = 0, accesses = 0, wgmma = 0, bank_conflicts = 0;
  uint64_t clock_entries = 0;        // of the clocks that were joined, extended or fenced: what the checker's order costs
  uint64_t digest = 0;               // hash of every scheduling decision: equal seeds give equal digests
  double seconds = 0;
};

// A place that a mutation run may leave out, and how often it was passed.
struct DropSite {
  std::string kind, site;
  uint64_t count;
};

// A place in a kernel that reads or writes shared memory, and what its banks made of it: `least` wavefronts would have
// done, `worst` is the excess of one request. Plain accesses as the source makes them: nvcc may join neighbours.
struct BankSite {
  std::string site, what;
  uint64_t requests = 0, wavefronts = 0, least = 0, worst = 0;
};

// Thrown by launch() or run_world() with the whole report.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

Options& options();                                 // of this process; read at the start of a run
const Statistics& last_statistics();
std::vector<DropSite> last_drop_sites();
std::vector<BankSite> last_bank_sites();            // most conflicts first

// The memory that kernels may touch besides shared memory and their stacks: tensors of the next launches.
// In unchecked runs this only names buffers in reports. `rank` owns the memory (worlds of several ranks).
void register_buffer(const void* begin, size_t bytes, const char* name, bool writable, int rank = 0);
void clear_buffers();

// Worlds of several ranks: between begin_world and run_world, launches are queued on the selected rank instead of run.
void begin_world(int ranks);
void select_rank(int rank);
void run_world();
void abandon_world();

}  // namespace emulator

// Two ranks that fill each other's buffer, round after round: payload, a flag with the round's number, and credits back.
#include "cases.h"

using namespace planted;

namespace {

constexpr uint32_t kRounds = 4, kThreads = 96, kBlocks = 2;

struct Channel {           // in the memory of the receiver, except credit: in the memory of the sender
  uint32_t* payload;       // kThreads words a block
  uint32_t* flag;          // one a block
  uint32_t* credit;
};

HOPPER_KERNEL(kThreads) exchange(Channel send, Channel receive, uint32_t* sums, uint32_t rank, int bug) {
  const uint32_t t = threadIdx.x, block = blockIdx.x, warp = t / 32;
  uint32_t sum = 0;
  for (uint32_t round = 1; round <= kRounds; ++round) {
    // Send: wait until the receiver has taken the last round, write, announce.
    if (bug != 4) {
      if (t == 0)
        while (load<Order::acquire, Scope::sys>(send.credit + block) < round - 1) {
        }
      block_sync();
    }
    store<Order::relaxed, Scope::sys>(send.payload + block * kThreads + t, 1000 * rank + 100 * round + t);
    if (bug != 2) block_sync();
    if (t == 0) {
      const uint32_t value = bug == 5 ? round - 1 : round;
      if (bug == 1) {
        store<Order::relaxed, Scope::sys>(send.flag + block, value);
      } else if (bug == 6) {
        store<Order::release, Scope::gpu>(send.flag + block, value);   // the other rank is not on this GPU
      } else if (bug == 0 && round % 2) {
        fence<Scope::sys>();                                           // the other legal way to say it
        store<Order::relaxed, Scope::sys>(send.flag + block, value);
      } else {
        store<Order::release, Scope::sys>(send.flag + block, value);
      }
    }
    // Receive: one lane of every warp polls.
    if (t % 32 == 0) {
      if (bug == 7)
        while (load<Order::relaxed, Scope::sys>(receive.flag + block) < round) {
        }
      else if (bug == 8)
        while (load<Order::acquire, Scope::cta>(receive.flag + block) < round) {
        }
      else
        while (load<Order::acquire, Scope::sys>(receive.flag + block) < round) {
        }
    }
    if (bug != 3) syncwarp();
    sum += receive.payload[block * kThreads + (warp * 32 + 31 - t % 32)];
    block_sync();
    if (t == 0) store<Order::release, Scope::sys>(receive.credit + block, round);
  }
  sums[block * kThreads + t] = sum;
}

}  // namespace

// Bugs 1 to 5 are c1 to c5 of research/emulator.md; 6 to 8 are scopes and orders that are too weak.
CASE(communication, "race|data", "race|data", "race", "race|data|deadlock|livelock", "livelock|deadlock", "race|data", "race|data", "race|data") {
  struct Rank {
    Buffer<uint32_t> payload, flag, credit, sums;
    explicit Rank(int r)
        : payload(kBlocks * kThreads, "payload", true, r), flag(kBlocks, "flag", true, r), credit(kBlocks, "credit", true, r),
          sums(kBlocks * kThreads, "sums", true, r) {}
  } rank0(0), rank1(1);
  Rank* ranks[] = {&rank0, &rank1};
  emulator::begin_world(2);
  for (uint32_t r = 0; r < 2; ++r) {
    Rank &own = *ranks[r], &peer = *ranks[1 - r];
    emulator::select_rank(static_cast<int>(r));
    LaunchConfig c = shape(kBlocks, kThreads, 1024);
    c.name = "exchange";
    launch(c, exchange, Channel{peer.payload.data(), peer.flag.data(), own.credit.data()},
           Channel{own.payload.data(), own.flag.data(), peer.credit.data()}, own.sums.data(), r, bug);
  }
  emulator::run_world();
  for (uint32_t r = 0; r < 2; ++r)
    ranks[r]->sums.expect([&](size_t i) {
      const uint32_t t = i % kThreads;
      return kRounds * 1000 * (1 - r) + 100 * kRounds * (kRounds + 1) / 2 + kRounds * (t / 32 * 32 + 31 - t % 32);
    });
}

// Copy engines: TMA, bulk copies, cp.async. PTX ISA: "cp.async.bulk.tensor", "cp.async.bulk", "cp.reduce.async.bulk",
// "cp.async", and their commit and wait instructions.
//
// A load lands in one step and completes its bytes on a barrier. A store has two: it reads shared memory, and later it
// writes; bulk_wait_read waits for the first, bulk_wait for the second.
#include <algorithm>
#include <cstring>

#include "reduction.h"
#include "shadow.h"
#include "tensor_map.h"

namespace emulator {
namespace {

struct Copy : AsyncOperation {
  Block* block = nullptr;      // of the issuer
  Stamp stamp;                 // what the issuer had seen

  Access accessing(bool write) const {
    Access a;
    a.who = epoch;
    a.seen = stamp;
    a.write = write;
    a.kind = Kind::async;
    a.site = site;
    a.what = what;
    return a;
  }
  void wake(Wait kind) const {
    World& w = world();
    for (Thread* t : block->thread)
      if (t->wait == kind && !t->ready) w.make_ready(t);
  }
};

template <class T>
std::shared_ptr<T> begin(const char* what, Site site) {
  World& w = world();
  Thread* t = w.current;
  auto op = std::make_shared<T>();
  op->block = t->block;
  op->stamp = w.stamp(t);   // what the thread does from now on is not before the operation
  op->site = site;
  op->what = what;
  op->epoch = w.take_slot(t);
  return op;
}

void refuse(const char* rule, Site site, const std::string& why) {
  report(rule, site, why);
  world().stop();
}

// ---- loads ------------------------------------------------------------------------------------------------------

// Where a load lands: this CTA, or the CTAs of a multicast, each with its own barrier and the phase that it was in.
struct Landing {
  Block* block;
  uint32_t destination;
  MbarrierState* barrier;
  uint64_t phase;
};

std::vector<Landing> landings(void* dst, Mbarrier* barrier, uint16_t mask, Site site) {
  World& w = world();
  Block* own = w.current->block;
  std::vector<Landing> list;
  auto add = [&](Block* b, const void* d, const void* m) {
    MbarrierState* state = find_mbarrier(m, site, "copy");
    list.push_back({b, w.shared_offset(d), state, mbarrier_phase(*state)});
  };
  Block* at = w.block_of(dst);
  if (!at) refuse("tma.arguments", site, "copies to " + place(dst) + ", which is not shared memory of a running block");
  if (mask == 0) {
    add(at, dst, barrier);
    return list;
  }
  const auto& peers = own->cluster->block;
  if (mask >> peers.size()) refuse("tma.arguments", site, "multicast to CTAs past the cluster's " + std::to_string(peers.size()));
  for (size_t r = 0; r < peers.size(); ++r)
    if (mask >> r & 1) {
      if (peers[r]->life != Life::running) refuse("smem.dead_block", site, "multicasts to CTA " + std::to_string(r) + ", which has ended");
      add(peers[r], peers[r]->window + w.shared_offset(dst), peers[r]->window + w.shared_offset(barrier));
    }
  return list;
}

void land(const Copy& op, Landing& l, uint32_t bytes) {
  if (mbarrier_phase(*l.barrier) != l.phase) {
    World& w = world();
    w.hazard("mbarrier.phase", "phase" + at(op.site), where(op.epoch) + " at " + at(op.site) + ": " + op.what + " of " + std::to_string(bytes) +
             " bytes was issued in phase " + std::to_string(l.phase) + " of its mbarrier (init " + at(l.barrier->init_site) + ") and lands in phase " +
             std::to_string(mbarrier_phase(*l.barrier)) + ": the phase completed without it, expect_tx announced too few bytes or too few copies "
             "(PTX ISA: mbarrier, tx-count)");
  }
  mbarrier_complete_tx(*l.barrier, bytes, op.epoch, op.block->actors);
}

struct TensorLoad : Copy {
  DecodedMap map;
  int32_t coordinates[5]{};
  std::vector<Landing> to;

  void act() override {
    Access write = accessing(true), read = accessing(false);
    write.tiled = true;
    write.swizzle = map.swizzle;
    const bool check = world().checking;
    for (Landing& l : to) {
      bool first = &l == &to[0];
      for_each_piece(map, coordinates, l.destination, [&](uint32_t address, uint8_t* from, uint32_t bytes) {
        if (check && from && first) access(from, bytes, read);
        if (address < kSmemStart || address + bytes > l.block->smem_end) {
          world().hazard("smem.bounds", "tma" + at(site), where(epoch) + " at " + at(site) + ": " + what + " writes shared memory +" +
                         std::to_string(static_cast<int64_t>(address) - kSmemStart) + ", outside of the block's " +
                         std::to_string(l.block->smem_end - kSmemStart) + " bytes");
          return;
        }
        uint8_t* target = l.block->window + address;
        if (check) access(target, bytes, write);
        if (from)
          std::memcpy(target, from, bytes);
        else
          std::memcpy(target, map.fill, bytes);
      });
      land(*this, l, box_bytes(map));
    }
    finished = sources_read = true;
    world().release_slot(block, epoch);
  }
};

struct BulkLoad : Copy {
  const uint8_t* source = nullptr;
  uint32_t bytes = 0;
  std::vector<Landing> to;

  void act() override {
    access(source, bytes, accessing(false));
    for (Landing& l : to) {
      access(l.block->window + l.destination, bytes, accessing(true));
      if (l.destination >= kSmemStart && l.destination + bytes <= l.block->smem_end) std::memcpy(l.block->window + l.destination, source, bytes);
      land(*this, l, bytes);
    }
    finished = sources_read = true;
    world().release_slot(block, epoch);
  }
};

// ---- stores -----------------------------------------------------------------------------------------------------

struct Store : Copy {
  std::vector<uint8_t> data;
  bool reduces = false;
  Reduce op{};
  Element element{};
  Subnormals subnormals = kBulkSubnormals;

  virtual void read() = 0;
  virtual void write() = 0;

  void act() override {
    if (!sources_read) {
      read();
      sources_read = true;
    } else {
      epoch.time += 1;   // the moment that bulk_wait (not .read) has seen
      write();
      finished = true;
      epoch.time -= 1;
      world().release_slot(block, epoch);
    }
    wake(Wait::bulk);
  }
  void put(uint8_t* target, const uint8_t* from, uint32_t bytes) {
    Access a = accessing(true);
    if (reduces) a.kind = Kind::reduction;   // relaxed, of gpu scope: several may meet (PTX ISA: cp.reduce.async.bulk)
    access(target, bytes, a);
    if (reduces)
      reduce_elements(op, element, target, from, bytes, subnormals);
    else
      std::memcpy(target, from, bytes);
  }
};

struct TensorStore : Store {
  DecodedMap map;
  int32_t coordinates[5]{};
  uint32_t source = 0;

  void read() override {
    Access a = accessing(false);
    a.tiled = true;
    a.swizzle = map.swizzle;
    data.reserve(box_bytes(map));
    for_each_piece(map, coordinates, source, [&](uint32_t address, uint8_t* to, uint32_t bytes) {
      if (!to) return;
      if (address < kSmemStart || address + bytes > block->smem_end) {
        world().hazard("smem.bounds", "tma" + at(site), where(epoch) + " at " + at(site) + ": " + what + " reads outside of the block's shared memory");
        data.insert(data.end(), bytes, 0xFF);
        return;
      }
      access(block->window + address, bytes, a);
      data.insert(data.end(), block->window + address, block->window + address + bytes);
    });
  }
  void write() override {
    size_t done = 0;
    for_each_piece(map, coordinates, source, [&](uint32_t, uint8_t* to, uint32_t bytes) {
      if (!to) return;
      put(to, data.data() + done, bytes);
      done += bytes;
    });
  }
};

struct BulkStore : Store {
  const uint8_t* source = nullptr;
  uint8_t* target = nullptr;
  uint32_t bytes = 0;

  void read() override {
    access(source, bytes, accessing(false));
    data.assign(source, source + bytes);
  }
  void write() override { put(target, data.data(), bytes); }
};

void check_bulk(const void* shared, const void* global, uint32_t bytes, Site site, const char* what) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    refuse("bulk.arguments", site, std::string(what) + " of " + std::to_string(bytes) + " bytes between " + place(shared) + " and " + place(global) +
           ": size and addresses are multiples of 16");
}

template <class T>
std::shared_ptr<T> begin_tensor(const char* what, const TensorMap* map, const void* shared, const int32_t* coordinates, int rank, Site site) {
  DecodedMap decoded;
  const std::string wrong = decode(map, decoded);
  if (!wrong.empty()) refuse("tma.arguments", site, std::string(what) + ": " + wrong);
  const std::string misplaced = check_copy(decoded, rank, world().shared_offset(shared));
  if (!misplaced.empty()) refuse("tma.arguments", site, std::string(what) + " at " + place(shared) + ": " + misplaced);
  auto op = begin<T>(what, site);
  op->map = decoded;
  std::copy(coordinates, coordinates + rank, op->coordinates);
  return op;
}

void issue_store(const std::shared_ptr<Store>& op) {
  me()->bulk_open.push_back(op);
  world().enqueue(op);
}

}  // namespace

void tma_load(void* dst, const TensorMap* map, Mbarrier* barrier, const int32_t* coordinates, int rank, uint16_t cta_mask, Site site) {
  if (dropped_here("tma_load", site)) return;
  auto to = landings(dst, barrier, cta_mask, site);
  auto op = begin_tensor<TensorLoad>("TMA load", map, dst, coordinates, rank, site);
  op->to = std::move(to);
  world().enqueue(op);
}

void tma_store(const TensorMap* map, const void* src, const int32_t* coordinates, int rank, Site site) {
  if (dropped_here("tma_store", site)) return;
  shared_address(src, site);
  auto op = begin_tensor<TensorStore>("TMA store", map, src, coordinates, rank, site);
  op->source = world().shared_offset(src);
  issue_store(op);
}

void tma_reduce(Reduce reduce, const TensorMap* map, const void* src, const int32_t* coordinates, int rank, Site site) {
  shared_address(src, site);
  auto op = begin_tensor<TensorStore>("TMA reduction", map, src, coordinates, rank, site);
  const std::string wrong = tensor_reduce_legal(reduce, op->map.element);
  if (!wrong.empty()) refuse("tma.arguments", site, wrong);
  op->source = world().shared_offset(src);
  op->reduces = true;
  op->op = reduce;
  op->element = op->map.element;
  op->subnormals = kTensorSubnormals;
  issue_store(op);
}

void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier, uint16_t cta_mask, Site site) {
  if (dropped_here("bulk_load", site)) return;
  check_bulk(dst, src, bytes, site, "bulk load");
  auto to = landings(dst, barrier, cta_mask, site);
  auto op = begin<BulkLoad>("bulk load", site);
  op->source = static_cast<const uint8_t*>(src);
  op->bytes = bytes;
  op->to = std::move(to);
  world().enqueue(op);
}

void bulk_copy_cluster(void* dst, const void* src, uint32_t bytes, Mbarrier* remote, Site site) {
  check_bulk(dst, src, bytes, site, "cluster copy");
  auto to = landings(dst, remote, 0, site);
  auto op = begin<BulkLoad>("cluster copy", site);
  op->source = static_cast<const uint8_t*>(src);
  op->bytes = bytes;
  op->to = std::move(to);
  world().enqueue(op);
}

void bulk_store(void* dst, const void* src, uint32_t bytes, Site site) {
  if (dropped_here("bulk_store", site)) return;
  check_bulk(src, dst, bytes, site, "bulk store");
  shared_address(src, site);
  auto op = begin<BulkStore>("bulk store", site);
  op->source = static_cast<const uint8_t*>(src);
  op->target = static_cast<uint8_t*>(dst);
  op->bytes = bytes;
  issue_store(op);
}

void bulk_reduce(Reduce reduce, Element element, void* dst, const void* src, uint32_t bytes, Site site) {
  check_bulk(src, dst, bytes, site, "bulk reduction");
  const std::string wrong = bulk_reduce_legal(reduce, element);
  if (!wrong.empty()) refuse("bulk.arguments", site, wrong);
  shared_address(src, site);
  auto op = begin<BulkStore>("bulk reduction", site);
  op->source = static_cast<const uint8_t*>(src);
  op->target = static_cast<uint8_t*>(dst);
  op->bytes = bytes;
  op->reduces = true;
  op->op = reduce;
  op->element = element;
  issue_store(op);
}

void bulk_commit(Site site) {
  if (dropped_here("bulk_commit", site)) return;
  Thread* t = me();
  t->bulk_groups.push_back(std::move(t->bulk_open));
  t->bulk_open.clear();
}

void bulk_wait(uint32_t pending, bool read_only, Site site) {
  if (dropped_here(read_only ? "bulk_wait_read" : "bulk_wait", site)) return;
  World& w = world();
  Thread* t = w.current;
  const auto done = [&] {
    for (size_t i = 0; i + pending < t->bulk_groups.size(); ++i)
      for (const Operation& op : t->bulk_groups[i])
        if (!(read_only ? op->sources_read : op->finished)) return false;
    return true;
  };
  while (!done()) w.wait(Wait::bulk, t, pending, site);
  for (size_t i = 0; i + pending < t->bulk_groups.size(); ++i)
    for (const Operation& op : t->bulk_groups[i]) {
      Epoch e = op->epoch;
      if (!read_only) e.time += 1;
      w.observe(t, e);
    }
  if (t->bulk_groups.size() > pending) t->bulk_groups_read = std::max<uint32_t>(t->bulk_groups_read, t->bulk_groups.size() - pending);
  // A group whose sources are read still has writes in flight: a later bulk_wait must find it.
  if (!read_only)
    while (t->bulk_groups.size() > pending) {
      t->bulk_groups.pop_front();
      t->bulk_groups_read -= t->bulk_groups_read > 0;
    }
}

// ---- cp.async ---------------------------------------------------------------------------------------------------

namespace {

struct SmallCopy : Copy {
  uint8_t* target = nullptr;
  const uint8_t* source = nullptr;
  uint32_t bytes = 0, valid = 0;

  void act() override {
    Access read = accessing(false), write = accessing(true);
    read.kind = write.kind = Kind::generic;  // cp.async is not of the async proxy
    if (valid) access(source, valid, read);
    access(target, bytes, write);
    std::memcpy(target, source, valid);
    std::memset(target + valid, 0, bytes - valid);
    finished = sources_read = true;
    world().release_slot(block, epoch);
    wake(Wait::cp_async);
  }
};

// An arrival that comes when the thread's copies so far are done.
struct ArriveAfter : Copy {
  std::vector<Operation> copies;
  MbarrierState* barrier = nullptr;

  void act() override {
    std::vector<Epoch> moments;
    for (const Operation& c : copies) {
      world().finish_now(c);
      moments.push_back(c->epoch);
    }
    mbarrier_arrive_by_operation(*barrier, moments, block->actors);
    finished = sources_read = true;
    world().release_slot(block, epoch);
  }
};

}  // namespace

void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t valid, Site site) {
  if (dropped_here("cp_async", site)) return;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || valid > bytes || reinterpret_cast<uintptr_t>(dst) % bytes || reinterpret_cast<uintptr_t>(src) % bytes)
    refuse("cp_async.arguments", site, "cp.async of " + std::to_string(bytes) + " bytes (" + std::to_string(valid) + " valid) from " + place(src) + " to " +
           place(dst) + ": 4, 8 or 16, aligned to the size");
  shared_address(dst, site);
  auto op = begin<SmallCopy>("cp.async", site);
  op->target = static_cast<uint8_t*>(dst);
  op->source = static_cast<const uint8_t*>(src);
  op->bytes = bytes;
  op->valid = valid;
  me()->cp_async_open.push_back(op);
  world().enqueue(op);
}

void cp_async_commit(Site site) {
  if (dropped_here("cp_async_commit", site)) return;
  Thread* t = me();
  t->cp_async_groups.push_back(std::move(t->cp_async_open));
  t->cp_async_open.clear();
}

void cp_async_wait(uint32_t pending, Site site) {
  if (dropped_here("cp_async_wait", site)) return;
  World& w = world();
  Thread* t = w.current;
  const auto done = [&] {
    for (size_t i = 0; i + pending < t->cp_async_groups.size(); ++i)
      for (const Operation& op : t->cp_async_groups[i])
        if (!op->finished) return false;
    return true;
  };
  while (!done()) w.wait(Wait::cp_async, t, pending, site);
  while (t->cp_async_groups.size() > pending) {
    // Its writes are of the generic proxy: wgmma and TMA need a fence_proxy_async after this (PTX ISA: "Async proxy").
    for (const Operation& op : t->cp_async_groups.front()) w.observe(t, op->epoch, false);
    t->cp_async_groups.pop_front();
  }
}

void cp_async_mbarrier_arrive(Mbarrier* barrier, bool no_increment, Site site) {
  Thread* t = me();
  MbarrierState* m = find_mbarrier(barrier, site, "cp.async arrive");
  if (!no_increment) ++m->pending;
  auto op = begin<ArriveAfter>("cp.async arrive", site);
  for (const auto& group : t->cp_async_groups) op->copies.insert(op->copies.end(), group.begin(), group.end());
  op->copies.insert(op->copies.end(), t->cp_async_open.begin(), t->cp_async_open.end());
  op->barrier = m;
  world().enqueue(op);
}

}  // namespace emulator

// Fences. PTX ISA: "fence.proxy.async", "fence.mbarrier_init", "fence", "membar", "fence.proxy.tensormap".
#include "world.h"

namespace emulator {

void fence_mbarrier_init(Site site) {
  // Orders mbarrier.init before later operations of the cluster; the barrier that follows carries it. Dropping it can
  // only be seen on hardware: the emulator's initialisation takes effect at once.
  (void)dropped_here("fence_mbarrier_init", site);
}

void fence_proxy_async(Space, Site site) {
  if (dropped_here("fence_proxy_async", site)) return;
  World& w = world();
  Thread* t = w.current;
  if (!w.checking) return;
  t->seen = with_async_visible(t->seen);
  t->async_time = t->time++;  // own writes up to now; later ones are not covered
}

void fence(Order order, Scope scope, Site site) {
  if (dropped_here("fence", site)) return;
  World& w = world();
  Thread* t = w.current;
  if (order != Order::acq_rel && order != Order::release && order != Order::acquire)
    report("memory.order", site, "a fence is acq_rel (or sc)");
  drain_before_release(t);
  if (!w.checking) return;
  // Acquire: what relaxed loads have seen so far, where this fence's scope includes the one who released (PTX ISA:
  // "Morally strong operations").
  for (auto& [clock, needed] : t->relaxed_loads)
    if (scope >= needed) w.acquire(t, clock);
  t->relaxed_loads.clear();
  // Release: later relaxed stores carry this moment.
  Release r;
  r.add(w.stamp(t), t->block->actors);
  t->fence_clock = r.take();
  t->fence_scope = scope;
}

void fence_proxy_tensormap_acquire(const TensorMap*, Scope, Site) {}

}  // namespace emulator

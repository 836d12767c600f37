#include "bulk.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda/ptx/bulk.h"
#include "intrinsics.h"
#include "memory.h"

namespace lcore::emulator {
namespace {

void read_shared(BulkStore& store) {
  if (!store.content.empty()) return;
  store.content.assign(store.from, store.from + store.bytes);
  let_go(store.from, store.bytes);
}

void require_sixteens(const char* what, const void* to, const void* from, int bytes) {
  const auto odd = [](auto x) { return x % 16 != 0; };
  if (bytes > 0 && !odd(bytes) && !odd(reinterpret_cast<uintptr_t>(to)) && !odd(reinterpret_cast<uintptr_t>(from)))
    return;
  current()->fail(std::string(what) + ": both addresses and the " + std::to_string(bytes) +
                  " bytes must be multiples of 16");
}

}  // namespace

void issue(const char* what, BulkLoad load) {
  Block& b = *current();
  load.epoch = ++b.engine_epoch;
  require_fenced(what, load.barrier, sizeof(uint64_t));
  claim(what, load.to, load.bytes, load.epoch);
  b.loads.push_back(std::move(load));
}

void issue(const char* what, BulkStore store) {
  hold(what, store.from, store.bytes);
  current()->running().stores.open.push_back(std::move(store));
}

void fence_proxy_async() {
  Block& b = *current();
  Order& order = b.orders[b.warp()];
  order.fenced[b.warp()] = order.seen[b.warp()];
  ++order.seen[b.warp()];  // what the warp writes from now on is not fenced
}

bool end_one_load(Block& b) {
  const auto awaited = [&](const BulkLoad& load) {
    const auto found = b.mbarriers.find(reinterpret_cast<uintptr_t>(load.barrier));
    return found != b.mbarriers.end() && !found->second.waiting.empty();
  };
  const auto load = std::find_if(b.loads.begin(), b.loads.end(), awaited);
  if (load == b.loads.end()) return false;
  load->move();
  set_arrived(b, load->to, load->bytes);
  complete_bytes(b, load->barrier, static_cast<int>(load->bytes), load->epoch);
  b.loads.erase(load);
  return true;
}

void end_stores() {
  Block& b = *current();
  BulkStores& stores = b.running().stores;
  if (!stores.open.empty()) b.fail("returned before it committed its bulk stores");
  for (auto& group : stores.groups) {
    for (BulkStore& store : group) {
      if (store.content.empty()) b.fail("returned while its bulk stores still read shared memory");
      store.write(store.content.data());
    }
  }
}

std::string unended_loads(const Block& b) {
  if (b.loads.empty()) return {};
  return "the block returned while " + std::to_string(b.loads.size()) +
         " bulk loads into its shared memory were on their way";
}

}  // namespace lcore::emulator

namespace lcore::cuda {

using namespace emulator;

void fence_proxy_async() { emulator::fence_proxy_async(); }

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  require_sixteens("bulk_load", to, from, bytes);
  const auto size = static_cast<size_t>(bytes);
  access(from, size, Access::kRead, 16, nullptr);
  emulator::issue("bulk_load", BulkLoad{to, size, barrier, 0, [=] { std::memcpy(to, from, size); }});
}

void bulk_store(void* to, const void* from, int bytes) {
  require_sixteens("bulk_store", to, from, bytes);
  const auto size = static_cast<size_t>(bytes);
  access(to, size, Access::kWrite, 16, nullptr);
  emulator::issue("bulk_store", BulkStore{static_cast<const std::byte*>(from),
                                          size,
                                          [=](const std::byte* content) { std::memcpy(to, content, size); },
                                          {}});
}

void bulk_add(float* to, const float* from, int bytes) {
  require_sixteens("bulk_add", to, from, bytes);
  const auto size = static_cast<size_t>(bytes);
  access(to, size, Access::kWrite, 16, nullptr);
  const auto add = [=](const std::byte* content) {
    for (size_t i = 0; i < size / sizeof(float); ++i) {
      float x;
      std::memcpy(&x, content + i * sizeof x, sizeof x);
      atomicAdd(to + i, x);
    }
  };
  emulator::issue("bulk_add", BulkStore{reinterpret_cast<const std::byte*>(from), size, add, {}});
}

void bulk_commit() {
  BulkStores& stores = current()->running().stores;
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}

void bulk_wait(int pending, bool only_read) {
  auto& groups = current()->running().stores.groups;
  const auto kept = std::min(static_cast<size_t>(pending), groups.size());
  const auto end = groups.end() - static_cast<std::ptrdiff_t>(kept);
  for (auto group = groups.begin(); group != end; ++group) {
    for (BulkStore& store : *group) {
      read_shared(store);
      if (!only_read) store.write(store.content.data());
    }
  }
  if (!only_read) groups.erase(groups.begin(), end);
}

}  // namespace lcore::cuda

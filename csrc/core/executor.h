// How a kernel uses threads without knowing whose they are: the torch library runs items on torch's intra-op pool, a
// standalone benchmark on its own threads. Items are handed out in order, one at a time, so a kernel that lists its
// longest items first is balanced; which worker takes an item never changes a result.
#pragma once

#include <cstdint>

namespace lcore {

class Executor {
 public:
  virtual ~Executor() = default;

  // Workers that run() may use at once; sizes per-worker scratch.
  virtual int workers() const = 0;

  // Calls body(item, worker) once for each item in [0, items); returns when all are done. `grain` items are worth
  // waking a thread for; fewer run in the caller.
  template <class Body>
  void run(int64_t items, const Body& body, int64_t grain = 1) {
    const auto call = [](const void* context, int64_t item, int worker) {
      (*static_cast<const Body*>(context))(item, worker);
    };
    if (items <= grain || workers() == 1) {
      for (int64_t item = 0; item < items; ++item) call(&body, item, 0);
    } else {
      run_items(items, call, &body);
    }
  }

 protected:
  using Item = void (*)(const void* context, int64_t item, int worker);
  virtual void run_items(int64_t items, Item item, const void* context) = 0;
};

}  // namespace lcore

// wgmma: the lanes of a warp meet to ask for a product and to wait. Warps of a warpgroup need not meet, but must ask
// for the same products.
#include "cuda/ptx/wgmma.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "memory.h"
#include "products.h"
#include "warp.h"

namespace lcore::emulator {
namespace {

constexpr int kChunk = 16;

struct Request {  // of a lane; of `issued` all lanes have the same
  uint32_t* sum;
  const uint32_t* a;
  const Issued* issued;
};

[[noreturn]] void refuse(const std::string& why) { current()->fail("wgmma: " + why); }

Products& of_warp() { return current()->products[current()->warp()]; }
Warpgroup& of_warpgroup() { return current()->warpgroups[current()->warp() / kWarpgroup]; }

// f(memory) for each 16-byte chunk of shared memory that a warp's part of the product reads.
template <class F>
void for_chunks(const Issued& p, int warp, F&& f) {
  Block& b = *current();
  const auto visit = [&](uint64_t descriptor, cuda::Major major, int first, int count) {
    std::string wrong;
    const Operand operand = decode(descriptor, wrong);
    if (!wrong.empty()) refuse(wrong);
    if (major == cuda::Major::kK) {
      for (int i = 0; i < 2 * count; ++i) f(b.shared_at(operand.k_major(first + i / 2, i % 2)));
    } else {
      for (int i = 0; i < 2 * count; ++i) f(b.shared_at(operand.mn_major(first / 8 + i / 16, i % 16)));
    }
  };
  if (!p.a_in_registers) visit(p.a, p.a_major, 16 * warp, 16);
  visit(p.b, p.b_major, 0, p.n);
}

// The accumulator of the lanes' requests: one that is pending, or a new one that is poisoned from now on.
Accumulator* accumulator(const Lanes& lanes, int count) {
  auto& sums = of_warp().sums;
  const auto mine = lanes.get<Request>(0).sum;
  const auto found = std::find_if(sums.begin(), sums.end(), [&](auto& sum) { return sum.registers[0] == mine; });
  if (found != sums.end()) {
    if (found->count != count) refuse("an accumulator that is on its way is used with another size");
    return &*found;
  }
  Accumulator& sum = sums.emplace_back();
  sum.count = count;
  sum.pending = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum.registers[lane] = lanes.get<Request>(lane).sum;
    sum.values.insert(sum.values.end(), sum.registers[lane], sum.registers[lane] + count);
    std::fill_n(sum.registers[lane], count, kPoison);
  }
  return &sum;
}

void require_untouched(const Accumulator& sum) {
  for (const uint32_t* registers : sum.registers) {
    if (std::any_of(registers, registers + sum.count, [](uint32_t x) { return x != kPoison; })) {
      refuse("accumulators were written before the wait");
    }
  }
}

// The warpgroup's next product, which this warp asks for.
Product& next_product(const Issued& issued) {
  Warpgroup& group = of_warpgroup();
  const size_t number = of_warp().asked++;
  if (number == group.products.size()) {
    group.products.push_back(std::make_unique<Product>());
    group.products.back()->issued = issued;
  }
  Product& product = *group.products[number];
  if (product.issued != issued) refuse("warps of a warpgroup ask for different products");
  if (++product.asked == kWarpgroup) {
    for (Thread* thread : group.waiting) thread->state = State::kReady;
    group.waiting.clear();
  }
  return product;
}

void issue(const Lanes& lanes) {
  const int warp = current()->warp() % kWarpgroup;
  const Issued issued = *lanes.get<Request>(0).issued;
  for (int lane = 1; lane < kLanes; ++lane) {
    if (*lanes.get<Request>(lane).issued != issued) refuse("lanes of a warp ask for different products");
  }
  if (!of_warp().fenced) refuse("no wgmma_fence since the warp's last wait");
  Product& product = next_product(issued);
  for_chunks(issued, warp, [](const std::byte* chunk) { hold("wgmma", chunk, kChunk); });
  if (issued.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) std::copy_n(lanes.get<Request>(lane).a, 4, product.a[warp][lane]);
  }
  Accumulator* sum = product.sums[warp] = accumulator(lanes, issued.n / 2);
  require_untouched(*sum);
  ++sum->pending;
}

void compute(Product& product) {
  product.epoch = ++current()->tensor_epoch;
  for (int warp = 0; warp < kWarpgroup; ++warp) {
    multiply(*current(), product, warp);
    for_chunks(product.issued, warp, [&](const std::byte* chunk) { let_go_of_product(chunk, kChunk, product.epoch); });
  }
}

// The running warp sees its part.
void end(Product& product) {
  Accumulator& sum = *product.sums[current()->warp() % kWarpgroup];
  require_untouched(sum);
  if (product.epoch == 0) compute(product);
  uint32_t& seen = current()->orders[current()->warp()].seen[kTensor];
  seen = std::max(seen, product.epoch);
  if (--sum.pending > 0) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    std::copy_n(sum.values.data() + lane * sum.count, sum.count, sum.registers[lane]);
  }
  of_warp().sums.remove_if([&](const Accumulator& other) { return &other == &sum; });
}

// How many of the warp's products are over when at most `pending` groups are not.
size_t due(int pending) {
  const Products& products = of_warp();
  const auto count = products.groups.size();
  return count > static_cast<size_t>(pending) ? products.groups[count - 1 - static_cast<size_t>(pending)] : 0;
}

template <class In>
void together(const char* what, const In& in, Combine combine) {
  meet<char>(what, 0xffffffff, in, combine);
}

}  // namespace

void wgmma(uint32_t* sum, const uint32_t* a, const Issued& issued) {
  const Block& b = *current();
  const dim3 size = b.launch.block;
  if (static_cast<unsigned>(b.warp() / kWarpgroup + 1) * kWarpgroup * kLanes > size.x * size.y * size.z) {
    refuse("a warpgroup is four warps, and this block's last has fewer");
  }
  together("wgmma", Request{sum, a, &issued}, issue);
}

void end_products() {
  const Products& products = of_warp();
  if (products.asked != products.ended) refuse("the thread returned while products were on their way");
}

void set_registers(int count) {
  Block& b = *current();
  b.registers[b.warp()] = count;
  int sum = 0;
  for (const int registers : b.registers) sum += registers * kLanes;
  if (sum > 65536) {
    b.fail("setmaxnreg waits for ever: with " + std::to_string(count) + " the warps ask for " + std::to_string(sum) +
           " registers, and there are 65536");
  }
}

}  // namespace lcore::emulator

namespace lcore::cuda {

using namespace emulator;

void wgmma_fence() {
  together("wgmma.fence", '\0', [](const Lanes&) { of_warp().fenced = true; });
}

void wgmma_commit() {
  together("wgmma.commit_group", '\0', [](const Lanes&) {
    Products& products = of_warp();
    products.groups.push_back(products.asked);
  });
}

void wgmma_wait(int pending) {
  Block& b = *current();
  const auto& asked = of_warpgroup().products;
  for (size_t i = of_warp().ended; i < due(pending); ++i) {
    if (asked[i]->asked == kWarpgroup) continue;
    of_warpgroup().waiting.push_back(&b.running());
    b.wait({"wgmma.wait_group for warps of its warpgroup that have not asked for product %d", {static_cast<int>(i)}});
  }
  together("wgmma.wait_group", pending, [](const Lanes& lanes) {
    Products& products = of_warp();
    products.fenced = false;
    for (const size_t end_of = due(lanes.get<int>(0)); products.ended < end_of; ++products.ended) {
      end(*of_warpgroup().products[products.ended]);
    }
  });
}

}  // namespace lcore::cuda

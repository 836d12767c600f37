#include "block.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace lcore::emulator {
namespace {

thread_local Block* this_block = nullptr;

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Wait& wait) {
  char words[160];
  std::snprintf(words, sizeof words, wait.format, wait.numbers[0], wait.numbers[1], wait.numbers[2]);
  return words;
}

std::string kernel_name(const void* kernel) {
  Dl_info info{};
  if (!dladdr(kernel, &info) || !info.dli_sname) return "(no symbol)";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> plain(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), &std::free);
  return status == 0 ? plain.get() : info.dli_sname;
}

// __shared__ variables are thread_local: they are the thread's copy of this library's TLS segment.
int find_static(dl_phdr_info* module, size_t, void* data) {
  auto& block = *static_cast<Block*>(data);
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    const auto base = reinterpret_cast<uintptr_t>(module->dlpi_tls_data);
    const auto own = reinterpret_cast<uintptr_t>(&this_block);
    if (segment.p_type != PT_TLS || own < base || own >= base + segment.p_memsz) continue;
    block.static_low = base;
    block.static_bytes = segment.p_memsz;
    return 1;
  }
  return 0;
}

size_t static_limit() {
  size_t largest = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* data) {
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          if (module->dlpi_phdr[i].p_type == PT_TLS) {
            auto& most = *static_cast<size_t*>(data);
            most = std::max<size_t>(most, module->dlpi_phdr[i].p_memsz);
          }
        }
        return 0;
      },
      &largest);
  return largest;
}

}  // namespace

Block* current() { return this_block; }

Block::Block(const Launch& l)
    : launch(l),
      dynamic_shadow(l.shared_bytes),
      static_shadow(static_limit()),
      dynamic(static_cast<std::byte*>(std::aligned_alloc(1024, (l.shared_bytes + 1023) / 1024 * 1024 + 1024))),
      stacks_(static_cast<int>(l.block.x * l.block.y * l.block.z)),
      threads_(l.block.x * l.block.y * l.block.z) {
  dl_iterate_phdr(find_static, this);
}

Block::~Block() { std::free(dynamic); }

bool Block::run(uint3 which) {
  index = which;
  this_block = this;
  uint32_t first = std::max(engine_epoch, tensor_epoch);
  for (const Order& order : orders) first = std::max(first, *std::max_element(order.seen.begin(), order.seen.end()));
  engine_epoch = tensor_epoch = first++;
  for (int w = 0; w < kWarps; ++w) {
    orders[w].seen.fill(first - 1);
    orders[w].fenced.fill(first - 1);
    orders[w].seen[w] = first;
    products[w] = Products{};
    registers[w] = 0;
  }
  for (Warpgroup& group : warpgroups) group = Warpgroup{};
  dynamic_shadow.start_block(first);
  static_shadow.start_block(first);
  mbarriers.clear();
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  for (size_t i = 0; i < threads_.size(); ++i) {
    const auto id = static_cast<unsigned>(i);
    const uint3 at{id % launch.block.x, id / launch.block.x % launch.block.y, id / launch.block.x / launch.block.y};
    const int n = static_cast<int>(i);
    threads_[i] = Thread{at, n, State::kReady, stacks_.prepare(n, enter), stacks_.low(n), {}, 0, {}, {}, {}, {}, {}};
  }
  for (bool ran = true; ran;) {
    ran = false;
    for (Thread& thread : threads_) {
      if (thread.state != State::kReady) continue;
      ran = true;
      running_ = &thread;
      lcore_emulator_switch(&scheduler_, thread.stack);
      if (!error.empty()) {
        this_block = nullptr;
        return false;
      }
    }
    if (!ran || turned_) ran |= end_one_load(*this);
    turned_ = false;
  }
  error = stuck();
  if (error.empty()) error = unended_loads(*this);
  this_block = nullptr;
  return error.empty();
}

void Block::enter() {
  Block& block = *this_block;
  block.launch.invoke(block.launch.kernel, block.launch.params);
  end_stores();
  end_products();
  block.steps_ = 0;
  block.running_->state = State::kDone;
  void* unused = nullptr;
  lcore_emulator_switch(&unused, block.scheduler_);
  std::abort();  // nobody runs a thread that is done
}

void Block::wait(const Wait& what) {
  steps_ = 0;
  running_->state = State::kWaiting;
  running_->waits_for = what;
  lcore_emulator_switch(&running_->stack, scheduler_);
}

void Block::step() {
  if (++steps_ % kTurn != 0) return;
  if (steps_ >= kPatience) fail("runs for ever: 2^24 accesses of the block and no thread waited or returned");
  turned_ = true;
  lcore_emulator_switch(&running_->stack, scheduler_);
}

void Block::fail(const std::string& what) {
  error = who(*running_) + ": " + what;
  lcore_emulator_switch(&running_->stack, scheduler_);
  std::abort();
}

uint32_t Block::window(const void* memory) {
  const auto at = reinterpret_cast<uintptr_t>(memory);
  const auto offset = at - reinterpret_cast<uintptr_t>(dynamic);
  if (offset < launch.shared_bytes) return static_cast<uint32_t>(offset);
  const auto place = at - static_low + static_window();
  if (at - static_low < static_bytes && place < 1 << 18) return static_cast<uint32_t>(place);
  fail("a descriptor of what is not shared memory");
}

std::byte* Block::shared_at(uint32_t address) {
  if (address < launch.shared_bytes) return dynamic + address;
  return reinterpret_cast<std::byte*>(static_low + (address - static_window()));
}

std::string Block::who(const Thread& thread) const {
  return "kernel " + kernel_name(launch.kernel) + ", block " + text(index) + ", thread " + text(thread.index);
}

std::string Block::stuck() const {
  const auto waiting = [](const Thread& t) { return t.state == State::kWaiting; };
  const auto first = std::find_if(threads_.begin(), threads_.end(), waiting);
  if (first == threads_.end()) return {};
  std::string what = who(*first) + ": waits for ever at " + text(first->waits_for) + "; ";
  const auto other = std::find_if(threads_.begin(), threads_.end(), [&](const Thread& t) {
    return t.state == State::kDone || text(t.waits_for) != text(first->waits_for);
  });
  if (other == threads_.end()) return what + "all threads wait there";
  if (other->state == State::kDone) return what + "thread " + text(other->index) + " has returned";
  return what + "thread " + text(other->index) + " waits at " + text(other->waits_for);
}

}  // namespace lcore::emulator

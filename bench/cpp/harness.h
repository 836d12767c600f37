// What the standalone benchmarks share: the machine, its ceilings, and cases that Google Benchmark times and that leave
// rows of the same form as the Python benchmarks', in the same kind of file.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "flags.h"
#include "row.h"
#include "thread_pool.h"

namespace lcore::bench {

struct Peaks {
  double fma_gflops;
  double dot_bf16_gflops;  // 0: no such instructions
  double read_gbytes;

  bool uses_dot(const std::string& dtype) const { return dtype == "bf16" && dot_bf16_gflops > 0; }
  const char* ceiling(const std::string& dtype) const { return uses_dot(dtype) ? "dot_bf16" : "fma"; }
  double gflops(const std::string& dtype) const { return uses_dot(dtype) ? dot_bf16_gflops : fma_gflops; }
  Row row() const {
    return Row().set("fma_gflops", fma_gflops).set("dot_bf16_gflops", dot_bf16_gflops).set("read_gbytes", read_gbytes);
  }
};

inline constexpr int kPeakRepeats = 5;

inline Peaks measure_peaks(Executor& executor) {
  const cpu::KernelTable& kernels = cpu::kernels();
  return {.fma_gflops = kernels.peak_fma(executor, kPeakRepeats) / 1e9,
          .dot_bf16_gflops = kernels.peak_dot(executor, kPeakRepeats) / 1e9,
          .read_gbytes = kernels.peak_read(executor, kPeakRepeats) / 1e9};
}

inline std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(std::min(line.find(':') + 2, line.size()));
  }
  return "unknown";
}

inline Row machine(const std::string& commit, int threads) {
  char date[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  return Row()
      .set("date", date)
      .set("commit", commit)
      .set("processor", processor())
      .set("threads", threads)
      .set("cpu_isa", cpu::kernels().isa)
      .set("lcore", LCORE_VERSION)
      .set("torch", nullptr)
      .set("python", nullptr);
}

// One case: `prepare` makes the inputs, checks one result, and returns the call to time; `describe` makes the row from
// the median seconds of a call and may add counters to the table.
struct Case {
  std::string name;
  std::function<std::function<void()>()> prepare;
  std::function<Row(double seconds, benchmark::UserCounters* counters)> describe;
};

class Harness {
 public:
  Harness(const char* bench, int argc, char** argv) : bench_(bench) {
    benchmark::Initialize(&argc, argv);
    flags_ = std::make_unique<Flags>(argc, argv);
    json_ = flags_->text("json", "");
    commit_ = flags_->text("commit", "unknown");
  }

  virtual ~Harness() = default;
  Harness(const Harness&) = delete;
  Harness& operator=(const Harness&) = delete;

  Flags& flags() { return *flags_; }
  ThreadPool& pool() { return pool_; }
  const Peaks& peaks() const { return peaks_; }

  // All flags are known by now. The exit status: 1 when a case failed.
  int run(const std::vector<Case>& cases) {
    flags_->refuse_unknown();
    std::printf("%s\n", measure_ceilings().c_str());
    std::fflush(stdout);
    for (size_t i = 0; i < cases.size(); ++i) {
      benchmark::RegisterBenchmark(cases[i].name.c_str(),
                                   [this, i, &cases](benchmark::State& state) { time(cases[i], i, state); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
    benchmark::RunSpecifiedBenchmarks();
    call_ = nullptr;
    if (!json_.empty()) write();
    return failed_ ? 1 : 0;
  }

 protected:
  // Before the cases; returns a line about the machine.
  virtual std::string measure_ceilings() {
    peaks_ = measure_peaks(pool_);
    char line[160];
    std::snprintf(line, sizeof line, "%s, %d threads; peaks: %.0f GFLOP/s fma, %.0f GFLOP/s dot_bf16, %.1f GB/s read",
                  cpu::kernels().isa, pool_.workers(), peaks_.fma_gflops, peaks_.dot_bf16_gflops, peaks_.read_gbytes);
    return line;
  }
  virtual Row ceilings() const { return peaks_.row(); }
  virtual Row about() const { return machine(commit_, pool_.workers()); }
  // Of one call.
  virtual double seconds_of(const std::function<void()>& call) {
    const auto start = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  // Times are taken here: Debian builds the library without optimisation ("built as DEBUG"), which does not touch them.
  // Google Benchmark calls this more than once for a case, with more and more iterations: what was prepared is kept
  // until the next case comes, and the last call's times count.
  void time(const Case& one, size_t index, benchmark::State& state) {
    try {
      if (prepared_ != &one) {
        call_ = nullptr;  // frees the last case's tensors before the next ones are made
        call_ = one.prepare();
        prepared_ = &one;
      }
    } catch (const std::exception& error) {
      failed_ = true;
      return state.SkipWithError(error.what());
    }
    std::vector<double> seconds;
    for (auto _ : state) {
      seconds.push_back(seconds_of(call_));
      state.SetIterationTime(seconds.back());
    }
    std::sort(seconds.begin(), seconds.end());
    const size_t half = seconds.size() / 2;
    const double median = seconds.size() % 2 == 1 ? seconds[half] : (seconds[half - 1] + seconds[half]) / 2;
    rows_.insert_or_assign(index, one.describe(median, &state.counters));
  }

  void write() const {
    std::ofstream out(json_);
    out << "{\"bench\": \"" << bench_ << "\", \"machine\": " << about().json() << ", \"peaks\": " << ceilings().json()
        << ", \"rows\": [";
    const char* separator = "\n";
    for (const auto& [index, row] : rows_) {
      out << separator << row.json();
      separator = ",\n";
    }
    out << "\n]}\n";
    out.close();
    if (!out) throw std::runtime_error("cannot write " + json_);
  }

  const char* bench_;
  std::unique_ptr<Flags> flags_;
  std::string json_;
  std::string commit_;
  ThreadPool pool_{thread_count()};
  Peaks peaks_{};
  const Case* prepared_ = nullptr;
  std::function<void()> call_;
  std::map<size_t, Row> rows_;
  bool failed_ = false;
};

// What main does: the benchmark, and one line for what is wrong with the arguments or the machine.
inline int main_of(int (*run)(int, char**), int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 2;
  }
}

}  // namespace lcore::bench

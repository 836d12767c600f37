// csrc/cuda/ptx/barrier.h for the emulator.
#pragma once

namespace lcore::cuda {

inline void barrier_sync(int barrier, int threads) { emulator::synchronize(barrier, threads, false); }
inline void barrier_arrive(int barrier, int threads) { emulator::arrive(barrier, threads); }

}  // namespace lcore::cuda

// Contiguous (batch, seq, heads, dim) tensors of the standalone benchmarks, filled with normal numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/attention.h"
#include "core/dtype.h"
#include "core/executor.h"

namespace lcore::bench {

inline DType dtype_named(const std::string& name) {
  if (name == "fp32") return DType::kFloat32;
  if (name == "bf16") return DType::kBFloat16;
  if (name == "fp16") return DType::kFloat16;
  throw std::invalid_argument("dtype must be fp32, bf16 or fp16, got " + name);
}

// Relative error, in the 2-norm of a row, that no right kernel comes near: 4 to 8 units of the type's own rounding.
inline double tolerance(DType type) {
  return type == DType::kFloat32 ? 1e-4 : type == DType::kFloat16 ? 0x1p-8 : 0x1p-6;
}

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType type, int64_t batch, int64_t seq, int64_t heads, int64_t dim)
      : type_(type), seq_(seq), heads_(heads), dim_(dim), count_(batch * seq * heads * dim) {
    const size_t bytes = (count_ * size_of(type) + 63) / 64 * 64;
    data_.reset(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  // Standard normal numbers that depend on the seed alone.
  static Tensor normal(DType type, int64_t batch, int64_t seq, int64_t heads, int64_t dim, int seed,
                       Executor& executor) {
    Tensor x(type, batch, seq, heads, dim);
    constexpr int64_t kBlock = 1 << 16;
    executor.run((x.count_ + kBlock - 1) / kBlock, [&](int64_t block, int) {
      std::seed_seq seeds{static_cast<int64_t>(seed), block};
      std::mt19937_64 engine(seeds);
      std::normal_distribution<float> distribution;
      const int64_t end = std::min((block + 1) * kBlock, x.count_);
      for (int64_t i = block * kBlock; i < end; ++i) x.set(i, distribution(engine));
    });
    return x;
  }

  void* data() const { return data_.get(); }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(size_of(type_)); }

  // Packed: all batches are one (tokens, heads, dim).
  Strided strided(bool packed = false) const {
    return {data_.get(), packed ? 0 : seq_ * heads_ * dim_, heads_ * dim_, dim_, 1};
  }

  std::vector<double> row(int64_t batch, int64_t token, int64_t head) const {
    std::vector<double> values(dim_);
    const int64_t begin = ((batch * seq_ + token) * heads_ + head) * dim_;
    for (int64_t c = 0; c < dim_; ++c) values[c] = get(begin + c);
    return values;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

  double get(int64_t i) const {
    if (type_ == DType::kFloat32) return as<float>()[i];
    return type_ == DType::kFloat16 ? to_float(as<Half>()[i]) : to_float(as<BFloat16>()[i]);
  }

  void set(int64_t i, float value) {
    if (type_ == DType::kFloat32) {
      as<float>()[i] = value;
    } else if (type_ == DType::kFloat16) {
      as<Half>()[i] = to_half(value);
    } else {
      as<BFloat16>()[i] = to_bfloat16(value);
    }
  }

  DType type_ = DType::kFloat32;
  int64_t seq_ = 0;
  int64_t heads_ = 0;
  int64_t dim_ = 0;
  int64_t count_ = 0;
  std::unique_ptr<char, Free> data_;
};

}  // namespace lcore::bench

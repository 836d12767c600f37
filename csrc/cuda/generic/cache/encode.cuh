// K or V of a full page from its rows to codes, scales and zeros (core/page_format.h), by all threads of a block. First
// the grid of every group, in shared memory; then the codes, a word a thread. Of equal values, 0 and -0, the first of a
// group counts, as on the CPU: partial extents are joined in order.
#pragma once

#include "cuda/generic/cache/grid.cuh"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {

constexpr int kEncodeThreads = 256;
constexpr int kEncodeWarps = kEncodeThreads / kWarpLanes;
constexpr int kMostPageDim = 512;
constexpr int kMostPageSize = 256;

// The tokens of a page: the first `waiting` stand in the tail, the others are new.
template <class T>
struct PageRows {
  const T* tail;  // [page_size][dim]
  int64_t waiting;
  const T* fresh;  // the first new one
  int64_t fresh_row;
  int64_t fresh_dim;
  int dim;

  __device__ T at(int r, int c) const {
    return r < waiting ? tail[int64_t{r} * dim + c] : fresh[(r - waiting) * fresh_row + c * fresh_dim];
  }
};

template <class T>
class PageEncoder {
 public:
  __device__ PageEncoder(PageFormat format, bool value, int page_size, const PageRows<T>& rows, uint8_t* out)
      : format_(format),
        value_(value),
        page_size_(page_size),
        dim_(rows.dim),
        rows_(rows),
        out_(out),
        side_(page_side(format, value, page_size, rows.dim)) {}

  __device__ void encode() const {
    __shared__ float step[kMostPageSize * kMostPageDim / kValueGroup];  // of a group
    __shared__ float origin[kMostPageSize * kMostPageDim / kValueGroup];
    value_ ? value_grids(step, origin) : key_grids(step, origin);
    __syncthreads();
    const int64_t groups = value_ ? value_groups(dim_) * page_size_ : dim_;
    const int64_t codes = is_integer(format_) ? put_words(step, origin) : put_bytes(step);
    zero(codes, side_.scales);
    zero(side_.scales + 2 * groups, side_.zeros);
    zero(side_.zeros + (is_integer(format_) ? 2 * groups : 0), side_.bytes);
    __syncthreads();  // the grids are written anew for the next side
  }

 private:
  __device__ float at(int r, int c) const { return static_cast<float>(widen(rows_.at(r, c))); }

  __device__ void zero(int64_t begin, int64_t end) const {
    for (int64_t i = begin + threadIdx.x; i < end; i += kEncodeThreads) out_[i] = 0;
  }

  __device__ void set(int64_t group, const Extent& extent, float* step, float* origin) const {
    const Grid grid = grid_of(format_, extent);
    reinterpret_cast<__half*>(out_ + side_.scales)[group] = grid.scale;
    if (is_integer(format_)) reinterpret_cast<__half*>(out_ + side_.zeros)[group] = grid.zero;
    step[group] = grid.step;
    origin[group] = grid.origin;
  }

  // A group is a channel: a lane. The rows of few channels are shared out over warps.
  __device__ void key_grids(float* step, float* origin) const {
    __shared__ float parts[kMostPageDim][3];  // [splits][channels, whole warps of them]: an Extent
    const int chunks = (dim_ + kWarpLanes - 1) / kWarpLanes, splits = chunks < kEncodeWarps ? kEncodeWarps / chunks : 1;
    const int rows = (page_size_ + splits - 1) / splits, lane = threadIdx.x % kWarpLanes;
    for (int part = threadIdx.x / kWarpLanes; part < chunks * splits; part += kEncodeWarps) {
      const int c = part % chunks * kWarpLanes + lane, begin = part / chunks * rows;
      Extent extent;
      for (int r = begin; r < begin + rows && r < page_size_ && c < dim_; ++r) extent.add(at(r, c));
      float* to = parts[part * kWarpLanes + lane];
      to[0] = extent.low;
      to[1] = extent.high;
      to[2] = extent.spoilt;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dim_; c += kEncodeThreads) {
      Extent extent;
      for (int split = 0; split < splits; ++split) {
        const float* part = parts[split * chunks * kWarpLanes + c];
        extent.join({part[0], part[1], part[2]});
      }
      set(c, extent, step, origin);
    }
  }

  // A group is 64 channels of a row: a warp, two neighbours a lane.
  __device__ void value_grids(float* step, float* origin) const {
    const int groups = static_cast<int>(value_groups(dim_)), lane = threadIdx.x % kWarpLanes;
    for (int group = threadIdx.x / kWarpLanes; group < groups * page_size_; group += kEncodeWarps) {
      const int r = group % page_size_, c = group / page_size_ * kValueGroup + 2 * lane;
      Extent extent;
      if (c < dim_) extent.add(at(r, c));
      if (c + 1 < dim_) extent.add(at(r, c + 1));
      for (int width = 1; width < kWarpLanes; width *= 2) {
        Extent other{__shfl_xor_sync(kAllLanes, extent.low, width), __shfl_xor_sync(kAllLanes, extent.high, width),
                     __shfl_xor_sync(kAllLanes, extent.spoilt, width)};
        if ((lane & width) != 0) {
          const Extent later = extent;
          extent = other;
          other = later;
        }
        extent.join(other);
      }
      if (lane == 0) set(group, extent, step, origin);
    }
  }

  __device__ int group_of(int r, int c) const { return value_ ? c / kValueGroup * page_size_ + r : c; }

  // Bytes written.
  __device__ int64_t put_bytes(const float* step) const {
    for (int i = threadIdx.x; i < page_size_ * dim_; i += kEncodeThreads) {
      const int r = i / dim_, c = i % dim_;
      out_[i] = nearest_float8(at(r, c) / step[group_of(r, c)]);
    }
    return int64_t{page_size_} * dim_;
  }

  __device__ int64_t put_words(const float* step, const float* origin) const {
    const int bits = bits_of(format_), codes = 2 * planes_of(format_);  // of a word
    const auto levels = static_cast<float>((1 << bits) - 1);
    const uint32_t flip = format_ == PageFormat::kInt8 ? 0x80u : 0u;
    const int columns = value_ ? static_cast<int>(word_columns(dim_)) : page_size_;
    const int words = static_cast<int>(steps_of(format_, value_ ? page_size_ : dim_)) * columns;
    for (int i = threadIdx.x; i < words; i += kEncodeThreads) {
      uint32_t word = 0;
      for (int k = 0; k < codes; ++k) {
        const int along = i / columns * codes + k, across = i % columns;
        const int r = value_ ? along : across, c = value_ ? across : along;
        if (c >= dim_) break;
        const int group = group_of(r, c);
        const uint32_t code = nearest_code((at(r, c) - origin[group]) / step[group], levels) ^ flip;
        word |= code << (16 * (k % 2) + bits * (k / 2));
      }
      reinterpret_cast<uint32_t*>(out_)[i] = word;
    }
    return 4 * int64_t{words};
  }

  PageFormat format_;
  bool value_;
  int page_size_;
  int dim_;
  const PageRows<T>& rows_;
  uint8_t* out_;
  PageSide side_;
};

}  // namespace lcore::cuda::generic

// One value of K or V of a slot, a (sequence, kv head), wherever it lies and however it is coded: page, part of a page
// of values, or tail. For kernels that are bound by something else than decoding.
#pragma once

#include "core/kv_pages.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda::generic {

// A row of K or V.
struct RowPlace {
  const uint8_t* side;  // K or V of a page, or rows of values
  PageFormat format;
  int row;
  int page_size;

  // p: where the slot's K or V is; `tail_format` the format of values of the model's type.
  __device__ RowPlace(const KvPages& pages, PageFormat tail_format, int64_t slot, int64_t length, int64_t key,
                      bool value, int dim)
      : page_size(static_cast<int>(pages.page_size)) {
    const int64_t page = key / page_size;
    row = static_cast<int>(key % page_size);
    format = tail_format;
    if (page >= length / page_size) {
      const auto values = static_cast<int64_t>(size_of(plain_type(tail_format))) * page_size * dim;
      side = static_cast<const uint8_t*>(value ? pages.tail_v : pages.tail_k) + slot * values;
      return;
    }
    const int32_t* ids = pages.page_table + slot * pages.table_width + pages.column(page);
    if (page < pages.plain_pages) {
      const int tokens = static_cast<int>(page_size / pages.parts);
      side = pages.pool + ids[row / tokens] * pages.page_bytes + (value ? pages.plain_v_offset : 0);
      row %= tokens;
      return;
    }
    side = pages.pool + *ids * pages.page_bytes + (value ? pages.v_offset : 0);
    format = pages.format(value);
  }

  __device__ float at(bool value, int dim, int c) const {
    const int64_t i = int64_t{row} * dim + c;
    if (format == PageFormat::kFloat32) return reinterpret_cast<const float*>(side)[i];
    if (format == PageFormat::kFloat16) return widen(reinterpret_cast<const __half*>(side)[i]);
    if (format == PageFormat::kBFloat16) return widen(reinterpret_cast<const __nv_bfloat16*>(side)[i]);
    const PageSide offsets = page_side(format, value, page_size, dim);
    const int group = value ? c / kValueGroup * page_size + row : c;
    const float scale = widen(reinterpret_cast<const __half*>(side + offsets.scales)[group]);
    if (format == PageFormat::kFloat8) return scale * float8(side[i]);
    const float zero = widen(reinterpret_cast<const __half*>(side + offsets.zeros)[group]);
    const int bits = bits_of(format), codes = 2 * planes_of(format);  // of a word
    const int along = value ? row : c, across = value ? c : row;
    const int columns = value ? static_cast<int>(word_columns(dim)) : page_size;
    const uint32_t word = reinterpret_cast<const uint32_t*>(side)[along / codes * columns + across];
    const uint32_t code = word >> (16 * (along % 2) + bits * (along % codes / 2)) & ((1u << bits) - 1);
    return fmaf(scale, static_cast<float>(format == PageFormat::kInt8 ? code ^ 0x80u : code), zero);
  }

 private:
  // e4m3: multiplying by 2^120 moves the exponent bias from 7 to 127 and normalises subnormals exactly.
  __device__ static float float8(uint8_t code) {
    const float magnitude = __uint_as_float((code & 0x7fu) << 20) * 0x1p120f;
    return (code & 0x80u) != 0 ? -magnitude : magnitude;
  }
};

}  // namespace lcore::cuda::generic

// Products of wgmma that a warp has asked for. Results appear at the wait: until then the accumulators hold kPoison,
// and shared memory is held. Operands in shared memory are read at the wait, the latest moment that hardware may
// choose.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "cuda/descriptor.h"
#include "cuda/product.h"

namespace lcore::emulator {

class Block;
struct Thread;

constexpr int kWarpgroup = 4;             // warps
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

struct Issued {  // what all warps of a warpgroup must agree on
  cuda::Product type;
  int n;
  cuda::Major a_major, b_major;
  bool a_in_registers, accumulate;
  uint64_t a, b;  // descriptors
  bool operator==(const Issued&) const = default;
};

struct Accumulator {  // of a warp, while products that write it are on their way
  uint32_t* registers[32];
  int count;
  int pending;
  std::vector<uint32_t> values;  // (32, count): their true values
};

struct Product {  // of a warpgroup
  Issued issued;
  int asked = 0;                  // warps
  uint32_t epoch = 0;             // of the tensor cores, once it is computed and its shared memory let go
  uint32_t a[kWarpgroup][32][4];  // where it is in registers
  Accumulator* sums[kWarpgroup];
};

struct Warpgroup {
  std::vector<std::unique_ptr<Product>> products;  // all of the block, in order
  std::vector<Thread*> waiting;                    // until all warps have asked
};

struct Products {  // of a warp
  std::list<Accumulator> sums;
  size_t asked = 0, ended = 0;  // of the warpgroup's products
  std::vector<size_t> groups;   // `asked` at the commit of each, oldest first
  bool fenced = false;          // since its last wait
};

// An operand in shared memory, decoded: 16-byte chunks of the index that is contiguous.
struct Operand {
  uint32_t start, leading, stride;
  cuda::Swizzle swizzle;

  // The chunk of k_major memory with k from 16 bytes * chunk on, or of mn_major memory with m or n from 8 * chunk on.
  uint32_t k_major(int mn, int chunk) const;
  uint32_t mn_major(int chunk, int k) const;
};
// Empty `wrong` if the descriptor is right.
Operand decode(uint64_t descriptor, std::string& wrong);

// The sums of one of the four warps, rows (16, n), += or = a b.
void multiply(Block& block, const Product& product, int warp);

// When a thread returns.
void end_products();

}  // namespace lcore::emulator

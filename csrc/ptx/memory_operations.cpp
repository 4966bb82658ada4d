// Loads, stores, atomics, asynchronous copies and matrices from shared memory.
#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

// Elements of type M in memory, R in registers: d, or the operands of the list.
template <class M, class R>
void load(Warp& w, const Instruction& i, uint32_t mask) {
  uint8_t* pointers[kLanes];
  checked_addresses(w, i, mask, sizeof(M) * i.elements, false, pointers);
  for (size_t k = 0; k < i.elements; ++k) {
    alignas(Block) R d[kLanes] = {};
    for_lanes(mask, [&](uint32_t l) {
      M value;
      std::memcpy(&value, pointers[l] + k * sizeof(M), sizeof(M));
      d[l] = static_cast<R>(value);
    });
    const Place place = i.list < 0 ? i.d : operand_of(w, i, k);
    if (place != kNowhere) put(w, place, d, mask);
  }
}

// b, or the operands of the list.
template <class M, class R>
void store(Warp& w, const Instruction& i, uint32_t mask) {
  uint8_t* pointers[kLanes];
  checked_addresses(w, i, mask, sizeof(M) * i.elements, true, pointers);
  const bool backwards = w.launch->random.seed % 2 != 0;  // which lane's value stays is open
  for (size_t k = 0; k < i.elements; ++k) {
    const R* const values = lanes_at<R>(w, i.list < 0 ? i.b : operand_of(w, i, k));
    const auto store_one = [&](uint32_t l) {
      const M value = static_cast<M>(values[l]);
      std::memcpy(pointers[l] + k * sizeof(M), &value, sizeof(M));
    };
    if (!backwards) {
      for_lanes(mask, store_one);
    } else {
      for (uint32_t l = kLanes; l-- > 0;) {
        if ((mask >> l & 1) != 0) store_one(l);
      }
    }
  }
}

void atomic_add(Warp& w, const Instruction& i, uint32_t mask) {
  uint8_t* pointers[kLanes];
  checked_addresses(w, i, mask, sizeof(uint32_t), true, pointers);
  const uint32_t* const b = lanes_at<uint32_t>(w, i.b);
  alignas(Block) uint32_t d[kLanes] = {};
  for_lanes(mask, [&](uint32_t l) {
    std::memcpy(&d[l], pointers[l], sizeof d[l]);
    const uint32_t sum = d[l] + b[l];
    std::memcpy(pointers[l], &sum, sizeof sum);
  });
  put(w, i.d, d, mask);
}

void commit_copies(Warp& w, const Instruction&, uint32_t mask) {
  for_lanes(mask, [&](uint32_t l) { ++w.committed[l]; });
}
void wait_for_copies(Warp& w, const Instruction& i, uint32_t mask) {
  complete_copies(w, i, mask, static_cast<uint32_t>(i.immediate));
}

// i.elements matrices of 8 x 8 numbers of 16 bits; lane 8 k + r has the address of row r of the
// k-th. Lane 4 g + t gets [g][2 t] and [g][2 t + 1]; transposed [2 t][g] and [2 t + 1][g].
void load_matrices(Warp& w, const Instruction& i, uint32_t mask) {
  if (mask != kAllLanes) fault(w, i, 0, "ldmatrix without all lanes");
  constexpr uint32_t kRows = 8, kRowBytes = 16;
  uint8_t* rows[kLanes] = {};
  const uint32_t used = i.elements * kRows;
  checked_addresses(w, i, used == kLanes ? kAllLanes : (1u << used) - 1, kRowBytes, false, rows);
  for (uint32_t k = 0; k < i.elements; ++k) {
    alignas(Block) uint32_t d[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t g = l / 4, t = l % 4;
      uint16_t pair[2];
      for (uint32_t e = 0; e < 2; ++e) {
        const uint32_t row = i.transposed ? 2 * t + e : g, column = i.transposed ? g : 2 * t + e;
        std::memcpy(&pair[e], rows[kRows * k + row] + 2 * column, sizeof pair[e]);
      }
      d[l] = pair[0] | uint32_t{pair[1]} << 16;
    }
    put(w, operand_of(w, i, k), d, mask);
  }
}

}  // namespace

void add_memory(Operations& all) {
  // By the type in memory and the bytes of a register.
  all["load.u8.2"] = load<uint8_t, uint16_t>;
  all["load.u8.4"] = load<uint8_t, uint32_t>;
  all["load.u16.2"] = all["load.s16.2"] = load<uint16_t, uint16_t>;
  all["load.u16.4"] = load<uint16_t, uint32_t>;
  all["load.s16.4"] = load<int16_t, int32_t>;
  all["load.u32.4"] = all["load.s32.4"] = all["load.f32.4"] = load<uint32_t, uint32_t>;
  all["load.u32.8"] = load<uint32_t, uint64_t>;
  all["load.s32.8"] = load<int32_t, int64_t>;
  all["load.u64.8"] = load<uint64_t, uint64_t>;
  all["store.u8.2"] = store<uint8_t, uint16_t>;
  all["store.u8.4"] = store<uint8_t, uint32_t>;
  all["store.u16.2"] = store<uint16_t, uint16_t>;
  all["store.u16.4"] = store<uint16_t, uint32_t>;
  all["store.u32.4"] = all["store.f32.4"] = store<uint32_t, uint32_t>;
  all["store.u64.8"] = store<uint64_t, uint64_t>;
  all["atom.add.u32"] = atomic_add;
  all["cp.async"] = begin_copies;
  all["cp.async.commit_group"] = commit_copies;
  all["cp.async.wait_group"] = wait_for_copies;
  all["ldmatrix"] = load_matrices;
}

}  // namespace snv2::ptx

// The instructions of AMX, or for tests the same on any machine, with memory that sanitizers watch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

// The operand of ldtilecfg: palette and shapes of the tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace snv2::cpu::SNV2_ISA

#if !defined(SNV2_SANITIZED)

// The compiler's own intrinsics do not tell it that memory is read and written.
#define SNV2_TILE_CONFIGURE(shapes) asm volatile("ldtilecfg (%0)" ::"r"(shapes) : "memory")
#define SNV2_TILE_RELEASE() asm volatile("tilerelease" ::: "memory")
#define SNV2_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define SNV2_TILE_LOAD(tile, from, stride)                                   \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"((const void*)(from)), \
               "r"((int64_t)(stride))                                        \
               : "memory")
#define SNV2_TILE_STORE(tile, to)                                                          \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void*)(to)), "r"((int64_t)64) \
               : "memory")
#define SNV2_TILE_DOT(In, sums, x, weights)                                              \
  do {                                                                                   \
    if constexpr (std::is_same_v<In, BFloat16>) {                                        \
      asm volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #x ", %%tmm" #sums::: "memory"); \
    } else {                                                                             \
      asm volatile("tdpbusd %%tmm" #weights ", %%tmm" #x ", %%tmm" #sums::: "memory");   \
    }                                                                                    \
  } while (false)

#else

namespace snv2::cpu::SNV2_ISA {

// The tiles of a thread.
struct EmulatedTiles {
  TileShapes shapes;
  uint8_t bytes[8][16][64];

  void zero(int tile) { std::memset(bytes[tile], 0, sizeof bytes[tile]); }
  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < shapes.rows[tile]; ++row) {
      std::memcpy(bytes[tile][row], static_cast<const char*>(from) + row * stride,
                  shapes.row_bytes[tile]);
    }
  }
  void store(int tile, void* to) const {
    for (int row = 0; row < shapes.rows[tile]; ++row) {
      std::memcpy(static_cast<char*>(to) + row * 64, bytes[tile][row], shapes.row_bytes[tile]);
    }
  }
  template <class T>
  T at(int tile, int row, int column) const {
    T value;
    std::memcpy(&value, bytes[tile][row] + column * sizeof(T), sizeof value);
    return value;
  }
  // Adds a word's products to a sum.
  static float add_dot(float sum, uint32_t x, uint32_t weights) {
    for (const uint32_t mask : {0xffffu, 0xffff0000u}) {
      const auto value = [&](uint32_t pair) {
        const uint32_t bits = mask == 0xffffu ? pair << 16 : pair & mask;
        float number;
        std::memcpy(&number, &bits, sizeof number);
        return number;
      };
      sum += value(x) * value(weights);
    }
    return sum;
  }
  static int32_t add_dot(int32_t sum, uint32_t x, uint32_t weights) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += static_cast<uint8_t>(x >> shift) * static_cast<int8_t>(weights >> shift);
    }
    return sum;
  }
  template <class Sum>
  void dot(int sums, int x, int weights) {
    if (shapes.row_bytes[x] != shapes.rows[weights] * 4 || shapes.rows[x] != shapes.rows[sums] ||
        shapes.row_bytes[weights] != shapes.row_bytes[sums] || shapes.rows[x] == 0) {
      __builtin_trap();  // as the processor does
    }
    for (int row = 0; row < shapes.rows[x]; ++row) {
      for (int column = 0; column < shapes.row_bytes[sums] / 4; ++column) {
        Sum sum = at<Sum>(sums, row, column);
        for (int word = 0; word < shapes.rows[weights]; ++word) {
          sum = add_dot(sum, at<uint32_t>(x, row, word), at<uint32_t>(weights, word, column));
        }
        std::memcpy(bytes[sums][row] + column * 4, &sum, sizeof sum);
      }
    }
  }
};

inline thread_local EmulatedTiles emulated_tiles;

}  // namespace snv2::cpu::SNV2_ISA

#define SNV2_TILE_CONFIGURE(config) emulated_tiles.shapes = *(config)
#define SNV2_TILE_RELEASE() emulated_tiles.shapes = {}
#define SNV2_TILE_ZERO(tile) emulated_tiles.zero(tile)
#define SNV2_TILE_LOAD(tile, from, stride) emulated_tiles.load(tile, from, stride)
#define SNV2_TILE_STORE(tile, to) emulated_tiles.store(tile, to)
#define SNV2_TILE_DOT(In, sums, x, weights)                                                     \
  emulated_tiles.dot<std::conditional_t<std::is_same_v<In, BFloat16>, float, int32_t>>(sums, x, \
                                                                                       weights)

#endif

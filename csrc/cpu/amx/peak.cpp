// Products of tiles, as fast as the processor can.
#include "cpu/amx/kernels.h"
#include "cpu/amx/tiles.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class In>
int64_t products(int64_t count) {
  constexpr int64_t kWordPlanes = sizeof(float) / sizeof(In);
  constexpr int64_t kProducts = kTileHeight * kTileWords * kWordPlanes * kPanel;
  alignas(64) float zeros[kTileFloats] = {};
  const int64_t rounds = ceil_div(count, kTilePanels * kProducts);
  const Tiles tiles(kTileHeight, kTileWords);
  SNV2_TILE_ZERO(0);
  SNV2_TILE_ZERO(1);
  SNV2_TILE_ZERO(2);
  SNV2_TILE_ZERO(3);
  SNV2_TILE_LOAD(4, zeros, 64);
  SNV2_TILE_LOAD(5, zeros, 64);
#pragma GCC unroll 1
  for (int64_t round = 0; round < rounds; ++round) {
    SNV2_TILE_DOT(In, 0, 4, 5);
    SNV2_TILE_DOT(In, 1, 4, 5);
    SNV2_TILE_DOT(In, 2, 4, 5);
    SNV2_TILE_DOT(In, 3, 4, 5);
  }
  return rounds * kTilePanels * kProducts;
}

}  // namespace

int64_t multiply_adds(int64_t count) { return products<BFloat16>(count); }

int64_t int8::multiply_adds(int64_t count) { return products<UInt8>(count); }

}  // namespace snv2::cpu::SNV2_ISA

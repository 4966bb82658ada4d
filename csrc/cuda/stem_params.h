// Arguments of stem_kernel, and the tile of a CTA.
#pragma once

#include <cstdint>

#include "cuda/activation.h"
#include "cuda/isa.h"

namespace snv2::SNV2_GPU {

constexpr int kStemColumns = 7;  // pooled, of a warp: of the eighth its neighbour needs a part
constexpr int kStemWarps = 8;
// Pixels of a line before its tile: three are needed, whole sectors are loaded.
constexpr int stem_halo(bool bytes) { return bytes ? 32 : 16; }

// Where the taps of a pixel lie: in three planes, in pixels of three channels, or in any planes.
enum class Taps { kPlanes3, kPixels3, kAny };

constexpr int64_t stem_lines(int64_t rows) { return 4 * rows + 3; }
template <Taps kTaps>
constexpr int kPixel = kTaps == Taps::kPixels3 ? 3 : 1;  // elements of a line's pixel

template <class T>
struct StemParams {
  const void* in;     // [N, C, H, W] or [N, H, W, C] of T, or bytes
  const T* weights;   // packed [out, C * 9]
  const float* bias;  // [out], padded
  After after;
  const int32_t* out_table;  // [out] planes
  T* out;
  int64_t out_pitch;
  int channels, height, width;
  int out_channels, conv_height, conv_width, out_height, out_width;
  int rows, columns;            // of a tile
  int out_row;                  // elements of a row of the result's planes, padding included
  int strips, panes;            // tiles of an image, down and across
  int line_pitch, plane_pitch;  // of the lines in shared memory
  int stage_pitch, stage_row;   // of the result
  int stage_at, weights_at;     // bytes
  bool channels_last, bytes;
  int copy;  // elements that are copied at once
  float scale[4], shift[4];
};

struct StemTile {
  int64_t image;
  int row, rows, column, columns;  // pooled
  int y, x;                        // of the first line's first pixel

  template <class T>
  SNV2_DEVICE explicit StemTile(const StemParams<T>& params) {
    const int tiles = params.strips * params.panes;
    image = static_cast<int>(blockIdx.x) / tiles;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    row = tile / params.panes * params.rows;
    column = tile % params.panes * params.columns;
    rows = params.out_height - row < params.rows ? params.out_height - row : params.rows;
    columns =
        params.out_width - column < params.columns ? params.out_width - column : params.columns;
    y = 4 * row - 3;
    x = 4 * column - stem_halo(params.bytes);
  }
};

}  // namespace snv2::SNV2_GPU

// One ShuffleNet V2 unit in one launch: 1x1, depthwise and 1x1 of the main branch, and at stride 2
// the depthwise convolution and 1x1 of the projection, which other CTAs (blockIdx.y = 1) take.
//
// All images together are one tall map of batch x height rows. A CTA marches down a range of its
// output rows. In each step it
//   loads the next `columns` pixels of all gathered planes        X    [in][columns]
//   multiplies them, into a ring of pixels                        MID  [mid][ring]
//   convolves the rows that are complete                          DW   [mid][rows of pixels]
//   multiplies those, and stores planes or the caller's tensor.
// Rows have their padding everywhere, so that blocks of 8 pixels are whole, aligned and of one row;
// a step is some rows or a part of one. What padding holds is convolved with nothing, and products
// keep their columns apart. The ring keeps what the next rows need, less than the rows of a window:
// inside a range nothing is read or computed twice; two ranges that meet inside an image both read
// up to as many rows around the cut, less one. X is dead once MID is made, and DW takes its place.
//
// Weights lie in shared memory for the whole march where they fit beside two CTAs (Resident). Where
// they do not, the CTAs of a cluster march together, each with its share of the rows of both
// matrices (Clustered): they load X for each other and hand each other their rows of DW. Where
// there are no clusters weights are read from L2 in every step (Direct: a warp then takes a whole
// row of tiles over up to 112 columns, so that a step reads each weight once). For x1.0 in 16 bits,
// stage 2 has 16 KB of weights and stage 3 64 KB; stage 4 has 230 KB, more than an SM.
#pragma once

#include <cstdint>

#include "cuda/unit_convolve.h"
#include "cuda/unit_load.h"
#include "cuda/unit_product.h"
#include "cuda/unit_tensor.h"

namespace snv2::SNV2_GPU {

// kCaller: the caller's tensors may be read and written; else there are planes at both ends. kBare:
// without the first product; X is then the ring. kPartial: other parts may be missing too.
template <class T, int kStride, class Mode, class Act, bool kCaller, bool kBare, bool kPartial>
SNV2_DEVICE void march(const UnitParams<T>& params, const Branch<T>& whole) {
  constexpr bool kShared = Mode::kCluster && !kBare;  // X is loaded for each other
  const int rank = Mode::kCluster ? cluster_rank() : 0;
  const int cta = static_cast<int>(blockIdx.x) >> (Mode::kCluster ? params.cluster_log2 : 0);
  const Branch<T> branch =
      Mode::kCluster ? share_of<T, Act>(whole, params.in_channels, rank, params.cluster_log2)
                     : whole;
  // Beside the first product a piece has no second one: else its branch is whole.
  const bool projects = !kPartial || (kBare && branch.pw2 != nullptr);
  const Memory<T> m = memory_of<T>(whole.at);
  const int depth = params.in_channels;
  const int pitch = params.row, ring = params.ring, columns = params.columns;
  const int reach = params.template reach_of<Act>();

  // The range, in output rows, and the elements of a plane that it reads, which count from the
  // first one.
  const Heights& heights = params.heights;
  const int all_rows = params.batch * heights.out;
  int row = cta * params.rows_per_cta;
  const int row_end = all_rows - row < params.rows_per_cta ? all_rows : row + params.rows_per_cta;
  const int row_start = heights.template first<kStride>(row, reach);
  const auto element = [&](int done) { return int64_t{row_start} * pitch + done; };  // of planes
  const int end = (heights.template needed<kStride>(row_end, reach) - row_start) * pitch;
  // Columns of the step that begins with element `done`. It ends where its rows do, or its row.
  const auto columns_from = [&](int done) {
    const int left =
        columns < pitch ? pitch - (done - params.by_row.divide(done) * pitch) : columns;
    const int most = columns < left ? columns : left;
    return end - done < most ? end - done : most;
  };
  const auto rows_before = [&](int done) {
    return params.by_stretch.divide(done) * params.stretch_rows;
  };

  // The next kernel's CTAs may wait beside these: all wait for what others write.
  grid_dependents_launch();

  // Load what stays, the planes of X first.
  load_words<1>(m.in_table, params.in_table, depth);
  cp_async_commit();
  if constexpr (Mode::kResident) {
    if constexpr (!kBare) {
      load_matrix(m.pw1, branch.pw1, packed_count<T>(branch.mid, depth));
    }
    if (projects) {
      load_matrix(m.pw2, branch.pw2, packed_count<T>(branch.out, branch.depth));
    }
  }
  if constexpr (!kBare) {
    load_words<4>(m.pw1_bias, branch.pw1_bias, units_of<16>(branch.mid) * 16);
  }
  if (projects) {
    load_words<4>(m.pw2_bias, branch.pw2_bias, units_of<16>(branch.out) * 16);
  }
  load_words<4>(m.dw_weights, branch.dw, branch.mid * branch.template dw_floats<Act>());
  const bool keeps = !kCaller || params.out != nullptr;  // planes
  if (keeps) load_table(m.out_table, branch.out_table, branch.out);
  cp_async_commit();
  if (kCaller && params.result != nullptr) load_sources(params, branch, m.sources, rank);

  // Zeros below X and DW. Where they share a place, each step has to put them back.
  const bool apart = kBare || params.prefetch;
  const auto zero_x = [&] {
    if (!kBare && depth % kTileDepth<T> != 0) {
      zero_row(m.x + depth * m.x_pitch, m.x_pitch);
    }
  };
  const auto zero_dw = [&] {
    if (branch.depth % kTileDepth<T> != 0) {
      zero_row(m.dw + branch.depth * m.dw_pitch, m.dw_pitch);
    }
  };
  zero_x();
  if (apart) zero_dw();

  constexpr bool kHolds = Mode::kResident;  // else columns fill the registers
  float by_pw1 = by_row_blocks<Mode>(branch.mid), by_pw2 = by_row_blocks<Mode>(branch.out);
  if constexpr (kHolds) by_pw1 = in_register(by_pw1), by_pw2 = in_register(by_pw2);

  // Find the planes, before the input may be there.
  cp_async_wait<1>();
  if constexpr (Mode::kCluster && !kShared) {
    sync_cluster_reads();  // the others have begun
  } else {
    sync_threads();
  }
  // The projection convolves X itself, and so each CTA of a cluster loads its share alone.
  const PlaneLoads<T, kHolds> planes(m.in_table + (kBare ? branch.first_depth : 0),
                                     kBare ? branch.mid : depth);
  grid_dependency_wait();

  const auto start_load = [&](int done, int at) {
    const int blocks = columns_from(done) / kBlock, wrap = kBare ? ring : columns;
    if (!kCaller || params.in_planes) {
      planes.start(params, m, element(done), blocks, kBare ? at : 0, wrap);
    } else {
      load_tensor(params, m,
                  TensorStep{row_start + rows_before(done), done % params.stretch, blocks * kBlock,
                             kBare ? at : 0, wrap});
    }
    cp_async_commit();
  };
  [[maybe_unused]] Held<T> held(params, rank);
  if constexpr (kShared) {
    held.fetch(params, m, element(0), columns_from(0) / kBlock);
    cp_async_wait<0>();
    sync_cluster();
    held.hand_out(params, m, columns_from(0) / kBlock);
    sync_cluster();
  } else {
    start_load(0, 0);
  }

  int ring_at = 0;  // place of element `done` in the ring
  for (int done = 0; done < end;) {
    const int count = columns_from(done), blocks = count / kBlock;
    const int next = done + count;
    bool more = next < end;  // to load
    int next_at = ring_at + count;
    if (next_at >= ring) next_at -= ring;
    int complete = row_end;
    if (more) {
      complete = heights.template complete<kStride>(row_start + rows_before(next), reach);
      if (complete > row_end) complete = row_end;
    }
    if constexpr (!kShared) {
      cp_async_wait<0>();
      sync_threads();
    }

    // First product.
    if constexpr (!kBare) {
      const auto before = [](const auto&) { return 0; };
      const auto use = [&](auto& acc, int tile, int block, int count, int) {
        activate<Act>(acc, branch.pw1_after, branch.mid, tile);
        store_lines<T, Act>(m.mid, m.mid_pitch, acc, branch.mid, tile, count,
                            ring_at + block * kBlock, ring);
      };
      const Operand<T> x{m.x, m.x_pitch, depth};
      if constexpr (Mode::kResident) {
        product<Mode>(m.pw1, m.pw1_bias, branch.mid, by_pw1, x, blocks, before, use);
      } else {
        product<Mode>(Global<const T>{branch.pw1}, m.pw1_bias, branch.mid, by_pw1, x, blocks,
                      before, use);
      }
      sync_threads();
      if (more) {
        if constexpr (kShared) {
          held.fetch(params, m, element(next), columns_from(next) / kBlock);
        } else if (params.prefetch) {
          start_load(next, next_at);
          more = false;
        }
      }
    }

    // The rows that are complete now.
    while (row < complete) {
      const int rows = complete - row < params.step_rows ? complete - row : params.step_rows;
      const int64_t first = int64_t{row} * params.out_row;
      const int dw_blocks = rows * params.out_row / kBlock;

      // Depthwise convolution. What lies in the ring ends at element `next`, at `next_at`.
      const int image = heights.by_out.divide(row), local = row - image * heights.out;
      const int center = image * heights.in + local * kStride - row_start;
      int place = next_at - (next - center * pitch);
      if (place < 0) place += ring;
      convolve_rows<T, kStride, Act, kBare && kPartial, Mode::kResident && sizeof(T) == 2>(
          params, branch, kBare ? m.x : m.mid, kBare ? m.x_pitch : m.mid_pitch,
          m.dw + branch.first_depth * m.dw_pitch, m.dw_pitch, m.dw_weights,
          Rows{rows, local, place});
      if (!apart) zero_dw();
      if constexpr (Mode::kCluster) {
        // All are past their first product and the second one before it.
        sync_cluster_reads();
        if (projects) hand_out_dw(params, m, branch, dw_blocks, rank);
        if (kShared && more && params.prefetch) {
          held.hand_out(params, m, columns_from(next) / kBlock);
          more = false;
        }
        sync_cluster();
      } else {
        sync_threads();
      }

      // Second product.
      using Planes = ResultPlanes<Mode::kTiles>;
      // Looked up before it, or after it where registers are full of columns.
      const auto before = [&](const auto& tiles) {
        return keeps && Mode::kResident ? Planes(m.out_table, tiles) : Planes{};
      };
      const auto use = [&](auto& acc, int tile, int block, int count, Planes planes) {
        activate<Act>(acc, branch.pw2_after, branch.out, tile);
        if (keeps) {
          if constexpr (!Mode::kResident) {
            const int tiles[] = {tile};
            planes = Planes(m.out_table, tiles);
          }
          store_planes<T, Act>(params, planes, acc, branch.out, tile, block, count, first);
        }
        if (kCaller && params.result != nullptr) {
          store_lines<T, Act>(m.result, m.dw_pitch, acc, branch.out, tile, count, block * kBlock,
                              m.dw_pitch);
        }
      };
      const Operand<T> x{m.dw, m.dw_pitch, branch.depth};
      if (!projects) {
        store_rows(params, m, branch, dw_blocks, first);
      } else if constexpr (Mode::kResident) {
        product<Mode>(m.pw2, m.pw2_bias, branch.out, by_pw2, x, dw_blocks, before, use);
      } else {
        product<Mode>(Global<const T>{branch.pw2}, m.pw2_bias, branch.out, by_pw2, x, dw_blocks,
                      before, use);
      }
      sync_threads();
      if (kCaller && params.result != nullptr) {
        store_result(params, m, ResultStep{image, local, rows});
        sync_threads();
      }
      row += rows;
    }
    done = next;
    ring_at = next_at;
    if (more) {
      if (!apart) zero_x();
      if constexpr (kShared) {
        sync_cluster_reads();
        held.hand_out(params, m, columns_from(next) / kBlock);
        sync_cluster();
      } else {
        start_load(next, next_at);
      }
    }
  }
}

// Threads of a CTA at most. A unit at an edge of a network has what it needs for both kinds of map,
// and registers for no more. So has one of any activations with its weights in L2, whose columns in
// registers leave no room beside them.
template <class Mode, class Act, bool kCaller>
constexpr int kThreadsOfUnit =
    kCaller || (Act::kAny && !Mode::kResident) ? kUnitThreads : kMostUnitThreads;

template <class T, int kStride, class Mode, class Act, bool kCaller>
__global__ void __launch_bounds__((kThreadsOfUnit<Mode, Act, kCaller>), 1)
    unit_kernel(UnitParams<T> params) {
  if constexpr (kStride == 2) {
    if (blockIdx.y == 1) {
      return march<T, kStride, Mode, Act, kCaller, true, false>(params, params.branches[1]);
    }
  }
  march<T, kStride, Mode, Act, kCaller, false, false>(params, params.branches[0]);
}

// A piece of a unit: of its main branch, and if that has no first product, of the projection beside
// it.
template <class T, int kStride, class Mode, bool kBare>
__global__ void __launch_bounds__((kThreadsOfUnit<Mode, AnyActivation, false>), 1)
    piece_kernel(UnitParams<T> params) {
  march<T, kStride, Mode, AnyActivation, false, kBare, true>(params, params.branches[blockIdx.y]);
}

}  // namespace snv2::SNV2_GPU

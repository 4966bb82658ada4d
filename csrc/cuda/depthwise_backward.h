// Gradients of dw_conv3x3, and of split_dw_cat_shuffle, where as many channels pass through.
//
// A CTA keeps to some channels, a thread to one, and goes through tiles of some images. Its sums
// for the parameters' gradients stay in registers all the way; at the end each CTA writes one set,
// and a second kernel adds the sets up in their order. On a tile there are two phases, in which a
// lane marches down some rows of seven columns (backward_march.h):
//   where there is a ReLU, the convolution again, for the pixels of the gradient in and around the
//   tile: it clears them, in shared memory, where the ReLU cut off;
//   grad_x, the same convolution turned round, and the sums.
//
// Contiguous: lanes take neighbouring pieces of planes, and a tile is the planes of some channels:
// one span of x, one of the gradient and two of grad_x. Channels-last: lanes take neighbouring
// channels, and the pieces one after the other. A tile is an image if that fits, else, as in
// contiguous planes that do not fit, a block of pixels; it reads two rows and columns of x around
// it, and one of the gradient, which its neighbours read too, from L2 as a rule.
#pragma once

#include <type_traits>

#include "cuda/alternate.h"
#include "cuda/backward_cut.h"

namespace snv2::SNV2_GPU {

// Loads the parameters of the CTA's channels. Returns those of the `channel`-th.
template <class T>
SNV2_DEVICE ChannelGradient load_channels(Shared<float> room, const BackwardParams<T>& params,
                                          int64_t channel0, int channels, int channel) {
  ChannelGradient of{room + channel * 9, room + (9 * params.group + channel),
                     room + (10 * params.group + channel)};
  const auto load_all = [](Shared<float> to, const float* from, int count) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      store(to + i, load(Global<const float>{from} + i));
    }
  };
  load_all(room, params.weight + channel0 * 9, channels * 9);
  load_all(room + 9 * params.group, params.scale + channel0, channels);
  load_all(room + 10 * params.group, params.shift + channel0, channels);
  return of;
}

// Adds up the CTA's sums and writes them at `to`: kDepthwiseSums rows, `row` apart, of `channels`.
// A channel has `step` threads, of which this is `which`, unless it is idle.
SNV2_DEVICE void store_sums(Shared<float> room, const ChannelGradient& of, Global<float> to,
                            int64_t row, int channels, int step, int channel, int which,
                            bool idle) {
  constexpr int kSums = static_cast<int>(kDepthwiseSums), kPart = 16;
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  const int pitch = channels | 1;  // other banks for other threads
  sync_threads();                  // room may be where the last tile lay
  if (!idle) {
    Shared<float> own = room + (which * pitch + channel);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      store(own, of.sums[i]);
      own = own + step * pitch;
    }
  }
  sync_threads();
  // Up to 16 of them by a thread.
  const Shared<float> added = room + kSums * step * pitch;
  const int parts = (step + kPart - 1) / kPart;
#pragma unroll 1
  for (int i = thread; i < channels * parts * kSums; i += team) {
    const int rest = i / channels, sum = rest / parts;
    const int begin = (rest - sum * parts) * kPart;
    const int count = step - begin < kPart ? step - begin : kPart;
    Shared<float> from = room + ((sum * step + begin) * pitch + i - rest * channels);
    float sums[2] = {};  // shorter chains round less often
#pragma unroll 4
    for (int k = 1; k < count; k += 2) {
      sums[0] += load(from);
      sums[1] += load(from + pitch);
      from = from + 2 * pitch;
    }
    if (count % 2 != 0) sums[0] += load(from);
    if (parts == 1) {
      store(to + (sum * row + i - rest * channels), sums[0] + sums[1]);
    } else {
      store(added + i, sums[0] + sums[1]);
    }
  }
  if (parts == 1) return;
  sync_threads();
  for (int i = thread; i < channels * kSums; i += team) {
    const int sum = i / channels, c = i - sum * channels;
    float total = 0.0f;
    for (int k = 0; k < parts; ++k) total += load(added + ((sum * parts + k) * channels + c));
    store(to + (sum * row + c), total);
  }
}

// Writes rows of the gradient of x from one place on: staged in shared memory, where planes are
// tiles; else with what passes through, from shared memory or not.
template <class T>
class StagedRows {
 public:
  SNV2_DEVICE StagedRows(Shared<T> at, int row) : at_(at), row_(row) {}
  template <class Shape, int N>
  SNV2_DEVICE void put(const float (&values)[N], int count) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!Shape::kWhole && i >= count) break;
      store(at_ + i, rounded<T>(values[i]));
    }
    at_ = at_ + row_;
  }

 private:
  Shared<T> at_;
  int row_;
};
template <class T, bool kPassthrough, class From, int kFromPixel>
class GlobalRows {
 public:
  SNV2_DEVICE GlobalRows(Global<T> main, int64_t to_pass, int64_t row, int64_t pixel, From passed,
                         int64_t passed_row)
      : main_(main),
        to_pass_(to_pass),
        row_(row),
        pixel_(pixel),
        passed_(passed),
        passed_row_(passed_row) {}
  template <class Shape, int N>
  SNV2_DEVICE void put(const float (&values)[N], int count) {
    Global<T> at = main_;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!Shape::kWhole && i >= count) break;
      store(at, rounded<T>(values[i]));
      if constexpr (kPassthrough) store(at + to_pass_, load(passed_ + i * kFromPixel));
      at = at + pixel_;
    }
    main_ = main_ + row_;
    if constexpr (kPassthrough) passed_ = passed_ + passed_row_;
  }

 private:
  Global<T> main_;
  int64_t to_pass_, row_, pixel_;
  From passed_;
  int64_t passed_row_;
};

// Loads a span by the usual number of threads, or any.
template <class T>
SNV2_DEVICE Shared<T> load_by_team(Shared<unsigned char> room, Global<const T> from, int count) {
  if (blockDim.x == kLeastThreads) return load_span<kLeastThreads>(room, from, count);
  return load_span<kAnyTeam>(room, from, count);
}
// Stores one.
template <class T>
SNV2_DEVICE void store_by_team(Global<T> to, Shared<T> from, int count) {
  if (blockDim.x == kLeastThreads) return store_span<kLeastThreads>(to, from, count);
  store_span<kAnyTeam>(to, from, count);
}

// A tile, and what this thread takes of it: every step-th piece of a channel.
template <class T, int kUnit, bool kChannelLanes>
struct BackwardTile {
  Extent rows, columns;
  Block<T, kChannelLanes ? kWarp : 1> x;
  Block<T, kChannelLanes ? kUnit * kWarp : 1> grad;
  Shared<T> zeros;
  int height;
  int first, step;
};

template <int kStride, class Shape, class Tile, class ResultsAt>
SNV2_DEVICE void march_tile(const Tile& tile, ChannelGradient& of, bool relu, bool idle,
                            const ResultsAt& results_at) {
  if (relu) {
    if (!idle) {
      for_pieces<Shape>(tile.first, tile.step, tile.grad.rows, tile.grad.columns,
                        [&](const Piece& piece) {
                          cut<kStride, Shape>(tile.x, tile.grad, of, piece, tile.height);
                        });
    }
    sync_threads();
  }
  if (idle) return;
  const auto of_stride = [](const Extent& e) {
    return Extent{e.begin / kStride, (e.end + kStride - 1) / kStride};
  };
  for_pieces<Shape>(tile.first, tile.step, of_stride(tile.rows), of_stride(tile.columns),
                    [&](const Piece& piece) {
                      turn_round<Shape>(
                          std::integral_constant<int, kStride>{}, tile.x, tile.grad, tile.zeros, of,
                          piece, tile.height,
                          results_at(kStride * piece.rows.begin, kStride * piece.column));
                    });
}

template <class T, bool kPassthrough, int kStride, bool kChannelLanes>
__global__ void __launch_bounds__(kMostThreads, kLeastCtas)
    backward_kernel(BackwardParams<T> params) {
  constexpr int kUnit = kPassthrough ? 2 : 1;  // channels of grad for each of the convolution's
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const int warp = warp_uniform(thread / kWarp);
  const int team = static_cast<int>(blockDim.x), warps = team / kWarp;
  const Shared<unsigned char> memory = shared_memory();
  const int channel0 =
      static_cast<int>(blockIdx.x % static_cast<uint32_t>(params.groups)) * params.group;
  const int64_t part = blockIdx.x / static_cast<uint32_t>(params.groups);
  const int channels_left = static_cast<int>(params.channels) - channel0;
  const int channels = channels_left < params.group ? channels_left : params.group;
  const bool planes = !kChannelLanes && params.planes;

  BackwardTile<T, kUnit, kChannelLanes> tile{};
  tile.height = params.height;
  tile.step = params.step;
  // Channels-last: which 32 channels the warp loads.
  const int blocks = kChannelLanes ? params.group / kWarp : 1, lanes = warp % blocks;
  const int channel = kChannelLanes ? thread % channels : thread / params.step;
  tile.first = kChannelLanes ? thread / channels : thread % params.step;
  const bool idle = channel >= channels || tile.first >= params.step;
  ChannelGradient of = load_channels((memory + params.parameters_at).template as<float>(), params,
                                     channel0, channels, channel);
  constexpr int kZeros = decltype(tile.grad)::kPixel;
  const Shared<T> zeros = (memory + params.zeros_at).template as<T>();
  for (int i = thread; i < zeros_of(kZeros); i += team) store(zeros + i, T{});
  tile.zeros = zeros + kZeros;

  const int64_t run = params.run + (part < params.longer ? 1 : 0);
  const int64_t first_tile = part * params.run + (part < params.longer ? part : params.longer);
  int64_t image = first_tile;
  int down = 0, across = 0;
  if (params.tiles_down * params.tiles_across > 1) {
    across = static_cast<int>(first_tile % params.tiles_across);
    down = static_cast<int>(first_tile / params.tiles_across % params.tiles_down);
    image = first_tile / params.tiles_across / params.tiles_down;
  }
  for (int64_t i = 0; i < run; ++i) {
    const int row = down * params.rows, column = across * params.columns;
    tile.rows = Extent{row, row + params.rows}.with_halo(0, params.height);
    tile.columns = Extent{column, column + params.columns}.with_halo(0, params.width);
    const int halo = params.relu ? 2 : 0;  // of x
    tile.x.rows = tile.rows.with_halo(halo, params.height);
    tile.x.columns = tile.columns.with_halo(halo, params.width);
    tile.grad.rows = tile.rows.with_halo(1, params.height).results(kStride);
    tile.grad.columns = tile.columns.with_halo(1, params.width).results(kStride);
    const Global<const T> grad_pass =
        Global<const T>{params.grad.data} + params.grad.at(image, channel0, 0, 0);
    const Global<const T> grad_main = grad_pass + params.grad.main;
    const Global<const T> x =
        Global<const T>{params.x.data} + (params.x.at(image, channel0, 0, 0) + params.x.main);
    const Global<T> out_pass =
        Global<T>{params.grad_x.data} + params.grad_x.at(image, channel0, 0, 0);
    const Global<T> out_main = out_pass + params.grad_x.main;

    // Load. What passes through comes along, but for blocks of contiguous planes.
    const Shared<unsigned char> grad_memory = memory + params.grad_at;
    Shared<T> loaded = grad_memory.template as<T>();
    const int plane = tile.grad.pixels();
    if (planes) {
      tile.x.data = load_by_team(memory, x, channels * tile.x.pixels()) + channel * tile.x.pixels();
      loaded = load_by_team(grad_memory, grad_pass, channels * kUnit * plane);
      tile.grad.data = loaded + (kUnit * channel + kUnit - 1) * plane;
    } else if (kChannelLanes) {
      const int left = channels - lanes * kWarp;
      const int of_lanes = left < 0 ? 0 : left < kWarp ? left : kWarp;
      const Shared<T> x_to = (memory + lanes * params.x_bytes).template as<T>();
      const Shared<T> grad_to = (grad_memory + lanes * params.grad_bytes).template as<T>();
      const int mate = warp / blocks * kWarp + lane, mates = warps / blocks * kWarp;
      load_pixels<kWarp>(x_to, tile.x.rows, tile.x.columns, params.x, x + lanes * kWarp, of_lanes,
                         params.copy_x, mate, mates);
      load_pixels<kUnit * kWarp>(grad_to, tile.grad.rows, tile.grad.columns, params.grad,
                                 grad_pass + lanes * kUnit * kWarp, kUnit * of_lanes,
                                 params.copy_grad, mate, mates);
      const int block = channel / kWarp, at = channel % kWarp;
      tile.x.data = (memory + block * params.x_bytes).template as<T>() + at;
      tile.grad.data =
          (grad_memory + block * params.grad_bytes).template as<T>() + (kUnit * at + kUnit - 1);
    } else {
      tile.x.data = memory.template as<T>();
      tile.grad.data = loaded;
      if constexpr (!kChannelLanes) {
        load_rows(tile.x, params.x, x, params.copy_x);
        load_rows(tile.grad, params.grad, grad_main, params.copy_grad);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute.
    const Shared<T> staged_pass =
        (memory + (params.pass_at + misalignment(out_pass, 16))).template as<T>();
    const Shared<T> staged_main =
        (memory + (params.main_at + misalignment(out_main, 16))).template as<T>();
    const auto march = [&](auto shape, const auto& results_at) {
      march_tile<kStride, decltype(shape)>(tile, of, params.relu, idle, results_at);
    };
    const auto march_whole = [&](const auto& results_at) {
      if (!params.whole) {
        march(Pieces<false>{}, results_at);
      } else {
        march(Pieces<true>{}, results_at);
      }
    };
    const int64_t to_pass = -params.grad_x.main;
    if constexpr (kChannelLanes) {
      using Rows = GlobalRows<T, kPassthrough, Shared<T>, kUnit * kWarp>;
      march_whole([&](int y, int x) {
        const Shared<T> passed = kPassthrough ? tile.grad.at(y, x) + -1 : tile.grad.data;
        return Rows(out_main + params.grad_x.at(0, channel, y, x), to_pass, params.grad_x.row,
                    params.grad_x.pixel, passed, tile.grad.pitch());
      });
    } else if (planes) {
      march_whole([&](int y, int x) {
        const int at = (channel * params.height + y) * params.width + x;
        return StagedRows<T>(staged_main + at, params.width);
      });
      if constexpr (kPassthrough) {
        if (!params.stages_pass) {
#pragma unroll 1
          for (int k = warp; k < channels; k += warps) {
            const Global<T> to = out_pass + k * plane;
            const Shared<T> from = loaded + 2 * k * plane;
            if (params.unit == kSector) {
              constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kStep = kWarp * kVector;
              move_vectors<kWarp>(
                  to + lane * kVector, from + lane * kVector, plane / kVector - lane, kStep,
                  [](auto t, auto f, auto n) { copy_out<kVector, kStep>(t, f, n); });
            } else {
              copy_units<1>(to, from, 0, plane);
            }
          }
        } else {
          // A share of the planes by each warp.
          const int begin = channels * warp / warps, last = channels * (warp + 1) / warps;
          spread_planes<true>(staged_pass + begin * plane, loaded + 2 * begin * plane, plane,
                              last - begin, params.unit);
        }
      }
    } else {
      using Rows = GlobalRows<T, kPassthrough, Global<const T>, 1>;
      march(Pieces<false>{}, [&](int y, int x) {
        return Rows(out_main + params.grad_x.at(0, channel, y, x), to_pass, params.grad_x.row, 1,
                    grad_pass + params.grad.at(0, channel, y, x), params.grad.row);
      });
    }
    sync_threads();

    // Store.
    if (planes) {
      const int count = channels * tile.x.pixels();
      if constexpr (kPassthrough) {
        if (params.stages_pass) store_by_team(out_pass, staged_pass, count);
      }
      store_by_team(out_main, staged_main, count);
    }
    if (++across < params.tiles_across) continue;
    across = 0;
    if (++down < params.tiles_down) continue;
    down = 0;
    ++image;
  }
  const int64_t pitch = sums_pitch(params.channels);
  store_sums(memory.template as<float>(), of,
             Global<float>{params.sums} + (part * kDepthwiseSums * pitch + channel0), pitch,
             channels, tile.step, channel, tile.first, idle);
}

}  // namespace snv2::SNV2_GPU

// Squeeze-and-excite and the shortcut behind it in one launch, in place:
// planes = activation(planes * expand(reduce(their means)) + other planes).
//
// A CTA has an image; where there are clusters, the CTAs of one share its channels in tiles of 16,
// so that a small batch fills the GPU and a CTA's planes fit in its shared memory: then they are
// read once and written once, else they are read again, from L2. Each CTA multiplies its means by
// its columns of the first matrix and hands the sums to the others, which add them up in the order
// of ranks; its channels are rows of the second matrix. So the weights are read once for each
// image. Without matrices CTAs that share an image have nothing to tell each other, and there are
// as many as there are SMs for.
//
// Added planes are read once, at the end. An image's lines are whole vectors, with the padding of
// rows, which is scaled as pixels are; the means are of pixels alone.
//
// Matrices are as the tensor cores' kernels read them (mma.h), and their fragments are multiplied
// by one column on the ordinary cores, in float32.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/network.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int kGateThreads = 512;
constexpr int kGateWarps = kGateThreads / kWarp;

// Where a CTA's arrays lie in shared memory, in bytes; means are at 0.
struct GatePlaces {
  int table, sources, partial, sums, hidden, gates, held;
};

template <class T>
struct GateParams {
  T* planes;
  int64_t pitch;         // of planes
  const int32_t* table;  // [channels], and behind it as many of the planes that are added
  bool adds;
  const T* reduce;  // packed [reduced, channels]
  const T* expand;  // packed [channels, reduced]
  const float* reduce_bias;
  const float* expand_bias;
  After reduce_after, expand_after, after;
  int channels, reduced;  // reduced: 0 where nothing is scaled
  int plane, row, width;  // elements of an image's line and of a row, and pixels of a row
  float pixels;           // of an image
  int ctas;               // that share an image, those of a cluster where there are clusters
  int parts;              // that the first product's sums are made of, in each CTA
  int held_bytes;         // of a plane that is kept in shared memory, or 0
  GatePlaces at;
};

// Calls use(i, fetch(i)) for the 16-byte vectors that this lane has of a line of `count` elements.
// kAhead vectors are fetched before one is used: for all that a compiler knows, what is stored
// might be what is fetched next.
template <class T, int kAhead, class Fetch, class Use>
SNV2_DEVICE void for_each_of_lane(int count, const Fetch& fetch, const Use& use) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  // Signed: of lane_of_warp() the compiler spills a register in bfloat16.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int first = lane * kVector; first < count; first += kAhead * kWarp * kVector) {
    decltype(fetch(0)) fetched[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * kWarp * kVector;
      if (i < count) fetched[k] = fetch(i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * kWarp * kVector;
      if (i < count) use(i, fetched[k]);
    }
  }
}

// Returns the sum of the first `count` elements.
template <class T, int N>
SNV2_DEVICE float sum_of(const Vector<T, N>& v, int count) {
  float sums[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = i < count ? to_float(v.values[i]) : 0.0f;
#pragma unroll
  for (int n = N / 2; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  return sums[0];
}

// Rows g and g + 8 of a row of tiles, g = lane / 4, times tiles `first`, first + step, ... of x.
template <class T>
SNV2_DEVICE Vector<float, 2> times(Global<const T> tiles, Shared<float> x, int first, int end,
                                   int step) {
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  float low = 0.0f, high = 0.0f;
  for (int k = first; k < end; k += step) {
    const Global<const T> tile = tiles + k * kTileElements<T>;
    const Shared<float> column = x + k * kTileDepth<T>;
    if constexpr (sizeof(T) == 4) {
      const Vector<T, 2> w = load_vector<2>(tile + (g * 8 + t * 2));
      const float value = load(column + t);
      low = multiply_add(w.values[0], value, low);
      high = multiply_add(w.values[1], value, high);
    } else {
      const Vector<T, 8> w = load_vector<8>(tile + lane * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = load(column + (i / 2 * 8 + 2 * t + i % 2));
        const int at = i / 2 * 4 + i % 2;
        low = multiply_add(to_float(w.values[at]), value, low);
        high = multiply_add(to_float(w.values[at + 2]), value, high);
      }
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    low += shuffle_xor(low, lanes);
    high += shuffle_xor(high, lanes);
  }
  return {{low, high}};
}

SNV2_DEVICE float gated(const After& after, float x, int row) {
  if (after.kind == Activation::kSigmoid) return sigmoid(x);
  if (after.kind == Activation::kHardsigmoid) return hardsigmoid(x);
  return activated(after.kind, x, slope_of(after, row));
}

// The channels of an image that a CTA has, begin to end, and where their lines are.
template <class T>
struct Share {
  const GateParams<T>& params;
  Shared<unsigned char> memory;
  int64_t image;
  int rank, begin, end;

  SNV2_DEVICE Shared<float> floats(int at) const { return (memory + at).template as<float>(); }
  SNV2_DEVICE Shared<int32_t> table(int at) const { return (memory + at).template as<int32_t>(); }
  // Of the plane that a table has for channel c.
  SNV2_DEVICE Global<T> line(int table_at, int c) const {
    const int64_t at = load(table(table_at) + (c - begin));
    return Global<T>{params.planes} + (at * params.pitch + image * params.plane);
  }
  SNV2_DEVICE Shared<T> held(int c) const {
    return (memory + (params.at.held + (c - begin) * params.held_bytes)).template as<T>();
  }
};

// Leaves the gates of a CTA's channels in shared memory, and their lines where those are held.
template <class T, bool kCluster>
SNV2_DEVICE void compute_gates(const GateParams<T>& params, const Share<T>& share) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int rank = share.rank, ranks = kCluster ? params.ctas : 1;
  const int begin = share.begin, end = share.end;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_of_cta(), lane = lane_of_warp();
  const int plane = params.plane, channels = params.channels;
  const int rows = (params.reduced + 15) / 16 * 16;
  const Shared<float> means = share.floats(0);
  const Shared<float> partial = share.floats(params.at.partial);
  const Shared<float> sums = share.floats(params.at.sums);
  const Shared<float> hidden = share.floats(params.at.hidden);
  const Shared<float> gates = share.floats(params.at.gates);

  // Means. A lane meets the same elements again below.
  for (int c = begin + warp; c < end; c += kGateWarps) {
    float sum = 0.0f;
    if (c < channels) {
      const Global<T> line = share.line(params.at.table, c);
      const Global<const T> from{line.address};
      const Shared<T> held = share.held(c);
      for_each_of_lane<T, 4>(
          plane, [&](int i) { return load_vector<kVector>(from + i); },
          [&](int i, const Vector<T, kVector>& v) {
            if (params.held_bytes > 0) store_vector<kVector>(held + i, v);
            sum += sum_of(v, params.width - i % params.row);
          });
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (lane == 0) store(means + (c - begin), sum * (1.0f / params.pixels));
  }
  sync_threads();

  // First product, by tiles of rows and parts of this CTA's columns.
  const int deep = (channels + kTileDepth<T> - 1) / kTileDepth<T>;
  const int first = begin / kTileDepth<T>;
  const int columns = (end / kTileDepth<T> < deep ? end / kTileDepth<T> : deep) - first;
  for (int task = warp; task < rows / 16 * params.parts; task += kGateWarps) {
    const int tile = task / params.parts, part = task % params.parts;
    const Global<const T> row =
        Global<const T>{params.reduce} + (int64_t{tile} * deep + first) * kTileElements<T>;
    const Vector<float, 2> sum = times<T>(row, means, part, columns, params.parts);
    if (lane % 4 == 0) {
      const Shared<float> to = partial + (part * rows + tile * 16 + lane / 4);
      store(to, sum.values[0]);
      store(to + 8, sum.values[1]);
    }
  }
  sync_threads();
  for (int r = thread; r < rows; r += kGateThreads) {
    float sum = 0.0f;
    for (int part = 0; part < params.parts; ++part) sum += load(partial + (part * rows + r));
    for (int other = 0; other < ranks; ++other) {
      const Shared<float> to = sums + (rank * rows + r);
      if constexpr (kCluster) {
        store(remote(to, other), sum);
      } else {
        store(to, sum);
      }
    }
  }
  if constexpr (kCluster) {
    sync_cluster();
  } else {
    sync_threads();
  }
  for (int r = thread; r < rows; r += kGateThreads) {
    float value = 0.0f;
    if (r < params.reduced) {
      float sum = load(Global<const float>{params.reduce_bias} + r);
      for (int other = 0; other < ranks; ++other) sum += load(sums + (other * rows + r));
      value = gated(params.reduce_after, sum, r);
    }
    store(hidden + r, value);
  }
  sync_threads();

  // Second product.
  const int depth = (params.reduced + kTileDepth<T> - 1) / kTileDepth<T>;
  for (int tile = begin / 16 + warp; tile < end / 16; tile += kGateWarps) {
    const Global<const T> row =
        Global<const T>{params.expand} + int64_t{tile} * depth * kTileElements<T>;
    const Vector<float, 2> sum = times<T>(row, hidden, 0, depth, 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = tile * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && c < channels) {
        const float bias = load(Global<const float>{params.expand_bias} + c);
        store(gates + (c - begin), gated(params.expand_after, sum.values[half] + bias, c));
      }
    }
  }
  sync_threads();
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kGateThreads, 2) gate_kernel(GateParams<T> params) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int cta = static_cast<int>(blockIdx.x), rank = cta % params.ctas;
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = params.channels, tiles = (channels + 15) / 16;
  const int begin = tiles * rank / params.ctas * 16, end = tiles * (rank + 1) / params.ctas * 16;
  const Share<T> share{params, shared_memory(), cta / params.ctas, rank, begin, end};
  for (int c = begin + thread; c < end && c < channels; c += kGateThreads) {
    const Global<const int32_t> entry = Global<const int32_t>{params.table} + c;
    store(share.table(params.at.table) + (c - begin), load(entry));
    if (params.adds) store(share.table(params.at.sources) + (c - begin), load(entry + channels));
  }
  grid_dependents_launch();
  if constexpr (kCluster) {
    sync_cluster_reads();  // the others have begun
  } else {
    sync_threads();
  }
  grid_dependency_wait();
  const bool scales = params.reduced > 0;
  if (scales) compute_gates<T, kCluster>(params, share);

  // Scale, add.
  for (int c = begin + warp_of_cta(); c < end && c < channels; c += kGateWarps) {
    const float gate = scales ? load(share.floats(params.at.gates) + (c - begin)) : 1.0f;
    const float slope = slope_of(params.after, c);
    const Global<T> line = share.line(params.at.table, c);
    const Global<const T> from{line.address};
    const Global<const T> source{params.adds ? share.line(params.at.sources, c).address
                                             : line.address};
    const Shared<T> held = share.held(c);
    with_activation(params.after.kind, [&](const auto& act) {
      const auto finish = [&](T value, T added) {
        return rounded<T>(act(multiply_add(to_float(value), gate, to_float(added)), slope));
      };
      struct Pair {
        Vector<T, kVector> value, added;
      };
      for_each_of_lane<T, 2>(
          params.plane,
          [&](int i) {
            Pair pair{params.held_bytes > 0 ? load_vector<kVector>(held + i)
                                            : load_vector<kVector>(from + i),
                      {}};
            if (params.adds) pair.added = load_vector<kVector>(source + i);
            return pair;
          },
          [&](int i, const Pair& pair) {
            Vector<T, kVector> v;
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
              v.values[k] = finish(pair.value.values[k], pair.added.values[k]);
            }
            store_vector<kVector>(line + i, v);
          });
    });
  }
}

// How a gate is cut.
struct GateCut {
  int64_t ctas = 1, parts = 1;  // see GateParams
  int64_t held_bytes = 0;
  int64_t shared_bytes = 0;
  GatePlaces at = {};
};

struct GateShape {
  int64_t batch, channels, reduced, plane, size, tile_depth;  // plane: with padding
  bool adds;

  bool scales() const { return reduced > 0; }
};

GateCut place(const GateShape& s, int64_t ctas, bool held) {
  GateCut c;
  c.ctas = ctas;
  const int64_t share = ceil_div(ceil_div(s.channels, kTileRows), ctas) * kTileRows;
  const int64_t rows = padded_rows(s.reduced);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += ceil_div(bytes, 16) * 16;
    return static_cast<int>(here);
  };
  const int64_t means = s.scales() ? share * 4 : 0;
  take(means);
  c.at.table = take(share * 4);
  c.at.sources = take(s.adds ? share * 4 : 0);
  if (s.scales()) {
    c.parts = std::clamp<int64_t>(kGateWarps / (rows / kTileRows), 1, share / s.tile_depth);
  }
  c.at.partial = take(c.parts * rows * 4);
  c.at.sums = take(ctas * rows * 4);
  c.at.hidden = take(rows * 4);
  c.at.gates = take(means);
  // 16 bytes apart, modulo 32: lines of neighbours then begin in different banks.
  c.held_bytes = held ? (s.plane * s.size) | 16 : 0;
  c.at.held = take(share * c.held_bytes);
  c.shared_bytes = at;
  return c;
}

// The fewest CTAs for an image, a cluster where they multiply, of which an SM can hold the planes
// of two, or more where SMs would stand idle. Planes that are not averaged are read only once.
GateCut choose(const GateShape& s, const Device& device) {
  const auto fits = [&](const GateCut& c) {
    const int64_t ctas = s.batch * c.ctas > device.sms ? 2 : 1;
    return c.shared_bytes <= device.shared_per_cta &&
           ctas * (c.shared_bytes + device.reserved_per_cta) <= device.shared_per_sm;
  };
  const int64_t tiles = ceil_div(s.channels, kTileRows);
  const int64_t most = s.scales() ? std::min(device.cluster, tiles) : tiles;
  int64_t ctas = 1;
  while (2 * ctas <= most &&
         (2 * ctas * s.batch <= device.sms || !fits(place(s, ctas, s.scales())))) {
    ctas *= 2;
  }
  for (const bool held : {s.scales(), false}) {
    const GateCut c = place(s, ctas, held);
    if (fits(c)) return c;
  }
  throw std::invalid_argument("x: a gate of " + std::to_string(s.channels) + " channels and " +
                              std::to_string(s.reduced) +
                              " inside is too large for the shared memory of this device");
}

template <class T>
void gate(const StepCall& call, LaunchInfo* info) {
  constexpr DType dtype = dtype_of<T>();
  const GpuStep& step = *call.step;
  const GateShape s{call.batch,
                    step.out_channels,
                    step.mid_channels,
                    call.out.image,
                    sizeof(T),
                    kTileDepth<T>,
                    step.in_channels > step.out_channels};
  const GateCut c = choose(s, call.device);
  const int64_t cluster = s.scales() ? c.ctas : 1;
  if (s.batch * c.ctas > kMaxGrid) throw std::invalid_argument("x: too many images for a gate");
  const int64_t map_bytes = s.batch * s.channels * s.plane * s.size;
  const int64_t reduce_bytes = packed_elements(s.reduced, s.channels, dtype) * s.size;
  const int64_t expand_bytes = packed_elements(s.channels, s.reduced, dtype) * s.size;
  if (info != nullptr) {
    info->kernel = "gate";
    info->ctas = s.batch * c.ctas;
    info->threads = kGateThreads;
    info->shared_bytes = c.shared_bytes;
    info->columns = s.plane;
    info->cluster = cluster;
    info->launches = 1;
    info->read_bytes = map_bytes * (1 + (s.scales() && c.held_bytes == 0) + s.adds);
    info->written_bytes = map_bytes;
    info->weight_bytes = s.batch * (reduce_bytes + expand_bytes +
                                    (s.scales() ? cluster * s.reduced + s.channels : 0) * 4);
    info->multiply_adds = s.batch * (reduce_bytes + expand_bytes) / s.size;
    return;
  }

  GateParams<T> params{};
  params.planes = static_cast<T*>(call.out.data);
  params.pitch = call.out.channel;
  params.table = call.arrays.tables + step.in_table;
  params.adds = s.adds;
  params.reduce = static_cast<const T*>(call.arrays.weights) + step.pw1_weights;
  params.expand = static_cast<const T*>(call.arrays.weights) + step.pw2_weights;
  params.reduce_bias = call.arrays.parameters + step.pw1_bias;
  params.expand_bias = call.arrays.parameters + step.pw2_bias;
  const auto after = [&](const GpuActivation& act) {
    return After{act.kind, call.arrays.parameters + act.slopes};
  };
  params.reduce_after = after(step.pw1_activation);
  params.expand_after = after(step.pw2_activation);
  params.after = after(step.dw_activation);
  params.channels = static_cast<int>(s.channels);
  params.reduced = static_cast<int>(s.reduced);
  params.plane = static_cast<int>(s.plane);
  params.row = static_cast<int>(call.out.row);
  params.width = static_cast<int>(call.width);
  params.pixels = static_cast<float>(call.height * call.width);
  params.ctas = static_cast<int>(c.ctas);
  params.parts = static_cast<int>(c.parts);
  params.held_bytes = static_cast<int>(c.held_bytes);
  params.at = c.at;

  std::vector<Buffer> buffers{constants(params.table, step.in_channels * 4),
                              updates(params.planes, call.out.channels * params.pitch * s.size,
                                      map_bytes * (1 + s.adds), map_bytes)};
  if (s.scales()) {
    buffers.push_back(constants(params.reduce, reduce_bytes));
    buffers.push_back(constants(params.expand, expand_bytes));
    buffers.push_back(constants(params.reduce_bias, s.reduced * 4));
    buffers.push_back(constants(params.expand_bias, s.channels * 4));
  }
  const auto slopes = [&](const After& layer, int64_t rows) {
    if (layer.kind == Activation::kPrelu) buffers.push_back(constants(layer.slopes, rows * 4));
  };
  slopes(params.reduce_after, s.reduced);
  slopes(params.expand_after, s.channels);
  slopes(params.after, s.channels);
  Launch config;
  config.grid_x = static_cast<uint32_t>(s.batch * c.ctas);
  config.threads = kGateThreads;
  config.cluster = static_cast<uint32_t>(cluster);
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  launch(config, buffers, cluster > 1 ? gate_kernel<T, true> : gate_kernel<T, false>, params);
}

}  // namespace

void run_gate(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) { gate<decltype(zero)>(call, info); });
}

}  // namespace snv2::SNV2_GPU

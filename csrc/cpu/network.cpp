// Runs a plan on the CPU.
//
// All threads go through the steps together (team.h). With at least as many images as threads, each
// takes whole images through all steps and never waits for another; the images left over, and small
// batches, are split inside each step, over rows or panels. Cut into rows, a unit is one parallel
// step: a thread's last product needs its own depthwise rows only, and maps stay in the caches of
// the thread that made them. Cut into panels it is two, with the depthwise result of all threads
// between them; that is for maps of few rows, where the rows of the first product that neighbours
// share would cost more. A gate is three: means of planes, the products behind them, and
// scaling; without products it is the last alone.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/network_memory.h"
#include "cpu/team.h"
#include "cpu/unit_grid.h"

namespace snv2::cpu {
namespace {

// Multiply-adds below which another thread costs more than it saves.
constexpr int64_t kMinWork = 50'000;

Act act_of(const Layer& layer, const float* weights) {
  return {static_cast<Activation>(layer.activation), weights + layer.slopes};
}

// Offsets of planes in a buffer of `pixels` pixels.
void plane_offsets(const int64_t* planes, int64_t count, int64_t pixels, int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t plane = planes[i];
    offsets[i] = static_cast<int32_t>((plane / kPanel) * pixels * kPanel + plane % kPanel);
  }
}

// Of the words of consecutive planes, all of the same number; returns their count.
int64_t consecutive_offsets(int64_t channels, int64_t planes, int64_t pixels, int32_t* offsets) {
  const int64_t count = ceil_div(channels, planes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t plane = i * planes;
    plane_offsets(&plane, 1, pixels, offsets + i);
  }
  return count;
}

// Takes one image through all steps but the last product of the head, which runs once for all
// images.
template <class T>
class ImageRunner {
 public:
  ImageRunner(const Plan& plan, const MapKernels<T>& kernels, const float* weights,
              const FeatureMap& x, const FeatureMap* results, const Memory& memory,
              float* workspace, T* features, Team& team)
      : plan_(plan),
        kernels_(kernels),
        weights_(weights),
        x_(x),
        results_(results),
        memory_(memory),
        features_(features),
        parallel_for_(team) {
    current_ = reinterpret_cast<T*>(workspace);
    spare_ = reinterpret_cast<T*>(workspace += memory.buffer);
    depthwise_ = reinterpret_cast<T*>(workspace += memory.buffer);
    workspace += memory.depthwise;
    offsets_ = reinterpret_cast<int32_t*>(workspace + team.member * memory.offsets);
    scratch_ = workspace + team.threads * memory.offsets;
  }

  void run(int64_t image) {
    image_ = image;
    extent_ = {x_.height, x_.width};
    result_ = results_;
    for (const Step& step : plan_) {
      if (step.new_buffer) panels_ = step.buffer_panels;
      switch (step.kind) {
        case StepKind::kImport:
          import(step);
          break;
        case StepKind::kStem:
          stem(step);
          break;
        case StepKind::kUnit:
          unit(step);
          break;
        case StepKind::kGate:
          gate(step);
          break;
        case StepKind::kHead:
          head(step);
          break;
        case StepKind::kExport:
          export_planes(step);
          break;
      }
      extent_ = extent_after(step, extent_);
    }
  }

 private:
  static constexpr int64_t kWordPlanes = sizeof(float) / sizeof(T);

  int64_t threads_for(int64_t multiply_adds) const {
    return std::min(parallel_for_.threads, 1 + multiply_adds / kMinWork);
  }

  float* scratch(int64_t thread) const { return scratch_ + thread * memory_.scratch; }

  void import(const Step& step) {
    const Branch& main = step.main;
    const int64_t pixels = extent_.pixels();
    const int64_t parts = std::min(threads_for(pixels * main.in_channels * 8), pixels);
    parallel_for_(parts, [&](int64_t i) {
      kernels_.import_planes(x_, image_, plan_.table(main.in_table), main.out_channels,
                             weights_ + main.dw.weights, current_, part_of(pixels, parts, i));
    });
  }

  Act act(const Layer& layer) const { return act_of(layer, weights_); }

  const Block* blocks(const Layer& layer) const {
    return reinterpret_cast<const Block*>(plan_.table(layer.blocks));
  }

  // Multiply-adds of a pixel.
  int64_t work_of(const Layer& layer, int64_t depth, int64_t outputs) const {
    if (layer.block_count == 0) return depth * outputs;
    int64_t work = 0;
    for (int64_t i = 0; i < layer.block_count; ++i) {
      work += blocks(layer)[i].depth * blocks(layer)[i].outputs;
    }
    return work;
  }

  void stem(const Step& step) {
    const Branch& main = step.main;
    stem_offsets(ceil_div(main.in_channels, kWordPlanes), kWordPlanes, extent_.width, offsets_);
    const Stem<T> op{
        x_,       image_,        weights_ + main.pw1.weights, main.out_channels, offsets_,
        current_, act(main.pw1), weights_ + main.dw.weights};
    const int64_t rows = op.out_height();
    const int64_t work = 4 * rows * op.out_width() * 9 * main.in_channels * main.out_channels;
    const int64_t parts = std::min(threads_for(work), rows);
    parallel_for_(parts,
                  [&](int64_t i) { kernels_.stem(op, part_of(rows, parts, i), scratch(i)); });
  }

  // A branch of a unit as its kernels take it.
  struct Lane {
    int64_t parts = 0;
    int64_t panels = 0;  // of the depthwise result, or of the average
    ExpandDepthwise<T> expand{};
    PanelDepthwise<T> depthwise{};
    AveragePool<T> pool{};
    Pointwise<T, T> pw2{};
  };

  // Offsets and the depthwise result take memory from the front of what is given.
  Lane lane(const Branch& branch, int64_t stride, Extent out, T* result, int32_t*& offsets,
            T*& scratch) const {
    Lane lane;
    lane.parts = branch.parts;
    if (branch.parts == 0) return lane;
    const int64_t out_panel = out.pixels() * kPanel;
    T* const y = result + branch.out_panel * out_panel;
    if ((branch.parts & kPool) != 0) {
      lane.panels = branch.in_channels;
      lane.pool = {current_,
                   plan_.table(branch.in_table),
                   {extent_.height, extent_.width, stride},
                   (branch.parts & kPoolInside) != 0,
                   act(branch.dw),
                   y};
      return lane;
    }
    const bool expands = (branch.parts & kExpand) != 0;
    const bool depthwise = (branch.parts & kDepthwise) != 0;
    const auto words = [&](int64_t table, int64_t count, int64_t pixels) {
      int32_t* const taken = offsets;
      plane_offsets(plan_.table(table), count, pixels, taken);
      offsets += count;
      return taken;
    };
    const int32_t* const in = depthwise && !expands
                                  ? nullptr
                                  : words(branch.in_table, branch.in_channels, extent_.pixels());
    if (depthwise) {
      lane.panels = panels_of(branch.mid_channels);
      const Depthwise<T> dw{weights_ + branch.dw.weights, act(branch.dw),
                            depthwise_shape(branch, extent_, stride), meets(branch) ? scratch : y};
      if (expands) {
        lane.expand = {
            {current_, in, branch.in_channels, branch.mid_channels, weights_ + branch.pw1.weights,
             nullptr, 0, 0, act(branch.pw1), blocks(branch.pw1), branch.pw1.block_count},
            dw};
      } else {
        lane.depthwise = {current_, plan_.table(branch.in_table), dw};
      }
    }
    if ((branch.parts & kProject) != 0) {
      lane.pw2 = {depthwise ? scratch : current_,
                  depthwise ? words(branch.table, branch.depth, out.pixels()) : in,
                  depthwise ? branch.depth : branch.in_channels,
                  branch.out_channels,
                  weights_ + branch.pw2.weights,
                  y,
                  out_panel,
                  out.pixels(),
                  act(branch.pw2),
                  blocks(branch.pw2),
                  branch.pw2.block_count,
                  current_,
                  branch.added_panels > 0 ? plan_.table(branch.added) : nullptr};
    }
    if (meets(branch)) scratch += lane.panels * out_panel;
    return lane;
  }

  void unit(const Step& step) {
    const Extent out = extent_.strided(step.stride);
    T* const result = step.new_buffer ? spare_ : current_;
    int32_t* offsets = offsets_;
    T* free = depthwise_;
    const Lane lanes[] = {lane(step.main, step.stride, out, result, offsets, free),
                          lane(step.projection, step.stride, out, result, offsets, free)};

    const int64_t panels = panels_of((step.main.parts & kDepthwise) != 0 ? step.main.mid_channels
                                                                         : step.main.out_channels);
    int64_t expand = 0, rest = 0;  // multiply-adds of a pixel of the input, and of the result
    UnitWork work{step.stride, 0, 0, 0, 0, 0};
    for (const Branch* branch : {&step.main, &step.projection}) {
      if ((branch->parts & kDepthwise) != 0) {
        const int64_t reach = depthwise_shape(*branch, extent_, step.stride).reach();
        work.reach = std::max(work.reach, reach);
        rest += branch->mid_channels * branch->window * branch->window;
      }
      if ((branch->parts & kExpand) != 0) {
        const int64_t pixel = work_of(branch->pw1, branch->in_channels, branch->mid_channels);
        expand += pixel;
        work.expand += pixel / panels_of(branch->mid_channels) * extent_.width;
        work.exchange += branch->in_channels * extent_.pixels();
      }
      if ((branch->parts & kProject) != 0) {
        const int64_t depth = lanes[branch != &step.main].pw2.depth;
        const int64_t pixel = work_of(branch->pw2, depth, branch->out_channels);
        rest += pixel;
        work.weights += pixel;
        work.exchange += depth * out.pixels();
      }
    }
    work.rest = rest / panels * out.width;
    work.weights += expand;
    const int64_t total = expand * extent_.pixels() + rest * out.pixels();
    const Grid grid(threads_for(total), panels, out.height, work);
    // Panels of part i.
    const auto share = [&](int64_t count, int64_t i) {
      return part_of(count, grid.panel_parts, i % grid.panel_parts);
    };
    const auto depthwise_part = [&](int64_t i) {
      for (const Lane& lane : lanes) {
        if ((lane.parts & (kDepthwise | kPool)) == 0) continue;
        const Range taken = share(lane.panels, i);
        if ((lane.parts & kPool) != 0) {
          kernels_.average_pool(lane.pool, taken, grid.row_range(i));
        } else if ((lane.parts & kExpand) != 0) {
          kernels_.expand_depthwise(lane.expand, taken, grid.row_range(i), scratch(i));
        } else {
          kernels_.panel_depthwise(lane.depthwise, taken, grid.row_range(i), scratch(i));
        }
      }
    };
    const auto last_part = [&](int64_t i) {
      const Range rows = grid.row_range(i);
      const Range pixels{rows.begin * out.width, rows.end * out.width};
      for (const Lane& lane : lanes) {
        if ((lane.parts & kProject) == 0) continue;
        kernels_.pointwise(lane.pw2, share(panels_of(lane.pw2.outputs), i), pixels);
      }
    };
    if (grid.panel_parts == 1 || !(meets(step.main) || meets(step.projection))) {
      parallel_for_(grid.parts(), [&](int64_t i) {
        depthwise_part(i);
        last_part(i);
      });
    } else {
      parallel_for_(grid.parts(), depthwise_part);
      parallel_for_(grid.parts(), last_part);
    }
    if (step.new_buffer) std::swap(current_, spare_);
  }

  void gate(const Step& step) {
    const Branch& main = step.main;
    const int64_t pixels = extent_.pixels();
    const int64_t panels = panels_of(main.out_channels);
    T* const map = current_ + main.out_panel * pixels * kPanel;
    float* const means = reinterpret_cast<float*>(depthwise_);
    float* const scales = means + panels * kPanel;
    const int64_t parts = std::min(threads_for(pixels * main.out_channels * 8), panels);
    const bool scaled = main.mid_channels > 0, adds = main.depth > 0;
    if (scaled) {
      const Gate op{means,
                    plan_.table(main.in_table),
                    main.in_channels,
                    weights_ + main.pw1.weights,
                    act(main.pw1),
                    main.mid_channels,
                    weights_ + main.pw2.weights,
                    act(main.pw2),
                    main.out_channels,
                    scales + panels * kPanel,
                    scales};
      parallel_for_(
          parts, [&](int64_t i) { kernels_.means(map, pixels, part_of(panels, parts, i), means); });
      parallel_for_(1, [&](int64_t) { kernels_.gate(op); });
    }
    if (adds) plane_offsets(plan_.table(main.table), main.depth, pixels, offsets_);
    const Scale<T> op{map,
                      pixels,
                      main.out_channels,
                      scaled ? scales : nullptr,
                      adds ? current_ : nullptr,
                      offsets_,
                      act(main.dw)};
    parallel_for_(parts, [&](int64_t i) { kernels_.scale(op, part_of(panels, parts, i)); });
  }

  void head(const Step& step) {
    const Branch& main = step.main;
    const int64_t pixels = extent_.pixels();
    if ((main.parts & kPool) != 0) return mean_features(main, pixels);
    plane_offsets(plan_.table(main.in_table), main.in_channels, pixels, offsets_);
    // Features lie in panels whose "pixels" are the images, ready for the last product.
    const Pointwise<T, T> op{current_,
                             offsets_,
                             main.in_channels,
                             main.mid_channels,
                             weights_ + main.pw1.weights,
                             features_ + image_ * kPanel,
                             x_.batch * kPanel,
                             pixels,
                             act(main.pw1)};
    const int64_t panels = panels_of(main.mid_channels);
    const int64_t parts =
        std::min(threads_for(main.in_channels * main.mid_channels * pixels), panels);
    parallel_for_(parts,
                  [&](int64_t i) { kernels_.pointwise_mean(op, part_of(panels, parts, i)); });
  }

  void mean_features(const Branch& head, int64_t pixels) {
    float* const means = reinterpret_cast<float*>(depthwise_);
    const int64_t parts = std::min(threads_for(pixels * panels_ * kPanel), panels_);
    parallel_for_(parts, [&](int64_t i) {
      kernels_.means(current_, pixels, part_of(panels_, parts, i), means);
    });
    parallel_for_(1, [&](int64_t) {
      kernels_.mean_features(means, plan_.table(head.in_table), head.in_channels,
                             features_ + image_ * kPanel, x_.batch * kPanel);
    });
  }

  void export_planes(const Step& step) {
    const Branch& main = step.main;
    const int64_t pixels = extent_.pixels();
    plane_offsets(plan_.table(main.in_table), main.in_channels, pixels, offsets_);
    const int64_t parts = std::min(threads_for(pixels * main.in_channels * 8), pixels);
    parallel_for_(parts, [&](int64_t i) {
      kernels_.export_planes(current_, offsets_, weights_ + main.dw.weights, *result_, image_,
                             part_of(pixels, parts, i));
    });
    ++result_;
  }

  const Plan& plan_;
  const MapKernels<T>& kernels_;
  const float* weights_;
  const FeatureMap& x_;
  const FeatureMap* results_;
  const Memory& memory_;
  T* features_;
  Team& parallel_for_;
  T* current_;  // buffer that holds the map now
  T* spare_;    // buffer for the next stage's
  T* depthwise_;
  int32_t* offsets_;
  float* scratch_;
  const FeatureMap* result_ = nullptr;  // that the next export writes
  int64_t image_ = 0;
  int64_t panels_ = 0;  // of the current buffer
  Extent extent_{0, 0};
};

template <class T>
void classify(const Branch& head, const Kernels& kernels, const float* weights,
              const Memory& memory, float* features, const FeatureMap& out, Team& parallel_for) {
  float* const classes = features + memory.features;
  int32_t* const offsets = reinterpret_cast<int32_t*>(classes + memory.classes);
  constexpr int64_t kPlanes = sizeof(float) / sizeof(T);
  parallel_for(
      1, [&](int64_t) { consecutive_offsets(head.mid_channels, kPlanes, out.batch, offsets); });
  const Pointwise<T, float> op{reinterpret_cast<T*>(features),
                               offsets,
                               ceil_div(head.mid_channels, kPlanes),
                               head.out_channels,
                               weights + head.pw2.weights,
                               classes,
                               out.batch * kPanel,
                               out.batch,
                               act_of(head.pw2, weights)};
  const int64_t panels = panels_of(head.out_channels);
  const int64_t work = head.mid_channels * head.out_channels * out.batch;
  const int64_t parts = std::min({parallel_for.threads, 1 + work / kMinWork, panels});
  parallel_for(parts, [&](int64_t i) {
    maps_of<T>(kernels)->linear(op, part_of(panels, parts, i), Range{0, out.batch});
  });
  // The result is one image of [classes, batch] pixels, written transposed.
  const FeatureMap transposed{out.data, out.dtype, Layout::kChannelsLast, 1, head.out_channels,
                              1,        out.batch};
  parallel_for(1, [&](int64_t) {
    consecutive_offsets(head.out_channels, 1, out.batch, offsets);
    kernels.float32->export_planes(classes, offsets, nullptr, transposed, 0, Range{0, out.batch});
  });
}

// Images that are taken through the network side by side.
int64_t images_at_once(int64_t batch, int64_t threads) { return batch >= threads ? threads : 1; }

int64_t workspace_floats(const Memory& memory, const Plan& plan, int64_t batch, int64_t threads) {
  const int64_t images = images_at_once(batch, threads);
  // Side by side, each image needs one thread's memory; the images left over need all threads'.
  const int64_t body =
      images * memory.per_image(1) + (threads - 1) * (memory.offsets + memory.scratch);
  const Step& tail = plan.end()[-1];
  const int64_t head_offsets =
      plan.header().classify ? std::max(tail.main.mid_channels, tail.main.out_channels) : 0;
  const int64_t counters =
      team_counters(threads) * static_cast<int64_t>(sizeof(TeamCounter) / sizeof(float));
  return counters + body + memory.features + memory.classes + aligned(head_offsets);
}

void check_io(const Plan& plan, const FeatureMap& x, const FeatureMap* results,
              int64_t result_count) {
  if (x.channels != plan.header().in_channels || x.height < 1 || x.width < 1) {
    throw std::invalid_argument("x does not fit the plan");
  }
  if (result_count != plan.result_count()) {
    throw std::invalid_argument("results are not as many as the plan's");
  }
  const bool bytes = x.dtype == DType::kUint8;
  if (bytes && (plan.element() != DType::kUint8 || plan.begin()->kind != StepKind::kStem)) {
    throw std::invalid_argument("x is of bytes, which only a whole network of integers takes");
  }
  const DType dtype = bytes && result_count > 0 ? results[0].dtype : x.dtype;
  Extent extent{x.height, x.width};
  for (const Step& step : plan) {
    extent = extent_after(step, extent);
    if (step.kind != StepKind::kExport && step.kind != StepKind::kHead) continue;
    if (step.kind == StepKind::kHead) extent = {1, 1};
    const FeatureMap& out = *results++;
    if (out.batch != x.batch || out.channels != step.main.out_channels ||
        out.height != extent.height || out.width != extent.width || out.dtype != dtype ||
        dtype == DType::kUint8) {
      throw std::invalid_argument("out does not fit the plan and x");
    }
  }
}

// The network on a workspace that is large enough.
template <class T>
void run_on(const Kernels& kernels, const Plan& plan, const float* weights, const FeatureMap& x,
            const FeatureMap* results, void* workspace, const ParallelFor& parallel_for) {
  const int64_t threads = parallel_for.threads;
  const MapKernels<T>& maps = *maps_of<T>(kernels);
  const Memory memory = plan_memory(plan, x.batch, {x.height, x.width});
  const int64_t images = images_at_once(x.batch, threads);
  auto* const counters = static_cast<TeamCounter*>(workspace);
  for (int64_t i = 0; i < team_counters(threads); ++i) new (counters + i) TeamCounter;
  float* const base = reinterpret_cast<float*>(counters + team_counters(threads));
  float* const features =
      base + images * memory.per_image(1) + (threads - 1) * (memory.offsets + memory.scratch);
  const auto runner_at = [&](int64_t place, Team& team) {
    return ImageRunner<T>(plan, maps, weights, x, results, memory,
                          base + place * memory.per_image(1), reinterpret_cast<T*>(features), team);
  };

  parallel_for(threads, [&](int64_t member) {
    Team team(counters, threads, member);
    // Whole images side by side
    int64_t done = 0;
    if (images > 1) {
      done = x.batch - x.batch % images;
      team(images, [&](int64_t i) {
        Team alone;
        ImageRunner<T> runner = runner_at(i, alone);
        for (int64_t image = i; image < done; image += images) runner.run(image);
      });
    }
    // The rest one by one, each split over the threads
    ImageRunner<T> runner = runner_at(0, team);
    for (int64_t image = done; image < x.batch; ++image) runner.run(image);

    const Step& tail = plan.end()[-1];
    if (tail.kind == StepKind::kHead) {
      classify<T>(tail.main, kernels, weights, memory, features, results[plan.result_count() - 1],
                  team);
    }
  });
}

}  // namespace

int64_t workspace_bytes(const Plan& plan, int64_t batch, int64_t height, int64_t width,
                        int64_t threads) {
  // Offsets are 32-bit: one image's planes must stay below 2^31 elements. The first comparison
  // keeps the products that follow from overflowing.
  constexpr int64_t kMaxFloats = std::numeric_limits<int32_t>::max();
  const bool sane = batch >= 0 && height > 0 && width > 0 && threads > 0 && threads < 65536 &&
                    height < kMaxFloats && width < kMaxFloats / height && batch < kMaxFloats;
  if (!sane) throw std::invalid_argument("workspace_bytes: extents out of range");
  const Memory memory = plan_memory(plan, batch, {height, width});
  const int64_t map = std::max({memory.buffer, memory.depthwise, memory.features});
  if (map >= kMaxFloats / planes_in_word(plan.element()) ||
      std::max(memory.scratch, memory.classes) >= kMaxFloats) {
    throw std::invalid_argument("one image's feature maps exceed 2^31 elements");
  }
  return workspace_floats(memory, plan, batch, threads) * static_cast<int64_t>(sizeof(float));
}

void run_network(const Plan& plan, const float* weights, const FeatureMap& x,
                 const FeatureMap* results, int64_t result_count, void* workspace,
                 int64_t workspace_size, const ParallelFor& parallel_for) {
  check_io(plan, x, results, result_count);
  const Kernels& table = kernels();
  if (plan.element() == DType::kBFloat16 && table.bfloat16 == nullptr) {
    throw std::runtime_error(
        std::string("plan: it is for bfloat16, which the instruction set in use, ") + table.name +
        ", cannot multiply; avx512_bf16 and neon_bf16 can");
  }
  const int64_t threads = parallel_for.threads;
  if (workspace_size < workspace_bytes(plan, x.batch, x.height, x.width, threads)) {
    throw std::invalid_argument("workspace is smaller than workspace_bytes()");
  }
  if (x.batch == 0) return;
  const auto run = plan.element() == DType::kFloat32    ? run_on<float>
                   : plan.element() == DType::kBFloat16 ? run_on<BFloat16>
                                                        : run_on<UInt8>;
  run(table, plan, weights, x, results, workspace, parallel_for);
}

}  // namespace snv2::cpu

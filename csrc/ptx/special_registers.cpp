// Registers that tell a thread where it is: %tid.x and the like. Blocks have one dimension, grids
// two.
#include <algorithm>

#include "ptx/machine.h"
#include "ptx/statements.h"

namespace snv2::ptx {
namespace {

struct SpecialRegister {
  std::string_view name;
  uint32_t (*value)(const Warp& w, uint32_t lane);
};

uint32_t zero(const Warp&, uint32_t) { return 0; }
uint32_t one(const Warp&, uint32_t) { return 1; }
uint64_t grid_barrier(const Warp& w) {
  return reinterpret_cast<uint64_t>(w.launch->grid_barrier.data());
}

constexpr SpecialRegister kRegisters[] = {
    {"%tid.x", [](const Warp& w, uint32_t lane) { return kLanes * w.index + lane; }},
    {"%tid.y", zero},
    {"%tid.z", zero},
    {"%ntid.x", [](const Warp& w, uint32_t) { return w.launch->shape.threads; }},
    {"%ntid.y", one},
    {"%ntid.z", one},
    {"%ctaid.x", [](const Warp& w, uint32_t) { return w.cta->x; }},
    {"%ctaid.y", [](const Warp& w, uint32_t) { return w.cta->y; }},
    {"%ctaid.z", zero},
    {"%nctaid.x", [](const Warp& w, uint32_t) { return w.launch->shape.grid_x; }},
    {"%nctaid.y", [](const Warp& w, uint32_t) { return w.launch->shape.grid_y; }},
    {"%nctaid.z", one},
    {"%cluster_ctarank", [](const Warp& w, uint32_t) { return w.cta->rank; }},
    // Where cooperative groups keep the barrier of a grid.
    {"%envreg1",
     [](const Warp& w, uint32_t) { return static_cast<uint32_t>(grid_barrier(w) >> 32); }},
    {"%envreg2", [](const Warp& w, uint32_t) { return static_cast<uint32_t>(grid_barrier(w)); }},
};

}  // namespace

int special_index(std::string_view name) {
  const auto found = std::find_if(std::begin(kRegisters), std::end(kRegisters),
                                  [&](const SpecialRegister& r) { return r.name == name; });
  return found == std::end(kRegisters) ? -1 : static_cast<int>(found - std::begin(kRegisters));
}

uint32_t special_value(int index, const Warp& w, uint32_t lane) {
  return kRegisters[index].value(w, lane);
}

}  // namespace snv2::ptx

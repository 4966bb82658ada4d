// Lanes that read each other, and the cluster's CTAs.
#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// a of another lane: b says which, c the bounds of its segment (PTX ISA, shfl.sync). Operand 1 of
// the list is the predicate of p|q.
template <Shuffle kMode>
void shuffle(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const a = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const b = lanes_at<uint32_t>(w, i.b);
  const uint32_t* const c = lanes_at<uint32_t>(w, i.c);
  alignas(Block) uint32_t d[kLanes] = {};
  uint32_t inside = 0;
  for_lanes(mask, [&](uint32_t l) {
    const uint32_t offset = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const uint32_t first = l & segment, last = first | (clamp & ~segment);
    uint32_t from = l;
    bool fits = false;
    switch (kMode) {
      case Shuffle::kUp:
        fits = l >= last + offset;
        from = l - offset;
        break;
      case Shuffle::kDown:
        fits = l + offset <= last;
        from = l + offset;
        break;
      case Shuffle::kButterfly:
        fits = (l ^ offset) <= last;
        from = l ^ offset;
        break;
      case Shuffle::kIndex:
        from = first | (offset & ~segment);
        fits = from <= last;
        break;
    }
    if (!fits) from = l;
    if ((mask >> from & 1) == 0) {
      fault(w, i, l, "shfl reads lane " + std::to_string(from) + ", which does not take part");
    }
    d[l] = a[from];
    inside |= uint32_t{fits} << l;
  });
  put(w, i.d, d, mask);
  const Place q = operand_of(w, i, 1);
  if (q != kNowhere) put_predicate(w, q, inside, mask);
}

// The address a in CTA b of the cluster.
void map_to_rank(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* const a = lanes_at<uint64_t>(w, i.a);
  const uint32_t* const b = lanes_at<uint32_t>(w, i.b);
  alignas(Block) uint64_t d[kLanes] = {};
  for_lanes(mask, [&](uint32_t l) {
    if ((a[l] & kWindows) != kSharedWindow) fault(w, i, l, "mapa of no shared memory");
    if (b[l] >= w.launch->shape.cluster) fault(w, i, l, "mapa to a CTA that is not in the cluster");
    const uint64_t offset = a[l] & ((1u << kRankShift) - 1);
    d[l] = kSharedWindow | (uint64_t{b[l]} + 1) << kRankShift | offset;
  });
  put(w, i.d, d, mask);
}

void wait_for_grid(Warp& w, const Instruction&, uint32_t) {
  w.waited = w.launch->any_waited = true;
}

void do_nothing(Warp&, const Instruction&, uint32_t) {}

}  // namespace

void add_lanes(Operations& all) {
  all["shfl.up"] = shuffle<Shuffle::kUp>;
  all["shfl.down"] = shuffle<Shuffle::kDown>;
  all["shfl.bfly"] = shuffle<Shuffle::kButterfly>;
  all["shfl.idx"] = shuffle<Shuffle::kIndex>;
  all["mapa.u64"] = map_to_rank;
  all["griddepcontrol.wait"] = wait_for_grid;
  all["griddepcontrol.launch_dependents"] = do_nothing;
  all["bar.warp"] = do_nothing;
}

}  // namespace snv2::ptx
